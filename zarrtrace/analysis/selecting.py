"""What the analyses share: traces of a run, places in a prompt, results over scenarios."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.findings import with_findings
from zarrtrace.analysis.gaps import attributes_by_scenario, statements
from zarrtrace.analysis.parallel import all_together
from zarrtrace.analysis.repeats import (
    CHOICE,
    REPEAT,
    SCENARIO_NAME,
    beside,
    columns_of_traces,
    varies_within,
)
from zarrtrace.analysis.tables import (
    Before,
    is_table,
    table_metadata,
    table_options,
    table_repeats,
    table_scenarios,
    table_spans,
    table_tags,
)
from zarrtrace.errors import ConfigError, ScenarioError, ZarrtraceError
from zarrtrace.format.attributes import is_trace
from zarrtrace.scenarios import DECISION, name_of, span, typed_column
from zarrtrace.suggestions import did_you_mean

#: A trace, a whole run, or a table of samples.
Data = xr.Dataset | xr.DataTree
#: The same, or traces by scenario: who looks often looks them up once, a millisecond each.
Scenarios = Data | dict[str, xr.Dataset]
#: A span's name, a token position (negative from the end), several positions, or where a span is
#: decided.
Place = str | int | Sequence[int] | Before

_Labelled = TypeVar("_Labelled", xr.DataArray, xr.Dataset)

_WHY_ABSENT = {
    "attention": "It was extracted with --no-attention (features only).",
    "attention_mean": "It was extracted with --no-attention (features only).",
    "features": "It was extracted with --no-features (attention only).",
    "top_feature": "It was extracted with --no-features (attention only).",
    "top_activation": "It was extracted with --no-features (attention only).",
    "next_token": "It was imported from NPZ files, which do not hold next-token probabilities.",
    "next_token_logprob": "It was imported from NPZ files, which do not hold next-token "
    "probabilities.",
}


# --- traces ------------------------------------------------------------------------------------


def traces(data: Scenarios) -> dict[str, xr.Dataset]:
    """Return the traces of a run by name, in the run's order; a trace is a run of one.

    The name is the scenario's, of one of several repeats ``NAME~3``.

    Parameters
    ----------
    data
        A trace (Dataset, or a DataTree node that holds one), a run (DataTree), or what this
        function returned.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if isinstance(data, dict):
        return data
    if isinstance(data, xr.Dataset):
        return {scenario_of(data): data}
    if data.attrs.get("kind") == "trace":
        return traces(data.to_dataset())
    children = {name: child.to_dataset() for name, child in data.children.items()}
    order = [name for name in data.attrs.get("scenarios", ()) if name in children]
    found = {
        name: children[name]
        for name in dict.fromkeys([*order, *children])
        if is_trace(children[name].attrs)
    }
    if not found:
        raise ConfigError(
            "this DataTree holds no traces",
            why="Its children lack the attributes of a trace.",
            remedy="Give what zarrtrace.open_run or zarrtrace.open_trace returned.",
        )
    return found


def is_run(data: Data) -> bool:
    """Tell whether `data` has many scenarios: a run or a table, not a single trace."""
    return is_table(data) or (isinstance(data, xr.DataTree) and data.attrs.get("kind") != "trace")


def scenario_names(data: Scenarios) -> list[str]:
    """Return the names of the scenarios, in order."""
    return table_scenarios(data).names if is_table(data) else list(traces(data))


def scenario_tags(data: Scenarios) -> dict[str, tuple[str, ...]]:
    """Return the tags of each scenario."""
    if is_table(data):
        return dict(zip(scenario_names(data), table_tags(data), strict=True))
    return {name: tags(ds) for name, ds in traces(data).items()}


def options(data: Scenarios) -> dict[str, np.ndarray]:
    """Return the id of each option's first token by scenario, −1 where it has not the option."""
    if is_table(data):
        return table_options(data)
    found = [_attributes(ds).get("options", {}) for ds in traces(data).values()]
    return {
        name: np.array([one[name]["token_id"] if name in one else -1 for one in found], np.int64)
        for name in dict.fromkeys(name for one in found for name in one)
    }


