"""`tinyllama-hf eval` and `tinyllama-hf report`."""

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from .loading import DEVICE, QUANTIZATION


MODELS = Annotated[list[str], typer.Argument(help="Model folders or names; or one run, for all its milestones.")]
TASK = Annotated[
    str,
    typer.Option(
        help="bits_per_byte of held-out documents; commonsense: TinyLlama's seven tasks; "
        "replies of a chat model: do they end, and how likely are the true ones."
    ),
]
DATA = Annotated[
    list[str] | None,
    typer.Option(
        help="bits_per_byte: prepared data whose held-out text is scored, repeatable; default: the run's. "
        "commonsense: folder with the tasks' rows, or embedded:sample, no benchmark; default: the Hub. "
        "replies: JSON lines of conversations; default: MODEL/validation.jsonl."
    ),
]
BASELINES = Annotated[
    bool,
    typer.Option(
        "--baselines", help="bits_per_byte: also fit a unigram and a 5-gram model on the text each milestone read."
    ),
]
LIMIT = Annotated[
    int | None, typer.Option(help="commonsense: items of each task, the first ones; replies: conversations.")
]
PUBLISHED = Annotated[
    str | None, typer.Option(help="commonsense: row of TinyLlama's table to compare with, see `list`.")
]
BATCH_SIZE = Annotated[int | None, typer.Option(help="commonsense: rows of a forward pass; default: 8.")]
SAMPLES = Annotated[
    Path | None, typer.Option(help="commonsense: JSON lines file to write, with every item and its choices.")
]
MAX_NEW_TOKENS = Annotated[int | None, typer.Option(help="replies: budget of a reply; default: 64.")]
OUTPUT = Annotated[
    Path | None,
    typer.Option(
        help="JSON file to write; default for a run: RUN/scores.json, of commonsense RUN/commonsense.json; "
        "for the replies of one folder: MODEL/replies.json. With --quantization nf4 scores-nf4.json, and so on."
    ),
]
WATCH = Annotated[
    bool, typer.Option("--watch", help="bits_per_byte: score the milestones of a run as they appear, until the last.")
]
RESCORE = Annotated[
    bool, typer.Option("--rescore", help="bits_per_byte: forget what the output file has, and score all again.")
]
EVERY = Annotated[float | None, typer.Option(help="With --watch, seconds between two looks; default: 60.")]


class _Options(NamedTuple):
    """What the command was given, by the names of its options."""

    models: list[str]
    task: str
    data: list[str]
    baselines: bool
    limit: int | None
    published: str | None
    batch_size: int | None
    samples: Path | None
    max_new_tokens: int | None
    output: Path | None
    watch: bool
    rescore: bool
    every: float | None
    quantization: str
    device: str


def evaluate(
    models: MODELS,
    task: TASK = "bits_per_byte",
    data: DATA = None,
    baselines: BASELINES = False,
    limit: LIMIT = None,
    published: PUBLISHED = None,
    batch_size: BATCH_SIZE = None,
    samples: SAMPLES = None,
    max_new_tokens: MAX_NEW_TOKENS = None,
    output: OUTPUT = None,
    watch: WATCH = False,
    rescore: RESCORE = False,
    every: EVERY = None,
    quantization: QUANTIZATION = "none",
    device: DEVICE = "auto",
) -> None:
    """Score models by stock transformers on the exported folders: bits per byte, the commonsense tasks by lm-eval, replies.

    Commonsense follows the published protocol: fp32, zero-shot, no begin-of-sequence. The output file is read first, and
    models that it has are not scored again.

    Example: tinyllama-hf eval runs/demo/pretrain --baselines
    """
    from tinyllama_hf.progress import quiet_library_bars

    options = _Options(
        models, task, data or [], baselines, limit, published, batch_size, samples, max_new_tokens, output, watch,
        rescore, every, quantization, device,
    )  # fmt: skip
    _check_task(options)
    quiet_library_bars()
    if task == "bits_per_byte":
        (_watch if watch else _bits_per_byte)(options)
    elif task == "commonsense":
        _commonsense(options)
    else:
        _replies(options)


_OWN_OPTIONS = {
    "bits_per_byte": ("baselines", "watch", "every", "rescore"),
    "commonsense": ("limit", "published", "batch_size", "samples"),
    "replies": ("limit", "max_new_tokens"),
}


