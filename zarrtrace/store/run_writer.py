"""Writing runs: one writer at a time, resumed or replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zarrtrace.errors import (
    IncompleteError,
    IntegrityError,
    NotATraceError,
    StoreError,
)
from zarrtrace.format.attributes import RunAttributes
from zarrtrace.identity import combined_versions, differences, refuse_other
from zarrtrace.records import TracePlan
from zarrtrace.scenarios import check_name
from zarrtrace.storage import Address, Location, at_once, disk, locate
from zarrtrace.storage.locks import FileLock
from zarrtrace.store.metadata import Nodes, read_run, read_trace, repeated_nodes, sealed_group
from zarrtrace.store.publish import end_replacing, move, put_in_place, remove
from zarrtrace.store.staged import staging_folder
from zarrtrace.store.trace_writer import TraceWriter

# A file among the staged traces of a run that is to replace another one. Folders are exchanged at
# once, and removed a while later: it tells the new run from the old one.
_SUCCESSOR = "successor"
#: A run of more traces holds no copy of their metadata: it would be large, and slow to read.
MOST_CONSOLIDATED = 1000


class RunWriter:
    """Write a run, one trace a scenario; an existing run is resumed.

    Parameters
    ----------
    path
        Folder of the run, or its address in an object store; created if need be.
    scenarios
        Names of the traces.
    config
        What was asked for, JSON values only. An existing run must have been asked for the same.
    overwrite
        Replace an existing run, once the new one is finished.
    repair
        Read every byte of an existing run, and compute again what is damaged.
    accept_versions
        Resume a run that other versions of libraries began, and name both in it.

    Raises
    ------
    NotATraceError
        If `path` exists and is not a run.
    IntegrityError
        If the run's metadata is damaged, and `repair` is false.
    ConfigMismatchError
        If the run was started with another configuration.
    LockedError
        If another process is writing it.
    """

    def __init__(
        self,
        path: Address,
        scenarios: Sequence[str],
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        repair: bool = False,
        accept_versions: bool = False,
    ) -> None:
        self._final = locate(path).resolved()
        self._attributes = RunAttributes(
            scenarios=tuple(check_name(name) for name in scenarios), config=dict(config)
        )
        self._overwrite, self._repair = overwrite, repair
        self._accept_versions = accept_versions
        self.path = self._final

    def __enter__(self) -> Self:
        with disk.explained(self._final):
            self._lock = lock_run(self._final)
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()

    def _open(self) -> None:
        was_replaced = self._end_earlier_replacement()
        if self._final.is_file() or (
            self._final.is_folder() and any(True for _ in self._final.children())
        ):
            previous = self._previous()
            if not self._overwrite:
                self._resume(previous)
                return
            if was_replaced and _is_same(previous, self._attributes):
                return
            self.path = self._new
            if self._can_resume(self._new):
                return
            self._refuse_foreign_successor()
            remove(self._new)
            if self._new.path is not None:
                marker = staging_folder(self._new) / _SUCCESSOR
                marker.parent.mkdir(parents=True)
                marker.touch()
        self._write_group(self.path, self._attributes, None)

    def _resume(self, previous: RunAttributes) -> None:
        """Refuse a run that was started otherwise; name its versions and today's in it."""
        stored, now = _compared(previous), _compared(self._attributes)
        refuse_other(self._final, stored, now, accept_versions=self._accept_versions)
        if "versions" not in self._attributes.config:
            return
        known = previous.config.get("versions", {})
        versions = combined_versions(known, self._attributes.config["versions"])
        if previous.complete and not self._repair:
            versions = known  # nothing will be written
        config = {**self._attributes.config, "versions": versions}
        self._attributes = self._attributes.model_copy(update={"config": config})
        if versions != known:  # before the first layer that they make
            self._write_group(self._final, self._attributes, None)

    def _write_group(self, path: Location, attributes: RunAttributes, nodes: Nodes | None) -> None:
        if (folder := path.path) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        (path / "zarr.json").write(sealed_group(attributes, nodes))

    def _previous(self) -> RunAttributes:
        """Return the attributes of the run that exists; repaired if its metadata is damaged."""
        try:
            return read_run(self._final).attributes
        except (IntegrityError, NotATraceError):
            if not self._repair or not self._has_traces():
                raise
        self._write_group(self._final, self._attributes, None)
        return self._attributes

    def _has_traces(self) -> bool:
        names = self._attributes.scenarios
        return any((self._final / name / "zarr.json").is_file() for name in names)

    @property
    def _new(self) -> Location:
        """Where a run is written that replaces another one."""
        return self._final.with_name(f".{self._final.name}.zarrtrace-new")

    def _can_resume(self, path: Location) -> bool:
        """Whether an earlier writer that was to replace the run was asked for the same."""
        if not _is_successor(path):
            return False
        try:
            return _is_same(read_run(path).attributes, self._attributes)
        except StoreError:
            return False

    def _refuse_foreign_successor(self) -> None:
        """Refuse to remove what this program did not write."""
        if self._new.exists():
            try:
                read_run(self._new)
            except StoreError as error:
                raise NotATraceError(
                    f"{self._new}: is in the way, and is not a run",
                    why="The new run is written there before it replaces the old one.",
                    remedy="Move it away, and run the same command again.",
                ) from error

    def _end_earlier_replacement(self) -> bool:
        """Bring to its end what an interrupted writer began; returns whether it did."""
        if self._final.path is not None and _is_successor(self._final):
            end_replacing(Path(self._new), self._final.path)
            remove(self._new)  # the old run
            disk.remove_folder(staging_folder(self._final))
            return True
        if not self._can_resume(self._new) or not read_run(self._new).attributes.complete:
            if (path := self._final.path) is not None and not path.exists():
                end_replacing(Path(self._new), path)
            return False
        self._replace()
        return True

    def _replace(self) -> None:
        """Put the finished new run in the place of the old one."""
        new, final = self._new.path, self._final.path
        if new is None or final is None:
            move(self._new, self._final)
        else:
            end_replacing(new, final)
            if new.exists():
                put_in_place(new, final)
        for run in (self._new, self._final):
            disk.remove_folder(staging_folder(run))
        self.path = self._final

    def trace(self, plan: TracePlan) -> TraceWriter:
        """Return the writer of one scenario's trace, which may hold layers already."""
        return TraceWriter(self.path, plan, repair=self._repair)

    def finish(self) -> None:
        """Mark the run complete if its traces are, and consolidate its metadata.

        Raises
        ------
        IncompleteError
            If a scenario has layers missing; what is there stays readable.
        """
        names = self._attributes.scenarios
        traces = [self.path / name for name in names]
        each = map if self.path.path is not None else at_once
        found = list(each(_nodes_of, traces))
        missing = [name for name, nodes in zip(names, found, strict=True) if nodes is None]
        if missing:
            raise IncompleteError(
                f"{self._final}: {len(missing)} of {len(names)} scenarios are not complete: "
                f"{', '.join(missing[:5])}",
                remedy="Run the same command again; it resumes where this one stopped.",
            )
        nodes = {
            f"{name}/{key}".rstrip("/"): node
            for name, of_trace in sorted(zip(names, found, strict=True), key=lambda one: one[0])
            for key, node in (of_trace or {}).items()
        }
        with disk.explained(self._final):
            complete = self._attributes.model_copy(update={"complete": True})
            few = len(names) <= MOST_CONSOLIDATED
            self._write_group(self.path, complete, nodes if few else None)
            if (folder := self.path.path) is not None:
                disk.sync_path(folder / "zarr.json")
            if self.path == self._final:
                disk.remove_folder(staging_folder(self.path))
            else:
                self._replace()


def _is_successor(run: Location) -> bool:
    """Whether a run was written to replace another one; in an object store nothing tells."""
    return run.path is None or (staging_folder(run) / _SUCCESSOR).is_file()


def lock_run(run: Location) -> FileLock:
    """Lock a run against other writers on this machine.

    Raises
    ------
    LockedError
        If another process has the lock.
    """
    path = run.path or staging_folder(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.zarrtrace-lock"), run)


def _nodes_of(trace: Location) -> Nodes | None:
    """Return what a run repeats of a trace's metadata; None if the trace is not complete."""
    try:
        return repeated_nodes(read_trace(trace))
    except NotATraceError:
        return None


def _compared(run: RunAttributes) -> dict[str, Any]:
    return {**run.config, "scenarios": list(run.scenarios)}


def _is_same(old: RunAttributes, new: RunAttributes) -> bool:
    return not differences(_compared(old), _compared(new))
