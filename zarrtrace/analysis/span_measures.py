"""How a word's features compare with others at a span, and wherever else it could be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from zarrtrace.analysis.parallel import OfLayer, each_layer
from zarrtrace.analysis.positions import has_span, stored_positions, stored_queries, token_labels
from zarrtrace.analysis.shifts import shifted_products
from zarrtrace.analysis.special import special_keys, special_queries
from zarrtrace.analysis.trace_arrays import attention
from zarrtrace.analysis.words import missing_rows
from zarrtrace.errors import ConfigError

# Tokens that can be ranked.
_FEWEST = 3
# Places that a span is moved to, the nearest ones: attention to each is held in memory.
_MOST_PLACES = 128


class SpanPlaces(NamedTuple):
    """Where a span is in a prompt, and where it could be.

    Attributes
    ----------
    tokens
        Tokens of the span, among the stored ones ``(query,)`` bool.
    counted
        Stored tokens that ``"place"`` compares ``(query,)`` bool: none if there are no others.
    ranked
        Stored tokens whose attention is stored ``(query,)`` bool.
    rows
        Numbers of their rows in the stored attention.
    keys
        Numbers of each place's keys, its own first ``(place, token)``; none if too few tokens
        stand behind the span.
    after
        First of `ranked` behind each place ``(place,)``.
    """

    tokens: np.ndarray
    counted: np.ndarray
    ranked: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    after: np.ndarray


def span_places(ds: xr.Dataset, names: Sequence[str], *, special: bool) -> dict[str, SpanPlaces]:
    """Return where the spans of a trace are, of those that it has."""
    found = {}
    at, stored = np.asarray(ds["query"].values), pd.Index(stored_queries(ds))
    usual = np.ones(len(at), bool) if special else ~special_queries(ds)
    ranked = np.isin(at, stored) & usual
    for name in names:
        if has_span(ds, name):
            tokens = np.isin(at, stored_positions(ds, name))
            counted = usual | tokens
            keys = _places(ds, name, at[ranked], special=special)
            last = token_labels(ds)[keys].max(1, initial=-1)
            found[name] = SpanPlaces(
                tokens,
                counted & (counted != tokens).any(),
                ranked,
                stored.get_indexer(at[ranked]),
                keys,
                np.searchsorted(at[ranked], last, side="right"),
            )
    return found


def _places(ds: xr.Dataset, name: str, ranked: np.ndarray, *, special: bool) -> np.ndarray:
    """Return the keys of a span moved along the prompt ``(place, token)``, in a circle."""
    labels, span = token_labels(ds), stored_positions(ds, name)
    usual = np.isin(labels, span) | special | ~special_keys(ds)
    here = np.searchsorted(labels[usual], span)
    behind = len(ranked) - np.searchsorted(ranked, labels[usual], side="right")
    # Moves that leave enough tokens behind the last of the span; the nearest ones.
    enough = int((behind >= _FEWEST).sum()) - 1 - here.max()
    if enough < 0:
        return np.empty((0, len(span)), np.int64)
    first = max(-here.min(), -(_MOST_PLACES // 2))
    moves = np.arange(first, min(enough, first + _MOST_PLACES - 1) + 1)
    return np.asarray(np.flatnonzero(usual)[here + np.roll(moves, first)[:, None]])


class SpanMeasures(NamedTuple):
    """One measure at one span, in one layer of one trace.

    Attributes
    ----------
    defined
        Which of the table's features have it.
    means
        Over each pair's own features, and over the others ``(pair, 2)``; NaN without any.
    profiles
        Their difference, by how far the span is moved ``(pair, shift)``; NaN where none is
        defined.
    """

    defined: np.ndarray
    means: np.ndarray
    profiles: np.ndarray


def measure_jobs(
    runs: Sequence[xr.Dataset],
    spans: Sequence[Mapping[str, SpanPlaces]],
    features: Mapping[int, np.ndarray],
    own: Mapping[tuple[int, str], np.ndarray],
) -> Iterator[tuple[xr.DataArray, OfLayer[dict[tuple[str, str], SpanMeasures]]]]:
    """Yield what to do with the features of each trace: results are by measure and span.

    Parameters
    ----------
    runs
        The traces.
    spans
        Places of each trace's spans.
    features
        By layer, the table's, ascending.
    own
        By layer and span, which go with the words of the span's pairs ``(pair, feature)``.
    """
    for ds, places, weights in zip(runs, spans, _attended(runs, spans), strict=True):
        layers = ds.indexes["layer"].tolist()
        measure = partial(
            _measure_layer,
            layers=layers,
            tables=[features[layer] for layer in layers],
            own=[{name: own[layer, name] for name in places} for layer in layers],
            weights=[weights.get(layer, {}) for layer in layers],
            spans=places,
        )
        yield ds["features"], measure


def _attended(
    runs: Sequence[xr.Dataset], spans: Sequence[Mapping[str, SpanPlaces]]
) -> Iterator[dict[int, dict[str, np.ndarray]]]:
    """Yield each trace's attention to spans, by layer: what :func:`_attention_to` returns."""
    wanted = [any(len(place.keys) for place in places.values()) for places in spans]
    arrays = [attention(ds, "mean") for ds in runs]
    found = each_layer(
        (array, partial(_attention_to, spans=places))
        for array, places, want in zip(arrays, spans, wanted, strict=True)
        if want
    )
    for array, want in zip(arrays, wanted, strict=True):
        yield dict(zip(array.indexes["layer"].tolist(), next(found), strict=True)) if want else {}


