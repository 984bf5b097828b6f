"""Compare reading from a store with reading NPZ files, one a layer, as the user's scripts do.

Both start with closed files. NumPy reads ``layer_N.npz`` layer after layer; zarrtrace opens the
trace and selects. The floor reads and decompresses exactly the chunks that hold the answer.

    python scripts/bench_read.py [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import zarrtrace as zt
from zarrtrace.spec import (
    FeatureRecord,
    LayerRecord,
    SpanAttributes,
    Tokens,
    TraceAttributes,
    TraceShape,
)
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


def zarr_chunks(folder: Path, key: str, at: Any) -> np.ndarray:
    """Read the same with plain Zarr from an array that is open: its chunks, and no labels."""
    opened: Any = zarr.open_array(folder / "bench" / key, mode="r")
    found: np.ndarray = opened.oindex[at]
    return found


QUESTIONS: dict[str, tuple[Callable[[Any], Any], str, Any, Any]] = {
    "attention[:, :, -1, balance], all layers": (
        lambda ds: ds.attention.isel(query=-1, key=BALANCE),
        "attention",
        (slice(None), -1, BALANCE),
        lambda tokens: (slice(None), slice(None), [tokens - 1], BALANCE),
    ),
    "one feature, all layers and tokens": (
        lambda ds: ds.features.sel(feature=FEATURE),
        "features",
        (slice(None), FEATURE),
        lambda _tokens: (slice(None), slice(None), [FEATURE]),
    ),
    "last token, all features, all layers": (
        lambda ds: ds.features.isel(query=-1),
        "features",
        (-1,),
        lambda tokens: (slice(None), [tokens - 1], slice(None)),
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
        chosen = chunks(tokens)
        out[name] = {
            "npz": median(lambda key=key, at=at: npz(folder, layers, key, at), few),  # type: ignore[misc]
            "zarrtrace": median(new, repeats),
            "floor": median(
                lambda key=key, at=chosen: zarr_chunks(folder, key, at),  # type: ignore[misc]
                repeats,
            ),
        }
    old, whole = whole_layer(folder)
    opening = median(lambda: zt.open_trace(folder / "bench"), repeats)
    layer = {"npz": median(old, repeats), "zarrtrace": median(whole, repeats), "floor": opening}
    out["one whole layer, features and attention"] = layer
    return out


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = {}
    print("| shape | what | NPZ ms | zarrtrace ms | times faster | Zarr alone ms |")
    print("|---|---|---|---|---|---|", flush=True)
    for tokens, layers in SHAPES:
        with tempfile.TemporaryDirectory() as work:
            build(Path(work), tokens, layers)
            found = measure(Path(work), tokens, layers, given.repeats)
        results[f"{tokens}"] = found
        for name, row in found.items():
            print(
                f"| {layers} layers, {tokens} tokens | {name} | {row['npz'] * 1e3:.0f} | "
                f"{row['zarrtrace'] * 1e3:.1f} | {row['npz'] / row['zarrtrace']:.1f} | "
                f"{row['floor'] * 1e3:.1f} |",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
