"""Time the index of a run of many scenarios: building it, adding to it, and looking features up.

The scenarios are synthetic and small (64 tokens, 4 layers, 4,096 features at 50 active a token),
but each is a whole trace with all its arrays, so that what grows with their number is there.

    python scripts/bench/index.py [--scenarios 1000] [--keep FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import common
import numpy as np

from zarrtrace.index import build_index, find_feature
from zarrtrace.records import TracePlan
from zarrtrace.store import RunWriter

LAYERS, HEADS, TOKENS, FEATURES, ACTIVE = (1, 2, 3, 4), 4, 64, 4096, 50


def write_run(path: Path, names: list[str], complete: int) -> None:
    """Write the first `complete` scenarios of a synthetic run, or those that are missing."""
    with RunWriter(path, names, {"model": "synthetic"}) as run:
        for number, name in enumerate(names[:complete]):
            if not (path / name).exists():
                common.write_trace(run, _plan(name, number), number, ACTIVE)
        if complete == len(names):
            run.finish()


def _plan(name: str, number: int) -> TracePlan:
    return common.trace_plan(
        name,
        LAYERS,
        TOKENS,
        heads=HEADS,
        features=FEATURES,
        spans={"balance": (20, 21)},
        tags=("risky",) if number % 2 else ("safe",),
    )


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
    common.save(given.json, found)


def measure(run: Path, names: list[str]) -> dict[str, float]:
    """Return seconds, milliseconds and megabytes by name."""
    found: dict[str, float] = {}

    most = len(names) - max(1, len(names) // 10)
    for name, act in (
        ("writing nine tenths of the run, s", lambda: write_run(run, names, most)),
        ("index of nine tenths, s", lambda: build_index(run, rebuild=True)),
        ("writing the last tenth, s", lambda: write_run(run, names, len(names))),
        ("adding the last tenth, s", lambda: build_index(run)),
        ("nothing to add, s", lambda: build_index(run)),
    ):
        found[name] = common.timed(act).wall
    rng = np.random.default_rng(0)
    for what, top in (("1 token", 1), ("20 tokens", 20)):
        times = [
            common.timed(partial(find_feature, run, 3, feature, top=top)).wall * 1e3
            for feature in rng.integers(0, FEATURES, 50).tolist()
        ]
        found[f"find_feature, {what}, ms (median of 50)"] = statistics.median(times)
    command = [sys.executable, "-m", "zarrtrace", "find", str(run), "--layer", "3"]
    command += ["--feature", "7"]
    times = [
        common.timed(partial(subprocess.run, command, check=True, capture_output=True)).wall
        for _ in range(3)
    ]
    found["zarrtrace find, the whole command, s"] = statistics.median(times)
    found["index on disk, MB"] = common.size_of(run / "index") / 1e6
    found["peak memory of this process, MiB"] = common.peak_bytes() / 2**20
    return found


if __name__ == "__main__":
    main()
