"""Checkpoints of a fine-tuning run: the trainer's whole state, complete or not used.

The trainer (transformers 5.23) writes a checkpoint under its final name, so a killed process leaves an incomplete one.
`checkpoint.json`, with the sizes of all files, is written after everything else is on the disk. A folder without it,
or with other sizes, is removed when the run resumes.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, remove_folder, sync, write_json
from ..pretrain.resume import list_changes


CHECKPOINTS_FOLDER = "checkpoints"
_RECORD_FILE = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")  # given by the trainer


@dataclass(frozen=True)
class RunState:
    """What a checkpoint knows about its run in addition to the trainer's state.

    Attributes:
        settings (`dict`): settings, data and base model, flat; a run resumes only with the same.
        losses (`dict[int, float]`): held-out loss by step.
        pending (`list[float]`): training losses of the steps since the last row of `metrics.jsonl`.
    """

    settings: dict[str, Any]
    losses: dict[int, float]
    pending: list[float]

    @property
    def best_step(self) -> int:
        """The step with the lowest held-out loss, of equal ones the first; 0 before the first one in training."""
        return min(self.losses.keys() - {0}, key=lambda step: (self.losses[step], step), default=0)


def complete_checkpoint(folder: Path, state: RunState) -> None:
    """Marks a checkpoint as complete, once its files are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _RECORD_FILE)
    sync(*files, folder)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_json(folder / _RECORD_FILE, {**asdict(state), "files": sizes})


def checkpoint_folder(output: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of a step."""
    return output / CHECKPOINTS_FOLDER / f"checkpoint-{step}"


def read_state(folder: Path) -> RunState | None:
    """Returns what a checkpoint knows about its run, `None` if the checkpoint is incomplete."""
    if not (folder / _RECORD_FILE).is_file():
        return None
    record = read_json(folder / _RECORD_FILE)
    for name, size in record["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return None
    losses = {int(step): loss for step, loss in record["losses"].items()}
    return RunState(record["settings"], losses, record["pending"])


def checkpoint_folders(output: Path) -> dict[int, Path]:
    """Returns the folders of all checkpoints by step, also of incomplete ones."""
    folders = (output / CHECKPOINTS_FOLDER).glob("checkpoint-*")
    named = ((_NAME.fullmatch(folder.name), folder) for folder in folders)
    return dict(sorted((int(match[1]), folder) for match, folder in named if match))


def last_checkpoint(output: Path) -> tuple[int, RunState] | None:
    """Returns step and state of the last complete checkpoint."""
    for step, folder in reversed(checkpoint_folders(output).items()):
        if state := read_state(folder):
            return step, state
    return None


def remove_checkpoints(output: Path, kept: set[int]) -> None:
    """Removes all checkpoints except those of some steps."""
    for step, folder in checkpoint_folders(output).items():
        if step not in kept:
            remove_folder(folder)


def check_same_settings(output: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Checks that a run is resumed with the settings and the data that it was started with.

    Raises:
        InputError: listing each setting that differs, with both values.
    """
    if changes := list_changes(recorded, current):
        raise InputError(
            f"output_dir {output}: its checkpoints were trained with other settings or data, so the run cannot be "
            "resumed with this recipe. Restore them, choose another output_dir, or start over with --overwrite\n  "
            + "\n  ".join(changes)
        )
