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
    """A quantity over tokens and hours. An entry stands for an interval of logged steps, in a short run for one step.

    Attributes:
        tokens, hours (`np.ndarray`): `[num_intervals]`, mean of the interval.
        mean, low, high (`np.ndarray`): `[num_intervals]`. Low and high keep spikes that the mean hides.
    """

    tokens: np.ndarray
    hours: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class TrainingCurves:
    """The metrics that a run has logged so far. `refresh` reads only the rows that were added since the last call.

    A row has no time of day. Its hours are those of the steps up to it, from their tokens and tokens per second. They
    add up over all launches of the run, and are without validation, checkpoints and steps that a launch repeated.

    Args:
        run (`Path`): folder of the run.
        branched_at (`int`, *optional*, defaults to 0): tokens at which the run branched from another one; `None` if
            that is unknown, then the hours are those after the first row.

    Attributes:
        validation (`list`): tokens and loss of each validation.
        validation_hours (`list`): hours of each validation.
        hours (`float`): of all steps so far.
        first, last (`dict`): the first and the last training row, `None` if there is none yet.

    Raises:
        InputError: if there is no file, or a complete row is damaged.
    """

    def __init__(self, run: Path, branched_at: int | None = 0):
        self.branched_at = branched_at
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
        table = np.array(intervals).reshape(-1, 3, 2 + len(QUANTITIES))
        column = 2 + QUANTITIES.index(name)
        return Curve(table[:, 0, 0], table[:, 0, 1], *table[:, :, column].T)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean rate of all steps so far; `None` if their hours are unknown."""
        if not self.first or not self.last or not self.hours:
            return None
        start = self.first["tokens"] if self.branched_at is None else self.branched_at
        return (self.last["tokens"] - start) / self.hours / 3600

    def _reset(self, inode: int) -> None:
        self._inode, self._offset, self._width = inode, 0, 1
        self._intervals: list[np.ndarray] = []  # each `[3, 2 + num_quantities]`: mean, low, high; tokens, hours, ...
        self._open: list[tuple[float, ...]] = []  # rows of the interval that is not full yet
        self.validation: list[tuple[int, float]] = []
        self.validation_hours: list[float] = []
        self.hours = 0.0
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None

    def _add(self, row: dict[str, Any]) -> None:
        if "validation_loss" in row:
            self.validation.append((row["tokens"], row["validation_loss"]))
            self.validation_hours.append(self.hours + self._hours_until(row["tokens"], self.last))
        if "loss" not in row:
            return
        self.hours += self._hours_until(row["tokens"], row)
        self.first, self.last = self.first or row, row
        self._open.append((row["tokens"], self.hours, *(row[name] for name in QUANTITIES)))
        if len(self._open) < self._width:
            return
        self._intervals.append(_summary(self._open))
        self._open = []
        if len(self._intervals) == 2 * _MAX_INTERVALS:
            pairs = np.array(self._intervals).reshape(_MAX_INTERVALS, 2, 3, -1)
            mean, low, high = pairs[:, :, 0].mean(1), pairs[:, :, 1].min(1), pairs[:, :, 2].max(1)
            self._intervals, self._width = [*np.stack([mean, low, high], 1)], 2 * self._width

    def _hours_until(self, tokens: int, rate: dict[str, Any] | None) -> float:
        """Hours from the last training row to a count of tokens, at the rate of a row."""
        before = self.last["tokens"] if self.last else self.branched_at
        return (tokens - before) / rate["tokens_per_second"] / 3600 if rate and before is not None else 0.0


def _summary(rows: list[tuple[float, ...]]) -> np.ndarray:
    values = np.array(rows)
    return np.stack([values.mean(0), values.min(0), values.max(0)])
