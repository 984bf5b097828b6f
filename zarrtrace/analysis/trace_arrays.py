"""Arrays of a trace: checked to be there, and cut to what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr

from zarrtrace.analysis.tables import is_table
from zarrtrace.analysis.traces import scenario_of
from zarrtrace.errors import ConfigError

_WHY_ABSENT = {
    "attention": "It was extracted with --no-attention (features only).",
    "attention_mean": "It was extracted with --no-attention (features only).",
    "features": "It was extracted with --no-features (attention only).",
    "top_feature": "It was extracted with --no-features (attention only).",
    "top_activation": "It was extracted with --no-features (attention only).",
    "next_token": "It was imported from NPZ files, which do not hold next-token probabilities.",
    "next_token_logprob": "It was imported from NPZ files, which do not hold next-token "
    "probabilities.",
}


def require(ds: xr.Dataset, *names: str) -> None:
    """Refuse a trace, or a table, that lacks one of the arrays `names`.

    Raises
    ------
    ConfigError
        Naming the scenario, the array, and why a trace has none.
    """
    for name in names:
        if name not in ds:
            here = "the table" if is_table(ds) else f"{scenario_of(ds)}: the trace"
            raise ConfigError(
                f"{here} has no {name!r}",
                why=_WHY_ABSENT.get(name, "It was not extracted with it."),
                remedy=f"It has: {', '.join(map(str, ds.data_vars)) or 'no arrays'}. Extract the "
                "scenario again with what is missing.",
            )


def attention(ds: xr.Dataset, heads: Literal["mean", "each"]) -> xr.DataArray:
    """Return a trace's attention ``(layer[, head], query, key)``, without token texts, unloaded.

    Parameters
    ----------
    ds
        A trace.
    heads
        ``"mean"`` takes the stored mean over heads, a fraction of the reading.

    Raises
    ------
    ConfigError
        If the trace has no attention, or `heads` is something else.
    """
    if heads not in ("mean", "each"):
        raise ConfigError(f"heads={heads!r} is neither 'mean' nor 'each'", remedy="Give one.")
    name = "attention_mean" if heads == "mean" else "attention"
    require(ds, name)
    # Attention has dimensions of its own where it has fewer layers or rows than features.
    own = {"attention_layer": "layer", "attention_query": "query"}
    out = ds[name].reset_coords(drop=True)
    return out.rename({dim: common for dim, common in own.items() if dim in out.dims})


def token_ids(ds: xr.Dataset, why: str) -> np.ndarray:
    """Return the ids of a trace's tokens ``(key,)``.

    Parameters
    ----------
    ds
        A trace.
    why
        The sentence of the error that says why they are needed.

    Raises
    ------
    ConfigError
        If the trace has none.
    """
    if "token_id" not in ds.coords:
        raise ConfigError(
            f"{scenario_of(ds)}: the trace has no token ids",
            why=why,
            remedy="Keep the coordinate 'token_id'.",
        )
    return np.asarray(ds["token_id"].values)


def taken(array: xr.DataArray, **labels: Sequence[int] | np.ndarray) -> xr.DataArray:
    """Return an array at some labels of its dimensions, reading no others but those between.

    A list of labels alone would make dask read whole blocks before it chooses among them; slices
    go down to the reading, unless something else uses the same blocks: take all that is needed of
    an array at once.
    """
    places = {}
    for dim, wanted in labels.items():
        at = array.indexes[dim].get_indexer(np.asarray(wanted))
        if (at < 0).any():
            raise KeyError(f"{dim} {np.asarray(wanted)[at < 0][0]}")
        places[dim] = at
    between = {dim: slice(at.min(), at.max() + 1) for dim, at in places.items() if len(at)}
    array = array.isel(between)
    for dim, at in places.items():
        if len(at) != array.sizes[dim] or (np.diff(at) != 1).any():
            array = array.isel({dim: at - at.min() if len(at) else at})
    return array


def whole(array: xr.DataArray, *dims: str) -> xr.DataArray:
    """Let dask blocks span `dims`, which one step of the computation needs whole."""
    return array if array.chunks is None else array.chunk(dict.fromkeys(dims, -1))
