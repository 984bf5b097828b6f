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
from zarrtrace.store import RunWriter

NAMES = tuple(f"{kind}_{i}" for i in range(2) for kind in ("Risky", "Safe"))

ANALYSES: dict[str, Callable[[Any], Any]] = {
    "attention_to": lambda run: analysis.attention_to(run, ["balance", 0]),
    "attention_to_heads": lambda run: analysis.attention_to(run, "balance", heads="each"),
    "feature_trajectory": lambda run: analysis.feature_trajectory(
        run, [(1, 3), (2, 7)], ["balance"]
    ),
    "pathway_features": lambda run: analysis.pathway_features(run, "balance"),
    "attention_locality": analysis.attention_locality,
    "layer_bands": lambda run: analysis.layer_bands(
        run, bands={"local": (1, 1), "task": (2, 2), "decision": (3, 3)}, resamples=99
    ),
    "critical_layers": lambda run: analysis.critical_layers(run, draws=2000),
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
# They read a few numbers a scenario, in this process.
HERE = ("feature_trajectory", "decision")


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


@pytest.mark.long
@pytest.mark.parametrize("name", ANALYSES)
def test_a_cluster_finds_what_numpy_finds(client: Client, run: fakes.FakeRun, name: str) -> None:
    in_memory = zt.open_run(run.path).map_over_datasets(lambda ds: ds.load())
    with dask.config.set(scheduler="synchronous"):
        expected = ANALYSES[name](in_memory)
    assert dask.base.get_scheduler() == client.get
    for chunks in ("auto", None):  # a block a task, and a scenario a task
        assert_same(ANALYSES[name](zt.open_run(run.path, chunks=chunks)).compute(), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ANALYSES if name not in HERE])
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "tasks"),
    [("attention_to", 9), ("feature_trajectory", 9), ("attention_locality", 14), ("head_roles", 9)],
)
def test_graphs_stay_small(run: fakes.FakeRun, name: str, tasks: int) -> None:
    found = ANALYSES[name](zt.open_run(run.path, chunks="auto"))
    (graph,) = dask.optimize(found)
    blocks = len(NAMES) * len(fakes.LAYERS)
    assert len(dict(graph.__dask_graph__())) <= tasks * blocks


def begun(folder: Path, **sizes: Any) -> Path:
    """Begin a trace of any size: no layer of it is stored."""
    with RunWriter(folder / "run", ["Safe_1"], fakes.CONFIG) as run:
        writer = run.trace(fakes.make_plan(**sizes))
        for record in fakes.make_records(layers=(), tokens=sizes["tokens"]):
            writer.append(record)
    return folder / "run"


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(250, (1, 1, 1)), (120, (2, 1)), (60, (3,))], ids=["one", "two", "three"]
)
def test_blocks_are_several_small_layers(
    tmp_path: Path, tokens: int, wanted: tuple[int, ...]
) -> None:
    """A layer of 32,768 features is 8 to 33 MB, a block of dask's at most 34."""
    run = begun(tmp_path, tokens=tokens, features=32768, heads=0)
    for opened in (
        zt.open_trace(run / "Safe_1", chunks="auto", missing="nan"),
        zt.open_run(run, chunks="auto", missing="nan")["Safe_1"],
    ):
        assert opened["features"].chunksizes["layer"] == wanted
        assert opened["next_token"].chunks is not None


@pytest.mark.parametrize("chunks", ["auto", {}])
def test_blocks_are_whole_chunks(tmp_path: Path, chunks: Any) -> None:
    """A block that held a part of a chunk would have it decoded twice."""
    run = begun(tmp_path, tokens=5000, features=32768, heads=8)
    several = 0
    for array in zt.open_trace(run / "Safe_1", chunks=chunks, missing="nan").data_vars.values():
        for sizes, chunk in zip(array.chunks, array.encoding["chunks"], strict=True):
            assert all(size % chunk == 0 for size in sizes[:-1])
            several += len(sizes) > 1
    assert several > 4


def test_an_array_that_is_sent_is_small(run: fakes.FakeRun) -> None:
    ds = zt.open_run(run.path, chunks="auto")["Risky_0"].to_dataset()
    graph = dict(ds["features"].data.dask)
    assert max(len(cloudpickle.dumps(task)) for task in graph.values()) < 8192


@pytest.mark.long
def test_workers_refuse_lost_files(client: Client, tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path)
    opened = zt.open_run(run.path, chunks="auto")
    (run.trace / "features" / "c.0.0.0").unlink()
    with pytest.raises(IntegrityError, match=r"features/c\.0\.0\.0: is gone"):
        analysis.feature_trajectory(opened, (1, 3)).compute()


@pytest.mark.long
def test_an_index_is_built_on_a_cluster(client: Client, run: fakes.FakeRun, tmp_path: Path) -> None:
    build_index(run.path)
    on_cluster = fakes.files_in(run.path / "index")
    with dask.config.set(scheduler="synchronous"):
        build_index(run.path, rebuild=True)
    assert fakes.files_in(run.path / "index") == on_cluster
