"""Features of a run or a table, by scenario and position, to index."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import RunAttributes, TraceAttributes
from zarrtrace.format.layout import INDEX, SPECIAL
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.scenarios import first_repeats, sample_names
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.array import open_array
from zarrtrace.store.metadata import (
    REPAIR,
    Group,
    damaged,
    each_trace,
    kind_of,
    read_run,
    read_table,
    read_trace,
)


class Activations(NamedTuple):
    """Features of some rows.

    Attributes
    ----------
    values
        ``(row, feature)``.
    scenarios, positions
        Number of the scenario and position in the prompt of each row.
    """

    values: np.ndarray
    scenarios: np.ndarray
    positions: np.ndarray


class IndexableTrace(NamedTuple):
    """A scenario whose features can be indexed.

    Attributes
    ----------
    number
        Its place in the run.
    path
        Folder of its trace.
    digest
        Stands for the content of its features; never 0.
    features
        Number of latents by array.
    layers
        Layers of which it has features, by array.
    positions
        Token positions of their rows; None for all tokens.
    first
        The first position that counts: repeats of a scenario share its prompt, which counts once.
    """

    number: int
    path: Location
    digest: int
    features: dict[str, int]
    layers: dict[str, tuple[int, ...]]
    positions: tuple[int, ...] | None
    first: int = 0

    def read(self, array: str, layer: int, *, special: bool) -> Activations:
        """Read the activations of a layer that it has, those of special tokens only if asked.

        Raises
        ------
        IntegrityError
            If files are gone, cut short or damaged.
        """
        found = read_trace(self.path)
        at = found.attributes.layers.index(layer)
        values = open_array(found, array).read((at, slice(None), slice(None)))
        rows = len(values)
        positions = np.arange(rows) if self.positions is None else np.asarray(self.positions)
        kept = positions >= self.first
        if not special:
            kept &= ~read_special(found, positions)
        if not kept.all():
            values, positions = values[kept], positions[kept]
        return Activations(values, np.full(len(positions), self.number), positions)


class IndexableSamples(NamedTuple):
    """Neighbouring samples of a table, whose features can be indexed.

    Attributes
    ----------
    path
        Folder of the table.
    features, layers
        As of :class:`IndexableTrace`.
    rows
        Numbers of the first sample and of the one behind the last.
    scenarios
        Number of each sample's scenario; -1 if that was not computed, or if another repeat has
        the same token of its prompt.
    """

    path: Location
    features: dict[str, int]
    layers: dict[str, tuple[int, ...]]
    rows: tuple[int, int]
    scenarios: np.ndarray

    def read(self, array: str, layer: int, *, special: bool) -> Activations:
        """Read the activations of a layer that it has, of samples that were computed.

        Special tokens are included only if asked.

        Raises
        ------
        IntegrityError
            If files are gone, cut short or damaged.
        """
        found, rows = read_table(self.path), slice(*self.rows)
        at = found.attributes.layers.index(layer)
        values = open_array(found, array).read((at, rows, slice(None)))
        positions = open_array(found, "position").read((rows,))
        counted = self.scenarios >= 0
        if not special and has_special(found):
            counted &= ~open_array(found, SPECIAL).read((rows,))
        if counted.all():
            return Activations(values, self.scenarios, positions)
        return Activations(values[counted], self.scenarios[counted], positions[counted])


class Indexable(NamedTuple):
    """The parts of a run or a table that can be indexed.

    Attributes
    ----------
    names
        Names of all its scenarios, in order.
    parts
        Complete traces that have features, or the samples of the table.
    by_scenario
        For a run, the digest of each scenario's features, 0 without; for a table, the number of its
        first sample.
    indexed
        Number of scenarios in the parts.
    table
        Seal of the table; None for a run of traces.
    """

    names: Sequence[str]
    parts: Sequence[IndexableTrace] | Sequence[IndexableSamples]
    by_scenario: np.ndarray
    indexed: int
    table: str | None

    @property
    def layers(self) -> list[int]:
        """The layers of which a part has features."""
        return sorted({n for part in self.parts for found in part.layers.values() for n in found})

    @property
    def features(self) -> dict[str, int]:
        """Number of latents by array: the largest of all parts."""
        found: dict[str, int] = {}
        for part in self.parts:
            for array, size in part.features.items():
                found[array] = max(size, found.get(array, 0))
        return dict(sorted(found.items()))


def read_run_or_table(path: Address) -> Group[RunAttributes] | Group[TableAttributes]:
    """Read the metadata of a run or a table.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return read_table(path) if kind_of(path) == "table" else read_run(path)


