"""Score files: JSON files with one row per model, for one task under one protocol. Written after each model."""

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
    """The fields that all rows share.

    Attributes:
        name (`str`): name of the model, including its quantization.
        path (`str`): the model folder.
        quantization (`str`): one of `QUANTIZATIONS`. Files of early versions do not have it; their models are plain.
        step (`int`, *optional*): training step, for milestones.
        tokens (`int`, *optional*): number of training tokens, for milestones.
    """

    name: str
    path: str
    quantization: str = "none"
    step: int | None = None
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the row as it is written to the file, without `step` and `tokens` where they are `None`."""
        row = dataclasses.asdict(self)
        return {key: value for key, value in row.items() if value is not None or key not in ("step", "tokens")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """Bits per byte over all documents, and by data set."""

    bits_per_byte: float
    by_source: dict[str, float]


@dataclasses.dataclass(frozen=True)
class TextProtocol:
    """The settings that affect bits per byte: context and stride in tokens, begin-of-sequence, and dtype."""

    context: int
    stride: int
    bos: bool
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRow(BitsPerByte, ScoredModel):
    """Bits per byte of a model. `created` is the time at which its folder was written, if known."""

    created: str | None = None
    protocol: TextProtocol
    scored_with: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineRow(BitsPerByte):
    """Bits per byte of an n-gram model, fitted on the text that a milestone was trained on."""

    name: str
    step: int
    tokens: int
    distinct_tokens: int


@dataclasses.dataclass(frozen=True)
class TextSource:
    """The held-out text of a prepared data set: its path, fingerprint, number of documents and UTF-8 bytes."""

    path: str
    fingerprint: str
    documents: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Score and standard error on a commonsense task, in percent."""

    metric: str
    score: float
    standard_error: float
    items: int
    version: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonsenseRow(ScoredModel):
    """Commonsense scores of a model. `fingerprint` is the hash of its files."""

    fingerprint: str
    results: dict[str, TaskResult]
    average: float
    average_standard_error: float
    cut_requests: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class ReplySample:
    """A question, the reply of the model and the true reply."""

    question: str
    reply: str
    stopped: bool
    true: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyScores:
    """Stop rate and median length of a model's replies, and the loss of the true replies in nats per token."""

    replies: int
    max_new_tokens: int
    stop_rate: float
    median_length: float
    loss: float
    samples: list[ReplySample]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyRow(ReplyScores, ScoredModel):
    """Reply scores of a model. `data_sha256` is the hash of the file of conversations."""

    data_sha256: str


Row = TypeVar("Row", bound=ScoredModel)
Record = TypeVar("Record")


class ScoreFile(Generic[Row]):
    """The rows of a score file. Each change is written at once, so an interrupted evaluation loses one model at most.

    Args:
        path (`Path`, *optional*): the JSON file. Existing rows are read from it. Without a path, rows are kept in
            memory only.
        task (`str`): name of the task.
        settings (`dict`): what all rows share, JSON-ready.
        row_type (`type`): the subclass of [`ScoredModel`] of the rows.
        identities (`Callable`): returns the identities of a row. Two rows that share one belong to the same model.
        check_settings (`Callable`): gets the contents of an existing file; raises `InputError` if its settings differ.
        extra (`Sequence[str]`, *optional*): names of further lists in the file, available as `extra`.
        rescore (`bool`, *optional*, defaults to `False`): ignore an existing file and replace it.

    Raises:
        InputError: if an existing file is damaged, or has scores of another task or with other settings.
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
            raise InputError(f"--output {path} is a folder. Name a file")
        self.path, self.settings, self._identities = path, {"task": task, **settings}, identities
        before = {} if rescore else read_score_file(path, task) or {}
        if before:
            check_settings(before)
        self.rows: list[Row] = read_records(before.get("models"), row_type, f"{path}: models") if before else []
        self.extra: dict[str, list[dict[str, Any]]] = {name: before.get(name, []) for name in extra}

    def find(self, identity: Hashable) -> Row | None:
        """Returns the row with this identity, or `None`."""
        return next((row for row in self.rows if identity in self._identities(row)), None)

    def add(self, row: Row) -> None:
        """Adds a row, or replaces the rows of the same model, and writes the file."""
        is_other = [self._identities(other).isdisjoint(self._identities(row)) for other in self.rows]
        place = is_other.index(False) if False in is_other else len(self.rows)
        others = list(itertools.compress(self.rows, is_other))
        self.keep([*others[:place], row, *others[place:]])

    def keep(self, rows: Sequence[Row]) -> None:
        """Replaces all rows and writes the file."""
        self.rows = list(rows)
        self.write()

    def contents(self, rows: Sequence[Row] | None = None) -> dict[str, Any]:
        """Returns the contents of the file, with all rows or only the given ones."""
        models = [row.to_json() for row in (self.rows if rows is None else rows)]
        return {**self.settings, "models": models, **self.extra, "provenance": provenance.collect()}

    def write(self) -> None:
        """Writes the file atomically: a reader sees the old contents or the new ones."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.contents())


def read_score_file(path: Path | None, task: str) -> dict[str, Any] | None:
    """Returns the contents of a score file, or `None` if it does not exist.

    Raises:
        InputError: if the file is not valid JSON, or has the scores of another task.
    """
    if path is None or not path.is_file():
        return None
    contents = read_json(path)
    if not isinstance(contents, dict) or contents.get("task") != task:
        raise InputError(f"--output {path}: is not a file of {task} scores. Choose another file.")
    return contents


def read_records(values: Any, record_type: type[Record], where: str) -> list[Record]:
    """Converts the JSON of a list in a score file to dataclasses.

    Args:
        values (`Any`): the list.
        record_type (`type`): a dataclass of this module.
        where (`str`): file and key, for error messages.

    Raises:
        InputError: if a field is missing or has the wrong type; names the field.
    """
    try:
        return TypeAdapter(list[record_type]).validate_python(values)  # type: ignore[valid-type]  # known only here
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, (where, *problem["loc"])))
        raise InputError(f"{field}: {problem['msg']}. The file is damaged; remove it and score again") from error
