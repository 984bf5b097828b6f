"""Runs in object stores, against servers that are not ours: see ``s3_servers.py``."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing.util
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import fakes
import numpy as np
import processes
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner, Result
from everyday import mostly_long
from s3_servers import BUCKET, SERVER, Request, Server
from zarr.storage import ObjectStore

import zarrtrace as zt
from zarrtrace.card import write_card
from zarrtrace.cli import group
from zarrtrace.errors import (
    ConfigError,
    ConfigMismatchError,
    IntegrityError,
    LockedError,
    NotATraceError,
    RemoteError,
    StoreError,
)
from zarrtrace.index import build_index
from zarrtrace.storage import Location, locate
from zarrtrace.storage.location import REQUESTS_AT_ONCE
from zarrtrace.store import RunWriter, TraceWriter, copy_run, read_run, summarize, verify

Folder = Callable[[], Location]


@pytest.fixture(scope="session")
def google(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Google's interface, and in the environment the credentials that lead there."""
    key = tmp_path_factory.mktemp("google") / "key.json"
    with s3_server.google(key) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_SERVICE_ACCOUNT", str(key))
        yield server


# moto checks no credentials; Swift would, and Google's are others.
@pytest.fixture(params=["s3", "gs"] if SERVER == "moto" else ["s3"])
def folder(request: pytest.FixtureRequest, s3: Server) -> Folder:
    """Folders of the test's own, by the interfaces of Amazon and of Google."""
    server: Server = s3 if request.param == "s3" else request.getfixturevalue("google")
    return server.folder


@pytest.fixture(scope="session")
def tall(s3_server: Server) -> fakes.FakeRun:
    """A run there, of many layers, that no test may change."""
    folder = s3_server.folder()
    layers = tuple(range(1, 32))
    return fakes.make_run(folder, scenarios=ONE, layers=layers, heads=1, tokens=40, features=64)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, of this process and of those that it starts."""
    multiprocessing.util.get_temp_dir()  # chosen now: processes outlive a test
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


#: Names of the scenarios of a smaller run: a request takes a server in Python 20 ms.
ONE = ("Safe_1",)


def contents(folder: Location) -> dict[str, bytes]:
    return {name: (folder / name).read() for name in sorted(folder.files())}


def beside(run: Location) -> set[str]:
    """Return the names in the folder that a run is in."""
    return {name.split("/")[0] for name in run.parent.files()}


def assert_equals(ds: xr.Dataset, truth: fakes.Truth) -> None:
    for name, expected in truth.items():
        found = ds[name].to_numpy()
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert found.dtype.kind == expected.dtype.kind, name


def memory() -> Location:
    return locate(f"memory://{uuid.uuid4().hex}/folder")


# --- what is written, and what is read ---------------------------------------------------------


@pytest.mark.long
def test_run_is_the_same_in_an_object_store(folder: Folder, tmp_path: Path) -> None:
    assert_is_the_same(folder(), tmp_path)


def test_run_is_the_same_in_memory(tmp_path: Path) -> None:
    assert_is_the_same(memory(), tmp_path)


def assert_is_the_same(there: Location, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": (1, 2), "features": 20, "tokens": (7, 9)}
    local, remote = fakes.make_run(tmp_path, **sizes), fakes.make_run(there, **sizes)
    assert contents(remote.path) == fakes.files_in(local.path)
    assert beside(remote.path) == {"run"}
    assert_reads_the_same(remote.path, local)


def assert_reads_the_same(there: Location, local: fakes.FakeRun) -> None:
    run = zt.open_run(there)
    for scenario, truth in local.truth.items():
        assert_equals(zt.open_trace(there / scenario), truth)
        assert_equals(run[scenario].to_dataset(), truth)
        assert_equals(zt.open_trace(there / scenario, chunks="auto"), truth)
    assert verify(there) == []
    assert summarize(there).model_dump(exclude={"path"}) == summarize(local.path).model_dump(
        exclude={"path"}
    )


def test_fsspec_reads_the_same(tmp_path: Path) -> None:
    """An address that obstore does not know: ``local://`` is fsspec's own."""
    local = fakes.make_run(tmp_path, tokens=(7, 9))
    there = locate(f"local://{local.path}")
    assert_reads_the_same(there, local)
    copy_run(there, tmp_path / "copy")
    assert fakes.files_in(tmp_path / "copy") == fakes.files_in(local.path)
    (local.trace / "attention" / "c.0.0.0.0").unlink()
    with pytest.raises(IntegrityError, match="is gone"):
        zt.open_trace(there / "Safe_1")
    with pytest.raises(NotATraceError, match="no such folder"):
        zt.open_trace(there / "Nobody")


