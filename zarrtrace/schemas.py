"""The content of ``schema/``, generated from the code; a test compares them.

``python -m zarrtrace.schemas`` writes the files into ``./schema``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from zarrtrace.format.attributes import (
    ModelAttributes,
    OptionAttributes,
    RunAttributes,
    SAEAttributes,
    SpanAttributes,
    TraceAttributes,
)
from zarrtrace.format.index_layout import IndexAttributes
from zarrtrace.format.layout import TraceShape
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.records import FeatureRecord, LayerRecord, Tokens, TokensRecord, TracePlan
from zarrtrace.scenarios import ScenarioEntry, SuiteFile
from zarrtrace.store import TraceWriter

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCHEMAS: dict[str, type[BaseModel]] = {
    "scenarios.schema.json": SuiteFile,
    "scenario-entry.schema.json": ScenarioEntry,
    "trace.schema.json": TraceAttributes,
    "run.schema.json": RunAttributes,
    "table.schema.json": TableAttributes,
    "index.schema.json": IndexAttributes,
}
_CHECKSUM = "0123456789abcdef"
_LAYERS, _TOKENS, _HEADS, _FEATURES = (1, 2), ("<s>", "Stop", "?"), 2, 8


def generate() -> dict[str, str]:
    """Return every generated file of ``schema/``: text by file name."""
    out = {
        name: _text({"$schema": _DIALECT, **model.model_json_schema()})
        for name, model in _SCHEMAS.items()
    }
    with tempfile.TemporaryDirectory(prefix="zarrtrace-schema-") as folder:
        trace = Path(folder) / "example"
        _write_example(trace)
        attributes = _metadata(trace)
        attributes.pop("consolidated_metadata", None)
        # Compressed bytes differ from one version of the compressor to the next.
        attributes["attributes"]["seal"] = _CHECKSUM
        out["example-trace.zarr.json"] = _text(attributes)
        for name in ("attention", "features"):
            array = _metadata(trace / name)
            checksums = array["attributes"]["checksums"]
            checksums.update({key: [123, _CHECKSUM] for key in checksums})
            out[f"example-{name}.zarr.json"] = _text(array)
    return out


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _metadata(node: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((node / "zarr.json").read_text(encoding="utf-8"))
    return found


def _write_example(path: Path) -> None:
    tokens, heads, features = len(_TOKENS), _HEADS, _FEATURES
    attention = np.tril(np.ones((heads, tokens, tokens), np.float32))
    attention /= attention.sum(-1, keepdims=True)
    activations = np.tile(np.eye(tokens, features, dtype=np.float32), (1, 1))
    strongest = np.argsort(-np.abs(activations), axis=-1, kind="stable").astype(np.uint32)
    attributes = TraceAttributes(
        scenario="example",
        prompt="Stop?",
        tags=("safe",),
        spans={
            "choices": SpanAttributes(characters=((0, 4),), tokens=(1,)),
            "decision": SpanAttributes(characters=(), tokens=(2,)),
        },
        options={"stop": OptionAttributes(text="2", token_id=17)},
        model=ModelAttributes(
            id="owner/model",
            revision="0123456789abcdef0123456789abcdef01234567",
            architecture="LlamaForCausalLM",
            n_layers=4,
            n_heads=heads,
            d_model=4,
            dtype="float32",
            attn_implementation="eager",
            softmax_dtype="float32",
            tokenizer="PreTrainedTokenizerFast",
            prepend_bos=True,
        ),
        layers=_LAYERS,
        attention_dtype="float32",
        feature_dtype="float32",
        versions={"zarrtrace": "x.y.z", "zarr": "x.y.z"},
    )
    saes = tuple(
        SAEAttributes(
            layer=layer,
            release="a_release",
            id=f"l{layer}r",
            hook_name=f"blocks.{layer}.hook_resid_post",
            architecture="jumprelu",
            d_in=4,
            d_sae=features,
            dtype="float32",
            decoder_norm_folded=False,
        )
        for layer in _LAYERS
    )
    shape = TraceShape(
        layers=len(_LAYERS), tokens=tokens, heads=heads, features={"features": features}
    )
    known = Tokens(ids=(0, 5, 7), texts=_TOKENS, special=(True, False, False))
    with TraceWriter(path.parent, TracePlan(attributes, shape, known, saes)) as writer:
        for layer in _LAYERS:
            record = FeatureRecord(
                activations=activations,
                top_feature=strongest,
                top_activation=np.take_along_axis(activations, strongest, axis=-1),
            )
            writer.append(
                LayerRecord(
                    scenario="example",
                    layer=layer,
                    attention=attention,
                    attention_mean=attention.mean(0),
                    features={"features": record},
                )
            )
        writer.append(
            TokensRecord(
                scenario="example",
                next_token=np.tile(np.arange(10, dtype=np.uint32), (tokens, 1)),
                next_token_logprob=np.full((tokens, 10), -2.5, np.float32),
                next_token_text=np.full((tokens, 10), " 2", object),
            )
        )


def main() -> None:
    """Write the generated files into ``./schema``."""
    folder = Path("schema")
    folder.mkdir(exist_ok=True)
    for name, text in generate().items():
        (folder / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{folder / name}\n")


if __name__ == "__main__":
    main()
