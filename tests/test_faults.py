"""Faults, each injected for real: kills, full disks, damaged files, failing workers, NaN."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import processes
import pytest
import xarray as xr

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.cli import main
from zarrtrace.errors import IntegrityError, NonFiniteError, StoreError
from zarrtrace.format.layout import ArrayLayout, TraceShape, trace_layout
from zarrtrace.store import (
    TraceWriter,
    nodes,
    open_trace,
    read_trace_attributes,
    trace_writer,
    verify,
)

# --- bit rot -----------------------------------------------------------------------------------


def flip(file: Path, seed: int) -> None:
    content = bytearray(file.read_bytes())
    chosen = random.Random(seed)
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    file.write_bytes(content)


def cut(file: Path, _seed: int) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path, _seed: int) -> None:
    file.write_bytes(b"")


def delete(file: Path, _seed: int) -> None:
    file.unlink()


# File below the run, and how many layers have to be computed again once it is damaged.
FILES = {
    "Safe_1/attention/c/1/0/0/0": 1,
    "Safe_1/attention_mean/c/1/0/0": 1,
    "Safe_1/features/c/1/0/0": 1,
    "Safe_1/top_feature/c/1/0/0": 1,
    "Safe_1/next_token/c/0/0": 0,
    "Safe_1/query_token/c/0": 0,
    "Safe_1/layer/c/0": 0,
    "Safe_1/features/zarr.json": 0,
    "Safe_1/query_token/zarr.json": 0,
    "Safe_1/zarr.json": 3,
    "zarr.json": 0,
}


def means_the_same(before: bytes, file: Path) -> bool:
    """Whether JSON still says what it said: a flipped bit can turn one blank into another."""
    try:
        return file.name == "zarr.json" and json.loads(before) == json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("damage", "seed"),
    [(flip, 0), (flip, 1), (cut, 0), (empty, 0), (delete, 0)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_damage_is_found_never_read_and_repaired(
    run: fakes.FakeRun,
    shared_run: fakes.FakeRun,
    file: str,
    damage: Callable[[Path, int], None],
    seed: int,
) -> None:
    path = run.path / file
    before = path.read_bytes()
    damage(path, seed)
    if means_the_same(before, path):
        assert verify(run.path) == []
        return
    assert_found(run.path, file)
    assert_never_read(run)
    again = fakes.make_run(run.path.parent, repair=True)
    assert verify(again.path) == []
    assert fakes.files_in(again.path) == fakes.files_in(shared_run.path)
    assert len(again.written) <= FILES[file]


def assert_found(run: Path, file: str) -> None:
    if file == "zarr.json":
        try:
            problems = verify(run)
        except StoreError:  # the run's own metadata: nothing else can be checked
            return
    else:
        problems = verify(run)
    assert problems
    *folders, _ = Path(file).parts
    scenario, array = (*folders[:2], None, None)[:2]
    assert {problem.scenario for problem in problems} == {scenario}
    if array is not None:
        assert {problem.array for problem in problems} == {array}
        if array in ("attention", "attention_mean", "features") and "/c/" in file:
            assert {problem.layer for problem in problems} == {2}


def assert_never_read(run: fakes.FakeRun) -> None:
    """Whatever can still be read equals what was written."""
    for name, values in run.truth["Safe_1"].items():
        try:
            found = zt.open_trace(run.path / "Safe_1")[name].values
        except Exception:  # noqa: BLE001, S112  whatever Zarr and its codecs raise
            continue
        np.testing.assert_array_equal(found, values, err_msg=name)


def test_damaged_consolidated_metadata_is_found(run: fakes.FakeRun) -> None:
    for folder, scenario in ((run.trace, "Safe_1"), (run.path, None)):
        file = folder / "zarr.json"
        good = file.read_text()
        metadata = json.loads(good)
        nodes = metadata["consolidated_metadata"]["metadata"]
        nodes[next(name for name in nodes if name.endswith("attention"))]["fill_value"] = 0.5
        file.write_text(json.dumps(metadata))
        problems = verify(run.path)
        assert "consolidated metadata differs" in problems[0].message
        assert problems[0].scenario == scenario
        file.write_text(good)
    assert verify(run.path) == []


def test_files_that_damaged_metadata_claims_are_not_looked_for(run: fakes.FakeRun) -> None:
    file = run.trace / "query" / "zarr.json"
    metadata = json.loads(file.read_text())
    (chunk,) = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    metadata["shape"] = [chunk * 200_000]
    file.write_text(json.dumps(metadata))
    (problem,) = verify(run.path)
    assert (problem.scenario, problem.array, problem.chunk) == ("Safe_1", "query", None)
    metadata["shape"] = [chunk * 2**20]
    file.write_text(json.dumps(metadata))
    (problem,) = verify(run.path)
    assert "no array of a trace has shape" in problem.message


def test_damaged_metadata_without_repair_is_refused(run: fakes.FakeRun) -> None:
    before = fakes.files_in(run.path)
    fakes.make_run(run.path.parent)
    assert fakes.files_in(run.path) == before
    for file in ("zarr.json", "Safe_1/zarr.json"):
        path = run.path / file
        good = path.read_text()
        path.write_text(good.replace('"Safe_1"', '"Safe_2"', 1))
        damaged = fakes.files_in(run.path)
        with pytest.raises(StoreError) as error:
            fakes.make_run(run.path.parent)
        assert "--repair" in error.value.remedy
        assert fakes.files_in(run.path) == damaged
        path.write_text(good)


def test_repair_does_not_mix_two_configurations(run: fakes.FakeRun) -> None:
    """With its manifest gone, a run cannot refuse; its traces still say what they are."""
    (run.path / "zarr.json").unlink()
    again = fakes.make_run(run.path.parent, repair=True, attention_dtype="float16")
    assert len(again.written) == 6
    assert zt.open_trace(again.trace).attention.dtype == np.float16


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("codec", ["plain", "sparse_by_token"])
def test_what_was_cut_otherwise_is_gone_on_with(tmp_path: Path, codec: str, damaged: bool) -> None:
    """A run that another version of zarrtrace began: the chunks on the disk count."""
    sizes: dict[str, Any] = {"scenarios": ("Safe_1",), "tokens": 20, "features": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zarrtrace.spec._QUERIES_PER_SHORT_CHUNK", 5)
        patch.setattr("zarrtrace.spec._FEATURES_PER_CHUNK", 16)
        patch.setattr(trace_writer, "trace_layout", partial(_earlier_layout, codec=codec))
        patch.setattr(nodes, "ATTENTION_BLOCK", 0)
        begun = fakes.make_run(tmp_path, **sizes, drop={"Safe_1": fakes.LAYERS[-1:]})
    for name in ("attention", "features") if damaged else ():
        (begun.trace / name / "zarr.json").write_bytes(b"{}")  # nothing says how they were cut
    again = fakes.make_run(tmp_path, **sizes, repair=damaged)
    assert [layer for _, layer in again.written] == list(fakes.LAYERS[0 if damaged else -1 :])
    assert verify(again.path) == []
    found = open_trace(again.trace)
    assert found.attention.encoding["chunks"][2] == (8 if damaged else 5)
    assert found.features.encoding["chunks"][2] == (64 if damaged else 16)
    xr.testing.assert_identical(found, xr.open_zarr(again.trace, consolidated=False))
    sharding = json.loads((again.trace / "features" / "zarr.json").read_bytes())["codecs"][0]
    codecs = [one["name"] for one in sharding["configuration"]["codecs"]]
    if damaged:
        assert codecs == ["transpose", "bytes", "zstd", "crc32c"]
    else:
        assert codecs == ["bytes", "zstd", *(["crc32c"] if codec == "sparse_by_token" else [])]
    for name in ("attention", "features"):
        np.testing.assert_array_equal(found[name], again.truth["Safe_1"][name])


def _earlier_layout(shape: TraceShape, *, codec: str) -> dict[str, ArrayLayout]:
    """Features were once compressed token by token, and before that with a checksum within zstd."""
    return {
        name: layout.model_copy(update={"codec": codec}) if layout.codec == "sparse" else layout
        for name, layout in trace_layout(shape).items()
    }


def test_repair_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not a zarrtrace run"):
        fakes.make_run(tmp_path, repair=True)
    assert fakes.files_in(tmp_path / "run") == {"thesis.txt": b"precious"}


@pytest.mark.torch
def test_extract_repairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["zarrtrace", "extract", "-o", str(tmp_path / "run")]
    command += ["--layers", "1-3", "--no-features", "--scenario", "Risky_40", "-q"]

    def call(*more: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    assert call() == 0
    good = fakes.files_in(tmp_path / "run")
    flip(tmp_path / "run/Risky_40/attention/c/1/0/0/0", 5)
    flip(tmp_path / "run/Risky_40/token_id/c/0", 5)
    untouched = tmp_path / "run/Risky_40/attention/c/0/0/0/0"
    written = untouched.stat().st_mtime_ns
    capsys.readouterr()
    assert call() == 1
    assert "--repair" in capsys.readouterr().err
    assert call("--repair") == 0
    assert fakes.files_in(tmp_path / "run") == good
    assert untouched.stat().st_mtime_ns == written
    assert call("--repair", "--overwrite") == 2


# --- a worker fails ----------------------------------------------------------------------------


def options(**changes: Any) -> Any:
    from zarrtrace.extraction import Options

    return Options(**{"layers": (1, 2, 3), "features": False, "only": ("Risky_40",), **changes})


@pytest.mark.torch
def test_a_failing_writer_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zarrtrace.extraction import extract

    original, seen = TraceWriter.append, []

    def append(self: TraceWriter, record: Any) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise RuntimeError("the codec broke")
        original(self, record)

    monkeypatch.setattr(TraceWriter, "append", append)
    with pytest.raises(RuntimeError, match="the codec broke"):
        extract(tmp_path / "run", options(layers=tuple(range(32))))
    assert len(seen) < 12  # what was in flight, not all 32
    attributes = read_trace_attributes(tmp_path / "run" / "Risky_40")
    assert not attributes.complete
    assert len(attributes.complete_layers) == len(seen) - 1
    monkeypatch.undo()
    extract(tmp_path / "run", options(layers=tuple(range(32))))
    assert verify(tmp_path / "run") == []


@pytest.mark.torch
def test_a_failing_sae_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zarrtrace.capture.saes import FolderSAEs
    from zarrtrace.extraction import extract

    original = FolderSAEs.load

    def load(self: FolderSAEs, attributes: Any, device: Any) -> Any:
        if attributes.layer == 2:
            raise ConnectionError("the hub went away")
        return original(self, attributes, device)

    monkeypatch.setattr(FolderSAEs, "load", load)
    with pytest.raises(ConnectionError, match="the hub went away"):
        extract(tmp_path / "run", options(features=True))
    attributes = read_trace_attributes(tmp_path / "run" / "Risky_40")
    assert attributes.complete_layers == (1,)


# --- NaN and infinity --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with an MLP of block 2 whose output is infinite."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(demo.model_path(), folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.down_proj.weight"].mul_(1e38)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.torch
def test_nonfinite_values_are_named(tmp_path: Path, overflowing: Path) -> None:
    from zarrtrace.extraction import extract

    asked = options(model=str(overflowing), sae_path=demo.sae_path(), features=True)
    with pytest.raises(NonFiniteError) as error:
        extract(tmp_path / "run", asked)
    assert "Risky_40: the model computed NaN or infinity in layer 2 (features)" in str(error.value)
    assert "--allow-nonfinite" in error.value.remedy
    assert read_trace_attributes(tmp_path / "run/Risky_40").complete_layers == (1,)
    extract(tmp_path / "run", asked, allow_nonfinite=True)
    attributes = read_trace_attributes(tmp_path / "run/Risky_40")
    assert attributes.complete
    assert attributes.nonfinite == ("2", "3", "tokens")
    assert verify(tmp_path / "run") == []
    stored = open_trace(tmp_path / "run/Risky_40")
    assert np.isnan(stored.attention.sel(layer=3)).any()
    assert np.isfinite(stored.attention.sel(layer=2)).all()


# --- no space left -----------------------------------------------------------------------------

# Forks for both attempts, which need not import everything each. Mounting needs root, or a user
# namespace of one's own.
SMALL_DISK = r"""
import ctypes, json, os, subprocess, sys
from pathlib import Path
from zarrtrace.cli import main
from zarrtrace.extraction.job import capture_package

