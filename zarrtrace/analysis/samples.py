"""Samples: rows of (scenario, position), from traces or from a table; what analyses take."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.concatenated import SAMPLE, concatenated
from zarrtrace.analysis.selecting import (
    Data,
    Place,
    Scenarios,
    as_places,
    label,
    metadata,
    present,
    require,
    require_places,
    scenario_of,
    span_names,
    tags,
    traces,
)
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.format.attributes import layers_in, ranges
from zarrtrace.scenarios import DECISION, span

#: Which positions of each prompt: all that are stored, those of any span, or places.
At = Literal["all", "spans"] | Place | Sequence[Place]

_ALL, _SPANS = "all", "spans"
# Arrays of a trace that a table has, besides those of SAEs, and the texts beside them.
_OF_TRACES = ("residual", "next_token", "next_token_logprob")
_TEXTS = ("next_token_text",)
# Attributes of traces that are a table's.
_SHARED = ("model", "saes", "residual_hook", "feature_dtype", "residual_dtype", "versions")


def table(run: Data, at: At = DECISION) -> xr.Dataset:
    """Put positions of a run's prompts side by side: one lazy dataset of samples.

    A sample is one (scenario, position). Samples stand in the order of scenarios, then of
    positions.

    Parameters
    ----------
    run
        A run, a trace, or a table, of which some samples are taken.
    at
        ``"decision"``, ``"all"`` stored positions, ``"spans"``: those of any span, the name of a
        span, positions (negative from the end of the prompt), or a list of names and positions. A
        scenario without a span has no samples of it.

    Returns
    -------
    xr.Dataset
        ``features (layer, sample, feature)``, ``residual (layer, sample, channel)``, ``next_token``
        and ``next_token_logprob (sample, rank)``, those that the traces hold; with coordinates
        along ``sample``: ``scenario``, ``position`` in the prompt, ``token``, ``token_id``,
        ``span`` (names of the spans that hold the position, joined by commas), ``tags``,
        ``option_NAME`` (id of the option's first token, −1 without one) and the columns of
        metadata. Nothing is read before it is looked at, and then only the chunks that hold it. On
        dask if the run was opened with ``chunks``. NaN where a trace lacks a layer.

    Raises
    ------
    ScenarioError
        If no scenario has a span, or a position is not in a prompt or not stored: the message names
        the scenario.
    ConfigError
        If traces hold different arrays, or a tag or a column of metadata has a name that a table
        cannot have.

    Examples
    --------
    >>> last = zt.table(run)
    >>> last.features.sel(layer=25).groupby("round").mean()  # a column of metadata
    """
    runs = traces(run)
    chosen = _chosen(runs, at)
    first = chosen[0].ds
    names = [str(name) for name in first.data_vars if _is_of_samples(str(name))]
    for one in chosen:
        require(one.ds, *names)
    texts = [name for name in _TEXTS if all(name in one.ds.variables for one in chosen)]
    labels, places = _labels(
        chosen, dict.fromkeys(dim for name in names for dim in first[name].dims)
    )
    arrays = {
        name: concatenated(
            [one.rows_of(name) for one in chosen],
            [{dim: at for dim, at in one.items() if dim in first[name].dims} for one in places],
        )
        for name in (*names, *texts)
    }
    coordinates: dict[Hashable, xr.Variable] = {
        **{dim: xr.Variable(dim, values, first[dim].attrs) for dim, values in labels.items()},
        **_coordinates(runs, chosen),
        **{name: arrays.pop(name) for name in texts},
    }
    columns = metadata(runs)
    _check_names({*arrays, *coordinates}, columns)
    lengths = [len(one.positions) for one in chosen]
    numbers = {name: number for number, name in enumerate(runs)}
    number = np.repeat([numbers[one.name] for one in chosen], lengths)
    attributes = _attributes(runs, at, labels, list(columns))
    of_scenarios = {name: (SAMPLE, values[number]) for name, values in columns.items()}
    return xr.Dataset(arrays, {**coordinates, **of_scenarios}, attributes)


class _Chosen(NamedTuple):
    """Positions chosen of one trace.

    Attributes
    ----------
    ds
        The trace.
    positions
        In the prompt, ascending.
    rows
        Where they are along ``query``.
    """

    ds: xr.Dataset
    positions: np.ndarray
    rows: slice | np.ndarray

    @property
    def name(self) -> str:
        """The scenario."""
        return scenario_of(self.ds)

    def rows_of(self, name: str, dim: str = "query") -> xr.Variable:
        """Return an array of the trace at these positions, along ``sample``, unread."""
        variable = self.ds.variables[name]
        rows = self.rows if dim == "query" else _rows(self.ds, self.positions, dim)
        dims = [SAMPLE if one == dim else one for one in variable.dims]
        return xr.Variable(dims, variable.isel({dim: rows}), variable.attrs)


def _chosen(data: Scenarios, at: At) -> list[_Chosen]:
    """Choose positions of each trace that has any.

    Raises
    ------
    ScenarioError
        If no scenario has a span, or a position is not stored.
    """
    places: list[Place] = [*span_names(data)] if _is_word(at) else as_places(at)[0]
    require_places(data, places)
    found = []
    for ds in traces(data).values():
        everything = isinstance(at, str) and at == _ALL
        wanted = np.asarray(ds["query"]) if everything else _wanted(ds, places)
        if len(wanted):
            found.append(_Chosen(ds, wanted, _rows(ds, wanted)))
    if not found:
        raise ScenarioError(
            "there are no samples",
            why="The prompts have no such tokens, or the list of places is empty.",
            remedy=f"Spans there are: {', '.join(span_names(data))}.",
        )
    return found


def _wanted(ds: xr.Dataset, places: Sequence[Place]) -> np.ndarray:
    """Return the positions in the prompt of those places that a trace has."""
    tokens = ds.sizes.get("key", len(np.asarray(ds["query"])))
    found: list[int] = []
    for place in present(ds, places):
        if isinstance(place, str):
            found += span(ds, place)
            continue
        for given in [place] if isinstance(place, int | np.integer) else place:
            at = int(given) + tokens if given < 0 else int(given)
            if not 0 <= at < tokens:
                raise ScenarioError(
                    f"{scenario_of(ds)}: {label(place)!r} covers token {given}, which is not there",
                    why=f"The prompt has {tokens} tokens, positions 0 to {tokens - 1}.",
                    remedy="Give positions of these tokens.",
                )
            found.append(at)
    return np.unique(np.asarray(found, np.int64))


def _rows(ds: xr.Dataset, positions: np.ndarray, dim: str = "query") -> slice | np.ndarray:
    """Return where positions are along a dimension; refuse those that are not stored."""
    at = ds.indexes[dim].get_indexer(pd.Index(positions))
    if (at < 0).any():
        stored = ds.indexes[dim].tolist()
        shown = ", ".join(map(str, stored[:10])) + (", …" if len(stored) > 10 else "")
        raise ScenarioError(
            f"{scenario_of(ds)}: position {positions[at < 0][0]} is not stored",
            why=f"The trace holds {len(stored)} positions: {shown}.",
            remedy="Choose among these, or extract the scenario with the others.",
        )
    neighbours = (np.diff(at) == 1).all()
    return slice(int(at[0]), int(at[-1]) + 1) if neighbours else at


def _is_word(at: At) -> bool:
    return isinstance(at, str) and at in (_ALL, _SPANS)


def _is_of_samples(name: str) -> bool:
    return name in _OF_TRACES or name == "features" or name.startswith("features_")


def _labels(
    chosen: Sequence[_Chosen], dims: Iterable[Hashable]
) -> tuple[dict[Hashable, np.ndarray], list[dict[Hashable, np.ndarray]]]:
    """Return the labels that any trace has, and where each trace with others has them.

    Parameters
    ----------
    chosen
        Of the traces.
    dims
        Dimensions that may have labels.
    """
    labels: dict[Hashable, np.ndarray] = {}
    places: list[dict[Hashable, np.ndarray]] = [{} for _ in chosen]
    for dim in dims:
        if dim == "query" or dim not in chosen[0].ds.indexes:
            continue
        indexes: list[pd.Index[Any]] = [one.ds.indexes[dim] for one in chosen]
        labels[dim] = indexes[0].to_numpy()
        if all(index.equals(indexes[0]) for index in indexes[1:]):
            continue
        labels[dim] = np.unique(np.concatenate(indexes))
        for place, index in zip(places, indexes, strict=True):
            place[dim] = np.asarray(index.get_indexer(pd.Index(labels[dim])))
    return labels, places


def _coordinates(data: Scenarios, chosen: Sequence[_Chosen]) -> dict[Hashable, xr.Variable]:
    """Return what is said of each sample, besides metadata; texts of tokens unread."""
    lengths = [len(one.positions) for one in chosen]

    def each(values: Sequence[Any], kind: Any) -> xr.Variable:
        return xr.Variable(SAMPLE, np.repeat(np.array(values, kind), lengths))

    of_tags = [tags(one.ds) for one in chosen]
    _check_tags(of_tags)
    out: dict[Hashable, xr.Variable] = {
        "scenario": each([one.name for one in chosen], object),
        "position": xr.Variable(SAMPLE, np.concatenate([one.positions for one in chosen])),
        "span": xr.Variable(SAMPLE, np.concatenate([_spans(one) for one in chosen])),
        "tags": each([",".join(one) for one in of_tags], object),
    }
    for name, stored, dim in (("token", "query_token", "query"), ("token_id", "token_id", "key")):
        if all(stored in one.ds.variables for one in chosen):
            parts = [one.rows_of(stored, dim) for one in chosen]
            out[name] = concatenated(parts, [{}] * len(parts))
    for option in options(data):
        found = [one.ds.attrs["options"].get(option, {"token_id": -1}) for one in chosen]
        out[f"option_{option}"] = each([one["token_id"] for one in found], np.int64)
    return out


def _spans(chosen: _Chosen) -> np.ndarray:
    """Name the spans that hold each position, the decision last."""
    found: dict[int, list[str]] = {int(position): [] for position in chosen.positions}
    for name in span_names(chosen.ds):
        for position in span(chosen.ds, name):
            if position in found:
                found[position].append(name)
    return np.array([",".join(names) for names in found.values()], object)


def options(data: Scenarios) -> list[str]:
    """Return the names of the options that any scenario has, in order of first use."""
    named = (ds.attrs.get("options", {}) for ds in traces(data).values())
    return list(dict.fromkeys(name for names in named for name in names))


def _check_tags(tags: Sequence[tuple[str, ...]]) -> None:
    for tag in (tag for found in tags for tag in found):
        if "," in tag:
            raise ConfigError(
                f"the tag {tag!r} has a comma",
                why="A table joins a scenario's tags by commas.",
                remedy="Rename the tag in the scenarios file and extract again.",
            )


def _check_names(taken: set[Hashable], columns: Mapping[str, Any]) -> None:
    for column in columns:
        if column in taken:
            raise ConfigError(
                f"metadata {column!r} has the name of an array of tables",
                why="A table has the columns of metadata as coordinates beside its arrays.",
                remedy="Rename the column in the scenarios file and extract again.",
            )


def _attributes(
    data: Scenarios, at: At, labels: Mapping[Hashable, np.ndarray], columns: list[str]
) -> dict[str, Any]:
    """Return the attributes of a table."""
    runs = list(traces(data).values())
    first = runs[0].attrs
    without = {
        name: ranges(sorted({n for ds in runs for n in layers_in(ds.attrs.get(name, ""))}))
        for name in ("layers_without_sae", "layers_without_residual")
    }
    return {
        "kind": "table",
        "format_version": 2,
        "scenarios": len(runs),
        "positions": positions_text(at),
        "layers": ranges(labels["layer"].tolist()) if "layer" in labels else "",
        **without,
        **{name: first[name] for name in _SHARED if name in first},
        "spans": span_names(data),
        "options": options(data),
        "metadata": columns,
        "failed": {},
    }


def positions_text(at: At) -> str:
    """Return a choice of positions as text: ``all``, ``balance,decision``, ``0,-1``."""
    return ",".join(label(place) for place in as_places(at)[0])
