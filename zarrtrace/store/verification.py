"""Checking that a run's files are the ones that were written."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from zarrtrace.errors import StoreError
from zarrtrace.format.attributes import RunAttributes
from zarrtrace.format.layout import INDEX
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.damage import Problem, find_damage
from zarrtrace.store.index_arrays import stale_scenarios
from zarrtrace.store.metadata import (
    Group,
    kind_of,
    read_index_group,
    read_run,
    read_scenario,
    read_table,
    read_trace,
    repeated_nodes,
)
from zarrtrace.store.nodes import Nodes
from zarrtrace.store.staged import STAGED

# Files beside the traces of a run that belong to it.
_OF_RUN = ("zarr.json", "README.md", INDEX, STAGED)


def verify(path: Address) -> list[Problem]:
    """Read every byte of a run, a trace or a table, and compare it with its checksums.

    Parameters
    ----------
    path
        Its folder, or its address.

    Returns
    -------
    list of Problem
        Empty if everything is there and as it was written.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        If the run's own metadata cannot be read.
    """
    path = locate(path)
    kind = kind_of(path)
    if kind == "trace":
        return list(_trace(path, None))
    if kind == "table":
        (path / "zarr.json").inside(path)
        return find_damage(read_table(path))
    (path / "zarr.json").inside(path)
    run = read_run(path)
    names = run.attributes.scenarios
    with ThreadPoolExecutor(4, thread_name_prefix="zarrtrace-verify") as pool:
        found = pool.map(lambda name: list(_trace(path / name, name)), names)
        problems = list(itertools.chain.from_iterable(found))
    return [*problems, *_consolidated(run), *_unknown(path, names), *_index(path, names)]


def _trace(path: Location, scenario: str | None) -> Iterator[Problem]:
    if not path.is_folder():
        yield Problem(scenario=scenario, message="not there: not extracted yet, or deleted")
        return
    try:
        (path / "zarr.json").inside(path if scenario is None else path.parent)
        trace = read_trace(path)
    except StoreError as error:
        yield Problem(scenario=scenario or path.name, message=error.what)
        return
    own = trace.attributes.scenario
    if scenario not in (None, own):
        yield Problem(scenario=scenario, message=f"holds scenario {own!r}: folders were exchanged")
    yield from find_damage(trace, scenario or own)


def _consolidated(run: Group[RunAttributes]) -> Iterator[Problem]:
    """Compare the metadata that a run repeats with that of its traces."""
    repeated: dict[str, Nodes] = {}
    for name, node in run.nodes.items():
        scenario, _, array = name.partition("/")
        repeated.setdefault(scenario, {})[array] = node
    for scenario, nodes in repeated.items():
        message = "the run's copy of its metadata is another"
        if scenario not in run.attributes.scenarios:
            yield Problem(scenario=None, message=f"repeats metadata of {scenario!r}: no such trace")
            continue
        with contextlib.suppress(StoreError):  # said of the trace itself
            if nodes != repeated_nodes(read_scenario(run.path, scenario)):
                yield Problem(scenario=scenario, message=message)


def _unknown(path: Location, names: Sequence[str]) -> Iterator[Problem]:
    if not path.backend.listable:
        return
    known = {*names, *_OF_RUN}
    for child in path.children():
        if child.name not in known:
            yield Problem(scenario=None, message=f"{child.name} does not belong to the run")


def _index(run: Location, names: Sequence[str]) -> Iterator[Problem]:
    """Check the run's index, if it has one."""
    path = run / INDEX
    if not (path.is_folder() if path.path is None else path.exists()):
        return
    try:
        (path / "zarr.json").inside(run)
        index = read_index_group(path)
    except StoreError as error:
        yield Problem(scenario=None, array=INDEX, message=error.what)
        return
    damage = find_damage(index)
    for problem in damage:
        yield problem.model_copy(update={"array": f"{INDEX}/{problem.array}"})
    if not damage:
        for scenario, message in stale_scenarios(run, names):
            yield Problem(scenario=scenario, array=INDEX, message=message)
