"""Experiments for probes: samples of groups, in which layers say nothing, or something known."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from rates import Experiment

from zarrtrace import analysis

#: Permutations of a draw: p = 0.05 is a multiple of 1 / 40.
PERMUTATIONS = 39


def table_of(residual: np.ndarray, per_group: int = 1, **columns: Any) -> xr.Dataset:
    """Make a table of residuals ``(layer, sample, channel)`` with columns along its samples.

    Parameters
    ----------
    residual
        Of the layers.
    per_group
        Neighbours in one ``group``; each sample is a scenario.
    columns
        ``(sample,)`` each.
    """
    layers, samples, _ = residual.shape
    known = {
        "scenario": np.array([f"s{n}" for n in range(samples)], object),
        "position": np.zeros(samples, np.int64),
        "span": np.array(["decision"] * samples, object),
        "group": np.arange(samples) // per_group,
        **columns,
    }
    return xr.Dataset(
        {"residual": (("layer", "sample", "channel"), residual.astype(np.float32))},
        {"layer": np.arange(layers), **{name: ("sample", one) for name, one in known.items()}},
        {"kind": "table", "metadata": ["group", *columns]},
    )


def draw(
    seed: int,
    *,
    groups: int = 20,
    per_group: int = 3,
    channels: int = 20,
    layers: int = 2,
    effect: float = 0.0,
    confounded: float = 0.0,
    by_group: bool = False,
    classes: bool = False,
) -> xr.Dataset:
    """Draw normal residuals whose groups differ, and a target ``y``.

    Parameters
    ----------
    seed
        Of the draw.
    groups, per_group, channels, layers
        Sizes.
    effect
        Times channel 0 of the last layer, added to a target of variance 1.
    confounded
        Times the confound ``c``, of variance 1, added to target and channel 1 of all layers.
    by_group
        Draw target and confound by group.
    classes
        Whether the target is above 0, instead of the number.
    """
    rng = np.random.default_rng(seed)
    of_sample = np.repeat(np.arange(groups), per_group)
    own = rng.standard_normal((layers, groups * per_group, channels))
    residual = (own + rng.standard_normal((layers, groups, channels))[:, of_sample]) / np.sqrt(2)
    if by_group:
        c, y = rng.standard_normal((2, groups))[:, of_sample]
    else:
        c, y = rng.standard_normal((2, groups * per_group))
    residual[:, :, 1] += confounded * c
    if by_group:
        signal = np.bincount(of_sample, residual[-1, :, 0]) / per_group
        y = y + effect * signal[of_sample]
    else:
        y = y + effect * residual[-1, :, 0]
    y = y + confounded * c
    return table_of(residual, per_group, y=y > 0 if classes else y, c=c)


def finds(seed: int, confounds: tuple[str, ...] = (), **settings: Any) -> bool:
    """Tell whether any layer's familywise p is at most 0.05."""
    samples = draw(seed, **settings)
    found = analysis.probe(
        samples,
        "y",
        groups="group",
        confounds=confounds,
        n_permutations=PERMUTATIONS,
        seed=seed + 2**20,  # independent of the data's
    )
    return bool((found["p_familywise"] <= 0.05).any())
