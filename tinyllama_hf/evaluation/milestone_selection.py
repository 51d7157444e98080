"""Which milestone of a series to fine-tune: a ranking by one metric, with paired intervals and ties."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError, did_you_mean, require
from ..files import read_json
from .scaling_curve import CONFIDENCE
from .score_files import ScoredModel, TaskRow, TaskScoreFile, TextScoreFile, read_scores
from .score_metrics import lower_is_better, metric_scale, metric_unit
from .scored_items import ScoredItem, read_scored_items


TEXT = "text"  # bits per byte of held-out text
BITS_PER_BYTE = "bits_per_byte"  # of the right answers
ACCURACY = "accuracy"  # the metric that each task reports
METRICS = (BITS_PER_BYTE, ACCURACY, TEXT)
Row = TypeVar("Row", bound=ScoredModel)
TASKS_FILE, OTHER_TASKS_FILES, TEXT_FILE = "commonsense.json", "tasks-*.json", "scores.json"


@dataclasses.dataclass(frozen=True)
class RankedMilestone:
    """A milestone in the ranking.

    Attributes:
        name (`str`), tokens (`int`, *optional*), path (`str`): of the milestone.
        score (`float`): its score, in the unit of the ranking.
        difference, low, high (`float`, *optional*): by how much it is worse than the best one, and the interval
            of this difference; `None` if no interval can be computed.
        is_tied (`bool`, *optional*): whether it cannot be told apart from the best one.
    """

    name: str
    tokens: int | None
    path: str
    score: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    is_tied: bool | None = None


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The milestones of a series, the best one first.

    Attributes:
        metric (`str`): one of `METRICS`.
        unit (`str`): `"points"` (percent), `"bits"`, or empty if the reported metric has its own unit.
        milestones (`list[RankedMilestone]`): all of them.
        items (`dict[str, int]`): number of items per task that all of them answered; for text, bytes per source.
        left_out (`int`): number of items that not all of them answered.
        confidence (`float`, *optional*): confidence that the truly best milestone is the first one or a tie.
        note (`str`, *optional*): why there are no intervals.
    """

    metric: str
    unit: str
    milestones: list[RankedMilestone]
    items: dict[str, int]
    left_out: int = 0
    confidence: float | None = None
    note: str | None = None

    @property
    def ties(self) -> list[RankedMilestone]:
        """The milestones that cannot be told apart from the best one, without itself."""
        return [milestone for milestone in self.milestones[1:] if milestone.is_tied]

    def to_json(self) -> dict[str, Any]:
        """Returns what `--json` writes."""
        return dataclasses.asdict(self) | {"best": self.milestones[0].name, "ties": [m.name for m in self.ties]}


def rank_milestones(series: Path, metric: str | None = None, tasks: Sequence[str] = ()) -> Ranking:
    """Ranks the milestones of a series by a metric.

    Args:
        series (`Path`): a run with score files, or a score file of `eval tasks` or `eval text`.
        metric (`str`, *optional*): one of `METRICS`; by default the first one that the scores have.
        tasks (`Sequence[str]`, *optional*): only these tasks; by default all.

    Raises:
        InputError: if there are no scores of the metric, or fewer than two milestones; if a milestone has no items,
            or the milestones have no items of a task in common.
    """
    if metric is not None and metric not in METRICS:
        raise InputError(f"--metric {metric!r}: unknown metric{did_you_mean(metric, METRICS)}")
    if metric == TEXT and tasks:
        raise InputError("--task: --metric text has no tasks. Remove it, or choose another --metric")
    path = _score_file(series, metric, bool(tasks))
    if _kind(path) == TextScoreFile.task:
        if metric not in (None, TEXT) or tasks:
            raise InputError(f"{path}: has bits per byte of text, not task scores. Use --metric {TEXT} without --task")
        return _rank_text(path)
    file = read_scores(path, TaskScoreFile)
    if file is None or metric == TEXT:
        raise InputError(f"{path}: has task scores, not text scores. Use --metric {BITS_PER_BYTE} or {ACCURACY}")
    rows = _at_least_two(path, file.models)
    if unknown := [task for task in tasks if task not in rows[0].results]:
        raise InputError(f"--task {unknown[0]}: not scored{did_you_mean(unknown[0], rows[0].results)}")
    answers = [read_scored_items(path, row) for row in rows]
    chosen = metric or (BITS_PER_BYTE if _has_bits(answers, tasks) else ACCURACY)
    return _rank_tasks(path, rows, answers, chosen, tasks)


