"""Statistics of pairs: against statsmodels and scipy, and by simulation of models whose true difference is known."""

import functools
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from tinyllama_hf.evaluation.comparison import paired_tests
from tinyllama_hf.evaluation.comparison.score_differences import (
    average_difference,
    paired_difference,
    unpaired_difference,
)
from tinyllama_hf.evaluation.score_files import MetricScore


PAIRS = [(0, 0), (1, 0), (0, 6), (3, 5), (5, 3), (100, 140), (1500, 1502), (5021, 4000)]
PHI = NormalDist().cdf


def items(values) -> dict:
    """Values of items under distinct hashes."""
    return {(f"{number}", 0): float(value) for number, value in enumerate(values)}


@pytest.mark.parametrize(("gained", "lost"), PAIRS)
def test_the_exact_mcnemar_test(gained, lost):
    expected = mcnemar([[7, gained], [lost, 9]], exact=True).pvalue
    assert paired_tests.mcnemar_p_value(gained, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 49, 100, 1001, 10041])
@pytest.mark.parametrize("t", [0.0, 0.01, -0.7, 1.96, -3.0, 6.0, 40.0])
def test_students_t(t, degrees):
    expected = 2 * stats.t.sf(abs(t), degrees)
    assert paired_tests.student_p_value(t, degrees) == pytest.approx(expected, abs=1e-12)


def test_standard_errors_and_tests_of_means():
    generator = np.random.default_rng(0)
    first, second = generator.normal(2, 1, (2, 137))
    difference = paired_difference("t", "bits_per_byte", (items(first), items(second)), 1000, 0)[0]
    reference = DescrStatsW(second - first)
    p_value = reference.ttest_mean()[1]
    assert difference.standard_error == pytest.approx(reference.std_mean, rel=1e-9)
    assert difference.difference == pytest.approx(reference.mean, rel=1e-9)
    assert difference.p_value == pytest.approx(p_value, abs=1e-9) and difference.test == "paired t"
    scores = [MetricScore(float(x.mean()), float(DescrStatsW(x).std_mean)) for x in (first, second)]
    unpaired = unpaired_difference("t", "bits_per_byte", (scores[0], scores[1]))
    compared = CompareMeans.from_data(second, first)
    assert unpaired.standard_error == pytest.approx(compared.std_meandiff_separatevar, rel=1e-9)
    assert unpaired.interval == pytest.approx(compared.zconfint_diff(usevar="unequal"), rel=1e-9)
    assert unpaired.p_value == pytest.approx(compared.ztest_ind(usevar="unequal")[1], rel=1e-9)


def test_the_standard_error_of_a_share():
    right = np.repeat([1.0, 0.0], [37, 101])
    error = paired_tests.binomial_standard_error(37 / 138, 138)
    assert error == pytest.approx(DescrStatsW(right).std_mean, rel=1e-9)
    assert paired_tests.binomial_standard_error(0.0, 138) is None


def test_the_degrees_of_freedom_of_a_sum():
    generator = np.random.default_rng(1)
    first, second = generator.normal(0, 1, 20), generator.normal(0, 5, 9)
    errors = [float(DescrStatsW(x).std_mean) for x in (first, second)]
    expected = CompareMeans.from_data(first, second).dof_satt()
    assert paired_tests.welch_degrees(errors, [19, 8]) == math.floor(expected)


@pytest.mark.parametrize("count", [1, 2, 7, 57])
def test_holm(count):
    p_values = list(np.random.default_rng(count).uniform(0, 1, count) ** 4)
    expected = multipletests(p_values, method="holm")[1]
    assert paired_tests.holm(p_values) == pytest.approx(list(expected), rel=1e-9)


