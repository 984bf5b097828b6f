"""How often probes find what is not there, and what is."""

from __future__ import annotations

import null_probe
import numpy as np
import pytest
import scipy.stats
from rates import DRAWS, Experiment, holds, rate

from zarrtrace import analysis

pytestmark = pytest.mark.long


@pytest.mark.parametrize("experiment", null_probe.EXPERIMENTS, ids=lambda one: one.data)
def test_the_promised_rate_holds(experiment: Experiment) -> None:
    found = rate(experiment)
    assert holds(experiment, found), found


def test_p_is_uniform_without_an_effect() -> None:
    """Also above 0.05: Kolmogorov and Smirnov's test against p = 1/40, 2/40 … 1."""
    found = []
    for seed in range(DRAWS):
        samples = null_probe.draw(seed, layers=1)
        result = analysis.probe(
            samples, "y", groups="group", n_permutations=null_probe.PERMUTATIONS, seed=seed + 2**20
        )
        found.append(float(result["p"][0]))
    # Uniform on steps of 1/40; spread within the step, it is uniform between 0 and 1.
    spread = np.array(found) - np.random.default_rng(0).random(DRAWS) / 40
    assert scipy.stats.kstest(spread, "uniform").pvalue > 0.001
