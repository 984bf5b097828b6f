"""Copying runs between disks and object stores, verified by checksum.

Every file is compared with the source's journal when it is read, and again as it arrived. A trace's
own zarr.json comes after its files and the run's after its traces, so that a reader of the copy
sees nothing that is not whole, and a copy that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from zarrtrace.errors import ConfigMismatchError, IntegrityError, NotATraceError, StoreError
from zarrtrace.spec import INDEX, IndexAttributes, Stored, TraceAttributes
from zarrtrace.store.attributes import (
    METADATA,
    ArrayOnDisk,
    check_place,
    files_of,
    files_of_entry,
    kind_of,
    names_below,
    read_array,
    read_index_attributes,
    read_run_attributes,
    read_trace_attributes,
)
from zarrtrace.store.files import (
    clear_errors,
    fingerprint,
    fingerprint_of,
    fsync,
    size_of,
    sizes_below,
    write_whole,
)
from zarrtrace.store.locks import lock, unlock
from zarrtrace.store.objects import Location, at_once, locate, resolved
from zarrtrace.store.regular import REPAIR, read_regular

Progress = Callable[[int, int], None]

_Attributes = TypeVar("_Attributes", TraceAttributes, IndexAttributes)


class Copied(NamedTuple):
    """What :func:`copy_run` did.

    Attributes
    ----------
    scenarios
        How many the copy holds.
    bytes
        How many were written.
    bytes_there
        How many were there already.
    """

    scenarios: int
    bytes: int
    bytes_there: int


class _Entry(NamedTuple):
    """Some files of which a journal has size and hash together."""

    files: Sequence[str]
    stored: Stored


class _Counter:
    """Adds up what threads did."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._mutex = threading.Lock()
        self.written = self.there = 0

    def add(self, *, written: int = 0, there: int = 0) -> None:
        with self._mutex:
            self.written += written
            self.there += there
            if self._progress is not None:
                self._progress(self.written + self.there, self._total)


def copy_run(
    source: str | Location, target: str | Location, *, progress: Progress | None = None
) -> Copied:
    """Copy a run, or one trace, with its index and card if it has them.

    Parameters
    ----------
    source
        Folder or address; what its journals name is copied, also of a run that is not complete.
    target
        Folder or address of the copy. If an earlier call was interrupted, what arrived stays.
    progress
        Called with the number of bytes done and of all.

    Raises
    ------
    ConfigMismatchError
        If another run is at `target`.
    IntegrityError
        If files of `source` are not the ones that were written, or arrive otherwise.
    LockedError
        If another process is writing `target`.
    NotATraceError, FormatVersionError, RemoteError, NoSpaceError
    """
    source, target = locate(source), resolved(locate(target))
    alone = kind_of(source) == "trace"
    _refuse_other(source, target, alone=alone)
    names = [""] if alone else [*read_run_attributes(source).scenarios]
    traces = [source / name if name else source for name in names]
    sizes = at_once(_bytes_of, traces)
    counter = _Counter(sum(size or 0 for size in sizes), progress)
    with clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        held = lock(target)
        try:
            for name, trace, size in zip(names, traces, sizes, strict=True):
                if size is not None:
                    if name:
                        check_place(trace, read_trace_attributes(trace))
                    _copy_group(
                        trace, target / name if name else target, read_trace_attributes, counter
                    )
            if not alone:
                _copy_index(source, target, counter)
                _copy_file(source, target, "README.md")
                _copy_file(source, target, "zarr.json")
        finally:
            unlock(target, held)
    there = sum(size is not None for size in sizes)
    return Copied(there, counter.written, counter.there)


def _refuse_other(source: Location, target: Location, *, alone: bool) -> None:
    there = _kind_there(target)
    if there is None:
        # What an interrupted copy left has no zarr.json yet.
        known = {*names_below(source), INDEX, "README.md", "README.md.partial", "zarr.json.partial"}
        if target.is_file() or (
            target.is_dir() and any(file.name not in known for file in target.iterdir())
        ):
            kind_of(target)  # refuses it
        return
    if alone != (there == "trace"):
        same = False
    elif alone:
        mine, other = read_trace_attributes(source), read_trace_attributes(target)
        same = all(
            getattr(mine, name) == getattr(other, name) for name in ("scenario", "prompt", "model")
        )
    else:
        run, others = read_run_attributes(source), read_run_attributes(target)
        same = (run.scenarios, run.config) == (others.scenarios, others.config)
    if not same:
        raise ConfigMismatchError(
            f"{target}: another run is there",
            why="A copy goes on only with what an earlier call began.",
            remedy="Choose another target, or remove that run.",
        )