def test_fsspec_s_addresses_are_read_only(tmp_path: Path) -> None:
    local = fakes.make_run(tmp_path)
    with pytest.raises(ConfigError, match="such addresses are read only"):
        fakes.make_run(locate(f"local://{tmp_path}/there"))
    with pytest.raises(ConfigError, match="such addresses are read only"):
        copy_run(local.path, f"local://{tmp_path}/there/copy")
    with pytest.raises(ConfigError, match="such addresses are read only"):
        build_index(f"local://{local.path}")
    assert not (tmp_path / "there").exists()


def test_addresses_and_options_lead_to_the_same_run(s3: Server, tall: fakes.FakeRun) -> None:
    options = {"endpoint": s3.proxy.address}
    assert_equals(zt.open_trace(str(tall.trace), storage_options=options), tall.truth["Safe_1"])
    assert list(zt.open_run(str(tall.path), storage_options=options).children) == ["Safe_1"]


def test_plain_zarr_and_xarray_read_it(s3: Server, tall: fakes.FakeRun) -> None:
    """No code of ours: zarr's ObjectStore over obstore."""
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        prefix=str(tall.path).removeprefix(f"s3://{BUCKET}/"),
        endpoint=s3.proxy.address,
        client_options={"allow_http": True},
    )
    tree = xr.open_datatree(ObjectStore(store, read_only=True), engine="zarr")
    truth = tall.truth["Safe_1"]
    np.testing.assert_array_equal(tree["Safe_1"]["attention"].values, truth["attention"])
    group = zarr.open_group(ObjectStore(store, read_only=True), mode="r")
    np.testing.assert_array_equal(group["Safe_1/features"][:], truth["features"])


# --- requests ----------------------------------------------------------------------------------


def asked(server: Server) -> list[tuple[str, str]]:
    """Return what was asked for since the last call: a GET's or HEAD's file, or LIST."""
    found = [
        (one.method, "LIST" if "list-type" in one.path else one.path.partition("?")[0][-40:])
        for one in server.proxy.seen
    ]
    server.proxy.seen.clear()
    return found


def test_opening_a_trace_is_one_get_and_one_list(s3: Server, tall: fakes.FakeRun) -> None:
    asked(s3)
    zt.open_trace(tall.trace)
    assert sorted((method, file.rpartition("/")[2]) for method, file in asked(s3)) == [
        ("GET", "LIST"),
        ("GET", "zarr.json"),
    ]


def test_opening_a_run_is_one_get_a_trace_and_one_list(s3: Server) -> None:
    names = tuple(f"Safe_{number}" for number in range(5))
    made = fakes.make_run(s3.folder(), scenarios=names, layers=(1,), features=0, tokens=3)
    asked(s3)
    zt.open_run(made.path)
    files = [file.rpartition("run/")[2] for _, file in asked(s3)]
    assert sorted(files) == sorted(["LIST", "zarr.json", *(f"{name}/zarr.json" for name in names)])


@pytest.mark.parametrize(
    ("part", "most"),
    [
        # An index, and neighbouring chunks as one range.
        (lambda ds: ds.attention[:, :, -1, 1:3], 2),
        (lambda ds: ds.attention[3], 2),
        (lambda ds: ds.features.sel(feature=5), 2),
        (lambda ds: ds.features[:, -1], 2),
        (lambda ds: ds.features.sel(layer=[1, 31]), 2),
        (lambda ds: ds.next_token, 1),
    ],
)
def test_reading_is_an_index_and_a_range_a_file(
    s3: Server, tall: fakes.FakeRun, part: Any, most: int
) -> None:
    for ds in (zt.open_trace(tall.trace), zt.open_run(tall.path)["Safe_1"].to_dataset()):
        asked(s3)
        found = part(ds).values
        assert len(asked(s3)) == most
        np.testing.assert_array_equal(found, part(truth_as_dataset(tall)).values)


def truth_as_dataset(made: fakes.FakeRun) -> xr.Dataset:
    ds = zt.open_trace(made.trace)
    return ds.assign({name: (ds[name].dims, made.truth["Safe_1"][name]) for name in ds.data_vars})


def test_long_prompts_read_neighbouring_chunks_together(s3: Server) -> None:
    made = fakes.make_run(s3.folder(), scenarios=ONE, layers=(1, 2), tokens=600, features=16)
    ds = zt.open_trace(made.trace)
    asked(s3)
    row = ds.attention[:, :, 500, :].values
    assert len(asked(s3)) <= 3
    np.testing.assert_array_equal(row, made.truth["Safe_1"]["attention"][:, :, 500, :])


def test_resuming_a_complete_run_reads_metadata_alone(s3: Server) -> None:
    folder = s3.folder()
    made = fakes.make_run(folder, scenarios=ONE)
    asked(s3)
    again = fakes.make_run(folder, scenarios=ONE)
    assert again.written == []
    files = [file for method, file in asked(s3) if method == "GET" and file != "LIST"]
    assert {file.rpartition("/")[2] for file in files} == {"zarr.json"}
    assert not [file for file in files if "/Safe_1/" in file and file[-17:] != "/Safe_1/zarr.json"]
    assert collections.Counter(files).most_common(1)[0][1] <= 5
    assert_equals(zt.open_trace(again.trace), made.truth["Safe_1"])


