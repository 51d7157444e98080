"""Checks the rows of the commonsense tasks, since lm-eval renders a missing passage as the word "None"."""

import json
from collections.abc import Iterable
from typing import Any

from jinja2 import UndefinedError

from ..errors import InputError
from ..text import check_text


# Raised by a task definition for a malformed row.
BAD_ROW = (UndefinedError, KeyError, ValueError, TypeError, AttributeError)


def decisive_fields(task: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row that affect question, choices or answer, found by setting each to `None`.

    Args:
        task (`Any`): an lm-eval task.
        row (`dict`): a valid row of its file.
    """
    whole = _asked(task, row)
    return {name: value for name, value in row.items() if _asked(task, {**row, name: None}) != whole}


def _asked(task: Any, row: dict[str, Any]) -> list[Any] | None:
    from datasets import Dataset

    documents = Dataset.from_list([row])
    try:
        if task.config.process_docs is not None:
            documents = task.config.process_docs(documents)
        return [of(documents[0]) for of in (task.doc_to_text, task.doc_to_choice, task.doc_to_target)]
    except BAD_ROW:
        return None


def check_rows(name: str, rows: Iterable[tuple[int, Any]], fields: dict[str, Any], source: str) -> None:
    """Checks that rows have all fields that affect the task's questions.

    Args:
        name (`str`): name of the task.
        rows (`Iterable[tuple[int, Any]]`): pairs of row number and row.
        fields (`dict`): from [`decisive_fields`]; the values are examples of the types.
        source (`str`): the file, for error messages.

    Raises:
        InputError: if a field is missing, null or of another type; names the row and the field.
    """
    for number, row in rows:
        _check(row, fields, f"{source}, row {number}", f"{name} needs {', '.join(map(repr, fields))}")


def _check(value: Any, example: Any, where: str, rule: str) -> None:
    if type(value) is not type(example):
        shown = json.dumps(value, default=str)[:40]
        raise InputError(f"{where} is {shown}, not of type {type(example).__name__}. {rule}. Fix or remove the row")
    if isinstance(example, dict):
        for key, part in example.items():
            if key not in value:
                raise InputError(f"{where} has no field {key!r}. {rule}. Fix or remove the row")
            _check(value[key], part, f"{where}, field {key!r}", rule)
    elif isinstance(example, list):
        for number, part in enumerate(value):
            _check(part, example[0], f"{where}, item {number}", rule)
    elif isinstance(example, str):
        check_text(value, where)
