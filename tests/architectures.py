"""Small random models of every architecture under test, and references that share no code with us.

Windows are smaller than the prompts and weights larger than usual, so that every part of an
architecture shows in its attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from zarrtrace import demo
from zarrtrace.capture import LoadedModel, Request, load_model
from zarrtrace.capture.hooks import parse_hook
from zarrtrace.capture.prompts import Prompt
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.records import LayerRecord, Tokens
from zarrtrace.scenarios import Scenario

LAYERS, HEADS, WIDTH = 4, 4, 32
VOCABULARY = 480  # the embedded tokenizer's

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_TWO_BLOCKS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": LAYERS,
}


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers, its configuration, and where its decoder blocks are."""

    model_type: str
    config: Mapping[str, Any]
    blocks: str = "model.layers"
    #: Blocks that have attention probabilities.
    attention_layers: tuple[int, ...] = (0, 1, 2, 3)
    #: Width of a sliding window, by the blocks that have one.
    windows: Mapping[int, int] | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("llama", _GROUPED),
    "GPT-2": Architecture(
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 1024,
        },
        blocks="transformer.h",
    ),
    "GPT-NeoX": Architecture("gpt_neox", _SIZES, blocks="gpt_neox.layers"),
    "Mistral": Architecture(
        "mistral", {**_GROUPED, "sliding_window": 7}, windows=dict.fromkeys(range(LAYERS), 7)
    ),
    "Gemma 2": Architecture(
        "gemma2",
        {
            **_GROUPED,
            **_TWO_BLOCKS,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 7,
            "attn_logit_softcapping": 0.5,  # small, so that it bites
            "final_logit_softcapping": 3.0,
        },
        windows={0: 7, 2: 7},
    ),
    "Gemma 3": Architecture(
        "gemma3_text",
        {
            **_GROUPED,
            **_TWO_BLOCKS,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 7,
        },
        windows={0: 7, 2: 7},
    ),
    "Qwen 2": Architecture("qwen2", _GROUPED),
    "Qwen 3": Architecture("qwen3", {**_GROUPED, "head_dim": 16}),
    "Phi-3": Architecture(
        "phi3",
        {**_GROUPED, "pad_token_id": 0, "sliding_window": 7},
        windows=dict.fromkeys(range(LAYERS), 7),
    ),
    "OLMo 2": Architecture("olmo2", _GROUPED),
    "gpt-oss": Architecture(
        "gpt_oss",
        {
            **_GROUPED,
            **_TWO_BLOCKS,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
        },
        windows={0: 7, 2: 7},
    ),
    "Qwen3-Next": Architecture(
        "qwen3_next",
        {
            **_GROUPED,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "decoder_sparse_step": 1,
            "layer_types": [
                "linear_attention",
                "full_attention",
                "linear_attention",
                "full_attention",
            ],
        },
        attention_layers=(1, 3),
    ),
}
#: One of each kind of attention: grouped; with learnt positions; soft-capped and with windows; of
#: one projection; with sinks; in some blocks only.
EVERY_DAY = ("Llama", "GPT-2", "Gemma 2", "Phi-3", "gpt-oss", "Qwen3-Next")


