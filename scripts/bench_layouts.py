"""Compare layouts of `attention` on disk: size, time to write, time to read.

Layouts differ in inner chunk, shard and compression level; all are ones that every Zarr v3 reader
has. Values are softmax attention of random scores with a sink on the first token, float32.
Zarrtrace's own writer writes them, and its own reader reads them; a row is also read by Zarr.

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
from unittest import mock

import numpy as np
import zarr
from numcodecs import Blosc
from xarray.core.indexing import BasicIndexer
from zarrtrace.store.lazy import stored_array
from zarrtrace.store.nodes import create_arrays

from zarrtrace.format.layout import ATTENTION_BLOCK, ATTENTION_LEVEL, ArrayLayout
from zarrtrace.store import shards

HEADS = 32


class Layout(NamedTuple):
    """One way to cut and compress ``(layer, head, query, key)``."""

    name: str
    chunks: tuple[int, int, int, int]
    sharded: bool = True
    level: int = ATTENTION_LEVEL


def layouts(tokens: int) -> list[Layout]:
    """Return the layouts to compare at a length; rows and keys of a chunk of a shard by number."""
    keys = min(tokens, 256)
    tile = min(tokens, 128)
    rows = [
        Layout(f"shard, {count} x {width}", (1, HEADS, count, width))
        for width in sorted({keys, min(tokens, 512)})
        for count in (4, 8, 16, 32, 64)
    ]
    return [
        Layout("a head", (1, 1, tokens, tokens), sharded=False),
        Layout("a whole layer", (1, HEADS, tokens, tokens), sharded=False),
        Layout(f"tiles of {tile} x {tile}", (1, HEADS, tile, tile), sharded=False),
        *rows,
        Layout(f"shard, 16 x {keys}, level 1", (1, HEADS, 16, keys), level=1),
        Layout(f"shard, 16 x {keys}, level 5", (1, HEADS, 16, keys), level=5),
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


def described(layout: Layout, values: np.ndarray) -> ArrayLayout:
    """Return what zarrtrace's writer wants to know of a layout."""
    tokens = values.shape[-1]
    _, _, rows, keys = layout.chunks
    # As many rows a shard as zarrtrace's shards of 2,048 tokens have.
    shard = (1, HEADS, -(-min(tokens, 256) // rows) * rows, -(-tokens // keys) * keys)
    return ArrayLayout(
        dims=("layer", "head", "query", "key"),
        dtype="float32",
        shape=values.shape,
        chunks=layout.chunks,
        shards=shard if layout.sharded else None,
        codec="attention",
        skip_empty=layout.sharded,
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
    path, how = folder / "attention", described(layout, values)
    rows, last = (how.shards or how.chunks)[2], values.shape[2] - 1
    key = values.shape[-1] // 3

    def write() -> None:
        shutil.rmtree(path, ignore_errors=True)
        create_arrays(folder, {}, {path.name: how})
        codec = Blosc("zstd", layout.level, Blosc.SHUFFLE, ATTENTION_BLOCK)
        with mock.patch.object(shards, "_BLOSC", codec):
            for layer in range(len(values)):
                for row in range(0, last + 1, rows):
                    block = values[layer : layer + 1, :, row : row + rows]
                    shards.write_block(path, how, (layer, 0, row, 0), block)

    def ours(*index: int | slice) -> Any:
        opened = stored_array(path)
        assert opened is not None  # noqa: S101 -- it was written so
        return opened[0][BasicIndexer(index)]

    every = slice(None)
    writing = timed(write, max(1, repeats // 2))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    np.testing.assert_array_equal(ours(every, every, last, key), values[:, :, -1, key])
    reading = [
        timed(lambda: ours(every, every, last, key), repeats),
        timed(lambda: zarr.open_array(path, mode="r")[:, :, -1, key], repeats),
        timed(lambda: ours(len(values) // 2, every, every, every), repeats),
    ]
    times = [f"{writing:.0f}", *(f"{time:.1f}" for time in reading)]
    return [layout.name, f"{size / 1e6:.1f}", *times]


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
        print("| layout | MB | write ms | `[:, :, -1, key]` ms | by Zarr ms | one layer ms |")
        print("|---|---|---|---|---|---|")
        folder = Path(tempfile.mkdtemp(prefix="zarrtrace-bench-"))
        try:
            for layout in layouts(tokens):
                print("|", " | ".join(measure(folder, layout, values, given.repeats)), "|")
                sys.stdout.flush()
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
