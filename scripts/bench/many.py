"""Compare many scenarios with few: seconds and memory of a run must not grow with its scenarios.

The `proxy` model (see ``proxy.py``) with the prompts of the ten scenarios under other names.
Memory is what the process holds beyond the model, at its highest. What a run costs whatever its
size (reading SAEs, above all) is taken off in the last row: ``(many - few) / (300 - 10)``.

    python scripts/bench/many.py [--counts 10 300] [--layers 4] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import common

#: The encoder of one of proxy's SAEs with biases and thresholds, float32: part of any run's memory.
SAE_BYTES = 4 * 32_768 * (256 + 2)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs=2, default=[10, 300])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        import extract

        extract.LAYERS = tuple(range(1, given.layers + 1))
        folder, count = given.one
        print(json.dumps(extract.zarrtrace_way(Path(folder), int(count), features=True)))
        return
    from proxy import build

    folder = Path(tempfile.mkdtemp(prefix="zarrtrace-many-"))
    try:
        build(folder, 50)
        found: dict[int, list[dict[str, float]]] = {count: [] for count in given.counts}
        for _ in range(given.repeats):
            for count, runs in found.items():
                runs.append(
                    common.in_process(__file__, "--one", folder, count, "--layers", given.layers)
                )
                print(f"{count}: {runs[-1]}", file=sys.stderr, flush=True)
        shown = {count: common.medians(runs) for count, runs in found.items()}
        few, many = given.counts
        print(f"layers 1-{given.layers}, medians of {given.repeats}\n")
        common.print_head("scenarios", "ms a scenario", "CPU ms", "MB beyond model and one SAE")
        for count, row in shown.items():
            wall, cpu = (row[key] / count * 1e3 for key in ("seconds", "cpu_seconds"))
            print(f"| {count} | {wall:.0f} | {cpu:.0f} | {(row['peak'] - SAE_BYTES) / 1e6:.0f} |")
        more = [
            (shown[many][key] - shown[few][key]) / (many - few) * 1e3
            for key in ("seconds", "cpu_seconds")
        ]
        print(f"| each beyond {few} | {more[0]:.0f} | {more[1]:.0f} | |")
        common.save(given.json, found)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
