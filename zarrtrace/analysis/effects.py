"""Standardised differences without small-sample bias, and their intervals."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import gammaln, nctdtrinc

#: The share of intervals that hold the effect.
CONFIDENCE = 0.95
_KNOTS = 401


class Effects(NamedTuple):
    """Hedges' g and its interval, one value a column ``(m,)``."""

    g: np.ndarray
    low: np.ndarray
    high: np.ndarray


def hedges(cohens_d: np.ndarray, degrees: int, scale: float) -> Effects:
    """Correct Cohen's d for its bias, and return an interval.

    Parameters
    ----------
    cohens_d
        ``(m,)``, a difference in its own standard deviations; NaN stays NaN.
    degrees
        Degrees of freedom of the standard deviation.
    scale
        ``cohens_d = scale * t`` with Student's t: ``sqrt(1 / n_a + 1 / n_b)`` for two groups.

    Returns
    -------
    Effects
        g is d times the exact factor of Hedges (1981); NaN with one degree of freedom. The 95 %
        interval is that of the noncentral t distribution (Hedges & Olkin 1985; Steiger & Fouladi
        1997): exact for normal values of equal variances. Its bounds are interpolated, to four
        digits.
    """
    half = degrees / 2
    # With one degree of freedom d has no mean, and no factor makes it unbiased.
    factor = np.nan
    if degrees > 1:
        factor = np.exp(gammaln(half) - gammaln(half - 0.5)) / math.sqrt(half)
    t = np.asarray(cohens_d, dtype=np.float64) / scale
    low, high = _lower_noncentrality(t, degrees), -_lower_noncentrality(-t, degrees)
    return Effects(factor * np.asarray(cohens_d), scale * low, scale * high)


def _lower_noncentrality(t: np.ndarray, degrees: int) -> np.ndarray:
    """Return the least noncentrality that the interval of each t holds."""
    largest = _largest_t(degrees)
    inside = np.clip(t, -largest, largest)
    found = _spline(degrees)(np.arcsinh(inside))
    beyond = t / np.where(inside == 0, 1, inside)
    return np.asarray(np.where(np.abs(t) > largest, found * beyond, found))


def _largest_t(degrees: int) -> float:
    """Return the t beyond which the noncentrality is proportional to it, to three digits."""
    return 1000.0 + 30.0 * math.sqrt(degrees)


@lru_cache(maxsize=64)
def _spline(degrees: int) -> CubicSpline:
    """Interpolate the lower noncentrality over the inverse hyperbolic sine of t."""
    largest = np.arcsinh(_largest_t(degrees))
    knots = np.linspace(-largest, largest, _KNOTS)
    return CubicSpline(knots, nctdtrinc(float(degrees), (1 + CONFIDENCE) / 2, np.sinh(knots)))
