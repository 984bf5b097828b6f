"""Opening runs and traces, lazily and labelled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from xarray.core.indexes import PandasIndex

from zarrtrace.errors import IncompleteError, IntegrityError, NotATraceError, ZarrtraceError
from zarrtrace.spec import LABELS, NAMESPACE, Stored, TraceAttributes
from zarrtrace.store.attributes import (
    COORDINATES,
    METADATA,
    REPAIR,
    ArrayMetadata,
    ArrayOnDisk,
    files_of_entry,
    incomplete,
    parse_array,
    read_group,
    read_metadata,
    read_run_attributes,
    read_trace_attributes,
    trace_attributes_of,
)
from zarrtrace.store.files import (
    fingerprint_of,
    names_there,
    no_collecting,
    read_all,
    size_of,
    sizes_below,
)
from zarrtrace.store.lazy import as_lazy, stored_array
from zarrtrace.store.objects import Location, ObjectPath, at_once, locate, zarr_place
from zarrtrace.store.opening import (
    Shared,
    load_index,
    open_consolidated,
    open_nodes,
    variable_of,
    whole_files,
)

Missing = Literal["raise", "nan"]
ChunkSpec = Mapping[str, Any] | Literal["auto"] | None


def open_trace(
    path: str | Location,
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
        arrays in blocks of whole files, of several layers where they are small; a mapping of
        dimensions to sizes, those.
    missing
        What to do if layers are missing: ``"raise"``, or ``"nan"`` to read them as NaN; arrays
        of a trace that lacks layers are dask arrays.
    storage_options
        How to reach an object store, as ``{"endpoint": "http://localhost:9000"}``; credentials are
        taken from the environment.

    Returns
    -------
    xr.Dataset
        ``attention (layer, head, query, key)``, ``features (layer, query, feature)`` and the rest
        of ``schema/README.md``, with token texts as loaded coordinates; from an object store they
        are read when they are first asked for.

    Raises
    ------
    NotATraceError
        If `path` is not a trace.
    FormatVersionError
        If a newer zarrtrace wrote it.
    IncompleteError
        If layers are missing.
    IntegrityError
        If files of a stored layer are gone or have another size.
    """
    path = locate(path, storage_options)
    group = read_group(path, "trace")
    attributes = trace_attributes_of(path, group)
    if missing == "raise" and not attributes.complete:
        raise incomplete(path, attributes)
    if COORDINATES not in attributes.stored:
        raise incomplete(path, attributes)  # its arrays are being created
    if isinstance(path, ObjectPath):
        ds = _open_there(path, group, attributes)
    else:
        arrays = _read_arrays(path, attributes)
        _check_sizes(path, attributes, arrays)
        with _damage_explained(path):
            ds = _open(path, group, arrays, attributes)
    _check_spans(path, attributes, ds.sizes.get("query", 0))
    if chunks is not None:
        ds = _chunk(ds, chunks)
    if attributes.missing_layers:
        ds = _without(ds, attributes.missing_layers)
    return ds


@no_collecting()
def open_run(
    path: str | Location,
    *,
    chunks: ChunkSpec = None,
    missing: Missing = "raise",
    storage_options: Mapping[str, str] | None = None,
) -> xr.DataTree:
    """Open a run, lazily: one child a scenario, in the suite's order.

    Parameters
    ----------
    path
        Folder of the run, or its address.
    chunks, missing, storage_options
        As for :func:`open_trace`; with ``missing="nan"``, scenarios not begun are left out.

    Returns
    -------
    xr.DataTree
        Its children are traces; its ``attrs`` hold the run's own attributes.

    Raises
    ------
    NotATraceError, FormatVersionError, IncompleteError, IntegrityError
        As for :func:`open_trace`; but of a complete trace, files that are gone or have another
        size are found when the array is first read.
    """
    path = locate(path, storage_options)
    run = read_run_attributes(path)
    there = names_there(path, run.scenarios)
    groups = _groups_there(path, there) if isinstance(path, ObjectPath) else {}
    begun = {name for name in there if _begun(path / name, groups.get(name), whole=run.complete)}
    absent = [name for name in run.scenarios if name not in begun]
    if absent and missing == "raise":
        raise IncompleteError(
            f"{path}: {len(absent)} of {len(run.scenarios)} scenarios are not there: "
            + ", ".join(absent[:5]),
            why="The extraction was interrupted, or is still going on.",
            remedy="Run the same 'zarrtrace extract' again to go on, or open it with "
            "missing='nan'.",
        )
    shared = Shared()
    tree = xr.DataTree(xr.Dataset(attrs={NAMESPACE: run.model_dump(mode="json")}), name=path.name)
    tree.children = {  # given to DataTree() they would be copied
        name: _one_of_many(path / name, groups.get(name), chunks, missing, shared)
        for name in run.scenarios
        if name in begun
    }
    return tree


