"""Unit, scale and direction of the metrics of scores, and the three summary metrics, which the modules in
`eval/metrics/` wrap as `evaluate.Metric`.
"""

import math
import statistics
from collections.abc import Sequence

from ..errors import InputError
from .protocol import TASKS
from .scored_items import ScoredItem


# Metrics of lm-eval that are in percent in score files: shares of right items, and other metrics of at most 1. All
# others stay as lm-eval gives them, even fractions such as pass@2, so that score files of all versions are comparable.
_SHARES = {
    *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "likelihood_acc"),
    *("pass@1", "pass_at_1", "prefix_match", "contains"),
}
_OTHERS_IN_PERCENT = {"f1", "mcc"}
_LOWER_IS_BETTER = {"bits_per_byte", "perplexity", "word_perplexity", "byte_perplexity", "brier_score", "ter"}


def metric_unit(metric: str) -> str:
    """Returns the unit of a metric's scores: `"points"` (percent), `"bits"`, or empty if it has another unit.

    Args:
        metric (`str`): its name in score files, possibly with a filter: `"exact_match,strict-match"`.
    """
    name = _without_filter(metric)
    return "points" if name in _SHARES | _OTHERS_IN_PERCENT else "bits" if name == "bits_per_byte" else ""


def metric_scale(metric: str) -> float:
    """Returns the score that a mean of 1 over the items has. For the argument see [`metric_unit`]."""
    return 100.0 if metric_unit(metric) == "points" else 1.0


def lower_is_better(metric: str) -> bool:
    """Returns whether a lower value of a metric is better. For the argument see [`metric_unit`]."""
    return _without_filter(metric) in _LOWER_IS_BETTER


def is_share(metric: str) -> bool:
    """Returns whether a score is the percentage of the items that are right. For the argument see [`metric_unit`]."""
    return _without_filter(metric) in _SHARES


def is_wrong(item: ScoredItem, metric: str) -> bool:
    """Returns whether the answer to an item is wrong: the reported metric of its task is below 1.

    If an item has no such metric (as for F1 over all items), or a lower value is better, its choice decides.
    """
    if metric in item.metrics and not lower_is_better(metric):
        return item.metrics[metric] < 1
    return item.gold is not None and item.chosen not in item.right_choices


def _without_filter(metric: str) -> str:
    return metric.partition(",")[0]


def bits_per_byte(nats: Sequence[float], texts: Sequence[str]) -> float:
    """Returns the negative log-likelihood of texts in bits, divided by their UTF-8 bytes. Lower is better.

    Bits are summed over all texts before the division, so a long text has more weight than a short one. A model that
    assigns equal probability to all bytes scores 8.

    Args:
        nats (`Sequence[float]`): negative log-likelihood of each text, in nats, summed over its tokens.
        texts (`Sequence[str]`): the texts.

    Raises:
        InputError: if the texts are empty.
    """
    return bits_by_size(math.fsum(nats), sum(len(text.encode()) for text in texts))


def bits_by_size(nats: float, num_bytes: int) -> float:
    """Returns [`bits_per_byte`] from the summed negative log-likelihood and size of all texts.

    Raises:
        InputError: if the size is 0.
    """
    if not num_bytes:
        raise InputError("bits_per_byte: the references are empty. Pass at least one byte of text")
    return nats / math.log(2) / num_bytes


def stop_rate(replies: Sequence[Sequence[int]], eos_token_id: int) -> float:
    """Returns the share of replies that end in the stop token, between 0 and 1.

    A chat model that has not learned its stop token generates until the token limit.

    Args:
        replies (`Sequence[Sequence[int]]`): the generated token ids of each reply, without the prompt.
        eos_token_id (`int`): the stop token.

    Raises:
        InputError: if there are no replies.
    """
    if not replies:
        raise InputError("stop_rate: got 0 replies. Pass at least one")
    return sum(_stops(reply, eos_token_id) for reply in replies) / len(replies)


def median_length(replies: Sequence[Sequence[int]], eos_token_id: int) -> float:
    """Returns the median number of tokens of replies, without the stop token. For the arguments see [`stop_rate`].

    It tells a model that answers from one that stops immediately.
    """
    return float(statistics.median(len(reply) - _stops(reply, eos_token_id) for reply in replies))


def _stops(reply: Sequence[int], eos_token_id: int) -> bool:
    return bool(reply) and reply[-1] == eos_token_id


def commonsense_average(scores: Sequence[float], tasks: Sequence[str]) -> float:
    """Returns the unweighted mean of the scores on TinyLlama's seven tasks.

    Args:
        scores (`Sequence[float]`): one score per task, all in the same unit.
        tasks (`Sequence[str]`): the names of the seven tasks, each once, in the order of the scores.

    Raises:
        InputError: if a task is missing or duplicated, or if a score is not finite.
    """
    if sorted(tasks) != sorted(TASKS):
        raise InputError(
            f"commonsense_average: got the tasks {', '.join(tasks)}. It needs each of {', '.join(TASKS)} once"
        )
    return math.fsum(_one_per_task(scores, "scores")) / len(TASKS)


def average_standard_error(standard_errors: Sequence[float]) -> float:
    """Returns the standard error of [`commonsense_average`] from the standard errors of the seven scores.

    The tasks are independent samples, so it is the root of the summed squares, divided by seven.

    Raises:
        InputError: if there are not seven standard errors, or if one is not finite.
    """
    return math.hypot(*_one_per_task(standard_errors, "standard errors")) / len(TASKS)


def _one_per_task(values: Sequence[float], name: str) -> Sequence[float]:
    if len(values) != len(TASKS):
        raise InputError(f"commonsense_average: got {len(values)} {name} for {len(TASKS)} tasks. Pass one per task")
    if not all(map(math.isfinite, values)):
        raise InputError(f"commonsense_average: one of the {name} is not finite. Score that task again")
    return values
