"""Rolling checkpoints, from which a stopped run resumes bit for bit.

A checkpoint is a folder `checkpoints/step-N`. It holds the files of torch.distributed.checkpoint (model and optimizer,
sharded as the processes hold them, loadable by any other number of processes) and `checkpoint.json`, which describes
them and lists their sizes and checksums. It is written under a temporary name, synced to the disk and renamed, so a
folder with the final name is complete.
"""

import contextlib
import shutil
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..errors import InputError, one_line
from ..files import link_folder, read_json, remove_folder, replace_folder, write_json
from .checkpoint_reader import CheckpointReader, TensorPlanner
from .step import TrainStep


CHECKPOINTS_FOLDER = "checkpoints"
TRAINING_STATE_FOLDER = "training_state"  # next to the milestones: the state that a branch starts from
RECORD_FILE = "checkpoint.json"
FORMAT_VERSION = 1
Settings: TypeAlias = dict[str, Any]  # by `section.key`
_RECORD = {"files": dict, "step": int, "tokens": int, "identity": dict, "arithmetic": dict}  # required keys
BYTES_PER_PARAMETER = 12  # weight and two moments, all fp32


class FullDiskError(RuntimeError):
    """A file of a run could not be written, usually because the disk is full. Earlier checkpoints are intact."""

    exit_status = 4

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: could not be written ({reason}). Earlier checkpoints are intact. If the disk is full, free "
            "space or lower checkpoints.keep, then run the same command again."
        )


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Turns the error of a failed write into a [`FullDiskError`]."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FullDiskError(path, one_line(error)) from error


@dataclass(frozen=True)
class CheckpointRecord:
    """The contents of `checkpoint.json`.

    Attributes:
        step, tokens (`int`): trained so far.
        branched_at (`int`): tokens seen at the milestone from which the run was branched.
        identity, arithmetic (`dict`): the settings of the run, see `resume.py`.
        provenance (`dict`): code, libraries, machine.
        files (`dict`): size and checksum of each file.
    """

    step: int
    tokens: int
    branched_at: int | None
    identity: Settings
    arithmetic: Settings
    provenance: dict[str, Any]
    files: dict[str, list[int]] = field(default_factory=dict)


class AnotherVersionError(InputError):
    """A checkpoint in a format of another version. It is not damaged, and is never removed."""


def write_checkpoint(
    folder: Path, train_step: TrainStep, record: CheckpointRecord, second_folder: Path | None = None
) -> None:
    """Writes a checkpoint; a collective call of all processes.

    Args:
        folder (`Path`): of the checkpoint; an existing one is replaced.
        train_step (`TrainStep`): has the model, the optimizer and the guards.
        record (`CheckpointRecord`): without the files, which are added.
        second_folder (`Path`, *optional*): gets the same files, as hard links if the file system has them.

    Raises:
        FullDiskError: if a file cannot be written; the incomplete checkpoint is removed.
    """
    accelerator = train_step.accelerator
    temporary = folder.with_name(f".{folder.name}.tmp")  # the same for all processes; other runs are locked out
    if accelerator.is_main_process:
        with translate_write_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    problem: BaseException | None = None
    try:
        with _no_dist(accelerator) as no_dist:  # syncs its files, and raises on every process
            dcp.save(_state(train_step), checkpoint_id=temporary, no_dist=no_dist)
        if accelerator.is_main_process:
            _complete(temporary, folder, record, second_folder)
    except CheckpointException as error:
        problem = _cause(error)
    except OSError as error:
        problem = error
    failed = [None if problem is None else one_line(problem)]  # the other processes follow the main one
    broadcast_object_list(failed)
    if failed[0] is not None:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise FullDiskError(folder, failed[0]) from problem


