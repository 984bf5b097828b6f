"""Experiments on how often features of a word are said to sit where attention goes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import synthetic
import xarray as xr
from rates import Experiment

from zarrtrace import analysis
from zarrtrace.extraction import extract_run
from zarrtrace.store import open_run

TOKENS, OWN, OTHERS, LAYERS = 60, 8, 24, (1, 2)
SPAN = {"balance": (20, 21)}
_DEMO_LAYERS = [9, 25]


def _series(rng: np.random.Generator, features: int) -> np.ndarray:
    """Return activations that neighbouring tokens share, most of them 0 ``(token, feature)``."""
    values = rng.normal(size=(TOKENS + 2, features))
    smooth = values[:-2] + values[1:-1] + values[2:]
    return np.maximum(smooth - 1, 0).astype(np.float32)


def _prompt(name: str, rng: np.random.Generator, own: np.ndarray, others: np.ndarray) -> xr.Dataset:
    """Return a trace whose word's features fire together."""
    ds = synthetic.trace(
        name, tokens=TOKENS, layers=LAYERS, heads=1, features=None, spans=SPAN, seed=1
    )
    weights = np.tril(rng.gamma(0.5, size=(len(LAYERS), TOKENS, TOKENS)))
    ds["attention_mean"][:] = weights / weights.sum(-1, keepdims=True)
    noise = rng.uniform(0.8, 1.2, (TOKENS, OWN))
    features = np.column_stack([own[:, None] * noise, others]).astype(np.float32)
    dims = ("layer", "query", "feature")
    return ds.assign(features=(dims, np.stack([features] * len(LAYERS))))


def _table() -> pd.DataFrame:
    words = ["balance" if feature < OWN else "other" for feature in range(OWN + OTHERS)]
    rows = [(layer, f, word, 1.0) for layer in LAYERS for f, word in enumerate(words)]
    return pd.DataFrame(rows, columns=["layer", "feature", "word", "score"])


def _is_found(found: xr.Dataset, measure: str) -> bool:
    return bool((found["p_familywise"].sel(measure=measure) <= 0.05).any())


def fire_together(seed: int, *, measure: str, block: str | None) -> bool:
    """Draw four prompts whose span has nothing to do with the word; None: of one template."""
    rng = np.random.default_rng(seed)
    own, others = _series(rng, 1)[:, 0], _series(rng, OTHERS)
    prompts = []
    for number in range(4):
        if block:
            own, others = _series(rng, 1)[:, 0], _series(rng, OTHERS)
        prompts.append(_prompt(f"S{number}", rng, own, others))
    found = analysis.crossreference(
        synthetic.run(prompts), _table(), {"balance": "balance"}, block=block, n_permutations=199
    )
    return _is_found(found, measure)


def planted(seed: int, *, measure: str, block: str | None) -> bool:
    """Draw four prompts in which the word's features go with the span."""
    rng = np.random.default_rng(seed)
    prompts = []
    for number in range(4):
        ds = _prompt(f"S{number}", rng, _series(rng, 1)[:, 0], _series(rng, OTHERS))
        features = ds["features"].to_numpy().copy()
        for layer, attention in enumerate(ds["attention_mean"].to_numpy()):
            if measure == "attention":  # ranks that correlate by about 0.5
                attended = attention[22:, 20:22].mean(1).argsort().argsort() / 38
                noise = rng.uniform(0, 1.7, (38, OWN))
                features[layer, 22:, :OWN] = attended[:, None] + noise
            else:  # two standard deviations
                features[layer, 20:22, :OWN] += 2 * features[layer, :, :OWN].std(0)
        prompts.append(ds.assign(features=(ds["features"].dims, features)))
    found = analysis.crossreference(
        synthetic.run(prompts), _table(), {"balance": "balance"}, block=block, n_permutations=199
    )
    return _is_found(found, measure)


@lru_cache
def _demo() -> tuple[dict[str, xr.Dataset], pd.DataFrame, list[str]]:
    """Return the demo's traces, its own table of words, and words with several features."""
    with tempfile.TemporaryDirectory() as folder:
        extract_run(Path(folder) / "demo")
        run, arrays = open_run(Path(folder) / "demo"), ["features", "attention_mean"]
        traces = {
            name: child.to_dataset()[arrays].sel(layer=_DEMO_LAYERS).load()
            for name, child in run.children.items()
        }
        table = analysis.word_associations(run, top=1).to_dataframe().reset_index()
    table = table[table["layer"].isin(_DEMO_LAYERS)]
    counts = pd.crosstab(table["word"], table["layer"])
    return traces, table, list(counts.index[(counts >= 2).all(axis=1)])


def placebo(seed: int, *, measure: str, together: bool) -> bool:
    """Draw a word of the demo and two neighbouring tokens in place of a span."""
    rng = np.random.default_rng(seed)
    traces, table, words = _demo()
    word = words[rng.integers(len(words))]
    shared, moved = int(rng.integers(1, 95)), []
    for ds in traces.values():
        at = shared if together else int(rng.integers(1, ds.sizes["query"] - 12))
        spans = {"placebo": {"characters": [], "tokens": [at, at + 1]}}
        moved.append(synthetic.with_attributes(ds, spans=spans))
    found = analysis.crossreference(synthetic.run(moved), table, {word: "placebo"})
    return _is_found(found, measure)


def _each(draw: Callable[..., bool], data: str, **more: object) -> list[Experiment]:
    nominal = None if draw is planted else 0.05
    return [
        Experiment(
            f"`crossreference` p_familywise, {measure}",
            data,
            partial(draw, measure=measure, **more),
            nominal,
        )
        for measure in ("attention", "place")
    ]


_FOUR = "4 prompts of 60 tokens, 8 features of the word that fire together, 24 others"

EXPERIMENTS: tuple[Experiment, ...] = (
    *_each(fire_together, f"{_FOUR}, one template", block=None),
    *_each(fire_together, f"{_FOUR}, independent prompts, `block='scenario'`", block="scenario"),
    *_each(placebo, "the demo, its words, the same 2 random tokens of each prompt", together=True),
    *_each(placebo, "the demo, its words, 2 random tokens drawn in each prompt", together=False),
    *_each(
        planted,
        f"{_FOUR}; planted: rank correlation 0.5 with attention, or 2 SD at the span",
        block=None,
    ),
    *_each(
        planted,
        f"{_FOUR}, `block='scenario'`; planted: rank correlation 0.5, or 2 SD at the span",
        block="scenario",
    ),
)
