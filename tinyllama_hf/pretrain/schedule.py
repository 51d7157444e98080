"""The learning rate as a function of the tokens seen, and nothing else."""

import math

from .config import PretrainConfig


def learning_rate(tokens: int, config: PretrainConfig) -> float:
    """The learning rate of the step that begins after `tokens` tokens.

    Linear from 0 to `schedule.peak` over `schedule.warmup_tokens`, then half a cosine down to `schedule.floor` at
    `training.total_tokens`. It does not depend on the number of processes.
    """
    schedule, total = config.schedule, config.training.total_tokens
    # The first step would have rate 0 and be lost: warm-up counts the step's own tokens.
    reached = tokens + config.training.tokens_per_step
    if reached < schedule.warmup_tokens:
        return schedule.peak * reached / schedule.warmup_tokens
    progress = min((tokens - schedule.warmup_tokens) / (total - schedule.warmup_tokens), 1.0)
    return schedule.floor + (schedule.peak - schedule.floor) * 0.5 * (1 + math.cos(math.pi * max(progress, 0.0)))
