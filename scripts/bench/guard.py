"""Fail if a ratio to the old way has halved: a minute, on a small configuration.

Ratios of CPU time, and of size: both sides run in this process, in turns. Bounds are about half
of what a busy two-core machine shows, so that noise passes and a large loss does not.

    python scripts/bench/guard.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import npz
import numpy as np
import read

CASE, REPEATS = read.Case(tokens=121, heads=32, active=50, layers=8), 5

#: What has to be how many times as fast as NPZ files, by reader, in the order of the questions.
READING = {
    "open_trace": (5.0, 30.0, 12.0, 1.5, 0.9),
    "xarray": (2.5, 10.0, 2.5, 0.7, 0.3),
    "xarray, zarrs": (4.0, 25.0, 10.0, 1.5, 0.5),
    "tensorstore": (6.0, 40.0, 15.0, 2.0, 0.8),
}
#: The same of writing; how much smaller a trace is than the NPZ files; NPZ export.
WRITING, SIZE, EXPORT = 9.0, 1.1, 1.4


def ratios() -> dict[str, tuple[float, float]]:
    """Measure all ratios, each with its bound."""
    with tempfile.TemporaryDirectory() as work:
        found = read.measure(Path(work), CASE, REPEATS)
    out = {}
    for reader, bounds in READING.items():
        for bound, (question, times) in zip(bounds, found.reading.items(), strict=True):
            out[f"{reader}: {question}"] = times[read.NPZ] / times[reader], bound
    for name, measured, bound in (
        ("writing", found.writing, WRITING),
        ("size", found.size, SIZE),
    ):
        out[name] = measured[read.NPZ] / measured["trace"], bound
    rng = np.random.default_rng(0)
    layers = [npz.CASES["both, bfloat16 values"](rng) for _ in range(CASE.layers)]
    with tempfile.TemporaryDirectory() as work:
        out["NPZ export"] = npz.measure(Path(work), layers, REPEATS)["times_faster"], EXPORT
    return out


def main() -> None:
    """Compare with the bounds."""
    low = []
    for name, (ratio, bound) in ratios().items():
        print(f"{name}: NPZ takes {ratio:.1f} times as much, at least {bound} wanted")
        if ratio < bound:
            low.append(name)
    if low:
        sys.exit(f"worse than they were: {'; '.join(low)}")


if __name__ == "__main__":
    main()
