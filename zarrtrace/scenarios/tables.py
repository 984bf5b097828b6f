"""Tables of scenarios: CSV, Parquet, pandas and Datasets; other columns are metadata."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile, plain, problem_of
from zarrtrace.scenarios.metadata import Value, check_metadata_name, is_missing
from zarrtrace.scenarios.suite_file import refuse_double_keys
from zarrtrace.suggestions import closest

# Columns that are fields of an entry.
_FIELDS = ("prompt", "messages", "generation_prompt", "name", "tags", "spans", "options")
# As pandas stores an index without a name.
_INDEX = re.compile(r"__index_level_\d+__")
# Text "007" is a label, not the number 7.
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[+-]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": True, "false": False}


# --- kinds of tables ---------------------------------------------------------------------------


def parse_csv(path: Path, text: str) -> tuple[SuiteFile, list[str]]:
    """Parse a CSV file with a header; returns file and line of each scenario, too.

    A column of metadata whose cells all are numbers holds numbers, one of ``true`` and ``false``
    booleans, any other text. An empty cell is a missing value.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(len(text) + 1)
    line = 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ScenarioError(
            f"{path}:{reader.line_num}: not valid CSV: {error}",
            remedy='Put text with commas, quotes or line ends in quotes: "a ""word"", a comma".',
        ) from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ScenarioError(f"{path}: is empty", remedy="Begin it with a line of column names.")
    header, *rows = rows
    header = [name.strip() for name in header]
    for row, line in zip(rows, lines[1:], strict=True):
        if len(row) != len(header):
            raise ScenarioError(
                f"{path}:{line}: {len(row)} cells, and the header has {len(header)}",
                why="A comma, quote or line end within a text splits it into cells.",
                remedy='Put such a text in quotes: "a ""word"", a comma".',
            )
    columns = [[row[at] for row in rows] for at in range(len(header))]
    typed = [
        [cell or None for cell in column] if name in _FIELDS else _typed_cells(column)
        for name, column in zip(header, columns, strict=True)
    ]
    return _entries(
        f"{path}:{lines[0]}", header, typed, lambda at: f"{path}:{lines[at + 1]}", len(rows)
    )


def parse_parquet(path: Path, content: bytes) -> tuple[SuiteFile, list[str]]:
    """Parse a Parquet file; returns file and row of each scenario, too."""
    import pyarrow as pa  # noqa: PLC0415 -- rarely needed
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.read_table(pa.BufferReader(content))
        columns = [column.to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ScenarioError(
            f"{path}: not a usable Parquet file: {error}", remedy="Write it again."
        ) from None
    kept = [at for at, name in enumerate(table.column_names) if not _INDEX.fullmatch(name)]
    return _entries(
        str(path),
        [table.column_names[at] for at in kept],
        [columns[at] for at in kept],
        lambda at: f"{path}: row {at}",
        table.num_rows,
    )


def frame_entries(frame: Any) -> tuple[SuiteFile, list[str]]:
    """Return the entries of a pandas DataFrame, and which row each is.

    Levels of its index that have a name are columns, too.
    """
    named = [level for level, name in enumerate(frame.index.names) if name is not None]
    header = [frame.index.names[level] for level in named] + list(frame.columns)
    columns = [frame.index.get_level_values(level).tolist() for level in named]
    columns += [frame.iloc[:, at].tolist() for at in range(len(frame.columns))]
    return _entries("the frame", header, columns, lambda at: f"row {at}", len(frame))


def dataset_entries(dataset: Any) -> tuple[SuiteFile, list[str]]:
    """Return the entries of a ``datasets.Dataset``, and which row each is."""
    plainly = dataset.with_format(None)
    header = list(plainly.column_names)
    columns = [list(plainly[name]) for name in header]
    return _entries("the data set", header, columns, lambda at: f"row {at}", len(dataset))


# --- entries -----------------------------------------------------------------------------------


def _entries(
    table: str,
    header: Sequence[Any],
    columns: Sequence[Sequence[Any]],
    where: Callable[[int], str],
    count: int,
) -> tuple[SuiteFile, list[str]]:
    """Make entries of a table's columns.

    Parameters
    ----------
    table
        What messages call it.
    header, columns
        Names and values.
    where
        Names a row, counted from 0.
    count
        Number of rows.
    """
    _check_header(table, header)
    if not count:
        raise ScenarioError(f"{table}: holds no scenario", remedy="Give it at least one row.")
    entries = [
        _entry(dict(zip(header, (column[at] for column in columns), strict=True)), where(at))
        for at in range(count)
    ]
    return SuiteFile(scenarios=entries), [where(at) for at in range(count)]


def _check_header(table: str, header: Sequence[Any]) -> None:
    """Refuse a table without prompts, or with columns that cannot be metadata."""
    if "prompt" not in header and "messages" not in header:
        close = closest("prompt", map(str, header))
        hint = f"Did you mean {close!r}? Rename it to 'prompt'" if close else "Name one so"
        raise ScenarioError(
            f"{table}: there is no column 'prompt'",
            why=f"The columns are: {', '.join(map(str, header[:20]))}.",
            remedy=f"{hint}; columns are separated by commas in CSV.",
        )
    for name in header:
        problem, remedy = "", "Rename the column, or leave it out."
        if list(header).count(name) > 1:
            problem = "stands twice"
        elif name == "":
            problem = "has no name"
            remedy = "If it is a frame's index, write the file with index=False, or name it."
        elif name not in _FIELDS:
            try:
                check_metadata_name(name)
            except ValueError as error:
                problem = f"cannot be metadata: {error}"
        if problem:
            raise ScenarioError(f"{table}: column {name!r} {problem}", remedy=remedy)


def _entry(row: Mapping[str, Any], where: str) -> ScenarioEntry:
    given = {name: None if is_missing(value) else plain(value) for name, value in row.items()}
    entry: dict[str, Any] = {"metadata": {k: v for k, v in given.items() if k not in _FIELDS}}
    try:
        entry |= {"prompt": given.get("prompt"), "name": given.get("name") or None}
        entry["messages"] = _messages(given.get("messages"))
        if entry["prompt"] is None and entry["messages"] is None:
            raise ScenarioError(
                f"{'prompt' if 'prompt' in given else 'messages'}: missing",
                remedy="Give every row a prompt, or messages.",
            )
        entry["generation_prompt"] = given.get("generation_prompt")
        entry["tags"] = _tags(given.get("tags"))
        entry["spans"] = _mapping("spans", given.get("spans"))
        entry["options"] = _mapping("options", given.get("options")) or None
        return ScenarioEntry.model_validate(entry)
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error.what}", remedy=error.remedy) from None
    except ValidationError as error:
        problem = problem_of(error)
        remedy = "Rename, convert or leave out the column."
        if not problem.path.startswith("metadata"):
            remedy = problem.remedy
        raise ScenarioError(f"{where}: {problem.path}: {problem.reason}", remedy=remedy) from None


