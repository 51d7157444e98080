"""The score files that `tinyllama-hf eval` writes into a run or a model folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json


@dataclass(frozen=True)
class Scores:
    """Contents of the score files of a run or a model; empty for missing files.

    Rows stay JSON objects, since files of older versions lack some fields.
    """

    bits_per_byte: dict[str, Any] = field(default_factory=dict)
    commonsense: dict[str, Any] = field(default_factory=dict)
    replies: dict[str, Any] = field(default_factory=dict)


NO_SCORES = Scores()


def read_scores(folder: Path) -> Scores:
    """Reads the score files of a run or a model folder."""
    files = [folder / name for name in ("scores.json", "commonsense.json", "replies.json")]
    return Scores(*(read_json(file) if file.is_file() else {} for file in files))


def row_of(name: str, scores: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of a model in a score file, `None` if it was not scored."""
    return next((row for row in scores.get("models", ()) if row["name"] == name), None)
