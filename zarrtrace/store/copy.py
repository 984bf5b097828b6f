"""Copying runs between disks and object stores, verified by checksum.

Every file is compared with its trace's metadata when it is read. A trace is published at its target
whole, and the run's ``zarr.json`` is written last: readers of the copy see nothing that is not
whole, and an interrupted copy is resumed trace by trace.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from zarrtrace.errors import (
    ConfigMismatchError,
    IncompleteError,
    IntegrityError,
    NotATraceError,
    StoreError,
)
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.index_layout import IndexAttributes
from zarrtrace.format.layout import INDEX, LABELLED, STAGED
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.storage import Address, Location, disk, locate
from zarrtrace.store.chunks import Checksum
from zarrtrace.store.damage import check_sizes, compare_file
from zarrtrace.store.label_file import check_labels
from zarrtrace.store.metadata import (
    REPAIR,
    Group,
    each_trace,
    kind_of,
    read_index_group,
    read_run,
    read_scenario,
    read_table,
    read_trace,
)
from zarrtrace.store.publish import publish_folder
from zarrtrace.store.run_writer import lock_run
from zarrtrace.store.staged import staging_folder
from zarrtrace.store.staged_table import refuse_staged_table
from zarrtrace.store.target import refuse_foreign, refuse_inside

Progress = Callable[[int, int], None]


# Groups that are copied in one piece, by kind.
_READ: dict[str, Callable[[Location], Group[Any]]] = {
    "trace": read_trace,
    "table": read_table,
    "index": read_index_group,
}
_Piece = Group[TraceAttributes] | Group[TableAttributes] | Group[IndexAttributes]


class CopySummary(NamedTuple):
    """The outcome of :func:`copy_run`.

    Attributes
    ----------
    scenarios
        Traces that the copy holds, or scenarios of a table.
    bytes
        Bytes that were written.
    bytes_there
        Bytes that were there already.
    missing
        Scenarios of the run that the copy lacks, because they are not complete.
    """

    scenarios: int
    bytes: int
    bytes_there: int
    missing: tuple[str, ...] = ()


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


def copy_run(source: Address, target: Address, *, progress: Progress | None = None) -> CopySummary:
    """Copy a run, a trace or a table, with index, labels and card if it has them.

    Parameters
    ----------
    source
        Folder or address; the complete traces of a run are copied, also if others are not. The
        outcome names those others.
    target
        Folder or address of the copy. If an earlier call was interrupted, what arrived stays.
    progress
        Called with the number of bytes done and of all.

    Raises
    ------
    ConfigError
        If `target` is in a run.
    ConfigMismatchError
        If another run is at `target`.
    IncompleteError
        If no trace of a run is complete, or a table is still being written.
    IntegrityError
        If files of `source` are not the ones that were written.
    LockedError
        If another process is writing `target`.
    NotATraceError, FormatVersionError, RemoteError, NoSpaceError
    """
    source, target = locate(source), locate(target).resolved()
    kind = _kind_of(source)
    is_run = kind == "run"
    if not (kind == "trace" and _is_of_run(target)):
        refuse_inside(target, may_be_one=True)
    _refuse_other(source, target, kind)
    sizes, missing = _sizes(source) if is_run else ({"": _bytes_of(_READ[kind](source))}, ())
    if kind != "trace":
        with contextlib.suppress(NotATraceError):
            sizes[INDEX] = _bytes_of(read_index_group(source / INDEX))
    counter = _Counter(sum(sizes.values()), progress)
    scenarios = len(sizes.keys() - {INDEX})
    with disk.explained(target):
        lock = lock_run(target)
        try:
            for name in sizes:  # one at a time: metadata of 100,000 traces fill gigabytes
                group = _in_run(source, name) if name else _READ[kind](source)
                _copy_group(group, source, target / name if name else target, counter)
                if isinstance(group.attributes, TableAttributes):
                    scenarios = group.attributes.scenarios
            if kind != "trace":
                check_labels(source)
                for name in ("README.md", LABELLED):
                    _copy_file(source, name, target)
            if is_run:
                _copy_file(source, "zarr.json", target)
        finally:
            lock.release()
    return CopySummary(scenarios, counter.written, counter.there, missing)


def _kind_of(source: Location) -> str:
    try:
        return kind_of(source)
    except NotATraceError:
        refuse_staged_table(source)
        raise


def _sizes(run: Location) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the bytes of a run's complete traces by name, and the names of the others."""
    names = read_run(run).attributes.scenarios
    found = dict(zip(names, each_trace(run, names, _bytes_of), strict=True))
    sizes = {name: size for name, size in found.items() if size is not None}
    if not sizes:
        raise IncompleteError(
            f"{run}: none of its {len(names)} scenarios is complete; nothing to copy",
            why="The extraction was interrupted, or is still running.",
            remedy="Run the same 'zarrtrace extract' again to resume it, then copy.",
        )
    return sizes, tuple(name for name in names if name not in sizes)


