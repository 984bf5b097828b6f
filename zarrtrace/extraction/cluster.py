"""Extracting on a Dask cluster: the client's side.

The client holds the run's lock, makes its manifest and, at the end, its consolidated metadata.
In between, tasks of some scenarios each go to the workers
(:mod:`zarrtrace.extraction.worker`). Which scenarios share a forward pass is decided for the whole
run, as a single process does it; how many such batches make a task depends on the cluster, and
changes nothing in what is stored.
"""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed import Client, Future, KilledWorker

from zarrtrace.errors import ClusterError, ConfigError
from zarrtrace.extraction import worker
from zarrtrace.extraction.cluster_continuations import results, with_continuations
from zarrtrace.extraction.options import Options, find_scenarios, stated_by_suite
from zarrtrace.extraction.orders import Group, Item, Order, Plan, Setup, TokenizedScenarios
from zarrtrace.extraction.progress import GenerationProgress, Progress, Shown, say
from zarrtrace.extraction.running import as_before, saying_how_much_room
from zarrtrace.scenarios import Scenario, trace_name
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    RunWriter,
    check_target,
    remove_continuations,
)

_SECONDS_FOR_A_WORKER = 60
_SCENARIOS_A_MEASUREMENT = 1000
_SECONDS_BETWEEN_CHECKS = 2
# Tasks that are with a worker: one stores its last layers, one computes, one opens its traces.
_AHEAD = 3


def extract_on_cluster(
    client: Client,
    output: Address,
    options: Options | None = None,
    *,
    scenarios: Sequence[Scenario] | None = None,
    overwrite: bool = False,
    repair: bool = False,
    allow_nonfinite: bool = False,
    accept_versions: bool = False,
    progress: Shown = None,
) -> Location:
    """Do what :func:`zarrtrace.extraction.extract_run` does, on the workers of a Dask cluster.

    Stored values are the same, bit for bit, where workers compute as this machine would. If a
    worker dies, another one goes on with its scenarios.

    Parameters
    ----------
    client
        Connected to the cluster, whose workers have one thread each and see the same files.
    output, options, scenarios, overwrite, repair, allow_nonfinite, accept_versions, progress
        As for :func:`zarrtrace.extraction.extract_run`. On GPUs the device is ``"cuda"``: the first
        one that a worker sees.

    Returns
    -------
    Location
        The run.

    Raises
    ------
    ClusterError
        If no worker is there, workers differ, or scenarios end each worker that computes them.
    ZarrtraceError
        As for :func:`zarrtrace.extraction.extract_run`, from whichever worker it comes.
    """
    output = locate(output)
    check_target(output, "run", overwrite=overwrite, repair=repair)
    asked = as_before(output, options or Options(), overwrite=overwrite)
    if asked.device.startswith("cuda:"):
        raise ConfigError(
            f"--device {asked.device} on a cluster",
            why="Every worker computes on the first GPU that it sees.",
            remedy="Use --device cuda; CUDA_VISIBLE_DEVICES says which GPUs a worker sees.",
        )
    if scenarios is None:
        scenarios = find_scenarios(asked)
    samples = 1 if asked.generate is None else asked.generate.samples
    items = [
        Item(scenario, number, trace_name(scenario.name, number if samples > 1 else None))
        for scenario in scenarios
        for number in range(samples)
    ]
    names = [one.name for one in items]
    setup = Setup(replace(asked, scenarios=None), Path.cwd())
    plan = _plan(client, setup, tuple(scenarios))
    say(plan.settings.notes, progress)
    with (
        saying_how_much_room(plan.disk_bytes),
        RunWriter(
            output,
            names,
            plan.config,
            stated=stated_by_suite(asked),
            overwrite=overwrite,
            repair=repair,
            accept_versions=accept_versions,
        ) as run,
    ):
        order = Order(
            run=f"zarrtrace-{uuid.uuid4().hex}",
            setup=plan.setup,
            folder=run.path,
            batch_size=plan.settings.batch_size,
            repair=repair,
            allow_nonfinite=allow_nonfinite,
            config=plan.settings.config,
        )
        with GenerationProgress(len(names) if asked.generate else 0, progress) as generation:
            plan = with_continuations(client, output, order, plan, items, generation)
        bars = Progress(dict.fromkeys(names, plan.settings.layers), progress, generation)
        with bars, _listening(client, order.run, bars):
            tasks = _Tasks(client, order, plan.config["prompts"], bars)
            tasks.run(plan.tasks(_count(client)))
            run.finish()
        remove_continuations(output)
    return output


