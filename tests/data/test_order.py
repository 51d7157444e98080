"""The data order: a pure function, a permutation within each epoch, and a mixture within its stated bound."""

from fractions import Fraction

import numpy as np
import pytest

from tinyllama_hf.data.order import BlockOrder, permuted


class TestPermutation:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 1000, 4097])
    def test_is_a_permutation(self, size):
        values = permuted(np.arange(size), size, (3407, 0, 0))
        assert sorted(values) == list(range(size))

    def test_place_by_place_equals_all_at_once(self):
        together = permuted(np.arange(500), 500, (1, 2, 3))
        assert [permuted(np.array([i]), 500, (1, 2, 3))[0] for i in range(500)] == list(together)

    def test_key_decides(self):
        orders = {tuple(permuted(np.arange(100), 100, key)) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))}
        assert len(orders) == 4

    def test_huge_size_costs_nothing(self):
        size = 10**15
        values = permuted(np.arange(1000), size, (0,))
        assert len(set(values.tolist())) == 1000 and values.max() < size

    def test_looks_random(self):
        """Mean displacement of a random permutation is a third of its length; neighbours are no neighbours."""
        size = 10_000
        values = permuted(np.arange(size), size, (7,))
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
        """Block 1.5 billion, the last of 3T tokens, costs what block 10 costs, and counts are exact there."""
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
        """Thirds sum to a little less than 1; they are taken as equal shares."""
        order = BlockOrder([9, 9, 9], [0.3333333333333333] * 3, seed=0)
        assert order.counts(300) == [100, 100, 100]

    @pytest.mark.parametrize(
        ("num_blocks", "weights"),
        [([1, 0], [0.5, 0.5]), ([1], [0.5, 0.5]), ([1, 1], [1.5, -0.5])],
    )
    def test_refuses(self, num_blocks, weights):
        with pytest.raises(ValueError, match="weight"):
            BlockOrder(num_blocks, weights, seed=0)
