"""Suites: scenarios from files, tables and Python, with unique names and typed metadata."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from zarrtrace.errors import ScenarioError, readable
from zarrtrace.scenarios.arrow_files import (
    arrow_columns,
    arrow_entries,
    folder_files,
    is_dataset_folder,
)
from zarrtrace.scenarios.csv_file import CSVFile
from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile, checked_entry
from zarrtrace.scenarios.metadata import RESERVED, Column, Value, plain_value
from zarrtrace.scenarios.names import check_name, default_name, label
from zarrtrace.scenarios.scenario import Scenario, assembled, changed
from zarrtrace.scenarios.streams import Draft, ScenarioStream, Source, changed_error, placed
from zarrtrace.scenarios.suite_file import MAX_BYTES, parse_yaml, read_jsonl
from zarrtrace.scenarios.tables import dataset_entries, frame_entries
from zarrtrace.scenarios.templates import render_template, text_of, value_names

_TEXT_FILES = (".yaml", ".yml", ".jsonl", ".csv")
_ENDINGS = (*_TEXT_FILES, ".parquet")
_GIVE_A_FILE = "Give a YAML, JSONL, CSV or Parquet file, or the folder of a data set."

_TABLES = {"pandas.DataFrame": frame_entries, "datasets.Dataset": dataset_entries}
# For entries that share nothing.
_PLAIN = SuiteFile.model_construct(scenarios=[])

Entries = Iterator[tuple[ScenarioEntry, str]]


def load_suite(path: str | Path) -> tuple[Scenario, ...]:
    """Read scenarios from a YAML, JSONL, CSV or Parquet file, or from a data set's folder.

    Parameters
    ----------
    path
        YAML (``.yaml``, ``.yml``) holds a list under ``scenarios``, JSONL one such entry a line.
        CSV and Parquet have columns ``prompt`` or ``messages``, ``name``, ``tags``, ``spans``,
        ``options`` and ``generation_prompt``; all others are metadata. A folder holds one split:
        what ``Dataset.save_to_disk`` wrote, or Parquet files.

    Raises
    ------
    ScenarioError
        If the file cannot be read or is not valid; the message names file, line and reason.
    """
    return tuple(_file_stream(Path(path)))


def as_scenarios(given: Any) -> tuple[Scenario, ...]:
    """Return the scenarios of whatever a user may give as such.

    Parameters
    ----------
    given
        Argument of :func:`stream`.

    Returns
    -------
    tuple of Scenario
        With unique names (``scenario_0``, … by its place where none was given), and with metadata
        of the same columns and types in all of them.

    Raises
    ------
    ScenarioError
        If it is something else, or a scenario is not valid; the message names it.
    """
    return tuple(stream(given))


def stream(given: Any) -> ScenarioStream:
    """Return the scenarios of whatever a user may give as such, one by one.

    Files but YAML, folders, frames and data sets are read row by row, as often as the stream is
    used: 100,000 prompts take no more memory than 1,000.

    Parameters
    ----------
    given
        One of:

        - a prompt, word for word. A string that names an existing file with one of the endings
          ``.yaml``, ``.yml``, ``.jsonl``, ``.csv`` and ``.parquet``, or the folder of a data set,
          is that file or folder; for a prompt that reads like this, give ``Scenario(prompt)``.
        - a :class:`Scenario`, or a mapping with the keys of an entry in a YAML file.
        - a sequence of these; strings in it are always prompts.
        - a :class:`pathlib.Path`: a file or folder, as for :func:`load_suite`.
        - a pandas DataFrame or a ``datasets.Dataset`` with the columns that CSV files have.

    Raises
    ------
    ScenarioError
        If it is something else. Wrong scenarios raise when the stream is first used.
    """
    if isinstance(given, ScenarioStream):
        return given
    if isinstance(given, os.PathLike) or (isinstance(given, str) and _is_file(given)):
        return _file_stream(Path(given))
    kind = _kind(given)
    if kind in _TABLES:
        return ScenarioStream(Source(lambda: _drafts(_TABLES[kind](given))))
    if kind.startswith("datasets."):
        raise ScenarioError(
            f"scenarios cannot be taken from a value of type {kind}",
            remedy="Give one split, as dataset['train']; of an iterable one some rows, as "
            "datasets.Dataset.from_list(list(dataset.take(100))).",
        )
    if isinstance(given, str | Scenario | Mapping):
        return _sequence_stream([given])
    if isinstance(given, bytes | Set) or not isinstance(given, Iterable):
        raise ScenarioError(
            f"scenarios cannot be taken from a value of type {type(given).__name__}",
            remedy="Give a prompt, a Scenario, a mapping, a sequence of these, a path, a pandas "
            "DataFrame or a datasets.Dataset.",
        )
    return _sequence_stream(tuple(given) if isinstance(given, Iterator) else given)


def _sequence_stream(given: Iterable[Any]) -> ScenarioStream:
    def drafts() -> Iterator[Draft]:
        place = -1
        for place, one in enumerate(given):
            yield _draft(one, place)
        if place < 0:
            raise ScenarioError("there are no scenarios", remedy="Give at least one prompt.")

    return ScenarioStream(Source(drafts))


def _file_stream(path: Path) -> ScenarioStream:
    suffix = path.suffix.lower()
    with _reading(path):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            files = folder_files(path)
            return _watched(path, files, lambda: arrow_entries(path, files))
        _refuse_odd_file(path, status, is_read_whole=suffix in (".yaml", ".yml"))
    if suffix == ".parquet":
        return _watched(path, [path], lambda: arrow_entries(path, [path]))
    if suffix == ".jsonl":
        return _watched(path, [path], lambda: read_jsonl(path))
    if suffix == ".csv":
        return _watched(path, [path], CSVFile(path).entries)
    if suffix in _TEXT_FILES:
        return _yaml_stream(path)
    raise ScenarioError(
        f"{path}: unknown kind of scenario file {suffix or '(no ending)'!r}",
        remedy="Name it .yaml (a list under 'scenarios'), .jsonl (one scenario a line), "
        ".csv or .parquet (a column 'prompt' or 'messages').",
    )


def _yaml_stream(path: Path) -> ScenarioStream:
    """Stream a YAML file, which is read whole, once."""

    @functools.cache
    def parsed() -> tuple[SuiteFile, list[str]]:
        with _reading(path):
            text = path.read_bytes().decode("utf-8-sig")
        return parse_yaml(path, text)

    def drafts() -> Iterator[Draft]:
        suite, places = parsed()
        return _drafts(zip(suite.scenarios, places, strict=True), suite)

    return ScenarioStream(Source(drafts, str(path)))


def suite_attributes(given: Any) -> dict[str, Any]:
    """Return ``bands`` and ``task_spans``, which a suite's YAML file may state for its runs.

    Parameters
    ----------
    given
        Argument of :func:`stream`.

    Raises
    ------
    ScenarioError
        If it is a YAML file that cannot be read.
    """
    if not isinstance(given, str | os.PathLike) or (isinstance(given, str) and not _is_file(given)):
        return {}
    path = Path(given)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return {}
    with _reading(path):
        suite, _ = parse_yaml(path, path.read_bytes().decode("utf-8-sig"))
    stated = {"bands": suite.bands, "task_spans": suite.task_spans}
    return {name: value for name, value in stated.items() if value is not None}


def _watched(path: Path, files: Sequence[Path], read: Callable[[], Entries]) -> ScenarioStream:
    """Stream files that are read again and again, and refused as soon as one has changed."""
    first: list[tuple[int, int]] = []

    def drafts() -> Iterator[Draft]:
        with _reading(path):
            now = [(one.st_size, one.st_mtime_ns) for one in map(os.stat, files)]
            if first and first != now:
                raise changed_error(str(path))
            first[:] = now
            yield from _drafts(read())

    return ScenarioStream(Source(drafts, str(path)))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise what an operating system says of a file, or of its text, as our errors."""
    try:
        yield
    except FileNotFoundError:
        raise ScenarioError(f"{path}: no such scenario file", remedy=_GIVE_A_FILE) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ScenarioError):
            raise
        raise ScenarioError(
            f"{path}: cannot be read as UTF-8 text ({error})",
            remedy="Save the file as UTF-8 and check its permissions.",
        ) from error


