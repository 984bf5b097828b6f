"""Tables of samples: their scenarios, and where places are among their samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import DECISION

#: The dimension of samples.
SAMPLE = "sample"

_OPTION = "option_"


def is_table(data: Any) -> TypeGuard[xr.Dataset]:
    """Tell whether data are a table of samples."""
    return isinstance(data, xr.Dataset) and data.attrs.get("kind") == "table"


class TableScenarios(NamedTuple):
    """The scenarios of a table.

    Attributes
    ----------
    names
        In their order in the table.
    starts
        Where the samples of each begin, and the number of all samples.
    """

    names: list[str]
    starts: np.ndarray

    def of_samples(self) -> np.ndarray:
        """Return the number of each sample's scenario."""
        return np.repeat(np.arange(len(self.names)), np.diff(self.starts))


def table_scenarios(table: xr.Dataset) -> TableScenarios:
    """Return the scenarios of a table.

    Raises
    ------
    ConfigError
        If samples of a scenario are not beside each other, or there are none.
    """
    _require_coordinates(table, "scenario", "position", "span")
    if not table.sizes[SAMPLE]:
        raise ConfigError("the table has no samples", remedy="Choose some of its samples.")
    codes, names = pd.factorize(table["scenario"].to_numpy())
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    if len(starts) != len(names):
        raise ConfigError(
            f"the table's samples of scenario {names[codes[starts[len(names)]]]!r} are apart",
            why="Its samples were sorted or put together in another order.",
            remedy="Sort it: table.sortby(['scenario', 'position']).",
        )
    return TableScenarios([str(name) for name in names], np.append(starts, len(codes)))


def _require_coordinates(table: xr.Dataset, *names: str) -> None:
    for name in names:
        if name not in table.coords or table[name].dims != (SAMPLE,):
            raise ConfigError(
                f"the table has no coordinate {name!r} along {SAMPLE!r}",
                why="An operation of xarray has dropped it.",
                remedy="Select with isel or sel, which keep coordinates.",
            )


def by_scenario(table: xr.Dataset, name: str) -> np.ndarray:
    """Return a coordinate's value of each scenario: that of its first sample."""
    _require_coordinates(table, name)
    values: np.ndarray = table[name].to_numpy()[table_scenarios(table).starts[:-1]]
    return values.astype(object) if values.dtype.kind not in "biuf" else values


def table_tags(table: xr.Dataset) -> list[tuple[str, ...]]:
    """Return the tags of each scenario."""
    if "tags" not in table.coords:
        return [()] * len(table_scenarios(table).names)
    return [tuple(filter(None, str(text).split(","))) for text in by_scenario(table, "tags")]


def table_metadata(table: xr.Dataset) -> dict[str, np.ndarray]:
    """Return the columns of metadata, a value a scenario."""
    names = [name for name in table.attrs.get("metadata", ()) if name in table.coords]
    return {name: by_scenario(table, name) for name in names}


def table_options(table: xr.Dataset) -> dict[str, np.ndarray]:
    """Return the id of each option's first token, −1 where a scenario has it not."""
    named = [str(name) for name in table.coords if str(name).startswith(_OPTION)]
    kept = [name for name in named if name.removeprefix(_OPTION) in table.attrs.get("options", ())]
    return {name.removeprefix(_OPTION): by_scenario(table, name) for name in kept}


def table_spans(table: xr.Dataset) -> list[str]:
    """Return the spans of which the table has samples, ``decision`` last."""
    found: dict[str, None] = {}
    for names in pd.unique(table["span"].to_numpy()):
        found |= dict.fromkeys(filter(None, str(names).split(",")))
    named = [name for name in table.attrs.get("spans", found) if name in found]
    return [n for n in named if n != DECISION] + ([DECISION] if DECISION in named else [])


def _require_whole_span(table: xr.Dataset, name: str) -> None:
    """Refuse a span of which a table may hold some tokens only.

    Raises
    ------
    ScenarioError
    """
    asked = str(table.attrs.get("positions", "all")).split(",")
    if name == DECISION or {"all", "spans", name} & {*asked}:
        return
    raise ScenarioError(
        f"the table may lack tokens of span {name!r}",
        why=f"Its positions are: {', '.join(asked)}.",
        remedy=f"Make a table with at={name!r}, or at='spans'.",
    )


def span_rows(table: xr.Dataset, name: str) -> np.ndarray:
    """Return the samples that a span holds."""
    codes, texts = pd.factorize(table["span"].to_numpy())
    holds = np.array([name in str(names).split(",") for names in texts], bool)
    return np.flatnonzero(holds[codes])


def rows_in_table(
    table: xr.Dataset, place: str | int | Sequence[int], scenarios: TableScenarios | None = None
) -> np.ndarray:
    """Return the samples of a place, ascending; none if no scenario has the span.

    Raises
    ------
    ScenarioError
        If the table may lack tokens of the span, or a scenario has no sample at a position.
    """
    if isinstance(place, str):
        _require_whole_span(table, place)
        return span_rows(table, place)
    found = [int(place)] if isinstance(place, int | np.integer) else [int(at) for at in place]
    return _position_rows(table, found, scenarios or table_scenarios(table))


def _position_rows(
    table: xr.Dataset, positions: Sequence[int], scenarios: TableScenarios
) -> np.ndarray:
    """Return the samples at positions of each prompt, negative ones from its end.

    Raises
    ------
    ScenarioError
        If a scenario has no sample there.
    """
    of_sample, position = scenarios.of_samples(), table["position"].to_numpy()
    tokens = np.zeros(len(scenarios.names), np.int64)
    last = span_rows(table, DECISION)
    tokens[of_sample[last]] = position[last] + 1
    found = np.zeros(len(position), bool)
    for wanted in positions:
        at = tokens[of_sample] + wanted if wanted < 0 else wanted
        here = (position == at) & ((tokens[of_sample] > 0) | (wanted >= 0))
        absent = np.setdiff1d(np.arange(len(tokens)), of_sample[here])
        if len(absent):
            raise ScenarioError(
                f"{scenarios.names[absent[0]]}: the table has no sample at position {wanted}",
                why="It is not in the prompt, or was not asked for"
                + (", or the table lacks the prompt's last token." if wanted < 0 else "."),
                remedy="Give positions that the table has of each prompt.",
            )
        found |= here
    return np.flatnonzero(found)
