"""Why the scores of a model differ from its row of the published table."""

import dataclasses
import math

from ...released import Released, tables
from ..protocol import TASKS
from ..score_files import Protocol, TaskRow, TaskScore
from ..score_metrics import metric_unit


# bf16 changed the choice on 11 of 700 items of SmolLM2-135M-Instruct, scored with lm-eval's own model.
_FLIPPED_SHARE = 11 / 700
# A larger difference, in standard deviations, is not attributed to chance.
_DEVIATIONS = 3
_KEYS = ("add_bos_token", "num_fewshot", "apply_chat_template", "dtype")


@dataclasses.dataclass(frozen=True)
class Departure:
    """A way in which a model was not scored like the published table.

    Attributes:
        text (`str`): what differs, with both values.
        reach (`dict`): for each task, the largest difference in points that it can explain; infinite if no bound is
            known, as for a begin-of-sequence token.
    """

    text: str
    reach: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Deviation:
    """A difference from the published score outside the tolerance. `causes` is empty if it is unexplained."""

    task: str
    difference: float
    causes: list[str]


@dataclasses.dataclass(frozen=True)
class PublishedCheck:
    """A scored model as a reproduction of a published row: departures from its protocol, and scores that deviate."""

    published: str
    departures: list[str]
    deviations: list[Deviation]


def check_against_published(row: TaskRow, protocol: Protocol, published: Released) -> PublishedCheck:
    """Compares the reported scores of a model with a published row, and looks for the cause of each difference.

    A difference outside the tolerance in `released.yaml` is explained by departures from the published protocol that
    can have such an effect, alone or together, and by another metric of the same row that is within the tolerance.
    This only makes sense for scores of the published model.

    Args:
        row (`TaskRow`): the scores.
        protocol (`Protocol`): their protocol.
        published (`Released`): a row of the table that has scores.
    """
    departures = _departures(row, protocol, published)
    tolerance = tables()["protocol"]["tolerance"]
    tasks = [task for task in TASKS if task in row.results]
    deviations, matching = [], {}
    for task in tasks:
        result, printed = row.results[task], published.scores[task]
        difference = result.score - printed
        matching[task] = result.score
        if _is_within(difference, tolerance["per_task"]):
            continue
        causes = _causes(difference, {d.text: d.reach.get(task, 0.0) for d in departures})
        for metric, score in _near(result, printed, tolerance["per_task"]).items():
            matching[task] = score
            causes.append(f"{metric} of the same row is {score:.2f}, and {result.metric} is reported")
        deviations.append(Deviation(task, difference, causes))
    if row.average is not None and published.average is not None:
        difference = row.average - published.average
        if not _is_within(difference, tolerance["average"]):
            causes = _causes(difference, {d.text: _average_reach(d) for d in departures})
            average = math.fsum(matching.values()) / len(TASKS)
            if _is_within(average - published.average, tolerance["average"]):
                causes.append("another metric, see the tasks")
            deviations.append(Deviation("average", difference, causes))
    return PublishedCheck(published.name, [d.text for d in departures], deviations)


def _causes(difference: float, reaches: dict[str, float]) -> list[str]:
    """Returns the departures that explain a difference: each one that reaches it, or else all of them together.

    The effects are independent errors, so together they reach the root of the sum of their squares.
    """
    alone = [text for text, reach in reaches.items() if abs(difference) <= reach]
    if alone or abs(difference) > math.hypot(*reaches.values()):
        return alone
    return [" and ".join(text for text, reach in reaches.items() if reach > 0)]


def _is_within(difference: float, tolerance: float) -> bool:
    return round(abs(difference), 2) <= tolerance  # published scores have two decimals


def _near(result: TaskScore, printed: float, tolerance: float) -> dict[str, float]:
    """Returns the scores of other metrics, in percent, that are within the tolerance of the published score."""
    return {
        name: metric.score
        for name, metric in result.metrics.items()
        if name != result.metric and metric_unit(name) == "points" and _is_within(metric.score - printed, tolerance)
    }


def _average_reach(departure: Departure) -> float:
    """Returns how much of the average a departure can explain. Effects on different tasks are independent."""
    return math.hypot(*departure.reach.values()) / len(TASKS)


def _departures(row: TaskRow, protocol: Protocol, published: Released) -> list[Departure]:
    table = tables()["protocol"]
    unbounded = dict.fromkeys(TASKS, math.inf)
    found = []
    for key in _KEYS:
        own = vars(protocol)[key]
        if isinstance(own, dict) and len(set(own.values())) == 1:
            own = next(iter(own.values()))
        if own != table[key]:
            reach = _dtype_reach() if key == "dtype" else unbounded
            found.append(Departure(f"{key} is {own}, not {table[key]}", reach))
    if row.quantization != "none":
        found.append(Departure(f"the weights were quantized to {row.quantization}", unbounded))
    if row.adapter:
        found.append(Departure(f"the adapter {row.adapter} was loaded", unbounded))
    if row.cut_requests:
        found.append(Departure(f"{row.cut_requests} requests were truncated to the context", unbounded))
    for task in (task for task in TASKS if task in row.results):
        result, official = row.results[task], table["items"][task]
        if result.metric != table["metric"][task]:
            # If the row also has the published metric, that is compared instead of assuming the cause.
            reach = {} if table["metric"][task] in result.metrics else {task: math.inf}
            found.append(Departure(f"{task} reports {result.metric}, not {table['metric'][task]}", reach))
        if result.items != official:
            share = published.scores[task] / 100
            deviation = math.sqrt(share * (1 - share) * (1 / result.items + 1 / official))
            found.append(
                Departure(f"{task} has {result.items} items, not {official}", {task: 100 * _DEVIATIONS * deviation})
            )
    return found


def _dtype_reach() -> dict[str, float]:
    """Returns the largest likely effect of another dtype on each score, in points.

    A changed choice makes an item right or wrong, equally often, so the effect on n items has a standard deviation of
    at most sqrt(share / n).
    """
    items = tables()["protocol"]["items"]
    return {task: 100 * _DEVIATIONS * math.sqrt(_FLIPPED_SHARE / items[task]) for task in TASKS}
