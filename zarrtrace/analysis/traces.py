"""Traces of a run by scenario: names, tags, options, metadata and repeats."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.repeats import (
    SCENARIO_NAME,
    beside,
    columns_of_traces,
    varies_within,
)
from zarrtrace.analysis.tables import (
    is_table,
    table_metadata,
    table_options,
    table_repeats,
    table_scenarios,
    table_tags,
)
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.format.attributes import is_trace
from zarrtrace.scenarios import name_of, typed_column

#: A trace, a whole run, or a table of samples.
Data = xr.Dataset | xr.DataTree
#: The same, or traces by scenario: who looks often looks them up once, a millisecond each.
Scenarios = Data | dict[str, xr.Dataset]

Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset)


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
    found = [trace_attributes(ds).get("options", {}) for ds in traces(data).values()]
    return {
        name: np.array([one[name]["token_id"] if name in one else -1 for one in found], np.int64)
        for name in dict.fromkeys(name for one in found for name in one)
    }


def tags(ds: xr.Dataset) -> tuple[str, ...]:
    """Return the tags of a trace's scenario."""
    return tuple(trace_attributes(ds).get("tags", ()))


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
    stored = {name: trace_attributes(ds).get("metadata", {}) for name, ds in runs.items()}
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
    return columns_of_traces(trace_attributes(ds) for ds in traces(data).values())


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


def over_repeats(result: Labelled, data: Scenarios) -> Labelled:
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
    mean: Labelled = named.groupby("scenario").mean(skipna=True)
    return mean.reindex(scenario=pd.Index(pd.unique(names[at]), dtype=object))


def scenario_of(ds: xr.Dataset) -> str:
    """Return the name of a trace: its scenario's, of one of several repeats ``NAME~3``."""
    return name_of(trace_attributes(ds))


def trace_attributes(ds: xr.Dataset) -> Mapping[str, Any]:
    """Return the attributes of a trace.

    Raises
    ------
    ConfigError
        If it is a table, or no trace.
    """
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
