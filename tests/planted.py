"""Runs in memory, as the store gives them, whose attention is noise with planted effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask
import dask.array as da
import fakes
import numpy as np
import xarray as xr

from zarrtrace.format.attributes import RunAttributes, SpanAttributes, ranges

#: The spans of every scenario, besides the decision: its last token.
SPANS = {
    "probability": (4, 5),
    "goal": (9, 10),
    "balance": (14, 15, 16),
    "choices": (20, 21),
}
TOKENS = 28
HEADS = 4
LAYERS = (1, 2, 3, 4, 5, 6)
BANDS = {"local": (1, 2), "task": (3, 4), "decision": (5, 6)}
SCENARIOS = tuple(f"{kind}_{i}" for kind in ("Risky", "Safe") for i in range(5))

#: Changes the scores of a layer, ``(head, query, key)``, before the softmax: (layer, scores).
Plant = Callable[[int, np.ndarray], None]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return causal attention of scores ``(head, query, key)``."""
    tokens = scores.shape[-1]
    scores = np.where(np.triu(np.ones((tokens, tokens), bool), 1), -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def make_trace(
    scenario: str = SCENARIOS[0],
    *,
    layers: Sequence[int] = LAYERS,
    tokens: int = TOKENS,
    spans: Mapping[str, Sequence[int]] = SPANS,
    seed: int = 0,
    missing: Sequence[int] = (),
    dtype: str = "float32",
    plants: Sequence[Plant] = (),
    token_ids: Sequence[int] | None = None,
) -> xr.Dataset:
    """Return one trace, loaded.

    Parameters
    ----------
    missing
        Layers that read as NaN, as from ``open_trace(missing="nan")``.
    token_ids
        No token repeats unless given.
    """
    rng = np.random.default_rng(seed)
    weights = np.empty((len(layers), HEADS, tokens, tokens), dtype)
    for i, layer in enumerate(layers):
        scores = rng.normal(0, 1, (HEADS, tokens, tokens))
        for plant in plants:
            plant(layer, scores)
        weights[i] = np.nan if layer in missing else softmax(scores)
    texts = np.asarray([f" t{i}" for i in range(tokens)], object)
    ids = np.arange(tokens) if token_ids is None else np.asarray(token_ids)
    attributes = fakes.make_trace_attributes(
        scenario,
        layers=tuple(layers),
        heads=HEADS,
        features=0,
        spans={
            name: SpanAttributes(characters=(), tokens=tuple(found))
            for name, found in {**spans, "decision": (tokens - 1,)}.items()
        },
    )
    return xr.Dataset(
        {
            "attention": (("layer", "head", "query", "key"), weights),
            "attention_mean": (("layer", "query", "key"), weights.mean(1, dtype=np.float32)),
        },
        coords={
            "layer": list(layers),
            "head": np.arange(HEADS),
            "query": np.arange(tokens),
            "key": np.arange(tokens),
            "query_token": ("query", texts),
            "key_token": ("key", texts),
            "token_id": ("key", ids.astype(np.uint32)),
        },
        attrs=attributes.model_dump(mode="json")
        | ({"missing_layers": ranges(sorted(missing))} if missing else {}),
    )


def make_run(
    scenarios: Sequence[str] = SCENARIOS,
    *,
    seed: int = 0,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **common: Any,
) -> xr.DataTree:
    """Return a run of traces, loaded; `changes` hold arguments of single scenarios."""
    changes = changes or {}
    return as_run(
        {
            name: make_trace(
                name, **{"seed": seed * 1000 + number, **common, **changes.get(name, {})}
            )
            for number, name in enumerate(scenarios)
        }
    )


def as_run(traces: Mapping[str, xr.Dataset]) -> xr.DataTree:
    """Return traces as a run."""
    attributes = RunAttributes(scenarios=tuple(traces), config={}, complete=True)
    root = xr.Dataset(attrs=attributes.model_dump(mode="json"))
    return xr.DataTree.from_dict({"/": root, **traces}, name="run")


def attend(
    queries: Sequence[int], keys: Sequence[int], layers: Sequence[int], *, by: float = 3.0
) -> Plant:
    """Return a plant that raises the scores from `queries` to `keys`."""

    def plant(layer: int, scores: np.ndarray) -> None:
        if layer in layers:
            scores[:, np.asarray(queries)[:, None], np.asarray(keys)] += by

    return plant


def attend_near(layers: Sequence[int], *, by: float = 2.0) -> Plant:
    """Return a plant that raises the scores of the five nearest tokens."""

    def plant(layer: int, scores: np.ndarray) -> None:
        if layer in layers:
            at = np.arange(scores.shape[-1])
            scores[:, np.abs(at[:, None] - at) <= 5] += by

    return plant


def chunked(data: Any, **chunks: int) -> Any:
    """Return the same data on dask, one block a layer as the store chunks it, and `chunks`."""
    if isinstance(data, xr.DataTree):
        return as_run(
            {n: chunked(child.to_dataset(), **chunks) for n, child in data.children.items()}
        )
    return data.assign(
        {
            name: array.chunk({d: n for d, n in {"layer": 1, **chunks}.items() if d in array.dims})
            for name, array in data.data_vars.items()
        }
    )


class CountingArray:
    """An array that counts the values read from it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim
        self.read = 0

    def __getitem__(self, key: Any) -> np.ndarray:
        found = np.asarray(self._values[key])
        self.read += found.size
        return found


def counting(ds: xr.Dataset) -> tuple[xr.Dataset, dict[str, CountingArray]]:
    """Return a trace on dask, one block a layer, and what counts the reading of its arrays."""
    counters = {str(name): CountingArray(array.values) for name, array in ds.data_vars.items()}
    lazy = {
        name: (ds[name].dims, da.from_array(counter, chunks=(1, *counter.shape[1:])))
        for name, counter in counters.items()
    }
    return ds.assign(lazy), counters


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


def nothing_computed() -> Any:
    """Return a context in which any computation by dask fails."""
    return dask.config.set(scheduler=_refuse)
