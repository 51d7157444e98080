"""Opens the tasks of a protocol: redirects lm-eval's definitions to local rows, and checks the rows."""

import contextlib
import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ...data.row_files import read_rows
from ...errors import InputError, one_line, require
from ...progress import progress_bar
from ...provenance import file_sha256
from ..protocol import TASKS
from .definition_hashes import hash_definitions
from .protocol_definitions import ProtocolDefinition, define_protocol, fewshot_of, metric_of
from .task_data import (
    COMMONSENSE_SPLITS,
    SAMPLE,
    WHERE_DATA_COME_FROM,
    RowLayout,
    TaskSource,
    check_files,
    data_folder,
    find_source,
    local_source,
    read_part,
)
from .task_index import ChosenTasks, choose_tasks, index_tasks
from .task_loading import load_example, load_tasks, quiet_harness
from .task_rows import BAD_ROW, NUM_ASKED, check_rows, decisive_fields, typical_rows


# lm-eval's default. It determines which few-shot examples are drawn; set it again before requests are rebuilt.
FEWSHOT_SEED = 1234
_OUR_CODE_TASKS = "tinyllama_hf.evaluation.tasks.code_tasks."


class Suite(NamedTuple):
    """The opened tasks. Valid inside [`open_suite`].

    Attributes:
        harness (`str`): name and version of the harness.
        tasks (`dict`): leaf tasks of lm-eval, by name.
        groups (`dict`): groups of lm-eval, by name, for `task_dict={"tasks": ..., "groups": ...}` of its `evaluate`.
        versions (`dict`): version of each task.
        metrics (`dict`): reported metric of each task, such as `"acc"`, or with a filter `"exact_match,strict-match"`.
        num_fewshot (`dict`): number of few-shot examples, by task.
        definitions (`dict`): hash of the definition of each task and group.
        data (`dict`): SHA-256 of the local file, or location on the Hub, by task.
        sample (`bool`): whether all data are the made-up items that ship with the package.
        runs_code (`bool`): whether a task runs code written by the model.
    """

    harness: str
    tasks: dict[str, Any]
    groups: dict[str, Any]
    versions: dict[str, int | float | str]
    metrics: dict[str, str]
    num_fewshot: dict[str, int]
    definitions: dict[str, str]
    data: dict[str, str]
    sample: bool
    runs_code: bool


def task_files(folder: str | Path) -> dict[str, Path]:
    """Returns the local file of each of the seven commonsense tasks. Works without lm-eval.

    Args:
        folder (`str` or `Path`): as `data` of [`open_suite`].

    Raises:
        InputError: if files are missing; the message lists them, and where to get them.
    """
    root = data_folder(folder)
    assert root is not None
    sources = {name: local_source(root, name, split, RowLayout(name)) for name, split in COMMONSENSE_SPLITS.items()}
    check_files(sources.values(), folder)
    return {name: source.files[source.eval_split] for name, source in sources.items()}


def find_sources(
    data: str | Path | None, definition: ProtocolDefinition, include: Path | None = None
) -> dict[str, TaskSource]:
    """Returns the data of each task of a protocol, without opening tasks; the arguments are those of [`open_suite`].

    Raises:
        InputError: if a file is missing; the message names it, and where to get it.
    """
    return _sources(data, definition, choose_tasks(definition.tasks, index_tasks(include)))


