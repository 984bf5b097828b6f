"""Capture against transformers and sae-lens, bit for bit, on the embedded model."""

from __future__ import annotations

import gc
import weakref
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numerics
import numpy as np
import pytest
import rounding
import torch
from architectures import Activations
from capturing import records_of
from sae_lens import SAE
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

from zarrtrace import demo
from zarrtrace.capture import LoadedModel, Prompt, Request, keeping, load_model, tokenize
from zarrtrace.capture.batches import batches, goes_in_several_waves, waves
from zarrtrace.capture.saes import FolderSAEs
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.format.layout import NO_ID
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.scenarios import Scenario, load_suite

pytestmark = pytest.mark.torch

LAYERS = tuple(range(32))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(str(demo.model_path()))


@pytest.fixture(scope="module")
def prompts(model: LoadedModel) -> list[Prompt]:
    suite = load_suite(demo.suite_path())
    return [tokenize(model, scenario, prepend_bos=True) for scenario in suite[:4]]


class CountedSAEs(FolderSAEs):
    """Counts how often each SAE is loaded."""

    def __init__(self) -> None:
        super().__init__(demo.sae_path())
        self.loads: Counter[int] = Counter()

    def load(self, attributes: SAEAttributes, device: torch.device) -> Any:
        self.loads[attributes.layer] += 1
        return super().load(attributes, device)


def requests(prompts: Sequence[Prompt], layers: Sequence[int] = LAYERS) -> list[Request]:
    return [Request(prompt, frozenset(layers), next_token=True) for prompt in prompts]


def run(
    model: LoadedModel, wanted: Sequence[Request], **options: Any
) -> Generator[LayerRecord | TokensRecord]:
    source = options.pop("source", None) or FolderSAEs(demo.sae_path())
    saes = source.find(LAYERS)
    residual = {layer: f"blocks.{layer}.hook_resid_post" for layer in LAYERS}
    return records_of(
        model,
        wanted,
        attention_dtype="float32",
        saes=saes,
        source=source,
        residual=residual,
        **options,
    )


def by_key(records: Any) -> dict[tuple[str, int], Any]:
    return {
        (record.scenario, record.layer if isinstance(record, LayerRecord) else -1): record
        for record in records
    }


def arrays_of(record: LayerRecord | TokensRecord) -> list[np.ndarray]:
    if isinstance(record, TokensRecord):
        return [record.next_token, record.next_token_logprob]
    features = record.features["features"]
    assert record.attention is not None
    assert record.attention_mean is not None
    assert isinstance(record.residual, np.ndarray)
    return [
        record.residual,
        record.attention,
        record.attention_mean,
        np.asarray(features.activations),
        features.top_feature,
        features.top_activation,
    ]


@torch.no_grad()
def reference(model: LoadedModel, prompt: Prompt) -> tuple[Any, dict[int, torch.Tensor]]:
    """Return what transformers says of a prompt, and the output of each block."""
    outputs: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(
            lambda _module, _args, output, i=i: outputs.__setitem__(
                i, output[0] if isinstance(output, tuple) else output
            )
        )
        for i, block in enumerate(model.blocks)
    ]
    made = model.model(
        **model.tokenizer(prompt.scenario.prompt, return_tensors="pt"),
        output_attentions=True,
        output_hidden_states=True,
    )
    for handle in handles:
        handle.remove()
    return made, outputs


def test_everything_is_what_the_libraries_compute(
    model: LoadedModel, prompts: list[Prompt]
) -> None:
    found = by_key(run(model, requests(prompts[:2])))
    for prompt in prompts[:2]:
        name = prompt.scenario.name
        made, outputs = reference(model, prompt)
        assert not torch.equal(outputs[31], made.hidden_states[-1])  # that is behind the last norm
        for layer in LAYERS:
            record = found[name, layer]
            attention = made.attentions[layer][0]
            np.testing.assert_array_equal(record.attention, attention)
            np.testing.assert_array_equal(record.attention_mean, attention.mean(0))
            sae = SAE.load_from_disk(demo.sae_path() / f"blocks.{layer}.hook_resid_post")
            np.testing.assert_array_equal(record.residual, outputs[layer][0])
            with torch.no_grad():
                encoded = sae.encode(outputs[layer])[0]
                assert torch.equal(sae.encode(torch.from_numpy(record.residual)), encoded)
            features = record.features["features"]
            np.testing.assert_array_equal(np.asarray(features.activations), encoded)
            np.testing.assert_array_equal(features.top_activation, encoded.topk(32).values)
            fires = features.top_activation != 0
            assert (features.top_feature[~fires] == NO_ID).all()
            tokens, _ = np.nonzero(fires)
            picked = np.asarray(features.activations)[tokens, features.top_feature[fires]]
            np.testing.assert_array_equal(picked, features.top_activation[fires])
        likeliest = made.logits[0].log_softmax(-1).topk(10)
        np.testing.assert_array_equal(found[name, -1].next_token, likeliest.indices)
        np.testing.assert_array_equal(found[name, -1].next_token_logprob, likeliest.values)
        texts = [[model.tokenizer.decode([token]) for token in row] for row in likeliest.indices]
        assert found[name, -1].next_token_text.tolist() == texts


