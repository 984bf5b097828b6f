"""Running a job: capture beside compression and writing.

``for record in capture(...): writer.append(record)``, with a bounded number of records between the
two, and resume.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from numcodecs import BitRound

from zarrtrace.errors import IntegrityError, NonFiniteError, NoSpaceError, readable
from zarrtrace.extraction.estimate import estimate
from zarrtrace.extraction.interrupts import held_back
from zarrtrace.extraction.job import Job, Options, capture_package, prepare
from zarrtrace.extraction.memory import release_freed
from zarrtrace.extraction.progress import Progress, Shown, Watch
from zarrtrace.spec import LayerRecord, TokensRecord
from zarrtrace.store import (
    Location,
    ObjectPath,
    RunWriter,
    TraceWriter,
    locate,
    read_run_attributes,
    refuse_foreign,
    wait_for_writers,
)

#: How long to wait for a worker that was given up, and still writes what is to be done again.
SECONDS_GIVEN_UP = 600

_WRITERS = 2
# Bytes of records that wait or are being written, by writer; one record may be larger.
_BYTES_A_WRITER = 48 * 2**20
_MOST_WRITERS = 14
# After a record of this size, or so many bytes of small ones, memory that was freed is given back.
_LARGE_RECORD = 32 * 2**20
_SMALL_RECORDS = 64 * 2**20


def extract(
    output: str | Location,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    repair: bool = False,
    allow_nonfinite: bool = False,
    progress: Shown = None,
) -> Location:
    """Run a model over scenarios and store attention, features and continuations.

    A run that exists is gone on with, if it was asked for alike.

    Parameters
    ----------
    output
        Folder of the run, or its address in an object store.
    options
        What to extract; by default the embedded model, SAEs and scenarios.
    overwrite
        Replace a run that exists, once the new one is finished.
    repair
        Read every byte of a run that exists, and make anew what is damaged.
    allow_nonfinite
        Store NaN and infinity that the model computes, and say where in the trace's attributes.
    progress
        ``"bars"`` draws two on stderr, ``"lines"`` writes one twice a minute, for logs.

    Returns
    -------
    Path or ObjectPath
        The run.

    Raises
    ------
    ConfigError, ScenarioError
        If options do not fit the model, the SAEs or each other.
    ModelError, SAEError
        If the model or an SAE cannot be used.
    NonFiniteError
        If the model computes NaN or infinity, and `allow_nonfinite` is false.
    StoreError
        If `output` cannot be written, or is another run.
    """
    output = locate(output)
    if not repair:
        refuse_foreign(output)  # before hours of work
    job = prepare(
        as_before(output, options or Options(), overwrite=overwrite), progress=progress == "bars"
    )
    layers = {prompt.scenario.name: len(job.layers) for prompt in job.prompts}
    with (
        saying_how_much_room(output, estimate(job).disk_bytes),
        RunWriter(output, list(layers), job.config, overwrite=overwrite, repair=repair) as run,
        Progress(layers, progress) as bars,
    ):
        wait_for_writers(run.path, seconds=SECONDS_GIVEN_UP)
        fill(run.path, job, bars, repair=repair, allow_nonfinite=allow_nonfinite)
        run.finish()
    return output


@contextlib.contextmanager
def saying_how_much_room(output: Location, needed: int) -> Iterator[None]:
    """Add to the error of a full disk how many bytes the run needs."""
    try:
        yield
    except NoSpaceError as error:
        free = readable(shutil.disk_usage(str(output.parent)).free)
        raise NoSpaceError(
            error.what,
            why=f"The run needs about {readable(needed)} in all; {free} are free now.",
            remedy=error.remedy,
        ) from error


def fill(
    folder: Location,
    job: Job,
    watch: Watch,
    *,
    repair: bool = False,
    allow_nonfinite: bool = False,
    threads: int | None = None,
) -> None:
    """Capture what the traces of a job's prompts lack, and store it.

    Parameters
    ----------
    folder
        The run, which exists; whoever calls has seen to it that nobody else writes these traces.
    job
        Its prompts are computed in batches made of all of them, done or not.
    watch
        Is told of what was found and stored.
    repair, allow_nonfinite
        As for :func:`extract`.
    threads
        How many compress and write; None chooses.

    Raises
    ------
    ModelError, SAEError, NonFiniteError, StoreError
        As for :func:`extract`.
    """
    writers = {
        prompt.scenario.name: TraceWriter(
            folder / prompt.scenario.name,
            job.attributes(prompt),
            job.shape(prompt),
            prompt.tokens,
            repair=repair,
        )
        for prompt in job.prompts
    }
    for name, writer in writers.items():
        complete = not writer.missing_layers and not writer.needs_tokens
        if complete:
            writer.finish()  # an earlier process may have stopped just before it
        watch.found(name, len(writer.missing_layers), complete=complete)
    capture = capture_package()
    requests = [
        capture.Request(
            prompt,
            frozenset(writers[prompt.scenario.name].missing_layers),
            writers[prompt.scenario.name].needs_tokens,
            blocked=prompt.scenario.name in job.blocked,
            queries=job.queries(prompt),
        )
        for prompt in job.prompts
    ]
    records: Generator[LayerRecord | TokensRecord, None, None] = capture.capture(
        job.model,
        requests,
        attention_dtype=job.attention_dtype,
        saes=job.saes,
        source=job.source,
        batch_size=job.batch_size,
    )
    # Closed here: a pass that is dropped in another thread cannot be ended there.
    with (
        held_back() as interrupted,
        _WriterPool(writers, watch, threads or _writers(job, folder)) as pool,
        contextlib.closing(records),
    ):
        for record in records:
            watch.check()
            if not allow_nonfinite:
                _refuse_nonfinite(record, job)
            pool.submit(_rounded(record, job.options.attention_keepbits))
            interrupted()


def _refuse_nonfinite(record: LayerRecord | TokensRecord, job: Job) -> None:
    if not record.nonfinite:
        return
    where = f"layer {record.layer}" if isinstance(record, LayerRecord) else "the last layer"
    raise NonFiniteError(
        f"{record.scenario}: the model computed NaN or infinity in {where} "
        f"({', '.join(record.nonfinite)})",
        why=f"The model runs in {job.model.attributes.dtype}; float16 ends at 65,504, which some "
        "models exceed. Damaged weights do this, too.",
        remedy="Use --dtype bfloat16 or float32, or store such values with --allow-nonfinite.",
    )


def _rounded(
    record: LayerRecord | TokensRecord, keepbits: int | None
) -> LayerRecord | TokensRecord:
    """Round attention to some bits of its mantissa; zeros behind them compress well."""
    if keepbits is None or isinstance(record, TokensRecord) or record.attention is None:
        return record
    rounded = BitRound(keepbits).encode(record.attention)
    return replace(record, attention=rounded.view(record.attention.dtype))


def as_before(output: Location, options: Options, *, overwrite: bool) -> Options:
    """Take the batch size that an interrupted run chose from memory: results depend on it."""
    if options.batch_size is not None or overwrite or not (output / "zarr.json").is_file():
        return options
    with contextlib.suppress(IntegrityError):  # said, or repaired, when the run is opened
        return replace(options, batch_size=read_run_attributes(output).config.get("batch_size"))
    return options


class _WriterPool:
    """Append records beside the computation; at most a few wait.

    The first error of a writer ends the capture: :meth:`submit` raises it.
    """

    def __init__(self, writers: Mapping[str, TraceWriter], watch: Watch, threads: int) -> None:
        self._writers, self._watch = writers, watch
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="zarrtrace-write", initializer=_give_way
        )
        self._limit = min(threads, max(_WRITERS, _other_cores())) * _BYTES_A_WRITER
        self._held = self._freed = 0
        self._room = threading.Condition()
        self._failed: list[BaseException] = []
        self._finished: set[str] = set()
        self._mutex = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def submit(self, record: LayerRecord | TokensRecord) -> None:
        """Queue a record; waits while too many are queued."""
        size = _bytes_of(record)
        with self._room:
            self._room.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size
        self._raise_first()
        self._pool.submit(self._append, record).add_done_callback(partial(self._done, size))

    def _append(self, record: LayerRecord | TokensRecord) -> None:
        if self._failed:
            return
        writer = self._writers[record.scenario]
        writer.append(record)
        complete = self._is_last(record.scenario, writer)
        if complete:
            writer.finish()
        self._watch.stored(record.scenario, len(writer.missing_layers), complete=complete)

    def _is_last(self, scenario: str, writer: TraceWriter) -> bool:
        """Whether a trace has just got its last record; true once."""
        with self._mutex:
            if scenario in self._finished or writer.missing_layers or writer.needs_tokens:
                return False
            self._finished.add(scenario)
            return True

    def _done(self, size: int, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._failed.append(error)
        with self._room:
            self._held -= size
            self._freed += size
            release = size >= _LARGE_RECORD or self._freed >= _SMALL_RECORDS
            if release:
                self._freed = 0
            self._room.notify()
        if release:
            release_freed()

    def _raise_first(self) -> None:
        if self._failed:
            raise self._failed[0]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Records in hand are still stored when the capture fails or is interrupted.
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise_first()


def _writers(job: Job, folder: Location) -> int:
    """Choose how many threads write: two beside a CPU that computes, else all cores but one."""
    if isinstance(folder, ObjectPath):
        return _MOST_WRITERS  # they wait for answers, most of the time
    if job.model.device.type == "cpu":
        return _WRITERS
    return max(_WRITERS, min(_MOST_WRITERS, _other_cores()))


def _other_cores() -> int:
    return (os.cpu_count() or 1) - 1


def _give_way() -> None:
    """Let the threads that compute go first; torch's wait for each other many times a layer."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _bytes_of(record: LayerRecord | TokensRecord) -> int:
    if isinstance(record, TokensRecord):
        return record.next_token.nbytes + record.next_token_logprob.nbytes
    arrays: list[Any] = [record.attention, record.attention_mean]
    arrays += [features.activations for features in record.features.values()]
    return sum(array.nbytes for array in arrays if array is not None)
