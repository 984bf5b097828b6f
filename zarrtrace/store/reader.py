"""Opening runs and traces, lazily and labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr

from zarrtrace.errors import IncompleteError, IntegrityError
from zarrtrace.spec import LABELS, NAMESPACE, TraceAttributes
from zarrtrace.store.attributes import (
    METADATA,
    REPAIR,
    files_of_entry,
    incomplete,
    read_array,
    read_run_attributes,
    read_trace_attributes,
)
from zarrtrace.store.files import fingerprint, size_of

Missing = Literal["raise", "nan"]
ChunkSpec = Mapping[str, Any] | Literal["auto"] | None


def open_trace(
    path: str | Path, *, chunks: ChunkSpec = None, missing: Missing = "raise"
) -> xr.Dataset:
    """Open one scenario's trace, lazily.

    Parameters
    ----------
    path
        Folder of the trace, inside a run or by itself.
    chunks
        None indexes lazily without dask, best for point reads. ``"auto"`` or ``{}`` gives dask
        arrays with one task a shard (one layer); a mapping of dimensions to sizes, those.
    missing
        What to do if layers are missing: ``"raise"``, or ``"nan"`` to read them as NaN; arrays
        of a trace that lacks layers are dask arrays.

    Returns
    -------
    xr.Dataset
        ``attention (layer, head, query, key)``, ``features (layer, query, feature)`` and the rest
        of ``schema/README.md``, with token texts as loaded coordinates.

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
    path = Path(path)
    attributes = read_trace_attributes(path)
    if missing == "raise" and not attributes.complete:
        raise incomplete(path, attributes)
    check_sizes(path, attributes)
    try:
        ds = xr.open_zarr(path, chunks=None, consolidated=attributes.complete, zarr_format=3)
    except ValueError:  # consolidated metadata is an extra: someone may have removed it
        ds = xr.open_zarr(path, chunks=None, consolidated=False, zarr_format=3)
    if chunks is not None:
        ds = _chunk(ds, chunks)
    if attributes.missing_layers:
        ds = _without(ds, attributes.missing_layers)
    return _with_loaded_labels(ds)


def open_run(
    path: str | Path, *, chunks: ChunkSpec = None, missing: Missing = "raise"
) -> xr.DataTree:
    """Open a run, lazily: one child a scenario, in the suite's order.

    Parameters
    ----------
    path
        Folder of the run.
    chunks, missing
        As for :func:`open_trace`; with ``missing="nan"``, scenarios not begun are left out.

    Returns
    -------
    xr.DataTree
        Its children are traces; its ``attrs`` hold the run's own attributes.

    Raises
    ------
    NotATraceError, FormatVersionError, IncompleteError, IntegrityError
        As for :func:`open_trace`.
    """
    path = Path(path)
    run = read_run_attributes(path)
    absent = [name for name in run.scenarios if not (path / name / "zarr.json").exists()]
    if absent and missing == "raise":
        raise IncompleteError(
            f"{path}: {len(absent)} of {len(run.scenarios)} scenarios are not there: "
            + ", ".join(absent[:5]),
            why="The extraction was interrupted, or is still going on.",
            remedy="Run the same 'zarrtrace extract' again to go on, or open it with "
            "missing='nan'.",
        )
    children = {
        name: open_trace(path / name, chunks=chunks, missing=missing)
        for name in run.scenarios
        if name not in absent
    }
    root = xr.Dataset(attrs={NAMESPACE: run.model_dump(mode="json")})
    return xr.DataTree.from_dict({"/": root, **children}, name=path.name)


def check_sizes(path: Path, attributes: TraceAttributes) -> None:
    """Refuse a trace in which files of a stored layer are gone or have another size.

    Raises
    ------
    IntegrityError
    """
    arrays = {
        name: read_array(path / name)
        for name in {name for entry in attributes.stored.values() for name in entry}
    }
    for name, stored in attributes.stored.get(METADATA, {}).items():
        if fingerprint(path, [f"{name}/zarr.json"]) != stored:
            raise IntegrityError(
                f"{path / name}/zarr.json: not the metadata that was written",
                why="The file was damaged, or edited by hand.",
                remedy=REPAIR,
            )
    for key, entry in attributes.stored.items():
        for name, stored in entry.items():
            array = arrays[name]
            files = files_of_entry(attributes, key, name, array.dims, array.shape, array.file_shape)
            found = size_of(path, files)
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
                dict(
                    zip(
                        variable.dims,
                        variable.encoding.get("shards") or variable.encoding["chunks"],
                        strict=True,
                    )
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
    # Lazy text would make where(ds.query_token == ...) read the disk each time; numpy's variable
    # width strings are turned into objects, which every part of xarray handles.
    loaded = {
        name: ds[name].copy(data=np.asarray(ds[name].values, dtype=object))
        for name in LABELS
        if name in ds.coords and ds[name].dtype.kind not in "iub"
    }
    return ds.assign_coords(loaded)


def array_of(path: str | Path, name: str) -> zarr.Array[Any]:
    """Open one array of a trace with plain Zarr."""
    return zarr.open_array(Path(path) / name, mode="r")
