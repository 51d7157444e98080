"""The difference between two models on a task, or between their averages: interval, test, verdict."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from ..score_files import MetricScore
from ..score_metrics import lower_is_better, metric_scale, metric_unit
from . import paired_tests as statistics
from .compared_models import ItemValues
from .paired_tests import Floats


@dataclasses.dataclass(kw_only=True)
class ScoreDifference:
    """The difference between two models on a task, or between their averages.

    Scores, differences, errors and bounds are in points (percent); for `bits_per_byte`, they are in bits. Other
    metrics have their own unit.

    Attributes:
        task (`str`): name of the task, or `"average"`.
        metric (`str`): the metric; empty for an average over different ones.
        test (`str`): `"exact McNemar"` or `"paired t"`; `"unpaired"` if items are missing.
        pairs (`int`, *optional*): number of items that both models answered; `None` if unpaired.
        left_out (`tuple[int, int]`): number of unpaired items of each model.
        scores (`tuple[float, float]`): of the reference and of the other model, on the pairs if there are any.
        difference (`float`): score of the other model minus that of the reference.
        standard_error (`float`, *optional*), interval (`tuple[float, float]`, *optional*): of the difference; `None`
            if a score has no standard error.
        p_value (`float`, *optional*): that of this test alone.
        corrected (`float`, *optional*): the p-value corrected for the number of tasks; unchanged for the average.
        detectable (`float`, *optional*): minimum detectable difference, at a power of 80 %.
        verdict (`str`): `"better"`, `"worse"`, `"no difference shown"`, or `"not tested"` without a standard error.
    """

    task: str
    metric: str
    test: str
    pairs: int | None = None
    left_out: tuple[int, int] = (0, 0)
    scores: tuple[float, float]
    difference: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    corrected: float | None = None
    detectable: float | None = None
    verdict: str = "not tested"

    @property
    def unit(self) -> str:
        """The unit of the scores and the difference: `"points"`, `"bits"`, or empty."""
        return metric_unit(self.metric) if self.metric else "points"  # only shares are averaged over different metrics

    def decide(self, corrected: float, lower: bool) -> None:
        """Sets the verdict from the corrected p-value. `lower` is whether a lower score is better."""
        self.corrected = corrected
        if corrected >= statistics.ALPHA or self.difference == 0:
            self.verdict = "no difference shown"
        else:
            self.verdict = "better" if (self.difference < 0) == lower else "worse"


def paired_difference(
    task: str, metric: str, items: tuple[ItemValues, ItemValues], resamples: int, seed: int
) -> tuple[ScoreDifference, Floats]:
    """Compares two models on the items that both answered, of which there must be two or more.

    Args:
        task (`str`), metric (`str`): their names.
        items (`tuple[ItemValues, ItemValues]`): the values of the items of the reference and of the other model.
        resamples (`int`), seed (`int`): settings of the bootstrap. Samples depend only on the seed, the name of the
            task and the number of pairs.

    Returns:
        The difference, and its bootstrap values `[resamples]`.
    """
    keys = [key for key in items[0] if key in items[1]]
    first, second = (np.array([values[key] for key in keys]) for values in items)
    differences, scale = second - first, metric_scale(metric)
    name = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8])
    is_binary = statistics.is_binary(first) and statistics.is_binary(second)
    sample = statistics.bootstrap_sample(differences) if is_binary else differences
    means = scale * statistics.bootstrap_means(sample, resamples, np.random.default_rng([seed, name]))
    found = ScoreDifference(
        task=task,
        metric=metric,
        test="paired t",
        pairs=len(keys),
        left_out=(len(items[0]) - len(keys), len(items[1]) - len(keys)),
        scores=(float(scale * first.mean()), float(scale * second.mean())),
        difference=float(scale * differences.mean()),
        standard_error=scale * statistics.paired_standard_error(differences),
        interval=statistics.percentile_interval(means),
    )
    if is_binary:
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        found.test, found.p_value = "exact McNemar", statistics.mcnemar_p_value(gained, lost)
        share = statistics.detectable_share(len(keys), gained + lost)
        found.detectable = None if share is None else scale * share
    else:
        _test_mean(found, len(keys) - 1)
    return found, means


def unpaired_difference(task: str, metric: str, scores: tuple[MetricScore, MetricScore]) -> ScoreDifference:
    """Compares two scores by their standard errors, as if they were on different items.

    If both models answered the same items, the standard error is an upper bound, since they tend to fail on the same
    ones.
    """
    first, second = scores
    found = ScoreDifference(
        task=task,
        metric=metric,
        test="unpaired",
        scores=(first.score, second.score),
        difference=second.score - first.score,
    )
    if first.standard_error is not None and second.standard_error is not None:
        found.standard_error = math.hypot(first.standard_error, second.standard_error)
        _test_unpaired(found)
    return found


def average_difference(tasks: Sequence[ScoreDifference], means: Sequence[Floats]) -> ScoreDifference:
    """Returns the difference between the unweighted means of the tasks' scores.

    The tasks are independent samples, so their variances add. It is unpaired if one of the tasks is.

    Args:
        tasks (`Sequence[ScoreDifference]`): the differences, all of shares or all of one metric.
        means (`Sequence[Floats]`): the bootstrap differences `[resamples]` of the paired ones.
    """
    number, metrics = len(tasks), {task.metric for task in tasks}
    found = ScoreDifference(
        task="average",
        metric=metrics.pop() if len(metrics) == 1 else "",
        test="paired t" if len(means) == number else "unpaired",
        scores=(
            math.fsum(task.scores[0] for task in tasks) / number,
            math.fsum(task.scores[1] for task in tasks) / number,
        ),
        difference=math.fsum(task.difference for task in tasks) / number,
    )
    errors = [task.standard_error for task in tasks if task.standard_error is not None]
    if len(errors) < number:
        return found
    found.standard_error = math.hypot(*errors) / number
    if found.test == "unpaired":
        _test_unpaired(found)
    else:
        pairs = [task.pairs or 0 for task in tasks]
        found.pairs = sum(pairs)
        found.left_out = (sum(task.left_out[0] for task in tasks), sum(task.left_out[1] for task in tasks))
        found.interval = statistics.percentile_interval(np.mean(means, axis=0))
        _test_mean(found, statistics.welch_degrees(errors, [own - 1 for own in pairs]))
    if found.p_value is not None:
        found.decide(found.p_value, lower_is_better(found.metric))
    return found


def correct_for_tasks(tasks: Sequence[ScoreDifference]) -> None:
    """Sets corrected p-values (Holm) and verdicts of the tasks that have a p-value."""
    tested = [(task, task.p_value) for task in tasks if task.p_value is not None]
    for (task, _), corrected in zip(tested, statistics.holm([p for _, p in tested]), strict=True):
        task.decide(corrected, lower_is_better(task.metric))


def _test_mean(found: ScoreDifference, degrees: int) -> None:
    error = found.standard_error or 0.0
    found.p_value = statistics.mean_p_value(found.difference, error, degrees)
    found.detectable = statistics.detectable_mean(error, degrees) if error else None


def _test_unpaired(found: ScoreDifference) -> None:
    error = found.standard_error or 0.0
    found.interval = statistics.normal_interval(found.difference, error)
    found.p_value = statistics.normal_p_value(found.difference / error)
    found.detectable = statistics.detectable_mean(error)
