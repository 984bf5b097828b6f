"""Every architecture against transformers' own eager attention and block outputs, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, EVERY_DAY, Activations, Models
from capturing import records_of
from everyday import mostly_long
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from zarrtrace import demo
from zarrtrace.capture import load_model
from zarrtrace.errors import ModelError
from zarrtrace.extraction import Options, extract_run
from zarrtrace.records import TokensRecord
from zarrtrace.store import open_trace, verify

pytestmark = pytest.mark.torch

NAMES = list(ARCHITECTURES)
DTYPES = ["float32", "bfloat16", "float16"]
TOKENS = 23
SUITE = {
    "scenarios": [
        {
            "name": "short",
            "prompt": "You now hold $90. Your choice:",
            "spans": {"balance": "$90"},
            "options": {"bet": "1", "stop": "2"},
        }
    ]
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps(SUITE), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_long(lambda name, dtype: dtype == "float32" or name in ("Llama", "gpt-oss"),
                NAMES, DTYPES),
)  # fmt: skip
def test_attention_blocks_and_continuations_are_transformers_own(
    models: Models, name: str, dtype: str
) -> None:
    ids = architectures.random_ids(TOKENS)
    expected = architectures.reference(name, models.path(name, dtype), ids)
    source = Activations()
    records = list(
        records_of(
            models(name, dtype),
            [architectures.request(ids)],
            attention_dtype="float16" if dtype == "float16" else "float32",
            saes=source.find(range(4)),
            source=source,
            residual={layer: f"blocks.{layer}.hook_resid_post" for layer in range(4)},
        )
    )
    layers = architectures.gather(records)
    assert list(layers) == [0, 1, 2, 3]
    for layer, record in layers.items():
        blocks = expected.blocks[layer].float().numpy()
        assert np.array_equal(np.asarray(record.residual), blocks)
        assert np.array_equal(np.asarray(record.features["features"].activations), blocks)
        if layer not in expected.attention:
            assert record.attention is None
            assert record.attention_mean is None
            continue
        weights = expected.attention[layer]
        stored = weights.numpy() if dtype == "float16" else weights.float().numpy()
        assert record.attention is not None
        assert record.attention_mean is not None
        found = np.asarray(record.attention)
        assert found.dtype == stored.dtype
        assert np.array_equal(found, stored)
        mean = weights.double().mean(0).numpy()
        np.testing.assert_allclose(record.attention_mean, mean, rtol=0, atol=1e-6)
    tokens = records[-1]
    assert isinstance(tokens, TokensRecord)
    logprobs, best = expected.logits.float().log_softmax(-1).topk(10)
    assert np.array_equal(tokens.next_token, best.numpy())
    assert np.array_equal(tokens.next_token_logprob, logprobs.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_configurations_show_what_their_architecture_is_about(models: Models, name: str) -> None:
    """The references themselves: causal, windows that bite, sinks that take their part."""
    found = architectures.reference(
        name, models.path(name), architectures.random_ids(TOKENS)
    ).attention
    windows = ARCHITECTURES[name].windows or {}
    behind = np.subtract.outer(np.arange(TOKENS), np.arange(TOKENS))
    for layer, weights in found.items():
        values = weights.numpy()
        assert values.shape == (4, TOKENS, TOKENS)
        seen = (behind >= 0) & (behind < windows.get(layer, TOKENS))
        assert (values[:, ~seen] == 0).all()
        assert (values[:, seen] > 0).all()
        sums = values.sum(-1)
        # A sink takes a part that no key gets.
        assert sums.min() < 0.9 if name == "gpt-oss" else np.allclose(sums, 1, atol=1e-6)


@pytest.mark.parametrize("name", mostly_long(lambda name: name in EVERY_DAY, NAMES))
def test_a_whole_run_stores_what_was_captured(
    models: Models, name: str, tmp_path: Path, suite: Path
) -> None:
    path = models.path(name)
    run = extract_run(tmp_path / "run", _options(path, suite))
    assert verify(run) == []
    ds = open_trace(run / "short")
    attributes = ds.attrs
    expected = architectures.reference(name, path, ds.token_id.values.tolist())
    layers = list(ARCHITECTURES[name].attention_layers)
    dim = "attention_layer" if len(layers) < 4 else "layer"
    assert ds.attention.dims == (dim, "head", "query", "key")
    assert ds[dim].values.tolist() == layers
    for layer in layers:
        stored = ds.attention.sel({dim: layer}).values
        assert np.array_equal(stored, expected.attention[layer].numpy())
    model = attributes["model"]
    assert model["architecture"] == type(models(name).model).__name__
    assert model["attn_implementation"] == "eager"
    assert model["softmax_dtype"] == "float32"
    assert (model["n_layers"], model["n_heads"], model["d_model"]) == (4, 4, 32)


def test_blocks_without_attention_say_so_and_keep_their_features(
    models: Models, tmp_path: Path, suite: Path
) -> None:
    from sae_lens import SAE, StandardSAEConfig

    path = models.path("Qwen3-Next")
    torch.manual_seed(0)
    for layer in range(4):
        config = StandardSAEConfig(d_in=32, d_sae=48)
        config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        SAE.from_dict(config.to_dict()).save_model(tmp_path / "saes" / str(layer))
    run = extract_run(
        tmp_path / "run", _options(path, suite, features=True, sae_path=tmp_path / "saes")
    )
    assert verify(run) == []
    ds = open_trace(run / "short")
    assert ds.attention.dims == ("attention_layer", "head", "query", "key")
    assert ds.attention_mean.dims == ("attention_layer", "query", "key")
    assert ds.attention_layer.values.tolist() == [1, 3]
    assert ds.features.dims == ("layer", "query", "feature")
    assert ds.layer.values.tolist() == [0, 1, 2, 3]
    [(why, layers)] = ds.attrs["layers_without_attention"].items()
    assert "Qwen3NextDecoderLayer" in why
    assert layers == "0,2"
    expected = architectures.reference("Qwen3-Next", path, ds.token_id.values.tolist())
    for layer in range(4):
        sae = SAE.load_from_disk(tmp_path / "saes" / str(layer))
        features = sae.encode(expected.blocks[layer]).detach().numpy()
        assert (features > 0).any()
        assert np.array_equal(ds.features.sel(layer=layer).values, features)


def test_layers_without_attention_alone_still_make_a_trace(
    models: Models, tmp_path: Path, suite: Path
) -> None:
    run = extract_run(tmp_path / "run", _options(models.path("Qwen3-Next"), suite, layers=(0, 2)))
    assert verify(run) == []
    ds = open_trace(run / "short")
    assert ds.sizes["attention_layer"] == 0
    assert ds.layer.values.tolist() == [0, 2]
    assert np.isfinite(ds.next_token_logprob.values).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_long(lambda name, dtype: name == "Llama" or dtype == "bfloat16",
                ["Llama", "Gemma 2", "gpt-oss", "Qwen3-Next"], DTYPES),
)  # fmt: skip
def test_attention_is_stored_without_loss(
    models: Models, name: str, dtype: str, tmp_path: Path, suite: Path
) -> None:
    stored = "float16" if dtype == "float16" else "float32"
    path = models.path(name, dtype)
    ds = open_trace(extract_run(tmp_path / "run", _options(path, suite)) / "short")
    assert ds.attention.dtype == stored
    attributes = ds.attrs
    assert attributes["attention_dtype"] == stored
    assert attributes["model"]["dtype"] == dtype
    ids = ds.token_id.values.tolist()
    for at, weights in enumerate(architectures.reference(name, path, ids).attention.values()):
        assert np.array_equal(ds.attention.values[at].astype(np.float32), weights.float().numpy())


def test_softmax_precision_is_the_architectures_own(models: Models) -> None:
    """gpt-oss makes probabilities in the model's precision, Llama in float32, then rounds."""
    for dtype in DTYPES:
        assert models("Llama", dtype).attributes.softmax_dtype == "float32"
        assert models("gpt-oss", dtype).attributes.softmax_dtype == dtype


