"""Samples: rows of (scenario, position), from traces or from a table; what analyses take."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.concatenated import concatenated
from zarrtrace.analysis.gaps import gaps_of_traces, sae_ids
from zarrtrace.analysis.positions import (
    Place,
    as_places,
    label,
    not_stored,
    positions,
    present,
    require_places,
    span_names,
)
from zarrtrace.analysis.repeats import SCENARIO_NAME
from zarrtrace.analysis.tables import SAMPLE, is_table, rows_in_table, table_scenarios
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import (
    Data,
    Scenarios,
    options,
    repeats,
    scenario_of,
    stored_metadata,
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
# Coordinates along `sample`, where traces have them, and along which dimension.
_LABELS = (
    ("token", "query_token", "query"),
    ("token_id", "token_id", "key"),
    ("special", "special", "key"),
    ("generated", "generated", "key"),
)
# Attributes of traces that are a table's.
_NO_RESIDUAL = "layers_without_residual"
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
        ``special`` (whether it is BOS or a chat marker), ``span`` (names of the spans that hold the
        position, joined by commas), ``tags``, ``option_NAME`` (id of the option's first token, −1
        without one) and the columns of metadata; of generated text also ``generated``, ``choice``
        (empty without one) and, where scenarios have several, ``repeat``. With several SAEs, each
        has its ``sae_id (layer)``, empty in layers that it lacks. No other array is read before it
        is looked at, and then only the chunks that hold it. On dask if the run was opened with
        ``chunks``. NaN where a trace lacks a layer.

    Raises
    ------
    ScenarioError
        If no scenario has a span, or a position is not in a prompt: the message names the scenario.
    ConfigError
        If a position is not stored, traces hold different arrays, or a tag or a column of metadata
        has a name that a table cannot have.

    Examples
    --------
    >>> last = zt.table(run)
    >>> last.features.sel(layer=25).groupby("round").mean()  # a column of metadata
    """
    if is_table(run):
        rows, _ = _rows_of_table(run, at)
        return run.isel({SAMPLE: rows}).assign_attrs(positions=positions_text(at))
    runs = traces(run)
    chosen = _chosen(runs, at)
    first = chosen[0].ds
    names = [str(name) for name in first.data_vars if _is_of_samples(str(name))]
    arrays, labels = _together(chosen, [*names, *_texts(chosen)])
    coordinates: dict[Hashable, xr.Variable] = {
        **{dim: xr.Variable(dim, values, first[dim].attrs) for dim, values in labels.items()},
        **_coordinates(runs, chosen),
        **sae_ids([one.ds for one in chosen], list(labels.get("layer", ()))),
        **{name: arrays.pop(name) for name in _TEXTS if name in arrays},
    }
    columns = stored_metadata(runs)
    _check_names({*arrays, *coordinates}, columns)
    number = _scenario_of_samples(runs, chosen)
    attributes = _attributes(runs, at, labels, list(columns))
    of_scenarios = {name: (SAMPLE, values[number]) for name, values in columns.items()}
    return xr.Dataset(arrays, {**coordinates, **of_scenarios}, attributes)


class Samples(NamedTuple):
    """Samples at some places.

    Attributes
    ----------
    arrays
        ``([layer,] sample, …)``, unread.
    of_scenario
        Number of each sample's scenario in the run or the table.
    position
        Position of each sample in its prompt.
    rows
        For each place its samples, ascending.
    """

    arrays: xr.Dataset
    of_scenario: np.ndarray
    position: np.ndarray
    rows: list[np.ndarray]


