"""`tinyllama-hf eval` and `tinyllama-hf report`."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .loading import ADAPTER, DEVICE, QUANTIZATION, import_libraries, note


class _EvalGroup(TyperGroup):
    """Also accepts the spelling of version 0.1, `eval MODEL... [--task TASK]`, which the next version removes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer 0.29 has its own, private copy of click
        if args and not ctx.resilient_parsing and self._is_old_spelling(args[0]):
            import shlex

            args = _new_spelling(args)
            print(
                f"note: this spelling is deprecated. Use: {shlex.join(['tinyllama-hf', 'eval', *args])}",
                file=sys.stderr,
            )
        return super().parse_args(ctx, args)

    def _is_old_spelling(self, word: str) -> bool:
        import difflib

        near = difflib.get_close_matches(word, self.commands, cutoff=0.7)
        misspelt = near and not word.startswith("-") and not Path(word).exists()
        return word not in {*self.commands, "--help"} and not misspelt


def _new_spelling(args: list[str]) -> list[str]:
    """Returns the arguments with a sub-command in place of `--task TASK`, which defaulted to bits_per_byte."""
    from tinyllama_hf.errors import InputError, did_you_mean

    tasks = {"bits_per_byte": "text", "commonsense": "tasks", "replies": "replies"}
    task, words = "bits_per_byte", iter(args)
    others = []
    for word in words:
        if word.partition("=")[0] == "--task":
            task = (word.partition("=")[2] or next(words, "")).replace("-", "_")
        else:
            others.append(word)
    if task not in tasks:
        raise InputError(f"--task {task!r}: unknown task{did_you_mean(task, tasks)}")
    return [tasks[task], *others]


app = typer.Typer(
    cls=_EvalGroup,
    help="Score models with stock transformers: bits per byte on held-out text, lm-eval tasks, replies of chat "
    "models.\n\n"
    "Example: tinyllama-hf eval text runs/demo/pretrain --baselines",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
MODELS = Annotated[list[str], typer.Argument(help="Model folders or names, or one run, for all its milestones.")]
RESCORE = Annotated[bool, typer.Option("--rescore", help="Score models in the output file again.")]
OUTPUT = "JSON file to write; default for {}. With --quantization nf4: {}-nf4.json."


@app.command("text")
def eval_text_command(
    models: MODELS,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Prepared data set with held-out text, repeatable; default for a run: its training data."),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="Also fit a unigram and a 5-gram model to the training text of each milestone."
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Score the milestones of a run as they appear, until the last one.")
    ] = False,
    every: Annotated[float, typer.Option(help="With --watch, seconds between checks for new milestones.")] = 60,
    max_bytes: Annotated[
        str, typer.Option(help="Sample size per data set in UTF-8 bytes, such as 500k, or all for everything.")
    ] = "2_000_000",
    rescore: RESCORE = False,
    output: Annotated[Path | None, typer.Option(help=OUTPUT.format("a run: RUN/scores.json", "scores"))] = None,
    quantization: QUANTIZATION = "none",
    dtype: Annotated[str, typer.Option(help="Dtype of weights and computation: fp32 or bf16.")] = "fp32",
    device: DEVICE = "auto",
) -> None:
    """Bits per byte on held-out documents. Models in the output file are not scored again.

    For large data sets, a sample of 2 MB is scored. It is chosen by the hashes of the documents, so it is the same for
    all models and tokenizers.

    Example: tinyllama-hf eval text runs/demo/pretrain --baselines

    Example: tinyllama-hf eval text my-model other-model --data data/demo --max-bytes all
    """
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.held_out.held_out_text import parse_max_bytes
    from tinyllama_hf.evaluation.held_out.text_protocol import check_text_dtype
    from tinyllama_hf.pretrain.milestones import find_run

    if watch and (len(models) != 1 or data or baselines):
        raise InputError(
            "--watch takes one run and scores it on its own data. Remove other models, --data and --baselines"
        )
    if every <= 0:
        raise InputError(f"--every {every}: must be above 0")
    check_text_dtype(dtype)
    size = parse_max_bytes(max_bytes)
    if not watch:
        _check_models(models, device, quantization)
    import_libraries()
    from tinyllama_hf.evaluation import series
    from tinyllama_hf.evaluation.score_files import BaselineRow, TextRow
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    if watch:
        run = Path(models[0])
        watched = output or run / _file_name("scores", quantization)
        log = partial(print, flush=True)
        series.watch(run, device, watched, every, log, rescore, quantization, dtype, size)
        print(f"wrote {watched}")
        return
    target = _target(output, find_run(models), "scores", quantization)
    options: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "max_bytes": size}
    scores = series.score(models, data or [], baselines, device, target, rescore, **options)
    for text in scores.data:
        if text.max_bytes is not None:
            print(f"sample of {text.path}: {text.bytes:,} of {text.total_bytes:,} bytes")
    print(f"{'bits per byte':>13}  {'tokens':>12}  model")
    rows: list[TextRow | BaselineRow] = [*scores.baselines, *scores.models]
    for row in sorted(rows, key=lambda row: row.tokens or 0):
        tokens = f"{row.tokens:,}" if row.tokens is not None else ""
        print(f"{row.bits_per_byte:>13.4f}  {tokens:>12}  {row.name}")
    if target:
        print(f"wrote {target}")


