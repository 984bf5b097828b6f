"""Faults, each injected for real: kills, full disks, damaged files, failing workers, NaN."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import hostile
import numpy as np
import processes
import pytest

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.cli import main
from zarrtrace.errors import IntegrityError, NonFiniteError, StoreError
from zarrtrace.format.layout import Limits
from zarrtrace.store import TraceWriter, open_trace, read_trace, summarize, verify

# --- bit rot -----------------------------------------------------------------------------------


def flip(file: Path, seed: int) -> None:
    content = bytearray(file.read_bytes())
    chosen = random.Random(seed)
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    file.write_bytes(content)


def flip_in_layer_2(file: Path, _seed: int) -> None:
    """Flip a bit of a chunk of the second layer; of other files, in the middle."""
    content = bytearray(file.read_bytes())
    at = len(content) // 2
    if file.parent.name in LAYERED and file.name != "zarr.json":
        entries = hostile.index_of(file.parents[1], file.parent.name)
        offset, length = entries[len(entries) // 3].tolist()
        at = offset + length // 2
    content[at] ^= 4
    file.write_bytes(content)


def flip_at_the_end(file: Path, _seed: int) -> None:
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(content)


def cut(file: Path, _seed: int) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def lengthen(file: Path, _seed: int) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def empty(file: Path, _seed: int) -> None:
    file.write_bytes(b"")


def delete(file: Path, _seed: int) -> None:
    file.unlink()


def put_a_folder(file: Path, _seed: int) -> None:
    file.unlink()
    file.mkdir()


def put_a_pipe(file: Path, _seed: int) -> None:
    file.unlink()
    os.mkfifo(file)


def exchange(file: Path, _seed: int) -> None:
    """Put the same file of the other trace there."""
    other = Path(str(file).replace("Safe_1", "Risky_2"))
    file.write_bytes(other.read_bytes())


LAYERED = ("attention", "attention_mean", "features", "top_feature", "top_activation")
FILES = (
    "Safe_1/attention/c.0.0.0.0",
    "Safe_1/attention_mean/c.0.0.0",
    "Safe_1/features/c.0.0.0",
    "Safe_1/top_feature/c.0.0.0",
    "Safe_1/top_activation/c.0.0.0",
    "Safe_1/next_token/c.0.0",
    "Safe_1/next_token_text/c.0.0",
    "Safe_1/query_token/c.0",
    "Safe_1/token_id/c.0",
    "Safe_1/layer/c.0",
    "Safe_1/features/zarr.json",
    "Safe_1/query_token/zarr.json",
    "Safe_1/zarr.json",
    "zarr.json",
)
DAMAGES = [
    (flip, 0),
    pytest.param(flip, 1, marks=pytest.mark.long),
    pytest.param(flip, 2, marks=pytest.mark.long),
    (flip_in_layer_2, 0),
    (flip_at_the_end, 0),
    (cut, 0),
    (lengthen, 0),
    (empty, 0),
    (delete, 0),
    (put_a_folder, 0),
    (put_a_pipe, 0),
    (exchange, 0),
]


def means_the_same(before: bytes, file: Path) -> bool:
    """Whether the file holds what it held: JSON also if a blank became another blank."""
    try:
        after = file.read_bytes() if file.is_file() else b""
        is_array = file.name == "zarr.json" and file.parent.name not in ("Safe_1", "run")
        return before == after or (is_array and json.loads(before) == json.loads(after))
    except ValueError:
        return False


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("damage", "seed"), DAMAGES, ids=lambda value: getattr(value, "__name__", str(value))
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
        assert damage in (flip, lengthen, exchange)
        assert verify(run.path) == []
        return
    layers = layers_found(run.path, file)
    if damage is flip_in_layer_2 and path.parent.name in LAYERED and path.name != "zarr.json":
        assert layers == {2}
    assert_never_read(run)
    if damage is put_a_folder and file == "zarr.json":
        with pytest.raises(StoreError, match="a folder is in its place"):
            fakes.make_run(run.path.parent, repair=True)
        path.rmdir()
    again = fakes.make_run(run.path.parent, repair=True)
    assert verify(again.path) == []
    assert fakes.files_in(again.path) == fakes.files_in(shared_run.path)
    assert {layer for _, layer in again.written} == layers
    assert {scenario for scenario, _ in again.written} <= {"Safe_1"}


def layers_found(run: Path, file: str) -> set[int]:
    """Return the layers that have to be computed again; `verify` must name the file."""
    *folders, name = Path(file).parts
    scenario, array = (*folders[:2], None, None)[:2]
    try:
        problems = verify(run)
    except StoreError:  # the run's own metadata: nothing else can be checked
        assert scenario is None
        return set()
    assert problems
    assert {problem.scenario for problem in problems} == {scenario}
    if array is None:
        return set() if scenario is None else set(fakes.LAYERS)
    assert {problem.array for problem in problems} == {array}
    assert {problem.chunk for problem in problems} == {name}
    if name == "zarr.json" or array not in LAYERED:
        return set()
    named = {problem.layer for problem in problems}
    return set(fakes.LAYERS) if None in named else {layer for layer in named if layer is not None}


def assert_never_read(run: fakes.FakeRun) -> None:
    """Whatever can still be read equals what was written."""
    for opening in (zt.open_trace, lambda trace: zt.open_run(trace.parent)[trace.name]):
        try:
            opened = opening(run.trace)
        except StoreError:
            continue
        for name, values in run.truth["Safe_1"].items():
            try:
                found = opened[name].values
            except StoreError:
                continue
            np.testing.assert_array_equal(found, values, err_msg=name)


def test_a_trace_that_was_exchanged_as_a_whole_is_named(run: fakes.FakeRun) -> None:
    (run.path / "Safe_1").rename(run.path / "x")
    (run.path / "Risky_2").rename(run.path / "Safe_1")
    (run.path / "x").rename(run.path / "Risky_2")
    assert {problem.scenario for problem in verify(run.path)} == {"Safe_1", "Risky_2"}
    with pytest.raises(IntegrityError, match="holds scenario 'Risky_2'"):
        zt.open_run(run.path)


def test_what_does_not_belong_to_a_run_is_named(run: fakes.FakeRun) -> None:
    for file in ("notes.txt", "Safe_1/notes.txt", "Safe_1/features/c.0.0.1"):
        (run.path / file).write_bytes(b"x")
        (problem,) = verify(run.path)
        assert "does not belong" in problem.message
        assert problem.scenario == ("Safe_1" if "/" in file else None)
        (run.path / file).unlink()
    assert verify(run.path) == []


def test_damaged_consolidated_metadata_is_found(run: fakes.FakeRun) -> None:
    """Also with a seal that fits."""
    for folder, name, said in (
        (run.trace, "attention", "is not the metadata that was written"),
        (run.path, "Safe_1/attention", "the run's copy of its metadata is another"),
    ):
        good = (folder / "zarr.json").read_bytes()
        group = json.loads(good)
        group["consolidated_metadata"]["metadata"][name]["attributes"]["long_name"] = "x"
        (folder / "zarr.json").write_text(json.dumps(group))
        if folder == run.path:
            with pytest.raises(IntegrityError, match="not the metadata"):
                verify(run.path)
        else:
            assert "not the metadata" in verify(run.path)[0].message
        (folder / "zarr.json").write_bytes(hostile.sealed(group))
        problems = verify(run.path)
        assert said in problems[0].message
        assert {problem.scenario for problem in problems} == {"Safe_1"}
        (folder / "zarr.json").write_bytes(good)
    assert verify(run.path) == []


def test_files_that_damaged_metadata_claims_are_not_looked_for(
    run: fakes.FakeRun, opened_files: list[str]
) -> None:
    def change(node: Any) -> None:
        node["shape"] = [9_000]
        node["attributes"]["checksums"] = {f"c.{n}": [9, "0" * 8] for n in range(9_000)}

    hostile.change_array(run.trace, "query", change)
    opened_files.clear()
    (problem,) = verify(run.path)
    assert (problem.scenario, problem.array) == ("Safe_1", None)
    assert not [file for file in opened_files if "Safe_1/query/" in file]


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


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("repair", [True, False])
def test_what_was_cut_otherwise_is_not_mixed(
    tmp_path: Path, is_complete: bool, repair: bool
) -> None:
    """A trace that another version began is started again; a complete one stays."""
    sizes: dict[str, Any] = {"scenarios": ("Safe_1",), "tokens": 20, "features": 64}
    drop = None if is_complete else {"Safe_1": fakes.LAYERS[-1:]}
    begun = fakes.make_run(tmp_path, **sizes, drop=drop, limits=Limits(queries=5, features=16))
    again = fakes.make_run(tmp_path, **sizes, repair=repair)
    stays = is_complete and not repair
    assert len(again.written) == (0 if stays else 3)
    assert verify(again.path) == []
    found = open_trace(again.trace)
    assert found.attention.encoding["chunks"][2] == (5 if stays else 20)
    assert found.features.encoding["chunks"][2] == (16 if stays else 64)
    for name, expected in begun.truth["Safe_1"].items():
        if is_complete or not name.startswith(LAYERED):
            np.testing.assert_array_equal(found[name], expected)
    assert not np.isnan(found.features).any()


def test_repair_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not a zarrtrace run"):
        fakes.make_run(tmp_path, repair=True)
    assert fakes.files_in(tmp_path / "run") == {"thesis.txt": b"precious"}


@pytest.mark.long
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
    flip_in_layer_2(tmp_path / "run/Risky_40/attention/c.0.0.0.0", 5)
    flip(tmp_path / "run/Risky_40/token_id/c.0", 5)
    cut(tmp_path / "run/Risky_40/query_token/c.0", 0)
    capsys.readouterr()
    assert call() == 1
    assert "--repair" in capsys.readouterr().err
    assert call("--repair") == 0
    assert fakes.files_in(tmp_path / "run") == good
    assert call("--repair", "--overwrite") == 2


# --- a worker fails ----------------------------------------------------------------------------


def options(**changes: Any) -> Any:
    from zarrtrace.extraction import Options

    return Options(**{"layers": (1, 2, 3), "features": False, "only": ("Risky_40",), **changes})


def stored_layers(run: Path) -> tuple[int, ...]:
    """Return the stored layers of a trace that is not complete."""
    (trace,) = summarize(run).traces
    assert not trace.complete
    return tuple(layer for layer in trace.layers if layer not in trace.missing_layers)


@pytest.mark.long
@pytest.mark.torch
def test_a_failing_writer_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zarrtrace.extraction import extract_run

    original, seen = TraceWriter.append, []

    def append(self: TraceWriter, record: Any) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise RuntimeError("the codec broke")
        original(self, record)

    monkeypatch.setattr(TraceWriter, "append", append)
    with pytest.raises(RuntimeError, match="the codec broke"):
        extract_run(tmp_path / "run", options(layers=tuple(range(32))))
    assert len(seen) < 12  # what was in flight, not all 32
    assert not (tmp_path / "run" / "Risky_40").exists()
    assert stored_layers(tmp_path / "run") == tuple(range(seen[1].layer))
    monkeypatch.undo()
    extract_run(tmp_path / "run", options(layers=tuple(range(32))))
    assert verify(tmp_path / "run") == []


@pytest.mark.torch
def test_a_failing_sae_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zarrtrace.capture.saes import FolderSAEs
    from zarrtrace.extraction import extract_run

    original = FolderSAEs.load

    def load(self: FolderSAEs, attributes: Any, device: Any) -> Any:
        if attributes.layer == 2:
            raise ConnectionError("the hub went away")
        return original(self, attributes, device)

    monkeypatch.setattr(FolderSAEs, "load", load)
    with pytest.raises(ConnectionError, match="the hub went away"):
        extract_run(tmp_path / "run", options(features=True))
    assert stored_layers(tmp_path / "run") == (1,)


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
    from zarrtrace.extraction import extract_run

    asked = options(
        model=str(overflowing), scenarios="slot-machine", sae_path=demo.sae_path(), features=True
    )
    with pytest.raises(NonFiniteError) as error:
        extract_run(tmp_path / "run", asked)
    assert "Risky_40: the model computed NaN or infinity in layer 2 (features)" in str(error.value)
    assert "--allow-nonfinite" in error.value.remedy
    assert stored_layers(tmp_path / "run") == (1,)
    extract_run(tmp_path / "run", asked, allow_nonfinite=True)
    attributes = read_trace(tmp_path / "run/Risky_40").attributes
    assert {*attributes.nonfinite} >= {"attention", "features", "next_token_logprob"}
    assert attributes.nonfinite["features"] == (2, 3)
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
from zarrtrace.extraction.packages import capture_package

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
leftover = subprocess.run(["find", disk, "-name", "*partial*"], capture_output=True, text=True)
print(json.dumps([*first, *second, verified, leftover.stdout]))
"""


