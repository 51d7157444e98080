"""The data order: a pure function, a permutation in each epoch, and a mixture within the documented bound."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from tinyllama_hf.data.order import BlockOrder, WeightChange, permute


class TestPermutation:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 1000, 4097])
    def test_is_a_permutation(self, size):
        values = permute(np.arange(size), size, (3407, 0, 0))
        assert sorted(values) == list(range(size))

    def test_place_by_place_equals_all_at_once(self):
        together = permute(np.arange(500), 500, (1, 2, 3))
        assert [permute(np.array([i]), 500, (1, 2, 3))[0] for i in range(500)] == list(together)

    def test_key_decides(self):
        orders = {tuple(permute(np.arange(100), 100, key)) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))}
        assert len(orders) == 4

    def test_huge_size_costs_nothing(self):
        size = 10**15
        values = permute(np.arange(1000), size, (0,))
        assert len(set(values.tolist())) == 1000 and values.max() < size

    def test_looks_random(self):
        """The mean displacement of a random permutation is a third of its length, and neighbors are separated."""
        size = 10_000
        values = permute(np.arange(size), size, (7,))
        assert abs(np.abs(values - np.arange(size)).mean() / size - 1 / 3) < 0.02
        assert (np.abs(np.diff(values)) == 1).sum() < 10


CASES = [
    ([10, 20], [0.7, 0.3]),
    ([5, 9, 2], [0.5, 0.3, 0.2]),
    ([100, 7], [0.693584, 0.306416]),
    ([3, 3, 3, 3, 3, 3, 3], [0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ([4], [1.0]),
    ([6, 6], [0.5, 0.5]),
]


class TestMixture:
    @pytest.mark.parametrize(("num_blocks", "weights"), CASES)
    def test_counts_stay_within_the_bound(self, num_blocks, weights):
        order = BlockOrder(num_blocks, weights, seed=1)
        exact = [Fraction(str(w)) for w in weights]
        counts, n = [0] * len(weights), len(weights)
        for position, block in enumerate(order.blocks(0, 3000), start=1):
            counts[block.source] += 1
            for count, weight in zip(counts, exact, strict=True):
                assert abs(count - weight * position) <= Fraction(1, 2) + n * weight / 2, (position, counts)
        assert order.counts(3000) == counts

    @pytest.mark.parametrize(("num_blocks", "weights"), CASES)
    def test_any_place_is_found_without_the_places_before(self, num_blocks, weights):
        order = BlockOrder(num_blocks, weights, seed=1)
        all_at_once = order.blocks(0, 400)
        for start in (0, 1, 2, 3, 17, 100, 255, 399):
            assert order.blocks(start, min(20, 400 - start)) == all_at_once[start : start + 20]

    @pytest.mark.parametrize(("num_blocks", "weights"), CASES)
    def test_each_epoch_reads_every_block_once(self, num_blocks, weights):
        blocks = BlockOrder(num_blocks, weights, seed=1).blocks(0, 600)
        for source, size in enumerate(num_blocks):
            indices = [block.index for block in blocks if block.source == source]
            epochs = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)]
            assert epochs and all(sorted(epoch) == list(range(size)) for epoch in epochs)
            if size > 5 and len(epochs) > 1:
                assert epochs[0] != epochs[1], "epochs must differ in order"

    def test_far_into_a_run(self):
        """Block 1.5 billion, the last of 3T tokens, is as fast as block 10, with exact counts."""
        order = BlockOrder([10**9, 10**8], [0.693584, 0.306416], seed=1)
        position = 1_464_844_288
        counts = order.counts(position)
        assert sum(counts) == position
        assert abs(counts[0] - position * 0.693584) <= 1.2
        assert len(order.blocks(position, 64)) == 64

    def test_seed_changes_the_order_and_not_the_mixture(self):
        a, b = (BlockOrder([50, 50], [0.7, 0.3], seed=s).blocks(0, 100) for s in (1, 2))
        assert a != b and [x.source for x in a] == [x.source for x in b]

    def test_weights_that_are_no_short_decimals(self):
        """Three rounded thirds, which sum to less than 1, are equal shares."""
        order = BlockOrder([9, 9, 9], [0.3333333333333333] * 3, seed=0)
        assert order.counts(300) == [100, 100, 100]

    @pytest.mark.parametrize(
        ("num_blocks", "weights"),
        [([1, 0], [0.5, 0.5]), ([1], [0.5, 0.5]), ([1, 1], [1.5, -0.5])],
    )
    def test_refuses(self, num_blocks, weights):
        with pytest.raises(ValueError, match="weight"):
            BlockOrder(num_blocks, weights, seed=0)


RAMPED = [
    ([50, 20, 9], [1.0, 0.0, 0.0], [(300, 200, [0.75, 0.15, 0.10])]),
    (
        [50, 20, 9],
        [0.5, 0.3, 0.2],
        [(100, 300, [0.0, 0.4, 0.6]), (400, 0, [0.2, 0.3, 0.5]), (600, 50, [0.2, 0.0, 0.8])],
    ),
    ([7, 7], [0.693584, 0.306416], [(Fraction(1001, 3), Fraction(700, 9), [0.1, 0.9])]),
]


class TestRamps:
    """Weights that change linearly have the same guarantees, with the integral of the weight instead of weight x
    position."""

    @staticmethod
    def order(num_blocks, weights, changes, seed=1):
        return BlockOrder(
            num_blocks, weights, seed, [WeightChange(Fraction(a), Fraction(b), w) for a, b, w in changes]
        )

    @staticmethod
    def weight(weights, changes, source: int, time: Fraction) -> Fraction:
        value = Fraction(str(weights[source]))
        for start, ramp, after in changes:
            target = Fraction(str(after[source]))
            if time >= start + ramp:
                value = target
            elif time > start:
                return value + (target - value) * (time - start) / Fraction(ramp)
        return value

    def integral(self, weights, changes, source: int, time: int) -> Fraction:
        """The exact integral: the weight is linear between these bounds."""
        bounds = sorted(
            {Fraction(0), Fraction(time)}
            | {min(Fraction(x), Fraction(time)) for a, b, _ in changes for x in (a, a + b)}
        )
        total = Fraction(0)
        for start, end in itertools.pairwise(bounds):
            middle = (start + end) / 2
            total += self.weight(weights, changes, source, middle) * (end - start)
        return total

    @pytest.mark.parametrize(("num_blocks", "weights", "changes"), RAMPED)
    def test_counts_stay_within_the_bound(self, num_blocks, weights, changes):
        counts, n = [0] * len(weights), len(weights)
        for position, block in enumerate(self.order(num_blocks, weights, changes).blocks(0, 900), start=1):
            counts[block.source] += 1
            for source, count in enumerate(counts):
                near = [position + Fraction(d, 4) for d in range(-2 * n, 2 * n + 1)]
                largest = max(self.weight(weights, changes, source, max(time, Fraction(0))) for time in near)
                missed = abs(count - self.integral(weights, changes, source, position))
                assert missed <= Fraction(1, 2) + n * largest / 2 + Fraction(1, 1 << 31), (position, source)

    @pytest.mark.parametrize(("num_blocks", "weights", "changes"), RAMPED)
    def test_any_place_is_found_without_the_places_before(self, num_blocks, weights, changes):
        order = self.order(num_blocks, weights, changes)
        together = order.blocks(0, 900)
        for start in range(0, 880, 13):
            assert order.blocks(start, 20) == together[start : start + 20]
            assert order.counts(start) == [sum(b.source == s for b in together[:start]) for s in range(len(weights))]

    @pytest.mark.parametrize(("num_blocks", "weights", "changes"), RAMPED)
    def test_each_epoch_reads_every_block_once(self, num_blocks, weights, changes):
        blocks = self.order(num_blocks, weights, changes).blocks(0, 900)
        for source, size in enumerate(num_blocks):
            indices = [block.index for block in blocks if block.source == source]
            for start in range(0, len(indices) - size + 1, size):
                assert sorted(indices[start : start + size]) == list(range(size))

    def test_a_source_of_weight_zero_is_not_read(self):
        blocks = self.order([9, 9], [1.0, 0.0], [(100, 0, [0.0, 1.0])]).blocks(0, 200)
        assert [block.source for block in blocks] == [0] * 100 + [1] * 100

    def test_the_place_of_v1_1(self):
        """The published change: after 1.5T tokens, with a ramp of 6B, in blocks of 2048."""
        start, ramp = Fraction(1_500_000_000_000, 2048), Fraction(6_000_000_000, 2048)
        order = BlockOrder([10**9] * 3, [1.0, 0.0, 0.0], 1, [WeightChange(start, ramp, [0.75, 0.15, 0.10])])
        before, after = (order.counts(int(x)) for x in (start - 10, start + ramp))
        assert before[1:] == [0, 0]
        assert after[1] == pytest.approx(float(ramp) * 0.15 / 2, abs=2), (
            "half of its weight, on average, over the ramp"
        )
        assert len(order.blocks(int(start + ramp / 2), 64)) == 64
