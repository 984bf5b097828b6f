"""Build the benchmark's model and SAEs: small to compute, of true shape and volume on disk.

A random 32-block Llama with 32 query and 8 key heads and width 256, float32, and for blocks 1-31
a JumpReLU SAE of 32,768 features whose thresholds let a chosen number of features fire a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zarrtrace import demo
from zarrtrace.scenarios import load_suite

WIDTH, FEATURES, LAYERS = 256, 32_768, tuple(range(1, 32))


def build(folder: Path, active: int) -> None:
    """Save ``model`` and ``saes`` below a folder.

    Parameters
    ----------
    folder
        Where to save.
    active
        Features that fire a token, on average over three prompts.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=8,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=512,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for layer, tokens in _block_outputs(model, tokenizer).items():
        _save_sae(folder / "saes" / f"blocks.{layer}.hook_resid_post", layer, tokens, active)


@torch.no_grad()
def _block_outputs(model: Any, tokenizer: Any) -> dict[int, torch.Tensor]:
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            kept[layer].append(output[0] if isinstance(output, tuple) else output)

        return hook

    for layer in LAYERS:
        model.model.layers[layer].register_forward_hook(keep(layer))
    for scenario in load_suite(demo.suite_path())[:3]:
        model(**tokenizer(scenario.prompt, return_tensors="pt"))
    return {
        layer: torch.cat([part.reshape(-1, WIDTH) for part in parts])
        for layer, parts in kept.items()
    }


@torch.no_grad()
def _save_sae(folder: Path, layer: int, tokens: torch.Tensor, active: int) -> None:
    hook = f"blocks.{layer}.hook_resid_post"
    metadata = SAEMetadata(model_name="proxy", hook_name=hook, prepend_bos=True)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=FEATURES, metadata=metadata))
    encoder = torch.randn(WIDTH, FEATURES) / 16
    pre = (tokens @ encoder)[1::5].flatten()
    firing = max(1, round(len(pre) * active / FEATURES))
    sae.W_enc.data, sae.W_dec.data = encoder, encoder.T.contiguous()
    sae.b_enc.data, sae.b_dec.data = torch.zeros(FEATURES), torch.zeros(WIDTH)
    sae.threshold.data = torch.full((FEATURES,), pre.topk(firing).values[-1].item())
    sae.save_model(folder)
