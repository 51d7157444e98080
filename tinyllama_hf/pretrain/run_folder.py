"""The folder of a run: made ready for a launch, kept from other launches, and marked when the run was asked to stop."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from .. import provenance
from ..errors import InputError
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
    with _locked(run.output):
        with full_disk_says(run.output):
            if overwrite:
                _empty(run.output)
            (run.output / STOPPED_FILE).unlink(missing_ok=True)
            # First of all, since it is what makes the folder a run that may be gone on with.
            provenance.write_text(run.output / CONFIG_FILE, training_yaml(run.config))
            write_run_record(run.output, run.record)
            (run.output / MILESTONES_FOLDER).mkdir(exist_ok=True)
            prune(run.output, run.config.checkpoints.keep, step)
        accelerator.wait_for_everyone()
        yield


def mark_stopped(output: Path, record: dict[str, Any]) -> None:
    """Leaves word that the run has saved and ended because it was asked to."""
    with full_disk_says(output / STOPPED_FILE):
        provenance.write_json(output / STOPPED_FILE, record)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[TextIO]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"output_dir {output}: cannot be written to ({error}); a run writes there: choose another"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"output_dir {output}: another process trains in this folder; wait for it") from error
        except OSError as error:  # a file system without locks, for one
            raise InputError(
                f"output_dir {output}: {output / '.lock'} cannot be locked ({error}), and without a lock two launches "
                "could train in one folder; choose a folder on a disk that has locks"
            ) from error
        yield lock


def _empty(output: Path) -> None:
    """Removes a run; what makes the folder one goes last, so that a killed removal can be repeated."""
    for path in sorted(output.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
