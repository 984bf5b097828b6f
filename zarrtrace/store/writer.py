"""Writing runs: one writer at a time, resumed or replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    REPAIR,
    read_group,
    read_run_attributes,
    read_trace_attributes,
    seal_broken,
)
from zarrtrace.store.files import (
    clear_errors,
    each_of,
    fsync,
    move,
    remove_partial_files,
    remove_tree,
)
from zarrtrace.store.locks import lock, unlock
from zarrtrace.store.nodes import consolidate, create_run, write_attributes
from zarrtrace.store.objects import Location, ObjectPath, locate
from zarrtrace.store.trace_writer import TraceWriter


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
        self._final = locate(path).absolute()
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
            remove_tree(self._new)
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
        create_run(self._final, self._attributes.model_dump(mode="json"))
        return self._attributes

    def _has_traces(self) -> bool:
        names = self._attributes.scenarios
        return any((self._final / name / "zarr.json").is_file() for name in names)

    @property
    def _new(self) -> Location:
        return self._final.with_name(f".{self._final.name}.new")

    @property
    def _old(self) -> Location:
        return self._final.with_name(f".{self._final.name}.old")

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
        began = self._old.exists() and not self._final.exists()
        if began:
            move(self._new if self._new.exists() else self._old, self._final)
        remove_tree(self._old)
        return began

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

        On a disk it is renamed, and whole at any moment; in an object store it is copied, and its
        zarr.json comes last.
        """
        if not isinstance(self._final, ObjectPath):
            remove_tree(self._old)
            move(self._final, self._old)
        move(self._new, self._final)
        self.path = self._final
        remove_tree(self._old)

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


def _is_complete(trace: Location) -> bool:
    return (trace / "zarr.json").is_file() and read_trace_attributes(trace).complete


def _compared(run: RunAttributes) -> dict[str, Any]:
    return {**run.config, "scenarios": list(run.scenarios)}


def _differing(old: RunAttributes, new: RunAttributes) -> bool:
    return bool(differences(_compared(old), _compared(new)))
