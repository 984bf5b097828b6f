"""Measure a table on disk: size against the user's files, plain reads, writing, its index.

``python scripts/bench/table.py [--samples N] [NAME ...]`` makes synthetic tables in the folder of
temporary files and prints medians of CPU and wall milliseconds, and the bytes that are decoded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import xarray as xr
import zarr

from zarrtrace.format.table_layout import TableAttributes, TableShape, table_block, table_columns
from zarrtrace.index import build_index, find_feature
from zarrtrace.records import BFloat16, Nonzeros, SampleRecord, SampleTokens, TablePlan
from zarrtrace.store import TableWriter, open_table

_RECORD = 256
_REPEATS = 5
# A layer of more numbers is not read whole.
_MOST_NUMBERS = 2**27


class Case(NamedTuple):
    """A synthetic table."""

    samples: int
    layers: int
    features: int
    active: int
    channels: int | None


CASES = {
    "narrow": Case(100_000, 1, 512, 12, None),
    "wide": Case(10_000, 2, 32_768, 50, None),
    "files": Case(20_000, 31, 512, 12, 64),
    "residual": Case(2_000, 2, 512, 12, 4096),
}


def frequencies(case: Case, layer: int) -> np.ndarray:
    """Return how likely each feature is: few fire often, as in SAEs."""
    rank = np.random.default_rng(layer).permutation(case.features) + 10.0
    found: np.ndarray = rank**-0.8 / (rank**-0.8).sum()
    return found


def sparse_rows(case: Case, layer: int, start: int, stop: int) -> tuple[Nonzeros, np.ndarray]:
    """Make rows of features of a bfloat16 model, and the features that fire."""
    rng = np.random.default_rng([layer, start])
    likely = np.cumsum(frequencies(case, layer))
    fires = np.empty((stop - start, case.active), np.int64)
    for row in fires:  # drawn one by one, each feature once
        drawn = np.searchsorted(likely, rng.random(8 * case.active) * likely[-1])
        _, first = np.unique(drawn, return_index=True)
        row[:] = np.sort(drawn[np.sort(first)[: case.active]])
    bits = common.bfloat16(rng.exponential(2, fires.shape) + 0.1)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    columns = table_columns(case.features)
    row = np.repeat(np.arange(stop - start), case.active)
    block, column = np.divmod(fires.ravel(), columns)
    order = [np.flatnonzero(block == n) for n in range(-(-case.features // columns))]
    at = tuple((row * columns + column)[one] for one in order)
    parts = tuple(values.ravel()[one] for one in order)
    return Nonzeros((stop - start, case.features), columns, at, parts), fires


def residual_rows(case: Case, layer: int, start: int, stop: int) -> BFloat16:
    """Make rows of a residual stream: heavy tails, each channel with a scale of its own."""
    rng = np.random.default_rng([layer, start, 1])
    scale = np.random.default_rng(layer).lognormal(0, 1, case.channels)
    return BFloat16(common.bfloat16(rng.standard_t(4, (stop - start, case.channels or 0)) * scale))


def write(case: Case, path: Path) -> dict[str, float]:
    """Write a table; returns CPU milliseconds a sample and layer, without making the values."""
    attributes = TableAttributes(
        scenarios=case.samples,
        positions="last",
        model=None,
        layers=tuple(range(1, case.layers + 1)),
        feature_dtype="float32",
        residual_dtype=None if case.channels is None else "float32",
        versions={},
    )
    shape = TableShape(
        layers=case.layers,
        samples=case.samples,
        features={"features": case.features},
        channels=case.channels,
        feature_dtype="float32",
        residual_dtype="float32",
    )
    number = np.arange(case.samples)
    coordinates: dict[str, Any] = {
        "scenario": [f"round_{n}" for n in number],
        "position": number % 60 + 20,
        "token": np.full(case.samples, "?"),
        "token_id": np.full(case.samples, 30, np.uint32),
        "span": np.full(case.samples, "decision"),
        "tags": np.full(case.samples, ""),
        **{f"column{n}": number * n for n in range(10)},
    }
    spent = 0.0
    with TableWriter(path, TablePlan(attributes, shape, coordinates, {})) as writer:
        for start in range(0, case.samples, _RECORD):
            stop = min(start + _RECORD, case.samples)
            records: list[Any] = [tokens(start, stop)]
            for layer in attributes.layers:
                rows, _ = sparse_rows(case, layer, start, stop)
                one = None if case.channels is None else residual_rows(case, layer, start, stop)
                records.append(SampleRecord(layer, start, {"features": rows}, one))
            begun = time.process_time()
            for record in records:
                writer.append(record)
            spent += time.process_time() - begun
        begun = time.process_time()
        writer.finish()
        spent += time.process_time() - begun
    return {"cpu ms a sample and layer": spent * 1000 / case.samples / case.layers}


def tokens(start: int, stop: int) -> SampleTokens:
    """Make the next tokens of some samples."""
    rng = np.random.default_rng([start, 2])
    ids = rng.integers(0, 32_000, (stop - start, 10), dtype=np.uint32)
    texts = np.array([[f"t{one}" for one in row] for row in ids], object)
    return SampleTokens(start, ids, -rng.random(ids.shape, np.float32), texts)


Key = tuple[int, int | slice, int | slice]


def reads(case: Case) -> dict[str, tuple[str, Key]]:
    """Return what is read of a table: an array, and which part of it."""
    count, middle, every = min(1000, case.samples), case.samples // 2, slice(None)
    some = slice(middle - count // 2, middle + count // 2)
    found: dict[str, tuple[str, Key]] = {
        "one (layer, feature)": ("features", (0, every, case.features // 3)),
        f"{count} samples of a layer": ("features", (0, some, every)),
        "one sample of a layer": ("features", (0, middle, every)),
    }
    if case.samples * case.features < _MOST_NUMBERS:
        found["a layer"] = ("features", (0, every, every))
    if case.channels is not None:
        found["residual of a layer"] = ("residual", (0, every, every))
    return found


def decoded(path: Path, name: str, key: Key) -> float:
    """Return how many megabytes of chunks a read decodes."""
    array = zarr.open_array(path / name, mode="r")
    chunks = 1
    for part, size, step in zip(key, array.shape, array.chunks, strict=True):
        start, stop, _ = (slice(part, part + 1) if isinstance(part, int) else part).indices(size)
        chunks *= (stop - 1) // step - start // step + 1
    return chunks * int(np.prod(array.chunks)) * array.dtype.itemsize / 1e6


def measure(action: Callable[[], Any]) -> tuple[float, float]:
    """Return the medians of CPU and wall milliseconds."""
    spent = common.middle([common.timed(action) for _ in range(_REPEATS)])
    return 1000 * spent.cpu, 1000 * spent.wall


def sizes(case: Case, path: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """Yield sizes of a layer's arrays as a share of the user's own files."""
    if case.samples * case.features > _MOST_NUMBERS:
        return
    columns = [sparse_rows(case, 1, at, min(at + _RECORD, case.samples))
               for at in range(0, case.samples, _RECORD)]  # fmt: skip
    fires = np.concatenate([one for _, one in columns])
    dense = open_table(path).features[0].values
    np.savez_compressed(
        folder / "coo.npz",
        row_indices=np.repeat(np.arange(case.samples, dtype=np.int32), case.active),
        col_indices=fires.ravel().astype(np.int32),
        values=np.take_along_axis(dense, fires, 1).ravel(),
        shape=np.array(dense.shape),
    )
    ours = sum(file.stat().st_size for file in (path / "features").glob("c.0.*"))
    yield "features / COO NPZ", ours / (folder / "coo.npz").stat().st_size
    if case.channels is not None:
        residual = open_table(path).residual[0].values.astype(np.float16)
        np.savez_compressed(folder / "hidden.npz", hidden_states=residual)
        ours = sum(file.stat().st_size for file in (path / "residual").glob("c.0.*"))
        yield "residual / float16 NPZ", ours / (folder / "hidden.npz").stat().st_size


def run(name: str, case: Case) -> None:
    """Write a table, read it with plain xarray and with ours, and print the figures."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = folder / "run"
        writing = write(case, path)
        files = [file for file in path.rglob("*") if file.is_file()]
        shape = TableShape(case.layers, case.samples, {"features": case.features})
        size = common.size_of(path) / 1e6
        print(f"{name}: {case}")
        print(f"  block {table_block(shape)} × {table_columns(case.features)} features")
        print(f"  {len(files)} files, {size:.1f} MB")
        for label, figure in [*writing.items(), *sizes(case, path, folder)]:
            print(f"  {label}: {figure:.3f}")
        print(f"  {'':32}{'plain cpu':>10}{'wall':>8}{'ours cpu':>10}{'wall':>8}{'MB':>8}")
        for label, (array, key) in reads(case).items():
            plain = measure(partial(read_plain, path, array, key))
            ours = measure(partial(read_ours, path, array, key))
            print(
                f"  {label:32}{plain[0]:10.0f}{plain[1]:8.0f}{ours[0]:10.0f}{ours[1]:8.0f}"
                f"{decoded(path, array, key):8.0f}"
            )
        print_index(path)


def print_index(path: Path) -> None:
    """Index a table, look a feature up, and print what both cost."""
    wall, cpu = common.timed(lambda: build_index(path))
    layer = int(open_table(path).layer[0])
    found = measure(partial(find_feature, path, layer, 0))
    peak = common.peak_bytes() / 2**20
    print(f"  index: {cpu:.1f} s CPU, {wall:.1f} s; the process's peak up to now {peak:.0f} MB")
    print(f"  find_feature: {found[0]:.0f} ms CPU, {found[1]:.0f} ms")


def read_plain(path: Path, array: str, key: Any) -> np.ndarray:
    """Open a table with xarray alone, and read a part of an array."""
    values: np.ndarray = xr.open_zarr(path, chunks=None)[array][key].values
    return values


def read_ours(path: Path, array: str, key: Any) -> np.ndarray:
    """Open a table, and read a part of an array."""
    values: np.ndarray = open_table(path)[array][key].values
    return values


def main() -> None:
    """Run the cases that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--samples", type=int, help="instead of the case's own number")
    given = parser.parse_args()
    for name in given.names or CASES:
        case = CASES[name]
        run(name, case._replace(samples=given.samples) if given.samples else case)


if __name__ == "__main__":
    main()