def _attention_to(
    layer: np.ndarray, _at: int, *, spans: Mapping[str, SpanPlaces]
) -> dict[str, np.ndarray]:
    """Return the mean attention to each span's tokens, wherever it is moved ``(place, query)``."""
    return {
        name: layer[place.rows].T[place.keys].mean(1)
        for name, place in spans.items()
        if len(place.keys)
    }


def _measure_layer(
    layer: np.ndarray,
    at: int,
    *,
    layers: Sequence[int],
    tables: Sequence[np.ndarray],
    own: Sequence[Mapping[str, np.ndarray]],
    weights: Sequence[Mapping[str, np.ndarray]],
    spans: Mapping[str, SpanPlaces],
) -> dict[tuple[str, str], SpanMeasures]:
    """Measure the table's features in ``(query, feature)``; nothing if the layer is missing."""
    features = tables[at]
    if missing_rows(layer).all() or not len(features):
        return {}
    if features[-1] >= layer.shape[1] or features[0] < 0:
        raise ConfigError(
            f"the table names feature {features[-1]} of layer {layers[at]}",
            why=f"The SAE of that layer has {layer.shape[1]} latents, counted from 0.",
            remedy="Take a table that was made with the same SAEs.",
        )
    firing = np.flatnonzero(np.any(layer != 0, axis=0)[features])
    values = np.abs(layer[:, features[firing]].astype(np.float64))
    found = {}
    ranks = np.empty((0, len(firing)))
    for name, place in spans.items():
        is_own = own[at][name][:, firing]
        if name in weights[at]:
            # The same for all spans. Half numbers around 0: their sums are exact, so that what does
            # not vary has a spread of 0.
            if not len(ranks):
                ranked = values[place.ranked]
                ranks = stats.rankdata(ranked, axis=0) - (len(ranked) + 1) / 2
            found["attention", name] = _follows(weights[at][name], ranks, place, firing, is_own)
        if place.counted.any():
            found["place", name] = _stands(values, place, firing, is_own)
    return found


def _follows(
    weights: np.ndarray, ranks: np.ndarray, place: SpanPlaces, firing: np.ndarray, own: np.ndarray
) -> SpanMeasures:
    """Compare how features follow attention to the span, and to each place it is moved to.

    Parameters
    ----------
    weights
        Attention ``(place, query)``.
    ranks
        Ranks of strength over the whole prompt ``(query, feature)``.
    place
        The span.
    firing
        Numbers of the features in the table ``(feature,)``.
    own
        Which go with each pair's word ``(pair, feature)``.
    """
    behind = len(ranks) - place.after
    attended = _suffix_ranks(weights, place.after)
    sums, squares = (
        np.cumsum(power[::-1], axis=0)[::-1][place.after] for power in (ranks, ranks**2)
    )
    spread = np.sqrt((squares * behind[:, None] - sums**2) / behind[:, None])
    defined = (spread > 0) & ~np.isnan(attended[:, -1:])
    rho = np.divide(attended @ ranks, spread, out=np.zeros(defined.shape), where=defined)
    with np.errstate(invalid="ignore"):
        own_mean, other_mean = (
            (rho @ group.T) / (defined.astype(np.float64) @ group.T)
            for group in (own.astype(np.float64), (~own).astype(np.float64))
        )
    # Coefficients of few tokens vary more: their variance is 1 / (n - 1) by chance.
    profiles = (own_mean - other_mean) * np.sqrt(behind - 1)[:, None]
    means = np.column_stack([own_mean[0], other_mean[0]])
    return SpanMeasures(firing[defined[0]], means, profiles.T)


def _suffix_ranks(weights: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Rank each row from its own first column on: centred, of length 1, 0 before it.

    NaN if it does not vary.
    """
    is_behind = np.arange(weights.shape[1]) >= first[:, None]
    ranks = stats.rankdata(np.where(is_behind, weights, -np.inf), axis=1)
    ranks -= (first + weights.shape[1] + 1)[:, None] / 2
    ranks *= is_behind
    length = np.sqrt((ranks**2).sum(1, keepdims=True))
    return np.asarray(np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0))


def _stands(
    values: np.ndarray, place: SpanPlaces, firing: np.ndarray, own: np.ndarray
) -> SpanMeasures:
    """Compare how features stand out at the span, and at each place it is moved to."""
    strength = _standardised(values[place.counted])
    defined = ~np.isnan(strength[0])
    strength, own = strength[:, defined], own[:, defined]
    weights = _at_place(place)
    groups = np.stack([own, ~own]).astype(np.float64)
    with np.errstate(invalid="ignore"):
        groups /= groups.sum(-1, keepdims=True)  # NaN without any
    means = (groups @ (weights @ strength)).T
    differences = strength @ (groups[0] - groups[1]).T
    return SpanMeasures(firing[defined], means, shifted_products(weights, differences))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Divide by the standard deviation over tokens; NaN for a feature that does not vary."""
    spread = values.std(0)
    out = np.full_like(values, np.nan)
    return np.asarray(np.divide(values, spread, out=out, where=spread > 0))


def _at_place(place: SpanPlaces) -> np.ndarray:
    """Return the weights whose sum is the mean at the span minus the mean elsewhere."""
    tokens = place.tokens[place.counted]
    return np.asarray(np.where(tokens, 1 / tokens.sum(), -1 / (~tokens).sum()))