def _groups_there(run: ObjectPath, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the metadata of the traces that are there, some at a time."""

    def read(name: str) -> dict[str, Any] | None:
        try:
            return read_group(run / name)
        except NotATraceError:
            return None

    found = zip(names, at_once(read, names), strict=True)
    return {name: group for name, group in found if group is not None}


def _one_of_many(
    path: Location,
    group: dict[str, Any] | None,
    chunks: ChunkSpec,
    missing: Missing,
    shared: Shared,
) -> xr.DataTree:
    """Open a trace as :func:`open_trace` does, but check its files when they are read."""
    group = group or read_group(path)
    attributes = trace_attributes_of(path, group)
    with _damage_explained(path):
        blocks = chunks is not None and chunks in ("auto", {})
        node = open_consolidated(path, group, attributes, shared, blocks=blocks)
    if node is None:
        return xr.DataTree(open_trace(path, chunks=chunks, missing=missing))
    _check_spans(path, attributes, node.sizes.get("query", 0))
    return node if chunks is None or blocks else xr.DataTree(node.to_dataset().chunk(chunks))


def _check_spans(path: Location, attributes: TraceAttributes, tokens: int) -> None:
    for name, span in attributes.spans.items():
        if any(at >= tokens for at in span.tokens):
            raise IntegrityError(
                f"{path}: span {name!r} has positions beyond the prompt's {tokens} tokens",
                why="The attributes are not what zarrtrace writes.",
                remedy=REPAIR,
            )


def _begun(path: Location, group: dict[str, Any] | None, *, whole: bool) -> bool:
    """Tell whether a trace's arrays and coordinates are there; layers may be missing."""
    if isinstance(path, ObjectPath):
        return group is not None and COORDINATES in trace_attributes_of(path, group).stored
    if not (path / "zarr.json").exists():
        return False
    return whole or COORDINATES in read_trace_attributes(path).stored


@contextlib.contextmanager
def _damage_explained(path: Location) -> Iterator[None]:
    """Turn what damaged metadata makes Zarr and xarray raise into an error that helps."""
    try:
        yield
    except ZarrtraceError:
        raise
    except Exception as error:  # what they raise depends on what is broken
        raise IntegrityError(
            f"{path}: cannot be opened: {str(error).partition(chr(10))[0] or type(error).__name__}",
            why="The metadata of its arrays is not what zarrtrace writes.",
            remedy=REPAIR,
        ) from error


def _open(
    path: Path,
    group: dict[str, Any],
    arrays: Mapping[str, ArrayMetadata],
    attributes: TraceAttributes,
) -> xr.Dataset:
    """Open all arrays, none of them read but the coordinates of dimensions."""
    labels = set(group["attributes"].get("coordinates", "").split())
    variables: dict[str, xr.Variable] = {}
    coordinates: dict[str, xr.Variable] = {}
    indexes: dict[str, PandasIndex] = {}
    for name, (found, metadata, _) in sorted(arrays.items()):
        opened = stored_array(path / name, metadata)
        if opened is None:
            with _damage_explained(path / name / "zarr.json"):
                _array_of(path, name)  # names the array that cannot be opened
            plain: xr.Dataset = xr.open_zarr(path, chunks=None, consolidated=False, zarr_format=3)
            return _with_loaded_labels(plain)
        array, _ = opened
        if found.dims == (name,):
            coordinates[name], indexes[name] = load_index(name, array, metadata, attributes)
        else:
            # Lazy text would make where(ds.query_token == ...) read the disk each time.
            data = array.load() if array.dtype == object else as_lazy(array)
            variable = variable_of(data, array.encoding, metadata)
            (coordinates if name in labels else variables)[name] = variable
    rest = {key: value for key, value in group["attributes"].items() if key != "coordinates"}
    return xr.Dataset(variables, xr.Coordinates(coordinates, indexes), rest)


def _open_there(path: ObjectPath, group: dict[str, Any], attributes: TraceAttributes) -> xr.Dataset:
    """Open a trace in an object store: two requests if it is complete.

    Sizes are compared where one request lists them all, else when files are read.
    """
    names = sorted(attributes.stored.get(METADATA, {}))
    nodes = (group.get("consolidated_metadata") or {}).get("metadata", {})
    if not attributes.complete or sorted(nodes) != names:
        nodes = _nodes_there(path, attributes.stored[METADATA])
    sizes = sizes_below(path)
    if sizes is not None:
        arrays = {
            name: parse_array(path / name, lambda node=node: node)  # type: ignore[misc]
            for name, node in nodes.items()
        }
        _compare_sizes(path, attributes, arrays, sizes)
    with _damage_explained(path):
        node = open_nodes(path, group, nodes, attributes, Shared(), blocks=False)
    if node is None:
        plain: xr.Dataset = xr.open_zarr(zarr_place(path), chunks=None, zarr_format=3)
        return _with_loaded_labels(plain)
    return node.to_dataset()


def _nodes_there(path: ObjectPath, journal: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    """Read the metadata of each array."""
    contents = read_all([path / name / "zarr.json" for name in journal])
    nodes = {}
    for (name, stored), content in zip(journal.items(), contents, strict=True):
        if fingerprint_of([content]) != stored:
            raise _other_metadata(path / name)
        try:
            nodes[name] = json.loads(content)
        except (ValueError, RecursionError):
            raise _other_metadata(path / name) from None
    return nodes


def _read_arrays(path: Path, attributes: TraceAttributes) -> dict[str, ArrayMetadata]:
    """Read the metadata of a trace's arrays: those that are there, and those that should be.

    Raises
    ------
    IntegrityError
        If it is gone or damaged.
    """
    names = {file.parent.name for file in path.glob("*/zarr.json")}
    names |= {name for entry in attributes.stored.values() for name in entry}
    return {name: read_metadata(path / name) for name in names}


def _check_sizes(
    path: Path, attributes: TraceAttributes, arrays: Mapping[str, ArrayMetadata]
) -> None:
    """Refuse a trace in which files of a stored layer are gone or have another size.

    Raises
    ------
    IntegrityError
    """
    for name, stored in attributes.stored.get(METADATA, {}).items():
        if arrays[name].stored != stored:
            raise _other_metadata(path / name)
    _compare_sizes(path, attributes, {name: one.array for name, one in arrays.items()}, None)


def _other_metadata(array: Location) -> IntegrityError:
    return IntegrityError(
        f"{array}/zarr.json: not the metadata that was written",
        why="The file was damaged, or edited by hand.",
        remedy=REPAIR,
    )


def _compare_sizes(
    path: Location,
    attributes: TraceAttributes,
    arrays: Mapping[str, ArrayOnDisk],
    sizes: Mapping[str, int] | None,
) -> None:
    for key, entry in attributes.stored.items():
        for name, stored in entry.items() if key != METADATA else ():
            array = arrays[name]
            files = files_of_entry(attributes, key, name, array.dims, array.shape, array.file_shape)
            found = size_of(path, files, sizes)
            if found != stored.bytes:
                of = f"layer {key}" if key.isdigit() else key
                raise IntegrityError(
                    f"{path}: array {name!r} has {found} bytes on disk for {of}, "
                    f"not {stored.bytes}",
                    why="Files were lost, cut short or replaced, for example by an interrupted "
                    "copy.",
                    remedy=REPAIR,
                )


def _chunk(ds: xr.Dataset, chunks: ChunkSpec) -> xr.Dataset:
    """Chunk every variable by whole shards: dask tasks never share one."""
    if chunks and chunks != "auto":
        return ds.chunk(chunks)
    return ds.assign(
        {
            name: variable.chunk(
                whole_files(
                    variable.variable,
                    variable.encoding.get("shards") or variable.encoding["chunks"],
                )
            )
            for name, variable in ds.data_vars.items()
        }
    )


def _without(ds: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    """Read layers as NaN, whatever files a killed writer left and whatever the fill value is."""
    found = {}
    for name, variable in (ds if ds.chunks else _chunk(ds, "auto")).data_vars.items():
        dim = str(variable.dims[0])
        if variable.dtype.kind == "f" and dim in ("layer", "attention_layer"):
            found[name] = variable.where(~ds[dim].isin(layers))
    return ds.assign(found)


def _with_loaded_labels(ds: xr.Dataset) -> xr.Dataset:
    # NumPy's strings of variable width are turned into objects, which every part of xarray handles.
    loaded = {
        name: ds[name].copy(data=np.asarray(ds[name].values, dtype=object))
        for name in LABELS
        if name in ds.coords and ds[name].dtype.kind not in "iub"
    }
    return ds.assign_coords(loaded)


def _array_of(path: Location, name: str) -> zarr.Array[Any]:
    """Open one array of a trace with plain Zarr."""
    path = path / name
    with _damage_explained(path):
        return zarr.open_array(zarr_place(path), mode="r")
