"""Work on many layers and scenarios, in parts that dask does in parallel.

Dask calls the analyses' functions where it reads: what comes back is small, and nothing is done in
one thread while another waits. For arrays that are no dask arrays, a scenario is a task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import xarray as xr

_Found = TypeVar("_Found")

#: Gets the values of a layer, and its place in the array.
OfLayer = Callable[[np.ndarray, int], _Found]

# Scenarios, or calls, that dask gets together, and whose results are in memory at once.
_AT_ONCE = max(8, 2 * (os.cpu_count() or 1))
# Bytes read of an array that is no dask array, unless a layer is more.
_READ_BYTES = 2**23


def each_layer(jobs: Iterable[tuple[xr.DataArray, OfLayer[_Found]]]) -> Iterator[list[_Found]]:
    """Call a function with each layer of an array.

    Parameters
    ----------
    jobs
        Arrays ``(layer, …)``, one a scenario, each with the function to call.

    Yields
    ------
    list
        For each job in order, what the function returned, by layer. Each worker has one block of
        layers in memory at a time; without dask 8 MiB, or one layer.
    """
    for batch in _batches(jobs):
        lazy = [
            _called(_layer_by_layer, array, of) if array.chunks is None else _in_blocks(array, of)
            for array, of in batch
        ]
        for found in dask.compute(*lazy):
            yield found.ravel().tolist() if isinstance(found, np.ndarray) else found


def load(arrays: Iterable[xr.DataArray]) -> Iterator[np.ndarray]:
    """Yield the values of small arrays in order; some are read in parallel."""
    for batch in _batches(arrays):
        lazy = [
            _called(np.asarray, array) if array.chunks is None else array.data for array in batch
        ]
        for values in dask.compute(*lazy, traverse=False):
            yield np.asarray(values)


def together(calls: Iterable[Callable[[], _Found]]) -> Iterator[_Found]:
    """Yield what functions return, in order; some of them are called in parallel."""
    for batch in _batches(calls):
        yield from dask.compute(*map(_called, batch))


def all_together(calls: Iterable[Callable[[], _Found]]) -> Sequence[_Found]:
    """Return what functions return, in order; for results that are all kept."""
    found: Sequence[_Found] = dask.compute(*map(_called, calls))
    return found


_Item = TypeVar("_Item")


def _batches(items: Iterable[_Item]) -> Iterator[Sequence[_Item]]:
    rest = iter(items)
    while batch := list(islice(rest, _AT_ONCE)):
        yield batch


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return a call that dask does, without looking into the arguments or naming them."""
    return dask.delayed(partial(function, *arguments), pure=False)()


def _layer_by_layer(array: xr.DataArray, of: OfLayer[_Found]) -> list[_Found]:
    return [
        of(layer, start + number)
        for start, layers in some_layers(array)
        for number, layer in enumerate(layers)
    ]


def some_layers(array: xr.DataArray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield an array ``(layer, …)`` that is no dask array: some layers, and the first one's place.

    Small arrays are read at once, because each read costs a millisecond; others layer by layer.
    """
    step = max(1, _READ_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield start, array[start : start + step].to_numpy()


def _in_blocks(array: xr.DataArray, of: OfLayer[Any]) -> da.Array:
    """Return what the function returns of each layer, an object each, ``(layer, 1, …)``."""
    # All dimensions stay: dask would copy a block to take one of them away.
    data = array.chunk(dict.fromkeys(array.dims[1:], -1)).data
    ones = ((1,),) * (array.ndim - 1)
    return da.map_blocks(
        _of_block,
        data,
        of,
        chunks=(data.chunks[0], *ones),
        name=f"layers-{uuid4().hex}",  # not of the arguments' content, which may be a table
        dtype=object,
        meta=np.empty((0,) * array.ndim, object),
    )


def _of_block(block: np.ndarray, of: OfLayer[Any], block_info: Any = None) -> np.ndarray:
    first, _ = block_info[0]["array-location"][0]
    out = np.empty(len(block), object)
    for number, layer in enumerate(block):
        out[number] = of(layer, first + number)
    return out.reshape(-1, *(1,) * (block.ndim - 1))
