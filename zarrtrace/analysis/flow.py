"""How what stands at a span can reach the decision through all layers up to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from zarrtrace.analysis.gaps import missing_layers
from zarrtrace.analysis.parallel import some_layers
from zarrtrace.analysis.positions import (
    Place,
    as_places,
    label,
    positions,
    present,
    require_places,
    require_queries,
    spans_before,
    token_labels,
)
from zarrtrace.analysis.results import described, per_scenario
from zarrtrace.analysis.trace_arrays import attention
from zarrtrace.analysis.traces import Data, scenario_of
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

# Capacities are whole numbers for scipy; 2**28 keeps sums into a node within 32 bits.
_UNIT = 2**28
# A graph of this many edges takes about 1 GB while its flow is sought.
_MOST_EDGES = 20_000_000


def attention_rollout(
    data: Data,
    source: Place | Sequence[Place] | None = None,
    target: Place = DECISION,
    *,
    residual: float = 0.5,
) -> xr.DataArray:
    """Attention rollout: the share of the target that comes from each source's input tokens.

    Parameters
    ----------
    data
        A trace or a run.
    source
        Spans, or positions, whose tokens are at the bottom; None takes every span but the
        decision.
    target
        Whose tokens are at the top: the mean over them.
    residual
        Weight of the residual connection, which carries a token on to itself.

    Returns
    -------
    xr.DataArray
        float64 ``([scenario,] [source,] layer)``, from 0 to 1: rolled out from the input of the
        trace's first layer up to the output of each layer; summed over the source's tokens.

    Raises
    ------
    ConfigError
        If there is no attention, a layer in between or a row of attention is missing, or
        `residual` is not within 0 to 1.
    ScenarioError
        If no scenario has a span.

    Notes
    -----
    Abnar & Zuidema (2020), *Quantifying Attention Flow in Transformers*: with A the mean over
    heads, Ã = `residual`·I + (1 − `residual`)·A with rows normalised, the product of Ã over the
    layers. It is built by applying one layer after the other to the sources' indicator vectors,
    which gives the same numbers and holds one layer at a time. If the trace does not begin with
    layer 0, neither does the rollout. A description of each scenario: no null hypothesis is tested.
    """
    return _through_layers(
        data,
        source,
        target,
        _rolled,
        "attention_rollout",
        "product over layers of residual·I + (1 − residual)·attention, mean over heads, rows "
        "normalised (Abnar & Zuidema 2020); summed over the source's tokens",
        residual=residual,
    )


def _rolled(
    layers: _Layers, keys: list[list[int]], queries: list[int], *, residual: float
) -> _Found:
    """Return the rollout from each source to the target's rows."""
    state: Any = np.zeros((layers.tokens, len(keys)))
    for column, found in enumerate(keys):
        state[found, column] = 1
    out = []
    for number, stretch in layers:
        states = _call(_roll, stretch, state, residual)
        state = _call(_last, states)
        out.append((number, _call(_mean_rows, states, queries)))
    return out


def _roll(layers: np.ndarray, state: np.ndarray, residual: float) -> np.ndarray:
    """Return the state after each layer ``(layer, token, source)``."""
    states = np.empty((len(layers), *state.shape))
    for number, layer in enumerate(layers):
        states[number] = state = _with_residual(layer, residual) @ state
    return states


def _last(states: np.ndarray) -> np.ndarray:
    return np.asarray(states[-1])


def _mean_rows(states: np.ndarray, rows: list[int]) -> np.ndarray:
    return np.asarray(states[:, rows].mean(1))


def attention_flow(
    data: Data,
    source: Place | Sequence[Place] | None = None,
    target: Place = DECISION,
    *,
    residual: float = 0.5,
) -> xr.DataArray:
    """Attention flow: the most that can flow from each source's tokens to the target.

    Parameters
    ----------
    data
        A trace or a run.
    source, target, residual
        As for :func:`attention_rollout`.

    Returns
    -------
    xr.DataArray
        float64 ``([scenario,] [source,] layer)``: the maximum flow from the source's tokens at
        the input of the trace's first layer to the target's tokens at the output of each layer,
        for one target token (from 0 to 1).

    Raises
    ------
    ConfigError
        As for :func:`attention_rollout`, and if the graph of a scenario would have more than
        20 million edges (about 1100 tokens at 31 layers), which takes over 1 GB.

    Notes
    -----
    Abnar & Zuidema (2020): tokens at each layer are nodes, Ã of :func:`attention_rollout` are the
    capacities. All tokens of a source feed one flow, and all tokens of the target take it.
    Capacities are rounded to 2⁻²⁸ for ``scipy.sparse.csgraph.maximum_flow`` (Dinic's algorithm).
    Time grows with the square of the number of layers. A description of each scenario: no null
    hypothesis is tested.
    """
    return _through_layers(
        data,
        source,
        target,
        _flowed,
        "attention_flow",
        "maximum flow through the graph of tokens by layer with capacities residual·I + "
        "(1 − residual)·attention, mean over heads (Abnar & Zuidema 2020)",
        residual=residual,
    )


