"""Continuations of prompts, by transformers' own ``generate``.

``generate`` draws once a batch, so that a draw would depend on the other prompts of it. Here it
runs greedily behind a logits processor that adds Gumbel noise to the log-probabilities (the
Gumbel-max trick: the largest sum is a draw from the distribution [1]_). The noise of a token is a
function of the seed, the scenario's name, the repeat, the step and the token alone. It is made on
the CPU in float64 for all devices.

Attention is computed as it is captured, eagerly: where transformers has a faster function, it may
leave parts out (Gemma 2's soft cap), and the choice would be made from other probabilities than
the trace holds.

.. [1] E. J. Gumbel, Statistical theory of extreme values and some practical applications, 1954;
   C. J. Maddison, D. Tarlow, T. Minka, A* sampling, NeurIPS 2014.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from zarrtrace.capture.host import to_device
from zarrtrace.capture.messages import forward_errors, full_memory
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.prompts import Prompt
from zarrtrace.errors import ConfigError, ModelError, NonFiniteError
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
    """Group the repeats of all scenarios into batches of equally long prompts.

    No prompt is padded, so that nothing but rounding can depend on a batch. The result depends on
    the arguments alone: a resumed run that plans all its scenarios, done or not, makes the same
    batches as an uninterrupted one, and skips those that are done.

    Parameters
    ----------
    model
        The model; only its sizes count.
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
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    batches: Plan = []
    for length, indices in sorted(by_length.items()):
        rows = [(index, repeat) for index in indices for repeat in range(sampling.samples)]
        step = size or _default_size(model, length, sampling.tokens)
        batches += [rows[start : start + step] for start in range(0, len(rows), step)]
    return batches


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
        If a prompt and its continuation may be longer than the model's context.
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
    if model.max_tokens is None:
        return
    for prompt in prompts:
        length = len(prompt.tokens.ids)
        if length + sampling.tokens > model.max_tokens:
            raise ConfigError(
                f"scenario {prompt.scenario.name!r}: its prompt has {length} tokens, and "
                f"{sampling.tokens} more do not fit the model's context of {model.max_tokens}",
                why="Neither a prompt nor a continuation is cut silently.",
                remedy=f"Use --generate {model.max_tokens - length} or less, or a shorter prompt."
                if length < model.max_tokens
                else "Shorten the prompt, or choose a model with a longer context.",
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
        not every architecture computes exactly: :func:`plan_batches` makes none.
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
    ids, mask = _padded([prompt.tokens.ids for prompt, _ in requests])
    start, end_ids = ids.shape[1], _end_ids(model)
    sampler = _Sampler([(prompt.scenario.name, n) for prompt, n in requests], sampling, start)
    stops = _StopTexts(model, [prompt for prompt, _ in requests], sampling.stop, start, end_ids)
    settings = _settings(sampling.tokens, end_ids)
    name, device = model.attributes.id, model.device
    with (
        full_memory(name, device),
        forward_errors(name),
        _only(model.model, settings),
        torch.inference_mode(),
    ):
        found = model.model.generate(
            input_ids=to_device(ids, device),
            attention_mask=to_device(mask, device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([stops] if sampling.stop else []),
        )
        rows = found[:, start:].tolist()
    sampler.refuse_nan(name)
    return [
        _continuation(model, prompt, row, end_ids, stop)
        for (prompt, _), row, stop in zip(requests, rows, stops.lengths, strict=True)
    ]


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask ``(sequence, token)`` of prompts, padded on the left."""
    shape = (len(prompts), max(map(len, prompts)))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, shape[1] - len(prompt) :] = torch.tensor(prompt)
        mask[row, shape[1] - len(prompt) :] = 1
    return ids, mask


# --- transformers' settings ---------------------------------------------------------------------


def _end_ids(model: LoadedModel) -> tuple[int, ...]:
    """Return the ids of the model's end-of-sequence tokens: none, one or several."""
    found = model.model.generation_config.eos_token_id
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _settings(tokens: int, end_ids: Sequence[int]) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
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


# --- the choice of a token ----------------------------------------------------------------------


def gumbel_noise(seed: int, name: str, repeat: int, step: int, size: int) -> np.ndarray:
    """Return standard Gumbel noise that is a function of its arguments.

    Philox 4x64 with a key of the seed, the scenario and the repeat, and a counter of the step; its
    raw bits are turned to numbers here, so that no version of NumPy gives others.

    Parameters
    ----------
    seed, name, repeat, step
        The run's seed, the scenario's name, and the numbers of repeat and token, from 0.
    size
        Tokens of the vocabulary.

    Returns
    -------
    ndarray
        float64 ``(size,)``.
    """
    identity = f"{seed}\0{repeat}\0{name}".encode()
    digest = hashlib.blake2b(identity, digest_size=16, person=b"zarrtrace").digest()
    key = np.frombuffer(digest, dtype="<u8")
    bits = np.random.Philox(key=key, counter=[0, 0, step, 0]).random_raw(size)
    # 52 bits and a half: neither 0 nor 1, of which the noise would be infinite.
    uniform = ((bits >> np.uint64(12)) + 0.5) * 2.0**-52
    noise: np.ndarray = -np.log(-np.log(uniform))
    return noise


class _Sampler(LogitsProcessor):  # type: ignore[misc]
    """Makes the largest score a draw from the model's distribution.

    Parameters
    ----------
    rows
        Name of the scenario and number of the repeat of each sequence.
    sampling
        Its temperature, top-p and seed.
    start
        Tokens in front of a continuation, padding included.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], sampling: Sampling, start: int) -> None:
        self._rows, self._sampling, self._start = rows, sampling, start
        self._has_nan: torch.Tensor | None = None
        self._warpers = LogitsProcessorList()
        if not sampling.is_greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores ``(sequence, vocabulary)`` of the next token."""
        # Kept on the device: a GPU would be waited for at each token.
        found = scores.isnan().any()
        self._has_nan = found if self._has_nan is None else self._has_nan | found
        if self._sampling.is_greedy:
            return scores
        wide = scores.double()
        wide = wide - wide.amax(-1, keepdim=True)  # 0 at most: no temperature makes it infinite
        warped: torch.Tensor = self._warpers(input_ids, wide)
        step, size = input_ids.shape[1] - self._start, scores.shape[1]
        noise = [gumbel_noise(self._sampling.seed, *row, step, size) for row in self._rows]
        return warped + to_device(torch.from_numpy(np.stack(noise)), scores.device)

    def refuse_nan(self, name: str) -> None:
        """Refuse tokens that were chosen among NaN.

        Raises
        ------
        NonFiniteError
        """
        if self._has_nan is not None and bool(self._has_nan):
            raise NonFiniteError(
                f"{name}: computes NaN while it continues a prompt",
                why="Values exceed what the model's precision can hold, often in float16.",
                remedy="Try --dtype bfloat16 or --dtype float32.",
            )


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