def _complete(temporary: Path, folder: Path, record: CheckpointRecord, second_folder: Path | None) -> None:
    files = {path.name: _size_and_checksum(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / RECORD_FILE, {"format_version": FORMAT_VERSION, **asdict(record), "files": files})
    if second_folder:  # first, since the checkpoint is what a killed run resumes after
        link_folder(temporary, second_folder)
    replace_folder(temporary, folder)


def read_checkpoint(folder: Path, train_step: TrainStep) -> None:
    """Loads a checkpoint into the model, the optimizer and the guards; a collective call of all processes.

    Only tensors are read. The optimizer keeps its settings, which a branch may have changed.

    Raises:
        InputError: if the files are not a checkpoint of this model. No code that they name is run.
    """
    state = _state(train_step)
    settings = state["optimizer"].pop("param_groups")
    reader = CheckpointReader(folder)
    try:
        with _no_dist(train_step.accelerator) as no_dist:  # fills all tensors in place, including the guards
            dcp.load(state, storage_reader=reader, planner=TensorPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        raise InputError(
            f"{folder}: cannot be loaded ({one_line(_cause(error))}). The run cannot resume from this checkpoint."
        ) from error
    set_state_dict(
        train_step.model,
        train_step.optimizer,
        model_state_dict=state["model"],
        optim_state_dict={**state["optimizer"], "param_groups": settings},
    )


def _cause(error: CheckpointException) -> BaseException:
    """The error of the first process that failed. (torch's `CheckpointException` is not an `Exception`.)"""
    return next(iter(error.failures.values()))[0]


@contextlib.contextmanager
def _no_dist(accelerator: Accelerator) -> Iterator[bool]:
    """Gives `no_dist`, which is true for a single process, and hides torch's warning about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield accelerator.num_processes == 1


def _state(train_step: TrainStep) -> dict[str, Any]:
    model, optimizer = get_state_dict(train_step.model, train_step.optimizer)
    return {"model": model, "optimizer": optimizer, "guards": train_step.state()}


def prune_checkpoints(run: Path, keep: int, step: int) -> None:
    """Removes all but the newest checkpoints up to a step, and temporary folders of killed processes.

    Checkpoints after the step from which a run resumes are damaged, and do not count among those that are kept.
    Checkpoints of another version of this package are intact, and are not removed.

    Args:
        run (`Path`): folder of the run.
        keep (`int`): checkpoints to keep.
        step (`int`): the last good one.
    """
    folder = run / CHECKPOINTS_FOLDER
    by_age = [*reversed(list_checkpoints(run))]
    good = [path for path in by_age if _step(path) <= step]
    for path in [*(path for path in by_age if _step(path) > step), *good[keep:]]:
        if not _is_of_another_version(path):
            remove_folder(path)
    for path in (*folder.glob(".*.tmp"), *folder.glob(".*.replaced")):
        shutil.rmtree(path)


def newest_intact_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of a run, and one message per damaged newer one.

    Raises:
        AnotherVersionError: if another version wrote a newer checkpoint, which this one cannot read.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(run)):
        problem = find_damage(path)
        if problem is None:
            return path, complaints
        complaints.append(f"checkpoint {path.name} is damaged ({problem}); using the previous one")
    return None, complaints


def find_damage(checkpoint: Path) -> str | None:
    """Describes the damage of a checkpoint, or returns `None` if all files are as they were written.

    Raises:
        AnotherVersionError: if another version wrote it.
    """
    try:
        record = read_checkpoint_record(checkpoint)
    except AnotherVersionError:
        raise
    except InputError as error:
        return str(error)
    for name, expected in record.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _size_and_checksum(path) != expected:
            return f"{name} has changed since it was written"
    return None


def read_checkpoint_record(checkpoint: Path) -> CheckpointRecord:
    """Reads the `checkpoint.json` of a checkpoint.

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
            f"{path}: format_version {version} is not supported; this version of tinyllama_hf reads {FORMAT_VERSION}. "
            "Resume with the version that wrote it, or choose another output_dir."
        )
    if version != FORMAT_VERSION or any(not isinstance(record.get(key), kind) for key, kind in _RECORD.items()):
        raise InputError(f"{path}: damaged; it must have the keys {', '.join(_RECORD)}")
    if outside := [name for name in record["files"] if Path(name).name != name]:
        raise InputError(f"{path}: names {outside[0]!r}, which is outside the checkpoint")
    names = [each.name for each in fields(CheckpointRecord)]
    return CheckpointRecord(**{name: record.get(name) for name in names})


def _is_of_another_version(checkpoint: Path) -> bool:
    try:
        read_checkpoint_record(checkpoint)
    except InputError as error:
        return isinstance(error, AnotherVersionError)
    return False


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, damaged ones included, in the order of their steps (a number, not a string)."""
    found = [path for path in (run / CHECKPOINTS_FOLDER).glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _size_and_checksum(path: Path) -> list[int]:
    """Detects damage, not manipulation."""
    checksum, size = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return [size, checksum]