def read_indexable(path: Address) -> Indexable:
    """Return what of a run or a table can be indexed.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        If it, or one of a run's traces, cannot be read.
    """
    path = locate(path)
    return _of_table(read_table(path)) if kind_of(path) == "table" else _of_run(path)


# --- runs ----------------------------------------------------------------------------------------


def _of_run(run: Location) -> Indexable:
    names = read_run(run).attributes.scenarios
    numbers = {name: number for number, name in enumerate(names)}
    first = first_repeats(names)
    found = each_trace(
        run,
        run.present(names),
        lambda trace: _trace(number := numbers[trace.path.name], trace, is_first=first[number]),
    )
    traces = [trace for trace in found if trace is not None and trace.features]
    digests = np.zeros(len(names), np.uint64)
    for trace in traces:
        digests[trace.number] = trace.digest
    return Indexable(names, traces, digests, len(traces), None)


def _trace(number: int, trace: Group[TraceAttributes], *, is_first: bool) -> IndexableTrace:
    arrays = _feature_arrays(trace)
    generation = trace.attributes.generation
    return IndexableTrace(
        number=number,
        path=trace.path,
        digest=digest_of(trace),
        features={name: int(trace.nodes[name]["shape"][-1]) for name in arrays},
        layers={name: _layers_with(trace, name) for name in arrays},
        positions=_positions(trace),
        first=0 if is_first or generation is None else generation.prompt_tokens,
    )


def _positions(trace: Group[TraceAttributes]) -> tuple[int, ...] | None:
    """Return the token positions that a trace stores; None for all."""
    if "query" not in trace.nodes or trace.nodes["query"]["shape"] == trace.nodes["key"]["shape"]:
        return None
    return tuple(open_array(trace, "query").load().tolist())


def _feature_arrays(group: Group[TraceAttributes] | Group[TableAttributes]) -> list[str]:
    """Return the arrays of features; metadata of a table may be called so, too."""
    return sorted(
        name
        for name, node in group.nodes.items()
        if name.split("_")[0] == "features" and len(node["shape"]) > 1
    )


def _layers_with(
    group: Group[TraceAttributes] | Group[TableAttributes], name: str
) -> tuple[int, ...]:
    """Return the layers of which an array of features holds values."""
    without = set(group.attributes.layers_without_sae)
    ids = f"sae_id{name.removeprefix('features')}"
    if ids in group.nodes:
        pairs = zip(group.attributes.layers, open_array(group, ids).load(), strict=True)
        without |= {layer for layer, sae in pairs if not sae}
    return tuple(layer for layer in group.attributes.layers if layer not in without)


def digest_of(trace: Group[TraceAttributes]) -> int:
    """Return a number that stands for the features of a trace; never 0."""
    names = (*_feature_arrays(trace), *({"query"} & trace.checksums.keys()))
    content = {name: trace.checksums[name] for name in names}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) or 1


def read_token_texts(trace: Location) -> tuple[list[str], int]:
    """Read the texts of a trace's tokens, and how many of them are the prompt.

    Raises
    ------
    IntegrityError
        If they are gone or damaged.
    """
    found = read_trace(trace)
    if "key_token" not in found.nodes:
        raise IntegrityError(f"{trace}: has no 'key_token'", remedy=REPAIR)
    texts = [str(text) for text in open_array(found, "key_token").load()]
    generation = found.attributes.generation
    return texts, len(texts) if generation is None else generation.prompt_tokens


