"""Opening many traces: metadata from one file each, coordinates once, files checked when read.

What :func:`zarrtrace.store.open_trace` looks at takes milliseconds a trace
(``scripts/bench_read.py``), which a run of thousands cannot afford. Here the arrays' metadata comes
from the consolidated metadata of the trace, which is dropped whenever the trace is written to; that
files have their sizes, and each array its own metadata, is checked when the array is first read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from xarray.core.indexes import PandasIndex

from zarrtrace.spec import NAMESPACE, Stored, TraceAttributes
from zarrtrace.store.attributes import COORDINATES, METADATA, parse_array
from zarrtrace.store.checked import CheckedArray, OpenedTrace, Written
from zarrtrace.store.encoding import Encoding
from zarrtrace.store.lazy import StoredArray, as_lazy
from zarrtrace.store.objects import Location, ObjectPath
from zarrtrace.store.remote import Files, RemoteArray

# What a block of dask's may hold at most, unless one file holds more.
_BLOCK_BYTES = 32 * 2**20

#: An array whose files are checked when they are read.
Checked = CheckedArray | RemoteArray


class Pattern(NamedTuple):
    """What traces have in common whose arrays and indexes are alike, made once.

    Attributes
    ----------
    nodes
        Metadata by array.
    arrays
        How what is no index is encoded, and its first dimension, by name.
    dataset
        A trace without attributes, with its indexes, and with nothing in its other variables.
    """

    nodes: Mapping[str, dict[str, Any]]
    arrays: dict[str, tuple[Encoding, str]]
    dataset: xr.Dataset


class Shared:
    """What was made for a trace and serves others of its run.

    Attributes
    ----------
    indexes
        By name and the hash of their content: most are alike in all traces.
    patterns
        By what the journal says of metadata and indexes.
    """

    def __init__(self) -> None:
        self.indexes: dict[tuple[str, Stored], tuple[xr.Variable, PandasIndex]] = {}
        self.patterns: dict[Hashable, Pattern] = {}


def open_consolidated(
    path: Location,
    group: dict[str, Any],
    attributes: TraceAttributes,
    shared: Shared,
    *,
    blocks: bool,
) -> xr.DataTree | None:
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
        What was made before; added to. Texts are read when they are first asked for.
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
) -> xr.DataTree | None:
    """Open a trace whose arrays' metadata, by name, was read; see :func:`open_consolidated`."""
    try:
        pattern = _pattern(path, group, nodes, attributes, shared)
    except _OtherEncodingError:
        return None
    node = xr.DataTree(pattern.dataset)  # which copies variables
    variables, trace = (
        node.variables,
        OpenedTrace(str(path), group["attributes"][NAMESPACE].get("blake2b")),
    )
    for name, (encoding, first) in pattern.arrays.items():
        variable, array = variables[name], _array(path, name, encoding, first, attributes, trace)
        variable.data = as_lazy(array)
        if blocks and name in pattern.dataset.data_vars:
            variable.data = _blocks(variable, path, name, array, attributes)
    node.attrs = {k: v for k, v in group["attributes"].items() if k != "coordinates"}
    return node


class _OtherEncodingError(Exception):
    """A trace is encoded in another way than ours."""


def _pattern(
    path: Location,
    group: dict[str, Any],
    nodes: Mapping[str, dict[str, Any]],
    attributes: TraceAttributes,
    shared: Shared,
) -> Pattern:
    """Return the pattern of a trace: one that is shared, or a new one."""
    text = group["attributes"].get("coordinates", "")
    labels = set(text.split())
    indexes = {k: v for k, v in attributes.stored[COORDINATES].items() if k not in labels}
    journals = (attributes.stored[METADATA], indexes)
    key = text, *((k, v.bytes, v.blake2b) for journal in journals for k, v in journal.items())
    found = shared.patterns.get(key)
    # Nobody has compared the metadata with its hashes.
    if found is None or found.nodes != nodes:
        found = shared.patterns[key] = _new_pattern(path, labels, nodes, attributes, shared)
    return found


def _new_pattern(
    path: Location,
    labels: set[str],
    nodes: Mapping[str, dict[str, Any]],
    attributes: TraceAttributes,
    shared: Shared,
) -> Pattern:
    arrays: dict[str, tuple[Encoding, str]] = {}
    variables: dict[str, xr.Variable] = {}
    coordinates: dict[str, xr.Variable] = {}
    indexes: dict[str, PandasIndex] = {}
    for name, metadata in sorted(nodes.items()):
        dims = parse_array(path / name, lambda metadata=metadata: metadata).dims  # type: ignore[misc]
        try:
            encoding = Encoding(metadata)
        except (ValueError, KeyError, TypeError) as error:
            raise _OtherEncodingError from error
        if dims != (name,):
            arrays[name] = encoding, dims[0]
            nothing = np.broadcast_to(np.empty((), encoding.dtype), encoding.shape)
            variable = variable_of(nothing, encoding, metadata)
            (coordinates if name in labels else variables)[name] = variable
            continue
        key = name, attributes.stored[COORDINATES][name]
        if key not in shared.indexes:
            array = _array(path, name, encoding, name, attributes, None)
            shared.indexes[key] = load_index(name, array, metadata, attributes)
        coordinates[name], indexes[name] = shared.indexes[key]
    return Pattern(nodes, arrays, xr.Dataset(variables, xr.Coordinates(coordinates, indexes)))


def _array(
    path: Location,
    name: str,
    encoding: Encoding,
    first: str,
    attributes: TraceAttributes,
    trace: OpenedTrace | None,
) -> Checked:
    if isinstance(path, ObjectPath):
        return RemoteArray(path / name, encoding, Files.of(name, first, attributes))
    return CheckedArray(encoding, Written.of(str(path), name, encoding, first, attributes), trace)


def variable_of(data: Any, encoding: Encoding, metadata: dict[str, Any]) -> xr.Variable:
    """Return a variable of an array, or of what stands for it."""
    cut = {"chunks": encoding.chunks, "shards": encoding.shards}
    # fastpath: pandas would look whether text is dates.
    dims, attrs = metadata["dimension_names"], metadata["attributes"]
    return xr.Variable(dims, data, attrs, cut, fastpath=True)


def _blocks(
    variable: xr.Variable, path: Location, name: str, array: Checked, attributes: TraceAttributes
) -> Any:
    """Return a variable's array on dask, in blocks of whole files: tasks never share one.

    Blocks are named by what the journal says of their content: dask would pickle the array for a
    name.
    """
    trace = str(path)
    content = [entry[name].blake2b for entry in attributes.stored.values() if name in entry]
    token = hashlib.blake2b("".join([trace, name, *content]).encode(), digest_size=16).hexdigest()
    chunks = whole_files(variable, array.encoding.file_shape)
    return variable.chunk(chunks, name=f"{name}-{token}").data


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
