"""Finding a Dask cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster

from zarrtrace.errors import ClusterError, ConfigError
from zarrtrace.extraction import fork_server
from zarrtrace.extraction.packages import capture_package


@contextlib.contextmanager
def connected(
    *,
    scheduler: str | None = None,
    scheduler_file: Path | None = None,
    workers: int | None = None,
    device: str = "cpu",
    forked: bool = False,
) -> Iterator[Client]:
    """Yield a client of a cluster that runs, or of one that lives as long as the context.

    Parameters
    ----------
    scheduler, scheduler_file
        Its address, or the file in which it wrote its address.
    workers
        Number of processes to start on this machine instead; on GPUs, one process a GPU.
    device
        ``"cuda"`` gives each of these its GPU.
    forked
        Whether the processes come from :mod:`zarrtrace.extraction.fork_server`, which was started.

    Raises
    ------
    ClusterError
        If no scheduler answers.
    ConfigError
        If the file is not there, or there are more workers than GPUs.
    """
    if workers is not None:
        with _local_cluster(workers, device, forked=forked) as cluster, _client(cluster) as client:
            yield client
        return
    if scheduler_file is not None and not scheduler_file.is_file():
        raise ConfigError(
            f"--scheduler-file {scheduler_file}: no such file",
            why="The scheduler writes it when it starts: dask scheduler --scheduler-file FILE.",
            remedy="Start the scheduler first, and check the path.",
        )
    where = {"scheduler_file": str(scheduler_file)} if scheduler_file else {"address": scheduler}
    with _client(**where) as client:
        yield client


@contextlib.contextmanager
def _client(address: Any = None, **where: Any) -> Iterator[Client]:
    try:
        client = Client(address, set_as_default=False, **where)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise no_scheduler(error) from error
    with client:
        yield client


def no_scheduler(error: Exception) -> ClusterError:
    """Say that no scheduler can be reached."""
    return ClusterError(
        f"no scheduler answers: {error}",
        why="It is not running there, or a firewall is between.",
        remedy="Check the address that `dask scheduler` printed, as tcp://10.0.0.1:8786.",
    )


@contextlib.contextmanager
def _local_cluster(workers: int, device: str, *, forked: bool) -> Iterator[Any]:
    """Processes of this machine; one that dies is replaced."""
    before = dict(os.environ)
    try:
        with _started(workers, device, forked=forked) as cluster:
            yield cluster
    finally:
        # Dask changes the environment of the process that starts workers.
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _started(workers: int, device: str, *, forked: bool) -> Iterator[Any]:
    gpus, count = None, fork_server.gpu_count() if forked else None
    forked = count is not None
    if device.startswith("cuda"):
        gpus = _gpus(workers, capture_package().gpu_count() if count is None else count)
    if gpus is not None and importlib.util.find_spec("dask_cuda") is not None:
        from dask_cuda import LocalCUDACluster  # noqa: PLC0415 -- an option

        with LocalCUDACluster(
            CUDA_VISIBLE_DEVICES=gpus,
            threads_per_worker=1,
            memory_limit=None,
            preload=["zarrtrace.extraction.worker"],
            dashboard_address=None,
        ) as cluster:
            yield cluster
        return
    network = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard": False}
    network["dashboard_address"] = "127.0.0.1:0"  # of the server that answers health checks
    worker = {
        **network,
        "nthreads": 1,
        "memory_limit": 0,
        "preload": ["zarrtrace.extraction.worker"],
        "silence_logs": logging.CRITICAL,
    }
    own = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] if gpus else [{}] * workers
    # All the time: a worker that dies is replaced.
    with (
        dask.config.set(_settings(workers, forked=forked)),
        SpecCluster(
            scheduler={"cls": Scheduler, "options": {**network, "port": 0}},
            workers={
                at: {"cls": Nanny, "options": {**worker, "env": env}} for at, env in enumerate(own)
            },
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster


def _settings(workers: int, *, forked: bool) -> dict[str, Any]:
    """Dask's settings for processes that compute with torch."""
    settings = {
        # Without Dask's MALLOC_TRIM_THRESHOLD_, which has the C library give back freed memory at
        # once: page faults for every large array.
        "distributed.nanny.pre-spawn-environ": fork_server.environment(workers),
        # It takes the interpreter's lock a hundred times a second.
        "distributed.worker.profile.enabled": False,
    }
    if forked:
        settings["distributed.worker.multiprocessing-method"] = "forkserver"
    return settings


def _gpus(workers: int, count: int) -> list[str]:
    """Name one visible GPU of `count` for each worker."""
    if workers > count:
        raise ConfigError(
            f"--workers {workers}: {count} GPUs are visible",
            why="Each worker has a GPU of its own.",
            remedy=f"Give --workers {count} or fewer." if count else "Use --device cpu.",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(at) for at in range(count)]
    return [name.strip() for name in names[:workers]]
