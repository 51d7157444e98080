"""The order of the training data as a pure function of (seed, sources, weights, block number).

Block k of a run is found in two steps without state:

1. Among sources: W_i(t) is the integral of the weight of source i up to time t, in blocks. Its m-th block (m = 1, 2,
...)
   is due when W_i(t) = m - 1/2, and blocks are taken in the order of their due times.
2. Within a source: draw m is block `permutation(epoch)[m % n]` of epoch m // n. Each epoch reads every block once, in
a
   different order.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np


_ROUNDS = 6  # of the Feistel network; four give a pseudo-random permutation (Luby and Rackoff 1988)
# Due times are multiples of 1 / 2^32 block. Those within a ramp are square roots, which could not be compared exactly.
_GRID = 1 << 32


class Block(NamedTuple):
    """A training block: index of the source in the recipe, and index of the block in that source."""

    source: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used


class WeightChange(NamedTuple):
    """New weights, reached linearly over `ramp` blocks from block `start`."""

    start: Fraction
    ramp: Fraction
    weights: Sequence[float]


class BlockOrder:
    """The block at each position of a run.

    After any k blocks, the number of blocks from source i is within 1/2 + n w_i / 2 of W_i(k), with n sources and w_i
    the largest of its weights within n / 2 blocks of k. This is below one block for two sources of constant weight.

    Args:
        num_blocks (`Sequence[int]`): number of blocks of each source.
        weights (`Sequence[float]`): share of each source; normalized by their sum.
        seed (`int`): seed of the permutations.
        changes (`Sequence[WeightChange]`, *optional*): later weights, with consecutive ramps.

    Raises:
        ValueError: if a source has no block, or a weight is negative or missing.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        weights: Sequence[float],
        seed: int,
        changes: Sequence[WeightChange] = (),
    ):
        for shares in (weights, *(change.weights for change in changes)):
            if len(shares) != len(num_blocks) or min(num_blocks) < 1:
                raise ValueError(
                    f"every source needs a weight and at least one block, got {num_blocks} blocks and weights {shares}"
                )
            if min(shares) < 0 or not sum(shares):
                raise ValueError(f"weights must be non-negative and not all 0, got {list(shares)}")
        self.num_blocks, self.seed = list(num_blocks), seed
        self._due = [_DueTimes(pieces) for pieces in _pieces(weights, changes)]

    def counts(self, position: int) -> list[int]:
        """The number of blocks of each source before a position of the run."""
        # At time t, source i has had round(W_i(t)) blocks. Their sum differs from t by at most half a block per
        # source, so this time is early enough, and at most a few blocks are missing.
        time = max(position - len(self._due), 0) * _GRID
        counts = [due.count(time) for due in self._due]
        for source, _ in self._merge(counts, position - sum(counts)):
            counts[source] += 1
        return counts

    def blocks(self, start: int, count: int) -> list[Block]:
        """The blocks at positions `start` to `start + count - 1` of the run."""
        taken = self._merge(self.counts(start), count)
        draws: dict[tuple[int, int], list[int]] = {}  # (source, epoch) -> positions in its permutation
        for source, m in taken:
            epoch, position = divmod(m, self.num_blocks[source])
            draws.setdefault((source, epoch), []).append(position)
        indices = {
            (source, epoch): iter(
                permute(np.array(positions), self.num_blocks[source], (self.seed, source, epoch)).tolist()
            )
            for (source, epoch), positions in draws.items()
        }
        return [Block(source, next(indices[source, m // self.num_blocks[source]])) for source, m in taken]

    def _merge(self, counts: list[int], number: int) -> list[tuple[int, int]]:
        """The next (source, draw) pairs in the order of their due times, after `counts` draws of each source."""
        due = [(self._due[source].time(m), source, m) for source, m in enumerate(counts)]
        heapq.heapify(due)
        taken = []
        for _ in range(number):
            _, source, m = due[0]
            taken.append((source, m))
            heapq.heapreplace(due, (self._due[source].time(m + 1), source, m + 1))
        return taken


class _Piece(NamedTuple):
    """A time interval with constant or linearly changing weight: 2 scale W = c + 2 a x + b x^2, where x is the time
    since `start` in grid units. All coefficients are integers, so that W is exact.

    The last interval has no end (`math.inf`) and b = 0.
    """

    start: int
    end: float
    scale: int
    c: int
    a: int
    b: int

    def twice_integral(self, x: int) -> int:
        return self.c + 2 * self.a * x + self.b * x * x


@dataclass(frozen=True)
class _DueTimes:
    """The due times of the blocks of one source, in grid units."""

    pieces: list[_Piece]

    def count(self, time: int) -> int:
        """The number of blocks due up to a time: round(W(time))."""
        piece = next(piece for piece in reversed(self.pieces) if piece.start <= time)
        return (piece.twice_integral(time - piece.start) + piece.scale) // (2 * piece.scale)

    def time(self, m: int) -> float:
        """The first grid unit at which W is at least m + 1/2, for m = 0, 1, ...; infinite if there is none."""
        for piece in self.pieces:
            target = (2 * m + 1) * piece.scale
            if piece.end == math.inf or piece.twice_integral(int(piece.end) - piece.start) >= target:
                return self._within(piece, target)
        raise AssertionError("the last piece has no end")

    @staticmethod
    def _within(piece: _Piece, target: int) -> float:
        missing = target - piece.c  # smallest x with 2 a x + b x^2 >= missing
        if missing <= 0:
            return piece.start
        if piece.a == piece.b == 0:
            return math.inf
        if piece.b == 0:
            return piece.start - (-missing // (2 * piece.a))
        # x = (sqrt(a^2 + b missing) - a) / b, written without a difference of nearly equal numbers. The root is
        # rounded down to an integer, and the loops below correct x.
        x = missing // (piece.a + math.isqrt(max(piece.a * piece.a + piece.b * missing, 0)) or 1)
        while piece.twice_integral(x) < target:
            x += 1
        while x and piece.twice_integral(x - 1) >= target:
            x -= 1
        return piece.start + x


def _pieces(weights: Sequence[float], changes: Sequence[WeightChange]) -> list[list[_Piece]]:
    """The intervals of each source: constant, ramp, constant, ramp, ..., constant."""
    levels = []
    for shares in (weights, *(change.weights for change in changes)):
        exact = [Fraction(str(share)) for share in shares]  # 0.7 is 7/10
        levels.append([share / sum(exact) for share in exact])
    starts = [int(change.start * _GRID) for change in changes]
    ends = [start + int(change.ramp * _GRID) for start, change in zip(starts, changes, strict=True)]
    bounds = [0, *(bound for pair in zip(starts, ends, strict=True) for bound in pair)]
    intervals = list(zip(bounds, (*bounds[1:], math.inf), strict=True))
    found = []
    for source in range(len(weights)):
        pieces, integral = [], Fraction(0)
        for number, (start, end) in enumerate(intervals):
            before, after = levels[number // 2][source], levels[(number + 1) // 2][source]
            if start == end:
                continue  # no interval before the first change, or a change without a ramp
            slope = Fraction(0) if before == after else (after - before) / (int(end) - start) / _GRID
            per_unit = before / _GRID
            scale = math.lcm(integral.denominator, per_unit.denominator, slope.denominator)
            piece = _Piece(start, end, scale, int(2 * integral * scale), int(per_unit * scale), int(slope * scale))
            pieces.append(piece)
            if end != math.inf:
                integral = Fraction(piece.twice_integral(int(end) - start), 2 * piece.scale)
        found.append(pieces)
    return found


def permute(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Evaluates a pseudo-random permutation of 0 .. size-1 at given positions, in constant memory.

    A Feistel network permutes the numbers below the next power of four. It is applied again to results of at least
    `size` until they are smaller ("cycle walking", Black and Rogaway 2002), on average at most four times.

    Args:
        positions (`np.ndarray`): numbers in 0 .. size-1.
        size (`int`): length of the permutation.
        key (`Sequence[int]`): numbers that select the permutation.
    """
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, dtype=np.uint64)
    values = _feistel(positions.astype(np.uint64), keys, np.uint64(half))
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
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), in which every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
