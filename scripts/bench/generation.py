"""Compare repeats that the model continues with as many prompts of the same length.

The demo's ten scenarios, each continued 20 times by one token at temperature 1, against 200
prompts that consist of a scenario and its most likely next token: the same tokens are captured, and
the difference is what generating costs. Each way runs in a process of its own, in turn, which also
imports torch and loads the model.

    python scripts/bench/generation.py [--repeats 3] [--samples 20] [--tokens 1] [--features]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

WAYS = ("continued", "prompts")


def one_way(way: str, given: argparse.Namespace) -> dict[str, float]:
    """Extract one run and measure it; imports, and loading the model, are part of it."""
    import zarrtrace as zt
    from zarrtrace import capture, demo
    from zarrtrace.scenarios import Scenario, load_suite

    suite = list(load_suite(demo.suite_path()))
    options: dict[str, Any] = {"model": "demo", "features": given.features, "quiet": True}
    if way == "continued":
        options |= {"generate": given.tokens, "temperature": 1.0, "samples": given.samples}
    else:
        suite = [
            Scenario(one.prompt + "1" * given.tokens, name=f"{one.name}_{repeat}", marks=False)
            for one in suite
            for repeat in range(given.samples)
        ]
    inside, original = [0.0], capture.generate

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments)
        finally:
            inside[0] += time.perf_counter() - start

    vars(capture)["generate"] = timed
    with tempfile.TemporaryDirectory(prefix="zarrtrace-generation-") as folder:
        start, cpu = time.perf_counter(), sum(os.times()[:4])
        run = zt.extract(Path(folder) / "run", suite, **options)
        took, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
        tokens = sum(trace.sizes["key"] for trace in run.children.values())
        run.close()
    return {"seconds": took, "cpu_seconds": cpu, "generate": inside[0], "tokens": float(tokens)}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=20, help="continuations of a scenario")
    parser.add_argument("--tokens", type=int, default=1, help="tokens of a continuation, at most")
    parser.add_argument("--features", action="store_true", help="store the demo's SAE features")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(one_way(given.way, given)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(given.repeats):
        for way, runs in found.items():
            runs.append(common.in_process(*sys.argv, "--way", way))
            print(f"{way}: {runs[-1]}", file=sys.stderr, flush=True)
    print_table(found, given)
    common.save(given.json, found)


def print_table(found: dict[str, list[dict[str, float]]], given: argparse.Namespace) -> None:
    """Print medians, and the ratios of runs that followed each other."""
    labels = {
        "continued": f"10 scenarios x {given.samples}, continued",
        "prompts": f"{10 * given.samples} prompts",
    }
    common.print_head("", "tokens", "s", "CPU s", "share of the time in generate")
    for way, runs in found.items():
        seconds, cpu, tokens = (
            statistics.median(run[key] for run in runs)
            for key in ("seconds", "cpu_seconds", "tokens")
        )
        share = statistics.median(run["generate"] / run["seconds"] for run in runs)
        print(f"| {labels[way]} | {tokens:.0f} | {seconds:.1f} | {cpu:.1f} | {share:.0%} |")
    pairs = list(zip(*found.values(), strict=True))
    wall, cpu = (
        statistics.median(one[key] / other[key] for one, other in pairs)
        for key in ("seconds", "cpu_seconds")
    )
    print(f"| ratio | | {wall:.2f} | {cpu:.2f} | |")


if __name__ == "__main__":
    main()
