"""Samples of a run, read block by block: all that the formats of an export have in common."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from zarrtrace.analysis.gaps import layers_without_sae
from zarrtrace.errors import ConfigError, IncompleteError
from zarrtrace.format.attributes import layers_in, ranges
from zarrtrace.scenarios import sample_names, split_trace_name
from zarrtrace.suggestions import did_you_mean

# Dense values that are read at once: a layer of 1,024 samples and 32,768 features in float32.
_BYTES = 2**27
# Samples whose texts are held at once: a chunk of a coordinate of a table on disk.
_TEXTS = 2**16
_FEATURES = re.compile(r"features(_[A-Za-z0-9_]+)?")

#: One array a sample; the only key that all formats add to the coordinates.
VALID = "valid_mask"


@dataclass(frozen=True)
class Block:
    """Some samples of some layers of an array.

    Attributes
    ----------
    layers
        Indices of decoder blocks.
    start, stop
        Numbers of the samples.
    values
        ``(layer, sample, feature or channel)``.
    """

    layers: Sequence[int]
    start: int
    stop: int
    values: np.ndarray


class LayeredArray:
    """Features or residual stream of the samples, by layers that have it.

    Parameters
    ----------
    array
        ``(layer, sample, feature or channel)``.
    without
        Layers that lack it.
    """

    def __init__(self, array: xr.DataArray, without: Collection[int]) -> None:
        self._stored = _stored_samples(array)
        self.array = array.transpose("layer", "sample", ...)
        labels = [int(label) for label in array["layer"].values]
        self._at = {label: at for at, label in enumerate(labels) if label not in without}
        self.layers = tuple(self._at)
        self.samples, self.width = self.array.shape[1:]
        self.dtype = np.dtype(self.array.dtype)

    @property
    def suffix(self) -> str:
        """Name of a further SAE behind ``_``; empty for the first one and the residual stream."""
        return str(self.array.name).removeprefix("features").removeprefix("residual")

    def rows(self, layers: int) -> int:
        """Number of samples that are read at once with `layers` layers.

        A chunk of a table is read once, in one piece; of traces, each is read once for all layers.
        """
        a_row = self.width * self.dtype.itemsize
        if self._stored is None:
            return max(1, _BYTES // (layers * a_row))
        return min(self._stored, max(1, 2 * _BYTES // a_row))

    @property
    def rows_of_all(self) -> int:
        """Number of samples whose values of all layers are held at once."""
        layers = len(self.layers)
        a_row = self.width * self.dtype.itemsize * layers
        return min(self.rows(layers), self.samples, max(1, 2 * _BYTES // a_row))

    def groups(self) -> Iterator[tuple[int, ...]]:
        """Yield layers that are read together."""
        number = self.layers_at_once
        for at in range(0, len(self.layers), number):
            yield self.layers[at : at + number]

    @property
    def layers_at_once(self) -> int:
        """Number of layers read together."""
        rows = min(self.rows(len(self.layers)), self.samples)
        return max(1, _BYTES // max(1, rows * self.width * self.dtype.itemsize))

    def read(self, layers: Sequence[int], start: int, stop: int) -> Block:
        """Read some samples of some layers."""
        at = [self._at[layer] for layer in layers]
        # Neighbours as a slice, which any array takes without a copy.
        chosen: Any = slice(at[0], at[-1] + 1) if at[-1] - at[0] == len(at) - 1 else at
        return Block(layers, start, stop, self.array[chosen, start:stop].values)


def _stored_samples(array: xr.DataArray) -> int | None:
    """Return how many samples a chunk holds; None if they come from traces."""
    if "sample" in array.chunksizes:
        return int(array.chunksizes["sample"][0])
    stored = array.encoding.get("chunks")
    return int(stored[array.dims.index("sample")]) if stored else None


@dataclass(frozen=True)
class Samples:
    """A dataset of samples, as ``zt.table`` makes it, to be written in another format.

    Attributes
    ----------
    ds
        The dataset.
    """

    ds: xr.Dataset

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.ds.sizes["sample"])

    @cached_property
    def features(self) -> list[LayeredArray]:
        """Features of each SAE."""
        names = [name for name in map(str, self.ds.data_vars) if _FEATURES.fullmatch(name)]
        return [LayeredArray(self.ds[name], layers_without_sae(self.ds, name)) for name in names]

    @cached_property
    def residual(self) -> LayeredArray | None:
        """The residual stream; None if it is not stored."""
        if "residual" not in self.ds.data_vars:
            return None
        lacking = self.ds.attrs.get("layers_without_residual", ())
        without = layers_in(lacking) if isinstance(lacking, str) else lacking
        return LayeredArray(self.ds["residual"], without)

    @property
    def layers(self) -> list[int]:
        """Layers of the dataset."""
        return [int(layer) for layer in self.ds["layer"].values] if "layer" in self.ds else []

    @cached_property
    def columns(self) -> list[str]:
        """Coordinates with one value a sample, metadata among them."""
        return [str(name) for name, one in self.ds.coords.items() if one.dims == ("sample",)]

    @cached_property
    def failed(self) -> frozenset[str]:
        """Scenarios that could not be computed."""
        return frozenset(map(str, self.ds.attrs.get("failed", ())))

    def valid(self, start: int, stop: int) -> np.ndarray:
        """Which of some samples were computed."""
        names = _names(self.ds.isel(sample=slice(start, stop)))
        return np.fromiter((name not in self.failed for name in names), bool, stop - start)

    def refuse_gaps(self) -> None:
        """Refuse scenarios that lack layers which others have: their values would be NaN.

        Raises
        ------
        IncompleteError
        """
        own = self.ds.attrs.get("missing_layers")
        if not own:
            return
        arrays = [*self.features, *([self.residual] if self.residual else [])]
        exported = {layer for array in arrays for layer in array.layers}
        for name in dict.fromkeys(_names(self.ds)):
            if gone := sorted(exported.intersection(layers_in(own.get(name, "")))):
                raise IncompleteError(
                    f"{name}: layer {ranges(gone)} is not stored"
                    if len(gone) == 1
                    else f"{name}: layers {ranges(gone)} are not stored",
                    why="Its extraction is not finished, or had fewer layers than others: nothing "
                    "in the files would tell its missing values from computed ones.",
                    remedy="Finish the extraction, or export the layers or scenarios that are "
                    "complete: --layers or --scenario, in Python layers=… or scenarios=….",
                )

    def windows(self) -> Iterator[slice]:
        """Yield samples whose texts are held at once."""
        for start in range(0, self.count, _TEXTS):
            yield slice(start, min(start + _TEXTS, self.count))

    def refuse_columns(self, keys: Collection[str], extra: str = "") -> None:
        """Refuse columns that have the name of something else in the files.

        Parameters
        ----------
        keys
            Names that the files give a meaning.
        extra
            Pattern of further such names.

        Raises
        ------
        ConfigError
        """
        for name in self.columns:
            if name in keys or (extra and re.fullmatch(extra, name)):
                raise ConfigError(
                    f"the samples have a column {name!r}",
                    why="These files give that name another meaning.",
                    remedy="Rename it in the scenarios, or in Python: "
                    f"zt.export(zt.table(run).rename({name}='{name}_'), …).",
                )


def choose_samples(
    ds: xr.Dataset, scenarios: Sequence[str] | None, layers: Sequence[int] | None
) -> Samples:
    """Check that a dataset holds samples, and take some scenarios and layers of it.

    Raises
    ------
    ConfigError, IncompleteError
    """
    if ds.attrs.get("kind") != "table" or "sample" not in ds.dims or "scenario" not in ds.coords:
        raise ConfigError(
            "the dataset holds no samples",
            why="A table has a dimension 'sample' with a coordinate 'scenario'.",
            remedy="Give a run, or what zt.table(run) returns.",
        )
    if scenarios is not None:
        names = _names(ds)
        # A scenario's name stands for all its repeats.
        labels = [{name, split_trace_name(name)[0]} for name in names]
        asked, there_are = set(scenarios), {*itertools.chain(*labels)}
        wanted = np.fromiter((not asked.isdisjoint(one) for one in labels), bool, len(names))
        missing = [name for name in scenarios if name not in there_are]
        if missing or not scenarios:
            raise ConfigError(
                f"no scenario {missing[0]!r}" if missing else "no scenario was asked for",
                remedy=did_you_mean(
                    missing[0] if missing else "", sorted(there_are), label="There are"
                ),
            )
        ds = ds.isel(sample=_chosen(wanted))
    if layers is not None:
        ds = _of_layers(ds, layers)
    if not ds.sizes["sample"]:
        raise ConfigError("there are no samples", remedy="Choose other positions with --at.")
    samples = Samples(ds)
    samples.refuse_gaps()
    return samples


def _names(ds: xr.Dataset) -> list[str]:
    """Name the trace that each sample is of."""
    repeats = ds["repeat"].values if "repeat" in ds.coords else None
    return sample_names(ds["scenario"].values, repeats)


def _chosen(mask: np.ndarray) -> Any:
    """Return where a mask is true: a slice if it is in one piece, which is cheaper to take."""
    at = np.flatnonzero(mask)
    whole = len(at) and at[-1] - at[0] == len(at) - 1
    return slice(int(at[0]), int(at[-1]) + 1) if whole else at


def _of_layers(ds: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    """Take some layers, which must exist."""
    there = [int(layer) for layer in ds["layer"].values] if "layer" in ds.coords else []
    absent = [layer for layer in layers if layer not in there]
    if absent or not layers:
        raise ConfigError(
            f"no layer {absent[0]}" if absent else "no layer was asked for",
            remedy=f"There are layers {', '.join(map(str, there)) or 'of nothing'}.",
        )
    return ds.isel(layer=_chosen(np.isin(there, list(layers))))
