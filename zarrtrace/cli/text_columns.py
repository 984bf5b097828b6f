"""Columns of text for a terminal: cells, widths and alignment."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from zarrtrace.text import terminal_text

if TYPE_CHECKING:
    import pandas as pd

# Characters that a text is not cut below.
_SHORTEST_TEXT = 12


def without_constants(
    table: pd.DataFrame, whole: pd.DataFrame
) -> tuple[dict[str, str], pd.DataFrame]:
    """Return the columns with one value in all rows, as text, and the table without them."""
    if len(whole) < 2:
        return {}, table
    constant = {
        str(name): _cell(whole[name].iloc[0])
        for name in table
        if name in whole and len(whole[name].drop_duplicates()) == 1
    }
    if len(constant) == len(table.columns):
        constant.pop(str(table.columns[0]))
    return constant, table.drop(columns=list(constant))


def constants_text(constants: dict[str, str]) -> str:
    """Name the columns with one value, and the values."""
    parts = (f"{terminal_text(name)} {terminal_text(value)}" for name, value in constants.items())
    return "In all rows: " + ", ".join(parts)


def drawable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of texts that are safe on one line; texts of tokens in quotes."""
    import pandas as pd

    texts = [str(name) for name in table if str(name).endswith("token_text")]
    shown = {name.removesuffix("_text"): table[name].map(repr) for name in texts}
    if "word" in table:  # most begin with a space
        shown["word"] = table["word"].map(repr)
    table = table.assign(**shown).drop(columns=texts)
    cells = {
        terminal_text(str(name)): [terminal_text(_cell(value)) for value in column]
        for name, column in table.items()
    }
    return pd.DataFrame(cells, dtype=object)


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN  # noqa: PLR0124
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _widths(cells: pd.DataFrame) -> list[int]:
    return [max(len(str(name)), *map(len, cells[name])) for name in cells]


def fits(cells: pd.DataFrame, width: int | None) -> bool:
    """Tell whether a table fits a width, None for any."""
    return width is None or sum(_widths(cells)) + 2 * (cells.shape[1] - 1) <= width


def fitted(
    cells: pd.DataFrame, extra: Sequence[str], kept: Collection[str], width: int | None
) -> tuple[pd.DataFrame, list[str]]:
    """Leave out columns until a table fits: metadata, the last ones, those `kept` at the end."""
    rest = [name for name in reversed(list(cells)) if name not in extra]
    order = [*reversed(extra), *sorted(rest, key=lambda name: name in kept)]
    left: list[str] = []
    metadata_last = [*(name for name in cells if name not in extra), *extra]
    cells = cells[metadata_last]
    for name in order:
        if fits(cells, width) or cells.shape[1] <= 2:  # a label and a value stay
            break
        cells = cells.drop(columns=name)
        left.insert(0, str(name))
    return cells, left


def aligned(cells: pd.DataFrame, width: int | None) -> list[str]:
    """Align columns, numbers to the right; cut long texts where the table is too wide."""
    columns = {str(name): [str(name), *cells[name]] for name in cells}
    if not fits(cells, width) and width is not None:
        longest = max(columns, key=lambda name: max(map(len, columns[name])))
        rest = sum(_widths(cells)) - max(map(len, columns[longest])) + 2 * (len(columns) - 1)
        room = max(_SHORTEST_TEXT, width - rest)
        columns[longest] = [
            text if len(text) <= room else text[: room - 1] + "…" for text in columns[longest]
        ]
    for name, texts in columns.items():
        size = max(map(len, texts))
        is_number = all(text == "-" or _is_number(text) for text in texts[1:])
        columns[name] = [text.rjust(size) if is_number else text.ljust(size) for text in texts]
    return ["  ".join(row).rstrip() for row in zip(*columns.values(), strict=True)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
