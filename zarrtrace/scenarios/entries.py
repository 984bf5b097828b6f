"""The file format of scenarios, as frozen values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.metadata import RESERVED, Value, check_metadata_name, plain_value
from zarrtrace.scenarios.names import IDENTIFIER
from zarrtrace.suggestions import closest

_Text = Annotated[str, StringConstraints(min_length=1)]
_SpanName = Annotated[str, StringConstraints(pattern=rf"^{IDENTIFIER}$")]
_Scalar = str | bool | int | float
_MetadataName = Annotated[
    str,
    AfterValidator(check_metadata_name),
    WithJsonSchema({"type": "string", "pattern": f"^{IDENTIFIER}$"}),
]
_MetadataValue = Annotated[
    Value | None,
    BeforeValidator(plain_value),
    WithJsonSchema({"type": ["boolean", "integer", "number", "string", "null"]}),
]
_PLAIN = frozenset((str, int, float, bool, type(None)))
# How pydantic names the members of a union, and a key, within an error's location.
_UNION_MEMBER = re.compile(
    r"constrained-|literal\[|list\[|tuple\[|\[key\]|TextSpan$|(?:str|bool|int|float)$"
)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSpan(_Strict):
    """A span given by literal text of the prompt."""

    text: _Text = Field(description="Literal text; it must occur in the prompt.")
    occurrence: Annotated[int, Field(ge=1)] | Literal["last", "all"] | None = Field(
        default=None, description="Which occurrence, counted from 1; needed if there are several."
    )


_Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
SpanEntry = _Text | TextSpan | _Range | list[_Range]


class ScenarioEntry(_Strict):
    """One scenario of a file: a prompt, or a template with its values."""

    name: str | None = Field(
        default=None, description="`scenario_0`, `scenario_1`, … by its place if left out."
    )
    prompt: _Text | None = Field(default=None, description="The prompt, word for word.")
    template: _Text | None = Field(
        default=None,
        description="`{value}` takes a value, `[[span:text]]` marks a span, `{{` and `}}` are "
        "braces.",
    )
    values: dict[str, _Scalar | list[_Scalar]] = Field(
        default_factory=dict,
        description="Values of the template, which are metadata, too; a list is joined with ', '.",
    )
    spans: dict[_SpanName, SpanEntry] = Field(
        default_factory=dict,
        description="Spans by literal text, by text and occurrence, or by character range(s) "
        "[start, end).",
        json_schema_extra={"additionalProperties": False},
    )
    tags: list[_Text] = Field(default_factory=list)
    options: dict[str, _Text] | None = Field(
        default=None, description="Continuations whose probability matters, by name."
    )
    metadata: dict[_MetadataName, _MetadataValue] = Field(
        default_factory=dict,
        description="Numbers, text and booleans: columns of the suite, with one type each. Null is "
        "a missing value.",
        json_schema_extra={
            "additionalProperties": False,
            "propertyNames": {"not": {"enum": [*sorted(RESERVED)]}},
        },
    )


class SuiteFile(_Strict):
    """A file of scenarios, with defaults that its entries share."""

    name: str | None = None
    template: _Text | None = Field(default=None, description="Template of entries without one.")
    defaults: dict[str, _Scalar | list[_Scalar]] = Field(default_factory=dict)
    options: dict[str, _Text] = Field(default_factory=dict)
    scenarios: list[ScenarioEntry] = Field(min_length=1)


class Problem(NamedTuple):
    """Where an entry is wrong, why, and what to do."""

    location: tuple[str | int, ...]
    reason: str
    remedy: str

    @property
    def path(self) -> str:
        """The location in one word; empty for the whole."""
        return ".".join(map(str, self.location))


def problem_of(error: ValidationError) -> Problem:
    """Return the first problem that pydantic found, in words of the file format."""
    first, *others = sorted(
        error.errors(),
        # A misspelt field also makes the right one missing.
        key=lambda e: e["type"] != "extra_forbidden",
    )
    if _UNION_MEMBER.match(str(first["loc"][-1:] and first["loc"][-1])):
        # None of several forms fits: the one that fits furthest is what was meant.
        same = [e for e in others if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
        first = max([first, *same], key=lambda e: len(e["loc"]))
    location = tuple(step for step in first["loc"] if not _UNION_MEMBER.match(str(step)))
    remedy = "See schema/scenarios.schema.json for what an entry may hold."
    if first["type"] == "extra_forbidden":
        name = str(location[-1])
        known = [*ScenarioEntry.model_fields, *SuiteFile.model_fields, *TextSpan.model_fields]
        close = closest(name, known)
        if name == "messages":
            remedy = "Chat prompts come in a later version; give 'prompt', a text."
        elif close:
            remedy = f"Did you mean {close!r}? {remedy}"
        elif len(location) == 1 or location[0] == "scenarios":
            remedy = f"Numbers, text and booleans of your own stand under 'metadata'. {remedy}"
        return Problem(location, f"unknown field {name!r}", remedy)
    return Problem(location, first["msg"].removeprefix("Value error, "), remedy)


def checked_entry(given: Mapping[str, Any], label: str) -> ScenarioEntry:
    """Check an entry that comes from Python.

    Parameters
    ----------
    given
        Fields by name; NumPy's values are taken as Python's.
    label
        What messages call the scenario.

    Raises
    ------
    ScenarioError
        Naming the scenario and the field.
    """
    try:
        return ScenarioEntry.model_validate({str(k): plain(v) for k, v in given.items()})
    except ValidationError as error:
        problem = problem_of(error)
        raise ScenarioError(
            f"{label}: {problem.path or 'the entry'}: {problem.reason}", remedy=problem.remedy
        ) from None


def plain(value: Any) -> Any:
    """Return a value with NumPy's arrays and numbers within it as Python's, sets as lists."""
    if type(value) in _PLAIN:
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):  # whose order differs from process to process
        return sorted(map(plain, value), key=str)
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
