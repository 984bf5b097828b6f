"""Rows of tables as scenarios; columns other than an entry's fields are metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.entries import ScenarioEntry, plain, problem_of
from zarrtrace.scenarios.metadata import check_metadata_name, is_missing
from zarrtrace.scenarios.suite_file import decode_json
from zarrtrace.suggestions import closest

#: Columns that are fields of an entry.
FIELDS = ("prompt", "messages", "generation_prompt", "name", "tags", "spans", "options")
#: Rows that are taken from a table at a time.
BATCH = 256

Row = Sequence[Any]


def frame_entries(frame: Any) -> Iterator[tuple[ScenarioEntry, str]]:
    """Yield the entries of a pandas DataFrame, and which row each is.

    Levels of its index that have a name are columns, too.
    """
    named = [level for level, name in enumerate(frame.index.names) if name is not None]
    header = [frame.index.names[level] for level in named] + list(frame.columns)

    def rows() -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(frame), BATCH):
            part = frame.iloc[start : start + BATCH]
            columns = [part.index.get_level_values(level).tolist() for level in named]
            columns += [part.iloc[:, at].tolist() for at in range(len(frame.columns))]
            yield from zip(*columns, strict=True)

    return table_entries("the frame", header, numbered("", rows()))


def dataset_entries(dataset: Any) -> Iterator[tuple[ScenarioEntry, str]]:
    """Yield the entries of a ``datasets.Dataset``, and which row each is."""
    plainly = dataset.with_format(None)
    header = list(plainly.column_names)

    def rows() -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(plainly), BATCH):
            columns = plainly[start : start + BATCH]
            yield from zip(*(columns[name] for name in header), strict=True)

    return table_entries("the data set", header, numbered("", rows()))


def numbered(table: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Yield rows, each with what messages call it: its number, behind the name of its table."""
    begin = f"{table}: row" if table else "row"
    for number, row in enumerate(rows):
        yield f"{begin} {number}", row


def table_entries(
    table: str, header: Sequence[Any], rows: Iterable[tuple[str, Row]]
) -> Iterator[tuple[ScenarioEntry, str]]:
    """Make entries of a table's rows, one by one.

    Parameters
    ----------
    table
        Name of the table in messages.
    header
        Names of the columns.
    rows
        Words for a row and for its values in messages.
    """
    check_header(table, header)
    is_empty = True
    for where, row in rows:
        is_empty = False
        yield _entry(dict(zip(header, row, strict=True)), where), where
    if is_empty:
        raise ScenarioError(f"{table}: holds no scenario", remedy="Give it at least one row.")


def check_header(table: str, header: Sequence[Any]) -> None:
    """Refuse a table without prompts, or with columns that cannot be metadata."""
    if "prompt" not in header and "messages" not in header:
        _refuse_separators(table, header)
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
        elif name not in FIELDS:
            try:
                check_metadata_name(name)
            except ValueError as error:
                problem = f"cannot be metadata: {error}"
        if problem:
            raise ScenarioError(f"{table}: column {name!r} {problem}", remedy=remedy)


def _refuse_separators(table: str, header: Sequence[Any]) -> None:
    """Refuse a header of one cell that semicolons or tabs divide, as spreadsheets save them."""
    only = str(header[0]) if len(header) == 1 else ""
    for separator, named in ((";", "semicolons"), ("\t", "tabs")):
        if separator in only:
            raise ScenarioError(
                f"{table}: columns are separated by {named}, not by commas",
                why=f"Spreadsheets in some languages save CSV so: its only column is {only!r}.",
                remedy="Save the file as CSV with commas between the columns.",
            )


def _entry(row: Mapping[str, Any], where: str) -> ScenarioEntry:
    given = {name: None if is_missing(value) else plain(value) for name, value in row.items()}
    entry: dict[str, Any] = {"metadata": {k: v for k, v in given.items() if k not in FIELDS}}
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
        return decode_json(cell)
    except (ValueError, RecursionError) as error:
        raise ScenarioError(
            f"{field}: not valid JSON: {error}",
            remedy='Write spans and options as {"name": "text"}, tags as ["a", "b"] or a;b, '
            'messages as [{"role": "user", "content": "text"}].',
        ) from None
