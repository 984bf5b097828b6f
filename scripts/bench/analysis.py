"""Measure every analysis over a run of many scenarios of real shape: time, cores, memory.

31 layers x 32 heads x 121 tokens and 32,768 features at 50 active a token, synthetic values. Eight
traces are written and copied under other names until the run has as many as it should (29 MB each),
then each analysis runs in a process of its own, from the closed run to its result in memory, as
``zarrtrace analyze`` does. Peak memory is that of the largest process, Python and its libraries
included; CPU time is that of all. With ``--workers`` each runs on a local cluster of processes.

    python scripts/bench/analysis.py [--scenarios 200] [--only attention_to contrast] [--run FOLDER]
                                     [--workers 2] [--chunks auto]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import dask
import numpy as np
import pandas as pd

import zarrtrace as zt
from zarrtrace import analysis
from zarrtrace.cli.shared import computing
from zarrtrace.format.attributes import OptionAttributes
from zarrtrace.format.layout import NEXT_TOKENS
from zarrtrace.records import TracePlan
from zarrtrace.store import RunWriter, read_trace
from zarrtrace.store.seal import sealed_group

LAYERS, HEADS, TOKENS, FEATURES, ACTIVE = tuple(range(1, 32)), 32, 121, 32_768, 50
STORED = 8
BANDS = {"local": (1, 10), "task": (11, 20), "decision": (21, 31)}
SPANS = {"probability": [82], "goal": [76, 77, 78], "balance": [51, 52]}

ANALYSES: dict[str, Callable[[Any], Any]] = {
    "attention_to": analysis.attention_to,
    "attention_to, each head": lambda run: analysis.attention_to(run, heads="each"),
    "attention_locality": lambda run: analysis.attention_locality(run, heads="mean"),
    "attention_locality, each head": analysis.attention_locality,
    "head_roles": analysis.head_roles,
    "attention_rollout": analysis.attention_rollout,
    "attention_flow": lambda run: analysis.attention_flow(run, "balance"),
    "layer_bands": lambda run: analysis.layer_bands(run, BANDS),
    "critical_layers": analysis.critical_layers,
    "feature_trajectory": lambda run: analysis.feature_trajectory(run, [(14, 14_826), (25, 7)]),
    "pathway_features": lambda run: analysis.pathway_features(run, "balance"),
    "position_specific_features": analysis.position_specific_features,
    "word_associations": analysis.word_associations,
    "crossreference": lambda run: analysis.crossreference(run, _table(), {"balance": "balance"}),
    "contrast, features": lambda run: analysis.contrast(run, "risky", "safe"),
    "contrast, attention": lambda run: analysis.contrast(run, "risky", "safe", what="attention"),
    "decision": analysis.decision,
    "relate": lambda run: analysis.relate(
        analysis.decision(run)["entropy"], analysis.attention_to(run, "balance")
    ),
}


def _table() -> pd.DataFrame:
    """Words of 2,000 features of every layer."""
    features = np.arange(0, FEATURES, FEATURES // 2000)
    layers = np.repeat(LAYERS, len(features))
    words = np.where(np.arange(len(layers)) % 20 == 0, "balance", "other")
    columns = {"layer": layers, "feature": np.tile(features, len(LAYERS)), "word": words}
    return pd.DataFrame({**columns, "score": 1.0})


def make_run(path: Path, scenarios: int) -> None:
    """Write some traces, copy them under other names, and finish the run."""
    names = [f"S{number:03d}" for number in range(scenarios)]
    # The options are among the most likely tokens.
    likely = np.tile(np.arange(NEXT_TOKENS, dtype=np.uint32), (TOKENS, 1))
    with RunWriter(path, names, {"model": "synthetic"}) as run:
        for number, name in enumerate(names[:STORED]):
            common.write_trace(run, _plan(name, number), number, ACTIVE, likely)
        for number, name in enumerate(names[STORED:]):
            if not (path / name).exists():
                _copy_trace(path / names[number % STORED], path / name)
        run.finish()


def _plan(name: str, number: int) -> TracePlan:
    return common.trace_plan(
        name,
        LAYERS,
        TOKENS,
        heads=HEADS,
        features=FEATURES,
        spans=SPANS,
        words=40,
        tags=("risky" if number % 2 else "safe",),
        options={"bet": OptionAttributes(text="1", token_id=3)},
    )


def _copy_trace(source: Path, target: Path) -> None:
    """Copy a trace under another name, and write its sealed metadata for that name."""
    trace = read_trace(source)
    shutil.copytree(source, target)
    attributes = trace.attributes.model_copy(update={"scenario": target.name})
    (target / "zarr.json").write_bytes(sealed_group(attributes, trace.nodes))


def measure(path: Path, name: str, workers: int | None, chunks: str) -> dict[str, float]:
    """Run one analysis in this process; its CPU time and memory are also those of its workers."""
    found: dict[str, float] = {}
    results: list[Any] = []

    def analyse() -> None:
        with computing(threads=None, workers=workers, scheduler=None, progress=False):
            run = zt.open_run(path, chunks="auto" if chunks == "auto" else None)
            start = time.perf_counter()
            results.append(ANALYSES[name](run))
            found["graph"] = time.perf_counter() - start
            results[0].compute()

    spent = common.timed(analyse, common.cpu_with_children)
    both = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(one.ru_maxrss for one in both) / 1024
    return {**found, "wall": spent.wall, "cpu": spent.cpu, "peak": peak, "tasks": tasks(results[0])}


def tasks(result: Any) -> int:
    """Return the number of tasks that are left after dask's optimisation; 0 if none are lazy."""
    if result.__dask_graph__() is None:
        return 0
    (small,) = dask.optimize(result)
    return len(dict(small.__dask_graph__()))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=200)
    parser.add_argument("--only", nargs="*", choices=list(ANALYSES), default=list(ANALYSES))
    parser.add_argument("--run", type=Path, help="Folder of the run; kept, and resumed.")
    parser.add_argument("--workers", type=int, help="Processes, instead of threads.")
    parser.add_argument("--chunks", choices=["none", "auto"], default="none", help="Of dask.")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        run, name = given.measure
        print(json.dumps(measure(Path(run), name, given.workers, given.chunks)))
        return
    with tempfile.TemporaryDirectory(prefix="zarrtrace-bench-") as scratch:
        path = given.run or Path(scratch) / "run"
        if not path.exists() or len(list(path.glob("S*"))) < given.scenarios:
            make_run(path, given.scenarios)
        print(f"{given.scenarios} scenarios\n")
        common.print_head("analysis", "tasks", "graph s", "s", "CPU s / s", "peak MB")
        how = ["--chunks", given.chunks]
        how += ["--workers", str(given.workers)] if given.workers else []
        for name in given.only:
            found = common.in_process(__file__, "--measure", path, name, *how)
            cores = found["cpu"] / found["wall"]
            common.print_row(
                name,
                f"{found['tasks']:.0f}",
                f"{found['graph']:.1f}",
                f"{found['wall']:.1f}",
                f"{cores:.2f}",
                f"{found['peak']:.0f}",
            )


if __name__ == "__main__":
    main()
