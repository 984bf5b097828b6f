"""critical_layers and layer_bands find what is planted, and little where nothing is."""

from __future__ import annotations

import pytest
from null_attention import EXPERIMENTS
from rates import Experiment, holds, rate


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: f"{one.name}: {one.data}")
def test_rate(experiment: Experiment) -> None:
    found = rate(experiment)
    assert holds(experiment, found), str(found)
