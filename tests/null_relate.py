"""Correlations of an outcome with quantities over scenarios, without a relation and with one."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr
from rates import Experiment

from zarrtrace import analysis

#: Layers times spans.
QUANTITIES = 64


def any_correlation(seed: int, n: int, *, tied: bool = False, slope: float = 0.0) -> bool:
    """Tell whether q_permutation reports a quantity; with a slope, whether it reports the first."""
    rng = np.random.default_rng(seed)
    outcome = rng.random(n) < 0.5 if tied else rng.normal(size=n)
    values = rng.normal(size=(n, QUANTITIES))
    values[:, 0] += slope * outcome
    found = analysis.relate(
        xr.DataArray(outcome.astype(float), dims="scenario"),
        xr.DataArray(values, dims=("scenario", "cell")),
    )
    reported = found["q_permutation"].to_numpy() <= 0.05
    return bool(reported[0] if slope else reported.any())


EXPERIMENTS = (
    Experiment(
        "relate q_permutation",
        f"nothing related, 10 scenarios, {QUANTITIES} quantities",
        partial(any_correlation, n=10),
    ),
    Experiment(
        "relate q_permutation",
        f"nothing related, outcome 0 or 1, 20 scenarios, {QUANTITIES} quantities",
        partial(any_correlation, n=20, tied=True),
    ),
    Experiment(
        "relate q_permutation",
        f"one of {QUANTITIES} quantities follows the outcome (r = 0.89), 20 scenarios",
        partial(any_correlation, n=20, slope=2.0),
        nominal=None,
    ),
)
