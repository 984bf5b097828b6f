"""Where attention goes: between spans, near or far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import dask.array as da
import numpy as np
import xarray as xr

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
    stored_queries,
    token_labels,
)
from zarrtrace.analysis.results import described, per_scenario
from zarrtrace.analysis.trace_arrays import attention, taken, whole
from zarrtrace.analysis.traces import Data
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

Heads = Literal["mean", "each"]

#: The measures of :func:`attention_locality`.
LOCALITY = ("distance", "entropy", "window_share", "first_share")


# Attention probabilities that are looked at together in float64, one megabyte of them.
_SLAB = 2**17


# --- between spans -----------------------------------------------------------------------------


def attention_to(
    data: Data,
    source: Place | Sequence[Place] | None = None,
    target: Place | Sequence[Place] = DECISION,
    *,
    heads: Heads = "mean",
    reduce: Literal["mean", "sum"] = "mean",
) -> xr.DataArray:
    """Attention that a target pays to a source, by layer: the pathway source → target.

    Parameters
    ----------
    data
        A trace or a run.
    source
        Whose tokens are attended to (keys): a span, a position, several positions, or a list of
        spans; None takes every span but the target's own.
    target
        Places whose tokens attend (queries), given likewise.
    heads
        ``"mean"`` over heads (from ``attention_mean``), or ``"each"``.
    reduce
        Over the source's tokens: ``"mean"`` is attention for one token of it, so that spans of
        different length compare; ``"sum"`` is the share of the target's attention that the whole
        span gets.

    Returns
    -------
    xr.DataArray
        float64 ``([scenario,] [source,] [target,] layer[, head])``; `source` and `target` are
        dimensions if several were asked for. Always the mean over the target's tokens. NaN where
        a layer, or a span in a scenario, is missing; 0 where every key comes after every query.

    Raises
    ------
    ConfigError
        If there is no attention, or the target's rows were not stored.
    ScenarioError
        If no scenario has a span.

    Notes
    -----
    ``attention[:, target][:, source].mean()`` of each layer's ``(query, key)`` matrix; only these
    rows and columns are read. A description: no null hypothesis is tested. The scenario is the
    unit; :func:`contrast`, :func:`relate` and :func:`critical_layers` test what is seen here.
    """
    targets, several_targets = as_places(target)
    names = [label(place) for place in targets]
    if source is None:
        source = [name for name in spans_before(data, targets) if name not in names]
    sources, several_sources = as_places(source)
    _check_places(data, sources, targets)

    of = partial(_between, sources=sources, targets=targets, heads=heads, reduce=reduce)
    out = per_scenario(data, of).rename("attention")
    # In the order asked for, and with the spans that a single trace lacks.
    out = out.reindex(source=[label(place) for place in sources], target=names)
    out = out.transpose("scenario", "source", "target", ..., missing_dims="ignore")
    out = out if several_sources else out.isel(source=0)
    out = out if several_targets else out.isel(target=0)
    out = out.assign_attrs(long_name="attention probability", units="1")
    return described(
        out,
        data,
        "attention_to",
        f"mean over the target's tokens of the {reduce} over the source's tokens of attention",
        source=[label(place) for place in sources],
        target=names,
        heads=heads,
        reduce=reduce,
    )


def _check_places(data: Data, sources: Sequence[Place], targets: Sequence[Place]) -> None:
    if not sources or not targets:
        raise ConfigError(
            "attention from nothing or to nothing",
            why="The scenarios have no spans besides the decision, or the list is empty.",
            remedy="Give a source and a target.",
        )
    require_places(data, [*sources, *targets])


def _between(
    ds: xr.Dataset, sources: Sequence[Place], targets: Sequence[Place], heads: Heads, reduce: str
) -> xr.DataArray | None:
    """Return ``(source, target, layer[, head])`` of one trace, of the places that it has."""
    array = attention(ds, heads)
    sources, targets = present(ds, sources), present(ds, targets)
    if not sources or not targets:
        return None
    if reduce not in ("mean", "sum"):
        raise ConfigError(f"reduce={reduce!r} is neither 'mean' nor 'sum'", remedy="Give one.")
    queries = {label(place): positions(ds, place) for place in targets}
    keys = {label(place): positions(ds, place) for place in sources}
    require_queries(ds, {q for found in queries.values() for q in found})
    rows, columns = _weights(queries, average=True), _weights(keys, average=reduce == "mean")
    return weighted(array, rows, columns).transpose("source", "target", ...)


class Weights(NamedTuple):
    """How much each token counts for each of several places.

    Attributes
    ----------
    names
        Names of the places.
    positions
        Token positions, each once.
    values
        ``(place, position)``.
    """

    names: list[str]
    positions: np.ndarray
    values: np.ndarray


def _weights(places: dict[str, list[int]], *, average: bool) -> Weights:
    """Return weights that take the mean or the sum over each place's tokens."""
    every = np.unique([position for found in places.values() for position in found])
    values = np.array([np.isin(every, found) for found in places.values()], dtype=np.float64)
    return Weights(
        list(places), every, values / values.sum(1, keepdims=True) if average else values
    )


