"""Compares scores with the published commonsense table, and tells when they are not comparable."""

import dataclasses

from ..errors import InputError, did_you_mean
from ..released import Released, released, tables
from .score_files import TaskRow, TaskScoreFile


TASKS = tuple(tables()["protocol"]["metric"])


def published_row(name: str) -> Released:
    """Returns a row of the published table by its name. The table includes the peer and chat models.

    Raises:
        InputError: if the table has no such row, or no scores for it.
    """
    rows = {model.name: model for model in released()}
    with_scores = [model.name for model in rows.values() if model.scores]
    if name not in rows:
        raise InputError(f"--published {name!r} is not in the published table{did_you_mean(name, with_scores)}")
    if not rows[name].scores:
        raise InputError(f"--published {name!r} has no published scores. Use one of {', '.join(with_scores)}")
    return rows[name]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Published scores, differences (score minus published score), and the names of those outside the tolerance.

    Scores and differences are in percent, by task and, with all seven tasks, for the `"average"`.
    """

    published: dict[str, float]
    differences: dict[str, float]
    outside: list[str]


def compare(row: TaskRow, published: Released) -> Comparison:
    """Compares the scores of a model with a row of the published table, with the tolerance in `released.yaml`.

    Raises:
        InputError: if they have no task in common.
    """
    tasks = [task for task in TASKS if task in row.results and task in published.scores]
    if not tasks:
        raise InputError(f"{row.name} and {published.name} have no task in common")
    scores = {task: row.results[task].score for task in tasks}
    printed = {task: published.scores[task] for task in tasks}
    if row.average is not None and published.average is not None:
        scores["average"], printed["average"] = row.average, published.average
    differences = {name: score - printed[name] for name, score in scores.items()}
    tolerance = tables()["protocol"]["tolerance"]
    allowed = dict.fromkeys(TASKS, tolerance["per_task"]) | {"average": tolerance["average"]}
    # Published scores have two decimals, so differences are rounded to hundredths: 45.41 - 44.51 is 0.8999... in
    # floats.
    outside = [name for name, difference in differences.items() if round(abs(difference), 2) > allowed[name]]
    return Comparison(printed, differences, outside)


def caveat(file: TaskScoreFile) -> str:
    """Returns why scores are not a benchmark result (sample data or a subset of the items), or `""` if they are one.

    All rows of a file have the same items, so the first one is enough.
    """
    if file.protocol.sample:
        return "a few made-up items that test the pipeline; the scores have no meaning"
    official, results = tables()["protocol"]["items"], file.models[0].results
    known = {task: result for task, result in results.items() if task in official}
    partial = [f"{r.items} of {official[t]} items of {t}" for t, r in known.items() if r.items != official[t]]
    if file.protocol.limit is not None and not partial:  # the total number of items of other tasks is not known here
        partial = [f"the first {file.protocol.limit} items of each task"]
    return f"{', '.join(partial)}; not comparable with scores on all items" if partial else ""
