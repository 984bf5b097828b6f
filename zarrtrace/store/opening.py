"""Opening many traces: metadata from one file each, coordinates once, files checked when read.

What :func:`zarrtrace.store.open_trace` looks at takes milliseconds a trace (README.md has the
figures), which a run of thousands cannot afford. Here the arrays' metadata comes from the
consolidated metadata of the trace, which is dropped whenever the trace is written to; that files
have their sizes, and each array its own metadata, is checked when the array is first read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from xarray.core.indexes import PandasIndex

from zarrtrace.errors import IntegrityError
from zarrtrace.spec import Stored, TraceAttributes
from zarrtrace.store.attributes import (
    COORDINATES,
    METADATA,
    REPAIR,
    ArrayOnDisk,
    files_of,
    parse_array,
)
from zarrtrace.store.files import fingerprint_of, size_of
from zarrtrace.store.lazy import StoredArray, as_lazy
from zarrtrace.store.objects import Location, ObjectPath
from zarrtrace.store.remote import Files, RemoteArray

# What a block of dask's may hold at most, unless one file holds more.
_BLOCK_BYTES = 32 * 2**20

# Indexes by name and the hash of their content: most are alike in all traces.
Shared = dict[tuple[str, Stored], tuple[xr.Variable, PandasIndex]]


class Written(NamedTuple):
    """What the journal says of one array.

    Attributes
    ----------
    trace, name
        Folder of the trace, and the array's name.
    shape, file_shape
        Of the array, and of what one file holds.
    metadata
        Of its zarr.json.
    bytes
        By the journal's key: which of its files (those of a layer by its place, or None for all),
        and their size.
    """

    trace: str
    name: str
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    metadata: Stored
    bytes: dict[str, tuple[int | None, int]]

    def check(self) -> None:
        """Refuse an array whose files are gone, have another size, or whose metadata was changed.

        Raises
        ------
        IntegrityError
        """
        file = Path(self.trace, self.name, "zarr.json")
        # A pipe in its place would be waited for forever.
        if not file.is_file() or fingerprint_of([file.read_bytes()]) != self.metadata:
            raise IntegrityError(
                f"{file}: not the metadata that was written",
                why="The file was damaged, or edited by hand.",
                remedy=REPAIR,
            )
        for key, (at, written) in self.bytes.items():
            found = size_of(self.trace, files_of(self.name, self.shape, self.file_shape, at))
            if found != written:
                of = f"layer {key}" if key.isdigit() else key
                raise IntegrityError(
                    f"{self.trace}: array {self.name!r} has {found} bytes on disk for {of}, "
                    f"not {written}",
                    why="Files were lost, cut short or replaced, for example by an interrupted "
                    "copy.",
                    remedy=REPAIR,
                )


class CheckedArray(StoredArray):
    """An array of a trace whose files are checked before it is first read."""

    def __init__(self, path: Path, metadata: dict[str, Any], written: Written) -> None:
        super().__init__(path, metadata)
        self.written = written
        self._unchecked = True

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        if self._unchecked:  # by several threads at once: each may look
            self.written.check()
            self._unchecked = False
        return super()._read(key)


#: An array whose files are checked when they are read.
Checked = CheckedArray | RemoteArray


def open_consolidated(
    path: Location,
    group: dict[str, Any],
    attributes: TraceAttributes,
    shared: Shared,
    *,
    blocks: bool,
) -> xr.Dataset | None:
    """Open a complete trace from its consolidated metadata; None if it cannot be done so.

    Parameters
    ----------
    path
        Folder of the trace.
    group
        Its zarr.json.
    attributes
        What it says of itself.
    shared
        Indexes that were loaded before; added to. Texts are read when they are first asked for.
    blocks
        Whether to give dask arrays, whole files a block.
    """
    nodes = (group.get("consolidated_metadata") or {}).get("metadata", {})
    journal = attributes.stored.get(METADATA, {})
    if not attributes.complete or set(nodes) != set(journal) or not nodes:
        return None
    return open_nodes(path, group, nodes, attributes, shared, blocks=blocks)


def open_nodes(
    path: Location,
    group: dict[str, Any],
    nodes: Mapping[str, dict[str, Any]],
    attributes: TraceAttributes,
    shared: Shared,
    *,
    blocks: bool,
) -> xr.Dataset | None:
    """Open a trace whose arrays' metadata, by name, was read; see :func:`open_consolidated`."""
    labels = set(group["attributes"].get("coordinates", "").split())
    variables: dict[str, xr.Variable] = {}
    coordinates: dict[str, xr.Variable] = {}
    indexes: dict[str, PandasIndex] = {}
    for name, metadata in sorted(nodes.items()):
        found = parse_array(path / name, lambda metadata=metadata: metadata)  # type: ignore[misc]
        try:
            array = _array(path, name, metadata, found, attributes)
        except (ValueError, KeyError, TypeError):
            return None  # in another encoding than ours
        if found.dims == (name,):
            stored = attributes.stored[COORDINATES][name]
            if (name, stored) not in shared:
                shared[name, stored] = load_index(name, array, metadata, attributes)
            coordinates[name], indexes[name] = shared[name, stored]
            continue
        variable = variable_of(array, metadata)
        if name in labels:
            coordinates[name] = variable
        else:
            variables[name] = (
                _blocks(variable, path, name, array, attributes) if blocks else variable
            )
    rest = {k: v for k, v in group["attributes"].items() if k != "coordinates"}
    return xr.Dataset(variables, xr.Coordinates(coordinates, indexes), rest)


