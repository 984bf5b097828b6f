"""Tests of differences and correlations over few scenarios, for very many quantities at once.

Quantities are columns; scenarios (or whatever is exchangeable) are rows. Sizes: ``n`` rows,
``m`` columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

#: Permutations drawn where trying all of them would take more than :data:`MOST_EXACT`.
DEFAULT_PERMUTATIONS = 9999
#: Up to so many, every permutation is tried and the p-value is exact.
MOST_EXACT = 10_000

# One block of permuted statistics (permutations × columns, float64) stays below this many values.
_BLOCK_VALUES = 4_000_000
# Sums of the same numbers in another order differ by rounding, and must count as equal.
_TIE = 1e-9


@dataclass(frozen=True)
class TwoGroups:
    """What :func:`two_groups` found, one value a column.

    Attributes
    ----------
    mean_a, mean_b, cohens_d, t, p_welch, p_permutation
        ``(m,)`` float64.
    extreme
        ``(k,)`` the largest standardised difference of any column, by permutation, for
        :func:`familywise`; its first value belongs to the observed grouping.
    standardised
        ``(m,)`` the observed standardised difference.
    smallest_p
        The smallest p-value that a permutation can give.
    exact
        Whether every permutation was tried.
    """

    mean_a: np.ndarray
    mean_b: np.ndarray
    cohens_d: np.ndarray
    t: np.ndarray
    p_welch: np.ndarray
    p_permutation: np.ndarray
    extreme: np.ndarray
    standardised: np.ndarray
    smallest_p: float
    exact: bool


def two_groups(
    values: np.ndarray,
    in_a: np.ndarray,
    *,
    n_permutations: int = DEFAULT_PERMUTATIONS,
    seed: int = 0,
) -> TwoGroups:
    """Compare two groups of rows in every column.

    Parameters
    ----------
    values
        ``(n, m)``, finite.
    in_a
        ``(n,)`` bool: the rows of group A; both groups have at least two.
    n_permutations
        Permutations to draw if there are more than :data:`MOST_EXACT`.
    seed
        Of the permutations drawn.

    Returns
    -------
    TwoGroups
        Cohen's d divides by the pooled standard deviation (Cohen 1988); t and its p-value are
        Welch's (1947), NaN where neither group varies. The permutation p-value is two-sided, on
        the absolute difference of means: the share of groupings at least as extreme, the observed
        one counted (Phipson & Smyth 2010).
    """
    values = np.asarray(values, dtype=np.float64)
    in_a = np.asarray(in_a, dtype=bool)
    a, b = values[in_a], values[~in_a]
    mean_a, mean_b = a.mean(0), b.mean(0)
    sd_a, sd_b = _spread(a), _spread(b)
    na, nb = len(a), len(b)
    with np.errstate(divide="ignore", invalid="ignore"):
        pooled = np.sqrt(((na - 1) * sd_a**2 + (nb - 1) * sd_b**2) / (na + nb - 2))
        cohens_d = (mean_a - mean_b) / pooled
        welch = stats.ttest_ind_from_stats(mean_a, sd_a, na, mean_b, sd_b, nb, equal_var=False)
    constant = pooled == 0
    groupings, tried, exact = _groupings(in_a, n_permutations, seed)
    count, extreme, standardised = _permute(values, groupings, na)
    return TwoGroups(
        mean_a=mean_a,
        mean_b=mean_b,
        cohens_d=cohens_d,
        t=np.where(constant, np.nan, welch.statistic),
        p_welch=np.where(constant, np.nan, welch.pvalue),
        p_permutation=count / tried,
        extreme=extreme,
        standardised=standardised,
        # With groups of one size, swapping their names gives the same absolute difference.
        smallest_p=(2 if exact and na == nb else 1) / tried,
        exact=exact,
    )


def familywise(standardised: np.ndarray, extreme: np.ndarray) -> np.ndarray:
    """Return p-values corrected for all columns at once: the max statistic's distribution.

    The share of permutations in which *any* column's standardised difference is at least this
    column's (Westfall & Young 1993, single step).
    """
    order = np.sort(extreme)
    below = np.searchsorted(order, standardised - _TIE, side="left")
    return np.asarray((len(order) - below) / len(order))


def corrected(p: np.ndarray) -> np.ndarray:
    """Return p-values corrected by Benjamini & Hochberg (1995) over all that are not NaN."""
    q = np.full(np.shape(p), np.nan)
    defined = np.isfinite(p)
    if defined.any():
        q[defined] = multipletests(np.asarray(p)[defined], method="fdr_bh")[1]
    return q


def correlations(
    outcome: np.ndarray,
    values: np.ndarray,
    *,
    n_permutations: int = DEFAULT_PERMUTATIONS,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Rank-correlate every column with an outcome.

    Parameters
    ----------
    outcome
        ``(n,)``, finite.
    values
        ``(n, m)``, finite.
    n_permutations, seed
        As for :func:`two_groups`.

    Returns
    -------
    rho, p
        ``(m,)`` Spearman's (1904) coefficient and its two-sided permutation p-value; NaN for a
        column, or an outcome, that does not vary.
    smallest_p
        The smallest p-value that a permutation can give (without ties).
    """
    order, ranks = _ranks(outcome[:, None])[:, 0], _ranks(values)
    rho = order @ ranks
    shuffles, exact = _orders(len(order), n_permutations, seed)
    permuted = order[shuffles]
    count = np.zeros(len(rho))
    for columns in _blocks(len(shuffles), len(rho)):
        reached = np.abs(permuted @ ranks[:, columns]) >= np.abs(rho[columns]) - _TIE
        count[columns] = reached.sum(0)
    p = np.where(np.isnan(rho), np.nan, count / len(shuffles))
    return rho, p, (2 if exact else 1) / len(shuffles)


