"""Prompts with their continuations: the answer in it, and the option that it names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from zarrtrace.errors import ScenarioError
from zarrtrace.extraction.packages import capture_package
from zarrtrace.format.attributes import GenerationAttributes, SpanAttributes
from zarrtrace.records import Continuation, Tokens
from zarrtrace.scenarios import ANSWER, COMPLETION, DECISION, Sampling, token_positions, trace_name
from zarrtrace.scenarios.scenario import changed

if TYPE_CHECKING:  # they import torch
    from zarrtrace.capture import LoadedModel, Prompt

_TAKEN = (COMPLETION, ANSWER)
_CHOICE = "choice"


class Answer(NamedTuple):
    """The answer in a continuation.

    Attributes
    ----------
    characters
        Where it stands in the text; None if there is none.
    choice
        Name of the option that it names first; None for none.
    """

    characters: tuple[int, int] | None
    choice: str | None


def find_answer(text: str, pattern: str | None, options: Mapping[str, str]) -> Answer:
    """Find the answer in the text of a continuation.

    With a pattern, it is the first match (its first group, if it has one), and names the option
    whose text stands first in it. Without, it is the first option itself. An option's text counts
    without white space around it, and only as a whole word: ``1`` does not stand in ``10``.

    Parameters
    ----------
    pattern
        A regular expression, or None.
    options
        Texts of options by name.
    """
    start, end = 0, len(text)
    if pattern is not None:
        match = re.search(pattern, text)
        if match is None:
            return Answer(None, None)
        group = 1 if match.re.groups and match.start(1) >= 0 else 0
        start, end = match.span(group)
    found = []
    for name, option in options.items():
        if (words := option.strip()) and (match := _whole(words).search(text[start:end])):
            # The longest of several that begin at one place: "stop now" before "stop".
            found.append((match.start(), -len(words), name))
    at, length, choice = min(found, default=(0, 0, None))
    if pattern is not None:
        return Answer((start, end) if start < end else None, choice)
    return Answer(None if choice is None else (at, at - length), choice)


def _whole(words: str) -> re.Pattern[str]:
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", words[-1]) else ""
    return re.compile(f"{before}{re.escape(words)}{after}")


def with_continuation(
    model: LoadedModel,
    prompt: Prompt,
    repeat: int,
    made: Continuation,
    sampling: Sampling,
    answer: str | None,
) -> Prompt:
    """Return a prompt with a continuation: its tokens, the spans in it, and the trace's name.

    Parameters
    ----------
    repeat
        Number of the continuation.
    sampling, answer
        How it was generated, and the pattern of its answer, as options have them.
    """
    capture, tokens = capture_package(), prompt.tokens
    number = repeat if sampling.samples > 1 else None
    options = {name: one.text for name, one in prompt.options.items()}
    found, count = find_answer(made.text, answer, options), len(tokens.ids)
    spans = {name: one for name, one in prompt.spans.items() if name != DECISION}
    spans[COMPLETION] = _span(range(count, count + len(made.tokens)))
    if found.characters is not None:
        offsets = _offsets(model, prompt, made)
        at = [count + n for n in token_positions([found.characters], offsets)]
        spans |= {ANSWER: _span(at)} if at else {}
    generation = GenerationAttributes(
        **vars(sampling), prompt_tokens=count, text=made.text, ended_by=made.ended_by
    )
    special = model.special_ids
    return replace(
        prompt,
        scenario=changed(prompt.scenario, name=trace_name(prompt.scenario.name, number)),
        tokens=Tokens(
            ids=[*tokens.ids, *made.tokens],
            texts=[*tokens.texts, *(model.texts[token] for token in made.tokens)],
            special=[*(tokens.special or ()), *(token in special for token in made.tokens)],
        ),
        spans={**spans, DECISION: prompt.spans[DECISION]},
        continued=capture.Continued(prompt, number, generation, found.choice),
    )


def _span(tokens: Iterable[int]) -> SpanAttributes:
    return SpanAttributes(characters=(), tokens=tuple(tokens))


def refuse_taken_names(prompt: Prompt) -> None:
    """Refuse spans and metadata that are called as what a continuation adds.

    Raises
    ------
    ScenarioError
    """
    for kind, names in (("span", _TAKEN), ("metadata", (_CHOICE,))):
        own = prompt.spans if kind == "span" else prompt.scenario.metadata
        if taken := [name for name in names if name in own]:
            raise ScenarioError(
                f"scenario {prompt.scenario.name!r}: {kind} {taken[0]!r} with --generate",
                why="It is the name of something in the continuation.",
                remedy="Give it another name.",
            )


def _offsets(model: LoadedModel, prompt: Prompt, made: Continuation) -> list[tuple[int, int]]:
    """Return the characters of a continuation's text for which each of its tokens stands.

    Several tokens that spell one character all stand for it.
    """
    texts = [model.texts[token] for token in made.tokens]
    count = len(texts) - (made.ended_by == "end_of_sequence")
    if "".join(texts[:count]) == made.text:
        ends = [len("".join(texts[: n + 1])) for n in range(count)]
    else:  # bytes of one character, or a decoder that looks at neighbours
        texts_so_far = (
            capture_package().continuation_text(model, prompt, made.tokens[: n + 1])
            for n in range(count)
        )
        ends = [_common(text, made.text) for text in texts_so_far]
    offsets = []
    for n in range(count):
        start = ends[n - 1] if n else 0
        offsets.append((start, next((end for end in ends[n:] if end > start), start)))
    return offsets + [(0, 0)] * (len(texts) - count)


def _common(text: str, other: str) -> int:
    """Return how many of the first characters of two texts are the same."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((n for n, (one, two) in pairs if one != two), min(len(text), len(other)))


def expected_prompts(
    model: LoadedModel, prompts: Iterable[Prompt], sampling: Sampling, tokens: int | None = None
) -> Iterator[Prompt]:
    """Yield prompts as they may be with continuations of some tokens, by default of the most.

    Ids of the continuations say nothing: these tell sizes and names, before anything is generated.
    """
    for prompt in prompts:
        refuse_taken_names(prompt)
        ids = tuple(prompt.tokens.ids[-1:]) * (tokens or sampling.tokens)
        made = Continuation(ids, "", "length")
        for number in range(sampling.samples):
            yield with_continuation(model, prompt, number, made, sampling, None)