def _flowed(
    layers: _Layers, keys: list[list[int]], queries: list[int], *, residual: float
) -> _Found:
    """Return the maximum flow from each source to the target's rows."""
    tokens = layers.tokens
    edges = layers.count * tokens * (tokens + 1) // 2
    if edges > _MOST_EDGES:
        raise ConfigError(
            f"attention flow through {layers.count} layers of {tokens} tokens needs a graph of "
            f"{edges:,} edges, more than {_MOST_EDGES:,}",
            why="Maximum flow has to hold all layers at once.",
            remedy="Take fewer layers (ds.sel(layer=...)), or attention_rollout.",
        )
    whole: list[Any] = [_call(_capacities, stretch, residual) for _, stretch in layers]
    return [(layers.count, _call(_flows, whole, keys, queries))]


def _capacities(layers: np.ndarray, residual: float) -> np.ndarray:
    """Return the capacities ``(layer, query, key)`` as whole numbers."""
    return np.stack(
        [np.rint(_with_residual(layer, residual) * _UNIT).astype(np.int32) for layer in layers]
    )


def _flows(stretches: list[np.ndarray], keys: list[list[int]], queries: list[int]) -> np.ndarray:
    """Return the maximum flows ``(layer, source)`` for one target token."""
    layers = np.concatenate(stretches)
    return np.stack([_flow(layers, found, queries) for found in keys], axis=1)


def _flow(layers: np.ndarray, sources: list[int], targets: list[int]) -> np.ndarray:
    """Return the maximum flow from some tokens to others, up to each layer ``(layer,)``."""
    # Attention looks back: nothing flows through tokens before the first source.
    first, last = min(sources), max(targets)
    starts = [token - first for token in sources if token <= last]
    ends = [token - first for token in targets if token >= first]
    if not ends:
        return np.zeros(len(layers))
    here = layers[:, first : last + 1, first : last + 1]
    values, heads, counts = _edges(here)
    tokens = last + 1 - first
    # The sources are one node, 0, that has all their edges: as rows are normalised, none exceeds 1,
    # however many tokens a source feeds.
    fed = here[0][:, starts].sum(1, dtype=np.int32)
    begins = np.flatnonzero(fed)
    out = np.empty(len(layers))
    for top in range(1, len(layers) + 1):
        # The last node takes from all targets.
        sink = 1 + (top + 1) * tokens
        edges = counts[: top * tokens].sum()
        takes = np.zeros(tokens, np.int64)
        takes[ends] = 1
        ends_at = np.cumsum([0, len(begins), *counts[: top * tokens], *takes, 0])
        unlimited = np.full(len(ends), _UNIT * 2 - 1, np.int32)
        to = [1 + tokens + begins, heads[:edges], np.full(len(ends), sink)]
        graph = csr_array(
            (
                np.concatenate([fed[begins], values[:edges], unlimited]),
                np.concatenate(to).astype(np.int32),
                ends_at.astype(np.int32),
            ),
            shape=(sink + 1, sink + 1),
        )
        out[top - 1] = maximum_flow(graph, 0, sink).flow_value / _UNIT / len(targets)
    return out