@pytest.mark.torch
@pytest.mark.long
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
from zarrtrace.errors import IntegrityError
from zarrtrace.extraction import Options, extract_run, job
from zarrtrace.extraction.packages import capture_package
from zarrtrace.store import RunWriter, TraceWriter, open_run, summarize, verify

capture = capture_package()
capture.hide_progress()
import zarrtrace.capture.saes

folder, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
OPTIONS = Options(layers=tuple(range(1, 9)), only=("Risky_40", "Safe_140_near_goal"))
PHASES = ("loading", "capture", "writing", "publishing")
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
TraceWriter.complete = watched("publishing", TraceWriter.complete)
TraceWriter.publish = watched("publishing", TraceWriter.publish)
RunWriter.finish = watched("publishing", RunWriter.finish)


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


def stored_layers():
    "Layers of each trace that are stored, complete or staged."
    if not (run / "zarr.json").exists():
        return {}
    return {
        trace.scenario: [n for n in trace.layers if n not in trace.missing_layers]
        for trace in summarize(run).traces
    }


def journalled():
    "The file that holds each stored layer; a file that was started again is another one."
    found, layers_of = {}, stored_layers()
    for name in OPTIONS.only:
        staged = run / ".staged" / name
        if (staged / "zarr.json").exists() and not (staged / "journal").exists():
            layers_of[name] = OPTIONS.layers  # complete, but not in its place yet
    for name, layers in layers_of.items():
        folder = run / name if (run / name).exists() else run / ".staged" / name
        for layer in layers:
            found[name, layer] = (folder / "attention" / "c.0.0.0.0").stat().st_ino
    return found