def tags(ds: xr.Dataset) -> tuple[str, ...]:
    """Return the tags of a trace's scenario."""
    return tuple(_attributes(ds).get("tags", ()))


def metadata(data: Scenarios) -> dict[str, np.ndarray]:
    """Return the columns that scenarios may be grouped by, in the run's order.

    They are the columns of metadata, and those of generated text: ``choice`` and, of a run with
    repeats, ``repeat`` and ``scenario_name``; a column of metadata that is called as one of these
    becomes ``metadata_NAME``. A missing text is empty, a missing number NaN. A column whose values
    do not fit one type, as only traces put together by hand have one, is left out with a warning.
    """
    if is_table(data):
        return table_metadata(data)
    return beside(stored_metadata(data), repeats(data))


def stored_metadata(data: Mapping[str, xr.Dataset] | Data) -> dict[str, np.ndarray]:
    """Return the columns of metadata alone, of a run or a trace."""
    runs = traces(data)  # type: ignore[arg-type]
    stored = {name: _attributes(ds).get("metadata", {}) for name, ds in runs.items()}
    columns: dict[str, np.ndarray] = {}
    for column in dict.fromkeys(column for values in stored.values() for column in values):
        try:
            typed = typed_column(column, {name: stored[name].get(column) for name in runs})
        except ScenarioError as error:
            warnings.warn(f"{error.what}: it is left out", stacklevel=2)
            continue
        values = list(typed.values())
        columns[column] = np.array(values, object if isinstance(values[0], str) else None)
    return columns


def repeats(data: Scenarios) -> dict[str, np.ndarray]:
    """Return ``scenario_name``, ``repeat`` and ``choice`` of each trace, those that there are."""
    if is_table(data):
        return table_repeats(data)
    return columns_of_traces(_attributes(ds) for ds in traces(data).values())


def independent(data: Scenarios) -> np.ndarray:
    """Return the name of each trace's scenario: repeats of one are not independent."""
    columns = repeats(data)
    return columns.get(SCENARIO_NAME, np.array(scenario_names(data), object))


def require_whole_scenarios(data: Scenarios, values: np.ndarray, name: str) -> None:
    """Refuse a column that parts the repeats of a scenario, where these belong together.

    Raises
    ------
    ConfigError
    """
    names = independent(data)
    if varies_within(values, names):
        raise ConfigError(
            f"repeats of a scenario differ in {name!r}",
            why="Repeats of one prompt are not independent: they belong into one block.",
            remedy="Give a column with one value a scenario.",
        )


def over_repeats(result: _Labelled, data: Scenarios) -> _Labelled:
    """Average a result by scenario over the repeats of each, which are no further scenarios.

    Tests and intervals take scenarios for independent; repeats of one share its prompt.

    Parameters
    ----------
    result
        Along ``scenario``.
    data
        The run that it is of.

    Returns
    -------
    xr.DataArray or xr.Dataset
        With the names of scenarios as ``scenario``, in the order of the run; unchanged if the run
        has no repeats. Means are over the repeats that have a value.
    """
    if SCENARIO_NAME not in repeats(data):
        return result
    names = independent(data)
    at = pd.Index(scenario_names(data)).get_indexer(pd.Index(result["scenario"].values))
    bare = result.drop_vars([n for n, c in result.coords.items() if "scenario" in c.dims])
    named = bare.assign_coords(scenario=names[at])
    mean: _Labelled = named.groupby("scenario").mean(skipna=True)
    return mean.reindex(scenario=pd.Index(pd.unique(names[at]), dtype=object))


def scenario_of(ds: xr.Dataset) -> str:
    """Return the name of a trace: its scenario's, of one of several repeats ``NAME~3``."""
    return name_of(_attributes(ds))


