"""Storing what something else captured, trace by trace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from pydantic import ValidationError

from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.format.attributes import (
    ChatAttributes,
    GenerationAttributes,
    ModelAttributes,
    SpanAttributes,
    TraceAttributes,
    ranges,
)
from zarrtrace.format.layout import TraceShape
from zarrtrace.records import Tokens, TracePlan
from zarrtrace.scenarios import COMPLETION, DECISION, CharRange, Scenario, span_positions
from zarrtrace.scenarios.names import IDENTIFIER
from zarrtrace.storage import Address, locate
from zarrtrace.store.captured import CapturedArrays, token_positions, whole_numbers
from zarrtrace.store.run_writer import RunExtension
from zarrtrace.store.trace_writer import TraceWriter


def write_trace(
    run: Address,
    scenario: str | Scenario,
    *,
    tokens: tuple[Sequence[int], Sequence[str]],
    attention: Mapping[int, Any] | None = None,
    features: Mapping[int, Any] | None = None,
    residual: Mapping[int, Any] | None = None,
    positions: Sequence[int] | None = None,
    attention_positions: Sequence[int] | None = None,
    spans: Mapping[str, Sequence[int]] | None = None,
    offsets: Sequence[CharRange] | None = None,
    special: Sequence[bool] | None = None,
    model: str | None = None,
    generation: GenerationAttributes | Mapping[str, Any] | None = None,
    repeat: int | None = None,
    choice: str | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, str] | None = None,
) -> None:
    """Store attention, features and residual stream of one prompt that something else captured.

    The first call creates the run, further calls add traces to it. After each call the run is
    complete and can be opened. All its traces have the same layers, sizes and precisions. They
    have no next tokens and no description of the model. One process writes a run at a time.

    Parameters
    ----------
    run
        Folder of the run, or its address in an object store.
    scenario
        A name, or a :class:`zarrtrace.Scenario` that has one. Its prompt, spans, tags and metadata
        are stored; it must have no options, because these need a tokenizer.
    tokens
        Ids and texts of all tokens: of the prompt, and of its continuation if there is one.
    attention
        By layer, weights behind the softmax, ``(head, query, key)``.
    features
        By layer, activations ``(query, feature)``; SciPy's sparse ones, too. Layers may have
        attention, features, residual, or several of them.
    residual
        By layer, the residual stream ``(query, channel)``, as the outputs of the decoder blocks.
        The trace does not say which hook point it is from.
    positions
        Token positions of the rows (`query`) of all arrays, ascending. By default all tokens.
    attention_positions
        Token positions of the rows of attention, if it has fewer: some of `positions`.
    spans
        Token positions by name (letters, digits and ``_``). Other spans of `scenario` are found by
        their characters.
    offsets
        Characters ``(start, end)`` of the prompt for which each token stands; ``(0, 0)`` for none.
        By default found from the texts, if these put together end with the prompt.
    special
        Which tokens are special, such as BOS. By default not known.
    model
        Name of the model, for people; the same in all calls.
    generation
        How the last tokens were generated, as ``schema/trace.schema.json`` says; ``prompt_tokens``
        of the tokens are the prompt. They become the span ``completion``.
    repeat
        Number of the continuation, if the scenario has several: the trace is called ``NAME~repeat``
        then.
    choice
        The option that was chosen in the continuation.
    overwrite
        Replace the scenario's trace if the run has one.
    storage_options
        How to reach an object store.

    Notes
    -----
    Arrays are those of NumPy or torch, on any device: float16, bfloat16 or float32, which are
    stored losslessly, bfloat16 as float32.

    Raises
    ------
    ConfigError, ScenarioError
        If shapes or precisions do not agree, attention holds no probabilities, a span cannot be
        found, or the run has the scenario and `overwrite` is false.
    ConfigMismatchError
        If the run has other layers, sizes or precisions.
    NonFiniteError
        If an array holds NaN or infinity.
    NotATraceError
        If `run` is something else than a run that this function writes.
    LockedError
        If another process is writing the run.
    """
    location = locate(run, storage_options)
    given = Scenario(".", name=scenario, marks=False) if isinstance(scenario, str) else scenario
    label = f"scenario {given.name!r}"
    if not given.name:
        raise ScenarioError("the scenario has no name", remedy="Give Scenario(…, name=…).")
    if given.messages and not given.prompt:
        raise ScenarioError(
            f"{label}: has messages, which are not rendered",
            why="A tokenizer's chat template makes the prompt of them.",
            remedy="Give scenario.render(tokenizer).",
        )
    if given.options:
        raise ConfigError(
            f"{label}: has options",
            why="An option is a token that may come next, and no tokenizer is at hand.",
            remedy="Leave options out.",
        )
    texts = _tokens(label, tokens, special)
    made = _generation(label, generation, len(texts.ids), repeat)
    arrays = CapturedArrays(
        label,
        len(texts.ids),
        {"attention": attention or {}, "features": features or {}, "residual": residual or {}},
        positions,
        attention_positions,
    )
    found = _spans(label, given, texts.texts, spans or {}, offsets, made)
    plan = trace_plan(
        scenario=given.name,
        repeat=repeat,
        generation=made,
        choice=choice,
        prompt=None if isinstance(scenario, str) else given.prompt,
        chat=None if given.chat is None else given.chat.attributes,
        tags=given.tags,
        spans={
            name: SpanAttributes(characters=given.spans.get(name, ()), tokens=tuple(positions))
            for name, positions in found.items()
        },
        metadata=given.metadata,
        layers=arrays.layers,
        without_attention={"none was given": arrays.without["attention"]},
        without_sae=arrays.without["features"],
        without_residual=arrays.without["residual"],
        **arrays.sizes,
        tokens=texts,
        positions=arrays.positions,
        attention_positions=arrays.attention_positions,
    )
    config = {
        "written_by": "zarrtrace.write_trace",
        "model": model,
        "layers": ranges(arrays.layers),
        **{f"layers_without_{name}": ranges(found) for name, found in arrays.without.items()},
        **arrays.sizes,
        "metadata": {name: type(value).__name__ for name, value in given.metadata.items()},
    }
    with RunExtension(location, config) as extended:
        name = plan.attributes.name
        extended.begin(name, overwrite=overwrite)
        with TraceWriter(extended.path, plan, fresh=True) as trace:
            for layer in arrays.layers:
                trace.append(arrays.record(name, layer))
        extended.add(name)


# --- shared with imports ------------------------------------------------------------------------


def trace_plan(
    *,
    scenario: str,
    prompt: str | None,
    tags: Sequence[str],
    spans: Mapping[str, SpanAttributes],
    layers: Sequence[int],
    without_attention: Mapping[str, Sequence[int]],
    without_sae: Sequence[int],
    heads: int | None,
    features: int | None,
    attention_dtype: Any,
    feature_dtype: Any,
    tokens: Tokens,
    positions: tuple[int, ...] | None = None,
    attention_positions: tuple[int, ...] | None = None,
    without_residual: Sequence[int] = (),
    channels: int | None = None,
    residual_dtype: Any = None,
    metadata: Mapping[str, Any] | None = None,
    model: ModelAttributes | None = None,
    chat: ChatAttributes | None = None,
    generation: GenerationAttributes | None = None,
    repeat: int | None = None,
    choice: str | None = None,
) -> TracePlan:
    """Describe a trace whose arrays are there already, and which has no next tokens.

    Parameters
    ----------
    scenario, prompt, tags, spans, metadata, model, chat, generation, repeat, choice
        As the trace's attributes have them.
    layers
        Ascending.
    without_attention, without_sae, without_residual
        Layers that lack attention, by reason, and layers that lack features and residual.
    heads, features, channels
        Sizes; None for none.
    attention_dtype, feature_dtype, residual_dtype
        Precisions.
    tokens, positions, attention_positions
        The prompt's tokens; those that are stored, and those whose rows of attention are, as in
        :class:`zarrtrace.records.TracePlan`.
    """
    reasons = {reason: tuple(found) for reason, found in without_attention.items() if found}
    lacking = sum(map(len, reasons.values()))
    if heads is None:
        reasons, lacking = {}, 0
    return TracePlan(
        attributes=TraceAttributes(
            scenario=scenario,
            repeat=repeat,
            generation=generation,
            choice=choice,
            prompt=prompt,
            chat=chat,
            tags=tuple(tags),
            spans=dict(spans),
            metadata=dict(metadata or {}),
            model=model,
            layers=tuple(layers),
            layers_without_sae=() if features is None else tuple(without_sae),
            layers_without_attention=reasons,
            layers_without_residual=tuple(without_residual),
            attention_dtype=attention_dtype,
            feature_dtype=feature_dtype,
            residual_dtype=residual_dtype,
            versions={name: version(name) for name in ("numpy", "zarr")},
        ),
        shape=TraceShape(
            layers=len(layers),
            tokens=len(tokens.ids),
            heads=heads,
            features={} if features is None else {"features": features},
            channels=channels,
            attention_dtype=attention_dtype,
            feature_dtype=feature_dtype,
            residual_dtype=residual_dtype,
            next_token=False,
            attention_layers=len(layers) - lacking if lacking else None,
        ),
        tokens=tokens,
        positions=positions,
        attention_positions=attention_positions,
    )


# --- what a caller gives ------------------------------------------------------------------------


def _tokens(
    label: str, given: tuple[Sequence[int], Sequence[str]], special: Sequence[bool] | None
) -> Tokens:
    error = ConfigError(
        f"{label}: tokens are no ids and texts of one prompt",
        why="Each token has an id in the model's vocabulary and a text.",
        remedy="Give (ids, texts) as tokens, equally many; special, if given, as many, too.",
    )
    try:
        first, second = given
        ids, texts = whole_numbers(first), list(second)
    except (TypeError, ValueError):
        raise error from None
    is_odd = not all(isinstance(one, str) for one in texts) or any(
        not 0 <= one < 2**32 for one in ids
    )
    marks = None if special is None else [bool(one) for one in special]
    if is_odd or not ids or {len(texts), len(ids if marks is None else marks)} != {len(ids)}:
        raise error
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{label}: the text of token {number} is {text!r}, which is not valid Unicode",
                why="Half of a surrogate pair is stored as no text; it is left over where bytes "
                "were decoded with 'surrogateescape'.",
                remedy="Decode with errors='replace', as tokenizers do.",
            ) from None
    return Tokens(ids, [str(text) for text in texts], marks)  # NumPy's texts are no plain str


def _generation(
    label: str,
    given: GenerationAttributes | Mapping[str, Any] | None,
    tokens: int,
    repeat: int | None,
) -> GenerationAttributes | None:
    if repeat is not None and not (isinstance(repeat, int) and 0 <= repeat < 10**9):
        raise ConfigError(
            f"{label}: repeat {repeat!r}", remedy="Give the number of the continuation, from 0."
        )
    if given is None:
        return None
    try:
        made = GenerationAttributes.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{label}: generation: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            remedy="See schema/trace.schema.json for its fields.",
        ) from None
    if made.prompt_tokens >= tokens:
        raise ConfigError(
            f"{label}: generation.prompt_tokens is {made.prompt_tokens}, of {tokens} tokens",
            why="The tokens behind the prompt are the continuation, at least one.",
            remedy="Give the tokens of both.",
        )
    return made


def _spans(
    label: str,
    scenario: Scenario,
    texts: Sequence[str],
    given: Mapping[str, Sequence[int]],
    offsets: Sequence[CharRange] | None,
    generation: GenerationAttributes | None,
) -> dict[str, list[int]]:
    """Return token positions of all spans, ``decision`` and ``completion`` included."""
    last = len(texts) - 1
    prompt = len(texts) if generation is None else generation.prompt_tokens
    own = {DECISION} if generation is None else {DECISION, COMPLETION}
    found = _given_spans(label, given)
    taken = {name: list[int]() for name in own & {*scenario.spans}}
    for name, positions in {**taken, **found}.items():
        if name in own or not positions or positions[0] < 0 or positions[-1] > last:
            raise ConfigError(
                f"{label}: span {name!r} at {positions}",
                why=f"There are tokens 0 to {last}; {DECISION!r} is always the prompt's last one"
                + (f", {COMPLETION!r} all behind it." if COMPLETION in own else "."),
                remedy="Give positions of these tokens, and other names.",
            )
    if rest := [name for name in scenario.spans if name not in found]:
        words = texts[:prompt]
        places = _offsets(scenario.prompt, words) if offsets is None else list(offsets)
        if places is None or len(places) != prompt:
            raise ConfigError(
                f"{label}: no token positions for span {rest[0]!r}",
                why="The texts of the tokens, put together, do not end with the prompt."
                if places is None
                else f"offsets are for {len(places)} tokens, and the prompt has {prompt}.",
                remedy="Give spans={name: positions}, or offsets as fast tokenizers do with "
                "return_offsets_mapping=True.",
            )
        positions_of = span_positions(scenario, places)
        found |= {name: positions_of[name] for name in rest}
    found[DECISION] = [prompt - 1]
    return found if generation is None else {**found, COMPLETION: [*range(prompt, last + 1)]}


def _given_spans(label: str, given: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return positions of spans that a caller names, ascending."""
    for name in given:
        if not isinstance(name, str) or not re.fullmatch(IDENTIFIER, name):
            raise ConfigError(
                f"{label}: {name!r} is no name of a span",
                why="Tables put the names of a token's spans together, with commas between them.",
                remedy="Use letters, digits and '_', and begin with no digit.",
            )
    return {
        name: sorted({*token_positions(f"{label}: span {name!r}", positions)})
        for name, positions in given.items()
    }


def _offsets(prompt: str, texts: Sequence[str]) -> list[CharRange] | None:
    """Find the characters of each token, if the texts end with the prompt."""
    joined = "".join(texts)
    if not joined.endswith(prompt):
        return None
    # In front of the prompt stands a special token, or the space that SentencePiece adds.
    edges = np.cumsum([0, *map(len, texts)]) - (len(joined) - len(prompt))
    starts, ends = (np.maximum(one, 0).tolist() for one in (edges[:-1], edges[1:]))
    return list(zip(starts, ends, strict=True))
