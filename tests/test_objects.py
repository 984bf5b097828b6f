"""Runs in object stores, against servers that are not ours: see ``s3_servers.py``."""

from __future__ import annotations

import collections
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import processes
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner, Result
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
)
from zarrtrace.index import build_index
from zarrtrace.storage import locate
from zarrtrace.store import copy_run, leases, objects, summarize, verify
from zarrtrace.store import writer as writer_module


@pytest.fixture
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead owners are recognised sooner than a user's network allows."""
    monkeypatch.setattr(leases, "SECONDS_A_BEAT", 0.3)
    monkeypatch.setattr(leases, "SECONDS_DEAD", 2.0)


Folder = Callable[[], ObjectPath]


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


#: Names of the scenarios of a smaller run: a request takes a server in Python 20 ms.
ONE = ("Safe_1",)


def _contents(folder: ObjectPath) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(folder.files())}


def _equals(ds: xr.Dataset, truth: fakes.Truth) -> None:
    for name, expected in truth.items():
        found = ds[name].to_numpy()
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert found.dtype.kind == expected.dtype.kind, name


# --- what is written, and what is read ------------------------------------------------------------


def test_a_run_is_the_same_in_an_object_store(folder: Folder, tmp_path: Path) -> None:
    _is_the_same(folder(), tmp_path)


@pytest.mark.parametrize("kind", ["memory", "fsspec"])
def test_a_run_is_the_same_in_every_store(kind: str, tmp_path: Path) -> None:
    there = {
        "memory": lambda: locate(f"memory://{uuid.uuid4().hex}/x").parent,
        # obstore knows no such scheme: fsspec's own files
        "fsspec": lambda: locate(f"local://{tmp_path}/there/x").parent,
    }[kind]()
    _is_the_same(there, tmp_path)


