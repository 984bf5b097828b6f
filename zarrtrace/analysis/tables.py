"""Tables of samples: their scenarios, and where places are among their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pandas as pd
import xarray as xr

from zarrtrace.analysis.repeats import (
    CHOICE,
    REPEAT,
    beside,
    columns_of_repeats,
)
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import DECISION, split_trace_name, trace_name

#: The dimension of samples.
SAMPLE = "sample"

_OPTION = "option_"


@dataclass(frozen=True)
class Before:
    """The token before a span's first one: where the model decides how the span begins."""

    span: str


def is_table(data: Any) -> TypeGuard[xr.Dataset]:
    """Tell whether data are a table of samples."""
    return isinstance(data, xr.Dataset) and data.attrs.get("kind") == "table"


class TableScenarios(NamedTuple):
    """The scenarios of a table; each repeat of one counts as one.

    Attributes
    ----------
    names
        In their order in the table; ``NAME~3`` for a repeat.
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
        If samples of a scenario are not consecutive, or there are none.
    """
    _require_coordinates(table, "scenario", "position", "span")
    if not table.sizes[SAMPLE]:
        raise ConfigError("the table has no samples", remedy="Choose some of its samples.")
    codes, _ = pd.factorize(table["scenario"].to_numpy())
    repeats = None
    if is_of_repeats(table, REPEAT):
        repeats = table[REPEAT].to_numpy()
        codes = pd.factorize(codes * (int(repeats.max(initial=0)) + 2) + repeats + 1)[0]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    named = [str(name) for name in table["scenario"].to_numpy()[starts]]
    if len(starts) != codes.max() + 1:
        raise ConfigError(
            f"the table's samples of scenario {named[codes.max() + 1]!r} are apart",
            why="Its samples were sorted or put together in another order.",
            remedy="Sort it: table.sortby(['scenario', 'position']).",
        )
    if repeats is not None:
        numbers = [number if number >= 0 else None for number in repeats[starts].tolist()]
        named = list(map(trace_name, named, numbers))
    return TableScenarios(named, np.append(starts, len(codes)))


def is_of_repeats(table: xr.Dataset, name: str) -> bool:
    """Tell whether a table has ``repeat`` or ``choice``, and not as a column of metadata."""
    return name in table.coords and name not in table.attrs.get("metadata", ())


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
    """Return the columns of metadata and of repeats, a value a scenario."""
    names = [name for name in table.attrs.get("metadata", ()) if name in table.coords]
    columns = {name: by_scenario(table, name) for name in names}
    return beside(columns, table_repeats(table))


def table_repeats(table: xr.Dataset) -> dict[str, np.ndarray]:
    """Return what is known of repeats, a value a repeat."""
    if not any(is_of_repeats(table, name) for name in (REPEAT, CHOICE)):
        return {}
    names = table_scenarios(table).names
    has_repeats, has_choices = (is_of_repeats(table, name) for name in (REPEAT, CHOICE))
    return columns_of_repeats(
        [split_trace_name(name)[0] for name in names],
        by_scenario(table, REPEAT).tolist() if has_repeats else [None] * len(names),
        by_scenario(table, CHOICE).tolist() if has_choices else None,
    )


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
    table: xr.Dataset,
    place: str | int | Sequence[int] | Before,
    scenarios: TableScenarios | None = None,
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
    if isinstance(place, Before):
        return _rows_before(table, place.span, scenarios or table_scenarios(table))
    found = [int(place)] if isinstance(place, int | np.integer) else [int(at) for at in place]
    return _position_rows(table, found, scenarios or table_scenarios(table))


def _rows_before(table: xr.Dataset, name: str, scenarios: TableScenarios) -> np.ndarray:
    """Return the sample before a span's first, of each scenario that has the span.

    Raises
    ------
    ScenarioError
        If the table may lack tokens of the span, or has no such sample.
    """
    _require_whole_span(table, name)
    rows, of_sample = span_rows(table, name), scenarios.of_samples()
    numbers, at = np.unique(of_sample[rows], return_index=True)
    first = rows[at]
    position = table["position"].to_numpy()
    before = first - 1
    is_there = (first > scenarios.starts[numbers]) & (position[before] == position[first] - 1)
    if not is_there.all():
        raise ScenarioError(
            f"{scenarios.names[numbers[~is_there][0]]}: the table has no sample at position "
            f"{position[first[~is_there][0]] - 1}, before span {name!r}",
            why="The token before a span is where the model decides how it begins.",
            remedy="Make a table with at='all', or look at the run of traces.",
        )
    return np.asarray(before)


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
