"""Odd files in a run, links as outputs, names beside an output, and what file systems lack."""

from __future__ import annotations

import errno
import fcntl
import http.server
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import dask
import fakes
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from command_line import call
from sample_tables import plan_of, values_of, write_table

import zarrtrace as zt
from zarrtrace.card import write_card
from zarrtrace.cli import group
from zarrtrace.demo import copy_tutorials
from zarrtrace.errors import (
    ConfigError,
    LockedError,
    NoSpaceError,
    RemoteError,
    StoreError,
    ZarrtraceError,
)
from zarrtrace.figures.page import draw_run
from zarrtrace.imports import import_hidden
from zarrtrace.index import build_index
from zarrtrace.npz import export_npz, import_npz
from zarrtrace.storage import Location, locate
from zarrtrace.store import RunWriter, TableWriter, copy_run, summarize, verify
from zarrtrace.viewer.bundle import plan, write_bundle


def data_file(trace: Path, array: str) -> Path:
    """Return the first file that holds values of an array."""
    return min(f for f in (trace / array).rglob("*") if f.is_file() and f.name != "zarr.json")


def in_subprocess(code: str, *arguments: object) -> str:
    """Run code that may hang or fill the memory in a process of its own; return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- odd files --------------------------------------------------------------------------------


def use(run: Path, out: Path, *names: str) -> dict[str, Any]:
    """Do things with a run, in a process with little memory and little time; say what came out."""
    calls: dict[str, Callable[[], Any]] = {
        "verify": lambda: [problem.model_dump() for problem in verify(run)],
        "copy": lambda: copy_run(run, out / "copy") and None,
        "export": lambda: export_npz(run, out / "npz") and None,
        "info": lambda: summarize(run) and None,
        "card": lambda: write_card(run) and None,
        "index": lambda: build_index(run) and None,
        "bundle": lambda: write_bundle(plan(run, out / "b")[0], out / "b") and None,
        "open": lambda: (
            [node.dataset.load() for node in zt.open_run(run).children.values()] and None
        ),
        "repair": lambda: fakes.make_run(run.parent, repair=True) and None,
    }
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**32, held + 2**32))
            found = {}
            for name in names:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
                signal.alarm(30)
                try:
                    with dask.config.set(scheduler="synchronous"):
                        found[name] = calls[name]()
                except ZarrtraceError as error:
                    found[name] = str(error)
            os.write(start, json.dumps(found).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 -- the process must not go on as a test
            traceback.print_exc()
            os._exit(1)
    os.close(start)
    with open(end, "rb") as stream:  # noqa: PTH123 -- a pipe
        said = stream.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"{names}: ended by signal or error"
    answers: dict[str, Any] = json.loads(said)
    return answers


def pipe(file: Path) -> None:
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def folder(file: Path) -> None:
    file.mkdir()


def itself(file: Path) -> None:
    file.symlink_to(file.name)


USES = ("verify", "copy", "export", "info", "index", "bundle", "open")


@pytest.mark.parametrize(
    ("odd", "array"),
    [(pipe, "attention"), (endless, "features"), (folder, "attention"), (itself, "features")],
)
def test_odd_file_in_place_of_values(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, tmp_path: Path, odd: Any, array: str
) -> None:
    file = data_file(run.trace, array)
    file.unlink()
    odd(file)
    other = data_file(run.path / "Risky_2", "next_token")
    other.write_bytes(other.read_bytes()[::-1])
    found = use(run.path, tmp_path / "out", *USES, "repair")
    problems = {(one["scenario"], one["array"]): one["message"] for one in found["verify"]}
    assert problems.keys() == {("Safe_1", array), ("Risky_2", "next_token")}
    said = "a link that leads elsewhere" if odd is endless else "is not a regular file"
    assert said in problems["Safe_1", array]
    for name in ("copy", "bundle", "open"):
        assert "Safe_1" in found[name], name
        assert array in found[name], name
    assert "Safe_1" in found["export"]
    if array == "features":
        assert "Safe_1" in found["index"]
    assert found["repair"] is None
    if array == "attention":
        shutil.rmtree(run.path / "index")
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)
    assert verify(run.path) == []


@pytest.mark.parametrize(
    ("odd", "place"),
    [
        (pipe, "attention/zarr.json"),
        (folder, "attention/zarr.json"),
        (pipe, "zarr.json"),
        (endless, "zarr.json"),
        (folder, "zarr.json"),
        (itself, "zarr.json"),
    ],
)
def test_odd_file_in_place_of_metadata(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, tmp_path: Path, odd: Any, place: str
) -> None:
    (run.trace / place).unlink()
    odd(run.trace / place)
    other = data_file(run.path / "Risky_2", "next_token")
    other.write_bytes(other.read_bytes()[::-1])
    found = use(run.path, tmp_path / "out", "verify", "copy", "export", "info", "open", "repair")
    assert {one["scenario"] for one in found["verify"]} == {"Safe_1", "Risky_2"}
    # Readers take an array's metadata from the trace's own zarr.json, which repeats it.
    for name in ("copy", "export", "open") if place == "zarr.json" else ("copy",):
        assert "Safe_1" in found[name], name
    assert found["repair"] is None
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


@pytest.mark.parametrize("odd", [pipe, folder])
def test_odd_file_in_place_of_the_run_s_own(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, tmp_path: Path, odd: Any
) -> None:
    (run.path / "zarr.json").unlink()
    odd(run.path / "zarr.json")
    found = use(run.path, tmp_path / "out", *USES, "repair")
    assert all("zarr.json" in found[name] for name in USES), found
    if odd is folder:
        assert "zarr.json: cannot be written: a folder is in its place" in found["repair"]
        (run.path / "zarr.json").rmdir()
        fakes.make_run(run.path.parent, repair=True)
    else:
        assert found["repair"] is None
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


@pytest.mark.parametrize("odd", [pipe, endless, folder])
def test_odd_readme_and_index(run: fakes.FakeRun, tmp_path: Path, odd: Any) -> None:
    odd(run.path / "README.md")
    found = use(run.path, tmp_path / "out", "verify", "copy", "card")
    assert found["verify"] == []
    assert "README.md" in found["copy"]
    assert "README.md" in found["card"]
    readme = run.path / "README.md"
    readme.rmdir() if readme.is_dir() and not readme.is_symlink() else readme.unlink()
    build_index(run.path)
    file = data_file(run.path / "index", "maximum")
    file.unlink()
    odd(file)
    found = use(run.path, tmp_path / "out", "verify", "index")
    assert {one["array"] for one in found["verify"]} == {"index/maximum"}
    assert found["index"] is None  # built again
    assert verify(run.path) == []


def test_odd_file_in_place_of_the_index(run: fakes.FakeRun, tmp_path: Path) -> None:
    index = run.path / "index"
    pipe(index)
    found = use(run.path, tmp_path / "out", "verify", "info", "open", "index")
    assert [one["array"] for one in found["verify"]] == ["index"]
    assert found["info"] is found["open"] is found["index"] is None
    assert verify(run.path) == []
    shutil.rmtree(index)
    index.write_text("precious")
    assert "Move it away" in use(run.path, tmp_path / "out", "index")["index"]
    assert index.read_text() == "precious"
    assert not list(run.path.parent.glob(".*"))


def test_odd_folders_that_belong_to_nobody(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, tmp_path: Path
) -> None:
    for where in (run.path, run.trace):
        (where / "extra").mkdir()
        pipe(where / "extra" / "zarr.json")
        pipe(where / "pipe")
        (where / "round").symlink_to(where)
    found = use(run.path, tmp_path / "out", "verify", "copy", "info", "open")
    said = {(one["scenario"], one["array"], one["message"]) for one in found["verify"]}
    names = ("extra", "pipe", "round")
    assert said == {
        *(("Safe_1", name, "does not belong to the trace") for name in names),
        *((None, None, f"{name} does not belong to the run") for name in names),
    }
    assert found["info"] is None
    assert found["open"] is None
    assert found["copy"] is None
    assert fakes.files_in(tmp_path / "out" / "copy") == fakes.files_in(shared_run.path)


def test_links_out_of_the_run_are_named_and_not_copied(run: fakes.FakeRun, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("precious")
    (run.path / "README.md").symlink_to(secret)
    with pytest.raises(StoreError, match=r"README\.md: is a link"):
        copy_run(run.path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    (run.path / "README.md").unlink()
    file = data_file(run.trace, "attention")
    file.rename(tmp_path / "chunk")
    file.symlink_to(tmp_path / "chunk")
    (problem,) = verify(run.path)
    assert (problem.scenario, problem.array) == ("Safe_1", "attention")
    assert "a link that leads elsewhere" in problem.message
    with pytest.raises(StoreError, match="is a link"):
        copy_run(run.path, tmp_path / "copy")
    file.unlink()
    (tmp_path / "chunk").rename(file)
    run.trace.rename(tmp_path / "trace")
    run.trace.symlink_to(tmp_path / "trace")
    assert [(one.scenario, "a link" in one.message) for one in verify(run.path)] == [
        ("Safe_1", True)
    ]
    with pytest.raises(StoreError, match="is a link"):
        copy_run(run.path, tmp_path / "copy")
    run.trace.unlink()
    (tmp_path / "trace").rename(run.trace)
    assert verify(run.path) == []
    (run.trace / "zarr.json").rename(tmp_path / "metadata")
    (run.trace / "zarr.json").symlink_to(tmp_path / "metadata")
    assert [one.scenario for one in verify(run.path)] == ["Safe_1"]
    with pytest.raises(StoreError, match="is a link"):
        copy_run(run.path, tmp_path / "copy")


def test_the_hub_s_cache_is_verified_and_copied(run: fakes.FakeRun, tmp_path: Path) -> None:
    """It holds each file in blobs/, and a link to it in snapshots/REVISION/."""
    cache = tmp_path / "datasets--owner--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    shutil.copytree(run.path, snapshot)
    for number, file in enumerate(f for f in sorted(snapshot.rglob("*")) if f.is_file()):
        blob = file.rename(cache / "blobs" / str(number))
        file.symlink_to(os.path.relpath(blob, file.parent))
    assert verify(snapshot) == []
    copy_run(snapshot, tmp_path / "copy")
    assert fakes.files_in(tmp_path / "copy") == fakes.files_in(run.path)
    assert summarize(snapshot).bytes_on_disk == summarize(run.path).bytes_on_disk


# --- links as outputs -------------------------------------------------------------------------


def test_output_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run"
    link.symlink_to("disk/real")  # to what is not there yet
    fakes.make_run(tmp_path)
    assert link.is_symlink()
    made = fakes.make_run(tmp_path, seed=5, overwrite=True)
    build_index(link)
    build_index(link, rebuild=True)
    copy_run(link, tmp_path / "copy")
    assert link.is_symlink()
    found = zt.open_trace(tmp_path / "disk" / "real" / "Safe_1").attention.values
    assert (found == made.truth["Safe_1"]["attention"]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "run", "copy"}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"real"}


def test_copy_and_import_follow_a_link_as_target(run: fakes.FakeRun, tmp_path: Path) -> None:
    exported = export_npz(run.path, tmp_path / "npz").parent
    for name, write in {
        "copied": lambda target: copy_run(run.path, target),
        "imported": lambda target: import_npz(exported, target),
    }.items():
        (tmp_path / f"disk-{name}").mkdir()
        (tmp_path / name).symlink_to(tmp_path / f"disk-{name}" / "real")
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert verify(tmp_path / f"disk-{name}" / "real") == []


def test_one_writer_by_whatever_path(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    for one, other in (("run", "link"), ("link", "run")):
        with RunWriter(tmp_path / one, ["a"], {}), pytest.raises(LockedError):
            RunWriter(tmp_path / other, ["a"], {}).__enter__()


def test_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(ZarrtraceError, match="run"):
        fakes.make_run(tmp_path)


@pytest.mark.parametrize("name", ["bundle", "page.html"])
def test_bundle_follows_a_link(run: fakes.FakeRun, tmp_path: Path, name: str) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / name
    link.symlink_to(tmp_path / "disk" / name)
    for overwrite in (False, True):
        write_bundle(plan(run.path, link)[0], link, overwrite=overwrite)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == [name]


# --- names beside an output -------------------------------------------------------------------


def test_files_beside_an_output_are_left_alone(tmp_path: Path, run: fakes.FakeRun) -> None:
    """Whatever they are called: nobody has seen zarrtrace's own names before."""
    home = run.path.parent
    names = ("old", "new", "lock", "locks", "beats", "notes", "partial", "html")
    for name in names:
        (home / f".run.{name}").write_text(name)
        (home / f".run.index.{name}").mkdir()
        (home / f".run.index.{name}" / "notes").write_text(name)
    (run.path / "thesis.partial").write_text("thesis")
    kept = {name: content for name, content in fakes.files_in(home).items() if name[0] == "."}
    (home / "run.html").write_text("kept")
    fakes.make_run(home, repair=True)
    build_index(run.path)
    build_index(run.path, rebuild=True)
    assert (run.path / "thesis.partial").read_text() == "thesis"
    (run.path / "thesis.partial").unlink()  # a run that holds it is not replaced
    fakes.make_run(home, seed=5, overwrite=True)
    copy_run(run.path, home / "copy")
    found = {name: content for name, content in fakes.files_in(home).items() if name[0] == "."}
    assert found == kept


