"""Running a job: capture, compression and writing in parallel.

``for record in capture(...): writer.append(record)``, with a bounded number of records between the
two, and resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zarrtrace.errors import IntegrityError, NoSpaceError, readable
from zarrtrace.extraction.continuations import trace_names, with_continuations
from zarrtrace.extraction.estimates import estimate
from zarrtrace.extraction.interrupts import held_back
from zarrtrace.extraction.job import Job, prepare
from zarrtrace.extraction.options import NOTHING_LOADED, Loaded, Options, stated_by_suite
from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.processes import FEW_TRACES, WriterPool, WriterProcesses
from zarrtrace.extraction.progress import GenerationProgress, Progress, ProgressListener, Shown, say
from zarrtrace.extraction.writers import (
    MissingParts,
    Record,
    Traces,
    Writers,
    WriterThreads,
)
from zarrtrace.hub import cache_if_unreachable
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    RunWriter,
    check_target,
    read_run,
    remove_continuations,
    wait_for_writers,
)

if TYPE_CHECKING:
    from zarrtrace.capture import Prompt
    from zarrtrace.scenarios import Scenario

#: How long to wait for a worker that was given up, and still writes what is to be done again.
SECONDS_GIVEN_UP = 600


def extract_run(
    output: Address,
    options: Options | None = None,
    *,
    scenarios: Sequence[Scenario] | None = None,
    loaded: Loaded = NOTHING_LOADED,
    overwrite: bool = False,
    repair: bool = False,
    allow_nonfinite: bool = False,
    accept_versions: bool = False,
    progress: Shown = None,
) -> Location:
    """Do what :func:`zarrtrace.extract` does, in this process, and return where the run is.

    A run that exists is resumed if its configuration is the same.

    Parameters
    ----------
    output
        Folder of the run, or its address in an object store.
    options
        Options of the extraction; by default the embedded model, SAEs and scenarios.
    scenarios
        The scenarios; None reads those that the options name.
    loaded
        A model, a tokenizer and SAEs that are in memory.
    overwrite
        Replace a run that exists, once the new one is finished.
    repair
        Read every byte of a run that exists, and compute damaged layers again.
    allow_nonfinite
        Store NaN and infinity, which the model computes or the stored precision makes of values
        too large for it, and say where in the trace's attributes.
    accept_versions
        Go on with a run that was begun by other versions of libraries; its traces name both.
    progress
        ``"bars"`` draws two on stderr, ``"lines"`` writes one twice a minute, for logs.

    Returns
    -------
    Location
        The run.

    Raises
    ------
    ConfigError, ScenarioError
        If options do not fit the model, the SAEs or each other.
    ModelError, SAEError
        If the model or an SAE cannot be used.
    NonFiniteError
        If NaN or infinity would be stored, and `allow_nonfinite` is false.
    StoreError
        If `output` cannot be written, or is another run.
    """
    output = locate(output)
    check_target(output, "run", overwrite=overwrite, repair=repair)
    options = as_before(output, options or Options(), overwrite=overwrite)
    # While it runs, each SAE is read from the hub or its cache.
    named = options.own_model if loaded.model is None else None
    hub = cache_if_unreachable(named, options.sae_release)
    with hub, WriterPool() as pool, borrowed(loaded.model):
        job = prepare(
            options,
            scenarios=scenarios,
            loaded=loaded,
            progress=progress == "bars",
            pool=pool,
        )
        say(job.notes, progress)
        layers = dict.fromkeys(trace_names(job), len(job.layers))
        generated = len(layers) if job.options.generate else 0
        with (
            saying_how_much_room(estimate(job).disk_bytes),
            RunWriter(
                output,
                list(layers),
                job.config,
                stated=stated_by_suite(options),
                overwrite=overwrite,
                repair=repair,
                accept_versions=accept_versions,
            ) as run,
        ):
            wait_for_writers(run.path, seconds=SECONDS_GIVEN_UP)
            with GenerationProgress(generated, progress) as generation:
                job = with_continuations(job, output, run.path, generation)
            with Progress(layers, progress, generation) as bars:
                fill(run.path, job, bars, pool, repair=repair, allow_nonfinite=allow_nonfinite)
                run.finish()
            remove_continuations(output)
    return output


def borrowed(model: Any) -> AbstractContextManager[None]:
    """Borrow a loaded model, if there is one."""
    if model is None:
        return contextlib.nullcontext()
    lent: AbstractContextManager[None] = capture_package().borrow(model)
    return lent


@contextlib.contextmanager
def saying_how_much_room(needed: int) -> Iterator[None]:
    """Add to the error of a full disk how many bytes the run needs."""
    try:
        yield
    except NoSpaceError as error:
        raise NoSpaceError(
            error.what,
            why=f"The run needs about {readable(needed)} in all. {error.why}".rstrip(),
            remedy=error.remedy,
        ) from error


def fill(
    folder: Location,
    job: Job,
    watch: ProgressListener,
    pool: WriterPool,
    *,
    computing: AbstractContextManager[None] | None = None,
    repair: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Capture what the traces of a job's prompts lack, and store it.

    Parameters
    ----------
    folder
        The run, which exists; the caller makes sure that nobody else writes these traces.
    job
        Its prompts are computed in batches made of all of them, done or not.
    watch
        Is told of what was found and stored.
    pool
        Its processes write what a GPU computes for several traces.
    computing
        Context that is entered when all traces are open, and left when everything is computed.
    repair, allow_nonfinite
        As for :func:`extract_run`.

    Raises
    ------
    ModelError, SAEError, NonFiniteError, StoreError
        As for :func:`extract_run`.
    """
    traces = Traces(
        folder,
        [job.plan(prompt) for prompt in _in_order(job)],
        repair,
        allow_nonfinite,
    )
    opened = _writers(job, traces, watch, pool)
    with held_back() as interrupted, opened as writers:
        for name, lack in writers.lacks.items():
            watch.found(name, len(lack.layers), complete=not any(lack))
        # Closed here: a pass that is dropped in another thread cannot be ended there.
        turn = computing or contextlib.nullcontext()
        with turn, contextlib.closing(captured(job, writers.lacks)) as records:
            for record in records:
                watch.check()
                writers.submit(record)
                interrupted()