capture_package().hide_progress()

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
user = os.geteuid()
assert ctypes.CDLL(None).unshare(NEW_MOUNTS | (NEW_USER if user else 0)) == 0
if user:
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
disk, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", disk], check=True)


def call(*arguments):
    said, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(end, 2)
        sys.argv = ["zarrtrace", *arguments]
        main()  # ends the process
    os.close(end)
    with open(said) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


first = call(*command)
subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
second = call(*command)
verified, _ = call("verify", f"{disk}/run")
leftover = subprocess.run(["find", disk, "-name", "*.partial"], capture_output=True, text=True)
print(json.dumps([*first, *second, verified, leftover.stdout]))
"""


@pytest.mark.torch
def test_a_full_disk(tmp_path: Path) -> None:
    """A small tmpfs fills in the middle; with more room, the same command goes on."""
    command = ["extract", "-o", str(tmp_path / "run"), "--layers", "1-31", "--no-features"]
    command += ["--scenario", "Risky_40", "-q"]
    done = processes.python(SMALL_DISK, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    code, error, again, error_again, verified, partial = json.loads(done.stdout.splitlines()[-1])
    assert code == 1
    assert "no space left on the disk" in error
    assert "The run needs about" in error
    assert "Traceback" not in error
    assert (again, error_again) == (0, "")
    assert verified == 0
    assert partial == ""


# --- kill -9 -----------------------------------------------------------------------------------

# Forks for every attempt, before torch or Zarr have started a thread. What the
# extraction is doing stands in memory that it shares with the killer.
KILLER = r"""
import json, mmap, os, random, shutil, signal, sys, threading, time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zarr, xarray
from zarrtrace.errors import NotATraceError
from zarrtrace.extraction import Options, extract, job
from zarrtrace.extraction.job import capture_package
from zarrtrace.store import RunWriter, TraceWriter, open_run, read_trace_attributes, verify

