"""Building a run's index: one parallel pass over its features, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import dask
import numpy as np

from zarrtrace.errors import ConfigError, StoreError
from zarrtrace.index.counting import FeatureCounts
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    IndexableTrace,
    IndexWriter,
    RunIndex,
    indexable_traces,
    locked,
    read_features,
    read_run,
    write_index_layer,
)
from zarrtrace.store.chunks import Checksum

# A task reads so many scenarios one after another, and so many tasks' counts (9 MB each at 32,768
# features) are put together at once.
_SCENARIOS_PER_TASK, _COUNTS_PER_TASK = 32, 8


class IndexUpdate(NamedTuple):
    """What :func:`build_index` did.

    Attributes
    ----------
    how
        ``"built"`` from all scenarios, ``"updated"`` by those that were not in it, or
        ``"unchanged"``.
    added
        How many scenarios were read.
    indexed, scenarios
        How many are in the index now, and how many the run has.
    """

    how: Literal["built", "updated", "unchanged"]
    added: int
    indexed: int
    scenarios: int


def build_index(run: Address, *, rebuild: bool = False) -> IndexUpdate:
    """Index the features of a run, or bring its index up to date.

    For each layer and feature: maximum, mean and frequency over all tokens, and the 20 strongest
    tokens of all scenarios (those of largest magnitude; signs are kept).
    It reads the features of complete scenarios that are not in the index, on whatever scheduler
    dask is set to; tasks write their layer themselves, so a cluster needs the run in an object
    store, or its folder under the same path. If a scenario that is in the index was changed or
    taken away, all of it is built again: maxima cannot be taken back. An index that grew equals one
    that was built at once, bit for bit.

    Parameters
    ----------
    run
        Folder of the run, or its address.
    rebuild
        Read all scenarios, whatever the index holds.

    Returns
    -------
    IndexUpdate

    Raises
    ------
    ConfigError
        If no complete scenario has features.
    LockedError
        If another process is writing the run.
    NotATraceError, FormatVersionError, IntegrityError
        If it cannot be read.
    """
    run = locate(run).resolved()
    read_run(run)  # says what is wrong if it is no run
    with locked(run):  # from the first look on: what is indexed must not be replaced meanwhile
        return _build(run, rebuild=rebuild)


def _build(run: Location, *, rebuild: bool) -> IndexUpdate:
    traces = indexable_traces(run)
    if not traces:
        raise ConfigError(
            f"{run}: no scenario has features to index",
            why="It was extracted with --no-features, or no scenario is complete yet.",
            remedy="Extract it with features first.",
        )
    layers = sorted({n for trace in traces for found in trace.layers.values() for n in found})
    features: dict[str, int] = {}
    for trace in traces:
        for array, size in trace.features.items():
            features[array] = max(size, features.get(array, 0))
    features = dict(sorted(features.items()))
    earlier = None if rebuild else _reusable(run, traces, layers, features)
    known = set() if earlier is None else _indexed(earlier)
    new = [trace for trace in traces if trace.number not in known]
    if earlier is not None and not new:
        there = earlier.attributes
        return IndexUpdate("unchanged", 0, there.indexed, there.scenarios)
    with IndexWriter(run, layers, features) as writer:
        tasks = [
            _layer_graph(run if earlier else None, writer.path, new, layers, features, *which)
            for which in ((layer, array) for layer in layers for array in features)
        ]
        stored: dict[str, dict[str, Checksum]] = {}
        for found in dask.compute(*tasks):
            for name, checksums in found.items():
                stored.setdefault(name, {}).update(checksums)
        by_number = {trace.number: trace.digest for trace in traces}
        digests = [by_number.get(number, 0) for number in range(writer.scenarios)]
        made = writer.finish(digests, stored)
    how: Literal["built", "updated"] = "built" if earlier is None else "updated"
    return IndexUpdate(how, len(new), made.indexed, made.scenarios)


def _reusable(
    run: Location,
    traces: Sequence[IndexableTrace],
    layers: Sequence[int],
    features: Mapping[str, int],
) -> RunIndex | None:
    """Return the index that is there, if all that is in it is still in the run."""
    try:
        index = RunIndex(run)
        index.check()
        digests, names = index.read("digest", slice(None)), index.read("scenario", slice(None))
    except StoreError:
        return None  # there is none, or it is damaged
    same = (
        list(index.attributes.layers) == list(layers)
        and index.attributes.features == features
        and [str(name) for name in names] == list(read_run(run).attributes.scenarios)
    )
    now = {trace.number: trace.digest for trace in traces}
    kept = all(digest in (0, now.get(at)) for at, digest in enumerate(digests.tolist()))
    return index if same and kept else None


def _indexed(index: RunIndex) -> set[int]:
    return set(np.flatnonzero(index.read("digest", slice(None))).tolist())


def _layer_graph(
    earlier: Location | None,
    target: Location,
    traces: Sequence[IndexableTrace],
    layers: Sequence[int],
    features: Mapping[str, int],
    layer: int,
    array: str,
) -> Any:
    """Return the task that writes one layer, after those that count blocks of scenarios."""
    having = [trace for trace in traces if layer in trace.layers.get(array, ())]
    counts = [
        dask.delayed(_count)(having[start : start + _SCENARIOS_PER_TASK], array, layer)
        for start in range(0, len(having), _SCENARIOS_PER_TASK)
    ]
    while len(counts) > _COUNTS_PER_TASK:
        counts = [
            dask.delayed(_together)(counts[start : start + _COUNTS_PER_TASK])
            for start in range(0, len(counts), _COUNTS_PER_TASK)
        ]
    return dask.delayed(_write)(earlier, target, counts, list(layers), dict(features), layer, array)


def _count(traces: Sequence[IndexableTrace], array: str, layer: int) -> FeatureCounts:
    counts = FeatureCounts(max(trace.features[array] for trace in traces))
    for trace in traces:
        activations = read_features(trace, array, layer)
        if activations is not None:
            counts.add(trace.number, activations, trace.positions)
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