def read_special(trace: Group[TraceAttributes], positions: np.ndarray) -> np.ndarray:
    """Tell which token positions of a trace hold special tokens; none if that is not known.

    Raises
    ------
    IntegrityError
        If that is gone or damaged.
    """
    if SPECIAL not in trace.nodes:
        return np.zeros(len(positions), bool)
    found = open_array(trace, SPECIAL).load()
    if len(positions) and positions.max() >= len(found):
        raise damaged(trace.path / SPECIAL, f"it has no token {positions.max()}")
    return np.asarray(found[positions], bool)


# --- tables --------------------------------------------------------------------------------------


def has_special(table: Group[TableAttributes]) -> bool:
    """Tell whether a table says which samples hold special tokens."""
    return SPECIAL in table.nodes and SPECIAL not in table.attributes.metadata


def _of_table(table: Group[TableAttributes]) -> Indexable:
    if INDEX in table.nodes:  # the index would take its place
        raise damaged(table.path / INDEX, "no table has an array of that name")
    names, starts = _scenarios(table)
    failed = [number for number, name in enumerate(names) if name in table.attributes.failed]
    later = np.flatnonzero(~np.array(first_repeats(names), bool))
    arrays = _feature_arrays(table)
    layers = {name: _layers_with(table, name) for name in arrays}
    parts = []
    if any(layers.values()):
        features = {name: int(table.nodes[name]["shape"][-1]) for name in arrays}
        samples = table.encodings["scenario"].shape[0]
        # Whole chunks: none is decoded twice.
        step = max(table.encodings[name].chunks[1] for name in arrays)
        for first in range(0, samples, step):
            rows = (first, min(first + step, samples))
            scenarios = np.searchsorted(starts, np.arange(*rows), side="right") - 1
            if len(later):
                generated = open_array(table, "generated").read((slice(*rows),))
                scenarios[np.isin(scenarios, later) & ~generated] = -1
            scenarios[np.isin(scenarios, failed)] = -1
            parts.append(
                IndexableSamples(table.path, features, layers, rows, scenarios.astype(np.int32))
            )
    indexed = len(names) - len(failed) if parts else 0
    return Indexable(names, parts, starts, indexed, table.attributes.seal)


def _scenarios(table: Group[TableAttributes]) -> tuple[list[str], np.ndarray]:
    """Return the names of a table's scenarios, and the number of each one's first sample.

    Each repeat of a scenario is named as a trace is.
    """
    array, names = open_array(table, "scenario"), list[str]()
    repeats = open_array(table, "repeat") if "repeat" in table.nodes else None
    starts = []
    (samples,), (step,) = array.encoding.shape, array.encoding.file_shape
    for first in range(0, samples, step):
        found = array.read((slice(first, first + step),))
        if repeats is not None:
            numbers = repeats.read((slice(first, first + step),))
            found = np.array(sample_names(found, numbers), object)
        begins = np.append(not names or found[0] != names[-1], found[1:] != found[:-1])
        at = np.flatnonzero(begins)
        starts.append(first + at)
        names += map(str, found[at])
    return names, np.concatenate(starts)


def read_sample_texts(
    table: Group[TableAttributes], rows: Sequence[tuple[int, int]]
) -> list[tuple[dict[int, str], set[int]]]:
    """Read the texts of some samples' tokens, by position, and which of them were generated.

    Parameters
    ----------
    rows
        Numbers of each scenario's first sample, and of the one behind its last.

    Raises
    ------
    IntegrityError
        If they are gone or damaged.
    """
    samples = np.concatenate([np.arange(*one) for one in rows]) if rows else np.empty(0, np.int64)
    positions = open_array(table, "position").read((samples,)).tolist()
    texts = [""] * len(samples)
    if "token" in table.nodes:
        texts = [str(text) for text in open_array(table, "token").read((samples,))]
    marks = np.zeros(len(samples), bool)
    if "generated" in table.nodes and "generated" not in table.attributes.metadata:
        marks = open_array(table, "generated").read((samples,))
    found = []
    each = iter(zip(positions, texts, marks.tolist(), strict=True))
    for start, stop in rows:
        own = list(itertools.islice(each, stop - start))
        found.append(
            ({at: text for at, text, _ in own}, {at for at, _, is_generated in own if is_generated})
        )
    return found
