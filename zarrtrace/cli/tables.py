"""Results as tables: rows by effect, for a terminal of any width and for files."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from zarrtrace.cli.feature_names import Namer, labelled, no_names, shortened
from zarrtrace.suggestions import did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
from zarrtrace.cli.text_columns import (
    aligned,
    constants_text,
    drawable,
    fits,
    fitted,
    without_constants,
)

# Attributes that are printed before the table.
_FIRST = ("findings", "missing", "nonfinite")
# Rows of a terminal's table, unless --top says otherwise.
_ROWS_SHOWN = 20
# Columns that sentences take at least.
_NARROWEST = 40
# Dimensions without labels that a person would ask for.
_NUMBERS = ("row", "index", "pair")
# Columns whose order is their own; of others the largest magnitude comes first.
_ASCENDING = ("layer", "head", "feature", "rank", "position", "token_id")


class Layout(NamedTuple):
    """How an analysis' table is laid out.

    Attributes
    ----------
    sort
        Columns to sort by, of which the first that the table has counts most.
    across
        Dimension whose labels become columns; of ``"scenario"`` only if all of them fit, else
        there is the mean.
    averaged
        Whether rows are means over scenarios where `across` is another dimension.
    value
        The value that these columns hold.
    is_one
        Whether values of fewer dimensions are columns of the one table.
    kept
        Columns that a narrow terminal shows, too, as those of `sort`.
    hidden
        Columns for files only.
    filters
        Columns by which rows can be chosen: ``"layer"``, ``"feature"``.
    is_short
        Whether the table is so short that nothing is chosen or sorted.
    """

    sort: tuple[str, ...] = ()
    across: str | None = None
    averaged: bool = False
    value: str | None = None
    is_one: bool = False
    kept: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    filters: tuple[str, ...] = ("layer",)
    is_short: bool = False


_FEATURES = ("layer", "feature")
#: By command; others have the default.
LAYOUTS = {
    "attention-to": Layout(("attention",), across="scenario"),
    "feature-trajectory": Layout(
        ("activation",), across="scenario", hidden=("dictionary",), filters=_FEATURES
    ),
    "pathway-features": Layout(("score",), is_one=True, hidden=("rank",), filters=_FEATURES),
    "attention-locality": Layout(("window_share",), across="scenario"),
    "layer-bands": Layout(is_short=True),
    "critical-layers": Layout(("q", "p", "ratio"), kept=("critical",)),
    "attention-rollout": Layout(("rollout",), across="scenario"),
    "attention-flow": Layout(("flow",), across="scenario"),
    "contrast": Layout(
        ("p_familywise", "p_permutation", "hedges_g", "difference"), filters=_FEATURES
    ),
    "position-specific-features": Layout(
        ("score",), is_one=True, hidden=("rank",), filters=_FEATURES
    ),
    "word-associations": Layout(("score",), filters=_FEATURES),
    "crossreference": Layout(("p_familywise", "p_permutation", "difference")),
    "probe": Layout(("p_familywise", "p", "score"), kept=("score", "low", "high"), filters=()),
    "directions": Layout(filters=()),
    "head-roles": Layout(("induction", "previous_token"), across="role", averaged=True),
    "decision": Layout((), across="option", value="probability", is_one=True, filters=()),
    "relate": Layout(("p_permutation", "rho")),
}


class Choice(NamedTuple):
    """Which rows are wanted, and in which order.

    Attributes
    ----------
    layers
        Only these, all if None.
    features
        Only these pairs of layer and feature, all if empty.
    sort
        Column to sort by; the layout's if None.
    top
        Number of rows.
    """

    layers: tuple[int, ...] | None = None
    features: tuple[tuple[int, int], ...] = ()
    sort: str | None = None
    top: int | None = None


def rows_of(
    result: xr.DataArray | xr.Dataset, layout: Layout, choice: Choice, namer: Namer = no_names
) -> pd.DataFrame:
    """Return all rows for a file, in the order in which a terminal shows them.

    Features that `namer` names have their label in a last column, ``label``.

    Raises
    ------
    click.UsageError
        If the table lacks a column that rows are chosen or sorted by, or has no such row.
    """
    table = _Table(result, layout, choice)
    return labelled(table.long.reset_index(drop=True), namer, words=False)


def text_of(
    result: xr.DataArray | xr.Dataset, layout: Layout, choice: Choice, namer: Namer = no_names
) -> str:
    """Write a result for a terminal: the sentence that answers the question comes first."""
    width = _width()
    lines = [line for name in _FIRST for line in _sentences(result, name, width)]
    for part in [result] if layout.is_one else _parts(result):
        lines += ["", *_Table(part, layout, choice).lines(width, namer)]
    limits = _sentences(result, "limits", width)
    return "\n".join([*lines, *([""] if limits else []), *limits]).lstrip("\n")


def _sentences(result: xr.DataArray | xr.Dataset, name: str, width: int | None) -> list[str]:
    """Return the lines of an attribute that holds a sentence, or several."""
    found = result.attrs.get(name) or []
    sentences = [found] if isinstance(found, str) else [str(one) for one in found]
    return [line for one in sentences for line in _wrapped(one, width)]


def _wrapped(text: str, width: int | None) -> list[str]:
    return [text] if width is None else textwrap.wrap(text, max(width, _NARROWEST)) or [text]


def _width() -> int | None:
    """Return the columns of the terminal; None for a pipe, which takes lines of any length."""
    is_limited = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return shutil.get_terminal_size().columns if is_limited else None


def _parts(result: xr.DataArray | xr.Dataset) -> list[Any]:
    """Split a result into variables of the same dimensions, the smallest table first."""
    by_dims: dict[frozenset[Any], list[Any]] = {}
    if not hasattr(result, "data_vars"):
        return [result]
    for name, variable in result.data_vars.items():
        by_dims.setdefault(frozenset(variable.dims), []).append(name)
    parts = [result[names] for names in by_dims.values()]
    return sorted(parts, key=lambda part: max(v.size for v in part.data_vars.values()))


def _metadata_of(result: xr.Dataset) -> list[str]:
    """Name the coordinates of a result that hold metadata."""
    from zarrtrace.analysis.results import METADATA

    coords = result.coords.items()
    return [str(name) for name, one in coords if one.attrs.get("description") == METADATA]


class _Table:
    """The rows of a result, and the table that shows them.

    Attributes
    ----------
    long
        A row a combination of labels, sorted.
    shown
        The table, whose index says which row of it each row of `long` belongs to.
    """

    def __init__(self, result: Any, layout: Layout, choice: Choice) -> None:
        if not hasattr(result, "data_vars"):
            result = result.to_dataset(name=result.name or "value")
        self._result, self._layout = result, layout
        self._extra = _metadata_of(result)
        self._values = [str(name) for name in result.data_vars]
        long = _chosen(self._frame(), choice)
        self._over = long["scenario"].nunique() if "scenario" in long else 0
        shown, group = self._laid_out(long)
        sort = [name for name in layout.sort if name in shown]
        if layout.across == "option":  # the first option's probability
            sort = [str(name) for name in result.indexes[layout.across][:1]]
        order = _sorted(shown, long, sort if choice.sort is None else [choice.sort])
        order = order[: choice.top]
        self.shown = shown.loc[order]
        rank = {number: place for place, number in enumerate(order)}
        place = group[group.isin(order)].map(rank).sort_values(kind="stable")
        self.long = long.loc[place.index]
        self._place = place.to_numpy()  # of the row of `shown`
        self._limit = choice.top or _ROWS_SHOWN

    def _frame(self) -> pd.DataFrame:
        """Return a row a combination of labels, which come first; rows without a value are out."""
        frame: pd.DataFrame = self._result.to_dataframe()
        frame = frame.dropna(how="all", subset=self._values).reset_index()
        if "feature" in self._values:
            frame = frame[frame["feature"] >= 0]  # places in a ranking that no feature takes
        numbers = {*_NUMBERS} - {*self._extra} - {*self._result.coords}
        labels = [name for name in frame if name not in self._values and name not in numbers]
        if {"row", "pair"} & {*labels}:
            labels = [name for name in labels if name not in ("row", "pair")]
        return frame[[*labels, *self._values]].reset_index(drop=True)

    def _laid_out(self, long: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series[int]]:
        """Return the table, and the number of the row that shows each row of `long`."""
        across = self._layout.across
        averages = across == "scenario" or self._layout.averaged
        gone = {across} | ({"scenario", *self._extra} if averages else set())
        if across not in long or (across == "scenario" and self._over < 2):
            return long, long.index.to_series()
        fixed = [name for name in self._values if across not in self._result[name].dims]
        keys = [name for name in long if name not in self._values and name not in gone]
        keys = keys or [name for name in long if name not in self._values][:1]
        groups = long.groupby(keys, sort=False, dropna=False)
        group = groups.ngroup()
        table = long[keys].drop_duplicates().reset_index(drop=True)
        if across == "scenario":
            means = groups[self._values].mean(numeric_only=True)
            return table.join(means.reset_index(drop=True)), group
        value = self._layout.value or self._values[0]
        wide = long.assign(_group=group).pivot_table(
            value, "_group", across, aggfunc="mean", sort=False
        )
        wide = wide.reindex(columns=self._result.indexes[across])  # also those never known
        wide.columns = wide.columns.astype(str)
        rest = groups[fixed].first().reset_index(drop=True) if fixed else None
        table = table.join(wide)
        return (table if rest is None else table.join(rest)), group

    # --- drawing -------------------------------------------------------------------------------

    def lines(self, width: int | None, namer: Namer) -> list[str]:
        """Return the lines of a terminal: constants, the table, and what it leaves out."""
        if self.shown.empty:
            return ["No row has a value."]
        table = self.shown.head(self._limit).drop(columns=[*self._layout.hidden], errors="ignore")
        note, means = "", self._layout.averaged or self._layout.across == "scenario"
        if self._layout.across == "scenario" and self._over > 1:
            scenarios = self._by_scenario(table)
            if scenarios is not None and fits(drawable(scenarios), width):
                table, means = scenarios, False
            else:
                table = self._with_range(table)
        if means and self._over > 1:
            note = f"Means over {self._over} scenarios; --output FILE writes each."
        named = labelled(table, namer, words=True)
        constants, table = without_constants(table, self.shown)
        if "label" in named:
            table = table.assign(label=named["label"].map(shortened))
        cells = drawable(table)
        extra = [name for name in cells if name in self._extra]
        kept = {
            "label",
            *self._layout.sort,
            *self._layout.kept,
            *(str(name) for name in table.columns[:2]),
        }
        cells, left = fitted(cells, extra, kept, width)
        out = _wrapped(note, width) if note else []
        out += _wrapped(constants_text(constants), width) if constants else []
        out += aligned(cells, width)
        if left:
            text = f"... too narrow for {', '.join(left)}; --output FILE writes them"
            out += _wrapped(text, width)
        if len(self.shown) > len(table):
            more = len(self.shown) - len(table)
            out.append(f"... {more} more rows; --top N shows more, --output FILE writes all")
        return out

    def _by_scenario(self, table: pd.DataFrame) -> pd.DataFrame | None:
        """Return the table with a column a scenario in place of the mean."""
        if len(self._values) > 1:
            return None
        scenarios = self.long["scenario"].sort_index().unique()  # in the run's order
        wide = self.long.assign(_place=self._place).pivot_table(
            self._values[0], "_place", "scenario", aggfunc="first"
        )
        keys = table.drop(columns=self._values).reset_index(drop=True)
        return keys.join(wide.reindex(columns=scenarios))

    def _with_range(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the table with the least and the largest value of any scenario."""
        if len(self._values) > 1:
            return table
        (value,) = self._values
        groups = self.long.groupby(self._place)[value]
        least, most = (of.to_numpy()[: len(table)] for of in (groups.min(), groups.max()))
        return table.assign(min=least, max=most)