def _attributes(ds: xr.Dataset) -> Mapping[str, Any]:
    if is_table(ds):
        raise ConfigError(
            "a table has no attention",
            why="It holds samples, one a position of a prompt; attention is a matrix a prompt.",
            remedy="Give the run of traces that zarrtrace.open_run returns.",
        )
    if not is_trace(ds.attrs):
        raise ConfigError(
            "this Dataset is not a trace",
            why="It lacks the attributes 'kind', 'scenario' and 'spans'; some xarray operations "
            "drop attributes.",
            remedy="Give what zarrtrace.open_trace returned, or select with isel/sel, which keep "
            "them.",
        )
    return ds.attrs


def require(ds: xr.Dataset, *names: str) -> None:
    """Refuse a trace, or a table, that lacks one of the arrays `names`.

    Raises
    ------
    ConfigError
        Naming the scenario, the array, and why a trace has none.
    """
    for name in names:
        if name not in ds:
            here = "the table" if is_table(ds) else f"{scenario_of(ds)}: the trace"
            raise ConfigError(
                f"{here} has no {name!r}",
                why=_WHY_ABSENT.get(name, "It was not extracted with it."),
                remedy=f"It has: {', '.join(map(str, ds.data_vars)) or 'no arrays'}. Extract the "
                "scenario again with what is missing.",
            )


# --- places ------------------------------------------------------------------------------------


def has_span(ds: xr.Dataset, name: str) -> bool:
    """Tell whether a trace has the span `name`."""
    return name in _attributes(ds)["spans"]


def span_names(data: Scenarios) -> list[str]:
    """Return the spans of any scenario, in order of first use, ``decision`` last."""
    if is_table(data):
        return table_spans(data)
    found = dict.fromkeys(n for ds in traces(data).values() for n in _attributes(ds)["spans"])
    return [n for n in found if n != DECISION] + ([DECISION] if DECISION in found else [])


def spans_before(data: Scenarios, targets: Sequence[Place]) -> list[str]:
    """Return the spans that targets can attend to, without the decision.

    Spans of generated text are none of them where all targets are in the prompt.
    """
    runs = traces(data).values()
    names = [name for name in span_names(data) if name != DECISION]
    return [name for name in names if any(_is_before(ds, name, targets) for ds in runs)]


def _is_before(ds: xr.Dataset, name: str, targets: Sequence[Place]) -> bool:
    if not has_span(ds, name):
        return False
    first = min(span(ds, name), default=0)
    generation = ds.attrs.get("generation")
    if generation is None or first < generation["prompt_tokens"]:
        return True
    return any(max(positions(ds, target)) >= first for target in present(ds, targets))


def positions(ds: xr.Dataset, place: Place) -> list[int]:
    """Return the token positions (labels of ``key``) of a place.

    Not each of them need be stored: :func:`stored_positions`, :func:`require_queries`.

    Parameters
    ----------
    ds
        A trace, or a part of one.
    place
        A span's name, a position (negative from the end), or several.

    Raises
    ------
    ScenarioError
        If the trace has no such span or no such position.
    """
    if isinstance(place, str):
        _attributes(ds)
        found = span(ds, place)
    elif isinstance(place, Before):
        found = [span(ds, place.span)[0] - 1]
    else:
        tokens = token_labels(ds)
        given = [int(place)] if isinstance(place, int | np.integer) else [int(i) for i in place]
        found = [int(tokens[i]) if -len(tokens) <= i < 0 else i for i in given]
    have = set(token_labels(ds).tolist())
    outside = [position for position in found if position not in have]
    if outside or not found:
        raise ScenarioError(
            f"{scenario_of(ds)}: {label(place)!r} covers "
            + (f"token {outside[0]}, which is not there" if outside else "no token"),
            why=f"The trace has {len(have)} tokens, positions {min(have)} to {max(have)}."
            if have
            else "The trace has no tokens.",
            remedy="Give a span or positions of these tokens.",
        )
    return found


def stored_positions(ds: xr.Dataset, place: Place) -> list[int]:
    """Return the token positions (labels of ``query``) of a place, all of which are stored.

    Raises
    ------
    ConfigError
        If one of them is not stored: the scenario was extracted with chosen positions.
    ScenarioError
        As :func:`positions`.
    """
    found = positions(ds, place)
    absent = sorted(set(found) - set(query_labels(ds).tolist()))
    if absent:
        raise not_stored(ds, "token", absent)
    return found


