"""Rolling checkpoints: what a stopped run goes on from, bit for bit.

A checkpoint is a folder `checkpoints/step-N` of files from torch.distributed.checkpoint (model and optimiser, in whatever
parts the processes hold, loadable by any other number of processes) and `checkpoint.json`, which says what they are and
lists their sizes and checksums. It is written under a temporary name, synchronised to the disk and renamed: whatever bears
the name is complete.
"""

import contextlib
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

from ..errors import InputError, one_line
from ..files import read_json, remove_folder, replace_folder, write_json
from .checkpoint_reader import CheckpointReader, TensorPlanner
from .step import TrainStep


CHECKPOINTS_FOLDER = "checkpoints"
TRAINING_STATE_FOLDER = "training_state"  # beside the milestones: what a branch begins with
RECORD_FILE = "checkpoint.json"
FORMAT_VERSION = 1
_RECORD = {"files": dict, "step": int, "tokens": int, "identity": dict, "arithmetic": dict}  # what a reader relies on
BYTES_PER_PARAMETER = 12  # weight and two moments, all fp32


class FullDiskError(RuntimeError):
    """Something of a run could not be written, as a rule because the disk is full; the checkpoints before it are whole."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: could not be written ({reason}); the checkpoints before it are whole. On a full disk make room, or "
            "lower checkpoints.keep; then give the same command again"
        )


@contextlib.contextmanager
def full_disk_says(path: Path) -> Iterator[None]:
    """Turns what a failed write raises into a [`FullDiskError`]."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FullDiskError(path, reason(error)) from error


def reason(problem: BaseException) -> str:
    """The cause of a failed write in a line."""
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


class AnotherVersionError(InputError):
    """A checkpoint of a format that this version does not know. It is not damaged, and never removed."""


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
    temporary = folder.with_name(f".{folder.name}.tmp")  # the same for all processes; other runs are locked out
    if accelerator.is_main_process:
        with full_disk_says(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    problem: BaseException | None = None
    try:
        with _alone(accelerator) as no_dist:  # synchronises its files, and raises on every process
            dcp.save(_state(train_step), checkpoint_id=temporary, no_dist=no_dist)
        if accelerator.is_main_process:
            _complete(temporary, folder, record)
    except CheckpointException as error:
        problem = _cause(error)
    except OSError as error:
        problem = error
    failed = [None if problem is None else one_line(problem)]  # of the main process, which the others follow
    if accelerator.num_processes > 1:
        broadcast_object_list(failed)
    if failed[0] is not None:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise FullDiskError(folder, failed[0]) from problem


def _complete(temporary: Path, folder: Path, record: dict[str, Any]) -> None:
    files = {path.name: _size_and_checksum(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / RECORD_FILE, {"format_version": FORMAT_VERSION, **record, "files": files})
    replace_folder(temporary, folder)


def read_checkpoint(folder: Path, train_step: TrainStep) -> None:
    """Loads a checkpoint into the model, the optimiser and the guards; to be called by all processes.

    The optimiser keeps its settings, which a branch may have changed: only tensors are read.

    Raises:
        InputError: if the files are not a checkpoint of this model. Nothing that they name is run.
    """
    state = _state(train_step)
    settings = state["optimizer"].pop("param_groups")
    reader = CheckpointReader(folder)
    try:
        with _alone(train_step.accelerator) as no_dist:  # fills every tensor in place, also those of the guards
            dcp.load(state, storage_reader=reader, planner=TensorPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        raise InputError(
            f"{folder}: cannot be loaded ({one_line(_cause(error))}); it is not a checkpoint that this run can resume from"
        ) from error
    set_state_dict(
        train_step.model,
        train_step.optimizer,
        model_state_dict=state["model"],
        optim_state_dict={**state["optimizer"], "param_groups": settings},
    )


def _cause(error: CheckpointException) -> BaseException:
    """What happened on the first process that failed; the exception itself is not an `Exception`."""
    return next(iter(error.failures.values()))[0]


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

    What lies beyond the step of a run that goes on is damaged, and must not count among those that are kept. What another
    version of this package wrote is whole, and not for this one to remove.
    """
    folder = run / CHECKPOINTS_FOLDER
    by_age = [*reversed(list_checkpoints(run))]
    good = [path for path in by_age if _step(path) <= step]
    for path in [*(path for path in by_age if _step(path) > step), *good[keep:]]:
        if _is_of_another_version(path):
            continue
        remove_folder(path)
    for path in (*folder.glob(".*.tmp"), *folder.glob(".*.replaced")):
        shutil.rmtree(path)


def newest_complete(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run whose files are all as they were written, and what is wrong with newer ones.

    Raises:
        AnotherVersionError: if a newer one was written by another version: the run is further than this one can see.
    """
    complaints = []
    for path in reversed(list_checkpoints(run)):
        problem = damage(path)
        if problem is None:
            return path, complaints
        complaints.append(f"checkpoint {path.name} is damaged ({problem}), taking the one before it")
    return None, complaints


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, `None` if nothing is.

    Raises:
        AnotherVersionError: if another version wrote it, which is no damage.
    """
    try:
        record = read_record(checkpoint)
    except AnotherVersionError:
        raise
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
        InputError: if it is missing or damaged.
        AnotherVersionError: if another version wrote it.
    """
    path = checkpoint / RECORD_FILE
    if not path.is_file():
        raise InputError(f"{RECORD_FILE} is missing")
    record = read_json(path)
    version = record.get("format_version") if isinstance(record, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise AnotherVersionError(
            f"{path}: has format_version {version}, and this version of tinyllama_hf reads {FORMAT_VERSION}; go on with the "
            "version that wrote it, or choose another output_dir"
        )
    if version != FORMAT_VERSION or any(not isinstance(record.get(key), kind) for key, kind in _RECORD.items()):
        raise InputError(f"{path}: damaged, it lacks one of {', '.join(_RECORD)}")
    if outside := [name for name in record["files"] if Path(name).name != name]:
        raise InputError(f"{path}: names {outside[0]!r}, which is outside of the checkpoint")
    return record


def _is_of_another_version(checkpoint: Path) -> bool:
    try:
        read_record(checkpoint)
    except AnotherVersionError:
        return True
    except InputError:
        return False
    return False


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, by number: as text, step-960000 would come after step-1000000."""
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


def size_in_words(num_bytes: float) -> str:
    """`13.2 GB`, and below one GB `45 MB`."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
