"""Writing runs: one writer at a time, resumed or replaced as a whole."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from zarrtrace.errors import (
    ConfigError,
    IncompleteError,
    IntegrityError,
    NotATraceError,
    StoreError,
)
from zarrtrace.format.attributes import RunAttributes
from zarrtrace.identity import combined_versions, differences, refuse_other
from zarrtrace.machine import no_garbage
from zarrtrace.records import TracePlan
from zarrtrace.scenarios import check_trace_name, name_key
from zarrtrace.storage import Address, Location, disk, locate
from zarrtrace.storage.locks import FileLock
from zarrtrace.store.journal import JOURNAL
from zarrtrace.store.metadata import (
    each_trace,
    kind_of,
    read_run,
    read_trace,
    repeated_nodes,
)
from zarrtrace.store.nodes import Nodes
from zarrtrace.store.publish import beside, exchange_folders, publish_folder, remove
from zarrtrace.store.seal import sealed_group
from zarrtrace.store.staged import staging_folder
from zarrtrace.store.target import refuse_foreign, refuse_inside, refuse_strangers
from zarrtrace.store.trace_writer import TraceWriter

#: A run of more traces holds no copy of their metadata: it would be large, and slow to read.
MOST_CONSOLIDATED = 1000
#: The same of a run to which traces are added one by one, each of which writes the copy.
MOST_EXTENDED = 100

# File in a finished run that is about to replace another, or has just done so: it tells which of
# the two is the new one.
_REPLACING = ".zarrtrace-replacing"


class LockedRun(ABC):
    """Context manager that holds a run's lock, and has the run opened under it."""

    _final: Location

    def __enter__(self) -> Self:
        refuse_inside(self._final, may_be_one=True)
        with disk.explained(self._final):
            self._lock = lock_run(self._final)
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @abstractmethod
    def _open(self) -> None:
        """Find or make the run."""


class RunWriter(LockedRun):
    """Write a run, one trace a scenario; an existing run is resumed.

    Parameters
    ----------
    path
        Folder of the run, or its address in an object store; created if need be.
    scenarios
        Names of the traces.
    config
        Options of the extraction, JSON values only; an existing run must have equal ones.
    stated
        Attributes that the suite file states, for readers: ``bands`` and ``task_spans``.
    overwrite
        Replace an existing run, once the new one is finished.
    repair
        Read every byte of an existing run, and compute again what is damaged.
    accept_versions
        Resume a run that other versions of libraries began, and name both in it.

    Raises
    ------
    ConfigError
        If `path` is in another run.
    NotATraceError
        If `path` exists and is not a run.
    StoreError
        If files would be deleted with a run that do not belong to it.
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
        stated: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        repair: bool = False,
        accept_versions: bool = False,
    ) -> None:
        self._final = locate(path).resolved()
        self._attributes = RunAttributes(
            scenarios=tuple(check_trace_name(name) for name in scenarios),
            config=dict(config),
            **(stated or {}),
        )
        self._overwrite, self._repair = overwrite, repair
        self._accept_versions = accept_versions
        self.path = self._final
        # Where a run is written that replaces another one.
        self._new = beside(self._final, "new")

    def _open(self) -> None:
        was_replaced = self._end_replacement()
        if self._final.is_file() or (
            self._final.is_folder() and any(True for _ in self._final.children())
        ):
            previous = None if self._replaces_table() else self._previous()
            if previous is not None and not self._overwrite:
                self._resume(previous)
                return
            if was_replaced and previous is not None and _is_same(previous, self._attributes):
                return
            refuse_strangers(self._final)
            self.path = self._new
            if self._successor() is not None:
                return
            remove_run(self._new)
        # In the folder of temporary files an earlier run at this address may have left traces.
        disk.remove_folder(staging_folder(self.path))
        self._write_group(self.path, self._attributes, None)

    def _replaces_table(self) -> bool:
        """Whether a table is there that the run takes the place of."""
        with contextlib.suppress(StoreError):
            return self._overwrite and kind_of(self._final) == "table"
        return False

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

    def _successor(self) -> RunAttributes | None:
        """Return the attributes of the new run, if an earlier writer was asked for the same."""
        with contextlib.suppress(StoreError):
            found = read_run(self._new).attributes
            return found if _is_same(found, self._attributes) else None
        return None

    def _end_replacement(self) -> bool:
        """Put the new run in the place of the old one, if it is finished.

        A writer that was killed meanwhile is continued from any step on. Returns whether the run
        was replaced.
        """
        final, new = self._final.path, self._new.path
        if final is None or new is None:
            successor = self._successor()
            is_finished = successor is not None and successor.complete
            if is_finished:
                publish_folder(self._new, self._final)
            return is_finished
        old = beside(final, "old")
        if (new / _REPLACING).exists():
            exchange_folders(new, final, old)
        elif not final.exists() and _is_run(old):
            old.rename(final)
        if not (final / _REPLACING).exists():
            return False
        for folder in (new, old):
            remove_run(locate(folder))
        (final / _REPLACING).unlink()
        return True

    def trace(self, plan: TracePlan) -> TraceWriter:
        """Return the writer of one scenario's trace, which may hold layers already."""
        return TraceWriter(self.path, plan, repair=self._repair)

    @no_garbage()
    def finish(self) -> None:
        """Mark the run complete if its traces are, and consolidate its metadata.

        Raises
        ------
        IncompleteError
            If a scenario has layers missing; what is there stays readable.
        """
        names = self._attributes.scenarios
        is_consolidated = len(names) <= MOST_CONSOLIDATED
        used = repeated_nodes if is_consolidated else lambda _: {}
        # Who published a trace, or found it there, has compared all of it with the format.
        found = each_trace(self.path, names, used, by_seal=True)
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
            self._write_group(self.path, complete, nodes if is_consolidated else None)
            if (folder := self.path.path) is not None:
                disk.sync_path(folder / "zarr.json")
            disk.remove_folder(staging_folder(self.path))
            if self.path == self._final:
                return
            if folder is not None:
                (folder / _REPLACING).touch()
                disk.sync_path(folder)
            self._end_replacement()
            self.path = self._final


