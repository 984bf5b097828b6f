"""Tasks of a Dask cluster's processes, which keep the model and fill traces.

A worker writes traces and nothing else of a run; its manifest is the client's
(:mod:`zarrtrace.extraction.cluster`). Hooks sit on the model, so that one task computes at a time;
meanwhile the next one opens its traces, and those before it store what they have computed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import LifoQueue
from typing import Any

from distributed import get_worker, secede

from zarrtrace.errors import ClusterError
from zarrtrace.extraction.answers import with_continuation
from zarrtrace.extraction.configuration import library_versions
from zarrtrace.extraction.estimates import estimate
from zarrtrace.extraction.job import Job, prepare, with_prompts, with_scenarios
from zarrtrace.extraction.options import Options
from zarrtrace.extraction.orders import Item, Order, RunSettings, Setup, TokenizedScenarios
from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.processes import WriterPool
from zarrtrace.extraction.running import SECONDS_GIVEN_UP, fill
from zarrtrace.identity import differences
from zarrtrace.machine import keep_freed
from zarrtrace.records import Continuation
from zarrtrace.scenarios import Scenario
from zarrtrace.store import only_writer

_SECONDS_A_REPORT = 0.5
# Tasks whose traces are open: of one the model computes, of the other the last layers are stored.
_WRITERS = 2

#: Layers that a scenario lacks, and whether its trace is complete.
State = tuple[int, bool]


class _Stopped(Exception):  # noqa: N818 -- a request, not an error
    """The client asked this worker to stop."""


@dataclass
class _WorkerState:
    """State of a worker between tasks.

    Attributes
    ----------
    opening
        Held by the task that opens its traces, until it has the model.
    model
        Held by the task that uses the model, or loads another one.
    kept
        The model last used, as a job without scenarios.
    pools
        Processes that write while a GPU computes, for one task each.
    active, stopped
        Names of the runs that it works for, and of those that are to end.
    """

    opening: threading.Lock = field(default_factory=threading.Lock)
    model: threading.RLock = field(default_factory=threading.RLock)
    kept: dict[Setup, Job] = field(default_factory=dict)
    pools: LifoQueue[WriterPool] = field(default_factory=LifoQueue)
    active: list[str] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for _ in range(_WRITERS):
            self.pools.put(WriterPool())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other task opens traces or computes."""
        with self.opening, self.model:
            yield

    @contextlib.contextmanager
    def writers(self) -> Iterator[WriterPool]:
        """Wait for processes that write, and lend them."""
        pool = self.pools.get()
        try:
            yield pool
        finally:
            self.pools.put(pool)


def _held(dask_worker: Any = None) -> _WorkerState:
    """Return what this worker holds; Dask keeps it as long as the worker."""
    held: _WorkerState = vars(dask_worker or get_worker()).setdefault("zarrtrace", _WorkerState())
    return held


# Options of which the model and its SAEs know nothing.
_NOT_LOADED: dict[str, Any] = {
    "scenarios": None,
    "only": (),
    "batch_size": None,
    "positions": "all",
    "attention_positions": None,
    "attention": True,
    "attention_capture": "auto",
    "attention_dtype": None,
    "attention_keepbits": None,
    "feature_dtype": "float32",
    "residual": False,
    "residual_dtype": "float32",
}


def measure(setup: Setup, scenarios: Sequence[Scenario]) -> TokenizedScenarios:
    """Load what `setup` names, if it is not loaded yet, and tokenise scenarios."""
    with _held().alone():
        job = _job(setup, scenarios)
    return TokenizedScenarios(
        tokens={prompt.scenario.name: len(prompt.tokens.ids) for prompt in job.prompts},
        blocked=job.blocked,
        digests=job.config["prompts"],
        disk_bytes=estimate(job).disk_bytes,
        worker=get_worker().address,
        config={key: value for key, value in job.config.items() if key != "prompts"},
    )