def weighted(array: xr.DataArray, rows: Weights, columns: Weights) -> xr.DataArray:
    """Return sums of attention that are weighted over queries and over keys.

    Parameters
    ----------
    array
        ``(layer[, head], query, key)``.
    rows, columns
        Weights of the targets' queries and of the sources' keys.

    Returns
    -------
    xr.DataArray
        float64 ``(layer[, head], source, target)``.
    """
    out: xr.DataArray = xr.apply_ufunc(
        _weighted,
        whole(taken(array, query=rows.positions, key=columns.positions), "query", "key"),
        kwargs={"rows": rows.values, "columns": columns.values},
        input_core_dims=[["query", "key"]],
        output_core_dims=[["source", "target"]],
        output_dtypes=[np.float64],
        dask="parallelized",
        dask_gufunc_kwargs={
            "output_sizes": {"source": len(columns.names), "target": len(rows.names)}
        },
        keep_attrs=False,
    )
    return out.assign_coords(source=columns.names, target=rows.names)


def _weighted(block: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """``(…, q, k), (t, q), (s, k)`` → ``(…, s, t)``; NaN where a weighted value is not finite."""
    sums, values = partial(np.einsum, "tq,...qk,sk->...st", optimize=True), block.astype(np.float64)
    is_finite = np.isfinite(values)
    if is_finite.all():
        return np.asarray(sums(rows, values, columns))
    # NaN times a weight of 0 is NaN: one place's values would spoil another's.
    out = np.asarray(sums(rows, np.where(is_finite, values, 0), columns))
    counts = sums(
        (rows != 0).astype(float), (~is_finite).astype(float), (columns != 0).astype(float)
    )
    return np.where(counts > 0, np.nan, out)


# --- near or far -------------------------------------------------------------------------------


def attention_locality(
    data: Data, *, heads: Heads = "each", window: int = 5, exclude_first: bool = False
) -> xr.Dataset:
    """How local attention is, by layer and head.

    Parameters
    ----------
    data
        A trace or a run.
    heads
        ``"each"``, or ``"mean"`` for the measures of the mean over heads (from
        ``attention_mean``; its entropy is not the mean of the heads' entropies).
    window
        Tokens; a key is near if it is at most so far back.
    exclude_first
        Leave the first token out of what is attended to. It often takes most of the attention
        without meaning anything (an attention sink; Xiao et al. 2024), which hides the rest.

    Returns
    -------
    xr.Dataset
        ``([scenario,] layer[, head])`` float64, each the mean over queries, the first token left
        out because it can only attend to itself; rows are normalised to sum to 1 first.

        - ``distance``: mean distance back to the key, in tokens.
        - ``entropy``: Shannon's, in nats (Clark et al. 2019).
        - ``window_share``: share of attention on keys at most `window` tokens back, the query
          itself included; over queries that have keys outside the window only, as the share of
          the others is 1 by construction.
        - ``first_share``: share of attention on the first token; with `exclude_first`, what it
          took before it was left out.

        NaN for missing layers, and for heads that hold NaN.

    Raises
    ------
    ConfigError
        If there is no attention, or the window is negative.

    Notes
    -----
    A description of the rows that are stored, a scenario each: no null hypothesis is tested.
    """
    if window < 0:
        raise ConfigError(f"window={window} is negative", remedy="Give 0 or more tokens.")

    of = partial(_locality, heads=heads, window=window, exclude_first=exclude_first)
    out = per_scenario(data, of).to_dataset("measure")
    for name, units in zip(LOCALITY, ("tokens", "nats", "1", "1"), strict=True):
        out[name].attrs["units"] = units
    return described(
        out,
        data,
        "attention_locality",
        "mean over queries of distance, Shannon entropy, share within a window, share on the "
        "first token",
        heads=heads,
        window=window,
        exclude_first=exclude_first,
    )


def _locality(ds: xr.Dataset, heads: Heads, window: int, *, exclude_first: bool) -> xr.DataArray:
    """Return ``(layer[, head], measure)`` of one trace."""
    rows = stored_queries(ds)
    array = taken(attention(ds, heads), query=rows)
    of_rows = partial(
        _locality_of_rows, keys=token_labels(ds), window=window, exclude_first=exclude_first
    )
    found = xr.DataArray(
        _by_rows(of_rows, array, rows),
        dims=[*array.dims[:-1], "measure"],
        coords={dim: array.indexes[dim] for dim in array.dims[:-1]},
    )
    return _mean_over_queries(found).assign_coords(measure=list(LOCALITY))


def _mean_over_queries(found: xr.DataArray) -> xr.DataArray:
    """Average what is defined; NaN where attention itself is NaN, which infinity stands for."""
    if found.chunks is not None:
        # Little enough to be one block, which makes graphs small.
        lazy = whole(found.mean("query", skipna=True), "layer")
        return lazy.where(lazy != np.inf)
    # mean() warns where there is nothing but NaN, and threads cannot each ignore warnings.
    count = found.notnull().sum("query")
    mean: xr.DataArray = found.sum("query", skipna=True) / count.where(count > 0)
    return mean.where(mean != np.inf)


def _by_rows(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray], array: xr.DataArray, at: np.ndarray
) -> Any:
    """Call a function with rows ``(…, query, key)`` and their positions ``(query, 1)``."""
    if array.chunks is None:
        out = np.empty((*array.shape[:-1], len(LOCALITY)))
        for start, layers in some_layers(array):
            out[start : start + len(layers)] = function(layers, at[:, None])
        return out
    # Not apply_ufunc: for a dimension that the function takes away, dask copies each block.
    blocks = whole(array, "key")
    positions = da.from_array(at[:, None], (blocks.chunksizes["query"], (1,)))
    return da.map_blocks(
        function,
        blocks.data,
        positions,
        chunks=(*blocks.data.chunks[:-1], (len(LOCALITY),)),
        dtype=np.float64,
        meta=np.empty((0,) * array.ndim),
    )


