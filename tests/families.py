"""Tiny random models of the families of causal language models that transformers has.

A family is a model type of transformers' ``AutoModelForCausalLM``, by the name that ``config.json``
gives it; another configuration of the same type has a word behind that name. Windows are smaller
than the prompts, and a family has a block of each of its kinds. ``scripts/models_table.py``
generates a README's table of models from this one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYERS, HEADS, WIDTH, WINDOW = 4, 4, 32, 7
VOCABULARY = 480  # the embedded tokenizer's
_POSITIONS = 1024

# Names are those of configurations' fields; each configuration takes the fields that it has.
_SIZES: tuple[tuple[int | float, str], ...] = (
    (
        VOCABULARY,
        """
            vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size
            shape_vocab_size
        """,
    ),
    (
        _POSITIONS,
        """
            max_position_embeddings original_max_position_embeddings max_target_positions
            max_seq_len n_positions context_length
        """,
    ),
    (
        LAYERS,
        """
            num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
            num_encoder_layers num_decoder_layers num_blocks
        """,
    ),
    (
        WIDTH,
        """
            hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim
            input_embedding_size output_embedding_size lru_width cross_attention_hidden_size
            ple_embed_dim router_hidden_size
        """,
    ),
    (
        48,
        """
            intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_inner n_inner dim_ff dff
            ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size
            prefix_dense_intermediate_size
        """,
    ),
    (
        16,
        """
            moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
            shared_experts_intermediate_size expert_ffn_hidden_size
            moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank mamba_chunk_size
            chunk_size hidden_size_per_layer_input
        """,
    ),
    (
        HEADS,
        """
            num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
            encoder_attention_heads swa_num_attention_heads num_encoder_attention_heads
            num_decoder_attention_heads linear_num_heads linear_num_value_heads mamba_num_heads
            mamba_n_heads index_n_heads indexer_n_heads num_experts n_routed_experts
            num_local_experts moe_num_experts heads_per_ngram zero_expert_num
        """,
    ),
    (
        2,
        """
            num_key_value_heads swa_num_key_value_heads num_kv_heads linear_num_key_heads
            o_groups num_experts_per_tok moe_topk moe_k top_k_experts n_shared_experts
            num_shared_experts moe_num_shared_experts n_groups pad_token_id mask_token_id
        """,
    ),
    (
        8,
        """
            head_dim swa_head_dim global_head_dim d_head dim_head v_head_dim linear_key_head_dim
            linear_value_head_dim linear_head_dim kv_channels attention_head_dim
            attention_head_size qk_nope_head_dim query_pre_attn_scalar mamba_head_dim
            mamba_headdim index_head_dim indexer_head_dim o_lora_rank mamba_d_state state_size
            ssm_state_size index_topk keep_window_size block_size hc_lowrank
            pronunciation_embed_dim shape_embed_dim
        """,
    ),
    (
        4,
        """
            qk_rope_head_dim rotary_dim
        """,
    ),
    (
        WINDOW,
        """
            sliding_window sliding_window_size attention_window_size local_attention window_size
            attention_chunk_size
        """,
    ),
    (
        1,
        """
            n_group topk_group first_k_dense_replace num_random_blocks eos_token_id sep_token_id
            eod_token_id forced_eos_token_id indexer_kv_heads
        """,
    ),
    (
        0,
        """
            bos_token_id cls_token_id decoder_start_token_id
        """,
    ),
    (
        0.3,
        """
            initializer_range init_std initializer_factor
        """,
    ),
)


@dataclass(frozen=True)
class Family:
    """Configuration of a family, and what zarrtrace captures of it.

    Attributes
    ----------
    config
        Settings beside the usual sizes.
    blocks
        Name of the module that holds its decoder blocks.
    attention
        Blocks that make attention probabilities; None for all.
    without
        Kind of the other blocks: "other blocks have ...".
    refused
        Reason why it is refused, a key of :data:`REFUSALS`; None if it is captured.
    vectors
        Whether a block passes on one vector a token, as SAEs read it.
    by_blocks
        Whether attention can be computed by blocks of queries.
    together
        Whether prompts of unequal lengths can go through the model together.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    blocks: str = "model.layers"
    attention: tuple[int, ...] | None = None
    without: str | None = None
    refused: str | None = None
    vectors: bool = True
    by_blocks: bool = True
    together: bool = True


