"""Checking that a run's files are the ones that were written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from zarrtrace.errors import StoreError
from zarrtrace.format.attributes import RunAttributes
from zarrtrace.format.layout import INDEX, LABELLED
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.damage import Problem, find_damage, unknown_entries
from zarrtrace.store.index_arrays import stale_scenarios
from zarrtrace.store.label_file import check_labels
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

# Traces that wait for a thread; a run may have a hundred thousand.
_AT_ONCE = 256

Progress = Callable[[int, int], None]


def verify(path: Address, *, progress: Progress | None = None) -> list[Problem]:
    """Read every byte of a run, a trace or a table, and compare it with its checksums.

    Parameters
    ----------
    path
        Its folder, or its address.
    progress
        Called with the number of scenarios that were read, and of all; for a trace or a table with
        bytes.

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
        return list(_trace(path, None, progress))
    (path / "zarr.json").inside(path)
    if kind == "table":
        table = read_table(path)
        return [*find_damage(table, progress=progress), *_index(table), *_labels(path)]
    run = read_run(path)
    names = run.attributes.scenarios
    return [
        *_traces(path, names, progress),
        *_consolidated(run),
        *_unknown(run),
        *_index(run),
        *_labels(path),
    ]


def _traces(path: Location, names: Sequence[str], progress: Progress | None) -> Iterator[Problem]:
    """Read all traces, some of them at the same time."""
    with ThreadPoolExecutor(4, thread_name_prefix="zarrtrace-verify") as pool:
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            found = pool.map(lambda name: list(_trace(path / name, name)), some)
            for number, problems in enumerate(found, start + 1):
                yield from problems
                if progress is not None:
                    progress(number, len(names))


def _trace(
    path: Location, scenario: str | None, progress: Progress | None = None
) -> Iterator[Problem]:
    if not path.is_folder():
        yield Problem(scenario=scenario, message="not there: not extracted yet, or deleted")
        return
    try:
        (path / "zarr.json").inside(path if scenario is None else path.parent)
        trace = read_trace(path)
    except StoreError as error:
        yield Problem(scenario=scenario or path.name, message=error.what)
        return
    own = trace.attributes.name
    if scenario not in (None, own):
        yield Problem(scenario=scenario, message=f"holds scenario {own!r}: folders were exchanged")
    yield from find_damage(trace, scenario or own, progress)


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


def _unknown(run: Group[RunAttributes]) -> Iterator[Problem]:
    for name in unknown_entries(run):
        yield Problem(scenario=None, message=f"{name} does not belong to the run")


def _index(run: Group[RunAttributes] | Group[TableAttributes]) -> Iterator[Problem]:
    """Check the index of a run or a table, if it has one."""
    path = run.path / INDEX
    if not (path.is_folder() if path.path is None else path.exists()):
        return
    try:
        (path / "zarr.json").inside(run.path)
        index = read_index_group(path)
    except StoreError as error:
        yield Problem(scenario=None, array=INDEX, message=error.what)
        return
    damage = find_damage(index)
    for problem in damage:
        yield problem.model_copy(update={"array": f"{INDEX}/{problem.array}"})
    if not damage:
        for scenario, message in stale_scenarios(run):
            yield Problem(scenario=scenario, array=INDEX, message=message)


def _labels(run: Location) -> Iterator[Problem]:
    """Check the labels of a run or a table, if it has any."""
    try:
        check_labels(run)
    except StoreError as error:
        yield Problem(scenario=None, array=LABELLED, message=error.what)