def _edges(layers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the edges of the graph of tokens, from each token of each layer to the next layer.

    Returns
    -------
    capacities, heads
        Capacity of each edge, and the node it leads to; token t at the input of layer l is node
        1 + l · tokens + t.
    counts
        Numbers of edges that leave each node.
    """
    onwards = np.triu(layers.swapaxes(1, 2))
    layer, key, query = np.nonzero(onwards)
    tokens = layers.shape[1]
    counts = np.bincount(layer * tokens + key, minlength=len(layers) * tokens)
    return onwards[layer, key, query], 1 + (layer + 1) * tokens + query, counts


# --- both --------------------------------------------------------------------------------------


def _call(function: Callable[..., np.ndarray], *arguments: Any) -> Any:
    """Call now, or later if an argument is lazy."""
    lazy = dask.is_dask_collection(arguments[0]) or (
        isinstance(arguments[0], list) and dask.is_dask_collection(arguments[0][0])
    )
    return dask.delayed(function, pure=True)(*arguments) if lazy else function(*arguments)


def _with_residual(layer: np.ndarray, residual: float) -> np.ndarray:
    mixed = (1 - residual) * np.asarray(layer, dtype=np.float64)
    mixed[np.diag_indices_from(mixed)] += residual
    out: np.ndarray = mixed / mixed.sum(-1, keepdims=True)
    return out


class _Layers(Iterable[tuple[int, Any]]):
    """The matrices of a trace's layers in stretches ``(layer, query, key)``, from the first on.

    Each comes with its number of layers. Dask arrays come lazily, a block at a time.
    """

    def __init__(self, ds: xr.Dataset, array: xr.DataArray) -> None:
        self._scenario = scenario_of(ds)
        self._missing = missing_layers(ds, "attention")
        self._array = array.transpose("layer", "query", "key")
        self.tokens, self.count = array.sizes["query"], array.sizes["layer"]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        numbers = self._array["layer"].values.tolist()
        if self._array.chunks is None:
            for start, layers in some_layers(self._array):
                size = len(layers)
                yield (
                    size,
                    _finite(layers, self._scenario, numbers[start : start + size], self._missing),
                )
            return
        sizes = self._array.chunksizes["layer"]
        for start, size in zip(np.cumsum((0, *sizes)).tolist(), sizes, strict=False):
            stretch, here = self._array[start : start + size], numbers[start : start + size]
            # One task takes blocks together, and hands on what it has checked.
            yield (
                size,
                dask.delayed(_finite, pure=True)(stretch.data, self._scenario, here, self._missing),
            )


#: Stretches ``(layer, source)``, each with its number of layers.
_Found = list[tuple[int, Any]]
#: Takes the layers, each source's rows and the target's.
_Through = Callable[[_Layers, list[list[int]], list[int]], _Found]


def _through_layers(
    data: Data,
    source: Place | Sequence[Place] | None,
    target: Place,
    through: Callable[..., _Found],
    analysis: str,
    method: str,
    *,
    residual: float,
) -> xr.DataArray:
    if not 0 <= residual <= 1:
        raise ConfigError(f"residual={residual} is not within 0 to 1", remedy="The usual is 0.5.")
    if source is None:
        source = [name for name in spans_before(data, [target]) if name != label(target)]
    sources, several = as_places(source)
    if not sources:
        raise ConfigError("no source to start from", remedy="Give a span or positions.")
    require_places(data, [*sources, target])

    step = partial(through, residual=residual)
    of = partial(_through_trace, sources=sources, target=target, through=step)
    out = per_scenario(data, of).rename(analysis.removeprefix("attention_"))
    out = out.reindex(source=[label(place) for place in sources])
    out = out.transpose("scenario", "source", "layer", missing_dims="ignore")
    out = out if several else out.isel(source=0)
    return described(
        out.assign_attrs(units="1"),
        data,
        analysis,
        method,
        source=[label(place) for place in sources],
        target=label(target),
        residual=residual,
    )


def _through_trace(
    ds: xr.Dataset, sources: Sequence[Place], target: Place, through: _Through
) -> xr.DataArray | None:
    """Return ``(source, layer)`` of one trace, of the places that it has."""
    array = attention(ds, "mean")
    here = present(ds, sources)
    if not here or not present(ds, [target]):
        return None
    _check_whole(ds, array)
    keys = [_rows(ds, place) for place in here]
    rows = through(_Layers(ds, array), keys, _rows(ds, target))
    return xr.DataArray(
        _together(rows, len(here)),
        dims=("layer", "source"),
        coords={"layer": array["layer"].values, "source": [label(p) for p in here]},
    ).transpose("source", "layer")


def _finite(
    values: np.ndarray, scenario: str, layers: list[int], missing: frozenset[int]
) -> np.ndarray:
    """Return attention of some layers, all of it finite.

    Raises
    ------
    ConfigError
        If a layer is missing, or the model computed NaN in it.
    """
    odd = ~np.isfinite(values).all((1, 2))
    if not odd.any():
        return values
    layer = layers[int(odd.argmax())]
    if layer in missing:
        raise ConfigError(
            f"{scenario}: attention of layer {layer} is missing",
            why="The trace is not complete, and a flow through all layers needs each of them.",
            remedy="Complete the run with 'zarrtrace extract', or select the layers above it.",
        )
    raise ConfigError(
        f"{scenario}: attention of layer {layer} holds NaN or infinity, which the model computed",
        why="The run was extracted with --allow-nonfinite, and a flow through all layers needs "
        "each of them.",
        remedy="Leave the scenario out, or select the layers above this one.",
    )


def _check_whole(ds: xr.Dataset, array: xr.DataArray) -> None:
    """Refuse a trace with gaps: what passes through a layer that is not there is not known."""
    require_queries(ds, token_labels(ds).tolist())
    layers = array["layer"].values.tolist()
    gaps = sorted(set(range(layers[0], layers[-1] + 1)) - set(layers)) if layers else [0]
    if gaps or array.sizes["query"] != array.sizes["key"]:
        raise ConfigError(
            f"{scenario_of(ds)}: attention of layer {gaps[0]} is missing"
            if gaps
            else f"{scenario_of(ds)}: attention is not square",
            why="A flow through all layers needs each of them, with all tokens.",
            remedy="Select layers without a gap, and all tokens.",
        )


def _rows(ds: xr.Dataset, place: Place) -> list[int]:
    where = {int(at): row for row, at in enumerate(token_labels(ds))}
    return sorted({where[position] for position in positions(ds, place)})


def _together(stretches: list[tuple[int, Any]], width: int) -> Any:
    """Put stretches of layers, each with their number, together ``(layer, source)``."""
    found = [stretch for _, stretch in stretches]
    if not dask.is_dask_collection(found[0]):
        return np.concatenate(found)
    return da.concatenate(
        [da.from_delayed(rows, (layers, width), np.float64) for layers, rows in stretches]
    )