def _locality_of_rows(
    block: np.ndarray, at: np.ndarray, keys: np.ndarray, *, window: int, exclude_first: bool
) -> np.ndarray:
    """``(…, q, k)`` and the queries' positions → ``(…, q, measure)``.

    NaN where a measure is undefined, infinity where attention is not finite.
    """
    at = np.asarray(at).reshape(-1)
    first = 1 if exclude_first else 0
    distance = at[:, None] - keys
    near = ((distance >= 0) & (distance <= window))[:, first:]
    has_far = (distance > window)[:, first:].any(1)
    moments = np.stack([np.ones(len(keys)), keys], axis=-1)[first:]
    out = np.empty((*block.shape[:-1], len(LOCALITY)))
    matrices, found = block.reshape(-1, *block.shape[-2:]), out.reshape(-1, *out.shape[-2:])
    # Some heads at a time: temporaries stay small, and threads rarely wait for Python's lock.
    step = max(1, _SLAB // max(1, math.prod(block.shape[-2:])))
    for start in range(0, len(matrices), step):
        rows = matrices[start : start + step].astype(np.float64)
        kept = rows[..., first:]
        mass, moment = np.moveaxis(kept @ moments, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(kept, out=np.zeros_like(kept), where=kept > 0)
            # The entropy of kept / mass, without dividing every value.
            entropy = np.log(mass) - np.einsum("hqk,hqk->hq", kept, logs) / mass
            inside = np.where(has_far, np.einsum("hqk,qk->hq", kept, near) / mass, np.nan)
            values = (at - moment / mass, entropy, inside, rows[..., 0] / rows.sum(-1))
        of_rows = np.stack(values, axis=-1)
        of_rows[~np.isfinite(rows.sum(-1))] = np.inf  # not to be taken for undefined
        found[start : start + step] = of_rows
    out[..., at == keys[0], :] = np.nan
    return out
