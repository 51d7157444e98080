"""A saturating power law over the tokens of a run, with intervals, a forecast and a back-test.

L(D) = E + A D^-alpha in the number of training tokens D: the form of Hoffmann et al. (2022, arXiv:2203.15556, section
3.3) for models of one size. E is the limit for more tokens of the same data, alpha the exponent.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from ..errors import InputError, require


PARAMETERS = 3
MIN_POINTS = PARAMETERS + 1  # one more than the parameters, since intervals need residuals
CONFIDENCE = 0.95
NORMAL_QUANTILE = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_MAX_ALPHA = 5.0
_STARTS = [(share, alpha) for share in (0.2, 0.5, 0.8, 0.95) for alpha in (0.1, 0.3, 0.6, 1.2)]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The value of a curve at a number of tokens, and its 95 % prediction interval."""

    tokens: float
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ScalingCurve:
    """A fitted curve `floor + scale * (tokens / center) ** -alpha`.

    Attributes:
        floor (`float`): E, in the unit of the values.
        scale (`float`): the value above the floor at `center` tokens, A `center`^-alpha.
        alpha (`float`): the exponent.
        center (`float`): geometric mean of the tokens, which makes scale and exponent nearly uncorrelated.
        covariance (`np.ndarray`): `[3, 3]`, of floor, log of scale, and alpha; 0 for a parameter at its bound.
        tokens, values (`np.ndarray`): `[num_points]`, the fitted points.
    """

    floor: float
    scale: float
    alpha: float
    center: float
    covariance: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the values of the curve at numbers of tokens, of any shape."""
        return self.floor + self.scale * (np.asarray(tokens, float) / self.center) ** -self.alpha

    @property
    def residuals(self) -> np.ndarray:
        """Values minus curve, in percent of the curve: `[num_points]`."""
        fitted = self.at(self.tokens)
        return 100 * (self.values - fitted) / fitted

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithms of values around the curve, approximately the relative error."""
        errors = np.log(self.values / self.at(self.tokens))
        return math.sqrt(float(errors @ errors) / (len(errors) - PARAMETERS))

    def forecast(self, tokens: float) -> Forecast:
        """Returns the value at a number of tokens with its 95 % prediction interval.

        Delta method on the logarithm of the curve: its variance is g C g' for the gradient g and the covariance C of
        the parameters. A measured value adds the variance of the residuals. The quantile is Student's t with the
        number of points minus three degrees of freedom. This assumes independent residuals and the right form of
        the curve; neither holds for a run with a decaying learning rate.
        """
        from scipy.stats import t

        gradient = _log_gradient(np.array([tokens]), self.floor, self.scale, self.alpha, self.center)[0]
        variance = float(gradient @ self.covariance @ gradient) + self.spread**2
        half = float(t.ppf((1 + CONFIDENCE) / 2, len(self.tokens) - PARAMETERS)) * math.sqrt(variance)
        value = float(self.at(np.array(tokens)))
        return Forecast(tokens, value, value * math.exp(-half), value * math.exp(half))


def fit_scaling_curve(tokens: Sequence[float], values: Sequence[float]) -> ScalingCurve:
    """Fits the curve to losses, or bits per byte, of one run by least squares of their logarithms.

    Logarithms make the errors relative. The floor is between 0 and the lowest value. The best fit from several
    starting points is used, since the problem has local minima.

    Args:
        tokens (`Sequence[float]`): numbers of training tokens, in any order.
        values (`Sequence[float]`): the value at each.

    Raises:
        InputError: if there are fewer than four points or different numbers of tokens, a number is not finite and
            positive, or the values do not decrease; or if scipy is not installed.
    """
    places, measured = _checked(tokens, values)
    optimize = require("scipy.optimize", "eval", "fitting a scaling curve")
    center, lowest = math.exp(float(np.log(places).mean())), float(measured.min())

    def errors(parameters: np.ndarray) -> np.ndarray:
        floor, log_scale, alpha = parameters
        return np.log(floor + np.exp(log_scale) * (places / center) ** -alpha) - np.log(measured)

    def gradients(parameters: np.ndarray) -> np.ndarray:
        floor, log_scale, alpha = parameters
        return _log_gradient(places, floor, math.exp(log_scale), alpha, center)

    bounds = ([0.0, -60.0, 0.0], [lowest, 60.0, _MAX_ALPHA])
    fits = []
    for share, alpha in _STARTS:
        scale = float(np.median((measured - share * lowest) * (places / center) ** alpha))
        start = [share * lowest, math.log(scale), alpha]
        fits.append(optimize.least_squares(errors, start, gradients, bounds, x_scale="jac", xtol=1e-12, ftol=1e-12))
    best = min(fits, key=lambda fit: fit.cost)
    floor, log_scale, alpha = map(float, best.x)
    fitted = floor + math.exp(log_scale) * (np.array([places.min(), places.max()]) / center) ** -alpha
    if not fitted[1] < fitted[0] * (1 - 1e-6):
        raise InputError(
            f"the values do not decrease with tokens ({measured[0]:.4g} at {places[0]:,.0f}, {measured[-1]:.4g} at "
            f"{places[-1]:,.0f}). A power law needs decreasing values"
        )
    variance = 2 * best.cost / (len(places) - PARAMETERS)
    covariance = variance * _inverse(best.jac, best.active_mask == 0)
    return ScalingCurve(floor, math.exp(log_scale), alpha, center, covariance, places, measured)


