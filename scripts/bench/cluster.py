"""Time extraction on a local cluster: what a second worker brings, and what the first one costs.

The embedded model with attention and features, or another one. Contenders take turns; libraries and
model are loaded before the clock starts. "one core" pins a whole process, with the threads that
compress and write, to one core, as a cluster would be that leaves no core free; without it, the
writers of one process use the second core already. On a GPU nothing is pinned.

    python scripts/bench/cluster.py [--scenarios 20] [--repeats 3] [--json FILE]
    python scripts/bench/cluster.py --device cuda --model ID --sae-release NAME --scenarios 300
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# One thread computes in each process; they are read when torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import common

from zarrtrace.capture import keeping
from zarrtrace.extraction import Options, prepare
from zarrtrace.extraction.cluster import extract_on_cluster
from zarrtrace.extraction.connecting import connected
from zarrtrace.extraction.processes import WriterPool
from zarrtrace.extraction.progress import Progress
from zarrtrace.extraction.running import fill
from zarrtrace.store import RunWriter


def cpu_seconds() -> float:
    """Return the CPU seconds of this process so far."""
    return time.process_time()


def pin(cores: set[int]) -> None:
    """Let every thread of this process, and those that it will start, use these cores alone."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it ended in between
            os.sched_setaffinity(int(thread.name), cores)


class Bench:
    """Contenders over one suite."""

    def __init__(self, folder: Path, options: Options, pool: WriterPool) -> None:
        self.folder, self.options, self.pool = folder, options, pool
        job = prepare(options, progress=False)
        source = job.source and keeping(job.source)  # as workers do
        self.job = replace(job, source=source)
        self.cores = sorted(os.sched_getaffinity(0))

    def single(self) -> None:
        """Extract in this process, the model loaded."""
        layers = {prompt.scenario.name: len(self.job.layers) for prompt in self.job.prompts}
        with (
            RunWriter(self._run(), list(layers), self.job.config) as run,
            Progress(layers, None) as bars,
        ):
            fill(run.path, self.job, bars, self.pool)
            run.finish()

    def on(self, client: Any) -> Callable[[], None]:
        """Extract on a cluster."""
        return lambda: void(extract_on_cluster(client, self._run(), self.options))

    def cpu_of(self, client: Any) -> float:
        """Return the CPU seconds of all workers, this client and its scheduler."""
        return float(sum(client.run(cpu_seconds).values())) + cpu_seconds()

    def _run(self) -> Path:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        return self.folder / "run"


def void(_value: object) -> None:
    """Drop a value."""


def contest(bench: Bench, repeats: int) -> dict[str, list[common.Spent]]:
    """Let one process, one worker and two workers take turns, pinned and free.

    On a GPU, whose memory three models and their SAEs would fill, two workers come last.
    """
    found: dict[str, list[common.Spent]] = {}
    if bench.options.device == "cpu":
        _turns(bench, {"1 worker": 1, "2 workers": 2}, repeats, found)
    else:
        _turns(bench, {"1 worker": 1}, repeats, found)
        _turns(bench, {"2 workers": 2}, repeats, found)
    return found


def _turns(
    bench: Bench, sizes: dict[str, int], repeats: int, found: dict[str, list[common.Spent]]
) -> None:
    """Time clusters of these sizes; the process, too, beside that of one worker."""
    device = bench.options.device
    with contextlib.ExitStack() as stack:
        clusters = {
            kind: stack.enter_context(connected(workers=workers, device=device))
            for kind, workers in sizes.items()
        }
        for client in clusters.values():
            bench.on(client)()  # loads the model
        for _ in range(repeats):
            for pinned in (True, False) if device == "cpu" else (False,):
                cores = bench.cores[:1] if pinned else bench.cores
                pin(set(cores))
                name = "one core a process" if pinned else "free"
                if 1 in sizes.values():
                    result = common.timed(bench.single, cpu_seconds)
                    found.setdefault(f"1 process, {name}", []).append(result)
                for kind, client in clusters.items():
                    for at, address in enumerate(client.nthreads()):
                        own = {bench.cores[at % len(bench.cores)]} if pinned else set(cores)
                        client.run(pin, own, workers=[address])
                    result = common.timed(bench.on(client), lambda: bench.cpu_of(client))  # noqa: B023
                    found.setdefault(f"{kind}, {name}", []).append(result)
    pin(set(bench.cores))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenarios", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sae-release")
    parser.add_argument("--sae-path", type=Path)
    parser.add_argument("--layers", help="as FIRST-LAST; by default all that have an SAE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    given = parser.parse_args()
    first, last = map(int, given.layers.split("-")) if given.layers else (None, None)
    with tempfile.TemporaryDirectory() as temporary, WriterPool() as pool:
        folder = Path(temporary)
        common.write_suite(folder / "suite.jsonl", common.demo_prompts(given.scenarios))
        options = Options(
            model=given.model,
            sae_release=given.sae_release,
            sae_path=given.sae_path,
            layer_start=first,
            layer_end=last,
            scenarios=folder / "suite.jsonl",
            device=given.device,
        )
        bench = Bench(folder, options, pool)
        bench.single()  # warms up
        found = contest(bench, given.repeats)
    print(f"{given.scenarios} scenarios, medians of {given.repeats}; load {os.getloadavg()[0]:.1f}")
    common.print_head("", "wall s", "CPU s")
    for name, runs in found.items():
        wall, cpu = common.middle(runs)
        common.print_row(name, f"{wall:.2f}", f"{cpu:.2f}")
    for how in ("one core a process", "free") if given.device == "cpu" else ("free",):
        # Ratios within a turn: what else the machine does changes between turns.
        turns = zip(*(found[f"{kind}, {how}"] for kind in KINDS), strict=True)
        ratios = [(two[0], one[0], plain[0], one[1], plain[1]) for plain, one, two in turns]
        speed = statistics.median(one / two for two, one, *_ in ratios)
        wall = statistics.median(one / plain - 1 for _, one, plain, *_ in ratios)
        cpu = statistics.median(one / plain - 1 for *_, one, plain in ratios)
        print(f"{how}: 2 workers {speed:.2f}x 1 worker; 1 worker costs {wall:+.1%} wall, "
              f"{cpu:+.1%} CPU over 1 process")  # fmt: skip
    common.save(given.json, found)


KINDS = ("1 process", "1 worker", "2 workers")

if __name__ == "__main__":
    main()
