"""Compare layouts of `attention` on disk: size, time to write, time to read.

Layouts differ in inner chunk, shard and compression level; all are ones that every Zarr v3 reader
has. Values are softmax attention of random scores with a sink on the first token, float32.

    python scripts/bench_layouts.py [--tokens 121 2048] [--repeats 5]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

HEADS = 32


class Layout(NamedTuple):
    """One way to cut and compress ``(layer, head, query, key)``."""

    name: str
    chunks: tuple[int, int, int, int]
    sharded: bool
    level: int = 3


def layouts(tokens: int) -> list[Layout]:
    """Return the layouts to compare at a length."""
    keys = min(tokens, 256)
    return [
        Layout("a head", (1, 1, tokens, tokens), sharded=False),
        Layout("a whole layer", (1, HEADS, tokens, tokens), sharded=False),
        Layout("tiles of 128 x 128", (1, HEADS, min(tokens, 128), min(tokens, 128)), sharded=False),
        Layout("shard, 16 rows", (1, HEADS, 16, keys), sharded=True),
        Layout("shard, 64 rows, level 1", (1, HEADS, 64, keys), sharded=True, level=1),
        Layout("shard, 64 rows (ours)", (1, HEADS, 64, keys), sharded=True),
        Layout("shard, 64 rows, level 5", (1, HEADS, 64, keys), sharded=True, level=5),
    ]


def attention(layers: int, tokens: int) -> np.ndarray:
    """Return causal attention ``(layer, head, query, key)``."""
    rng = np.random.default_rng(0)
    out = np.zeros((layers, HEADS, tokens, tokens), np.float32)
    hidden = np.triu(np.ones((tokens, tokens), bool), 1)
    for layer in range(layers):
        scores = rng.normal(0, 2, out.shape[1:]).astype(np.float32)
        scores[..., 0] += 4
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[layer] = weights / weights.sum(-1, keepdims=True)
    return out


def create(path: Path, layout: Layout, values: np.ndarray) -> zarr.Array[Any]:
    """Create an empty array."""
    tokens = values.shape[-1]
    rounded = tuple(
        -(-size // step) * step
        for size, step in zip((1, HEADS, tokens, tokens), layout.chunks, strict=True)
    )
    return zarr.create_array(
        path,
        shape=values.shape,
        dtype="float32",
        chunks=layout.chunks,
        shards=rounded if layout.sharded else None,
        compressors=[
            BloscCodec(cname="zstd", clevel=layout.level, shuffle="shuffle"),
            Crc32cCodec(),
        ],
        config={"write_empty_chunks": False},
        overwrite=True,
    )


def timed(action: Callable[[], object], repeats: int) -> float:
    """Return the median of some runs, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure(folder: Path, layout: Layout, values: np.ndarray, repeats: int) -> list[str]:
    """Return one row of the table."""
    path = folder / "array"

    def write() -> None:
        array = create(path, layout, values)
        for layer in range(len(values)):
            array[layer] = values[layer]

    writing = timed(write, max(1, repeats // 2))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    def column() -> Any:
        return zarr.open_array(path, mode="r")[:, :, -1, values.shape[-1] // 3]

    def layer() -> Any:
        return zarr.open_array(path, mode="r")[len(values) // 2]

    np.testing.assert_array_equal(column(), values[:, :, -1, values.shape[-1] // 3])
    reading = timed(column, repeats), timed(layer, repeats)
    return [layout.name, f"{size / 1e6:.1f}", *(f"{t:.0f}" for t in (writing, *reading))]


def main() -> None:
    """Print a table for each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[121, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    for tokens in given.tokens:
        layers = 31 if tokens < 500 else 2
        values = attention(layers, tokens)
        print(f"\n{layers} layers x {HEADS} heads x {tokens} tokens, float32\n")
        print("| layout | MB | write ms | `[:, :, -1, key]` ms | one layer ms |")
        print("|---|---|---|---|---|")
        folder = Path(tempfile.mkdtemp(prefix="zarrtrace-bench-"))
        try:
            for layout in layouts(tokens):
                print("|", " | ".join(measure(folder, layout, values, given.repeats)), "|")
                sys.stdout.flush()
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
