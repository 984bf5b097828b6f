"""Writing runs: resumed byte for byte, one writer at a time, replaced as a whole."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
from reading import assert_equals, in_subprocess

import zarrtrace as zt
from zarrtrace.errors import (
    ConfigMismatchError,
    IncompleteError,
    IntegrityError,
    LockedError,
    NotATraceError,
    ScenarioError,
    StoreError,
)
from zarrtrace.format.attributes import RunAttributes
from zarrtrace.storage import disk
from zarrtrace.store import RunWriter, open_run, read_run, summarize, verify
from zarrtrace.store.seal import sealed_group

# --- attributes --------------------------------------------------------------------------------


def test_what_the_suite_states_is_in_the_run_and_else_not_on_disk(
    tmp_path: Path, shared_run: fakes.FakeRun
) -> None:
    stated = {"bands": {"local": (1, 2), "decision": (3, 3)}, "task_spans": ["goal"]}
    run = fakes.make_run(tmp_path, stated=stated)
    attributes = open_run(run.path).attrs
    assert attributes["bands"] == {"local": [1, 2], "decision": [3, 3]}
    assert attributes["task_spans"] == ["goal"]
    # Another hypothesis is no other run: the latest is kept.
    other = fakes.make_run(tmp_path, stated={"bands": {"local": (1, 1)}})
    assert other.written == []
    assert open_run(run.path).attrs["bands"] == {"local": [1, 1]}
    assert not {"bands", "task_spans"} & set(open_run(shared_run.path).attrs)
    assert b"bands" not in (shared_run.path / "zarr.json").read_bytes()


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drop",
    [
        {"Safe_1": (2, 3), "Risky_2": (1, 2, 3)},
        {"Safe_1": (1,)},
        {"Risky_2": (3,)},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, shared_run: fakes.FakeRun, drop: dict[str, tuple[int, ...]]
) -> None:
    begun = fakes.make_run(tmp_path, drop=drop)
    assert read_run(begun.path).attributes.complete is False
    done = fakes.make_run(tmp_path)
    # What came behind a missing layer was not stored.
    expected = [
        (name, layer)
        for name in fakes.SCENARIOS
        for layer in fakes.LAYERS
        if layer >= min(drop.get(name, (9,)))
    ]
    assert done.written == expected
    assert fakes.files_in(done.path) == fakes.files_in(shared_run.path)


def test_a_complete_run_is_left_as_it_is(run: fakes.FakeRun) -> None:
    traces = {path: path.stat().st_ino for path in run.path.rglob("*/*")}
    before = fakes.files_in(run.path)
    assert fakes.make_run(run.path.parent).written == []
    assert fakes.files_in(run.path) == before
    assert {path: path.stat().st_ino for path in run.path.rglob("*/*")} == traces


def test_a_run_is_not_finished_without_its_traces(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", fakes.SCENARIOS, {}) as run:
        with pytest.raises(IncompleteError, match="2 of 2 scenarios are not complete: Safe_1"):
            run.finish()
        writer = run.trace(fakes.make_plan())
        with pytest.raises(IncompleteError, match="3 of 3 layers missing"):
            writer.finish()
    assert read_run(tmp_path / "run").attributes.complete is False
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["zarr.json"]


def _damage(run: Path) -> None:
    file = run / "Safe_1" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"float32"', b'"float64"', 1))


def _exchange(run: Path) -> None:
    (run / "Safe_1").rename(run / "x")
    (run / "Risky_2").rename(run / "Safe_1")
    (run / "x").rename(run / "Risky_2")


@pytest.mark.parametrize(
    ("change", "said"),
    [(_damage, "not the metadata that was written"), (_exchange, "holds scenario 'Risky_2'")],
)
def test_a_run_is_not_finished_with_metadata_of_other_traces(
    tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    begun = fakes.make_run(tmp_path)
    content = (begun.path / "zarr.json").read_bytes()
    change(begun.path)
    with (
        RunWriter(begun.path, fakes.SCENARIOS, fakes.CONFIG) as run,
        pytest.raises(IntegrityError, match=said),
    ):
        run.finish()
    assert (begun.path / "zarr.json").read_bytes() == content


def test_python_looks_for_no_garbage_while_a_run_is_opened(
    shared_run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile = []

    def chosen(names: tuple[str, ...], _: object) -> tuple[str, ...]:
        meanwhile.append((gc.get_threshold()[0], gc.isenabled()))
        return names

    monkeypatch.setattr("zarrtrace.store.open.chosen_names", chosen)
    before = gc.get_threshold()
    assert len(open_run(shared_run.path).children) == len(fakes.SCENARIOS)
    with pytest.raises(NotATraceError):
        open_run(shared_run.path / "elsewhere")
    assert meanwhile == [(0, True)]
    assert gc.get_threshold() == before
    assert before[0] > 0


def test_dask_imported_while_a_run_is_opened_leaves_the_collector_on(
    shared_run: fakes.FakeRun,
) -> None:
    code = f"""
