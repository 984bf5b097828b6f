"""Plan a run that is larger than any machine here: simulate 8 to 512 GPUs with object storage.

A simulation of discrete events. Workers ask the scheduler for tasks, which it hands out one after
the other; a task takes as long as the slowest of: computing, its node's network, the bucket's
bandwidth, the bucket's requests. Shared resources are divided by the workers that use them at that
moment. Before the first task each node reads the weights once; after the last one the client
finishes the run alone. Costs come from `scripts/bench_gpu.py` on an H100 and, for scheduler
and client, from `scripts/bench_cluster.py`; every one is an option.

    python scripts/plan_cluster.py [--scenarios 100000] [--json FILE] [--finish-ms 3 ...]
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Costs:
    """What a run and the machines are assumed to cost.

    Attributes
    ----------
    scenarios
        In the whole run.
    scenarios_a_task
        Sent to a worker together.
    gpus_a_node
        That share a network and the file cache of weights.
    scenario_s
        Seconds a GPU with 16 cores takes for a scenario of 116 tokens: 37.3 s for 500.
    start_s
        Seconds from the start of a worker to its first task, without reading weights.
    weights_gb
        Bytes of model and SAEs that a node reads.
    scenario_mb, scenario_puts
        Bytes and requests to store a scenario: an object a file.
    node_gbps, bucket_gbps
        Gigabits a second of a node's network, and of the object store for all nodes.
    bucket_puts, partitions
        Writes a second that the store accepts in a partition, and into how many it has split the
        run's keys: Amazon S3 begins with one and makes more under load.
    task_ms, report_ms, reports_a_second
        The scheduler's and client's time for a task and a report; reports of one worker.
    tokenise_ms
        A worker's time to tokenise a scenario before the run starts.
    finish_ms
        The client's time at the end, a scenario.
    jitter
        Standard deviation of a task's time, as a share.
    """

    scenarios: int = 100_000
    scenarios_a_task: int = 32
    gpus_a_node: int = 8
    scenario_s: float = 0.044
    start_s: float = 15.0
    weights_gb: float = 24.4
    scenario_mb: float = 13.4
    scenario_puts: int = 37
    node_gbps: float = 25.0
    bucket_gbps: float = 100.0
    bucket_puts: float = 3500.0
    partitions: int = 1
    task_ms: float = 1.7
    report_ms: float = 0.05
    reports_a_second: float = 2.0
    tokenise_ms: float = 0.65
    finish_ms: float = 2.0
    jitter: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """What a simulated run took.

    Attributes
    ----------
    gpus
        How many took part.
    start_s, work_s, finish_s
        Until the first task, from there to the last task's end, and the client's end.
    scenarios_a_second
        While tasks ran, and over the whole run.
    busy
        Share of the time that each resource was used while tasks ran.
    """

    gpus: int
    start_s: float
    work_s: float
    finish_s: float
    scenarios_a_second: tuple[float, float]
    busy: dict[str, float]


def demands(costs: Costs) -> dict[str, float]:
    """Return what one GPU that computes all the time takes of each shared resource: a share."""
    rate = 1 / costs.scenario_s
    scheduler = rate / costs.scenarios_a_task * costs.task_ms
    scheduler += costs.reports_a_second * costs.report_ms
    return {
        "requests": rate * costs.scenario_puts / (costs.bucket_puts * costs.partitions),
        "bucket": rate * costs.scenario_mb * 8e-3 / costs.bucket_gbps,
        "node network": costs.gpus_a_node * rate * costs.scenario_mb * 8e-3 / costs.node_gbps,
        "scheduler": scheduler * 1e-3,
    }


def simulate(costs: Costs, gpus: int, *, seed: int = 0) -> Outcome:
    """Simulate one run."""
    chance = random.Random(seed)
    nodes = -(-gpus // costs.gpus_a_node)
    puts = costs.bucket_puts * costs.partitions
    reading = 8 * costs.weights_gb / min(costs.node_gbps, costs.bucket_gbps / nodes)
    start = costs.start_s + reading + costs.tokenise_ms * 1e-3 * costs.scenarios / gpus
    # Reports take the scheduler's time evenly; tasks queue for what is left of it.
    reports = min(0.99, gpus * costs.reports_a_second * costs.report_ms * 1e-3)
    handing_out = costs.task_ms * 1e-3 / (1 - reports)
    scheduler_free, now = start, start
    busy = dict.fromkeys(("GPUs", "requests", "bucket", "node network", "scheduler"), 0.0)
    free = [(start, at) for at in range(gpus)]
    ends: list[float] = []
    for task in _tasks(costs):
        now, gpu = heapq.heappop(free)
        scheduler_free = max(scheduler_free, now) + handing_out
        while ends and ends[0] <= scheduler_free:
            heapq.heappop(ends)
        together = min(gpus, len(ends) + 1)
        computing = task * costs.scenario_s * max(0.2, chance.gauss(1, costs.jitter))
        near = min(together, costs.gpus_a_node)
        times = {
            "GPUs": computing,
            "requests": task * costs.scenario_puts * together / puts,
            "bucket": task * costs.scenario_mb * 8e-3 * together / costs.bucket_gbps,
            "node network": task * costs.scenario_mb * 8e-3 * near / costs.node_gbps,
        }
        end = scheduler_free + max(times.values())
        busy["GPUs"] += computing / gpus
        for name in ("requests", "bucket"):
            busy[name] += times[name] / together
        busy["node network"] += times["node network"] / near / nodes
        busy["scheduler"] += costs.task_ms * 1e-3
        heapq.heappush(ends, end)
        heapq.heappush(free, (end, gpu))
    work = max(end for end, _ in free) - start
    finish = costs.finish_ms * 1e-3 * costs.scenarios
    shares = {name: seconds / work for name, seconds in busy.items()}
    shares["scheduler"] += reports
    rates = (costs.scenarios / work, costs.scenarios / (start + work + finish))
    return Outcome(gpus, start, work, finish, rates, shares)


def _tasks(costs: Costs) -> Iterator[int]:
    left = costs.scenarios
    while left > 0:
        yield min(left, costs.scenarios_a_task)
        left -= costs.scenarios_a_task


def show(costs: Costs, outcomes: list[Outcome]) -> str:
    """Lay the outcomes out as a table, with what saturates first."""
    columns = ["GPUs", "start s", "work s", "finish s", "scenarios/s at work", "over all"]
    columns += ["GPUs busy", *demands(costs)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in outcomes:
        shares = " | ".join(f"{share:.0%}" for share in one.busy.values())
        rates = " | ".join(f"{rate:,.1f}" for rate in one.scenarios_a_second)
        times = " | ".join(f"{s:,.0f}" for s in (one.start_s, one.work_s, one.finish_s))
        lines.append(f"| {one.gpus} | {times} | {rates} | {shares} |")
    lines.append("")
    for name, share in sorted(demands(costs).items(), key=lambda pair: -pair[1]):
        if name == "node network":
            lines.append(f"{name}: {share:.0%} of each, at any number")
        else:
            lines.append(f"{name}: saturated at {1 / share:,.0f} GPUs")
    finishing = costs.scenario_s * 1e3 / costs.finish_ms
    lines.append(f"client: finishing takes as long as the work from {finishing:,.0f} GPUs on")
    return "\n".join(lines)


def main() -> None:
    """Simulate 8 to 512 GPUs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field in fields(Costs):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar="N"
        )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    given = vars(parser.parse_args())
    gpus, file = given.pop("gpus"), given.pop("json")
    costs = Costs(**given)
    outcomes = [simulate(costs, count) for count in gpus]
    print(show(costs, outcomes))
    if file:
        file.write_text(json.dumps([vars(one) for one in outcomes], indent=2) + "\n")


if __name__ == "__main__":
    main()
