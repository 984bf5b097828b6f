"""Extraction on a Dask cluster: real processes, compared with one process file by file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import fakes
import pytest
import s3_servers
from hypothesis import given
from hypothesis import strategies as st
from processes import extracting, forked, import_once, said_after

from zarrtrace import demo
from zarrtrace.cli import main
from zarrtrace.errors import (
    ClusterError,
    ConfigError,
    LockedError,
    NonFiniteError,
    ZarrtraceError,
)
from zarrtrace.extraction import Options, extract_run
from zarrtrace.extraction.configuration import library_versions
from zarrtrace.extraction.progress import Progress
from zarrtrace.records import TokensRecord
from zarrtrace.scenarios import Sampling
from zarrtrace.storage import locate
from zarrtrace.store import (
    RunWriter,
    TraceWriter,
    only_writer,
    read_run,
    verify,
    wait_for_writers,
)

pytest.importorskip("distributed")

from zarrtrace.extraction import worker
from zarrtrace.extraction.cluster import extract_on_cluster
from zarrtrace.extraction.connecting import connected

pytestmark = [pytest.mark.torch, pytest.mark.long]

NAMES = ("Desperate_10", "Safe_130_one_win", "Risky_40", "Initial_100_first_round", "Medium_60")


def options(**changes: Any) -> Options:
    return Options(**{"layers": (1, 2, 3), "only": NAMES, "residual": True, **changes})


ASKED = ["--no-features", "--residual", *(part for name in NAMES for part in ("--scenario", name))]
#: Without SAEs, whose library takes seconds to import; long enough to be ended in the middle.
ATTENTION = options(layers=tuple(range(1, 32)), features=False)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two processes that are kept for all tests here."""
    import_once()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        connected(workers=2) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The run as one process stores it."""
    return files_of(extract_run(tmp_path_factory.mktemp("single") / "run", options()))


@pytest.fixture(scope="module")
def single_attention(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The run without features as one process stores it."""
    return files_of(extract_run(tmp_path_factory.mktemp("single") / "run", ATTENTION))


def files_of(run: Any) -> dict[str, bytes]:
    return fakes.files_in(Path(run))


def has_begun(run: Path) -> bool:
    """Whether a worker has stored layers of a trace that it has not published."""
    return any(run.glob(".staged/*/attention/c.*"))


def assert_same(run: Path, expected: dict[str, bytes]) -> None:
    found = fakes.files_in(run)
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in expected if found[name] != expected[name]} == {}
    assert sorted(path.name for path in run.parent.iterdir()) == [run.name]  # no lock is left
    assert sorted(path.name for path in run.iterdir()) == sorted([*NAMES, "zarr.json"])


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.005)
    return found


@given(
    prompts=st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=20),
    size=st.integers(1, 5),
    limit=st.integers(1, 10),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_groups_that_follow_each_other_stay_the_same(
    prompts: list[tuple[int, bool]], size: int, limit: int, cut: tuple[int, int]
) -> None:
    from zarrtrace.capture import grouped

    rope = {"rope_type": "longrope", "original_max_position_embeddings": limit}
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(rope_parameters=rope))
    model: Any = SimpleNamespace(model=SimpleNamespace(config=config), max_tokens=9)

    def groups_of(indices: list[int]) -> list[list[int]]:
        lengths, alone = ([prompts[at][field] for at in indices] for field in (0, 1))
        return [[indices[at] for at in group] for group in grouped(model, lengths, alone, size)]

    every = groups_of(list(range(len(prompts))))
    assert all(len({prompts[at][0] > limit for at in group}) == 1 for group in every)
    some = every[min(cut) : max(cut)]
    assert groups_of([at for group in some for at in group]) == some


