"""Scores of predictions, and their intervals over groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

# Draws of groups for an interval, and how many of them at once.
_RESAMPLES, _AT_ONCE = 1000, 100


def r_squared(y: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return 1 − squared error / variance around the mean, by weights ``(k, n)`` of samples."""
    total = weights.sum(1)
    mean = weights @ y / total
    spread = weights @ y**2 - total * mean**2
    wrong = weights @ (y - predicted) ** 2
    spread = np.where(spread > 1e-12 * (weights @ y**2), spread, np.nan)
    return np.asarray(1 - wrong / spread)


def auc(y: np.ndarray, predicted: np.ndarray, fold: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve over pairs of samples of one fold.

    Pairs of different folds would compare models with different intercepts, which puts an
    uninformative probe below 0.5 (Airola et al. 2011).

    Parameters
    ----------
    y, predicted, fold
        ``(n,)``; `y` is 0 or 1.
    weights
        ``(k, n)`` of the samples.

    Returns
    -------
    np.ndarray
        ``(k,)``; NaN without a pair.
    """
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for number in np.unique(fold):
        order = np.flatnonzero(fold == number)
        order = order[np.argsort(predicted[order], kind="stable")]
        starts = np.flatnonzero(np.diff(predicted[order], prepend=-np.inf))
        ones = np.add.reduceat(weights[:, order] * y[order], starts, axis=1)
        zeros = np.add.reduceat(weights[:, order] * (1 - y[order]), starts, axis=1)
        below = zeros.cumsum(1) - zeros / 2
        wins += (ones * below).sum(1)
        pairs += ones.sum(1) * zeros.sum(1)
    return np.asarray(np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))


def resampled(
    function: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return a function's values ``(…, resamples)`` for groups drawn with replacement."""
    n = int(groups.max()) + 1
    found = []
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        counts = rng.multinomial(n, np.full(n, 1 / n), _AT_ONCE)
        found.append(function(counts[:, groups].astype(np.float64)))
    return np.concatenate(found, axis=-1)


def interval(
    estimate: float, drawn: np.ndarray, n_groups: int, n_folds: int
) -> tuple[float, float]:
    """Return the estimate ± Student's t × its standard error, of a score of cross-validation.

    The bootstrap's error over groups is about the probes that were trained. Trained on other groups
    they would differ, and those of overlapping folds err together: the variance is larger by
    1 + n_folds × held-out / training samples (Nadeau & Bengio 2003, *Inference for the
    Generalization Error*).
    """
    # The bootstrap's variance is too small by (n - 1) / n.
    variance = np.nanvar(drawn, ddof=1) * n_groups / (n_groups - 1)
    error = np.sqrt(variance * (1 + n_folds / (n_folds - 1)))
    reach = float(stats.t.ppf(0.975, n_groups - 1) * error)
    return estimate - reach, estimate + reach