def test_partial_files_of_strangers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.partial").write_text("precious")
    with pytest.raises(StoreError):
        fakes.make_run(tmp_path)
    assert fakes.files_in(tmp_path) == {"run/thesis.partial": b"precious"}


def test_strangers_in_our_own_names_are_refused(run: fakes.FakeRun) -> None:
    """Names that an unfinished replacement really uses, with somebody else's files in them."""
    home = run.path.parent
    fakes.make_run(home, seed=5, overwrite=True, finish=False)
    (ours,) = (path for path in home.iterdir() if path != run.path)
    shutil.rmtree(ours)
    ours.mkdir()
    (ours / "thesis").write_text("precious")
    before = fakes.files_in(home)
    with pytest.raises(StoreError, match=r"(?s)in the way.*Move it away"):
        fakes.make_run(home, seed=5, overwrite=True)
    assert fakes.files_in(home) == before


def test_bundle_replaces_bundles_only(run: fakes.FakeRun, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").write_text('{"name": "my site"}')
    (site / "thesis").write_text("precious")
    page = tmp_path / "page.html"
    page.write_text("<p>precious</p>")
    before = fakes.files_in(site)
    for output in (site, page):
        with pytest.raises(ZarrtraceError, match="no bundle"):
            write_bundle(plan(run.path, output)[0], output, overwrite=True)
    assert fakes.files_in(site) == before
    assert page.read_text() == "<p>precious</p>"
    write_bundle(plan(run.path, tmp_path / "b")[0], tmp_path / "b")
    (tmp_path / "b" / "thesis").write_text("precious")
    with pytest.raises(ZarrtraceError, match="thesis"):
        write_bundle(plan(run.path, tmp_path / "b")[0], tmp_path / "b", overwrite=True)


# --- what a killed bundle leaves --------------------------------------------------------------

KILLED_BUNDLE = """
import os, sys
from zarrtrace.viewer.bundle import plan, write_bundle

seen = []
layout = plan(sys.argv[2], sys.argv[3])[0]
write_bundle(layout, sys.argv[3], progress=lambda done, _: done > 20 and os._exit(0))
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["bundle", "page.html"])
def test_killed_bundle_leaves_nothing_for_good(
    run: fakes.FakeRun, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    in_subprocess(KILLED_BUNDLE, run.path, out / name)
    assert [path.name for path in out.iterdir()] != []
    assert not (out / name).exists()
    write_bundle(plan(run.path, out / name)[0], out / name)
    assert [path.name for path in out.iterdir()] == [name]


def test_bundle_that_is_being_written_is_left_alone(run: fakes.FakeRun, tmp_path: Path) -> None:
    """Two at a time: the second must not take the first one's files for left-overs."""
    layout, output = plan(run.path, tmp_path / "b")[0], tmp_path / "b"
    done: list[int] = []

    def meanwhile(number: int, _: int) -> None:
        if number == 20 and not done:
            done.append(write_bundle(layout, output))
            shutil.rmtree(output)

    write_bundle(layout, output, progress=meanwhile)
    assert done
    assert (output / "index.json").is_file()
    assert fakes.files_in(output).keys() == set(layout.files())


# --- what file systems lack -------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_missing_locks_are_explained(
    run: fakes.FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = fakes.files_in(run.path.parent)
    for write in (
        lambda: fakes.make_run(run.path.parent),
        lambda: fakes.make_run(tmp_path / "new"),
        lambda: build_index(run.path),
        lambda: copy_run(run.path, tmp_path / "copies" / "copy"),
    ):
        with pytest.raises(StoreError, match=r"(?s)has no locks.*--output"):
            write()
    assert fakes.files_in(run.path.parent) == before
    write_bundle(plan(run.path, tmp_path / "b")[0], tmp_path / "b")  # needs none


# Mounting needs root, or a user namespace of one's own.
FEW_FILES = """
import ctypes, json, os, subprocess, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import fakes
from zarrtrace.errors import NoSpaceError
from zarrtrace.extraction.running import saying_how_much_room

user = os.geteuid()
assert ctypes.CDLL(None).unshare(0x00020000 | (0x10000000 if user else 0)) == 0
if user:
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
disk = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m,nr_inodes=40", "none", disk], check=True)
try:
    with saying_how_much_room(10**6):
        fakes.make_run(disk)
except NoSpaceError as error:
    print(error)
subprocess.run(["mount", "-o", "remount,nr_inodes=4000", disk], check=True)
fakes.make_run(disk)
"""


def test_exhausted_inodes_are_told_from_exhausted_space(tmp_path: Path) -> None:
    said = in_subprocess(FEW_FILES, tmp_path)
    assert "no space left on the disk" in said
    assert "inodes" in said
    assert "MB are free now" not in said


@pytest.mark.parametrize("what", ["export", "bundle", "card", "copy"])
def test_full_disk_is_told_from_other_errors(
    run: fakes.FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "export": lambda: export_npz(run.path, tmp_path / "npz"),
        "bundle": lambda: write_bundle(plan(run.path, tmp_path / "b")[0], tmp_path / "b"),
        "card": lambda: write_card(run.path),
        "copy": lambda: copy_run(run.path, tmp_path / "copy"),
    }
    original = os.replace
    for number, kind in ((errno.ENOSPC, NoSpaceError), (errno.EACCES, ZarrtraceError)):

        def refuse(source: Any, target: Any, number: int = number) -> None:
            if str(tmp_path) in str(target):
                raise OSError(number, os.strerror(number))
            original(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            patch.setattr(os, "rename", refuse)
            with pytest.raises(kind) as error:
                calls[what]()
        assert isinstance(error.value, NoSpaceError) == (number == errno.ENOSPC)


def test_commands_name_odd_files(run: fakes.FakeRun, tmp_path: Path) -> None:
    """On the command line, too: an exit code and a sentence."""
    file = data_file(run.trace, "attention")
    file.unlink()
    pipe(file)
    for command in (
        ["verify", str(run.path)],
        ["copy", str(run.path), str(tmp_path / "copy"), "-q"],
        ["export", str(run.path), "-o", str(tmp_path / "npz"), "-q"],
    ):
        done = CliRunner().invoke(group, command)
        said = done.output + str(done.exception or "")
        assert done.exit_code == 1, command
        assert "Safe_1" in said, command
        assert "attention" in said, command


# --- an object server whose answers are cut ---------------------------------------------------


class _Bucket(http.server.BaseHTTPRequestHandler):
    """Reading and listing as Amazon S3 does; an answer that `cut` chooses ends in its middle."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]]
    cut: ClassVar[Callable[[str], bool]]
    refused: ClassVar[Callable[[str], bool]]

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(url.query))
        if type(self).refused(self.path):
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif "list-type" in asked:
            self._answer(200, self._list(asked.get("prefix", ""), asked.get("delimiter")))
        else:
            self._read(self.objects.get(urllib.parse.unquote(url.path).split("/", 2)[2]))

    def _read(self, content: bytes | None) -> None:
        if content is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif bounds := self.headers.get("Range"):
            first, _, last = bounds.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            stop = min(len(content), int(last) + 1) if first and last else len(content)
            self._answer(206, content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self._answer(200, content)

    do_HEAD = do_GET  # noqa: N815

    def _list(self, prefix: str, delimiter: str | None) -> bytes:
        rest = [key.removeprefix(prefix) for key in sorted(self.objects) if key.startswith(prefix)]
        below = [name for name in rest if delimiter is None or delimiter not in name]
        folders = {name.split("/")[0] for name in rest} - {name.split("/")[0] for name in below}
        parts = [
            f"<Contents><Key>{prefix}{name}</Key><Size>{len(self.objects[prefix + name])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in below
        ]
        if delimiter:
            parts += [
                f"<CommonPrefixes><Prefix>{prefix}{name}/</Prefix></CommonPrefixes>"
                for name in sorted(folders)
            ]
        return f"<ListBucketResult>{''.join(parts)}</ListBucketResult>".encode()

    def _answer(self, code: int, content: bytes, content_range: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"of the object, not of what is read of it"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "HEAD":
            return
        if type(self).cut(self.path):
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def served(kind: type[_Bucket], run: Path) -> Iterator[tuple[type[_Bucket], str]]:
    """Serve a run below ``a/run``; yield the handler's class and the server's address.

    The class is of this call alone, so that a test may change what it cuts and refuses.
    """
    objects = {f"a/run/{name}": content for name, content in fakes.files_in(run).items()}
    own = {"objects": objects, "cut": lambda _: False, "refused": lambda _: False}
    handler = type(kind.__name__, (kind,), own)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def bucket(run: fakes.FakeRun) -> Iterator[tuple[type[_Bucket], Location]]:
    """A server that holds the run, and the run's address there."""
    with served(_Bucket, run.path) as (handler, address):
        options = {"endpoint": address, "region": "us-east-1", "skip_signature": "true"}
        yield handler, locate("s3://bucket/a/run", options)


@pytest.mark.long
@pytest.mark.parametrize(
    ("call", "kind"),
    [(call, kind) for call in ("open", "verify", "copy") for kind in ("LIST", "GET")]
    + [("info", "GET")],  # it lists nothing
)
def test_cut_answers_of_a_server_are_asked_for_again(
    bucket: tuple[type[_Bucket], Location], tmp_path: Path, kind: str, call: str
) -> None:
    server, there = bucket
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: zt.open_trace(there / "Safe_1").load(),
        "verify": lambda: verify(there),
        "info": lambda: summarize(there),
        "copy": lambda: copy_run(there, tmp_path / "copy"),
    }
    asked: list[str] = []

    def cut(path: str) -> bool:
        if ("list-type" in path) == (kind == "LIST"):
            asked.append(path)
            return len(asked) in (1, 3)
        return False

    server.cut = cut
    found = calls[call]()
    assert len(asked) >= 2
    if call == "verify":
        assert found == []
    if call == "copy":
        assert verify(tmp_path / "copy") == []


def test_server_that_always_cuts_ends_in_an_error(bucket: tuple[type[_Bucket], Location]) -> None:
    server, there = bucket
    asked: list[str] = []

    def cut(path: str) -> bool:
        if "list-type" not in path:
            return False
        asked.append(path)
        return True

    server.cut = cut
    with pytest.raises(RemoteError, match="list response body"):
        zt.open_trace(there / "Safe_1")
    assert len(asked) == 5


def test_refused_listing_is_not_repeated(bucket: tuple[type[_Bucket], Location]) -> None:
    server, there = bucket
    asked: list[str] = []

    def refuse(path: str) -> bool:
        asked.append(path)
        return "list-type" in path

    server.refused = refuse
    with pytest.raises(RemoteError, match="403 Forbidden"):
        zt.open_trace(there / "Safe_1")
    assert len(asked) == 2  # its zarr.json, and the listing


# --- Azure, which knows no range of the last bytes ---------------------------------------------


class _Container(_Bucket):
    """Reading and listing as Azure's blobs do."""

    def do_GET(self) -> None:
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        if asked.get("comp") != "list":
            super().do_GET()
            return
        prefix = asked.get("prefix", "")
        blobs = "".join(
            f"<Blob><Name>{key}</Name><Properties><Content-Length>{len(content)}</Content-Length>"
            "<Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified><Etag>x</Etag>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for key, content in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        self._answer(
            200, f"<EnumerationResults><Blobs>{blobs}</Blobs></EnumerationResults>".encode()
        )

    do_HEAD = do_GET  # noqa: N815


def test_azure_is_read(run: fakes.FakeRun) -> None:
    with served(_Container, run.path) as (_, address):
        options = {
            "azure_storage_account_name": "account",
            "azure_endpoint": address,
            "azure_skip_signature": "true",
        }
        opened = zt.open_trace("az://container/a/run/Safe_1", storage_options=options)
        for name, expected in run.truth["Safe_1"].items():
            np.testing.assert_array_equal(opened[name].values, expected)


# --- in a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["new", "Safe_1/new", "index/new", "no/such/folder/new"])
def test_nothing_is_written_into_a_run(run: fakes.FakeRun, tmp_path: Path, below: str) -> None:
    """At any depth, through a link, too: it would be deleted with the run."""
    build_index(run.path)
    (tmp_path / "link").symlink_to(run.path)
    source = fakes.make_run(tmp_path, name="source").path
    exported = export_npz(source, tmp_path / "npz").parent
    np.save(tmp_path / "hidden_states.npy", np.ones((4, 2, 8), "float32"))
    rows = np.ones((1, 8), "float32")
    table = plan_of()
    before = fakes.files_in(run.path)
    writers: dict[str, Callable[[Path], Any]] = {
        "run": lambda to: RunWriter(to, ["a"], {}).__enter__(),
        "table": lambda to: TableWriter(to, table).__enter__(),
        "trace": lambda to: zt.write_trace(to, "a", tokens=([1], ["a"]), residual={0: rows}),
        "extract": lambda to: zt.extract(to, quiet=True),
        "repair": lambda to: zt.extract(to, quiet=True, repair=True),
        "extract_table": lambda to: zt.extract(to, layout="table", quiet=True),
        "npz": lambda to: import_npz(exported, to),
        "hidden": lambda to: import_hidden(tmp_path / "hidden_states.npy", to, layers=(0, 1)),
        "copy": lambda to: copy_run(source, to),
        "copy_trace": lambda to: copy_run(source / "Safe_1", to),
        "bundle": lambda to: write_bundle(plan(source, to)[0], to),
        "page": lambda to: write_bundle(plan(source, to)[0], to.with_suffix(".html")),
        "tutorial": copy_tutorials,
        "export": lambda to: zt.export(source, to),
        "rows": lambda to: zt.export(source, to, to="coo"),
        "figures": lambda to: draw_run(source, to),
    }
    for folder in (run.path, tmp_path / "link"):
        for name, write in writers.items():
            with pytest.raises(ConfigError, match=r"(?s)is in a (run|trace).*outside that folder"):
                pytest.fail(f"{name}: {write(folder / below)}")
    assert fakes.files_in(run.path) == before


def test_commands_write_nothing_into_a_run(run: fakes.FakeRun, tmp_path: Path) -> None:
    source = fakes.make_run(tmp_path, name="source").path
    inside = run.path / "Safe_1" / "new"
    before = fakes.files_in(run.path)
    for line in (
        ("extract", "-o", inside),
        ("extract", "-o", inside, "--layout", "table"),
        ("copy", source, inside),
        ("bundle", source, "-o", inside),
        ("tutorial", "-o", inside),
        ("export", source, "-o", inside),
        ("figures", source, "-o", inside),
        ("analyze", "decision", source, "-o", inside.with_suffix(".csv")),
    ):
        done = call(*line)
        assert done.returncode == 2, line
        assert "is in a trace" in done.stderr, line
    assert fakes.files_in(run.path) == before


def test_a_group_of_another_program_may_hold_a_run(tmp_path: Path) -> None:
    zarr.create_group(tmp_path, zarr_format=3, attributes={"kind": "mine"})
    run = fakes.make_run(tmp_path).path
    copy_run(run, tmp_path / "copy")
    assert verify(tmp_path / "copy") == []


def test_a_lost_trace_is_copied_back_into_its_run(run: fakes.FakeRun, tmp_path: Path) -> None:
    copy_run(run.path, tmp_path / "copy")
    shutil.rmtree(run.trace)
    copy_run(tmp_path / "copy" / "Safe_1", run.trace)
    assert verify(run.path) == []


def test_a_run_in_a_run_of_an_object_store_is_refused() -> None:
    address = f"memory://{uuid.uuid4().hex}/run"
    with RunWriter(address, [], {}) as writer:
        writer.finish()
    with (
        pytest.raises(ConfigError, match="is in a run"),
        RunWriter(f"{address}/other", [], {}),
    ):
        pass


@pytest.mark.parametrize("kind", ["run", "table"])
def test_overwrite_deletes_no_file_of_others(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "old"
    table = plan_of(9)
    if kind == "run":
        fakes.make_run(tmp_path, name="old")
    else:
        write_table(folder, table, values_of(3, 9, 300, 12))
    (folder / "exp2").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / ".zarr.json.zarrtrace-partial").write_text("of a writer that was killed")
    before = fakes.files_in(folder)
    said = f"(?s)does not belong to the {kind}: exp2, notes.txt\n.*Move it away"
    layout: Any = "traces" if kind == "run" else "table"
    for write in (
        lambda: RunWriter(folder, ["a"], {}, overwrite=True).__enter__(),
        lambda: TableWriter(folder, table, overwrite=True).__enter__(),
        lambda: zt.extract(folder, layout=layout, overwrite=True, quiet=True),
    ):
        with pytest.raises(StoreError, match=said):
            write()
    assert fakes.files_in(folder) == before
    (folder / "notes.txt").unlink()
    (folder / "exp2").rmdir()
    with RunWriter(folder, [], {}, overwrite=True) as writer:
        writer.finish()
    assert verify(folder) == []
