"""Sentences about what a comparison of groups found, or could find."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

from zarrtrace.analysis.effects import hedges
from zarrtrace.analysis.groups import Groups

#: Observations that each group needs for Welch's p-values to hold in many tests at once.
LEAST_FOR_WELCH = 20

_ALPHA = 0.05


class Design(NamedTuple):
    """Sizes and permutations of a comparison.

    Attributes
    ----------
    n_a, n_b
        Observations of each group.
    unit
        ``"scenarios"`` or ``"blocks"``.
    is_paired
        Whether each block has scenarios of both groups.
    left_out
        Scenarios of blocks that have one group alone, where others have both.
    smallest_p
        The smallest permutation p-value.
    permutations
        ``"all 70"`` or ``"9999 drawn"``.
    not_tested
        Places and layers that too few observations have.
    """

    n_a: int
    n_b: int
    unit: str
    is_paired: bool
    left_out: int
    smallest_p: float
    permutations: str
    not_tested: tuple[str, ...]


def claims(
    out: xr.Dataset, design: Design, groups: Groups, note: str
) -> dict[str, str | int | float]:
    """Return the attributes that say what was found and what could have been.

    Parameters
    ----------
    out
        The comparison.
    design
        Its sizes and permutations.
    groups
        The groups compared.
    note
        Sentence about templates; may be empty.
    """
    n_tests = int(np.isfinite(out["p_permutation"]).sum())
    smallest = design.smallest_p
    least_g = _least_g(design, n_tests)
    found: dict[str, str | int | float] = {
        "findings": f"{_findings(out, design, groups, n_tests)} {note}".strip(),
        "limits": f"{_limits(design, n_tests, least_g)} {note}".strip(),
        "n_a": design.n_a,
        "n_b": design.n_b,
        "unit": design.unit,
        "n_tests": n_tests,
        "permutations": design.permutations,
        "smallest_p": smallest,
        "smallest_q_alone": min(1.0, smallest * n_tests),
        "needed_at_smallest_p": max(1, math.ceil(smallest * n_tests / _ALPHA - 1e-9)),
        "not_tested": "; ".join(design.not_tested),
    }
    return found | ({} if least_g is None else {"least_g": least_g})


def _findings(out: xr.Dataset, design: Design, groups: Groups, n_tests: int) -> str:
    """Answer the question in a sentence."""
    what = "features" if "row" in out.dims else "places of attention"
    sizes = f"{groups.name_a} ({design.n_a}) and {groups.name_b} ({design.n_b} {design.unit})"
    if design.smallest_p > _ALPHA:
        return (
            f"Groups of this size cannot tell {sizes} apart: no p-value can fall below "
            f"{design.smallest_p:.2g}."
        )
    means = int((out["p_familywise"] <= _ALPHA).sum())
    distributions = int((out["p_distribution"] <= _ALPHA).sum())
    said = f"{means} of {n_tests} {what} differ in mean between {sizes}, p_familywise <= {_ALPHA}"
    if means:
        said += f"; {_strongest(out, groups)}"
    if distributions > means:
        said += f"; {distributions} differ in mean or spread, p_distribution <= {_ALPHA}"
    return f"{said}."


def _strongest(out: xr.Dataset, groups: Groups) -> str:
    """Name the largest effect among those that differ."""
    named = out.where(out["p_familywise"] <= _ALPHA)
    strength = abs(named["hedges_g"]).fillna(-1).where(named["p_familywise"].notnull(), -2)
    at = out.isel(strength.argmax(...))
    # Labels are numbers and texts.
    place = at["place"] if "place" in at.coords else at["source"]
    head = f", head {int(at['head'])}" if "head" in at.coords else ""
    feature = f", feature {int(at['feature'])}" if "feature" in at.coords else ""
    more = groups.name_a if float(at["difference"]) > 0 else groups.name_b
    return (
        f"the largest effect is layer {int(at['layer'])}{feature}{head} "
        f"{'at' if 'place' in at.coords else 'to'} {place.item()}: {_size(at, groups)}, "
        f"more in {more}"
    )


def _size(at: xr.Dataset, groups: Groups) -> str:
    """Write an effect: its g, or the means if a group's standard deviation is 0."""
    flags = (("constant_a", groups.name_a), ("constant_b", groups.name_b))
    constant = [name for flag, name in flags if at[flag]]
    if constant:
        means = f"{float(at['mean_a']):.3g} against {float(at['mean_b']):.3g}"
        return f"means {means}, without variance in {' and '.join(constant)}"
    bounds = f"[{float(at['g_low']):.3g}, {float(at['g_high']):.3g}]"
    return f"g = {float(at['hedges_g']):.3g} {bounds}"


def _least_g(design: Design, n_tests: int) -> float | None:
    """Return the least g with p_familywise <= 0.05, for equal spreads; None if there is none."""
    if design.smallest_p > _ALPHA or not n_tests:
        return None
    n_a, n_b = design.n_a, design.n_b
    t = float(stats.t.isf(_ALPHA / n_tests / 2, min(n_a, n_b) - 1))
    scale = math.sqrt(1 / n_a if design.is_paired else 1 / n_a + 1 / n_b)
    degrees = n_a - 1 if design.is_paired else n_a + n_b - 2
    return float(hedges(np.array([t * scale]), degrees, scale).g[0])


def _limits(design: Design, n_tests: int, least_g: float | None) -> str:
    """Say what groups of this size can show at best."""
    smallest = design.smallest_p
    alone = min(1.0, smallest * n_tests)
    needed = max(1, math.ceil(smallest * n_tests / _ALPHA - 1e-9))
    reach = f"{needed} must reach it together" if needed <= n_tests else "all are too few"
    sizes = (
        f"{design.n_a} {design.unit} with both groups"
        if design.is_paired
        else f"{design.n_a} against {design.n_b} {design.unit}"
    )
    first = (
        f"{sizes}, {design.permutations} permutations: no p_permutation, p_distribution or "
        f"p_familywise below {smallest:.4g}. With {n_tests} tests, one alone at that p has "
        f"q_permutation = {alone:.3g}; {reach} for q <= 0.05."
    )
    parts = [first]
    if least_g is not None:
        parts.append(f"p_familywise <= 0.05 needs |g| of at least {least_g:.2g}.")
    if min(design.n_a, design.n_b) < LEAST_FOR_WELCH:
        parts.append(
            f"q_welch is not given below {LEAST_FOR_WELCH} {design.unit} a group, where it does "
            "not hold its level."
        )
    if design.left_out:
        parts.append(
            f"{design.left_out} {'scenarios' if design.unit == 'blocks' else 'repeats'} were left "
            f"out: their {design.unit} have one group alone."
        )
    return " ".join(parts)
