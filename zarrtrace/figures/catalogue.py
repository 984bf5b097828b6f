"""Catalogue of a run's figures: title, caption, and the analysis shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from zarrtrace import analysis
from zarrtrace.analysis.bands import attention_of_decision
from zarrtrace.analysis.positions import spans_before
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import Data, tags, traces
from zarrtrace.errors import ScenarioError
from zarrtrace.figures import contrasts, features, flow, heatmaps, integrated, layers
from zarrtrace.index import names_of, read_labels
from zarrtrace.scenarios import DECISION
from zarrtrace.storage import Location
from zarrtrace.store import open_run, read_run

#: Scenarios that figures over scenarios take, at most.
MOST_COMPARED = 1000
# Features that get a bar each, and those that may have a name in the volcano plot: reading the
# words of one from the index takes 50 ms.
_FEATURES_DRAWN, _FEATURES_NAMED = 8, 12


@functools.lru_cache(maxsize=1)
def open_compared(path: Location) -> xr.DataTree:
    """Open the scenarios of a run that figures compare, once a process."""
    names = read_run(path).attributes.scenarios
    return open_run(path, scenarios=evenly_spaced(names, MOST_COMPARED))


def forget() -> None:
    """Drop what is kept of a run that may have been replaced since."""
    for kept in (open_compared, _features_contrast, _words, _labels):
        kept.cache_clear()


def evenly_spaced(names: Sequence[str], most: int) -> Sequence[str]:
    """Return at most so many names, evenly spaced."""
    if len(names) <= most:
        return names
    return [names[number * len(names) // most] for number in range(most)]


def default_groups(data: Data) -> dict[str, list[str]]:
    """Return the two groups of scenarios to compare, by tag.

    The two tags that most scenarios have, each without the scenarios that have both; nothing if
    there are not two such groups.
    """
    members: dict[str, list[str]] = {}
    for name, ds in traces(data).items():
        for tag in tags(ds):
            members.setdefault(tag, []).append(name)
    pair = sorted(members, key=lambda tag: -len(members[tag]))[:2]
    if len(pair) < 2:
        return {}
    both = set(members[pair[0]]) & set(members[pair[1]])
    groups = {tag: [name for name in members[tag] if name not in both] for tag in pair}
    return groups if all(groups.values()) else {}


def strongest_layer(ds: xr.Dataset) -> int:
    """Return the layer in which the decision attends most to the spans."""
    strength = attention_of_decision(ds, spans_before(ds, [DECISION]))
    if strength is None:
        require(ds, "attention_mean")
        return int(np.asarray(ds["layer"])[-1])
    return int(strength.fillna(0).idxmax("layer"))


@dataclass(frozen=True)
class Drawing:
    """A figure of the set.

    `make` takes the run's path and the run or trace; it returns the figure and the data it shows.
    """

    key: str
    title: str
    caption: str
    make: Callable[..., tuple[Figure, Any]]
    has_special: bool = False
    needs_bands: bool = False


def _two_groups(run: xr.DataTree) -> tuple[str, str]:
    groups = default_groups(run)
    if not groups:
        raise ScenarioError(
            "the run has no two groups of scenarios to compare",
            why="Groups are tags, and fewer than two tags have scenarios of their own.",
        )
    first, second = groups
    return first, second


def _contrast(run: xr.DataTree, **options: Any) -> xr.Dataset:
    groups = [default_groups(run)[name] for name in _two_groups(run)]
    return analysis.contrast(run, *groups, **options)


def _pathways(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.attention_to(run)
    groups = default_groups(run) or None
    return layers.pathway_strength(result, groups=groups, bands=run.attrs.get("bands")), result


def _critical(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.critical_layers(run)
    return contrasts.critical_chart(result), result


def _difference(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = _contrast(run, what="attention")
    return contrasts.difference_map(result, names=_two_groups(run)), result


def _difference_heads(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = _contrast(run, what="attention", heads="each")
    return contrasts.difference_heads(result, names=_two_groups(run)), result


def _names(path: Location, contrast: xr.Dataset) -> dict[tuple[int, int], str]:
    """Name the features of a contrast by labels, else by words."""
    layers, found = (contrast[name].values.tolist() for name in ("layer", "feature"))
    return names_of(path, zip(layers, found, strict=True))


@functools.lru_cache(maxsize=1)
def _features_contrast(path: Location) -> xr.Dataset:
    return _contrast(open_compared(path))


def _volcano(path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = _features_contrast(path)
    groups, labels = _two_groups(run), _names(path, result.isel(row=slice(_FEATURES_NAMED)))
    return contrasts.volcano(result, names=groups, labels=labels), result


def _trajectory(path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    strongest = _features_contrast(path).isel(row=slice(_FEATURES_DRAWN))
    pairs = zip(
        strongest["layer"].values.tolist(), strongest["feature"].values.tolist(), strict=True
    )
    result = analysis.feature_trajectory(run, list(pairs))
    groups, labels = default_groups(run), _names(path, strongest)
    return features.trajectory(result, groups=groups, labels=labels), result


def _locality(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.attention_locality(run)
    return layers.locality(result, bands=run.attrs.get("bands")), result


def _bands(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.layer_bands(run)
    return layers.bands(result, groups=default_groups(run) or None), result


OF_RUN = (
    Drawing("pathways", "Pathways to the decision",
             "Attention of the decision to one token of each span, by layer, mean over heads. "
             "Thin: scenarios; thick: means of groups.", _pathways),
    Drawing("critical", "Critical layers",
             "Attention to a span as a multiple of what the tokens beside it get (log₂; dots: more "
             "than placebo groups of tokens of the same prompts, Benjamini–Hochberg).",
             _critical),
    Drawing("bands", "Hypothesised bands",
             "Whether attention is local, then about the task, then about the decision. Dashed: "
             "means of bands; below the name, how much the hypothesised band exceeds the others, "
             "with its 95 % interval over scenarios, and p over places of the bands.", _bands,
             needs_bands=True),
    Drawing("locality", "Locality of attention",
             "How far back attention reaches, by layer: mean over heads and scenarios, and the "
             "range of heads. Shaded, if the suite file states any: bands of layers.", _locality),
    Drawing("difference", "Difference map",
             "Attention of the decision to the spans, one group less the other. Dots: "
             "p_familywise of zarrtrace analyze contrast, as in the plot of features.",
             _difference),
    Drawing("heads", "Difference by head",
             "As the difference map, for every head.", _difference_heads),
    Drawing("volcano", "Features that separate the groups",
             "Every feature active at the decision. Names are layer · latent index. Heights are "
             "Welch's p-values, which assume normal activations; colours are corrected p-values, "
             "p_familywise of zarrtrace analyze contrast.", _volcano),
    Drawing("trajectory", "Activation of the strongest such features",
             "At the decision: means of the groups, and a dot a scenario. A bar each, because SAEs "
             "of two layers share no features.", _trajectory),
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _words(path: Location, *, special: bool) -> xr.Dataset:
    return analysis.word_associations(open_compared(path), strip=True, special=special)


@functools.lru_cache(maxsize=1)
def _labels(path: Location) -> dict[tuple[int, int], str]:
    found = read_labels(path, array="features")
    keys = zip(found["layer"].tolist(), found["feature"].tolist(), strict=True)
    return dict(zip(keys, found["label"].tolist(), strict=True))


def _integrated(path: Location, ds: xr.Dataset, *, special: bool) -> tuple[Figure, Any]:
    require(ds, "attention_mean", "features")
    words, labels = _words(path, special=special), _labels(path)
    return integrated.integrated_view(ds, words=words, labels=labels, special=special), ds


def _timeline(_path: Location, ds: xr.Dataset, *, special: bool) -> tuple[Figure, Any]:
    return features.feature_timeline(ds, special=special), ds


OF_SCENARIO = (
    Drawing("integrated", "Features, words and tokens",
             "Above: attention of the decision to every token. Below: features active at a span "
             "and at the decision, strongest on the pathway, with the words that activate them "
             "most over the whole run.", _integrated, has_special=True),
    Drawing("layers", "Attention by layer",
             "Mean over heads, divided by what uniform attention would give; query downwards, key "
             "to the right; one scale for all layers.",
             lambda _, ds: (heatmaps.attention_layers(ds), ds)),
    Drawing("heads", "Heads of one layer",
             "The layer in which the decision attends most to the spans, divided by what uniform "
             "attention would give.",
             lambda _, ds: (heatmaps.attention_heads(ds, strongest_layer(ds)), ds)),
    Drawing("flow", "Attention flow",
             "Share of attention from span to span, layers downwards; left, apart, on the first "
             "token; right: rollout (Abnar & Zuidema 2020). Shares below 15 % of the largest, or "
             "below twice what uniform attention would give, are left out.",
             lambda _, ds: (flow.flow_diagram(ds), ds)),
    Drawing("timeline", "Feature timeline",
             "Activation of each token's strongest feature, by layer.",
             _timeline, has_special=True),
)  # fmt: skip
