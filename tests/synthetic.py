"""Traces and runs in memory with chosen content, for analyses: no store, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import fakes
import numpy as np
import xarray as xr

from zarrtrace.format.attributes import ranges

WORDS = ("<s>", " balance", " is", " $", "90", " goal", " stop", " now", " bet", ":")


def trace(
    scenario: str,
    *,
    tokens: int = 12,
    layers: Sequence[int] = (1, 2, 3),
    heads: int | None = 2,
    features: int | None = 24,
    seed: int = 0,
    active: float = 0.3,
    tags: Sequence[str] = (),
    spans: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, int] | None = None,
) -> xr.Dataset:
    """Return a random trace; `heads` or `features` None leaves out those arrays."""
    rng = np.random.default_rng(seed)
    n = len(layers)
    texts = np.array([WORDS[i % len(WORDS)] for i in range(tokens)], dtype=object)
    arrays: dict[str, Any] = {}
    coords: dict[str, Any] = {
        "layer": list(layers),
        "query": np.arange(tokens),
        "query_token": ("query", texts),
        "key": np.arange(tokens),
        "key_token": ("key", texts),
        "token_id": ("key", np.arange(tokens, dtype=np.uint32) % len(WORDS)),
    }
    if heads:
        attention = np.stack(
            [fakes.make_attention(heads, tokens, seed=seed * 100 + layer) for layer in layers]
        )
        arrays["attention"] = (("layer", "head", "query", "key"), attention)
        arrays["attention_mean"] = (("layer", "query", "key"), attention.mean(1))
        coords["head"] = np.arange(heads)
    if features:
        dense = rng.exponential(2, (n, tokens, features)).astype(np.float32)
        dense[rng.random(dense.shape) >= active] = 0
        arrays["features"] = (("layer", "query", "feature"), dense)
        coords["feature"] = np.arange(features)
    logprob = -np.sort(rng.exponential(2, (tokens, 10)) + 2.4).astype(np.float32)
    arrays["next_token"] = (
        ("query", "rank"),
        np.stack([rng.permutation(30)[:10] for _ in range(tokens)]).astype(np.uint32),
    )
    arrays["next_token_logprob"] = (("query", "rank"), logprob)
    chosen = {"balance": (3, 4), "goal": (5,)} if spans is None else spans
    attributes = {
        "kind": "trace",
        "scenario": scenario,
        "tags": list(tags),
        "spans": {
            name: {"characters": [], "tokens": list(positions)}
            for name, positions in {**chosen, "decision": (tokens - 1,)}.items()
        },
        "options": {
            name: {"text": str(token), "token_id": token}
            for name, token in (options or {"bet": 3, "stop": 7}).items()
        },
        "layers": ranges(layers),
        "saes": {},
        "model": {"id": "fake/model"},
        "versions": {"zarrtrace": "0"},
    }
    return with_index(xr.Dataset(arrays, coords, attrs=attributes))


def with_index(ds: xr.Dataset) -> xr.Dataset:
    """Return a trace whose ``top_feature`` and ``top_activation`` fit its features."""
    if "features" not in ds:
        return ds
    dense = ds["features"].to_numpy()
    top = np.argsort(-dense, axis=-1, kind="stable")[..., :32]
    dims = ("layer", "query", "feature_rank")
    return ds.assign(
        top_feature=(dims, top.astype(np.uint32)),
        top_activation=(dims, np.take_along_axis(dense, top, axis=-1)),
    )


def run(traces: Sequence[xr.Dataset]) -> xr.DataTree:
    """Return a run of traces."""
    names = [ds.attrs["scenario"] for ds in traces]
    root = xr.Dataset(attrs={"kind": "run", "scenarios": names})
    return xr.DataTree.from_dict({"/": root, **dict(zip(names, traces, strict=True))})


def random_run(n: int = 6, **sizes: Any) -> xr.DataTree:
    """Return a run of scenarios of different lengths; the first half is risky, the rest safe."""
    return run(
        [
            trace(
                f"S{i}",
                **{
                    "tokens": 12 + i % 3,
                    "seed": i + 1,
                    "tags": ("risky",) if i < n // 2 else ("safe",),
                    **sizes,
                },
            )
            for i in range(n)
        ]
    )


def lazy(data: xr.DataTree) -> xr.DataTree:
    """Return a run whose arrays are dask's, a layer a block."""
    return data.map_over_datasets(lambda ds: ds.chunk({"layer": 1}) if "layer" in ds.dims else ds)


def change(data: xr.DataTree, **by_scenario: xr.Dataset) -> xr.DataTree:
    """Return a run with some traces replaced."""
    return run([by_scenario.get(name, child.to_dataset()) for name, child in data.children.items()])


def with_attributes(ds: xr.Dataset, **changes: Any) -> xr.Dataset:
    """Return a trace with other attributes."""
    return ds.assign_attrs(changes)


def with_queries(ds: xr.Dataset, queries: Sequence[int]) -> xr.Dataset:
    """Return a trace with attention of chosen queries only, in a dimension of their own."""
    names = ("attention", "attention_mean")
    chosen = {
        name: ds[name]
        .sel(query=list(queries))
        .reset_coords(drop=True)
        .rename(query="attention_query")
        for name in names
    }
    return ds.drop_vars(names).assign(chosen)


def without_span(ds: xr.Dataset, name: str) -> xr.Dataset:
    """Return a trace without a span."""
    spans = {k: v for k, v in ds.attrs["spans"].items() if k != name}
    return with_attributes(ds, spans=spans)


def without_layer(ds: xr.Dataset, layer: int) -> xr.Dataset:
    """Return a trace in which a layer is not stored: NaN that the reader gives a name to."""
    return with_nan(ds, layer).assign_attrs(missing_layers=str(layer))


def with_nan(ds: xr.Dataset, layer: int) -> xr.Dataset:
    """Return a trace in which all values of a layer are NaN."""
    kept = ds["layer"] != layer
    arrays = ("features", "top_activation", "attention", "attention_mean")
    return ds.assign({name: ds[name].where(kept) for name in arrays if name in ds})