def test_requests_at_once_are_bounded(s3: Server, tall: fakes.FakeRun) -> None:
    s3.proxy.most = 0
    s3.proxy.fault = lambda _: time.sleep(0.02)
    verify(tall.path)
    assert 4 < s3.proxy.most <= REQUESTS_AT_ONCE


def test_large_objects_are_sent_in_parts(s3: Server, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(20 * 2**20)
    (tmp_path / "large").write_bytes(content)
    for data in (content, tmp_path / "large"):
        file = s3.folder() / "large"
        s3.proxy.seen.clear()
        file.write(data)
        sent = [one for one in s3.proxy.seen if one.method == "PUT"]
        assert len(sent) == 3
        assert all("uploadId=" in one.path for one in sent)
        assert file.read() == content


# --- damage and faults -------------------------------------------------------------------------


@pytest.mark.long
def test_damage_is_found(s3: Server) -> None:
    made = fakes.make_run(s3.folder(), scenarios=ONE)
    ds, run = zt.open_trace(made.trace), zt.open_run(made.path)
    file = made.trace / "attention" / "c.0.0.0.0"
    content = file.read()
    file.write(content[:-1])
    with pytest.raises(IntegrityError, match=f"has {len(content) - 1} bytes"):
        zt.open_trace(made.trace)
    for opened in (ds, run["Safe_1"].to_dataset()):
        with pytest.raises(IntegrityError, match=r"attention/c\.0\.0\.0\.0"):
            opened.attention[1, :, -1].values  # noqa: B018 -- reads
    file.writable_backend().delete([file.key])
    with pytest.raises(IntegrityError, match="gone"):
        run["Safe_1"].attention[1].values  # noqa: B018
    problems = verify(made.path)
    assert [(one.array, one.layer, one.message) for one in problems] == [
        ("attention", None, "is gone")
    ]
    flipped = bytearray(content)
    flipped[10] ^= 1
    file.write(bytes(flipped))
    with pytest.raises(IntegrityError, match="cannot be decoded"):
        zt.open_trace(made.trace).attention[0].values  # noqa: B018
    assert [(one.array, one.layer) for one in verify(made.path)] == [("attention", 1)]
    again = fakes.make_run(made.path.parent, scenarios=ONE, repair=True)
    assert again.written == [("Safe_1", 1)]
    assert verify(made.path) == []
    assert file.read() == content


@pytest.mark.long
def test_errors_and_slowness_of_the_server_are_borne(s3: Server, tmp_path: Path) -> None:
    count = 0

    def fault(request: Request) -> int | None:
        nonlocal count
        count += 1
        if count % 7 == 0:
            time.sleep(0.3)
        return (500, 503)[count % 2] if count % 5 == 0 else None

    s3.proxy.fault = fault
    there = fakes.make_run(s3.folder(), scenarios=ONE)
    assert count > 40
    assert_equals(zt.open_trace(there.trace), there.truth["Safe_1"])
    s3.proxy.fault = lambda _: None
    local = fakes.make_run(tmp_path, scenarios=ONE)
    assert contents(there.path) == fakes.files_in(local.path)


@pytest.mark.torch
@pytest.mark.long
def test_server_that_is_gone_for_a_while(s3: Server, tmp_path: Path) -> None:
    """Killed during an extraction, and started again: with Swift all its processes; with moto,
    whose data would be lost, the proxy before it.
    """
    from zarrtrace.extraction import Options, extract_run

    puts: list[Request] = []
    killed, back = threading.Event(), threading.Event()
    server: Any = s3.processes if SERVER == "swift" else s3.proxy

    def start() -> None:
        time.sleep(2)
        server.start()
        back.set()

    def fault(request: Request) -> int | None:
        if request.method == "PUT":
            puts.append(request)
        if len(puts) == 12 and not killed.is_set():
            killed.set()
            server.kill()
            threading.Thread(target=start).start()
        return None

    s3.proxy.fault = fault
    options = Options(layers=(1, 2), features=False, only=("Desperate_10",))
    there = s3.folder() / "run"
    extract_run(there, options)
    assert back.wait(60)
    s3.proxy.fault = lambda _: None
    assert len(puts) > 15
    extract_run(tmp_path / "run", options)
    assert contents(there) == fakes.files_in(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize(
    "cut", mostly_long(lambda cut: cut in (0, 15, 39), [0, 1, 2, 15, 38, 39, 40])
)
def test_readers_see_complete_traces_only(cut: int, s3: Server, tmp_path: Path) -> None:
    """Whatever request is the last that a writer gets through."""
    puts = 0

    def fault(request: Request) -> int | None:
        nonlocal puts
        puts += request.method == "PUT"
        return 403 if puts > cut and request.method in ("PUT", "DELETE", "POST") else None

    folder = s3.folder()
    s3.proxy.fault = fault
    with pytest.raises(RemoteError, match="access denied"):
        fakes.make_run(folder)
    s3.proxy.fault = lambda _: None
    local = fakes.make_run(tmp_path)
    run, seen = folder / "run", set()
    for scenario in fakes.SCENARIOS:
        try:
            assert_equals(zt.open_trace(run / scenario), local.truth[scenario])
            seen.add(scenario)
        except (NotATraceError, StoreError) as error:
            assert not isinstance(error, IntegrityError)  # noqa: PT017 -- no half trace
    if cut:
        with pytest.raises(StoreError):
            zt.open_run(run)
        assert set(summarize(run).scenarios_missing).isdisjoint(seen)
    again = fakes.make_run(folder)
    assert {scenario for scenario, _ in again.written}.isdisjoint(seen)
    assert contents(run) == fakes.files_in(local.path)


def test_interrupted_upload_computes_nothing_again(s3: Server, temporary: Path) -> None:
    """Layers stay in the folder of temporary files until their trace is published."""
    folder = s3.folder()
    s3.proxy.fault = lambda request: 403 if "/attention/" in request.path else None
    with pytest.raises(RemoteError):
        fakes.make_run(folder, scenarios=ONE)
    s3.proxy.fault = lambda _: None
    with pytest.raises(StoreError, match="0 of 3 layers missing"):
        zt.open_trace(folder / "run" / "Safe_1")
    assert zt.open_trace(folder / "run" / "Safe_1", missing="nan").attention.notnull().all()
    again = fakes.make_run(folder, scenarios=ONE)
    assert again.written == []
    assert_equals(zt.open_trace(again.trace), again.truth["Safe_1"])
    assert [*temporary.rglob("*.*"), *temporary.glob("*/*")] == []


def test_layers_of_an_interrupted_run_are_resumed(s3: Server, tmp_path: Path) -> None:
    folder = s3.folder()
    fakes.make_run(folder, scenarios=ONE, drop={"Safe_1": [2, 3]})
    again = fakes.make_run(folder, scenarios=ONE)
    assert again.written == [("Safe_1", 2), ("Safe_1", 3)]
    local = fakes.make_run(tmp_path, scenarios=ONE)
    assert contents(again.path) == fakes.files_in(local.path)


def test_layers_of_another_run_are_not_resumed(s3: Server) -> None:
    """A run was deleted, not overwritten; what it left among temporary files is another's."""
    folder = s3.folder()
    fakes.make_run(folder, scenarios=ONE, drop={"Safe_1": [3]}, seed=7)
    left = folder / "run" / "zarr.json"
    left.writable_backend().delete([left.key])
    again = fakes.make_run(folder, scenarios=ONE)
    assert len(again.written) == 3
    assert_equals(zt.open_trace(again.trace), again.truth["Safe_1"])


def test_staged_layers_of_other_settings_are_not_resumed() -> None:
    """A cluster's worker may hold layers of a run that was deleted since, of other settings."""
    run, plan = memory() / "run", fakes.make_plan()
    records = list(fakes.make_records())
    for settings, missing in (("a", (1, 2, 3)), ("a", (2, 3)), ("b", (1, 2, 3))):
        writer = TraceWriter(run, dataclasses.replace(plan, settings=settings))
        assert writer.missing_layers == missing
        if settings == "a" and 1 in missing:
            writer.append(records[0])


@pytest.mark.long
def test_replaced_run_is_not_read(s3: Server) -> None:
    folder = s3.folder()
    made = fakes.make_run(folder, scenarios=ONE)
    opened = [zt.open_trace(made.trace), zt.open_run(made.path)["Safe_1"].to_dataset()]
    opened[1].attention[:1].load()
    fakes.make_run(folder, scenarios=ONE, seed=5, overwrite=True)
    for ds in opened:
        for name in ds.data_vars:
            with pytest.raises(IntegrityError):
                ds[name][1:].load()


# --- the index ---------------------------------------------------------------------------------


@pytest.mark.long
def test_index_is_built_on_machines_with_other_disks(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks share the object store with the client, and no folder of temporary files."""
    local, there = fakes.make_run(tmp_path), s3.folder() / "run"
    build_index(local.path)
    copy_run(fakes.make_run(tmp_path, name="plain").path, there)
    (tmp_path / "elsewhere").mkdir()

    def elsewhere(graph: Any, keys: Any, **_: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
            return dask.get(graph, keys)

    with dask.config.set(scheduler=elsewhere):
        build_index(there)
        assert contents(there) == fakes.files_in(local.path)
        s3.proxy.fault = lambda request: (
            403 if request.method == "PUT" and request.path.endswith("index/zarr.json") else None
        )
        with pytest.raises(RemoteError):
            build_index(there, rebuild=True)
        s3.proxy.fault = lambda _: None
        build_index(there)
    assert contents(there) == fakes.files_in(local.path)
    assert beside(there) == {"run"}
    assert fakes.files_in(tmp_path / "elsewhere") == {}


# --- two writers -------------------------------------------------------------------------------


def test_one_writer_a_machine(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder() / "run"
    with RunWriter(run, ["a"], {}):
        with pytest.raises(LockedError, match="another process is writing"):
            RunWriter(run, ["a"], {}).__enter__()
        with RunWriter(run.with_name("run2"), ["a"], {}):
            pass
    with RunWriter(run, ["a"], {}):
        pass
    assert list(run.files()) == ["zarr.json"]  # and no lock


def meanwhile(server: Server, matches: Callable[[Request], bool], act: Callable[[], None]) -> None:
    """Act as another writer does, once, before the server gets a certain request."""
    done: list[Request] = []

    def fault(request: Request) -> None:
        if matches(request) and not done:
            done.append(request)
            act()

    server.proxy.fault = fault


def is_last_put(request: Request) -> bool:
    return request.method == "PUT" and request.path.endswith("/Safe_1/zarr.json")


def is_comparison(request: Request) -> bool:
    """Whether it lists what has been uploaded: the only one that follows upon a PUT."""
    return request.method == "GET" and "list-type" in request.path and "Safe_1" in request.path


def test_writer_of_the_same_bytes_may_be_faster(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines run one command: the trace that is published first stays."""
    folder, local = s3.folder(), fakes.make_run(tmp_path, scenarios=ONE)
    trace = folder / "run" / "Safe_1"

    def publish() -> None:
        for name, content in sorted(fakes.files_in(local.trace).items(), reverse=True):
            (trace / name).write(content)

    with RunWriter(folder / "run", ONE, fakes.CONFIG) as run:
        writer = run.trace(fakes.make_plan())
        for record in fakes.make_records():
            writer.append(record)
        publish()
        s3.proxy.seen.clear()
        writer.finish()
        assert [one.path for one in s3.proxy.seen if one.method != "HEAD"] == []
        run.finish()
    assert contents(folder / "run") == fakes.files_in(local.path)


def test_bytes_of_another_size_are_uploaded_over(s3: Server, tmp_path: Path) -> None:
    folder, local = s3.folder(), fakes.make_run(tmp_path, scenarios=ONE)
    file = folder / "run" / "Safe_1" / "attention" / "c.0.0.0.0"
    puts = collections.Counter[str]()
    s3.proxy.seen.clear()
    meanwhile(
        s3,
        lambda request: is_comparison(request) and "attention" in str(s3.proxy.seen),
        lambda: file.write(b"of another size"),
    )
    fakes.make_run(folder, scenarios=ONE)
    s3.proxy.fault = lambda _: None
    puts.update(one.path for one in s3.proxy.seen if one.method == "PUT")
    assert puts[f"/{BUCKET}/{str(file).partition(f'{BUCKET}/')[2]}"] == 3  # ours, theirs, ours
    assert contents(folder / "run") == fakes.files_in(local.path)


def test_writer_that_is_always_overwritten_gives_up(s3: Server) -> None:
    folder = s3.folder()
    file = folder / "run" / "Safe_1" / "attention" / "c.0.0.0.0"
    inside: list[int] = []

    def fault(request: Request) -> None:
        if is_comparison(request) and not inside:
            inside.append(1)
            file.write(b"of another size")
            inside.clear()

    s3.proxy.fault = fault
    with pytest.raises(RemoteError, match="holds other files than were written"):
        fakes.make_run(folder, scenarios=ONE)
    s3.proxy.fault = lambda _: None
    with pytest.raises(StoreError):
        zt.open_run(folder / "run")
    assert not (folder / "run" / "Safe_1" / "zarr.json").is_file()


def same_size(tmp_path: Path, key: str) -> tuple[fakes.FakeRun, bytes]:
    """Return a run, and the bytes that a file of the same size has in another one."""
    local = fakes.make_run(tmp_path, scenarios=ONE)
    for seed in range(1, 200):
        other = fakes.make_run(tmp_path / "others", name=str(seed), scenarios=ONE, seed=seed)
        content = (other.trace / key).read_bytes()
        if len(content) == (local.trace / key).stat().st_size:
            return local, content
    raise AssertionError("no seed gives a file of the same size")


@pytest.mark.long
def test_mixture_of_one_size_is_named(s3: Server, tmp_path: Path) -> None:
    """Unequal hardware computes other values, whose chunks may have the same size."""
    array, key = "next_token_logprob", "next_token_logprob/c.0.0"
    local, other = same_size(tmp_path, key)
    folder = s3.folder()
    file = folder / "run" / "Safe_1" / key
    meanwhile(s3, is_last_put, lambda: file.write(other))
    there = fakes.make_run(folder, scenarios=ONE)
    assert file.read() == other
    assert [(one.scenario, one.array) for one in verify(there.path)] == [("Safe_1", array)]
    ds = zt.open_trace(there.trace)
    with pytest.raises(IntegrityError, match="is not the file that belongs to this array"):
        ds[array].load()
    np.testing.assert_array_equal(ds.attention.values, there.truth["Safe_1"]["attention"])
    fakes.make_run(folder, scenarios=ONE, repair=True)
    assert contents(there.path) == fakes.files_in(local.path)


_WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import fakes
from zarrtrace.errors import ZarrtraceError
from zarrtrace.storage import locate

try:
    fakes.make_run(locate(sys.argv[2], {"endpoint": sys.argv[3]}), seed=int(sys.argv[4]))
except ZarrtraceError as error:
    print("refused", error)
"""


@pytest.mark.long
@pytest.mark.parametrize("seeds", [(0, 0), (0, 5)], ids=["equal", "unequal"])
def test_two_machines_leave_a_trace_or_a_named_mixture(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: tuple[int, int]
) -> None:
    folder, answers = s3.folder(), []
    s3.proxy.fault = lambda _: time.sleep(0.01)
    with contextlib.ExitStack() as stack:
        both = []
        for number, seed in enumerate(seeds):
            monkeypatch.setenv("TMPDIR", str(tmp_path / f"machine-{number}"))
            (tmp_path / f"machine-{number}").mkdir()
            arguments = (Path(__file__).parent, folder, s3.proxy.address, seed)
            both.append(stack.enter_context(processes.forked(_WRITER, *arguments)))
        for process in both:
            answers.append(process.communicate(timeout=120))
            assert process.returncode == 0, answers
    s3.proxy.fault = lambda _: None
    local = [fakes.make_run(tmp_path, name=f"local-{n}", seed=seed) for n, seed in enumerate(seeds)]
    if seeds[0] == seeds[1] and not any("refused" in said for said, _ in answers):
        assert contents(folder / "run") == fakes.files_in(local[0].path)
    named = {one.scenario for one in verify(folder / "run")}
    for scenario in fakes.SCENARIOS:
        seen = set()
        with contextlib.suppress(StoreError):
            ds = zt.open_trace(folder / "run" / scenario)
            for name in ds.data_vars:
                with contextlib.suppress(IntegrityError):
                    found = ds[name].values
                    truths = [one.truth[scenario][name] for one in local]
                    which = [np.array_equal(found, truth, equal_nan=found.dtype.kind == "f")
                             for truth in truths]  # fmt: skip
                    assert any(which)
                    seen.add(which.index(True))
        assert len(seen) <= 1 or scenario in named
    again = fakes.make_run(folder, repair=True)
    assert verify(again.path) == []


# --- addresses ---------------------------------------------------------------------------------


def test_addresses() -> None:
    path = locate("s3://bucket/a/run/")
    assert (str(path), path.name, str(path.parent)) == ("s3://bucket/a/run", "run", "s3://bucket/a")
    assert str(path.with_name(".run.lock")) == "s3://bucket/a/.run.lock"
    assert locate("runs/demo").path == Path("runs/demo")
    assert locate("file:///runs/demo").path == Path("/runs/demo")
    for bad in ("s3://bucket", "s3://", "s3://bucket/../run", "https://host/run?token=1"):
        with pytest.raises(ConfigError, match="not the address"):
            locate(bad)
    with pytest.raises(ConfigError, match="looks like a credential"):
        locate("s3://bucket/run", {"aws_secret_access_key": "x"})
    with pytest.raises(ConfigError, match="holds a password") as found:
        locate("sftp://user:hunter2@host/run")
    assert "hunter2" not in str(found.value)
    with pytest.raises(ConfigError, match="nosuch"):
        locate("nosuch://bucket/run").is_file()
    with pytest.raises(ConfigError, match="endpointx"):
        locate("s3://bucket/run", {"endpointx": "x"}).is_file()


def test_credentials_stand_in_no_error(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "Zgk" * 13
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    run = s3.folder() / "run"
    s3.proxy.fault = lambda _: 403
    with pytest.raises(RemoteError) as found:
        zt.open_run(run)
    assert secret not in str(found.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"needs obstore(.|\n)*pip install obstore"):
        locate(f"s3://bucket-{uuid.uuid4().hex}/run").is_file()


# --- copying -----------------------------------------------------------------------------------


@pytest.mark.long
def test_copy_there_and_back(s3: Server, tmp_path: Path, temporary: Path) -> None:
    local = fakes.make_run(tmp_path, layers=(1, 2))
    build_index(local.path)
    write_card(local.path)
    there, steps = s3.folder() / "copy", []
    done = copy_run(local.path, there, progress=lambda *step: steps.append(step))
    assert contents(there) == fakes.files_in(local.path)
    assert done.scenarios == 2
    assert done.bytes_there == 0
    assert steps[-1] == (done.bytes, done.bytes)
    assert beside(there) == {"copy"}
    assert copy_run(there, tmp_path / "back").bytes == done.bytes
    assert fakes.files_in(tmp_path / "back") == fakes.files_in(local.path)
    again = copy_run(local.path, there)
    assert (again.bytes, again.bytes_there) == (0, done.bytes)
    trace = copy_run(there / "Risky_2", f"memory://{uuid.uuid4().hex}/trace")
    assert trace.scenarios == 1
    copy_run(there / "Risky_2", tmp_path / "alone" / "trace")
    assert fakes.files_in(tmp_path / "alone") == {
        f"trace/{name}": content for name, content in fakes.files_in(local.path / "Risky_2").items()
    }
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["trace"]
    assert [*temporary.glob("*/*")] == []


@pytest.mark.long
def test_interrupted_copy_is_resumed(s3: Server, tmp_path: Path) -> None:
    local, there = fakes.make_run(tmp_path), s3.folder() / "copy"
    puts = 0

    def fault(request: Request) -> int | None:
        nonlocal puts
        puts += request.method == "PUT"
        return 403 if puts > 60 else None

    s3.proxy.fault = fault
    with pytest.raises(RemoteError):
        copy_run(local.path, there)
    s3.proxy.fault = lambda _: None
    assert (there / "Safe_1" / "zarr.json").is_file()
    assert not (there / "Risky_2" / "zarr.json").is_file()
    assert not (there / "zarr.json").is_file()
    damaged = next(there / name for name in there.files() if name.startswith("Risky_2/"))
    damaged.write(damaged.read()[::-1])  # on its way, of the same size
    done = copy_run(local.path, there)
    assert done.bytes_there > 0
    assert done.bytes > 0
    assert contents(there) == fakes.files_in(local.path)


@pytest.mark.parametrize("to", ["disk", "memory"])
def test_copy_that_lost_files_is_copied_again(tmp_path: Path, to: str) -> None:
    local = fakes.make_run(tmp_path)
    there = locate(tmp_path / "copy") if to == "disk" else memory() / "copy"
    copy_run(local.path, there)
    lost = there / "Safe_1" / "attention" / "c.0.0.0.0"
    lost.writable_backend().delete([lost.key])
    done = copy_run(local.path, there)
    assert done.bytes > 0
    assert done.bytes_there > 0
    assert contents(there) == fakes.files_in(local.path)


def test_copy_refuses_damage_and_other_runs(tmp_path: Path) -> None:
    local = fakes.make_run(tmp_path)
    address = f"memory://{uuid.uuid4().hex}/copy"
    file = local.trace / "features" / "c.0.0.0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"features/c\.0\.0\.0: 1 chunks are damaged"):
        copy_run(local.path, address)
    assert not (locate(address) / "Safe_1").exists()
    other = fakes.make_run(tmp_path, name="other", config={"model": "another"})
    copy_run(other.path, address + "2")
    with pytest.raises(ConfigMismatchError, match="another run is there"):
        copy_run(fakes.make_run(tmp_path, name="third").path, address + "2")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    with pytest.raises(NotATraceError):
        copy_run(other.path, tmp_path / "notes")


# --- the command line --------------------------------------------------------------------------


def call(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(one) for one in arguments])


@pytest.mark.long
def test_every_command_takes_an_address(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = s3.folder() / "run"
    option = ("--storage-option", f"endpoint={s3.proxy.address}")

    def said(*arguments: object, code: int = 0) -> str:
        found = call(*arguments, *option)
        assert found.exit_code == code, (found.output, found.exception)
        return found.output

    local = fakes.make_run(tmp_path, layers=(2, 3), tokens=(7, 9)).path
    assert "2 scenarios" in said("copy", local, run)
    assert f"run          {run}" in said("info", run)
    assert "everything is there" in said("verify", run)
    assert "index built" in said("index", run, "--threads", "1")
    assert "index unchanged" in said("index", run)
    found = said("find", run, "--layer", 2, "--feature", 3)
    assert "feature 3 of layer 2" in found
    said("export", run, "-o", tmp_path / "npz")
    said("export", local, "-o", tmp_path / "npz_local")
    for name in ("Safe_1/layer_2.npz", "Risky_2/layer_3.npz"):
        assert (tmp_path / "npz" / name).read_bytes() == (
            tmp_path / "npz_local" / name
        ).read_bytes()
    said("import", tmp_path / "npz", "-o", run.parent / "imported")
    assert verify(run.parent / "imported") == []
    assert "index built" in said("index", local)  # its words name features in tables
    table = said("analyze", "feature-trajectory", run, "--feature", "2:3")
    assert table == said("analyze", "feature-trajectory", local, "--feature", "2:3")
    said("bundle", run, "-o", tmp_path / "bundle", "-q")
    said("bundle", local, "-o", tmp_path / "bundle_local", "-q")
    assert fakes.files_in(tmp_path / "bundle") == fakes.files_in(tmp_path / "bundle_local")
    figures = ("--scenario", "Safe_1", "--format", "png", "--dpi", 30, "-q")
    said("figures", run, "-o", tmp_path / "figures", *figures)
    assert (tmp_path / "figures" / "index.html").is_file()
    assert "README.md" in said("card", run)
    monkeypatch.setattr("zarrtrace.viewer.server.Server.run", lambda self: None)
    assert said("view", run, "--no-browser").startswith("http://127.0.0.1:")


def test_storage_options_on_the_command_line() -> None:
    bad = call("info", "s3://bucket/run", "--storage-option", "endpoint")
    assert bad.exit_code == 2
    assert "give it as KEY=VALUE" in bad.output
    bad = call("info", "s3://bucket/run", "--storage-option", "secret_access_key=x")
    assert isinstance(bad.exception, ConfigError)
    assert "x" not in str(bad.exception).split()


def test_a_copy_reaches_its_target_by_options_of_its_own(s3: Server, tmp_path: Path) -> None:
    local = fakes.make_run(tmp_path, scenarios=ONE, layers=(1,))
    there = s3.folder() / "copy"
    options = ["--storage-option", "endpoint=http://127.0.0.1:9"]
    for name, value in there.options:
        options += ["--target-option", f"{name}={value}"]
    assert call("copy", local.path, str(there), "-q", *options).exit_code == 0
    assert contents(there) == fakes.files_in(local.path)


@pytest.mark.torch
@pytest.mark.long
@pytest.mark.parametrize("moment", ["capture", "upload"])
def test_killed_extraction_is_resumed(
    s3: Server, tmp_path: Path, temporary: Path, moment: str
) -> None:
    """By SIGKILL, while the model computes or while a trace is uploaded."""
    run, puts, enough = s3.folder() / "run", 0, threading.Event()

    def fault(request: Request) -> int | None:
        nonlocal puts
        puts += request.method == "PUT"
        if puts > 5:
            enough.set()
            time.sleep(0.2)
        return None

    s3.proxy.fault = fault
    options = ("--layers", "1-9", "--no-features", "--scenario", "Desperate_10",
               "--scenario", "Risky_40", "-q")  # fmt: skip
    where = ("-o", run, "--storage-option", f"endpoint={s3.proxy.address}")
    with processes.extracting(*where, *options) as process:
        if moment == "upload":
            assert enough.wait(120), process.poll()
        else:
            until = time.monotonic() + 120
            while not any(temporary.rglob("attention/c.*")):
                assert time.monotonic() < until
                time.sleep(0.002)
        process.kill()
        process.wait()
    s3.proxy.fault = lambda _: None
    assert not summarize(run).complete
    assert call("extract", *where, *options).exit_code == 0
    assert call("extract", "-o", tmp_path / "run", *options).exit_code == 0
    assert contents(run) == fakes.files_in(tmp_path / "run")
    assert beside(run) == {"run"}
    assert [*temporary.rglob("*.lock"), *temporary.glob("*/*/*")] == []


@pytest.mark.long
@pytest.mark.parametrize("cut", mostly_long(lambda cut: cut in (20, 60), [1, 20, 39, 60, 76]))
def test_overwriting_and_interrupted_replacements(s3: Server, cut: int) -> None:
    """A run of 39 objects is written beside the old one, then copied over it."""
    folder = s3.folder()
    small: dict[str, Any] = {"scenarios": ONE, "layers": (1,)}
    fakes.make_run(folder, **small)
    other = {**small, "config": {"model": "other"}, "seed": 5}
    with pytest.raises(ConfigMismatchError):
        fakes.make_run(folder, **other)
    puts = 0

    def fault(request: Request) -> int | None:
        nonlocal puts
        puts += request.method == "PUT"
        return 403 if puts > cut else None

    s3.proxy.fault = fault
    with pytest.raises(RemoteError):
        fakes.make_run(folder, **other, overwrite=True)
    s3.proxy.fault = lambda _: None
    made = fakes.make_run(folder, **other, overwrite=True)
    assert_equals(zt.open_trace(made.trace), made.truth["Safe_1"])
    assert read_run(made.path).attributes.config == {"model": "other"}
    assert verify(made.path) == []
    assert beside(made.path) == {"run"}


def test_complete_successor_takes_its_place(s3: Server) -> None:
    """It was interrupted while it was copied over the old run: nothing is computed again."""
    folder = s3.folder()
    small: dict[str, Any] = {"scenarios": ONE, "layers": (1,)}
    fakes.make_run(folder, **small)
    other = {**small, "config": {"model": "other"}, "seed": 5}
    s3.proxy.fault = lambda request: 403 if "x-amz-copy-source" in request.headers else None
    with pytest.raises(RemoteError):
        fakes.make_run(folder, **other, overwrite=True)
    s3.proxy.fault = lambda _: None
    made = fakes.make_run(folder, **other)
    assert made.written == []
    assert_equals(zt.open_trace(made.trace), made.truth["Safe_1"])
    assert beside(made.path) == {"run"}