def test_float16_on_request(models: Models, tmp_path: Path, suite: Path) -> None:
    path = models.path("Llama")
    run = extract_run(tmp_path / "run", _options(path, suite, attention_dtype="float16"))
    ds = open_trace(run / "short")
    assert ds.attention.dtype == np.float16
    weights = architectures.reference("Llama", path, ds.token_id.values.tolist()).attention
    for at, expected in enumerate(weights.values()):
        assert np.array_equal(ds.attention.values[at], expected.half().numpy())


def _options(path: Path, suite: Path, **changes: Any) -> Options:
    chosen = {"features": False, "layers": (0, 1, 2, 3), "scenarios": suite, **changes}
    return Options(model=str(path), **chosen)


# --- quantised models ---------------------------------------------------------------------------


def _quantise(folder: Path, method: str) -> None:
    """Say in a saved model's configuration that its weights are quantised."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


# transformers' BitNet module imports something of torch that is to go.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_quantised_model_is_captured_exactly(tmp_path: Path, suite: Path) -> None:
    """BitNet's ternary weights: the quantisation that transformers computes on a CPU by itself."""
    from transformers.integrations.bitnet import pack_weights

    path = architectures.save_model("Llama", tmp_path / "model")
    _quantise(path, "bitnet")
    packed = {}
    for name, weight in load_file(path / "model.safetensors").items():
        packed[name] = weight
        if "_proj" in name:
            ternary = torch.sign(weight * (weight.abs() > 0.2)).to(torch.int8)
            packed[name] = pack_weights(ternary)
            packed[f"{name}_scale"] = torch.tensor([3.0])
    save_file(packed, path / "model.safetensors", metadata={"format": "pt"})
    blocks = load_model(str(path)).blocks
    assert "BitLinear" in {type(module).__name__ for module in blocks[0].modules()}
    ds = open_trace(extract_run(tmp_path / "run", _options(path, suite)) / "short")
    expected = architectures.reference("Llama", path, ds.token_id.values.tolist())
    for layer, weights in expected.attention.items():
        assert np.array_equal(ds.attention.sel(layer=layer).values, weights.numpy())


