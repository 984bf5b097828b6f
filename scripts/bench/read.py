"""Compare a trace with NPZ files of the same values: reading by several readers, writing, size.

Values are those of a model in bfloat16: causal softmax of random scores with a sink, and features
of which some fire at each token. Times are CPU time of this process, all its threads, medians of
repeats in turns: other jobs of the machine change them little. Selections are timed on datasets
that are open; opening is a figure of its own. NumPy opens each of its files, there is no other way.

    python scripts/bench/read.py [--tokens 121 277] [--active 50 1000] [--heads 32] [--repeats 5]
                                 [--rows 32 --feature-tokens 64 --feature-columns 4096]
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import common
import numpy as np
import tensorstore
import xarray as xr
import zarr

import zarrtrace as zt
from zarrtrace.format.layout import (
    DEFAULT_LIMITS,
    Limits,
    attention_chunk_rows,
)
from zarrtrace.layer_batches import SparseFeatures
from zarrtrace.records import BFloat16, LayerRecord, Nonzeros, TokensRecord, TracePlan
from zarrtrace.store import TraceWriter, chunks, codecs

FEATURES, FEATURE, KEYS = 32_768, 14_826, slice(51, 54)
NAME, SEARCHED = "bench", "searched"


class Case(NamedTuple):
    """The sizes of a trace, and active features a token."""

    tokens: int
    heads: int
    active: int
    layers: int
    limits: Limits = DEFAULT_LIMITS

    def __str__(self) -> str:
        layers = "layer" if self.layers == 1 else "layers"
        return (
            f"{self.tokens:,} tokens, {self.layers} {layers}, {self.heads} heads, "
            f"{self.active:,} active"
        )


# --- values ------------------------------------------------------------------------------------


def features(rng: np.random.Generator, tokens: int, active: int) -> np.ndarray:
    """Return ``(query, feature)`` of which `active` a token are above 0, float32."""
    values = common.features(rng, tokens, FEATURES, active)
    values[:, FEATURE] = 1  # the answer is not empty
    return values


def bfloat16(values: np.ndarray) -> BFloat16:
    """Cut values to bfloat16."""
    return BFloat16(common.bfloat16(values))


def sparse(values: np.ndarray, columns: int) -> SparseFeatures:
    """Return the values that are not 0, as capture returns them."""
    blocks = [values[:, at : at + columns].reshape(-1) for at in range(0, FEATURES, columns)]
    at = tuple(np.flatnonzero(block) for block in blocks)
    found = tuple(block[here] for block, here in zip(blocks, at, strict=True))
    nonzeros = Nonzeros(values.shape, columns, at, found)
    return SparseFeatures(nonzeros, np.ones(len(values), bool))


def records(case: Case) -> list[LayerRecord | TokensRecord]:
    """Return what a capture yields of one prompt."""
    rng = np.random.default_rng(0)
    found: list[LayerRecord | TokensRecord] = []
    for layer in range(case.layers):
        weights = common.attention(rng, case.heads, case.tokens)
        active = np.asarray(bfloat16(features(rng, case.tokens, case.active)))
        record = sparse(active, case.limits.features).record()
        found.append(
            LayerRecord(NAME, layer, 0, bfloat16(weights), weights.mean(0), {"features": record})
        )
    return [*found, common.tokens_record(rng, NAME, case.tokens)]


def plan(case: Case) -> TracePlan:
    """Return the trace before its first layer."""
    return common.trace_plan(
        NAME,
        range(case.layers),
        case.tokens,
        heads=case.heads,
        features=FEATURES,
        limits=case.limits,
    )


# --- writing -----------------------------------------------------------------------------------


def write_trace(folder: Path, case: Case, found: list[LayerRecord | TokensRecord]) -> None:
    """Write the records as a trace."""
    shutil.rmtree(folder / NAME, ignore_errors=True)
    with TraceWriter(folder, plan(case)) as writer:
        for record in found:
            writer.append(record)


def write_searched(folder: Path, case: Case, found: list[LayerRecord | TokensRecord]) -> None:
    """Write the records as a trace of which zstd searches all chunks, as without zstandard."""
    with (
        mock.patch.object(chunks, "sparse_frames", lambda parts, _: [None] * len(parts)),
        mock.patch.object(codecs, "causal_frame", return_value=None),
    ):
        write_trace(folder, case, found)


def write_npz(folder: Path, found: list[LayerRecord | TokensRecord]) -> None:
    """Write the same values as NumPy does."""
    (folder / "npz").mkdir(exist_ok=True)
    for record in found:
        if isinstance(record, LayerRecord):
            np.savez_compressed(
                folder / "npz" / f"layer_{record.layer}.npz",
                attention=np.asarray(record.attention),
                features=np.asarray(record.features["features"].activations),
            )


# --- reading -----------------------------------------------------------------------------------

#: What is asked for: an array, and an index of each of its dimensions.
QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention row, all layers": ("attention", {"query": -1, "key": KEYS}),
    "one feature, all layers": ("features", {"feature": FEATURE}),
    "last token's features, all layers": ("features", {"query": -1}),
    "one layer of features": ("features", {"layer": 1}),
    "one layer of attention": ("attention", {"layer": 1}),
}
DIMS = {"attention": ("layer", "head", "query", "key"), "features": ("layer", "query", "feature")}


def indices(array: str, chosen: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return an index of every dimension of an array."""
    return tuple(chosen.get(dim, slice(None)) for dim in DIMS[array])


