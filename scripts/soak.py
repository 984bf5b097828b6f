"""Extract thousands of small scenarios in one process, and watch what a long run would lose.

All scenarios go through one layer, then through the next: a row of the table is one layer of all
of them. It prints memory, open file handles and time a scenario, and fails if memory, handles or
CPU time grow between the second layer (the first warms up) and the last: seconds of the clock are
also those of whatever else the machine does, and the last layer also completes the traces.

    python scripts/soak.py [--scenarios 2000] [--minutes 20] [--layers 1-6]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As zarrtrace itself sets them, before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from zarrtrace.cli.option_types import Layers
from zarrtrace.extraction import Options, extract_run
from zarrtrace.records import LayerRecord
from zarrtrace.store import TraceWriter, verify

# What may be added between the second and the last layer. A leak of one handle or of 50 kB a
# scenario is far above these.
_MORE_MEMORY = 32 * 2**20
_MORE_HANDLES = 8
_SLOWER = 1.5


@dataclass(frozen=True)
class Sample:
    """What was held when a record was stored; `seconds` and CPU seconds since the one before."""

    seconds: float
    cpu: float
    resident: int
    handles: int
    threads: int


class Watch:
    """Take a sample whenever a layer of a scenario is stored; ends the run when its time is up."""

    def __init__(self, seconds: float) -> None:
        self.samples: dict[int, list[Sample]] = {}
        self.stopped = False
        self._last, self._last_cpu = time.monotonic(), time.process_time()
        self._until = self._last + seconds
        self._lock = threading.Lock()

    def take(self, layer: int) -> None:
        """Remember what the process holds now."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        with self._lock:
            now, cpu = time.monotonic(), time.process_time()
            sample = Sample(
                now - self._last,
                cpu - self._last_cpu,
                pages * os.sysconf("SC_PAGE_SIZE"),
                len(list(Path("/proc/self/fd").iterdir())),
                threading.active_count(),
            )
            self._last, self._last_cpu = now, cpu
            self.samples.setdefault(layer, []).append(sample)
            late = now > self._until and not self.stopped
            self.stopped |= late
        if late:
            import _thread

            _thread.interrupt_main()  # as Ctrl-C would


def write_suite(file: Path, count: int) -> None:
    """Write scenarios of ten lengths."""
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            rounds = " ".join(f"Round {i + 1}: bet $10, lost." for i in range(number % 10))
            prompt = f"Slot machine {number}. Balance: ${number % 97}. {rounds} Bet or stop?"
            entry = {"name": f"S{number}", "prompt": prompt, "spans": {"balance": "Balance"}}
            out.write(json.dumps(entry) + "\n")


def watch_layers(watch: Watch) -> None:
    """Have every layer that is stored counted."""
    append = TraceWriter.append

    def counted(self: TraceWriter, record: Any) -> None:
        append(self, record)
        if isinstance(record, LayerRecord):
            watch.take(record.layer)

    setattr(TraceWriter, "append", counted)  # noqa: B010


def table(samples: Mapping[int, Sequence[Sample]]) -> str:
    """Describe each layer: medians, and the most memory."""
    lines = ["layer  scenarios  memory MB  at most  handles  threads  ms a scenario  CPU ms"]
    for layer, here in samples.items():
        lines.append(
            f"{layer:>5}  {len(here):>9}  {median(here, 'resident') / 2**20:9.1f}  "
            f"{max(s.resident for s in here) / 2**20:7.1f}  {median(here, 'handles'):7.0f}  "
            f"{median(here, 'threads'):7.0f}  {1000 * pace(here, 'seconds'):13.1f}  "
            f"{1000 * pace(here, 'cpu'):6.1f}"
        )
    return "\n".join(lines)


def median(samples: Sequence[Sample], field: str) -> float:
    """Return the median of a field."""
    return float(statistics.median(getattr(sample, field) for sample in samples))


def pace(samples: Sequence[Sample], field: str) -> float:
    """Return what a scenario took, on average; the first also waited for the SAE."""
    return statistics.fmean(getattr(sample, field) for sample in samples[1:])


def growth(samples: Mapping[int, Sequence[Sample]]) -> list[str]:
    """Say what grew between the second layer and the last."""
    _, early, *between, late = samples.values()

    def grew(field: str) -> float:
        return median(late, field) - median(early, field)

    problems = []
    if grew("resident") > _MORE_MEMORY:
        problems.append(f"memory grew by {grew('resident') / 2**20:.1f} MB")
    if grew("handles") > _MORE_HANDLES:
        problems.append(f"open file handles grew by {grew('handles'):.0f}")
    if grew("threads") > _MORE_HANDLES:
        problems.append(f"threads grew by {grew('threads'):.0f}")
    # The last layer also completes the traces.
    before, after = pace(early, "cpu"), pace(between[-1] if between else late, "cpu")
    if after > _SLOWER * before:
        problems.append(f"a scenario took {before:.3f} CPU seconds, then {after:.3f}")
    return problems


def main() -> None:
    """Run, print the table, and fail if something grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=20, help="The run is stopped after them.")
    parser.add_argument("--layers", default="1-6", help="At least three.")
    given = parser.parse_args()
    layers = Layers().convert(given.layers, None, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_suite(folder / "suite.jsonl", given.scenarios)
        watch = Watch(60 * given.minutes)
        watch_layers(watch)
        start = time.monotonic()
        try:
            extract_run(
                folder / "run",
                Options(model="demo", scenarios=folder / "suite.jsonl", layers=layers),
            )
        except KeyboardInterrupt:
            if not watch.stopped:
                raise
        seconds = time.monotonic() - start
        print(f"{given.scenarios} scenarios × {len(layers)} layers, {seconds:.0f} s in all")
        done = {k: v for k, v in watch.samples.items() if len(v) >= given.scenarios // 2}
        print(table(done))
        if len(done) < 3:
            sys.exit("too few layers to tell: give it more --minutes or --layers")
        problems = growth(done)
        if watch.stopped:
            print("stopped: its time was up")
        else:
            problems += [f"{p.scenario}: {p.message}" for p in verify(folder / "run")[:5]]
        print("\n".join(problems) or "nothing grew")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
