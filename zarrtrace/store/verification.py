"""Checking that a run's files are the ones that were written."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import zarr
from pydantic import BaseModel

from zarrtrace.errors import StoreError
from zarrtrace.spec import INDEX, NAMESPACE, Stored, TraceAttributes
from zarrtrace.store.attributes import (
    METADATA,
    ArrayOnDisk,
    files_of,
    files_of_entry,
    kind_of,
    names_below,
    read_array,
    read_group,
    read_index_attributes,
    read_run_attributes,
    read_trace_attributes,
    seal_broken,
)
from zarrtrace.store.files import fingerprint, names_there
from zarrtrace.store.indexable import digest_of
from zarrtrace.store.nodes import consolidated, labels_of
from zarrtrace.store.objects import Location, ObjectPath, at_once, locate, zarr_place

_OTHER_ATTRIBUTES = "its attributes are not the ones that were written"


class Problem(BaseModel):
    """Something that is wrong with a run, and where.

    Attributes
    ----------
    scenario
        None if it is the run's own metadata.
    array, layer
        None if it is about all of them.
    chunk
        Key of the damaged file in its array, as ``c/3/0/0``; None if it cannot be told.
    message
        What is wrong.
    """

    scenario: str | None
    array: str | None = None
    layer: int | None = None
    chunk: str | None = None
    message: str


def verify(path: str | Location) -> list[Problem]:
    """Read every byte of a run, or of one trace, and compare it with the journal.

    Parameters
    ----------
    path
        Folder of the run or the trace, or its address.

    Returns
    -------
    list of Problem
        Empty if everything is there and as it was written.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        If the run's own attributes cannot be read.
    """
    path = locate(path)
    if kind_of(path) == "trace":
        return list(_trace(path, path.name))
    names = read_run_attributes(path).scenarios
    there = names_there(path, names)
    with ThreadPoolExecutor(4, thread_name_prefix="zarrtrace-verify") as pool:
        of_traces = pool.map(lambda name: list(_trace(path / name, name)), there)
        found = dict(zip(there, of_traces, strict=True))
    problems = [*_group(path, None)]
    for name in names:
        problems += found[name] if name in found else [_absent(name)]
    problems = problems or list(_copy(path, None))
    return [*problems, *_index(path, names)]


def _index(run: Location, names: Sequence[str]) -> Iterator[Problem]:
    """Compare the run's index, if it has one, with its journal and with the traces."""
    path = run / INDEX
    if not path.is_dir():
        return
    try:
        attributes = read_index_attributes(path)
        layout = {name: read_array(path / name) for name in attributes.stored.get(METADATA, {})}
    except StoreError as error:
        yield Problem(scenario=None, array=INDEX, message=error.what)
        return
    if seal_broken(read_group(path)["attributes"][NAMESPACE]):
        yield Problem(scenario=None, array=INDEX, message=_OTHER_ATTRIBUTES)
    sound = True
    for key, entry in attributes.stored.items():
        at = attributes.layers.index(int(key)) if key.isdigit() else None
        for name, stored in entry.items():
            files = [f"{name}/zarr.json"]
            if key != METADATA:
                files = files_of(name, layout[name].shape, layout[name].file_shape, at)
            if fingerprint(path, files) != stored:
                sound = False
                yield Problem(
                    scenario=None,
                    array=f"{INDEX}/{name}",
                    layer=int(key) if key.isdigit() else None,
                    message="its bytes are not the ones that were written",
                )
    if sound:
        yield from _stale(run, path, names)


def _stale(run: Location, path: Location, names: Sequence[str]) -> Iterator[Problem]:
    """Name the scenarios whose features are not those that the index was made from."""
    listed = zarr.open_array(zarr_place(path / "scenario"), mode="r")[:]
    digests = zarr.open_array(zarr_place(path / "digest"), mode="r")[:]
    if [str(name) for name in np.asarray(listed)] != list(names):
        yield Problem(
            scenario=None, array=INDEX, message="is of other scenarios: 'zarrtrace index' again"
        )
        return
    for name, digest in zip(names, np.asarray(digests).tolist(), strict=True):
        try:
            same = digest in (0, digest_of(read_trace_attributes(run / name)))
        except StoreError:
            continue  # said of the trace itself
        if not same:
            yield Problem(
                scenario=name, array=INDEX, message="has changed since: 'zarrtrace index' again"
            )


def _absent(scenario: str) -> Problem:
    return Problem(scenario=scenario, message="not there: not extracted yet, or deleted")


def _trace(path: Location, scenario: str) -> Iterator[Problem]:
    if not path.is_dir():
        yield _absent(scenario)
        return
    try:
        attributes = read_trace_attributes(path)
    except StoreError as error:
        yield Problem(scenario=scenario, message=error.what)
        return
    problems = [*_group(path, scenario), *_journalled(path, scenario, attributes)]
    yield from problems or _copy(path, scenario)


