"""Continuations of prompts, by transformers' own ``generate``.

``generate`` draws once a batch, so that a draw would depend on the other prompts of it. Here it
runs greedily behind a processor that makes the draw (:mod:`zarrtrace.capture.sampler`).

Attention is computed as it is captured, eagerly: where transformers has a faster function, it may
leave parts out (Gemma 2's soft cap), and the choice would be made from other probabilities than
the trace holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zarrtrace.capture.host import to_device
from zarrtrace.capture.messages import forward_errors, full_memory
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.prompts import Prompt
from zarrtrace.capture.rope import rope_limits, rope_sides
from zarrtrace.capture.sampler import Sampler
from zarrtrace.errors import ConfigError, ModelError
from zarrtrace.records import Continuation
from zarrtrace.scenarios.sampling import Sampling

#: Repeats of scenarios that go through the model together: indices of scenarios, and repeats.
Plan = list[list[tuple[int, int]]]

# Sequences of a batch.
_MOST = 64
# Size of a batch's keys and values, and of the scores of its prompts' attention in one block. The
# same whatever is free: a resumed run must make the same batches.
_CACHE_BYTES = 2**30
_SCORE_BYTES = 256 * 2**20
# Tokens of the prompt that are decoded together with a continuation: decoders drop the space in
# front of a text's first token, and join bytes of a character.
_CONTEXT = 16


def plan_batches(
    model: LoadedModel, lengths: Sequence[int], sampling: Sampling, *, size: int | None = None
) -> Plan:
    """Group the repeats of all scenarios into batches, by length of the prompts.

    Prompts of a batch are equally long, or padded where the model permits it
    (:func:`zarrtrace.capture.probe_generation`), and on one side of a length at which rotary
    embeddings change (:mod:`zarrtrace.capture.rope`). The result depends on the arguments alone: a
    resumed run that plans all its scenarios, done or not, makes the same batches as an
    uninterrupted one, and skips those that are done.

    Parameters
    ----------
    model
        The model; only its sizes and what it permits count.
    lengths
        Tokens of each scenario's prompt, in the suite's order.
    sampling
        Its `samples` and `tokens`.
    size
        Most sequences of a batch; None for what the model's cache of keys and values allows.

    Returns
    -------
    list of list of (int, int)
        Batches of (index of the scenario, repeat): shortest prompts first.
    """
    permitted = model.permitted
    size = size if permitted.cached_batches else 1
    groups: dict[tuple[int, int], list[int]] = {}
    sides = rope_sides(model, lengths)
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        length = 0 if permitted.left_padding else lengths[index]
        groups.setdefault((sides[index], length), []).append(index)
    batches: Plan = []
    for indices in groups.values():
        rows = [(index, repeat) for index in indices for repeat in range(sampling.samples)]
        batches += _cut(rows, lambda at: size or _default_size(model, lengths[at], sampling.tokens))
    return batches


def _cut(rows: Sequence[tuple[int, int]], most_of: Callable[[int], int]) -> Plan:
    """Cut rows into batches as large as the longest prompt of each allows."""
    stop, cut = len(rows), []
    while stop > 0:  # from behind: the longest prompt decides the number
        most = most_of(rows[stop - 1][0])
        cut.append(list(rows[max(0, stop - most) : stop]))
        stop -= most
    return cut[::-1]


def _default_size(model: LoadedModel, length: int, tokens: int) -> int:
    """Return how many sequences of a length keep their keys, values and scores within bounds."""
    config = model.model.config.get_text_config()
    itemsize = torch.empty(0, dtype=model.model.dtype).element_size()
    heads = getattr(config, "num_key_value_heads", None)
    share = heads / model.n_heads if isinstance(heads, int) else 1
    cache = 2 * len(model.blocks) * int(model.d_heads * share) * (length + tokens) * itemsize
    scores = model.n_heads * length**2 * itemsize
    return max(1, min(_MOST, _CACHE_BYTES // cache, _SCORE_BYTES // scores))


def check_context(model: LoadedModel, prompts: Iterable[Prompt], sampling: Sampling) -> None:
    """Refuse prompts that leave no place for their continuation; nothing is computed.

    Raises
    ------
    ConfigError
        If a prompt and its continuation may be longer than the model's context, or than the length
        at which its rotary embeddings change and the prompt is not.
    ModelError
        If the model's class cannot continue text.
    """
    if not model.model.can_generate():
        raise ModelError(
            f"{model.attributes.id}: transformers cannot continue text with "
            f"{type(model.model).__name__}",
            why="Its class has no method generate.",
            remedy="Leave out --generate, or choose a causal language model.",
        )
    for prompt in prompts:
        length = len(prompt.tokens.ids)
        _check_rope(model, prompt, sampling.tokens)
        if model.max_tokens is not None and length + sampling.tokens > model.max_tokens:
            raise ConfigError(
                f"scenario {prompt.scenario.name!r}: its prompt has {length} tokens, and "
                f"{sampling.tokens} more do not fit the model's context of {model.max_tokens}",
                why="Neither a prompt nor a continuation is cut silently.",
                remedy=f"Use --generate {model.max_tokens - length} or less, or a shorter prompt."
                if length < model.max_tokens
                else "Shorten the prompt, or choose a model with a longer context.",
            )


def _check_rope(model: LoadedModel, prompt: Prompt, tokens: int) -> None:
    """Refuse a continuation within which rotary embeddings change."""
    length = len(prompt.tokens.ids)
    for limit in rope_limits(model):
        if length <= limit < length + tokens:
            room = limit - length
            raise ConfigError(
                f"scenario {prompt.scenario.name!r}: its prompt has {length} tokens, and with "
                f"{tokens} more it may get longer than {limit}, where {model.attributes.id} "
                "computes otherwise (LongRoPE)",
                why="A trace is one pass over prompt and continuation. Beyond this length the pass "
                "has other rotary embeddings than chose the first tokens of the continuation.",
                remedy=(f"Use --generate {room} or less, or" if room else "Use")
                + " a longer or shorter prompt.",
            )


def generate(
    model: LoadedModel, requests: Sequence[tuple[Prompt, int]], sampling: Sampling
) -> list[Continuation]:
    """Let the model go on after some prompts, which it reads together.

    A continuation depends on the seed, its scenario and its repeat; on the batch only so far as
    sums are rounded otherwise in another one, which decides between tokens that are as good as
    equally likely. Settings of the model's own ``generation_config`` (temperature, penalties,
    suppressed or forced tokens, lengths) do not count, except for the ids of its end-of-sequence
    tokens.

    Parameters
    ----------
    model
        From :func:`zarrtrace.capture.load_model`, or borrowed (:mod:`zarrtrace.capture.borrow`).
    requests
        Prompts, each with the number of its repeat. Unequal lengths are padded on the left, which
        not every architecture computes exactly: :func:`plan_batches` knows.
    sampling
        Its settings.

    Returns
    -------
    list of Continuation
        One a request.

    Raises
    ------
    ConfigError
        If a prompt and its continuation may be longer than the model's context.
    ModelError
        If the model cannot continue text, or memory is full.
    NonFiniteError
        If it computes NaN.
    """
    check_context(model, (prompt for prompt, _ in requests), sampling)
    prompts = [prompt for prompt, _ in requests]
    start, end_ids = max(len(prompt.tokens.ids) for prompt in prompts), end_of_sequence_ids(model)
    sampler = Sampler([(prompt.scenario.name, n) for prompt, n in requests], sampling, start)
    stops = _StopTexts(model, prompts, sampling.stop, start, end_ids)
    ids = [prompt.tokens.ids for prompt in prompts]
    rows = run(model, ids, sampling.tokens, sampler, [stops] if sampling.stop else [])
    sampler.refuse_nan(model.attributes.id)
    return [
        _continuation(model, prompt, row, end_ids, stop)
        for prompt, row, stop in zip(prompts, rows, stops.lengths, strict=True)
    ]


def run(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    processor: LogitsProcessor,
    criteria: Sequence[StoppingCriteria] = (),
    *,
    part: int | None = None,
) -> list[list[int]]:
    """Run ``generate`` over the ids of some prompts, and return the ids that follow each.

    Behind the end of a sequence, while others go on, are ids that mean nothing. At most `part`
    tokens of a prompt are read together, where the model permits parts.
    """
    name, device = model.attributes.id, model.device
    ids, mask = _padded(prompts, device)
    settings = _settings(model, ids, tokens, part)
    with (
        full_memory(name, device),
        forward_errors(name),
        _only(model.model, settings),
        torch.inference_mode(),
    ):
        cache = _read_once(model, prompts, part) if settings.use_cache else None
        if cache is not None:  # one token is left, and transformers 5.17 would read all again
            settings.prefill_chunk_size = None
        found = model.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList(criteria),
            past_key_values=cache,
        )
        rows: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return rows


def _padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask ``(sequence, token)`` of prompts, padded on the left."""
    shape = (len(prompts), max(map(len, prompts)))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, shape[1] - len(prompt) :] = torch.tensor(prompt)
        mask[row, shape[1] - len(prompt) :] = 1
    return to_device(ids, device), to_device(mask, device)


