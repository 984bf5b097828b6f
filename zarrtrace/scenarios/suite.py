"""Suites: scenarios from files, tables and Python, with unique names and typed metadata."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zarrtrace.errors import ScenarioError, readable
from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile, checked_entry
from zarrtrace.scenarios.metadata import RESERVED, Value, plain_value, typed_metadata
from zarrtrace.scenarios.names import check_name, default_name, label, name_key
from zarrtrace.scenarios.scenario import Scenario, assembled, changed
from zarrtrace.scenarios.suite_file import parse_jsonl, parse_yaml
from zarrtrace.scenarios.tables import dataset_entries, frame_entries, parse_csv, parse_parquet
from zarrtrace.scenarios.templates import render_template, text_of, value_names

_MAX_FILE_BYTES = 2**28
_TEXT_FILES = {
    ".yaml": parse_yaml,
    ".yml": parse_yaml,
    ".jsonl": parse_jsonl,
    ".csv": parse_csv,
}
_ENDINGS = (*_TEXT_FILES, ".parquet")
_GIVE_A_FILE = "Give a YAML, JSONL, CSV or Parquet file."


@dataclass(frozen=True)
class _Draft:
    """A scenario before the suite has typed its metadata."""

    scenario: Scenario
    where: str = ""  # of its entry, as messages begin
    from_template: frozenset[str] = frozenset()  # metadata that its template took as values


def load_suite(path: str | Path) -> tuple[Scenario, ...]:
    """Read scenarios from a YAML, JSONL, CSV or Parquet file.

    Parameters
    ----------
    path
        YAML (``.yaml``, ``.yml``) holds a list under ``scenarios``, JSONL one such entry a line.
        CSV and Parquet have columns ``prompt`` or ``messages``, ``name``, ``tags``, ``spans``,
        ``options`` and ``generation_prompt``; all others are metadata.

    Raises
    ------
    ScenarioError
        If the file cannot be read or is not valid; the message names file, line and reason.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        _refuse_odd_file(path)
        if suffix not in _ENDINGS:
            raise ScenarioError(
                f"{path}: unknown kind of scenario file {suffix or '(no ending)'!r}",
                remedy="Name it .yaml (a list under 'scenarios'), .jsonl (one scenario a line), "
                ".csv or .parquet (a column 'prompt' or 'messages').",
            )
        content = path.read_bytes()
        text = "" if suffix == ".parquet" else content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ScenarioError(f"{path}: no such scenario file", remedy=_GIVE_A_FILE) from None
    except (OSError, ValueError) as error:
        raise ScenarioError(
            f"{path}: cannot be read as UTF-8 text ({error})",
            remedy="Save the file as UTF-8 and check its permissions.",
        ) from error
    if suffix == ".parquet":
        suite, places = parse_parquet(path, content)
    else:
        suite, places = _TEXT_FILES[suffix](path, text)
    return _suite(_drafts(suite, places), str(path))


