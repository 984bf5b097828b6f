"""Tests of differences and correlations over few scenarios, for very many quantities at once.

Quantities are columns; scenarios (or whatever is exchangeable) are rows. Sizes: ``n`` rows,
``m`` columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import gammaln
from statsmodels.stats.multitest import multipletests

from zarrtrace.analysis.permutations import (
    DEFAULT_PERMUTATIONS,
    MOST_EXACT,
    TIE,
    as_extreme_as,
    column_blocks,
    counted,
    groupings,
    orders,
    signs_of,
    unit_or_zero,
    welch_statistics,
)

__all__ = [
    "DEFAULT_PERMUTATIONS",
    "MOST_EXACT",
    "TwoGroups",
    "corrected",
    "correlations",
    "familywise",
    "paired_blocks",
    "same_rows",
    "spearman",
    "two_groups",
]


@dataclass(frozen=True)
class TwoGroups:
    """Result of :func:`two_groups` or :func:`paired_blocks`, one value a column.

    Attributes
    ----------
    mean_a, mean_b, cohens_d, t, p_welch, p_permutation
        ``(m,)`` float64.
    p_unequal
        ``(m,)`` two-sided p-value of t with the degrees of freedom of the smaller group.
    constant_a, constant_b
        ``(m,)`` bool: all values of the group are equal.
    extreme
        ``(k,)`` the largest statistic of any column, by permutation, for :func:`familywise`; its
        first value belongs to the observed grouping.
    statistic
        ``(m,)`` the observed statistic of the permutation test.
    degrees, scale
        Degrees of freedom and factor of the pooled t: ``cohens_d = scale * t``.
    smallest_p
        The smallest p-value that a permutation can give.
    exact
        Whether every permutation was tried.
    tried
        Number of permutations, the observed grouping among them.
    """

    mean_a: np.ndarray
    mean_b: np.ndarray
    cohens_d: np.ndarray
    t: np.ndarray
    p_welch: np.ndarray
    p_unequal: np.ndarray
    constant_a: np.ndarray
    constant_b: np.ndarray
    p_permutation: np.ndarray
    extreme: np.ndarray
    statistic: np.ndarray
    degrees: int
    scale: float
    smallest_p: float
    exact: bool
    tried: int


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
        Seed of the permutations drawn.

    Returns
    -------
    TwoGroups
        Cohen's d divides by the pooled standard deviation (Cohen 1988), NaN where that is 0; t and
        its p-value are Welch's (1947), NaN where neither group varies. `p_unequal` holds for normal
        values whatever the two variances (Mickey & Brown 1966). The permutation p-value is
        two-sided, the share of groupings at least as extreme, the observed one counted (Phipson &
        Smyth 2010).

    Notes
    -----
    The permuted statistic is studentised (Janssen 1997; Chung & Romano 2013): Welch's t, computed
    again in each grouping, on the scale of a normal variable by Wallace's (1959) approximation with
    the degrees of freedom of that grouping (Satterthwaite). It is one function of the values and
    the grouping, so the test is exact where rows are exchangeable. In groups of one size Welch's t
    orders the groupings as the difference of means does. The variance of a group's mean counts as
    1e-9 of the column's sum of squares at least; where neither group varies, the statistic is
    large and finite.
    """
    values = np.asarray(values, dtype=np.float64)
    in_a = np.asarray(in_a, dtype=bool)
    a, b = values[in_a], values[~in_a]
    sd_a, sd_b = _spread(a), _spread(b)
    na, nb = len(a), len(b)
    difference = a.mean(0) - b.mean(0)
    pooled = np.sqrt(((na - 1) * sd_a**2 + (nb - 1) * sd_b**2) / (na + nb - 2))
    constant = pooled == 0
    welch = _welch(difference, sd_a, na, sd_b, nb)
    members, tried, exact = groupings(in_a, n_permutations, seed)
    count, extreme, statistic = welch_statistics(unit_or_zero(values), members, na)
    return TwoGroups(
        mean_a=a.mean(0),
        mean_b=b.mean(0),
        cohens_d=np.where(constant, np.nan, difference / np.where(constant, 1, pooled)),
        t=welch.t,
        p_welch=welch.p,
        p_unequal=2 * stats.t.sf(np.abs(welch.t), min(na, nb) - 1),
        constant_a=sd_a == 0,
        constant_b=sd_b == 0,
        p_permutation=count / tried,
        extreme=extreme,
        statistic=statistic,
        degrees=na + nb - 2,
        scale=math.sqrt(1 / na + 1 / nb),
        # With groups of one size, swapping their names gives the same absolute difference.
        smallest_p=(2 if exact and na == nb else 1) / tried,
        exact=exact,
        tried=tried,
    )