def samples(
    data: Data, places: Sequence[Place], names: Sequence[str], optional: Sequence[str] = ()
) -> Samples:
    """Return the samples at places of a run, a trace or a table.

    Parameters
    ----------
    data
        A run, a trace or a table.
    places
        Spans and positions.
    names
        Arrays that are needed.
    optional
        Arrays that are taken where all scenarios have them.

    Raises
    ------
    ScenarioError
        If no scenario has a place, or lacks a position.
    ConfigError
        If an array is not there.
    """
    require_places(data, places)
    if is_table(data):
        require(data, *names)
        rows, by_place = _rows_of_table(data, places)
        known = [*names, *(name for name in optional if name in data.variables)]
        arrays = data.reset_coords()[known].isel({SAMPLE: rows})
        number = table_scenarios(data).of_samples()[rows]
        position = data["position"].to_numpy()[rows]
        return Samples(arrays, number, position, [np.searchsorted(rows, at) for at in by_place])
    runs = traces(data)
    chosen = _chosen(runs, places)
    known = [*names, *(name for name in optional if all(name in c.ds.variables for c in chosen))]
    variables, labels = _together(chosen, known)
    starts = np.cumsum([0, *(len(one.positions) for one in chosen)])
    by_place = [
        np.concatenate(
            [
                start + np.searchsorted(one.positions, _wanted(one.ds, [place]))
                for start, one in zip(starts[:-1], chosen, strict=True)
            ]
        )
        for place in places
    ]
    number = _scenario_of_samples(runs, chosen)
    position = np.concatenate([one.positions for one in chosen])
    return Samples(xr.Dataset(variables, labels), number, position, by_place)


def _rows_of_table(table: xr.Dataset, at: At) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the samples that are asked for, of all places and of each."""
    if isinstance(at, str) and at == _ALL:
        return np.arange(table.sizes[SAMPLE]), []
    places: list[Place] = [*span_names(table)] if _is_word(at) else as_places(at)[0]
    require_places(table, places)
    found = [rows_in_table(table, place) for place in places]
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
    if not len(rows):
        raise _no_samples(table)
    return rows, found


def _no_samples(data: Scenarios) -> ScenarioError:
    return ScenarioError(
        "there are no samples",
        why="The prompts have no such tokens, or the list of places is empty.",
        remedy=f"Spans there are: {', '.join(span_names(data))}.",
    )


def _texts(chosen: Sequence[_TraceRows]) -> list[str]:
    return [name for name in _TEXTS if all(name in one.ds.variables for one in chosen)]


def _together(
    chosen: Sequence[_TraceRows], names: Sequence[str]
) -> tuple[dict[str, xr.Variable], dict[Hashable, np.ndarray]]:
    """Return arrays of traces side by side, unread, and the labels of their dimensions."""
    for one in chosen:
        require(one.ds, *(name for name in names if name not in _TEXTS))
    first = chosen[0].ds.variables
    labels, places = _labels(chosen, dict.fromkeys(d for name in names for d in first[name].dims))
    arrays = {
        name: concatenated(
            [one.rows_of(name) for one in chosen],
            [{dim: at for dim, at in one.items() if dim in first[name].dims} for one in places],
        )
        for name in names
    }
    return arrays, labels


class _TraceRows(NamedTuple):
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


def _chosen(data: Scenarios, at: At) -> list[_TraceRows]:
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
            found.append(_TraceRows(ds, wanted, _rows(ds, wanted)))
    if not found:
        raise _no_samples(data)
    return found


def rows_of_place(ds: xr.Dataset, place: Place) -> np.ndarray:
    """Return where the positions of a place are along ``query``; none if it has not the span.

    Raises
    ------
    ScenarioError
        If one is not in the prompt, or not stored.
    """
    wanted = _wanted(ds, [place])
    rows = _rows(ds, wanted) if len(wanted) else wanted
    return np.arange(ds.sizes["query"])[rows]


def _wanted(ds: xr.Dataset, places: Sequence[Place]) -> np.ndarray:
    """Return the positions in the prompt of those places that a trace has."""
    found = [positions(ds, place) for place in present(ds, places)]
    return np.unique(np.array([position for one in found for position in one], np.int64))


def _rows(ds: xr.Dataset, wanted: np.ndarray, dim: str = "query") -> slice | np.ndarray:
    """Return where positions are along a dimension; refuse those that are not stored."""
    at = ds.indexes[dim].get_indexer(pd.Index(wanted))
    if (at < 0).any():
        raise not_stored(ds, "token", wanted[at < 0].tolist())
    neighbours = (np.diff(at) == 1).all()
    return slice(int(at[0]), int(at[-1]) + 1) if neighbours else at


def _is_word(at: At) -> bool:
    return isinstance(at, str) and at in (_ALL, _SPANS)


def _is_of_samples(name: str) -> bool:
    return name in _OF_TRACES or name == "features" or name.startswith("features_")


def _labels(
    chosen: Sequence[_TraceRows], dims: Iterable[Hashable]
) -> tuple[dict[Hashable, np.ndarray], list[dict[Hashable, np.ndarray]]]:
    """Return the labels that any trace has, and where each trace with others has them.

    Parameters
    ----------
    chosen
        The chosen traces.
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