def test_no_token_sees_what_follows(model: LoadedModel, prompts: list[Prompt]) -> None:
    for record in run(model, requests(prompts[:1])):
        if isinstance(record, LayerRecord):
            assert record.attention is not None
            assert not np.triu(record.attention, 1).any()
            sums = record.attention.sum(-1, dtype=np.float64)
            # A softmax's sum over the tokens, an exponential and a quotient.
            rounding.assert_close(
                sums, np.ones_like(sums), rounding.rounding("float32", sums.shape[-1] + 4)
            )


@pytest.mark.long
def test_a_batch_changes_nothing_but_rounding(model: LoadedModel, prompts: list[Prompt]) -> None:
    lengths = {len(prompt.tokens.ids) for prompt in prompts}
    assert len(lengths) > 1
    wanted = requests(prompts, (0, 15, 31))
    alone, together = (by_key(run(model, wanted, batch_size=size)) for size in (1, 3))
    assert alone.keys() == together.keys()
    allowed = _deviations(model, wanted)
    for key, one in alone.items():
        other = together[key]
        if isinstance(one, TokensRecord):
            error = allowed["logprob"]
            rounding.assert_close(other.next_token_logprob, one.next_token_logprob, error)
            rounding.assert_same_ranking(
                other.next_token, one.next_token, one.next_token_logprob, error
            )
            continue
        for name in ("attention", "attention_mean"):
            rounding.assert_close(getattr(other, name), getattr(one, name), allowed[name])
        features = [np.asarray(record.features["features"].activations) for record in (one, other)]
        sae = SAE.load_from_disk(demo.sae_path() / f"blocks.{key[1]}.hook_resid_post")
        numerics.assert_features_close(*features, sae, allowed["blocks"], allowed["size"])
        for record, values in zip((one, other), features, strict=True):
            strongest = -np.sort(-values, axis=1)[:, :32]
            np.testing.assert_array_equal(record.features["features"].top_activation, strongest)


def _deviations(model: LoadedModel, wanted: Sequence[Request]) -> dict[str, float]:
    """Return how far rounding may bring two captures apart, and the size of what blocks make."""
    unchanged = Activations(width=64)

    def captured() -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for record in run(model, wanted, source=unchanged):
            if isinstance(record, TokensRecord):
                found["logprob"].append(record.next_token_logprob)
            else:
                found["attention"].append(record.attention)
                found["attention_mean"].append(record.attention_mean)
                found["blocks"].append(np.asarray(record.features["features"].activations))
        return {name: np.concatenate(list(map(np.ravel, all_))) for name, all_ in found.items()}

    return {**numerics.deviations(captured), "size": float(np.abs(captured()["blocks"]).max())}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_resumed_capture_gives_the_same_bits(
    model: LoadedModel, prompts: list[Prompt], batch_size: int
) -> None:
    whole = by_key(run(model, requests(prompts, (2, 9, 30)), batch_size=batch_size))
    rest = [
        Request(prompts[0], frozenset(), next_token=False),
        Request(prompts[1], frozenset({9, 30}), next_token=True),
        Request(prompts[2], frozenset(), next_token=True),
        Request(prompts[3], frozenset({30}), next_token=False),
    ]
    again = by_key(run(model, rest, batch_size=batch_size))
    names = [prompt.scenario.name for prompt in prompts]
    expected = {(names[1], 9), (names[1], 30), (names[1], -1), (names[2], -1), (names[3], 30)}
    assert again.keys() == expected
    for key, record in again.items():
        for one, other in zip(arrays_of(whole[key]), arrays_of(record), strict=True):
            np.testing.assert_array_equal(one, other)


def test_each_sae_is_loaded_once(model: LoadedModel, prompts: list[Prompt]) -> None:
    source = CountedSAEs()
    wanted = [*requests(prompts[:3], (1, 2, 3, 4))]
    for _ in run(model, wanted, source=source):
        pass
    assert source.loads == {1: 1, 2: 1, 3: 1, 4: 1}


