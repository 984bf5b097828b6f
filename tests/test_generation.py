"""Continuations against transformers' own ``generate``, and against the model's probabilities."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import families
import numpy as np
import pytest
import scipy.stats
import torch
from architectures import ARCHITECTURES, Models, random_ids
from capturing import records_of
from chat_templates import LLAMA, chat_tokenizer
from everyday import mostly_long
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from zarrtrace.capture import (
    LoadedModel,
    Prompt,
    borrow,
    check_context,
    generate,
    generation,
    load_model,
    plan_batches,
    probe_generation,
    take_model,
    tokenize,
)
from zarrtrace.capture.comparison import other_rounding
from zarrtrace.capture.generation import continuation_text, run
from zarrtrace.capture.generation_probe import Recorder
from zarrtrace.capture.sampler import gumbel_noise
from zarrtrace.errors import ConfigError, ModelError, NonFiniteError
from zarrtrace.records import Continuation, Tokens, TokensRecord
from zarrtrace.scenarios import Sampling, Scenario

pytestmark = pytest.mark.torch

#: Every day with learnt positions, with windows and a soft cap, with recurrent blocks.
EVERY = mostly_long(lambda name: name in ("GPT-2", "Gemma 2", "Qwen3-Next"), ARCHITECTURES)
#: Every day with grouped heads, with learnt positions.
SOME = mostly_long(lambda name: name in ("Llama", "GPT-2"), ARCHITECTURES)
LENGTHS = (5, 9, 9)
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
    found = sampled(model, given, Sampling(10))  # beyond the windows of seven tokens
    for (index, _), one in found.items():
        assert list(one.tokens) == alone(model, given[index], 10)


@pytest.mark.parametrize("name", SOME)
def test_a_draw_does_not_depend_on_its_batch(models: Models, name: str) -> None:
    model, given = models(name), prompts((9, 9, 9))
    sampling = Sampling(6, temperature=1.0, top_p=0.9, samples=3, seed=5)
    every = list(itertools.product(range(3), range(3)))
    found = sampled(model, given, sampling, [every])
    assert len({one.tokens for one in found.values()}) > 1
    shuffled = [every[at] for at in np.random.default_rng(0).permutation(len(every))]
    for batches in ([[one] for one in every[::2]], [shuffled[:4], shuffled[4:]]):
        again = sampled(model, given, sampling, batches)
        assert again == {key: found[key] for key in again}
    other = sampled(model, given, Sampling(6, temperature=1.0, top_p=0.9, samples=3, seed=6))
    assert {key: one.tokens for key, one in other.items()} != {
        key: one.tokens for key, one in found.items()
    }


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [
        pytest.param(1.0, 1.0, marks=pytest.mark.long),
        pytest.param(0.7, 1.0, marks=pytest.mark.long),
        (1.5, 0.8),
    ],
)
def test_frequencies_are_the_models_probabilities(
    models: Models, temperature: float, top_p: float
) -> None:
    model, given = models("Llama"), prompts((6,))
    sampling = Sampling(1, temperature=temperature, top_p=top_p, samples=1000)
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
    assert common.sum() >= 8
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
    assert sorted(itertools.chain(*plan)) == list(itertools.product(range(3), range(3)))
    assert all(len({LENGTHS[index] for index, _ in batch}) == 1 for batch in plan)
    assert [len(batch) for batch in plan] == [3, 2, 4]


def test_a_prompt_that_leaves_no_place_is_refused(models: Models) -> None:
    model, given = models("GPT-2"), prompts((1020,))
    check_context(model, given, Sampling(4))
    with pytest.raises(ConfigError, match="5 more do not fit the model's context of 1024"):
        check_context(model, given, Sampling(5))
    with pytest.raises(ConfigError, match="--generate 4 or less"):
        generate(model, [(given[0], 0)], Sampling(5))


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_padding_on_the_left_changes_nothing(models: Models, name: str) -> None:
    model = probe_generation(models(name))
    given, sampling = prompts((5, 24, 9)), Sampling(8, temperature=1.0, samples=2)
    [batch] = plan_batches(model, (5, 24, 9), sampling)
    assert len({len(given[index].tokens.ids) for index, _ in batch}) == 3
    together = sampled(model, given, sampling, [batch])
    assert together == sampled(model, given, sampling, [[one] for one in batch])
    for index, prompt in enumerate(given):
        [one] = generate(model, [(prompt, 0)], Sampling(8))
        assert list(one.tokens) == alone(model, given[index], 8)


def test_batches_stay_within_memory(models: Models) -> None:
    """Keys and values within 1 GiB, scores of a block within 256 MiB, whatever else there is."""
    model, sampling = models("Llama"), Sampling(1000, temperature=1.0, samples=100)
    assert [len(one) for one in plan_batches(model, [10], sampling)] == [36, 64]
    # A sequence's keys and values of 32 layers, 2 heads, 8 channels and 1,010 tokens are 4 MB.
    long = replace(model, n_heads=512, d_heads=4096)  # 512 heads * 4 bytes * 256 ** 2 = 128 MiB
    assert max(len(one) for one in plan_batches(long, [256], sampling)) == 2


@pytest.mark.parametrize("name", ["Llama", pytest.param("Gemma 2", marks=pytest.mark.long)])
def test_a_long_prompt_is_read_in_parts(
    models: Models, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, given = models(name), prompts((24, 24, 40))
    sampling = Sampling(5, temperature=1.0, samples=2)
    every = [[(0, 0), (0, 1), (1, 0)], [(2, 0)]]
    expected, read = sampled(model, given, sampling, every), []
    monkeypatch.setattr(generation, "_SCORE_BYTES", 4 * 4 * 3 * 24 * 5)  # five queries of three
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    try:
        assert sampled(model, given, sampling, every) == expected
    finally:
        hook.remove()
    assert max(read) <= 9


def test_what_a_probe_refuses(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says something else with a cache, behind padding, or step by step at all."""
    model = models("Llama")
    usual = probe_generation(model).permitted
    assert usual.cache
    assert usual.cached_parts
    assert usual.cached_batches
    assert usual.left_padding
    prepare, forward = type(model.model).prepare_inputs_for_generation, type(model.model).forward

    def restarted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, *args, **kwargs)
        read = found["input_ids"].shape[1]
        if read > 1 and found["past_key_values"].get_seq_length():
            found["position_ids"] = torch.arange(read)[None]
        return found

    with monkeypatch.context() as patch:  # positions start again in each part of a prompt
        patch.setattr(type(model.model), "prepare_inputs_for_generation", restarted)
        assert probe_generation(model).permitted == replace(usual, cached_parts=False)

    def without_positions(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, *args, **kwargs)
        found["position_ids"] = torch.arange(found["input_ids"].shape[1])[None]
        return found

    def without_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "attention_mask": None})

    with monkeypatch.context() as patch:  # each new token stands at position 0
        patch.setattr(type(model.model), "prepare_inputs_for_generation", without_positions)
        permitted = probe_generation(model).permitted
        assert not permitted.cache
        assert permitted.cached_batches
        given = prompts((9, 9))
        found = sampled(probe_generation(model), given, Sampling(6))
    for (index, _), one in found.items():  # right without the cache
        assert list(one.tokens) == alone(model, given[index], 6)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "forward", without_mask)
        permitted = probe_generation(model).permitted
        assert permitted.cache
        assert permitted.cached_batches
        assert not permitted.left_padding
        plan = plan_batches(replace(model, permitted=permitted), (5, 9, 9), Sampling(2))
        assert plan == [[(0, 0)], [(1, 0), (2, 0)]]

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, *args, **kwargs)
        found["input_ids"] = (found["input_ids"] + 1) % architectures.VOCABULARY
        return found

    monkeypatch.setattr(type(model.model), "prepare_inputs_for_generation", shifted)
    with pytest.raises(ModelError, match="something else step by step"):
        probe_generation(model)