def test_a_quantised_model_whose_package_is_missing_is_refused(
    models: Models, tmp_path: Path, suite: Path
) -> None:
    path = architectures.save_model("Llama", tmp_path / "model")
    _quantise(path, "aqlm")
    with pytest.raises(ModelError, match="needs another package to load it") as caught:
        extract_run(tmp_path / "run", _options(path, suite))
    assert "aqlm" in caught.value.what.lower() or "accelerate" in caught.value.what.lower()
    assert not (tmp_path / "run").exists()


# --- what cannot be captured exactly ------------------------------------------------------------


def _config_alone(folder: Path, config: PreTrainedConfig, architecture: str) -> Path:
    """Save a model without any weights: whatever reads them fails in another way."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 480}
MAMBA = MambaConfig(**SMALL, state_size=4)
VIT = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
T5 = T5Config(vocab_size=480, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)


@pytest.mark.parametrize(
    ("config", "architecture", "what"),
    [
        (T5, "T5ForConditionalGeneration", "an encoder-decoder model"),
        (MAMBA, "MambaForCausalLM", "MambaForCausalLM cannot be captured exactly"),
        (VIT, "ViTModel", "no class that continues text for a vit model"),
    ],
)
def test_other_architectures_are_refused_by_name_before_any_work(
    tmp_path: Path, suite: Path, config: PreTrainedConfig, architecture: str, what: str
) -> None:
    folder = _config_alone(tmp_path / "model", config, architecture)
    with pytest.raises(ModelError, match=what) as caught:
        extract_run(tmp_path / "run", _options(folder, suite, layers=(0, 1)))
    assert str(folder) in caught.value.what
    assert caught.value.why
    assert caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_class_that_declares_nothing_is_found_by_usual_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(**SMALL, num_attention_heads=4, intermediate_size=48)
    folder = _config_alone(tmp_path / "model", config, "LlamaForCausalLM")
    monkeypatch.setattr(LlamaPreTrainedModel, "_can_record_outputs", None)
    found = load_model(str(folder), weights=False).attentions
    assert [type(module).__name__ for module in found.values()] == ["LlamaAttention"] * 2


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path, suite: Path) -> None:
    config = LlamaConfig(**SMALL, num_attention_heads=4, intermediate_size=48)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="gives no character offsets"):
        extract_run(tmp_path / "run", _options(tmp_path / "model", suite, layers=(0, 1)))
    assert not (tmp_path / "run").exists()
