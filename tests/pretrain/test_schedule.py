"""The learning rate at landmarks, and the names and steps of milestones."""

import itertools
from random import Random

import pytest

from tests.conftest import ROOT
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.milestones import milestone_names, milestone_steps
from tinyllama_hf.pretrain.schedule import Steps, learning_rate


@pytest.fixture
def config(recipe):
    return load_pretrain_config(
        recipe,
        ["training.total_tokens=102400", "schedule.warmup_tokens=2560", "schedule.peak=4e-4", "schedule.floor=4e-5"],
    )


def rate_at(tokens: int, config) -> float:
    """The rate of the step that starts at `tokens`."""
    return learning_rate(config.steps.reaching(tokens) + 1, config)


def test_regression_floor_equal_to_peak(config, recipe):
    """The original's floor equaled its peak, so the rate was constant for 0.5T tokens."""
    step = config.training.tokens_per_step  # 256
    assert rate_at(0, config) == pytest.approx(4e-4 * step / 2560)
    assert rate_at(2560 - 2 * step, config) == pytest.approx(4e-4 * 0.9)
    assert rate_at(2560, config) == 4e-4
    middle = 2560 + (102400 - 2560) // 2
    assert rate_at(middle, config) == pytest.approx((4e-4 + 4e-5) / 2)
    assert rate_at(102400 - step, config) == pytest.approx(4e-5, rel=1e-3)
    rates = [learning_rate(number, config) for number in range(11, config.steps.number + 1)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    with pytest.raises(InputError, match=r"equals schedule\.peak, so cosine is constant"):
        load_pretrain_config(recipe, ["schedule.peak=4e-4", "schedule.floor=4e-4"])


def test_regression_the_published_schedule():
    """The values of TinyLlama's schedule at its first, 2000th, middle and last step (facts/released.yaml)."""
    config = load_pretrain_config(ROOT / "recipes" / "pretrain" / "tinyllama-1.1b.yaml")
    assert config.steps.number == 1_430_512
    assert learning_rate(1, config) == pytest.approx(4e-4 / 2000)
    assert learning_rate(2000, config) == pytest.approx(4e-4)
    assert learning_rate(2000 + (1_430_512 - 2000) // 2 + 1, config) == pytest.approx(2.2e-4, rel=1e-5)
    assert learning_rate(1_430_512, config) == pytest.approx(4e-5, rel=1e-6)


def test_regression_rate_follows_tokens_not_steps(config, recipe):
    """The original's batch size was per node, so the schedule depended on the hardware."""
    other = load_pretrain_config(
        recipe,
        [
            "training.total_tokens=102400",
            "schedule.warmup_tokens=2560",
            "schedule.peak=4e-4",
            "schedule.floor=4e-5",
            "training.micro_batch_size=1",
        ],
    )
    assert [learning_rate(n, config) for n in range(1, 401)] == [learning_rate(n, other) for n in range(1, 401)]


def test_wsd_is_a_trapezoid(recipe):
    config = load_pretrain_config(
        recipe,
        [
            "training.total_tokens=102400",
            "schedule.name=wsd",
            "schedule.warmup_tokens=2560",
            "schedule.peak=4e-4",
            "schedule.floor=0",
            "schedule.decay_tokens=25600",
        ],
    )
    assert rate_at(0, config) == pytest.approx(4e-5)
    assert {learning_rate(n, config) for n in range(10, 302)} == {4e-4}
    assert rate_at(102400 - 12800, config) == pytest.approx(2e-4)
    assert rate_at(102400 - 256, config) == pytest.approx(4e-4 / 100)


def test_constant(recipe):
    config = load_pretrain_config(
        recipe, ["schedule.name=constant", "schedule.floor=null", "schedule.warmup_tokens=512"]
    )
    assert [learning_rate(n, config) for n in (1, 2, 12)] == [pytest.approx(2.5e-3), 5e-3, 5e-3]


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_cooldown_begins_where_the_branch_does_and_ends_at_the_floor(recipe, name):
    floor = "null" if name == "constant" else "1e-4"
    decay = "512" if name == "wsd" else "null"
    config = load_pretrain_config(
        recipe,
        [
            f"schedule.name={name}",
            f"schedule.floor={floor}",
            f"schedule.decay_tokens={decay}",
            "branch={from: x, schedule: cooldown}",
            "training.total_tokens=25600",
        ],
    )
    first = learning_rate(51, config, branched_at=12800)
    assert first == learning_rate(51, config.model_copy(update={"branch": None}))
    assert learning_rate(76, config, branched_at=12800) == pytest.approx((first + (config.schedule.floor or 0)) / 2)
    last = learning_rate(100, config, branched_at=12800)
    assert last == pytest.approx((config.schedule.floor or 0) + (first - (config.schedule.floor or 0)) / 50)


class TestSteps:
    STEPS = Steps(1000, 10, [(55, 20), (300, 100)])

    def test_changes_at_the_first_step_that_begins_there(self):
        assert [self.STEPS.tokens_after(n) for n in (0, 6, 7, 18, 19, 25)] == [0, 60, 80, 300, 400, 1000]
        assert [self.STEPS.tokens_of(n) for n in (1, 6, 7, 18, 19)] == [10, 10, 20, 20, 100]
        assert self.STEPS.number == 25 and self.STEPS.sizes == [10, 20, 100]

    def test_sizes_are_in_the_order_of_time(self):
        assert Steps(1000, 100, [(300, 20), (600, 100), (700, 50)]).sizes == [100, 20, 100, 50]
        assert Steps(1000, 10, [(100, 10), (1500, 20)]).sizes == [10], "what is not reached, or is no change, is none"

    def test_changes_within_one_step(self):
        """The step of 100 passes both changes: the size of 10 is never used, and step numbers do not decrease."""
        steps = Steps(1200, 100, [(1010, 10), (1060, 20)])
        assert [steps.tokens_after(n) for n in (10, 11, 12, 16)] == [1000, 1100, 1120, 1200]
        assert steps.number == 16 and steps.sizes == [100, 20]

    def test_any_changes_are_what_a_loop_over_the_steps_gives(self):
        """Compared with the definition: each step has the size of the last change at or before its start."""
        random = Random(0)
        for _ in range(100):
            total, size = random.randint(1, 400), random.randint(1, 120)
            begins = sorted(random.sample(range(1, 400), random.randint(0, 5)))
            changes = [(begin, random.randint(1, 120)) for begin in begins]
            steps, seen, used = Steps(total, size, changes), [0], []
            while seen[-1] < total:
                used.append(next((new for begin, new in reversed(changes) if begin <= seen[-1]), size))
                seen.append(seen[-1] + used[-1])
            assert steps.number == len(used), changes
            assert [steps.tokens_after(n) for n in range(len(seen))] == seen, changes
            assert [steps.tokens_of(n) for n in range(1, len(seen))] == used, changes
            assert steps.sizes == [size for size, _ in itertools.groupby(used)], changes
            assert [steps.reaching(tokens) for tokens in range(1, total + 1)] == [
                next(n for n, after in enumerate(seen) if after >= tokens) for tokens in range(1, total + 1)
            ], changes

    def test_reaching_is_the_first_step_that_reaches(self):
        for tokens in range(1, 1001):
            step = self.STEPS.reaching(tokens)
            assert self.STEPS.tokens_after(step - 1) < tokens <= self.STEPS.tokens_after(step)


def test_milestones_at_the_first_step_that_reaches_them():
    assert milestone_steps([1, 256, 257, 1000], [3], Steps(2560, 256)) == [1, 2, 3, 4, 10]


def test_names_are_tinyllamas():
    steps = [50_000, 240_000, 480_000, 715_000, 955_000, 1_195_000, 1_430_512]
    names = milestone_names(steps, Steps(3 * 10**12, 2_097_152))
    assert names[480_000] == "step-480k-token-1007B"
    assert names[715_000] == "step-715k-token-1499B"
    assert names[50_000] == "step-50k-token-105B"
    assert names[1_430_512] == "step-1431k-token-3000B"


def test_steps_are_written_in_thousands_from_ten_thousand_on():
    """Below 10 000, thousands would not identify the step."""
    steps = Steps(20_000 * 1024, 1024)
    names = milestone_names([1_500, 9_999, 20_000], steps)
    assert list(names.values()) == ["step-1500-token-2M", "step-9999-token-10M", "step-20k-token-20M"]
    assert milestone_names([10_000], steps) == {10_000: "step-10k-token-10M"}


def test_small_names_keep_apart():
    assert list(milestone_names([147, 293, 440, 586], Steps(1_200_000, 2048)).values()) == [
        "step-147-token-0.3M",
        "step-293-token-0.6M",
        "step-440-token-0.9M",
        "step-586-token-1.2M",
    ]
    names = milestone_names([1, 2], Steps(512, 256)).values()
    assert len(set(names)) == 2 and "step-1-token-0.0003M" in names