def read_columns(path: str | Path) -> dict[str, list[Value]]:
    """Read a CSV or Parquet file as columns of metadata, which need not stand beside prompts.

    Raises
    ------
    ScenarioError
        If it cannot be read, or a column is none of metadata.
    """
    path = Path(path)
    with _reading(path):
        if path.suffix.lower() == ".csv":
            found: Mapping[str, Sequence[Any]] = CSVFile(path).columns()
        elif path.suffix.lower() == ".parquet":
            found = arrow_columns(path)
        else:
            raise ScenarioError(
                f"{path}: is neither .csv nor .parquet", remedy="Give a CSV or Parquet file."
            )
    columns = {}
    for name, values in found.items():
        column = Column(name)
        try:
            plainly = [plain_value(value) for value in values]
            for row, value in enumerate(plainly):
                column.add(f"row {row}", value)
            column.settle()
        except ValueError as error:
            reason = error.what if isinstance(error, ScenarioError) else f"{name}: {error}"
            raise ScenarioError(
                f"{path}: {reason}", remedy="Rename, convert or leave out the column."
            ) from None
        columns[name] = [column.typed(value) for value in plainly]
    return columns


def _kind(given: Any) -> str:
    """Name the class of a frame or data set without importing what it comes from."""
    classes = [f"{one.__module__.partition('.')[0]}.{one.__name__}" for one in type(given).__mro__]
    known = [one for one in classes if one in _TABLES]
    return known[0] if known else classes[0]


