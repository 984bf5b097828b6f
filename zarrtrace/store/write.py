"""Storing what something else captured, trace by trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.format.attributes import (
    ChatAttributes,
    ModelAttributes,
    SpanAttributes,
    TraceAttributes,
    ranges,
)
from zarrtrace.format.layout import TraceShape
from zarrtrace.records import Tokens, TracePlan
from zarrtrace.scenarios import DECISION, CharRange, Scenario, span_positions
from zarrtrace.storage import Address, locate
from zarrtrace.store.captured import CapturedArrays
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
        Ids and texts of the prompt's tokens, all of them.
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
        Token positions by name. Other spans of `scenario` are found by their characters.
    offsets
        Characters ``(start, end)`` of the prompt for which each token stands; ``(0, 0)`` for none.
        By default found from the texts, if these put together end with the prompt.
    special
        Which tokens are special, such as BOS. By default not known.
    model
        Name of the model, for people; the same in all calls.
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
    arrays = CapturedArrays(
        label,
        len(texts.ids),
        {"attention": attention or {}, "features": features or {}, "residual": residual or {}},
        positions,
        attention_positions,
    )
    found = _spans(label, given, texts.texts, spans or {}, offsets)
    plan = trace_plan(
        scenario=given.name,
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
        extended.begin(given.name, overwrite=overwrite)
        with TraceWriter(extended.path, plan, fresh=True) as trace:
            for layer in arrays.layers:
                trace.append(arrays.record(given.name, layer))
        extended.add(given.name)


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
) -> TracePlan:
    """Describe a trace whose arrays are there already, and which has no next tokens.

    Parameters
    ----------
    scenario, prompt, tags, spans, metadata, model, chat
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
        remedy="Give tokens=(ids, texts), equally many; special, if given, as many, too.",
    )
    try:
        first, second = given
        ids, texts = [int(one) for one in first], list(second)
    except (TypeError, ValueError):
        raise error from None
    is_odd = not all(isinstance(one, str) for one in texts) or any(
        not 0 <= one < 2**32 for one in ids
    )
    marks = None if special is None else [bool(one) for one in special]
    if is_odd or not ids or {len(texts), len(ids if marks is None else marks)} != {len(ids)}:
        raise error
    return Tokens(ids, texts, marks)


def _spans(
    label: str,
    scenario: Scenario,
    texts: Sequence[str],
    given: Mapping[str, Sequence[int]],
    offsets: Sequence[CharRange] | None,
) -> dict[str, list[int]]:
    """Return token positions of all spans, ``decision`` included."""
    last = len(texts) - 1
    found = {name: sorted({int(at) for at in positions}) for name, positions in given.items()}
    for name, positions in found.items():
        if name == DECISION or not positions or positions[0] < 0 or positions[-1] > last:
            raise ConfigError(
                f"{label}: span {name!r} at {positions}",
                why=f"The prompt has tokens 0 to {last}; {DECISION!r} is always the last one.",
                remedy="Give positions of the prompt's tokens.",
            )
    if rest := [name for name in scenario.spans if name not in found]:
        places = _offsets(scenario.prompt, texts) if offsets is None else list(offsets)
        if places is None or len(places) != len(texts):
            raise ConfigError(
                f"{label}: no token positions for span {rest[0]!r}",
                why="The texts of the tokens, put together, do not end with the prompt."
                if places is None
                else f"offsets are for {len(places)} tokens, and there are {len(texts)}.",
                remedy="Give spans={name: positions}, or offsets as fast tokenizers do with "
                "return_offsets_mapping=True.",
            )
        positions_of = span_positions(scenario, places)
        found |= {name: positions_of[name] for name in rest}
    return {**found, DECISION: [last]}


def _offsets(prompt: str, texts: Sequence[str]) -> list[CharRange] | None:
    """Find the characters of each token, if the texts end with the prompt."""
    joined = "".join(texts)
    if not joined.endswith(prompt):
        return None
    # In front of the prompt stands a special token, or the space that SentencePiece adds.
    edges = np.cumsum([0, *map(len, texts)]) - (len(joined) - len(prompt))
    starts, ends = (np.maximum(one, 0).tolist() for one in (edges[:-1], edges[1:]))
    return list(zip(starts, ends, strict=True))
