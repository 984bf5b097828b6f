"""Metadata of scenarios: named numbers, texts and booleans, of one type in a whole suite."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
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
        "generated",
        "tags",
    )
)

Value = bool | int | float | str

_IDENTIFIER = re.compile(IDENTIFIER)
_NEVER_MISSING = frozenset((str, int, bool))


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


def free_name(name: str, taken: Collection[str], columns: Collection[str]) -> str:
    """Name a column of metadata beside others.

    Parameters
    ----------
    name
        Its name in the suite.
    taken
        Names of what is not metadata; such a column becomes ``metadata_NAME``.
    columns
        Names of all columns of metadata.
    """
    called = name
    while called in taken or (called != name and called in columns):
        called = f"metadata_{called}"
    return called


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
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = from_numpy(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
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


def from_numpy(value: Any) -> Any:
    """Return a value or array of NumPy as Python's; dates and durations as they are."""
    kind = value.dtype.char
    if kind in "mM":
        # tolist() turns those of nanoseconds into whole numbers, which say no unit.
        return list(value) if value.ndim else value[()]
    if kind in "gG":  # tolist() returns the long double itself
        value = value.astype("d" if kind == "g" else "D")
    return value.tolist()


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or what pandas puts in its place."""
    kind = type(value)
    if kind in _NEVER_MISSING:
        return False
    if value is None or kind.__name__ in ("NAType", "NaTType"):
        return True
    try:
        return bool(value != value) and not isinstance(value, str)  # noqa: PLR0124 -- NaN
    except (TypeError, ValueError):  # an array
        return False


class Column:
    """A column of metadata, met value by value: first all of them, then typed one by one.

    A column has one type in a whole suite: text where any value is text, with ``""`` for a missing
    one; whole numbers if all are; otherwise floats, with NaN for a missing one; booleans, of which
    none may be missing. Values that a template took may differ in type from scenario to scenario,
    as the prompt is text anyway: such a column is text.

    Parameters
    ----------
    name
        Its name, for messages.
    lacking
        The first scenario without a value, of those before the column's first.
    """

    def __init__(self, name: str, lacking: str | None = None) -> None:
        self.name = name
        self._lacking = lacking
        self._types: dict[type, str] = {}  # of values, with the first scenario of each
        self._too_long: tuple[str, Value] | None = None  # the first that no float holds
        self._is_from_template = True
        self._convert: Callable[[Value], Value] = str
        self._missing: Value = ""

    def add(self, scenario: str, value: Value | None, *, from_template: bool = False) -> None:
        """Take the value of the next scenario; None and NaN are missing."""
        if value is None or is_missing(value):
            if self._lacking is None:
                self._lacking = scenario
            return
        if type(value) not in self._types:
            self._types[type(value)] = scenario
        if not from_template:
            self._is_from_template = False
        if self._too_long is None and isinstance(value, int) and int(float(value)) != value:
            self._too_long = (scenario, value)

    def settle(self) -> type[Value]:
        """Return the column's type, which :meth:`typed` then gives every value.

        Raises
        ------
        ScenarioError
            If it mixes types, or lacks a boolean; the message names the scenarios.
        """
        try:
            kind = self._settled()
        except ScenarioError:
            if not self._is_from_template:
                raise
            kind = str
        self._convert = kind
        self._missing = math.nan if kind is float else ""
        return kind

    def typed(self, value: Value | None) -> Value:
        """Return a value, or what stands for a missing one, in the column's type."""
        if value is None or is_missing(value):
            return self._missing
        return self._convert(value)

    def _settled(self) -> type[Value]:
        kinds: dict[str, str] = {}
        for one, scenario in self._types.items():
            kinds.setdefault(_kind(one), scenario)
        if len(kinds) > 1:
            (kind, scenario), (other, another) = list(kinds.items())[:2]
            raise ScenarioError(
                f"metadata {self.name!r} is {kind} in scenario {scenario!r} and {other} in "
                f"scenario {another!r}",
                why="A column has one type in all scenarios.",
                remedy="Give it the same type everywhere, or choose two names.",
            )
        kind = next(iter(kinds), "a number")
        if kind == "text":
            return str
        if kind == "true or false":
            if self._lacking is not None:
                raise ScenarioError(
                    f"metadata {self.name!r} is true or false in scenario {kinds[kind]!r} "
                    f"and missing in scenario {self._lacking!r}",
                    why="A missing number is NaN and a missing text is empty, but no boolean says "
                    "that it is missing.",
                    remedy="Give it in all scenarios, or as text.",
                )
            return bool
        if self._lacking is None and not any(issubclass(one, float) for one in self._types):
            return int
        if self._too_long is not None:
            scenario, value = self._too_long
            raise ScenarioError(
                f"metadata {self.name!r} of scenario {scenario!r} is {value}, which no float holds",
                why="Other scenarios lack the column or have fractions, so its numbers are floats.",
                remedy="Give it as text.",
            )
        return float


def typed_column(name: str, found: Mapping[str, Value | None]) -> dict[str, Value]:
    """Give the values of a column one type, as a :class:`Column` does.

    Parameters
    ----------
    name
        Its name, for messages.
    found
        Values by scenario; None and NaN are missing.

    Raises
    ------
    ScenarioError
        If it mixes types, or lacks a boolean.
    """
    column = Column(name)
    for scenario, value in found.items():
        column.add(scenario, value)
    column.settle()
    return {scenario: column.typed(value) for scenario, value in found.items()}


def _kind(of: type) -> str:
    if issubclass(of, bool):
        return "true or false"
    return "text" if issubclass(of, str) else "a number"
