"""Error rates of what compares choices over repeats."""

from __future__ import annotations

import pytest
from null_repeats import EXPERIMENTS
from rates import Experiment, holds, rate


@pytest.mark.long
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: f"{one.name}: {one.data}")
def test_the_rate_is_what_is_promised(experiment: Experiment) -> None:
    found = rate(experiment)
    assert holds(experiment, found), str(found)
