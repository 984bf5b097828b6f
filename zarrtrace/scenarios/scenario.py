"""One scenario: a named prompt with named spans, tags and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from types import MappingProxyType
from typing import Any

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.chat import Chat, Message, read_chat, render_chat
from zarrtrace.scenarios.entries import MessageEntry, SpanEntry, TextSpan, checked_entry
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

    >>> chat = Scenario(messages=[{"role": "user", "content": "You hold [[balance:$90]]. Bet?"}])
    >>> chat.messages[0].content
    'You hold $90. Bet?'

    Parameters
    ----------
    prompt
        The text the model reads, without special tokens.
    messages
        A chat instead of a prompt: mappings of ``role`` and ``content``. The tokenizer's chat
        template makes the prompt of them, when a run begins or in :meth:`render`.
    generation_prompt
        Whether the template begins the assistant's next message. If not, a last message of the
        assistant's is continued: the prompt ends where its content ends. None does as
        :func:`zarrtrace.extract` is told, where it is True by default.
    name
        Unique within its suite and safe as a folder name (:func:`check_name`). Without one, the
        suite calls it ``scenario_0``, ``scenario_1``, … by its place.
    tags
        Groups the scenario belongs to, for example ``["risky"]``.
    spans
        As in a file of scenarios: a text that occurs once, ``{"text": …, "occurrence": …}``, or
        character ranges ``(start, end)`` of the prompt without marks. Ranges in messages refer to
        the text that the template makes, or with ``"message": 1`` to one message's content.
    options
        Named continuations whose probability matters, for example ``{"bet": "1"}``.
    metadata
        Numbers, texts and booleans by name; None and NaN are missing values.
    marks
        Whether marks ``[[name:text]]`` in `prompt`, or in contents of `messages`, are taken out
        and become spans. Anything else in double brackets is literal. False takes texts word for
        word.
    chat
        Messages that were read already, as :func:`dataclasses.replace` hands them on.

    Attributes
    ----------
    prompt
        The text. With messages it is empty until they are rendered, and then holds the special
        tokens that the template writes.
    name
        Empty until a suite is made, if none was given.
    spans
        Character ranges ``(start, end)`` of `prompt` by span name, half open; of messages, when
        they are rendered.
    chat
        The messages and how they are rendered; None for a prompt.

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
    chat: Chat | None

    def __init__(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        generation_prompt: bool | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        spans: Mapping[
            str, SpanEntry | Mapping[str, Any] | Sequence[int] | Sequence[CharRange]
        ] = _NONE,
        options: Mapping[str, str] = _NONE,
        metadata: Mapping[str, Value | None] = _NONE,
        marks: bool = True,
        chat: Chat | None = None,
    ) -> None:
        called = label(name) if isinstance(name, str) else label("")
        given: dict[str, Any] = {
            "prompt": prompt if chat is None else None,
            "name": name,
            "tags": tags,
            "spans": spans,
        }
        given |= {"options": options, "metadata": metadata, "messages": messages}
        entry = checked_entry({**given, "generation_prompt": generation_prompt}, called)
        made = assembled(
            name="" if entry.name is None else check_name(entry.name),
            prompt=entry.prompt if chat is None else prompt,
            messages=entry.messages,
            generation_prompt=entry.generation_prompt,
            marks=marks,
            spans=entry.spans,
            tags=entry.tags,
            options=entry.options or {},
            metadata=entry.metadata,
            chat=chat,
        )
        _fill(self, **vars(made))

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages of a chat, without marks; none for a prompt."""
        return () if self.chat is None else self.chat.messages

    @property
    def span_names(self) -> tuple[str, ...]:
        """Names of its spans, in order, also of a chat that is not rendered yet."""
        chat = self.chat
        if chat is None or chat.template is not None:
            return tuple(self.spans)
        of_messages = (name for message in chat.messages for name in message.spans)
        return tuple(dict.fromkeys((*of_messages, *chat.sought)))

    def render(
        self, tokenizer: Any, *, generation_prompt: bool = True, prepend_bos: bool | None = None
    ) -> Scenario:
        """Return the scenario with the prompt that a tokenizer's template makes of its messages.

        A run does this by itself. A scenario that has a prompt is returned as it is.

        Parameters
        ----------
        tokenizer
            Tokenizer of transformers, with a chat template.
        generation_prompt
            Whether the template begins the assistant's next message, if the scenario does not say
            it.
        prepend_bos
            Whether the prompt begins with BOS. By default the template decides.

        Raises
        ------
        ConfigError
            If the tokenizer has no template, or its template contradicts `prepend_bos`.
        ScenarioError
            If the template refuses the messages, or a span cannot be found exactly.
        """
        if self.chat is None or self.chat.template is not None:
            return self
        prompt, spans, chat = render_chat(
            self.name,
            self.chat,
            tokenizer,
            generation_prompt=generation_prompt,
            prepend_bos=prepend_bos,
        )
        _check_length(self.name, prompt)
        return changed(self, prompt=prompt, spans=spans, chat=chat)


