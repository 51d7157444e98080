"""The folder of a run: prepared for a launch, locked against other launches, and marked when the run was stopped."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from ..files import locked, write_text
from .checkpoints import prune_checkpoints, translate_write_errors
from .milestones import CONFIG_FILE, MILESTONES_FOLDER
from .run_record import write_run_record
from .setup import PretrainRun


# Present from the time that a run was stopped by a signal until it resumes. It tells a batch job to requeue itself,
# since `accelerate launch` does not pass on the exit status of the script.
STOPPED_FILE = "stopped.json"


@contextlib.contextmanager
def lock_run_folder(run: PretrainRun, accelerator: Accelerator, overwrite: bool, step: int) -> Iterator[None]:
    """Prepares the folder of a run, and locks it against other launches until the context ends.

    Args:
        run (`PretrainRun`): has the folder.
        accelerator (`Accelerator`): all of its processes must call this.
        overwrite (`bool`): remove an existing run.
        step (`int`): the last finished step.

    Raises:
        InputError: if another launch is training in the folder, or it cannot be locked.
        FullDiskError: if it cannot be written to.
    """
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield
        return
    with locked(run.output / ".lock", f"output_dir {run.output}"):
        with translate_write_errors(run.output):
            if overwrite:
                empty_run_folder(run.output)
            (run.output / STOPPED_FILE).unlink(missing_ok=True)
            # Written first, since a folder that has this file is recognized as a run and can be resumed.
            write_text(run.output / CONFIG_FILE, run.config.to_yaml())
            write_run_record(run.output, run.record)
            (run.output / MILESTONES_FOLDER).mkdir(exist_ok=True)
            prune_checkpoints(run.output, run.config.checkpoints.keep, step)
        accelerator.wait_for_everyone()
        yield


def empty_run_folder(output: Path) -> None:
    """Removes a run. The file that marks it as a run goes last, so that an interrupted removal can be repeated."""
    for path in sorted(output.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
