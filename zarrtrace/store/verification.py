"""Checking that a run's files are the ones that were written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel

from zarrtrace.errors import StoreError
from zarrtrace.spec import Stored, TraceAttributes
from zarrtrace.store.attributes import (
    files_of,
    kind_of,
    read_array,
    read_run_attributes,
    read_trace_attributes,
)
from zarrtrace.store.files import fingerprint


class Problem(BaseModel):
    """Something that is wrong with a run, and where."""

    scenario: str
    array: str | None = None
    layer: int | None = None
    message: str


def verify(path: str | Path) -> list[Problem]:
    """Read every byte of a run, or of one trace, and compare it with the journal.

    Parameters
    ----------
    path
        Folder of the run or the trace.

    Returns
    -------
    list of Problem
        Empty if everything is there and as it was written.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        If the run's own attributes cannot be read.
    """
    path = Path(path)
    names = [""] if kind_of(path) == "trace" else list(read_run_attributes(path).scenarios)
    with ThreadPoolExecutor(4, thread_name_prefix="zarrtrace-verify") as pool:
        found = pool.map(lambda name: list(_trace(path / name, name or path.name)), names)
        return [problem for problems in found for problem in problems]


def _trace(path: Path, scenario: str) -> Iterator[Problem]:
    if not path.is_dir():
        yield Problem(scenario=scenario, message="not there: not extracted yet, or deleted")
        return
    try:
        attributes = read_trace_attributes(path)
    except StoreError as error:
        yield Problem(scenario=scenario, message=error.what)
        return
    for missing in attributes.missing_layers:
        yield Problem(scenario=scenario, layer=missing, message="not stored")
    for key, entry in attributes.stored.items():
        layer = int(key) if key.isdigit() else None
        for array, stored in entry.items():
            message = _compare(path, array, attributes, layer, stored)
            if message:
                yield Problem(scenario=scenario, array=array, layer=layer, message=message)


def _compare(
    path: Path, array: str, attributes: TraceAttributes, layer: int | None, stored: Stored
) -> str:
    try:
        metadata = read_array(path / array)
    except StoreError as error:
        return error.what
    at = None if layer is None else attributes.index_of(layer, metadata.dims[0])
    found = fingerprint(path, files_of(array, metadata.shape, metadata.file_shape, at))
    if found == stored:
        return ""
    if found.bytes != stored.bytes:
        return f"{found.bytes} bytes on disk, {stored.bytes} were written"
    return "its bytes are not the ones that were written"