def _coordinates(data: Scenarios, chosen: Sequence[_TraceRows]) -> dict[Hashable, xr.Variable]:
    """Return what is said of each sample, besides metadata; texts of tokens unread."""
    lengths = [len(one.positions) for one in chosen]

    def each(values: Sequence[Any], kind: Any) -> xr.Variable:
        return xr.Variable(SAMPLE, np.repeat(np.array(values, kind), lengths))

    of_tags = [tags(one.ds) for one in chosen]
    _check_tags(of_tags)
    out: dict[Hashable, xr.Variable] = {
        "scenario": each([one.ds.attrs["scenario"] for one in chosen], object),
        "position": xr.Variable(SAMPLE, np.concatenate([one.positions for one in chosen])),
        "span": xr.Variable(SAMPLE, np.concatenate([_spans(one) for one in chosen])),
        "tags": each([",".join(one) for one in of_tags], object),
    }
    for name, stored, dim in _LABELS:
        if all(stored in one.ds.variables for one in chosen):
            parts = [one.rows_of(stored, dim) for one in chosen]
            out[name] = concatenated(parts, [{}] * len(parts))
    for name, of_repeats in repeats(data).items():
        if name != SCENARIO_NAME:
            out[name] = xr.Variable(SAMPLE, of_repeats[_scenario_of_samples(data, chosen)])
    for name, ids in options(data).items():
        out[f"option_{name}"] = xr.Variable(SAMPLE, ids[_scenario_of_samples(data, chosen)])
    return out


def _scenario_of_samples(data: Scenarios, chosen: Sequence[_TraceRows]) -> np.ndarray:
    """Return the number in the run of each sample's scenario."""
    numbers = {name: number for number, name in enumerate(traces(data))}
    return np.repeat([numbers[one.name] for one in chosen], [len(one.positions) for one in chosen])


def _spans(chosen: _TraceRows) -> np.ndarray:
    """Name the spans that hold each position, the decision last."""
    found: dict[int, list[str]] = {int(position): [] for position in chosen.positions}
    for name in span_names(chosen.ds):
        for position in span(chosen.ds, name):
            if position in found:
                found[position].append(name)
    return np.array([",".join(names) for names in found.values()], object)


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
    without = {layer for ds in runs for layer in layers_in(ds.attrs.get(_NO_RESIDUAL, ""))}
    chats = [ds.attrs["chat"] for ds in runs if ds.attrs.get("chat")]
    return {
        "kind": "table",
        "format_version": 2,
        "scenarios": len(runs),
        "positions": positions_text(at),
        "layers": ranges(labels["layer"].tolist()) if "layer" in labels else "",
        _NO_RESIDUAL: ranges(sorted(without)),
        **gaps_of_traces(traces(data), labels.get("layer", np.empty(0, int)).tolist()),
        **{name: first[name] for name in _SHARED if name in first},
        "spans": span_names(data),
        "options": list(options(data)),
        "metadata": columns,
        "chat_template": chats[0]["template"] if chats else None,
        "failed": {},
    }


def positions_text(at: At) -> str:
    """Return a choice of positions as text: ``all``, ``balance,decision``, ``0,-1``."""
    return ",".join(label(place) for place in as_places(at)[0])
