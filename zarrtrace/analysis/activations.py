"""Features that are active at places of scenarios, a layer of all scenarios at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import xarray as xr

from zarrtrace.analysis.blocks import blocks
from zarrtrace.analysis.parallel import OfLayer, each_layer
from zarrtrace.analysis.positions import Place
from zarrtrace.analysis.trace_arrays import taken
from zarrtrace.analysis.traces import Data, scenario_names

# Activations that are in memory at once, about: those of some layers, if there are many scenarios.
_AT_ONCE = 2**26
# Active features of a scenario at a place, at most, usually.
_OFTEN_ACTIVE = 256
# Values that are tested at once.
_TESTED = 2**22


class ActiveFeatures(NamedTuple):
    """Mean non-zero activations of scenarios at one place and layer.

    Attributes
    ----------
    known
        Which scenarios have the place and the layer, by their place among those compared.
    row
        Place of the scenario, of each activation.
    feature, activation
        The others.
    """

    known: np.ndarray
    row: np.ndarray
    feature: np.ndarray
    activation: np.ndarray


def active_features(
    data: Data, chosen: Sequence[str], places: Sequence[Place]
) -> Iterator[tuple[tuple[int, int], ActiveFeatures]]:
    """Yield what is active by (number of the place, layer), some layers at a time."""
    numbers = {name: number for number, name in enumerate(scenario_names(data))}
    rows = {numbers[name]: row for row, name in enumerate(chosen)}
    layers = sorted({n for block in blocks(data, ["features"], (), rows) for n in block.layers})
    step = max(1, _AT_ONCE // (len(chosen) * len(places) * _OFTEN_ACTIVE))
    for start in range(0, len(layers), step):
        found: dict[tuple[int, int], list[ActiveFeatures]] = {}
        for key, active in _active_of_layers(data, rows, places, layers[start : start + step]):
            found.setdefault(key, []).append(active)
        for key in sorted(found):
            yield key, ActiveFeatures(*map(np.concatenate, zip(*found[key], strict=True)))


def _active_of_layers(
    data: Data, rows: Mapping[int, int], places: Sequence[Place], layers: Sequence[int]
) -> Iterator[tuple[tuple[int, int], ActiveFeatures]]:
    """Yield what is active in some layers, block by block."""
    of_layers: deque[list[int]] = deque()  # of the blocks that are being read

    def jobs() -> Iterator[tuple[xr.DataArray, OfLayer[list[tuple[int, ActiveFeatures]]]]]:
        for block in blocks(data, ["features"], (), rows):
            cells = [
                (place, rows[number], samples)
                for place, at in enumerate(places)
                for number, samples in block.rows(at).items()
                if number in rows
            ]
            here = [n for n in block.layers if n in layers]
            if not cells or not here:
                continue
            samples = np.unique(np.concatenate([at for _, _, at in cells]))
            places_of = [(place, row, np.searchsorted(samples, at)) for place, row, at in cells]
            of_layers.append(here)
            gone = [
                {row for number, row in rows.items() if n in block.missing.get(number, ())}
                for n in here
            ]
            array = block.arrays["features"].assign_coords(
                layer=block.layers, sample=np.arange(block.starts[-1])
            )
            yield (
                taken(array, layer=here, sample=samples),
                partial(_active_of_layer, cells=places_of, gone=gone),
            )

    for by_layer in each_layer(jobs()):
        for layer, found in zip(of_layers.popleft(), by_layer, strict=True):
            for place, active in found:
                yield (place, layer), active


def _active_of_layer(
    layer: np.ndarray,
    at_layer: int,
    *,
    cells: Sequence[tuple[int, int, np.ndarray]],
    gone: Sequence[Collection[int]],
) -> list[tuple[int, ActiveFeatures]]:
    """Return what is active at each place of each scenario; nothing where it is missing."""
    found: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for place, row, samples in cells:
        if row in gone[at_layer]:
            continue
        mean = layer[samples].mean(0, dtype=np.float64)
        active = np.flatnonzero(mean)
        found.setdefault(place, []).append((row, active.astype(np.int32), mean[active]))
    out = []
    for place, parts in found.items():
        known, features, values = zip(*parts, strict=True)
        counts = [len(one) for one in features]
        rows = np.repeat(np.array(known, np.int32), counts)
        merged = np.concatenate(features), np.concatenate(values)
        out.append((place, ActiveFeatures(np.array(known), rows, *merged)))
    return out


def side_by_side(
    active: ActiveFeatures, rows: np.ndarray, min_scenarios: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield features active in enough scenarios ``(m,)`` and their values ``(n, m)``."""
    features, counts = np.unique(active.feature, return_counts=True)
    features = features[counts >= min_scenarios]
    number = np.cumsum(rows) - 1  # among the scenarios that are known
    step = max(1, _TESTED // int(rows.sum()))
    for start in range(0, len(features), step):
        some = features[start : start + step]
        kept = np.isin(active.feature, some)
        values = np.zeros((int(rows.sum()), len(some)))
        column = np.searchsorted(some, active.feature[kept])
        values[number[active.row[kept]], column] = active.activation[kept]
        # Features with computed NaN are left out; the result's `nonfinite` says so.
        is_finite = np.isfinite(values).all(0)
        yield some[is_finite], values[:, is_finite]
