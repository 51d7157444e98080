"""Steps and learning rate as functions of the number of tokens seen alone."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from .config import PretrainConfig


class _Stage(NamedTuple):
    """Consecutive steps of one size, and the steps and tokens before them."""

    steps_before: int
    tokens_before: int
    tokens_per_step: int


class Steps:
    """Optimizer steps, numbered from 1, and the tokens seen before and after each.

    Args:
        total_tokens (`int`): the last step is the first to reach it.
        tokens_per_step (`int`): of all processes together.
        changes (`Sequence[tuple[int, int]]`, *optional*): (from_tokens, tokens_per_step), increasing: a new size from
            the first step that starts at or after `from_tokens`. If several apply at once, the last one does.
    """

    def __init__(self, total_tokens: int, tokens_per_step: int, changes: Sequence[tuple[int, int]] = ()):
        self._stages = [_Stage(0, 0, tokens_per_step)]
        for from_tokens, size in changes:
            last = self._stages[-1]
            # 0 if the previous stage already starts after this change: one earlier step passes both.
            number = max(-(-(from_tokens - last.tokens_before) // last.tokens_per_step), 0)
            tokens = last.tokens_before + number * last.tokens_per_step
            self._stages.append(_Stage(last.steps_before + number, tokens, size))
        self.total_tokens = total_tokens
        self.number = self.reaching(total_tokens)

    @property
    def sizes(self) -> list[int]:
        """The step sizes in tokens that the run has, in order."""
        stages = itertools.pairwise([*self._stages, _Stage(self.number, 0, 0)])
        reached = [
            stage.tokens_per_step
            for stage, following in stages
            if stage.steps_before < min(following.steps_before, self.number)
        ]
        return [size for size, _ in itertools.groupby(reached)]

    def tokens_after(self, step: int) -> int:
        """Tokens seen after `step` steps."""
        stage = next(stage for stage in reversed(self._stages) if stage.steps_before <= step)
        return stage.tokens_before + (step - stage.steps_before) * stage.tokens_per_step

    def tokens_of(self, step: int) -> int:
        """Tokens of the step with this number."""
        return next(stage for stage in reversed(self._stages) if stage.steps_before < step).tokens_per_step

    def reaching(self, tokens: int) -> int:
        """The first step after which at least this many tokens have been seen."""
        stage = next(
            stage for stage in reversed(self._stages) if stage.tokens_before < tokens or not stage.steps_before
        )
        return stage.steps_before + -(-(tokens - stage.tokens_before) // stage.tokens_per_step)


def learning_rate(step: int, config: "PretrainConfig", branched_at: int | None = None) -> float:
    """The learning rate of a step. It depends on tokens alone, not on the number of processes.

    Linear from 0 to `schedule.peak` over `schedule.warmup_tokens`. Then, where u rises from 0 to 1 at
    `training.total_tokens`:

    - `cosine`: `floor + (peak - floor) (1 + cos(pi u)) / 2`, as published;
    - `wsd`: `peak`, then linear to `floor` over the last `schedule.decay_tokens` (a trapezoid);
    - `constant`: `peak`;
    - in a branch with `schedule: cooldown`: linear from the rate of its first step to `floor`, or to 0 if `floor` is
      null.

    Args:
        step (`int`): from 1 on.
        config (`PretrainConfig`): the recipe.
        branched_at (`int`, *optional*): tokens seen at the milestone from which the run was branched.
    """
    tokens = config.steps.tokens_after(step - 1)
    if branched_at is None or config.branch is None or config.branch.schedule == "continue":
        return _scheduled(tokens, tokens + config.steps.tokens_of(step), config)
    first = config.steps.reaching(branched_at) + 1
    start = _scheduled(branched_at, branched_at + config.steps.tokens_of(first), config)
    done = (tokens - branched_at) / (config.training.total_tokens - branched_at)
    return start + ((config.schedule.floor or 0.0) - start) * done


def _scheduled(tokens: int, reached: int, config: "PretrainConfig") -> float:
    schedule, total = config.schedule, config.training.total_tokens
    floor = schedule.floor or 0.0  # null for `constant` only
    # Warm-up counts the tokens of the step itself; otherwise the first step would have rate 0 and no effect.
    if reached < schedule.warmup_tokens:
        return schedule.peak * reached / schedule.warmup_tokens
    if schedule.name == "constant":
        return schedule.peak
    if schedule.name == "wsd":
        assert schedule.decay_tokens is not None  # by the rules of a recipe
        left = min((total - tokens) / schedule.decay_tokens, 1.0)
        return floor + (schedule.peak - floor) * max(left, 0.0)
    decaying = max(total - schedule.warmup_tokens, 1)  # 1 if the warm-up is longer than the run
    progress = min((tokens - schedule.warmup_tokens) / decaying, 1.0)
    return floor + (schedule.peak - floor) * 0.5 * (1 + math.cos(math.pi * max(progress, 0.0)))
