"""Correlations over scenarios keep their error rates, and find what is planted."""

from __future__ import annotations

import pytest
from null_relate import EXPERIMENTS
from rates import Experiment, holds, rate

pytestmark = pytest.mark.long


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: f"{one.name}: {one.data}")
def test_error_rate(experiment: Experiment) -> None:
    found = rate(experiment)
    assert holds(experiment, found), f"{experiment.name}, {experiment.data}: {found}"
