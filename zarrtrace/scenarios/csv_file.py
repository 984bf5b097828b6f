"""CSV files of scenarios, read as a stream; a column's cells together decide its type."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.entries import ScenarioEntry
from zarrtrace.scenarios.metadata import Value
from zarrtrace.scenarios.streams import changed_error
from zarrtrace.scenarios.suite_file import MAX_BYTES, lines_of
from zarrtrace.scenarios.tables import BATCH, FIELDS, check_header, table_entries

# Text "007" is a label, not the number 7.
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": True, "false": False}

Convert = Callable[[str], Value | None]


class CSVFile:
    """A CSV file with a header, read again and again.

    A column of metadata whose cells all are numbers holds numbers, one of ``true`` and ``false``
    booleans, any other text. An empty cell is a missing value. The first reading finds the types.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._converts: list[Convert] | None = None

    def entries(self) -> Iterator[tuple[ScenarioEntry, str]]:
        """Yield entries, each with its file and line."""
        if self._converts is None:
            self._converts = self._find_types()
        converts = self._converts
        rows = self._rows()
        where, header = next(rows)
        if len(header) != len(converts):
            raise changed_error(where)

        def typed() -> Iterator[tuple[str, Sequence[Any]]]:
            for place, row in rows:
                try:
                    cells = [convert(cell) for convert, cell in zip(converts, row, strict=True)]
                except (KeyError, ValueError):
                    raise changed_error(place) from None
                yield place, cells

        yield from table_entries(where, header, typed())

    def columns(self) -> dict[str, list[Value | None]]:
        """Read the columns of a file that need not hold prompts."""
        converts = self._find_types(is_suite=False)
        rows = self._rows()
        _, header = next(rows)
        columns: dict[str, list[Value | None]] = {name: [] for name in header}
        for _, row in rows:
            for (_, values), convert, cell in zip(columns.items(), converts, row, strict=True):
                values.append(convert(cell))
        return columns

    def _find_types(self, *, is_suite: bool = True) -> list[Convert]:
        rows = self._rows()
        where, header = next(rows)
        if is_suite:
            check_header(where, header)
        elif len({*header}) < len(header):
            raise ScenarioError(f"{where}: two columns have one name", remedy="Rename one.")
        fields = FIELDS if is_suite else ()
        columns = [None if name in fields else _Cells() for name in header]
        for _, row in rows:
            for column, cell in zip(columns, row, strict=True):
                if column is not None:
                    column.add(cell)
        return [_text if column is None else column.convert() for column in columns]

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the header and the rows, each with its file and line."""
        width = None
        for line, row in self._numbered_rows():
            where = f"{self._path}:{line}"
            if width is None:
                width = len(row)
                yield where, [name.strip() for name in row]
                continue
            if len(row) != width:
                raise ScenarioError(
                    f"{where}: {len(row)} cells, and the header has {width}",
                    why="A comma, quote or line end within a text splits it into cells.",
                    remedy='Put such a text in quotes: "a ""word"", a comma".',
                )
            yield where, row
        if width is None:
            raise ScenarioError(
                f"{self._path}: is empty", remedy="Begin it with a line of column names."
            )

    def _numbered_rows(self) -> Iterator[tuple[int, list[str]]]:
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(lines_of(self._path, file), strict=True)
            while batch := self._next_rows(reader):
                yield from batch

    def _next_rows(self, reader: Any) -> list[tuple[int, list[str]]]:
        """Return the next rows that are not empty, each with the line where it begins."""
        rows: list[tuple[int, list[str]]] = []
        limit = csv.field_size_limit(MAX_BYTES)  # of all readers in the process: put back below
        try:
            line = reader.line_num + 1
            while len(rows) < BATCH and (row := next(reader, None)) is not None:
                if row:
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ScenarioError(
                f"{self._path}:{reader.line_num}: not valid CSV: {error}",
                remedy='Put text with commas, quotes or line ends in quotes: "a ""word"", a '
                'comma".',
            ) from None
        finally:
            csv.field_size_limit(limit)
        return rows


class _Cells:
    """The cells of a column, met one by one, and the types that all of them fit."""

    def __init__(self) -> None:
        self._is_boolean = self._is_whole = self._is_number = True
        self._has_values = self._has_numbers = self._has_gaps = False
        self._is_exact = True  # floats hold all whole numbers

    def add(self, cell: str) -> None:
        if not (self._is_boolean or self._is_number):
            return  # text
        cell = cell.strip().lower()
        if not cell:
            self._has_gaps = True
            return
        self._has_values = True
        self._is_boolean = self._is_boolean and cell in _BOOLEANS
        if cell == "nan":
            self._has_gaps = True
            return
        self._has_numbers = True
        if _INTEGER.fullmatch(cell):
            # Beyond 64 bits it is a label: rounded, two of them could become equal.
            self._is_number = self._is_number and len(cell) <= 20 and -(2**63) <= int(cell) < 2**63
            self._is_exact = self._is_exact and self._is_number and int(float(cell)) == int(cell)
            return
        self._is_whole = False
        self._is_number = self._is_number and _is_float(cell)

    def convert(self) -> Convert:
        """Return the function that turns a cell into a value of the column's type."""
        if not self._has_values:
            return _missing
        if self._is_boolean:
            return _boolean
        if not self._has_numbers or not self._is_number:
            return _text
        # Beside a fraction or a missing number all of them are floats.
        if not self._is_exact and (self._has_gaps or not self._is_whole):
            return _text
        return _whole if self._is_whole else _float


def _missing(cell: str) -> None:
    if cell.strip():
        raise ValueError(cell)


def _text(cell: str) -> str | None:
    return cell or None


def _boolean(cell: str) -> bool | None:
    cell = cell.strip().lower()
    return _BOOLEANS[cell] if cell else None


def _whole(cell: str) -> int | None:
    cell = cell.strip()
    return None if not cell or cell.lower() == "nan" else int(cell)


def _float(cell: str) -> float | None:
    cell = cell.strip()
    return None if not cell or cell.lower() == "nan" else float(cell)


def _is_float(cell: str) -> bool:
    return bool(_FLOAT.fullmatch(cell)) and any(sign.isdigit() for sign in cell.partition("e")[0])