def paired_blocks(
    a: np.ndarray,
    b: np.ndarray,
    *,
    n_permutations: int = DEFAULT_PERMUTATIONS,
    seed: int = 0,
) -> TwoGroups:
    """Compare two groups that both occur in every block, in every column.

    Parameters
    ----------
    a, b
        ``(n, m)``, finite: the mean of each group in each of at least two blocks.
    n_permutations
        Permutations to draw if there are more than :data:`MOST_EXACT`.
    seed
        Seed of the permutations drawn.

    Returns
    -------
    TwoGroups
        t is that of the blocks' differences, d their mean in their standard deviations, both NaN
        where all differences are equal. A permutation swaps the groups' names in whole blocks: the
        differences' signs (Fisher 1935). p-values as in :func:`two_groups`; `p_welch` and
        `p_unequal` are both the paired t-test's.
    """
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(differences)
    spread = _spread(differences)
    constant = spread == 0
    d = np.where(constant, np.nan, differences.mean(0) / np.where(constant, 1, spread))
    p = 2 * stats.t.sf(np.abs(d) * math.sqrt(n), n - 1)
    length = np.sqrt((differences**2).sum(0))
    units = np.divide(differences, length, out=np.zeros_like(differences), where=length > 0)
    signs, tried, exact = signs_of(n, n_permutations, seed)
    # The length is the same whatever the signs, so |sum| orders them as |t| does.
    count, extreme, statistic = counted(
        signs, units.shape[1], lambda rows, columns: np.abs(rows @ units[:, columns])
    )
    return TwoGroups(
        mean_a=np.mean(a, axis=0),
        mean_b=np.mean(b, axis=0),
        cohens_d=d,
        t=d * math.sqrt(n),
        p_welch=p,
        p_unequal=p,
        constant_a=_spread(np.asarray(a)) == 0,
        constant_b=_spread(np.asarray(b)) == 0,
        p_permutation=count / tried,
        extreme=extreme,
        statistic=statistic,
        degrees=n - 1,
        scale=math.sqrt(1 / n),
        smallest_p=(2 if exact else 1) / tried,
        exact=exact,
        tried=tried,
    )


class _Welch(NamedTuple):
    t: np.ndarray
    p: np.ndarray


def _welch(difference: np.ndarray, sd_a: np.ndarray, na: int, sd_b: np.ndarray, nb: int) -> _Welch:
    """Return Welch's t and p; NaN where neither group varies."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = stats.ttest_ind_from_stats(
            difference, sd_a, na, np.zeros_like(difference), sd_b, nb, equal_var=False
        )
    constant = (sd_a == 0) & (sd_b == 0)
    return _Welch(*(np.where(constant, np.nan, x) for x in (found.statistic, found.pvalue)))


def familywise(statistic: np.ndarray, extreme: np.ndarray) -> np.ndarray:
    """Return p-values corrected for all columns at once: the max statistic's distribution.

    The share of permutations in which *any* column's statistic is at least this column's
    (Westfall & Young 1993, single step).
    """
    order = np.sort(extreme)
    below = np.searchsorted(order, as_extreme_as(statistic), side="left")
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        ``(m,)`` the smallest p-value that a permutation can give: the share of orders in which both
        have the ranks that agree, or disagree, most. Ties make it larger; NaN as p.
    """
    order, ranks = _ranks(outcome[:, None])[:, 0], _ranks(values)
    rho = order @ ranks
    shuffles, exact = orders(len(order), n_permutations, seed)
    permuted = order[shuffles]
    count = np.zeros(len(rho))
    for columns in column_blocks(len(shuffles), len(rho)):
        reached = np.abs(permuted @ ranks[:, columns]) >= np.abs(rho[columns]) - TIE
        count[columns] = reached.sum(0)
    p = np.where(np.isnan(rho), np.nan, count / len(shuffles))
    floor = 0.0 if exact else 1 / len(shuffles)
    return rho, p, np.maximum(_smallest_p(order, ranks), floor)


def _smallest_p(order: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return, by column, the share of orders in which ranks agree or disagree most."""
    kinds, kind = np.unique(np.sort(ranks, axis=0), axis=1, return_inverse=True)
    first = np.sort(order)
    found = []
    for other in kinds.T:
        ways = [(abs(first @ one), _share(first, one)) for one in (other, other[::-1])]
        most = max(value for value, _ in ways)
        found.append(sum((share for value, share in ways if value >= most - TIE), 0.0))
    known = ~np.isnan(ranks).any(0) & ~np.isnan(order).any()
    return np.where(known, np.array(found)[kind.ravel()], np.nan)


def _share(first: np.ndarray, other: np.ndarray) -> float:
    """Return the share of orders that pair tied values as these two columns do."""
    n = len(first)
    tied = [np.unique(column, return_counts=True)[1] for column in (first, other)]
    pairs = np.unique(np.stack([first, other]), axis=1, return_counts=True)[1]
    # Orders with one table of pairs: the product of both margins' factorials by that of the cells'.
    logs = sum(gammaln(counts + 1.0).sum() for counts in tied) - gammaln(pairs + 1.0).sum()
    return float(np.exp(logs - gammaln(n + 1.0)))


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
