"""Running a job: capture beside compression and writing.

``for record in capture(...): writer.append(record)``, with a bounded number of records between the
two, and resume.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from numcodecs import BitRound
from tqdm import tqdm

from zarrtrace.errors import IntegrityError, NonFiniteError, NoSpaceError, readable
from zarrtrace.extraction.estimate import estimate
from zarrtrace.extraction.job import Job, Options, capture_package, prepare
from zarrtrace.extraction.memory import release_freed
from zarrtrace.spec import LayerRecord, TokensRecord
from zarrtrace.store import RunWriter, TraceWriter, read_run_attributes, refuse_foreign

_WRITERS = 2
# Bytes of records that wait or are being written, by writer; one record may be larger.
_BYTES_A_WRITER = 48 * 2**20
_MOST_WRITERS = 14
_SECONDS_A_LINE = 30
# After a record of this size, or so many bytes of small ones, memory that was freed is given back.
_LARGE_RECORD = 32 * 2**20
_SMALL_RECORDS = 256 * 2**20


def extract(
    output: str | Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    repair: bool = False,
    allow_nonfinite: bool = False,
    progress: Literal["bars", "lines"] | None = None,
) -> Path:
    """Run a model over scenarios and store attention, features and continuations.

    A run that exists is gone on with, if it was asked for alike.

    Parameters
    ----------
    output
        Folder of the run.
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
    Path
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
    output = Path(output)
    if not repair:
        refuse_foreign(output)  # before hours of work
    asked = _as_before(output, options or Options(), overwrite=overwrite)
    job = prepare(asked, progress=progress == "bars")
    names = [prompt.scenario.name for prompt in job.prompts]
    with (
        _saying_how_much_room(output, job),
        RunWriter(output, names, job.config, overwrite=overwrite, repair=repair) as run,
    ):
        writers = [
            run.trace(job.attributes(prompt), job.shape(prompt), prompt.tokens)
            for prompt in job.prompts
        ]
        for writer in writers:
            if not writer.missing_layers and not writer.needs_tokens:
                writer.finish()  # an earlier process may have stopped just before it
        _fill(job, writers, allow_nonfinite=allow_nonfinite, progress=progress)
        run.finish()
    return output


@contextlib.contextmanager
def _saying_how_much_room(output: Path, job: Job) -> Iterator[None]:
    try:
        yield
    except NoSpaceError as error:
        needed = readable(estimate(job).disk_bytes)
        free = readable(shutil.disk_usage(output.parent).free)
        raise NoSpaceError(
            error.what,
            why=f"The run needs about {needed} in all; {free} are free now.",
            remedy=error.remedy,
        ) from error


def _fill(
    job: Job,
    writers: Sequence[TraceWriter],
    *,
    allow_nonfinite: bool,
    progress: Literal["bars", "lines"] | None,
) -> None:
    """Capture what is missing and hand it to the writers."""
    capture = capture_package()
    by_name = {
        prompt.scenario.name: writer for prompt, writer in zip(job.prompts, writers, strict=True)
    }
    requests = [
        capture.Request(
            prompt,
            frozenset(writer.missing_layers),
            writer.needs_tokens,
            blocked=prompt.scenario.name in job.blocked,
            queries=job.queries(prompt),
        )
        for prompt, writer in zip(job.prompts, writers, strict=True)
    ]
    records: Generator[LayerRecord | TokensRecord, None, None] = capture.capture(
        job.model,
        requests,
        attention_dtype=job.attention_dtype,
        saes=job.saes,
        source=job.source,
        batch_size=job.batch_size,
    )
    with _Progress(requests, progress) as bars:
        try:
            # Closed here: a pass that is dropped in another thread cannot be ended there.
            with (
                _WriterPool(by_name, bars.stored, _writers(job)) as pool,
                contextlib.closing(records),
            ):
                for record in records:
                    if not allow_nonfinite:
                        _refuse_nonfinite(record, job)
                    pool.submit(_rounded(record, job.options.attention_keepbits))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped after {bars}") from None


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


def _as_before(output: Path, options: Options, *, overwrite: bool) -> Options:
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

    def __init__(self, writers: Mapping[str, TraceWriter], stored: Any, threads: int) -> None:
        self._writers, self._stored = writers, stored
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="zarrtrace-write", initializer=_give_way
        )
        self._limit = threads * _BYTES_A_WRITER
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
        self._stored(record.scenario, len(writer.missing_layers), complete)

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


def _writers(job: Job) -> int:
    """Choose how many threads write: two beside a CPU that computes, else all cores but one."""
    if job.model.device.type == "cpu":
        return _WRITERS
    return max(_WRITERS, min(_MOST_WRITERS, (os.cpu_count() or 1) - 1))


def _give_way() -> None:
    """Let the threads that compute go first; torch's wait for each other many times a layer."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _bytes_of(record: LayerRecord | TokensRecord) -> int:
    if isinstance(record, TokensRecord):
        return record.next_token.nbytes + record.next_token_logprob.nbytes
    arrays = [record.attention, record.attention_mean]
    arrays += [features.activations for features in record.features.values()]
    return sum(array.nbytes for array in arrays if array is not None)


class _Progress:
    """Layers of all scenarios, and scenarios, on stderr: two bars, or a line now and then."""

    def __init__(self, requests: Sequence[Any], shown: Literal["bars", "lines"] | None) -> None:
        self._mutex = threading.Lock()
        self._lines, self._said = shown == "lines", time.monotonic()
        self._missing = {request.prompt.scenario.name: len(request.layers) for request in requests}
        layers, done = sum(self._missing.values()), sum(request.done for request in requests)
        self._counts = [0, layers, done, len(requests)]
        hidden = shown != "bars"
        self._layers = tqdm(
            total=layers, desc="layers", unit="layer", disable=hidden, file=sys.stderr
        )
        self._scenarios = tqdm(
            total=len(requests),
            initial=done,
            desc="scenarios",
            unit="scenario",
            disable=hidden,
            file=sys.stderr,
        )

    def __enter__(self) -> Self:
        return self

    def stored(self, scenario: str, missing: int, complete: bool) -> None:  # noqa: FBT001
        """Count what a record has completed; `missing` layers are left of its scenario."""
        with self._mutex:
            new = max(0, self._missing[scenario] - missing)
            self._missing[scenario] -= new
            self._counts[0] += new
            self._counts[2] += complete
            self._layers.update(new)
            self._scenarios.update(int(complete))
            if self._lines and time.monotonic() - self._said > _SECONDS_A_LINE:
                self._said = time.monotonic()
                sys.stderr.write(f"zarrtrace: {self}\n")

    def __str__(self) -> str:
        """Say how far the run is; layers are those that this process was to store."""
        return "{} of {} layers, {} of {} scenarios".format(*self._counts)

    def __exit__(self, *_: object) -> None:
        self._scenarios.close()
        self._layers.close()
