"""Hashes of task definitions, so that scores under a changed definition are not taken as those of the same task."""

import importlib.util
from typing import Any

from ...provenance import fingerprint
from .task_data import is_url
from .task_index import ChosenTasks, Function, read_definition


def hash_definitions(chosen: ChosenTasks) -> dict[str, str]:
    """Returns the hash of the definition of each task and group, with its includes and the overrides of its groups.

    It does not depend on the location of the files. For a function, the whole Python file is hashed, since other
    functions in it may affect scores too. Local rows have separate hashes, see [`TaskSource`].
    """
    groups = {name: read_definition(file.path) for name, file in chosen.files.items() if file.is_group and file.path}
    return {name: fingerprint(_plain(definition)) for name, definition in (groups | chosen.tasks).items()}


def _plain(value: Any) -> Any:
    """Returns a part of a definition in JSON types: functions with their source, files of local rows without paths."""
    if isinstance(value, Function):
        return [value, _source(value)]
    if isinstance(value, dict):
        return {str(key): _remote(part) if key == "data_files" else _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if isinstance(value, int | float | str | None) else str(value)  # YAML has dates


def _remote(files: Any) -> Any:
    """Returns the files of rows that a definition names, without the local ones."""
    if isinstance(files, dict):
        return {split: _remote(part) for split, part in files.items()}
    if isinstance(files, list):
        return [_remote(part) for part in files]
    return files if is_url(files) else None


def _source(function: Function) -> str | None:
    """Returns the text of the Python file that lm-eval imports a function from; `None` if it is compiled."""
    module = function.removeprefix("!function ").rpartition(".")[0]
    file = function.folder / f"{module.replace('.', '/')}.py"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    spec = importlib.util.find_spec(module)
    loader: Any = spec and spec.loader
    return loader.get_source(module) if loader else None
