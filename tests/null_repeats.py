"""Repeats of scenarios: choices that go with nothing, or with a feature, within scenarios."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr
from rates import Experiment

from zarrtrace import analysis

FEATURES = 50


def table(values: np.ndarray, scenarios: int, choice: np.ndarray) -> xr.Dataset:
    """Return a table of one layer with a generated sample, the answer, a repeat."""
    n = len(values)
    repeats = n // scenarios
    return xr.Dataset(
        {"features": (("layer", "sample", "feature"), values[None])},
        {
            "layer": [1],
            "scenario": ("sample", np.repeat([f"S{i}" for i in range(scenarios)], repeats)),
            "repeat": ("sample", np.tile(np.arange(repeats), scenarios)),
            "choice": ("sample", choice.astype(object)),
            "generated": ("sample", np.ones(n, bool)),
            "position": ("sample", np.full(n, 9)),
            "span": ("sample", np.full(n, "answer", object)),
        },
        {"kind": "table", "positions": "answer", "metadata": []},
    )


def draw(rng: np.random.Generator, scenarios: int, repeats: int, *, effect: float) -> xr.Dataset:
    """Draw activations of which much is the scenario's, and so is how often it bets.

    Both are higher in the same scenarios: exchanged without regard to these, repeats would show a
    difference that is the prompts'. Features fire in 5 to 80 % of the repeats.
    """
    of_scenario = rng.normal(size=(scenarios, 1))
    bets = rng.random((scenarios, repeats)) < 1 / (1 + np.exp(-2 * of_scenario))
    level = np.exp(of_scenario + rng.normal(0, 0.5, (scenarios, FEATURES)))
    shape = (scenarios, repeats, FEATURES)
    fires = rng.random(shape) < rng.choice([0.05, 0.2, 0.8], FEATURES)
    values = level[:, None] * rng.exponential(1, shape) * fires
    values[..., 0] += effect * bets
    choice = np.where(bets, "bet", "stop").ravel()
    return table(values.reshape(-1, FEATURES), scenarios, choice)


def contrasted(seed: int, *, statistic: str, scenarios: int, repeats: int, effect: float) -> bool:
    """Tell whether a contrast of choices reports a feature; with an effect, the planted one."""
    data = draw(np.random.default_rng(seed), scenarios, repeats, effect=effect)
    found = analysis.contrast(data, "bet", "stop", "answer", by="choice", n_permutations=999)
    p = found[statistic].where(found["feature"] == 0) if effect else found[statistic]
    return bool(np.nanmin(p.to_numpy(), initial=1.0) <= 0.05)


def related(seed: int, *, effect: float) -> bool:
    """Tell whether a choice goes with the planted feature, or with a given one without effect."""
    data = draw(np.random.default_rng(seed), 10, 20, effect=effect)
    activation = data["features"].sel(layer=1).isel(feature=0)
    outcome = analysis.chose(data, "bet")
    quantity = outcome.copy(data=activation.to_numpy())
    return bool(analysis.relate(outcome, quantity, n_permutations=999)["p_permutation"] <= 0.05)


EXPERIMENTS = (
    *(
        Experiment(
            f"contrast by choice, {statistic}",
            f"{scenarios} scenarios, {repeats} repeats, skewed features with no effect",
            partial(
                contrasted, statistic=statistic, scenarios=scenarios, repeats=repeats, effect=0
            ),
        )
        for statistic in ("p_familywise", "p_distribution")
        for scenarios, repeats in ((8, 20), (16, 6))
    ),
    Experiment(
        "contrast by choice, p_familywise",
        "16 scenarios, 20 repeats, a feature that is 2 units higher with a bet",
        partial(contrasted, statistic="p_familywise", scenarios=16, repeats=20, effect=2),
        nominal=None,
    ),
    Experiment(
        "relate to a choice, p_permutation",
        "10 scenarios, 20 repeats, no effect within scenarios",
        partial(related, effect=0),
    ),
    Experiment(
        "relate to a choice, p_permutation",
        "10 scenarios, 20 repeats, a feature that is 1 unit higher with a bet",
        partial(related, effect=1),
        nominal=None,
    ),
)