def _writers(job: Job, traces: Traces, watch: ProgressListener, pool: WriterPool) -> Writers:
    gpu = job.model.device.type != "cpu"
    if not gpu or len(traces.each) < FEW_TRACES:  # each would have one process
        return WriterThreads(traces, watch, gpu=gpu)
    return WriterProcesses(traces, watch, pool, job.batch_size)


def _in_order(job: Job) -> list[Prompt]:
    """Return a job's prompts as they go through the model, those of a batch side by side."""
    lengths = [len(prompt.tokens.ids) for prompt in job.prompts]
    alone = [prompt.scenario.name in job.blocked for prompt in job.prompts]
    groups = capture_package().grouped(job.model, lengths, alone, job.batch_size)
    return [job.prompts[at] for group in groups for at in group]


def captured(
    job: Job,
    lacks: Mapping[str, MissingParts],
    positions: Callable[[Prompt], tuple[int, ...] | None] | None = None,
) -> Generator[Record, None, None]:
    """Capture what traces lack.

    Parameters
    ----------
    positions
        Token positions of a prompt that are stored, None for all; by default the job's.
    """
    capture, stored = capture_package(), positions or job.positions
    requests = [
        capture.Request(
            prompt,
            frozenset(lacks[prompt.scenario.name].layers),
            lacks[prompt.scenario.name].tokens,
            blocked=prompt.scenario.name in job.blocked,
            positions=stored(prompt),
            attention_positions=job.attention_rows(prompt) if job.attention_dtype else None,
        )
        for prompt in job.prompts
    ]
    found: Generator[Record, None, None] = capture.capture(
        job.model,
        requests,
        attention_dtype=job.attention_dtype,
        saes=job.saes,
        source=job.source,
        residual=job.residual,
        batch_size=job.batch_size,
    )
    return found


def as_before(output: Location, options: Options, *, overwrite: bool) -> Options:
    """Take the batch size that an interrupted run chose from memory: results depend on it."""
    if options.batch_size is not None or overwrite or not (output / "zarr.json").is_file():
        return options
    with contextlib.suppress(IntegrityError):  # said, or repaired, when the run is opened
        return replace(options, batch_size=read_run(output).attributes.config.get("batch_size"))
    return options