@app.command("tasks")
def eval_tasks_command(
    models: MODELS,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Folder with the tasks' rows, or embedded:sample (not a benchmark); default: the Hub."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first N items of each task; default: all.")] = None,
    published: Annotated[
        str | None, typer.Option(help="Row of TinyLlama's table to compare with; see `tinyllama-hf list`.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="published (TinyLlama's table), modern (lm-eval's defaults), olmes or instruct.")
    ] = "published",
    task: Annotated[
        list[str] | None,
        typer.Option(help="lm-eval task or group, repeatable; default: those of the protocol."),
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with your own tasks, as lm-eval YAML files.")] = None,
    show: Annotated[int, typer.Option(help="Number of wrong answers to print per task, at most 10.")] = 0,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run code written by the model, in a sandbox (HumanEval).")
    ] = False,
    adapter: ADAPTER = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="JSON lines file to write, with all items and the log-likelihoods of their choices."),
    ] = None,
    rescore: RESCORE = False,
    output: Annotated[
        Path | None, typer.Option(help=OUTPUT.format("a run: RUN/commonsense.json", "commonsense"))
    ] = None,
    quantization: QUANTIZATION = "none",
    device: DEVICE = "auto",
    server: Annotated[
        str | None,
        typer.Option(help="Score the model behind this OpenAI-compatible server; MODEL provides the tokenizer."),
    ] = None,
    server_model: Annotated[
        str | None, typer.Option(help="Name of the model on the server; default: the only one it has.")
    ] = None,
) -> None:
    """lm-eval tasks: by default the seven commonsense tasks of TinyLlama's table, under its protocol.

    The published protocol is fp32, zero-shot, no begin-of-sequence. Models in the output file are not scored again.
    After an interruption, the same command resumes and repeats no request.

    Example: tinyllama-hf eval tasks my-model --data embedded:sample

    Example: tinyllama-hf eval tasks my-model --protocol modern --task mmlu --limit 100 --output mmlu.json

    For multiple choice, a server must return log-probabilities of prompts, as vLLM does. Its key is read from the
    environment variable OPENAI_API_KEY.

    Example: tinyllama-hf eval tasks step-50k-105b --published step-50k-105b

    Example: tinyllama-hf eval tasks my-model --server http://localhost:8000 --output served.json
    """
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.protocol import published_row
    from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
    from tinyllama_hf.pretrain.milestones import find_run

    folder = _one(data, "pass one folder")
    row = published_row(published) if published is not None else None
    _check_show(show)
    if published is not None:
        _check_published(published, protocol)
    definition = define_protocol(protocol, task or (), include)
    _check_models(models, device, quantization)
    loading = {"--quantization": quantization != "none", "--adapter": adapter, "--device": device != "auto"}
    _check_server(server, server_model, models, [option for option, is_given in loading.items() if is_given])
    import_libraries()
    from tinyllama_hf.evaluation.harness.served_model import find_served_model
    from tinyllama_hf.evaluation.harness.server_requests import ServerFailure
    from tinyllama_hf.evaluation.table import table_lines, wrong_item_lines
    from tinyllama_hf.evaluation.task_scores import score_tasks
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    name = "commonsense" if protocol == "published" and not task else f"tasks-{protocol}"
    target = _target(output, find_run(models) if not adapter and not server else None, name, quantization)
    served = find_served_model(models[0], server, server_model) if server else None
    try:
        scored = score_tasks(
            models,
            folder,
            limit,
            device,
            target,
            samples,
            print,
            quantization,
            adapter,
            definition,
            include,
            run_code,
            with_items=show > 0,
            server=served,
            rescore=rescore,
        )
    except ServerFailure as failure:
        raise InputError(f"{failure}; {_kept_answers(target, rescore)}") from failure
    except KeyboardInterrupt:
        note(f"interrupted; {_kept_answers(target, rescore)}")
        raise typer.Exit(130) from None
    for line in table_lines(scored.file, row):
        print(line)
    for model, items in zip(scored.file.models, scored.items, strict=True):
        for line in wrong_item_lines(model, items, show):
            print(line)
    for path in filter(None, (target, samples)):
        print(f"wrote {path}")