def as_scenarios(given: Any) -> tuple[Scenario, ...]:
    """Return the scenarios of whatever a user may give as such.

    Parameters
    ----------
    given
        One of:

        - a prompt, word for word. A string that names an existing file with one of the endings
          ``.yaml``, ``.yml``, ``.jsonl``, ``.csv`` and ``.parquet`` is that file; for a prompt
          that reads like this, give ``Scenario(prompt)``.
        - a :class:`Scenario`, or a mapping with the keys of an entry in a YAML file.
        - a sequence of these; strings in it are always prompts.
        - a :class:`pathlib.Path`: a file, as for :func:`load_suite`.
        - a pandas DataFrame or a ``datasets.Dataset`` with the columns that CSV files have.

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
    if isinstance(given, os.PathLike):
        return load_suite(Path(given))
    if isinstance(given, str):
        return load_suite(given) if _is_file(given) else _suite([_draft(given, 0)])
    kind = _kind(given)
    if kind == "pandas.DataFrame":
        return _suite(_drafts(*frame_entries(given)))
    if kind == "datasets.Dataset":
        return _suite(_drafts(*dataset_entries(given)))
    if kind.startswith("datasets."):
        raise ScenarioError(
            f"scenarios cannot be taken from a value of type {kind}",
            remedy="Give one split, as dataset['train']; of an iterable one some rows, as "
            "datasets.Dataset.from_list(list(dataset.take(100))).",
        )
    if isinstance(given, Scenario | Mapping):
        return _suite([_draft(given, 0)])
    if isinstance(given, bytes | Set) or not isinstance(given, Iterable):
        raise ScenarioError(
            f"scenarios cannot be taken from a value of type {type(given).__name__}",
            remedy="Give a prompt, a Scenario, a mapping, a sequence of these, a path, a pandas "
            "DataFrame or a datasets.Dataset.",
        )
    drafts = [_draft(one, place) for place, one in enumerate(given)]
    if not drafts:
        raise ScenarioError("there are no scenarios", remedy="Give at least one prompt.")
    return _suite(drafts)


def _kind(given: Any) -> str:
    """Name the class of a frame or data set without importing what it comes from."""
    classes = [f"{one.__module__.partition('.')[0]}.{one.__name__}" for one in type(given).__mro__]
    known = [one for one in classes if one in ("pandas.DataFrame", "datasets.Dataset")]
    return known[0] if known else classes[0]


def _is_file(text: str) -> bool:
    """Whether a string stands for a file of scenarios; what looks like a wrong one is refused."""
    if "\n" in text or len(text) > 4096 or "\0" in text:
        return False
    path = Path(text)
    suffix = path.suffix.lower()
    try:
        exists = path.is_file()
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


def _refuse_odd_file(path: Path) -> None:
    """Refuse what would never end, or not fit into memory, before it is read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ScenarioError(
            f"{path}: cannot be read: not a regular file",
            why="It is a folder, a pipe or a device.",
            remedy=_GIVE_A_FILE,
        )
    if status.st_size > _MAX_FILE_BYTES:
        raise ScenarioError(
            f"{path}: larger than {readable(_MAX_FILE_BYTES)}",
            why="No file of scenarios is that large; it is probably another file.",
            remedy="Check its name, or split the file.",
        )


# --- scenarios -------------------------------------------------------------------------------


def _draft(given: Any, place: int) -> _Draft:
    """Make a scenario of one that stands in Python at a place of a sequence."""
    name = default_name(place)
    if isinstance(given, Scenario):
        return _Draft(given if given.name else changed(given, name=name))
    if isinstance(given, str):
        return _Draft(Scenario(given, name=name, marks=False))
    if not isinstance(given, Mapping):
        raise ScenarioError(
            f"{label(name)} is a value of type {type(given).__name__}",
            remedy="Give a prompt, a Scenario or a mapping with 'prompt'; a file or table only by "
            "itself.",
        )
    called = given.get("name")
    entry = checked_entry(given, label(called if isinstance(called, str) else name))
    return _entry_draft(entry, place, SuiteFile(scenarios=[entry]))


def _drafts(suite: SuiteFile, places: Sequence[str]) -> list[_Draft]:
    """Make scenarios of the entries of a file or table, each with its place there."""
    drafts = []
    for number, (entry, where) in enumerate(zip(suite.scenarios, places, strict=True)):
        try:
            drafts.append(_entry_draft(entry, number, suite, where))
        except ScenarioError as error:
            raise _at(where, error) from None
    return drafts


def _at(where: str, error: ScenarioError) -> ScenarioError:
    what = f"{where}: {error.what}" if where else error.what
    return ScenarioError(what, why=error.why, remedy=error.remedy)


def _entry_draft(entry: ScenarioEntry, place: int, suite: SuiteFile, where: str = "") -> _Draft:
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
            raise _at(label(name), error) from None
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
    return _Draft(scenario, where, frozenset(values.keys() - entry.metadata.keys()))


def _metadata_of(name: str, value: Any) -> Value | None:
    """Return a template's value as metadata: a list, and a number out of range, as its text."""
    if not isinstance(value, list):
        try:
            return plain_value(value)
        except ValueError:
            pass
    return text_of(name, value)


def _suite(drafts: Sequence[_Draft], where: str = "") -> tuple[Scenario, ...]:
    """Check names against each other, and type the metadata."""
    taken: dict[str, str] = {}
    for draft in drafts:
        name = draft.scenario.name
        key = name_key(name)
        if key in taken:
            error = ScenarioError(
                f"scenario name {name!r} is taken by {taken[key]!r}",
                why="Names that differ only in case or Unicode form are one folder on many file "
                "systems.",
                remedy="Rename one of the two.",
            )
            raise _at(draft.where, error)
        taken[key] = name
    given = {draft.scenario.name: draft.scenario.metadata for draft in drafts}
    template = {(draft.scenario.name, one) for draft in drafts for one in draft.from_template}
    try:
        typed = typed_metadata(given, template)
    except ScenarioError as error:
        raise _at(where, error) from None
    return tuple(changed(draft.scenario, metadata=typed[draft.scenario.name]) for draft in drafts)
