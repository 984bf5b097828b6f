"""Writing runs: one writer at a time, resumed or replaced as a whole."""

from __future__ import annotations

import shutil
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
from zarrtrace.identity import combined_versions, differences, refuse_other
from zarrtrace.scenarios import check_name
from zarrtrace.spec import NAMESPACE, RunAttributes, Tokens, TraceAttributes, TraceShape
from zarrtrace.store.attributes import (
    kind_of,
    read_group,
    read_run_attributes,
    read_trace_attributes,
    seal_broken,
)
from zarrtrace.store.files import (
    beside,
    clear_errors,
    each_of,
    fsync,
    move,
    remove_partial_files,
    remove_tree,
    replace_folder,
)
from zarrtrace.store.locks import lock, unlock
from zarrtrace.store.nodes import consolidate, create_run, write_attributes
from zarrtrace.store.objects import Location, ObjectPath, locate, resolved
from zarrtrace.store.regular import REPAIR, clear_way
from zarrtrace.store.trace_writer import TraceWriter

#: File in a run that is about to replace another, or has just done so.
_REPLACING = ".zarrtrace-replacing"


class RunWriter:
    """Write a run, one trace a scenario; resumes where an earlier writer stopped.

    Parameters
    ----------
    path
        Folder of the run, or its address in an object store; created if need be.
    scenarios
        Names of the traces.
    config
        What was asked for, JSON values only. A run that exists must have been asked for alike.
    overwrite
        Replace a run that exists, once the new one is finished.
    repair
        Read every byte of a run that exists, and make anew what is damaged.
    accept_versions
        Go on with a run that was begun by other versions of libraries, and name both in it.

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
        path: str | Location,
        scenarios: Sequence[str],
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        repair: bool = False,
        accept_versions: bool = False,
    ) -> None:
        self._final = resolved(locate(path))
        self._attributes = RunAttributes(
            scenarios=tuple(check_name(name) for name in scenarios), config=dict(config)
        )
        self._overwrite, self._repair = overwrite, repair
        self._accept_versions = accept_versions
        self.path = self._final

    def __enter__(self) -> Self:
        with clear_errors(self._final):
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._final)
            try:
                self._open()
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unlock()

    def _open(self) -> None:
        just_replaced = self._end_earlier_swap()
        remove_partial_files(self._final, deep=False)
        exists = self._final.is_dir() and any(self._final.iterdir())
        if exists or self._final.is_file():
            previous = self._previous()
            if not self._overwrite:
                self._go_on_with(previous)
                return
            if just_replaced and not _differing(previous, self._attributes):
                return
            self.path = self._new
            if self._can_go_on(self._new):
                return
            remove_run(self._new)
        create_run(self.path, self._attributes.model_dump(mode="json"))

    def _go_on_with(self, previous: RunAttributes) -> None:
        """Refuse a run that was started otherwise; name its versions and ours in it."""
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
            write_attributes(self._final, self._attributes.model_dump(mode="json"))

    def _previous(self) -> RunAttributes:
        """Return what the run there says of itself; repaired if its metadata is damaged."""
        try:
            previous = read_run_attributes(self._final)
            broken = seal_broken(read_group(self._final)["attributes"][NAMESPACE])
        except (IntegrityError, NotATraceError):
            if not self._repair or not self._has_traces():
                raise
            broken = True
        if not broken:
            return previous
        if not self._repair:
            raise IntegrityError(
                f"{self._final}/zarr.json: its attributes are not the ones that were written",
                why="The file was damaged, or edited by hand.",
                remedy=REPAIR,
            )
        if isinstance(self._final, Path):
            clear_way(self._final, ["zarr.json"])
        create_run(self._final, self._attributes.model_dump(mode="json"))
        return self._attributes

    def _has_traces(self) -> bool:
        names = self._attributes.scenarios
        return any((self._final / name / "zarr.json").is_file() for name in names)

    @property
    def _new(self) -> Location:
        return beside(self._final, "new")

    @property
    def _old(self) -> Location:
        return beside(self._final, "old")

    def _can_go_on(self, path: Location) -> bool:
        """Whether an earlier writer, stopped while it replaced a run, was asked for the same."""
        try:
            return not _differing(read_run_attributes(path), self._attributes)
        except StoreError:
            return False

    def _end_earlier_swap(self) -> bool:
        """Bring to its end what a writer killed in :meth:`_swap` began; say if it did."""
        if isinstance(self._final, ObjectPath):
            return self._end_earlier_copying()
        if not self._final.exists():
            if (self._new / _REPLACING).exists():
                move(self._new, self._final)
            elif _is_run(self._old):
                move(self._old, self._final)
        replaced = (self._final / _REPLACING).exists()
        if replaced:
            self._tidy_up(self._new, self._old)
        return replaced

    def _end_earlier_copying(self) -> bool:
        try:
            began = read_run_attributes(self._new).complete
        except StoreError:
            return False
        if began:
            move(self._new, self._final)
        return began

    def _swap(self) -> None:
        """Put the finished new run where the old one is.

        On a disk the two are exchanged; in an object store the new one is copied, and its zarr.json
        comes last.
        """
        new, final, old = self._new, self._final, self._old
        if isinstance(new, Path) and isinstance(final, Path) and isinstance(old, Path):
            # Tells a later writer which of the two the new one is.
            (new / _REPLACING).touch()
            fsync(new)
            left = replace_folder(new, final, old)
            fsync(final.parent)
            self._tidy_up(left)
        else:
            move(new, final)
        self.path = final

    def _tidy_up(self, *left: Location) -> None:
        for folder in left:
            remove_run(folder)
        (Path(str(self._final)) / _REPLACING).unlink()

    def _unlock(self) -> None:
        unlock(self._final, self._lock)

    def trace(self, attributes: TraceAttributes, shape: TraceShape, tokens: Tokens) -> TraceWriter:
        """Return the writer of one scenario's trace, which may hold layers already."""
        path = self.path / attributes.scenario
        return TraceWriter(path, attributes, shape, tokens, repair=self._repair)

    def finish(self) -> None:
        """Mark the run complete if its traces are, and consolidate its metadata.

        Raises
        ------
        IncompleteError
            If a scenario has layers missing; what is there stays readable.
        """
        traces = [self.path / name for name in self._attributes.scenarios]
        missing = [
            trace.name
            for trace, complete in zip(traces, each_of(_is_complete, traces), strict=True)
            if not complete
        ]
        if missing:
            raise IncompleteError(
                f"{self._final}: {len(missing)} of {len(self._attributes.scenarios)} scenarios "
                f"are not complete: {', '.join(missing[:5])}",
                remedy="Run the same command again; it goes on where this one stopped.",
            )
        with clear_errors(self._final):
            complete = self._attributes.model_copy(update={"complete": True})
            consolidate(self.path, complete.model_dump(mode="json"))
            fsync(self.path / "zarr.json")
            if self.path != self._final:
                self._swap()


