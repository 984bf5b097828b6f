"""Contrasts keep their error rates, and find what is planted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from null_contrast import EXPERIMENTS, any_finding, normal, of_templates
from rates import Experiment, holds, rate
from scipy import stats

from zarrtrace.analysis.claims import LEAST_FOR_WELCH
from zarrtrace.analysis.resampling import two_groups

pytestmark = pytest.mark.long


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: f"{one.name}: {one.data}")
def test_error_rate(experiment: Experiment) -> None:
    found = rate(experiment)
    assert holds(experiment, found), f"{experiment.name}, {experiment.data}: {found}"


def test_templates_without_blocks_are_findings() -> None:
    """The error that block= mends: without it nearly every run of 4 templates has findings."""
    draws = [
        of_templates(seed, templates=4, each=10, mixed=False, block=False) for seed in range(10)
    ]
    assert np.mean(draws) > 0.5


def test_p_distribution_sees_unequal_spread() -> None:
    """The error that p_familywise has not: about a third of the calls, 10 against 10."""
    wide = partial(normal, ratio=4.0)
    draws = [any_finding(seed, wide, 10, 10, "p_distribution") for seed in range(40)]
    assert np.mean(draws) > 0.1


@pytest.mark.parametrize(
    ("n_a", "n_b", "most"), [(4, 4, 0.065), (10, 10, 0.07), (4, 12, 0.065), (2, 6, 0.09)]
)
def test_p_permutation_of_single_features_of_unequal_spread(
    n_a: int, n_b: int, most: float
) -> None:
    """Studentised, it is near its level; the difference of means is at 0.28 for 4 against 12."""
    values = np.random.default_rng(0).normal(size=(n_a + n_b, 20_000))
    values[:n_a] *= 4
    found = two_groups(values, np.arange(n_a + n_b) < n_a, n_permutations=499)
    assert (found.p_permutation <= 0.05).mean() <= most


@pytest.mark.parametrize(
    ("n_a", "n_b", "least", "most"),
    [(4, 12, 0.2, 0.3), (8, 24, 0.1, 0.2), (LEAST_FOR_WELCH, 60, 0.04, 0.08)],
)
def test_welch_in_1000_tests(n_a: int, n_b: int, least: float, most: float) -> None:
    """Bonferroni's smallest p of normal values, from 2 million differences and variances."""
    rng = np.random.default_rng(0)
    draws, tests = 2_000_000, 1000
    a, b = (rng.chisquare(n - 1, draws) / (n - 1) / n for n in (n_a, n_b))
    t = rng.normal(size=draws) * np.sqrt((1 / n_a + 1 / n_b) / (a + b))
    degrees = (a + b) ** 2 / (a**2 / (n_a - 1) + b**2 / (n_b - 1))
    share = np.mean(2 * stats.t.sf(np.abs(t), degrees) <= 0.05 / tests)
    assert least < 1 - (1 - share) ** tests < most
