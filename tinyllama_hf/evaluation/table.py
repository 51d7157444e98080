"""Task scores and wrong items for the terminal."""

from collections.abc import Iterator, Sequence

from ..released import Released, tables
from .protocol import TASKS, caveat, compare
from .score_files import MetricScore, TaskRow, TaskScoreFile
from .scored_items import ScoredItem


COLUMNS = (*TASKS, "average")
_MOST_TASKS = 20  # listed individually if they are in groups
WIDTHS = {name: max(len(name), 8) + 2 for name in COLUMNS}


def table_lines(scores: TaskScoreFile, published: Released | None = None) -> Iterator[str]:
    """Yields the lines of the table of the seven tasks, or of a list per model for other tasks.

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
    if any(row.average is None for row in scores.models):
        for row in scores.models:
            yield from _list_lines(row)
            if published:
                yield from _comparison(row, published, len(f"  published {published.name}") + 2, with_titles=True)
        return
    labels = [row.name for row in scores.models] + [
        "standard error",
        *([f"published {published.name}"] if published else []),
    ]
    label_width = max(map(len, labels)) + 2
    yield _line("", COLUMNS, label_width)
    yield _line("", [*scores.protocol.metrics.values(), ""], label_width)
    for row in scores.models:
        results = [row.results[task] for task in TASKS]
        yield _line(row.name, [f"{r.score:.2f}" for r in results] + [f"{row.average or 0:.2f}"], label_width)
        errors = [r.standard_error for r in results] + [row.average_standard_error]
        yield _line("  standard error", [f"{error:.2f}" if error else "none" for error in errors], label_width)
        bits = [r.metrics.get("bits_per_byte") for r in results]
        if any(bits):  # files of early versions have none
            yield _line("  bits per byte", [f"{b.score:.3f}" if b else "" for b in bits] + [""], label_width)
        if published:
            yield from _comparison(row, published, label_width)


def _list_lines(row: TaskRow) -> Iterator[str]:
    """Yields a line for each metric of each group and task. If there are many tasks in groups, only the groups."""
    scores = {**row.groups, **row.results}
    if row.groups and len(row.results) > _MOST_TASKS:
        scores = row.groups
    width = max(map(len, [row.name, *scores])) + 2
    yield f"{row.name:<{width}}{'metric':<28}{'score':>10}{'standard error':>16}{'items':>8}"
    for name, score in scores.items():
        own = MetricScore(score.score, score.standard_error)
        for metric, value in (score.metrics or {score.metric: own}).items():
            error = "none" if value.standard_error is None else f"{value.standard_error:.2f}"
            mark = "*" if metric == score.metric else ""
            yield f"{name:<{width}}{metric + mark:<28}{value.score:>10.2f}{error:>16}{score.items:>8}"
    left_out = len(row.results) if scores is row.groups else 0
    yield f"* reported{f'; {left_out} tasks of these groups are in the score file' if left_out else ''}"


def wrong_item_lines(row: TaskRow, items: Sequence[ScoredItem], number: int) -> Iterator[str]:
    """Yields the first wrong answers of each task: question, choices with their log-likelihoods, or the reply."""
    for task in row.results if number else ():
        wrong = [item for item in items if item.task == task and item.question is not None][:number]
        for item in wrong:
            yield f"{row.name}, {task}, item {item.index}:"
            yield _indented(item.question or "", "  ")
            for place, (choice, likelihood) in enumerate(zip(item.choices, item.log_likelihoods, strict=False)):
                is_marked = {"right": place in item.right_choices, "chosen": place == item.chosen}
                marks = [mark for mark, is_set in is_marked.items() if is_set]
                end = f"  <- {', '.join(marks)}" if marks else ""
                yield _indented(f"{likelihood:9.3f}  {choice.strip()}{end}", "  ")
            for reply in item.replies:
                yield _indented(f"reply: {reply.strip()}", "  ")


def _indented(text: str, by: str) -> str:
    return "\n".join(by + line for line in text.splitlines())


def _comparison(row: TaskRow, published: Released, label_width: int, with_titles: bool = False) -> Iterator[str]:
    """Yields the differences from the published scores, for the tasks that the row has."""
    found, tolerance = compare(row, published), tables()["protocol"]["tolerance"]
    columns = list(found.published)
    if with_titles:
        yield _line("", columns, label_width, columns)
    scores = [f"{score:.2f}" for score in found.published.values()]
    yield _line(f"  published {published.name}", scores, label_width, columns)
    differences = [f"{found.differences[name]:+.2f}{'*' if name in found.outside else ''}" for name in columns]
    yield _line("  difference", differences, label_width, columns)
    bounds = f"{tolerance['per_task']} per task"
    if "average" in columns:
        bounds += f" and {tolerance['average']} for the average"
    verdict = f"outside in {', '.join(found.outside)} (*)" if found.outside else "within"
    yield f"  tolerance, {bounds}: {verdict}"


def _line(label: str, cells: Sequence[str], label_width: int, columns: Sequence[str] = COLUMNS) -> str:
    padded = (f"{cell:>{WIDTHS[name]}}" for cell, name in zip(cells, columns, strict=True))
    return (f"{label:<{label_width}}" + "".join(padded)).rstrip()
