"""The learning rate at the places that matter, and names and steps of milestones."""

import itertools

import pytest

from tinyllama_hf.pretrain.checkpoints import milestone_names, milestone_steps
from tinyllama_hf.pretrain.config import load_config
from tinyllama_hf.pretrain.schedule import learning_rate


@pytest.fixture
def config(recipe):
    return load_config(
        recipe,
        ["training.total_tokens=102400", "schedule.warmup_tokens=2560", "schedule.peak=4e-4", "schedule.floor=4e-5"],
    )


def test_regression_floor_equal_to_peak(config):
    """The original's floor equalled its peak, and the rate stayed constant for 0.5T tokens."""
    step = config.training.tokens_per_step  # 256
    assert learning_rate(0, config) == pytest.approx(4e-4 * step / 2560)
    assert learning_rate(2560 - 2 * step, config) == pytest.approx(4e-4 * 0.9)
    assert learning_rate(2560, config) == 4e-4
    middle = 2560 + (102400 - 2560) // 2
    assert learning_rate(middle, config) == pytest.approx((4e-4 + 4e-5) / 2)
    assert learning_rate(102400 - step, config) == pytest.approx(4e-5, rel=1e-3)
    rates = [learning_rate(tokens, config) for tokens in range(2560, 102400, step)]
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_regression_rate_follows_tokens_not_steps(config, recipe):
    """The original's batch size meant "per node", so that other hardware had another schedule."""
    other = load_config(recipe, ["training.total_tokens=102400", "schedule.warmup_tokens=2560", "schedule.peak=4e-4",
                                 "schedule.floor=4e-5", "training.micro_batch_size=1"])  # fmt: skip
    assert [learning_rate(t, config) for t in range(0, 102400, 256)] == [
        learning_rate(t, other) for t in range(0, 102400, 256)
    ]


def test_milestones_at_the_first_step_that_reaches_them():
    assert milestone_steps([1, 256, 257, 1000], 256, 10) == [1, 2, 4, 10]


def test_names_are_tinyllamas():
    steps = [50_000, 240_000, 480_000, 715_000, 955_000, 1_195_000, 1_430_512]
    names = milestone_names(steps, 2_097_152)
    assert names[480_000] == "step-480k-token-1007B"
    assert names[715_000] == "step-715k-token-1499B"
    assert names[50_000] == "step-50k-token-105B"
    assert names[1_430_512] == "step-1431k-token-3000B"


def test_small_names_keep_apart():
    assert list(milestone_names([147, 293, 440, 586], 2048).values()) == [
        "step-147-token-0.3M", "step-293-token-0.6M", "step-440-token-0.9M", "step-586-token-1.2M",
    ]  # fmt: skip
    names = milestone_names([1, 2], 256).values()
    assert len(set(names)) == 2 and "step-1-token-0.0003M" in names
