"""`tinyllama-hf publish`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .loading import import_libraries


def publish_command(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a pretraining run, or of one model: fine-tuned, converted, quantized or an adapter."
        ),
    ],
    repo: Annotated[str, typer.Option(help="USER/NAME on the Hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="License identifier of the Hub: apache-2.0, mit, ...; default: that of the card on the Hub."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="USER/NAME of the base model, if the folder does not record it."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything and print what would be uploaded; needs neither network nor token."
        ),
    ] = False,
) -> None:
    """Publish a run on the Hub: each milestone as a revision, the newest on main, with generated model cards.

    Files that the Hub already has are not uploaded again, so an interrupted upload resumes with the next call.
    License, text and files that were added on the Hub are kept. Absolute paths and the names of the user and the host
    are removed. Needs a token with write permission, in HF_TOKEN or from `hf auth login`.

    Example: tinyllama-hf publish runs/demo/pretrain --repo me/my-model --private --dry-run
    """
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.hub.access import check_repo

    if not run.is_dir():
        fix = f"a file, not a folder. Give the folder {run.parent.resolve()}" if run.exists() else "no such folder"
        raise InputError(f"run {run}: {fix}")
    check_repo(repo)
    if base_model is not None:
        check_repo(base_model.partition("@")[0], "--base-model")
    import_libraries()
    from huggingface_hub.utils import disable_progress_bars

    from tinyllama_hf.hub.publish import publish

    if not sys.stderr.isatty():
        disable_progress_bars()
    publish(run, repo, private, license, dry_run, lambda line: print(line, flush=True), base_model)
