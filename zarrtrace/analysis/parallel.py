"""Work on many layers and scenarios, in parts that dask does beside each other.

Dask calls the analyses' functions where it reads, a block of layers a task: what comes back is
small, and nothing is done in one thread while another waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import xarray as xr

from zarrtrace.analysis.selecting import whole

_Found = TypeVar("_Found")

#: Gets the values of a layer, and its place in the array.
OfLayer = Callable[[np.ndarray, int], _Found]

# Scenarios, or calls, that dask gets together, and whose results are in memory at once.
_AT_ONCE = 8


def each_layer(jobs: Iterable[tuple[xr.DataArray, OfLayer[_Found]]]) -> Iterator[list[_Found]]:
    """Call a function with each layer of an array.

    Parameters
    ----------
    jobs
        Arrays ``(layer, …)``, one a scenario, each with the function to call.

    Yields
    ------
    list
        For each job in order, what the function returned, by layer. Without dask one layer is in
        memory at a time, else a block a worker.
    """
    for batch in _batches(jobs):
        lazy = [_in_blocks(array, of) for array, of in batch if array.chunks is not None]
        computed = iter(dask.compute(*lazy))
        for array, of in batch:
            if array.chunks is None:
                yield [of(np.asarray(array[at]), at) for at in range(len(array))]
            else:
                yield next(computed).ravel().tolist()


def load(arrays: Iterable[xr.DataArray]) -> Iterator[np.ndarray]:
    """Yield the values of small arrays in order; dask-backed ones are computed together."""
    for batch in _batches(arrays):
        bare = [array.data if array.chunks is not None else array for array in batch]
        for values in dask.compute(*bare, traverse=False):
            yield np.asarray(values)


def together(calls: Iterable[Callable[[], _Found]]) -> Iterator[_Found]:
    """Yield what functions return, in order; some of them are called beside each other."""
    for batch in _batches(calls):
        yield from dask.compute(*[dask.delayed(call, pure=False)() for call in batch])


_Item = TypeVar("_Item")


def _batches(items: Iterable[_Item]) -> Iterator[Sequence[_Item]]:
    rest = iter(items)
    while batch := list(islice(rest, _AT_ONCE)):
        yield batch


def _in_blocks(array: xr.DataArray, of: OfLayer[Any]) -> da.Array:
    """Return what the function returns of each layer, an object each, ``(layer, 1, …)``."""
    # All dimensions stay: dask would copy a block to take one of them away.
    data = whole(array, *map(str, array.dims[1:])).data
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