class RunExtension(LockedRun):
    """Add traces to a run, one at a time; a context manager that holds the run's lock.

    Parameters
    ----------
    path
        The run; created if need be.
    config
        Configuration that all its traces share, JSON values only.

    Raises
    ------
    NotATraceError
        If `path` exists and is not a run.
    ConfigMismatchError
        If the run has another configuration.
    LockedError
        If another process is writing it.
    """

    def __init__(self, path: Location, config: Mapping[str, Any]) -> None:
        self.path = self._final = path.resolved()
        self._config = dict(config)

    def _open(self) -> None:
        if not (self._final / "zarr.json").is_file():
            refuse_foreign(self._final)
            self._write((), None)
        run = read_run(self._final)
        refuse_other(self._final, run.attributes.config, self._config)
        self._names, self._nodes = run.attributes.scenarios, run.nodes

    def begin(self, name: str, *, overwrite: bool) -> None:
        """Get ready to write a trace, new or in place of another one.

        Raises
        ------
        ConfigError
            If the run has it, and `overwrite` is false; or one that some file systems take for it.
        """
        if name not in self._names:
            taken = {name_key(one): one for one in self._names}
            if (rival := taken.get(name_key(name))) is not None:
                raise ConfigError(
                    f"{self._final}: scenario name {name!r} is taken by {rival!r}",
                    why="Many file systems take both for one folder.",
                    remedy="Choose another name.",
                )
        elif not overwrite:
            raise ConfigError(
                f"{self._final}: has scenario {name!r}",
                remedy="Choose another name, or replace the trace with overwrite=True.",
            )
        else:  # a copy of its metadata must not outlive it
            self._nodes = {}
            self._write(self._names, None)

    def add(self, name: str) -> None:
        """Name a trace that is published in the run."""
        if name not in self._names:
            self._names = (*self._names, name)
        nodes: Nodes | None = None
        if len(self._names) <= MOST_EXTENDED:
            known = {path.partition("/")[0] for path in self._nodes}
            for one in self._names:
                if one not in known or one == name:
                    found = repeated_nodes(read_trace(self._final / one))
                    added = {f"{one}/{key}".rstrip("/"): node for key, node in found.items()}
                    self._nodes |= added
            nodes = {
                path: self._nodes[path]
                for path in sorted(self._nodes, key=lambda path: path.partition("/")[0])
            }
        self._write(self._names, nodes)

    def _write(self, names: Sequence[str], nodes: Nodes | None) -> None:
        attributes = RunAttributes(scenarios=tuple(names), config=self._config, complete=True)
        with disk.explained(self._final):
            if (folder := self._final.path) is not None:
                folder.mkdir(parents=True, exist_ok=True)
            (self._final / "zarr.json").write(sealed_group(attributes, nodes))


def remove_run(folder: Location) -> None:
    """Remove a run or a table that a writer left beside another, if it is one.

    On a disk its ``zarr.json`` and its journal go last: what is left of it if the process is killed
    is still known.

    Raises
    ------
    StoreError
        If something else is there.
    """
    if (path := folder.path) is None:
        remove(folder)
        return
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not (_is_run(path) or (path.is_dir() and not any(path.iterdir()))):
        raise StoreError(
            f"{path}: is in the way, and no run that zarrtrace wrote",
            why="A run that replaces another has this name until it is whole.",
            remedy="Move it away, and run the same command again.",
        )
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            disk.remove_folder(child)
        elif child.name not in ("zarr.json", JOURNAL):
            child.unlink()
    for name in ("zarr.json", JOURNAL):
        (path / name).unlink(missing_ok=True)
    path.rmdir()


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run or a table, complete or not."""
    if (folder / JOURNAL).is_file():
        return True
    try:
        return kind_of(folder) in ("run", "table")
    except StoreError:
        return False


def lock_run(run: Location) -> FileLock:
    """Lock a run against other writers on this machine.

    Raises
    ------
    ConfigError
        If its address is read only.
    LockedError
        If another process has the lock.
    """
    run.writable_backend()  # raises if it is read only
    path = run.path or staging_folder(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.zarrtrace-lock"), run)


def _compared(run: RunAttributes) -> dict[str, Any]:
    return {**run.config, "scenarios": list(run.scenarios)}


def _is_same(old: RunAttributes, new: RunAttributes) -> bool:
    return not differences(_compared(old), _compared(new))
