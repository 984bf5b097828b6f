"""The file format of scenarios, as frozen values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from zarrtrace.scenarios.scenario import IDENTIFIER

_Text = Annotated[str, StringConstraints(min_length=1)]
_SpanName = Annotated[str, StringConstraints(pattern=rf"^{IDENTIFIER}$")]
_Scalar = str | int | float


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

    name: str
    prompt: _Text | None = Field(default=None, description="The prompt, word for word.")
    template: _Text | None = Field(
        default=None,
        description="`{value}` takes a value, `[[span:text]]` marks a span, `{{` and `}}` are "
        "braces.",
    )
    values: dict[str, _Scalar | list[_Scalar]] = Field(
        default_factory=dict, description="Values of the template; a list is joined with ', '."
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


class SuiteFile(_Strict):
    """A file of scenarios, with defaults that its entries share."""

    name: str | None = None
    template: _Text | None = Field(default=None, description="Template of entries without one.")
    defaults: dict[str, _Scalar | list[_Scalar]] = Field(default_factory=dict)
    options: dict[str, _Text] = Field(default_factory=dict)
    scenarios: list[ScenarioEntry] = Field(min_length=1)
