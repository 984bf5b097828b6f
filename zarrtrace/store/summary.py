"""A run at a glance: sizes, layers, completeness. Reads metadata only."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from zarrtrace.spec import TraceAttributes
from zarrtrace.store.attributes import (
    ArrayOnDisk,
    kind_of,
    names_below,
    parse_array,
    read_array,
    read_group,
    read_run_attributes,
    read_trace_attributes,
    trace_attributes_of,
)
from zarrtrace.store.files import each_of, names_there, sizes_below
from zarrtrace.store.objects import Location, ObjectPath, locate

_ITEMSIZE = {"float16": 2, "float32": 4, "uint32": 4, "int64": 8, "bool": 1}


class TraceSummary(BaseModel):
    """One scenario's trace at a glance."""

    scenario: str
    complete: bool
    layers: tuple[int, ...]
    missing_layers: tuple[int, ...]
    tokens: int
    dims: dict[str, int]
    arrays: dict[str, tuple[int, ...]]
    bytes_on_disk: int
    bytes_dense: int
    tags: tuple[str, ...]
    model: str | None
    sae_release: str | None
    sae_ids: tuple[str, ...]


class RunSummary(BaseModel):
    """A run at a glance; a trace that stands alone is a run of one."""

    path: str
    format_version: int
    complete: bool
    traces: tuple[TraceSummary, ...]
    scenarios_missing: tuple[str, ...]
    bytes_on_disk: int
    bytes_dense: int

    @property
    def compression(self) -> float:
        """How many dense bytes one byte on disk stands for."""
        return self.bytes_dense / max(1, self.bytes_on_disk)


def summarize(path: str | Location) -> RunSummary:
    """Summarise a run, or a trace that stands alone.

    Parameters
    ----------
    path
        Its folder, or its address.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    path = locate(path)
    names: tuple[str, ...]
    if kind_of(path) == "trace":
        names, complete, version = ("",), True, read_trace_attributes(path).format_version
    else:
        run = read_run_attributes(path)
        names, complete, version = run.scenarios, run.complete, run.format_version
    # The folder itself, if it is a trace.
    likely = names_there(path, names) if names != ("",) else list(names)
    folders = [path / name if name else path for name in likely]
    there = each_of(lambda folder: (folder / "zarr.json").is_file(), folders)
    present = {name for name, one in zip(likely, there, strict=True) if one}
    traces = tuple(
        each_of(_trace, [folder for folder, one in zip(folders, there, strict=True) if one])
    )
    return RunSummary(
        path=str(path),
        format_version=version,
        complete=complete and len(present) == len(names) and all(t.complete for t in traces),
        traces=traces,
        scenarios_missing=tuple(name for name in names if name not in present),
        bytes_on_disk=sum(trace.bytes_on_disk for trace in traces),
        bytes_dense=sum(trace.bytes_dense for trace in traces),
    )


def _trace(path: Location) -> TraceSummary:
    group = read_group(path)
    attributes = trace_attributes_of(path, group)
    dims: dict[str, int] = {}
    arrays: dict[str, tuple[int, ...]] = {}
    dense = 0
    for name, array in _arrays(path, group, attributes).items():
        dims |= dict(zip(array.dims, array.shape, strict=True))
        if len(array.shape) > 1:
            arrays[name] = array.shape
            dense += math.prod(array.shape) * _ITEMSIZE.get(array.dtype, 8)
    return TraceSummary(
        scenario=attributes.scenario,
        complete=attributes.complete,
        layers=attributes.layers,
        missing_layers=attributes.missing_layers,
        tokens=dims.get("query", 0),
        dims=dims,
        arrays=arrays,
        bytes_on_disk=_bytes_of(path, attributes),
        bytes_dense=dense,
        tags=attributes.tags,
        model=None if attributes.model is None else attributes.model.id,
        sae_release=_release(attributes),
        sae_ids=tuple(sae.id for sae in attributes.saes),
    )


def _arrays(
    path: Location, group: Mapping[str, Any], attributes: TraceAttributes
) -> dict[str, ArrayOnDisk]:
    """Return what the trace's arrays say of themselves; in an object store without a request."""
    nodes = (group.get("consolidated_metadata") or {}).get("metadata", {})
    if isinstance(path, ObjectPath) and attributes.complete:
        return {
            name: parse_array(path / name, functools.partial(nodes.__getitem__, name))
            for name in sorted(nodes)
        }
    return {name: read_array(path / name) for name in names_below(path)}


def _release(attributes: TraceAttributes) -> str | None:
    return next((sae.release for sae in attributes.saes if sae.release), None)


def _bytes_of(path: Location, attributes: TraceAttributes) -> int:
    if not isinstance(path, ObjectPath):
        return _bytes_below(path)
    sizes = sizes_below(path)
    if sizes is not None:
        return sum(sizes.values())
    return sum(stored.bytes for entry in attributes.stored.values() for stored in entry.values())


def _bytes_below(path: str | Path) -> int:
    with os.scandir(path) as entries:
        return sum(
            _bytes_below(entry.path) if entry.is_dir() else entry.stat().st_size
            for entry in entries
        )
