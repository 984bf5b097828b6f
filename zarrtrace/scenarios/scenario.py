"""One scenario: a named prompt with named spans, tags and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from types import MappingProxyType
from typing import Any

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.entries import SpanEntry, checked_entry
from zarrtrace.scenarios.metadata import Value
from zarrtrace.scenarios.names import check_name, label
from zarrtrace.scenarios.spans import CharRange, locate_spans
from zarrtrace.scenarios.templates import read_marks

_MAX_PROMPT = 2**22
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, init=False)
class Scenario:
    """A prompt with named spans, tags and metadata.

    >>> poor = Scenario(
    ...     "You hold [[balance:$90]]. 1) Bet 2) Stop:", name="poor", metadata={"game": "g7"}
    ... )
    >>> poor.prompt, poor.spans
    ('You hold $90. 1) Bet 2) Stop:', {'balance': ((9, 12),)})

    Parameters
    ----------
    prompt
        The text the model reads, without special tokens.
    name
        Unique within its suite and safe as a folder name (:func:`check_name`). Without one, the
        suite calls it ``scenario_0``, ``scenario_1``, … by its place.
    tags
        Groups the scenario belongs to, for example ``["risky"]``.
    spans
        As in a file of scenarios: a text that occurs once, ``{"text": …, "occurrence": …}``, or
        character ranges ``(start, end)`` of the prompt without marks.
    options
        Named continuations whose probability matters, for example ``{"bet": "1"}``.
    metadata
        Numbers, texts and booleans by name; None and NaN are missing values.
    marks
        Whether marks ``[[name:text]]`` in `prompt` are taken out and become spans. Anything else
        in double brackets is literal. False takes the prompt word for word.

    Attributes
    ----------
    name
        Empty until a suite is made, if none was given.
    spans
        Character ranges ``(start, end)`` of `prompt` by span name, half open.

    Raises
    ------
    ScenarioError
        If anything is not as in a file of scenarios.
    """

    # dataclasses.replace() must be told marks=False: it would read marks in literal text.
    marks: InitVar[bool]
    prompt: str
    name: str
    tags: tuple[str, ...]
    spans: Mapping[str, tuple[CharRange, ...]]
    options: Mapping[str, str]
    metadata: Mapping[str, Value | None]

    def __init__(
        self,
        prompt: str,
        *,
        name: str | None = None,
        tags: Sequence[str] = (),
        spans: Mapping[
            str, SpanEntry | Mapping[str, Any] | Sequence[int] | Sequence[CharRange]
        ] = _NONE,
        options: Mapping[str, str] = _NONE,
        metadata: Mapping[str, Value | None] = _NONE,
        marks: bool = True,
    ) -> None:
        called = label(name) if isinstance(name, str) else label("")
        given: dict[str, Any] = {"prompt": prompt, "name": name, "tags": tags, "spans": spans}
        given |= {"options": options, "metadata": metadata}
        entry = checked_entry(given, called)
        if not entry.prompt:
            raise ScenarioError(f"{called}: its prompt is empty", remedy="Give it text.")
        text = entry.prompt
        marked: Mapping[str, Sequence[CharRange]] = {}
        if marks:
            try:
                text, marked = read_marks(text)
            except ScenarioError as error:
                remedy = f"{error.remedy} Or take the prompt word for word with marks=False."
                raise ScenarioError(f"{called}: {error.what}", remedy=remedy) from None
        made = assembled(
            name="" if entry.name is None else check_name(entry.name),
            prompt=text,
            marked=marked,
            spans=entry.spans,
            tags=entry.tags,
            options=entry.options or {},
            metadata=entry.metadata,
        )
        _fill(self, **vars(made))


def assembled(
    *,
    name: str,
    prompt: str,
    marked: Mapping[str, Sequence[CharRange]],
    spans: Mapping[str, SpanEntry],
    tags: Sequence[str],
    options: Mapping[str, str],
    metadata: Mapping[str, Value | None],
) -> Scenario:
    """Return a scenario of the checked fields of an entry.

    Raises
    ------
    ScenarioError
        If its prompt is empty or too long, or lacks a span.
    """
    if not prompt.strip():
        raise ScenarioError(f"{label(name)}: its prompt is empty", remedy="Give it text.")
    if len(prompt) > _MAX_PROMPT:
        raise ScenarioError(
            f"{label(name)}: its prompt has {len(prompt):,} characters",
            why=f"Up to {_MAX_PROMPT:,} are read, about a million tokens.",
            remedy="Shorten it, or split it into several scenarios.",
        )
    return _fill(
        object.__new__(Scenario),
        prompt=prompt,
        name=name,
        tags=tuple(dict.fromkeys(tags)),
        spans=locate_spans(name, prompt, spans, marked),
        options=dict(options),
        metadata=dict(metadata),
    )


def changed(scenario: Scenario, **fields: Any) -> Scenario:
    """Return a scenario with other fields, which are not checked; its prompt stays literal."""
    return _fill(object.__new__(Scenario), **{**vars(scenario), **fields})


def _fill(scenario: Scenario, **fields: Any) -> Scenario:
    for field, value in fields.items():
        object.__setattr__(scenario, field, value)
    return scenario
