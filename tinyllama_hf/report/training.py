"""The training curves of a run, read from `metrics.jsonl` and downsampled for plots."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..pretrain.metrics import METRICS_FILE


QUANTITIES = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
_MAX_INTERVALS = 500  # between this and twice as many, about one per pixel column of a panel


class Curve(NamedTuple):
    """A quantity over tokens. Each entry stands for an interval of logged steps, in a short run for one step.

    Attributes:
        tokens (`np.ndarray`): `[num_intervals]`, mean of the interval.
        mean, low, high (`np.ndarray`): `[num_intervals]`. Low and high keep spikes that the mean hides.
    """

    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class TrainingCurves:
    """The metrics that a run has logged so far. `refresh` reads only the rows that were added since the last call.

    Args:
        run (`Path`): folder of the run.

    Attributes:
        validation (`list`): tokens and loss of each validation.
        first, last (`dict`): the first and the last training row, `None` if there is none yet.

    Raises:
        InputError: if there is no file, or a complete row is damaged.
    """

    def __init__(self, run: Path):
        self._file = run / METRICS_FILE
        if not self._file.is_file():
            raise InputError(f"run {run}: {METRICS_FILE} is missing, so this is not a complete pretraining run")
        self._inode = -1
        self.refresh()

    def refresh(self) -> None:
        """Reads the rows that were added, or all rows if a resumed run replaced the file by a shorter one."""
        with self._file.open("rb") as stream:
            inode = self._file.stat().st_ino
            if inode != self._inode:
                self._reset(inode)
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                try:
                    self._add(json.loads(line))
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{self._file}: damaged, a row is not valid JSON ({error}). Copy the file again"
                    ) from error

    def curve(self, name: str) -> Curve:
        """The curve of one of `QUANTITIES`."""
        intervals = [*self._intervals, *([_summary(self._open)] if self._open else [])]
        table = np.array(intervals).reshape(-1, 3, 1 + len(QUANTITIES))
        column = 1 + QUANTITIES.index(name)
        return Curve(table[:, 0, 0], table[:, 0, column], table[:, 1, column], table[:, 2, column])

    def _reset(self, inode: int) -> None:
        self._inode, self._offset, self._width = inode, 0, 1
        self._intervals: list[np.ndarray] = []  # each `[3, 1 + num_quantities]`: mean, low and high, tokens first
        self._open: list[tuple[float, ...]] = []  # rows of the interval that is not full yet
        self.validation: list[tuple[int, float]] = []
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None

    def _add(self, row: dict[str, Any]) -> None:
        if "validation_loss" in row:
            self.validation.append((row["tokens"], row["validation_loss"]))
        if "loss" not in row:
            return
        self.first, self.last = self.first or row, row
        self._open.append((row["tokens"], *(row[name] for name in QUANTITIES)))
        if len(self._open) < self._width:
            return
        self._intervals.append(_summary(self._open))
        self._open = []
        if len(self._intervals) == 2 * _MAX_INTERVALS:
            pairs = np.array(self._intervals).reshape(_MAX_INTERVALS, 2, 3, -1)
            mean, low, high = pairs[:, :, 0].mean(1), pairs[:, :, 1].min(1), pairs[:, :, 2].max(1)
            self._intervals, self._width = [*np.stack([mean, low, high], 1)], 2 * self._width


def _summary(rows: list[tuple[float, ...]]) -> np.ndarray:
    values = np.array(rows)
    return np.stack([values.mean(0), values.min(0), values.max(0)])
