"""Features that fire at one kind of span and not elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import xarray as xr

from zarrtrace.analysis.blocks import blocks
from zarrtrace.analysis.parallel import OfLayer, each_layer
from zarrtrace.analysis.pathways import at_least_one, strongest
from zarrtrace.analysis.positions import require_places, span_names
from zarrtrace.analysis.results import described
from zarrtrace.analysis.traces import Data, scenario_names
from zarrtrace.scenarios import first_repeats, split_trace_name


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
        A trace, a run or a table with ``features``; the tokens of a table are its samples.
    spans
        Names of spans; all there are if None. A scenario without the span says nothing about it.
    threshold
        Magnitude of activation above which a feature fires, in the SAE's units.
    top
        Number of features to keep by span and layer.
    min_scenarios
        Keep only features that fire at the span in at least this many scenarios.

    Returns
    -------
    xr.Dataset
        ``(span, layer, rank)``, strongest first, ties to the lower index: ``feature`` (int64, −1
        where fewer score above 0), ``score``, ``rate_at`` (recall), ``rate_elsewhere``,
        ``precision`` (share of its firing tokens that lie in the span) and ``scenarios`` (in how
        many it fires there); and ``tokens_at``, ``tokens_elsewhere`` and ``tokens_nan (span,
        layer)``: tokens at which the model computed NaN are left out, and counted there. Computed
        at the call, scenario by scenario, one layer at a time (on dask-backed data one block a
        worker). Every activation counts, so it reads ``features`` whole and not the stored index
        of 32.

    Raises
    ------
    ConfigError
        If a trace has no features.
    ScenarioError
        If no scenario has one of `spans`.

    Notes
    -----
    The score is Youden's J (1950). There is no null hypothesis and no p-value: tokens of one prompt
    are not independent, scenarios of one template repeat the same tokens, and a ranking of many
    features always has a first one. `scenarios` says how often a finding repeats; in one template,
    that is no more than one prompt shows. Special tokens (BOS) count as elsewhere: a feature that
    fires at them only scores below 0 at every other span. Among a scenario's repeats the prompt
    counts once, and each continuation, if any repeat has the span; at spans of generated text
    `scenarios` counts repeats one by one.
    """
    at_least_one(top)
    names = span_names(data) if spans is None else list(spans)
    require_places(data, names)
    total = _count(data, names, threshold)
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
    out["tokens_nan"] = (dims[:2], total["tokens_nan"])
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


def _count(data: Data, names: Sequence[str], threshold: float) -> dict[str, np.ndarray]:
    """Count, by span and layer, tokens, and by feature those at which it fires."""
    layers, width = _layers_and_width(data)
    traces = scenario_names(data)
    first = np.array(first_repeats(traces), bool)
    of_traces = np.unique([split_trace_name(one)[0] for one in traces], return_inverse=True)[1]
    holders = _holders(data, names, of_traces)
    by_layer = ("tokens", "tokens_all", "tokens_nan")
    total = {name: np.zeros((len(names), len(layers)), np.int64) for name in by_layer}
    for name in ("fired", "fired_all", "scenarios"):
        total[name] = np.zeros((len(names), len(layers), width), np.int64)
    of_layers: deque[list[int]] = deque()  # of the blocks that are being read

    def jobs() -> Iterator[tuple[xr.DataArray, OfLayer[_Firing]]]:
        for block in blocks(data, ["features"]):
            of_layers.append(block.layers)
            places = np.zeros((len(names), int(block.starts[-1])), bool)
            for row, name in zip(places, names, strict=True):
                row[block.find(name)] = True
            firing = partial(
                _firing,
                places=places,
                everywhere=holders[:, of_traces[list(block.scenarios)]][:, block.of_samples]
                & block.counted(first),
                scenario=block.of_samples,
                missing=block.missing_scenarios(),
                threshold=threshold,
            )
            yield block.arrays["features"], firing

    for found in each_layer(jobs()):
        for at, one in zip(np.searchsorted(layers, of_layers.popleft()), found, strict=True):
            total["tokens"][:, at] += one.tokens
            total["tokens_all"][:, at] += one.tokens_all
            total["tokens_nan"][:, at] += one.tokens_nan
            for name in ("fired", "fired_all", "scenarios"):
                total[name][:, at][:, one.feature] += getattr(one, name)
    return {"layer": layers, **total}


