"""Run every analysis over many scenarios on a cluster of two worker processes.

Says how long opening takes, how many tasks each graph has, how long it runs, and the most memory
that a worker held. The run is that of scripts/bench/index.py: 64 tokens, 4 layers, 4,096 features.

    python scripts/bench/dask_analysis.py [--scenarios 1000] [--run FOLDER] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, LocalCluster
from index import write_run

import zarrtrace as zt
from zarrtrace import analysis

ANALYSES: dict[str, Callable[[Any], Any]] = {
    "attention_to": lambda run: analysis.attention_to(run, "balance"),
    "attention_to, each head": lambda run: analysis.attention_to(run, "balance", heads="each"),
    "feature_trajectory": lambda run: analysis.feature_trajectory(run, (2, 7)),
    "pathway_features": lambda run: analysis.pathway_features(run, "balance"),
    "attention_locality": analysis.attention_locality,
    "layer_bands": lambda run: analysis.layer_bands(
        run,
        bands={"local": (1, 1), "task": (2, 3), "decision": (4, 4)},
        task_spans=["balance"],
        resamples=99,
    ),
    "critical_layers": lambda run: analysis.critical_layers(run, draws=2000),
    "attention_rollout": lambda run: analysis.attention_rollout(run, "balance"),
    "attention_flow": lambda run: analysis.attention_flow(run, "balance"),
    "contrast": lambda run: analysis.contrast(run, "risky", "safe", n_permutations=99),
    "contrast of attention": lambda run: analysis.contrast(
        run, "risky", "safe", what="attention", n_permutations=99
    ),
    "position_specific_features": analysis.position_specific_features,
    "word_associations": analysis.word_associations,
    "head_roles": analysis.head_roles,
    "decision": analysis.decision,
}


class Watch:
    """The most memory that any child process held, in MiB; a context manager."""

    def __enter__(self) -> Watch:
        self.most = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                try:
                    self.most = max(self.most, child.memory_info().rss / 2**20)
                except psutil.Error:
                    continue


def tasks(result: Any) -> int:
    """Return the number of tasks that are left after dask's optimisation; 0 if none are lazy."""
    if result.__dask_graph__() is None:
        return 0
    (small,) = dask.optimize(result)
    return len(dict(small.__dask_graph__()))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=1000)
    parser.add_argument("--run", type=Path, help="A run that scripts/bench/index.py --keep made.")
    parser.add_argument("--only", nargs="+", choices=list(ANALYSES), default=list(ANALYSES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        path = given.run or Path(work) / "run"
        if given.run is None:
            names = [f"S{number:05d}" for number in range(given.scenarios)]
            write_run(path, names, len(names))
        for chunks in (None, "auto"):
            for _ in range(2):  # the second time, imports and the disk's cache are warm
                start, used = time.perf_counter(), time.process_time()
                run = zt.open_run(path, chunks=chunks)
                taken = time.perf_counter() - start, time.process_time() - used
            print(f"open_run, chunks={chunks}: {taken[0]:.2f} s, {taken[1]:.2f} s of CPU")
        print(f"{len(run.children)} scenarios")
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
        with cluster, Client(cluster):
            print("| analysis | tasks | graph s | compute s | worker MiB |")
            print("|---|---|---|---|---|", flush=True)
            for name in given.only:
                with Watch() as watch:
                    start = time.perf_counter()
                    result = ANALYSES[name](run)
                    made = time.perf_counter()
                    count = tasks(result)
                    before = time.perf_counter()
                    result.compute()
                    done = time.perf_counter()
                print(
                    f"| {name} | {count} | {made - start:.1f} | {done - before:.1f} | "
                    f"{watch.most:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