class Reader(NamedTuple):
    """How to open a trace, and to answer a question with what was opened."""

    open: Callable[[Path], Any]
    read: Callable[[Any, str, Mapping[str, Any]], np.ndarray]


def _select(dataset: Any, array: str, chosen: Mapping[str, Any]) -> np.ndarray:
    values: np.ndarray = dataset[array].isel(chosen).values
    return values


@contextlib.contextmanager
def zarrs() -> Iterator[None]:
    """Have zarr-python use the codecs of zarrs."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield


def _open_npz(folder: Path) -> list[Path]:
    return [folder / "npz" / f"layer_{n}.npz" for n in range(len(list((folder / "npz").iterdir())))]


def _read_npz(files: list[Path], array: str, chosen: Mapping[str, Any]) -> np.ndarray:
    if "layer" in chosen:
        one: np.ndarray = np.load(files[chosen["layer"]])[array]
        return one
    index = indices(array, chosen)[1:]
    return np.stack([np.load(file)[array][index] for file in files])


def _open_tensorstore(folder: Path) -> dict[str, Any]:
    return {
        name: tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{folder / NAME / name}/"},
            }
        ).result()
        for name in DIMS
    }


def _read_tensorstore(opened: Any, array: str, chosen: Mapping[str, Any]) -> np.ndarray:
    at = {dim: n - 1 if chosen.get(dim) == -1 else None for dim, n in _sizes(opened[array], array)}
    known = {dim: at[dim] if at[dim] is not None else index for dim, index in chosen.items()}
    found: np.ndarray = opened[array][indices(array, known)].read().result()
    return found


def _sizes(opened: Any, array: str) -> list[tuple[str, int]]:
    return list(zip(DIMS[array], opened.shape, strict=True))


def _open_zarrs(folder: Path) -> Any:
    with zarrs():
        return xr.open_zarr(folder / NAME, chunks=None)


def _read_zarrs(dataset: Any, array: str, chosen: Mapping[str, Any]) -> np.ndarray:
    with zarrs():
        return _select(dataset, array, chosen)


NPZ = "NPZ"
READERS: dict[str, Reader] = {
    NPZ: Reader(_open_npz, _read_npz),
    "open_trace": Reader(lambda folder: zt.open_trace(folder / NAME), _select),
    "xarray": Reader(lambda folder: xr.open_zarr(folder / NAME, chunks=None), _select),
    "xarray, zarrs": Reader(_open_zarrs, _read_zarrs),
    "tensorstore": Reader(_open_tensorstore, _read_tensorstore),
}


def medians(acts: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median CPU milliseconds of each, measured in turns."""
    return {name: 1e3 * spent.cpu for name, spent in common.turns(acts, repeats).items()}


