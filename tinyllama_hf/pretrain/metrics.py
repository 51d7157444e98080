"""What a run says of itself while it goes on: rows of `metrics.jsonl`, and a progress bar or lines."""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import InputError, require
from ..files import new_file, read_json, write_json
from ..portable import portable
from .checkpoints import FullDiskError, full_disk_says
from .config import PretrainConfig


METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "trackers.json"


class Metrics:
    """Writes metrics and shows progress; does nothing on other processes than the first.

    Every write raises a [`FullDiskError`] if it fails.

    Args:
        run (`Path`): folder of the run.
        total_tokens (`int`): of all steps together.
        enabled (`bool`): whether this is the process that reports.
        step (`int`): after which the run goes on; rows of later steps are cut, those steps come again.
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
        with full_disk_says(self._path):
            if enabled:
                _cut(run, step)
            self._file = self._path.open("a", encoding="utf-8") if enabled else None

    def __enter__(self) -> "Metrics":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exception: object) -> None:
        self._bar.stop()
        # A row that could not be written is tried again here; what ended the run must not be hidden by that.
        with contextlib.suppress(FullDiskError) if kind else contextlib.nullcontext(), full_disk_says(self._path):
            if self._file:
                self._file.close()

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row; rows with a training loss move the bar."""
        if not self._file:
            return
        with full_disk_says(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if "loss" not in row:
            summary = f"validation loss {row['validation_loss']:.3f}"
            self.say(f"step {row['step']:>6}  {row['tokens']:>12,} tokens  {summary}")
            return
        rate = row["tokens_per_second"]
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        summary = f"loss {row['loss']:.3f}  {rate:,.0f} tokens/s  MFU {mfu}"
        self._bar.update(self._task, completed=row["tokens"], step=row["step"], summary=summary)
        if not self._console.is_terminal:
            left = duration((self.total_tokens - row["tokens"]) / rate)
            self.say(f"step {row['step']:>6}  {row['tokens']:>12,} tokens  {summary}  {left} left")

    def synchronise(self) -> None:
        """Puts all rows on the disk: a checkpoint must not be newer than the rows before it."""
        if self._file:
            with full_disk_says(self._path):
                os.fsync(self._file.fileno())

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time in the two units that one would say it in: `42 s`, `7 min`, `3 h 20 min`, `89 d 23 h`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line that a killed process left half-written is no row."""
    with (run / METRICS_FILE).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _cut(run: Path, step: int) -> None:
    """Drops the rows after a step; of those before it only the last few are parsed."""
    path = run / METRICS_FILE
    with new_file(path) as kept:
        if step and path.is_file():
            with path.open("rb") as rows:
                end = _end_of_step(rows, step)
                rows.seek(0)
                while end and (block := rows.read(min(end, 1 << 24))):
                    end -= kept.write(block)


def _end_of_step(rows: BinaryIO, step: int) -> int:
    """Where the rows of a step end, found from the end of the file."""
    size, window = rows.seek(0, os.SEEK_END), 1 << 16
    while True:
        begin = rows.seek(max(size - window, 0))
        end = begin + (len(rows.readline()) if begin else 0)  # the first row may have begun before
        rows.seek(end)
        found = end if not begin else None
        for line in rows:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
            found = end
        if found is not None:
            return found
        window *= 2


def check_trackers(config: PretrainConfig) -> None:
    """Refuses a tracker whose package is missing; accelerate would only warn.

    Raises:
        InputError: naming the package and the extra that has it.
    """
    for name in config.logging.trackers:
        require(name, "trackers", f"logging.trackers: {name}")


def start_trackers(accelerator: Accelerator, config: PretrainConfig, output: Path, step: int | None = None) -> None:
    """Opens the trackers that the recipe names; a run that goes on goes on in the same wandb and trackio run and
    tensorboard folder.

    Args:
        accelerator (`Accelerator`): made with these trackers, and the run's folder as its project.
        config (`PretrainConfig`): shown by the trackers as the run's settings, without absolute paths and the names of
            user and host, as some of them send it elsewhere. (wandb records user and host itself.)
        output (`Path`): folder of the run, which exists.
        step (`int`, *optional*): after which the run goes on. What tensorboard has of later steps, which a killed
            process logged and which come again, is then no longer shown. wandb keeps the first rows of such steps,
            trackio both.

    Raises:
        InputError: if a tracker refuses to start, as wandb does without a login.
    """
    if not config.logging.trackers:
        return
    options: dict[str, dict[str, Any]] = {name: {} for name in config.logging.trackers}
    if accelerator.is_main_process:
        run_id = _run_id(output)
        started = {
            "wandb": {"id": run_id, "name": output.name, "resume": "allow", "dir": str(output)},
            "trackio": {"name": f"{output.name}-{run_id}", "resume": "allow"},
            "tensorboard": {} if step is None else {"purge_step": step + 1},
        }
        options = {name: started[name] for name in options}
    settings = flat(portable(config.model_dump(mode="json", by_alias=True)))
    try:
        accelerator.init_trackers("tinyllama_hf", settings, init_kwargs=options)
    except Exception as error:  # each tracker has errors of its own
        raise InputError(
            f"logging.trackers: {', '.join(options)}: cannot be started ({type(error).__name__}: {error}); wandb wants "
            "`wandb login` or WANDB_MODE=offline; or leave the tracker out"
        ) from error


def _run_id(output: Path) -> str:
    """What wandb and trackio know the run by: drawn once and kept in its folder.

    So it survives a folder that is moved, and `--overwrite` begins another; an id made from the path would do neither,
    and two machines with equal paths would log into one run.
    """
    file = output / RUN_ID_FILE
    if not file.is_file():
        write_json(file, {"id": uuid.uuid4().hex[:16]})
    return read_json(file)["id"]


def row_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics under flat names, without its step."""
    return {name: value for name, value in flat(row).items() if isinstance(value, (int, float)) and name != "step"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `section.key`; what tensorboard cannot hold becomes text."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, (int, float, str)) else str(value)
    return result
