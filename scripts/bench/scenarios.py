"""Read 1,000 and 100,000 scenarios as a stream: CPU time and memory, source by source.

Each scenario is a prompt of 180 to 330 characters with a name, a tag, a span and ten columns of
metadata. Every measurement runs in a process of its own, which goes through the stream twice: the
first pass checks all scenarios and finds the types of columns, the next one yields them. Memory is
the highest resident size of the process beyond that of one scenario of the same source, libraries
loaded.

    python scripts/bench/scenarios.py [--counts 1000 100000] [--sources jsonl csv …]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

SOURCES = ("jsonl", "csv", "parquet", "dataset", "list")
_WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be")


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield scenarios as flat rows, the same ones for every source."""
    rng = np.random.default_rng(3)
    for number in range(count):
        words = " ".join(rng.choice(_WORDS, int(rng.integers(50, 90))))
        balance = float(rng.integers(0, 300))
        yield {
            "name": f"game_{number:06}",
            "prompt": f"You hold ${balance:g}. {words}",
            "tags": '["risky"]',
            "spans": json.dumps({"balance": [9, 9 + len(f"{balance:g}")]}),
            "game": f"g{number // 40}",
            "round": number % 40,
            "outcome": ("win", "loss")[number % 2],
            "bet_type": "variable",
            "constraint": int(rng.integers(10, 70)),
            "condition": f"GM{number % 16}",
            "balance": balance if number % 5 else None,
            "is_last": number % 40 == 39,
            "share": float(rng.random()),
            "paradigm": "slot",
        }


def nested(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as an entry of a JSONL file."""
    fields = ("name", "prompt")
    return {
        **{name: row[name] for name in fields},
        "tags": json.loads(row["tags"]),
        "spans": json.loads(row["spans"]),
        "metadata": {k: v for k, v in row.items() if k not in (*fields, "tags", "spans")},
    }


def write(folder: Path, source: str, count: int) -> Path:
    """Write a source of scenarios."""
    path = folder / f"{count}.{source}"
    if source == "jsonl":
        with path.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(nested(row)) + "\n" for row in rows(count))
    elif source == "csv":
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(next(rows(1))))
            writer.writeheader()
            writer.writerows(rows(count))
    elif source == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows(count))), path)
    elif source == "dataset":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(list(rows(count))).save_to_disk(path)
    return path


def measure(path: Path, count: int) -> dict[str, float]:
    """Go through a source twice, in this process."""
    from zarrtrace.scenarios import stream

    source: Any = path
    if path.suffix == ".list":
        source = [nested(row) for row in rows(count)]
    begin = time.process_time()
    suite = stream(source)
    if len(suite) != count:
        raise SystemExit(f"{len(suite)} scenarios instead of {count}")
    first = time.process_time() - begin
    begin = time.process_time()
    if sum(len(scenario.metadata) for scenario in suite) != 10 * count:
        raise SystemExit("columns are missing")
    again = time.process_time() - begin
    return {"first": first / count, "again": again / count, "peak": common.peak_bytes()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        path, count = given.one
        print(json.dumps(measure(Path(path), int(count))))
        return
    common.print_head(
        "source", "scenarios", "CPU µs each, first pass", "next pass", "MB beyond one scenario"
    )
    with tempfile.TemporaryDirectory() as folder:
        for source, count in itertools.product(given.sources, given.counts):
            least = common.in_process(__file__, "--one", write(Path(folder), source, 1), 1)["peak"]
            found = common.in_process(__file__, "--one", write(Path(folder), source, count), count)
            print(
                f"| {source} | {count:,} | {1e6 * found['first']:.0f} | "
                f"{1e6 * found['again']:.0f} | {(found['peak'] - least) / 1e6:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
