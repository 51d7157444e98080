"""The three summary metrics. The modules in `eval/metrics/` wrap them as `evaluate.Metric`."""

import math
import statistics
from collections.abc import Sequence

from ..errors import InputError
from .protocol import TASKS


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
    num_bytes = sum(len(text.encode()) for text in texts)
    if not num_bytes:
        raise InputError("bits_per_byte: the references are empty. Pass at least one byte of text")
    return math.fsum(nats) / math.log(2) / num_bytes


def stop_rate(replies: Sequence[Sequence[int]], eos_token_id: int) -> dict[str, float]:
    """Returns the share of replies that end in the stop token, and their median length.

    A chat model that has not learned its stop token generates until the token limit. The median length distinguishes a
    model that answers from one that stops immediately.

    Args:
        replies (`Sequence[Sequence[int]]`): the generated token ids of each reply, without the prompt.
        eos_token_id (`int`): the stop token.

    Returns:
        `dict`: `stop_rate` between 0 and 1, and `median_length` in tokens without the stop token.

    Raises:
        InputError: if there is no reply.
    """
    if not replies:
        raise InputError("stop_rate: got 0 replies. Pass at least one")
    stopped = [bool(reply) and reply[-1] == eos_token_id for reply in replies]
    lengths = [len(reply) - stop for reply, stop in zip(replies, stopped, strict=True)]
    return {"stop_rate": sum(stopped) / len(replies), "median_length": float(statistics.median(lengths))}


def commonsense_average(
    scores: Sequence[float], tasks: Sequence[str], standard_errors: Sequence[float] | None = None
) -> dict[str, float | None]:
    """Returns the unweighted mean of the scores on TinyLlama's seven tasks, with its standard error.

    The tasks are independent samples, so the standard error of the mean is the root of the summed squares, divided by
    seven.

    Args:
        scores (`Sequence[float]`): one score per task, all in the same unit.
        tasks (`Sequence[str]`): the names of the seven tasks, each once, in the order of the scores.
        standard_errors (`Sequence[float]`, *optional*): standard errors, in the order of the scores.

    Returns:
        `dict`: `average`, and `standard_error` (`None` without `standard_errors`), in the unit of the scores.

    Raises:
        InputError: if a task is missing or duplicated, or if a value is not finite.
    """
    if sorted(tasks) != sorted(TASKS):
        raise InputError(
            f"commonsense_average: got the tasks {', '.join(tasks)}. It needs each of {', '.join(TASKS)} once"
        )
    if not all(map(math.isfinite, [*scores, *(standard_errors or ())])):
        raise InputError("commonsense_average: a score or standard error is not finite. Score that task again")
    if standard_errors is not None and len(standard_errors) != len(scores):
        raise InputError(
            f"commonsense_average: {len(standard_errors)} standard errors for {len(scores)} scores. Pass one per score"
        )
    error = None if standard_errors is None else math.hypot(*standard_errors) / len(TASKS)
    return {"average": math.fsum(scores) / len(TASKS), "standard_error": error}