def spearman(outcome: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return Spearman's coefficient of ``(n,)`` with each column of ``(n, m)``; see above."""
    return np.asarray(_ranks(outcome[:, None])[:, 0] @ _ranks(values))


def same_rows(present: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield sets of columns that have the same rows present.

    Parameters
    ----------
    present
        ``(n, m)`` bool.

    Yields
    ------
    rows, columns
        ``(n,)`` and ``(m,)`` bool.
    """
    if present.all():
        yield np.ones(len(present), bool), np.ones(present.shape[1], bool)
        return
    kinds, kind = np.unique(present, axis=1, return_inverse=True)
    for number in range(kinds.shape[1]):
        yield kinds[:, number], kind.ravel() == number


def _spread(group: np.ndarray) -> np.ndarray:
    """Sample standard deviation; exactly 0 for a group that does not vary."""
    return np.where(np.ptp(group, axis=0) == 0, 0.0, group.std(0, ddof=1))


def _groupings(in_a: np.ndarray, drawn: int, seed: int) -> tuple[Iterator[np.ndarray], int, bool]:
    """Memberships of group A in blocks ``(k, n)`` float64, how many in all, and whether all.

    The observed grouping comes first, so that the blocks need not be in memory together.
    """
    n, na = len(in_a), int(in_a.sum())
    observed = in_a.astype(np.float64)[None]
    if math.comb(n, na) <= MOST_EXACT:
        every = np.zeros((math.comb(n, na), n))
        for row, members in enumerate(combinations(range(n), na)):
            every[row, list(members)] = 1
        others = every[(every != observed).any(1)]
        return iter([np.vstack([observed, others])]), len(every), True

    def blocks() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        yield observed
        for block in _blocks(n, drawn):
            size = len(range(*block.indices(drawn)))
            yield rng.permuted(np.tile(observed, (size, 1)), axis=1)

    return blocks(), drawn + 1, False


def _permute(
    values: np.ndarray, groupings: Iterator[np.ndarray], na: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts of groupings at least as extreme ``(m,)``, extremes, standardised ``(m,)``."""
    n, m = values.shape
    centred = values - values.mean(0)
    # |difference of means| = |sum over A| · n / (na · nb), as the columns are centred; divided by
    # the total deviation it grows with the pooled t, so its maximum serves for all columns alike.
    scale = np.sqrt((centred**2).sum(0) * na * (n - na) / n)
    tiny = _TIE * np.abs(values).max(0, initial=0)
    units = np.divide(centred, scale, out=np.zeros_like(centred), where=scale > tiny)
    count, standardised = np.zeros(m), np.zeros(m)
    extremes: list[np.ndarray] = []
    for number, members in enumerate(groupings):
        extreme = np.zeros(len(members))
        for columns in _blocks(len(members), m):
            statistic = np.abs(members @ units[:, columns])
            if number == 0:
                standardised[columns] = statistic[0]
            count[columns] += (statistic >= standardised[columns] - _TIE).sum(0)
            np.maximum(extreme, statistic.max(1, initial=0), out=extreme)
        extremes.append(extreme)
    return count, np.concatenate(extremes), standardised


def _ranks(columns: np.ndarray) -> np.ndarray:
    """Ranks of each column ``(n, m)``, centred, of length 1."""
    return _unit(np.asarray(stats.rankdata(columns, axis=0)))


def _unit(columns: np.ndarray) -> np.ndarray:
    """Centre each column and scale it to length 1; NaN if it does not vary."""
    centred = columns - columns.mean(0)
    length = np.sqrt((centred**2).sum(0))
    return np.asarray(
        np.divide(centred, length, out=np.full_like(centred, np.nan), where=length > 0)
    )


def _orders(n: int, drawn: int, seed: int) -> tuple[np.ndarray, bool]:
    """Orders of `n` rows ``(k, n)``: all of them, or the observed one and `drawn` others."""
    if math.factorial(n) <= MOST_EXACT:
        return np.array(list(permutations(range(n)))), True
    rng = np.random.default_rng(seed)
    drawn_orders = rng.permuted(np.tile(np.arange(n), (drawn, 1)), axis=1)
    return np.vstack([np.arange(n), drawn_orders]), False


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    width = max(1, _BLOCK_VALUES // rows)
    for start in range(0, columns, width):
        yield slice(start, start + width)