def _is_of_run(trace: Location) -> bool:
    """Whether a run names the trace: a copy may take the place of one that is lost."""
    with contextlib.suppress(StoreError):
        return trace.name in read_run(trace.parent).attributes.scenarios
    return False


def _in_run(run: Location, name: str) -> _Piece:
    return read_index_group(run / name) if name == INDEX else read_scenario(run, name)


def _refuse_other(source: Location, target: Location, kind: str) -> None:
    try:
        there = kind_of(target)
    except NotATraceError:
        # An interrupted copy has no zarr.json yet.
        known = {STAGED, INDEX, LABELLED, "README.md"}
        if kind == "run":
            known |= {*read_run(source).attributes.scenarios}
        if target.is_file() or (
            target.is_folder() and any(child.name not in known for child in target.children())
        ):
            refuse_foreign(target)
        return
    if kind != there or _identity(source, kind) != _identity(target, kind):
        raise ConfigMismatchError(
            f"{target}: another run is there",
            why="A copy is resumed only if it is of the same run.",
            remedy="Choose another target, or remove that run.",
        )


def _identity(path: Location, kind: str) -> Any:
    """Return what a copy has in common with what it was copied from."""
    if kind == "run":
        run = read_run(path).attributes
        return run.scenarios, run.config
    return _READ[kind](path).attributes.seal


def _bytes_of(group: _Piece) -> int:
    return sum(one.bytes for files in group.checksums.values() for one in files.values())


def _copy_group(
    group: _Piece,
    source: Location,
    target: Location,
    counter: _Counter,
) -> None:
    """Copy a trace or an index: staged, then published. No link may lead out of the source."""
    total = _bytes_of(group)
    with contextlib.suppress(StoreError):
        there: Group[Any] = _READ[group.attributes.kind](target)
        if there.attributes.seal == group.attributes.seal:
            check_sizes(there)
            counter.add(there=total)
            return
    folder = staging_folder(target.parent) / target.name
    disk.remove_folder(folder)
    files = []
    for name, checksums in group.checksums.items():
        (folder / name).mkdir(parents=True)
        files += [(name, key, written) for key, written in checksums.items()]
        metadata = (group.path / name / "zarr.json").inside(source).read()
        (folder / name / "zarr.json").write_bytes(metadata)

    def copy(item: tuple[str, str, Checksum]) -> None:
        name, key, written = item
        file = (group.path / name / key).inside(source)
        content = file.read()
        for _, message in compare_file(content, group.encodings[name], written):
            raise IntegrityError(
                f"{file}: {message}",
                why="The source is damaged; nothing of this trace was copied.",
                remedy=REPAIR,
            )
        (folder / name / key).write_bytes(content)
        counter.add(written=len(content))

    try:
        group.path.each(copy, files)
        (folder / "zarr.json").write_bytes((group.path / "zarr.json").inside(source).read())
        disk.sync(folder)
        publish_folder(folder, target)
    finally:
        disk.remove_folder(folder)
        with contextlib.suppress(OSError):  # the last trace that is staged leaves no folder
            folder.parent.rmdir()


def _copy_file(source: Location, name: str, target: Location) -> None:
    """Copy a small file beside the traces, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        (target / name).write((source / name).inside(source).read())
