"""The order of the training data as a pure function of (seed, sources, weights, block number).

Block k of a run is found in two steps, neither of which has a state. Among the sources, the m-th block of source i
(m = 0, 1, ...) is due at time (m + 1/2) / w_i, and blocks are taken in the order of their due times. Within a source,
draw m is block `permutation(epoch)[m % n]` of epoch m // n: each epoch reads every block once, in an order of its own.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np


_ROUNDS = 6  # of the Feistel network; four already pass for random (Luby and Rackoff 1988)


class Block(NamedTuple):
    """A training block: number of the source in the recipe, and number of the block in that source."""

    source: int
    index: int


class BlockOrder:
    """Which block of which source stands at each place of a run.

    Args:
        num_blocks (`Sequence[int]`): blocks of each source.
        weights (`Sequence[float]`): share of each source; divided by their sum.
        seed (`int`): of the permutations.

    Raises:
        ValueError: if a source has no block, or a weight is not positive.
    """

    def __init__(self, num_blocks: Sequence[int], weights: Sequence[float], seed: int):
        # Decimal fractions are taken as written: 0.7 is 7/10, so that due times compare exactly.
        shares = [Fraction(str(weight)) for weight in weights]
        if len(weights) != len(num_blocks) or min(num_blocks) < 1:
            raise ValueError(f"every source needs a weight and at least one block, got {num_blocks} and {weights}")
        if min(shares) <= 0:
            raise ValueError(f"weights must be positive, got {list(weights)}")
        self.weights = [share / sum(shares) for share in shares]
        self.num_blocks, self.seed = list(num_blocks), seed

    def counts(self, position: int) -> list[int]:
        """How many blocks of each source stand before a place of the run: within 1/2 + n w_i / 2 of w_i x position."""
        # At time t, source i has had round(w_i t) blocks, which sum to t give or take half a block per source. Start
        # surely too early and take the few missing ones.
        time = max(position - len(self.weights), 0)
        counts = [int(weight * time + Fraction(1, 2)) for weight in self.weights]
        for source, _ in self._merge(counts, position - sum(counts)):
            counts[source] += 1
        return counts

    def blocks(self, start: int, count: int) -> list[Block]:
        """The blocks at the places `start` to `start + count - 1` of the run."""
        return [Block(source, self._draw(source, m)) for source, m in self._merge(self.counts(start), count)]

    def _merge(self, counts: list[int], number: int) -> list[tuple[int, int]]:
        due = [
            (Fraction(2 * m + 1, 2) / w, source, m)
            for source, (m, w) in enumerate(zip(counts, self.weights, strict=True))
        ]
        heapq.heapify(due)
        taken = []
        for _ in range(number):
            time, source, m = due[0]
            taken.append((source, m))
            heapq.heapreplace(due, (time + 1 / self.weights[source], source, m + 1))
        return taken

    def _draw(self, source: int, m: int) -> int:
        epoch, place = divmod(m, self.num_blocks[source])
        return int(permuted(np.array([place]), self.num_blocks[source], (self.seed, source, epoch))[0])


def permuted(places: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """A pseudo-random permutation of 0 .. size-1, evaluated at some places, in constant memory.

    A Feistel network permutes the numbers below the next power of four; a value beyond `size` is sent through again
    until it falls below ("cycle walking", Black and Rogaway 2002), at most four times on average.

    Args:
        places (`np.ndarray`): numbers in 0 .. size-1.
        size (`int`): length of the permutation.
        key (`Sequence[int]`): numbers that name the permutation.
    """
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, dtype=np.uint64)
    values = _feistel(places.astype(np.uint64), keys, np.uint64(half))
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], keys, np.uint64(half))
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