def _score_file(series: Path, metric: str | None, has_tasks: bool) -> Path:
    """Returns the score file of a run that has the metric."""
    if not series.is_dir():
        if not series.is_file():
            raise InputError(
                f"{series}: no such run or score file. Score the milestones with `tinyllama-hf eval tasks`"
            )
        return series
    tasks = [series / TASKS_FILE] if (series / TASKS_FILE).is_file() else sorted(series.glob(OTHER_TASKS_FILES))
    if len(tasks) > 1 and metric != TEXT:
        names = ", ".join(path.name for path in tasks)
        raise InputError(f"{series}: has the task scores {names}. Pass one of these files instead of the run")
    text = [series / TEXT_FILE] if (series / TEXT_FILE).is_file() else []
    found = text if metric == TEXT else tasks + (text if metric is None and not has_tasks else [])
    if not found:
        kind, command = ("text", "text") if metric == TEXT else ("task", "tasks")
        raise InputError(
            f"{series}: has no {kind} scores of milestones. Score them first: tinyllama-hf eval {command} {series}"
        )
    return found[0]


def _kind(path: Path) -> str | None:
    contents = read_json(path)
    return contents.get("task") if isinstance(contents, dict) else None


def _at_least_two(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of a score file; the path is added to names that several of them have."""
    if len(rows) < 2:
        raise InputError(f"{path}: has {len(rows)} models, and a ranking needs two. Score more milestones")
    names = Counter(row.name for row in rows)
    return [dataclasses.replace(row, name=f"{row.name} ({row.path})") if names[row.name] > 1 else row for row in rows]


def _rank_text(path: Path) -> Ranking:
    file = read_scores(path, TextScoreFile)
    assert file is not None  # it exists
    rows = sorted(_at_least_two(path, file.models), key=lambda row: row.bits_per_byte)
    if bad := [row for row in rows if not math.isfinite(row.bits_per_byte)]:
        raise InputError(f"{path}: bits per byte of {bad[0].name} are {bad[0].bits_per_byte}. Score with --rescore")
    best = rows[0].bits_per_byte
    return Ranking(
        TEXT,
        metric_unit(BITS_PER_BYTE),
        [RankedMilestone(r.name, r.tokens, r.path, r.bits_per_byte, r.bits_per_byte - best) for r in rows],
        {source.path: source.bytes for source in file.data},
        note="text score files have only sums over all documents, so there are no intervals and no ties. "
        f"Task scores have both: --metric {BITS_PER_BYTE}",
    )


def _has_bits(answers: Sequence[Iterable[ScoredItem]], tasks: Sequence[str]) -> bool:
    return all(BITS_PER_BYTE in item.metrics for items in answers for item in items if not tasks or item.task in tasks)


def item_tables(
    path: Path, rows: Sequence[TaskRow], answers: Sequence[list[ScoredItem]], metric: str, tasks: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], int]:
    """Returns the metric on the items that all milestones answered, and the number of items left out.

    Args:
        path (`Path`): the score file, for messages.
        rows (`Sequence[TaskRow]`), answers (`Sequence[list[ScoredItem]]`): the milestones, and their items.
        metric (`str`): `"bits_per_byte"`, or `"accuracy"` for the metric that each task reports.
        tasks (`Sequence[str]`, *optional*): only these tasks; by default all.

    Returns:
        For each task `[num_milestones, num_items]`, in the unit of score files.

    Raises:
        InputError: if an item has no finite value, or the milestones have fewer than two items of a task in common.
    """
    values = [_values(path, row, items, metric, tasks) for row, items in zip(rows, answers, strict=True)]
    common = sorted(set.intersection(*map(set, values)))
    left_out = len(set.union(*map(set, values))) - len(common)
    tables = {}
    for task, name in _metric_names(rows[0], metric, tasks).items():
        keys = [key for key in common if key[0] == task]
        if len(keys) < 2:
            raise InputError(
                f"{path}: the milestones have {len(keys)} items of {task} in common, and an interval needs two. Score "
                "all milestones on the same items"
            )
        tables[task] = metric_scale(name) * np.array([[value[key] for key in keys] for value in values])
    return tables, left_out


def _rank_tasks(
    path: Path, rows: Sequence[TaskRow], answers: Sequence[list[ScoredItem]], metric: str, tasks: Sequence[str]
) -> Ranking:
    """Ranks by the unweighted mean of the tasks, each the mean of the items that all milestones answered."""
    name = _common_metric(path, _metric_names(rows[0], metric, tasks))
    tables, left_out = item_tables(path, rows, answers, metric, tasks)
    scores = np.mean([table.mean(1) for table in tables.values()], axis=0)
    worse_sign = 1 if lower_is_better(name) else -1
    order = np.argsort(worse_sign * scores, kind="stable")
    best, ranked = order[0], []
    for number in order:
        row, interval = rows[number], (0.0, 0.0, 0.0)
        if number != best:
            worse = [worse_sign * (table[number] - table[best]) for table in tables.values()]
            interval = mean_interval(worse, comparisons=len(rows) - 1)
        is_tied = bool(interval[1] <= 0)
        ranked.append(RankedMilestone(row.name, row.tokens, row.path, float(scores[number]), *interval, is_tied))
    items = {task: table.shape[1] for task, table in tables.items()}
    return Ranking(metric, metric_unit(name), ranked, items, left_out, CONFIDENCE)


def _metric_names(row: TaskRow, metric: str, tasks: Sequence[str]) -> dict[str, str]:
    """Returns the name of the metric in the items, by task."""
    return {task: row.results[task].metric if metric == ACCURACY else metric for task in tasks or row.results}


def _common_metric(path: Path, names: dict[str, str]) -> str:
    """Returns a metric with the unit and direction that all tasks share.

    Raises:
        InputError: if these differ, so that the metrics cannot be averaged.
    """
    different = list(dict.fromkeys(names.values()))
    if len(different) > 1 and any(metric_unit(name) != "points" for name in different):
        reported = ", ".join(f"{name} of {task}" for task, name in names.items())
        raise InputError(
            f"{path}: {reported} cannot be averaged, since they have different units. Choose tasks of one metric with "
            "--task"
        )
    return different[0]


def _values(
    path: Path, row: TaskRow, items: Iterable[ScoredItem], metric: str, tasks: Sequence[str]
) -> dict[tuple[str, str, int], float]:
    """Returns the metric of each item, by task, hash of its row, and number among the rows with this hash."""
    seen: Counter[tuple[str, str]] = Counter()
    names, values = _metric_names(row, metric, tasks), {}
    for item in items:
        if item.task not in names:
            continue
        name = names[item.task]
        value = item.metrics.get(name, math.nan)
        if not math.isfinite(value):
            problem = f"is {value}" if name in item.metrics else "is missing"
            raise InputError(
                f"{path}: {name} of item {item.index} of {item.task} {problem} for {row.name}. Score it with "
                "`eval tasks --rescore`, or choose other tasks with --task or another --metric"
            )
        values[item.task, item.doc, seen[item.task, item.doc]] = value
        seen[item.task, item.doc] += 1
    return values


def mean_interval(differences: Sequence[np.ndarray], comparisons: int = 1) -> tuple[float, float, float]:
    """Returns the unweighted mean over tasks of paired differences, and its interval.

    The tasks are independent samples: the variance of the mean is the sum of their s^2 / n, divided by the squared
    number of tasks. The quantile is Student's t with the degrees of freedom of Welch and Satterthwaite, for
    `1 - (1 - 0.95) / comparisons` (Bonferroni). So with at least 95 % confidence, the interval of the truly best
    milestone reaches 0 or less, whichever one it is compared with. The intervals are not simultaneous 95 % intervals,
    since the milestone that all are compared with is chosen on the same items.

    Args:
        differences (`Sequence[np.ndarray]`): for each task `[num_items]`, at least two items.
        comparisons (`int`, *optional*, defaults to 1): number of other milestones, which could have been the best one.
    """
    stats = require("scipy.stats", "eval", "intervals of differences")
    mean = float(np.mean([task.mean() for task in differences]))
    parts = np.array([task.var(ddof=1) / len(task) for task in differences])
    if not parts.any():
        return mean, mean, mean
    freedom = parts.sum() ** 2 / sum(part**2 / (len(task) - 1) for part, task in zip(parts, differences, strict=True))
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), freedom)
    half = float(quantile * math.sqrt(parts.sum()) / len(differences))
    return mean, mean - half, mean + half
