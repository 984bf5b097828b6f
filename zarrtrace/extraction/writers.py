"""Threads that compress and write records while the model computes."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from zarrtrace.extraction.progress import ProgressListener
from zarrtrace.layer_batches import LayerBatch
from zarrtrace.machine import cpus, release_freed
from zarrtrace.records import LayerRecord, TokensRecord, TracePlan
from zarrtrace.storage import Location, disk
from zarrtrace.store import TraceWriter, is_untouched, staging_folder

Record = LayerBatch | LayerRecord | TokensRecord

#: Two in parallel with a CPU that computes.
THREADS = 2
# Bytes of records that wait or are being written, by writer; one record may be larger. Beside a GPU
# as much as a record of a long prompt in bfloat16, so that none is idle.
_BYTES_A_WRITER, _BESIDE_A_GPU = 8 * 2**20, 32 * 2**20
# Threads beside a GPU, at most: Python's lock keeps more from being busy.
_MOST_THREADS = 16
# After a record of this size, or this many bytes of small ones, freed memory is given back.
_LARGE_RECORD = 32 * 2**20
_SMALL_RECORDS = 64 * 2**20


@dataclass(frozen=True)
class Traces:
    """The traces that are to be filled.

    Attributes
    ----------
    folder
        The run, which exists.
    each
        The traces.
    repair, allow_nonfinite
        As for :func:`zarrtrace.extraction.extract_run`.
    """

    folder: Location
    each: Sequence[TracePlan]
    repair: bool
    allow_nonfinite: bool


class MissingParts(NamedTuple):
    """The parts that a trace lacks before anything is computed."""

    layers: tuple[int, ...]
    tokens: bool


def what_begins(traces: Traces) -> dict[str, MissingParts]:
    """Return what traces lack, all of it, where nothing of any is stored; else nothing."""
    names = [plan.attributes.name for plan in traces.each]
    if traces.repair or not is_untouched(traces.folder, names):
        return {}
    return {
        plan.attributes.name: MissingParts(plan.attributes.layers, plan.shape.next_token)
        for plan in traces.each
    }


class Writers(Protocol):
    """Appends records while the model computes; leaving it waits for the last one.

    The first error of a writer ends the capture: :meth:`submit` raises it.
    """

    @property
    def lacks(self) -> Mapping[str, MissingParts]:
        """The parts that each trace lacked when it was opened."""
        ...

    def submit(self, record: Record) -> None:
        """Queue a record; waits while too many are queued."""
        ...

    def __enter__(self) -> Self:
        """Go on."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is queued; records in hand are stored also when the capture fails."""
        ...


class Stored(NamedTuple):
    """How much of a trace is stored.

    Attributes
    ----------
    scenario
        Its scenario.
    missing
        Number of layers that it lacks.
    complete
        Whether readers find it.
    """

    scenario: str
    missing: int
    complete: bool


class OpenTraces:
    """Traces that one process writes, from any thread; :meth:`close` follows the last record.

    A thread of its own publishes complete traces: it waits for the disk, which may have gigabytes
    to take, while the others are written.

    Parameters
    ----------
    traces
        Which ones; those that are complete but for their last mark get it.
    """

    def __init__(self, traces: Traces) -> None:
        self._traces, self._mutex = traces, threading.Lock()
        self._plans = {plan.attributes.name: plan for plan in traces.each}
        # Of traces that begin, only those that are being written: a run may have thousands.
        self._writers: dict[str, TraceWriter] = {}
        self._finished: set[str] = set()
        self._publishing = ThreadPoolExecutor(1, thread_name_prefix="zarrtrace-publish")
        self._completed: list[str] = []
        self._published: list[Stored] = []
        self._failed: Exception | None = None
        begin = what_begins(traces)
        self.lacks = begin or {name: self._found(name) for name in self._plans}

    def _found(self, name: str) -> MissingParts:
        """Return what a trace lacks; one that lacks nothing is published."""
        writer = self._writer(name)
        lack = MissingParts(writer.missing_layers, writer.needs_tokens)
        if not any(lack):
            writer.finish()  # an earlier process may have stopped just before it
            del self._writers[name]
        return lack

    def _writer(self, name: str) -> TraceWriter:
        with self._mutex:
            if name not in self._writers:
                self._writers[name] = TraceWriter(
                    self._traces.folder,
                    self._plans[name],
                    repair=self._traces.repair,
                    allow_nonfinite=self._traces.allow_nonfinite,
                )
            return self._writers[name]

    def append(self, record: Record) -> list[Stored]:
        """Store a record; returns how much of its traces is stored, and which were published."""
        names = record.scenarios if isinstance(record, LayerBatch) else [record.scenario]
        open_ones = {name: self._writer(name) for name in names}
        for one in record.records() if isinstance(record, LayerBatch) else [record]:
            open_ones[one.scenario].append(one)
        complete = [name for name, writer in open_ones.items() if self._is_last(name, writer)]
        for name in complete:
            open_ones[name].complete()
        with self._mutex:
            self._completed += complete
        if complete:
            self._publishing.submit(self._publish)
        stored = [
            Stored(name, len(writer.missing_layers), complete=False)
            for name, writer in open_ones.items()
        ]
        return stored + self._news()

    def _publish(self) -> None:
        """Publish what is complete, once the disk has all of it."""
        with self._mutex:
            names, self._completed = self._completed, []
        if not names or self._failed:  # an earlier call has done it
            return
        try:
            disk.sync(staging_folder(self._traces.folder))
            for name in names:
                self._writer(name).publish()
        except Exception as error:  # noqa: BLE001 -- raised where records are appended
            self._failed = error
            return
        with self._mutex:
            for name in names:
                del self._writers[name]
                self._published.append(Stored(name, 0, complete=True))

    def _news(self) -> list[Stored]:
        """Return what was published since this was asked; raises what prevented that."""
        if self._failed:
            raise self._failed
        with self._mutex:
            found, self._published = self._published, []
        return found

    def close(self) -> list[Stored]:
        """Wait until what is complete is published, and return what is new."""
        self._publishing.shutdown()
        return self._news()

    def _is_last(self, scenario: str, writer: TraceWriter) -> bool:
        """Whether a trace has just got its last record; true once."""
        with self._mutex:
            if scenario in self._finished or writer.missing_layers or writer.needs_tokens:
                return False
            self._finished.add(scenario)
            return True


