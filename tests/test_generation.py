"""Continuations against transformers' own ``generate``, and against the model's probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import architectures
import numpy as np
import pytest
import scipy.stats
import torch
from architectures import ARCHITECTURES, EVERY_DAY, Models, random_ids
from everyday import mostly_long

from zarrtrace.capture import LoadedModel, Prompt, check_context, generate, plan_batches
from zarrtrace.capture.sampler import gumbel_noise
from zarrtrace.errors import ConfigError
from zarrtrace.records import Continuation
from zarrtrace.scenarios import Sampling

pytestmark = pytest.mark.torch

EVERY = mostly_long(lambda name: name in EVERY_DAY, ARCHITECTURES)
LENGTHS = (5, 9, 9, 14)
END = 1  # id of the tiny models' end-of-sequence token


def prompts(lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    return [
        architectures.request(random_ids(length, seed), f"s{seed}").prompt
        for seed, length in enumerate(lengths)
    ]


def alone(model: LoadedModel, prompt: Prompt, tokens: int, **options: Any) -> list[int]:
    """Return what transformers generates greedily of a prompt."""
    ids = torch.tensor([prompt.tokens.ids])
    found = model.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=END,
        **options,
    )
    new: list[int] = found[0, ids.shape[1] :].tolist()
    return new


def sampled(
    model: LoadedModel,
    given: Sequence[Prompt],
    sampling: Sampling,
    batches: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> dict[tuple[int, int], Continuation]:
    """Return continuations by scenario and repeat."""
    lengths = [len(prompt.tokens.ids) for prompt in given]
    found = {}
    for batch in plan_batches(model, lengths, sampling) if batches is None else batches:
        made = generate(model, [(given[index], repeat) for index, repeat in batch], sampling)
        found |= dict(zip(batch, made, strict=True))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_greedy_is_what_transformers_generates_of_the_prompt_alone(
    models: Models, name: str
) -> None:
    model, given = models(name), prompts()
    found = sampled(model, given, Sampling(12))
    for (index, _), one in found.items():
        assert list(one.tokens) == alone(model, given[index], 12)


@pytest.mark.parametrize("name", EVERY)
def test_a_draw_does_not_depend_on_its_batch(models: Models, name: str) -> None:
    model, given = models(name), prompts((9, 9, 9))
    sampling = Sampling(8, temperature=1.0, top_p=0.9, samples=3, seed=5)
    every = list(itertools.product(range(3), range(3)))
    found = sampled(model, given, sampling, [every])
    assert len({one.tokens for one in found.values()}) > 1
    shuffled = [every[at] for at in np.random.default_rng(0).permutation(len(every))]
    for batches in ([[one] for one in every], [shuffled], [shuffled[:4], shuffled[4:]]):
        assert sampled(model, given, sampling, batches) == found
    other = sampled(model, given, Sampling(8, temperature=1.0, top_p=0.9, samples=3, seed=6))
    assert {key: one.tokens for key, one in other.items()} != {
        key: one.tokens for key, one in found.items()
    }


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_frequencies_are_the_models_probabilities(
    models: Models, temperature: float, top_p: float
) -> None:
    model, given = models("Llama"), prompts((6,))
    sampling = Sampling(1, temperature=temperature, top_p=top_p, samples=2000)
    found = sampled(model, given, sampling)
    with torch.no_grad():
        logits = model.model(torch.tensor([given[0].tokens.ids])).logits[0, -1].double().numpy()
    expected = scipy.special.softmax(logits / temperature)
    order = np.argsort(-expected)
    before = np.cumsum(expected[order]) - expected[order]
    expected[order[before >= top_p]] = 0  # the fewest tokens that hold the share
    expected /= expected.sum()
    counts = np.bincount([one.tokens[0] for one in found.values()], minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    # Tokens of which fewer than five are expected count together.
    common = expected * sampling.samples >= 5
    assert common.sum() >= 10
    observed = [*counts[common], counts[~common].sum()]
    wanted = np.array([*expected[common], expected[~common].sum()]) * sampling.samples
    kept = wanted > 0
    assert scipy.stats.chisquare(np.array(observed)[kept], wanted[kept]).pvalue > 0.001


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(0, "a", 0, 0, 20_000)
    assert scipy.stats.kstest(noise, scipy.stats.gumbel_r.cdf).pvalue > 0.001
    others = [(1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    for other in others:
        assert abs(np.corrcoef(noise, gumbel_noise(*other, 20_000))[0, 1]) < 0.04
    np.testing.assert_array_equal(noise[:100], gumbel_noise(0, "a", 0, 0, 100))


def test_batches_hold_prompts_of_one_length(models: Models) -> None:
    model = models("Llama")
    sampling = Sampling(4, temperature=1.0, samples=3)
    plan = plan_batches(model, LENGTHS, sampling, size=4)
    assert sorted(itertools.chain(*plan)) == list(itertools.product(range(4), range(3)))
    assert all(len({LENGTHS[index] for index, _ in batch}) == 1 for batch in plan)
    assert [len(batch) for batch in plan] == [3, 2, 4, 3]


def test_a_prompt_that_leaves_no_place_is_refused(models: Models) -> None:
    model, given = models("GPT-2"), prompts((1020,))
    check_context(model, given, Sampling(4))
    with pytest.raises(ConfigError, match="5 more do not fit the model's context of 1024"):
        check_context(model, given, Sampling(5))
    with pytest.raises(ConfigError, match="--generate 4 or less"):
        generate(model, [(given[0], 0)], Sampling(5))
