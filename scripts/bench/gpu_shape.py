"""Write Llama-3.1-8B and Llama Scope's SAEs in their true shape, with random weights.

Both lie in a local Hugging Face cache as the hub's client leaves them, so that the documented
command runs on them. Weights are drawn on the device and written by several threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zarrtrace import demo
from zarrtrace.scenarios import load_suite

MODEL, SAES, RELEASE = (
    "meta-llama/Llama-3.1-8B",
    "fnlp/Llama3_1-8B-Base-LXR-8x",
    "llama_scope_lxr_8x",
)
LAYERS = tuple(range(1, 32))
_THREADS = 8
_ACTIVE = 50


@dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark: the true ones, or ones that a CPU runs in seconds.

    Attributes
    ----------
    width, heads, kv_heads, inner, vocabulary
        Of the model; it always has 32 blocks.
    features
        Of each SAE.
    many
        Scenarios of the throughput run.
    long
        Lengths of the long prompts.
    old
        Scenarios on which the old way is timed.
    few, most
        Scenarios of the runs that one GPU and two do.
    """

    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    inner: int = 14_336
    vocabulary: int = 128_256
    features: int = 32_768
    many: int = 500
    long: tuple[int, int] = (8_192, 32_768)
    old: int = 3
    few: int = 300
    most: int = 2_000


SCALES = {
    "true": Scale(),
    "tiny": Scale(64, 4, 2, 96, 4_096, 512, many=12, long=(700, 1_200), old=1, few=12, most=24),
}


def model_config(scale: Scale) -> dict[str, Any]:
    """Return Llama-3.1-8B's own configuration, in the sizes of `scale`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128_000 % scale.vocabulary,
        "eos_token_id": 128_001 % scale.vocabulary,
        "head_dim": scale.width // scale.heads,
        "hidden_act": "silu",
        "hidden_size": scale.width,
        "initializer_range": 0.02,
        "intermediate_size": scale.inner,
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": scale.heads,
        "num_hidden_layers": 32,
        "num_key_value_heads": scale.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8_192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": scale.vocabulary,
    }


def weight_shapes(scale: Scale) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of Llama's weights, in the order of its checkpoint."""
    wide, narrow = scale.width, scale.width // scale.heads * scale.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (scale.vocabulary, wide)}
    for layer in range(32):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.self_attn.q_proj.weight": (wide, wide),
            f"{block}.self_attn.k_proj.weight": (narrow, wide),
            f"{block}.self_attn.v_proj.weight": (narrow, wide),
            f"{block}.self_attn.o_proj.weight": (wide, wide),
            f"{block}.mlp.gate_proj.weight": (scale.inner, wide),
            f"{block}.mlp.up_proj.weight": (scale.inner, wide),
            f"{block}.mlp.down_proj.weight": (wide, scale.inner),
            f"{block}.input_layernorm.weight": (wide,),
            f"{block}.post_attention_layernorm.weight": (wide,),
        }
    shapes |= {"model.norm.weight": (wide,), "lm_head.weight": (scale.vocabulary, wide)}
    return shapes


class Repository:
    """A repository in the hub's cache: blobs, and a snapshot of links to them."""

    def __init__(self, home: Path, name: str) -> None:
        self._root = home / "hub" / f"models--{name.replace('/', '--')}"
        self._commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        (self._root / "blobs").mkdir(parents=True, exist_ok=True)
        (self._root / "refs").mkdir(exist_ok=True)
        (self._root / "refs" / "main").write_text(self._commit)
        self.snapshot = self._root / "snapshots" / self._commit

    def blob(self, name: str) -> Path:
        """Return where the content of a file goes, and link the file to it."""
        blob = self._root / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        link = self.snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        up = Path(*[".."] * (len(link.relative_to(self._root).parts) - 1))
        link.symlink_to(up / "blobs" / blob.name)
        return blob


def write_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]], make: Any) -> None:
    """Write bfloat16 tensors, made one at a time by ``make(name, shape)``; sorted by name."""
    header, offset = {}, 0
    for name in sorted(shapes):
        size = 2 * torch.Size(shapes[name]).numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    start = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    start += b" " * (-len(start) % 8)
    with file.open("wb", buffering=0) as content:
        content.write(len(start).to_bytes(8, "little") + start)
        for name in sorted(shapes):
            raw = memoryview(make(name, shapes[name]).view(torch.uint8).cpu().numpy().reshape(-1))
            while raw:  # one call writes 2 GiB at most
                raw = raw[content.write(raw) :]


