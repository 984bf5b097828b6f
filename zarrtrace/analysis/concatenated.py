"""Arrays of several traces as one, read only where it is looked at.

``xarray.concat`` loads arrays that are not on dask.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from zarrtrace.analysis.tables import SAMPLE

#: By dimension, where a part has each label of the whole, -1 if it does not.
Places = Mapping[Hashable, np.ndarray]

# Traces that are read at the same time: an object store lets each wait for a tenth of a second.
_TRACES_AT_ONCE = 16


def concatenated(parts: Sequence[xr.Variable], places: Sequence[Places]) -> xr.Variable:
    """Put arrays together along ``sample``, lazily.

    Parameters
    ----------
    parts
        With the same dimensions, ``sample`` among them; on dask, or indexed lazily, or in memory.
    places
        For each part, by those dimensions along which it has other labels than the whole. A label
        that it lacks is NaN.

    Returns
    -------
    xr.Variable
        On dask if the parts are.
    """
    if any(part.chunks is not None for part in parts):
        lazily: Any = xr.Variable
        together: xr.Variable = lazily.concat(list(map(_taken, parts, places)), dim=SAMPLE)
        return together
    if len(parts) == 1 and not places[0]:
        return parts[0]
    lazy: Any = indexing.LazilyIndexedArray(_Concatenated(parts, places))
    cached: Any = indexing.MemoryCachedArray
    data = cached(indexing.CopyOnWriteArray(lazy))
    return xr.Variable(parts[0].dims, data, parts[0].attrs, fastpath=True)


def _taken(part: xr.Variable, places: Places) -> xr.Variable:
    """Return a part with the whole's labels."""
    for dim, at in places.items():
        array = xr.DataArray(part, {dim: np.arange(part.sizes[dim])})
        part = array.reindex({dim: at}).variable  # no label is -1
    return part


class _Concatenated(BackendArray):
    """Arrays of several traces, for xarray to index; parameters as for :func:`concatenated`."""

    def __init__(self, parts: Sequence[xr.Variable], places: Sequence[Places]) -> None:
        first = parts[0]
        self._parts, self._places = parts, places
        self._dims, self._axis = first.dims, first.dims.index(SAMPLE)
        self._starts = np.cumsum([0, *(part.sizes[SAMPLE] for part in parts)])
        sizes = {**first.sizes, **{dim: len(at) for dim, at in places[0].items()}}
        self.shape = tuple({**sizes, SAMPLE: int(self._starts[-1])}.values())
        self.dtype = np.result_type(*{part.dtype for part in parts})

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Name what is read, so that dask can tell whether two graphs read the same."""
        return ("zarrtrace", list(self._parts), [list(one.items()) for one in self._places])

    def __getitem__(self, key: Any) -> Any:
        """Index as xarray asks."""
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        """Read what is chosen along each dimension by itself, all rows of a trace at once."""
        chosen = [_numbers(one, size) for one, size in zip(key, self.shape, strict=True)]
        out = np.empty([len(one) for one in chosen], self.dtype)
        samples = chosen[self._axis]
        part_of = np.searchsorted(self._starts, samples, side="right") - 1

        def put(number: int) -> None:
            into = np.flatnonzero(part_of == number)
            wanted = dict(zip(self._dims, chosen, strict=True))
            wanted[SAMPLE] = samples[into] - self._starts[number]
            at: list[Any] = [slice(None)] * len(chosen)
            at[self._axis] = _compact(into)
            out[tuple(at)] = _rows(self._parts[number], self._places[number], wanted)

        numbers = np.unique(part_of).tolist()
        for _ in (_pool(os.getpid()).map if len(numbers) > 1 else map)(put, numbers):
            pass
        squeezed = tuple(0 if isinstance(one, int | np.integer) else slice(None) for one in key)
        found: np.ndarray = out[squeezed]
        return found


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return this process's threads: a fork has none of its parent's."""
    return ThreadPoolExecutor(_TRACES_AT_ONCE, thread_name_prefix="zarrtrace-samples")


def _rows(part: xr.Variable, places: Places, wanted: Mapping[Hashable, np.ndarray]) -> np.ndarray:
    """Read what is wanted of a part along each dimension; NaN where it lacks a label."""
    there = {dim: places[dim][at] if dim in places else at for dim, at in wanted.items()}
    stored = part.isel({dim: _compact(at[at >= 0]) for dim, at in there.items()}).to_numpy()
    if all((at >= 0).all() for at in there.values()):
        return stored
    out = np.full([len(at) for at in there.values()], np.nan, part.dtype)
    out[np.ix_(*(np.flatnonzero(at >= 0) for at in there.values()))] = stored
    return out


def _numbers(key: Any, size: int) -> np.ndarray:
    """Count what is chosen along one dimension from the beginning."""
    if isinstance(key, slice):
        return np.arange(*key.indices(size))
    at = np.atleast_1d(np.asarray(key, np.int64))
    if ((at < -size) | (at >= size)).any():
        raise IndexError(f"index {key} is out of bounds for a dimension of size {size}")
    return np.where(at < 0, at + size, at)


def _compact(at: np.ndarray) -> slice | np.ndarray:
    """Return a slice for neighbours: of arrays in memory it is no copy."""
    if len(at) and (np.diff(at) == 1).all():
        return slice(int(at[0]), int(at[-1]) + 1)
    return at
