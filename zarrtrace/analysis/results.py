"""Results over scenarios: joined, and described by metadata, provenance and findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.findings import with_findings
from zarrtrace.analysis.gaps import attributes_by_scenario, statements
from zarrtrace.analysis.parallel import all_together
from zarrtrace.analysis.positions import span_names
from zarrtrace.analysis.repeats import CHOICE, REPEAT, SCENARIO_NAME
from zarrtrace.analysis.tables import is_table
from zarrtrace.analysis.traces import (
    Data,
    Labelled,
    independent,
    is_run,
    metadata,
    scenario_names,
    trace_attributes,
    traces,
)
from zarrtrace.errors import ScenarioError, ZarrtraceError
from zarrtrace.scenarios.metadata import free_name


def per_scenario(
    data: Data, function: Callable[[xr.Dataset], Labelled | None], dim: str = "scenario"
) -> Labelled:
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
    together: Labelled = xr.concat(
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
    data: Data, function: Callable[[xr.Dataset], Labelled | None]
) -> Iterable[Labelled | None]:
    """Call a function with each trace, several in parallel unless it only describes work."""
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
    function: Callable[[xr.Dataset], Labelled | None], ds: xr.Dataset
) -> Labelled | ZarrtraceError | None:
    """Return what a function returns, or its error: of several, the first trace's is raised."""
    try:
        result = function(ds)
        return None if result is None else result.load()
    except ZarrtraceError as error:
        return error


def _good(result: Labelled | ZarrtraceError | None) -> Labelled | None:
    if isinstance(result, ZarrtraceError):
        raise result
    return result


#: Tells coordinates that hold metadata from others.
METADATA = "metadata of the scenario"
# Dimensions of some results: such a column has another name in all, so that they can be combined.
_DIMENSIONS = frozenset(("source", "target", "role", "place", "option", "hypothesis", "band"))


def _with_metadata(result: Labelled, data: Data) -> Labelled:
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
        called = free_name(name, taken, columns)
        coords[called] = xr.Variable(scenario.dims, own, {"description": METADATA})
    return result.assign_coords(coords)


def described(
    result: Labelled, data: Data, analysis: str, method: str, /, **parameters: Any
) -> Labelled:
    """Return `result` with metadata of its scenarios, and attributes that say what it is.

    A column of metadata that is called as something else in the result gets the coordinate
    ``metadata_NAME``. ``missing`` names layers that are not stored, ``nonfinite`` those in which
    the model computed NaN, and ``findings`` answers the question, unless the result is still to
    be computed: :func:`zarrtrace.analysis.findings.with_findings`.

    Parameters
    ----------
    result
        The computed result.
    data
        The data that it was computed from.
    analysis
        Name of the function.
    method
        Definition and source, a sentence.
    parameters
        Arguments of the call; JSON values.
    """
    gaps = (
        attributes_by_scenario(data)
        if is_table(data)
        else [(name, trace_attributes(ds)) for name, ds in traces(data).items()]
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
    found = [data.attrs] if is_table(data) else map(trace_attributes, traces(data).values())
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
