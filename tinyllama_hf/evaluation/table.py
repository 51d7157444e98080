"""The table of commonsense scores for the terminal."""

from collections.abc import Iterator, Sequence

from ..released import Released, tables
from .protocol import TASKS, caveat, compare
from .score_files import TaskRow, TaskScoreFile


COLUMNS = (*TASKS, "average")
WIDTHS = [max(len(name), 8) + 2 for name in COLUMNS]


def table_lines(scores: TaskScoreFile, published: Released | None = None) -> Iterator[str]:
    """Yields the lines of the table.

    Args:
        scores (`TaskScoreFile`): the protocol and the models.
        published (`Released`, *optional*): a row of the published table to compare each model with. Scores on a
            subset of the items are not compared.
    """
    if made_on := caveat(scores):
        yield f"{'SAMPLE' if scores.protocol.sample else 'SUBSET'}: {made_on}"
        if published:
            yield f"{published.name} is not compared, since its published scores are on all items"
            published = None
    labels = [row.name for row in scores.models] + [
        "standard error",
        *([f"published {published.name}"] if published else []),
    ]
    label_width = max(map(len, labels)) + 2
    yield _line("", COLUMNS, label_width)
    yield _line("", [*scores.protocol.metrics.values(), ""], label_width)
    for row in scores.models:
        results = [row.results[task] for task in TASKS]
        yield _line(row.name, [f"{r.score:.2f}" for r in results] + [f"{row.average:.2f}"], label_width)
        errors = [r.standard_error for r in results] + [row.average_standard_error]
        yield _line("  standard error", [f"{error:.2f}" if error else "none" for error in errors], label_width)
        if published:
            yield from _comparison(row, published, label_width)


def _comparison(row: TaskRow, published: Released, label_width: int) -> Iterator[str]:
    found, tolerance = compare(row, published), tables()["protocol"]["tolerance"]
    yield _line(f"  published {published.name}", [f"{found.published[name]:.2f}" for name in COLUMNS], label_width)
    differences = [f"{found.differences[name]:+.2f}{'*' if name in found.outside else ''}" for name in COLUMNS]
    yield _line("  difference", differences, label_width)
    bounds = f"{tolerance['per_task']} per task and {tolerance['average']} for the average"
    verdict = f"outside in {', '.join(found.outside)} (*)" if found.outside else "within"
    yield f"  tolerance, {bounds}: {verdict}"


def _line(label: str, cells: Sequence[str], label_width: int) -> str:
    return (f"{label:<{label_width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True))).rstrip()
