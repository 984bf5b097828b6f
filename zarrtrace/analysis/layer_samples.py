"""One layer of a table's samples at a time, as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy import sparse

from zarrtrace.analysis.samples import At, table
from zarrtrace.analysis.tables import SAMPLE, is_table, table_scenarios
from zarrtrace.analysis.traces import Data
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import DECISION

# Bytes of a layer that are read at once.
_READ_BYTES = 2**27


def samples_of(data: Data, at: At | None) -> xr.Dataset:
    """Return a table: all of one if `at` is None, the last tokens of a run."""
    if is_table(data) and at is None:
        table_scenarios(data)  # refuses a table without them now, and not after the work
        return data
    return table(data, DECISION if at is None else at)


def probed_array(rows: xr.Dataset, what: str, layers: Sequence[int] | None) -> xr.DataArray:
    """Return the array of a table that is probed, at some layers."""
    known = [name for name, one in rows.data_vars.items() if {"layer", SAMPLE} <= {*one.dims}]
    if what not in known:
        raise ConfigError(
            f"the samples have no {what!r}",
            why="Residuals are stored with --residual, features with SAEs.",
            remedy=f"There are: {', '.join(map(str, known)) or 'none'}.",
        )
    array = rows[what].reset_coords(drop=True)
    if layers is None:
        return array
    absent = [one for one in layers if one not in array.indexes["layer"]]
    if absent or not len(layers):
        raise ConfigError(
            f"there is no layer {absent[0]} of {what!r}" if absent else "no layer is asked for",
            remedy=f"There are: {', '.join(map(str, array.indexes['layer']))}.",
        )
    return array.sel(layer=list(layers))


def read_rows(array: xr.DataArray, kept: np.ndarray) -> tuple[Any, np.ndarray]:
    """Read a layer ``(sample, column)``: the kept samples that are finite, and which these are.

    Features become a sparse matrix block by block.
    """
    column = next(dim for dim in array.dims if dim != SAMPLE)
    array = array.transpose(SAMPLE, column)
    step = max(1, _READ_BYTES // max(1, array.dtype.itemsize * array.sizes[column]))
    used = np.zeros(len(kept), bool)
    parts = []
    for start in range(0, len(kept), step):
        here = slice(start, start + step)
        block = array.isel({SAMPLE: here}).to_numpy().astype(np.float32, copy=False)
        used[here] = kept[here] & np.isfinite(block).all(1)
        block = block[used[here]]
        parts.append(block if column == "channel" else sparse.csr_array(block))
    together = (
        np.concatenate(parts) if column == "channel" else sparse.csr_array(sparse.vstack(parts))
    )
    return together, used
