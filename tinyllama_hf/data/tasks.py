"""What the tasks of a preparation leave behind, one per input file, and which of them are complete.

A task is complete for the input that it read: its counts, written last, say which that was. So one mended file is read
again alone.
"""

import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from .shards import SPLITS, check_sizes
from .sources import Source


def shard_name(split: str, rank: int) -> str:
    """The tokens of a task in a split, relative to the output."""
    return f"{split}/{rank:05d}.tokens"


def counts_file(output: Path, rank: int) -> Path:
    """Where a task notes what it wrote, when all of it is written."""
    return output / "work" / f"counts_{rank:05d}.json"


def logging_folder(output: Path) -> str:
    """Where executors note which tasks are complete, so that one goes on with what another has begun."""
    return str(output / "work" / "logs")


def completions_folder(output: Path) -> Path:
    """Where executors leave an empty file for each complete task, named by its number."""
    return Path(logging_folder(output)) / "completions"


def forget_task(output: Path, rank: int) -> None:
    """Removes what an earlier attempt at a task left and the next might not write over."""
    for file in (counts_file(output, rank), output / "validation" / f"{rank:05d}.jsonl.gz"):
        file.unlink(missing_ok=True)


def task_result(output: Path, source: Source, rank: int, token_bytes: int) -> dict[str, Any] | None:
    """The shards that a task made of its present input by split, and its `rows`; `None` if it is not complete."""
    try:
        counts = read_json(counts_file(output, rank))
        if (
            counts.get("input") != source.identity(rank) or "rows" not in counts
        ):  # an older version wrote them elsewhere
            return None
        result = {"rows": counts["rows"]}
        for split in SPLITS:
            result[split] = {"file": shard_name(split, rank), **counts[split]}
            check_sizes(output, result[split], token_bytes)
    except (FileNotFoundError, InputError):
        return None
    return result


def keep_complete(output: Path, source: Source, token_bytes: int) -> list[int]:
    """Returns the complete tasks; executors are made to repeat those whose input or output has changed since."""
    complete, folder = [], completions_folder(output)
    for mark in sorted(folder.glob("*")) if folder.is_dir() else ():
        rank = int(mark.name)
        if rank < source.num_tasks and task_result(output, source, rank, token_bytes):
            complete.append(rank)
        else:
            os.unlink(mark)
    return complete
