"""Finds task definitions by name: those of lm-eval, ours in `eval/tasks/`, and those in a folder of the user.

lm-eval's own index parses 13,986 YAML files, which takes 5 seconds, after an import of 3 seconds. This one reads only
the keys that it needs, with a regular expression, and imports nothing.
"""

import dataclasses
import difflib
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...errors import InputError


_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_KEY = re.compile(r"""^["']?(task|group|tag|include|class)["']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)""", re.MULTILINE)
# Keys of a group that are not settings for its tasks: the fields of lm-eval's `GroupConfig`.
_OF_GROUP = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include"}


class Function(str):
    """A function in a definition, as `"!function NAME"`. NAME is relative to `folder`, the definition's folder."""

    folder: Path


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """Where a name is defined. A group lists its tasks in its file; a tag has no file, only the names of its tasks."""

    name: str
    path: Path | None
    is_group: bool = False
    members: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChosenTasks:
    """The tasks and groups that names refer to: their files, and the settings of the tasks.

    Attributes:
        tasks (`dict`): definition of each task, with its includes and the overrides of its groups.
        files (`dict`): file of each task and group.
        members (`dict`): the tasks of each name.
    """

    tasks: dict[str, dict[str, Any]]
    files: dict[str, TaskFile]
    members: dict[str, list[str]]


def eval_folder() -> Path:
    """Returns the folder `eval/`: inside the package if installed, next to it in a clone."""
    package = Path(__file__).parents[2]
    return next(path for path in (package / "eval", package.parent / "eval") if path.is_dir())