capture = capture_package()
capture.hide_progress()
import zarrtrace.capture.saes

folder, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
OPTIONS = Options(layers=tuple(range(1, 9)), only=("Risky_40", "Safe_140_near_goal"))
LAYERED = ("attention", "attention_mean", "features", "top_feature", "top_activation")
PHASES = ("loading", "capture", "writing", "consolidation")
# By phase: how often it was entered, in how many threads it is, the longest stay in seconds.
entered, inside, longest = (memoryview(mmap.mmap(-1, 32)).cast("d") for _ in range(3))
mutex = threading.Lock()
stop = mmap.mmap(-1, 1)


@contextmanager
def phase(name):
    at, began = PHASES.index(name), time.monotonic()
    with mutex:
        entered[at] += 1
        inside[at] += 1
    try:
        yield
    finally:
        with mutex:
            inside[at] -= 1
            longest[at] = max(longest[at], time.monotonic() - began)


def watched(name, real):
    def body(*arguments, **options):
        with phase(name):
            return real(*arguments, **options)

    return body


def watched_records(*arguments, real=capture.capture, **options):
    with phase("capture"):
        yield from real(*arguments, **options)


job._load_model = watched("loading", job._load_model)
capture.capture = watched_records
TraceWriter.append = watched("writing", TraceWriter.append)
TraceWriter.finish = watched("consolidation", TraceWriter.finish)
RunWriter.finish = watched("consolidation", RunWriter.finish)


