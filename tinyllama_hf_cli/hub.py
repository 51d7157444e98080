"""`tinyllama-hf publish`."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def publish(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a pretraining run, or of one model: fine-tuned, converted, quantized, an adapter."
        ),
    ],
    repo: Annotated[str, typer.Option(help="USER/NAME on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="License of the weights, as the Hub names it: apache-2.0, mit, ...; default: what the card on the Hub has."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="USER/NAME of the model that a folder was made from, where the folder does not have it."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and say what would go where; needs neither Hub nor token."),
    ] = False,
) -> None:
    """Publish a run: each milestone a revision of its name, the newest on main, with a card made from the run's files.

    What the Hub has already is not sent again, so an interrupted upload resumes with the next call. License, text and files
    that were added on the Hub stay. No absolute path and no name of user or host is sent. Needs a token that may write, in
    HF_TOKEN or from `hf auth login`.

    Example: tinyllama-hf publish runs/demo/pretrain --repo me/my-model --private --dry-run
    """
    from huggingface_hub.utils import disable_progress_bars

    from tinyllama_hf.hub.publish import publish as run_publish

    if not sys.stderr.isatty():
        disable_progress_bars()
    run_publish(run, repo, private, license, dry_run, lambda line: print(line, flush=True), base_model)
