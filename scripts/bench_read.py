"""Compare reading from a store with reading NPZ files, one a layer, as the user's scripts do.

Both start with closed files. NumPy reads ``layer_N.npz`` layer after layer; zarrtrace opens the
trace and selects. Plain Zarr opens the array alone, without labels, and reads the same chunks, with
its own codec pipeline and with that of zarrs. At last, how long ``zarrtrace --help`` and ``info``
take, as processes of their own with compiled bytecode.

    python scripts/bench_read.py [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import zarrtrace as zt
from zarrtrace.format.attributes import SpanAttributes, TraceAttributes
from zarrtrace.format.layout import TraceShape
from zarrtrace.records import FeatureRecord, LayerRecord, Tokens
from zarrtrace.store import TraceWriter

HEADS, FEATURES, ACTIVE = 32, 32_768, 50
BALANCE, FEATURE = [51, 52, 53], 14_826

#: Tokens and layers: the mission's shape, and few layers of a long prompt.
SHAPES = ((121, 31), (2_048, 4))


def attention(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Return causal softmax attention ``(head, query, key)``, float32."""
    scores = rng.normal(0, 2, (HEADS, tokens, tokens)).astype(np.float32)
    scores[:, ~np.tri(tokens, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    found: np.ndarray = weights / weights.sum(-1, keepdims=True)
    return found


def features(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Return ``(query, feature)`` of which `ACTIVE` a token are above 0, float32."""
    values = np.zeros((tokens, FEATURES), np.float32)
    for row in values:
        row[rng.choice(FEATURES, ACTIVE, replace=False)] = rng.gamma(2.0, size=ACTIVE) + 0.3
    values[:, FEATURE] = 1  # the answer is not empty
    return values


def build(folder: Path, tokens: int, layers: int) -> None:
    """Write the same values as a trace and as NPZ files."""
    rng = np.random.default_rng(0)
    attributes = TraceAttributes(
        scenario="bench",
        prompt=None,
        spans={
            "balance": SpanAttributes(characters=(), tokens=tuple(BALANCE)),
            "decision": SpanAttributes(characters=(), tokens=(tokens - 1,)),
        },
        model=None,
        layers=tuple(range(layers)),
        attention_dtype="float32",
        feature_dtype="float32",
        versions={},
    )
    shape = TraceShape(
        layers=layers,
        tokens=tokens,
        heads=HEADS,
        features={"features": FEATURES},
        attention_dtype="float32",
        feature_dtype="float32",
        next_token=False,
    )
    labels = Tokens(ids=range(tokens), texts=[str(at) for at in range(tokens)])
    npz = folder / "npz"
    npz.mkdir()
    with TraceWriter(folder / "bench", attributes, shape, labels) as trace:
        for layer in range(layers):
            weights, active = attention(rng, tokens), features(rng, tokens)
            top = np.zeros((tokens, 32), np.uint32)
            record = FeatureRecord(active, top, top.astype(np.float32))
            trace.append(
                LayerRecord(
                    scenario="bench",
                    layer=layer,
                    attention=weights,
                    attention_mean=weights.mean(0),
                    features={"features": record},
                )
            )
            np.savez_compressed(npz / f"layer_{layer}.npz", attention=weights, features=active)


def files(folder: Path, layers: int) -> list[Path]:
    """Return the NPZ files."""
    return [folder / "npz" / f"layer_{layer}.npz" for layer in range(layers)]


def npz(folder: Path, layers: int, key: str, at: Any) -> np.ndarray:
    """Read a part of every layer as the user's loop does."""
    return np.stack([np.load(file)[key][at] for file in files(folder, layers)])


#: Codec pipelines of zarr-python.
PIPELINES = {
    "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


def plain_zarr(folder: Path, parts: dict[str, Any], pipeline: str) -> list[np.ndarray]:
    """Read parts of arrays with Zarr alone."""
    with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
        opened: dict[str, Any] = {
            key: zarr.open_array(folder / "bench" / key, mode="r") for key in parts
        }
        return [opened[key][at] for key, at in parts.items()]


QUESTIONS: dict[str, tuple[Callable[[Any], Any], str, Any, Any]] = {
    "attention[:, :, -1, balance], all layers": (
        lambda ds: ds.attention.isel(query=-1, key=BALANCE),
        "attention",
        (slice(None), -1, BALANCE),
        lambda tokens: (slice(None), slice(None), slice(tokens - 1, tokens), slice(51, 54)),
    ),
    "one feature, all layers and tokens": (
        lambda ds: ds.features.sel(feature=FEATURE),
        "features",
        (slice(None), FEATURE),
        lambda _tokens: (slice(None), slice(None), slice(FEATURE, FEATURE + 1)),
    ),
    "last token, all features, all layers": (
        lambda ds: ds.features.isel(query=-1),
        "features",
        (-1,),
        lambda tokens: (slice(None), slice(tokens - 1, tokens), slice(None)),
    ),
}


def median(read: Callable[[], Any], repeats: int) -> float:
    """Return the median of some repeats, in seconds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        read()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def whole_layer(folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return how each side reads attention and features of layer 2."""

    def old() -> list[np.ndarray]:
        with np.load(folder / "npz" / "layer_2.npz") as opened:
            return [opened[key] for key in ("attention", "features")]

    def new() -> list[np.ndarray]:
        ds = zt.open_trace(folder / "bench").sel(layer=2)
        return [ds[key].values for key in ("attention", "features")]

    return old, new


def measure(folder: Path, tokens: int, layers: int, repeats: int) -> dict[str, dict[str, float]]:
    """Time every question; check that both sides answer alike."""
    out = {}
    for name, (ask, key, at, chunks) in QUESTIONS.items():

        def new(ask: Callable[[Any], Any] = ask) -> np.ndarray:
            found: np.ndarray = ask(zt.open_trace(folder / "bench")).values
            return found

        np.testing.assert_array_equal(new(), npz(folder, layers, key, at))
        few = 2 if tokens > 1000 else repeats
        old = partial(npz, folder, layers, key, at)
        out[name] = _times(folder, old, new, {key: chunks(tokens)}, few, repeats)
    old_layer, new_layer = whole_layer(folder)
    parts = {"attention": 2, "features": 2}
    out["one whole layer, features and attention"] = _times(
        folder, old_layer, new_layer, parts, repeats, repeats
    )
    return out


def _times(
    folder: Path,
    old: Callable[[], Any],
    new: Callable[[], Any],
    parts: dict[str, Any],
    few: int,
    repeats: int,
) -> dict[str, float]:
    return {
        "npz": median(old, few),
        "zarrtrace": median(new, repeats),
        **{
            pipeline: median(partial(plain_zarr, folder, parts, pipeline), repeats)
            for pipeline in PIPELINES
        },
    }


def commands(folder: Path, repeats: int) -> dict[str, float]:
    """Time what starts a process, beside a Python that does nothing."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    programs = {
        "python -c pass": ["-c", "pass"],
        "zarrtrace --help": ["-m", "zarrtrace", "--help"],
        "zarrtrace info": ["-m", "zarrtrace", "info", str(folder / "bench")],
    }

    def start(arguments: list[str]) -> None:
        command = [sys.executable, *arguments]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    for arguments in programs.values():
        start(arguments)  # compiles
    return {
        name: median(partial(start, arguments), repeats) for name, arguments in programs.items()
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    print("| shape | what | NPZ ms | zarrtrace ms | times faster | Zarr ms | with zarrs |")
    print("|---" * 7 + "|", flush=True)
    for tokens, layers in SHAPES:
        with tempfile.TemporaryDirectory() as work:
            build(Path(work), tokens, layers)
            found = measure(Path(work), tokens, layers, given.repeats)
            started = commands(Path(work), given.repeats)
        results[f"{tokens}"] = found
        for name, row in found.items():
            print(
                f"| {layers} layers, {tokens} tokens | {name} | {row['npz'] * 1e3:.0f} | "
                f"{row['zarrtrace'] * 1e3:.1f} | {row['npz'] / row['zarrtrace']:.1f} | "
                f"{row['zarr'] * 1e3:.1f} | {row['zarrs'] * 1e3:.1f} |",
                flush=True,
            )
    for command, seconds in started.items():
        print(f"{command}: {seconds:.2f} s")
    results["commands"] = {"seconds": started}
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
