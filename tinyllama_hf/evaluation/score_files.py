"""Score files: JSON files with one row per model, for one task under one protocol. Written after each model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .. import provenance
from ..errors import InputError
from ..files import read_json, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """The fields that all rows share.

    Attributes:
        name (`str`): the model's name; for a quantized model with the kind, `"my-model (nf4)"`, so that its scores
            cannot be mistaken for those of the plain model.
        path (`str`): the model folder.
        quantization (`str`): one of `QUANTIZATIONS`. Files of early versions do not have it; their models are plain.
        adapter (`str`, *optional*): folder or Hub id of the adapter on top of the model.
        step (`int`, *optional*): training step, for milestones.
        tokens (`int`, *optional*): number of training tokens, for milestones.
    """

    name: str
    path: str
    quantization: str = "none"
    adapter: str | None = None
    step: int | None = None
    tokens: int | None = None

    @property
    def folder(self) -> Path:
        """The model folder."""
        return Path(self.path)

    def to_json(self) -> dict[str, Any]:
        """Returns the row as it is written to the file, without optional fields that are `None`."""
        row, optional = dataclasses.asdict(self), ("adapter", "step", "tokens", "items_file")
        return {key: value for key, value in row.items() if value is not None or key not in optional}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """Bits per byte over all documents, and by data set."""

    bits_per_byte: float
    by_source: dict[str, float]


@dataclasses.dataclass(frozen=True)
class TextProtocol:
    """The settings that affect bits per byte: context and stride in tokens, begin-of-sequence and dtype."""

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
    """Bits per byte of an n-gram model, fitted to the text that a milestone was trained on."""

    name: str
    step: int
    tokens: int
    distinct_tokens: int


@dataclasses.dataclass(frozen=True)
class TextSource:
    """The scored held-out text of a prepared data set: all of it, or a sample.

    Attributes:
        path (`str`): the data set.
        fingerprint (`str`): of the data set.
        documents, bytes (`int`): number of documents that were scored, and their UTF-8 bytes.
        total_documents, total_bytes (`int`, *optional*): those of all held-out documents. Files of early versions do
            not have them, since they scored all documents.
        max_bytes (`int`, *optional*): requested size of the sample; `None` for all documents.
    """

    path: str
    fingerprint: str
    documents: int
    bytes: int
    total_documents: int | None = None
    total_bytes: int | None = None
    max_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that change a task score. Scores are comparable if their protocols are equal.

    Attributes:
        harness (`str`): name and version of the harness.
        task_versions (`dict`): the harness's version of each task.
        metrics (`dict`): the reported metric of each task. `"acc"` picks the choice with the highest log-likelihood,
            `"acc_norm"` the one with the highest log-likelihood per character.
        dtype (`str`): dtype of weights and computation.
        num_fewshot (`int` or `dict`): number of few-shot examples; by task if it differs.
        add_bos_token (`bool`, *optional*): whether each request starts with the begin-of-sequence token; `None` for
            the default of the tokenizer.
        apply_chat_template (`bool`): whether each question is formatted as a user turn.
        context_length (`int`): context of the model in tokens. Longer requests are truncated from the left.
        limit (`int`, *optional*): number of items per task, in order; `None` for all.
        data (`dict`): for each task, the SHA-256 of the file that was read, or the location on the Hub.
        sample (`bool`): whether the data are the made-up items that ship with the package.
        name (`str`): `"published"`, `"modern"`, `"olmes"` or `"instruct"`. Files of early versions have none; their
            protocol is `"published"`.
        definitions (`dict`): the hash of the definition of each task and group. Files of early versions have none.
    """

    harness: str
    task_versions: dict[str, int | float | str]
    metrics: dict[str, str]
    dtype: str
    num_fewshot: int | dict[str, int]
    add_bos_token: bool | None
    apply_chat_template: bool
    context_length: int
    limit: int | None
    data: dict[str, str]
    sample: bool
    name: str = "published"
    definitions: dict[str, str] = dataclasses.field(default_factory=dict)

    def differences(self, other: "Protocol") -> list[str]:
        """Lists the differences from another protocol: `"limit (100, not None)"`, `"data of piqa"`."""
        found = []
        for key, mine in vars(self).items():
            theirs = vars(other)[key]
            if isinstance(mine, dict):
                # A definition without a hash is not known to differ. The other fields have the set of tasks.
                names = [task for task in mine if task in theirs] if key == "definitions" else mine | theirs
                tasks = [task for task in names if mine.get(task) != theirs.get(task)]
                found += [f"{key} of {', '.join(tasks)}"] if tasks else []
            elif mine != theirs:
                found.append(f"{key} ({theirs}, not {mine})")
        return found


@dataclasses.dataclass(frozen=True)
class MetricScore:
    """A metric of a task and its standard error: in percent for shares, in bits for `bits_per_byte`."""

    score: float
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Score and standard error on a task, in percent, and all its metrics.

    The standard error is lm-eval's, sqrt(p (1 - p) / (n - 1)) for a share p of n items. It is `None` if all or no
    items are right, where the formula gives 0 although the score is uncertain (Wilson 1927, J. Am. Stat. Assoc. 22,
    209).
    """

    metric: str
    score: float
    standard_error: float | None
    items: int
    version: int | float | str
    metrics: dict[str, MetricScore] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRow(ScoredModel):
    """Task scores of a model.

    Attributes:
        fingerprint (`str`): hash of the model's files.
        results (`dict`): the score of each task.
        groups (`dict`): the scores of groups of tasks, as the harness combines them.
        average (`float`, *optional*): unweighted mean of the seven scores, under the published protocol. It has no
            standard error if one of its scores has none.
        cut_requests (`int`): number of requests that were truncated to the context.
        items_file (`str`, *optional*): file with the answer to each item, relative to the folder of the score file.
    """

    fingerprint: str
    results: dict[str, TaskScore]
    groups: dict[str, TaskScore] = dataclasses.field(default_factory=dict)
    average: float | None = None
    average_standard_error: float | None = None
    cut_requests: int
    seconds: float
    items_file: str | None = None


@dataclasses.dataclass(frozen=True)
class ReplySample:
    """A question, the reply of the model and the reference reply."""

    question: str
    reply: str
    stopped: bool
    true: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyScores:
    """Stop rate and median length of a model's replies, and the loss on the reference replies in nats per token."""

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


