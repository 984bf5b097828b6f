"""Repairing: sound parts are copied, the rest is computed again, and the trace is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from reading import assert_equals, data_files, flip_byte_of_layer

import zarrtrace as zt
from zarrtrace.errors import IntegrityError, NoSpaceError
from zarrtrace.format.layout import Limits
from zarrtrace.records import LayerRecord
from zarrtrace.store import RunWriter, TraceWriter, verify

LAYERED = ("attention", "attention_mean", "features", "top_feature", "top_activation")
TOKENS = ("next_token", "next_token_logprob", "next_token_text")


def repaired(run: fakes.FakeRun) -> list[tuple[str, int]]:
    """Write the run again with repair; returns scenario and layer of each record computed."""
    return fakes.make_run(run.path.parent, repair=True).written


def writer_for_repair(run: fakes.FakeRun) -> TraceWriter:
    return TraceWriter(run.path, fakes.make_plan("Safe_1"), repair=True)


@pytest.mark.parametrize("array", LAYERED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_only_damaged_layers_are_computed_again(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, array: str, place: int
) -> None:
    flip_byte_of_layer(run.trace, array, place)
    assert repaired(run) == [("Safe_1", fakes.LAYERS[place])]
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)
    assert verify(run.path) == []


def test_layers_damaged_in_different_arrays_are_computed_again(
    run: fakes.FakeRun, shared_run: fakes.FakeRun
) -> None:
    flip_byte_of_layer(run.trace, "attention", 0)
    flip_byte_of_layer(run.trace, "top_feature", 2)
    flip_byte_of_layer(run.path / "Risky_2", "features", 1)
    assert repaired(run) == [("Safe_1", 1), ("Safe_1", 3), ("Risky_2", 2)]
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def other_fingerprint(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-4 - 16 * 3 - 1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, lengthen, other_fingerprint])
@pytest.mark.parametrize("array", ["attention", "features", "top_feature"])
def test_all_layers_of_a_file_without_its_index_are_computed_again(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, array: str, damage: Callable[[Path], object]
) -> None:
    damage(data_files(run.trace, array)[0])
    assert repaired(run) == [("Safe_1", layer) for layer in fakes.LAYERS]
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


@pytest.mark.parametrize("array", TOKENS)
def test_damaged_next_tokens_are_computed_again_and_no_layer(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, array: str
) -> None:
    cut_short(data_files(run.trace, array)[0])
    writer = writer_for_repair(run)
    assert writer.missing_layers == ()
    assert writer.needs_tokens
    assert repaired(run) == []
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


def lose_metadata(trace: Path) -> None:
    (trace / "features" / "zarr.json").unlink()


def damage_metadata(trace: Path) -> None:
    (trace / "attention" / "zarr.json").write_text("{")


def damage_label(trace: Path) -> None:
    cut_short(data_files(trace, "key_token")[0])


def lose_index(trace: Path) -> None:
    data_files(trace, "layer")[0].unlink()


def add_files(trace: Path) -> None:
    (trace / "features" / "c.0.0.0.partial").write_bytes(b"half")
    (trace / "zarr.json.partial").write_bytes(b"half")


@pytest.mark.parametrize(
    "damage", [lose_metadata, damage_metadata, damage_label, lose_index, add_files]
)
def test_the_known_is_written_again_and_nothing_computed(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, damage: Callable[[Path], None]
) -> None:
    damage(run.trace)
    assert verify(run.path)
    writer = writer_for_repair(run)
    assert (writer.missing_layers, writer.needs_tokens, writer.is_published) == ((), False, False)
    assert repaired(run) == []
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
@pytest.mark.parametrize("repair", [True, False])
def test_a_trace_without_its_metadata_is_computed_again(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, content: str | None, *, repair: bool
) -> None:
    file = run.trace / "zarr.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
        if not repair:
            with pytest.raises(IntegrityError, match="--repair"):
                fakes.make_run(run.path.parent)
            return
    again = fakes.make_run(run.path.parent, repair=repair)
    assert again.written == [("Safe_1", layer) for layer in fakes.LAYERS]
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


@pytest.mark.parametrize("content", [None, "{", '{"attributes": {}}'])
def test_metadata_of_a_run_is_repaired(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, content: str | None
) -> None:
    file = run.path / "zarr.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert repaired(run) == []
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


def test_a_sound_run_is_left_as_it_is(run: fakes.FakeRun) -> None:
    before = {path: path.stat().st_ino for path in run.path.rglob("*/*")}
    assert repaired(run) == []
    assert {path: path.stat().st_ino for path in run.path.rglob("*/*")} == before


def test_exchanged_files_are_computed_again(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    other = fakes.make_run(tmp_path / "two", seed=3)
    for array in ("features", "next_token"):
        shutil.copy(data_files(other.trace, array)[0], data_files(run.trace, array)[0])
    assert repaired(run) == [("Safe_1", layer) for layer in fakes.LAYERS]
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


def test_exchanged_traces_are_put_right(run: fakes.FakeRun, shared_run: fakes.FakeRun) -> None:
    (run.path / "Safe_1").rename(run.path / "x")
    (run.path / "Risky_2").rename(run.path / "Safe_1")
    (run.path / "x").rename(run.path / "Risky_2")
    with pytest.raises(IntegrityError, match="holds scenario 'Risky_2'"):
        fakes.make_run(run.path.parent)
    assert len(repaired(run)) == 6
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


def test_a_damaged_trace_stays_until_it_is_repaired(
    run: fakes.FakeRun, shared_run: fakes.FakeRun
) -> None:
    """An interrupted repair changes nothing, and the next one ends it."""
    flip_byte_of_layer(run.trace, "features", 0)
    flip_byte_of_layer(run.trace, "features", 2)
    before = fakes.files_in(run.trace)
    writer = writer_for_repair(run)
    assert writer.missing_layers == (1, 3)
    first = next(iter(fakes.make_records("Safe_1")))
    assert isinstance(first, LayerRecord)
    writer.append(first)
    assert writer.missing_layers == (3,)
    assert fakes.files_in(run.trace) == before
    np.testing.assert_array_equal(
        zt.open_trace(run.trace).features.sel(layer=2), run.truth["Safe_1"]["features"][1]
    )
    assert {layer for _, layer in repaired(run)} == {1, 3}
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


@pytest.mark.parametrize("failing", ["features", "next_token_text", "journal"])
def test_a_disk_full_while_sound_parts_are_copied_copies_them_later(
    run: fakes.FakeRun, shared_run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The same writer continues once there is room."""
    (run.trace / "features" / "zarr.json").unlink()
    writer = writer_for_repair(run)
    with fakes.full_disk(monkeypatch, failing), pytest.raises(NoSpaceError):
        writer.finish()
    writer.finish()
    assert verify(run.path) == []
    assert repaired(run) == []
    assert fakes.files_in(run.path) == fakes.files_in(shared_run.path)


