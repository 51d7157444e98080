"""Loads tasks with lm-eval, from a folder of definitions that include the original ones and point to local rows."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...errors import InputError, one_line
from .task_data import WHERE_DATA_COME_FROM, TaskSource, local_rows_settings
from .task_index import ChosenTasks


_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_LOCAL_ROWS = "custom_dataset: !function tinyllama_hf.evaluation.tasks.task_data.load_local_rows\n"


def load_example(source: TaskSource, chosen: ChosenTasks, folder: Path, examples: Path) -> Any:
    """Returns a task that has the rows of one file in all of its splits."""
    folder.mkdir(exist_ok=True)
    _write_definition(source, chosen, folder, dict.fromkeys(source.files, examples))
    with quiet_harness():
        return _manager(folder).load([source.task])["tasks"][source.task]


def load_tasks(
    chosen: ChosenTasks, sources: dict[str, TaskSource], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns all tasks and groups.

    Args:
        chosen (`ChosenTasks`): their definitions.
        sources (`dict`): the data of each task.
        folder (`Path`): folder to write definitions to, which must be empty.

    Raises:
        InputError: if rows are damaged or cannot be downloaded; the message names the task.
    """
    folder.mkdir(exist_ok=True)
    groups = [file for file in chosen.files.values() if file.is_group]
    for number, file in enumerate(groups):
        content = yaml.safe_dump({"include": str(file.path), "group": file.name})
        (folder / f"group-{number}.yaml").write_text(content, encoding="utf-8")
    for source in sources.values():
        _write_definition(source, chosen, folder, source.files)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    with quiet_harness():
        manager = _manager(folder)
        for name, members in chosen.members.items():
            try:
                found = manager.load([name])
            except Exception as error:  # of datasets, of the Hub's client, or of a function of the definition
                raise _explain(manager, members, sources, error) from error
            for kind, objects in loaded.items():
                objects |= found.get(kind, {})
    return loaded["tasks"], loaded["groups"]


def _explain(manager: Any, names: list[str], sources: dict[str, TaskSource], error: Exception) -> InputError:
    """Returns the error of the first task that cannot be loaded."""
    for name in names:
        try:
            manager.load([name])
        except Exception as own:  # as in load_tasks
            error = own
            break
    if isinstance(error, InputError):
        return error
    source = sources[name]
    cause = one_line(error.__cause__ or error)
    if source.is_redirected:
        return InputError(f"{source.name} does not have rows of {name} ({cause}). {WHERE_DATA_COME_FROM}")
    if source.files:
        return InputError(f"--task {name} cannot be loaded ({cause}). Fix its definition or its files")
    return InputError(
        f"--task {name} needs {source.location}, which cannot be downloaded from the Hub ({one_line(error)}). Check "
        "the connection, or pass local files with --data"
    )


def _manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=str(folder))


def _write_definition(source: TaskSource, chosen: ChosenTasks, folder: Path, files: dict[str, Path]) -> None:
    """Writes a definition that includes the original one, with local rows if there are any."""
    definition: dict[str, Any] = {"include": str(chosen.files[source.task].path), "task": source.task}
    text = ""
    if source.is_redirected:
        # lm-eval opens all splits that the definition names, even those that it does not need.
        named = {key: chosen.tasks[source.task].get(key) for key in _SPLITS}
        definition |= {key: None for key, split in named.items() if split and split not in files}
        definition["dataset_kwargs"] = local_rows_settings(source, files)
        text = _LOCAL_ROWS
    text = yaml.safe_dump(definition) + text
    (folder / f"{source.task.replace('/', '-')}.yaml").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silences messages and progress bars of the libraries, and makes lm-eval compile each template only once.

    Errors are reported by this package's messages. Can be nested.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    bars, task_bar = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    compile_template = lm_eval.utils.env.from_string
    try:
        # lm-eval 0.4.13 compiles the templates of a task again for each item, which is most of the time for building
        # requests. A compiled template has no state.
        lm_eval.utils.env.from_string = functools.cache(compile_template)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        # lm-eval 0.4.13 shows a bar per task while it builds requests, and has no option to turn it off.
        lm_eval.api.task.tqdm = lambda rows, **options: rows
        yield
    finally:
        lm_eval.api.task.tqdm = task_bar
        lm_eval.utils.env.from_string = compile_template
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