def readable():
    "What a reader sees: complete layers or honest gaps."
    if not (run / "zarr.json").exists():
        return
    stored = stored_layers()  # more may come meanwhile
    seen, whole = open_run(run, missing="nan"), open_run(truth)
    for name, node in seen.children.items():
        for array in ("attention", "features", "top_activation"):
            for layer in node["layer"].values:
                value = node[array].sel(layer=layer).values
                if layer in stored.get(name, ()) or not np.isnan(value).all():
                    np.testing.assert_array_equal(value, whole[name][array].sel(layer=layer).values)


def published():
    return [name for name in OPTIONS.only if (run / name).exists()]


def readable_beside_a_writer():
    "A staged trace that is published meanwhile is not where it was: nothing else is an error."
    before = published()
    try:
        readable()
    except IntegrityError as error:
        assert "is gone" in str(error) and published() != before, error


def keep_reading():
    while not stop[0]:
        readable_beside_a_writer()
        time.sleep(0.05)


def moment(aim, count, share):
    "Wait until a phase was entered so often, and then for a share of the longest stay in it."
    while entered[aim] < count and os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ) is None:
        time.sleep(0.0002)
    time.sleep(share * longest[aim])


run, truth = folder / "run", folder / "truth"
must(lambda: extract_run(truth, OPTIONS))
shutil.rmtree(truth)
longest[:] = memoryview(bytes(32)).cast("d")  # the first finds no file in the cache
must(lambda: extract_run(truth, OPTIONS))
moments = random.Random(seed)
log, before = [], {}
while len(log) < kills:
    aim = len(log) % len(PHASES)
    entered[:] = inside[:] = memoryview(bytes(32)).cast("d")
    stop[0] = 0
    child = start(lambda: extract_run(run, OPTIONS))
    reader = start(keep_reading)
    share = moments.random()
    moment(aim, moments.randint(1, (2, 1, 6, 3)[aim]), share)
    os.kill(child, signal.SIGKILL)
    code = end(child)
    stop[0] = 1
    assert end(reader) == 0, "a reader during the extraction"
    now = journalled()
    assert {key: now.get(key) for key in before} == before, "a stored layer was written again"
    before = now
    must(readable)
    if code == -signal.SIGKILL:
        there = [name for name, threads in zip(PHASES, inside) if threads]
        log.append((PHASES[aim], round(share, 3), there, len(now)))
    else:
        assert code == 0
        shutil.rmtree(run)  # it came to its end: from the beginning
        before = {}
must(lambda: extract_run(run, OPTIONS))
assert {key: journalled().get(key) for key in before} == before


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
        assert hit == {"loading", "capture", "writing", "publishing"}


def test_integrity_errors_name_the_remedy(run: fakes.FakeRun) -> None:
    delete(run.path / "Safe_1/features/c.0.0.0", 0)
    for reading in (
        lambda: zt.open_trace(run.path / "Safe_1"),
        zt.open_run(run.path)["Safe_1"]["features"].load,
    ):
        with pytest.raises(IntegrityError) as error:
            reading()
        assert "--repair" in error.value.remedy
