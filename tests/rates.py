"""How often an analysis finds something, on data with and without an effect.

``null_*.py`` hold the experiments, ``test_null_*.py`` run them with 100 draws, and
``scripts/error_rates.py`` with 1,000.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from scipy import stats

#: Draws in the tests.
DRAWS = 100


class Experiment(NamedTuple):
    """One analysis on data drawn from a seed.

    Attributes
    ----------
    name
        Analysis and statistic, as ``"contrast p_familywise"``.
    data
        The drawn data, in words: groups, their sizes, the planted effect.
    draw
        Draws data from a seed, and tells whether the analysis reports a finding.
    nominal
        For data without an effect: the error rate that is promised. None: an effect is planted, and
        at least 0.8 of the draws should find it.
    """

    name: str
    data: str
    draw: Callable[[int], bool]
    nominal: float | None = 0.05


class Rate(NamedTuple):
    """A share of draws with its binomial 95 % interval (Clopper & Pearson 1934)."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.3f} [{self.low:.3f}, {self.high:.3f}]"


def rate(experiment: Experiment, draws: int = DRAWS) -> Rate:
    """Run an experiment with seeds 0 to `draws` - 1."""
    hits = sum(bool(experiment.draw(seed)) for seed in range(draws))
    return of_hits(hits, draws)


def of_hits(hits: int, draws: int) -> Rate:
    """Return the share of hits with its interval."""
    interval = stats.binomtest(hits, draws).proportion_ci(0.95, "exact")
    return Rate(hits / draws, float(interval.low), float(interval.high))


def holds(experiment: Experiment, found: Rate) -> bool:
    """Tell whether a rate is what the experiment promises.

    The level holds if the interval does not lie above it; the power, if at least 0.8 of the draws
    find the planted effect.
    """
    if experiment.nominal is None:
        return found.share >= 0.8
    return found.low <= experiment.nominal
