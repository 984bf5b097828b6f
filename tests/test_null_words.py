"""Tests of words and places hold their level, and find what is planted."""

from __future__ import annotations

import pytest
from null_words import EXPERIMENTS
from rates import Experiment, holds, rate

pytestmark = pytest.mark.torch  # the demo is extracted


@pytest.mark.long
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: f"{one.name}: {one.data}")
def test_rates_are_what_was_promised(experiment: Experiment) -> None:
    found = rate(experiment)
    assert holds(experiment, found), f"{experiment.name}, {experiment.data}: {found}"
