"""Continuations on a Dask cluster: workers generate batches, and the client keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distributed import Client, Future, KilledWorker, as_completed

from zarrtrace.errors import ClusterError, install_command
from zarrtrace.extraction import worker
from zarrtrace.extraction.continuations import settings_of
from zarrtrace.extraction.orders import Item, Order, Plan
from zarrtrace.extraction.progress import GenerationProgress
from zarrtrace.records import Continuation
from zarrtrace.storage import Location
from zarrtrace.store import ContinuationFile, Repeat, stored_continuations


def with_continuations(
    client: Client,
    output: Location,
    order: Order,
    plan: Plan,
    items: Sequence[Item],
    progress: GenerationProgress,
) -> Plan:
    """Return the plan for prompts with their continuations; workers generate what is not kept.

    The client keeps the continuations: a batch that is lost with its worker goes to another one.
    """
    if order.setup.options.generate is None:
        return plan
    digests = {
        Repeat(one.scenario.name, one.number): plan.config["prompts"][one.scenario.name]
        for one in items
    }
    known = stored_continuations(order.folder, [one.name for one in items])
    with ContinuationFile(output, settings_of(plan.config)) as file, progress.timed():
        known |= file.take(digests)
        progress.found(len(known))
        for batch, made in _generated(client, order, plan, known):
            new = {key: one for key, one in zip(batch, made, strict=True) if key not in known}
            file.add(new, digests)
            known |= new
            progress.update(len(new))
    keys = [Repeat(one.scenario.name, one.number) for one in items]
    found = [one._replace(continuation=known[key]) for one, key in zip(items, keys, strict=True)]
    tokens = {
        one.name: plan.tokens[one.scenario.name] + len(one.continuation.tokens)
        for one in found
        if one.continuation is not None
    }
    lengths, size = [tokens[one.name] for one in found], plan.settings.batch_size
    call = client.submit(worker.group_continued, plan.setup, lengths, size, pure=False)
    [groups] = results(client, [call])
    return replace(
        plan, items=tuple(found), tokens=tokens, settings=replace(plan.settings, groups=groups)
    )


def _generated(
    client: Client, order: Order, plan: Plan, known: Mapping[Repeat, Continuation]
) -> Iterator[tuple[list[Repeat], list[Continuation]]]:
    """Yield batches of continuations that are not known, as workers generate them."""
    scenarios = [one.scenario for one in plan.items]
    lengths = [plan.tokens[one.name] for one in scenarios]
    call = client.submit(worker.plan_generation, plan.setup, lengths, pure=False)
    [batches] = results(client, [call])
    futures: dict[Future, list[Repeat]] = {}
    for batch in batches:
        keys = [Repeat(scenarios[at].name, number) for at, number in batch]
        if all(key in known for key in keys):
            continue
        places = {at: place for place, at in enumerate(dict.fromkeys(at for at, _ in batch))}
        some = tuple(scenarios[at] for at in places)
        requests = [(places[at], number) for at, number in batch]
        prompts = {one.name: plan.config["prompts"][one.name] for one in some}
        future = client.submit(worker.generate_some, order, some, requests, prompts, pure=False)
        futures[future] = keys
    try:
        for future in as_completed([*futures], loop=client.loop):  # there is no default one
            yield futures[future], results(client, [future])[0]
    finally:
        client.cancel([*futures], force=True)


def results(client: Client, futures: Sequence[Future]) -> list[Any]:
    """Return what workers return.

    Raises
    ------
    ClusterError
        If they end, or lack a package.
    """
    try:
        return client.gather(list(futures))  # type: ignore[no-any-return]
    except KilledWorker as error:
        raise ClusterError(
            "workers end while they load the model",
            why="Most often it is larger than their memory, or than their --memory-limit.",
            remedy="Give workers more memory, or use --low-memory; their logs say more.",
        ) from error
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"a worker lacks {error.name}",
            remedy=f"{install_command('extract,cluster')}, in the environment of every worker.",
        ) from error
    finally:
        client.cancel(list(futures))
