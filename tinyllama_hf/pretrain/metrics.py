"""What a run logs: rows of `metrics.jsonl`, a progress bar or lines, and trackers (tensorboard, wandb, trackio)."""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import InputError, one_line
from ..files import new_file, read_json, write_json
from ..portable import portable
from ..recipe import RecipeFile
from .checkpoints import FullDiskError, translate_write_errors


METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "trackers.json"


class Metrics:
    """Writes metrics and shows progress, on the main process only. A failed write raises a [`FullDiskError`].

    Args:
        run (`Path`): folder of the run.
        total_tokens (`int`): of all steps together.
        enabled (`bool`): whether this is the main process.
        step (`int`): the last finished step. Rows of later steps are removed, since a resumed run repeats those steps.
    """

    def __init__(self, run: Path, total_tokens: int, enabled: bool, step: int = 0):
        self.enabled, self.total_tokens = enabled, total_tokens
        self._console = Console()
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.fields[summary]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total_tokens, step=0, summary="")
        self._path = run / METRICS_FILE
        with translate_write_errors(self._path):
            if enabled:
                _remove_later_rows(run, step)
            self._file = self._path.open("a", encoding="utf-8") if enabled else None

    def __enter__(self) -> "Metrics":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exception: object) -> None:
        self._bar.stop()
        # Closing retries a failed write. A second failure must not hide the error that ended the run.
        with (
            contextlib.suppress(FullDiskError) if kind else contextlib.nullcontext(),
            translate_write_errors(self._path),
        ):
            if self._file:
                self._file.close()

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row; rows with a training loss move the bar."""
        if not self._file:
            return
        with translate_write_errors(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if "loss" not in row:
            summary = f"validation loss {row['validation_loss']:.3f}"
            if "accuracy" in row:
                summary += f"  accuracy {row['accuracy']:.1%}"
            self.print_line(f"step {row['step']:>6}  {row['tokens']:>12,} tokens  {summary}")
            return
        rate = row["tokens_per_second"]
        summary = f"loss {row['loss']:.3f}  {rate:,.0f} tokens/s"
        if "mfu" in row:
            summary += f"  MFU {'n/a' if row['mfu'] is None else format(row['mfu'], '.1%')}"
        self._bar.update(self._task, completed=row["tokens"], step=row["step"], summary=summary)
        if not self._console.is_terminal:
            left = duration((self.total_tokens - row["tokens"]) / rate)
            self.print_line(f"step {row['step']:>6}  {row['tokens']:>12,} tokens  {summary}  {left} left")

    def sync(self) -> None:
        """Syncs all rows to the disk, before a checkpoint that relies on them."""
        if self._file:
            with translate_write_errors(self._path):
                os.fsync(self._file.fileno())

    def print_line(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Formats a duration in its one or two largest units: `42 s`, `7 min`, `3 h 20 min`, `89 d 23 h`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _remove_later_rows(run: Path, step: int) -> None:
    """Removes the rows after a step, and an incomplete last row."""
    path = run / METRICS_FILE
    with new_file(path) as kept:
        if not step or not path.is_file():
            return
        with path.open("rb") as rows:
            for number, row in enumerate(rows, start=1):
                try:
                    if not row.endswith(b"\n") or json.loads(row)["step"] > step:
                        return
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{path}, row {number}: damaged ({one_line(error)}). Remove the row, and run the command again"
                    ) from error
                kept.write(row)


def start_trackers(
    accelerator: Accelerator, config: RecipeFile, trackers: Sequence[str], output: Path, step: int | None = None
) -> None:
    """Starts the trackers of the recipe. A resumed run continues in the same tracker run or folder.

    Args:
        accelerator (`Accelerator`): created with these trackers.
        config (`RecipeFile`): shown as the settings of the run, without absolute paths, user name and host name, since
            trackers may upload it. (wandb records user and host itself.)
        trackers (`Sequence[str]`): their names.
        output (`Path`): folder of the run; must exist.
        step (`int`, *optional*): the last finished step of a resumed run, which repeats later steps. tensorboard then
            hides the earlier rows of those steps, wandb keeps the earlier rows, and trackio shows both.

    Raises:
        InputError: if a tracker cannot be started, for example wandb without a login.
    """
    if not trackers:
        return
    options: dict[str, dict[str, Any]] = {}
    if accelerator.is_main_process:
        with translate_write_errors(output):
            run_id = _run_id(output)
        options = {
            "wandb": {"id": run_id, "name": output.name, "resume": "allow", "dir": str(output)},
            "trackio": {"name": f"{output.name}-{run_id}", "resume": "allow"},
        }
        # Created here, since accelerate would give it the name of the project, which is that of every run.
        purged = {} if step is None else {"purge_step": step + 1}
        board = TensorBoardTracker(_tensorboard_name(output, run_id), output, **purged)
        accelerator.log_with = [board if str(name) == "tensorboard" else name for name in accelerator.log_with]
    settings = flat(portable(config.model_dump(mode="json", by_alias=True)))
    try:
        accelerator.init_trackers("tinyllama_hf", settings, init_kwargs=options)
    except Exception as error:  # each tracker has its own exceptions
        raise InputError(
            f"logging.trackers: {', '.join(trackers)}: cannot be started ({one_line(error)}). wandb "
            "needs `wandb login` or WANDB_MODE=offline. Otherwise remove the tracker."
        ) from error


def _run_id(output: Path) -> str:
    """The id of the run in wandb and trackio: random, stored in the folder of the run.

    It stays the same when the folder is moved, and changes with `--overwrite`. An id derived from the path would do
    neither, and runs with equal paths on two machines would share one.
    """
    file = output / RUN_ID_FILE
    if not file.is_file():
        write_json(file, {"id": uuid.uuid4().hex[:16]})
    return read_json(file)["id"]


def _tensorboard_name(output: Path, run_id: str) -> str:
    """The folder of the tensorboard files in that of the run, which tensorboard shows as the name of the run."""
    # The folder of the run may have been renamed. Early versions wrote to tinyllama_hf/.
    started = [*output.glob("tinyllama_hf"), *output.glob(f"tensorboard/*-{run_id}")]
    return str(started[0].relative_to(output)) if started else f"tensorboard/{output.resolve().name}-{run_id}"


def row_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics under flat names, without `step`."""
    return {name: value for name, value in flat(row).items() if isinstance(value, (int, float)) and name != "step"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to `section.key`; values that tensorboard cannot store become text."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, (int, float, str)) else str(value)
    return result
