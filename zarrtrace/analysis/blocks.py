"""The samples of whole scenarios, some at a time: a trace's, or a part of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import xarray as xr

from zarrtrace.analysis.gaps import missing_layers, missing_of_table
from zarrtrace.analysis.positions import Place
from zarrtrace.analysis.repeats import Text
from zarrtrace.analysis.samples import rows_of_place
from zarrtrace.analysis.special import MARKS, generated_samples, special_samples
from zarrtrace.analysis.tables import (
    SAMPLE,
    TableScenarios,
    is_table,
    rows_in_table,
    table_scenarios,
)
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import Data, traces

# Bytes of a layer of a block of a table, unless one scenario has more: a chunk of it at least.
_BLOCK_BYTES = 2**27
# Called otherwise in traces.
_NAMES = {"token": "query_token"}


class SampleBlock(NamedTuple):
    """Samples of some whole scenarios.

    Attributes
    ----------
    arrays
        ``([layer,] sample, …)`` by name, unread.
    layers
        Layers of the arrays that have layers.
    scenarios
        Numbers of the scenarios in the run or the table.
    starts
        Where the samples of each begin, and the number of all.
    find
        Returns the samples of a place, ascending; none if no scenario has the span.
    special, generated
        Tell which samples hold special tokens, and generated ones.
    missing
        Layers whose features are not stored, by number of the scenario.
    """

    arrays: dict[str, xr.DataArray]
    layers: list[int]
    scenarios: Sequence[int]
    starts: np.ndarray
    find: Callable[[Place], np.ndarray]
    special: Callable[[], np.ndarray]
    generated: Callable[[], np.ndarray]
    missing: Mapping[int, frozenset[int]]

    @property
    def of_samples(self) -> np.ndarray:
        """Place among `scenarios` of each sample's scenario."""
        return np.repeat(np.arange(len(self.scenarios)), np.diff(self.starts))

    def missing_scenarios(self) -> list[list[int]]:
        """Return, for each layer, the places among `scenarios` of those that lack its features."""
        return [
            [
                at
                for at, number in enumerate(self.scenarios)
                if layer in self.missing.get(number, ())
            ]
            for layer in self.layers
        ]

    def counted(self, first: np.ndarray, text: Text = "all") -> np.ndarray:
        """Tell which samples count: of a scenario's repeats the prompt counts once.

        Parameters
        ----------
        first
            Whether each scenario of the run or the table is the first of its repeats.
        text
            Count tokens of prompts, or generated ones, only.
        """
        generated = self.generated()
        if text == "generated":
            return generated
        of_first = np.repeat(first[list(self.scenarios)], np.diff(self.starts))
        return np.asarray(of_first & ~generated if text == "prompt" else of_first | generated)

    def rows(self, place: Place) -> dict[int, np.ndarray]:
        """Return the samples of a place, by number of the scenario, of those that have it."""
        found = self.find(place)
        cuts = np.searchsorted(found, self.starts)
        return {
            number: found[start:stop]
            for number, start, stop in zip(self.scenarios, cuts[:-1], cuts[1:], strict=True)
            if stop > start
        }


def blocks(
    data: Data,
    names: Sequence[str],
    optional: Sequence[str] = (),
    scenarios: Collection[int] | None = None,
) -> Iterator[SampleBlock]:
    """Yield the samples of a run, a trace or a table, scenario by scenario.

    Parameters
    ----------
    data
        A run, a trace or a table.
    names
        Arrays and coordinates that are needed.
    optional
        Arrays that are taken where they are stored.
    scenarios
        Numbers of the scenarios that are needed, all if None; a block may hold others, too.

    Raises
    ------
    ConfigError
        If an array is not there.
    """
    if is_table(data):
        require(data, *names)
        yield from _blocks_of_table(data, [*names, *optional], scenarios)
        return
    for number, ds in enumerate(traces(data).values()):
        if scenarios is None or number in scenarios:
            require(ds, *(_NAMES.get(name, name) for name in names))
            yield _block_of_trace(number, ds, [*names, *optional])


def _block_of_trace(number: int, ds: xr.Dataset, names: Sequence[str]) -> SampleBlock:
    arrays = {}
    for name in names:
        variable = ds.variables.get(_NAMES.get(name, name))
        if variable is not None:
            dims = [SAMPLE if dim == "query" else dim for dim in variable.dims]
            arrays[name] = xr.DataArray(xr.Variable(dims, variable))
    layers = ds.indexes["layer"].tolist() if "layer" in ds.indexes else []
    starts = np.array([0, ds.sizes["query"]])
    marks = partial(special_samples, ds), partial(generated_samples, ds)
    missing = {number: missing_layers(ds)}
    find = partial(rows_of_place, ds)
    return SampleBlock(arrays, layers, [number], starts, find, *marks, missing)


def _blocks_of_table(
    table: xr.Dataset, names: Sequence[str], scenarios: Collection[int] | None
) -> Iterator[SampleBlock]:
    known = table_scenarios(table)
    variables = {name: table.variables[name] for name in names if name in table.variables}
    layers = table.indexes["layer"].tolist() if "layer" in table.indexes else []
    labels = [n for n in ("scenario", "position", "span", *MARKS) if n in table.coords]
    gaps = missing_of_table(table)
    for first, last in _cuts(known.starts, _most(variables.values())):
        numbers = range(first, last)
        if scenarios is not None and not any(number in scenarios for number in numbers):
            continue
        start, stop = (int(at) for at in known.starts[[first, last]])
        part = table[labels].isel({SAMPLE: slice(start, stop)})
        own = TableScenarios(known.names[first:last], known.starts[first : last + 1] - start)
        arrays = {
            name: xr.DataArray(one.isel({SAMPLE: slice(start, stop)}))
            for name, one in variables.items()
        }
        part = part.assign_attrs(table.attrs)
        find = partial(rows_in_table, part, scenarios=own)
        marks = partial(special_samples, part), partial(generated_samples, part)
        missing = {n: gaps.get(known.names[n], gaps[""]) for n in numbers}
        yield SampleBlock(arrays, layers, numbers, own.starts, find, *marks, missing)


def _most(variables: Collection[xr.Variable]) -> int:
    """Return how many samples a block has at most: whole chunks, if these are known."""
    sizes = [
        one.dtype.itemsize * math.prod(one.sizes[d] for d in one.dims if d not in ("layer", SAMPLE))
        for one in variables
    ]
    most = max(1, _BLOCK_BYTES // max([8, *sizes]))
    chunks = [
        int(one.encoding["chunks"][one.dims.index(SAMPLE)])
        for one in variables
        if one.ndim > 1 and one.encoding.get("chunks")
    ]
    chunk = max(chunks, default=1)
    return int(most // chunk * chunk or most)


def _cuts(starts: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Yield first and last (exclusive) scenarios of blocks of at most `most` samples, or one."""
    first = 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + most, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last
