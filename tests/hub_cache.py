"""A local Hugging Face cache in the hub's own layout, with small random models and SAEs."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from zarrtrace import demo

D_MODEL, D_SAE = 32, 96


def add_repo(home: Path, name: str, content: Path) -> None:
    """Put a folder into the cache as the hub's client would have left it."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for file in sorted(path for path in content.rglob("*") if path.is_file()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = repo / "snapshots" / commit / file.relative_to(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = Path(*[".."] * (len(link.relative_to(repo).parts) - 1))
        link.symlink_to(up / "blobs" / blob.name)


def make_llama(folder: Path) -> None:
    """Save a 32-block Llama with grouped queries and the embedded tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_llama_scope(folder: Path) -> None:
    """Save SAEs of layers 1-31 in the layout of Llama Scope's repository."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(1, 32):
        sae = folder / f"Llama3_1-8B-Base-L{layer}R-8x"
        (sae / "checkpoints").mkdir(parents=True)
        hyperparams = {
            "d_model": D_MODEL,
            "d_sae": D_SAE,
            "jump_relu_threshold": 0.3 + layer / 100,
            "hook_point_in": f"blocks.{layer}.hook_resid_post",
            "dataset_average_activation_norm": {"in": 5.0 + layer, "out": 5.0 + layer},
        }
        (sae / "hyperparams.json").write_text(json.dumps(hyperparams))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(torch.bfloat16)

        weights = {
            "encoder.weight": random(D_SAE, D_MODEL),
            "encoder.bias": random(D_SAE) * 0.1,
            "decoder.weight": random(D_MODEL, D_SAE),
            "decoder.bias": random(D_MODEL),
        }
        save_file(weights, sae / "checkpoints" / "final.safetensors")


def make_gpt2(folder: Path) -> None:
    """Save a 12-block GPT-2 whose tokenizer, like GPT-2's, adds no BOS by itself."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=D_MODEL,
        n_layer=12,
        n_head=4,
        n_positions=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")


def make_gpt2_saes(folder: Path) -> None:
    """Save SAEs in the layout of the release gpt2-small-res-jb, before sae-lens 6."""
    generator = torch.Generator().manual_seed(1)
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(12)]
    for hook in [*hooks, "blocks.11.hook_resid_post"]:
        sae = folder / hook
        sae.mkdir(parents=True)
        config = {
            "model_name": "gpt2-small",
            "hook_point": hook,
            "hook_point_layer": int(hook.split(".")[1]),
            "d_in": D_MODEL,
            "d_sae": D_SAE,
            "dtype": "torch.float32",
            "device": "cpu",
        }
        (sae / "cfg.json").write_text(json.dumps(config))
        weights = {
            "W_enc": torch.randn((D_MODEL, D_SAE), generator=generator),
            "b_enc": torch.randn(D_SAE, generator=generator) * 0.1,
            "W_dec": torch.randn((D_SAE, D_MODEL), generator=generator),
            "b_dec": torch.randn(D_MODEL, generator=generator),
        }
        save_file(weights, sae / "sae_weights.safetensors")
        save_file({"sparsity": torch.zeros(D_SAE)}, sae / "sparsity.safetensors")


def fill(home: str | Path) -> None:
    """Make a cache with everything that README names: Llama 3.1 with Llama Scope, and GPT-2."""
    repos = {
        "meta-llama/Llama-3.1-8B": make_llama,
        "fnlp/Llama3_1-8B-Base-LXR-8x": make_llama_scope,
        "gpt2": make_gpt2,
        "jbloom/GPT2-Small-SAEs-Reformatted": make_gpt2_saes,
    }
    for name, make in repos.items():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            add_repo(Path(home), name, Path(folder))