def build_model(home: Path, scale: Scale, device: str) -> None:
    """Write the model into the cache."""
    repository = Repository(home, MODEL)
    repository.blob("config.json").write_text(json.dumps(model_config(scale), indent=2))
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    saved = home / "tokenizer"
    tokenizer.save_pretrained(saved)
    for file in saved.iterdir():
        repository.blob(file.name).write_bytes(file.read_bytes())
    shapes = weight_shapes(scale)
    names = list(shapes)
    shards = [names[i * len(names) // 4 : (i + 1) * len(names) // 4] for i in range(4)]
    files = {f"model-{i + 1:05}-of-00004.safetensors": part for i, part in enumerate(shards)}
    index = {name: file for file, part in files.items() for name in part}
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    repository.blob("model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return empty.fill_(1) if "norm" in name else empty.normal_(std=0.02)

    def write(file: str) -> None:
        write_safetensors(repository.blob(file), {name: shapes[name] for name in files[file]}, make)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(write, files))


def build_saes(home: Path, scale: Scale, device: str) -> dict[int, float]:
    """Write the SAEs into the cache; returns how many features fire a token, by layer."""
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    repository = Repository(home, SAES)
    tokens = dict(zip(LAYERS, _residuals(home, device), strict=True))
    shapes = {
        "decoder.bias": (scale.width,),
        "decoder.weight": (scale.width, scale.features),
        "encoder.bias": (scale.features,),
        "encoder.weight": (scale.features, scale.width),
    }

    def write(layer: int) -> float:
        factor = get_norm_scaling_factor(RELEASE, f"l{layer}r_8x")
        folder = f"Llama3_1-8B-Base-L{layer}R-8x"
        made = {name: _random(shape, device) for name, shape in shapes.items()}
        encoded = tokens[layer] @ (made["encoder.weight"].float() * factor).T
        encoded += made["encoder.bias"].float()
        threshold = threshold_of(encoded)
        active = (encoded > threshold).sum().item() / len(encoded)
        average = scale.width**0.5 / factor
        hyperparameters = {
            "d_model": scale.width,
            "d_sae": scale.features,
            "jump_relu_threshold": threshold / factor,
            "hook_point_in": f"blocks.{layer}.hook_resid_post",
            "dataset_average_activation_norm": {"in": average, "out": average},
        }
        repository.blob(f"{folder}/hyperparams.json").write_text(json.dumps(hyperparameters))
        write_safetensors(
            repository.blob(f"{folder}/checkpoints/final.safetensors"),
            shapes,
            lambda name, _: made.pop(name),
        )
        return float(active)

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(LAYERS, pool.map(write, LAYERS), strict=True))


def threshold_of(encoded: torch.Tensor) -> float:
    """Return what about 50 of the values ``(token, feature)`` of a token exceed."""
    return float(encoded.flatten().topk(_ACTIVE * len(encoded)).values[-1])


def _random(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=shape[-1] ** -0.5)


def _residuals(home: Path, device: str) -> Iterator[torch.Tensor]:
    """Yield what blocks 1-31 make of three prompts, ``(token, d)`` float32, BOS left out."""
    model, tokenizer = load(home, device)
    some = load_suite(demo.suite_path())[:3]
    ids = [tokenizer(one.prompt, return_tensors="pt").input_ids.to(device) for one in some]
    kept = residuals(model, ids)
    for layer in LAYERS:
        yield torch.cat([hidden[0, 1:].float() for hidden in kept[layer]])


@torch.inference_mode()
def residuals(model: Any, prompts: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """Return what blocks 1-31 make of prompts ``(sequence, token)``, each ``(..., token, d)``."""
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            kept[layer].append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [model.model.layers[layer].register_forward_hook(keep(layer)) for layer in LAYERS]
    for ids in prompts:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return kept


def load(home: Path, device: str) -> tuple[Any, Any]:
    """Load model and tokenizer as a plain script does."""
    folder = Repository(home, MODEL).snapshot
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.bfloat16, device_map={"": device}
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encoder_bytes(scale: Scale) -> int:
    """Bytes of the encoders that a run needs, as they lie on the disk."""
    return len(LAYERS) * 2 * (scale.features * scale.width + scale.features + scale.width)


def model_bytes(scale: Scale) -> int:
    """Bytes of the model on the disk."""
    return sum(2 * torch.Size(shape).numel() for shape in weight_shapes(scale).values())


def write_long(file: Path, home: Path, tokens: int) -> None:
    """Write one scenario of about so many tokens, the suite's prompts one after another."""
    tokenizer = AutoTokenizer.from_pretrained(Repository(home, MODEL).snapshot)
    text = "\n".join(scenario.prompt for scenario in load_suite(demo.suite_path()))
    text *= tokens // 900 + 1
    ends = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    prompt = text[: ends[tokens - 2][1]]  # one more is the BOS
    file.write_text(json.dumps({"name": f"long_{tokens}", "prompt": prompt}), encoding="utf-8")


def prompts(count: int) -> Sequence[tuple[str, str]]:
    """Return names and texts of the first scenarios."""
    return [(s.name, s.prompt) for s in load_suite(demo.suite_path())[:count]]
