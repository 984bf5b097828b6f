"""Experiments for probes: layers that say nothing, the confound alone, or something known."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import xarray as xr
from rates import Experiment
from sklearn.metrics import r2_score

from zarrtrace import analysis
from zarrtrace.analysis.crossvalidation import Rows, ridge

#: Permutations of a draw: p = 0.05 is a multiple of 1 / 40.
PERMUTATIONS = 39


def table_of(residual: np.ndarray, per_group: int = 1, **columns: Any) -> xr.Dataset:
    """Make a table of residuals ``(layer, sample, channel)`` with columns along its samples.

    Parameters
    ----------
    residual
        Numbers of the layers.
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
        Seed of the draw.
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


_KNOWN: dict[str, Any] = {"layers": 1, "effect": 1.0}


def scores_of(seed: int) -> tuple[float, float, float]:
    """Return the interval of R², and R² of the same probes on 1,200 new samples."""
    samples, new = draw(seed, **_KNOWN), draw(seed + 2**21, groups=400, **_KNOWN)
    found = analysis.probe(samples, "y", groups="group", n_permutations=0, seed=seed + 2**20)
    rows, others = (
        Rows(one["residual"].to_numpy()[0], np.empty((one.sizes["sample"], 0)), group, 1)
        for one, group in ((samples, samples["group"].to_numpy()), (new, new["group"].to_numpy()))
    )
    y, fold = samples["y"].to_numpy(), found["fold"].to_numpy()
    scores = [
        r2_score(new["y"], ridge(rows.take(fold != number), y[fold != number], others))
        for number in np.unique(fold)
    ]
    return float(found["low"][0]), float(found["high"][0]), float(np.mean(scores))


def misses_the_same(seed: int) -> bool:
    """Tell whether the 95 % interval misses R² of the same probes on new samples."""
    low, high, true = scores_of(seed)
    return not low <= true <= high


@cache
def expected() -> float:
    """Return the mean R² of probes that were trained on other groups, on new samples."""
    return float(np.mean([scores_of(2**22 + seed)[2] for seed in range(100)]))


def misses_others(seed: int) -> bool:
    """Tell whether the 95 % interval misses the expected R² of probes trained on other groups."""
    low, high, _ = scores_of(seed)
    return not low <= expected() <= high


_SAMPLES = "20 groups of 3 samples, 20 channels, 2 layers; "
_CONFOUND = "channel 1 and the target hold the confound; "
EXPERIMENTS = (
    Experiment(
        "probe p_familywise, R²",
        _SAMPLES + "the target varies in groups; nothing in any layer",
        partial(finds),
    ),
    Experiment(
        "probe p_familywise, R²",
        _SAMPLES + "one target a group; nothing in any layer",
        partial(finds, by_group=True),
    ),
    Experiment(
        "probe p_familywise, AUC",
        _SAMPLES + "two values in a group; nothing in any layer",
        partial(finds, classes=True),
    ),
    Experiment(
        "probe p_familywise, confound given",
        _SAMPLES + _CONFOUND + "both vary in groups",
        partial(finds, confounds=("c",), confounded=1.0),
    ),
    Experiment(
        "probe p_familywise, confound given",
        _SAMPLES + _CONFOUND + "one value of both a group",
        partial(finds, confounds=("c",), confounded=1.0, by_group=True),
    ),
    Experiment(
        "probe interval of R² misses the same probes on new groups",
        "20 groups of 3 samples, 20 channels; one channel is half the target's variance",
        misses_the_same,
    ),
    Experiment(
        "probe interval of R² misses probes trained on other groups",
        "20 groups of 3 samples, 20 channels; one channel is half the target's variance",
        misses_others,
    ),
    Experiment(
        "probe p_familywise, R²",
        "40 groups of 3; one channel is half the target's variance",
        partial(finds, groups=40, effect=1.0),
        nominal=None,
    ),
    Experiment(
        "probe p_familywise, AUC",
        "60 groups of 3; above 0, where one channel is half the variance",
        partial(finds, groups=60, effect=1.0, classes=True),
        nominal=None,
    ),
    Experiment(
        "probe p_familywise, confound given",
        "40 groups of 3; confound and one channel are a third of the variance each",
        partial(finds, groups=40, effect=1.0, confounds=("c",), confounded=1.0),
        nominal=None,
    ),
)
