"""The probe of a loaded model: its refusals, and the ways it permits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import architectures
import families
import hub_cache
import numpy as np
import pytest
import torch
from architectures import Models
from capturing import records_of
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    LlavaConfig,
    Qwen2VLConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from zarrtrace import demo
from zarrtrace.capture import blocked, load_model, probe, probe_model, streaming
from zarrtrace.capture.blocked import AttentionRows
from zarrtrace.capture.checks import _warn_once
from zarrtrace.capture.model import LoadedModel, Permitted
from zarrtrace.capture.rows import RowBuffer
from zarrtrace.errors import ModelError
from zarrtrace.extraction import Options, extract_run
from zarrtrace.store import open_trace

pytestmark = pytest.mark.torch


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.yaml"
    prompts = {"short": "You now hold $90.", "longer": "Lost $30, lost $60. You now hold $140."}
    file.write_text(
        json.dumps({"scenarios": [{"name": n, "prompt": p} for n, p in prompts.items()]}),
        encoding="utf-8",
    )
    return file


def _options(path: Path, suite: Path, **changes: Any) -> Options:
    chosen = {"features": False, "layers": (0, 1), "scenarios": suite, **changes}
    return Options(model=str(path), **chosen)


# --- blocks of queries --------------------------------------------------------------------------


@pytest.mark.parametrize("start", [16, 32])
def test_a_mask_that_is_wrong_in_a_later_block_is_noticed(
    models: Models, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    added = blocked._Mask.added

    def wrong(self: Any, first: int, stop: int) -> Any:
        mask = added(self, first, stop)
        return torch.zeros_like(mask) if first == start else mask

    monkeypatch.setattr(blocked._Mask, "added", wrong)
    assert probe_model(models("Llama")).permitted == Permitted(blocks=False)


@pytest.mark.parametrize("layer", range(4))
def test_a_fault_in_one_kind_of_layer_is_noticed(
    models: Models, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    kinds = ["sliding_attention"] * 4
    kinds[layer] = "full_attention"
    model = models("Gemma 2", layer_types=kinds)
    eager = blocked._eager

    def wrong(module: Any) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            out, weights = eager(module)(*args, **kwargs)
            return out, weights.roll(1, 1) if module.layer_idx == layer else weights

        return attention

    assert probe_model(model).permitted.blocks
    monkeypatch.setattr(blocked, "_eager", wrong)
    assert not probe_model(model).permitted.blocks


def test_rows_of_chosen_queries_are_probed_as_well(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = blocked._fast
    monkeypatch.setattr(blocked, "_fast", lambda *given: 1.1 * fast(*given))
    assert not probe_model(models("Llama")).permitted.blocks


def test_more_rows_than_announced_are_refused_and_not_waited_for() -> None:
    buffer = RowBuffer(1, 4, 2, (0, 3), "float32")
    assert list(buffer.add(AttentionRows(0, (0,), torch.ones(1, 1, 1)))) == []
    assert len(list(buffer.add(AttentionRows(0, (3,), torch.ones(1, 1, 4))))) == 1
    with pytest.raises(ModelError, match="more than 2 rows"):
        list(buffer.add(AttentionRows(0, (0,), torch.ones(1, 1, 1))))


# --- batches, and parts of long prompts ---------------------------------------------------------


@pytest.fixture
def mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLPs look at all tokens of the batch, padding included."""
    forward = LlamaMLP.forward

    def mixed(self: Any, hidden: torch.Tensor) -> Any:
        return forward(self, hidden - 0.5 * hidden.mean((0, 1)))

    monkeypatch.setattr(LlamaMLP, "forward", mixed)


def test_what_depends_on_other_tokens_goes_alone_and_whole(models: Models, mixing: None) -> None:
    assert probe_model(models("Llama")).permitted == Permitted(batches=False, parts=False)