def query_labels(ds: xr.Dataset) -> np.ndarray:
    """Return the token positions that a trace (or a part of one) stores."""
    return np.asarray(ds["query"].values)


def token_labels(ds: xr.Dataset) -> np.ndarray:
    """Return the token positions that a trace (or a part of one) has as keys: the prompt's."""
    return np.asarray(ds["key"].values)


def not_stored(ds: xr.Dataset, what: str, absent: list[int]) -> ConfigError:
    """Return the error that a trace does not store something at token positions."""
    others = f" (nor of {len(absent) - 1} others)" if len(absent) > 1 else ""
    return ConfigError(
        f"{scenario_of(ds)}: {what} {absent[0]} is not stored{others}",
        why="The scenario was extracted with chosen positions (--positions or "
        "--attention-positions), or this is a part of a trace.",
        remedy="Choose among the stored positions, or extract the scenario with more of them.",
    )


def label(place: Place) -> str:
    """Return what a place is called in results."""
    if isinstance(place, str):
        return place
    if isinstance(place, Before):
        return f"before {place.span}"
    if isinstance(place, int | np.integer):
        return str(int(place))
    return ",".join(str(int(i)) for i in place)


def as_places(given: Place | Sequence[Place]) -> tuple[list[Place], bool]:
    """Return the places `given`, and whether they were a list of places.

    Several integers are one place; a sequence with a name in it is several.
    """
    if isinstance(given, str | int | np.integer | Before):
        return [given], False
    whole = [item for item in given if isinstance(item, int | np.integer)]
    if whole and len(whole) == len(given):
        return [[int(item) for item in whole]], False
    return list(given), True


def present(ds: xr.Dataset, places: Iterable[Place]) -> list[Place]:
    """Return those of `places` that a trace has: only span names can be absent."""
    return [place for place in places if (name := _span_of(place)) is None or has_span(ds, name)]


def _span_of(place: Place) -> str | None:
    """Return the span that a place is given by."""
    return place.span if isinstance(place, Before) else place if isinstance(place, str) else None


def require_places(data: Scenarios, places: Iterable[Place]) -> None:
    """Refuse a span that no scenario has.

    Raises
    ------
    ScenarioError
        Naming the span and those that exist.
    """
    known = span_names(data)
    for name in map(_span_of, places):
        if name is not None and name not in known:
            raise ScenarioError(
                f"no scenario has a span {name!r}",
                why="Spans are named in the scenarios file.",
                remedy=did_you_mean(name, known),
            )


# --- attention ---------------------------------------------------------------------------------


def attention(ds: xr.Dataset, heads: Literal["mean", "each"]) -> xr.DataArray:
    """Return a trace's attention ``(layer[, head], query, key)``, without token texts, unloaded.

    Parameters
    ----------
    ds
        A trace.
    heads
        ``"mean"`` takes the stored mean over heads, a fraction of the reading.

    Raises
    ------
    ConfigError
        If the trace has no attention, or `heads` is something else.
    """
    if heads not in ("mean", "each"):
        raise ConfigError(f"heads={heads!r} is neither 'mean' nor 'each'", remedy="Give one.")
    name = "attention_mean" if heads == "mean" else "attention"
    require(ds, name)
    # Attention has dimensions of its own where it has fewer layers or rows than features.
    own = {"attention_layer": "layer", "attention_query": "query"}
    out = ds[name].reset_coords(drop=True)
    return out.rename({dim: common for dim, common in own.items() if dim in out.dims})


