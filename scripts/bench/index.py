"""Time the index of a run of many scenarios: building it, adding to it, and looking features up.

The scenarios are synthetic and small (64 tokens, 4 layers, 4,096 features at 50 active a token),
but each is a whole trace with all its arrays, so that what grows with their number is there.

    python scripts/bench/index.py [--scenarios 1000] [--keep FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from zarrtrace.format.attributes import SpanAttributes, TraceAttributes
from zarrtrace.format.layout import TraceShape
from zarrtrace.index import build_index, find_feature
from zarrtrace.records import FeatureRecord, LayerRecord, Tokens, TokensRecord, TracePlan
from zarrtrace.store import RunWriter

LAYERS, HEADS, TOKENS, FEATURES, ACTIVE = (1, 2, 3, 4), 4, 64, 4096, 50


def write_run(path: Path, names: list[str], complete: int) -> None:
    """Write a run of synthetic scenarios, or go on with it: the first `complete` of them."""
    with RunWriter(path, names, {"model": "synthetic"}) as run:
        for number, name in enumerate(names[:complete]):
            if (path / name).exists():
                continue
            _write_trace(run, name, number)
        if complete == len(names):
            run.finish()


def _write_trace(run: RunWriter, name: str, number: int) -> None:
    rng = np.random.default_rng(number)
    attributes = TraceAttributes(
        scenario=name,
        prompt=None,
        tags=("risky",) if number % 2 else ("safe",),
        spans={
            "balance": SpanAttributes(characters=(), tokens=(20, 21)),
            "decision": SpanAttributes(characters=(), tokens=(TOKENS - 1,)),
        },
        model=None,
        layers=LAYERS,
        attention_dtype="float32",
        feature_dtype="float32",
        versions={},
    )
    shape = TraceShape(
        layers=len(LAYERS), tokens=TOKENS, heads=HEADS, features={"features": FEATURES}
    )
    ids = rng.integers(0, 1000, TOKENS).tolist()
    tokens = Tokens(ids, [f" w{at}" for at in ids])
    with run.trace(TracePlan(attributes, shape, tokens)) as trace:
        for layer in LAYERS:
            trace.append(_layer(rng, name, layer))
        trace.append(
            TokensRecord(
                scenario=name,
                next_token=rng.integers(0, 1000, (TOKENS, 10), dtype=np.uint32),
                next_token_logprob=-np.sort(rng.exponential(3, (TOKENS, 10))).astype(np.float32),
                next_token_text=np.full((TOKENS, 10), " word", object),
            )
        )


def _layer(rng: np.random.Generator, name: str, layer: int) -> LayerRecord:
    scores = rng.normal(0, 2, (HEADS, TOKENS, TOKENS)).astype(np.float32)
    weights = np.exp(scores) * np.tri(TOKENS, dtype=np.float32)
    weights /= weights.sum(-1, keepdims=True)
    activations = np.zeros((TOKENS, FEATURES), np.float32)
    top = rng.permuted(np.tile(np.arange(FEATURES), (TOKENS, 1)), axis=1)[:, :ACTIVE]
    values = -np.sort(-rng.gamma(2.0, size=top.shape).astype(np.float32), axis=1)
    np.put_along_axis(activations, top, values, axis=1)
    record = FeatureRecord(activations, top[:, :32].astype(np.uint32), values[:, :32])
    return LayerRecord(name, layer, 0, weights, weights.mean(0), {"features": record})


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="Folder for the run; kept.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    names = [f"S{number:05d}" for number in range(given.scenarios)]
    with tempfile.TemporaryDirectory() as work:
        found = measure((given.keep or Path(work)) / "run", names)
    for name, value in found.items():
        print(f"{name:42s} {value:10.3f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


def measure(run: Path, names: list[str]) -> dict[str, float]:
    """Return seconds, milliseconds and megabytes by name."""
    found: dict[str, float] = {}

    def timed(name: str, start: float, scale: float = 1) -> None:
        found[name] = (time.perf_counter() - start) * scale

    most = len(names) - max(1, len(names) // 10)
    start = time.perf_counter()
    write_run(run, names, most)
    timed("writing nine tenths of the run, s", start)
    start = time.perf_counter()
    build_index(run, rebuild=True)
    timed("index of nine tenths, s", start)
    write_run(run, names, len(names))
    start = time.perf_counter()
    build_index(run)
    timed("adding the last tenth, s", start)
    start = time.perf_counter()
    build_index(run)
    timed("nothing to add, s", start)
    rng = np.random.default_rng(0)
    for what, top in (("1 token", 1), ("20 tokens", 20)):
        times = []
        for feature in rng.integers(0, FEATURES, 50).tolist():
            start = time.perf_counter()
            find_feature(run, 3, feature, top=top)
            times.append((time.perf_counter() - start) * 1e3)
        found[f"find_feature, {what}, ms (median of 50)"] = statistics.median(times)
    times = []
    command = [
        sys.executable,
        "-m",
        "zarrtrace",
        "find",
        str(run),
        "--layer",
        "3",
        "--feature",
        "7",
    ]
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    found["zarrtrace find, the whole command, s"] = statistics.median(times)
    size = sum(file.stat().st_size for file in (run / "index").rglob("*") if file.is_file())
    found["index on disk, MB"] = size / 1e6
    found["peak memory of this process, MiB"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    return found


if __name__ == "__main__":
    main()
