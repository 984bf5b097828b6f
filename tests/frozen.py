"""Stores of format 2 that are frozen under ``data/``, and the numbers that they hold.

Every number follows from integer arithmetic, so that no version of a library changes it.
``python tests/frozen.py FOLDER`` writes the same stores with today's code, to compare; those under
``data/`` are never written again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sample_tables import nonzeros

from zarrtrace.format.attributes import (
    ChatAttributes,
    ModelAttributes,
    OptionAttributes,
    SAEAttributes,
    SpanAttributes,
    TraceAttributes,
)
from zarrtrace.format.layout import Limits, TraceShape
from zarrtrace.format.table_layout import TableAttributes, TableShape, table_columns
from zarrtrace.index import build_index
from zarrtrace.records import (
    FeatureRecord,
    LayerRecord,
    SampleRecord,
    SampleTokens,
    TablePlan,
    Tokens,
    TokensRecord,
    TracePlan,
)
from zarrtrace.store import RunWriter, TableWriter, TraceWriter

FORMAT2 = Path(__file__).parent / "data" / "format2"

LAYERS, WITHOUT_ATTENTION, WITHOUT_SAE, WITHOUT_SMALL = (0, 2, 3, 4), (3,), (4,), (3, 4)
HEADS, CHANNELS, FEATURES = 2, 6, {"features": 40, "features_small": 5}
RANKS = 10
MLP_OUT = "blocks.{layer}.hook_mlp_out"
#: Many chunks of everything, and several files, in arrays of few numbers.
CUT = Limits(
    file_bytes=2**10, keys=4, queries=2, tokens=4, features=16, attention=32, samples=4, labels=8
)
VERSIONS = {"zarrtrace": "0.1.0", "torch": "2.9.0, 2.10.0"}
CONFIG = {"model": "frozen/model", "dtype": "bfloat16", "layers": "0,2-4", "sae_release": "frozen",
          "versions": {"torch": "2.10.0"}}  # fmt: skip
WORDS = ("<s>", " Balance", " $", "90", ".", " Ω", "🎰", "\n", "", " stop")

#: Dimensions and values of arrays by name.
Arrays = dict[str, tuple[str, np.ndarray]]


class Prompt(NamedTuple):
    """A scenario of the frozen run."""

    name: str
    tokens: int
    metadata: Mapping[str, Any]
    tags: tuple[str, ...]
    chat: ChatAttributes | None = None
    positions: tuple[int, ...] | None = None
    attention_positions: tuple[int, ...] | None = None
    limits: Limits = Limits()

    @property
    def rows(self) -> list[int]:
        """Stored positions."""
        return [*range(self.tokens)] if self.positions is None else [*self.positions]

    @property
    def attention_rows(self) -> list[int]:
        """Positions whose rows of attention are stored."""
        return self.rows if self.attention_positions is None else [*self.attention_positions]


CHOSEN = Prompt(
    "chosen",
    9,
    {"condition": "", "round": -3, "balance": float("nan"), "is_last": True},
    ("risky", "high"),
    ChatAttributes(template="0123456789abcdef", generation_prompt=True, continued=False),
    positions=(1, 4, 5, 8),
    attention_positions=(4, 8),
)
WHOLE = Prompt(
    "whole",
    7,
    {"condition": "Ωhigh", "round": 2**53 + 1, "balance": 90.25, "is_last": False},
    ("safe",),
    limits=CUT,
)
PROMPTS = (CHOSEN, WHOLE)


# --- numbers -----------------------------------------------------------------------------------


def numbers(shape: Sequence[int], start: int, modulus: int) -> np.ndarray:
    """Return whole numbers from 0 to below `modulus` that look mixed."""
    count = np.arange(np.prod(shape, dtype=np.int64), dtype=np.int64)
    found: np.ndarray = ((count + start) * 7919 // 13 % modulus).reshape(shape)
    return found


def attention_of(prompt: Prompt, layer: int) -> np.ndarray:
    """Return ``(head, query, key)``: causal, a power of two in each denominator."""
    tokens = prompt.tokens
    weights = numbers((HEADS, tokens, tokens), prompt.tokens + layer, 8) / 64
    return np.tril(weights).astype(np.float32)


def features_of(rows: int, size: int, layer: int, start: int = 0) -> np.ndarray:
    """Return activations of which a fifth is non-zero; those of few latents have both signs."""
    found = numbers((rows, size), start + 101 * layer, 500)
    activations = np.where(found % 5 == 0, found / 8, 0)
    if size < 32:
        activations = np.where(found % 3 == 0, -activations, activations)
    return (activations + 0.0).astype(np.float32)  # no -0


def residual_of(rows: int, layer: int, start: int = 0) -> np.ndarray:
    """Return ``(row, channel)``, exact in float16."""
    return ((numbers((rows, CHANNELS), start + layer, 2001) - 1000) / 16).astype(np.float32)


def tokens_of(rows: int, start: int) -> dict[str, np.ndarray]:
    """Return next tokens ``(row, rank)``."""
    ids = numbers((rows, RANKS), start, 10 * len(WORDS)).astype(np.uint32)
    logprob = -(np.arange(RANKS) + numbers((rows, 1), start, 7)) / 8
    texts = np.array([[WORDS[one % len(WORDS)] for one in row] for row in ids], object)
    return {
        "next_token": ids,
        "next_token_logprob": logprob.astype(np.float32),
        "next_token_text": texts,
    }


def top_of(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of largest magnitude: NaN first, of equals the lower number first."""
    size = -np.abs(activations.astype(np.float32))
    size[np.isnan(size)] = -np.inf
    order = np.argsort(size, axis=-1, kind="stable")[:, :32]
    values = np.take_along_axis(activations, order, -1).astype(np.float32)
    return np.where(values != 0, order, 2**32 - 1).astype(np.uint32), values


