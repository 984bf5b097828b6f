"""One scenario: a named prompt with named spans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: The span that every scenario has: its last token, where the model decides what to say next.
DECISION = "decision"

#: Names of spans, values and marks.
IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"

CharRange = tuple[int, int]


@dataclass(frozen=True)
class Scenario:
    """A named prompt with named spans.

    Attributes
    ----------
    name
        Unique within its suite and safe as a folder name (:func:`check_name`).
    prompt
        The text the model reads, without special tokens.
    spans
        Character ranges ``(start, end)`` of `prompt` by span name, half open.
    tags
        Groups the scenario belongs to, for example ``("risky",)``.
    options
        Named continuations whose probability matters, for example ``{"bet": "1"}``.
    """

    name: str
    prompt: str
    spans: Mapping[str, tuple[CharRange, ...]] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
