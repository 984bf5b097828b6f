#!/usr/bin/env python
"""Measure how often each analysis finds something where there is nothing, and where there is.

Prints a table in Markdown: what was drawn, the promised rate, and the measured one with its
binomial 95 % interval. The experiments are those of ``tests/null_*.py``.

    scripts/error_rates.py                  # 1,000 draws of each
    scripts/error_rates.py contrast --draws 200
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))


def main() -> int:
    """Run the chosen experiments; the exit status is 1 if a promise does not hold."""
    from rates import holds, of_hits  # type: ignore[import-not-found]

    modules = sorted(path.stem for path in TESTS.glob("null_*.py"))
    names = [name.removeprefix("null_") for name in modules]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    if set(given.names) - set(names):
        parser.error(f"choose from {', '.join(names)}")
    broken = False
    print("| analysis | data | promised | measured |\n|---|---|---|---|")
    with ProcessPoolExecutor(given.processes) as pool:
        for module in (f"null_{name}" for name in given.names or names):
            for number, experiment in enumerate(importlib.import_module(module).EXPERIMENTS):
                jobs = [(module, number, seed) for seed in range(given.draws)]
                hits = sum(pool.map(_draw, jobs, chunksize=max(1, given.draws // 50)))
                found = of_hits(hits, given.draws)
                broken |= not holds(experiment, found)
                promised = "≥ 0.8" if experiment.nominal is None else f"≤ {experiment.nominal:g}"
                print(
                    f"| {experiment.name} | {experiment.data} | {promised} | {found} |",
                    flush=True,
                )
    return int(broken)


def _draw(job: tuple[str, int, int]) -> bool:
    module, number, seed = job
    return bool(importlib.import_module(module).EXPERIMENTS[number].draw(seed))


if __name__ == "__main__":
    sys.exit(main())