def _array(
    path: Location,
    name: str,
    metadata: dict[str, Any],
    found: ArrayOnDisk,
    attributes: TraceAttributes,
) -> Checked:
    if isinstance(path, ObjectPath):
        return RemoteArray(path / name, metadata, Files.of(name, found.dims, attributes))
    written = _written(path, name, found, attributes, attributes.stored[METADATA][name])
    return CheckedArray(path / name, metadata, written)


def _written(
    path: Path, name: str, found: ArrayOnDisk, attributes: TraceAttributes, metadata: Stored
) -> Written:
    sizes: dict[str, tuple[int | None, int]] = {}
    for key, entry in attributes.stored.items():
        if name in entry and key != METADATA:
            at = attributes.index_of(int(key), found.dims[0]) if key.isdigit() else None
            sizes[key] = at, entry[name].bytes
    return Written(str(path), name, found.shape, found.file_shape, metadata, sizes)


def variable_of(
    array: StoredArray, metadata: dict[str, Any], *, loaded: bool = False
) -> xr.Variable:
    """Return an array as a variable, which is read when it is first asked for unless `loaded`."""
    encoding = {"chunks": array.chunks, "shards": array.shards}
    data = array.load() if loaded else as_lazy(array)
    # fastpath: pandas would look whether text is dates.
    dims, attrs = metadata["dimension_names"], metadata["attributes"]
    return xr.Variable(dims, data, attrs, encoding, fastpath=True)


def _blocks(
    variable: xr.Variable, path: Location, name: str, array: Checked, attributes: TraceAttributes
) -> xr.Variable:
    """Return a variable on dask, in blocks of whole files: tasks never share one.

    Blocks are named by what the journal says of their content: dask would pickle the array for a
    name.
    """
    trace = str(path)
    content = [entry[name].blake2b for entry in attributes.stored.values() if name in entry]
    token = hashlib.blake2b("".join([trace, name, *content]).encode(), digest_size=16).hexdigest()
    chunks = whole_files(variable, array.file_shape)
    return variable.chunk(chunks, name=f"{name}-{token}")


def whole_files(variable: xr.Variable, file_shape: Sequence[int]) -> dict[Hashable, int]:
    """Choose dask's chunks: whole files, so that tasks never share one, of several small layers.

    Dask spends about a millisecond a task, as much as reading a row of a layer takes.
    """
    chunks = dict(zip(variable.dims, file_shape, strict=True))
    first = variable.dims[0]
    if first in ("layer", "attention_layer"):
        whole = zip(variable.shape[1:], file_shape[1:], strict=True)
        files = math.prod(min(size, step) for size, step in whole) * variable.dtype.itemsize
        chunks[first] = max(1, _BLOCK_BYTES // max(files, 1))
    return chunks


def load_index(
    name: str, array: StoredArray, metadata: dict[str, Any], attributes: TraceAttributes
) -> tuple[xr.Variable, PandasIndex]:
    """Load the index of a dimension; where it would take a request, from what the format says."""
    labels = _labels(name, array, attributes) if isinstance(array, RemoteArray) else array.load()
    first = int(labels[0]) if len(labels) else 0
    counted = pd.RangeIndex(first, first + len(labels))
    # Most are; looking one of 32,768 features up is then no search through a table made for it.
    index = PandasIndex(counted if np.array_equal(counted, labels) else labels, name)
    variable = xr.Variable((name,), index.index, metadata["attributes"])
    return index.create_variables({name: variable})[name], index


def _labels(name: str, array: StoredArray, attributes: TraceAttributes) -> np.ndarray:
    """Return the values of an index: the trace's layers, or positions."""
    (size,) = array.shape
    without = attributes.layers_without_attention
    layers = {
        "layer": list(attributes.layers),
        "attention_layer": [one for one in attributes.layers if str(one) not in without],
    }
    values = np.asarray(layers.get(name, np.arange(size)), array.dtype)
    if len(values) != size:
        raise ValueError(f"{name} has {size} values, not {len(values)}")
    return values
