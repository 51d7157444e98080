"""The tasks of a preparation, one per input file: what they are asked for, what they write, and which are complete.

The file of counts is written last and identifies the input. If an input file changes, only its task runs again.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from .shards import SPLITS, Shard, check_sizes
from .sources import Source


@dataclass(frozen=True)
class DataRequest:
    """What identifies a data set; stored in `work/request.json` and in `dataset.json`.

    Attributes:
        format_version (`int`): of the data set.
        tokenizer (`str`): fingerprint of the tokenizer.
        separator (`str`): `"both"`, `"bos"` or `"eos"`.
        begin, end (`list[int]`): ids before and after each document.
        token_bytes (`int`): bytes of an id.
        validation_fraction, sample_fraction, text_column, where: as for [`prepare`].
        source (`dict`): record of the sources.
    """

    format_version: int
    tokenizer: str
    separator: str
    begin: list[int]
    end: list[int]
    token_bytes: int
    validation_fraction: float
    sample_fraction: float
    text_column: str
    source: dict[str, Any]
    where: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The request as a JSON object, without `where` if it is not set."""
        return {name: value for name, value in vars(self).items() if name != "where" or value is not None}


def shard_name(split: str, rank: int) -> str:
    """Path of the tokens of a task in a split, relative to the output."""
    return f"{split}/{rank:05d}.tokens"


def counts_file(output: Path, rank: int) -> Path:
    """The file of counts, which a task writes last."""
    return output / "work" / f"counts_{rank:05d}.json"


def logging_folder(output: Path) -> str:
    """The logging folder of the executors, where they mark complete tasks. Any of them can resume the work of
    another."""
    return str(output / "work" / "logs")


def completions_folder(output: Path) -> Path:
    """The folder with an empty file for each complete task, named by its number."""
    return Path(logging_folder(output)) / "completions"


def read_task_result(
    output: Path, source: Source, rank: int, token_bytes: int
) -> tuple[dict[str, Shard], dict[str, int]] | None:
    """The shard of each split that a task has written, and the numbers of rows read, kept and empty.

    `None` if the task is not complete for its current input.
    """
    try:
        counts = read_json(counts_file(output, rank))
        if counts.get("input") != source.identity(rank) or "rows" not in counts:  # written by an older version
            return None
        shards = {split: Shard(file=shard_name(split, rank), **counts[split]) for split in SPLITS}
        for shard in shards.values():
            check_sizes(output, shard, token_bytes)
    except (FileNotFoundError, InputError):
        return None
    return shards, counts["rows"]


def complete_tasks(output: Path, source: Source, token_bytes: int) -> list[int]:
    """Returns the complete tasks. Those with changed input or output are marked as incomplete for the executors."""
    complete, folder = [], completions_folder(output)
    for mark in sorted(folder.glob("*")) if folder.is_dir() else ():
        rank = int(mark.name)
        if rank < source.num_tasks and read_task_result(output, source, rank, token_bytes):
            complete.append(rank)
        else:
            os.unlink(mark)
    return complete
