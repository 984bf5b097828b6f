"""Factories: attributes, records and whole runs with known content, no model needed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from zarrtrace.format.attributes import (
    ModelAttributes,
    OptionAttributes,
    SAEAttributes,
    SpanAttributes,
    TraceAttributes,
)
from zarrtrace.format.layout import (
    DEFAULT_LIMITS,
    NEXT_TOKENS,
    NO_ID,
    TOP_FEATURES,
    Limits,
    TraceShape,
)
from zarrtrace.records import FeatureRecord, LayerRecord, Tokens, TokensRecord, TracePlan
from zarrtrace.storage import disk
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
        "layers": layers,
        "attention_dtype": "float32" if heads else None,
        "feature_dtype": "float32" if features else None,
        "versions": {"zarrtrace": "0"},
    }
    return TraceAttributes(**{**fields, **changes})


def make_saes(layers: Sequence[int], features: int) -> tuple[SAEAttributes, ...]:
    """Return an SAE of each layer."""
    return tuple(
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
        for layer in layers
    )


def make_tokens(tokens: int) -> Tokens:
    """Return token ids and texts, multi-byte characters among them."""
    words = ["<s>", " balance", "90", " Ω", "🎰", "\n", ""]
    return Tokens(
        ids=[(7 * i) % 1000 for i in range(tokens)],
        texts=[words[i % len(words)] for i in range(tokens)],
        special=[i == 0 for i in range(tokens)],
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
    strongest = np.take_along_axis(activations, top, axis=-1).astype(np.float32)
    return FeatureRecord(
        activations=activations,
        top_feature=np.where(strongest != 0, top, NO_ID).astype(np.uint32),
        top_activation=strongest,
    )


def make_residual(
    tokens: int, channels: int, *, seed: int = 0, dtype: str = "float32"
) -> np.ndarray:
    """Return a residual stream ``(query, channel)``, with one channel of large values."""
    values = np.random.default_rng(seed).normal(0, 0.5, (tokens, channels))
    values[:, channels // 2] *= 300
    return values.astype(dtype)


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
    channels: int | None = None,
    residual_dtype: str = "float32",
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
            residual=make_residual(tokens, channels, seed=at, dtype=residual_dtype)
            if channels
            else None,
        )
    if next_token:
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 1000, (tokens, NEXT_TOKENS), dtype=np.uint32)
        yield TokensRecord(
            scenario=scenario,
            next_token=ids,
            next_token_text=np.vectorize(lambda i: f" {i} Ω", otypes=[object])(ids),
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
    channels: int | None = None,
    residual_dtype: str = "float32",
    next_token: bool = True,
    limits: Limits = DEFAULT_LIMITS,
) -> TraceShape:
    """Return the sizes of a fake trace."""
    return TraceShape(
        layers=len(layers),
        tokens=tokens,
        heads=heads or None,
        features=_sizes(features),
        channels=channels,
        attention_dtype=attention_dtype if heads else None,
        feature_dtype=feature_dtype if _sizes(features) else None,
        residual_dtype=residual_dtype if channels else None,
        next_token=next_token,
        limits=limits,
    )


def _sizes(features: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(features, int):
        return {"features": features} if features else {}
    return dict(features)


def truth_of(
    records: Sequence[LayerRecord | TokensRecord], layers: Sequence[int], tokens: Tokens
) -> Truth:
    """Return the arrays that a trace of `records` holds, missing layers as fill values."""
    texts = np.asarray(tokens.texts, dtype=object)
    out: Truth = {
        "layer": np.asarray(layers),
        "query": np.arange(len(tokens.ids)),
        "key": np.arange(len(tokens.ids)),
        "token_id": np.asarray(tokens.ids, np.uint32),
        "query_token": texts,
        "key_token": texts,
        "special": np.asarray(tokens.special, bool),
    }

    def put(name: str, layer: int, value: np.ndarray) -> None:
        gap = np.nan if value.dtype.kind == "f" else NO_ID
        whole = out.setdefault(name, np.full((len(layers), *value.shape), gap, value.dtype))
        whole[list(layers).index(layer)] = value

    for record in records:
        if isinstance(record, TokensRecord):
            out["next_token"] = record.next_token
            out["next_token_logprob"] = record.next_token_logprob
            out["next_token_text"] = record.next_token_text
            continue
        if record.attention is not None and record.attention_mean is not None:
            put("attention", record.layer, record.attention)
            put("attention_mean", record.layer, record.attention_mean)
            out["head"] = np.arange(record.attention.shape[0])
        if record.residual is not None:
            put("residual", record.layer, np.asarray(record.residual))
            out["channel"] = np.arange(record.residual.shape[1])
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
    """Return the writer of a fake trace in the run at `path`; `sizes` as of :func:`make_shape`."""
    return TraceWriter(path, make_plan(scenario, next_token=next_token, **sizes))


def make_plan(
    scenario: str = SCENARIOS[0],
    *,
    next_token: bool = True,
    without_sae: Sequence[int] = (),
    **sizes: Any,
) -> TracePlan:
    """Return a fake trace before its first layer; see :func:`make_shape` for `sizes`."""
    layers, tokens = tuple(sizes.get("layers", LAYERS)), sizes.get("tokens", 7)
    features, heads = _sizes(sizes.get("features", 16)), sizes.get("heads", 2)
    attributes = make_trace_attributes(
        scenario,
        layers=layers,
        heads=heads or 0,
        spans={
            "balance": SpanAttributes(
                characters=((9, 11),), tokens=tuple(i for i in (1, 2) if i < tokens) or (0,)
            ),
            "decision": SpanAttributes(characters=(), tokens=(tokens - 1,)),
        },
        attention_dtype=sizes.get("attention_dtype", "float32") if heads else None,
        feature_dtype=sizes.get("feature_dtype", "float32") if features else None,
        layers_without_sae=tuple(without_sae),
        residual_dtype=sizes.get("residual_dtype", "float32") if sizes.get("channels") else None,
    )
    with_sae = [layer for layer in layers if layer not in without_sae]
    return TracePlan(
        attributes=attributes,
        shape=make_shape(**{**sizes, "layers": layers}, next_token=next_token),
        tokens=make_tokens(tokens),
        # Of several arrays, every layer has each.
        saes=make_saes(with_sae, *features.values()) if len(features) == 1 else (),
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
    channels: int | None = None,
    residual_dtype: str = "float32",
    active: float = 0.1,
    without_sae: Sequence[int] = (),
    config: Mapping[str, Any] = CONFIG,
    finish: bool = True,
    drop: Mapping[str, Sequence[int]] | None = None,
    overwrite: bool = False,
    repair: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    stated: Mapping[str, Any] | None = None,
) -> FakeRun:
    """Write a run of synthetic scenarios through the real writers.

    Parameters
    ----------
    tokens
        Length of every scenario, or of each one.
    drop
        Layers not to write, by scenario; such a run is not finished.
    stated
        Statements of the suite file: attributes of the run.
    finish
        Whether to finish the run; if not, traces without dropped layers are finished all the same.
    """
    path = tmp_path / name
    drop = drop or {}
    truth: dict[str, Truth] = {}
    written: list[tuple[str, int]] = []
    lengths = [tokens] * len(scenarios) if isinstance(tokens, int) else list(tokens)
    with RunWriter(
        path, scenarios, config, stated=stated, overwrite=overwrite, repair=repair
    ) as run:
        for number, (scenario, length) in enumerate(zip(scenarios, lengths, strict=True)):
            sizes: dict[str, Any] = {
                "layers": tuple(layers),
                "heads": heads if attention else None,
                "tokens": length,
                "features": features,
                "attention_dtype": attention_dtype,
                "feature_dtype": feature_dtype,
                "channels": channels,
                "residual_dtype": residual_dtype,
            }
            records = list(
                make_records(
                    scenario, **sizes, seed=seed + number, active=active, without_sae=without_sae
                )
            )
            skipped = drop.get(scenario, ())
            kept = [r for r in records if not (isinstance(r, LayerRecord) and r.layer in skipped)]
            plan = make_plan(scenario, without_sae=without_sae, limits=limits, **sizes)
            writer = run.trace(plan)
            for record in kept:
                if isinstance(record, TokensRecord):
                    if writer.needs_tokens:
                        writer.append(record)
                elif record.layer in writer.missing_layers:
                    writer.append(record)
                    written.append((scenario, record.layer))
            if not writer.missing_layers and not writer.needs_tokens:
                writer.finish()
            truth[scenario] = truth_of(kept, layers, make_tokens(length))
        if finish and not drop:
            run.finish()
    return FakeRun(path, truth, written)


def make_run_of_two_saes(tmp_path: Path, **sizes: Any) -> FakeRun:
    """Write a run whose `features` have an SAE on layer 1 alone, `features_mlp` on layer 2 alone.

    No layer is in ``layers_without_sae``: each has one of the arrays.
    """
    features = {"features": 16, "features_mlp": 8}
    sizes |= {"layers": (1, 2), "features": features}
    saes = (
        *make_saes((1,), 16),
        *(one.model_copy(update={"variable": "features_mlp"}) for one in make_saes((2,), 8)),
    )
    path, truth = tmp_path / "run", dict[str, Truth]()
    with RunWriter(path, SCENARIOS, CONFIG) as run:
        for number, scenario in enumerate(SCENARIOS):
            records = list(make_records(scenario, **sizes, seed=number, active=0.5))
            for at, name in enumerate(features):
                layer = records[at]
                assert isinstance(layer, LayerRecord)
                records[at] = replace(layer, features={name: layer.features[name]})
            with run.trace(replace(make_plan(scenario, **sizes), saes=saes)) as trace:
                for record in records:
                    trace.append(record)
            truth[scenario] = truth_of(records, (1, 2), make_tokens(7))
        run.finish()
    return FakeRun(path, truth, [])


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file's content by its path below `folder`."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@contextlib.contextmanager
def full_disk(
    monkeypatch: pytest.MonkeyPatch, failing: str, number: int = errno.ENOSPC
) -> Iterator[None]:
    """Have appending to a file, or to any of a folder, fail after eleven bytes."""
    original = disk.append

    def append(file: Path, parts: Any, *arguments: Any) -> None:
        if failing in (file.name, file.parent.name):
            original(file, [b"".join(parts)[:11]], *arguments)
            raise OSError(number, os.strerror(number))
        original(file, parts, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "append", append)
        yield
