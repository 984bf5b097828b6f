"""Traces that a page shows, opened on demand if there are many."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from zarrtrace.errors import (
    ConfigError,
    IncompleteError,
    IntegrityError,
    NotATraceError,
    ZarrtraceError,
)
from zarrtrace.format.attributes import ranges
from zarrtrace.scenarios import chosen_names, name_of
from zarrtrace.storage import Location, locate
from zarrtrace.store import (
    kind_of,
    open_run,
    open_trace,
    read_run,
    read_scenario,
    read_staged,
    read_trace,
    staging_folder,
)

#: If there are more scenarios, each is opened when it is shown: opening takes milliseconds.
MOST_SCENARIOS = 500
# Datasets of a large run that stay open.
_KEPT = 64


#: Tags and metadata of a trace.
About = tuple[Sequence[str], Mapping[str, Any]]


class Traces(Mapping[str, xr.Dataset]):
    """Traces of a run by name, in its order.

    Parameters
    ----------
    path
        A run, or a trace that stands alone.
    scenarios
        Only these; all if None.
    layers
        Only these decoder blocks; all if None.
    seals
        The seal that a trace must have, by name; None of one that was not complete.

    Raises
    ------
    ConfigError
        If a layer is not there.
    IncompleteError
        If no scenario is stored yet.
    IntegrityError
        If a trace has another seal. If there are more than :data:`MOST_SCENARIOS` scenarios, only
        the first is checked for these three, each other one when it is opened.
    ScenarioError
        If a scenario is not there.
    """

    def __init__(
        self,
        path: Location,
        *,
        scenarios: Sequence[str] | None,
        layers: Sequence[int] | None,
        seals: Mapping[str, str | None] | None = None,
    ) -> None:
        self._path, self._layers, self._seals = path, layers, seals or {}
        self.is_run = kind_of(path) == "run"
        known = (
            [*read_run(path).attributes.scenarios]
            if self.is_run
            else [read_trace(path).attributes.name]
        )
        names = [*chosen_names(known, scenarios)]
        self.is_large = len(names) > MOST_SCENARIOS
        self._names, self._missing = self._present(names)
        if not self._names:
            raise _none_stored(path)
        self._lazy = functools.lru_cache(maxsize=_KEPT)(self._open)
        self._opened: dict[str, xr.Dataset] = {}
        if self.is_large:
            self._lazy(next(iter(self._names)))
        else:
            self._opened = self._open_all()
            self._names = dict.fromkeys(self._opened)

    def __getitem__(self, name: str) -> xr.Dataset:
        """Return a trace.

        Raises
        ------
        KeyError
            If there is none of this name.
        """
        if name not in self._names:
            raise KeyError(name)
        return self._opened[name] if name in self._opened else self._lazy(name)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of traces."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Whether there is a trace of this name; none is opened."""
        return name in self._names

    @property
    def layers(self) -> set[int]:
        """Layers that are shown; the first scenario's in a large run."""
        some = self._opened.values() or [self[next(iter(self._names))]]
        return {int(layer) for ds in some for layer in np.asarray(ds["layer"])}

    def missing(self, name: str) -> tuple[int, ...]:
        """Return the layers that a trace does not have yet."""
        return self._missing.get(name, ())

    def about(self, names: Sequence[str]) -> list[About | None]:
        """Return tags and metadata of traces, None if one is unreadable.

        In a large run, only their attributes are read.
        """
        if not self.is_large:
            return [_about(self[name]) for name in names]
        return self._path.each(self._read_about, names)

    def _read_about(self, name: str) -> About | None:
        # One damaged trace must not hide the tags of the others; opened, it says what is wrong.
        try:
            try:
                trace = read_scenario(self._path, name)
            except NotATraceError:
                return _about(self[name])  # not complete yet
            return trace.attributes.tags, trace.plain.get("metadata") or {}
        except ZarrtraceError:
            return None

    def _present(self, names: Sequence[str]) -> tuple[dict[str, None], dict[str, tuple[int, ...]]]:
        """Return names of stored traces, and missing layers by name."""
        if not self.is_run:
            return dict.fromkeys(names), {}
        published = set(self._path.present(names))
        absent = [name for name in names if name not in published]
        there = locate(staging_folder(self._path)).present(absent) if absent else []
        staged = {name: read_staged(self._path / name) for name in there}
        missing = {name: found[1] for name, found in staged.items() if found is not None}
        return {name: None for name in names if name in published or name in missing}, missing

    def _open_all(self) -> dict[str, xr.Dataset]:
        if not self.is_run:
            return {name: self._chosen(name, self._open_alone()) for name in self._names}
        run = open_run(self._path, scenarios=[*self._names], missing="nan")
        found = {name: run[name].to_dataset() for name in self._names if name in run.children}
        if not found:
            raise _none_stored(self._path)
        return {name: self._chosen(name, ds) for name, ds in found.items()}

    def _open_alone(self) -> xr.Dataset:
        return open_trace(self._path, missing="nan")

    def _open(self, name: str) -> xr.Dataset:
        ds = open_trace(self._path / name, missing="nan")
        if name_of(ds.attrs) != name:
            read_scenario(self._path, name)  # says which it is
        return self._chosen(name, ds)

    def _chosen(self, name: str, ds: xr.Dataset) -> xr.Dataset:
        """Return the chosen layers of a trace after checking its seal."""
        if self._seals.get(name) not in (None, ds.attrs.get("seal")):
            raise IntegrityError(
                f"{self._path}: {name} is not the trace that was opened",
                why="The run was replaced since then.",
                remedy="Open it again.",
            )
        return ds if self._layers is None else _only_layers(name, ds, self._layers)


def _about(ds: xr.Dataset) -> About:
    return ds.attrs["tags"], ds.attrs.get("metadata") or {}


def _only_layers(name: str, ds: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    absent = sorted(set(layers) - {int(layer) for layer in np.asarray(ds["layer"])})
    if absent:
        raise ConfigError(
            f"{name} has no layer {absent[0]}",
            remedy=f"It has layers {ranges(np.asarray(ds['layer']).tolist())}.",
        )
    chosen = {
        dim: np.isin(np.asarray(ds[dim]), layers)
        for dim in ("layer", "attention_layer")
        if dim in ds.dims
    }
    return ds.isel({dim: np.flatnonzero(kept) for dim, kept in chosen.items()})


def _none_stored(path: Location) -> IncompleteError:
    return IncompleteError(
        f"{path}: no scenario is stored yet",
        why="The extraction was interrupted, or is still running.",
        remedy="Run the same 'zarrtrace extract' again to resume it.",
    )
