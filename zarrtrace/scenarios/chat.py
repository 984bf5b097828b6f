"""Chats: messages instead of a prompt, and the text that a tokenizer's template makes of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.format.attributes import ChatAttributes
from zarrtrace.scenarios.entries import MessageEntry, SpanEntry, TextSpan
from zarrtrace.scenarios.names import label
from zarrtrace.scenarios.spans import (
    CharRange,
    find_span,
    locate_spans,
    occurrences,
    refuse_decision,
)
from zarrtrace.scenarios.templates import read_marks

_ASSISTANT = "assistant"
# A template may fail as Jinja does, or as the Python expressions in it do.
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

_Render = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Message:
    """One message of a chat.

    Attributes
    ----------
    role
        As the template knows it: ``"system"``, ``"user"``, ``"assistant"``.
    content
        Its text, without marks.
    spans
        Character ranges ``(start, end)`` of `content` by span name.
    """

    role: str
    content: str
    spans: Mapping[str, tuple[CharRange, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """The messages of a scenario, and what a template made of them.

    Attributes
    ----------
    messages
        In order.
    generation_prompt
        Whether the template begins the assistant's next message. None does as the run is told.
    sought
        Spans that are looked for in the rendered text.
    template
        Hash of the template; None until the chat is rendered.
    continued
        Whether the rendered text ends within the last message, the assistant's.
    """

    messages: tuple[Message, ...]
    generation_prompt: bool | None = None
    sought: Mapping[str, SpanEntry] = field(default_factory=dict)
    template: str | None = None
    continued: bool = False

    @property
    def attributes(self) -> ChatAttributes | None:
        """Attributes that traces store; None until it is rendered."""
        if self.template is None:
            return None
        return ChatAttributes(
            template=self.template,
            generation_prompt=bool(self.generation_prompt),
            continued=self.continued,
        )


# --- reading -----------------------------------------------------------------------------------


def read_chat(
    scenario: str,
    messages: Sequence[MessageEntry],
    spans: Mapping[str, SpanEntry],
    *,
    marks: bool,
    generation_prompt: bool | None,
) -> Chat:
    """Return the chat of a checked entry, with the spans that stand in messages.

    Parameters
    ----------
    scenario
        Its name, for errors.
    messages
        In order.
    spans
        As the entry gives them: those with a message are searched there, others later.
    marks
        Whether marks ``[[name:text]]`` in contents are taken out.
    generation_prompt
        As for :class:`Chat`.

    Raises
    ------
    ScenarioError
        If all messages are empty, a mark is wrong, or a message lacks a span.
    """
    if not any(message.content.strip() for message in messages):
        raise ScenarioError(f"{label(scenario)}: its messages are empty", remedy="Give them text.")
    found = [
        _read_message(scenario, at, message, marks=marks) for at, message in enumerate(messages)
    ]
    sought: dict[str, SpanEntry] = {}
    for name, given in spans.items():
        refuse_decision(scenario, name)
        if not isinstance(given, TextSpan) or given.message is None:
            sought[name] = given
            continue
        if not -len(found) <= given.message < len(found):
            raise ScenarioError(
                f"{label(scenario)}: span {name!r}: there is no message {given.message}",
                remedy=f"Messages count from 0 to {len(found) - 1}, or back from -1.",
            )
        at = given.message % len(found)
        content, before = found[at].content, found[at].spans
        search = functools.partial(occurrences, content)
        ranges = find_span(scenario, name, given, content, search, where=f"message {at}")
        together = tuple(sorted({*before.get(name, ()), *ranges}))
        found[at] = replace(found[at], spans={**before, name: together})
    return Chat(tuple(found), generation_prompt=generation_prompt, sought=sought)


def _read_message(scenario: str, at: int, given: MessageEntry, *, marks: bool) -> Message:
    content = given.content
    spans: dict[str, tuple[CharRange, ...]] = {}
    if marks:
        try:
            content, spans = read_marks(content)
        except ScenarioError as error:
            raise ScenarioError(
                f"{label(scenario)}: message {at}: {error.what}",
                remedy=f"{error.remedy} Or take contents word for word with marks=False.",
            ) from None
    return Message(given.role, content, spans)


# --- rendering ---------------------------------------------------------------------------------


def render_chat(
    scenario: str,
    chat: Chat,
    tokenizer: Any,
    *,
    generation_prompt: bool,
    prepend_bos: bool | None,
) -> tuple[str, dict[str, tuple[CharRange, ...]], Chat]:
    """Apply a tokenizer's template, and find the spans in the text that it makes.

    Parameters
    ----------
    scenario
        Its name, for errors.
    chat
        The messages.
    tokenizer
        Tokenizer of transformers, with a chat template.
    generation_prompt
        Default for a chat that does not state it.
    prepend_bos
        Whether the text begins with BOS; None leaves it to the template.

    Returns
    -------
    prompt, spans, chat
        The text with its special tokens, the character ranges of spans in it, and the chat with
        the hash of the template.

    Raises
    ------
    ConfigError
        If there is no template, or it contradicts `prepend_bos`.
    ScenarioError
        If the template refuses the messages, or a span cannot be found exactly.
    """
    template = _template(scenario, tokenizer)
    begins = generation_prompt if chat.generation_prompt is None else chat.generation_prompt
    render = _renderer(scenario, chat, tokenizer, generation_prompt=begins)
    contents = [message.content for message in chat.messages]
    text = render(contents)

    @functools.cache
    def place(message: int, start: int, end: int) -> CharRange:
        return _place(scenario, render, contents, text, (message, start, end))

    marked: dict[str, list[CharRange]] = {}
    for at, message in enumerate(chat.messages):
        for name, ranges in message.spans.items():
            marked.setdefault(name, []).extend(place(at, *one) for one in ranges)
    continued = not begins and chat.messages[-1].role == _ASSISTANT
    prompt = text
    if continued:
        if not contents[-1].strip():
            raise ScenarioError(
                f"{label(scenario)}: there is no text to continue in its last message",
                remedy="Leave that message out, and ask for a generation prompt.",
            )
        prompt = text[: place(len(contents) - 1, 0, len(contents[-1]))[1]]
    lead = _missing_bos(scenario, prompt, tokenizer, wanted=prepend_bos)
    moved = {
        name: [(start + len(lead), end + len(lead)) for start, end in ranges]
        for name, ranges in marked.items()
    }
    prompt = lead + prompt
    spans = locate_spans(scenario, prompt, chat.sought, moved)
    digest = hashlib.blake2b(template.encode(), digest_size=8).hexdigest()
    return (
        prompt,
        spans,
        replace(chat, generation_prompt=begins, template=digest, continued=continued),
    )


def _template(scenario: str, tokenizer: Any) -> str:
    """Return the template that transformers would apply."""
    named = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    try:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError:  # several templates, none of them the default
        template = ""
    if not template:
        raise ConfigError(
            f"{label(scenario)} has messages, and the tokenizer of {named} has no chat template",
            why="A template writes roles and turns as the model was trained on them; base models "
            "come without one.",
            remedy="Use the model's instruction-tuned version, give the text as a prompt, or (in "
            "Python) a tokenizer whose chat_template you set.",
        )
    return str(template)


def _renderer(scenario: str, chat: Chat, tokenizer: Any, *, generation_prompt: bool) -> _Render:
    """Return a function of contents that applies the template."""
    from jinja2 import TemplateError  # noqa: PLC0415 -- of the extra, as is the tokenizer

    roles = [message.role for message in chat.messages]

    def render(contents: Sequence[str]) -> str:
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, *_TEMPLATE_ERRORS) as error:
            raise ScenarioError(
                f"{label(scenario)}: the chat template refuses its messages: {error}",
                why=f"Their roles are {', '.join(roles)}; a template knows some roles, in some "
                "orders.",
                remedy="Give messages that it takes; a system message that it refuses may stand at "
                "the beginning of the first user message.",
            ) from error
        return text

    return render


def _place(
    scenario: str,
    render: _Render,
    contents: Sequence[str],
    text: str,
    place: tuple[int, int, int],
) -> CharRange:
    """Return where a range of a message's content stands in the rendered text.

    The template is applied once more, with a word that stands nowhere else in place of the range.
    The text around this word must be the text around the range; only white space at its ends may
    be missing, which templates trim.
    """
    at, start, end = place
    content = contents[at]
    marker = "zarrtrace"
    while marker in text or any(marker in one for one in contents):
        marker += "x"
    other = list(contents)
    other[at] = content[:start] + marker + content[end:]
    before, found, after = render(other).partition(marker)
    first, last = len(before), len(text) - len(after)
    exact = found and marker not in after and first <= last
    if exact and text.startswith(before) and text.endswith(after):
        kept, wanted = text[first:last], content[start:end]
        if kept.strip() and _is_trimmed(kept, wanted):
            return first, last
    shown = content[start:end] if end - start <= 60 else f"{content[start : start + 60]}…"
    raise ScenarioError(
        f"{label(scenario)}: the chat template does not write {shown!r} of message {at} exactly "
        "once, as it is",
        why="It leaves out, repeats or changes this text, so that its place is not known.",
        remedy="Take that span out of the message, or give it as a text that is searched in the "
        "rendered prompt.",
    )


def _is_trimmed(kept: str, wanted: str) -> bool:
    """Whether a text lacks nothing but white space at its ends."""
    core = wanted.strip()
    if kept.strip() != core:
        return False
    lead, trail = wanted.partition(core)[0], wanted[wanted.index(core) + len(core) :]
    mine, rest = kept.partition(core)[0], kept[kept.index(core) + len(core) :]
    return lead.endswith(mine) and trail.startswith(rest)


def _missing_bos(scenario: str, text: str, tokenizer: Any, *, wanted: bool | None) -> str:
    """Return BOS if it is wanted and the template did not write it."""
    bos: str | None = tokenizer.bos_token
    written = bool(bos) and text.startswith(str(bos))
    if wanted is False and written:
        raise ConfigError(
            f"--no-prepend-bos: {label(scenario)}: the chat template itself writes {bos}",
            why="Without it, the prompt would not be what the template makes.",
            remedy="Leave the option out, or (in Python) give a tokenizer with another "
            "chat_template.",
        )
    if not wanted or written:
        return ""
    if not bos:
        raise ConfigError(
            f"--prepend-bos: {label(scenario)}: the tokenizer has no BOS token",
            remedy="Leave the option out: the template decides.",
        )
    return bos
