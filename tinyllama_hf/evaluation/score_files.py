"""Score files: the scores of one task under one protocol, one row per model, written after each model."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from .. import provenance
from ..errors import InputError
from ..files import read_json, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """What every row has.

    Attributes:
        name (`str`): of the model, with its quantization behind it.
        path (`str`): its folder.
        quantization (`str`): early files do not have it; their models were not quantized.
        step (`int`, *optional*): of a milestone.
        tokens (`int`, *optional*): that a milestone was trained on.
    """

    name: str
    path: str
    quantization: str = "none"
    step: int | None = None
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The row of the file; `step` and `tokens` are left out where there are none."""
        row = dataclasses.asdict(self)
        return {key: value for key, value in row.items() if value is not None or key not in ("step", "tokens")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRow(ScoredModel):
    """Bits per byte of a model; `created` is the time at which its folder was written, where that is known."""

    created: str | None = None
    bits_per_byte: float
    by_source: dict[str, float]
    protocol: dict[str, Any]
    scored_with: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float


@dataclasses.dataclass(frozen=True)
class CountingRow:
    """Bits per byte of a counting model, fitted on what a milestone had read."""

    name: str
    step: int
    tokens: int
    distinct_tokens: int
    bits_per_byte: float
    by_source: dict[str, float]


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Held-out text that was scored: a prepared data set, and the number and UTF-8 bytes of its documents."""

    path: str
    fingerprint: str
    documents: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Score and standard error of a commonsense task, in percent."""

    metric: str
    score: float
    standard_error: float
    items: int
    version: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonsenseRow(ScoredModel):
    """Commonsense scores of a model; `fingerprint` is that of its files."""

    fingerprint: str
    results: dict[str, TaskResult]
    average: float
    average_standard_error: float
    cut_requests: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class ReplySample:
    """A question with the reply of the model and the true one."""

    question: str
    reply: str
    stopped: bool
    true: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyRow(ScoredModel):
    """How a chat model replies; `data_sha256` is that of the file of conversations."""

    data_sha256: str
    replies: int
    max_new_tokens: int
    stop_rate: float
    median_length: float
    loss: float
    samples: list[ReplySample]


Row = TypeVar("Row", bound=ScoredModel)
Record = TypeVar("Record")


class ScoreFile(Generic[Row]):
    """The rows of a task, in memory and, if it has a path, in a JSON file that is replaced after each change.

    Args:
        path (`Path`, *optional*): JSON file; what it has already is read.
        task (`str`): that is scored.
        settings (`dict`): what all rows have in common; JSON-ready.
        row_type (`type`): a kind of [`ScoredModel`].
        identities (`Callable`): given a row, what tells its model from others. Rows that share an identity are of one
            model.
        check_settings (`Callable`): given the contents of the file, raises `InputError` if its settings differ.
        extra (`Sequence[str]`, *optional*): names of further lists in the file, kept in `extra`.
        rescore (`bool`, *optional*, defaults to `False`): begin without what the file has.

    Raises:
        InputError: if the file is damaged, or its scores must not be mixed with these.
    """

    def __init__(
        self,
        path: Path | None,
        task: str,
        settings: dict[str, Any],
        row_type: type[Row],
        identities: Callable[[Row], set[Hashable]],
        check_settings: Callable[[dict[str, Any]], None] = lambda before: None,
        extra: Sequence[str] = (),
        rescore: bool = False,
    ):
        if path and path.is_dir():
            raise InputError(f"--output {path}: is a folder; name a file")
        self.path, self.settings, self._identities = path, {"task": task, **settings}, identities
        before = {} if rescore else read_score_file(path, task) or {}
        if before:
            check_settings(before)
        self.rows: list[Row] = read_records(before.get("models"), row_type, f"{path}: models") if before else []
        self.extra: dict[str, list[dict[str, Any]]] = {name: before.get(name, []) for name in extra}

    def find(self, identity: Hashable) -> Row | None:
        """The row with this identity, if there is one."""
        return next((row for row in self.rows if identity in self._identities(row)), None)

    def add(self, row: Row) -> None:
        """Adds a row, in place of those of the same model, and writes the file."""
        is_other = [self._identities(other).isdisjoint(self._identities(row)) for other in self.rows]
        place = is_other.index(False) if False in is_other else len(self.rows)
        others = list(itertools.compress(self.rows, is_other))
        self.keep([*others[:place], row, *others[place:]])

    def keep(self, rows: Sequence[Row]) -> None:
        """Keeps these rows and no others, and writes the file."""
        self.rows = list(rows)
        self.write()

    def contents(self, rows: Sequence[Row] | None = None) -> dict[str, Any]:
        """The contents of the file, with all rows or only these."""
        models = [row.to_json() for row in (self.rows if rows is None else rows)]
        return {**self.settings, "models": models, **self.extra, "provenance": provenance.collect()}

    def write(self) -> None:
        """Writes the file. A reader sees the old contents or the new ones, never a part."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.contents())


def read_score_file(path: Path | None, task: str) -> dict[str, Any] | None:
    """The contents of a score file, `None` if it does not exist.

    Raises:
        InputError: if it is damaged or has the scores of another task.
    """
    if path is None or not path.is_file():
        return None
    contents = read_json(path)
    if not isinstance(contents, dict) or contents.get("task") != task:
        raise InputError(f"--output {path}: is not a file of {task} scores. Choose another file.")
    return contents


def read_records(values: Any, record_type: type[Record], where: str) -> list[Record]:
    """Rows or other records of a score file.

    Args:
        values (`Any`): from JSON.
        record_type (`type`): one of the dataclasses of this module.
        where (`str`): names file and key in errors.

    Raises:
        InputError: if a field is missing or of another type, naming it.
    """
    try:
        return TypeAdapter(list[record_type]).validate_python(values)  # type: ignore[valid-type]
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, (where, *problem["loc"])))
        raise InputError(f"{field}: {problem['msg']}; the file is damaged, remove it and score again") from error
