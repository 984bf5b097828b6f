"""Targets of probes, their confounds, and groups of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.tables import SAMPLE
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import is_missing
from zarrtrace.suggestions import did_you_mean

# Up to this share of a target's variance is rounding of a fit that leaves nothing.
_NOTHING_LEFT = 1e-9


class Target(NamedTuple):
    """The values that a probe predicts.

    Attributes
    ----------
    name
        The column.
    values
        ``(sample,)`` float64; NaN where missing. Two values become 0 and 1.
    classes
        The two values in ascending order, as text; empty for numbers.
    """

    name: str
    values: np.ndarray
    classes: tuple[str, ...]


def read_target(samples: xr.Dataset, target: str | xr.DataArray) -> Target:
    """Return a target as numbers.

    Parameters
    ----------
    samples
        A table.
    target
        A coordinate along ``sample``, or an array of one value a sample. With exactly two values it
        has classes, whatever its type.

    Raises
    ------
    ScenarioError
        If there is no such coordinate.
    ConfigError
        If it does not vary, or is text of more than two values.
    """
    name, values = _column(samples, target)
    known = np.array([not is_missing(one) and one != "" for one in values.tolist()], bool)
    distinct = pd.unique(values[known]).tolist()
    if len(distinct) < 2:
        only = f" but {distinct[0]!r}" if len(distinct) else ""
        raise ConfigError(
            f"the target {name!r} has no value{only}",
            why="There is nothing to predict.",
            remedy="Choose a column that varies, or more samples.",
        )
    out = np.full(len(values), np.nan)
    if len(distinct) == 2:
        low, high = sorted(distinct)
        out[known] = values[known] == high
        return Target(name, out, (str(low), str(high)))
    if values.dtype.kind not in "biuf":
        raise ConfigError(
            f"the target {name!r} is text with {len(distinct)} values",
            why="A probe predicts a number, or one of two values.",
            remedy=f"Compare one value with the others: probe(samples, samples.{name} == "
            f"{distinct[0]!r}).",
        )
    out[known] = values[known]
    if not np.isfinite(out[known]).all():
        raise ConfigError(
            f"the target {name!r} is infinite in {int(np.isinf(out).sum())} samples",
            why="The squared error of such a prediction is not defined.",
            remedy="Leave these samples out: samples.isel(sample=...).",
        )
    return Target(name, out, ())


def read_groups(samples: xr.Dataset, groups: str | None) -> tuple[str, np.ndarray]:
    """Return the column of groups, and the number of each sample's group, −1 if missing.

    Parameters
    ----------
    samples
        A table.
    groups
        A coordinate along ``sample``; the scenario if None, with all repeats of it.

    Raises
    ------
    ScenarioError
        If there is no such coordinate.
    ConfigError
        If samples of one scenario are in several groups.
    """
    scenario = "scenario_name" if "scenario_name" in samples.coords else "scenario"
    name, values = _column(samples, groups or scenario)
    codes, _ = pd.factorize(np.array([None if v == "" else v for v in values.tolist()], object))
    scenarios, names = pd.factorize(_column(samples, scenario)[1])
    first = np.full(len(names), -1)
    first[scenarios[::-1]] = codes[::-1]
    apart = np.flatnonzero(first[scenarios] != codes)
    if len(apart):
        raise ConfigError(
            f"samples of scenario {names[scenarios[apart[0]]]!r} are in several groups of {name!r}",
            why="A probe that is trained on one of them knows the prompt of the others.",
            remedy="Give a column with one value a scenario.",
        )
    return name, np.asarray(codes)


def read_confounds(samples: xr.Dataset, names: Sequence[str]) -> np.ndarray:
    """Return confounds as numbers ``(sample, column)``: texts as an indicator a value.

    NaN where a value is missing.

    Raises
    ------
    ScenarioError
        If there is no such coordinate.
    """
    columns = [np.empty((samples.sizes[SAMPLE], 0))]
    for name in names:
        values = _column(samples, name)[1]
        if values.dtype.kind in "biuf":
            columns.append(values.astype(np.float64)[:, None])
            continue
        codes, distinct = pd.factorize(
            np.array([None if one == "" else one for one in values.tolist()], object)
        )
        indicators = np.eye(len(distinct))[codes]
        indicators[codes < 0] = np.nan
        columns.append(indicators)
    return np.hstack(columns)


def _column(samples: xr.Dataset, given: str | xr.DataArray) -> tuple[str, np.ndarray]:
    """Return the name and the values of a column, one a sample."""
    if isinstance(given, xr.DataArray):
        if given.dims != (SAMPLE,) or given.sizes[SAMPLE] != samples.sizes[SAMPLE]:
            raise ConfigError(
                f"the target has dimensions {dict(given.sizes)}",
                why=f"The table has {samples.sizes[SAMPLE]} samples, and each needs one value.",
                remedy="Make it from the table's own columns, as samples.balance > 50.",
            )
        return str(given.name or "target"), given.to_numpy()
    columns = [str(name) for name, one in samples.coords.items() if one.dims == (SAMPLE,)]
    if given not in columns:
        raise ScenarioError(
            f"the samples have no column {given!r}",
            why="Columns are the metadata of the scenarios file, and what every sample has.",
            remedy=did_you_mean(str(given), columns, label="There are"),
        )
    return given, samples[given].to_numpy()


class PermutedTarget(NamedTuple):
    """Targets with the link to the samples broken, and how.

    Attributes
    ----------
    columns
        ``(sample, permutation)``; the observed target comes first.
    unit
        ``"groups"`` or ``"samples within groups"``.
    smallest_p
        The least p that these permutations can give.
    """

    columns: np.ndarray
    unit: Literal["groups", "samples within groups"]
    smallest_p: float


def exchanged(
    target: np.ndarray, groups: np.ndarray, confounds: np.ndarray, drawn: int, seed: int
) -> PermutedTarget:
    """Permute a target between groups if each has one value, else within groups.

    With confounds the residuals of the target are permuted and the confounds' part is added again
    (Freedman & Lane 1983); between groups the confounds are averaged over a group's samples.

    Parameters
    ----------
    target
        ``(sample,)``, finite.
    groups
        ``(sample,)`` numbers from 0.
    confounds
        ``(sample, column)``, finite; may have no columns.
    drawn
        Permutations besides the observed order.
    seed
        Seed of the permutations.

    Raises
    ------
    ConfigError
        If the confounds leave nothing of the target to permute.
    """
    sizes = np.bincount(groups)
    first = np.zeros(len(sizes), np.int64)
    first[groups[::-1]] = np.arange(len(groups))[::-1]
    between = bool((target == target[first][groups]).all())
    rng = np.random.default_rng(seed)
    if between:
        means = [np.bincount(groups, column) / sizes for column in confounds.T]
        fit, rest = _split(target[first], np.array(means).reshape(-1, len(sizes)).T)
        orders = rng.permuted(np.tile(np.arange(len(sizes)), (drawn, 1)), axis=1)
        values = (fit + rest[orders])[:, groups].T
        ways = _log_ways(target[first]) if not confounds.shape[1] else math.lgamma(len(sizes) + 1)
    else:
        fit, rest = _split(target, confounds)
        base = np.argsort(groups, kind="stable")
        values = np.empty((len(target), drawn))
        for number in range(drawn):
            order = np.lexsort((rng.random(len(groups)), groups))
            values[base, number] = rest[order]
        values += fit[:, None]
        distinct = target if not confounds.shape[1] else np.arange(len(target))
        ways = sum(_log_ways(distinct[groups == group]) for group in range(len(sizes)))
    return PermutedTarget(
        np.column_stack([target, values]),
        "groups" if between else "samples within groups",
        max(1 / (drawn + 1), math.exp(-ways)),
    )


def _split(values: np.ndarray, confounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what confounds explain of values by least squares, and the rest."""
    if not confounds.shape[1]:
        return np.zeros(len(values)), values  # exact: permuted values are the values
    design = np.column_stack([np.ones(len(values)), confounds])
    rank = int(np.linalg.matrix_rank(design))
    fit = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    rest = values - fit
    if 2 * rank > len(values) or (rest**2).mean() <= _NOTHING_LEFT * values.var():
        raise ConfigError(
            f"the confounds leave too little of the target: {rank} columns explain "
            f"{1 - (rest**2).mean() / values.var():.0%} of {len(values)} values",
            why="Texts count as one column for each value; groups count once if the target is the "
            "same in all samples of a group.",
            remedy="Name fewer confounds, or extract more groups.",
        )
    return fit, rest


def _log_ways(values: np.ndarray) -> float:
    """Return the logarithm of the number of orders of values that a linear probe tells apart."""
    counts = np.unique(values, return_counts=True)[1]
    ways = math.lgamma(len(values) + 1) - sum(math.lgamma(int(n) + 1) for n in counts)
    # Two values that are exchanged for each other, as often as each other, are as easy to predict.
    return max(0.0, ways - math.log(2)) if len(counts) == 2 and counts[0] == counts[1] else ways


def described_values(target: Target, values: np.ndarray) -> dict[str, Any]:
    """Return what is said of a target in attributes."""
    if not target.classes:
        return {"target": target.name, "target_mean": float(values.mean())}
    low, high = target.classes
    share = float(values.mean())
    return {"target": target.name, "classes": [low, high], "share_of_second_class": share}