# --- rows --------------------------------------------------------------------------------------


def _chosen(long: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """Return the rows of some layers and features.

    Raises
    ------
    click.UsageError
        If the table has no such column, or no such row.
    """
    if choice.layers is not None and "layer" in long:
        long = long[long["layer"].isin(choice.layers)]
        if long.empty:
            raise click.UsageError("--layer: no row of the result is of these layers.")
    if choice.features:
        if "feature" not in long:
            raise click.UsageError("--feature: the result is not about features.")
        pairs = list(zip(long["layer"].tolist(), long["feature"].tolist(), strict=True))
        long = long[[pair in choice.features for pair in pairs]]
        if long.empty:
            named = ", ".join(f"{layer}:{feature}" for layer, feature in choice.features)
            raise click.UsageError(
                f"--feature: no row of the result is about {named}. It is not active there, or not "
                "among the strongest that --keep keeps."
            )
    return long.reset_index(drop=True)


def _sorted(shown: pd.DataFrame, long: pd.DataFrame, columns: Sequence[str]) -> list[Any]:
    """Return the index of a table, sorted by columns, of which the first counts most.

    Raises
    ------
    click.UsageError
        If there is no such column.
    """
    for column in reversed(columns):
        if column not in shown:
            extra = f" {column} differs within a row." if column in long else ""
            known = did_you_mean(column, [str(name) for name in shown], label="Columns")
            raise click.UsageError(f"--sort {column}: no such column.{extra} {known}")
        key = shown[column]
        is_ascending = (
            column in _ASCENDING or column.startswith(("p_", "q_")) or column in ("p", "q")
        )
        if key.dtype.kind in "fiu" and not is_ascending:
            key = -key.abs().astype(float)
        shown = shown.loc[key.sort_values(kind="stable", na_position="last").index]
    return shown.index.tolist()


# --- text --------------------------------------------------------------------------------------
