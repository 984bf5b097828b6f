"""Reads return the opened values or an error: replaced and vanished files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import xarray as xr
from everyday import mostly_long

import zarrtrace as zt
from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.index import build_index
from zarrtrace.npz import export_npz
from zarrtrace.store import copy_run, summarize, verify
from zarrtrace.viewer.layout import Layout
from zarrtrace.viewer.server import Server

OPENED = ["open_trace", "open_run"]


def opened(run: Path, how: str, scenario: str = "Safe_1", **options: Any) -> xr.Dataset:
    """Open one scenario, by itself or within its run."""
    if how == "open_trace":
        return zt.open_trace(run / scenario, **options)
    return zt.open_run(run, **options)[scenario].to_dataset()


def data_files(folder: Path) -> list[Path]:
    """Return the files below a folder that hold values."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "zarr.json")


def arrays_of(trace: Path) -> list[str]:
    return sorted(file.parent.name for file in trace.glob("*/zarr.json"))


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


# --- a run that was replaced ------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, {}], ids=["lazy", "dask"])
@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("how", OPENED)
def test_replaced_run_is_not_read(
    run: fakes.FakeRun, how: str, read_before: bool, chunks: Any
) -> None:
    ds = opened(run.path, how, chunks=chunks)
    if read_before:
        for name in ds.data_vars:
            np.testing.assert_array_equal(ds[name][0], run.truth["Safe_1"][name][0])
    fakes.make_run(run.path.parent, seed=5, overwrite=True)
    for name in ds.data_vars:
        with pytest.raises(StoreError, match=r"(?s)Safe_1.*since it was opened.*[Oo]pen it again"):
            ds[name][1:].load()


@pytest.mark.parametrize("how", OPENED)
def test_rewritten_run_with_the_same_values_is_read(run: fakes.FakeRun, how: str) -> None:
    """A repair, or the same command again, leaves datasets readable that are open."""
    ds = opened(run.path, how)
    fakes.make_run(run.path.parent, repair=True)
    fakes.make_run(run.path.parent, overwrite=True)
    for name in ds.data_vars:
        np.testing.assert_array_equal(ds[name], run.truth["Safe_1"][name])


@pytest.mark.parametrize("how", OPENED)
def test_removed_run_is_not_read(run: fakes.FakeRun, how: str) -> None:
    ds = opened(run.path, how)
    shutil.rmtree(run.path)
    for name in ds.data_vars:
        with pytest.raises(StoreError, match="gone"):
            ds[name].load()


def test_growing_trace_is_opened_again_when_it_is_published(tmp_path: Path) -> None:
    begun = fakes.make_run(tmp_path, drop={"Safe_1": (3,)})
    ds = zt.open_trace(begun.trace, missing="nan")
    np.testing.assert_array_equal(
        ds.attention.sel(layer=[1, 2]), begun.truth["Safe_1"]["attention"][:2]
    )
    assert np.isnan(ds.attention.sel(layer=3)).all()
    unread = zt.open_trace(begun.trace, missing="nan")
    fakes.make_run(tmp_path)
    with pytest.raises(IntegrityError, match="Open it again"):
        unread.attention.load()
    assert not np.isnan(zt.open_trace(begun.trace).attention).any()


def test_viewer_does_not_mix_two_runs(run: fakes.FakeRun) -> None:
    """A page keeps the scenarios and tokens of the run that it was opened with."""
    with Server(run.path) as server:

        def get(name: str) -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(server.url + name) as answer:  # noqa: S310 -- ours
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        truth = Layout(run.path, is_live=True)
        files = [name for name in truth.files() if "/c/" in name]
        old = {name: (200, truth.read(name)) for name in ("index.json", *files)}
        before = {name: get(name) for name in ("index.json", *files[::2])}
        fakes.make_run(run.path.parent, seed=5, overwrite=True)
        after = {name: get(name) for name in ("index.json", *files)}
    assert before.items() <= old.items()
    kept = {name: answer for name, answer in after.items() if answer[0] == 200}
    assert kept.items() <= old.items()
    refused = [answer[1].decode() for name, answer in after.items() if name not in kept]
    assert refused
    assert all("since it was opened" in text for text in refused)
    with Server(run.path) as server:
        assert len({get(name)[0] for name in files}) == 1
        assert get(files[0])[1] != old[files[0]][1]