def _is_the_same(there: ObjectPath, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": (1, 2), "features": 20, "tokens": (7, 9)}
    local, remote = fakes.make_run(tmp_path, **sizes), fakes.make_run(there, **sizes)
    assert _contents(remote.path) == fakes.files_in(local.path)
    assert {name for name in there.files() if not name.startswith("run/")} == set()  # no locks
    run = zt.open_run(remote.path)
    for scenario, truth in remote.truth.items():
        _equals(zt.open_trace(remote.path / scenario), truth)
        _equals(run[scenario].to_dataset(), truth)
        _equals(zt.open_trace(remote.path / scenario, chunks="auto"), truth)
    assert verify(remote.path) == []
    assert summarize(remote.path).model_dump(exclude={"path"}) == summarize(local.path).model_dump(
        exclude={"path"}
    )


def test_addresses_and_options_lead_to_the_same_run(s3: Server, tall: fakes.FakeRun) -> None:
    options = {"endpoint": s3.proxy.address}
    _equals(zt.open_trace(str(tall.trace), storage_options=options), tall.truth["Safe_1"])
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


def test_lazy_reading_does_few_requests(s3: Server, tall: fakes.FakeRun) -> None:
    seen, made = s3.proxy.seen, tall
    seen.clear()
    ds = zt.open_trace(made.trace)
    assert len(seen) <= 3
    seen.clear()
    row = ds.attention[:, :, -1, 1:3].values
    assert len(seen) <= 62  # two a shard
    np.testing.assert_array_equal(row, made.truth["Safe_1"]["attention"][:, :, -1, 1:3])
    seen.clear()
    whole = ds.attention[3].values
    assert len(seen) == 1
    np.testing.assert_array_equal(whole, made.truth["Safe_1"]["attention"][3])
    seen.clear()
    np.testing.assert_array_equal(
        ds.features.sel(feature=5).values, made.truth["Safe_1"]["features"][:, :, 5]
    )
    assert len(seen) <= 62
    seen.clear()
    run = zt.open_run(made.path)
    assert len(seen) <= 2
    seen.clear()
    run["Safe_1"].attention[:, :, -1, :].values  # noqa: B018 -- reads
    assert len(seen) <= 62


def test_resuming_waits_for_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the same for every scenario of a run is not read, and the rest at the same time."""
    there = locate(f"memory://{uuid.uuid4().hex}/x").parent
    made = fakes.make_run(there, scenarios=ONE)
    backend: Any = type(there.backend)
    alone: list[str] = []
    together: list[str] = []
    get = backend.get

    def counted(self: Any, key: str) -> Any:
        (together if "requests" in threading.current_thread().name else alone).append(key)
        return get(self, key)

    monkeypatch.setattr(backend, "get", counted)
    again = fakes.make_run(there, scenarios=ONE)
    assert again.written == []
    # Of each array, its metadata when it is compared, and when it is consolidated.
    assert collections.Counter(together).most_common(1)[0][1] == 2
    assert not [key for key in alone if "Safe_1/" in key and not key.endswith("Safe_1/zarr.json")]
    assert len(alone) <= 12
    _equals(zt.open_trace(again.trace), made.truth["Safe_1"])


def test_requests_at_once_are_bounded(s3: Server, tall: fakes.FakeRun) -> None:
    s3.proxy.most = 0
    s3.proxy.fault = lambda _: time.sleep(0.02)
    zt.open_trace(tall.trace).attention.load()
    verify(tall.path)
    assert 4 < s3.proxy.most <= objects.REQUESTS_AT_ONCE


def test_long_prompts_read_neighbouring_chunks_together(s3: Server) -> None:
    made = fakes.make_run(s3.folder(), scenarios=["Safe_1"], layers=(1, 2), tokens=600, features=16)
    ds = zt.open_trace(made.trace)
    s3.proxy.seen.clear()
    row = ds.attention[:, :, 500, :].values
    assert len(s3.proxy.seen) <= 4
    np.testing.assert_array_equal(row, made.truth["Safe_1"]["attention"][:, :, 500, :])


def test_large_objects_are_sent_in_parts(s3: Server) -> None:
    content = np.random.default_rng(0).bytes(20 * 2**20)
    file = s3.folder() / "large"
    file.write_bytes(content)
    assert sum("uploadId=" in one.path and one.method == "PUT" for one in s3.proxy.seen) == 3
    assert file.read_bytes() == content


# --- damage and faults ----------------------------------------------------------------------------


def test_damage_is_found(s3: Server) -> None:
    made = fakes.make_run(s3.folder(), scenarios=ONE)
    ds, run = zt.open_trace(made.trace), zt.open_run(made.path)
    shard = made.trace / "attention/c/1/0/0/0"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match="attention"):
        zt.open_trace(made.trace)
    for opened in (ds, run["Safe_1"].to_dataset()):
        with pytest.raises(IntegrityError, match=f"has {len(content) - 1} bytes"):
            opened.attention[1, :, -1].values  # noqa: B018 -- reads
    shard.backend.delete([shard.key])
    with pytest.raises(IntegrityError, match="gone"):
        run["Safe_1"].attention[1].values  # noqa: B018
    problems = verify(made.path)
    assert [(one.array, one.layer, one.message) for one in problems] == [("attention", 2, "gone")]
    flipped = bytearray(content)
    flipped[10] ^= 1
    shard.write_bytes(bytes(flipped))
    with pytest.raises(IntegrityError, match="cannot be decoded"):
        zt.open_trace(made.trace).attention[1].values  # noqa: B018
    again = fakes.make_run(made.path.parent, scenarios=ONE, repair=True)
    assert again.written == [("Safe_1", 2)]
    assert verify(made.path) == []


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
    assert count > 60
    _equals(zt.open_trace(there.trace), there.truth["Safe_1"])
    s3.proxy.fault = lambda _: None
    local = fakes.make_run(tmp_path, scenarios=ONE)
    assert _contents(there.path) == fakes.files_in(local.path)


@pytest.mark.torch
@pytest.mark.long
def test_a_server_that_is_gone_for_a_while(s3: Server, tmp_path: Path) -> None:
    """Killed during an extraction, and started again: with Swift all its processes; with moto,
    whose data would be lost, the proxy before it.
    """
    from zarrtrace.extraction import Options, extract

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
        if len(puts) == 45 and not killed.is_set():
            killed.set()
            server.kill()
            threading.Thread(target=start).start()
        return None

    s3.proxy.fault = fault
    options = Options(layers=tuple(range(1, 9)), features=False, only=("Desperate_10",))
    there = s3.folder() / "run"
    extract(there, options)
    assert back.wait(60)
    s3.proxy.fault = lambda _: None
    assert len(puts) > 50
    extract(tmp_path / "run", options)
    assert _contents(there) == fakes.files_in(tmp_path / "run")


@pytest.mark.parametrize("cut", [3, 20, 40])
def test_readers_see_complete_layers_only(cut: int, s3: Server, tmp_path: Path) -> None:
    """Whatever request is the last that a writer gets through."""
    puts = 0

    def fault(request: Request) -> int | None:
        nonlocal puts
        puts += request.method == "PUT"
        return 403 if puts > cut and request.method in ("PUT", "DELETE") else None

    folder = s3.folder()
    s3.proxy.fault = fault
    with pytest.raises(RemoteError, match="access denied"):
        fakes.make_run(folder, scenarios=ONE)
    s3.proxy.fault = lambda _: None
    truth = fakes.make_run(tmp_path, scenarios=ONE).truth
    if (folder / "run" / "zarr.json").is_file():
        run = zt.open_run(folder / "run", missing="nan")
        for scenario, node in run.children.items():
            ds = node.to_dataset()
            stored = {int(key) for key in ds.attrs["stored"] if key.isdigit()}
            for at, layer in enumerate(fakes.LAYERS):
                found = ds.attention.sel(layer=layer).values
                if layer in stored:
                    np.testing.assert_array_equal(found, truth[scenario]["attention"][at])
                else:
                    assert np.isnan(found).all()


# --- one writer -----------------------------------------------------------------------------------


def test_one_writer_at_a_time(folder: Folder, quick_leases: None) -> None:
    from zarrtrace.store.locks import lock, unlock

    run = folder() / "run"
    held = lock(run)
    try:
        time.sleep(1)  # some heartbeats
        with pytest.raises(LockedError, match="another process is writing"):
            lock(run)
        (run / "x").write_bytes(b"1")
    finally:
        unlock(run, held)
    unlock(run, lock(run))
    assert [*run.parent.files()] == ["run/x"]


def test_the_lock_of_a_dead_writer_is_taken_over(folder: Folder, quick_leases: None) -> None:
    from zarrtrace.store.locks import lock, unlock

    run = folder() / "run"
    dead = lock(run)
    dead._ended.set()  # its heart stands still
    dead._thread.join()
    held = lock(run)
    assert held._owner != dead._owner
    with pytest.raises(LockedError, match="lost its lock"):
        dead.check()
    dead.give_back()  # must not take the other's away
    (run / "x").write_bytes(b"1")
    with pytest.raises(LockedError, match="another process is writing"):
        lock(run)
    unlock(run, held)


def test_a_writer_that_was_taken_for_dead_writes_nothing_more(
    s3: Server, quick_leases: None
) -> None:
    from zarrtrace.store.locks import lock, unlock

    run = s3.folder() / "run"
    held = lock(run)
    (run.with_name(".run.zarrtrace-beats") / held._owner).backend.delete([held._beat.key])
    time.sleep(1)
    with pytest.raises(LockedError, match="lost its lock"):
        (run / "x").write_bytes(b"1")
    with pytest.raises(LockedError, match="lost its lock"):
        (run.with_name(".run.zarrtrace-index-1") / "x").write_bytes(b"1")
    (run.with_name("run2") / "x").write_bytes(b"1")  # another run
    unlock(run, held)
    assert "run/x" not in run.parent.files()


def test_a_writer_whom_nobody_took_for_dead_goes_on(s3: Server, quick_leases: None) -> None:
    from zarrtrace.store.locks import lock, unlock

    run = s3.folder() / "run"
    held = lock(run)
    s3.proxy.fault = lambda request: 403 if "-beats/" in request.path else None
    time.sleep(2.5)
    with pytest.raises(RemoteError, match="access denied"):
        (run / "x").write_bytes(b"1")
    s3.proxy.fault = lambda _: None
    (run / "x").write_bytes(b"1")
    unlock(run, held)


def test_a_journal_that_another_process_changed_is_not_written_over(folder: Folder) -> None:
    from zarrtrace.store.files import change_whole

    file = folder() / "zarr.json"
    file.write_bytes(b"{}")

    def change(content: bytes) -> bytes:
        file.write_bytes(content + b" ")  # somebody else, in between
        return content

    with pytest.raises(LockedError, match="changed by another process"):
        change_whole(file, change)


# --- addresses ------------------------------------------------------------------------------------


def test_addresses() -> None:
    path = locate("s3://bucket/a/run/")
    assert isinstance(path, ObjectPath)
    assert (str(path), path.name, str(path.parent)) == ("s3://bucket/a/run", "run", "s3://bucket/a")
    assert str(path.with_name(".run.lock")) == "s3://bucket/a/.run.lock"
    assert locate("runs/demo") == Path("runs/demo")
    assert locate("file:///runs/demo") == Path("/runs/demo")
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
    with pytest.raises(ConfigError, match=r"needs obstore(.|\n)*pip install '\.\[cloud\]'"):
        locate(f"s3://bucket-{uuid.uuid4().hex}/run").is_file()


# --- copying --------------------------------------------------------------------------------------


def test_copy_there_and_back(s3: Server, tmp_path: Path) -> None:
    local = fakes.make_run(tmp_path, layers=(1, 2))
    build_index(local.path)
    write_card(local.path)
    there, steps = s3.folder() / "copy", []
    done = copy_run(local.path, there, progress=lambda *step: steps.append(step))
    assert _contents(there) == fakes.files_in(local.path)
    assert done.scenarios == 2
    assert done.bytes_there == 0
    assert steps[-1][0] == done.bytes
    assert sorted({name.split("/")[0] for name in there.parent.files()}) == ["copy"]
    assert copy_run(there, tmp_path / "back").bytes == done.bytes
    assert fakes.files_in(tmp_path / "back") == fakes.files_in(local.path)
    again = copy_run(local.path, there)
    assert (again.bytes, again.bytes_there) == (0, done.bytes)
    trace = copy_run(there / "Risky_2", f"memory://{uuid.uuid4().hex}/trace")
    assert trace.scenarios == 1


def test_a_copy_that_was_interrupted_goes_on(
    s3: Server, tmp_path: Path, quick_leases: None
) -> None:
    local, there = fakes.make_run(tmp_path, scenarios=ONE), s3.folder() / "copy"
    puts = 0

    def fault(request: Request) -> int | None:
        nonlocal puts
        puts += request.method == "PUT"
        return 403 if puts > 30 else None

    s3.proxy.fault = fault
    with pytest.raises(RemoteError):
        copy_run(local.path, there)
    s3.proxy.fault = lambda _: None
    assert not (there / "zarr.json").is_file()
    shard = there / "Safe_1/attention/c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[::-1])  # damaged on its way, of the same size
    time.sleep(0.5)
    done = copy_run(local.path, there)
    assert done.bytes_there > 0
    assert _contents(there) == fakes.files_in(local.path)


def test_a_copy_refuses_damage_and_other_runs(tmp_path: Path) -> None:
    local = fakes.make_run(tmp_path)
    address = f"memory://{uuid.uuid4().hex}/copy"
    file = local.trace / "features" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"features/c/1/0/0: its bytes are not"):
        copy_run(local.path, address)
    assert not (locate(address) / "Safe_1/features/c/1/0/0").exists()
    other = fakes.make_run(tmp_path, name="other", config={"model": "another"})
    copy_run(other.path, address + "2")
    with pytest.raises(ConfigMismatchError, match="another run is there"):
        copy_run(fakes.make_run(tmp_path, name="third").path, address + "2")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    with pytest.raises(NotATraceError):
        copy_run(other.path, tmp_path / "notes")


# --- the command line -----------------------------------------------------------------------------


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(one) for one in arguments])


def test_every_command_takes_an_address(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = s3.folder() / "run"
    option = ("--storage-option", f"endpoint={s3.proxy.address}")

    def said(*arguments: object, code: int = 0) -> str:
        found = _call(*arguments, *option)
        assert found.exit_code == code, (found.output, found.exception)
        return found.output

    local = fakes.make_run(tmp_path, layers=(2, 3), tokens=(7, 9)).path
    assert "2 scenarios" in said("copy", local, run)
    assert f"run          {run}" in said("info", run)
    assert "everything is there" in said("verify", run)
    assert "index built" in said("index", run, "--scheduler", "synchronous")
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
    table = said("analyze", "feature-trajectory", run, "--feature", 3)
    assert table == said("analyze", "feature-trajectory", local, "--feature", 3)
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
    bad = _call("info", "s3://bucket/run", "--storage-option", "endpoint")
    assert bad.exit_code == 2
    assert "'endpoint' is not key=value" in bad.output
    bad = _call("info", "s3://bucket/run", "--storage-option", "secret_access_key=x")
    assert isinstance(bad.exception, ConfigError)
    assert "x" not in str(bad.exception).split()


@pytest.mark.torch
@pytest.mark.long
def test_an_extraction_that_was_killed_goes_on(
    s3: Server, tmp_path: Path, quick_leases: None
) -> None:
    """By SIGKILL, so that its lock stays; then by another process, which takes it over."""
    run, puts = s3.folder() / "run", 0
    enough = threading.Event()

    def fault(request: Request) -> int | None:
        nonlocal puts
        puts += request.method == "PUT"
        if puts > 35:
            enough.set()
        time.sleep(0.01)
        return None

    s3.proxy.fault = fault
    options = ("--layers", "1-9", "--no-features", "--scenario", "Desperate_10", "-q")
    where = ("-o", run, "--storage-option", f"endpoint={s3.proxy.address}")
    with processes.extracting(*where, *options) as process:
        assert enough.wait(120), process.poll()
        process.kill()
        process.wait()
    s3.proxy.fault = lambda _: None
    assert [name for name in run.parent.files() if name.startswith(".run.")]
    before = summarize(run)
    assert not before.complete
    assert _call("extract", *where, *options).exit_code == 0
    assert _call("extract", "-o", tmp_path / "run", *options).exit_code == 0
    assert _contents(run) == fakes.files_in(tmp_path / "run")
    assert not [name for name in run.parent.files() if name.startswith(".run.")]


def test_overwriting_and_interrupted_swaps(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = s3.folder()
    small: dict[str, Any] = {"scenarios": ONE, "layers": (1,)}
    fakes.make_run(folder, **small)
    other = {**small, "config": {"model": "other"}, "seed": 5}
    with pytest.raises(ConfigMismatchError):
        fakes.make_run(folder, **other)

    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "move", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fakes.make_run(folder, **other, overwrite=True)
    made = fakes.make_run(folder, **other)  # finds the new one complete, and puts it in its place
    assert made.written == []
    _equals(zt.open_trace(made.trace), made.truth["Safe_1"])
    replaced = fakes.make_run(folder, **small, seed=7, overwrite=True)
    _equals(zt.open_trace(replaced.trace), replaced.truth["Safe_1"])
    assert verify(replaced.path) == []
    assert {name.split("/")[0] for name in folder.files()} == {"run"}