import gc, sys, zarrtrace
tree = zarrtrace.open_run({str(shared_run.path)!r}, chunks="auto")
assert "dask.array" in sys.modules
tree["Safe_1"].attention[:1, 0].compute()
print(gc.isenabled(), gc.get_threshold()[0] > 0)
"""
    assert in_subprocess(code).split() == ["True", "True"]


def test_another_configuration_is_refused_by_name(run: fakes.FakeRun) -> None:
    before = fakes.files_in(run.path)
    other = {**fakes.CONFIG, "layers": [1, 2], "batch_size": 4}
    names = ["Safe_1", "Risky_2"]
    with pytest.raises(ConfigMismatchError) as caught, RunWriter(run.path, names, other):
        pass
    message = str(caught.value)
    assert "layers: [1, 2, 3] there, [1, 2] now" in message
    assert "batch_size: None there, 4 now" in message
    assert "model" not in message
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigMismatchError, match="holds 2 other scenarios: Safe_1, Risky_2"):
        RunWriter(run.path, ["b"], fakes.CONFIG).__enter__()
    assert fakes.files_in(run.path) == before


@pytest.mark.parametrize(
    ("there", "now", "said"),
    [
        (list("abcde"), list("abc"), "5 ('d', 'e') there, ['a', 'b', 'c'] now"),
        (list("abcdefgh"), None, "8 ('a', 'b', 'c', …) there, None now"),
        (list("abcde"), list("edcba"), "5 ('a', 'b', 'c', …) there, 5 ('e', 'd', 'c', …) now"),
        (
            dict.fromkeys("abcde", "x"),
            {**dict.fromkeys("abcde", "x"), "d": "y"},
            "5 (d: 'x') there, 5 (d: 'y') now",
        ),
    ],
)
def test_long_values_are_told_by_their_difference(
    tmp_path: Path, there: Any, now: Any, said: str
) -> None:
    with RunWriter(tmp_path / "run", ["a"], {"names": there}):
        pass
    with pytest.raises(ConfigMismatchError) as caught:
        RunWriter(tmp_path / "run", ["a"], {"names": now}).__enter__()
    assert f"\n  names: {said}\n" in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "", "zarr.json", "a/b"])
def test_unsafe_names_never_become_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ScenarioError, match="scenario name"):
        RunWriter(tmp_path / "run", [name], {})
    assert list(tmp_path.iterdir()) == []


def test_names_read_from_a_run_are_checked(run: fakes.FakeRun) -> None:
    """A run from elsewhere, sealed as it should be, must not make us read outside of it."""
    attributes = RunAttributes(scenarios=("../elsewhere",), config={}, complete=True)
    (run.path / "zarr.json").write_bytes(sealed_group(attributes, {}))
    for opening in (open_run, verify, summarize):
        with pytest.raises(IntegrityError, match="scenario name"):
            opening(run.path)


# --- one writer --------------------------------------------------------------------------------

LOCK = """
    import sys
    from zarrtrace.errors import LockedError
    from zarrtrace.store import RunWriter

    try:
        with RunWriter(sys.argv[1], ["a"], {}):
            print("writing")
    except LockedError as error:
        print(f"locked: {error.what}")