def _read_once(
    model: LoadedModel, prompts: Sequence[Sequence[int]], part: int | None
) -> DynamicCache | None:
    """Return a cache of prompts that come several times, each read once but for its last token.

    Twenty repeats of a long prompt would else take the time of twenty prompts before the first new
    token. None, so that ``generate`` reads each, where this saves nothing, and for caches that hold
    more than keys and values: transformers cannot copy a recurrent state. Nor where the last token
    is the one that makes rotary embeddings change: keys of the others are to change with it.
    """
    places = {one: at for at, one in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if len(places) == len(prompts) or min(map(len, places)) < 2:
        return None
    longest = max(map(len, places))
    if len(set(rope_sides(model, (longest - 1, longest)))) > 1:
        return None
    cache = _keys_and_values(model)
    if cache is None:
        return None
    ids, mask = _padded([one[:-1] for one in places], model.device)
    # A token is generated, and dropped, for generate to number the positions and fill the cache.
    model.model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=_settings(model, ids, 1, part),
        past_key_values=cache,
    )
    rows = torch.tensor([places[tuple(prompt)] for prompt in prompts])
    cache.batch_select_indices(to_device(rows, model.device))
    return cache


def keeps_keys_and_values(model: LoadedModel) -> bool:
    """Whether a model keeps nothing but keys and values between tokens."""
    return _keys_and_values(model) is not None


