"""Answers of models that are not completely scored yet: JSON lines in a file next to the score file.

So a resumed evaluation repeats no request. The file is written after each forward pass, and removed when the score
file has the complete rows of all models.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import InputError
from ...files import locked


Answer = list[float | bool] | str  # log-likelihood and whether it is greedy; or a generated text


def request_key(kind: str, arguments: tuple[Any, ...]) -> str:
    """Returns the hash of a request: its kind, its strings and its generation settings."""
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()[:32]


def repeated_keys(kind: str, arguments: Iterable[tuple[Any, ...]]) -> list[str]:
    """Returns a [`request_key`] for each request. Several samples of one request have different keys."""
    repeats: dict[str, int] = {}
    keys = []
    for pair in arguments:
        key = request_key(kind, pair)
        repeats[key] = repeats.get(key, -1) + 1
        keys.append(f"{key}/{repeats[key]}" if repeats[key] else key)
    return keys


class KeptAnswers:
    """The answers of one model, as a mapping from [`request_key`].

    Args:
        model (`str`): identifies the model and its settings.
        answers (`dict`): those of an interrupted evaluation.
        file (`BinaryIO`, *optional*): file to append to; without one, nothing is kept after the process ends.
    """

    def __init__(self, model: str, answers: dict[str, Answer], file: BinaryIO | None):
        self.model, self._answers, self._file = model, answers, file

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keeps answers. When this returns, they have been passed to the operating system."""
        self._answers.update(answers)
        if self._file:
            lines = [json.dumps({"model": self.model, "request": key, "answer": a}) for key, a in answers.items()]
            self._file.write("".join(line + "\n" for line in lines).encode())
            self._file.flush()


class AnswerFile:
    """The kept answers of all models of a score file. Created by [`open_answers`], which locks the file."""

    def __init__(self, path: Path | None, file: BinaryIO | None):
        self._file = file
        self._models: dict[str, dict[str, Answer]] = {}
        if path and file:
            self._models, size = _read(path)
            file.truncate(size)  # a killed process may have written a part of a line

    def of_model(self, model: str) -> KeptAnswers:
        """Returns the answers of a model, by a hash of everything that affects them, apart from the request."""
        return KeptAnswers(model, self._models.setdefault(model, {}), self._file)

    def discard(self, models: Iterable[str]) -> None:
        """Removes the answers of models with a row in the score file."""
        for model in models:
            self._models.pop(model, None)
            self._write({"model": model, "is_complete": True})
        if self._file and not any(self._models.values()):
            self._file.truncate(0)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file:
            self._file.write(f"{json.dumps(record)}\n".encode())
            self._file.flush()


def answers_path(output: Path) -> Path:
    """Returns the file of kept answers of a score file."""
    return output.with_name(f"{output.stem}.partial.jsonl")


def count_kept(output: Path) -> int:
    """Returns the number of answers that an interrupted evaluation has kept."""
    path = answers_path(output)
    return sum(map(len, _read(path)[0].values())) if path.is_file() else 0


@contextlib.contextmanager
def open_answers(output: Path | None) -> Iterator[AnswerFile]:
    """Opens the file of kept answers, and locks it, so that no other process can write to the same output.

    Raises:
        InputError: if another process has it, or the file is damaged.
    """
    if output is None:
        yield AnswerFile(None, None)
        return
    path = answers_path(output)
    with locked(path, f"--output {output}") as file:
        opened = AnswerFile(path, file)
        try:
            yield opened
        finally:
            if not path.stat().st_size:
                path.unlink()


def _read(path: Path) -> tuple[dict[str, dict[str, Answer]], int]:
    """Returns the answers by model and request, and the size of the file up to the end of its last complete line."""
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    models: dict[str, dict[str, Answer]] = {}
    try:
        for line in whole.splitlines():
            record = json.loads(line)
            if record.get("is_complete"):
                models.pop(str(record["model"]), None)
                continue
            answer = record["answer"]
            if not isinstance(answer, str):
                answer = [float(answer[0]), bool(answer[1])]
            models.setdefault(str(record["model"]), {})[str(record["request"])] = answer
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path}: damaged. It has the answers of an interrupted evaluation; remove it to score them again"
        ) from error
    return models, len(whole + newline)
