"""Statistics for two models that answered the same items: tests, intervals, corrections and detectable differences.

Needs only numpy and the standard library. The tests compare each function with statsmodels or scipy.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt


ALPHA = 0.05  # two-sided; the confidence level of intervals is 1 - ALPHA
POWER = 0.8
RESAMPLES = 10_000

Floats = npt.NDArray[np.float64]

_NORMAL = NormalDist()
_Z_ALPHA = _NORMAL.inv_cdf(1 - ALPHA / 2)
_Z_POWER = _NORMAL.inv_cdf(POWER)
# An exact McNemar test needs 6 discordant pairs for p < 0.05. With 8 expected, 81 % of samples have 6.
_FEWEST_DISCORDANT = 8
_INDICES_PER_BATCH = 2**21  # 16 MiB


def is_binary(values: Floats) -> bool:
    """Returns whether all values are 0 or 1, as those of accuracies are."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def paired_standard_error(differences: Floats) -> float:
    """Returns the standard error of the mean of the differences `[pairs]`, with n - 1 in the variance."""
    return float(np.std(differences, ddof=1) / math.sqrt(len(differences)))


def binomial_standard_error(share: float, items: int) -> float | None:
    """Returns lm-eval's standard error of a share of right items, sqrt(p (1 - p) / (n - 1)).

    `None` if all or no items are right, where the formula gives 0 although the share is uncertain.
    """
    return math.sqrt(share * (1 - share) / (items - 1)) if 0 < share < 1 and items > 1 else None


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Returns the two-sided p-value of the exact McNemar test, 2 P(X <= min(gained, lost)) with X ~ B(m, 1/2).

    Args:
        gained (`int`): number of pairs in which only the second model is right.
        lost (`int`): number of pairs in which only the first model is right. m is their sum.
    """
    discordant = gained + lost
    term = total = 1  # in integers, since the terms span thousands of orders of magnitude
    for number in range(min(gained, lost)):
        term = term * (discordant - number) // (number + 1)
        total += term
    return min(1.0, 2 * total / 2**discordant)


def student_p_value(t: float, degrees: int) -> float:
    """Returns the two-sided p-value of Student's t, accurate to 1e-12.

    Finite series for integer degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and
    26.7.4.
    """
    if math.isinf(t):
        return 0.0
    angle = math.atan2(t, math.sqrt(degrees))
    odd = degrees % 2
    # Ratios of successive terms: 2/3, 4/5, ... for odd degrees, 1/2, 3/4, ... for even ones; each times cos^2.
    numerators = np.arange(1 + odd, degrees - 2, 2, dtype=np.float64)
    terms = np.cumprod(numerators / (numerators + 1) * math.cos(angle) ** 2)
    series = math.sin(angle) * (1 + terms.sum())
    if odd:
        series = 2 / math.pi * (angle + (series * math.cos(angle) if degrees > 1 else 0.0))
    return float(np.clip(1 - abs(series), 0, 1))


def mean_p_value(mean: float, standard_error: float, degrees: int) -> float:
    """Returns the two-sided p-value of the t-test for a mean of 0; without any spread, 1 for a mean of 0, else 0."""
    if standard_error == 0:
        return 1.0 if mean == 0 else 0.0
    return student_p_value(mean / standard_error, degrees)


def normal_p_value(z: float) -> float:
    """Returns the two-sided p-value of a z-score."""
    return math.erfc(abs(z) / math.sqrt(2))


def welch_degrees(standard_errors: Sequence[float], degrees: Sequence[int]) -> int:
    """Returns the degrees of freedom of a sum of independent means, rounded down (Satterthwaite 1946, Biometrics 2,
    110). At least 1."""
    squares = [error**2 for error in standard_errors]
    spread = math.fsum(square**2 / own for square, own in zip(squares, degrees, strict=True))
    return max(1, int(math.fsum(squares) ** 2 / spread)) if spread else sum(degrees)


def bootstrap_sample(differences: Floats) -> Floats:
    """Returns the differences `[pairs]` of a 0/1 metric with two more, 1 and -1, to resample for an interval.

    Without them, the interval is too narrow with few discordant pairs and has no width with none. The adjustment is
    that of Bonett and Price (2012, J. Educ. Behav. Stat. 37, 479), which adds one to both numbers of discordant pairs.
    """
    return np.concatenate([differences, [1.0, -1.0]])


def bootstrap_means(values: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Returns the means `[resamples]` of samples of the values `[n]` with replacement, each of n values.

    Draws the same samples as `scipy.stats.bootstrap` with the same generator.
    """
    means = np.empty(resamples)
    step = max(1, _INDICES_PER_BATCH // len(values))
    for begin in range(0, resamples, step):
        end = min(begin + step, resamples)
        means[begin:end] = values[generator.integers(0, len(values), (end - begin, len(values)))].mean(axis=1)
    return means


def percentile_interval(means: Floats) -> tuple[float, float]:
    """Returns the 95 % percentile interval of bootstrap means."""
    low, high = np.quantile(means, (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


def normal_interval(difference: float, standard_error: float) -> tuple[float, float]:
    """Returns the 95 % interval of a normally distributed difference."""
    return difference - _Z_ALPHA * standard_error, difference + _Z_ALPHA * standard_error


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values corrected for multiple tests (Holm 1979, Scand. J. Stat. 6, 65), in the same order.

    If those up to alpha are rejected, the probability of any false rejection is at most alpha, for any dependence.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def detectable_share(pairs: int, discordant: int) -> float | None:
    """Returns the smallest difference between two shares that an exact McNemar test detects with a power of 80 %.

    For p < 0.05 in one test, without a correction. The power formula of Connor (1987, Biometrics 43, 207) with the
    continuity correction of Edwards (1948, Psychometrika 13, 185), which makes it that of the exact test: with the
    observed share psi of discordant pairs, n delta - 1 = z_alpha sqrt(n psi) + z_power sqrt(n (psi - delta^2)), solved
    for delta. The difference is at most psi. If psi is so small that no difference up to psi has this power, psi is
    raised until one has.

    Args:
        pairs (`int`): number of pairs, n.
        discordant (`int`): number of pairs in which only one of the models is right.

    Returns:
        The difference, between 0 and 1; `None` for fewer than 6 pairs, which cannot detect any.
    """
    if pairs < 6:
        return None
    expected = min(pairs, max(discordant, _FEWEST_DISCORDANT))
    constant = 1 + _Z_ALPHA * math.sqrt(expected)
    scale = 1 + _Z_POWER**2 / pairs
    root = math.sqrt(max(0.0, constant**2 - scale * (constant**2 - _Z_POWER**2 * expected)))
    return min(expected, (constant + root) / scale) / pairs


def detectable_mean(standard_error: float, degrees: int | None = None) -> float:
    """Returns the smallest difference of means that a test with this standard error detects with a power of 80 %.

    For p < 0.05 in one test. The standard error times the sum of the quantiles for alpha and for the power (Bloom
    1995, Evaluation Review 19, 547), of Student's t or, without degrees of freedom, of the normal distribution: 2.80.
    """
    if degrees is None:
        return (_Z_ALPHA + _Z_POWER) * standard_error
    return (_student_quantile(ALPHA, degrees) + _student_quantile(2 * (1 - POWER), degrees)) * standard_error


def _student_quantile(p_value: float, degrees: int) -> float:
    """Returns the t with a two-sided p-value, by bisection."""
    low, high = 0.0, 1.0
    while student_p_value(high, degrees) >= p_value:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p_value(middle, degrees) >= p_value else (low, middle)
    return low
