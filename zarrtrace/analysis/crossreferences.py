"""Whether features that go with a word sit where attention goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.parallel import OfLayer, each_layer, together
from zarrtrace.analysis.resampling import TwoGroups, corrected, spearman, two_groups
from zarrtrace.analysis.selecting import (
    Data,
    attention,
    described,
    has_span,
    require,
    require_places,
    span_names,
    stored_positions,
    stored_queries,
    token_labels,
    traces,
)
from zarrtrace.analysis.words import Table, all_layers, read_table
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

MEASURES = ("attention", "place")

# Tokens that can be ranked.
_FEWEST = 3


def crossreference(
    data: Data,
    table: Table,
    pairs: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
    *,
    top: int = 1,
    n_permutations: int = 999,
    seed: int = 0,
) -> xr.Dataset:
    """Whether features that go with a word sit where attention goes, and at the word's place.

    For every feature of the table, layer by layer, two measures, each averaged over the scenarios
    in which the feature fires:

    - ``"attention"``: over the tokens after the span whose attention is stored, Spearman's
      correlation of the feature's strength with the token's attention to the span (mean over
      heads, mean over the span's tokens). Undefined if these are fewer than three, so always for
      ``"decision"``.
    - ``"place"``: its mean strength at the span minus its mean at all other tokens, divided by
      the standard deviation over all tokens.

    Its strength is the magnitude of its activation, which some SAEs (AbsTopK) have negative.

    Then the features that go with the word are compared with the table's other features of that
    layer; the permutation test deals the same number of features out at random.

    Parameters
    ----------
    data
        A trace or a run with ``features`` and ``attention_mean``.
    table
        Features and their words, see :func:`read_table`. Words are compared without surrounding
        white space and case. From the same run, ``"place"`` is true by construction for words
        that the span itself holds: take a table made from other text to test it.
    pairs
        Which word to look for at which span: ``{"balance": "balance", "stop": "decision"}``.
        If None: every span by its own name, and every option (bet, stop) at the decision, where
        the table has the word.
    top
        A feature goes with its `top` best-scored words that have a score above 0.
    n_permutations, seed
        As for :func:`contrast`.

    Returns
    -------
    xr.Dataset
        ``(measure, pair, layer)``, with coordinates ``word`` and ``span`` along ``pair``:
        ``mean`` of the measure over the word's features, ``mean_others``, ``cohens_d``,
        ``p_permutation``, ``q_permutation`` (Benjamini & Hochberg 1995, over all of the result),
        ``n_features``, ``n_others`` (those that fire). NaN where either has fewer than two.
        Computed at the call, scenario by scenario, from ``features`` whole.

    Raises
    ------
    ConfigError
        If a trace lacks features or attention, the table is not one, or has none of the words.
    ScenarioError
        If no scenario has a span of `pairs`.
    """
    frame = read_table(table)
    runs = traces(data)
    for ds in runs.values():
        require(ds, "features", "attention_mean")
    frame = _own_words(frame, top)
    wanted = _pairs(data, frame, pairs)
    require_places(data, [span for _, span in wanted])
    layers = all_layers(runs.values())
    shape = (len(MEASURES), len(wanted), len(layers))
    names = ("mean", "mean_others", "cohens_d", "p_permutation")
    out = {name: np.full(shape, np.nan) for name in names}
    sizes = {name: np.zeros(shape, np.int64) for name in ("n_features", "n_others")}
    by_layer = {layer: frame[frame["layer"] == layer] for layer in layers}
    tables = {layer: np.unique(here["feature"].to_numpy()) for layer, here in by_layer.items()}
    measured = _measure(list(runs.values()), tables, sorted({span for _, span in wanted}))
    cells: list[tuple[int, int, int]] = []

    def tests() -> Iterator[Callable[[], TwoGroups]]:
        where = product(enumerate(layers), enumerate(wanted), range(len(MEASURES)))
        for (at, layer), (number, (word, span)), which in where:
            here = by_layer[layer]
            own = np.isin(tables[layer], here["feature"][here["word"] == word].to_numpy())
            values = measured[layer, span][:, which]
            fires = ~np.isnan(values)
            cell = which, number, at
            sizes["n_features"][cell] = (own & fires).sum()
            sizes["n_others"][cell] = (~own & fires).sum()
            if min(sizes["n_features"][cell], sizes["n_others"][cell]) >= 2:
                cells.append(cell)
                yield partial(
                    two_groups,
                    values[fires, None],
                    own[fires],
                    n_permutations=n_permutations,
                    seed=seed,
                )

    for found, cell in zip(together(tests()), cells, strict=True):
        statistics = (found.mean_a, found.mean_b, found.cohens_d, found.p_permutation)
        for name, value in zip(names, statistics, strict=True):
            out[name][cell] = value[0]
    out["q_permutation"] = corrected(out["p_permutation"])
    dims = ("measure", "pair", "layer")
    result = xr.Dataset(
        {name: (dims, value) for name, value in {**out, **sizes}.items()},
        coords={
            "measure": list(MEASURES),
            "pair": [f"{word} @ {span}" for word, span in wanted],
            "word": ("pair", [word for word, _ in wanted]),
            "span": ("pair", [span for _, span in wanted]),
            "layer": layers,
        },
    )
    return described(
        result,
        data,
        "crossreference",
        "features of a word against the table's other features: Spearman correlation of strength "
        "with attention to the span over the tokens after it, and standardised difference of "
        "strength at the span and elsewhere; two-sided permutation of features (Phipson & Smyth "
        "2010), q by Benjamini & Hochberg (1995)",
        pairs=[list(pair) for pair in wanted],
        top=top,
        n_permutations=n_permutations,
        seed=seed,
    )


def _plain(word: str) -> str:
    return word.strip().casefold()


def _own_words(frame: pd.DataFrame, top: int) -> pd.DataFrame:
    """Keep each feature's best words, in plain form."""
    frame = frame.assign(word=frame["word"].map(_plain))
    best = frame.sort_values(["layer", "feature", "score"], ascending=[True, True, False])
    best = best.drop_duplicates(["layer", "feature", "word"])
    rank = best.groupby(["layer", "feature"]).cumcount()
    # Features without a word of their own stay: they are what the others are compared with.
    return best.assign(word=best["word"].where((rank < top) & (best["score"] > 0)))


def _pairs(
    data: Data, frame: pd.DataFrame, given: Mapping[str, str] | Sequence[tuple[str, str]] | None
) -> list[tuple[str, str]]:
    words = set(frame["word"].dropna())
    if given is not None:
        asked = list(given.items()) if isinstance(given, Mapping) else list(given)
        found = [(_plain(word), span) for word, span in asked]
        absent = [word for word, _ in found if word not in words]
    else:
        options = [n for ds in traces(data).values() for n in ds.attrs.get("options", ())]
        asked = [(name, name) for name in span_names(data) if name != DECISION]
        asked += [(name, DECISION) for name in dict.fromkeys(options)]
        found = [(_plain(word), span) for word, span in asked if _plain(word) in words]
        absent = [] if found else [word for word, _ in asked]
    if absent or not found:
        raise ConfigError(
            "no feature of the table goes with the word " + " or ".join(map(repr, absent)),
            why=f"The table has words for {frame['feature'].nunique()} features.",
            remedy="Give pairs={word: span} with words of the table, or a larger `top`.",
        )
    return found


class _Span(NamedTuple):
    """Where a span is in a prompt.

    Attributes
    ----------
    tokens, keys
        Those of the span, among the stored ones ``(query,)`` and among all ``(key,)``, bool.
    after
        Stored tokens behind it whose attention is stored ``(query,)`` bool; none if they are too
        few to be ranked.
    rows
        Numbers of their rows in the stored attention, in the order of the tokens.
    """

    tokens: np.ndarray
    keys: np.ndarray
    after: np.ndarray
    rows: np.ndarray


def _spans(ds: xr.Dataset, names: Sequence[str]) -> dict[str, _Span]:
    found = {}
    at, stored = np.asarray(ds["query"].values), pd.Index(stored_queries(ds))
    for name in names:
        if has_span(ds, name):
            span = stored_positions(ds, name)
            after = (at > max(span)) & np.isin(at, stored)
            after &= after.sum() >= _FEWEST
            found[name] = _Span(
                np.isin(at, span),
                np.isin(token_labels(ds), span),
                after,
                stored.get_indexer(at[after]),
            )
    return found


def _measure(
    runs: Sequence[xr.Dataset], tables: Mapping[int, np.ndarray], names: Sequence[str]
) -> dict[tuple[int, str], np.ndarray]:
    """Return both measures of every feature of the table ``(feature, measure)``.

    Parameters
    ----------
    runs
        The traces.
    tables
        By layer, the table's features, ascending.
    names
        Of spans.

    Returns
    -------
    dict
        By layer and span.
    """
    shapes = {(n, name): (len(tables[n]), len(MEASURES)) for n in tables for name in names}
    total = {key: np.zeros(shape) for key, shape in shapes.items()}
    seen = {key: np.zeros(shape) for key, shape in shapes.items()}
    having = [ds for ds in runs if any(has_span(ds, name) for name in names)]
    for ds, found in zip(having, each_layer(_jobs(having, tables, names)), strict=True):
        for layer, measured in zip(ds.indexes["layer"].tolist(), found, strict=True):
            for name, values in measured.spans.items():
                defined = ~np.isnan(values)
                total[layer, name][measured.firing] += np.where(defined, values, 0)
                seen[layer, name][measured.firing] += defined
    with np.errstate(invalid="ignore"):
        return {key: total[key] / seen[key] for key in total}


def _jobs(
    runs: Sequence[xr.Dataset], tables: Mapping[int, np.ndarray], names: Sequence[str]
) -> Iterator[tuple[xr.DataArray, OfLayer[_Measured]]]:
    """Yield what to do with the features of each trace."""
    spans = [_spans(ds, names) for ds in runs]
    for ds, places, weights in zip(runs, spans, _attended(runs, spans), strict=True):
        layers = ds.indexes["layer"].tolist()
        measure = partial(
            _measure_layer,
            layers=layers,
            tables=[tables[layer] for layer in layers],
            weights=[weights.get(layer, {}) for layer in layers],
            spans=places,
        )
        yield ds["features"], measure


def _attended(
    runs: Sequence[xr.Dataset], spans: Sequence[Mapping[str, _Span]]
) -> Iterator[dict[int, dict[str, np.ndarray]]]:
    """Yield each trace's attention to spans, by layer: what :func:`_attention_to` returns."""
    wanted = [any(place.after.any() for place in places.values()) for places in spans]
    arrays = [attention(ds, "mean") for ds in runs]
    found = each_layer(
        (array, partial(_attention_to, spans=places))
        for array, places, want in zip(arrays, spans, wanted, strict=True)
        if want
    )
    for array, want in zip(arrays, wanted, strict=True):
        yield dict(zip(array.indexes["layer"].tolist(), next(found), strict=True)) if want else {}


def _attention_to(
    layer: np.ndarray, _at: int, *, spans: Mapping[str, _Span]
) -> dict[str, np.ndarray]:
    """Return the mean attention to each span's tokens of the tokens after it."""
    return {
        name: layer[np.ix_(place.rows, place.keys)].mean(1, dtype=np.float64)
        for name, place in spans.items()
        if len(place.rows)
    }


class _Measured(NamedTuple):
    """Both measures in one layer of one trace.

    Attributes
    ----------
    firing
        Which of the table's features fire.
    spans
        By span, ``(firing, measure)``.
    """

    firing: np.ndarray
    spans: dict[str, np.ndarray]


def _measure_layer(
    layer: np.ndarray,
    at: int,
    *,
    layers: Sequence[int],
    tables: Sequence[np.ndarray],
    weights: Sequence[Mapping[str, np.ndarray]],
    spans: Mapping[str, _Span],
) -> _Measured:
    """Measure the table's features in ``(query, feature)``; none if the layer is missing."""
    features = tables[at]
    if np.isnan(layer[0, 0]) or not len(features):
        return _Measured(np.empty(0, np.int64), {})
    if features[-1] >= layer.shape[1] or features[0] < 0:
        raise ConfigError(
            f"the table names feature {features[-1]} of layer {layers[at]}",
            why=f"The SAE of that layer has {layer.shape[1]} latents, counted from 0.",
            remedy="Take a table that was made with the same SAEs.",
        )
    firing = np.flatnonzero(np.any(layer != 0, axis=0)[features])
    values = np.abs(layer[:, features[firing]].astype(np.float64))
    found = {
        name: np.column_stack(
            [_follows(weights[at].get(name), values[place.after]), _at_place(place.tokens, values)]
        )
        for name, place in spans.items()
    }
    return _Measured(firing, found)


def _follows(weights: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """Rank correlation, over tokens, with attention from them ``(feature,)``."""
    return np.full(values.shape[1], np.nan) if weights is None else spearman(weights, values)


def _at_place(tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Standardised difference between the span and elsewhere ``(feature,)``."""
    if tokens.all():
        return np.full(values.shape[1], np.nan)
    difference = values[tokens].mean(0) - values[~tokens].mean(0)
    spread = values.std(0)
    out = np.full(values.shape[1], np.nan)
    return np.asarray(np.divide(difference, spread, out=out, where=spread > 0))
