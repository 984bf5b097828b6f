"""Building the index of a run or a table: one parallel pass over features, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import dask

from zarrtrace.errors import ConfigError, StoreError
from zarrtrace.index.counting import FeatureCounts
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    Checksum,
    Indexable,
    IndexableSamples,
    IndexableTrace,
    IndexWriter,
    RunIndex,
    locked,
    read_indexable,
    read_run_or_table,
    write_index_layer,
)

# Number of traces, or blocks of a table's samples, that a task reads in turn, and of tasks whose
# counts (9 MB each at 32,768 features) are put together at once.
_PARTS_PER_TASK, _COUNTS_PER_TASK = 32, 8

_Parts = Sequence[IndexableTrace] | Sequence[IndexableSamples]


class IndexUpdate(NamedTuple):
    """Result of :func:`build_index`.

    Attributes
    ----------
    how
        ``"built"`` from all scenarios, ``"updated"`` by those that were not in it, or
        ``"unchanged"``.
    added
        Number of scenarios read.
    indexed, scenarios
        Numbers of scenarios in the index now, and in the run or the table.
    """

    how: Literal["built", "updated", "unchanged"]
    added: int
    indexed: int
    scenarios: int


def build_index(run: Address, *, rebuild: bool = False, special: bool = False) -> IndexUpdate:
    """Index the features of a run or a table, or bring its index up to date.

    For each layer and feature: maximum, mean and frequency over all tokens, and the 20 strongest
    tokens of all scenarios (those of largest magnitude; signs are kept). Special tokens are left
    out of all of these: the activations of BOS alone would fill most features' 20 places.
    It reads the features of complete scenarios that are not in the index, on whatever scheduler
    dask is set to; tasks write their layer themselves, so a cluster needs the run in an object
    store, or its folder under the same path. If a scenario that is in the index was changed or
    taken away, or `special` differs, all of it is built again: maxima cannot be taken back. An
    index that grew equals one that was built at once, bit for bit. A table is read block by block
    of samples; scenarios that failed are not in its index.

    Parameters
    ----------
    run
        Folder of the run or the table, or its address.
    rebuild
        Read all scenarios, whatever the index holds.
    special
        Whether to count special tokens (BOS, chat markers), too. None are known in traces from NPZ
        files and in tables that do not say.

    Returns
    -------
    IndexUpdate

    Raises
    ------
    ConfigError
        If no complete scenario has features.
    LockedError
        If another process is writing it.
    NotATraceError, FormatVersionError, IntegrityError
        If it cannot be read.
    """
    run = locate(run).resolved()
    read_run_or_table(run)  # says what is wrong if it is neither
    with locked(run):  # from the first look on: what is indexed must not be replaced meanwhile
        return _build(run, rebuild=rebuild, special=special)


def _build(run: Location, *, rebuild: bool, special: bool) -> IndexUpdate:
    source = read_indexable(run)
    if not source.parts:
        raise ConfigError(
            f"{run}: no scenario has features to index",
            why="It was extracted with --no-features, or no scenario is complete yet.",
            remedy="Extract it with features first.",
        )
    earlier = None if rebuild else _reusable(run, source, special=special)
    new, known = source.parts, 0
    if earlier is not None:
        new, known = _without_indexed(source, earlier), earlier.attributes.indexed
        if not new:
            return IndexUpdate("unchanged", 0, known, len(source.names))
    layers, features = source.layers, source.features
    counted = partial(_count, special=special)
    with IndexWriter(run, source, special=special) as writer:
        tasks = [
            _layer_graph(
                run if earlier else None, writer.path, counted, new, layers, features, *which
            )
            for which in ((layer, array) for layer in layers for array in features)
        ]
        stored: dict[str, dict[str, Checksum]] = {}
        for found in dask.compute(*tasks):
            for name, checksums in found.items():
                stored.setdefault(name, {}).update(checksums)
        made = writer.finish(stored)
    how: Literal["built", "updated"] = "built" if earlier is None else "updated"
    return IndexUpdate(how, made.indexed - known, made.indexed, made.scenarios)


def _reusable(run: Location, source: Indexable, *, special: bool) -> RunIndex | None:
    """Return the index that is there, if all that is in it is still in the run."""
    try:
        index = RunIndex(run)
        index.check()
        there = index.attributes
        if (
            there.table != source.table
            or there.special != special
            or list(there.layers) != source.layers
            or there.features != source.features
        ):
            return None
        if source.table is not None:
            return index
        digests, names = index.read("digest", slice(None)), index.read("scenario", slice(None))
    except StoreError:
        return None  # there is none, or it is damaged
    is_same = [str(name) for name in names] == list(source.names)
    is_kept = is_same and ((digests == 0) | (digests == source.by_scenario)).all()
    return index if is_kept else None


def _without_indexed(source: Indexable, index: RunIndex) -> list[IndexableTrace]:
    """Return the traces that are not in an index; a table is in it as a whole, or not at all."""
    if source.table is not None:
        return []
    known = index.read("digest", slice(None)) != 0
    traces = [one for one in source.parts if isinstance(one, IndexableTrace)]
    return [trace for trace in traces if not known[trace.number]]


def _layer_graph(
    earlier: Location | None,
    target: Location,
    count: Callable[[_Parts, str, int], FeatureCounts],
    parts: _Parts,
    layers: Sequence[int],
    features: Mapping[str, int],
    layer: int,
    array: str,
) -> Any:
    """Return the task that writes one layer, after those that count."""
    having = [part for part in parts if layer in part.layers.get(array, ())]
    counts = [
        dask.delayed(count)(having[start : start + _PARTS_PER_TASK], array, layer)
        for start in range(0, len(having), _PARTS_PER_TASK)
    ]
    while len(counts) > _COUNTS_PER_TASK:
        counts = [
            dask.delayed(_together)(counts[start : start + _COUNTS_PER_TASK])
            for start in range(0, len(counts), _COUNTS_PER_TASK)
        ]
    return dask.delayed(_write)(earlier, target, counts, list(layers), dict(features), layer, array)


def _count(parts: _Parts, array: str, layer: int, *, special: bool) -> FeatureCounts:
    counts = FeatureCounts(max(part.features[array] for part in parts))
    for part in parts:
        found = part.read(array, layer, special=special)
        counts.add(found.scenarios, found.values, found.positions)
    counts.rank()  # what waits for the other tasks is small, however many tokens it is of
    return counts


def _together(parts: Sequence[FeatureCounts]) -> FeatureCounts:
    counts = FeatureCounts(max(len(part.active) for part in parts))
    for part in parts:
        counts.merge(part)
    return counts


def _write(
    earlier: Location | None,
    target: Location,
    parts: Sequence[FeatureCounts],
    layers: Sequence[int],
    features: Mapping[str, int],
    layer: int,
    array: str,
) -> dict[str, dict[str, Checksum]]:
    """Write what is known of one layer's features."""
    if earlier is None:
        counts = FeatureCounts(features[array])
    else:
        counts = FeatureCounts.of_arrays(RunIndex(earlier).layer(array, layer))
    for part in parts:
        counts.merge(part)
    suffix = array.removeprefix("features")
    arrays = {f"{name}{suffix}": value for name, value in counts.arrays().items()}
    return write_index_layer(target, layers, features, layer, arrays)
