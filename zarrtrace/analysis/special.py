"""Tokens of a kind: special ones (BOS, the markers of chat templates), and generated ones.

Activations at special tokens are often tens of times those elsewhere, in most features, whatever
the prompt says: they would be at the top of every list.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.tables import SAMPLE, is_table

#: Coordinates that mark tokens, along ``key`` or ``sample``.
MARKS = ("special", "generated")


def special_keys(ds: xr.Dataset) -> np.ndarray:
    """Tell which tokens of a trace's prompt are special ``(key,)``; none if that is not known."""
    return _marked_keys(ds, "special")


def special_queries(ds: xr.Dataset) -> np.ndarray:
    """Tell which stored positions of a trace hold special tokens ``(query,)``.

    None do where that is not known, as in traces from NPZ files.
    """
    return _marked(ds, "special")


def special_samples(data: xr.Dataset) -> np.ndarray:
    """Tell which samples of a table, or stored positions of a trace, hold special tokens."""
    return _marked(data, "special")


def generated_samples(data: xr.Dataset) -> np.ndarray:
    """Tell which samples of a table, or stored positions of a trace, the model generated."""
    return _marked(data, "generated")


def _marked(data: xr.Dataset, mark: str) -> np.ndarray:
    if is_table(data):
        known = mark in data.coords and mark not in data.attrs.get("metadata", ())
        return np.asarray(data[mark].values, bool) if known else np.zeros(data.sizes[SAMPLE], bool)
    at = data.indexes["key"].get_indexer(pd.Index(data["query"].values))
    return np.asarray(_marked_keys(data, mark)[at] & (at >= 0))


def _marked_keys(ds: xr.Dataset, mark: str) -> np.ndarray:
    return np.asarray(ds[mark] if mark in ds.coords else np.zeros(ds.sizes["key"]), bool)