def _keys_and_values(model: LoadedModel) -> DynamicCache | None:
    """Return an empty cache, None for a model that keeps more than keys and values."""
    if not model.model._supports_default_dynamic_cache():  # noqa: SLF001 -- no other way
        return None
    cache = DynamicCache(config=model.model.config.get_text_config(decoder=True))
    plain = {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    return cache if plain else None


# --- transformers' settings ---------------------------------------------------------------------


def end_of_sequence_ids(model: LoadedModel) -> tuple[int, ...]:
    """Return the ids of the model's end-of-sequence tokens: none, one or several."""
    # A class that cannot continue text has no such configuration.
    found = getattr(model.model.generation_config, "eos_token_id", None)
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _settings(
    model: LoadedModel, ids: torch.Tensor, tokens: int, part: int | None
) -> GenerationConfig:
    """Return the settings of ``generate`` for prompts ``(sequence, token)``."""
    end_ids = end_of_sequence_ids(model)
    itemsize = torch.empty(0, dtype=model.model.dtype).element_size()
    # Queries of a long prompt whose scores are computed together, as capture does.
    rows = part or max(1, _SCORE_BYTES // (ids.numel() * model.n_heads * itemsize))
    permitted = model.permitted
    in_parts = permitted.cache and permitted.cached_parts and keeps_keys_and_values(model)
    # Beyond a limit, the first part would be short enough for other rotary embeddings.
    in_parts = in_parts and rope_sides(model, (ids.shape[1],)) == [0]
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=model.permitted.cache,
        prefill_chunk_size=rows if in_parts and rows < ids.shape[1] else None,
        eos_token_id=list(end_ids) or None,
        # Stands behind the end of a sequence while others go on, and is cut off.
        pad_token_id=end_ids[0] if end_ids else 0,
        disable_compile=True,
    )


@contextmanager
def _only(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Let a model know no other settings.

    ``generate`` takes from the model's own ``generation_config`` whatever the one that it is given
    leaves open, such as a repetition penalty.
    """
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


# --- the end of a continuation ------------------------------------------------------------------


class _StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends each continuation at the token that completes a stop text.

    transformers' own stop strings also look at the prompt's end, and say nothing of where they are.

    Parameters
    ----------
    model, prompts
        The model, and the prompt of each sequence.
    stop
        Texts.
    start
        Tokens in front of a continuation, padding included.
    end_ids
        Ids of end-of-sequence tokens.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[Prompt],
        stop: Sequence[str],
        start: int,
        end_ids: Sequence[int],
    ) -> None:
        self._model, self._prompts, self._stop = model, prompts, stop
        self._start, self._end_ids = start, frozenset(end_ids)
        #: By sequence, the number of tokens that end with a stop text; None if none appeared.
        self.lengths: list[int | None] = [None] * len(prompts)

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return which sequences have ended."""
        for row, tokens in enumerate(input_ids[:, self._start :].tolist()):
            if self.lengths[row] is None and self._end_ids.isdisjoint(tokens):
                text = continuation_text(self._model, self._prompts[row], tokens)
                if any(stop in text for stop in self._stop):
                    self.lengths[row] = len(tokens)
        ended = [length is not None for length in self.lengths]
        return torch.tensor(ended, device=input_ids.device)


def continuation_text(model: LoadedModel, prompt: Prompt, tokens: Sequence[int]) -> str:
    """Return what tokens say as the continuation of a prompt, special tokens included."""

    def decode(ids: Sequence[int]) -> str:
        text: str = model.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    context = list(prompt.tokens.ids[-_CONTEXT:])
    before, whole = decode(context), decode([*context, *tokens])
    return whole[len(before) :] if whole.startswith(before) else decode(tokens)


def _continuation(
    model: LoadedModel,
    prompt: Prompt,
    row: Sequence[int],
    end_ids: Sequence[int],
    stop: int | None,
) -> Continuation:
    """Cut a continuation at its end; behind it is padding."""
    end = next((at for at, token in enumerate(row) if token in end_ids), None)
    if stop is not None:
        tokens = tuple(row[:stop])
        return Continuation(tokens, continuation_text(model, prompt, tokens), "stop")
    if end is not None:
        said = continuation_text(model, prompt, row[:end])
        return Continuation(tuple(row[: end + 1]), said, "end_of_sequence")
    return Continuation(tuple(row), continuation_text(model, prompt, row), "length")
