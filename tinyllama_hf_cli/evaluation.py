"""`tinyllama-hf eval` and `tinyllama-hf report`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or names; or one run, for all its milestones.")],
    task: Annotated[
        str,
        typer.Option(
            help="bits_per_byte of held-out documents; commonsense: TinyLlama's seven tasks; "
            "replies of a chat model: do they end, and how likely are the true ones."
        ),
    ] = "bits_per_byte",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="bits_per_byte: prepared data whose held-out text is scored, repeatable; default: the run's. "
            "commonsense: folder with the tasks' rows, or embedded:sample, no benchmark; default: the Hub. "
            "replies: JSON lines of conversations; default: MODEL/validation.jsonl."
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="bits_per_byte: also fit a unigram and a 5-gram model on the text each milestone read."
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="commonsense: items of each task, the first ones; replies: conversations."),
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="commonsense: row of TinyLlama's table to compare with, see `list`.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="commonsense: rows of a forward pass; default: 8.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="commonsense: JSON lines file to write, with every item and its choices.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="replies: budget of a reply; default: 64.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write; default for a run: RUN/scores.json, of commonsense RUN/commonsense.json; "
            "for the replies of one folder: MODEL/replies.json."
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="bits_per_byte: score the milestones of a run as they appear, until the last."),
    ] = False,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="bits_per_byte: forget what the output file has, and score all again.")
    ] = False,
    every: Annotated[float | None, typer.Option(help="With --watch, seconds between two looks; default: 60.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Score models by stock transformers on the exported folders: bits per byte, the commonsense tasks by lm-eval, replies.

    Commonsense follows the published protocol: fp32, zero-shot, no begin-of-sequence. The output file is read first, and
    models that it has are not scored again.

    Example: tinyllama-hf eval runs/demo/pretrain --baselines
    """
    from tinyllama_hf.progress import quiet_library_bars

    own_options = {
        "bits_per_byte": {
            "--baselines": baselines or None,
            "--watch": watch or None,
            "--every": every,
            "--rescore": rescore or None,
        },
        "commonsense": {
            "--limit": limit,
            "--published": published,
            "--batch-size": batch_size,
            "--samples": samples,
        },
        "replies": {"--limit": limit, "--max-new-tokens": max_new_tokens},
    }
    _check_task(task, own_options)
    quiet_library_bars()
    if task == "commonsense":
        _commonsense(models, data or [], limit, published, batch_size, samples, output, device)
    elif task == "replies":
        _replies(models, data or [], limit, max_new_tokens, output, device)
    elif watch:
        _watch(models, data or [], baselines, every, output, device, rescore)
    else:
        _bits_per_byte(models, data or [], baselines, output, device, rescore)


def _check_task(task: str, own_options: dict[str, dict[str, Any]]) -> None:
    """Refuses an unknown task, and an option that is given but belongs to others."""
    from tinyllama_hf.errors import InputError, did_you_mean

    if task not in own_options:
        raise InputError(f"--task {task!r}: there is no such task{did_you_mean(task, own_options)}")
    given = {name for options in own_options.values() for name, value in options.items() if value is not None}
    for option in sorted(given - own_options[task].keys()):
        owners = " or ".join(name for name, options in own_options.items() if option in options)
        raise InputError(f"{option}: belongs to --task {owners}; leave it out, or choose that task")


def _bits_per_byte(
    models: list[str], data: list[str], baselines: bool, output: Path | None, device: str, rescore: bool
) -> None:
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.ladder import SCORES_FILE, score, the_run

    run = the_run(models)
    target = output or (run / SCORES_FILE if run else None)
    if target and target.is_dir():
        raise InputError(f"--output {target}: is a folder; name a file")
    scores = score(models, data, baselines, device, target, rescore)
    print(f"{'bits per byte':>13}  {'tokens':>12}  model")
    for row in sorted([*scores["baselines"], *scores["models"]], key=lambda row: row.get("tokens", 0)):
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        print(f"{row['bits_per_byte']:>13.4f}  {tokens:>12}  {row['name']}")
    if target:
        print(f"wrote {target}")


def _watch(
    models: list[str],
    data: list[str],
    baselines: bool,
    every: float | None,
    output: Path | None,
    device: str,
    rescore: bool,
) -> None:
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.ladder import SCORES_FILE, watch

    if len(models) != 1 or data or baselines:
        raise InputError("--watch: takes one run and its own data; leave out other models, --data and --baselines")
    if every is not None and every <= 0:
        raise InputError(f"--every {every}: must be above 0")
    run = Path(models[0])
    target = output or run / SCORES_FILE
    watch(run, device, target, every or 60, lambda line: print(line, flush=True), rescore)
    print(f"wrote {target}")


def _commonsense(
    models: list[str],
    data: list[str],
    limit: int | None,
    published: str | None,
    batch_size: int | None,
    samples: Path | None,
    output: Path | None,
    device: str,
) -> None:
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.commonsense import score_commonsense
    from tinyllama_hf.evaluation.harness import BATCH_SIZE
    from tinyllama_hf.evaluation.ladder import the_run
    from tinyllama_hf.evaluation.protocol import published_row
    from tinyllama_hf.evaluation.table import table_lines

    if len(data) > 1:
        raise InputError(f"--data {' '.join(data)}: commonsense reads one folder; name one")
    row = published_row(published) if published is not None else None
    run = the_run(models)
    target = output or (run / "commonsense.json" if run else None)
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    scores = score_commonsense(models, data[0] if data else None, limit, batch_size, device, target, samples, print)
    for line in table_lines(scores, row):
        print(line)
    for path in filter(None, (target, samples)):
        print(f"wrote {path}")


def _replies(
    models: list[str], data: list[str], limit: int | None, max_new_tokens: int | None, output: Path | None, device: str
) -> None:
    from tinyllama_hf import provenance
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.replies import MAX_NEW_TOKENS, score

    if len(data) > 1:
        raise InputError(f"--data {' '.join(data)}: replies reads one file; name one")
    target = output or (Path(models[0]) / "replies.json" if len(models) == 1 and Path(models[0]).is_dir() else None)
    if target and target.is_dir():
        raise InputError(f"--output {target}: is a folder; name a file")
    budget = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    scores = score(models, data[0] if data else None, limit, budget, device)
    print(f"{'replies':>7}  {'end in time':>11}  {'median length':>13}  {'loss of true replies':>20}  model")
    for row in scores["models"]:
        print(
            f"{row['replies']:>7}  {row['stop_rate']:>11.1%}  {row['median_length']:>13g}  {row['loss']:>20.4f}  {row['name']}"
        )
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        provenance.write_json(target, scores)
        print(f"wrote {target}")


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a pretraining run, with scores.json from `eval`.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Continued by every milestone, repeatable.")] = None,
    stages: Annotated[
        Path | None, typer.Option(help="File of stage names and seconds, as the demo writes it.")
    ] = None,
    chat: Annotated[
        Path | None, typer.Option(help="Model fine-tuned from the run, scored with `eval --task replies`.")
    ] = None,
) -> None:
    """Tell the story of a run in pictures: one page that opens in any browser, and the pictures beside it.

    Example: tinyllama-hf report runs/demo/pretrain --output runs/demo/report --prompt "def main():"
    """
    from rich.console import Console

    from tinyllama_hf.progress import quiet_library_bars
    from tinyllama_hf.report.page import write_report

    quiet_library_bars()
    with Console().status("Drawing, and continuing the prompts"):
        page = write_report(run, output, prompt or (), stages, chat)
    print(f"wrote {page}")