def layer_values(prompt: Prompt, layer: int) -> dict[str, np.ndarray]:
    """Return all that a layer of a trace holds, by array, float32."""
    found: dict[str, np.ndarray] = {}
    if layer not in WITHOUT_ATTENTION:
        attention = attention_of(prompt, layer)[:, prompt.attention_rows]
        found |= {"attention": attention, "attention_mean": attention.sum(0) / HEADS}
    for name, size in FEATURES.items():
        if layer in (WITHOUT_SAE if name == "features" else WITHOUT_SMALL):
            continue
        activations = features_of(prompt.tokens, size, layer, prompt.tokens)[prompt.rows]
        if (prompt, layer, name) == (CHOSEN, 2, "features_small"):
            activations[0, 3], activations[1, 0] = np.nan, np.inf
        suffix = name.removeprefix("features")
        feature, activation = top_of(activations)
        found |= {
            name: activations,
            f"top_feature{suffix}": feature,
            f"top_activation{suffix}": activation,
        }
    if layer not in WITHOUT_SAE:
        found["residual"] = residual_of(prompt.tokens, layer, prompt.tokens)[prompt.rows]
        if (prompt, layer) == (CHOSEN, 0):
            found["residual"][0, 1] = np.inf
    return found


# --- what must be read -------------------------------------------------------------------------

_DIMS = {
    "attention": "attention_layer head {} key",
    "attention_mean": "attention_layer {} key",
    "residual": "layer query channel",
    **{f"features{s}": f"layer query feature{s}" for s in ("", "_small")},
    **{f"top_{t}{s}": f"layer query feature_rank{s}"
       for s in ("", "_small") for t in ("feature", "activation")},
}  # fmt: skip
_HALVES = ("attention", "residual")


