#!/usr/bin/env python
"""Time a probe of one layer: samples × channels in memory, a number in groups of ten.

scripts/bench/probe.py                          # 10,000 samples, 4,096 channels
scripts/bench/probe.py --samples 1000 --permutations 999
"""

from __future__ import annotations

import argparse

import common
import numpy as np
import xarray as xr

from zarrtrace import analysis


def main() -> None:
    """Draw samples of which one channel says half, and print the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--permutations", type=int, default=99)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, given.samples, given.channels), dtype=np.float32)
    number = np.arange(given.samples)
    columns = {
        "scenario": np.array([f"s{n}" for n in number], object),
        "position": number * 0,
        "span": np.array(["decision"] * given.samples, object),
        "group": number // 10,
        "y": x[0, :, 0] + rng.standard_normal(given.samples),
    }
    samples = xr.Dataset(
        {"residual": (("layer", "sample", "channel"), x)},
        {"layer": [0], **{name: ("sample", one) for name, one in columns.items()}},
        {"kind": "table", "metadata": ["group", "y"]},
    )
    results: list[xr.Dataset] = []

    def probe() -> None:
        asked = {"groups": "group", "n_permutations": given.permutations}
        results.append(analysis.probe(samples, "y", **asked))

    wall, cpu = common.timed(probe)
    (found,) = results
    peak = common.peak_bytes() / 1e9
    sizes = f"{given.samples:,} samples × {given.channels:,} channels"
    print(f"{sizes}, {given.permutations} permutations: {wall:.0f} s, {cpu:.0f} s of CPU time")
    print(f"{peak:.1f} GB of memory at most; {found.attrs['findings']}")


if __name__ == "__main__":
    main()
