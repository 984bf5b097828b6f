"""Opening runs and traces, lazily and labelled: one small file a trace is read."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing
from xarray.core.indexes import PandasIndex

from zarrtrace.accessors import source_of
from zarrtrace.errors import IncompleteError, NotATraceError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import ROWS
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.machine import no_garbage
from zarrtrace.scenarios import chosen_names
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.array import StoredArray, open_array
from zarrtrace.store.chunks import FileIndex
from zarrtrace.store.damage import check_sizes
from zarrtrace.store.metadata import Group, damaged, each_trace, read_run, read_trace
from zarrtrace.store.publish import beside
from zarrtrace.store.staged import read_staged, staging_folder
from zarrtrace.store.trace_writer import incomplete

Missing = Literal["raise", "nan"]
ChunkSpec = Mapping[str, Any] | Literal["auto"] | None

# A block of dask's holds at most this much, unless one layer is more.
_BLOCK_BYTES = 32 * 2**20
# A trace takes about 7 ms to open (2 of them to read its metadata, the others in xarray). This many
# are opened before it is said how long all of them take, if it is longer than this.
_TIMED, _LONG_SECONDS = 200, 10.0


def open_trace(
    path: Address,
    *,
    chunks: ChunkSpec = None,
    missing: Missing = "raise",
    storage_options: Mapping[str, str] | None = None,
) -> xr.Dataset:
    """Open one scenario's trace, lazily.

    Parameters
    ----------
    path
        Folder of the trace, inside a run or by itself, or its address: ``s3://bucket/run/trace``,
        also ``gs://``, ``az://``, ``https://``, ``memory://``.
    chunks
        None indexes lazily without dask, best for point reads. ``"auto"`` or ``{}`` gives dask
        arrays in blocks of whole layers; a mapping of dimensions to sizes, blocks of those.
    missing
        Treatment of an incomplete trace: ``"raise"``, or ``"nan"`` to read the layers that
        it lacks as NaN. Then the attribute ``missing_layers`` names them, and ``nonfinite`` the
        stored layers in which the model computed NaN.
    storage_options
        How to reach an object store, as ``{"endpoint": "http://localhost:9000"}``; credentials are
        taken from the environment.

    Returns
    -------
    xr.Dataset
        ``attention (layer, head, query, key)``, ``features (layer, query, feature)`` and the rest
        of ``schema/README.md``. Only the coordinates of dimensions are read.

    Raises
    ------
    NotATraceError
        If `path` is not a trace.
    FormatVersionError
        If another version of the format is there.
    IncompleteError
        If the trace is not complete, and `missing` is ``"raise"``.
    IntegrityError
        If its metadata is damaged, or files are gone or have another size.
    """
    path = locate(path, storage_options)
    try:
        trace = read_trace(path)
    except NotATraceError as error:
        staged = read_staged(path)
        if staged is None:
            raise _between_two(path.parent, error) from None
        group, missing_layers, indexes = staged
        if missing == "raise":
            raise incomplete(path, group.attributes.layers, missing_layers) from None
        return lazy_dataset(path, group, chunks, indexes)
    check_sizes(trace)
    return lazy_dataset(path, trace, chunks)


@no_garbage()
def open_run(
    path: Address,
    *,
    scenarios: Sequence[str] | None = None,
    chunks: ChunkSpec = None,
    missing: Missing = "raise",
    storage_options: Mapping[str, str] | None = None,
) -> xr.DataTree:
    """Open a run, lazily: one child a scenario, in the suite's order.

    The metadata of every trace is read, some milliseconds each. For a run of thousands, a warning
    says how long that takes; `scenarios` opens a part, and a table has no such cost.

    Parameters
    ----------
    path
        Folder of the run, or its address.
    scenarios
        Only these; all if None. A scenario's name stands for all its repeats.
    chunks, missing, storage_options
        As for :func:`open_trace`; with ``missing="nan"``, scenarios not begun are left out.

    Returns
    -------
    xr.DataTree
        Its children are traces; its ``attrs`` hold the run's own attributes.

    Raises
    ------
    NotATraceError, FormatVersionError, IncompleteError, IntegrityError
        As for :func:`open_trace`; but files that are gone or have another size are found when an
        array is read.
    ScenarioError
        If the run has no such scenario.
    """
    path = locate(path, storage_options)
    try:
        run = read_run(path)
    except NotATraceError as error:
        raise _between_two(path, error) from None
    names = chosen_names(run.attributes.scenarios, scenarios)
    present = path.present(names)
    found = _opened(path, present, chunks)
    opened = {**dict.fromkeys(names), **dict(zip(present, found, strict=True))}
    absent = [name for name, ds in opened.items() if ds is None]
    if absent and missing == "raise":
        raise IncompleteError(
            f"{path}: {len(absent)} of {len(names)} scenarios are not complete: "
            + ", ".join(absent[:5]),
            why="The extraction was interrupted, or is still running.",
            remedy="Run the same 'zarrtrace extract' again to resume it, or open the run with "
            "missing='nan'.",
        )
    for name in locate(staging_folder(path)).present(absent):
        with contextlib.suppress(NotATraceError):
            opened[name] = open_trace(path / name, chunks=chunks, missing=missing)
    tree = xr.DataTree(xr.Dataset(attrs=run.plain), name=path.name)
    tree.encoding = source_of(path)
    tree.children = {  # given to DataTree() they would be copied
        name: xr.DataTree(ds) for name, ds in opened.items() if ds is not None
    }
    return tree


def _opened(run: Location, names: Sequence[str], chunks: ChunkSpec) -> list[xr.Dataset | None]:
    """Open traces; if the first ones tell that it will take long, warn of it."""

    def opened(some: Sequence[str]) -> list[xr.Dataset | None]:
        return each_trace(run, some, lambda trace: lazy_dataset(trace.path, trace, chunks))

    started = time.perf_counter()
    first = opened(names[:_TIMED])
    seconds = (time.perf_counter() - started) * len(names) / _TIMED
    if len(names) > _TIMED and seconds > _LONG_SECONDS:
        warnings.warn(
            f"{run}: opening its {len(names):,} traces takes about {seconds:.0f} s; "
            "open_run(path, scenarios=[…]) opens a part, open_trace one of them. Prompts whose "
            "attention is not needed are better stored as a table (--layout table)",
            stacklevel=4,  # behind no_garbage, which wraps open_run
        )
    return [*first, *opened(names[_TIMED:])]


def _between_two(path: Location, error: NotATraceError) -> NotATraceError:
    """Say where both runs are while one replaces the other."""
    here = path.resolved().path
    if here is None or here.exists() or not beside(here, "old").is_dir():
        return error
    return NotATraceError(
        f"{path}: is being replaced: {beside(here, 'old')} by {beside(here, 'new')}",
        why="The file system cannot exchange two folders at once, or the process that replaced "
        "the run has ended between two renames.",
        remedy="Try again in a moment; else run the same 'zarrtrace extract --overwrite' again.",
    )


def lazy_dataset(
    path: Location,
    trace: Group[TraceAttributes] | Group[TableAttributes],
    chunks: ChunkSpec,
    staged: Mapping[str, Mapping[str, FileIndex]] | None = None,
) -> xr.Dataset:
    """Build a dataset of lazy arrays, none of them read but the coordinates of dimensions."""
    variables: dict[str, xr.Variable] = {}
    coordinates: dict[str, xr.Variable] = {}
    indexes: dict[Hashable, PandasIndex] = {}
    for name in sorted(trace.nodes):
        array = open_array(trace, name, None if staged is None else staged.get(name))
        if array.encoding.layout.dims == (name,):
            coordinates[name], indexes[name] = _index(name, array, trace)
            continue
        target = coordinates if name in trace.labels else variables
        target[name] = _variable(array)
    ds = xr.Dataset(variables, xr.Coordinates(coordinates, indexes), trace.plain)
    ds.encoding = source_of(path)
    return ds if chunks is None else _chunk(ds, chunks)


class _LazyArray(BackendArray):
    """An array of a trace, for xarray to index."""

    def __init__(self, array: StoredArray) -> None:
        self._array = array
        self.shape, self.dtype = array.encoding.shape, array.encoding.dtype

    def __dask_tokenize__(self) -> tuple[str, str, str]:
        """Name what is read, so that dask can tell whether two graphs read the same."""
        content = repr((sorted(self._array.checksums.items()), self.shape, self.dtype.str))
        token = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        return ("zarrtrace", str(self._array.path), token)

    def __getitem__(self, key: Any) -> Any:
        """Index as xarray asks."""
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._array.read)


def _variable(array: StoredArray) -> xr.Variable:
    """Wrap an array as xarray's own backends do: lazy, read once, and safe to assign to."""
    how = array.encoding
    lazy: Any = indexing.LazilyIndexedArray(_LazyArray(array))
    cached: Any = indexing.MemoryCachedArray
    data = cached(indexing.CopyOnWriteArray(lazy))
    cut = {"chunks": how.chunks} | ({"shards": how.file_shape} if how.is_sharded else {})
    # fastpath: pandas would look whether text is dates.
    return xr.Variable(how.layout.dims, data, how.layout.attributes, cut, fastpath=True)