def trace_arrays(prompt: Prompt) -> Arrays:
    """Return every array that a reader of a trace must find."""
    texts = np.array([WORDS[n % len(WORDS)] for n in range(prompt.tokens)], object)
    rows, heads = prompt.rows, [n for n in LAYERS if n not in WITHOUT_ATTENTION]
    out: Arrays = {
        "layer": ("layer", np.array(LAYERS)),
        "attention_layer": ("attention_layer", np.array(heads)),
        "head": ("head", np.arange(HEADS)),
        "channel": ("channel", np.arange(CHANNELS)),
        "feature": ("feature", np.arange(40)),
        "feature_small": ("feature_small", np.arange(5)),
        "query": ("query", np.array(rows)),
        "key": ("key", np.arange(prompt.tokens)),
        "key_token": ("key", texts),
        "query_token": ("query", texts[rows]),
        "token_id": ("key", token_ids(prompt)),
        "special": ("key", np.arange(prompt.tokens) % 4 == 0),
        **sae_labels(),
    }
    if prompt.attention_positions is not None:
        out["attention_query"] = ("attention_query", np.array(prompt.attention_positions))
    row = "query" if prompt.attention_positions is None else "attention_query"
    by_layer = {layer: layer_values(prompt, layer) for layer in LAYERS}
    for name, dims in _DIMS.items():
        found = [
            by_layer[layer].get(name)
            for layer in (heads if dims.startswith("attention_layer") else LAYERS)
        ]
        shape = next(one.shape for one in found if one is not None)
        missing = 2**32 - 1 if name.startswith("top_feature") else np.nan
        values = np.stack([np.full(shape, missing) if one is None else one for one in found])
        dtype = np.uint32 if name.startswith("top_feature") else np.float32
        out[name] = dims.format(row), values.astype(np.float16 if name in _HALVES else dtype)
    next_tokens = tokens_of(prompt.tokens, prompt.tokens)
    return out | {name: ("query rank", one[rows]) for name, one in next_tokens.items()}


def token_ids(prompt: Prompt) -> np.ndarray:
    """Return the ids of a prompt's tokens; the last is the largest that there is."""
    ids = numbers((prompt.tokens,), prompt.tokens, 50_000).astype(np.uint32)
    ids[-1] = 2**32 - 2
    return ids


def saes() -> tuple[SAEAttributes, ...]:
    """Return the SAEs of all layers; those of `features` differ in precision."""
    return tuple(
        SAEAttributes(
            layer=layer, variable=name, release="frozen", id=f"l{layer}{name[8:]}",
            hook_name=MLP_OUT.format(layer=layer), architecture="jumprelu", d_in=CHANNELS,
            d_sae=size, dtype="float16" if (layer, name) == (2, "features") else "float32",
            decoder_norm_folded=False, revision=None, fingerprint=f"{layer:016x}",
        )
        for name, size in FEATURES.items()
        for layer in LAYERS
        if layer not in (WITHOUT_SAE if name == "features" else WITHOUT_SMALL)
    )  # fmt: skip


def sae_labels() -> Arrays:
    """Return the coordinates along `layer` that say more of each SAE."""
    labels = {
        "sae_id": ["l0", "l2", "l3", ""],
        "sae_fingerprint": [f"{0:016x}", f"{2:016x}", f"{3:016x}", ""],
        "sae_dtype": ["float32", "float16", "float32", ""],
        "sae_id_small": ["l0_small", "l2_small", "", ""],
        "sae_fingerprint_small": [f"{0:016x}", f"{2:016x}", "", ""],
    }
    return {name: ("layer", np.array(found, object)) for name, found in labels.items()}


# --- writing the run ---------------------------------------------------------------------------


def _model() -> ModelAttributes:
    return ModelAttributes(
        id="frozen/model", revision="c0ffee", architecture="FrozenForCausalLM", n_layers=6,
        n_heads=HEADS, d_model=CHANNELS, dtype="bfloat16", attn_implementation="eager",
        softmax_dtype="float32", tokenizer="PreTrainedTokenizerFast", prepend_bos=True,
        quantization="gptq", fingerprint="fedcba9876543210",
    )  # fmt: skip