# Reasons why a family is refused.
ENCODER = "its attention looks at later tokens, as encoders do"
OTHER_KEYS = "it attends to something else than the tokens"
NO_ATTENTION = "no block makes attention probabilities"
UNDECLARED = "its attention modules have names of their own"
UNSEEN = "its attention keeps its probabilities to itself"
SEVERAL = "several attention matrices a block"
PATCHES = "its blocks work on patches of bytes"
LEFT_OUT = "blocks are left out where there is no image"
HEAD_COUNTS = "other numbers of heads in other blocks"

#: Regular expressions of the error's text, by reason.
REFUSALS = {
    ENCODER: "behind its query",
    OTHER_KEYS: "something else than the tokens",
    NO_ATTENTION: "no attention|number of attention heads",
    UNDECLARED: "hold no attention",
    UNSEEN: "no attention probabilities|None of its blocks",
    SEVERAL: "attention modules|no list of",
    PATCHES: "no list of",
    LEFT_OUT: r"runs where block|of \d+ blocks run",
    HEAD_COUNTS: r"has \d+ heads",
}


def _every_other(config: Mapping[str, Any], without: str) -> Family:
    """Return a family whose blocks 1 and 3 have attention."""
    return Family(config, attention=(1, 3), without=without)


_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SHARED = {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention"] * 2 + ["hybrid", "linear_attention", "hybrid"],
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
_XMOD = {"default_language": "en_XX"}
_LATENT = {"num_key_value_heads": HEADS, "head_dim": 4}
_TAIL = {"use_sliding_window": True, "max_window_layers": 2}

#: Decoders of which every block has attention, and which need nothing but the usual sizes.
_PLAIN = """
afmoe apertus arcee aria_text beam bitnet cohere cohere2 cohere2_moe cwm ernie4_5
ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2
glm glm4 glm4_moe gpt_oss granite granite_swa granitemoe granitemoe_swa
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe
kolibri1 laguna llama mellum mimo_v2_flash minimax_m2 ministral ministral3 mistral
mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe
seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
"""
_SEQUENCE_DECODERS = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart",
    "pegasus", "plbart", "whisper",
)  # fmt: skip
_DECODER = {"is_decoder": True, "is_encoder_decoder": False}
_ENCODERS = {
    "bert": "bert",
    "bert-generation": "bert",
    "camembert": "roberta",
    "data2vec-text": "data2vec_text",
    "electra": "electra",
    "ernie": "ernie",
    "megatron-bert": "bert",
    "rembert": "rembert",
    "roberta": "roberta",
    "roberta-prelayernorm": "roberta_prelayernorm",
    "roc_bert": "roc_bert",
    "roformer": "roformer",
    "xlm-roberta": "roberta",
    "xlm-roberta-xl": "roberta",
}