def assembled(
    *,
    name: str,
    prompt: str | None,
    spans: Mapping[str, SpanEntry],
    tags: Sequence[str],
    options: Mapping[str, str],
    metadata: Mapping[str, Value | None],
    marked: Mapping[str, Sequence[CharRange]] = _NONE,
    messages: Sequence[MessageEntry] | None = None,
    generation_prompt: bool | None = None,
    marks: bool = False,
    chat: Chat | None = None,
) -> Scenario:
    """Return a scenario of the checked fields of an entry.

    Parameters
    ----------
    name, spans, tags, options, metadata
        As for :class:`Scenario`.
    prompt, messages
        One of the two.
    generation_prompt
        Whether a template of messages begins the assistant's next one.
    marked
        Spans whose marks were taken out of the prompt already.
    marks
        Whether to take marks out.
    chat
        Chat of a copied scenario; `prompt` and `spans` then are its rendered ones.

    Raises
    ------
    ScenarioError
        If it has no text, both kinds or too much of it, or lacks a span.
    """
    if prompt is not None and messages is not None:
        raise ScenarioError(
            f"{label(name)} has a prompt and messages", remedy="Give one of the two."
        )
    if chat is not None:
        prompt = prompt or ""
    elif messages is not None:
        chat = read_chat(name, messages, spans, marks=marks, generation_prompt=generation_prompt)
        _check_length(name, "".join(message.content for message in chat.messages))
        prompt, spans = "", {}
    else:
        _refuse_chat_fields(name, spans, generation_prompt=generation_prompt)
        prompt, found = _checked_prompt(name, prompt, marks=marks)
        marked = {**marked, **found}
    return _fill(
        object.__new__(Scenario),
        prompt=prompt,
        name=name,
        tags=tuple(dict.fromkeys(tags)),
        spans=locate_spans(name, prompt, spans, marked),
        options=dict(options),
        metadata=dict(metadata),
        chat=chat,
    )


def _refuse_chat_fields(
    name: str, spans: Mapping[str, SpanEntry], *, generation_prompt: bool | None
) -> None:
    """Refuse fields that only messages have a use for."""
    field = "" if generation_prompt is None else "generation_prompt"
    for span, given in spans.items():
        if isinstance(given, TextSpan) and given.message is not None:
            field = f"span {span!r} in message {given.message}"
    if field:
        raise ScenarioError(
            f"{label(name)} has {field}, and no messages",
            remedy="Leave that out, or give messages instead of a prompt.",
        )


def _checked_prompt(
    name: str, prompt: str | None, *, marks: bool
) -> tuple[str, Mapping[str, Sequence[CharRange]]]:
    """Return a prompt and its marked spans; without text it is refused."""
    marked: Mapping[str, Sequence[CharRange]] = {}
    if marks and prompt:
        try:
            prompt, marked = read_marks(prompt)
        except ScenarioError as error:
            remedy = f"{error.remedy} Or take the prompt word for word with marks=False."
            raise ScenarioError(f"{label(name)}: {error.what}", remedy=remedy) from None
    if not prompt or not prompt.strip():
        raise ScenarioError(
            f"{label(name)}: its prompt is empty", remedy="Give it text, or messages."
        )
    _check_length(name, prompt)
    return prompt, marked


def _check_length(name: str, prompt: str) -> None:
    if len(prompt) > _MAX_PROMPT:
        raise ScenarioError(
            f"{label(name)}: its prompt has {len(prompt):,} characters",
            why=f"Up to {_MAX_PROMPT:,} are read, about a million tokens.",
            remedy="Shorten it, or split it into several scenarios.",
        )


def changed(scenario: Scenario, **fields: Any) -> Scenario:
    """Return a scenario with other fields, which are not checked; its prompt stays literal."""
    return _fill(object.__new__(Scenario), **{**vars(scenario), **fields})


def _fill(scenario: Scenario, **fields: Any) -> Scenario:
    for field, value in fields.items():
        object.__setattr__(scenario, field, value)
    return scenario