def test_batches_of_one_are_said_once(
    models: Models, suite: Path, tmp_path: Path, mixing: None, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    path = models.path("Llama")
    runs = [
        extract_run(tmp_path / str(size), _options(path, suite, batch_size=size))
        for size in (1, 2, 2)
    ]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "one prompt at a time instead of 2" in caplog.text
    for scenario in ("short", "longer"):
        alone, asked = (open_trace(run / scenario) for run in runs[:2])
        assert np.array_equal(alone.attention, asked.attention)
        assert np.array_equal(alone.next_token_logprob, asked.next_token_logprob)


def test_a_long_prompt_is_computed_whole_where_parts_differ(models: Models, mixing: None) -> None:
    model = probe_model(models("Llama"))
    ids = architectures.random_ids(600)
    records = list(records_of(model, [architectures.request(ids)], attention_dtype="float32"))
    expected = architectures.reference("Llama", models.path("Llama"), ids)
    logprobs = expected.logits.float().log_softmax(-1).topk(10).values
    assert np.array_equal(records[-1].next_token_logprob, logprobs.numpy())


# --- refusals -----------------------------------------------------------------------------------


def test_an_encoder_is_refused_before_anything_is_written(tmp_path: Path, suite: Path) -> None:
    config = BertConfig(
        vocab_size=480,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    architectures.save_random(config, tmp_path / "model")
    for changes in ({}, {"attention_capture": "blocked"}):
        with pytest.raises(ModelError, match="behind its query, as encoders do"):
            extract_run(tmp_path / "run", _options(tmp_path / "model", suite, **changes))
    assert not (tmp_path / "run").exists()


def test_matrices_that_are_not_transformers_own_are_refused(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recorded = models("Llama"), probe._recorded
    with monkeypatch.context() as patch:
        patch.setattr(probe, "_recorded", lambda *given: [0.9 * w for w in recorded(*given)])
        with pytest.raises(ModelError, match="layer 0 is not the matrix that transformers gives"):
            probe_model(model)
    monkeypatch.setattr(probe, "_recorded", lambda *given: recorded(*given)[1:])
    with pytest.raises(ModelError, match=r"gives 3 attention matrices .* 4 of these 4 blocks"):
        probe_model(model)


def test_a_forward_pass_that_fails_is_a_message(
    models: Models, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(LlamaMLP, "forward", fail)
    with pytest.raises(ModelError, match="its forward pass failed") as caught:
        extract_run(tmp_path / "run", _options(models.path("Llama"), suite))
    assert caught.value.what.endswith("RuntimeError: no kernel for this")
    assert not (tmp_path / "run").exists()


# --- what a probe costs and leaves behind -------------------------------------------------------


def test_a_model_is_as_before_when_it_was_probed(models: Models) -> None:
    model = models("Gemma 3")
    modules = list(model.model.modules())
    hooks = [len(module._forward_hooks) for module in modules]
    probe_model(model)
    assert list(model.model.modules()) == modules
    assert [len(module._forward_hooks) for module in modules] == hooks
    with torch.no_grad():
        ids = torch.tensor([architectures.random_ids(9)])
        assert len(model.model(ids, output_attentions=True).attentions) == 4


def test_a_probe_runs_two_of_many_equal_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache.make_llama(tmp_path)
    model = load_model(str(tmp_path), low_memory=True)
    brought: set[int] = set()
    bring = streaming.BlockStream._bring

    def counted(self: Any, index: int) -> None:
        brought.add(index)
        bring(self, index)

    monkeypatch.setattr(streaming.BlockStream, "_bring", counted)
    assert probe_model(model).permitted == Permitted()
    assert brought == {0, 1}
    assert len(model.blocks) == 32


# --- vision-language models ---------------------------------------------------------------------

_TEXT = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": families.WIDTH,
    "num_hidden_layers": families.LAYERS,
    "num_attention_heads": families.HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
}
_VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28}
_CONFIGS = {
    # As many blocks in the vision tower as in the text tower.
    "llava": LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={**_VISION, "model_type": "clip_vision_model", "patch_size": 14},
        image_token_index=479,
    ),
    "qwen2_vl": Qwen2VLConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={"depth": 4, "embed_dim": 32, "num_heads": 4, "hidden_size": 32},
        image_token_id=479,
        video_token_id=478,
        vision_start_token_id=477,
        vision_end_token_id=476,
    ),
}


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_text_towers_of_vision_language_models_are_captured(
    tmp_path: Path, suite: Path, name: str
) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_CONFIGS[name]).eval()
    with architectures.quiet():
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(tmp_path / "model")
    loaded: LoadedModel = load_model(str(tmp_path / "model"))
    assert {type(one).__name__ for one in loaded.attentions.values()} <= {
        "LlamaAttention",
        "Qwen2VLAttention",
    }
    ds = open_trace(
        extract_run(
            tmp_path / "run",
            _options(tmp_path / "model", suite, layers=(0, 1, 2, 3), attention_capture="blocked"),
        )
        / "longer"
    )
    assert ds.attrs["model"]["attn_implementation"] == "blocked"
    eager = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        made = eager(torch.tensor([ds.token_id.values.tolist()]), output_attentions=True)
    for layer, weights in enumerate(made.attentions):
        np.testing.assert_allclose(ds.attention.values[layer], weights[0], rtol=0, atol=1e-5)