def _index(
    name: str, array: StoredArray, trace: Group[TraceAttributes] | Group[TableAttributes]
) -> tuple[xr.Variable, PandasIndex]:
    """Return the index of a dimension, read only where the attributes do not say what it holds."""
    (size,) = array.encoding.shape
    tokens = trace.encodings["key"].shape[0] if "key" in trace.encodings else 0
    labels: np.ndarray
    if name in ("layer", "attention_layer"):
        labels = np.asarray(trace.attributes.layers_of(name), np.int64)
    elif name == "attention_query" or (name == "query" and size != tokens):
        labels = array.load()
        if not size or labels[0] < 0 or labels[-1] >= tokens or (np.diff(labels) < 1).any():
            raise damaged(array.path, f"it holds no ascending positions of the {tokens} tokens")
    else:
        labels = np.arange(size, dtype=np.int64)
    first = int(labels[0]) if size else 0
    counted = pd.RangeIndex(first, first + size)
    # Most are: one of 32,768 features is then looked up without a table made for it.
    index = PandasIndex(counted if np.array_equal(counted, labels) else labels, name)
    variable = xr.Variable((name,), index.index, array.encoding.layout.attributes)
    return index.create_variables({name: variable})[name], index


def _chunk(ds: xr.Dataset, chunks: ChunkSpec) -> xr.Dataset:
    """Put arrays on dask: in blocks of whole layers, or as asked for."""
    if chunks and chunks != "auto":
        return ds.chunk(chunks)
    return ds.assign(
        {name: array.chunk(_blocks(array.variable)) for name, array in ds.data_vars.items()}
    )


def _blocks(variable: xr.Variable) -> dict[Hashable, int]:
    """Choose dask's blocks: several whole layers, or rows of chunks of a large one.

    Dask spends about a millisecond a task, as much as reading a row of a layer takes.
    """
    shape = dict(zip(variable.dims, variable.shape, strict=True))
    chunks = dict(zip(variable.dims, variable.encoding["chunks"], strict=True))
    first = variable.dims[0]
    if first not in ("layer", "attention_layer"):
        return dict(shape)
    layer_bytes = math.prod(variable.shape[1:]) * variable.dtype.itemsize
    if layer_bytes > 2 * _BLOCK_BYTES:
        row = next(dim for dim in variable.dims if dim in ROWS)
        rows = max(1, _BLOCK_BYTES * shape[row] // (layer_bytes * chunks[row])) * chunks[row]
        return {**shape, first: 1, row: min(rows, shape[row])}
    return {**shape, first: max(1, min(shape[first], _BLOCK_BYTES // max(layer_bytes, 1)))}