@app.command("harness", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def eval_harness_command(
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of lm-eval's own command line.")] = None,
) -> None:
    """lm-eval's own command line with this package's model as `--model tinyllama`.

    Its `--model_args` are pretrained, adapter, quantization, dtype, add_bos_token and max_length.

    Example: tinyllama-hf eval harness run --model tinyllama --model_args pretrained=my-model --tasks arc_easy
    """
    from tinyllama_hf.errors import require

    require("lm_eval", "eval", "the commonsense evaluation")
    import_libraries()
    from lm_eval.__main__ import cli_evaluate

    import tinyllama_hf.evaluation.harness.local_harness  # noqa: F401 - registers the model, which lm-eval 0.4.13 does not discover

    sys.argv = ["tinyllama-hf eval harness", *(arguments or [])]
    cli_evaluate()


@app.command("replies")
def eval_replies_command(
    models: Annotated[list[str], typer.Argument(help="Folders or names of chat models.")],
    data: Annotated[
        list[str] | None, typer.Option(help="JSON lines file of conversations; default: MODEL/validation.jsonl.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N conversations; default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per reply.")] = 64,
    output: Annotated[
        Path | None, typer.Option(help=OUTPUT.format("one folder: MODEL/replies.json", "replies"))
    ] = None,
    quantization: QUANTIZATION = "none",
    device: DEVICE = "auto",
) -> None:
    """Replies of chat models: the share that ends before the token limit, and the loss on the reference replies.

    Example: tinyllama-hf eval replies runs/demo/chat --limit 100

    Example: tinyllama-hf eval replies my-chat other-chat --data conversations.jsonl --output replies.json
    """
    file = _one(data, "pass one file")
    _check_models(models, device, quantization)
    import_libraries()
    from tinyllama_hf.finetune.replies import score_replies
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    folder = Path(models[0]) if len(models) == 1 and Path(models[0]).is_dir() else None
    target = _target(output, folder, "replies", quantization)
    rows = score_replies(models, file, limit, max_new_tokens, device, quantization, target)
    print(f"{'replies':>7}  {'end in time':>11}  {'median length':>13}  {'loss of true replies':>20}  model")
    for row in rows:
        figures = f"{row.replies:>7}  {row.stop_rate:>11.1%}  {row.median_length:>13g}  {row.loss:>20.4f}"
        print(f"{figures}  {row.name}")
    if target:
        print(f"wrote {target}")


def _check_models(models: list[str], device: str, quantization: str) -> None:
    """Checks models and options as far as possible without torch or a download."""
    from tinyllama_hf.devices import check_device
    from tinyllama_hf.pretrain.milestones import find_run
    from tinyllama_hf.quantization.names import check_quantization_name
    from tinyllama_hf.released import check_model

    check_device(device)
    check_quantization_name(quantization, device)
    if not find_run(models):
        for model in models:
            check_model(model)


def _check_show(show: int) -> None:
    from tinyllama_hf.errors import InputError

    if not 0 <= show <= 10:
        raise InputError(f"--show {show}: must be 0 to 10, since the texts of 10 wrong answers per task are kept")


def _check_published(published: str, protocol: str) -> None:
    from tinyllama_hf.errors import InputError

    if protocol != "published":
        raise InputError(
            f"--published {published}: its scores are under the published protocol, not under {protocol}. Remove one "
            "of these options"
        )


def _check_server(server: str | None, server_model: str | None, models: list[str], ignored: list[str]) -> None:
    """Checks the options of a server, which determines everything but the tokenizer."""
    from tinyllama_hf.errors import InputError, require

    if server is None:
        if server_model is not None:
            raise InputError(f"--server-model {server_model}: needs --server")
        return
    if len(models) != 1:
        raise InputError(f"--server {server}: takes one MODEL, for its tokenizer, not {len(models)}")
    if ignored:
        raise InputError(f"{', '.join(ignored)}: the model is loaded by --server {server}. Set this on the server")
    for package in ("aiohttp", "requests", "tenacity"):
        require(package, "eval", "--server")


def _kept_answers(target: Path | None, rescore: bool) -> str:
    """Returns which answers an interrupted `eval tasks` has kept, and how to resume."""
    from tinyllama_hf.evaluation.harness.kept_answers import answers_path, count_kept

    if target is None:
        return "no answers were kept. Pass --output FILE to keep them"
    count = count_kept(target)
    answers = f"{answers_path(target)} has {count} answers" if count else "no request was answered"
    models = f"{target} has the finished models, " if target.is_file() else ""
    return f"{models}{answers}. Run the same command{' without --rescore' if rescore else ''} to resume"


def _target(output: Path | None, folder: Path | None, name: str, quantization: str) -> Path | None:
    return output or (folder / _file_name(name, quantization) if folder else None)


def _file_name(name: str, quantization: str) -> str:
    """Returns the default name. `report` and `publish` read a file without a suffix as scores of the plain model."""
    return f"{name}.json" if quantization == "none" else f"{name}-{quantization}.json"


def _one(data: list[str] | None, rule: str) -> str | None:
    from tinyllama_hf.errors import InputError

    if data and len(data) > 1:
        raise InputError(f"--data {' '.join(data)}: {rule}")
    return data[0] if data else None


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a pretraining run, with scores.json from `eval text`; or several folders to compare."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="For one run: prompt for each milestone to continue, repeatable.")
    ] = None,
    stages: Annotated[
        Path | None, typer.Option(help="For one run: file with the names and seconds of the demo's stages.")
    ] = None,
    chat: Annotated[
        Path | None, typer.Option(help="For one run: model fine-tuned from it and scored with `eval replies`.")
    ] = None,
) -> None:
    """Write the report of a run, or a comparison of several runs: one HTML page, with its figures as PNG files.

    A comparison shows the losses over tokens and over hours, the results, and the differences between the recipes.

    Example: tinyllama-hf report runs/demo/pretrain --output runs/demo/report --prompt "def main():"

    Example: tinyllama-hf report runs/small runs/large --output runs/comparison
    """
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.report.run_names import name_runs

    name_runs(runs)
    if chat is not None and not chat.is_dir():
        raise InputError(f"--chat {chat}: no such folder")
    for option, value in (("--prompt", prompt), ("--stages", stages), ("--chat", chat)):
        if value and len(runs) > 1:
            raise InputError(f"{option}: is for the report of one run, not for {len(runs)}. Remove it")
    import_libraries()
    from tinyllama_hf.progress import quiet_library_bars, show_busy
    from tinyllama_hf.report.comparison import write_comparison
    from tinyllama_hf.report.page import write_report

    quiet_library_bars()
    log = partial(print, flush=True)
    if len(runs) > 1:
        page = write_comparison(runs, output, log)
    else:
        with show_busy("drawing figures and continuing the prompts"):
            page = write_report(runs[0], output, prompt or (), stages, chat, log)
    print(f"wrote {page}")