def _sources(data: str | Path | None, definition: ProtocolDefinition, chosen: ChosenTasks) -> dict[str, TaskSource]:
    folder = data_folder(data)
    sources = {
        name: find_source(name, settings, fewshot_of(definition, settings), folder)
        for name, settings in chosen.tasks.items()
    }
    check_files(sources.values(), data)
    return sources


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
        run_code (`bool`, *optional*, defaults to `False`): allow tasks that run code written by the model.

    Raises:
        InputError: if files are missing or a row is not valid, the Hub is not reachable, a task runs code and this
            is not allowed or not possible on this system, or lm-eval is not installed.
    """
    require("lm_eval", "eval", "the evaluation on tasks")
    definition = definition or define_protocol()
    chosen = choose_tasks(definition.tasks, index_tasks(include))
    runs_code = _check_code(chosen, run_code)
    sources = _sources(data, definition, chosen)
    with tempfile.TemporaryDirectory() as scratch:
        with progress_bar("Opening the tasks", "tasks", len(sources)) as update, quiet_harness():
            for number, source in enumerate(sources.values()):
                if source.is_redirected:
                    _check_file(source, chosen, Path(scratch) / f"check-{number}")
                update(advance=1)
            tasks, groups = load_tasks(chosen, sources, Path(scratch) / "tasks")
            for number, (name, task) in enumerate(tasks.items()):
                _prepare(task, sources[name])
                if sources[name].files and not sources[name].is_redirected:
                    _check_own_rows(task, sources[name], chosen, Path(scratch) / f"own-{number}")
                _check_documents(task, sources[name])
        fingerprints = {name: source.fingerprint() for name, source in sources.items()}
        sample = {name: file_sha256(file) for name, file in task_files(SAMPLE).items()}
        yield Suite(
            harness=f"lm-eval {metadata.version('lm_eval')}",
            tasks=tasks,
            groups=groups,
            versions={name: task.VERSION for name, task in tasks.items()},
            metrics={name: metric_of(definition, name, task) for name, task in tasks.items()},
            num_fewshot={name: sources[name].num_fewshot for name in tasks},
            definitions=hash_definitions(chosen),
            data=fingerprints,
            sample=fingerprints.items() <= sample.items(),
            runs_code=runs_code,
        )


def _check_code(chosen: ChosenTasks, run_code: bool) -> bool:
    """Returns whether a task runs code of the model; refuses this without permission or without limits."""
    names = [name for name, settings in chosen.tasks.items() if settings.get("unsafe_code")]
    for name in names:
        if not runs_in_sandbox(chosen.tasks[name]):
            raise InputError(
                f"--task {name}: lm-eval runs the code that the model writes for it without limits. Use humaneval, "
                "one of its variants or instruct_humaneval, which run it in a sandbox"
            )
    if names and not run_code:
        raise InputError(
            f"--task {names[0]} runs code written by the model, in a subprocess with limits and without network. "
            "Add --run-code to allow it"
        )
    if names:
        from .code_sandbox import check_sandbox

        check_sandbox()
    return bool(names)


def runs_in_sandbox(settings: dict[str, Any]) -> bool:
    """Returns whether all functions of a definition that receive a reply are from this package."""
    seeing = repr([settings.get(key) for key in ("process_results", "filter_list", "metric_list")])
    functions = re.findall(r"!function ([\w.]+)", seeing)
    return bool(functions) and all(name.startswith(_OUR_CODE_TASKS) for name in functions)


def _check_file(source: TaskSource, chosen: ChosenTasks, scratch: Path) -> None:
    """Checks all rows of the local files of a task against its typical rows or those of the bundled sample."""
    file = source.files[source.eval_split]
    rows = list(read_part(file, source.column, source.part))
    if source.task in TASKS:
        fields = _sample_fields(source.task)
    else:
        fields = _fields(source, chosen, typical_rows([row for _, row in rows]) if rows else [], scratch)
    check_rows(source.task, rows, fields, str(file))
    if source.shot_split and source.shot_split != source.eval_split:
        shots = source.files[source.shot_split]
        rows = list(read_part(shots, source.column, source.part))
        check_rows(source.task, rows, fields, str(shots))
    needed = source.num_fewshot + (source.shot_split == source.eval_split)
    if source.shot_split and len(rows) < needed:
        raise InputError(
            f"{source.files[source.shot_split]} has {len(rows)} rows of {source.task}. {needed} are needed for "
            f"{source.num_fewshot} few-shot examples"
        )


def _check_own_rows(task: Any, source: TaskSource, chosen: ChosenTasks, scratch: Path) -> None:
    """Checks the rows of files that a definition names itself, as lm-eval has read them."""
    if callable(task.config.custom_dataset):
        return  # a function of the definition creates the rows
    fields: dict[str, Any] = {}
    for split in filter(None, dict.fromkeys((source.eval_split, source.shot_split))):
        # The scored rows come first, since they determine the needed fields. Values such as dates become text.
        rows = [json.loads(json.dumps(row, default=str)) for row in task.dataset[split]]
        read_here = dataclasses.replace(source, is_redirected=True)
        fields = fields or _fields(read_here, chosen, typical_rows(rows), scratch)
        check_rows(source.task, enumerate(rows, start=1), fields, str(source.files.get(split, source.task)))


@functools.cache
def _sample_fields(name: str) -> dict[str, Any]:
    """Returns the required fields of a commonsense task, from its definition and the bundled sample."""
    chosen = choose_tasks([name], index_tasks())
    source = find_source(name, chosen.tasks[name], 0, data_folder(SAMPLE))
    first = next(row for _, row in read_rows(source.files[source.eval_split]))
    with tempfile.TemporaryDirectory() as scratch:
        return _fields(source, chosen, [first], Path(scratch))


def _fields(source: TaskSource, chosen: ChosenTasks, rows: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """Returns the required fields of a task, from its definition and a few valid rows."""
    if not rows:
        part = f" of {source.column} {source.part}" if source.column else ""
        raise InputError(f"{source.name} has 0 rows{part}. {WHERE_DATA_COME_FROM}")
    examples = scratch / "rows.jsonl"
    scratch.mkdir(exist_ok=True)
    # Repeated if there are few, since definitions of few-shot tasks may skip the first rows.
    lines = [json.dumps(row) + "\n" for row in rows]
    examples.write_text("".join(lines * (1 if len(rows) > NUM_ASKED else 4)), encoding="utf-8")
    try:
        return decisive_fields(load_example(source, chosen, scratch / "tasks", examples), *rows[:NUM_ASKED])
    except (OSError, AssertionError, *BAD_ROW) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source.name} does not have rows of {source.task} ({one_line(error)}). {WHERE_DATA_COME_FROM}"
        ) from error


def _prepare(task: Any, source: TaskSource) -> None:
    """Applies the settings of lm-eval's command to a task, and makes it process its rows only once."""
    if getattr(task, "MULTIMODAL", False):
        raise InputError(
            f"--task {source.task} has images or audio, which this model cannot read. Choose another task"
        )
    if source.is_redirected and not callable(task.config.custom_dataset):
        raise InputError(f"--task {source.task} reads its rows itself, from the Hub. Score it without --data")
    task.set_config("num_fewshot", source.num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    # lm-eval 0.4.13 processes all rows of a task again at each access to `eval_docs`, several times per model.
    for name in ("test_docs", "validation_docs"):
        setattr(task, name, functools.cache(getattr(task, name)))


def _check_documents(task: Any, source: TaskSource) -> None:
    """Checks the number of items, and the choices of each."""
    documents = task.eval_docs
    if not source.is_redirected and source.task in TASKS:
        check_rows(source.task, enumerate(documents, start=1), _sample_fields(source.task), source.task)
    if len(documents) < 2:
        raise InputError(f"{source.name} has {len(documents)} rows. At least 2 are needed for a standard error")
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for index, document in enumerate(documents):
        try:
            choices = task.doc_to_choice(document)
            right = right_choices(task, document, choices)
        except BAD_ROW as error:
            raise InputError(
                f"{source.name}, row {index + 1} is not a valid {source.task} row ({one_line(error)})"
            ) from error
        if not all(choices) or not right or any(not 0 <= gold < len(choices) for gold in right):
            raise InputError(
                f"{source.name}, row {index + 1} has an empty choice, or answer {', '.join(map(str, right))} is not "
                f"in 0 to {len(choices) - 1}"
            )


def right_choices(task: Any, document: dict[str, Any], choices: list[str]) -> list[int]:
    """Returns the indices of the right choices: some definitions give several, or the text of the choice.

    WinoGrande has it in `doc_to_text`, since its choices are contexts.
    """
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    return [
        choices.index(gold) if isinstance(gold, str) and gold in choices else int(gold)
        for gold in (target if isinstance(target, list) else [target])
    ]
