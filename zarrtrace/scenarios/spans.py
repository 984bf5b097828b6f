"""Spans: from text to character ranges, and from these to token positions."""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.entries import SpanEntry, TextSpan
from zarrtrace.scenarios.names import DECISION, label
from zarrtrace.suggestions import did_you_mean

if TYPE_CHECKING:
    import xarray as xr

    from zarrtrace.scenarios.scenario import Scenario

CharRange = tuple[int, int]


def locate_spans(
    scenario: str,
    prompt: str,
    given: Mapping[str, SpanEntry],
    marked: Mapping[str, Sequence[CharRange]],
) -> dict[str, tuple[CharRange, ...]]:
    """Return the character ranges of all spans of an entry.

    Parameters
    ----------
    scenario
        Its name, for messages.
    prompt
        Its text.
    given
        Spans as the entry gives them.
    marked
        Ranges of spans that are marked in its text; a span may be both.

    Raises
    ------
    ScenarioError
        If the prompt has no such text or range, or a span is called ``decision``.
    """
    # A search a text, not a search a span; making the cache takes as long as one search.
    search: Callable[[str], Sequence[CharRange]] = functools.partial(occurrences, prompt)
    if len(given) > 1:
        search = functools.cache(search)
    spans = {name: list(ranges) for name, ranges in marked.items()}
    for name, one in given.items():
        refuse_decision(scenario, name)
        spans.setdefault(name, []).extend(find_span(scenario, name, one, prompt, search))
    return {name: tuple(sorted(set(ranges))) for name, ranges in spans.items()}


def refuse_decision(scenario: str, name: str) -> None:
    """Refuse a span that has the name of the one that every scenario has.

    Raises
    ------
    ScenarioError
    """
    if name == DECISION:
        raise ScenarioError(
            f"{label(scenario)}: span {DECISION!r} is always the last token",
            remedy="Give your span another name.",
        )


def occurrences(prompt: str, text: str) -> list[CharRange]:
    """Return where `text` stands in a prompt; occurrences may overlap."""
    found = []
    at = prompt.find(text)
    while at >= 0:
        found.append((at, at + len(text)))
        at = prompt.find(text, at + 1)
    return found


def find_span(
    scenario: str,
    name: str,
    given: SpanEntry,
    prompt: str,
    search: Callable[[str], Sequence[CharRange]],
    *,
    where: str = "the prompt",
) -> list[CharRange]:
    """Return the character ranges of one span.

    Parameters
    ----------
    scenario, name
        Names of the scenario and the span, for messages.
    given
        The span, as an entry gives it.
    prompt
        The text that it is in.
    search
        Returns the occurrences of a text in it.
    where
        Name of the text in messages.

    Raises
    ------
    ScenarioError
        If there is no such text or range.
    """
    if isinstance(given, str):
        given = TextSpan(text=given)
    if isinstance(given, TextSpan):
        return _choose(scenario, name, given, search(given.text), where)
    ranges = [given] if isinstance(given, tuple) else list(given)
    for start, end in ranges:
        if not start < end <= len(prompt):
            raise ScenarioError(
                f"{label(scenario)}: span {name!r} at [{start}, {end}) is not in its prompt",
                why=f"The prompt has {len(prompt)} characters; a range is [start, end).",
                remedy="Give start < end, both within the prompt.",
            )
    return ranges


def _choose(
    scenario: str, name: str, given: TextSpan, found: Sequence[CharRange], where: str
) -> list[CharRange]:
    span = f"{label(scenario)}: span {name!r}"
    if not found:
        raise ScenarioError(
            f"{span}: {given.text!r} is not in {where}",
            remedy=f"Spell it as {where} does, white space included.",
        )
    if given.occurrence == "all":
        return list(found)
    if given.occurrence == "last":
        return [found[-1]]
    if given.occurrence is None:
        if len(found) > 1:
            raise ScenarioError(
                f"{span}: {given.text!r} stands in {where} {len(found)} times",
                remedy=f"Say which: occurrence: 1 to {len(found)}, 'last' or 'all'.",
            )
        return [found[0]]
    if given.occurrence > len(found):
        raise ScenarioError(
            f"{span}: occurrence {given.occurrence} of {given.text!r}, which stands there "
            f"{len(found)} time(s)",
            remedy=f"Give 1 to {len(found)}.",
        )
    return [found[given.occurrence - 1]]


def token_positions(ranges: Iterable[CharRange], offsets: Sequence[CharRange]) -> list[int]:
    """Positions of the tokens that share a character with any of `ranges`.

    Parameters
    ----------
    ranges
        Character ranges ``[start, end)`` of the prompt.
    offsets
        The tokenizer's offset mapping: one ``(start, end)`` a token; special tokens have an empty
        range and belong to no span.

    Returns
    -------
    list of int
        Ascending token positions; several tokens that spell one character all belong to it.
    """
    return _Offsets(offsets).positions(ranges)


class _Offsets:
    """Tokens sorted by the characters they stand for: a range is found without a scan of all."""

    def __init__(self, offsets: Sequence[CharRange]) -> None:
        self._tokens = sorted(
            (start, end, position) for position, (start, end) in enumerate(offsets) if start < end
        )
        self._starts = [start for start, _, _ in self._tokens]
        # The furthest end so far: tokens that spell one character together overlap.
        self._ends = list(itertools.accumulate((end for _, end, _ in self._tokens), max))

    def positions(self, ranges: Iterable[CharRange]) -> list[int]:
        """Return the positions of tokens that share a character with any of `ranges`."""
        found: set[int] = set()
        for begin, stop in ranges:
            first, last = bisect_right(self._ends, begin), bisect_left(self._starts, stop)
            found.update(at for _, end, at in self._tokens[first:last] if end > begin)
        return sorted(found)


def span_positions(scenario: Scenario, offsets: Sequence[CharRange]) -> dict[str, list[int]]:
    """Token positions of every span of `scenario`, ``decision`` (the last token) included.

    Raises
    ------
    ScenarioError
        If a span covers no token of the prompt.
    """
    tokens = _Offsets(offsets)
    positions = {name: tokens.positions(ranges) for name, ranges in scenario.spans.items()}
    for name, found in positions.items():
        if not found:
            raise ScenarioError(
                f"scenario {scenario.name!r}: span {name!r} covers no token",
                why="It marks only characters that the tokenizer drops, such as white space.",
                remedy="Mark a visible word.",
            )
    positions[DECISION] = [len(offsets) - 1]
    return positions


def span(ds: xr.Dataset, name: str) -> list[int]:
    """Return the token positions of a span: labels of ``key``, and of ``query`` if stored.

    Parameters
    ----------
    ds
        A trace.
    name
        A span of its scenario, or ``"decision"``.

    Raises
    ------
    ScenarioError
        If the trace has no such span.
    """
    spans = ds.attrs["spans"]
    if name not in spans:
        raise ScenarioError(
            f"{ds.attrs['scenario']}: no span {name!r}",
            remedy=did_you_mean(name, spans, label="It has"),
        )
    return [int(position) for position in spans[name]["tokens"]]