@pytest.mark.parametrize("by_rows", [True, False])
def test_long_traces_are_repaired_by_layer(tmp_path: Path, *, by_rows: bool) -> None:
    limits = Limits(
        file_bytes=2**13 if by_rows else 2**15, keys=16, queries=8, tokens=16, features=64
    )
    sizes: dict[str, Any] = {"scenarios": ("a",), "tokens": 50, "features": 200, "limits": limits}
    run = fakes.make_run(tmp_path, **sizes)
    expected = fakes.files_in(run.path)
    files = data_files(run.trace, "attention")
    assert len(files) == (12 if by_rows else 3)
    cut_short(files[4] if by_rows else files[1])
    again = fakes.make_run(tmp_path, repair=True, **sizes)
    assert again.written == [("a", 2)]
    assert fakes.files_in(run.path) == expected
    assert_equals(zt.open_trace(run.trace), run.truth["a"])


def test_notes_of_nonfinite_values_are_kept(tmp_path: Path) -> None:
    *layers, tokens = fakes.make_records("Safe_1")
    plan, run = fakes.make_plan("Safe_1"), tmp_path / "run"
    bad = [np.full((2, 7, 7), np.nan, np.float32), np.full((7, 7), np.nan, np.float32)]
    layers[1] = LayerRecord(
        "Safe_1", 2, attention=bad[0], attention_mean=bad[1], features=layers[1].features  # type: ignore[union-attr]
    )  # fmt: skip
    with RunWriter(run, ["Safe_1"], {}) as writer:
        with TraceWriter(writer.path, plan, allow_nonfinite=True) as trace:
            for record in (*layers, tokens):
                trace.append(record)
        writer.finish()
    expected = fakes.files_in(run)
    assert zt.open_trace(run / "Safe_1").attrs["nonfinite"] == {"attention": "2"}
    flip_byte_of_layer(run / "Safe_1", "features", 2)
    with RunWriter(run, ["Safe_1"], {}, repair=True) as writer:
        with writer.trace(plan) as trace:
            assert trace.missing_layers == (3,)
            trace.append(layers[2])
        writer.finish()
    assert fakes.files_in(run) == expected
