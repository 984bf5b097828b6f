"""Whether features that go with a word sit where attention goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.parallel import OfLayer, each_layer
from zarrtrace.analysis.resampling import corrected
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
from zarrtrace.analysis.shifts import (
    Shifts,
    blocks_of,
    p_of_shifts,
    sentence_of_smallest,
    shifted_products,
    unit_ranks,
)
from zarrtrace.analysis.special import special_queries
from zarrtrace.analysis.words import Table, all_layers, missing_rows, read_table
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

MEASURES = ("attention", "place")

# Tokens that can be ranked.
_FEWEST = 3
_LEVEL = 0.05


def crossreference(
    data: Data,
    table: Table,
    pairs: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
    *,
    top: int = 1,
    block: str | None = None,
    special: bool = False,
    n_permutations: int = 999,
    seed: int = 0,
) -> xr.Dataset:
    """Whether features that go with a word sit where attention goes, and at the word's place.

    Two measures of every feature of the table, in every layer and scenario in which it fires:

    - ``"attention"``: over the tokens after the span whose attention is stored, Spearman's
      correlation of the feature's strength with the token's attention to the span (mean over
      heads, mean over the span's tokens). Undefined if these are fewer than three, so always for
      ``"decision"``.
    - ``"place"``: its mean strength at the span minus its mean at all other tokens, divided by
      the standard deviation over all tokens.

    Its strength is the magnitude of its activation, which some SAEs (AbsTopK) have negative.

    In each scenario, the mean over the features that go with the word is compared with the mean
    over the table's other features of that layer; the difference is averaged over scenarios.

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
    block
        Column of metadata, such as the template: scenarios that share its value are shifted
        together, others independently. ``"scenario"``: each by itself, for prompts that were
        written independently. If None, all are shifted together.
    special
        Whether to count special tokens (BOS, chat markers) outside the span, too.
    n_permutations, seed
        Shifts to draw if there are several blocks, and the seed of the random numbers.

    Returns
    -------
    xr.Dataset
        ``(measure, pair, layer)``, with coordinates ``word`` and ``span`` along ``pair``:
        ``mean`` of the measure over the word's features, ``mean_others``, ``difference``,
        ``p_permutation``, ``p_familywise`` (over the pair's layers), ``q_permutation`` (Benjamini
        & Hochberg 1995, over all of the result), ``n_features``, ``n_others`` (those that fire),
        ``n_scenarios`` (in which both do). NaN where none has both. Computed at the call, scenario
        by scenario, from ``features`` whole. Attributes: ``findings`` names the pairs with
        ``p_familywise`` of at most 0.05, ``limits`` says how small a p-value can be.

    Raises
    ------
    ConfigError
        If a trace lacks features or attention, the table is not one or has none of the words, or
        the scenarios have no metadata `block`.
    ScenarioError
        If no scenario has a span of `pairs`.

    Notes
    -----
    Null: where in a prompt the table's features fire has nothing to do with where the span is
    (``"place"``), or where attention goes to it (``"attention"``). Unit of exchange: the block of
    scenarios. A word's features fire together by construction, so they are not exchanged: each
    permutation moves all features of a prompt by the same number of tokens, in a circle, over the
    prompt's tokens or over those after the span. That keeps what features, neighbouring tokens and
    scenarios of one template have in common. The test is exact if activations are as likely at one
    place of the prompt as at another, and close to it otherwise.

    Floor: one block has as many shifts as its longest prompt has tokens, so p is at least 1/100
    for 100 tokens, however many scenarios it has; with several blocks, 1/(n_permutations + 1).
    """
    frame = _own_words(read_table(table), top)
    runs = traces(data)
    for ds in runs.values():
        require(ds, "features", "attention_mean")
    wanted = _pairs(data, frame, pairs)
    require_places(data, [span for _, span in wanted])
    blocks = blocks_of(data, block)
    words = _Words(frame, wanted, all_layers(runs.values()))
    spans = [_spans(ds, words.spans, special=special) for ds in runs.values()]
    shifts = _shifts(spans, words.spans, blocks, n_permutations, seed)
    out = _compare(list(runs.values()), words, spans, shifts)
    result = xr.Dataset(
        {name: (("measure", "pair", "layer"), value) for name, value in out.items()},
        coords={
            "measure": list(MEASURES),
            "pair": [f"{word} @ {span}" for word, span in wanted],
            "word": ("pair", [word for word, _ in wanted]),
            "span": ("pair", [span for _, span in wanted]),
            "layer": words.layers,
        },
    )
    result.attrs["findings"] = _findings(result)
    result.attrs["limits"] = sentence_of_smallest(list(shifts.values()), block)
    return described(
        result,
        data,
        "crossreference",
        "features of a word against the table's other features: Spearman correlation of strength "
        "with attention to the span over the tokens after it, and standardised difference of "
        "strength at the span and elsewhere; two-sided test by circular shifts of token positions, "
        "blocks of scenarios together (Phipson & Smyth 2010), familywise over a pair's layers "
        "(Westfall & Young 1993), q by Benjamini & Hochberg (1995)",
        pairs=[list(pair) for pair in wanted],
        top=top,
        block=block,
        special=special,
        n_permutations=n_permutations,
        seed=seed,
    )


def _findings(result: xr.Dataset) -> str:
    """Name the pairs that differ, with their layers."""
    found = result["p_familywise"]
    tests = int(np.isfinite(found).any("layer").sum())
    said = []
    for measure, pair in product(MEASURES, result["pair"].values.tolist()):
        p = found.sel(measure=measure, pair=pair)
        layers = result["layer"].values[np.asarray(p) <= _LEVEL].tolist()
        if layers:
            said.append(f"{pair} ({measure}) in layers {', '.join(map(str, layers))}")
    if not said:
        return f"In none of {tests} tests do a word's features differ from the others."
    return (
        f"In {len(said)} of {tests} tests, a word's features differ from the others "
        f"(p_familywise ≤ {_LEVEL}, over the layers of one test): {'; '.join(said)}."
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


class _Words:
    """The table's features by layer, and which of them go with each pair's word.

    Attributes
    ----------
    layers
        Ascending.
    spans
        Names of those that are asked for.
    features
        By layer, those of the table, ascending.
    """

    def __init__(
        self, frame: pd.DataFrame, wanted: Sequence[tuple[str, str]], layers: list[int]
    ) -> None:
        self.layers, self.wanted = layers, wanted
        self.spans = sorted({span for _, span in wanted})
        by_layer = {layer: frame[frame["layer"] == layer] for layer in layers}
        self.features = {n: np.unique(here["feature"].to_numpy()) for n, here in by_layer.items()}
        self._own = {
            n: np.array(
                [
                    np.isin(self.features[n], here["feature"][here["word"] == word].to_numpy())
                    for word, _ in wanted
                ]
            )
            for n, here in by_layer.items()
        }

    def pairs(self, span: str) -> list[int]:
        """Return the numbers of the pairs that look at a span."""
        return [number for number, (_, other) in enumerate(self.wanted) if other == span]

    def own(self, layer: int, span: str) -> np.ndarray:
        """Return which features go with the words of a span's pairs ``(pair, feature)``."""
        return self._own[layer][self.pairs(span)]


class _Span(NamedTuple):
    """Where a span is in a prompt.

    Attributes
    ----------
    tokens, keys
        Those of the span, among the stored ones ``(query,)`` and among all ``(key,)``, bool.
    counted
        Stored tokens that ``"place"`` compares ``(query,)`` bool: none if there are no others.
    after
        Stored tokens behind it whose attention is stored ``(query,)`` bool; none if they are too
        few to be ranked.
    rows
        Numbers of their rows in the stored attention, in the order of the tokens.
    """

    tokens: np.ndarray
    keys: np.ndarray
    counted: np.ndarray
    after: np.ndarray
    rows: np.ndarray


def _spans(ds: xr.Dataset, names: Sequence[str], *, special: bool) -> dict[str, _Span]:
    found = {}
    at, stored = np.asarray(ds["query"].values), pd.Index(stored_queries(ds))
    usual = np.ones(len(at), bool) if special else ~special_queries(ds)
    for name in names:
        if has_span(ds, name):
            span = stored_positions(ds, name)
            tokens = np.isin(at, span)
            after = (at > max(span)) & np.isin(at, stored) & usual
            after &= after.sum() >= _FEWEST
            counted = usual | tokens
            found[name] = _Span(
                tokens,
                np.isin(token_labels(ds), span),
                counted & (counted != tokens).any(),
                after,
                stored.get_indexer(at[after]),
            )
    return found


def _shifts(
    spans: Sequence[Mapping[str, _Span]],
    names: Sequence[str],
    blocks: np.ndarray,
    n_permutations: int,
    seed: int,
) -> dict[tuple[str, str], Shifts]:
    """Return the shifts by measure and span."""
    moved = {"attention": "after", "place": "counted"}
    return {
        (measure, name): Shifts(
            {
                number: int(getattr(places[name], which).sum())
                for number, places in enumerate(spans)
                if name in places
            },
            blocks,
            n_permutations,
            seed,
        )
        for (measure, which), name in product(moved.items(), names)
    }


def _compare(
    runs: Sequence[xr.Dataset],
    words: _Words,
    spans: Sequence[Mapping[str, _Span]],
    shifts: Mapping[tuple[str, str], Shifts],
) -> dict[str, np.ndarray]:
    """Return the columns of the result ``(measure, pair, layer)``."""
    shape = (len(MEASURES), len(words.wanted), len(words.layers))
    total = _Total(words, shifts, shape)
    having = [number for number, places in enumerate(spans) if places]
    jobs = _jobs([runs[n] for n in having], words, [spans[n] for n in having])
    for number, found in zip(having, each_layer(jobs), strict=True):
        for layer, of_spans in zip(runs[number].indexes["layer"].tolist(), found, strict=True):
            for (measure, span), one in of_spans.items():
                total.add(number, layer, measure, span, one)
    return total.columns()


class _Total:
    """Sums over scenarios, as they are measured: memory does not grow with their number."""

    def __init__(
        self,
        words: _Words,
        shifts: Mapping[tuple[str, str], Shifts],
        shape: tuple[int, int, int],
    ) -> None:
        self._words, self._shifts = words, shifts
        self._means = np.zeros((*shape, 2))
        self._scenarios = np.zeros(shape, np.int64)
        self._statistics = {
            (measure, pair): np.zeros((shape[2], shifts[measure, span].count))
            for measure, (pair, (_, span)) in product(MEASURES, enumerate(words.wanted))
        }
        self._fires = {
            (measure, span, layer): np.zeros(len(words.features[layer]), bool)
            for (measure, span), layer in product(shifts, words.layers)
        }

    def add(self, number: int, layer: int, measure: str, span: str, one: _Measured) -> None:
        """Add what was measured in one layer of a scenario."""
        which, at = MEASURES.index(measure), self._words.layers.index(layer)
        self._fires[measure, span, layer][one.defined] = True
        moved = self._shifts[measure, span].of(number)
        for pair, means, profile in zip(
            self._words.pairs(span), one.means, one.profiles, strict=True
        ):
            if not np.isnan(means).any():
                self._means[which, pair, at] += means
                self._scenarios[which, pair, at] += 1
                self._statistics[measure, pair][at] += profile[moved]

    def columns(self) -> dict[str, np.ndarray]:
        """Return means, differences, p-values and numbers ``(measure, pair, layer)``."""
        n = self._scenarios
        with np.errstate(invalid="ignore"):
            means = self._means / n[..., None]
        out = {"mean": means[..., 0], "mean_others": means[..., 1]}
        out["difference"] = out["mean"] - out["mean_others"]
        for name in ("p_permutation", "p_familywise"):
            out[name] = np.full(n.shape, np.nan)
        sizes = {name: np.zeros_like(n) for name in ("n_features", "n_others")}
        for (measure, pair), statistics in self._statistics.items():
            which, span = MEASURES.index(measure), self._words.wanted[pair][1]
            statistics = np.where(n[which, pair, :, None] > 0, statistics, np.nan)
            out["p_permutation"][which, pair], out["p_familywise"][which, pair] = p_of_shifts(
                statistics
            )
            for at, layer in enumerate(self._words.layers):
                fires = self._fires[measure, span, layer]
                own = self._words.own(layer, span)[self._words.pairs(span).index(pair)]
                sizes["n_features"][which, pair, at] = (fires & own).sum()
                sizes["n_others"][which, pair, at] = (fires & ~own).sum()
        out["q_permutation"] = corrected(out["p_permutation"])
        return {**out, **sizes, "n_scenarios": n}


class _Measured(NamedTuple):
    """One measure at one span, in one layer of one trace.

    Attributes
    ----------
    defined
        Which of the table's features have it.
    means
        Over each pair's own features, and over the others ``(pair, 2)``; NaN without any.
    profiles
        Their difference by how far the features are moved ``(pair, shift)``.
    """

    defined: np.ndarray
    means: np.ndarray
    profiles: np.ndarray


def _jobs(
    runs: Sequence[xr.Dataset], words: _Words, spans: Sequence[Mapping[str, _Span]]
) -> Iterator[tuple[xr.DataArray, OfLayer[dict[tuple[str, str], _Measured]]]]:
    """Yield what to do with the features of each trace."""
    for ds, places, weights in zip(runs, spans, _attended(runs, spans), strict=True):
        layers = ds.indexes["layer"].tolist()
        measure = partial(
            _measure_layer,
            layers=layers,
            tables=[words.features[layer] for layer in layers],
            own=[{name: words.own(layer, name) for name in places} for layer in layers],
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


def _measure_layer(
    layer: np.ndarray,
    at: int,
    *,
    layers: Sequence[int],
    tables: Sequence[np.ndarray],
    own: Sequence[Mapping[str, np.ndarray]],
    weights: Sequence[Mapping[str, np.ndarray]],
    spans: Mapping[str, _Span],
) -> dict[tuple[str, str], _Measured]:
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
    for name, place in spans.items():
        is_own = own[at][name][:, firing]
        if name in weights[at]:
            attended = unit_ranks(weights[at][name][:, None])[:, 0]
            ranks = unit_ranks(values[place.after])
            found["attention", name] = _measured(attended, ranks, firing, is_own)
        if place.counted.any():
            strength = _standardised(values[place.counted])
            found["place", name] = _measured(_at_place(place), strength, firing, is_own)
    return found


def _measured(
    weights: np.ndarray, series: np.ndarray, firing: np.ndarray, own: np.ndarray
) -> _Measured:
    """Compare own and other features: a measure is the sum of weights and a series.

    Parameters
    ----------
    weights
        ``(token,)``.
    series
        Of each feature ``(token, feature)``; NaN if it has not the measure.
    firing
        Numbers of the features in the table ``(feature,)``.
    own
        Which go with each pair's word ``(pair, feature)``.
    """
    defined = ~np.isnan(series[0]) & ~np.isnan(weights[0])
    series, own = series[:, defined], own[:, defined]
    both = np.stack([own, ~own]).astype(np.float64)
    with np.errstate(invalid="ignore"):
        both /= both.sum(-1, keepdims=True)  # NaN without any
    means = (both @ (weights @ series)).T
    differences = series @ (both[0] - both[1]).T
    return _Measured(firing[defined], means, shifted_products(weights, differences))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Divide by the standard deviation over tokens; NaN for a feature that does not vary."""
    spread = values.std(0)
    out = np.full_like(values, np.nan)
    return np.asarray(np.divide(values, spread, out=out, where=spread > 0))


def _at_place(place: _Span) -> np.ndarray:
    """Return the weights whose sum is the mean at the span minus the mean elsewhere."""
    tokens = place.tokens[place.counted]
    return np.where(tokens, 1 / tokens.sum(), -1 / (~tokens).sum())
