#!/usr/bin/env python3
"""Measure NPZ export against ``np.savez_compressed`` on the same values.

NumPy gets its arrays in memory; zarrtrace also reads its own from the store. Run it with nothing
else on the machine: ``python scripts/bench/npz.py [--json FILE]``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import common
import numpy as np

from zarrtrace.npz import export_npz
from zarrtrace.records import BFloat16, FeatureRecord, LayerRecord
from zarrtrace.store import RunWriter

TOKENS, HEADS, FEATURES = 121, 32, 32768
Arrays = dict[str, np.ndarray]


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Cut float32 values to what bfloat16 can hold."""
    return np.asarray(BFloat16(common.bfloat16(values)))


def attention(rng: np.random.Generator) -> np.ndarray:
    """Make causal softmax attention, float32."""
    return common.attention(rng, HEADS, TOKENS)


def features(rng: np.random.Generator, active: int) -> np.ndarray:
    """Make features of which `active` a token are above 0."""
    return common.features(rng, TOKENS, FEATURES, active)


CASES: dict[str, Callable[[np.random.Generator], Arrays]] = {
    "features float32, 50 active": lambda rng: {"features": features(rng, 50)},
    "features bfloat16 values, 50 active": lambda rng: {"features": as_bfloat16(features(rng, 50))},
    "features float32, 1000 active": lambda rng: {"features": features(rng, 1000)},
    "attention float32": lambda rng: {"attention": attention(rng)},
    "attention bfloat16 values": lambda rng: {"attention": as_bfloat16(attention(rng))},
    "attention float16": lambda rng: {"attention": attention(rng).astype(np.float16)},
    "both, bfloat16 values": lambda rng: {
        "features": as_bfloat16(features(rng, 50)),
        "attention": as_bfloat16(attention(rng)),
    },
}


def write_run(path: Path, layers: list[Arrays]) -> None:
    """Write the arrays as a run of one scenario."""
    first = layers[0]
    has_attention, has_features = "attention" in first, "features" in first
    plan = common.trace_plan(
        "bench",
        range(len(layers)),
        TOKENS,
        heads=HEADS if has_attention else None,
        features=FEATURES if has_features else None,
        attention_dtype=attention_dtype(first["attention"]) if has_attention else None,
        next_token=False,
    )
    with RunWriter(path, ["bench"], {}) as run:
        with run.trace(plan) as trace:
            for layer, arrays in enumerate(layers):
                trace.append(record(layer, arrays))
        run.finish()


def attention_dtype(array: np.ndarray) -> Literal["float16", "float32"]:
    """Name the dtype as the store does."""
    return "float16" if array.dtype == np.float16 else "float32"


def record(layer: int, arrays: Arrays) -> LayerRecord:
    """Make what the store takes; its indices are not exported and stay empty."""
    found = arrays.get("attention")
    activations = arrays.get("features")
    top = np.zeros((TOKENS, 32))
    return LayerRecord(
        scenario="bench",
        layer=layer,
        attention=found,
        attention_mean=None if found is None else found.mean(axis=0, dtype=np.float32),
        features={}
        if activations is None
        else {"features": FeatureRecord(activations, top.astype(np.uint32), top.astype("f4"))},
    )


def savez(folder: Path, layers: list[Arrays]) -> None:
    """Write the arrays as NumPy does."""
    folder.mkdir()
    for layer, arrays in enumerate(layers):
        np.savez_compressed(folder / f"layer_{layer}.npz", **arrays)  # type: ignore[arg-type]


def measure(work: Path, layers: list[Arrays], repeats: int) -> dict[str, Any]:
    """Time both ways in turn; every repeat writes to a new folder."""
    write_run(work / "run", layers)
    numpys, exports = (
        iter([work / f"{name}{at}" for at in range(repeats)]) for name in ("numpy", "ours")
    )
    spent = common.turns(
        {
            "numpy": lambda: savez(next(numpys), layers),
            "ours": lambda: export_npz(work / "run", next(exports)),
        },
        repeats,
    )
    numpy, ours = spent["numpy"], spent["ours"]
    size = {
        name: sum(file.stat().st_size for file in (work / f"{name}0").rglob("*.npz"))
        for name in spent
    }
    return {
        "numpy_s": numpy.wall,
        "zarrtrace_s": ours.wall,
        "times_faster": numpy.wall / ours.wall,
        "numpy_cpu_s": numpy.cpu,
        "zarrtrace_cpu_s": ours.cpu,
        "numpy_bytes": size["numpy"],
        "zarrtrace_bytes": size["ours"],
        "bytes_ratio": size["ours"] / size["numpy"],
    }


def main() -> None:
    """Measure every case and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results = {}
    print(f"{options.layers} layers of {TOKENS} tokens, {os.cpu_count()} CPUs, medians of ", end="")
    print(f"{options.repeats}\n")
    print("| values | NumPy s (CPU s) | zarrtrace s (CPU s) | times faster ", end="")
    print("| NumPy MB | zarrtrace MB | bytes |\n|---|---|---|---|---|---|---|", flush=True)
    for name, make in CASES.items():
        rng = np.random.default_rng(0)
        layers = [make(rng) for _ in range(options.layers)]
        with tempfile.TemporaryDirectory() as work:
            row = results[name] = measure(Path(work), layers, options.repeats)
        print(
            f"| {name} | {row['numpy_s']:.2f} ({row['numpy_cpu_s']:.2f}) "
            f"| {row['zarrtrace_s']:.2f} ({row['zarrtrace_cpu_s']:.2f}) "
            f"| {row['times_faster']:.1f} | {row['numpy_bytes'] / 1e6:.2f} "
            f"| {row['zarrtrace_bytes'] / 1e6:.2f} | {row['bytes_ratio']:.3f} |",
            flush=True,
        )
    common.save(options.json, results)


if __name__ == "__main__":
    main()
