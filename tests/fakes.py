"""Factories: attributes, records and whole runs with known content, no model needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zarrtrace.spec import (
    NEXT_TOKENS,
    TOP_FEATURES,
    FeatureRecord,
    LayerRecord,
    ModelAttributes,
    OptionAttributes,
    SAEAttributes,
    SpanAttributes,
    Tokens,
    TokensRecord,
    TraceAttributes,
    TraceShape,
)
from zarrtrace.store import RunWriter, TraceWriter

Truth = dict[str, np.ndarray]

SCENARIOS = ("Safe_1", "Risky_2")
LAYERS = (1, 2, 3)
#: The configuration of every fake run.
CONFIG: dict[str, Any] = {"model": "fake/model", "layers": [1, 2, 3]}


class FakeRun(NamedTuple):
    """A run on disk, what must be read from it (arrays by name, by scenario), and what was written.

    `written` names scenario and layer of each record that the run lacked.
    """

    path: Path
    truth: dict[str, Truth]
    written: list[tuple[str, int]]

    @property
    def trace(self) -> Path:
        """Folder of the first trace."""
        return self.path / next(iter(self.truth))


def make_trace_attributes(scenario: str = SCENARIOS[0], **changes: Any) -> TraceAttributes:
    """Return valid attributes; `changes` replace fields."""
    layers = tuple(changes.get("layers", LAYERS))
    features = changes.pop("features", 16)
    heads = changes.pop("heads", 2)
    fields: dict[str, Any] = {
        "scenario": scenario,
        "prompt": "Balance $90. Bet or stop?",
        "tags": ("risky",) if "isky" in scenario else ("safe",),
        "spans": {
            "balance": SpanAttributes(characters=((9, 11),), tokens=(1, 2)),
            "decision": SpanAttributes(characters=(), tokens=(0,)),
        },
        "options": {"bet": OptionAttributes(text="1", token_id=3)},
        "model": ModelAttributes(
            id="fake/model",
            revision=None,
            architecture="LlamaForCausalLM",
            n_layers=max(layers, default=0) + 1,
            n_heads=heads or 1,
            d_model=8,
            dtype="float32",
            attn_implementation="eager",
            softmax_dtype="float32",
            tokenizer="PreTrainedTokenizerFast",
            prepend_bos=True,
        ),
        "saes": tuple(
            SAEAttributes(
                layer=layer,
                release=None,
                id=f"l{layer}",
                hook_name=f"blocks.{layer}.hook_resid_post",
                architecture="jumprelu",
                d_in=8,
                d_sae=features,
                dtype="float32",
                decoder_norm_folded=False,
            )
            for layer in (layers if features else ())
        ),
        "layers": layers,
        "attention_dtype": "float32" if heads else None,
        "feature_dtype": "float32" if features else None,
        "versions": {"zarrtrace": "0"},
    }
    return TraceAttributes(**{**fields, **changes})


def make_tokens(tokens: int) -> Tokens:
    """Return token ids and texts, multi-byte characters among them."""
    words = ["<s>", " balance", "90", " Ω", "🎰", "\n", ""]
    return Tokens(
        ids=[(7 * i) % 1000 for i in range(tokens)],
        texts=[words[i % len(words)] for i in range(tokens)],
    )


def make_attention(heads: int, tokens: int, *, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Return causal softmax attention ``(head, query, key)``; the first token is a sink."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, (heads, tokens, tokens)).astype(np.float32)
    scores[..., 0] += 3
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(dtype)


def make_features(
    tokens: int, features: int, *, seed: int = 0, active: float = 0.1, dtype: str = "float32"
) -> FeatureRecord:
    """Return sparse activations ``(query, feature)`` with their index."""
    rng = np.random.default_rng(seed)
    activations = rng.exponential(2.0, (tokens, features)).astype(dtype)
    activations[rng.random((tokens, features)) >= active] = 0
    rank = min(TOP_FEATURES, features)
    top = np.argsort(-activations, axis=-1, kind="stable")[:, :rank]
    return FeatureRecord(
        activations=activations,
        top_feature=top.astype(np.uint32),
        top_activation=np.take_along_axis(activations, top, axis=-1).astype(np.float32),
    )


def make_records(
    scenario: str = SCENARIOS[0],
    *,
    layers: Sequence[int] = LAYERS,
    heads: int | None = 2,
    tokens: int = 7,
    features: int | Mapping[str, int] = 16,
    seed: int = 0,
    attention_dtype: str = "float32",
    feature_dtype: str = "float32",
    active: float = 0.1,
    next_token: bool = True,
    without_sae: Sequence[int] = (),
) -> Iterator[LayerRecord | TokensRecord]:
    """Yield what a capture of one scenario would yield, in its order."""
    for layer in layers:
        at = seed * 1000 + layer
        attention = None
        if heads:
            attention = make_attention(heads, tokens, seed=at, dtype=attention_dtype)
        yield LayerRecord(
            scenario=scenario,
            layer=layer,
            attention=attention,
            attention_mean=None
            if attention is None
            else attention.mean(0, dtype=np.float32).astype(np.float32),
            features={
                name: make_features(tokens, size, seed=at, active=active, dtype=feature_dtype)
                for name, size in _sizes(features).items()
                if layer not in without_sae
            },
        )
    if next_token:
        rng = np.random.default_rng(seed)
        yield TokensRecord(
            scenario=scenario,
            next_token=rng.integers(0, 1000, (tokens, NEXT_TOKENS), dtype=np.uint32),
            next_token_logprob=-np.sort(rng.exponential(3, (tokens, NEXT_TOKENS))).astype(
                np.float32
            ),
        )


def make_shape(
    *,
    layers: Sequence[int] = LAYERS,
    heads: int | None = 2,
    tokens: int = 7,
    features: int | Mapping[str, int] = 16,
    attention_dtype: str = "float32",
    feature_dtype: str = "float32",
    next_token: bool = True,
) -> TraceShape:
    """Return the sizes of a fake trace."""
    return TraceShape(
        layers=len(layers),
        tokens=tokens,
        heads=heads or None,
        features=_sizes(features),
        attention_dtype=attention_dtype if heads else None,
        feature_dtype=feature_dtype if _sizes(features) else None,
        next_token=next_token,
    )


def _sizes(features: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(features, int):
        return {"features": features} if features else {}
    return dict(features)


def truth_of(
    records: Sequence[LayerRecord | TokensRecord], layers: Sequence[int], tokens: Tokens
) -> Truth:
    """Return the arrays that a trace of `records` holds, missing layers as NaN (or 0)."""
    out: Truth = {
        "layer": np.asarray(layers),
        "query": np.arange(len(tokens.ids)),
        "token_id": np.asarray(tokens.ids, np.uint32),
        "query_token": np.asarray(tokens.texts, dtype=object),
    }

    def put(name: str, layer: int, value: np.ndarray) -> None:
        gap = np.nan if value.dtype.kind == "f" else 0
        whole = out.setdefault(name, np.full((len(layers), *value.shape), gap, value.dtype))
        whole[list(layers).index(layer)] = value

    for record in records:
        if isinstance(record, TokensRecord):
            out["next_token"] = record.next_token
            out["next_token_logprob"] = record.next_token_logprob
            continue
        if record.attention is not None and record.attention_mean is not None:
            put("attention", record.layer, record.attention)
            put("attention_mean", record.layer, record.attention_mean)
            out["head"] = np.arange(record.attention.shape[0])
            out["key"] = out["query"]
            out["key_token"] = out["query_token"]
        for name, found in record.features.items():
            suffix = name.removeprefix("features")
            put(name, record.layer, found.activations)
            put(f"top_feature{suffix}", record.layer, found.top_feature)
            put(f"top_activation{suffix}", record.layer, found.top_activation)
            out[f"feature{suffix}"] = np.arange(found.activations.shape[1])
    return out


def make_trace_writer(
    path: Path, scenario: str = SCENARIOS[0], *, next_token: bool = True, **sizes: Any
) -> TraceWriter:
    """Return the writer of a fake trace; see :func:`make_shape` for `sizes`."""
    layers = tuple(sizes.get("layers", LAYERS))
    tokens = sizes.get("tokens", 7)
    attributes = _attributes_for(scenario, sizes)
    shape = make_shape(**{**sizes, "layers": layers}, next_token=next_token)
    return TraceWriter(path, attributes, shape, make_tokens(tokens))


def _attributes_for(scenario: str, sizes: Mapping[str, Any]) -> TraceAttributes:
    features = _sizes(sizes.get("features", 16))
    tokens = sizes.get("tokens", 7)
    heads = sizes.get("heads", 2)
    return make_trace_attributes(
        scenario,
        layers=tuple(sizes.get("layers", LAYERS)),
        features=max(features.values(), default=0),
        heads=heads or 0,
        spans={
            "balance": SpanAttributes(
                characters=((9, 11),), tokens=tuple(i for i in (1, 2) if i < tokens) or (0,)
            ),
            "decision": SpanAttributes(characters=(), tokens=(tokens - 1,)),
        },
        attention_dtype=sizes.get("attention_dtype", "float32") if heads else None,
        feature_dtype=sizes.get("feature_dtype", "float32") if features else None,
        **({"saes": ()} if len(features) > 1 else {}),  # every layer has every array
    )


def make_run(
    tmp_path: Path,
    *,
    name: str = "run",
    scenarios: Sequence[str] = SCENARIOS,
    layers: Sequence[int] = LAYERS,
    heads: int | None = 2,
    tokens: int | Sequence[int] = 7,
    features: int | Mapping[str, int] = 16,
    seed: int = 0,
    attention: bool = True,
    attention_dtype: str = "float32",
    feature_dtype: str = "float32",
    active: float = 0.1,
    without_sae: Sequence[int] = (),
    config: Mapping[str, Any] = CONFIG,
    finish: bool = True,
    drop: Mapping[str, Sequence[int]] | None = None,
    overwrite: bool = False,
    repair: bool = False,
) -> FakeRun:
    """Write a run of synthetic scenarios through the real writers.

    Parameters
    ----------
    tokens
        Length of every scenario, or of each one.
    drop
        Layers not to write, by scenario; such a run is not finished.
    finish
        Whether to finish the run; if not, traces without dropped layers are finished all the same.
    """
    path = tmp_path / name
    drop = drop or {}
    truth: dict[str, Truth] = {}
    written: list[tuple[str, int]] = []
    lengths = [tokens] * len(scenarios) if isinstance(tokens, int) else list(tokens)
    with RunWriter(path, scenarios, config, overwrite=overwrite, repair=repair) as run:
        for number, (scenario, length) in enumerate(zip(scenarios, lengths, strict=True)):
            sizes: dict[str, Any] = {
                "layers": tuple(layers),
                "heads": heads if attention else None,
                "tokens": length,
                "features": features,
                "attention_dtype": attention_dtype,
                "feature_dtype": feature_dtype,
            }
            records = list(
                make_records(
                    scenario, **sizes, seed=seed + number, active=active, without_sae=without_sae
                )
            )
            skipped = drop.get(scenario, ())
            kept = [r for r in records if not (isinstance(r, LayerRecord) and r.layer in skipped)]
            attributes = _attributes_for(scenario, sizes).model_copy(
                update={"layers_without_sae": tuple(without_sae)}
            )
            writer = run.trace(attributes, make_shape(**sizes), make_tokens(length))
            for record in kept:
                if isinstance(record, TokensRecord):
                    if writer.needs_tokens:
                        writer.append(record)
                elif record.layer in writer.missing_layers:
                    writer.append(record)
                    written.append((scenario, record.layer))
            if not writer.missing_layers:
                writer.finish()
            truth[scenario] = truth_of(kept, layers, make_tokens(length))
        if finish and not drop:
            run.finish()
    return FakeRun(path, truth, written)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file's content by its path below `folder`."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