def taken(array: xr.DataArray, **labels: Sequence[int] | np.ndarray) -> xr.DataArray:
    """Return an array at some labels of its dimensions, reading no others but those between.

    A list of labels alone would make dask read whole blocks before it chooses among them; slices
    go down to the reading, unless something else uses the same blocks: take all that is needed of
    an array at once.
    """
    places = {}
    for dim, wanted in labels.items():
        at = array.indexes[dim].get_indexer(np.asarray(wanted))
        if (at < 0).any():
            raise KeyError(f"{dim} {np.asarray(wanted)[at < 0][0]}")
        places[dim] = at
    between = {dim: slice(at.min(), at.max() + 1) for dim, at in places.items() if len(at)}
    array = array.isel(between)
    for dim, at in places.items():
        if len(at) != array.sizes[dim] or (np.diff(at) != 1).any():
            array = array.isel({dim: at - at.min() if len(at) else at})
    return array


def stored_queries(ds: xr.Dataset) -> np.ndarray:
    """Return the positions whose rows of attention are stored."""
    dim = "attention_query" if "attention_query" in ds.dims else "query"
    return np.asarray(ds[dim].values)


def require_queries(ds: xr.Dataset, wanted: Iterable[int]) -> None:
    """Refuse rows of attention that were not stored.

    Raises
    ------
    ConfigError
        Naming the scenario and a row.
    """
    absent = sorted(set(wanted) - set(stored_queries(ds).tolist()))
    if absent:
        raise not_stored(ds, "attention of token", absent)


def whole(array: xr.DataArray, *dims: str) -> xr.DataArray:
    """Let dask blocks span `dims`, which one step of the computation needs whole."""
    return array if array.chunks is None else array.chunk(dict.fromkeys(dims, -1))


# --- results -----------------------------------------------------------------------------------


def per_scenario(
    data: Data, function: Callable[[xr.Dataset], _Labelled | None], dim: str = "scenario"
) -> _Labelled:
    """Apply `function` to every trace and put the results side by side.

    Parameters
    ----------
    data
        A run, or a trace: its result has `dim` as a scalar coordinate only.
    function
        Takes a trace; returns None where the scenario has nothing to say (a span is absent).
        A run that is not on dask has it called in tasks of dask's scheduler, which may be another
        process: it is to be found by name there, and to hold no more than it needs.
    dim
        Name of the new dimension.

    Returns
    -------
    xr.DataArray or xr.Dataset
        Results along `dim`; what a scenario lacks (layers, tokens, spans) is NaN.

    Raises
    ------
    ScenarioError
        If no scenario has anything to say.
    """
    results = dict(zip(traces(data), _results(data, function), strict=True))
    found = {name: result for name, result in results.items() if result is not None}
    if not found:
        raise ScenarioError(
            f"none of the {len(results)} scenarios has what was asked for",
            remedy=f"Spans there are: {', '.join(span_names(data))}.",
        )
    if not is_run(data):
        name, result = next(iter(found.items()))
        return result.assign_coords({dim: name})
    # Text as objects: what pandas makes of it by default depends on its version.
    index = pd.Index(list(found), dtype=object, name=dim)
    together: _Labelled = xr.concat(
        [result.drop_vars(dim, errors="ignore") for result in found.values()],
        dim=index,
        join="outer",
        # Token texts differ between scenarios: they get the new dimension too.
        coords="different",
        compat="equals",
        combine_attrs="drop_conflicts",
    )
    return together.reindex({dim: pd.Index(list(results), dtype=object)})


def _results(
    data: Data, function: Callable[[xr.Dataset], _Labelled | None]
) -> Iterable[_Labelled | None]:
    """Call a function with each trace, several beside each other unless it only describes work."""
    found = traces(data).values()
    lazy = any(array.chunks for ds in found for array in ds.values())
    if lazy or not is_run(data):
        return map(function, found)
    _fill_indexes(found)
    results = all_together(partial(_loaded, function, ds) for ds in found)
    return map(_good, results)


def _fill_indexes(found: Iterable[xr.Dataset]) -> None:
    """Have the indexes that traces share look something up, before several threads use them.

    They number their labels when they are first asked; in pandas 2 another thread may then see that
    half done, and miss labels that are there.
    """
    indexes = {id(index): index for ds in found for index in ds.indexes.values()}
    for index in indexes.values():
        if index.is_unique:
            index.get_indexer(index[:1])