#: Families of each kind, with what a probe permits: a cache, batches, padding on the left. None
#: where that depends on how the processor, or a version of transformers, rounds.
WAYS = {
    "bart": (True, True, False),  # positions count the padding
    "bloom": (True, True, True),  # position in a bias
    "deepseek_v32": None,  # which keys are selected depends on how many there are
    "gptj": (True, True, True),
    "nemotron_h": (False, True, True),  # its cache is another one than generate makes
    "openai-gpt": (True, False, False),  # it has no mask
    "opt": (True, True, True),  # learnt positions, which its mask counts
    "qwen3_5_moe": (True, True, True),
    "recurrent_gemma": (True, None, False),  # its recurrence reads the padding
    "roberta decoder": None,  # generate counts positions from another number
    "zamba2": (True, None, False),
}


@pytest.mark.long
@pytest.mark.parametrize("name", WAYS)
def test_families_continue_as_their_forward_pass_says(tmp_path: Path, name: str) -> None:
    """The reference is the argmax of whole passes, without transformers' ``generate``."""
    model = load_model(str(architectures.save_random(families.make_config(name), tmp_path / "m")))
    ways = WAYS[name]
    if ways is None:
        with pytest.raises(ModelError, match="something else step by step"):
            probe_generation(model)
        return
    model = probe_generation(model)
    permitted = model.permitted
    found = (permitted.cache, permitted.cached_batches, permitted.left_padding)
    assert all(way is None or one == way for one, way in zip(found, ways, strict=True))
    given, end = prompts((13, 13, 24)), model.model.generation_config.eos_token_id
    for (index, _), one in sampled(model, given, Sampling(6)).items():
        ids = list(given[index].tokens.ids)
        for token in one.tokens:
            with torch.inference_mode():
                logits = model.model(torch.tensor([ids]), use_cache=False).logits
            assert token == int(logits[0, -1].argmax())
            ids.append(token)
        assert len(one.tokens) == 6 or one.tokens[-1] == end


