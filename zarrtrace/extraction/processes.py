"""Processes that compress and write records while a GPU computes.

A GPU makes records faster than threads of one process can write them: all of them, and the one
that drives the GPU, would wait for Python's lock. Each trace has one process that writes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np

from zarrtrace.errors import StoreError
from zarrtrace.extraction.channel import pair
from zarrtrace.extraction.progress import ProgressListener
from zarrtrace.extraction.writer_template import fork_writer
from zarrtrace.extraction.writers import (
    MemoryBudget,
    MissingParts,
    Record,
    Traces,
    bytes_of,
    what_begins,
)
from zarrtrace.layer_batches import LayerBatch
from zarrtrace.machine import cpus
from zarrtrace.records import BFloat16, TokensRecord

#: Environment variable that says how many cores a worker has.
SHARE = "ZARRTRACE_CORES"

#: Fewer than these are better written by threads: each would have one process.
FEW_TRACES = 4

# Traces of a batch that one process writes: few, so that all have equally much to do.
_TOGETHER = 4
# Bytes of records that wait or are being sent, by process; one record may be larger.
_BYTES_A_PROCESS = 24 * 2**20


class _Process:
    """A process that writes traces for this one, and ends with it."""

    def __init__(self) -> None:
        self._channel, theirs = pair()
        with theirs:
            fork_writer(theirs)

    def send(self, value: Traces | Record | None) -> None:
        """Send traces to open, a record of one of them, or None where it is done with them."""
        self._channel.send(value)

    def answer(self) -> Any:
        """Wait for the answer to what was sent; raises the error that came of it."""
        found = self._channel.receive()
        if isinstance(found, BaseException):
            raise found
        return found

    def end(self) -> None:
        """Let it end: it stores what it has."""
        self._channel.end()

    def wait(self) -> None:
        """Wait for its end."""
        with suppress(EOFError, ConnectionError):
            while True:  # it may still answer
                self._channel.receive()
        self._channel.close()


def _end(processes: Sequence[_Process]) -> None:
    """Let processes end, and wait for that."""
    for process in processes:
        process.end()
    for process in processes:
        process.wait()


class WriterPool:
    """Processes that write traces, kept from one run to the next; a context manager ends them.

    Parameters
    ----------
    most
        Number of processes, at most; by default all cores but one, which drives the GPU: those
        that this worker has, where several on this machine share them.
    """

    def __init__(self, most: int | None = None) -> None:
        share = int(os.environ.get(SHARE, cpus()))
        self._most = most or max(1, share - 1)
        self._idle: list[_Process] = []

    def start(self, traces: int) -> None:
        """Start processes for a number of traces while weights are read."""
        for _ in range(min(self._most, traces) - len(self._idle)):
            self._idle.append(_Process())

    def take(self, traces: int) -> list[_Process]:
        """Lend processes for a number of traces; the caller gives them back."""
        self.start(traces)
        taken, self._idle = self._idle, []
        return taken

    def give_back(self, processes: list[_Process]) -> None:
        """Take processes back that have nothing to do."""
        self._idle += processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        ending, self._idle = self._idle, []
        _end(ending)


class WriterProcesses:
    """Append records in processes; see :class:`zarrtrace.extraction.writers.Writers`.

    Parameters
    ----------
    traces
        Where to.
    watch
        Is told of what was stored.
    pool
        Its processes write.
    together
        Number of successive traces in a batch. Some of them have one process, if
        there are enough for all.
    """

    def __init__(
        self, traces: Traces, watch: ProgressListener, pool: WriterPool, together: int = 1
    ) -> None:
        self._watch, self._pool = watch, pool
        self._processes = pool.take(len(traces.each))
        count = len(self._processes)
        self._room = MemoryBudget(count * _BYTES_A_PROCESS)
        self._queues: list[SimpleQueue[Record | None]] = [SimpleQueue() for _ in range(count)]
        self._failed: list[BaseException] = []
        each = min(together, _TOGETHER, -(-len(traces.each) // count))
        names = [one.attributes.name for one in traces.each]
        self._at = {name: number // each % count for number, name in enumerate(names)}
        self._traces = traces
        begin = what_begins(traces)
        self._begins = bool(begin)
        self.lacks: Mapping[str, MissingParts] = begin or self._open()
        self._threads = [
            threading.Thread(target=self._feed, args=(at,), name=f"zarrtrace-write-{at}")
            for at in range(count)
        ]

    def _open(self) -> dict[str, MissingParts]:
        """Let all processes open their traces; returns what these lack."""
        try:
            for at, process in enumerate(self._processes):
                process.send(self._traces_of(at))
            found = [process.answer() for process in self._processes]
        except BaseException:
            _end(self._processes)
            raise
        lacks = {name: lack for of_process in found for name, lack in of_process.items()}
        return {name: lacks[name] for name in self._at}

    def _traces_of(self, at: int) -> Traces:
        each = [one for one in self._traces.each if self._at[one.attributes.name] == at]
        return replace(self._traces, each=each)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def submit(self, record: Record) -> None:
        """Queue a record; waits while too many are queued."""
        if not isinstance(record, LayerBatch):
            self._put(self._at[record.scenario], record)
            return
        by_process: dict[int, list[int]] = {}
        for place, name in zip(record.wanted, record.scenarios, strict=True):
            by_process.setdefault(self._at[name], []).append(place)
        for at, places in by_process.items():
            self._put(at, record.part(places))

    def _put(self, at: int, record: Record) -> None:
        self._room.take(bytes_of(record))
        self._raise_first()
        self._queues[at].put(record)

    def _feed(self, at: int) -> None:
        """Send a process its records, one at a time, and hear what it has stored."""
        process, mine = self._processes[at], [name for name in self._at if self._at[name] == at]
        if self._begins:  # the model computes meanwhile
            with self._noting(mine):
                process.send(self._traces_of(at))
                process.answer()
        while (record := self._queues[at].get()) is not None:
            with self._noting(_scenarios(record)):
                self._exchange(process, _contiguous(record))
            self._room.give_back(bytes_of(record))
        with self._noting(mine):
            self._exchange(process, None)

    def _exchange(self, process: _Process, record: Record | None) -> None:
        """Send a record, or None behind the last one, and report what was stored."""
        if self._failed:
            return
        process.send(record)
        for scenario, missing, complete in process.answer():
            self._watch.stored(scenario, missing, complete=complete)

    @contextmanager
    def _noting(self, scenarios: Sequence[str]) -> Iterator[None]:
        """Note an error, which is raised where records are submitted."""
        try:
            yield
        except (EOFError, OSError) as error:
            self._failed.append(_ended(scenarios, error))
        except BaseException as error:  # noqa: BLE001 -- raised where records are submitted
            self._failed.append(error)

    def _raise_first(self) -> None:
        if self._failed:
            raise self._failed[0]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        if self._failed or kind is not None:
            _end(self._processes)
        else:
            self._pool.give_back(self._processes)
        if kind is None:
            self._raise_first()


def _contiguous(record: Record) -> Record:
    """Return a record whose large arrays can be sent as they are."""
    if isinstance(record, TokensRecord) or record.attention is None:
        return record
    attention, mean = record.attention, record.attention_mean
    whole = (
        BFloat16(np.ascontiguousarray(attention.bits))
        if isinstance(attention, BFloat16)
        else np.ascontiguousarray(attention)
    )
    return replace(
        record,
        attention=whole,
        attention_mean=None if mean is None else np.ascontiguousarray(mean),
    )


def _scenarios(record: Record) -> Sequence[str]:
    return record.scenarios if isinstance(record, LayerBatch) else [record.scenario]


def _ended(scenarios: Sequence[str], error: BaseException) -> BaseException:
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError | ConnectionError):
        return error
    return StoreError(
        f"{', '.join(scenarios)}: the process that wrote it has ended",
        why="It was killed; on Linux, usually because memory ran out.",
        remedy="Run the same command again; it resumes where this one stopped.",
    )