@dataclasses.dataclass(kw_only=True)
class TextScoreFile:
    """Bits per byte of models on one text. `data` is part of the protocol: another sample is another text."""

    task: str = "bits_per_byte"
    data: list[TextSource]
    models: list[TextRow]
    baselines: list[BaselineRow] = dataclasses.field(default_factory=list)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class TaskScoreFile:
    """Task scores of models under one protocol."""

    task: str = "commonsense"
    protocol: Protocol
    models: list[TaskRow]
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class ReplyScoreFile:
    """Scores of the replies of chat models."""

    task: str = "replies"
    decoding: str = "greedy"
    models: list[ReplyRow]
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


# The values of `task` for a kind of score file: scores under other protocols than the published one have their own.
_KINDS = {"commonsense": ("commonsense", "tasks")}

SERVER_DTYPE = "server"  # of the protocol of a model behind a server, which does not report its dtype
Row = TypeVar("Row", bound=ScoredModel)
File = TypeVar("File", TextScoreFile, TaskScoreFile, ReplyScoreFile)


def read_contents(path: Path | None, task: str, rescore: bool = False) -> dict[str, Any] | None:
    """Returns the JSON object in a score file; `None` if the file does not exist or `rescore` is set.

    Raises:
        InputError: if the path is a folder, or the file is not valid JSON or has the scores of another task.
    """
    if path and path.is_dir():
        raise InputError(f"--output {path} is a folder. Name a file")
    if rescore or path is None or not path.is_file():
        return None
    contents = read_json(path)
    if not isinstance(contents, dict) or contents.get("task") not in _KINDS.get(task, (task,)):
        raise InputError(f"{path}: is not a file of {task} scores. Choose another file.")
    return contents


def read_scores(path: Path | None, kind: type[File], rescore: bool = False) -> File | None:
    """Reads a score file; returns `None` if there is none.

    Args:
        path (`Path`, *optional*): the JSON file.
        kind (`type`): one of the three types of score files.
        rescore (`bool`, *optional*, defaults to `False`): ignore an existing file.

    Raises:
        InputError: as [`read_contents`]; if a field is missing or has the wrong type.
    """
    contents = read_contents(path, kind.task, rescore)
    try:
        return None if contents is None else TypeAdapter(kind).validate_python(contents)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"{path}: {field}: {problem['msg']}. The file is damaged; remove it and score again"
        ) from error


def replace_rows(rows: list[Row], old: Sequence[Row], new: Row) -> None:
    """Replaces the old rows of a model with a new one, which is appended if there are none."""
    place = next((number for number, row in enumerate(rows) if row in old), len(rows))
    rows[:] = [*rows[:place], new, *(row for row in rows[place:] if row not in old)]


def write_scores(path: Path | None, file: TextScoreFile | TaskScoreFile | ReplyScoreFile) -> None:
    """Records this process in the provenance and, if there is a path, writes the file.

    Called after each model, so that an interrupted evaluation loses at most one model. A reader sees the old contents
    or the new ones.
    """
    file.provenance = provenance.collect()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**dataclasses.asdict(file), "models": [row.to_json() for row in file.models]})


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The score files of a run or a model folder; `None` for missing files."""

    text: TextScoreFile | None = None
    commonsense: TaskScoreFile | None = None
    replies: ReplyScoreFile | None = None

    def of_model(self, name: str) -> "RunScores":
        """Returns the files reduced to the row of one model; `None` for files that do not have it."""
        return RunScores(_only(self.text, name), _only(self.commonsense, name), _only(self.replies, name))


NO_SCORES = RunScores()


def _only(file: File | None, name: str) -> File | None:
    rows = [row for row in file.models if row.name == name] if file else []
    return dataclasses.replace(file, models=rows[:1]) if file and rows else None


def read_run_scores(folder: Path) -> RunScores:
    """Reads the score files that `tinyllama-hf eval` writes into a run or a model folder.

    Raises:
        InputError: as [`read_scores`]; if the commonsense scores are not those of the seven tasks.
    """
    commonsense = read_scores(folder / "commonsense.json", TaskScoreFile)
    if commonsense and any(row.average is None for row in commonsense.models):
        raise InputError(
            f"{folder / 'commonsense.json'}: does not have all seven tasks of the published protocol, which the "
            "report and the model card show. Rename files with scores of other tasks"
        )
    if commonsense and commonsense.protocol.dtype == SERVER_DTYPE:
        raise InputError(
            f"{folder / 'commonsense.json'}: has the scores of a model on a server, whose weights are not known. "
            "Score the folder itself for the report and the model card, or rename the file"
        )
    return RunScores(
        read_scores(folder / "scores.json", TextScoreFile),
        commonsense,
        read_scores(folder / "replies.json", ReplyScoreFile),
    )