def _check_task(options: _Options) -> None:
    """Refuses an unknown task, and an option that is given but belongs to others."""
    from tinyllama_hf.errors import InputError, did_you_mean

    if options.task not in _OWN_OPTIONS:
        raise InputError(f"--task {options.task!r}: there is no such task{did_you_mean(options.task, _OWN_OPTIONS)}")
    foreign = {name for names in _OWN_OPTIONS.values() for name in names} - {*_OWN_OPTIONS[options.task]}
    for name in sorted(foreign):
        value = getattr(options, name)
        if value is not None and value is not False:
            owners = " or ".join(task for task, names in _OWN_OPTIONS.items() if name in names)
            raise InputError(
                f"--{name.replace('_', '-')}: belongs to --task {owners}; leave it out, or choose that task"
            )


def _bits_per_byte(options: _Options) -> None:
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.models import the_run
    from tinyllama_hf.evaluation.series import SCORES_FILE, score

    run = the_run(options.models)
    target = options.output or (run / _default(SCORES_FILE, options) if run else None)
    if target and target.is_dir():
        raise InputError(f"--output {target}: is a folder; name a file")
    scores = score(
        options.models, options.data, options.baselines, options.device, target, options.rescore,
        quantization=options.quantization,
    )  # fmt: skip
    print(f"{'bits per byte':>13}  {'tokens':>12}  model")
    for row in sorted([*scores["baselines"], *scores["models"]], key=lambda row: row.get("tokens", 0)):
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        print(f"{row['bits_per_byte']:>13.4f}  {tokens:>12}  {row['name']}")
    if target:
        print(f"wrote {target}")


def _watch(options: _Options) -> None:
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.series import SCORES_FILE, watch

    if len(options.models) != 1 or options.data or options.baselines:
        raise InputError("--watch: takes one run and its own data; leave out other models, --data and --baselines")
    if options.every is not None and options.every <= 0:
        raise InputError(f"--every {options.every}: must be above 0")
    run = Path(options.models[0])
    target = options.output or run / _default(SCORES_FILE, options)
    watch(
        run, options.device, target, options.every or 60, lambda line: print(line, flush=True), options.rescore,
        options.quantization,
    )  # fmt: skip
    print(f"wrote {target}")


def _commonsense(options: _Options) -> None:
    from tinyllama_hf.evaluation import harness
    from tinyllama_hf.evaluation.commonsense import score_commonsense
    from tinyllama_hf.evaluation.models import the_run
    from tinyllama_hf.evaluation.protocol import published_row
    from tinyllama_hf.evaluation.table import table_lines

    data = _one(options.data, "commonsense reads one folder")
    row = published_row(options.published) if options.published is not None else None
    run = the_run(options.models)
    target = options.output or (run / _default("commonsense.json", options) if run else None)
    batch_size = harness.BATCH_SIZE if options.batch_size is None else options.batch_size
    scores = score_commonsense(
        options.models, data, options.limit, batch_size, options.device, target, options.samples, print,
        options.quantization,
    )  # fmt: skip
    for line in table_lines(scores, row):
        print(line)
    for path in filter(None, (target, options.samples)):
        print(f"wrote {path}")


def _replies(options: _Options) -> None:
    from tinyllama_hf import provenance
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.finetune import replies

    data, models = _one(options.data, "replies reads one file"), options.models
    folder = Path(models[0]) if len(models) == 1 and Path(models[0]).is_dir() else None
    target = options.output or (folder / _default("replies.json", options) if folder else None)
    if target and target.is_dir():
        raise InputError(f"--output {target}: is a folder; name a file")
    budget = replies.MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
    scores = replies.score(models, data, options.limit, budget, options.device, options.quantization)
    print(f"{'replies':>7}  {'end in time':>11}  {'median length':>13}  {'loss of true replies':>20}  model")
    for row in scores["models"]:
        print(
            f"{row['replies']:>7}  {row['stop_rate']:>11.1%}  {row['median_length']:>13g}  {row['loss']:>20.4f}  {row['name']}"
        )
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        provenance.write_json(target, scores)
        print(f"wrote {target}")


def _default(file: str, options: _Options) -> str:
    """Name of the score file if none is given; report and card read the plain one as scores of the plain model."""
    return file if options.quantization == "none" else f"{Path(file).stem}-{options.quantization}.json"


def _one(data: list[str], rule: str) -> str | None:
    from tinyllama_hf.errors import InputError

    if len(data) > 1:
        raise InputError(f"--data {' '.join(data)}: {rule}; name one")
    return data[0] if data else None


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