def _plan(client: Client, setup: Setup, scenarios: tuple[Scenario, ...]) -> Plan:
    """Have the workers load the model, each tokenise a part of the scenarios, and one decide."""
    try:
        client.wait_for_workers(1, timeout=_SECONDS_FOR_A_WORKER)
    except TimeoutError as error:
        raise ClusterError(
            f"{client.scheduler.address}: no worker there",
            why="The scheduler answers, but nobody has joined it.",
            remedy="Start workers, as in: dask worker ADDRESS --nthreads 1",
        ) from error
    count = min(len(scenarios), max(_count(client), len(scenarios) // _SCENARIOS_A_MEASUREMENT))
    parts = [scenarios[at::count] for at in range(count)]
    measured = results(
        client, [client.submit(worker.measure, setup, part, pure=False) for part in parts]
    )
    tokens, blocked, digests, disk_bytes = _merged(measured)
    lengths = [tokens[scenario.name] for scenario in scenarios]
    alone = [scenario.name in blocked for scenario in scenarios]
    [settings] = results(
        client, [client.submit(worker.choose_settings, setup, lengths, alone, pure=False)]
    )
    _refuse_unlike(settings.config, measured)
    digests = {scenario.name: digests[scenario.name] for scenario in scenarios}
    config = {**settings.config, "prompts": digests}
    items = tuple(Item(scenario, 0, scenario.name) for scenario in scenarios)
    return Plan(setup, items, tokens, disk_bytes, settings, config)


def _refuse_unlike(config: Mapping[str, Any], measured: Sequence[TokenizedScenarios]) -> None:
    """Refuse workers that differ, and a client that would write metadata otherwise than they."""
    for part in measured:
        # Each has chosen a batch size for its own part.
        there = {**part.config, "batch_size": config["batch_size"], "prompts": {}}
        worker.refuse_other_worker(part.worker, config, there)
    for name in ("zarrtrace", "zarr"):
        here, there = version(name), config["versions"][name]
        if here != there:
            raise ClusterError(
                f"workers have {name} {there}, this machine has {here}",
                why="Workers write traces, this machine the metadata of the run.",
                remedy=f"Install the same {name} on all of them.",
            )


def _merged(
    measured: Sequence[TokenizedScenarios],
) -> tuple[dict[str, int], set[str], dict[str, str], int]:
    tokens: dict[str, int] = {}
    blocked: set[str] = set()
    digests: dict[str, str] = {}
    for part in measured:
        tokens |= part.tokens
        blocked |= part.blocked
        digests |= part.digests
    return tokens, blocked, digests, sum(part.disk_bytes for part in measured)


def _count(client: Client) -> int:
    """Return the number of workers now."""
    return max(1, len(client.nthreads()))


@contextlib.contextmanager
def _listening(client: Client, run: str, bars: Progress) -> Iterator[None]:
    """Draw what workers report."""

    def handle(event: tuple[float, Mapping[str, Mapping[str, Sequence[Any]]]]) -> None:
        news = event[1]
        for name, (missing, complete) in news["found"].items():
            bars.found(name, missing, complete=complete)
        for name, (missing, complete) in news["stored"].items():
            bars.stored(name, missing, complete=complete)

    client.subscribe_topic(run, handle)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            client.unsubscribe_topic(run)


class _Tasks:
    """Keeps each worker busy, with a task more at hand, until all are done."""

    def __init__(
        self, client: Client, order: Order, prompts: Mapping[str, str], bars: Progress
    ) -> None:
        self._client, self._order, self._bars = client, order, bars
        self._prompts = prompts
        self._waiting: deque[tuple[Group, ...]] = deque()
        # Parts of tasks whose workers ended, and the key of the one that is tried.
        self._suspects: deque[tuple[Group, ...]] = deque()
        self._tried = ""
        self._going: dict[str, tuple[Future, tuple[Group, ...]]] = {}
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._seen = time.monotonic()

    def run(self, tasks: Sequence[tuple[Group, ...]]) -> None:
        """Have all tasks done; whatever ends this early ends them, too."""
        self._waiting.extend(tasks)
        try:
            while self._waiting or self._suspects or self._going:
                self._submit()
                try:
                    future = self._ended.get(timeout=_SECONDS_BETWEEN_CHECKS)
                except queue.Empty:
                    self._check_cluster()
                else:
                    self._take(future)
        except BaseException:
            self._stop()
            raise

    def _submit(self) -> None:
        """Submit tasks; a suspect only alone, because Dask blames all tasks of a lost worker."""
        if self._suspects or self._tried in self._going:
            if not self._going:
                self._tried = self._submit_one(self._suspects.popleft())
            return
        while self._waiting and len(self._going) < _AHEAD * _count(self._client):
            self._submit_one(self._waiting.popleft())

    def _submit_one(self, task: tuple[Group, ...]) -> str:
        items = tuple(one for group in task for one in group)
        prompts = {one.scenario.name: self._prompts[one.scenario.name] for one in items}
        future = self._client.submit(worker.extract_some, self._order, items, prompts, pure=False)
        self._going[future.key] = (future, task)
        future.add_done_callback(self._ended.put)
        return str(future.key)

    def _take(self, future: Future) -> None:
        _, task = self._going.pop(future.key)
        if future.status == "cancelled":
            raise _lost(self._client)
        error = future.exception()
        if isinstance(error, KilledWorker):
            if len(task) > 1 or future.key != self._tried:
                self._suspects.extend((group,) for group in task)
            else:
                raise _refusal(task[0]) from error
        elif error is not None:
            raise error
        else:
            for name, (missing, complete) in future.result().items():
                self._bars.stored(name, missing, complete=complete)

    def _check_cluster(self) -> None:
        """Refuse to wait for workers that do not come."""
        try:
            there = bool(self._client.nthreads())
        except (OSError, TimeoutError) as error:
            raise _lost(self._client) from error
        if there:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _SECONDS_FOR_A_WORKER:
            raise ClusterError(
                f"{self._client.scheduler.address}: all workers are gone",
                why="They ended, and nothing has started others.",
                remedy="Start workers and run the same command again: it resumes where it stopped.",
            )

    def _stop(self) -> None:
        """End what workers still do, before the run's lock is given back."""
        with contextlib.suppress(Exception):  # whatever a broken cluster raises; traces have locks
            self._client.cancel([future for future, _ in self._going.values()], force=True)
            while any(self._still_at_it().values()):
                time.sleep(0.1)

    def _still_at_it(self) -> Mapping[str, bool]:
        found: Mapping[str, bool] = self._client.run(
            worker.stop, self._order.run, on_error="ignore"
        )
        return found


def _refusal(group: Group) -> ClusterError:
    """Say that a group of scenarios ends each worker that computes it alone."""
    names = ", ".join(one.name for one in group)
    return ClusterError(
        f"every worker that computes {names} ends",
        why="Most often its memory does not suffice: the system, or the worker's nanny at its "
        "--memory-limit, ends it then. Workers' logs say more.",
        remedy="Give workers more memory, or use --batch-size 1, --positions or --low-memory; "
        "what is done stays.",
    )


def _lost(client: Client) -> ClusterError:
    return ClusterError(
        f"{client.scheduler.address}: the connection to the scheduler was lost",
        why="It ended, or the network did.",
        remedy="Run the same command again when it is back: it resumes where it stopped.",
    )
