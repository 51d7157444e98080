"""The answers of a model to the items of tasks: a compressed file per model next to its scores."""

import dataclasses
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from ..errors import InputError
from ..files import new_file
from .score_files import TaskRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredItem:
    """The answer to one item of a task.

    Attributes:
        task (`str`): name of the task.
        index (`int`): number of the item in the task, from 0.
        doc (`str`): hash of the item's row. Items of two models are the same if task and hash are equal.
        metrics (`dict`): the metrics of this item: 0 or 1 for shares such as `"acc"`, bits for `"bits_per_byte"`.
            For generation tasks with several filters, the name is `"exact_match,strict-match"`.
        log_likelihoods (`list[float]`): for multiple choice, that of each choice, in nats.
        chosen (`int`, *optional*): for multiple choice, the choice that the reported metric picks.
        gold (`int`, *optional*), also_right (`list[int]`): for multiple choice, the right choice, and others.
        replies (`list[str]`): for generation tasks, the generated texts.
        question (`str`, *optional*), choices (`list[str]`): the texts, kept for the first wrong answers of each task.
    """

    task: str
    index: int
    doc: str
    metrics: dict[str, float]
    log_likelihoods: list[float] = dataclasses.field(default_factory=list)
    chosen: int | None = None
    gold: int | None = None
    also_right: list[int] = dataclasses.field(default_factory=list)
    replies: list[str] = dataclasses.field(default_factory=list)
    question: str | None = None
    choices: list[str] = dataclasses.field(default_factory=list)

    @property
    def right_choices(self) -> list[int]:
        """All right choices; empty unless the task is multiple choice."""
        return [] if self.gold is None else [self.gold, *self.also_right]

    def to_json(self) -> dict[str, object]:
        """Returns the item as it is written to a file, without empty fields."""
        return {key: value for key, value in vars(self).items() if value not in (None, [])}


def items_file_name(score_file: Path, row: TaskRow) -> str:
    """Returns the path of a model's items, relative to the folder of the score file."""
    kind = "" if row.quantization == "none" else f"-{row.quantization}"
    return f"{score_file.stem}.items/{row.fingerprint[:16]}{kind}.jsonl.gz"


def write_scored_items(path: Path, items: Iterable[ScoredItem]) -> None:
    """Writes the items of a model. A reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in items)
    with new_file(path) as file:
        file.write(gzip.compress(text.encode(), mtime=0))


def read_scored_items(score_file: Path, row: TaskRow) -> list[ScoredItem]:
    """Reads the items of a row of a score file.

    Raises:
        InputError: if the row has no items, or their file is missing or damaged.
    """
    if row.items_file is None:
        raise InputError(f"{score_file}: {row.name} has scores without items. Score it with `eval tasks --rescore`")
    path = score_file.parent / row.items_file
    try:
        # Not `splitlines`, which also splits at U+2028 and other characters inside a text.
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        return TypeAdapter(list[ScoredItem]).validate_python([json.loads(line) for line in lines if line])
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; it has the items of {row.name}. A score file needs its .items folder next to it; "
            "copy the folder, or score the model again with `eval tasks`"
        ) from error
    except (OSError, EOFError, ValueError) as error:  # of gzip, UTF-8, JSON and pydantic
        raise InputError(f"{path}: damaged. Score {row.name} again with `eval tasks`") from error
