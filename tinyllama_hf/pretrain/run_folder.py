"""The folder of a run: made ready for a launch, kept from other launches, and marked when the run was asked to stop."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import locked, write_json, write_text
from .checkpoints import full_disk_says, prune
from .milestones import CONFIG_FILE, MILESTONES_FOLDER
from .run_record import write_run_record
from .setup import Run, training_yaml


# There from the moment a run has stopped by request until it goes on. A batch system finds by it, in the run's own folder,
# whether to queue the job again: the exit status that says so does not get through `accelerate launch`.
STOPPED_FILE = "stopped.json"


@contextlib.contextmanager
def folder_of_one(run: Run, accelerator: Accelerator, overwrite: bool, step: int) -> Iterator[None]:
    """Makes the run's folder ready, and keeps other launches out of it.

    Args:
        run (`Run`): whose `output` is meant.
        accelerator (`Accelerator`): the processes; all of them enter.
        overwrite (`bool`): remove the run that lies there.
        step (`int`): after which the run goes on.

    Raises:
        InputError: if another launch trains there, or the folder cannot be used.
        FullDiskError: if nothing can be written there.
    """
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield
        return
    with locked(run.output / ".lock", f"output_dir {run.output}"):
        with full_disk_says(run.output):
            if overwrite:
                _empty(run.output)
            (run.output / STOPPED_FILE).unlink(missing_ok=True)
            # First of all, since it is what makes the folder a run that may be gone on with.
            write_text(run.output / CONFIG_FILE, training_yaml(run.config))
            write_run_record(run.output, run.record)
            (run.output / MILESTONES_FOLDER).mkdir(exist_ok=True)
            prune(run.output, run.config.checkpoints.keep, step)
        accelerator.wait_for_everyone()
        yield


def mark_stopped(output: Path, record: dict[str, Any]) -> None:
    """Leaves word that the run has saved and ended because it was asked to."""
    with full_disk_says(output / STOPPED_FILE):
        write_json(output / STOPPED_FILE, record)


def _empty(output: Path) -> None:
    """Removes a run; what makes the folder one goes last, so that a killed removal can be repeated."""
    for path in sorted(output.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
