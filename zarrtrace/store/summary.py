"""A run or a table at a glance: sizes, layers, completeness. Reads metadata only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from zarrtrace.errors import NotATraceError
from zarrtrace.format.attributes import FORMAT_VERSION, MetadataValue, TraceAttributes
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.array import open_array
from zarrtrace.store.column_summary import ColumnSummary, summarize_columns
from zarrtrace.store.metadata import (
    Group,
    kind_of,
    read_run,
    read_scenario,
    read_table,
    read_trace,
)
from zarrtrace.store.nodes import encoded
from zarrtrace.store.staged import read_staged, staging_folder
from zarrtrace.store.staged_table import read_staged_table

# Traces that are read before progress is told.
_AT_ONCE = 64


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
    metadata: dict[str, MetadataValue]
    model: str | None
    sae_release: str | None
    sae_ids: tuple[str, ...]
    repeat: int | None = None
    choice: str | None = None
    completion: str | None = None


class RunSummary(BaseModel):
    """A run at a glance; a trace that stands alone is a run of one.

    Attributes
    ----------
    scenarios, scenarios_complete
        Numbers of all scenarios, and of those that are complete.
    traces
        Summaries of traces, in the run's order.
    scenarios_missing
        Scenarios that were not begun.
    bytes_on_disk, bytes_dense
        Sizes of `traces`.
    """

    path: str
    format_version: int
    complete: bool
    scenarios: int
    scenarios_complete: int
    traces: tuple[TraceSummary, ...]
    scenarios_missing: tuple[str, ...]
    bytes_on_disk: int
    bytes_dense: int

    @property
    def compression(self) -> float:
        """Ratio of dense bytes to bytes on disk."""
        return self.bytes_dense / max(1, self.bytes_on_disk)


class TableSummary(BaseModel):
    """A table at a glance.

    Attributes
    ----------
    samples, samples_done
        All, and those that are stored; a table that is being written has fewer.
    failed
        Why scenarios were not computed, by name.
    columns
        Tags and columns of metadata, of a table that is complete.
    generated
        Whether it marks samples of text that the model generated.
    """

    path: str
    format_version: int
    complete: bool
    scenarios: int
    samples: int
    samples_done: int
    positions: str
    layers: tuple[int, ...]
    layers_without_sae: tuple[int, ...]
    arrays: dict[str, tuple[int, ...]]
    metadata: tuple[str, ...]
    columns: dict[str, ColumnSummary]
    failed: dict[str, str]
    files: int
    bytes_on_disk: int
    bytes_dense: int
    model: str | None
    sae_release: str | None
    sae_ids: tuple[str, ...]
    generated: bool = False

    @property
    def compression(self) -> float:
        """Ratio of dense bytes to bytes on disk."""
        return self.bytes_dense / max(1, self.bytes_on_disk)


def summarize_table(path: Address) -> TableSummary:
    """Summarise a table, complete or being written.

    Parameters
    ----------
    path
        Its folder, or its address.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    path = locate(path)
    try:
        table, done = read_table(path), None
    except NotATraceError:
        staged = read_staged_table(path)
        if staged is None or path.exists():  # a plain web server cannot say the latter
            raise
        table, done = staged
    samples = table.encodings["scenario"].shape[0]
    on_disk = _bytes_on_disk(table) + ((path / "zarr.json").size() if done is None else 0)
    attributes = table.attributes
    return TableSummary(
        path=str(path),
        format_version=FORMAT_VERSION,
        complete=done is None,
        scenarios=attributes.scenarios,
        samples=samples,
        samples_done=samples if done is None else done,
        positions=attributes.positions,
        layers=attributes.layers,
        layers_without_sae=attributes.layers_without_sae,
        arrays=_arrays(table),
        metadata=attributes.metadata,
        columns=summarize_columns(table) if done is None else {},
        failed=attributes.failed,
        files=sum(map(len, table.checksums.values())) + len(table.nodes) + 1,
        bytes_on_disk=on_disk,
        bytes_dense=_bytes_dense(table),
        model=None if attributes.model is None else attributes.model.id,
        sae_release=next((one.release for one in attributes.saes.values()), None),
        sae_ids=_sae_ids(table),
        generated="generated" in table.nodes and "generated" not in attributes.metadata,
    )