def _kind_there(path: Location) -> str | None:
    try:
        return kind_of(path)
    except NotATraceError:
        return None


def _bytes_of(trace: Location) -> int | None:
    """Return how much a trace's journal speaks of; None if it was not begun."""
    try:
        attributes = read_trace_attributes(trace)
    except NotATraceError:
        return None
    return sum(stored.bytes for entry in attributes.stored.values() for stored in entry.values())


def _copy_index(source: Location, target: Location, counter: _Counter) -> None:
    try:
        read_index_attributes(source / INDEX)
    except NotATraceError:
        return
    _copy_group(source / INDEX, target / INDEX, read_index_attributes, counter)


def _copy_group(
    source: Location,
    target: Location,
    read: Callable[[Location], _Attributes],
    counter: _Counter,
) -> None:
    """Copy a trace or an index, whose attributes a function reads."""
    attributes = read(source)
    content = read_regular(source / "zarr.json", source)
    if read(source) != attributes:  # so that what is sent last speaks of the files sent before
        raise IntegrityError(
            f"{source}: was changed while it was copied",
            why="An extraction is writing or replacing it.",
            remedy="Run the same command again; once the run is complete, the copy will be.",
        )
    names = sorted(attributes.stored.get(METADATA, {}))
    found = at_once(lambda name: read_array(source / name), names)
    entries = _entries(attributes, dict(zip(names, found, strict=True)))
    sizes = sizes_below(target)

    def copy(entry: _Entry) -> None:
        files, stored = entry
        if size_of(target, files, sizes) == stored.bytes and fingerprint(target, files) == stored:
            counter.add(there=stored.bytes)
            return
        _copy_entry(source, target, entry)
        counter.add(written=stored.bytes)

    at_once(copy, entries)
    _put(target / "zarr.json", content)


def _entries(
    attributes: TraceAttributes | IndexAttributes, arrays: Mapping[str, ArrayOnDisk]
) -> list[_Entry]:
    entries = []
    for key, entry in attributes.stored.items():
        for name, stored in entry.items():
            array = arrays[name]
            if isinstance(attributes, TraceAttributes):
                files = files_of_entry(
                    attributes, key, name, array.dims, array.shape, array.file_shape
                )
            elif key == METADATA:
                files = [f"{name}/zarr.json"]
            else:
                at = attributes.layers.index(int(key)) if key.isdigit() else None
                files = files_of(name, array.shape, array.file_shape, at)
            entries.append(_Entry(files, stored))
    return entries


def _copy_entry(source: Location, target: Location, entry: _Entry) -> None:
    contents: dict[str, bytes] = {}
    for file in entry.files:
        try:
            contents[file] = read_regular(source / file, source)
        except FileNotFoundError:
            continue  # may have been left out: the hash tells
    if fingerprint_of(contents.values()) != entry.stored:
        raise IntegrityError(
            f"{source / entry.files[0]}: its bytes are not the ones that were written",
            why="The source is damaged; nothing of this layer was copied.",
            remedy=REPAIR,
        )
    for file, content in contents.items():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(target / file, content)
    if fingerprint(target, entry.files) != entry.stored:
        raise IntegrityError(
            f"{target / entry.files[0]}: is not what was sent",
            why="The store, the disk or the network changed it.",
            remedy="Run the same command again; it copies what is wrong once more.",
        )


def _copy_file(source: Location, target: Location, name: str) -> None:
    """Copy a small file that no journal speaks of, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _put(target / name, read_regular(source / name, source))


def _put(target: Location, content: bytes) -> None:
    """Write a small file, unless it is there as it should be."""
    with contextlib.suppress(FileNotFoundError):
        if read_regular(target) == content:
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, content)
    fsync(target)
    if read_regular(target) != content:
        raise StoreError(f"{target}: is not what was sent", remedy="Run the same command again.")
