"""Special tokens: BOS, and the markers that chat templates write.

Activations at them are often tens of times those elsewhere, in most features, whatever the prompt
says: they would be at the top of every list.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.tables import SAMPLE, is_table

_SPECIAL = "special"


def special_keys(ds: xr.Dataset) -> np.ndarray:
    """Tell which tokens of a trace's prompt are special ``(key,)``; none if that is not known."""
    if _SPECIAL not in ds.coords:
        return np.zeros(ds.sizes["key"], bool)
    return np.asarray(ds[_SPECIAL].values, bool)


def special_queries(ds: xr.Dataset) -> np.ndarray:
    """Tell which stored positions of a trace hold special tokens ``(query,)``.

    None do where that is not known, as in traces from NPZ files.
    """
    at = ds.indexes["key"].get_indexer(pd.Index(np.asarray(ds["query"].values)))
    return np.asarray(special_keys(ds)[at] & (at >= 0))


def special_samples(data: xr.Dataset) -> np.ndarray:
    """Tell which samples of a table, or stored positions of a trace, hold special tokens."""
    if not is_table(data):
        return special_queries(data)
    known = _SPECIAL in data.coords and _SPECIAL not in data.attrs.get("metadata", ())
    if not known:
        return np.zeros(data.sizes[SAMPLE], bool)
    return np.asarray(data[_SPECIAL].values, bool)
