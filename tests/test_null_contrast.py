"""Contrasts keep their error rates, and find what is planted."""

from __future__ import annotations

import numpy as np
import pytest
from null_contrast import EXPERIMENTS, of_templates
from rates import Experiment, holds, rate

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