# --- at any moment of replacing a run, one is found -------------------------------------------

# At every rename and removal that concerns the run or what is beside it, open the run.
REPLACING = """
import ctypes, json, os, platform, struct, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import fakes
import zarrtrace as zt
from zarrtrace.errors import StoreError

folder, can_exchange, kill_at = Path(sys.argv[2]), sys.argv[3] == "yes", int(sys.argv[4])
if not can_exchange:  # renameat2 answers ENOSYS, as on a file system that cannot exchange
    number = {"x86_64": 316, "aarch64": 276}[platform.machine()]
    program = b"".join(
        struct.pack("HBBI", *line)
        for line in [
            (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50026), (0x06, 0, 0, 0x7FFF0000)
        ]
    )
    held = ctypes.create_string_buffer(program)
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(held)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter_, 0, 0) == 0
run, found, busy, at = folder / "run", [], [], [0]


def look(event, arguments):
    paths = [Path(one) for one in arguments[:2] if isinstance(one, (str, os.PathLike))]
    if busy or event not in ("os.rename", "shutil.rmtree", "os.remove", "os.rmdir"):
        return
    if not any(path.parent == folder and path.suffix != ".partial" for path in paths):
        return
    if at[0] == kill_at:
        os._exit(9)
    at[0] += 1
    busy.append(True)
    try:
        found.append(float(zt.open_trace(run / "Safe_1").attention[0, 0, 1, 0]))
    except StoreError as error:
        found.append(str(error))
    busy.clear()


sys.addaudithook(look)
fakes.make_run(folder, seed=5, overwrite=True)
print(json.dumps(found))
"""


def replacing(folder: Path, *, can_exchange: bool, kill_at: int = -1) -> tuple[int, list[Any]]:
    """Replace the run in a process of its own; return its exit code and what readers found."""
    arguments = [Path(__file__).parent, folder, "yes" if can_exchange else "no", kill_at]
    done = subprocess.run(
        [sys.executable, "-c", REPLACING, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 9), done.stderr
    return done.returncode, json.loads(done.stdout or "[]")


def assert_both_are_named(text: str, folder: Path) -> None:
    """The error names two folders; each is there or was just renamed, and one opens now."""
    names = {word.strip(".,:;'") for word in text.split() if word.startswith(str(folder))}
    beside = {name for name in names if Path(name).parent == folder and Path(name).name != "run"}
    assert len(beside) == 2, text


@pytest.mark.long
def test_replacing_leaves_no_moment_without_a_run(run: fakes.FakeRun) -> None:
    before = float(run.truth["Safe_1"]["attention"][0, 0, 1, 0])
    code, found = replacing(run.path.parent, can_exchange=True)
    after = float(zt.open_trace(run.trace).attention[0, 0, 1, 0])
    assert code == 0
    assert found
    assert set(found) <= {before, after}
    assert before != after
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


@pytest.mark.long
def test_readers_are_told_where_the_copies_are(run: fakes.FakeRun) -> None:
    """Where the file system cannot exchange two folders."""
    before = float(run.truth["Safe_1"]["attention"][0, 0, 1, 0])
    code, found = replacing(run.path.parent, can_exchange=False)
    after = float(zt.open_trace(run.trace).attention[0, 0, 1, 0])
    assert code == 0
    assert {one for one in found if isinstance(one, float)} <= {before, after}
    told = [one for one in found if isinstance(one, str)]
    assert told
    for text in told:
        assert_both_are_named(text, run.path.parent)
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("can_exchange", "kill_at"),
    mostly_long(
        lambda can_exchange, kill_at: kill_at == 1 or (kill_at == 2 and not can_exchange),
        [True, False],
        range(4),
    ),
)
def test_kill_while_replacing_loses_no_run(
    run: fakes.FakeRun, can_exchange: bool, kill_at: int
) -> None:
    folder = run.path.parent
    before = run.truth["Safe_1"]["attention"]
    replacing(folder, can_exchange=can_exchange, kill_at=kill_at)
    made = fakes.make_run(folder.parent / "other", seed=5)
    after = made.truth["Safe_1"]["attention"]
    try:
        found = zt.open_trace(run.trace).attention.values
    except StoreError as error:
        assert_both_are_named(str(error), folder)
    else:
        assert np.array_equal(found, before) or np.array_equal(found, after)
    fakes.make_run(folder, seed=5, overwrite=True)  # the same command once more
    np.testing.assert_array_equal(zt.open_trace(run.trace).attention, after)
    assert fakes.files_in(run.path) == fakes.files_in(made.path)
    assert [path.name for path in folder.iterdir()] == ["run"]


