"""Whether features that go with a word sit where attention goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.parallel import each_layer
from zarrtrace.analysis.positions import require_places, span_names
from zarrtrace.analysis.resampling import corrected
from zarrtrace.analysis.results import described
from zarrtrace.analysis.shifts import Shifts, blocks_of, p_of_shifts, sentence_of_smallest
from zarrtrace.analysis.span_measures import SpanMeasures, SpanPlaces, measure_jobs, span_places
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import Data, traces
from zarrtrace.analysis.words import Table, all_layers, read_table
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

MEASURES = ("attention", "place")

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

    - ``"attention"``: over the tokens after the span whose attention is stored, the correlation of
      ranks of the feature's strength, among all such tokens of the prompt, with ranks of the
      token's attention to the span (mean over heads, mean over the span's tokens). Undefined if
      these are fewer than three, so always for ``"decision"``.
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
        Column of metadata, such as the template: scenarios that share its value are moved
        together, others independently. ``"scenario"``: each by itself, for prompts that were
        written independently. If None, all are moved together.
    special
        Whether to count special tokens (BOS, chat markers) outside the span, too.
    n_permutations, seed
        Permutations to draw if there are several blocks, and the seed of the random numbers.

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
    Null: where the span is in a prompt has nothing to do with where the table's features fire; had
    it been elsewhere, they would stand out there, or follow attention to there, as much. Unit of
    exchange: the block of scenarios. A word's features fire together by construction, so features
    are not exchanged: each permutation moves the span along the prompt, by the same number of
    tokens in all scenarios of a block, in a circle over its tokens (``"place"``), or over the 128
    nearest places that leave three tokens behind it (``"attention"``; there coefficients are
    multiplied by √(n − 1) of the n tokens behind, because those of few tokens vary more). That
    keeps what features, neighbouring tokens and scenarios of one template have in common, and how
    much a token attends to anything. A place behind which none of the word's features fire, or none
    of the others, has no measure: a sum over fewer scenarios is divided by the square root of
    their share, and a permutation without any does not count. The test is exact for a span whose
    place was drawn at random.

    Floor: one block has as many permutations as its longest prompt has places, so p is at least
    1/100 for 100 of them, however many scenarios it has; with several blocks, it is at least
    1/(n_permutations + 1).
    """
    frame = _own_words(read_table(table), top)
    runs = traces(data)
    for ds in runs.values():
        require(ds, "features", "attention_mean")
    wanted = _pairs(data, frame, pairs)
    require_places(data, [span for _, span in wanted])
    blocks = blocks_of(data, block)
    words = _Words(frame, wanted, all_layers(runs.values()))
    spans = [span_places(ds, words.spans, special=special) for ds in runs.values()]
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
        "features of a word against the table's other features: rank correlation of strength with "
        "attention to the span over the tokens after it, and standardised difference of strength "
        "at the span and elsewhere; two-sided test by moving the span along the prompts, blocks of "
        "scenarios together (Phipson & Smyth 2010), familywise over a pair's layers (Westfall & "
        "Young 1993), q by Benjamini & Hochberg (1995)",
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
    tests = int(np.isfinite(np.asarray(found)).any(found.get_axis_num("layer")).sum())
    said = []
    for measure, pair in product(MEASURES, result["pair"].to_numpy().tolist()):
        p = found.sel(measure=measure, pair=pair)
        layers = result["layer"].to_numpy()[np.asarray(p) <= _LEVEL].tolist()
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


def _shifts(
    spans: Sequence[Mapping[str, SpanPlaces]],
    names: Sequence[str],
    blocks: np.ndarray,
    n_permutations: int,
    seed: int,
) -> dict[tuple[str, str], Shifts]:
    """Return by how much spans are moved, by measure and span."""
    moved: dict[str, Callable[[SpanPlaces], int]] = {
        "attention": lambda span: len(span.keys),
        "place": lambda span: int(span.counted.sum()),
    }
    return {
        (measure, name): Shifts(
            {
                number: places_of(places[name])
                for number, places in enumerate(spans)
                if name in places
            },
            blocks,
            n_permutations,
            seed,
        )
        for (measure, places_of), name in product(moved.items(), names)
    }


def _compare(
    runs: Sequence[xr.Dataset],
    words: _Words,
    spans: Sequence[Mapping[str, SpanPlaces]],
    shifts: Mapping[tuple[str, str], Shifts],
) -> dict[str, np.ndarray]:
    """Return the columns of the result ``(measure, pair, layer)``."""
    shape = (len(MEASURES), len(words.wanted), len(words.layers))
    total = _Total(words, shifts, shape)
    having = [number for number, places in enumerate(spans) if places]
    own = {(n, span): words.own(n, span) for n in words.layers for span in words.spans}
    traced = [runs[n] for n in having]
    jobs = measure_jobs(traced, [spans[n] for n in having], words.features, own)
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
        self._defined = {key: np.zeros_like(one, np.int64) for key, one in self._statistics.items()}
        self._fires = {
            (measure, span, layer): np.zeros(len(words.features[layer]), bool)
            for (measure, span), layer in product(shifts, words.layers)
        }

    def add(self, number: int, layer: int, measure: str, span: str, one: SpanMeasures) -> None:
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
                there = profile[moved]
                self._statistics[measure, pair][at] += np.nan_to_num(there)
                self._defined[measure, pair][at] += ~np.isnan(there)

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
        for (measure, pair), sums in self._statistics.items():
            which, span = MEASURES.index(measure), self._words.wanted[pair][1]
            # A sum over fewer scenarios, in which features fire behind the place, varies less.
            with np.errstate(divide="ignore", invalid="ignore"):
                statistics = sums * np.sqrt(n[which, pair, :, None] / self._defined[measure, pair])
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
