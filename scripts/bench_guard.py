"""Fail if a ratio to the old way has halved: a minute, on a small configuration.

Ratios, not times: both sides run in this process, in turns. Bounds are a good half
below what a busy two-core machine shows, so that noise passes and a large loss does not.

    python scripts/bench_guard.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import bench_npz
import bench_read
import numpy as np

LAYERS, REPEATS = 8, 5

#: What has to be how many times faster than NPZ files.
BOUNDS = {
    "attention[:, :, -1, balance], all layers": 2.5,
    "one feature, all layers and tokens": 12.0,
    "last token, all features, all layers": 6.0,
    "one whole layer, features and attention": 1.1,
    "NPZ export": 1.4,
}


def ratios() -> dict[str, float]:
    """Measure all ratios."""
    with tempfile.TemporaryDirectory() as work:
        bench_read.build(Path(work), 121, LAYERS)
        read = bench_read.measure(Path(work), 121, LAYERS, REPEATS)
    found = {name: row["npz"] / row["zarrtrace"] for name, row in read.items()}
    rng = np.random.default_rng(0)
    layers = [bench_npz.CASES["both, bfloat16 values"](rng) for _ in range(LAYERS)]
    with tempfile.TemporaryDirectory() as work:
        found["NPZ export"] = bench_npz.measure(Path(work), layers, REPEATS)["times_faster"]
    return found


def main() -> None:
    """Compare with the bounds."""
    slow = []
    for name, ratio in ratios().items():
        print(f"{name}: {ratio:.1f} times faster, at least {BOUNDS[name]} wanted")
        if ratio < BOUNDS[name]:
            slow.append(name)
    if slow:
        sys.exit(f"slower than they were: {'; '.join(slow)}")


if __name__ == "__main__":
    main()
