"""Measure every analysis over a run of many scenarios of real shape: time, cores, memory.

31 layers x 32 heads x 121 tokens and 32,768 features, synthetic values. Eight traces are stored
and linked under many names, so that disk space does not limit the number of scenarios; dask sees
them as different and reads each anew. Each analysis runs in a process of its own.

    python scripts/bench_analysis.py [--scenarios 200] [--only attention_to contrast]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from zarrtrace import analysis
from zarrtrace.spec import (
    NAMESPACE,
    FeatureRecord,
    LayerRecord,
    OptionAttributes,
    SpanAttributes,
    Tokens,
    TokensRecord,
    TraceAttributes,
    TraceShape,
)
from zarrtrace.store import TraceWriter, open_trace

LAYERS, HEADS, TOKENS, FEATURES, ACTIVE = tuple(range(1, 32)), 32, 121, 32_768, 50
STORED = 8
SPANS = {"probability": [82], "goal": [76, 77, 78], "balance": [51, 52], "decision": [120]}

ANALYSES: dict[str, Callable[[Any, Any], Any]] = {
    "attention_to": lambda a, run: a.attention_to(run),
    "attention_to, each head": lambda a, run: a.attention_to(run, heads="each"),
    "attention_locality": lambda a, run: a.attention_locality(run),
    "head_roles": lambda a, run: a.head_roles(run),
    "attention_rollout": lambda a, run: a.attention_rollout(run),
    "layer_bands": lambda a, run: a.layer_bands(run),
    "critical_layers": lambda a, run: a.critical_layers(run),
    "feature_trajectory": lambda a, run: a.feature_trajectory(run, [14_826, 7]),
    "pathway_features": lambda a, run: a.pathway_features(run, "balance"),
    "position_specific_features": lambda a, run: a.position_specific_features(run),
    "word_associations": lambda a, run: a.word_associations(run),
    "contrast, features": lambda a, run: a.contrast(run, "risky", "safe"),
    "contrast, attention": lambda a, run: a.contrast(run, "risky", "safe", what="attention"),
    "decision": lambda a, run: a.decision(run),
}


def make_run(folder: Path, scenarios: int) -> None:
    """Store a few traces and link them under many names."""
    rng = np.random.default_rng(0)
    shape = TraceShape(
        layers=len(LAYERS), tokens=TOKENS, heads=HEADS, features={"features": FEATURES}
    )
    for number in range(STORED):
        attributes = TraceAttributes(
            scenario=f"stored{number}",
            prompt=None,
            tags=("risky" if number % 2 else "safe",),
            spans={k: SpanAttributes(characters=(), tokens=tuple(v)) for k, v in SPANS.items()},
            options={"bet": OptionAttributes(text="1", token_id=3)},
            model=None,
            layers=LAYERS,
            attention_dtype="float32",
            feature_dtype="float32",
            versions={},
        )
        words = [f" word{i % 40}" for i in range(TOKENS)]
        tokens = Tokens(ids=list(range(TOKENS)), texts=words)
        with TraceWriter(folder / f"stored{number}", attributes, shape, tokens) as writer:
            for layer in LAYERS:
                scores = rng.normal(0, 2, (HEADS, TOKENS, TOKENS)).astype(np.float32)
                scores[:, np.triu(np.ones((TOKENS, TOKENS), bool), 1)] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                values = np.zeros((TOKENS, FEATURES), np.float32)
                at = rng.integers(0, FEATURES, (TOKENS, ACTIVE))
                drawn = rng.exponential(2, at.shape).astype(np.float32)
                np.put_along_axis(values, at, drawn, axis=1)
                top = np.argsort(-values, axis=1)[:, :32]
                record = FeatureRecord(
                    activations=values,
                    top_feature=top.astype(np.uint32),
                    top_activation=np.take_along_axis(values, top, axis=1),
                )
                writer.append(
                    LayerRecord(
                        scenario=attributes.scenario,
                        layer=layer,
                        attention=weights,
                        attention_mean=weights.mean(0),
                        features={"features": record},
                    )
                )
            ids = np.tile(np.arange(10, dtype=np.uint32), (TOKENS, 1))
            logprobs = -np.sort(rng.exponential(3, (TOKENS, 10))).astype(np.float32)
            writer.append(TokensRecord(attributes.scenario, ids, logprobs))
    for number in range(scenarios):
        (folder / f"S{number}").symlink_to(folder / f"stored{number % STORED}")


def measure(folder: Path, name: str, scenarios: int) -> dict[str, float]:
    """Run one analysis in this process."""
    traces = {}
    for number in range(scenarios):
        ds = open_trace(folder / f"S{number}", chunks="auto")
        said = {**ds.attrs[NAMESPACE], "scenario": f"S{number}"}
        traces[f"S{number}"] = ds.assign_attrs({NAMESPACE: said})
    root = xr.Dataset(attrs={NAMESPACE: {"kind": "run", "scenarios": list(traces)}})
    run = xr.DataTree.from_dict({"/": root, **traces})
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    ANALYSES[name](analysis, run).compute()
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "peak": after.ru_maxrss / 1024}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=list(ANALYSES), default=list(ANALYSES))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        folder, name = given.measure
        print(json.dumps(measure(Path(folder), name, given.scenarios)))
        return
    folder = Path(tempfile.mkdtemp(prefix="zarrtrace-bench-"))
    try:
        make_run(folder, given.scenarios)
        print(f"{given.scenarios} scenarios\n\n| analysis | s | CPU s / s | peak MB |")
        print("|---|---|---|---|")
        for name in given.only:
            command = [sys.executable, __file__, "--scenarios", str(given.scenarios)]
            done = subprocess.run(
                [*command, "--measure", str(folder), name],
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            cores = found["cpu"] / found["wall"]
            print(f"| {name} | {found['wall']:.1f} | {cores:.2f} | {found['peak']:.0f} |")
            sys.stdout.flush()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