"""


def test_a_second_process_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunWriter(path, ["a"], {}):
        before = fakes.files_in(path)
        assert in_subprocess(LOCK, path) == f"locked: {path}: another process is writing it\n"
        with pytest.raises(LockedError), RunWriter(path, ["a"], {}):
            pass
        assert fakes.files_in(path) == before
    assert in_subprocess(LOCK, path) == "writing\n"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = """
        import os, sys
        from zarrtrace.store import RunWriter

        RunWriter(sys.argv[1], ["a"], {}).__enter__()
        os._exit(0)
    """
    in_subprocess(code, tmp_path / "run")
    assert len([*tmp_path.iterdir()]) == 2
    with RunWriter(tmp_path / "run", ["a"], {}):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# --- replacing a run ---------------------------------------------------------------------------


def test_overwrite_replaces_only_when_finished(run: fakes.FakeRun) -> None:
    folder, before = run.path.parent, fakes.files_in(run.path)
    fakes.make_run(folder, seed=5, overwrite=True, finish=False)
    assert fakes.files_in(run.path) == before
    new = fakes.make_run(folder, seed=5, overwrite=True)
    assert_equals(zt.open_trace(new.trace), new.truth["Safe_1"])
    assert fakes.files_in(new.path) != before
    assert [p.name for p in folder.iterdir()] == ["run"]


def test_overwrite_goes_on_where_it_stopped(run: fakes.FakeRun) -> None:
    drop = {"Safe_1": (3,), "Risky_2": (1, 2)}
    fakes.make_run(run.path.parent, seed=5, overwrite=True, drop=drop)
    with RunWriter(run.path, fakes.SCENARIOS, fakes.CONFIG, overwrite=True) as again:
        assert again.trace(fakes.make_plan()).missing_layers == (3,)
    other = {**fakes.CONFIG, "layers": "1-3"}
    with RunWriter(run.path, fakes.SCENARIOS, other, overwrite=True) as again:
        assert again.trace(fakes.make_plan()).missing_layers == fakes.LAYERS


@pytest.mark.parametrize("whole", [True, False])
def test_the_old_run_never_takes_the_place_of_the_new_one(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> None:
    """After a kill between the exchange of both and the removal of the old one."""
    if not whole:  # the old run was never finished
        shutil.rmtree(run.path)
        fakes.make_run(run.path.parent, drop={"Safe_1": (3,)})

    def kill(*_: Any, **__: Any) -> None:
        raise KilledError

    original = disk.exchange
    with monkeypatch.context() as patch:

        def exchange(one: Path, other: Path) -> bool:
            patch.setattr(shutil, "rmtree", kill)
            return original(one, other)

        patch.setattr(disk, "exchange", exchange)
        with pytest.raises(KilledError):
            fakes.make_run(run.path.parent, seed=5, overwrite=True)
    again = fakes.make_run(run.path.parent, seed=5)  # without --overwrite
    assert again.written == []
    assert_equals(zt.open_trace(run.trace), again.truth["Safe_1"])
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]
    assert ".staged" not in [path.name for path in run.path.iterdir()]


def test_overwrite_removes_nothing_of_others(run: fakes.FakeRun) -> None:
    """A folder of the name under which the new run is written."""
    with RunWriter(run.path, fakes.SCENARIOS, fakes.CONFIG, overwrite=True) as writer:
        new = Path(writer.path)
    assert new.parent == run.path.parent
    shutil.rmtree(new)
    new.mkdir()
    (new / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="is in the way, and no run"):
        fakes.make_run(run.path.parent, seed=5, overwrite=True)
    assert (new / "thesis.tex").read_text() == "x"
    assert_equals(zt.open_trace(run.trace), run.truth["Safe_1"])


class KilledError(BaseException):
    """Ends a writer at once."""


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("stop_at", range(8))
def test_a_kill_while_replacing_loses_no_run(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch, stop_at: int, *, exchange: bool
) -> None:
    """Stop before every rename, exchange and removal of the swap; the next writer ends it."""
    steps = iter(range(100))

    def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if next(steps) == stop_at:
                raise KilledError
            return original(*arguments, **options)

        return step

    folder = run.path.parent
    fakes.make_run(folder, seed=5, overwrite=True, finish=False)
    swap = disk.exchange if exchange else lambda *_: False
    with (
        RunWriter(run.path, fakes.SCENARIOS, fakes.CONFIG, overwrite=True) as again,
        monkeypatch.context() as patch,
    ):
        patch.setattr(shutil, "rmtree", stopping(shutil.rmtree))
        patch.setattr(Path, "rename", stopping(Path.rename))
        patch.setattr(disk, "exchange", stopping(swap))
        try:
            again.finish()
            was_killed = False
        except KilledError:
            was_killed = True
    assert was_killed == (stop_at < (4 if exchange else 6))
    try:
        found = zt.open_trace(run.path / "Safe_1")
    except NotATraceError:  # between two renames, where folders cannot be exchanged
        assert not exchange
        with pytest.raises(NotATraceError, match=r"is being replaced: .*-old by"):
            zt.open_run(run.path)
    else:
        assert "features" in found
        found.load()
    new = fakes.make_run(folder, seed=5, overwrite=True)
    if was_killed:  # what was computed is not computed again
        assert new.written == []
    assert_equals(zt.open_trace(new.trace), new.truth["Safe_1"])
    assert verify(new.path) == []
    assert {p.name for p in folder.iterdir()} == {"run"}
