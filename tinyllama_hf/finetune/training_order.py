"""The order of training: which conversations each step sees, from the seed alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice

import numpy as np

from .packed_rows import balanced_rows


@dataclass(frozen=True)
class TrainingOrder:
    """The conversations of each step, and how they are divided into forward passes.

    Every step is full: after the last epoch the order continues with the conversations of a next one.

    Attributes:
        steps (`list[list[int]]`): numbers of the conversations of each step.
        lengths (`Sequence[int]`): tokens of each conversation.
        rows_per_step (`int`): forward passes of a step, of all processes together.
        packing (`bool`): whether the conversations of a forward pass share one row without padding.
    """

    steps: list[list[int]]
    lengths: Sequence[int]
    rows_per_step: int
    packing: bool

    def rows(self) -> list[list[int]]:
        """Returns the conversations of each forward pass, of all steps in order.

        With packing, the passes of a step have nearly equal numbers of tokens. Without, conversations of similar
        lengths are together, each pass has the same number of them, and the shortest ones come first.
        """
        return list(chain.from_iterable(self._divided(step) for step in self.steps))

    def tokens_after(self) -> list[int]:
        """Returns the number of trained tokens after each step, without padding."""
        return list(accumulate(sum(self.lengths[number] for number in step) for step in self.steps))

    def _divided(self, step: list[int]) -> list[list[int]]:
        if self.packing:
            rows = balanced_rows([self.lengths[number] for number in step], self.rows_per_step)
            return [[step[i] for i in row] for row in rows]
        ordered, size = sorted(step, key=self.lengths.__getitem__), len(step) // self.rows_per_step
        return [ordered[start : start + size] for start in range(0, len(step), size)]


def training_steps(
    sizes: Sequence[int], weights: Sequence[float], epochs: float, per_step: int, seed: int
) -> list[list[int]]:
    """Returns the numbers of the conversations of each step.

    An epoch has `weight` times the conversations of each source, in random order. With a weight of 0.5, the first
    epoch has one half of them, and the second epoch the other half.

    Args:
        sizes (`Sequence[int]`): number of conversations of each source, which are numbered in this order.
        weights (`Sequence[float]`): how often an epoch has each conversation of a source.
        epochs (`float`): number of epochs.
        per_step (`int`): conversations per step.
        seed (`int`): of the order.
    """
    random = np.random.default_rng(seed)
    counts = [round(size * weight) for size, weight in zip(sizes, weights, strict=True)]
    starts = [sum(sizes[:source]) for source in range(len(sizes))]
    streams = [_endless(start, size, random) for start, size in zip(starts, sizes, strict=True)]
    number = max(1, -(-round(sum(counts) * epochs) // per_step))
    order = _epochs(streams, counts, random)
    return [list(islice(order, per_step)) for _ in range(number)]


def _epochs(streams: list[Iterator[int]], counts: list[int], random: np.random.Generator) -> Iterator[int]:
    while True:
        epoch = [number for stream, count in zip(streams, counts, strict=True) for number in islice(stream, count)]
        yield from random.permutation(epoch).tolist()


def _endless(start: int, size: int, random: np.random.Generator) -> Iterator[int]:
    """Yields the numbers of a source in one random order after another."""
    while True:
        yield from (start + random.permutation(size)).tolist()