# --- settings ------------------------------------------------------------------------------------

LEAKS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 400)),
    "begin_suppress_tokens": list(range(3, 400)),
    "forced_eos_token_id": 7,
    "bad_words_ids": [[9]],
    "max_length": 3,
    "min_length": 100,
    "max_new_tokens": 2,
    "num_beams": 3,
    "stop_strings": ["a", "e"],
    "sequence_bias": [[[5], 100.0]],
    "use_cache": False,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("sampling", [Sampling(6), Sampling(6, temperature=1.0, samples=2)])
def test_the_models_own_settings_do_not_count(
    models: Models, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    model, given = models("Llama"), prompts((9, 9))
    expected = sampled(model, given, sampling)
    own = copy.deepcopy(model.model.generation_config)
    for setting, value in LEAKS.items():
        setattr(own, setting, value)
    monkeypatch.setattr(model.model, "generation_config", own)
    assert sampled(model, given, sampling) == expected
    assert model.model.generation_config is own
    assert {setting: getattr(own, setting) for setting in LEAKS} == LEAKS


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 5e-324])
def test_a_low_temperature_is_greedy(models: Models, temperature: float) -> None:
    model, given = models("Llama"), prompts((9, 9))
    greedy = sampled(model, given, Sampling(6))
    cold = sampled(model, given, Sampling(6, temperature=temperature, top_p=0.9))
    assert cold == greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "--generate 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "--top-p 1.1"),
        ({"temperature": 1.0, "samples": 0}, "--samples 0"),
        ({"seed": -1}, "--seed -1"),
        ({"stop": ("a", "")}, "stop text is empty"),
        ({"samples": 2}, "--samples 2 without --temperature"),
        ({"top_p": 0.5}, "--top-p 0.5 without --temperature"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Sampling(**{"tokens": 1, **settings})
    assert caught.value.remedy


# --- ends ----------------------------------------------------------------------------------------


def ending(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, ids: Any) -> None:
    """Give a model other end-of-sequence tokens, and no padding token."""
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", ids)
    monkeypatch.setattr(model.model.generation_config, "pad_token_id", None)


def test_each_end_of_sequence_token_ends_its_own_sequence(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = models("Llama"), prompts((9, 9, 9))
    ending(model, monkeypatch, None)
    free = sampled(model, given, Sampling(8))
    assert {one.ended_by for one in free.values()} == {"length"}
    rows = [list(free[index, 0].tokens) for index in range(3)]
    ids = [rows[0][2], rows[1][4]]  # as Llama 3's chat models, which have two
    ending(model, monkeypatch, ids)
    found = sampled(model, given, Sampling(8))
    for index, row in enumerate(rows):
        at = next((at for at, token in enumerate(row) if token in ids), None)
        one = found[index, 0]
        if at is None:
            assert one == free[index, 0]
        else:
            assert one.ended_by == "end_of_sequence"
            assert list(one.tokens) == row[: at + 1]
            assert one.text == said(model, given[index], row[:at])
    assert {one.ended_by for one in found.values()} >= {"end_of_sequence"}
    ending(model, monkeypatch, rows[0][0])  # nothing but the end
    assert generate(model, [(given[0], 0)], Sampling(8)) == [
        Continuation((rows[0][0],), "", "end_of_sequence")
    ]


def said(model: LoadedModel, prompt: Prompt, tokens: Sequence[int]) -> str:
    """Return what the tokenizer adds to the prompt's text."""
    ids = list(prompt.tokens.ids)
    before = model.tokenizer.decode(ids)
    whole: str = model.tokenizer.decode([*ids, *tokens])
    assert whole.startswith(before)
    return whole[len(before) :]


def test_a_stop_text_ends_at_the_token_that_completes_it(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = models("Llama"), prompts((9, 9, 9))
    free = sampled(model, given, Sampling(10))
    row = free[1, 0].tokens
    ends = [len(said(model, given[1], row[: n + 1])) for n in range(len(row))]
    text = free[1, 0].text
    # From within the third token to within the fifth, and one that another sequence contains.
    stop = text[ends[1] + (ends[2] - ends[1]) // 2 : ends[3] + max(1, (ends[4] - ends[3]) // 2)]
    other = free[2, 0].text[-2:]
    found = sampled(model, given, Sampling(10, stop=(stop, other)))
    for index in range(3):
        whole = free[index, 0].tokens
        texts = [said(model, given[index], whole[:n]) for n in range(1, len(whole) + 1)]
        n = next((n for n, one in enumerate(texts, 1) if stop in one or other in one), None)
        one = found[index, 0]
        expected = (whole, texts[-1], "length") if n is None else (whole[:n], texts[n - 1], "stop")
        assert (one.tokens, one.text, one.ended_by) == expected
    assert found[1, 0].ended_by == "stop"
    assert len(found[1, 0].tokens) <= 5
    # The prompt's own text ends nothing.
    spelled = model.tokenizer.decode(given[0].tokens.ids)
    last = Sampling(10, stop=(spelled[-3:] + free[0, 0].text[:1],))
    assert generate(model, [(given[0], 0)], last) == [free[0, 0]]


def test_text_keeps_the_space_of_its_first_word() -> None:
    """SentencePiece's decoder drops the space in front of a text, and a prompt ends without one."""
    words = ["<unk>", "\u2581The", "\u2581choice", ":", "\u2581stop", "\u2581now", "."]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    model: Any = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert model.tokenizer.decode([4, 5]) == "stop now"
    prompt = Prompt(Scenario("The choice:", name="a"), Tokens([1, 2, 3], ["", "", ""]), {}, {})
    assert continuation_text(model, prompt, [4, 5, 6]) == " stop now."
    assert continuation_text(model, prompt, [6]) == "."


def test_text_joins_the_bytes_of_a_character(models: Models) -> None:
    model, [prompt] = models("Llama"), prompts((9,))
    ids = model.tokenizer("né😀", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    assert continuation_text(model, prompt, ids) == "né😀"
    assert continuation_text(model, prompt, ids[:-1]).startswith("né")


def test_a_chat_goes_on_as_transformers_lets_it(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer(LLAMA)
    path = models.path("Llama", vocab_size=len(tokenizer))
    model = load_model(str(path), tokenizer=tokenizer)
    messages = [{"role": "user", "content": "You hold $90. Bet?"}]
    scenario = Scenario(messages=messages, name="a").render(tokenizer)
    prompt = tokenize(model, scenario, prepend_bos=True)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    expected = alone(model, prompt, 8)
    theirs = model.model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=END)
    assert theirs[0, inputs["input_ids"].shape[1] :].tolist() == expected
    [one] = generate(model, [(prompt, 0)], Sampling(8))
    assert list(one.tokens) == expected
    # A special token that ends nothing is part of the text, and may be a stop text.
    text = continuation_text(model, prompt, [*expected[:2], written])
    assert text.endswith("<|eot_id|>")


def test_nan_is_refused(models: Models) -> None:
    model, given = models("Llama"), prompts((9,))
    norm = model.model.model.norm.weight
    before = norm.data.clone()
    try:
        norm.data.fill_(torch.nan)
        with pytest.raises(NonFiniteError, match="NaN while it continues"):
            generate(model, [(given[0], 0)], Sampling(2))
    finally:
        norm.data.copy_(before)


# --- the model -----------------------------------------------------------------------------------


def test_a_borrowed_model_is_left_as_found(models: Models) -> None:
    with architectures.quiet():
        own = AutoModelForCausalLM.from_pretrained(models.path("Gemma 2"))
    tokenizer = AutoTokenizer.from_pretrained(models.path("Gemma 2"))
    own.train()
    config, text = own.generation_config, own.generation_config.to_json_string()
    attention = own.config._attn_implementation
    hooks = [len(module._forward_hooks) for module in own.modules()]
    expected = sampled(models("Gemma 2"), prompts(), Sampling(6))
    with borrow(own):
        model = probe_generation(take_model(own, tokenizer, "own"))
        assert sampled(model, prompts(), Sampling(6)) == expected
    assert own.training
    assert own.generation_config is config
    assert config.to_json_string() == text
    assert own.config._attn_implementation == attention
    assert hooks == [len(module._forward_hooks) for module in own.modules()]
    own(torch.tensor([random_ids(5)])).logits.sum().backward()  # no tensor of inference mode left


def test_blocks_in_host_memory_continue_the_same(models: Models) -> None:
    expected = sampled(models("Llama"), prompts(), Sampling(5, temperature=1.0, samples=2))
    streamed = load_model(str(models.path("Llama")), low_memory=True)
    assert sampled(streamed, prompts(), Sampling(5, temperature=1.0, samples=2)) == expected


@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_continuations_have_their_own_rope_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """On both sides of the limit of 64 tokens, where the factors change for a whole pass."""
    path = architectures.save_random(architectures.longrope_config(model_type), tmp_path / "model")
    model = probe_generation(load_model(str(path)))
    assert model.permitted.left_padding
    assert model.permitted.cached_parts
    monkeypatch.setattr(generation, "_SCORE_BYTES", 2**13)  # a few queries of a prompt together
    given = prompts((24, 58, 65, 66, 90))
    found = sampled(model, given, Sampling(6))
    for (index, _), one in found.items():
        assert list(one.tokens) == alone(model, given[index], 6)
    for prompt in given[2:]:  # read once, but for its last token
        ids = prompt.tokens.ids
        assert run(model, [ids, ids], 6, Recorder()) == [alone(model, prompt, 6)] * 2


def test_continuations_within_which_rope_factors_change_are_refused(tmp_path: Path) -> None:
    """The pass that traces store has the long factors for all tokens, ``generate`` had not."""
    path = architectures.save_random(architectures.longrope_config("llama"), tmp_path / "model")
    model = load_model(str(path))
    check_context(model, prompts((60, 65, 1020)), Sampling(4))
    with pytest.raises(ConfigError, match=r"longer than 64[\s\S]*--generate 4 or less"):
        generate(model, [(prompts((60,))[0], 0)], Sampling(5))
    with pytest.raises(ConfigError, match=r"longer than 64[\s\S]*Use a longer or shorter prompt"):
        check_context(model, prompts((64,)), Sampling(1))


def test_a_class_that_cannot_continue_is_refused(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("Llama")
    monkeypatch.setattr(type(model.model), "can_generate", classmethod(lambda _: False))
    with pytest.raises(ModelError, match="cannot continue text"):
        check_context(model, prompts(), Sampling(1))
    assert probe_generation(model) is model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOME)
def test_one_pass_says_what_was_said_step_by_step(models: Models, name: str, dtype: str) -> None:
    """A trace stores the probabilities that each generated token was chosen from.

    The bound is the probe's: eight roundings, each as large as what one rounding of the embeddings
    changes; twice that, because single values are compared and not their root mean square.
    """
    model, [prompt] = models(name, dtype), prompts((14,))
    recorder = Recorder()
    [row] = run(model, [prompt.tokens.ids], 8, recorder)
    found = torch.stack(recorder.scores)[:, 0].log_softmax(-1)
    request = architectures.request([*prompt.tokens.ids, *row[:-1]])
    [record] = [
        one
        for one in records_of(model, [request], attention_dtype="float32")
        if isinstance(one, TokensRecord)
    ]
    stored, ids = (
        record.next_token_logprob[-len(row) :],
        record.next_token[-len(row) :].astype(np.int64),
    )
    steps = np.take_along_axis(found.numpy(), ids, 1)
    with other_rounding(model), torch.inference_mode():
        noisy = model.model(torch.tensor([request.prompt.tokens.ids])).logits[0, -len(row) :]
    noise = np.abs(np.take_along_axis(noisy.float().log_softmax(-1).numpy(), ids, 1) - stored)
    least = torch.finfo(getattr(torch, dtype)).eps * np.abs(stored).max()
    assert np.abs(steps - stored).max() <= 8 * 2 * max(noise.max(), least)
    if dtype == "float32":
        assert ids[:, 0].tolist() == row
