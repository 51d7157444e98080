"""The scaling curve against scipy's `curve_fit`, simulated series, the committed nano run, and published intervals."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import binomtest, norm, t

from tests.conftest import ROOT
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.scaling_curve import back_test, fit_scaling_curve, wilson_interval


TOKENS = np.geomspace(1e5, 5e6, 12)


def law(tokens, floor=2.5, scale=60.0, alpha=0.3):
    return floor + scale * np.asarray(tokens, float) ** -alpha


def test_exact_values_give_the_exact_parameters():
    curve = fit_scaling_curve(TOKENS, law(TOKENS))
    assert (curve.floor, curve.alpha) == pytest.approx((2.5, 0.3), rel=1e-5)
    assert curve.scale * curve.center**curve.alpha == pytest.approx(60, rel=1e-4)
    assert np.abs(curve.residuals).max() < 1e-5
    forecast = curve.forecast(1e9)
    assert forecast.value == pytest.approx(law(1e9), rel=1e-6) and forecast.tokens == 1e9
    assert forecast.low <= forecast.value <= forecast.high


def test_the_order_of_the_points_does_not_matter():
    order = np.random.default_rng(0).permutation(len(TOKENS))
    one, other = fit_scaling_curve(TOKENS, law(TOKENS)), fit_scaling_curve(TOKENS[order], law(TOKENS)[order])
    assert one.forecast(1e7) == other.forecast(1e7)


def test_fit_and_interval_equal_those_of_scipy():
    """`curve_fit` on the logarithms, with its covariance in a prediction interval that is written out here."""
    values = law(TOKENS) * np.exp(np.random.default_rng(1).normal(0, 0.004, len(TOKENS)))
    curve = fit_scaling_curve(TOKENS, values)

    def log_law(tokens, floor, log_scale, alpha):
        return np.log(floor + np.exp(log_scale) * (tokens / 1e6) ** -alpha)

    found, covariance = curve_fit(log_law, TOKENS, np.log(values), p0=(2, 0, 0.3), xtol=1e-14, ftol=1e-14)
    assert (curve.floor, curve.alpha) == pytest.approx((found[0], found[2]), rel=1e-4)
    place, step = 2e7, 1e-6
    gradient = [
        (log_law(place, *(found + step * np.eye(3)[i])) - log_law(place, *(found - step * np.eye(3)[i]))) / (2 * step)
        for i in range(3)
    ]
    errors = np.log(values) - log_law(TOKENS, *found)
    noise = errors @ errors / (len(TOKENS) - 3)
    half = t.ppf(0.975, len(TOKENS) - 3) * math.sqrt(np.array(gradient) @ covariance @ np.array(gradient) + noise)
    forecast = curve.forecast(place)
    assert math.log(forecast.value) == pytest.approx(log_law(place, *found), abs=1e-7)
    assert math.log(forecast.high / forecast.value) == pytest.approx(half, rel=1e-3)
    assert math.log(forecast.value / forecast.low) == pytest.approx(half, rel=1e-3)
    assert curve.residuals == pytest.approx(100 * np.expm1(errors), abs=1e-3)


@pytest.mark.slow
def test_intervals_cover():
    """Independent errors of 0.5 %: a value at twice the tokens is within its 95 % interval in 92 to 98 % of series."""
    random, inside = np.random.default_rng(2), 0
    for _ in range(400):
        curve = fit_scaling_curve(TOKENS, law(TOKENS) * np.exp(random.normal(0, 0.005, len(TOKENS))))
        forecast = curve.forecast(2 * TOKENS[-1])
        inside += forecast.low <= law(2 * TOKENS[-1]) * math.exp(random.normal(0, 0.005)) <= forecast.high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_floor_of_zero():
    """A pure power law is at the bound of the floor, and still has an interval."""
    values = law(TOKENS, floor=0.0, scale=300) * np.exp(np.tile([0.004, -0.004], 6))
    curve = fit_scaling_curve(TOKENS, values)
    forecast = curve.forecast(1e8)
    assert curve.floor < 0.5 and forecast.low < law(1e8, floor=0.0, scale=300) < forecast.high


def test_back_test_uses_only_what_was_known():
    values = law(TOKENS)
    spoiled = np.where(TOKENS > TOKENS[7], 99.0, values)
    later = [(TOKENS[10], 2 * values[10]), (TOKENS[11], values[11] / 1.01)]
    first, second = back_test(TOKENS, spoiled, TOKENS[7], later)
    assert first.miss == pytest.approx(-50, abs=1e-3) and second.miss == pytest.approx(1, abs=1e-3)
    assert first.measured == later[0][1] and first.forecast.tokens == TOKENS[10]
    with pytest.raises(InputError, match="are not after"):
        back_test(TOKENS, values, TOKENS[7], [(TOKENS[7], 1.0)])


def test_the_nano_run():
    """Its loss at 8M tokens is forecast within 1.5 % from the validations up to 4M, after the warm-up."""
    lines = (ROOT / "benchmarks" / "results" / "nano" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "validation_loss" in row and row["tokens"] > 400_000]
    tokens, losses = [row["tokens"] for row in rows], [row["validation_loss"] for row in rows]
    [test] = back_test(tokens, losses, 4_100_000, [(tokens[-1], losses[-1])])
    assert tokens[-1] > 8e6 and abs(test.miss) < 1.5


@pytest.mark.parametrize(
    ("tokens", "values", "words"),
    [
        ([], [], "0 points are too few"),
        ([1, 2, 3], [3.0, 2.0, 1.5], "3 points are too few.*4"),
        ([1, 2, 3, 3], [3.0, 2.0, 1.5, 1.4], "3 points are too few"),
        ([1, 2, 3, 4], [3.0, 2.0, math.nan, 1.0], "value nan: must be finite"),
        ([1, 2, 3, 4], [3.0, 2.0, math.inf, 1.0], "value inf: must be finite"),
        ([1, 2, 3, 4], [3.0, 2.0, 1.0, -1.0], "value -1.0: must be finite and above 0"),
        ([0, 2, 3, 4], [3.0, 2.0, 1.5, 1.0], "tokens 0: must be finite and above 0"),
        ([1, 2, 3, 4], [3.0, 2.0, 1.5], "4 numbers of tokens for 3 values"),
        ([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0], "do not decrease"),
        ([1, 2, 3, 4, 5], [2.0] * 5, "do not decrease"),
    ],
)
def test_refusals(tokens, values, words):
    with pytest.raises(InputError, match=words):
        fit_scaling_curve(tokens, values)


@pytest.mark.parametrize(("right", "items"), [(0, 20), (20, 20), (7, 20), (250, 500), (1, 10042)])
def test_wilson_interval_equals_scipys(right, items):
    expected = binomtest(right, items).proportion_ci(0.95, method="wilson")
    assert wilson_interval(100 * right / items, items) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert norm.ppf(0.975) == pytest.approx(1.959964)


def test_wilson_interval_refuses():
    for share, items in ((50.0, 0), (101.0, 10), (math.nan, 10)):
        with pytest.raises(InputError, match="has no interval"):
            wilson_interval(share, items)