def test_what_goes_in_step_holds_little(model: LoadedModel, prompts: list[Prompt]) -> None:
    """A third of an encoder, 8 MiB at least; and every batch goes in one wave, in order."""
    found = batches(model, requests(prompts * 40), 1)
    (attributes,) = FolderSAEs(demo.sae_path()).find([3])[3]
    large = attributes.model_copy(update={"d_in": 4096, "d_sae": 32_768})
    for saes, budget in (([attributes], 8 * 2**20), ([attributes, large], 2**29 // 3)):
        cut = list(waves(model, found, saes))
        assert [batch for wave in cut for batch in wave] == found
        held = [sum(batch.held_bytes() for batch in wave) for wave in cut]
        assert max(held) <= budget
        nexts = [wave[0].held_bytes() for wave in cut[1:]]
        assert all(one + more > budget for one, more in zip(held, nexts, strict=False))
        assert (len(cut) > 1) == (saes == [attributes])
    assert [len(wave) for wave in waves(model, found, [])] == [1] * len(found)


def test_batches_go_alone_once_all_encoders_are_kept(
    model: LoadedModel, prompts: list[Prompt]
) -> None:
    found = batches(model, requests(prompts * 40), 1)
    source = keeping(CountedSAEs())
    assert keeping(source) is source
    (saes,) = source.find([3]).values()
    cut = waves(model, found, saes, source)
    first = next(cut)
    assert len(first) > 1
    assert not source.has(saes, model.device)
    source.load(saes[0], model.device)
    rest = list(cut)
    assert [len(wave) for wave in rest] == [1] * (len(found) - len(first))
    assert [batch for wave in (first, *rest) for batch in wave] == found
    assert not goes_in_several_waves(model, found)  # only a GPU's own memory is worth it
    streamed = replace(model, is_streamed=True)  # each batch would bring all blocks again
    assert len(next(waves(streamed, found, saes, source))) > 1


def test_a_gpu_keeps_encoders_that_it_needs_again() -> None:
    sizes = [SimpleNamespace(held_bytes=lambda: 2**28)] * 5
    for device, streamed, count, expected in (
        ("cuda", False, 5, True),
        ("cuda", False, 4, False),
        ("cuda", True, 5, False),
        ("cpu", False, 5, False),
    ):
        one: Any = SimpleNamespace(device=torch.device(device), is_streamed=streamed)
        some: Any = sizes[:count]
        assert goes_in_several_waves(one, some) == expected


@pytest.mark.long
def test_records_do_not_pile_up(model: LoadedModel, prompts: list[Prompt]) -> None:
    def alive() -> int:
        return sum(type(thing) is LayerRecord for thing in gc.get_objects())

    gc.collect()
    before, most = alive(), 0  # those that other tests have left
    for _ in run(model, requests(prompts[:3], range(3))):
        most = max(most, alive())
    assert most - before <= 4  # one batch of one layer, and the one in hand


def test_paused_passes_hold_no_attention(model: LoadedModel, prompts: list[Prompt]) -> None:
    """All scenarios of a layer are paused at once: what each still held would add up."""
    made: list[weakref.ref[torch.Tensor]] = []
    handles = [
        attention.register_forward_hook(
            lambda _module, _args, output: made.append(weakref.ref(output[1]))
        )
        for attention in model.attentions.values()
    ]
    alive = []
    try:
        for record in run(model, requests(prompts * 3)):
            alive.append(sum(held() is not None for held in made))
            del record
    finally:
        for handle in handles:
            handle.remove()
    assert len(made) > 6
    assert max(alive) <= 2


def test_hooks_go_with_the_capture(model: LoadedModel, prompts: list[Prompt]) -> None:
    def hooks() -> int:
        modules = list(model.model.modules())
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()  # transformers may have left some of its own
    records = run(model, requests(prompts[:1]))
    next(records)
    assert hooks() > before
    records.close()
    assert hooks() == before


def test_inference_mode_does_not_leak(model: LoadedModel, prompts: list[Prompt]) -> None:
    for _ in run(model, requests(prompts[:1], (1,))):
        assert not torch.is_inference_mode_enabled()


BOS = "<|begin_of_text|>"


@pytest.mark.parametrize("adds_bos", [True, False])  # whether the tokenizer does, as Llama's
@pytest.mark.parametrize("prepend", [True, False])
@pytest.mark.parametrize("spelt", [0, 1, 2])
def test_bos_exactly_once_or_not_at_all(
    model: LoadedModel, spelt: int, prepend: bool, adds_bos: bool
) -> None:
    """One that the prompt spells out is text: it stays without --prepend-bos."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = ByteLevel()
    assert (tokenizer("Bet")["input_ids"][0] == tokenizer.bos_token_id) == adds_bos
    text = spelt * BOS + "Bet now"
    prompt = tokenize(
        replace(model, tokenizer=tokenizer),
        Scenario(text, name="a", marks=False, spans={"now": "now"}),
        prepend_bos=prepend,
    )
    plain = tokenizer(BOS + "Bet now" if prepend else text, add_special_tokens=False)["input_ids"]
    assert list(prompt.tokens.ids) == plain
    assert list(prompt.tokens.texts).count(BOS) == (1 if prepend else spelt)
    assert "".join(prompt.tokens.texts[at] for at in prompt.spans["now"].tokens) == " now"


def test_attributes_say_what_computed(model: LoadedModel) -> None:
    attributes = model.attributes
    assert (attributes.n_layers, attributes.n_heads, attributes.d_model) == (32, 8, 64)
    assert attributes.architecture == "LlamaForCausalLM"
    assert (attributes.dtype, attributes.softmax_dtype) == ("float32", "float32")
    halved = load_model(str(demo.model_path()), dtype="bfloat16").attributes
    assert (halved.dtype, halved.softmax_dtype) == ("bfloat16", "float32")
