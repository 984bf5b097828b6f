"""Analyses on a cluster of processes: the same numbers as threads give, from small graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import fakes
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from processes import import_once

import zarrtrace as zt
from zarrtrace import analysis
from zarrtrace.errors import IntegrityError
from zarrtrace.index import build_index
from zarrtrace.store import opening

NAMES = tuple(f"{kind}_{i}" for i in range(2) for kind in ("Risky", "Safe"))

ANALYSES: dict[str, Callable[[Any], Any]] = {
    "attention_to": lambda run: analysis.attention_to(run, ["balance", 0]),
    "attention_to_heads": lambda run: analysis.attention_to(run, "balance", heads="each"),
    "feature_trajectory": lambda run: analysis.feature_trajectory(run, [3, 7], ["balance"]),
    "pathway_features": lambda run: analysis.pathway_features(run, "balance"),
    "attention_locality": analysis.attention_locality,
    "layer_bands": lambda run: analysis.layer_bands(
        run, bands={"local": (1, 1), "task": (2, 2), "decision": (3, 3)}, resamples=99
    ),
    "critical_layers": lambda run: analysis.critical_layers(run, n_permutations=99),
    "attention_rollout": lambda run: analysis.attention_rollout(run, ["balance"]),
    "attention_flow": lambda run: analysis.attention_flow(run, ["balance"]),
    "contrast_features": lambda run: analysis.contrast(run, "risky", "safe", n_permutations=99),
    "contrast_attention": lambda run: analysis.contrast(
        run, "risky", "safe", what="attention", n_permutations=99
    ),
    "position_specific_features": analysis.position_specific_features,
    "word_associations": analysis.word_associations,
    "crossreference": lambda run: analysis.crossreference(run, analysis.word_associations(run)),
    "head_roles": analysis.head_roles,
    "decision": analysis.decision,
    "relate": lambda run: analysis.relate(
        analysis.decision(run)["entropy"], analysis.attention_to(run, "balance"), n_permutations=99
    ),
}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two worker processes, shared by the tests of this module."""
    import_once()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    return fakes.make_run(
        tmp_path_factory.mktemp("distributed"), scenarios=NAMES, tokens=(18, 20) * 2, active=0.4
    )


def assert_same(found: Any, expected: Any) -> None:
    """Compare results of dask with those of NumPy: sums may be taken in another order."""
    xr.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("name", ANALYSES)
def test_a_cluster_finds_what_numpy_finds(client: Client, run: fakes.FakeRun, name: str) -> None:
    in_memory = zt.open_run(run.path).map_over_datasets(lambda ds: ds.load())
    with dask.config.set(scheduler="synchronous"):
        expected = ANALYSES[name](in_memory)
    assert dask.base.get_scheduler() == client.get
    for chunks in ("auto", None):  # a block a task, and a scenario a task
        assert_same(ANALYSES[name](zt.open_run(run.path, chunks=chunks)).compute(), expected)


@pytest.mark.parametrize("name", ANALYSES)
def test_what_is_sent_to_a_process_is_one_scenario(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened = zt.open_run(run.path)
    a_run, a_trace = (
        len(cloudpickle.dumps(data)) for data in (opened, opened[NAMES[0]].to_dataset())
    )
    assert a_run > 3 * a_trace
    sent: list[int] = []
    compute_for = dask.compute

    def compute(*calls: Any, **_settings: Any) -> Any:
        for call in calls:
            sent.extend(
                len(cloudpickle.dumps(task)) for task in dict(call.__dask_graph__() or {}).values()
            )
        return compute_for(*calls, scheduler="synchronous")

    monkeypatch.setattr("zarrtrace.analysis.parallel.dask.compute", compute)
    ANALYSES[name](opened)
    assert sent
    assert max(sent) < 2 * a_trace


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("attention_to", 9), ("feature_trajectory", 9), ("attention_locality", 14), ("head_roles", 9)],
)
def test_graphs_stay_small(run: fakes.FakeRun, name: str, tasks: int) -> None:
    found = ANALYSES[name](zt.open_run(run.path, chunks="auto"))
    (graph,) = dask.optimize(found)
    blocks = len(NAMES) * len(fakes.LAYERS)
    assert len(dict(graph.__dask_graph__())) <= tasks * blocks


def test_blocks_are_files(run: fakes.FakeRun) -> None:
    for chunks in ("auto", {}):
        for child in zt.open_run(run.path, chunks=chunks).children.values():
            for array in child.data_vars.values():
                file = array.encoding["shards"] or array.encoding["chunks"]
                for sizes, of_file in zip(array.chunks, file, strict=True):
                    assert all(size == of_file for size in sizes[:-1])


@pytest.mark.parametrize(("layers", "wanted"), [(1, (1, 1, 1)), (2, (2, 1)), (3, (3,))])
def test_blocks_are_several_small_files(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch, layers: int, wanted: tuple[int, ...]
) -> None:
    ds = zt.open_trace(run.path / NAMES[0])
    monkeypatch.setattr(opening, "_BLOCK_BYTES", layers * ds["features"][0].nbytes + 1)
    for opened in (
        zt.open_trace(run.path / NAMES[0], chunks="auto"),
        zt.open_run(run.path, chunks="auto")[NAMES[0]],
    ):
        assert opened["features"].chunksizes["layer"] == wanted
        assert opened["next_token"].chunks is not None


def test_an_array_that_is_sent_is_small(run: fakes.FakeRun) -> None:
    ds = zt.open_run(run.path, chunks="auto")["Risky_0"].to_dataset()
    graph = dict(ds["features"].data.dask)
    assert max(len(cloudpickle.dumps(task)) for task in graph.values()) < 8192


def test_workers_refuse_lost_files(client: Client, tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    opened = zt.open_run(run.path, chunks="auto")
    for file in (run.trace / "features" / "c" / "1").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(IntegrityError, match="0 bytes on disk"):
        analysis.feature_trajectory(opened, 3).compute()


def test_an_index_is_built_on_a_cluster(client: Client, run: fakes.FakeRun, tmp_path: Path) -> None:
    build_index(run.path)
    on_cluster = fakes.files_in(run.path / "index")
    with dask.config.set(scheduler="synchronous"):
        build_index(run.path, rebuild=True)
    assert fakes.files_in(run.path / "index") == on_cluster
