"""A family of tests of two groups, and what is reported of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from zarrtrace.analysis.claims import LEAST_FOR_WELCH, Design
from zarrtrace.analysis.effects import hedges
from zarrtrace.analysis.groups import Exchange, Units
from zarrtrace.analysis.parallel import together
from zarrtrace.analysis.resampling import TwoGroups, corrected

#: Variables that each test has.
STATISTICS = (
    "mean_a",
    "mean_b",
    "cohens_d",
    "hedges_g",
    "g_low",
    "g_high",
    "constant_a",
    "constant_b",
    "t",
    "p_welch",
    "p_permutation",
)


@dataclass
class Family:
    """The units exchanged, and the family of tests."""

    exchange: Exchange
    n_permutations: int
    seed: int
    smallest_p: float = 1.0
    exact: bool = True
    tried: int = 0
    not_tested: tuple[str, ...] = ()

    def testable(self, rows: np.ndarray) -> bool:
        """Tell whether both groups keep two observations."""
        return self.exchange.units(rows) is not None

    def tests(self, columns: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[TwoGroups]:
        """Compare the groups in columns of values, each with the scenarios it has values of."""
        calls = (
            partial(
                _test,
                self.exchange.units(rows),
                values,
                n_permutations=self.n_permutations,
                seed=self.seed,
            )
            for values, rows in columns
        )
        for found in together(calls):
            if found.smallest_p < self.smallest_p:
                self.smallest_p, self.tried = found.smallest_p, found.tried
            self.exact &= found.exact
            yield found

    def sizes(self, rows: np.ndarray) -> tuple[int, int]:
        """Return how many observations each group has."""
        return self.exchange.sizes(rows)

    @property
    def design(self) -> Design:
        """Return what the claims are about."""
        whole = np.ones(len(self.exchange.in_a), bool)
        return Design(
            *self.sizes(whole),
            self.exchange.unit,
            self.exchange.is_paired,
            int(self.exchange.left_out.sum()),
            self.smallest_p,
            f"all {self.tried}" if self.exact else f"{self.n_permutations} drawn",
            self.not_tested,
        )


def _test(units: Units | None, values: np.ndarray, n_permutations: int, seed: int) -> TwoGroups:
    if units is None:
        raise AssertionError("too few observations are never tested")
    return units.test(values, n_permutations, seed)


def columns_of(found: TwoGroups) -> dict[str, np.ndarray]:
    """Return the statistics of a result by name."""
    effects = hedges(found.cohens_d, found.degrees, found.scale)
    known = {"hedges_g": effects.g, "g_low": effects.low, "g_high": effects.high}
    return {n: known[n] if n in known else getattr(found, n) for n in STATISTICS}


def corrected_familywise(distribution: np.ndarray, unequal: np.ndarray, tests: int) -> np.ndarray:
    """Return the larger of two corrected p-values; the first where no group varies."""
    return np.asarray(np.fmax(distribution, np.minimum(unequal * tests, 1)))


def corrected_welch(p: np.ndarray, n_a: np.ndarray, n_b: np.ndarray) -> np.ndarray:
    """Correct Welch's p where the groups are large enough; NaN elsewhere."""
    return corrected(np.where(np.minimum(n_a, n_b) >= LEAST_FOR_WELCH, p, np.nan))