def stock_folder() -> Path:
    """Returns lm-eval's folder of tasks, without importing lm-eval.

    Raises:
        InputError: if lm-eval is not installed.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise InputError("the evaluation on tasks needs the package lm_eval: pip install 'tinyllama_hf[eval]'")
    return Path(found.submodule_search_locations[0]) / "tasks"


@functools.lru_cache(maxsize=4)
def index_tasks(include: Path | None = None) -> dict[str, TaskFile]:
    """Returns all task definitions by name. Later folders override earlier ones: lm-eval, ours, the user's.

    Args:
        include (`Path`, *optional*): the user's folder.

    Raises:
        InputError: if the folder does not exist or has no definitions.
    """
    index: dict[str, TaskFile] = {}
    for folder in (stock_folder(), eval_folder() / "tasks"):
        index |= _index_folder(folder)
    if include is not None:
        own = _index_folder(include.resolve(), _parsed_keys) if include.is_dir() else {}
        if not own:
            raise InputError(
                f"--include {include}: no task definitions. Name a folder with .yaml files of lm-eval tasks"
            )
        index |= own
    return index


def find_task(name: str, index: dict[str, TaskFile]) -> TaskFile:
    """Returns the definition with a name.

    Raises:
        InputError: if there is none; the message names the nearest one.
    """
    if name not in index:
        near = difflib.get_close_matches(name, index, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them"
        raise InputError(f"--task {name!r}: unknown task. {hint}")
    return index[name]


def choose_tasks(names: Sequence[str], index: dict[str, TaskFile]) -> ChosenTasks:
    """Resolves names of tasks, groups and tags to tasks.

    Raises:
        InputError: for an unknown name, a task that is included twice, or a definition that cannot be read.
    """
    tasks: dict[str, dict[str, Any]] = {}
    files: dict[str, TaskFile] = {}
    members: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        members[name] = []
        for file, definition in _follow(name, {}, index):
            files[file.name] = file
            if definition is None:
                continue
            if other := next((owner for owner in members if owner != name and file.name in members[owner]), None):
                raise InputError(f"--task {other} and --task {name} both include {file.name}. Name one of them")
            tasks[file.name] = definition
            members[name].append(file.name)
    return ChosenTasks(tasks, files, members)


def read_definition(path: Path) -> dict[str, Any]:
    """Reads a definition with its includes. Functions are not imported, see [`Function`].

    Raises:
        InputError: if a file is missing or not valid YAML.
    """
    try:
        with path.open(encoding="utf-8") as file:
            definition = yaml.load(file, Loader=_DefinitionLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable task definition ({' '.join(str(error).split())})") from error
    if not isinstance(definition, dict):
        raise InputError(f"{path}: not a task definition, which must be a YAML mapping")
    includes = definition.pop("include", [])
    merged: dict[str, Any] = {}
    for included in includes if isinstance(includes, list) else [includes]:
        merged |= read_definition(path.parent / included)  # an absolute path replaces the folder
    return merged | definition


class _DefinitionLoader(yaml.SafeLoader):
    pass


def _construct_function(loader: _DefinitionLoader, node: yaml.ScalarNode) -> Function:
    function = Function(f"!function {node.value}")
    function.folder = Path(loader.name).parent
    return function


_DefinitionLoader.add_constructor("!function", _construct_function)


def _index_folder(
    folder: Path, keys_of: Callable[[Path], dict[str, tuple[str, ...]]] | None = None
) -> dict[str, TaskFile]:
    found: dict[str, TaskFile] = {}
    tags: dict[str, list[str]] = {}
    paths = (path for path in folder.rglob("*.yaml") if not _IGNORED.intersection(path.parts))
    for path in sorted(paths, key=lambda path: path.as_posix()):
        keys = (keys_of or _keys)(path)
        is_group = "group" in keys and "class" not in keys
        name = next(iter(keys.get("group" if is_group else "task", ())), None)
        if name and name not in found:  # lm-eval keeps the first of two in a folder
            found[name] = TaskFile(name, path, is_group)
            if not found[name].is_group:
                for tag in keys.get("tag", ()):
                    tags.setdefault(tag, []).append(name)
    return {tag: TaskFile(tag, None, members=tuple(sorted(names))) for tag, names in tags.items()} | found


@functools.lru_cache(maxsize=4096)
def _keys(path: Path) -> dict[str, tuple[str, ...]]:
    """Returns the values of `task`, `group` and `tag` in a file and in those that it includes."""
    try:
        pairs = _KEY.findall(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    own = {key: tuple(_values(text)) for key, text in pairs}
    inherited: dict[str, tuple[str, ...]] = {}
    for included in own.pop("include", ()):
        inherited |= _keys(path.parent / included)
    return inherited | own


def _parsed_keys(path: Path) -> dict[str, tuple[str, ...]]:
    """Returns the same as [`_keys`] for a definition of the user, which may be in any form of YAML."""
    found = {}
    for key, value in read_definition(path).items():
        if key in ("task", "group", "tag", "class"):
            found[key] = tuple(
                part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str)
            )
    return found


def _values(text: str) -> Iterator[str]:
    """Yields the names in a value: `name`, `"name"`, `[a, b]` or a list over several lines."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.split("\n")]
    for line in lines[:1] + [line.removeprefix("-") for line in lines[1:]]:
        for part in line.strip("[] ").split(","):
            if value := part.strip().strip("\"'"):
                yield value


def _follow(
    name: str, changes: dict[str, Any], index: dict[str, TaskFile]
) -> Iterator[tuple[TaskFile, dict[str, Any] | None]]:
    """Yields tasks with their definitions, and groups with `None`."""
    file = find_task(name, index)
    if file.path is None:
        for member in file.members:
            yield from _follow(member, changes, index)
        return
    definition = read_definition(file.path)
    if not file.is_group:
        yield file, definition | changes
        return
    yield file, None
    yield from _follow_group(definition, changes, index)


def _follow_group(
    group: dict[str, Any], changes: dict[str, Any], index: dict[str, TaskFile]
) -> Iterator[tuple[TaskFile, dict[str, Any] | None]]:
    """Resolves the list of a group, in which an entry is a name, a name with changed settings, or a group."""
    changes = {key: value for key, value in group.items() if key not in _OF_GROUP} | changes
    members = group.get("task") or []
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield from _follow(member, changes, index)
        elif "group" in member and member["group"] not in index:
            yield from _follow_group(member, changes, index)
        else:
            own = {key: value for key, value in member.items() if key not in ("task", "group")}
            yield from _follow(member.get("group") or member["task"], changes | own, index)