@dataclasses.dataclass(frozen=True)
class BackTest:
    """The forecast for a later point by a curve fitted to earlier ones, and the measured value."""

    forecast: Forecast
    measured: float

    @property
    def miss(self) -> float:
        """Forecast minus measured value, in percent of the measured value."""
        return 100 * (self.forecast.value / self.measured - 1)


def back_test(
    tokens: Sequence[float], values: Sequence[float], known: float, later: Sequence[tuple[float, float]]
) -> list[BackTest]:
    """Fits the curve to the points up to a number of tokens, and compares its forecasts with later points.

    Args:
        tokens, values (`Sequence[float]`): the points, as for [`fit_scaling_curve`].
        known (`float`): points with more tokens are excluded from the fit.
        later (`Sequence[tuple[float, float]]`): tokens and measured values to compare the forecasts with.

    Raises:
        InputError: as [`fit_scaling_curve`]; if one of the later points is not after `known`.
    """
    if early := [place for place, _ in later if place <= known]:
        raise InputError(f"{early[0]:,.0f} tokens are not after {known:,.0f}, so they cannot be forecast from them")
    pairs = [(place, value) for place, value in zip(tokens, values, strict=True) if place <= known]
    curve = fit_scaling_curve([place for place, _ in pairs], [value for _, value in pairs])
    return [BackTest(curve.forecast(place), value) for place, value in later]


def wilson_interval(share: float, items: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, both in percent (Wilson 1927, J. Am. Stat. Assoc. 22, 209).

    Unlike one from the standard error, it has a width at 0 and 100 percent.

    Args:
        share (`float`): percent of the items that are right.
        items (`int`): number of items.

    Raises:
        InputError: if there are no items, or the share is not between 0 and 100.
    """
    if items < 1 or not 0 <= share <= 100:
        raise InputError(f"a share of {share} percent of {items} items has no interval. Score the task again")
    p, z2 = share / 100, NORMAL_QUANTILE**2
    middle = (p + z2 / (2 * items)) / (1 + z2 / items)
    half = math.sqrt(z2 * (p * (1 - p) / items + z2 / (4 * items**2))) / (1 + z2 / items)
    # Exact at the ends, where the result would be about 1e-17.
    return (0.0 if share == 0 else 100 * (middle - half)), (100.0 if share == 100 else 100 * (middle + half))


def _checked(tokens: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Checks the points and returns them sorted by tokens."""
    if len(tokens) != len(values):
        raise InputError(f"{len(tokens)} numbers of tokens for {len(values)} values. Pass one per value")
    different = len(set(tokens))
    if different < MIN_POINTS:
        raise InputError(
            f"{different} points are too few for a curve with {PARAMETERS} parameters. A fit needs {MIN_POINTS} with "
            "different numbers of tokens; write more milestones"
        )
    for name, numbers in (("tokens", tokens), ("value", values)):
        for number in numbers:
            if not (math.isfinite(number) and number > 0):
                raise InputError(f"{name} {number}: must be finite and above 0. Score that milestone again")
    order = np.argsort(np.asarray(tokens, float), kind="stable")
    return np.asarray(tokens, float)[order], np.asarray(values, float)[order]


def _log_gradient(tokens: np.ndarray, floor: float, scale: float, alpha: float, center: float) -> np.ndarray:
    """Derivatives of the logarithm of the curve with respect to floor, log of scale and alpha: `[num_tokens, 3]`."""
    ratio = tokens / center
    above = scale * ratio**-alpha
    return np.stack([np.ones_like(ratio), above, -above * np.log(ratio)], axis=1) / (floor + above)[:, None]


def _inverse(jacobian: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Inverse of J'J over the free parameters, 0 for those at a bound: `[3, 3]`.

    Raises:
        InputError: if the points do not determine the parameters.
    """
    used = jacobian[:, free]
    singular = np.linalg.svd(used, compute_uv=False)
    if singular[-1] < 1e-9 * singular[0]:
        raise InputError("the points do not determine a curve. Write more milestones, farther apart")
    inverse = np.zeros((PARAMETERS, PARAMETERS))
    inverse[np.ix_(free, free)] = np.linalg.inv(used.T @ used)
    return inverse