def save_model(name: str, folder: Path, dtype: str = "float32", **changes: Any) -> Path:
    """Save a random model of an architecture and the embedded tokenizer; `changes` its config."""
    architecture = ARCHITECTURES[name]
    config = CONFIG_MAPPING[architecture.model_type](
        **{
            **architecture.config,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )
    return save_random(config, folder, dtype)


def save_random(config: Any, folder: Path, dtype: str = "float32") -> Path:
    """Save a random model of a configuration and the embedded tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():  # what starts at 0 or 1 would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    with quiet():
        model.save_pretrained(folder)
        config.save_pretrained(folder)  # with its part for images, of which the model has none
        AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(folder)
    return folder


def longrope_config(model_type: str, limit: int = 64) -> Any:
    """Return a tiny configuration with other rotary embeddings beyond `limit` tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 16.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": limit,
    }
    changes = {"rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if model_type == "phi3":
        changes["original_max_position_embeddings"] = limit
    # Larger weights than usual, so that positions show in what is attended to.
    return CONFIG_MAPPING[model_type](**{**_SIZES, **changes, "initializer_range": 0.3})


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers draw no bars."""
    logging.disable_progress_bar()
    yield


class Models:
    """Saves and loads models once; give it a folder that outlives its users."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, LoadedModel] = {}

    def path(self, name: str, dtype: str = "float32", **changes: Any) -> Path:
        """Return the folder of a model."""
        key = f"{name} {dtype} {json.dumps(changes, sort_keys=True)}".replace('"', "")
        path = self._folder / "".join(c if c.isalnum() else "_" for c in key)
        return path if path.is_dir() else save_model(name, path, dtype, **changes)

    def __call__(self, name: str, dtype: str = "float32", **changes: Any) -> LoadedModel:
        """Return a model as zarrtrace loads it."""
        path = str(self.path(name, dtype, **changes))
        if path not in self._loaded:
            self._loaded[path] = load_model(path)
        return self._loaded[path]


def random_ids(tokens: int, seed: int = 0) -> list[int]:
    """Return token ids that are no special ones."""
    found: list[int] = np.random.default_rng(seed).integers(3, VOCABULARY, tokens).tolist()
    return found


def request(
    ids: Sequence[int],
    name: str = "a",
    layers: Sequence[int] = range(LAYERS),
    *,
    blocked: bool = False,
    positions: tuple[int, ...] | None = None,
    attention_positions: tuple[int, ...] | None = None,
) -> Request:
    """Ask for everything of a prompt that consists of given tokens."""
    prompt = Prompt(Scenario(".", name=name), Tokens(ids, [str(i) for i in ids]), {}, {})
    return Request(
        prompt,
        frozenset(layers),
        next_token=True,
        blocked=blocked,
        positions=positions,
        attention_positions=positions if attention_positions is None else attention_positions,
    )


class Activations:
    """A source of encoders that change nothing: features are the activations at a hook point."""

    prepend_bos = None

    def __init__(self, hook: str = "hook_resid_post", width: int = WIDTH) -> None:
        self._hook, self._width = hook, width

    def find(self, layers: Sequence[int]) -> dict[int, tuple[SAEAttributes, ...]]:
        return {
            layer: (
                SAEAttributes(
                    layer=layer,
                    release=None,
                    id=str(layer),
                    hook_name=f"blocks.{layer}.{self._hook}",
                    architecture="none",
                    d_in=self._width,
                    d_sae=self._width,
                    decoder_norm_folded=False,
                    dtype="float32",
                ),
            )
            for layer in layers
        }

    def load(self, attributes: SAEAttributes, device: torch.device) -> Any:
        return _Unchanged(attributes)


class _Unchanged:
    def __init__(self, attributes: SAEAttributes) -> None:
        self.attributes = attributes
        self.columns = attributes.d_sae
        self.hook = parse_hook(attributes.hook_name)

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        return activations.float()

    def split(self) -> None:
        pass

    def firing(self, activations: torch.Tensor) -> Any:
        values = self(activations)
        return values != 0, lambda at: values.reshape(-1)[at]

    def tiles(self, activations: torch.Tensor) -> list[Any]:
        values = activations.float().numpy().reshape(-1)
        at = np.flatnonzero(values)
        return [lambda: (at, values[at])]


@dataclass(frozen=True)
class Reference:
    """Outputs of transformers itself for a prompt.

    Attributes
    ----------
    attention
        ``(head, query, key)`` by the blocks that have attention, in the model's precision.
    blocks
        ``(token, d_model)``: each block's output.
    logits
        ``(token, vocabulary)``.
    """

    attention: dict[int, torch.Tensor]
    blocks: dict[int, torch.Tensor]
    logits: torch.Tensor


def blocks_of(name: str, model: Any) -> list[torch.nn.Module]:
    """Return a model's decoder blocks, found by where the architecture keeps them."""
    return list(model.get_submodule(ARCHITECTURES[name].blocks))


def reference(name: str, path: Path, ids: Sequence[int]) -> Reference:
    """Run a prompt alone through transformers' eager attention."""
    architecture = ARCHITECTURES[name]
    return reference_of(
        load_eager_once(path), architecture.blocks, architecture.attention_layers, ids
    )


def load_eager(path: Path) -> Any:
    """Load a model by transformers alone, with eager attention."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


#: A prompt is compared after a prompt: loading a model takes five times as long as running it.
load_eager_once = lru_cache(maxsize=16)(load_eager)


def reference_of(model: Any, blocks: str, layers: Sequence[int], ids: Sequence[int]) -> Reference:
    """Run a prompt alone through a model that transformers loaded.

    Parameters
    ----------
    model
        From :func:`load_eager`.
    blocks
        Name of the module that holds the decoder blocks.
    layers
        Blocks that have attention: transformers gives one matrix for each, and no other.
    ids
        The prompt.
    """
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            outputs[layer] = (output[0] if isinstance(output, tuple | list) else output)[0]

        return hook

    with ExitStack() as stack, torch.no_grad():
        for layer, block in enumerate(model.get_submodule(blocks)):
            stack.callback(block.register_forward_hook(keep(layer)).remove)
        made = model(torch.tensor([list(ids)]), output_attentions=True, use_cache=False)
    square = (len(ids), len(ids))  # MiniMax's states of linear attention stand among them
    weights = [
        found[0] for found in made.attentions if found is not None and found.shape[2:] == square
    ]
    return Reference(dict(zip(layers, weights, strict=True)), outputs, made.logits[0])


def gather(records: Sequence[Any], name: str = "a") -> dict[int, LayerRecord]:
    """Return the records of one scenario by layer, where each layer comes in one."""
    found: dict[int, LayerRecord] = {}
    for record in records:
        if isinstance(record, LayerRecord) and record.scenario == name:
            assert record.layer not in found
            found[record.layer] = record
    return found
