"""The three summaries of an evaluation. The modules in `eval/metrics/` offer them as `evaluate.Metric`."""

import math
import statistics
from collections.abc import Sequence

from ..errors import InputError
from .protocol import TASKS


def bits_per_byte(nats: Sequence[float], texts: Sequence[str]) -> float:
    """What a model spends on texts, in bits, divided by their UTF-8 bytes; lower is better, 8 is no knowledge at all.

    Bits are summed over all texts before the division, so that a long text weighs more than a short one.

    Args:
        nats (`Sequence[float]`): negative log-likelihood of each text, in nats, summed over its tokens.
        texts (`Sequence[str]`): the texts.

    Raises:
        InputError: if the texts are empty.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    if not num_bytes:
        raise InputError("bits_per_byte: the references hold no text; give at least one byte")
    return math.fsum(nats) / math.log(2) / num_bytes


def stop_rate(replies: Sequence[Sequence[int]], eos_token_id: int) -> dict[str, float]:
    """The share of replies that end by themselves, and how long they are.

    A chat model that never learned its stop token talks on until it is cut off; the median length tells a model that
    answers from one that stops at once.

    Args:
        replies (`Sequence[Sequence[int]]`): the new token ids of each reply, the prompt left out.
        eos_token_id (`int`): the stop token.

    Returns:
        `dict`: `stop_rate` between 0 and 1, and `median_length` in tokens, a stop token at the end not counted.

    Raises:
        InputError: if there is no reply.
    """
    if not replies:
        raise InputError("stop_rate: got no reply; give at least one")
    stopped = [bool(reply) and reply[-1] == eos_token_id for reply in replies]
    lengths = [len(reply) - stop for reply, stop in zip(replies, stopped, strict=True)]
    return {"stop_rate": sum(stopped) / len(replies), "median_length": float(statistics.median(lengths))}


def commonsense_average(
    scores: Sequence[float], tasks: Sequence[str], standard_errors: Sequence[float] | None = None
) -> dict[str, float | None]:
    """The unweighted mean of the scores on TinyLlama's seven tasks, with its standard error.

    The tasks are independent samples, so the standard error of the mean is the root of the summed squares, divided by
    seven.

    Args:
        scores (`Sequence[float]`): a score for each task, all in one unit.
        tasks (`Sequence[str]`): the tasks that they belong to, each of the seven once, in any order.
        standard_errors (`Sequence[float]`, *optional*): of the scores, in their order.

    Returns:
        `dict`: `average`, and `standard_error` (`None` without `standard_errors`), in the unit of the scores.

    Raises:
        InputError: if a task is missing or given twice, since the mean of six is another figure; or if a score is not a
            number.
    """
    if sorted(tasks) != sorted(TASKS):
        raise InputError(
            f"commonsense_average: got the tasks {', '.join(tasks)}; needs each of {', '.join(TASKS)} once"
        )
    if not all(map(math.isfinite, [*scores, *(standard_errors or ())])):
        raise InputError("commonsense_average: a score or a standard error is not a number; score that task again")
    if standard_errors is not None and len(standard_errors) != len(scores):
        raise InputError(
            f"commonsense_average: {len(standard_errors)} standard errors for {len(scores)} scores; give one each"
        )
    error = None if standard_errors is None else math.hypot(*standard_errors) / len(TASKS)
    return {"average": math.fsum(scores) / len(TASKS), "standard_error": error}