def summarize(
    path: Address,
    *,
    first: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RunSummary:
    """Summarise a run, or a trace that stands alone.

    Parameters
    ----------
    path
        Its folder, or its address.
    first
        Summarise no more than the first scenarios, and only count the others; all if None. The
        metadata of each takes some milliseconds to read.
    progress
        Called with the number of scenarios that were read, and of all that will be.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    path = locate(path)
    if kind_of(path) == "trace":
        trace = _trace(path, in_run=False)
        complete = int(trace is not None and trace.complete)
        return _summary(path, (trace,), scenarios=1, complete=complete, missing=())
    run = read_run(path).attributes  # refuses a table
    if not (run.complete or path.backend.listable):
        first = None  # only reading them tells which are there
    names, later = run.scenarios[:first], run.scenarios[len(run.scenarios[:first]) :]
    published = {*path.present(run.scenarios)}
    begun = published | {*locate(staging_folder(path)).present(run.scenarios)}
    found = _each(path, [name for name in names if name in begun], progress)
    known = {trace.scenario for trace in found} | {name for name in later if name in begun}
    complete = sum(trace.complete for trace in found) + sum(name in published for name in later)
    return _summary(
        path,
        found,
        scenarios=len(run.scenarios),
        complete=complete,
        missing=tuple(name for name in run.scenarios if name not in known),
        is_finished=run.complete,
    )


def _each(
    run: Location, names: Sequence[str], progress: Callable[[int, int], None] | None
) -> tuple[TraceSummary, ...]:
    """Summarise traces; those that were not begun are left out."""
    found: list[TraceSummary] = []
    for start in range(0, len(names), _AT_ONCE):
        some = [run / name for name in names[start : start + _AT_ONCE]]
        traces = run.each(partial(_trace, in_run=True), some)
        found += [trace for trace in traces if trace is not None]
        if progress is not None:
            progress(start + len(some), len(names))
    return tuple(found)


def _summary(
    path: Location,
    traces: Sequence[TraceSummary | None],
    *,
    scenarios: int,
    complete: int,
    missing: tuple[str, ...],
    is_finished: bool = True,
) -> RunSummary:
    found = tuple(trace for trace in traces if trace is not None)
    return RunSummary(
        path=str(path),
        format_version=FORMAT_VERSION,
        complete=is_finished and complete == scenarios,
        scenarios=scenarios,
        scenarios_complete=complete,
        traces=found,
        scenarios_missing=missing,
        bytes_on_disk=sum(trace.bytes_on_disk for trace in found),
        bytes_dense=sum(trace.bytes_dense for trace in found),
    )


def _trace(path: Location, *, in_run: bool) -> TraceSummary | None:
    """Summarise a trace, complete or staged; None if it was not begun."""
    missing: tuple[int, ...] = ()
    is_complete = True
    try:
        group = read_scenario(path.parent, path.name) if in_run else read_trace(path)
    except NotATraceError:
        staged = read_staged(path)
        if staged is None:
            return None
        (group, missing, indexes), is_complete = staged, False
        on_disk = sum(one.checksum.bytes for files in indexes.values() for one in files.values())
    else:
        on_disk = (path / "zarr.json").size() + _bytes_on_disk(group)
    dims: dict[str, int] = {}
    for how in group.encodings.values():
        dims |= dict(zip(how.layout.dims, how.shape, strict=True))
    attributes = group.attributes
    return TraceSummary(
        scenario=attributes.name,
        complete=is_complete,
        layers=attributes.layers,
        missing_layers=missing,
        tokens=dims.get("key", 0),
        dims=dims,
        arrays=_arrays(group),
        bytes_on_disk=on_disk,
        bytes_dense=_bytes_dense(group),
        tags=attributes.tags,
        metadata=attributes.metadata,
        model=None if attributes.model is None else attributes.model.id,
        sae_release=next((one.release for one in attributes.saes.values()), None),
        sae_ids=_sae_ids(group),
        repeat=attributes.repeat,
        choice=attributes.choice,
        completion=None if attributes.generation is None else attributes.generation.text,
    )


def _arrays(group: Group[Any]) -> dict[str, tuple[int, ...]]:
    """Return shapes of the arrays that have several dimensions."""
    return {name: how.shape for name, how in group.encodings.items() if len(how.shape) > 1}


def _bytes_dense(group: Group[Any]) -> int:
    arrays = [how for how in group.encodings.values() if len(how.shape) > 1]
    return sum(math.prod(how.shape) * how.dtype.itemsize for how in arrays)


def _bytes_on_disk(group: Group[Any]) -> int:
    """Return the bytes of arrays' files and metadata."""
    files = [one for found in group.checksums.values() for one in found.values()]
    return sum(one.bytes for one in files) + sum(len(encoded(one)) for one in group.nodes.values())


def _sae_ids(group: Group[TraceAttributes] | Group[TableAttributes]) -> tuple[str, ...]:
    names = [name for name in group.nodes if name.startswith("sae_id")]
    return tuple(text for name in names for text in open_array(group, name).load() if text)
