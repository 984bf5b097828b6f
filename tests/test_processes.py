"""Processes write the same as threads of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from capturing import interrupted_after
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from zarrtrace.errors import NonFiniteError, StoreError
from zarrtrace.extraction import Options, extract_run, prepare, running, writer_template
from zarrtrace.extraction.channel import Channel, pair
from zarrtrace.extraction.processes import WriterPool, WriterProcesses
from zarrtrace.store import open_run, verify

pytestmark = pytest.mark.torch

ASKED = Options(layers=(1, 4), only=("Risky_40", "Desperate_10", "Medium_60"))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[WriterPool]:
    """Extraction on a CPU writes with two processes, the same ones in every run."""
    with WriterPool(2) as pool:
        monkeypatch.setattr(
            running,
            "WriterThreads",
            lambda traces, watch, **_: WriterProcesses(traces, watch, pool),
        )
        yield pool


def template() -> int:
    """Number of the process that writers are forked from."""
    return writer_template._TEMPLATES[os.getpid()]._process.pid


def writers(count: int = 1) -> list[int]:
    """Numbers of the processes that write, once there are that many."""
    for _ in range(400):
        found = Path(f"/proc/{template()}/task/{template()}/children").read_text().split()
        if len(found) >= count:
            return list(map(int, found))
        time.sleep(0.05)
    raise AssertionError("too few were forked")


@given(
    st.lists(
        npst.arrays(st.sampled_from(["<f4", "<u2", "<i8", "?"]), npst.array_shapes(min_dims=0))
    )
)
def test_arrays_arrive_as_they_were(arrays: list[np.ndarray]) -> None:
    ours, theirs = pair()
    with theirs:
        other, got = Channel(theirs), []
        thread = threading.Thread(target=lambda: got.append(other.receive()))
        thread.start()
        ours.send({"arrays": arrays, "empty": np.empty((0, 3))})
        thread.join()
        ours.close()
        with pytest.raises(EOFError):
            other.receive()
    for found, array in zip(got[0]["arrays"], arrays, strict=True):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype
    assert got[0]["empty"].shape == (0, 3)


def test_what_is_more_than_a_socket_holds_arrives() -> None:
    ours, theirs = pair()
    large = [np.full(1_000_000, number) for number in range(3)] + [np.arange(3)] * 2000
    with theirs:
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(Channel(theirs).receive()))
        thread.start()
        ours.send(large)
        thread.join()
    ours.close()
    np.testing.assert_array_equal(np.concatenate(got[0]), np.concatenate(large))


@pytest.fixture(scope="module")
def by_threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that threads write."""
    run = tmp_path_factory.mktemp("threads") / "run"
    extract_run(run, ASKED)
    return fakes.files_in(run)


def test_a_run_is_the_same_byte_for_byte(
    tmp_path: Path, two: WriterPool, by_threads: dict[str, bytes]
) -> None:
    extract_run(tmp_path / "run", ASKED)
    assert fakes.files_in(tmp_path / "run") == by_threads


def test_a_cpu_starts_no_process() -> None:
    names = ("Risky_40", "Desperate_10", "Medium_60", "Bankruptcy_90_all_in")
    with WriterPool(1) as pool:
        prepare(Options(layers=(1,), only=names, features=False), weights=False, pool=pool)
        assert pool._idle == []


@pytest.mark.long
def test_the_same_processes_write_run_after_run_and_the_rest_of_one(
    tmp_path: Path, two: WriterPool, by_threads: dict[str, bytes]
) -> None:
    two.start(3)
    before = writers(2)
    extract_run(tmp_path / "whole", ASKED)
    assert writers() == before
    with interrupted_after(5, WriterProcesses):
        extract_run(tmp_path / "rest", ASKED)
    extract_run(tmp_path / "rest", ASKED)
    for run in ("whole", "rest"):
        assert fakes.files_in(tmp_path / run) == by_threads
    assert set(open_run(tmp_path / "rest").children) == set(ASKED.only)


@pytest.mark.long
@pytest.mark.usefixtures("two")
def test_processes_outlive_the_thread_that_asked_for_them(tmp_path: Path) -> None:
    for name in ("first", "second"):  # as tasks of a worker, which end with their threads
        thread = threading.Thread(target=extract_run, args=(tmp_path / name, ASKED))
        thread.start()
        thread.join()
        assert verify(tmp_path / name) == []


@pytest.mark.long
def test_a_process_that_dies_is_named_and_the_run_goes_on(
    tmp_path: Path, two: WriterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = WriterProcesses.submit, []

    def submit(self: WriterProcesses, record: Any) -> None:
        seen.append(record)
        if len(seen) == 4:
            for process in writers():
                os.kill(process, signal.SIGKILL)
        original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(WriterProcesses, "submit", submit)
        with pytest.raises(StoreError, match="process that wrote it has ended"):
            extract_run(tmp_path / "run", ASKED)
    assert not two._idle
    extract_run(tmp_path / "run", ASKED)
    assert verify(tmp_path / "run") == []


@pytest.mark.long
@pytest.mark.usefixtures("two")
def test_errors_of_a_process_are_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_run(tmp_path / "run", ASKED)
    file = tmp_path / "run" / "Medium_60" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b"Medium_60", b"Medium_61", 1))
    with pytest.raises(Exception, match="Medium_60") as caught:
        extract_run(tmp_path / "run", ASKED)
    assert caught.type.__module__ == NonFiniteError.__module__


@pytest.mark.long
def test_no_process_outlives_its_parent() -> None:
    code = (
        "import test_processes as tests; from zarrtrace.extraction.processes import WriterPool;"
        "pool = WriterPool(1); pool.start(3); print(*tests.writers(), flush=True); input()"
    )
    tests = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | tests,
    )
    assert parent.stdout is not None
    (child,) = map(int, parent.stdout.readline().split())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    for _ in range(200):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it lives")


@pytest.mark.long
def test_a_template_that_was_killed_is_started_again(tmp_path: Path, two: WriterPool) -> None:
    extract_run(tmp_path / "before", ASKED)
    os.kill(template(), signal.SIGKILL)
    with pytest.raises(
        StoreError, match="process that wrote it has ended"
    ):  # its children end, too
        extract_run(tmp_path / "run", ASKED)
    extract_run(tmp_path / "run", ASKED)
    assert verify(tmp_path / "run") == []
