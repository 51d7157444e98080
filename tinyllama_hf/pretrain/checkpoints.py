"""Rolling checkpoints: what a stopped run goes on from, bit for bit.

A checkpoint is a folder `checkpoints/step-N` of files from torch.distributed.checkpoint (model and optimiser, in whatever
parts the processes hold, loadable by any other number of processes) and `checkpoint.json`, which says what they are and
lists their sizes and checksums. It is written under a temporary name, synchronised to the disk and renamed: whatever bears
the name is complete.
"""

import contextlib
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .. import provenance
from ..errors import InputError
from .step import TrainStep


CHECKPOINTS_FOLDER = "checkpoints"
TRAINING_STATE_FOLDER = "training_state"  # beside the milestones: what a branch begins with
RECORD_FILE = "checkpoint.json"
FORMAT_VERSION = 1
BYTES_PER_PARAMETER = 12  # weight and two moments, all fp32


class FullDiskError(RuntimeError):
    """A checkpoint or milestone could not be written, as a rule because the disk is full; those before it are whole."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(
            f"{folder}: could not be written ({reason}); the checkpoints before it are whole. On a full disk make room, or "
            "lower checkpoints.keep; then give the same command again"
        )


@contextlib.contextmanager
def full_disk_says(folder: Path) -> Iterator[None]:
    """Turns what a failed write raises into a [`FullDiskError`]."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FullDiskError(folder, _reason(error)) from error


def write_checkpoint(folder: Path, train_step: TrainStep, record: dict[str, Any]) -> None:
    """Writes a checkpoint; to be called by all processes.

    Args:
        folder (`Path`): where it is to lie; what lies there is replaced.
        train_step (`TrainStep`): whose model, optimiser and guards are saved.
        record (`dict`): what `checkpoint.json` says besides the files.

    Raises:
        FullDiskError: if the disk is full; nothing is left of the new checkpoint then.
    """
    accelerator = train_step.accelerator
    temporary = folder.with_name(f".{folder.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    problem: BaseException | None = None
    try:
        with _alone(accelerator) as no_dist:  # synchronises its files, and raises on every process
            dcp.save(_state(train_step), checkpoint_id=temporary, no_dist=no_dist)
        if accelerator.is_main_process:
            _complete(temporary, folder, record)
    except (CheckpointException, OSError) as error:  # the first is no `Exception`
        problem = error
    failed = [None if problem is None else _reason(problem)]  # of the main process, which the others follow
    if accelerator.num_processes > 1:
        broadcast_object_list(failed)
    if failed[0] is not None:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise FullDiskError(folder, failed[0]) from problem


def _complete(temporary: Path, folder: Path, record: dict[str, Any]) -> None:
    files = {path.name: _size_and_checksum(path) for path in sorted(temporary.iterdir())}
    provenance.write_json(temporary / RECORD_FILE, {"format_version": FORMAT_VERSION, **record, "files": files})
    provenance.synchronise(temporary / RECORD_FILE, temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    provenance.synchronise(folder.parent)


def _reason(problem: BaseException) -> str:
    """The cause of a failed save in a line; torch wraps what happened on each process together with its traceback."""
    if isinstance(problem, CheckpointException):
        problem = next(iter(problem.failures.values()))[0]
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


def read_checkpoint(folder: Path, train_step: TrainStep) -> None:
    """Loads a checkpoint into the model, the optimiser and the guards; to be called by all processes."""
    state = _state(train_step)
    with _alone(train_step.accelerator) as no_dist:
        dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    set_state_dict(
        train_step.model,
        train_step.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    train_step.load_state(state["guards"])


@contextlib.contextmanager
def _alone(accelerator: Accelerator) -> Iterator[bool]:
    """Whether there is one process, without torch's warning that there is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield accelerator.num_processes == 1


def _state(train_step: TrainStep) -> dict[str, Any]:
    model, optimizer = get_state_dict(train_step.model, train_step.optimizer)
    return {"model": model, "optimizer": optimizer, "guards": train_step.state()}


def prune(run: Path, keep: int, step: int) -> None:
    """Removes all but the newest checkpoints up to a step, and what a killed process left under temporary names.

    What lies beyond the step of a run that goes on is damaged, and must not count among those that are kept.
    """
    folder = run / CHECKPOINTS_FOLDER
    by_age = [*reversed(_checkpoints(run))]
    good = [path for path in by_age if _step(path) <= step]
    for path in [*(path for path in by_age if _step(path) > step), *good[keep:]]:
        # Renamed first: a folder that loses its files while it bears its name would pass for a damaged checkpoint.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path)


def newest_complete(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run whose files are all as they were written, and what is wrong with newer ones."""
    complaints = []
    for path in reversed(_checkpoints(run)):
        problem = damage(path)
        if problem is None:
            return path, complaints
        complaints.append(f"checkpoint {path.name} is damaged ({problem}), taking the one before it")
    return None, complaints


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, `None` if nothing is."""
    try:
        record = read_record(checkpoint)
    except InputError as error:
        return str(error)
    for name, expected in record["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _size_and_checksum(path) != expected:
            return f"{name} has other contents than were written"
    return None


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The `checkpoint.json` of a checkpoint.

    Raises:
        InputError: if it is missing, damaged or of another format.
    """
    path = checkpoint / RECORD_FILE
    if not path.is_file():
        raise InputError(f"{RECORD_FILE} is missing")
    record = provenance.read_json(path)
    if not isinstance(record, dict) or "files" not in record or "step" not in record:
        raise InputError(f"{path}: damaged, it names no files")
    if record.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {record.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    return record


def check_space(run: Path, num_parameters: int, keep: int, num_milestones: int, keep_training_state: bool) -> None:
    """Refuses a run whose checkpoints cannot lie on its disk.

    Raises:
        InputError: naming what is needed and what is free.
    """
    state = BYTES_PER_PARAMETER * num_parameters
    milestone = 4 * num_parameters + (state if keep_training_state else 0)
    needed = (keep + 1) * state + num_milestones * milestone  # a new checkpoint lies there before an old one goes
    existing = next(path for path in (run, *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"output_dir {run}: {keep + 1} checkpoints and {num_milestones} milestones take {needed / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} GB are free; make room, lower checkpoints.keep, or choose another disk"
        )


def _checkpoints(run: Path) -> list[Path]:
    """By number: as text, step-960000 would come after step-1000000."""
    found = [path for path in (run / CHECKPOINTS_FOLDER).glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _size_and_checksum(path: Path) -> list[int]:
    """Guards against damage, not against malice."""
    checksum, size = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return [size, checksum]
