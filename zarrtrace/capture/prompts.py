"""From a scenario to the tokens that the model reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zarrtrace.capture.model import LoadedModel
from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import GenerationAttributes, OptionAttributes, SpanAttributes
from zarrtrace.records import Tokens
from zarrtrace.scenarios import Scenario, span_positions

# Prompts that the tokenizer gets together.
_AT_ONCE = 64

# Ids of tokens, and the characters that each stands for.
_Encoded = tuple[list[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Continued:
    """The prompt and the sampling that a continued prompt comes from.

    Attributes
    ----------
    prompt
        The prompt alone.
    repeat
        Number of the continuation; None if there is one.
    generation
        How it was generated, and its text.
    choice
        The option that was found in it; None for none.
    """

    prompt: Prompt
    repeat: int | None
    generation: GenerationAttributes
    choice: str | None


@dataclass(frozen=True)
class Prompt:
    """A scenario as the model reads it, or with what it goes on to say.

    Attributes
    ----------
    scenario
        Where it comes from.
    tokens
        Ids and texts, BOS included.
    spans
        Characters and token positions by name, ``decision`` included.
    options
        Named continuations with the id of their first token.
    continued
        If the tokens are those of a prompt and its continuation, where these come from; the
        scenario is called as the trace then.
    """

    scenario: Scenario
    tokens: Tokens
    spans: dict[str, SpanAttributes]
    options: dict[str, OptionAttributes]
    continued: Continued | None = None


def tokenize(model: LoadedModel, scenario: Scenario, *, prepend_bos: bool) -> Prompt:
    """Tokenise one scenario's prompt, as :func:`tokenize_all` does."""
    return next(tokenize_all(model, [scenario], prepend_bos=prepend_bos))


def tokenize_all(
    model: LoadedModel, scenarios: Iterable[Scenario], *, prepend_bos: bool
) -> Iterator[Prompt]:
    """Tokenise prompts, and add BOS once or not at all; some are read ahead.

    Parameters
    ----------
    model
        Its tokenizer and its longest input count.
    scenarios
        Prompts and their spans; chats are rendered (:meth:`Scenario.render`).
    prepend_bos
        Whether sequences start with BOS, as the SAEs were trained: with one, also if the prompt
        spells it out. False adds none, and keeps those that the prompt spells out. In a rendered
        chat all special tokens are part of the text.

    Raises
    ------
    ConfigError
        If a prompt is longer than the model's context: nothing is ever cut.
    ScenarioError
        If a span covers no token.
    """
    rest = iter(scenarios)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        encoded: dict[int, _Encoded] = {}
        for is_chat in (False, True):
            numbers = [n for n, one in enumerate(some) if (one.chat is not None) == is_chat]
            texts = [some[number].prompt for number in numbers]
            found = _encode(model.tokenizer, texts, add_special_tokens=not is_chat)
            encoded |= zip(numbers, found, strict=True)
        for number, scenario in enumerate(some):
            ids, offsets = encoded[number]
            if scenario.chat is None:
                ids, offsets = _with_bos(model, ids, offsets, prepend_bos=prepend_bos)
            yield _prompt(model, scenario, ids, offsets)


def _prompt(
    model: LoadedModel, scenario: Scenario, ids: list[int], offsets: list[tuple[int, int]]
) -> Prompt:
    if scenario.messages and not scenario.prompt:
        raise ValueError(f"scenario {scenario.name!r} is not rendered")  # a fault of the caller
    if model.max_tokens is not None and len(ids) > model.max_tokens:
        raise ConfigError(
            f"scenario {scenario.name!r}: its prompt has {len(ids)} tokens, the model's context "
            f"has {model.max_tokens}",
            why="A prompt is never cut silently: the decision would be another one.",
            remedy="Shorten the prompt, or choose a model with a longer context.",
        )
    positions = span_positions(scenario, offsets)
    special = model.special_ids
    return Prompt(
        scenario=scenario,
        tokens=Tokens(
            ids=ids,
            texts=[model.texts[token] for token in ids],
            special=[token in special for token in ids],
        ),
        spans={
            name: SpanAttributes(
                characters=tuple(scenario.spans.get(name, ())), tokens=tuple(found)
            )
            for name, found in positions.items()
        },
        options={
            name: OptionAttributes(
                text=text, token_id=_continuation(model.tokenizer, scenario.prompt, text)
            )
            for name, text in scenario.options.items()
        },
    )


def _encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> Iterator[_Encoded]:
    """Return ids and offsets of texts: together they take half the time."""
    if not texts:
        return iter(())
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
    )
    offsets = ([(int(a), int(b)) for a, b in one] for one in encoded["offset_mapping"])
    return zip(map(list, encoded["input_ids"]), offsets, strict=True)


def _with_bos(
    model: LoadedModel, ids: list[int], offsets: list[tuple[int, int]], *, prepend_bos: bool
) -> _Encoded:
    bos, special = model.tokenizer.bos_token_id, model.special_ids
    # An end-of-sequence token would make it, and not the prompt's last token, the decision.
    while len(ids) > 1 and ids[-1] in special and offsets[-1] == (0, 0):
        del ids[-1], offsets[-1]
    leading = 0
    while leading < len(ids) and ids[leading] == bos:
        leading += 1
    # A BOS that the prompt spells out is text, other than the one that the tokenizer adds.
    spelt = sum(offset != (0, 0) for offset in offsets[:leading])
    wanted = 1 if prepend_bos else spelt
    if prepend_bos and bos is None:
        raise ConfigError(
            "the SAEs expect a BOS token, and this tokenizer has none",
            why="The SAEs are those of another model, or its tokenizer was changed.",
            remedy="Use --no-prepend-bos, or the tokenizer that the SAEs were trained with.",
        )
    if leading < wanted:
        return [bos, *ids], [(0, 0), *offsets]
    return ids[leading - wanted :], offsets[leading - wanted :]


def _continuation(tokenizer: Any, prompt: str, text: str) -> int:
    """Id of the first token of `text` as the prompt's continuation."""
    before: Sequence[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after: Sequence[int] = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    for old, new in zip(before, after, strict=False):
        if old != new:  # the text changes how the prompt's end is cut: take it by itself
            return int(tokenizer(text, add_special_tokens=False)["input_ids"][0])
    return int(after[len(before)])