def start(body):
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def must(body):
    assert end(start(body)) == 0


def journalled():
    "Files of layers that are stored, and when they were written."
    found = {}
    for trace in (run / name for name in OPTIONS.only):
        try:
            attributes = read_trace_attributes(trace)
        except Exception:
            continue
        for layer in attributes.complete_layers:
            at = attributes.layers.index(layer)
            for array in LAYERED:  # the journal speaks of next_token for itself
                for file in trace.glob(f"{array}/c/{at}/**/*"):
                    if file.is_file() and not file.name.endswith(".partial"):
                        found[file] = file.stat().st_mtime_ns
    return found


def stored_layers(name):
    try:
        return read_trace_attributes(run / name).complete_layers
    except NotATraceError:  # not begun
        return ()


def readable():
    "What a reader sees: complete layers or honest gaps."
    if not (run / "zarr.json").exists():
        return
    stored = {name: stored_layers(name) for name in OPTIONS.only}  # more may come meanwhile
    seen, whole = open_run(run, missing="nan"), open_run(truth)
    for name, node in seen.children.items():
        for array in ("attention", "features", "top_activation"):
            for layer in node["layer"].values:
                value = node[array].sel(layer=layer).values
                if layer in stored[name] or not np.isnan(value).all():
                    np.testing.assert_array_equal(value, whole[name][array].sel(layer=layer).values)