def bytes_of(record: Record) -> int:
    """Return how much memory a record holds."""
    if isinstance(record, LayerBatch):
        return record.nbytes
    if isinstance(record, TokensRecord):
        return record.next_token.nbytes + record.next_token_logprob.nbytes
    arrays: list[Any] = [record.attention, record.attention_mean, record.residual]
    arrays += [features.activations for features in record.features.values()]
    return sum(array.nbytes for array in arrays if array is not None)


class MemoryBudget:
    """Lets records in while what is held stays below a limit, or nothing is held."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._free = threading.Condition()

    def take(self, size: int) -> None:
        """Wait for room, and take it."""
        with self._free:
            self._free.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def give_back(self, size: int) -> None:
        """Make room for others."""
        with self._free:
            self._held -= size
            self._free.notify()


class WriterThreads:
    """Append records in threads; see :class:`Writers`.

    Parameters
    ----------
    traces
        Where to.
    watch
        Is told of what was stored.
    gpu
        Whether a GPU computes: it leaves them all cores.
    """

    def __init__(self, traces: Traces, watch: ProgressListener, *, gpu: bool = False) -> None:
        self._traces, self._watch = OpenTraces(traces), watch
        threads = max(THREADS, min(cpus(), _MOST_THREADS)) if gpu else THREADS
        self.lacks: Mapping[str, MissingParts] = self._traces.lacks
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="zarrtrace-write", initializer=_give_way
        )
        self._room = MemoryBudget(threads * (_BESIDE_A_GPU if gpu else _BYTES_A_WRITER))
        self._freed, self._mutex = 0, threading.Lock()
        self._numbers = count()
        # What failed, by number of its record: that of the earliest is raised, whichever thread
        # was faster.
        self._failed: dict[int, BaseException] = {}

    def __enter__(self) -> Self:
        return self

    def submit(self, record: Record) -> None:
        """Queue a record; waits while too many are queued."""
        for one in record.each() if isinstance(record, LayerBatch) else [record]:
            size = bytes_of(one)
            self._room.take(size)
            self._raise_first()
            number = next(self._numbers)
            future = self._pool.submit(self._append, number, one)
            future.add_done_callback(partial(self._done, number, size))

    def _append(self, number: int, record: Record) -> None:
        if number < min(self._failed, default=math.inf):
            self._say(self._traces.append(record))

    def _say(self, found: Sequence[Stored]) -> None:
        for scenario, missing, complete in found:
            self._watch.stored(scenario, missing, complete=complete)

    def _done(self, number: int, size: int, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._failed[number] = error
        self._room.give_back(size)
        with self._mutex:
            self._freed += size
            release = size >= _LARGE_RECORD or self._freed >= _SMALL_RECORDS
            if release:
                self._freed = 0
        if release:
            release_freed()

    def _raise_first(self) -> None:
        if self._failed:
            self._pool.shutdown(wait=True)  # an earlier record may still fail
            raise self._failed[min(self._failed)]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        try:
            self._say(self._traces.close())
        except Exception as failure:  # noqa: BLE001 -- raised below, if it is the first
            self._failed[next(self._numbers)] = failure
        if kind is None:
            self._raise_first()


def _give_way() -> None:
    """Let the threads that compute go first; torch's wait for each other many times a layer."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