# --- folders and files that were exchanged ----------------------------------------------------


@pytest.fixture
def exchanged(run: fakes.FakeRun) -> fakes.FakeRun:
    """A run whose two scenarios' folders were exchanged."""
    exchange(run.path / "Safe_1", run.path / "Risky_2")
    return run


def test_exchanged_scenarios_are_named_by_verify(exchanged: fakes.FakeRun) -> None:
    problems = {problem.scenario: problem.message for problem in verify(exchanged.path)}
    assert problems.keys() == {"Safe_1", "Risky_2"}
    assert "'Risky_2'" in problems["Safe_1"]
    assert "'Safe_1'" in problems["Risky_2"]


@pytest.mark.parametrize("missing", ["raise", "nan"])
def test_exchanged_scenarios_are_not_opened(exchanged: fakes.FakeRun, missing: Any) -> None:
    with pytest.raises(IntegrityError, match=r"(?s)Safe_1: holds scenario 'Risky_2'.*--repair"):
        zt.open_run(exchanged.path, missing=missing)
    # By itself, a trace is what it says it is: folders of single traces may be renamed.
    ds = zt.open_trace(exchanged.path / "Safe_1")
    assert ds.attrs["scenario"] == "Risky_2"


def test_exchanged_scenarios_are_not_summarised_indexed_copied_or_exported(
    exchanged: fakes.FakeRun, tmp_path: Path
) -> None:
    for use in (
        lambda: summarize(exchanged.path),
        lambda: build_index(exchanged.path),
        lambda: copy_run(exchanged.path, tmp_path / "copy"),
        lambda: export_npz(exchanged.path, tmp_path / "npz"),
    ):
        with pytest.raises(IntegrityError, match="holds scenario"):
            use()
    assert not (tmp_path / "copy" / "zarr.json").exists()


def test_exchanged_scenarios_are_not_resumed_but_repaired(
    tmp_path: Path, shared_run: fakes.FakeRun
) -> None:
    begun = fakes.make_run(tmp_path, finish=False)
    exchange(begun.path / "Safe_1", begun.path / "Risky_2")
    with pytest.raises(IntegrityError, match=r"(?s)holds scenario.*--repair"):
        fakes.make_run(tmp_path)
    again = fakes.make_run(tmp_path, repair=True)
    assert fakes.files_in(again.path) == fakes.files_in(shared_run.path)


def test_exchanged_staged_traces_restart(tmp_path: Path, shared_run: fakes.FakeRun) -> None:
    begun = fakes.make_run(tmp_path, drop={"Safe_1": (3,), "Risky_2": (3,)})
    exchange(begun.path / ".staged" / "Safe_1", begun.path / ".staged" / "Risky_2")
    again = fakes.make_run(tmp_path)
    assert fakes.files_in(again.path) == fakes.files_in(shared_run.path)


# --- files that vanish ------------------------------------------------------------------------


@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("how", OPENED)
def test_vanished_file_is_not_read_as_a_fill_value(
    run: fakes.FakeRun, how: str, read_before: bool
) -> None:
    found: set[str] = set()
    for array in arrays_of(run.trace):
        for file in data_files(run.trace / array):
            ds = opened(run.path, how)
            if read_before and array in ds.data_vars:
                ds[array][:1].load()
            aside = file.rename(run.path.parent / "aside")
            try:
                values = ds[array].values
            except IntegrityError as error:
                assert array in error.what  # noqa: PT017 -- coordinates may be read on opening
                found.add(array)
            else:
                assert array in ds.coords
                np.testing.assert_array_equal(values, run.truth["Safe_1"][array])
            aside.rename(file)
    assert found >= set(opened(run.path, how).data_vars)