def choose_settings(setup: Setup, lengths: Sequence[int], alone: Sequence[bool]) -> RunSettings:
    """Choose the batch size, and group scenarios as a single process does."""
    capture, sampling = capture_package(), setup.options.generate
    more = 0 if sampling is None else sampling.tokens
    with _held().alone():
        job = _job(setup, ())
        most = [length + more for length in lengths]
        size = capture.choose_batch_size(job.model, most, setup.options.batch_size)
    return RunSettings(
        config={**job.config, "batch_size": size, "prompts": {}},
        batch_size=size,
        groups=capture.grouped(job.model, lengths, alone, size),
        layers=len(job.layers),
        notes=job.notes,
    )


def plan_generation(setup: Setup, lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Plan batches of continuations of all scenarios, as a single process does."""
    with _held().alone():
        job = _job(setup, ())
        plan: list[list[tuple[int, int]]] = capture_package().plan_batches(
            job.model, lengths, setup.options.generate
        )
    return plan


def generate_some(
    order: Order,
    scenarios: Sequence[Scenario],
    requests: Sequence[tuple[int, int]],
    prompts: Mapping[str, str],
) -> list[Continuation]:
    """Generate a batch of continuations.

    Parameters
    ----------
    order, prompts
        As for :func:`extract_some`.
    scenarios, requests
        Which scenarios, and of each continuation the index of its scenario and its number.
    """
    _check(order)
    with _held().alone():
        job = _prepared(order, scenarios, prompts)
        pairs = [(job.prompts[at], number) for at, number in requests]
        found: list[Continuation] = capture_package().generate(
            job.model, pairs, order.setup.options.generate
        )
    return found


def group_continued(
    setup: Setup, lengths: Sequence[int], batch_size: int
) -> Sequence[Sequence[int]]:
    """Group prompts with continuations of known lengths, as a single process does."""
    capture = capture_package()
    with _held().alone():
        model, mode = _job(setup, ()).model, setup.options.attention_capture
        alone = [capture.wants_blocks(model, length, mode=mode) for length in lengths]
    groups: Sequence[Sequence[int]] = capture.grouped(model, lengths, alone, batch_size)
    return groups


def _prepared(order: Order, scenarios: Sequence[Scenario], prompts: Mapping[str, str]) -> Job:
    """Return the job for some scenarios, which must be as the client knows them."""
    job = _job(order.setup, scenarios, order.batch_size)
    refuse_other_worker(get_worker().address, {**order.config, "prompts": prompts}, job.config)
    return job


def _with_continuations(job: Job, items: Sequence[Item]) -> Job:
    """Return a job for prompts with their continuations; without any, the same job."""
    if (sampling := job.options.generate) is None:
        return job
    known = {prompt.scenario.name: prompt for prompt in job.prompts}
    found = [
        with_continuation(
            job.model, known[one.scenario.name], one.number, made, sampling, job.options.answer
        )
        for one in items
        if (made := one.continuation) is not None
    ]
    return with_prompts(job, tuple(found))


def extract_some(
    order: Order, items: Sequence[Item], prompts: Mapping[str, str]
) -> dict[str, State]:
    """Fill the traces of whole groups of scenarios; returns how each is.

    Parameters
    ----------
    order, items
        The work.
    prompts
        Digests of the scenarios and their tokens, as the run's configuration has them.
    """
    _check(order)
    names = [one.name for one in items]
    scenarios = {one.scenario.name: one.scenario for one in items}
    reports, held = _Reports(order.run), _held()
    with contextlib.suppress(_Stopped), _going(order.run), reports, contextlib.ExitStack() as turn:
        turn.enter_context(held.opening)
        reports.check()
        with only_writer(order.folder, names, seconds=SECONDS_GIVEN_UP):
            job = _prepared(order, tuple(scenarios.values()), prompts)
            with held.writers() as pool:
                fill(
                    order.folder,
                    _with_continuations(job, items),
                    reports,
                    pool,
                    computing=_computing(held, turn),
                    repair=order.repair,
                    allow_nonfinite=order.allow_nonfinite,
                )
    return reports.states


@contextlib.contextmanager
def _computing(held: _WorkerState, opening: contextlib.ExitStack) -> Iterator[None]:
    """Wait for the model; from then on the next task opens its traces.

    Dask gives a worker of one thread the next task once this one secedes.
    """
    with held.model:
        opening.close()
        secede()
        yield


def stop(run: str, dask_worker: Any = None) -> bool:
    """End what a worker does for a run, after the record in hand; say if it is still at it."""
    held = _held(dask_worker)
    held.stopped.add(run)
    return run in held.active


def dask_setup(_worker: Any) -> None:
    """Leave Ctrl-C to the client, which a terminal sends it to as well; called by Dask."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _job(setup: Setup, scenarios: Sequence[Scenario], batch_size: int | None = None) -> Job:
    """Return the job for some scenarios, with the model that is kept."""
    loaded = replace(setup, options=replace(setup.options, **_NOT_LOADED))
    held = _held()
    kept = held.kept
    if loaded not in kept:
        # Two models may not fit into the memory of a device. No other task holds the one that is
        # kept: none opens its traces, because this one does, none computes, and none stores.
        with held.model, held.writers() as pool, held.writers():
            keep_freed()
            kept.clear()
            job = prepare(_resolved(setup), scenarios=scenarios, progress=False, pool=pool)
        source = job.source and capture_package().keeping(job.source)
        kept[loaded] = replace(job, source=source)
    options = replace(setup.options, batch_size=batch_size or setup.options.batch_size)
    return with_scenarios(replace(kept[loaded], options=options), scenarios)


def _resolved(setup: Setup) -> Options:
    """Make paths absolute: a worker may run in another folder than the client."""
    model, saes = setup.options.own_model, setup.options.sae_path
    if model and (setup.base / model).is_dir():
        model = str(setup.base / model)
    return replace(setup.options, model=model, sae_path=saes and setup.base / saes)


def _check(order: Order) -> None:
    """Refuse work that this worker would do otherwise than the others, or elsewhere."""
    where = get_worker().address
    versions = {"versions": library_versions()}  # before weights are loaded
    refuse_other_worker(where, {"versions": order.config["versions"]}, versions)
    if not (order.folder / "zarr.json").is_file():
        raise ClusterError(
            f"worker {where} does not see {order.folder}",
            why="Workers write traces themselves, into the folder that the client made.",
            remedy="Give an --output in an object store, or on a file system that all machines "
            "mount at the same place.",
        )


def refuse_other_worker(worker: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a worker with other libraries, weights or tokens than the run was begun with.

    Raises
    ------
    ClusterError
        With all that differs.
    """
    if differing := differences(expected, found):
        lines = "".join(
            f"\n  {one.name}: {one.there} there, {one.here} on this worker" for one in differing
        )
        raise ClusterError(
            f"worker {worker} is not set up as the worker that began:{lines}",
            why="A run must not depend on which worker made which part of it.",
            remedy="Install the same versions in the environments of all workers, and give all "
            "the same files of the model and the SAEs.",
        )


@contextlib.contextmanager
def _going(run: str) -> Iterator[None]:
    active = _held().active
    active.append(run)
    try:
        yield
    finally:
        active.remove(run)


class _Reports:
    """Tells the client how far the scenarios of a task are, twice a second; a context manager."""

    def __init__(self, run: str) -> None:
        self._run, self._worker, self._held = run, get_worker(), _held()
        self._mutex = threading.Lock()
        self._found: dict[str, State] = {}
        self._news: dict[str, State] = {}
        self._sent = time.monotonic()
        self.states: dict[str, State] = {}

    def found(self, scenario: str, missing: int, *, complete: bool) -> None:
        with self._mutex:
            self._found[scenario] = self.states[scenario] = (missing, complete)
            self._send_sometimes()

    def stored(self, scenario: str, missing: int, *, complete: bool) -> None:
        with self._mutex:
            before = self.states[scenario]
            state = (min(before[0], missing), complete or before[1])
            self._news[scenario] = self.states[scenario] = state
            self._send_sometimes()

    def check(self) -> None:
        if self._run in self._held.stopped:
            raise _Stopped
        if self._found:  # at once: else layers of a worker that dies would seem an earlier run's
            with self._mutex:
                self._send()

    def _send_sometimes(self) -> None:
        if time.monotonic() - self._sent > _SECONDS_A_REPORT:
            self._send()

    def _send(self) -> None:
        self._sent = time.monotonic()
        self._worker.log_event(self._run, {"found": self._found, "stored": self._news})
        self._found, self._news = {}, {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            self._send()