def trace_attributes(prompt: Prompt) -> TraceAttributes:
    """Return the attributes of a trace before it is written."""
    text, start = "Balance $90. Ω🎰\n", 3 if prompt.chat else 0
    return TraceAttributes(
        scenario=prompt.name,
        prompt=f"<s>{text}<|assistant|>" if prompt.chat else text,
        chat=prompt.chat,
        tags=prompt.tags,
        spans={
            "balance": SpanAttributes(
                characters=((start + 8, start + 9), (start + 9, start + 11)), tokens=(2, 3)
            ),
            "goal": SpanAttributes(characters=(), tokens=(4, 5)),
            "decision": SpanAttributes(characters=(), tokens=(prompt.tokens - 1,)),
        },
        options={
            "bet": OptionAttributes(text="1", token_id=3),
            "stop": OptionAttributes(text="2", token_id=9),
        },
        metadata=dict(prompt.metadata),
        model=_model(),
        layers=LAYERS,
        layers_without_sae=WITHOUT_SAE,
        layers_without_attention={"linear attention": WITHOUT_ATTENTION},
        layers_without_residual=WITHOUT_SAE,
        attention_dtype="float16",
        attention_keepbits=6,
        feature_dtype="float32",
        residual_dtype="float16",
        residual_hook=MLP_OUT,
        versions=VERSIONS,
    )


def _trace_plan(prompt: Prompt) -> TracePlan:
    shape = TraceShape(
        layers=len(LAYERS), tokens=prompt.tokens, heads=HEADS, features=FEATURES,
        channels=CHANNELS, attention_dtype="float16", feature_dtype="float32",
        residual_dtype="float16", attention_layers=len(LAYERS) - len(WITHOUT_ATTENTION),
        limits=prompt.limits,
    )  # fmt: skip
    arrays = trace_arrays(prompt)
    tokens = Tokens(*(arrays[name][1].tolist() for name in ("token_id", "key_token", "special")))
    return TracePlan(
        attributes=trace_attributes(prompt), shape=shape, tokens=tokens, saes=saes(),
        positions=prompt.positions, attention_positions=prompt.attention_positions,
    )  # fmt: skip


def _layer_record(prompt: Prompt, layer: int) -> LayerRecord:
    values = layer_values(prompt, layer)
    features = {
        name: FeatureRecord(
            values[name],
            values[f"top_feature{name[8:]}"],
            values[f"top_activation{name[8:]}"],
            nonfinite=not np.isfinite(values[name]).all(),
        )
        for name in FEATURES
        if name in values
    }
    return LayerRecord(
        prompt.name, layer, attention=values.get("attention"),
        attention_mean=values.get("attention_mean"), features=features,
        residual=values.get("residual"),
    )  # fmt: skip


def write_run(path: Path, *, repair: bool = False) -> None:
    """Write the run with its two traces and the index of its features."""
    with RunWriter(path, [prompt.name for prompt in PROMPTS], CONFIG, repair=repair) as run:
        for prompt in PROMPTS:
            plan = _trace_plan(prompt)
            with TraceWriter(run.path, plan, repair=repair, allow_nonfinite=True) as trace:
                for layer in trace.missing_layers:
                    trace.append(_layer_record(prompt, layer))
                next_tokens = tokens_of(prompt.tokens, prompt.tokens)
                rows = {name: found[prompt.rows] for name, found in next_tokens.items()}
                if trace.needs_tokens:
                    trace.append(TokensRecord(prompt.name, **rows))
        run.finish()
    build_index(path, special=True)


# --- the table ---------------------------------------------------------------------------------

SCENARIOS, SAMPLES, FAILED = 7, 14, "s4"


def table_labels() -> dict[str, np.ndarray]:
    """Return the coordinates along `sample`: two positions of each scenario."""
    number = np.arange(SAMPLES)
    scenario, last = number // 2, number % 2 == 1
    return {
        "scenario": np.array([f"s{n}" for n in scenario], object),
        "position": np.where(last, scenario + 5, 2),
        "token": np.array([WORDS[n % len(WORDS)] for n in number], object),
        "token_id": numbers((SAMPLES,), 3, 50_000).astype(np.uint32),
        "span": np.array(["goal,decision" if one else "balance" for one in last], object),
        "tags": np.array([("safe", "risky,high", "")[n % 3] for n in scenario], object),
        "option_bet": np.where(scenario % 4 == 0, -1, 3),
        "option_stop": np.full(SAMPLES, 9),
        "condition": np.array([("", "Ωhigh")[n % 2] for n in scenario], object),
        "round": scenario * 2**40,
        "balance": np.where(scenario % 3 == 0, np.nan, scenario / 8),
        "is_last": scenario == SCENARIOS - 1,
    }


