"""The scores of a run over its tokens: points with intervals, the fitted curve, its forecast and its back-test."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import InputError
from ..released import Released, released
from .protocol import TASKS, caveat
from .scaling_curve import (
    MIN_POINTS,
    NORMAL_QUANTILE,
    BackTest,
    Forecast,
    ScalingCurve,
    back_test,
    fit_scaling_curve,
    wilson_interval,
)
from .score_files import MetricScore, TaskScore, TaskScoreFile
from .score_metrics import is_share


AVERAGE = "average"
BITS_PER_BYTE = "bits_per_byte"
_EARLY_SHARE = 0.1  # of the tokens known so far
_KNOWN_MILESTONES = 5  # of the first back-test, which forecasts the last two


class ScorePoint(NamedTuple):
    """A score at a number of tokens and its 95 % interval, which is `None` without a standard error."""

    tokens: int
    score: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class FittedSeries:
    """Values of a run over tokens, with the curve that was fitted to them.

    Attributes:
        name (`str`), unit (`str`): of the values.
        points (`list[tuple[int, float]]`): tokens and values, in the order of tokens.
        curve (`ScalingCurve`, *optional*): fitted to the points without the early ones.
        forecast (`Forecast`, *optional*): at the end of the run, or at twice its tokens if it has ended.
        back_tests (`list[BackTest]`): forecasts of the last milestones from earlier ones.
        known (`list[int]`): for each back-test, the number of tokens up to which points were used.
        problem (`str`, *optional*): why there is no curve or no back-test.
    """

    name: str
    unit: str
    points: list[tuple[int, float]]
    curve: ScalingCurve | None = None
    forecast: Forecast | None = None
    back_tests: list[BackTest] = dataclasses.field(default_factory=list)
    known: list[int] = dataclasses.field(default_factory=list)
    problem: str | None = None


def fit_series(
    name: str,
    unit: str,
    points: Sequence[tuple[int, float]],
    milestones: Sequence[int],
    warmup_tokens: int,
    planned_tokens: int,
) -> FittedSeries:
    """Fits a curve to values of a run, and forecasts the last milestones from the earlier ones.

    Points before the end of the warm-up are excluded, and so are points before a tenth of the tokens so far if eight
    others remain: the loss of the first steps does not follow the curve.

    Args:
        name (`str`), unit (`str`): of the values.
        points (`Sequence[tuple[int, float]]`): tokens and values. For equal tokens, the last value is used.
        milestones (`Sequence[int]`): tokens of the milestones, the points of the back-test.
        warmup_tokens (`int`): length of the warm-up of the learning rate.
        planned_tokens (`int`): length of the run.
    """
    values = dict(sorted(points, key=lambda point: point[0]))  # stable: for equal tokens, the last one is used
    series = FittedSeries(name, unit, list(values.items()))
    last = max(values, default=0)
    try:
        curve = fit_scaling_curve(*_columns(_later_points(values, last, warmup_tokens)))
    except InputError as error:
        return dataclasses.replace(series, problem=f"No curve is fitted: {error}.")
    forecast = curve.forecast(planned_tokens if last < planned_tokens else 2 * last)
    series = dataclasses.replace(series, curve=curve, forecast=forecast)
    try:
        tests, known = _back_tests(values, [place for place in milestones if place in values], warmup_tokens)
    except InputError as error:
        return dataclasses.replace(series, problem=f"There is no back-test: {error}.")
    return dataclasses.replace(series, back_tests=tests, known=known)


def _back_tests(
    values: dict[int, float], milestones: Sequence[int], warmup_tokens: int
) -> tuple[list[BackTest], list[int]]:
    """Forecasts the last two milestones from those up to the fifth, and the last one from all earlier ones."""
    places = sorted(set(milestones))
    if len(places) < 3:
        raise InputError(f"the run has {len(places)} milestones with a value, and a back-test needs three")
    tests, known = [], []
    for number, later in ((min(_KNOWN_MILESTONES, len(places) - 2), places[-2:]), (len(places) - 1, places[-1:])):
        until = places[number - 1]
        used = _columns(_later_points({p: v for p, v in values.items() if p <= until}, until, warmup_tokens))
        tests += back_test(*used, until, [(place, values[place]) for place in later])
        known += [until] * len(later)
    return tests, known


def _later_points(values: dict[int, float], last: int, warmup_tokens: int) -> list[tuple[int, float]]:
    """Returns the points without the early ones."""
    warm = [(place, value) for place, value in values.items() if place >= warmup_tokens]
    later = [(place, value) for place, value in warm if place >= _EARLY_SHARE * last]
    return later if len(later) >= 2 * MIN_POINTS else warm


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [place for place, _ in points], [value for _, value in points]


def task_points(file: TaskScoreFile) -> dict[str, list[ScorePoint]]:
    """Returns the scores of the milestones in a file by task, in the order of their tokens.

    Intervals are Wilson's for shares, and 1.96 standard errors for other metrics and the average.
    """
    rows = sorted((row for row in file.models if row.tokens is not None), key=lambda row: row.tokens or 0)
    points: dict[str, list[ScorePoint]] = {}
    for row in rows:
        for task, result in row.results.items():
            points.setdefault(task, []).append(_task_point(row.tokens or 0, result))
        if row.average is not None:
            score = MetricScore(row.average, row.average_standard_error)
            points.setdefault(AVERAGE, []).append(_mean_point(row.tokens or 0, score))
    return points


def bits_points(file: TaskScoreFile) -> dict[str, list[ScorePoint]]:
    """Returns the bits per byte of the right answers by task, for the milestones that have them."""
    points: dict[str, list[ScorePoint]] = {}
    for row in sorted(file.models, key=lambda row: row.tokens or 0):
        for task, result in row.results.items():
            if row.tokens is not None and BITS_PER_BYTE in result.metrics:
                points.setdefault(task, []).append(_mean_point(row.tokens, result.metrics[BITS_PER_BYTE]))
    return points


def mean_points(points: dict[str, list[ScorePoint]]) -> list[tuple[int, float]]:
    """Returns tokens and the unweighted mean over tasks, at the numbers of tokens that all tasks have."""
    by_task = [{point.tokens: point.score for point in series} for series in points.values()]
    common = sorted(set.intersection(*map(set, by_task))) if by_task else []
    return [(place, sum(scores[place] for scores in by_task) / len(by_task)) for place in common]


def _task_point(tokens: int, result: TaskScore) -> ScorePoint:
    if not is_share(result.metric):
        return _mean_point(tokens, MetricScore(result.score, result.standard_error))
    return ScorePoint(tokens, result.score, *wilson_interval(result.score, result.items))


def _mean_point(tokens: int, score: MetricScore) -> ScorePoint:
    if score.standard_error is None:
        return ScorePoint(tokens, score.score, None, None)
    half = NORMAL_QUANTILE * score.standard_error
    return ScorePoint(tokens, score.score, score.score - half, score.score + half)


def published_series() -> list[Released]:
    """Returns the base and peer models of the published table, in the order of their tokens."""
    rows = [model for model in released() if model.kind in ("base", "peer") and model.scores]
    return sorted(rows, key=lambda model: model.tokens)


def overlay_problem(file: TaskScoreFile) -> str | None:
    """Returns why scores cannot be drawn with the published series, or `None` if they can."""
    if not file.models:
        return "no scores"
    if file.protocol.name != "published":
        return f"the protocol {file.protocol.name!r}"
    if missing := [task for task in TASKS if any(task not in row.results for row in file.models)]:
        return f"no scores of {', '.join(missing)}"
    if reason := caveat(file):
        return reason
    return None