class Measured(NamedTuple):
    """CPU milliseconds of readers by question, of opening by reader, of writing; and bytes."""

    reading: dict[str, dict[str, float]]
    opening: dict[str, float]
    writing: dict[str, float]
    size: dict[str, int]


def measure(folder: Path, case: Case, repeats: int) -> Measured:
    """Write both, compare what all readers read, and time them."""
    found = records(case)
    writers = {
        "trace": partial(write_trace, folder, case, found),
        SEARCHED: partial(write_searched, folder / SEARCHED, case, found),
    }
    writing = medians(writers, repeats) | medians({NPZ: partial(write_npz, folder, found)}, 1)
    del found
    size = {
        name: common.size_of(folder / path)
        for name, path in (("trace", NAME), (SEARCHED, f"{SEARCHED}/{NAME}"), (NPZ, "npz"))
    }
    opening = medians({name: partial(one.open, folder) for name, one in READERS.items()}, repeats)
    opened = {name: one.open(folder) for name, one in READERS.items()}
    reading = {}
    for question, (array, chosen) in QUESTIONS.items():
        acts = {
            name: partial(one.read, opened[name], array, chosen) for name, one in READERS.items()
        }
        right = acts[NPZ]()
        for name, act in acts.items():
            np.testing.assert_array_equal(act(), right, err_msg=f"{name}: {question}")
        reading[question] = medians(acts, repeats)
    return Measured(reading, opening, writing, size)


def report(case: Case, found: Measured) -> None:
    """Print the tables of one case; in brackets how many times as fast as NPZ."""
    rows = attention_chunk_rows(case.tokens, case.heads, case.limits)
    print(f"\n{case}; chunks of {rows} rows of attention, ", end="")
    print(f"{case.limits.tokens} tokens × {case.limits.features:,} features\n")
    common.print_head("CPU ms", *READERS)
    for question, times in found.reading.items():
        base = times[NPZ]
        cells = [f"{ms:.1f} ({base / ms:.1f})" for name, ms in times.items() if name != NPZ]
        common.print_row(question, f"{base:.0f}", *cells)
    common.print_row("opening", *(f"{ms:.1f}" for ms in found.opening.values()))
    ours, theirs = found.size["trace"], found.size[NPZ]
    print(
        f"\n{ours / 1e6:.2f} MB, {ours / theirs:.3f} of NPZ's {theirs / 1e6:.2f}; written in ",
        end="",
    )
    print(f"{found.writing['trace']:.0f} CPU ms, NPZ in {found.writing[NPZ]:.0f}", flush=True)
    ratio = found.size[SEARCHED] / ours
    print(f"If zstd searches all chunks: {ratio:.4f} as large, ", end="")
    print(f"written in {found.writing[SEARCHED]:.0f} CPU ms", flush=True)


def main() -> None:
    """Print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[121, 277])
    parser.add_argument("--active", type=int, nargs="+", default=[50])
    parser.add_argument("--heads", type=int, nargs="+", default=[32])
    parser.add_argument("--layers", type=int, help="31 of a short prompt, else 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, default=DEFAULT_LIMITS.queries, help="of a short prompt"
    )
    parser.add_argument("--feature-tokens", type=int, default=DEFAULT_LIMITS.tokens)
    parser.add_argument("--feature-columns", type=int, default=DEFAULT_LIMITS.features)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    limits = replace(
        DEFAULT_LIMITS,
        queries=given.rows,
        tokens=given.feature_tokens,
        features=given.feature_columns,
    )
    results = {}
    for tokens in given.tokens:
        for heads in given.heads:
            for active in given.active:
                layers = given.layers or (31 if tokens <= 600 else 2)
                case = Case(tokens, heads, active, layers, limits)
                with tempfile.TemporaryDirectory() as work:
                    found = measure(Path(work), case, given.repeats)
                report(case, found)
                results[str(case)] = found._asdict()
    common.save(given.json, results)


if __name__ == "__main__":
    main()