@pytest.mark.parametrize("pairs", [10, 137, 3000])
@pytest.mark.parametrize("binary", [True, False])
def test_the_bootstrap_on_the_same_resamples(pairs, binary):
    generator = np.random.default_rng(pairs)
    values = generator.choice([-1.0, 0.0, 1.0], pairs) if binary else generator.normal(0, 1, pairs)
    sample = paired_tests.bootstrap_sample(values) if binary else values
    assert len(sample) == pairs + 2 * binary and sample.sum() == pytest.approx(values.sum())
    means = paired_tests.bootstrap_means(sample, 2000, np.random.default_rng(5))
    reference = stats.bootstrap(
        (sample,), np.mean, n_resamples=2000, rng=np.random.default_rng(5), method="percentile", batch=100
    )
    assert means == pytest.approx(reference.bootstrap_distribution, rel=1e-9)
    assert paired_tests.percentile_interval(means) == pytest.approx(tuple(reference.confidence_interval), rel=1e-9)


def simulated_accuracy(generator, count: int, first: float, second: float, common: float):
    """Right or wrong of two models, given the share of the variance that is the item's difficulty."""
    difficulty = generator.normal(0, math.sqrt(common), count)
    noise = generator.normal(0, math.sqrt(1 - common), (2, count))
    right = (np.array([[first], [second]]) + difficulty + noise > 0).astype(float)
    return right, 100 * (PHI(second) - PHI(first))


def simulated_bits(generator, count: int, change: float):
    """Bits per byte of two models: log-normal, and changed by a factor that varies."""
    first = generator.lognormal(0, 0.6, count)
    second = first * generator.lognormal(change, 0.3, count)
    return np.array([first, second]), math.exp(0.18) * (math.exp(change + 0.045) - 1)


SIMULATIONS = {
    "equal models": ("acc", functools.partial(simulated_accuracy, count=500, first=0.0, second=0.0, common=0.5)),
    "a better model": ("acc", functools.partial(simulated_accuracy, count=500, first=-0.5, second=-0.3, common=0.7)),
    "few discordant": ("acc", functools.partial(simulated_accuracy, count=400, first=1.0, second=1.05, common=0.98)),
    "few items": ("acc", functools.partial(simulated_accuracy, count=100, first=0.3, second=0.5, common=0.5)),
    "bits per byte": ("bits_per_byte", functools.partial(simulated_bits, count=300, change=-0.02)),
}


@pytest.mark.parametrize("name", SIMULATIONS)
def test_intervals_cover_the_truth(name):
    """1,000 simulated pairs of models."""
    metric, simulate = SIMULATIONS[name]
    generator, covered = np.random.default_rng(17), 0
    for seed in range(1000):
        (first, second), truth = simulate(generator)
        low, high = paired_difference("t", metric, (items(first), items(second)), 1000, seed)[0].interval
        covered += low <= truth <= high
    print(f"{name}: {covered / 10} %")
    assert 930 <= covered <= 970


@pytest.mark.slow
def test_intervals_of_an_average_cover_the_truth():
    generator, covered = np.random.default_rng(18), 0
    for seed in range(1000):
        tasks, means, truths = [], [], []
        for number, count in enumerate((60, 80, 120, 200)):
            simulated = simulated_accuracy(generator, count, 0.1 * number, 0.2 * number, 0.4)
            (first, second), truth = simulated
            found = paired_difference(f"{number}", "acc", (items(first), items(second)), 1000, seed)
            tasks.append(found[0])
            means.append(found[1])
            truths.append(truth)
        low, high = average_difference(tasks, means).interval
        covered += low <= np.mean(truths) <= high
    print(f"{covered / 10} %")
    assert 930 <= covered <= 970


def test_the_average_of_tasks():
    """Its standard error is that of independent tasks, and its p-value that of a t-test."""
    generator = np.random.default_rng(3)
    pairs = [simulated_accuracy(generator, count, 0.0, 0.3, 0.5)[0] for count in (50, 90, 200)]
    found = [paired_difference(f"{i}", "acc", (items(a), items(b)), 1000, 0) for i, (a, b) in enumerate(pairs)]
    average = average_difference([task for task, _ in found], [means for _, means in found])
    errors = [100 * DescrStatsW(b - a).std_mean for a, b in pairs]
    assert average.standard_error == pytest.approx(math.hypot(*errors) / 3, rel=1e-9)
    assert average.difference == pytest.approx(np.mean([100 * (b - a).mean() for a, b in pairs]), rel=1e-9)
    assert average.pairs == 340 and average.test == "paired t"
    degrees = paired_tests.welch_degrees(errors, [49, 89, 199])
    expected = 2 * stats.t.sf(abs(average.difference / average.standard_error), degrees)
    assert average.p_value == pytest.approx(expected, abs=1e-9)
    assert average.interval == pytest.approx(
        stats.t.interval(0.95, degrees, average.difference, average.standard_error), abs=0.8
    )


