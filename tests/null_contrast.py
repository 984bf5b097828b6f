"""Contrasts of groups without a difference of means, and with a planted one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import synthetic
import xarray as xr
from rates import Experiment

from zarrtrace import analysis

#: Features of a run, unless another number is said.
FEATURES = 200
Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def normal(rng: np.random.Generator, n_a: int, n_b: int, *, ratio: float = 1.0) -> np.ndarray:
    """Draw equal means; `ratio` is the standard deviation of group A over that of group B."""
    values = rng.normal(size=(n_a + n_b, FEATURES))
    values[:n_a] *= ratio
    return values


def sparse(rng: np.random.Generator, n_a: int, n_b: int, *, features: int = FEATURES) -> np.ndarray:
    """Draw features that fire in 5, 20 or 50 % of the scenarios; most are constant in a group."""
    fires = rng.random((n_a + n_b, features)) < rng.choice([0.05, 0.2, 0.5], features)
    return rng.exponential(2, fires.shape) * fires


def table(values: np.ndarray, in_a: np.ndarray, template: np.ndarray | None = None) -> xr.Dataset:
    """Return a table of one layer with a sample, the decision, a scenario."""
    n = len(values)
    names = np.array([f"S{number}" for number in range(n)], object)
    metadata = {} if template is None else {"template": ("sample", template)}
    return xr.Dataset(
        {"features": (("layer", "sample", "feature"), values[None])},
        {
            "layer": [1],
            "scenario": ("sample", names),
            "position": ("sample", np.zeros(n, np.int64)),
            "span": ("sample", np.full(n, "decision", object)),
            "tags": ("sample", np.where(in_a, "a", "b").astype(object)),
            **metadata,
        },
        {"kind": "table", "positions": "decision", "metadata": list(metadata)},
    )


def least(values: np.ndarray, n_a: int, statistic: str) -> float:
    """Return the smallest p of a call; 1 if none is given."""
    in_a = np.arange(len(values)) < n_a
    # With 999, the q of one feature of 200 could not be small.
    number = 9999 if statistic == "q_permutation" else 999
    found = analysis.contrast(table(values, in_a), "a", "b", n_permutations=number)
    return float(np.nanmin(found[statistic].to_numpy(), initial=1.0))


def any_finding(seed: int, draw: Draw, n_a: int, n_b: int, statistic: str) -> bool:
    """Tell whether a call reports any feature."""
    return least(draw(np.random.default_rng(seed), n_a, n_b), n_a, statistic) <= 0.05


def planted(seed: int, n: int, features: int, statistic: str) -> bool:
    """Tell whether the feature that fires in group A alone, as 4 ± 1, is found."""
    rng = np.random.default_rng(seed)
    values = sparse(rng, n, n, features=features)
    values[:, 0] = np.where(np.arange(2 * n) < n, 4 + rng.normal(size=2 * n), 0)
    found = analysis.contrast(table(values, np.arange(2 * n) < n), n_permutations=999)
    row = int(np.flatnonzero(found["feature"] == 0)[0])
    return bool(found[statistic][row] <= 0.05)


def of_templates(
    seed: int, templates: int, each: int, *, mixed: bool, block: bool, effect: float = 0.0
) -> bool:
    """Tell whether features differ where templates do, by as much as their scenarios.

    `effect` is added to feature 0 of group A; then only that one counts.
    """
    rng = np.random.default_rng(seed)
    template = np.repeat(np.arange(templates), each)
    in_a = (np.arange(len(template)) if mixed else template) % 2 == 0
    values = rng.normal(size=(templates, FEATURES))[template]
    values += rng.normal(size=(templates, FEATURES))[template] * in_a[:, None]
    values += rng.normal(size=values.shape)
    values[in_a, 0] += effect
    found = analysis.contrast(
        table(values, in_a, template),
        "a",
        "b",
        block="template" if block else None,
        n_permutations=999,
    )
    reported = found["feature"][(found["p_familywise"] <= 0.05) | (found["q_permutation"] <= 0.05)]
    return bool((reported == 0).any() if effect else len(reported))


def planted_attention(seed: int, n: int) -> bool:
    """Tell whether attention to one of two spans in one of 16 layers is found."""
    rng = np.random.default_rng(seed)
    traces = []
    for number in range(2 * n):
        ds = BASE.assign_attrs(scenario=f"S{number}", tags=["a" if number < n else "b"])
        rows = rng.normal(0.1, 0.02, BASE["attention_mean"].shape).astype(np.float32)
        rows[8, -1, 5] += 0.08 * (number < n)
        traces.append(ds.assign(attention_mean=(("layer", "query", "key"), rows)))
    found = analysis.contrast(synthetic.run(traces), what="attention", n_permutations=999)
    cell = found["p_familywise"].sel(source="goal", layer=9)
    return bool(cell <= 0.05)


BASE = synthetic.trace("S0", layers=range(1, 17), heads=1, features=None)

_SIZES = ((4, 4), (10, 10), (2, 6), (2, 8), (4, 12))
_WIDE = partial(normal, ratio=4.0)


def _null(statistic: str, data: str, draw: Draw, n_a: int, n_b: int) -> Experiment:
    return Experiment(
        f"contrast {statistic}",
        f"{data}, {n_a} against {n_b}, {FEATURES} features",
        partial(any_finding, draw=draw, n_a=n_a, n_b=n_b, statistic=statistic),
    )


EXPERIMENTS = (
    *(_null("p_familywise", "equal means, SD 4 : 1", _WIDE, a, b) for a, b in _SIZES),
    # p_familywise is at least p_distribution, so these hold its level, too.
    *(_null("p_distribution", "normal", normal, a, b) for a, b in _SIZES),
    *(_null("p_distribution", "sparse", sparse, a, b) for a, b in _SIZES),
    _null("q_permutation", "equal means, SD 4 : 1", _WIDE, 10, 10),
    *(_null("q_welch", "normal", normal, a, b) for a, b in ((2, 6), (2, 8), (20, 20), (20, 60))),
    _null("q_welch", "equal means, SD 4 : 1", _WIDE, 20, 20),
    Experiment(
        "contrast, block=",
        "4 templates, 2 a group, 10 scenarios each",
        partial(of_templates, templates=4, each=10, mixed=False, block=True),
    ),
    Experiment(
        "contrast, block=",
        "16 templates, 8 a group, 5 scenarios each",
        partial(of_templates, templates=16, each=5, mixed=False, block=True),
    ),
    Experiment(
        "contrast, block=",
        "10 templates with scenarios of both groups, 6 each",
        partial(of_templates, templates=10, each=6, mixed=True, block=True),
    ),
    Experiment(
        "contrast p_familywise",
        "one of 1,000 sparse features fires in group A alone, as 4 ± 1, 10 against 10",
        partial(planted, n=10, features=1000, statistic="p_familywise"),
        nominal=None,
    ),
    Experiment(
        "contrast p_distribution",
        f"one of {FEATURES} sparse features fires in group A alone, as 4 ± 1, 5 against 5",
        partial(planted, n=5, features=FEATURES, statistic="p_distribution"),
        nominal=None,
    ),
    Experiment(
        "contrast p_familywise, attention",
        "one of 32 cells 0.18 instead of 0.10 (SD 0.02), 10 against 10",
        partial(planted_attention, n=10),
        nominal=None,
    ),
    Experiment(
        "contrast, block=",
        "an effect of 8 (SD between templates 1.4, within 1), 16 templates, 8 a group",
        partial(of_templates, templates=16, each=5, mixed=False, block=True, effect=8.0),
        nominal=None,
    ),
    Experiment(
        "contrast, block=",
        "an effect of 5 (SD between templates 1, within 1), 12 templates with both groups",
        partial(of_templates, templates=12, each=6, mixed=True, block=True, effect=5.0),
        nominal=None,
    ),
)