def keep_reading():
    while not stop[0]:
        readable()
        time.sleep(0.05)


def moment(aim, count, share):
    "Wait until a phase was entered so often, and then for a share of the longest stay in it."
    while entered[aim] < count and os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ) is None:
        time.sleep(0.0002)
    time.sleep(share * longest[aim])


run, truth = folder / "run", folder / "truth"
must(lambda: extract(truth, OPTIONS))
shutil.rmtree(truth)
longest[:] = memoryview(bytes(32)).cast("d")  # the first finds no file in the cache
must(lambda: extract(truth, OPTIONS))
moments = random.Random(seed)
log, before = [], {}
while len(log) < kills:
    aim = len(log) % len(PHASES)
    entered[:] = inside[:] = memoryview(bytes(32)).cast("d")
    stop[0] = 0
    child = start(lambda: extract(run, OPTIONS))
    reader = start(keep_reading)
    share = moments.random()
    moment(aim, moments.randint(1, (2, 1, 6, 3)[aim]), share)
    os.kill(child, signal.SIGKILL)
    code = end(child)
    stop[0] = 1
    assert end(reader) == 0, "a reader beside the extraction"
    now = journalled()
    assert {file: now.get(file) for file in before} == before, "a stored layer was written again"
    before = now
    must(readable)
    if code == -signal.SIGKILL:
        there = [name for name, threads in zip(PHASES, inside) if threads]
        log.append((PHASES[aim], round(share, 3), there, len(now)))
    else:
        assert code == 0
        shutil.rmtree(run)  # it came to its end: from the beginning
        before = {}
must(lambda: extract(run, OPTIONS))
assert {file: journalled().get(file) for file in before} == before


def equal():
    assert verify(run) == []
    content = [
        {str(f.relative_to(at)): f.read_bytes() for f in at.rglob("*") if f.is_file()}
        for at in (run, truth)
    ]
    assert content[0].keys() == content[1].keys(), content[0].keys() ^ content[1].keys()
    assert content[0] == content[1]


must(equal)
assert sorted(f.name for f in folder.iterdir()) == ["run", "truth"], list(folder.iterdir())
print(json.dumps(log))
"""


@pytest.mark.torch
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [11, 12])
def test_kill_9(tmp_path: Path, seed: int) -> None:
    """At random moments, 40 in CI; what is there afterwards equals an uninterrupted run."""
    kills = int(os.environ.get("ZARRTRACE_KILLS", "8")) // 2
    done = processes.python(KILLER, tmp_path, seed, kills)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    log = json.loads(done.stdout)
    print(*log, sep="\n")  # noqa: T201 -- shown with -rP, and when it fails
    assert len(log) == kills
    assert len({files for *_, files in log}) > 1, "every kill hit the same moment"
    if kills >= 20:
        hit = {phase for *_, there, _ in log for phase in there}
        assert hit == {"loading", "capture", "writing", "consolidation"}


def test_integrity_errors_name_the_remedy(run: fakes.FakeRun) -> None:
    delete(run.path / "Safe_1/features/c/1/0/0", 0)
    for reading in (
        lambda: zt.open_trace(run.path / "Safe_1"),
        zt.open_run(run.path)["Safe_1"]["features"].load,
    ):
        with pytest.raises(IntegrityError) as error:
            reading()
        assert "--repair" in error.value.remedy
