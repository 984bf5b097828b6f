"""Features that fire at one kind of span and not elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import xarray as xr

from zarrtrace.analysis.features import at_least_one, strongest
from zarrtrace.analysis.parallel import each_layer
from zarrtrace.analysis.selecting import (
    Data,
    described,
    has_span,
    require,
    require_places,
    span_names,
    stored_positions,
    traces,
)


def position_specific_features(
    data: Data,
    spans: Sequence[str] | None = None,
    *,
    threshold: float = 0.0,
    top: int = 10,
    min_scenarios: int = 1,
) -> xr.Dataset:
    """Features that fire at one kind of span and not elsewhere.

    A feature fires at a token if the magnitude of its activation is above `threshold`. Over the
    tokens of all scenarios, the score is the rate at the span minus the rate at all other tokens.

    Parameters
    ----------
    data
        A trace or a run with ``features``.
    spans
        Names of spans; all there are if None. A scenario without the span says nothing about it.
    threshold
        Magnitude of activation above which a feature fires, in the SAE's units.
    top
        How many features to keep by span and layer.
    min_scenarios
        Keep only features that fire at the span in at least so many scenarios.

    Returns
    -------
    xr.Dataset
        ``(span, layer, rank)``, strongest first, ties to the lower index: ``feature`` (int64, −1
        where fewer score above 0), ``score``, ``rate_at`` (recall), ``rate_elsewhere``,
        ``precision`` (share of its firing tokens that lie in the span) and ``scenarios`` (in how
        many it fires there); and ``tokens_at``, ``tokens_elsewhere (span, layer)``. Computed at the
        call, scenario by scenario, one layer at a time (on dask-backed data one block a worker).
        Every activation counts, so it reads ``features`` whole and not the stored index of 32.

    Raises
    ------
    ConfigError
        If a trace has no features.
    ScenarioError
        If no scenario has one of `spans`.

    Notes
    -----
    The score is Youden's J (1950). Tokens of one prompt are not independent, so no p-value is
    given; `scenarios` says how often the finding repeats.
    """
    at_least_one(top)
    names = span_names(data) if spans is None else list(spans)
    require_places(data, names)
    runs = list(traces(data).values())
    for ds in runs:
        require(ds, "features")
    total = _count(runs, names, threshold)
    layers = total["layer"]
    fired, elsewhere = total["fired"], total["fired_all"] - total["fired"]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_at = fired / total["tokens"][..., None]
        rate_elsewhere = elsewhere / (total["tokens_all"] - total["tokens"])[..., None]
        precision = fired / total["fired_all"]
    score = np.where(total["scenarios"] >= min_scenarios, rate_at - rate_elsewhere, np.nan)
    shape = (*score.shape[:-1], top)
    feature = np.full(shape, -1, np.int64)
    columns = {
        "score": score,
        "rate_at": rate_at,
        "rate_elsewhere": rate_elsewhere,
        "precision": precision,
        "scenarios": total["scenarios"],
    }
    values = {name: np.full(shape, np.nan) for name in columns}
    for where in np.ndindex(shape[:-1]):
        order = strongest(score[where], top)
        feature[where][: len(order)] = order
        for name, of in columns.items():
            values[name][where][: len(order)] = of[where][order]
    values["scenarios"] = np.nan_to_num(values["scenarios"]).astype(np.int64)
    dims = ("span", "layer", "rank")
    out = xr.Dataset(
        {"feature": (dims, feature), **{name: (dims, value) for name, value in values.items()}},
        coords={"span": names, "layer": layers, "rank": np.arange(1, top + 1)},
    )
    out["tokens_at"] = (dims[:2], total["tokens"])
    out["tokens_elsewhere"] = (dims[:2], total["tokens_all"] - total["tokens"])
    return described(
        out,
        data,
        "position_specific_features",
        "rate of firing at the span's tokens minus the rate at all other tokens (Youden's J 1950)",
        spans=names,
        threshold=threshold,
        top=top,
        min_scenarios=min_scenarios,
    )


def _count(
    runs: Sequence[xr.Dataset], names: Sequence[str], threshold: float
) -> dict[str, np.ndarray]:
    """Count, by span and layer, tokens, and by feature those at which it fires."""
    layers = np.unique(np.concatenate([np.asarray(ds["layer"]) for ds in runs]))
    width = max(ds.sizes["feature"] for ds in runs)
    by_layer = ("tokens", "tokens_all")
    total = {name: np.zeros((len(names), len(layers)), np.int64) for name in by_layer}
    for name in ("fired", "fired_all", "scenarios"):
        total[name] = np.zeros((len(names), len(layers), width), np.int64)
    places = [_places(ds, names) for ds in runs]
    jobs = (
        (ds["features"], partial(_firing, places=at, threshold=threshold))
        for ds, at in zip(runs, places, strict=True)
    )
    for ds, tokens, found in zip(runs, places, each_layer(jobs), strict=True):
        # A scenario without the span, or without the layer, counts neither here nor there.
        has = np.asarray(tokens.any(1))
        for at, one in zip(np.searchsorted(layers, ds["layer"]), found, strict=True):
            if one is None:
                continue
            total["tokens"][:, at] += tokens.sum(1)
            total["tokens_all"][:, at] += has * tokens.shape[1]
            total["fired"][:, at][:, one.feature] += one.fired
            total["fired_all"][:, at][:, one.feature] += has[:, None] * one.fired_all
            total["scenarios"][:, at][:, one.feature] += one.fired > 0
    return {"layer": layers, **total}


def _places(ds: xr.Dataset, names: Sequence[str]) -> np.ndarray:
    """Return which tokens each span has ``(span, query)`` bool; none if it is not there."""
    query = ds["query"].values
    out = np.zeros((len(names), len(query)), bool)
    for row, name in zip(out, names, strict=True):
        row[:] = np.isin(query, stored_positions(ds, name) if has_span(ds, name) else [])
    return out


class _Firing(NamedTuple):
    """At how many tokens features fire; only those that do.

    Attributes
    ----------
    feature
        ``(feature,)``.
    fired
        At each span's tokens ``(span, feature)``.
    fired_all
        At all tokens ``(feature,)``.
    """

    feature: np.ndarray
    fired: np.ndarray
    fired_all: np.ndarray


def _firing(layer: np.ndarray, _at: int, *, places: np.ndarray, threshold: float) -> _Firing | None:
    """Count tokens of one layer ``(query, feature)``; None if it is missing."""
    if np.isnan(layer[0, 0]):
        return None
    width = layer.shape[1]
    token, feature = np.divmod(np.flatnonzero(np.abs(layer) > threshold), width)
    everywhere = np.bincount(feature, minlength=width)
    firing = np.flatnonzero(everywhere)
    fired = np.zeros((len(places), len(firing)), np.int64)
    for row, there in zip(fired, places, strict=True):
        row[:] = np.bincount(feature[there[token]], minlength=width)[firing]
    return _Firing(firing, fired, everywhere[firing])
