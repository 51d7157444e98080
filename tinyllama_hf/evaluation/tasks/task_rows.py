"""Checks the rows of tasks, since lm-eval renders a missing passage as the word "None"."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import UndefinedError

from ...errors import InputError
from ...text import check_text


# Raised by a task definition for a malformed row.
BAD_ROW = (UndefinedError, KeyError, ValueError, TypeError, AttributeError, IndexError)
NUM_ASKED = 3
_NUM_TYPICAL = 200


def typical_rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the first rows that have the fields and types of most rows."""
    kinds = [json.dumps(_kind(row)) for row in rows]
    common = Counter(kinds).most_common(1)
    return [row for row, kind in zip(rows, kinds, strict=True) if kind == common[0][0]][:_NUM_TYPICAL]


def _kind(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _kind(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return sorted({json.dumps(_kind(part)) for part in value})
    return type(value).__name__


def decisive_fields(task: Any, *rows: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that affect the question, choices, answer or score, found by setting each to `None`.

    Args:
        task (`Any`): an lm-eval task.
        rows (`dict`): valid rows of its file; a field that affects one of them is returned.

    Returns:
        `dict`: for each field, its value in the first of the rows, as an example of the type.
    """
    found: dict[str, Any] = {}
    for row in rows:
        whole = _asked(task, row)
        for name in row.keys() - found.keys():
            if _asked(task, {**row, name: None}, name) != _without(whole, name):
                found[name] = rows[0].get(name, row[name])
    return {name: found[name] for row in rows[:1] for name in [*row, *found] if name in found}


def _asked(task: Any, row: dict[str, Any], changed: str | None = None) -> dict[str, Any] | None:
    """Returns everything that a task derives from a row; `None` if it raises an error. `changed` is left out."""
    from datasets import Dataset

    document: dict[str, Any] = row
    try:
        made: dict[str, Any] = {}
        if task.config.process_docs is not None:
            document = task.config.process_docs(Dataset.from_list([row]))[0]
            made = {f"document {name}": value for name, value in document.items()}
        made["question"] = task.fewshot_context(document, num_fewshot=0, gen_prefix=task.doc_to_prefix(document))
        made["choices"] = task.doc_to_choice(document) if task.config.doc_to_choice is not None else None
        made["target"] = task.doc_to_target(document)
        if callable(task.config.process_results) and not task.config.unsafe_code:
            made["score"] = repr(_score_nothing(task, document, len(made["choices"] or [""])))
    except (AssertionError, *BAD_ROW):
        return None
    return _without(made, changed)


def _without(made: dict[str, Any] | None, name: str | None) -> dict[str, Any] | None:
    return made and {key: value for key, value in made.items() if key != f"document {name}"}


def _score_nothing(task: Any, document: dict[str, Any], num_choices: int) -> Any:
    """Scores an empty answer, since some tasks read some fields only to score."""
    answer = [""] if task.OUTPUT_TYPE == "generate_until" else [(0.0, False)] * num_choices
    return task.process_results(document, answer)


def check_rows(name: str, rows: Iterable[tuple[int, Any]], fields: dict[str, Any], source: str) -> None:
    """Checks that rows have all fields that affect the task's questions.

    Args:
        name (`str`): name of the task.
        rows (`Iterable[tuple[int, Any]]`): pairs of row number and row.
        fields (`dict`): from [`decisive_fields`]; the values are examples of the types.
        source (`str`): the file, for error messages.

    Raises:
        InputError: if a field is missing, null or of another type; the message names the row and the field.
    """
    for number, row in rows:
        _check(row, fields, f"{source}, row {number}", f"{name} needs {', '.join(map(repr, fields))}")


def _check(value: Any, example: Any, where: str, rule: str) -> None:
    if type(value) is not type(example) and not (type(value) is int and type(example) is float):
        shown = json.dumps(value, default=str)[:40]
        raise InputError(f"{where} is {shown}, not of type {type(example).__name__}. {rule}. Fix or remove the row")
    if isinstance(example, dict):
        for key, part in example.items():
            if key not in value:
                raise InputError(f"{where} has no field {key!r}. {rule}. Fix or remove the row")
            _check(value[key], part, f"{where}, field {key!r}", rule)
    elif isinstance(example, list) and example:
        for number, part in enumerate(value):
            _check(part, example[0], f"{where}, item {number}", rule)
    elif isinstance(example, str):
        check_text(value, where)