FAMILIES: dict[str, Family] = {
    **{name: Family() for name in _PLAIN.split()},
    # Encoders, and the same as decoders.
    **{name: Family(refused=ENCODER) for name in _ENCODERS},
    **{
        f"{name} decoder": Family(
            {"is_decoder": True},
            blocks=f"{base}.encoder.layer",
            by_blocks=name not in {"megatron-bert", "rembert", "roformer"},
        )
        for name, base in _ENCODERS.items()
    },
    "xmod": Family(_XMOD, refused=ENCODER),
    "xmod decoder": Family({**_XMOD, "is_decoder": True}, blocks="roberta.encoder.layer"),
    "big_bird decoder": Family(
        {"is_decoder": True, "attention_type": "original_full"},
        blocks="bert.encoder.layer",
        by_blocks=False,
    ),
    # A window in some blocks.
    "gemma3_text": Family(_WINDOWS),
    "gemma3n_text": Family({**_WINDOWS, "num_kv_shared_layers": 2}, vectors=False),
    "dots1": Family({"max_window_layers": 2}),
    "qwen2": Family(_TAIL),
    "qwen2_moe": Family(_TAIL),
    "qwen3": Family(_TAIL),
    "qwen3_moe": Family(_TAIL),
    "cohere_compass_text": Family({"rope_parameters": {"full_attention": _MROPE}}),
    "gemma4_text": Family(_WINDOWS),
    "gemma4_text shared keys": Family({**_WINDOWS, "num_kv_shared_layers": 2}, by_blocks=False),
    "llama4_text": Family({"no_rope_layers": [1, 0, 1, 0]}),
    # Latent attention.
    **{
        name: Family(_LATENT)
        for name in ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"]
    },
    # Attention to the keys that an indexer chooses. It compares scores, many of which are 0: which
    # of equals it takes depends on the number of keys, padding among them.
    **{
        name: Family(_LATENT, by_blocks=False, together=False)
        for name in ["axk2", "deepseek_v32", "glm_moe_dsa"]
    },
    "dots3_note_text": Family(
        {
            **_LATENT,
            "layer_types": ["indexed_attention", "sliding_attention"] * 2,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 12,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
        refused=HEAD_COUNTS,
    ),
    "hy_v4": Family(vectors=False, by_blocks=False, together=False),
    "qwen4_exp_text": Family(
        {
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "ple_layer_ids": [1],
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 500,
            "split_ngram_parts": 4,
        },
        attention=(1, 3),
        without="linear attention",
        vectors=False,
        by_blocks=False,
        together=False,
    ),
    "minimax_m3_vl_text": Family(
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "index_block_size": 8,
            "index_topk_blocks": 1,
        },
        by_blocks=False,
        together=False,
    ),
    "doge": Family(by_blocks=False, together=False),
    # Some blocks with attention, others without.
    "bailing_hybrid": _every_other({**_LINEAR, "num_key_value_heads": HEADS}, "linear attention"),
    "bamba": _every_other({"attn_layer_indices": [1, 3]}, "a state space"),
    "granitemoehybrid": _every_other(_LINEAR, "a state space"),
    "jamba": _every_other({"attn_layer_period": 2, "attn_layer_offset": 1}, "a state space"),
    "kimi_linear": _every_other({**_LINEAR, "num_key_value_heads": HEADS}, "linear attention"),
    "lfm2": _every_other({"layer_types": ["conv", "full_attention"] * 2}, "a convolution"),
    "lfm2_moe": _every_other({"layer_types": ["conv", "full_attention"] * 2}, "a convolution"),
    "lfm3": _every_other(
        {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]}, "a convolution"
    ),
    "minimax": Family(attention=(0, 2), without="linear attention"),
    "nemotron_h": _every_other(
        {"layer_types": ["linear_attention", "full_attention", "moe", "full_attention", "mlp"]},
        "a state space, experts or an MLP",
    ),
    "olmo_hybrid": _every_other(_LINEAR, "linear attention"),
    "qwen3_next": _every_other(_LINEAR, "linear attention"),
    "qwen3_5_text": _every_other(_LINEAR, "linear attention"),
    "qwen3_5_moe_text": _every_other(_LINEAR, "linear attention"),
    "recurrent_gemma": _every_other({"block_types": ["recurrent", "attention"]}, "a recurrence"),
    "zamba": Family(_SHARED, attention=(2, 4), without="a state space"),
    "zamba2": Family(_SHARED, attention=(2, 4), without="a state space"),
    "zamba2 alternating": Family(
        {**_SHARED, "num_mem_blocks": 2}, attention=(2, 4), without="a state space"
    ),
    # Attention and a state space side by side, in every block.
    "falcon_h1": Family(),
    "gemma4_unified_text": Family(_WINDOWS),
    "internlm3": Family(),
    "iquestcoder": Family(),
    "inkling_text": Family({"layer_types": ["hybrid_sliding", "hybrid"] * 2}, by_blocks=False),
    "inkling2_text": Family({"layer_types": ["hybrid_sliding", "hybrid"] * 2}, by_blocks=False),
    "zaya": Family({"num_experts_per_tok": 1}),
    # Not through transformers' attention interface, or not declared to it.
    "biogpt": Family(blocks="biogpt.layers"),
    "bloom": Family(blocks="transformer.h", by_blocks=False),
    "codegen": Family(blocks="transformer.h", by_blocks=False),
    "ctrl": Family(blocks="transformer.h"),
    "diffllama": Family(by_blocks=False),
    "falcon": Family(blocks="transformer.h", by_blocks=False),
    "falcon alibi": Family({"alibi": True}, blocks="transformer.h", by_blocks=False),
    "falcon grouped": Family(
        {"new_decoder_architecture": True}, blocks="transformer.h", by_blocks=False
    ),
    "gpt_neo": Family(
        {"attention_types": [[["global", "local"], 2]]}, blocks="transformer.h", by_blocks=False
    ),
    "gpt_neox_japanese": Family(blocks="gpt_neox_japanese.layers", by_blocks=False),
    "gptj": Family(blocks="transformer.h", by_blocks=False),
    "mpt": Family(blocks="transformer.blocks", by_blocks=False),
    "openai-gpt": Family(blocks="transformer.h", by_blocks=False),
    # Decoders of other names.
    "gpt2": Family(blocks="transformer.h"),
    "gpt_bigcode": Family(blocks="transformer.h"),
    "gpt_neox": Family(blocks="gpt_neox.layers"),
    "opt": Family(blocks="model.decoder.layers"),
    "xglm": Family(by_blocks=False),
    # The decoders of encoder-decoder models.
    **{name: Family(_DECODER, "model.decoder.layers") for name in _SEQUENCE_DECODERS},
    **{
        name: Family(_DECODER, "model.decoder.layers", by_blocks=False) for name in ["mvp", "trocr"]
    },
    "prophetnet": Family(
        _DECODER, "prophetnet.decoder.layers", vectors=False, by_blocks=False, together=False
    ),
    # The text part of a model of images, too.
    "gemma3": Family(
        {"text_config": _WINDOWS, "vision_config": _VISION, "mm_tokens_per_image": 4},
        blocks="model.language_model.layers",
    ),
    "gemma4": Family({"text_config": _WINDOWS}, blocks="model.language_model.layers"),
    "gemma4_unified": Family({"text_config": _WINDOWS}, blocks="model.language_model.layers"),
    "fuyu": Family(
        {"text_config": {"model_type": "persimmon"}}, blocks="model.language_model.layers"
    ),
    "emu3": Family({"text_config": {}}),
    "git": Family({"vision_config": _VISION}, blocks="git.encoder.layer", by_blocks=False),
    "got_ocr2": Family(
        {
            "text_config": {"model_type": "qwen2"},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "mlp_dim": 48,
                "image_size": 64,
                "output_channels": 16,
                "global_attn_indexes": [1],
                "window_size": 2,
            },
        },
        blocks="model.language_model.layers",
    ),
    "mllama": Family({"text_config": {"cross_attention_layers": [2]}}, refused=LEFT_OUT),
    "phi4_multimodal": Family(
        {
            "vision_config": {**_VISION, "crop_size": 28},
            "audio_config": {
                "hidden_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "nemo_conv_channels": 16,
            },
        }
    ),
    "llama4": Family({"text_config": {"no_rope_layers": [1, 0, 1, 0]}}),
    "qwen3_5": _every_other({"text_config": _LINEAR}, "linear attention"),
    "qwen3_5_moe": _every_other({"text_config": _LINEAR}, "linear attention"),
    # Families without a matrix of attention probabilities from each token to each.
    "big_bird": Family(refused=ENCODER),
    "blt": Family(
        {
            "patcher_config": {},
            "encoder_config": {"hidden_size_global": 32},
            "decoder_config": {"hidden_size_global": 32},
            "global_config": {},
            "encoder_hash_byte_group_vocab": 50,
        },
        refused=PATCHES,
    ),
    "cpmant": Family(refused=UNDECLARED),
    "deepseek_v4": Family(refused=OTHER_KEYS),
    "falcon_mamba": Family(refused=NO_ATTENTION),
    "hrm_text": Family(refused=SEVERAL),
    "longcat_flash": Family(_LATENT, refused=SEVERAL),
    "mamba": Family(refused=NO_ATTENTION),
    "mamba2": Family({"num_heads": 8}, refused=NO_ATTENTION),
    "reformer": Family(
        {"is_decoder": True, "axial_pos_shape": [32, 32], "axial_pos_embds_dim": [16, 16]},
        refused=UNSEEN,
    ),
    "rwkv": Family(refused=NO_ATTENTION),
    "xlm": Family(refused=UNDECLARED),
    "xlnet": Family(refused=UNDECLARED),
    "xlstm": Family(refused=NO_ATTENTION),
}


_PARTS = ("text_config", "patcher_config", "encoder_config", "decoder_config", "global_config")


def make_config(name: str) -> Any:
    """Return the tiny configuration of a family."""
    return _make_config(name.partition(" ")[0], FAMILIES[name].config)


def _make_config(model_type: str, changes: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    known = {one.name for one in dataclasses.fields(kind)} - set(kind.attribute_map)
    chosen = {
        name: value
        for value, names in _SIZES
        for name in names.split()
        if name in known and name not in changes
    }
    parts = {
        name: _make_config(value.get("model_type") or kind.sub_configs[name].model_type, value)
        for name, value in changes.items()
        if name in _PARTS
    }
    return kind(**{**chosen, **changes, **parts})