def _loaded(
    function: Callable[[xr.Dataset], _Labelled | None], ds: xr.Dataset
) -> _Labelled | ZarrtraceError | None:
    """Return what a function returns, or its error: of several, the first trace's is raised."""
    try:
        result = function(ds)
        return None if result is None else result.load()
    except ZarrtraceError as error:
        return error


def _good(result: _Labelled | ZarrtraceError | None) -> _Labelled | None:
    if isinstance(result, ZarrtraceError):
        raise result
    return result


#: Tells coordinates that hold metadata from others.
METADATA = "metadata of the scenario"
# Dimensions of some results: such a column has another name in all, so that they can be combined.
_DIMENSIONS = frozenset(("source", "target", "role", "place", "option", "hypothesis", "band"))


def _with_metadata(result: _Labelled, data: Data) -> _Labelled:
    """Add the columns of metadata as coordinates along ``scenario``, where a result has that."""
    if "scenario" not in result.coords:
        return result
    scenario = result["scenario"]
    columns = metadata(data)
    wanted = pd.Index(np.atleast_1d(scenario.values))
    at = pd.Index(scenario_names(data)).get_indexer(wanted)
    if (at < 0).any():  # means over repeats: by scenario
        names, first = np.unique(independent(data).astype(str), return_index=True)
        at = first[pd.Index(names).get_indexer(wanted)]
        of_repeats = (REPEAT, CHOICE, SCENARIO_NAME)
        columns = {name: one for name, one in columns.items() if name not in of_repeats}
    taken = {*_DIMENSIONS, *result.dims, *result.coords}
    taken |= {result.name} if isinstance(result, xr.DataArray) else {*result.data_vars}
    coords = {}
    for name, values in columns.items():
        own = values[at] if scenario.ndim else values[at[0]]
        called = name
        while called in taken or (called != name and called in columns):
            called = f"metadata_{called}"
        coords[called] = xr.Variable(scenario.dims, own, {"description": METADATA})
    return result.assign_coords(coords)


def described(
    result: _Labelled, data: Data, analysis: str, method: str, /, **parameters: Any
) -> _Labelled:
    """Return `result` with metadata of its scenarios, and attributes that say what it is.

    A column of metadata that is called as something else in the result gets the coordinate
    ``metadata_NAME``. ``missing`` names layers that are not stored, ``nonfinite`` those in which
    the model computed NaN, and ``findings`` answers the question, unless the result is still to
    be computed: :func:`zarrtrace.analysis.findings.with_findings`.

    Parameters
    ----------
    result
        What was computed.
    data
        What it was computed from.
    analysis
        Name of the function.
    method
        Definition and source, a sentence.
    parameters
        What it was called with; JSON values.
    """
    gaps = (
        attributes_by_scenario(data)
        if is_table(data)
        else [(name, _attributes(ds)) for name, ds in traces(data).items()]
    )
    attributes = {
        "analysis": analysis,
        "method": method,
        "parameters": json.dumps(parameters, default=_plain),
        **provenance(data),
        **statements(gaps),
    }
    return with_findings(_with_metadata(result, data).assign_attrs(attributes))


def provenance(data: Data) -> dict[str, str]:
    """Return model, SAE release and versions that a result came from, as text."""
    models: dict[str, None] = {}
    releases: dict[str, None] = {}
    versions: dict[str, None] = {}
    found = [data.attrs] if is_table(data) else map(_attributes, traces(data).values())
    for attributes in found:
        if attributes.get("model"):
            models[str(attributes["model"]["id"])] = None
        saes = attributes.get("saes", {}).values()
        releases |= {str(sae["release"]): None for sae in saes if sae["release"]}
        versions |= {
            str(v): None for k, v in attributes.get("versions", {}).items() if k == "zarrtrace"
        }
    named = {"model": models, "sae_release": releases, "zarrtrace_version": versions}
    return {key: ", ".join(values) for key, values in named.items() if values}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else list(value)