def table_values(layer: int) -> dict[str, np.ndarray]:
    """Return what a layer of the table holds, by array; failed scenarios have values, too."""
    found = {
        name: features_of(SAMPLES, size, layer, 17)
        for name, size in FEATURES.items()
        if layer not in (WITHOUT_SAE if name == "features" else WITHOUT_SMALL)
    }
    if layer not in WITHOUT_SAE:  # tenths, of which float16 has few
        found["residual"] = residual_of(SAMPLES, layer, 17) / np.float32(10)
    return found


def table_arrays() -> Arrays:
    """Return every array that a reader of the table must find."""
    labels = table_labels()
    failed = labels["scenario"] == FAILED
    out: Arrays = {
        "layer": ("layer", np.array(LAYERS)),
        "channel": ("channel", np.arange(CHANNELS)),
        "feature": ("feature", np.arange(40)),
        "feature_small": ("feature_small", np.arange(5)),
        **sae_labels(),
        **{name: ("sample", values) for name, values in labels.items()},
    }
    by_layer = {layer: table_values(layer) for layer in LAYERS}
    for name, width, dtype in (
        ("features", 40, np.float16), ("features_small", 5, np.float16),
        ("residual", CHANNELS, np.float32),
    ):  # fmt: skip
        missing = np.full((SAMPLES, width), np.nan)
        values = np.stack([by_layer[layer].get(name, missing) for layer in LAYERS]).astype(dtype)
        values[:, failed] = np.nan
        out[name] = f"layer sample {name.replace('features', 'feature')}", values
    out["residual"] = "layer sample channel", out["residual"][1]
    missing_tokens = {
        "next_token": 2**32 - 1, "next_token_logprob": np.nan, "next_token_text": "",
    }  # fmt: skip
    for name, values in tokens_of(SAMPLES, 17).items():
        values[failed] = missing_tokens[name]
        out[name] = "sample rank", values
    return out


def table_attributes() -> TableAttributes:
    """Return the attributes of the table before it is written."""
    return TableAttributes(
        scenarios=SCENARIOS,
        positions="2,decision",
        spans=("balance", "goal", "decision"),
        options=("bet", "stop"),
        metadata=("condition", "round", "balance", "is_last"),
        chat_template="0123456789abcdef",
        model=_model(),
        layers=LAYERS,
        layers_without_sae=WITHOUT_SAE,
        layers_without_residual=WITHOUT_SAE,
        feature_dtype="float16",
        residual_dtype="float32",
        residual_hook=MLP_OUT,
        versions=VERSIONS,
    )


def write_table(path: Path, *, repair: bool = False) -> None:
    """Write the table: blocks of four samples, several files of each layer."""
    shape = TableShape(
        layers=len(LAYERS), samples=SAMPLES, features=FEATURES, channels=CHANNELS,
        feature_dtype="float16", residual_dtype="float32", limits=CUT,
    )  # fmt: skip
    plan = TablePlan(table_attributes(), shape, table_labels(), CONFIG, saes())
    failed = np.flatnonzero(plan.coordinates["scenario"] == FAILED).tolist()
    with TableWriter(path, plan, repair=repair) as table:
        for start, stop in ((0, failed[0]), (failed[-1] + 1, SAMPLES)):
            part = slice(start, stop)
            for layer in LAYERS:
                values = {name: found[part] for name, found in table_values(layer).items()}
                residual = values.pop("residual", None)
                features = {
                    name: nonzeros(found, table_columns(found.shape[1], CUT))
                    for name, found in values.items()
                }
                table.append(SampleRecord(layer, start, features, residual))
            tokens = {name: found[part] for name, found in tokens_of(SAMPLES, 17).items()}
            table.append(SampleTokens(start, **tokens))
            if stop == failed[0]:
                table.fail(FAILED, "out of memory", failed[0], len(failed))
        table.finish()


def write(folder: Path) -> None:
    """Write both stores into a folder."""
    write_run(folder / "run")
    write_table(folder / "table")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
