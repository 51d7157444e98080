"""The curves of a run, read from `metrics.jsonl` and thinned for pictures."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..pretrain.metrics import METRICS_FILE


QUANTITIES = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
_MAX_STRETCHES = 500  # up to twice as many, about the columns of pixels of a panel: a spike is one wide


class Curve(NamedTuple):
    """A quantity over tokens; each entry stands for a stretch of logged steps, of a short run for one.

    Attributes:
        tokens (`np.ndarray`): `[num_stretches]`, the mean of the steps.
        mean, low, high (`np.ndarray`): `[num_stretches]`, so that no spike is thinned away.
    """

    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class TrainingCurves:
    """What a run has logged so far. `refresh` reads what was added since: it costs the same late in a run as early.

    Args:
        run (`Path`): folder of the run.

    Attributes:
        validation (`list`): tokens and loss of each validation.
        first, last (`dict`): the first and last training rows, `None` before there is one.

    Raises:
        InputError: if a whole row is damaged.
    """

    def __init__(self, run: Path):
        self._file = run / METRICS_FILE
        self._inode = -1
        self.refresh()

    def refresh(self) -> None:
        """Reads the rows that were added; all of them where a resumed run has cut the file, which is another file then."""
        with self._file.open("rb") as stream:
            inode = self._file.stat().st_ino
            if inode != self._inode:
                self._begin(inode)
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # being written
                self._offset += len(line)
                try:
                    self._add(json.loads(line))
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{self._file}: damaged, a row is not valid JSON ({error}); copy it again"
                    ) from error

    def curve(self, name: str) -> Curve:
        """The curve of one of `QUANTITIES`."""
        stretches = [*self._stretches, *([_summary(self._open)] if self._open else [])]
        table = np.array(stretches).reshape(-1, 3, 1 + len(QUANTITIES))
        column = 1 + QUANTITIES.index(name)
        return Curve(table[:, 0, 0], table[:, 0, column], table[:, 1, column], table[:, 2, column])

    def _begin(self, inode: int) -> None:
        self._inode, self._offset, self._width = inode, 0, 1
        self._stretches: list[np.ndarray] = []  # each `[3, 1 + num_quantities]`: mean, low and high, tokens first
        self._open: list[tuple[float, ...]] = []  # rows of the stretch that is not full yet
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
        self._stretches.append(_summary(self._open))
        self._open = []
        if len(self._stretches) == 2 * _MAX_STRETCHES:
            pairs = np.array(self._stretches).reshape(_MAX_STRETCHES, 2, 3, -1)
            mean, low, high = pairs[:, :, 0].mean(1), pairs[:, :, 1].min(1), pairs[:, :, 2].max(1)
            self._stretches, self._width = [*np.stack([mean, low, high], 1)], 2 * self._width


def _summary(rows: list[tuple[float, ...]]) -> np.ndarray:
    if len(rows) == 1:
        return np.array([rows[0]] * 3)
    values = np.array(rows)
    return np.stack([values.mean(0), values.min(0), values.max(0)])