def remove_run(folder: Location) -> None:
    """Remove a run that a writer left beside another, if it is one.

    Its zarr.json goes last: what is left of it if the process is killed is still known as a run.

    Raises
    ------
    StoreError
        If there is something else.
    """
    if isinstance(folder, ObjectPath):
        remove_tree(folder)
        return
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not (_is_run(folder) or _is_empty(folder)):
        raise StoreError(
            f"{folder}: is in the way, and no run that zarrtrace wrote",
            why="A run that replaces another has this name until it is whole.",
            remedy="Move it away, and run the same command again.",
        )
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "zarr.json":
            path.unlink()
    (folder / "zarr.json").unlink(missing_ok=True)
    folder.rmdir()


def _is_run(folder: Location) -> bool:
    try:
        return kind_of(folder) == "run"
    except StoreError:
        return False


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing, or what a writer leaves that is killed as soon as it begins."""
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= {"zarr.json.partial"}


def _is_complete(trace: Location) -> bool:
    return (trace / "zarr.json").is_file() and read_trace_attributes(trace).complete


def _compared(run: RunAttributes) -> dict[str, Any]:
    return {**run.config, "scenarios": list(run.scenarios)}


def _differing(old: RunAttributes, new: RunAttributes) -> bool:
    return bool(differences(_compared(old), _compared(new)))