def _is_file(text: str) -> bool:
    """Whether a string names a file or folder of scenarios; what looks like a wrong one fails."""
    if "\n" in text or len(text) > 4096 or "\0" in text:
        return False
    path = Path(text)
    suffix = path.suffix.lower()
    try:
        exists = path.is_file()
        if path.is_dir():
            return is_dataset_folder(path)
    except OSError:  # longer than a name may be
        return False
    if suffix in _ENDINGS:
        if exists or any(sign.isspace() for sign in text):
            return exists
        problem = "no such scenario file"
    elif exists and suffix:
        problem = f"unknown kind of scenario file {suffix!r}"
    else:
        return False
    raise ScenarioError(
        f"{text}: {problem}",
        remedy=f"Give a file that ends in {', '.join(_ENDINGS)}. If it is a prompt, give "
        "Scenario(prompt).",
    )


def _refuse_odd_file(path: Path, status: os.stat_result, *, is_read_whole: bool) -> None:
    """Refuse what would never end, or not fit into memory, before it is read."""
    if not stat.S_ISREG(status.st_mode):
        raise ScenarioError(
            f"{path}: cannot be read: not a regular file",
            why="It is a pipe or a device.",
            remedy=_GIVE_A_FILE,
        )
    if is_read_whole and status.st_size > MAX_BYTES:
        raise ScenarioError(
            f"{path}: larger than {readable(MAX_BYTES)}",
            why="YAML is read whole.",
            remedy="Write large suites as JSONL, CSV or Parquet, which are read row by row.",
        )


# --- scenarios -------------------------------------------------------------------------------


def _draft(given: Any, place: int) -> Draft:
    """Make a scenario of one that stands in Python at a place of a sequence."""
    name = default_name(place)
    if isinstance(given, Scenario):
        return Draft(given if given.name else changed(given, name=name))
    if isinstance(given, str):
        return Draft(Scenario(given, name=name, marks=False))
    if not isinstance(given, Mapping):
        raise ScenarioError(
            f"{label(name)} is a value of type {type(given).__name__}",
            remedy="Give a prompt, a Scenario or a mapping with 'prompt' or 'messages'; a file or "
            "table only by itself.",
        )
    called = given.get("name")
    entry = checked_entry(given, label(called if isinstance(called, str) else name))
    return _entry_draft(entry, place, _PLAIN)


def _drafts(
    entries: Iterable[tuple[ScenarioEntry, str]], suite: SuiteFile = _PLAIN
) -> Iterator[Draft]:
    """Make scenarios of the entries of a file or table, each with its place there."""
    for number, (entry, where) in enumerate(entries):
        try:
            draft = _entry_draft(entry, number, suite, where)
        except ScenarioError as error:
            raise placed(where, error) from None
        yield draft


def _entry_draft(entry: ScenarioEntry, place: int, suite: SuiteFile, where: str = "") -> Draft:
    name = default_name(place) if entry.name is None else check_name(entry.name)
    own = "a prompt" if entry.prompt is not None else "messages" if entry.messages else ""
    if own and (entry.template is not None or entry.values):
        raise ScenarioError(
            f"{label(name)} has {own} and a template or values",
            remedy=f"Give either {own}, or 'template' and 'values'.",
        )
    template = entry.template or suite.template
    marked: dict[str, Any] = {}
    values: dict[str, Value | None] = {}
    marks, begins = suite.marks if entry.marks is None else entry.marks, entry.generation_prompt
    if begins is None and entry.messages:
        begins = suite.generation_prompt
    if own:
        prompt = entry.prompt
    elif template is not None:
        taken = value_names(template)
        unused = set(entry.values) - set(taken)
        if unused:
            raise ScenarioError(
                f"{label(name)}: value {min(unused)!r} is not in its template",
                remedy=f"The template takes: {', '.join(taken) or 'none'}.",
            )
        given = {**suite.defaults, **entry.values}
        try:
            prompt, marked = render_template(template, given)
        except ScenarioError as error:
            raise placed(label(name), error) from None
        values = {one: _metadata_of(one, given[one]) for one in taken if one not in RESERVED}
        marks = False  # they are read, and values are text
    else:
        raise ScenarioError(
            f"{label(name)} has no prompt",
            remedy="Give it 'prompt', or 'template' (its own or the file's) and 'values', or "
            "'messages'.",
        )
    scenario = assembled(
        name=name,
        prompt=prompt,
        messages=entry.messages,
        generation_prompt=begins,
        marks=bool(marks),
        marked=marked,
        spans=entry.spans,
        tags=entry.tags,
        options=suite.options if entry.options is None else entry.options,
        metadata={**values, **entry.metadata},
    )
    return Draft(scenario, where, frozenset(values.keys() - entry.metadata.keys()))


def _metadata_of(name: str, value: Any) -> Value | None:
    """Return a template's value as metadata: a list, and a number out of range, as its text."""
    if not isinstance(value, list):
        try:
            return plain_value(value)
        except ValueError:
            pass
    return text_of(name, value)
