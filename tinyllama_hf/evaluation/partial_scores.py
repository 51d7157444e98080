"""Finished tasks of models that are not completely scored: JSON lines in a file next to the score file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from ..errors import InputError
from ..files import write_text
from .harness import Item
from .score_files import Protocol, ScoredModel, TaskRow, TaskScore


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedTask:
    """Result of a task, with everything that decides it.

    Attributes:
        model (`str`): name of the model, for messages.
        fingerprint (`str`): hash of the model's files.
        quantization (`str`): one of `QUANTIZATIONS`.
        protocol (`Protocol`): the settings of the evaluation.
        task (`str`): name of the task.
        score (`TaskScore`): score and standard error.
        items (`list[Item]`): all items, for a samples file.
        cut_requests (`int`): number of requests that were truncated to the context.
        seconds (`float`): duration.
    """

    model: str
    fingerprint: str
    quantization: str
    protocol: Protocol
    task: str
    score: TaskScore
    items: list[Item]
    cut_requests: int
    seconds: float


class PartialScores:
    """Keeps finished tasks on the disk until the score file has the complete row of their model.

    Args:
        output (`Path`, *optional*): the score file; without one, nothing is kept after the process ends.

    Raises:
        InputError: if the file of finished tasks is damaged.
    """

    def __init__(self, output: Path | None):
        self.path = output.with_name(f"{output.stem}.partial.jsonl") if output else None
        self.tasks: list[FinishedTask] = []
        if self.path and self.path.is_file():
            try:
                lines = self.path.read_text(encoding="utf-8").splitlines()
                self.tasks = [TypeAdapter(FinishedTask).validate_python(json.loads(line)) for line in lines]
            except ValueError as error:  # of JSON, of UTF-8 and of pydantic
                raise InputError(
                    f"{self.path}: damaged. It has finished tasks of an interrupted evaluation; remove it to score "
                    "them again"
                ) from error

    def find(self, model: ScoredModel, fingerprint: str, protocol: Protocol) -> dict[str, FinishedTask]:
        """Returns the finished tasks of a model under a protocol, by name."""
        wanted = (fingerprint, model.quantization, protocol)
        found = [done for done in self.tasks if (done.fingerprint, done.quantization, done.protocol) == wanted]
        return {done.task: done for done in found}

    def add(self, done: FinishedTask) -> None:
        """Keeps a finished task, which is on the disk when this returns."""
        self._keep([*self.tasks, done])

    def discard(self, rows: Sequence[TaskRow], protocol: Protocol) -> None:
        """Removes the tasks of models with a row in the score file, and those under another protocol."""
        complete = {(row.fingerprint, row.quantization) for row in rows}
        kept = [done for done in self.tasks if (done.fingerprint, done.quantization) not in complete]
        self._keep([done for done in kept if done.protocol == protocol])

    def _keep(self, tasks: list[FinishedTask]) -> None:
        self.tasks = tasks
        if not self.path:
            return
        if tasks:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(json.dumps(dataclasses.asdict(done)) + "\n" for done in tasks))
        else:
            self.path.unlink(missing_ok=True)

    def __str__(self) -> str:
        """Names the finished tasks by model, for the message after an interruption."""
        names = {done.model: [own.task for own in self.tasks if own.model == done.model] for done in self.tasks}
        return "; ".join(f"{', '.join(tasks)} of {model}" for model, tasks in names.items())
