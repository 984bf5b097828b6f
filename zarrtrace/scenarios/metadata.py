"""Metadata of scenarios: named numbers, texts and booleans, of one type in a whole suite."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.names import IDENTIFIER

#: Names of dimensions and coordinates, which metadata cannot have.
RESERVED = frozenset(
    (
        "scenario",
        "sample",
        "position",
        "token",
        "span",
        "layer",
        "query",
        "key",
        "head",
        "feature",
        "channel",
        "rank",
        "repeat",
        "tags",
    )
)

Value = bool | int | float | str

_IDENTIFIER = re.compile(IDENTIFIER)
_INT64 = range(-(2**63), 2**63)


def check_metadata_name(name: object) -> str:
    """Return the name of a column of metadata.

    Raises
    ------
    ValueError
        If it is not an identifier, or the name of a dimension or coordinate.
    """
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        raise ValueError(
            "a name of metadata is made of letters, digits and '_', and begins with no digit"
        )
    if name in RESERVED:
        raise ValueError(f"{name!r} is the name of a dimension or coordinate; choose another one")
    return name


def plain_value(value: Any) -> Value | None:
    """Return a value of metadata as Python's own type; None if it is missing.

    Raises
    ------
    ValueError
        If it is infinite, a whole number beyond 64 bits, text that UTF-8 cannot hold, or neither
        number, text nor boolean.
    """
    if is_missing(value):
        return None
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value not in _INT64:
            raise ValueError("a whole number of more than 64 bits; write it as text")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("an infinite number; leave it out, or write it as text")
        return float(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text that is not valid Unicode") from None
        return str(value)
    raise ValueError(
        f"a value of type {type(value).__name__}; metadata is numbers, text, true and false"
    )


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or what pandas puts in its place."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return bool(value != value) and not isinstance(value, str)  # noqa: PLR0124 -- NaN
    except (TypeError, ValueError):  # an array
        return False


def typed_metadata(
    given: Mapping[str, Mapping[str, Value | None]],
    from_template: Collection[tuple[str, str]] = (),
) -> dict[str, dict[str, Value]]:
    """Give all scenarios of a suite the same columns, and each column one type.

    Parameters
    ----------
    given
        Values by scenario and column.
    from_template
        Scenario and column of values that a template took. They may differ in type from scenario
        to scenario, as the prompt is text anyway: such a column is text.

    Returns
    -------
    dict
        By scenario: text where any value is text, with ``""`` for a missing one; whole numbers if
        all are; otherwise floats, with NaN for a missing one; booleans.

    Raises
    ------
    ScenarioError
        If a column mixes types, or lacks a boolean; the message names the scenarios.
    """
    columns = dict.fromkeys(column for values in given.values() for column in values)
    typed: dict[str, dict[str, Value]] = {scenario: {} for scenario in given}
    for column in columns:
        found = {scenario: values.get(column) for scenario, values in given.items()}
        present = {s: value for s, value in found.items() if not is_missing(value)}
        try:
            values = typed_column(column, found)
        except ScenarioError:
            if not all((scenario, column) in from_template for scenario in present):
                raise
            values = {s: str(present.get(s, "")) for s in found}
        for scenario, value in values.items():
            typed[scenario][column] = value
    return typed


def typed_column(column: str, found: Mapping[str, Value | None]) -> dict[str, Value]:
    """Give the values of a column one type, as :func:`typed_metadata` does for all columns.

    Parameters
    ----------
    column
        Its name, for messages.
    found
        Values by scenario; None and NaN are missing.

    Raises
    ------
    ScenarioError
        If it mixes types, or lacks a boolean.
    """
    present: dict[str, Any] = {s: one for s, one in found.items() if not is_missing(one)}
    kinds: dict[str, str] = {}  # the first scenario of each kind
    for scenario, value in present.items():
        kinds.setdefault(_kind(value), scenario)
    if len(kinds) > 1:
        (kind, scenario), (other, another) = list(kinds.items())[:2]
        raise ScenarioError(
            f"metadata {column!r} is {kind} in scenario {scenario!r} and {other} in scenario "
            f"{another!r}",
            why="A column has one type in all scenarios.",
            remedy="Give it the same type everywhere, or choose two names.",
        )
    kind = next(iter(kinds), "a number")
    if kind == "text":
        return {scenario: present.get(scenario, "") for scenario in found}
    if kind == "true or false":
        lacking = [scenario for scenario in found if scenario not in present]
        if lacking:
            raise ScenarioError(
                f"metadata {column!r} is true or false in scenario {kinds[kind]!r} and missing in "
                f"scenario {lacking[0]!r}",
                why="A missing number is NaN and a missing text is empty, but no boolean says that "
                "it is missing.",
                remedy="Give it in all scenarios, or as text.",
            )
        return dict(present)
    if len(present) == len(found) and all(isinstance(value, int) for value in present.values()):
        return dict(present)
    for scenario, value in present.items():
        if int(float(value)) != int(value):
            raise ScenarioError(
                f"metadata {column!r} of scenario {scenario!r} is {value}, which no float holds",
                why="Other scenarios lack the column or have fractions, so its numbers are floats.",
                remedy="Give it as text.",
            )
    return {s: float(present[s]) if s in present else math.nan for s in found}


def _kind(value: Value) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "text" if isinstance(value, str) else "a number"