def _holders(data: Data, names: Sequence[str], of_traces: np.ndarray) -> np.ndarray:
    """Tell which scenarios have each span in any of their repeats ``(span, scenario)``."""
    found = np.zeros((len(names), of_traces.max() + 1), bool)
    for block in blocks(data, ["features"]):
        for row, name in zip(found, names, strict=True):
            row[of_traces[list(block.rows(name))]] = True
    return found


def _layers_and_width(data: Data) -> tuple[np.ndarray, int]:
    """Return the layers that any scenario has, and the largest number of features."""
    found = [block.arrays["features"].sizes["feature"] for block in blocks(data, ["features"])]
    layers = {layer for block in blocks(data, ["features"]) for layer in block.layers}
    return np.array(sorted(layers)), max(found)


class _Firing(NamedTuple):
    """At how many tokens features fire; only those that do.

    Attributes
    ----------
    feature
        ``(feature,)``.
    tokens, tokens_all
        Tokens that each span has ``(span,)``, and all tokens of the scenarios that have it in any
        of their repeats.
    tokens_nan
        Among all tokens, those that are left out because the model computed NaN ``(span,)``.
    fired
        At each span's tokens ``(span, feature)``.
    fired_all
        At all tokens of scenarios that have the span ``(span, feature)``.
    scenarios
        In how many scenarios a feature fires at the span ``(span, feature)``.
    """

    feature: np.ndarray
    tokens: np.ndarray
    tokens_all: np.ndarray
    tokens_nan: np.ndarray
    fired: np.ndarray
    fired_all: np.ndarray
    scenarios: np.ndarray


def _firing(
    layer: np.ndarray,
    at_layer: int,
    *,
    places: np.ndarray,
    everywhere: np.ndarray,
    scenario: np.ndarray,
    missing: Sequence[Sequence[int]],
    threshold: float,
) -> _Firing:
    """Count tokens of one layer ``(sample, feature)``.

    A scenario without the span, or without the layer, counts neither here nor there.

    Parameters
    ----------
    layer
        Activations.
    places
        Which samples each span holds ``(span, sample)``.
    everywhere
        Which samples count, of scenarios that have each span ``(span, sample)``.
    scenario
        Scenario of each sample ``(sample,)``.
    missing
        For each layer the scenarios that lack it.
    threshold
        Magnitude above which a feature fires.
    """
    width = layer.shape[1]
    everywhere = everywhere & ~np.isin(scenario, missing[at_layer])
    is_nan = np.isnan(layer.max(1))  # the largest of some is NaN if one of them is
    tokens_nan = (everywhere & is_nan).sum(1)
    everywhere = everywhere & ~is_nan
    places = places & everywhere
    token, feature = np.divmod(np.flatnonzero(np.abs(layer) > threshold), width)
    firing = np.flatnonzero(np.bincount(feature, minlength=width))

    def counted(at: np.ndarray) -> np.ndarray:
        return np.bincount(feature[at], minlength=width)[firing]

    def scenarios(at: np.ndarray) -> np.ndarray:
        pairs = np.unique(scenario[token[at]] * width + feature[at])
        return np.bincount(pairs % width, minlength=width)[firing]

    here = [row[token] for row in places]
    shape = (len(places), len(firing))
    return _Firing(
        firing,
        places.sum(1),
        everywhere.sum(1),
        tokens_nan,
        np.array([counted(at) for at in here]).reshape(shape),
        np.array([counted(row[token]) for row in everywhere]).reshape(shape),
        np.array([scenarios(at) for at in here]).reshape(shape),
    )
