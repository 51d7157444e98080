"""`tinyllama-hf eval` and `tinyllama-hf report`."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or names; or one run, for all its milestones.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Prepared data whose held-out text is scored, repeatable; default: the run's."),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also fit a unigram and a 5-gram model on the text each milestone read."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write; default for a run: RUN/scores.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Bits per byte on held-out documents, computed by stock transformers on the exported folders.

    Example: tinyllama-hf eval runs/demo/pretrain --baselines
    """
    from tinyllama_hf import provenance
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.ladder import score
    from tinyllama_hf.pretrain.checkpoints import MILESTONES_FOLDER
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    is_run = len(models) == 1 and (Path(models[0]) / MILESTONES_FOLDER).is_dir()
    target = output or (Path(models[0]) / "scores.json" if is_run else None)
    if target and target.is_dir():
        raise InputError(f"--output {target}: is a folder; name a file")
    scores = score(models, data or (), baselines, device)
    if target and target.is_file() and not baselines:
        # They depend on the run and the data alone, and cost more than the models.
        before = provenance.read_json(target)
        scores["baselines"] = before["baselines"] if before["data"] == scores["data"] else []
    print(f"{'bits per byte':>13}  {'tokens':>12}  model")
    for row in sorted([*scores["baselines"], *scores["models"]], key=lambda row: row.get("tokens", 0)):
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        print(f"{row['bits_per_byte']:>13.4f}  {tokens:>12}  {row['name']}")
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
) -> None:
    """Tell the story of a run in pictures: one page that opens in any browser, and the pictures beside it.

    Example: tinyllama-hf report runs/demo/pretrain --output runs/demo/report --prompt "def main():"
    """
    from rich.console import Console

    from tinyllama_hf.progress import quiet_library_bars
    from tinyllama_hf.report.page import write_report

    quiet_library_bars()
    with Console().status("Drawing, and continuing the prompts"):
        page = write_report(run, output, prompt or (), stages)
    print(f"wrote {page}")
