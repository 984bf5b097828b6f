"""Permutations of few rows, and statistics of very many columns in each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product

import numpy as np

#: Permutations drawn where trying all of them would take more than :data:`MOST_EXACT`.
DEFAULT_PERMUTATIONS = 9999
#: Up to this number, every permutation is tried and the p-value is exact.
MOST_EXACT = 10_000

# One block of permuted statistics (permutations × columns, float64) has about this many values: it
# stays in a core's cache. For 40 rows and 3,000 columns 2**15 to 2**19 take the same time, 2**22
# twice as long.
_BLOCK_VALUES = 2**17
_PERMUTATIONS_AT_ONCE = 512
#: Sums of the same numbers in another order differ by rounding, and must count as equal.
TIE = 1e-9
# The same of statistics in float32, absolutely and relatively.
_CLOSE = 1e-5
# The least variance of a group's mean, in columns of length 1. Without one a group that does not
# vary would have a statistic of rounding errors.
_LEAST_VARIANCE = 1e-9


def groupings(in_a: np.ndarray, drawn: int, seed: int) -> tuple[Iterator[np.ndarray], int, bool]:
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
        return _in_parts(np.vstack([observed, others])), len(every), True

    def draw(rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.permuted(np.tile(observed, (size, 1)), axis=1)

    return _drawn(observed, draw, drawn, seed), drawn + 1, False


def signs_of(n: int, drawn: int, seed: int) -> tuple[Iterator[np.ndarray], int, bool]:
    """Signs of `n` differences, as :func:`groupings`; all of them are + first."""
    observed = np.ones((1, n))
    if 2**n <= MOST_EXACT:
        return _in_parts(np.array(list(product((1.0, -1.0), repeat=n)))), 2**n, True

    def draw(rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.choice([1.0, -1.0], (size, n))

    return _drawn(observed, draw, drawn, seed), drawn + 1, False


def _in_parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _PERMUTATIONS_AT_ONCE):
        yield rows[start : start + _PERMUTATIONS_AT_ONCE]


def _drawn(
    observed: np.ndarray,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    drawn: int,
    seed: int,
) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    yield observed
    for start in range(0, drawn, _PERMUTATIONS_AT_ONCE):
        yield draw(rng, min(_PERMUTATIONS_AT_ONCE, drawn - start))


def welch_statistics(
    units: np.ndarray, memberships: Iterator[np.ndarray], na: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Test columns of length 1 by Welch's t of each grouping, as :func:`counted`."""
    nb = len(units) - na
    # Weighted so that the groups' variances are differences of sums without further factors.
    squares = units**2 / (na * (na - 1))
    total = squares.sum(0)

    def statistic(members: np.ndarray, columns: slice) -> np.ndarray:
        sums, of_squares = members @ units[:, columns], members @ squares[:, columns]
        return _squared_normal(sums, of_squares, total[columns], na, nb)

    return counted(memberships, units.shape[1], statistic)


def _squared_normal(
    sums: np.ndarray, squares: np.ndarray, total: np.ndarray, na: int, nb: int
) -> np.ndarray:
    """Return the square of the normal variable that Welch's t corresponds to ``(k, m)`` float32.

    Wallace's (1959) approximation ``f log(1 + t² / f) (8 f + 1)² / (8 f + 3)²`` with
    Satterthwaite's degrees of freedom f. `sums` and `squares` are group A's, of columns that add up
    to 0; squares and their `total` are divided by ``na (na - 1)``. Both are overwritten.
    """
    square = np.square(sums, out=sums)
    ratio = na * (na - 1) / (nb * (nb - 1))
    b = total - squares
    b *= ratio
    part = square * (1 / (nb * nb * (nb - 1)))
    b -= part
    np.maximum(b, _LEAST_VARIANCE, out=b)
    part *= nb * nb * (nb - 1) / (na * na * (na - 1))
    a = np.subtract(squares, part, out=squares)
    np.maximum(a, _LEAST_VARIANCE, out=a)
    b += a
    square /= b
    share = np.divide(a, b, out=a).astype(np.float32)
    # The rest needs no float64: nothing cancels.
    found = square.astype(np.float32)
    found *= (1 / na + 1 / nb) ** 2  # t squared
    inverse = share * (1 / (na - 1) + 1 / (nb - 1))  # of the degrees of freedom
    inverse -= 2 / (nb - 1)
    inverse *= share
    inverse += 1 / (nb - 1)
    found *= inverse
    found += 1
    np.log(found, out=found)
    found /= inverse
    factor = np.multiply(inverse, 3, out=share)
    factor += 8
    inverse += 8
    inverse /= factor
    inverse *= inverse
    found *= inverse
    return np.asarray(found)


def counted(
    permutations_: Iterator[np.ndarray],
    m: int,
    statistic_of: Callable[[np.ndarray, slice], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts of permutations at least as extreme ``(m,)``, extremes, statistics ``(m,)``."""
    count, observed = np.zeros(m), np.zeros(m)
    extremes: list[np.ndarray] = []
    for number, rows in enumerate(permutations_):
        extreme = np.zeros(len(rows))
        for columns in column_blocks(len(rows), m):
            found = statistic_of(rows, columns)
            if number == 0:
                observed[columns] = found[0]
            reached = as_extreme_as(observed[columns]).astype(found.dtype)
            count[columns] += (found >= reached).sum(0, dtype=np.uint16)
            np.maximum(extreme, found.max(1, initial=0), out=extreme)
        extremes.append(extreme)
    return count, np.concatenate(extremes), observed


def as_extreme_as(statistic: np.ndarray) -> np.ndarray:
    """Return from where on statistics count as equal to these, or larger."""
    return np.asarray(statistic * (1 - _CLOSE) - _CLOSE)


def unit_or_zero(columns: np.ndarray) -> np.ndarray:
    """Centre each column and scale it to length 1; 0 if it varies by rounding only."""
    centred = columns - columns.mean(0)
    length = np.sqrt((centred**2).sum(0))
    tiny = TIE * np.abs(columns).max(0, initial=0)
    units: np.ndarray = np.zeros_like(centred)
    np.divide(centred, length, out=units, where=length > tiny)
    return units


def orders(n: int, drawn: int, seed: int) -> tuple[np.ndarray, bool]:
    """Orders of `n` rows ``(k, n)``: all of them, or the observed one and `drawn` others."""
    if math.factorial(n) <= MOST_EXACT:
        return np.array(list(permutations(range(n)))), True
    rng = np.random.default_rng(seed)
    drawn_orders = rng.permuted(np.tile(np.arange(n), (drawn, 1)), axis=1)
    return np.vstack([np.arange(n), drawn_orders]), False


def column_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut columns into blocks that stay in a core's cache beside the rows."""
    width = max(1, _BLOCK_VALUES // rows)
    for start in range(0, columns, width):
        yield slice(start, start + width)
