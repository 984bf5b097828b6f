"""Synthetic runs in memory, as the store gives them, with effects planted on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fakes
import numpy as np
import xarray as xr

from zarrtrace.spec import NAMESPACE, TOP_FEATURES, RunAttributes, SpanAttributes

#: What every planted scenario of the usual length has.
SPANS = {
    "probability": (4, 5),
    "goal": (9, 10),
    "balance": (14, 15, 16),
    "choices": (20, 21),
}
TOKENS = 28
HEADS = 4
FEATURES = 24
LAYERS = tuple(range(1, 7))
RISKY = tuple(f"Risky_{i}" for i in range(5))
SAFE = tuple(f"Safe_{i}" for i in range(5))
SCENARIOS = (*RISKY, *SAFE)

#: Changes the scores before the softmax, or the activations, in place: (name, layer, array).
Plant = Callable[[str, int, np.ndarray], None]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return causal attention of scores ``(head, query, key)``."""
    tokens = scores.shape[-1]
    scores = np.where(np.triu(np.ones((tokens, tokens), bool), 1), -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def make_trace(
    scenario: str = RISKY[0],
    *,
    layers: Sequence[int] = LAYERS,
    tokens: int = TOKENS,
    heads: int = HEADS,
    features: int = FEATURES,
    spans: Mapping[str, Sequence[int]] = SPANS,
    seed: int = 0,
    attention: bool = True,
    missing: Sequence[int] = (),
    dtype: str = "float32",
    plant_attention: Plant | None = None,
    plant_features: Plant | None = None,
    texts: Sequence[str] | None = None,
) -> xr.Dataset:
    """Return one trace, loaded: noise, and what the plants put into it.

    Parameters
    ----------
    features
        0 for an attention-only trace.
    attention
        False for a features-only trace.
    missing
        Layers that read as NaN, as from ``open_trace(missing="nan")``.
    texts
        Token texts; one of its own for every position unless given.
    """
    rng = np.random.default_rng(seed)
    names = list(texts) if texts is not None else [f" t{i}" for i in range(tokens)]
    data: dict[str, Any] = {}
    if attention:
        weights = np.empty((len(layers), heads, tokens, tokens), dtype)
        for i, layer in enumerate(layers):
            scores = rng.normal(0, 1, (heads, tokens, tokens))
            if plant_attention:
                plant_attention(scenario, layer, scores)
            weights[i] = np.nan if layer in missing else softmax(scores)
        data["attention"] = (("layer", "head", "query", "key"), weights)
        mean = weights.mean(1, dtype=np.float32)
        data["attention_mean"] = (("layer", "query", "key"), mean)
    if features:
        data |= _features(scenario, layers, tokens, features, rng, missing, plant_features)
    data |= _next_tokens(scenario, tokens, rng)
    return xr.Dataset(
        data,
        coords={
            "layer": list(layers),
            "query": np.arange(tokens),
            "query_token": ("query", np.asarray(names, object)),
            "token_id": ("query", _ids_of(names)),
            **({"head": np.arange(heads), "key": np.arange(tokens)} if attention else {}),
            **({"key_token": ("key", np.asarray(names, object))} if attention else {}),
            **({"feature": np.arange(features)} if features else {}),
        },
        attrs={
            NAMESPACE: fakes.make_trace_attributes(
                scenario,
                layers=tuple(layers),
                heads=heads if attention else 0,
                features=features,
                spans={
                    name: SpanAttributes(characters=(), tokens=tuple(found))
                    for name, found in {**spans, "decision": (tokens - 1,)}.items()
                },
                options=fakes_options(),
            ).model_dump(mode="json")
        },
    )


def fakes_options() -> dict[str, Any]:
    """Return the options of every planted scenario: token 1 is a bet, token 2 a stop."""
    return {
        "bet": {"text": "1", "token_id": 1},
        "stop": {"text": "2", "token_id": 2},
    }


def _features(
    scenario: str,
    layers: Sequence[int],
    tokens: int,
    features: int,
    rng: np.random.Generator,
    missing: Sequence[int],
    plant: Plant | None,
) -> dict[str, Any]:
    values = rng.exponential(1.0, (len(layers), tokens, features)).astype(np.float32)
    values[rng.random(values.shape) > 0.3] = 0
    for i, layer in enumerate(layers):
        if plant:
            plant(scenario, layer, values[i])
        if layer in missing:
            values[i] = np.nan
    rank = min(TOP_FEATURES, features)
    top = np.argsort(-values, axis=-1, kind="stable")[..., :rank]
    return {
        "features": (("layer", "query", "feature"), values),
        "top_feature": (("layer", "query", "feature_rank"), top.astype(np.uint32)),
        "top_activation": (
            ("layer", "query", "feature_rank"),
            np.take_along_axis(values, top, axis=-1),
        ),
    }


def _next_tokens(scenario: str, tokens: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return continuations: the ten most likely hold the options; risky scenarios bet more."""
    scores = rng.normal(0, 0.3, (tokens, 12))
    scores[:, 1] += 2.0 if "Risky" in scenario else 1.0
    scores[:, 2] += 1.0 if "Risky" in scenario else 2.0
    logprob = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    order = np.argsort(-logprob, axis=-1, kind="stable")[:, :10]
    return {
        "next_token": (("query", "rank"), order.astype(np.uint32)),
        "next_token_logprob": (
            ("query", "rank"),
            np.take_along_axis(logprob, order, -1).astype(np.float32),
        ),
    }


def _ids_of(texts: Sequence[str]) -> np.ndarray:
    ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return np.asarray([ids[text] for text in texts], np.uint32)


def make_run(
    scenarios: Sequence[str] = SCENARIOS,
    *,
    seed: int = 0,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **common: Any,
) -> xr.DataTree:
    """Return a run of planted traces, loaded; `changes` hold arguments of single scenarios."""
    changes = changes or {}
    children = {
        name: make_trace(
            name, **{"seed": seed * 10_000 + number, **common, **changes.get(name, {})}
        )
        for number, name in enumerate(scenarios)
    }
    root = xr.Dataset(
        attrs={
            NAMESPACE: RunAttributes(
                scenarios=tuple(scenarios), config={}, complete=True
            ).model_dump(mode="json")
        }
    )
    return xr.DataTree.from_dict({"/": root, **children}, name="run")


def attend(
    target: Sequence[int],
    source: Sequence[int],
    layers: Sequence[int],
    *,
    by: float = 4.0,
    heads: Sequence[int] | None = None,
    scenarios: Sequence[str] | None = None,
) -> Plant:
    """Return a plant that raises the scores from `target` queries to `source` keys by `by`."""

    def plant(scenario: str, layer: int, scores: np.ndarray) -> None:
        if layer in layers and (scenarios is None or scenario in scenarios):
            which = range(scores.shape[0]) if heads is None else heads
            scores[np.ix_(list(which), list(target), list(source))] += by

    return plant


def both(*plants: Plant) -> Plant:
    """Return a plant that does what all of `plants` do."""

    def plant(scenario: str, layer: int, values: np.ndarray) -> None:
        for one in plants:
            one(scenario, layer, values)

    return plant


def chunked(data: xr.DataTree | xr.Dataset) -> Any:
    """Return the same data backed by dask, one task a layer as the store chunks it."""
    if isinstance(data, xr.Dataset):
        return data.chunk({"layer": 1})
    out = {
        name: node.to_dataset() if node is data else node.to_dataset().chunk({"layer": 1})
        for name, node in [("/", data), *data.children.items()]
    }
    return xr.DataTree.from_dict(out, name=data.name)
