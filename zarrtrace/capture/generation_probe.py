"""A probe of how the loaded model continues text: with a cache, and padded on the left.

Step by step, a model should say what it says in one pass over prompt and continuation, which is
the one that traces store. Architectures differ in how they number positions behind padding, and in
what they keep between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessor

from zarrtrace.capture.comparison import distance, other_rounding, within_rounding
from zarrtrace.capture.generation import keeps_keys_and_values, run
from zarrtrace.capture.messages import forward_errors, full_memory
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.probe import random_tokens
from zarrtrace.errors import ModelError

# Lengths that no head has as its size, longer than the windows of tests; and tokens that follow.
_LONG, _SHORT, _TOKENS = 47, 29, 4
# Tokens of a prompt that are read together: neither length is a multiple.
_PART = 11


def probe_generation(model: LoadedModel) -> LoadedModel:
    """Return the model with the ways that are permitted to continue prompts.

    Random tokens are continued in each way, and compared with one pass over all tokens. Without a
    cache that agrees, each step reads everything again; without batches that agree, prompts go
    alone; without padding that agrees, prompts that go together are equally long; without parts
    that agree, a long prompt is read whole, which takes more memory.

    Raises
    ------
    ModelError
        If no way agrees, or the plainest fails.
    """
    longest = min(_LONG, (model.max_tokens or _LONG + _TOKENS) - _TOKENS)
    if longest < 2 or not model.model.can_generate():
        return model  # `check_context` says what is wrong
    long, other = random_tokens(model, longest).tolist()
    short = other[: max(1, longest * _SHORT // _LONG)]

    def permits(batch: Sequence[Sequence[int]], part: int | None = None, **ways: bool) -> bool:
        tried = replace(model, permitted=replace(model.permitted, **ways))
        try:
            return _agrees(tried, batch, part)
        except ModelError:
            return False

    cache = permits([long], cache=True)
    plainest = replace(model, permitted=replace(model.permitted, cache=False))
    if not cache and not _agrees(plainest, [long]):
        raise ModelError(
            f"{model.attributes.id}: says something else step by step than in one pass",
            why="transformers' generate gives this architecture other positions than its own "
            "forward pass, or its attention selects other keys where there are fewer. A trace, "
            "which is one pass, would not show how the continuation was chosen.",
            remedy="Leave out --generate, or choose another model.",
        )
    together = permits([long, other, other], cache=cache)
    padded = together and permits([long, short, short], cache=cache)
    ways = {"cache": cache, "cached_batches": together, "left_padding": padded}
    if cache and keeps_keys_and_values(model):
        batch = [long, short, short] if padded else [long, other, other] if together else [long]
        ways["cached_parts"] = all(
            permits(one, _PART, cached_parts=True, **ways) for one in ([long], batch)
        )
    return replace(model, permitted=replace(model.permitted, **ways))


class Recorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps the scores of every step."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, _: Any, scores: torch.Tensor) -> torch.Tensor:
        """Keep scores ``(sequence, vocabulary)`` and return them."""
        self.scores.append(scores.clone())
        return scores


def _agrees(model: LoadedModel, prompts: Sequence[Sequence[int]], part: int | None = None) -> bool:
    """Whether a batch says in each step what one pass over each sequence says."""
    recorder = Recorder()
    rows = run(model, prompts, _TOKENS, recorder, part=part)
    for at, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        found = torch.stack([scores[at] for scores in recorder.scores]).float().log_softmax(-1)
        ids = [*prompt, *row][:-1]
        expected = _in_one_pass(model, ids)[-len(found) :]
        with other_rounding(model):
            noise = distance(_in_one_pass(model, ids)[-len(found) :], expected)
        if not within_rounding(model, found, expected, noise):
            return False
    return True


def _in_one_pass(model: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities ``(token, vocabulary)`` of what follows each token."""
    name, device = model.attributes.id, model.device
    given = torch.tensor([list(ids)], device=device)
    with full_memory(name, device), forward_errors(name), torch.inference_mode():
        logits: torch.Tensor = model.model(
            input_ids=given, attention_mask=torch.ones_like(given), use_cache=False
        ).logits
        return logits[0].float().log_softmax(-1)