def _tags(cell: Any) -> Any:
    """Return a cell of tags: a list, its JSON, or texts between commas or semicolons."""
    if cell is None:
        return []
    if not isinstance(cell, str):
        return cell
    if cell.lstrip().startswith("["):
        return _json("tags", cell)
    return [tag.strip() for tag in re.split("[,;]", cell) if tag.strip()]


def _messages(cell: Any) -> Any:
    """Return a cell of messages: a list of structs, or its JSON."""
    if isinstance(cell, str):
        return _json("messages", cell)
    if isinstance(cell, Mapping) and all(isinstance(one, list) for one in cell.values()):
        names = list(cell)  # a struct of lists, as older versions of Datasets store a list
        return [dict(zip(names, row, strict=True)) for row in zip(*cell.values(), strict=True)]
    return cell


def _mapping(field: str, cell: Any) -> Any:
    """Return a cell of spans or options: a mapping, or its JSON."""
    if cell is None:
        return {}
    if isinstance(cell, str):
        return _json(field, cell)
    if isinstance(cell, list) and all(isinstance(one, list) and len(one) == 2 for one in cell):
        cell = dict(cell)  # a map of Arrow
    return _without_missing(cell)


def _without_missing(value: Any) -> Any:
    """Leave out what a column of structs has to hold as null in rows that lack it."""
    if isinstance(value, Mapping):
        return {k: _without_missing(one) for k, one in value.items() if not is_missing(one)}
    return value


def _json(field: str, cell: str) -> Any:
    try:
        return json.loads(cell, object_pairs_hook=refuse_double_keys)
    except (ValueError, RecursionError) as error:
        raise ScenarioError(
            f"{field}: not valid JSON: {error}",
            remedy='Write spans and options as {"name": "text"}, tags as ["a", "b"] or a;b, '
            'messages as [{"role": "user", "content": "text"}].',
        ) from None


def _typed_cells(cells: Sequence[str]) -> Sequence[Value | None]:
    """Return the cells of a CSV column as its type, which no CSV file says."""
    present = [cell.strip() for cell in cells if cell.strip()]
    if not present:
        return [None] * len(cells)
    if all(cell.lower() in _BOOLEANS for cell in present):
        return [_BOOLEANS.get(cell.strip().lower()) for cell in cells]
    numbers = [cell for cell in present if cell.lower() != "nan"]
    if numbers and all(_INTEGER.fullmatch(cell) for cell in numbers):
        # Beyond these it is a label: neither 64 bits nor, beside a missing one, a float hold it.
        most = 2**63 - 1 if len(numbers) == len(cells) else 2**53
        if all(abs(int(cell)) <= most for cell in numbers):
            return [_number(cell, int) for cell in cells]
        return [cell or None for cell in cells]
    if numbers and all(_is_float(cell) for cell in numbers):
        return [_number(cell, float) for cell in cells]
    return [cell or None for cell in cells]


def _is_float(cell: str) -> bool:
    return bool(_FLOAT.fullmatch(cell)) and any(
        sign.isdigit() for sign in re.split("[eE]", cell)[0]
    )


def _number(cell: str, kind: type[int] | type[float]) -> Value | None:
    cell = cell.strip()
    return None if not cell or cell.lower() == "nan" else kind(cell)