def test_equals_one_process(
    client: Any, single: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options()
    made = extract_on_cluster(client, tmp_path / "run", asked, progress="bars")
    assert str(made) == str(tmp_path / "run")
    assert_same(tmp_path / "run", single)
    bars = capsys.readouterr().err
    assert "15/15" in bars
    assert "5/5" in bars
    # Each worker wrote some of it, each has the model; again, nothing is to be done.
    assert len(set(client.run(os.getpid).values())) == 2
    extract_on_cluster(client, tmp_path / "run", asked)
    assert_same(tmp_path / "run", single)


def test_workers_write_to_an_object_store(client: Any, single: dict[str, bytes], s3: Any) -> None:
    client.run(os.environ.update, s3_servers.CREDENTIALS)
    run = s3.folder() / "run"
    extract_on_cluster(client, run, options())
    assert {name: (run / name).read() for name in sorted(run.files())} == single
    assert {name.split("/")[0] for name in run.parent.files()} == {"run"}  # no lock is left


def test_batches_are_those_of_one_process(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(
        batch_size=2,
        layers=(1, 30),
        positions="spans",
        attention_positions="last",
        sae_path=Path("saes"),
    )
    monkeypatch.chdir(demo.sae_path().parent)  # workers run elsewhere
    (tmp_path / "one").mkdir()
    expected = files_of(extract_run(tmp_path / "one/run", asked))
    (tmp_path / "two").mkdir()
    extract_on_cluster(client, tmp_path / "two/run", asked)
    assert_same(tmp_path / "two/run", expected)


def test_a_killed_worker_is_replaced(
    client: Any,
    tmp_path: Path,
    single_attention: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: has_begun(tmp_path / "run"))
        busy = [address for address, tasks in client.processing().items() if tasks]
        pid = client.run(os.getpid, workers=busy[:1])[busy[0]]
        assert not read_run(tmp_path / "run").attributes.complete
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    extract_on_cluster(client, tmp_path / "run", ATTENTION, progress="bars")
    killer.join()
    assert killed
    assert_same(tmp_path / "run", single_attention)
    bars = capsys.readouterr().err
    assert "155/155" in bars
    assert "5/5" in bars
    wait_for(lambda: len(client.nthreads()) == 2)
    assert killed[0] not in client.run(os.getpid).values()


def test_errors_of_workers_arrive_as_they_are(client: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        extract_on_cluster(client, tmp_path / "run", options(positions=(117,)))
    assert refused.value.what.startswith("--positions 117: scenario ")
    assert refused.value.remedy.startswith("Give positions from -1")
    with pytest.raises(ConfigError, match="--device cuda;"):
        extract_on_cluster(client, tmp_path / "run", options(device="cuda:1"))
    assert not any(tmp_path.iterdir())


def test_a_worker_that_computes_nonsense_ends_the_run(client: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(demo.model_path(), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"].mul_(1e38)
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    asked = options(model=str(tmp_path / "model"), scenarios="slot-machine", features=False)
    with pytest.raises(NonFiniteError) as error:
        extract_on_cluster(client, tmp_path / "runs/run", asked)
    assert "the model computed NaN or infinity in" in error.value.what
    assert "--allow-nonfinite" in error.value.remedy
    with RunWriter(
        tmp_path / "runs/run", NAMES, read_run(tmp_path / "runs/run").attributes.config
    ):  # the lock was given back
        assert not read_run(tmp_path / "runs/run").attributes.complete
    extract_on_cluster(client, tmp_path / "runs/run", asked, allow_nonfinite=True)
    assert verify(tmp_path / "runs/run") == []


def test_a_signal_stops_workers_too(
    client: Any, tmp_path: Path, single_attention: dict[str, bytes]
) -> None:
    asked = ["-o", tmp_path / "run", "--scheduler", client.scheduler.address, *ASKED]
    with extracting(*asked) as process:
        wait_for(lambda: has_begun(tmp_path / "run"))
        said = said_after(process)
    assert process.returncode == 130
    assert "of 155 layers" in said
    assert "the same command resumes there" in said
    assert "Traceback" not in said
    before = fakes.files_in(tmp_path / "run")
    assert not read_run(tmp_path / "run").attributes.complete
    assert before == fakes.files_in(tmp_path / "run")  # nobody writes any more
    extract_on_cluster(client, tmp_path / "run", ATTENTION)
    assert_same(tmp_path / "run", single_attention)


def test_another_environment_is_refused(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client.submit

    def submit(function: Any, *arguments: Any, **how: Any) -> Any:
        if function is worker.extract_some:
            order, *rest = arguments
            order = worker.replace(order, config={**order.config, **other})
            order = worker.replace(order, **changes)
            return real(function, order, *rest, **how)
        return real(function, *arguments, **how)

    monkeypatch.setattr(client, "submit", submit)
    changes: dict[str, Any] = {"folder": locate("/nowhere/run")}
    other: dict[str, Any] = {}
    with pytest.raises(ClusterError, match="does not see /nowhere/run"):
        extract_on_cluster(client, tmp_path / "run", options())
    changes, other = {}, {"versions": {**library_versions(), "torch": "0.1"}}
    with pytest.raises(ClusterError, match=r"version of torch: '0.1' there, '\S+' on this worker"):
        extract_on_cluster(client, tmp_path / "run", options())
    other = {"model_fingerprint": "0123456789abcdef"}
    with pytest.raises(
        ClusterError, match=r"weights of the model: '0123456789abcdef' there, '\w+' on this worker"
    ):
        extract_on_cluster(client, tmp_path / "run", options())


def test_workers_and_client_with_other_versions_are_named(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written."""

    def upgrade() -> None:
        from zarrtrace.extraction import configuration

        real = configuration._versions
        configuration._versions = lambda: (*real(), ("torch", "9.9"))  # type: ignore[assignment]
        configuration._versions.real = real  # type: ignore[attr-defined]

    def restore() -> None:
        from zarrtrace.extraction import configuration

        configuration._versions = configuration._versions.real  # type: ignore[attr-defined]

    upgraded = next(iter(client.nthreads()))
    client.run(upgrade, workers=[upgraded])
    try:
        with pytest.raises(ClusterError, match=r"version of torch: .*9\.9"):
            extract_on_cluster(client, tmp_path / "run", options())
    finally:
        client.run(restore, workers=[upgraded])
    monkeypatch.setattr("zarrtrace.extraction.cluster.version", lambda _: "0.0")
    with pytest.raises(ClusterError, match=r"workers have zarrtrace \S+, this machine has 0.0"):
        extract_on_cluster(client, tmp_path / "run", options())
    assert not (tmp_path / "run").exists()


def end_on(name: str) -> Any:
    """Stand in for a worker's task: one scenario ends the process that has it."""

    def extract_some(_order: Any, scenarios: Any, _prompts: Any) -> dict[str, tuple[int, bool]]:
        if any(scenario.name == name for scenario in scenarios):
            time.sleep(1)  # what the process has done before is told to the scheduler
            os._exit(1)
        return {scenario.name: (0, True) for scenario in scenarios}

    return extract_some


def test_a_scenario_that_ends_its_workers_is_named(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cloudpickle

    def be_strict(dask_scheduler: Any) -> None:
        dask_scheduler.allowed_failures = 0

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    client.run_on_scheduler(be_strict)
    monkeypatch.setattr(worker, "extract_some", end_on("s7"))
    suite = tmp_path / "suite.yaml"  # more than there are tasks: most hold several
    scenarios = [{"name": f"s{at}", "prompt": f"You hold ${at}."} for at in range(40)]
    suite.write_text(json.dumps({"scenarios": scenarios}), encoding="utf-8")
    asked = options(model="demo", scenarios=suite, only=())
    with pytest.raises(ClusterError, match="every worker that computes s7 ends"):
        extract_on_cluster(client, tmp_path / "run", asked)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_processes_of_their_own(
    single_attention: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler and two workers, started as on several machines."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    start = "from distributed.cli.dask_{0} import main; main()".format
    with contextlib.ExitStack() as processes:
        processes.enter_context(forked(start("scheduler"), *common, "--port", "0"))
        wait_for(lambda: file.is_file() and file.read_bytes().endswith(b"}"))
        for _ in range(2):
            processes.enter_context(
                forked(start("worker"), *common, "--nthreads", "1", "--no-nanny")
            )
        (tmp_path / "runs").mkdir()
        ask = ["zarrtrace", "extract", "-o", "runs/run", "-q", *ASKED]
        address = json.loads(file.read_text())["address"]
        monkeypatch.setattr(sys, "argv", [*ask, "--scheduler", address])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert_same(tmp_path / "runs/run", single_attention)
        monkeypatch.setattr(sys, "argv", [*ask, "--scheduler-file", str(file)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0


def test_workers_of_this_machine(single_attention: dict[str, bytes], tmp_path: Path) -> None:
    """As typed: they are forked from a process that has imported what they need."""
    with extracting("-o", tmp_path / "run", "--workers", "2", *ASKED) as process:
        assert process.wait(240) == 0, process.communicate()[1]
    assert_same(tmp_path / "run", single_attention)


_FORKED = """
import gc, multiprocessing, os, signal, sys
from zarrtrace.extraction import Options, fork_server

def look(there):
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    modules = [name in sys.modules for name in ("torch", "zarrtrace.extraction.worker")]
    garbage = gc.get_threshold()[0] > 0, gc.get_freeze_count() > 100_000
    there.send([*modules, os.environ["OMP_NUM_THREADS"], blocked, *garbage])

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "3"
    before = dict(os.environ)
    assert fork_server.start(2, Options(features=False))
    assert "torch" not in sys.modules
    assert dict(os.environ) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    here, there = multiprocessing.Pipe(duplex=False)
    assert fork_server.gpu_count() == int(sys.argv[1])
    process = multiprocessing.get_context("forkserver").Process(target=look, args=(there,))
    process.start()
    assert here.recv() == [True, True, "3", True, True, True]
    process.join()
"""


def test_fork_server_imports_once_and_counts_gpus(tmp_path: Path) -> None:
    import torch

    (tmp_path / "main.py").write_text(_FORKED)
    command = [sys.executable, str(tmp_path / "main.py"), str(torch.cuda.device_count())]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--scheduler", "tcp://127.0.0.1:9", "--workers", "2"], "Give one of --workers"),
        (["--scheduler", "tcp://127.0.0.1:9"], "no scheduler answers"),
        (["--scheduler", "nonsense://x"], "no scheduler answers"),
        (["--scheduler-file", "absent.json"], "--scheduler-file absent.json: no such file"),
        (["--workers", "2", "--device", "cuda"], "--workers 2: 0 GPUs are visible"),
    ],
)
def test_clusters_that_are_none(
    asked: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["zarrtrace", "extract", "-o", str(tmp_path / "run"), *asked])
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code in (1, 2)
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shown", ["bars", "lines", None])
def test_progress_counts_what_a_dead_worker_stored(
    shown: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress({"a": 3, "b": 3, "c": 3}, shown) as progress:
        progress.found("c", 0, complete=True)
        progress.found("a", 1, complete=False)  # two of an earlier run
        progress.stored("a", 0, complete=True)
        progress.stored("a", 0, complete=True)
        progress.found("b", 3, complete=False)
        progress.found("b", 1, complete=False)  # two of the dead worker
        assert str(progress) == "3 of 4 layers, 2 of 3 scenarios"
        progress.stored("b", 0, complete=True)
        assert str(progress) == "4 of 4 layers, 3 of 3 scenarios"
    assert ("4/4" in capsys.readouterr().err) == (shown == "bars")


# --- workers that a cluster has given up -------------------------------------------------------


def test_worker_that_is_left_over_is_waited_for(tmp_path: Path) -> None:
    run = locate(tmp_path / "run")
    with only_writer(run, ["a", "b"], seconds=0):
        for wait in (
            lambda: only_writer(run, ["b"], seconds=0.2).__enter__(),
            lambda: wait_for_writers(run, seconds=0.2),
        ):
            with pytest.raises(LockedError, match="another process is writing it"):
                wait()
        with only_writer(run, ["c"], seconds=0):
            pass
    wait_for_writers(run, seconds=0)
    assert fakes.files_in(tmp_path) == {}
    wait_for_writers(run, seconds=0)


_WRITER = """
import sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import fakes
from zarrtrace.storage import locate
from zarrtrace.store import TraceWriter, only_writer

run = locate(sys.argv[2])
with only_writer(run, ["Safe_1"], seconds=0):
    writer = TraceWriter(run, fakes.make_plan())
    records = list(fakes.make_records())
    writer.append(records[0])
    print("one layer", flush=True)
    while not Path(sys.argv[3]).exists():
        time.sleep(0.01)
    for record in records[1:]:
        writer.append(record)
    writer.finish()
"""


@pytest.mark.parametrize("end", ["killed", "alive"])
def test_successor_of_a_worker_goes_on_where_it_ended(tmp_path: Path, end: str) -> None:
    """Its locks are the kernel's: a dead one has none, a live one is waited for."""
    expected = fakes.make_run(tmp_path / "whole", scenarios=("Safe_1",))
    run, go_on = locate(tmp_path / "run"), tmp_path / "go on"
    found: list[tuple[int, ...]] = []

    def succeed() -> None:
        with (
            only_writer(run, ["Safe_1"], seconds=60),
            TraceWriter(run, fakes.make_plan()) as writer,
        ):
            found.append(writer.missing_layers)
            for record in fakes.make_records():
                if isinstance(record, TokensRecord):
                    if writer.needs_tokens:
                        writer.append(record)
                elif record.layer in writer.missing_layers:
                    writer.append(record)

    arguments = (Path(__file__).parent, run, go_on)
    with (
        RunWriter(run, ["Safe_1"], fakes.CONFIG) as client,
        forked(_WRITER, *arguments) as first,
    ):
        journal = Path(run) / ".staged" / "Safe_1" / "journal"
        wait_for(lambda: journal.is_file() and journal.read_bytes().count(b"\n") == 2)
        successor = threading.Thread(target=succeed)
        successor.start()
        time.sleep(0.5)
        assert not found  # it waits
        if end == "killed":
            first.kill()
        else:
            go_on.touch()
        first.wait()
        successor.join(60)
        client.finish()
    assert found == [(2, 3) if end == "killed" else ()]
    assert fakes.files_in(Path(run)) == fakes.files_in(expected.path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == []


def test_next_client_waits_for_a_worker_of_the_last_one(tmp_path: Path) -> None:
    """`extract` in one process, after a client whose workers go on writing."""
    run = tmp_path / "run"
    extract_run(run, ATTENTION)
    with only_writer(locate(run), [NAMES[0]], seconds=0):
        done = threading.Event()

        def again() -> None:
            extract_run(run, ATTENTION)
            done.set()

        client = threading.Thread(target=again)
        client.start()
        assert not done.wait(3)
    client.join(60)
    assert done.is_set()
    assert not (run / ".staged").exists()


def test_cluster_errors_survive_the_wire() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ClusterError("a", why="b", remedy="c")))  # noqa: S301
    assert isinstance(error, ZarrtraceError)
    assert (error.what, error.why, error.remedy) == ("a", "b", "c")


# --- continuations ------------------------------------------------------------------------------


def test_workers_generate_what_one_process_does(client: Any, tmp_path: Path) -> None:
    """Batches go to workers whole, and the client keeps them: nothing is generated twice."""
    asked = options(
        only=NAMES[:3], layers=(3, 20), features=False,
        generate=Sampling(2, temperature=1.0, samples=3), positions=("completion", "decision"),
    )  # fmt: skip
    expected = files_of(extract_run(tmp_path / "single" / "run", asked))
    run = extract_on_cluster(client, tmp_path / "cluster" / "run", asked)
    found = files_of(run)
    assert {name for name in found if found[name] != expected.get(name)} == set()
    assert found.keys() == expected.keys()
    assert [path.name for path in (tmp_path / "cluster").iterdir()] == ["run"]
    name = f"{NAMES[1]}~1"
    (Path(run) / name / "zarr.json").unlink()
    repaired = extract_on_cluster(client, run, asked, repair=True)
    assert files_of(repaired) == expected