@pytest.mark.parametrize(
    ("pairs", "share"),
    [(100, 0.3), (200, 0.15), (500, 0.05), (500, 0.2), (500, 0.4), (1172, 0.25), (3270, 0.2), (10042, 0.15)],
)
def test_the_detectable_share_is_detected_in_80_percent(pairs, share):
    delta = paired_tests.detectable_share(pairs, round(pairs * share))
    counts = np.random.default_rng(4).multinomial(
        pairs, [(share + delta) / 2, (share - delta) / 2, 1 - share], size=4000
    )
    p_value = functools.cache(paired_tests.mcnemar_p_value)
    power = np.mean([p_value(int(gained), int(lost)) < 0.05 for gained, lost, _ in counts])
    print(f"{pairs} pairs, {share:.0%} discordant: {100 * delta:.2f} points, power {power:.1%}")
    assert 0.78 <= power <= 0.86


@pytest.mark.parametrize("pairs", [20, 100, 500, 10042])
def test_with_few_discordant_pairs_the_detectable_share_is_in_one_direction(pairs):
    """The observed discordance is too small for any difference to be shown."""
    delta = paired_tests.detectable_share(pairs, 2)
    gained = np.random.default_rng(4).binomial(pairs, delta, 4000)
    assert 0.78 <= np.mean([paired_tests.mcnemar_p_value(int(count), 0) < 0.05 for count in gained]) <= 0.9


def test_too_few_pairs_can_show_nothing():
    assert paired_tests.detectable_share(5, 5) is None and paired_tests.detectable_share(6, 6) is not None
    assert paired_tests.mcnemar_p_value(5, 0) > 0.05 > paired_tests.mcnemar_p_value(6, 0)


@pytest.mark.parametrize("count", [10, 40, 400])
def test_the_detectable_mean_is_detected_in_80_percent(count):
    delta = paired_tests.detectable_mean(1 / math.sqrt(count), count - 1)
    assert delta * math.sqrt(count) == pytest.approx(stats.t.ppf([0.975, 0.8], count - 1).sum(), rel=1e-9)
    samples = np.random.default_rng(2).normal(delta, 1, (4000, count))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
    assert paired_tests.detectable_mean(1.0) == pytest.approx(stats.norm.ppf([0.975, 0.8]).sum(), rel=1e-9)


@pytest.mark.parametrize(
    ("values", "p_value"), [([0.0, 0.0, 0.0], 1.0), ([0.5, 0.5, 0.5], 0.0), ([1.0, 1.0, 1.0], 0.0)]
)
def test_differences_without_spread(values, p_value):
    """Also where all differences are 0 or 1, which does not make bits per byte right and wrong."""
    first = np.array([1.0, 2.0, 3.0])
    found, _ = paired_difference("t", "bits_per_byte", (items(first), items(first + values)), 1000, 0)
    assert found.standard_error == 0 and found.p_value == p_value and found.detectable is None
    assert found.interval == (values[0], values[0]) and found.test == "paired t"


def test_equal_answers_have_an_interval_with_a_width():
    """100 equal answers do not prove that two models are equal; their difference is at most about 3.6 points."""
    right = np.repeat([0.0, 1.0], 50)
    found, _ = paired_difference("t", "acc", (items(right), items(right)), 10_000, 0)
    low, high = found.interval
    assert found.p_value == 1.0 and -4 < low < -1 and 1 < high < 4
