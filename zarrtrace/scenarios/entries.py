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
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from zarrtrace.errors import ScenarioError
from zarrtrace.format.attributes import LayerRange
from zarrtrace.scenarios.metadata import (
    RESERVED,
    Value,
    check_metadata_name,
    from_numpy,
    plain_value,
)
from zarrtrace.scenarios.names import IDENTIFIER
from zarrtrace.scenarios.written_numbers import WrittenNumber
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


def _template_value(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Refuse NumPy's dates, and keep numbers with a text: pydantic makes plain numbers of both."""
    for one in value if isinstance(value, list) else [value]:
        if (kind := type(one).__name__) in ("datetime64", "timedelta64"):
            raise ValueError(f"a value of type {kind}; give its text, as the prompt shall hold it")
    checked = check(value)
    if isinstance(value, list):
        return [
            given if isinstance(given, WrittenNumber) else one
            for given, one in zip(value, checked, strict=True)
        ]
    return value if isinstance(value, WrittenNumber) else checked


_TemplateValue = Annotated[_Scalar | list[_Scalar], WrapValidator(_template_value)]


def _text_alone(content: Any) -> Any:
    """Refuse a message without text in words, which pydantic has not."""
    if content is None:
        raise ValueError("a message without text, such as a call of a tool, is not read")
    if isinstance(content, list | tuple | Mapping):
        raise ValueError(  # noqa: TRY004 -- pydantic reports no TypeError
            "parts such as images are not read; give the text alone, as one string"
        )
    return content


class MessageEntry(_Strict):
    """A message of a chat."""

    role: _Text = Field(description="As the chat template knows it: `system`, `user`, `assistant`.")
    content: Annotated[str, BeforeValidator(_text_alone)] = Field(description="Its text.")

    @model_validator(mode="before")
    @classmethod
    def _without_missing(cls, given: Any) -> Any:
        """Leave out fields that are null, which rows of a table share."""
        if not isinstance(given, Mapping):
            return given
        return {k: v for k, v in given.items() if v is not None or k in cls.model_fields}


class TextSpan(_Strict):
    """A span given by literal text of the prompt."""

    text: _Text = Field(description="Literal text; it must occur in the prompt.")
    message: int | None = Field(
        default=None,
        description="Index of the message in whose content the text is searched, from 0, or back "
        "from -1. Null searches the rendered prompt.",
    )
    occurrence: Annotated[int, Field(ge=1)] | Literal["last", "all"] | None = Field(
        default=None, description="Which occurrence, counted from 1; needed if there are several."
    )


_Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
_GENERATION_PROMPT = (
    "Whether the chat template begins the assistant's next message. If not, a last message of the "
    "assistant's is continued. Null does as the command says, by default it does."
)
_MARKS = (
    "Whether marks `[[span:text]]` are taken out of `prompt` and of messages, and become spans; "
    "null is false."
)
SpanEntry = _Text | TextSpan | _Range | list[_Range]


class ScenarioEntry(_Strict):
    """One scenario of a file: a prompt, a template with its values, or messages."""

    name: str | None = Field(
        default=None, description="`scenario_0`, `scenario_1`, … by its place if left out."
    )
    prompt: _Text | None = Field(default=None, description="The prompt, word for word.")
    template: _Text | None = Field(
        default=None,
        description="`{value}` takes a value, `[[span:text]]` marks a span, `{{` and `}}` are "
        "braces.",
    )
    messages: Annotated[list[MessageEntry], Field(min_length=1)] | None = Field(
        default=None,
        description="A chat instead of a prompt: the tokenizer's chat template makes the prompt.",
    )
    generation_prompt: bool | None = Field(default=None, description=_GENERATION_PROMPT)
    marks: bool | None = Field(default=None, description=_MARKS)
    values: dict[str, _TemplateValue] = Field(
        default_factory=dict,
        description="Values of the template, which are metadata, too; a list is joined with ', '.",
    )
    spans: dict[_SpanName, SpanEntry] = Field(
        default_factory=dict,
        description="Spans by literal text, by text and occurrence, or by character range(s) "
        "[start, end) of the prompt; of messages, of the text that the chat template makes.",
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
    defaults: dict[str, _TemplateValue] = Field(default_factory=dict)
    options: dict[str, _Text] = Field(default_factory=dict)
    generation_prompt: bool | None = Field(
        default=None, description="Of entries with messages that do not say it themselves."
    )
    marks: bool | None = Field(
        default=None, description="Of entries that do not say it themselves."
    )
    bands: dict[_SpanName, LayerRange] | None = Field(
        default=None,
        description="Bands of layers that are hypothesised of the model, as `local: [1, 10]`: "
        "first and last layer. `analyze layer-bands` tests `local`, `task` and `decision`; figures "
        "shade them.",
    )
    task_spans: Annotated[list[_SpanName], Field(min_length=1)] | None = Field(
        default=None, description="Spans that state the task, for `analyze layer-bands`."
    )
    scenarios: list[ScenarioEntry] = Field(min_length=1)


class EntryProblem(NamedTuple):
    """Where an entry is wrong, why, and what to do."""

    location: tuple[str | int, ...]
    reason: str
    remedy: str

    @property
    def path(self) -> str:
        """The location in one word; empty for the whole."""
        return ".".join(map(str, self.location))


def problem_of(error: ValidationError) -> EntryProblem:
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
        if "messages" in location[:-1]:
            remedy = "A message holds 'role' and 'content', both texts."
        elif close:
            remedy = f"Did you mean {close!r}? {remedy}"
        elif len(location) == 1 or location[0] == "scenarios":
            remedy = f"Numbers, text and booleans of your own stand under 'metadata'. {remedy}"
        return EntryProblem(location, f"unknown field {name!r}", remedy)
    return EntryProblem(location, first["msg"].removeprefix("Value error, "), remedy)


def checked_entry(given: Mapping[str, Any], label: str) -> ScenarioEntry:
    """Check an entry that comes from Python.

    Parameters
    ----------
    given
        Fields by name; NumPy's values are taken as Python's.
    label
        Name of the scenario in messages.

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
        found = from_numpy(value)
        return found if type(found) is type(value) else plain(found)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):  # whose order differs from process to process
        return sorted(map(plain, value), key=str)
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