def _journalled(path: Location, scenario: str, attributes: TraceAttributes) -> Iterator[Problem]:
    """Compare files with the journal."""
    for missing in attributes.missing_layers:
        yield Problem(scenario=scenario, layer=missing, message="not stored")
    metadata = functools.cache(lambda array: read_array(path / array))

    def compare(entry: tuple[str, str, Stored]) -> list[Problem]:
        key, array, stored = entry
        layer = int(key) if key.isdigit() else None
        return [
            Problem(scenario=scenario, array=array, layer=layer, chunk=chunk, message=message)
            for chunk, message in _compare(path, array, attributes, key, stored, metadata)
        ]

    entries = [
        (key, array, stored)
        for key, entry in attributes.stored.items()
        for array, stored in entry.items()
    ]
    some_at_once = at_once if isinstance(path, ObjectPath) else map
    yield from itertools.chain.from_iterable(some_at_once(compare, entries))


def _group(path: Location, scenario: str | None) -> Iterator[Problem]:
    """Check a group's own metadata."""
    group = read_group(path)
    if seal_broken(group["attributes"][NAMESPACE]):
        yield Problem(scenario=scenario, message=_OTHER_ATTRIBUTES)
    labels = group["attributes"].get("coordinates")
    if scenario is not None and labels != labels_of(_names(path)):
        yield Problem(scenario=scenario, message="its attribute 'coordinates' was changed")
    if (group.get("zarr_format"), group.get("node_type")) != (3, "group"):
        yield Problem(scenario=scenario, message="its zarr.json is not that of a Zarr v3 group")


def _names(path: Location) -> list[str]:
    if isinstance(path, ObjectPath):
        return names_below(path)
    return [file.name for file in path.iterdir()]


def _copy(path: Location, scenario: str | None) -> Iterator[Problem]:
    """Compare a group's consolidated metadata with the metadata below it, which is sound."""
    if read_group(path).get("consolidated_metadata") not in (None, consolidated(path)):
        yield Problem(
            scenario=scenario,
            message="its consolidated metadata differs from the metadata that it copies",
        )


def _compare(
    path: Location,
    array: str,
    attributes: TraceAttributes,
    key: str,
    stored: Stored,
    metadata_of: Callable[[str], ArrayOnDisk],
) -> Iterator[tuple[str | None, str]]:
    """Yield what is wrong with one entry of the journal, and the file where it can be told."""
    try:
        metadata = metadata_of(array)
    except StoreError as error:
        if key == METADATA or METADATA not in attributes.stored:
            yield None, error.what
        return
    written = attributes.stored.get(METADATA, {}).get(array)
    if key != METADATA and written not in (None, fingerprint(path, [f"{array}/zarr.json"])):
        return  # said once, of the metadata; files it may claim by the million are not looked for
    files = files_of_entry(
        attributes, key, array, metadata.dims, metadata.shape, metadata.file_shape
    )
    found = fingerprint(path, files)
    if found == stored:
        return
    if key == METADATA:
        yield None, "its zarr.json is not the one that was written"
        return
    damaged = list(_damaged(path, array, files, metadata))
    if damaged:
        yield from damaged
    elif found.bytes != stored.bytes:
        yield None, f"{found.bytes} bytes on disk, {stored.bytes} were written"
    else:
        yield None, "its bytes are not the ones that were written"


def _damaged(
    path: Location, array: str, files: Sequence[str], metadata: ArrayOnDisk
) -> Iterator[tuple[str, str]]:
    """Yield files that are gone, or with chunks that cannot be decoded."""
    try:
        opened = zarr.open_array(zarr_place(path / array), mode="r")
    except Exception as error:  # noqa: BLE001  what Zarr raises depends on what is broken
        yield "zarr.json", f"Zarr cannot open the array: {error}"
        return
    for file in files:
        chunk = file.removeprefix(f"{array}/")
        if not (path / file).is_file():
            yield chunk, "gone"
            continue
        place = [int(part) for part in chunk.split("/")[1:]]
        corner = [at * size for at, size in zip(place, metadata.file_shape, strict=True)]
        inner = []
        for box in _inner(corner, metadata.file_shape, opened.chunks, metadata.shape):
            try:
                opened[box]
            except Exception:  # noqa: BLE001  codecs raise what they like
                inner.append("/".join(str(one.start) for one in box))
        if inner:
            first = ", ".join(inner[:3]) + (", …" if len(inner) > 3 else "")
            yield chunk, f"{len(inner)} inner chunks cannot be decoded, first elements {first}"


def _inner(
    corner: Sequence[int], file_shape: Sequence[int], step: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Yield the parts of a file, in the shape of its inner chunks."""
    ranges = [
        range(start, min(start + size, end), by)
        for start, size, by, end in zip(corner, file_shape, step, shape, strict=True)
    ]
    for starts in itertools.product(*ranges):
        yield tuple(
            slice(at, min(at + by, end)) for at, by, end in zip(starts, step, shape, strict=True)
        )
