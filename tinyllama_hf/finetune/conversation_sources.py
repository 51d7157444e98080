"""Reads the rows of conversations and preferences from files and data sets of the Hub, and counts what is invalid."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..data.questions import questions
from ..data.row_files import ROW_FILES, read_rows
from ..errors import InputError, one_line, require
from .config import ConversationSource
from .row_formats import RowFormat, find_format


EMBEDDED = "embedded:questions"
_HUB = re.compile(r"hub:(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:((?P<config>[^/]+)/)?(?P<split>[^/]+))?")
Item = TypeVar("Item")


class InvalidRows(NamedTuple):
    """Invalid rows with the same reason: their number, and the message about the first."""

    number: int
    first: str


@dataclass
class SourceSummary:
    """What was read from a source.

    Attributes:
        name (`str`): the source, as in the recipe.
        weight (`float`): its weight.
        formats (`Counter`): number of valid rows by format.
        num_rows (`int`): number of rows.
        invalid (`dict[str, InvalidRows]`): rows that were dropped, by reason.
    """

    name: str
    weight: float
    formats: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    invalid: dict[str, InvalidRows] = field(default_factory=dict)

    @property
    def format(self) -> str:
        """The format of the rows; several if the file mixes them."""
        return ", ".join(self.formats)

    @property
    def num_invalid(self) -> int:
        return sum(rows.number for rows in self.invalid.values())


def read_items(
    sources: Sequence[ConversationSource],
    formats: tuple[RowFormat, ...],
    invalid: str,
    build: Callable[[str, dict[str, Any], str, int], Item],
) -> tuple[list[Item], list[SourceSummary]]:
    """Reads all sources.

    Args:
        sources (`Sequence[ConversationSource]`): files, `hub:OWNER/NAME[@REVISION][:SPLIT or :CONFIG/SPLIT]`, or
            `embedded:questions`.
        formats (`tuple[RowFormat, ...]`): the formats that are read.
        invalid (`str`): `"error"`, or `"drop"` to leave invalid rows out.
        build (`Callable`): makes an item from the format, the columns, the name of the row, and the number of the
            source; raises `InputError` if they are invalid.

    Returns:
        The items in the order of the sources, and a summary of each source.

    Raises:
        InputError: if a source cannot be read or has no valid row, and for the first invalid row unless they are
            dropped; names file and row.
    """
    items: list[Item] = []
    summaries = []
    for number, source in enumerate(sources):
        summary = SourceSummary(source.path, source.weight)
        for place, row in _rows(source.path):
            where = f"{source.path}, {place}"
            summary.num_rows += 1
            try:
                name, columns = find_format(row, formats, source.columns, where)
                items.append(build(name, columns, where, number))
                summary.formats[name] += 1
            except InputError as error:
                if invalid == "error":
                    raise
                reason = re.sub(r"\d+", "N", str(error).removeprefix(where))  # the same but for numbers
                first = summary.invalid.get(reason, InvalidRows(0, str(error)))
                summary.invalid[reason] = first._replace(number=first.number + 1)
        if not summary.formats:
            reasons = "; ".join(rows.first for rows in summary.invalid.values())
            raise InputError(f"{source.path}: no usable row{f' of {summary.num_rows}: ' if reasons else ''}{reasons}")
        summaries.append(summary)
    return items, summaries


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each row of a source."""
    if path == EMBEDDED:
        for pair in questions():
            yield pair.name, {"prompt": pair.question, "completion": pair.answer}
    elif path.startswith("hub:"):
        yield from ((f"row {number}", row) for number, row in enumerate(_hub_rows(path), start=1))
    else:
        file = Path(path)
        if not file.is_file() or not file.name.endswith(ROW_FILES):
            raise InputError(
                f"{path}: {'unknown type of file' if file.is_file() else 'no such file'}. Name a file of type "
                f"{', '.join(ROW_FILES)}, a data set as hub:OWNER/NAME, or {EMBEDDED}"
            )
        yield from ((f"row {number}", row) for number, row in read_rows(file))


def _hub_rows(path: str) -> Iterator[Any]:
    """Returns the rows of a data set of the Hub, which `datasets` downloads into its cache."""
    match = _HUB.fullmatch(path)
    if not match:
        raise InputError(f"{path}: the form is hub:OWNER/NAME[@REVISION], then optionally :SPLIT or :CONFIG/SPLIT")
    datasets = require("datasets", "finetune", "reading data sets of the Hub")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    repo, config, split, revision = match["repo"], match["config"], match["split"], match["revision"]
    try:
        splits = [split] if split else datasets.get_dataset_split_names(repo, config, revision=revision)
        if len(splits) == 1:
            return iter(datasets.load_dataset(repo, config, split=splits[0], revision=revision))
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be loaded ({one_line(error)}). Check name, access and network") from error
    raise InputError(f"{path}: has the splits {', '.join(splits)}. Name one, as in {path}:{splits[0]}")
