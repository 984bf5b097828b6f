"""How workers of this machine are started; no process starts here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from zarrtrace.errors import ConfigError

pytest.importorskip("distributed")

import dask

from zarrtrace.extraction import connecting, fork_server

_METHOD = "distributed.worker.multiprocessing-method"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Workers that a cluster is asked for."""
    workers: list[Mapping[str, Any]] = []

    @contextlib.contextmanager
    def cluster(**options: Any) -> Iterator[str]:
        workers.extend(one["options"] for one in options["workers"].values())
        yield "cluster"

    monkeypatch.setattr(connecting, "SpecCluster", cluster)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,GPU-3")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    return workers


def test_forked_workers_have_their_gpus(
    started: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "gpu_count", lambda: 2)
    with connecting._local_cluster(2, "cuda", forked=True):
        assert dask.config.get(_METHOD) == "forkserver"  # also for a worker that replaces another
    assert dask.config.get(_METHOD) == "spawn"
    assert [one["env"]["CUDA_VISIBLE_DEVICES"] for one in started] == ["GPU-7", "GPU-3"]
    with (
        pytest.raises(ConfigError, match="--workers 3: 2 GPUs are visible"),
        connecting._local_cluster(3, "cuda", forked=True),
    ):
        pass


def test_workers_are_not_forked_from_a_process_that_used_a_gpu(
    started: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not work in them."""
    monkeypatch.setattr(fork_server, "gpu_count", lambda: None)
    with connecting._local_cluster(2, "cpu", forked=True):
        assert dask.config.get(_METHOD) == "spawn"
    assert [one["env"] for one in started] == [{}, {}]
