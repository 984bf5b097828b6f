"""Traces while they are written: in layer order, journalled, resumed byte for byte, unseen."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import assert_equals, data_files, index_of

import zarrtrace as zt
from zarrtrace.errors import (
    IncompleteError,
    NoSpaceError,
    NotATraceError,
    StoreError,
)
from zarrtrace.format.layout import Limits, attention_rows, feature_rows
from zarrtrace.records import FeatureRecord, LayerRecord, TokensRecord
from zarrtrace.storage import disk
from zarrtrace.store import TraceWriter, open_run, summarize, verify

LAYERS = (1, 2, 5, 6)
SIZES: dict[str, Any] = {"layers": LAYERS, "channels": 5}
#: Records of this trace hold some rows of a layer each.
LONG: dict[str, Any] = {
    "layers": (1, 2),
    "tokens": 50,
    "features": 24,
    "channels": 5,
    "limits": Limits(
        file_bytes=2**12, record_bytes=2**12, keys=16, queries=4, tokens=8, features=16
    ),
}


def records(**sizes: Any) -> list[LayerRecord | TokensRecord]:
    sizes.pop("limits", None)
    return list(fakes.make_records(**sizes))


def in_parts(record: LayerRecord | TokensRecord) -> list[LayerRecord | TokensRecord]:
    """Cut a record of the long trace into records of as many rows as capture gives."""
    if isinstance(record, TokensRecord):
        return [record]
    assert record.attention is not None
    assert record.attention_mean is not None
    tokens, limits = LONG["tokens"], LONG["limits"]
    step = attention_rows(tokens, 2, "float32", limits)
    assert step < tokens
    attention = np.asarray(record.attention)
    parts: list[LayerRecord | TokensRecord] = [
        replace(
            record,
            start=start,
            attention=attention[:, start : start + step],
            attention_mean=record.attention_mean[start : start + step],
            features={},
            residual=None,
        )
        for start in range(0, tokens, step)
    ]
    features, residual = record.features["features"], record.residual
    assert residual is not None
    step = feature_rows(tokens, LONG["features"], limits)
    assert step < tokens
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        some = FeatureRecord(
            np.asarray(features.activations)[rows],
            features.top_feature[rows],
            features.top_activation[rows],
        )
        parts.append(
            replace(
                record,
                start=start,
                attention=None,
                attention_mean=None,
                features={"features": some},
                residual=residual[rows],
            )
        )
    return parts


def write(run: Path, all_records: list[Any], sizes: dict[str, Any]) -> dict[str, bytes]:
    """Write a trace in one go; returns its files."""
    with fakes.make_trace_writer(run, **sizes) as writer:
        for record in all_records:
            writer.append(record)
    return fakes.files_in(run)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a trace that was written in order."""
    return write(tmp_path_factory.mktemp("in_order") / "run", records(**SIZES), SIZES)


@pytest.fixture(scope="module")
def expected_long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the long trace, whole layers written in order."""
    return write(tmp_path_factory.mktemp("long") / "run", records(**LONG), LONG)


def staged(run: Path) -> Path:
    return run / ".staged" / "Safe_1"


# --- order -------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(order=st.permutations(range(len(LAYERS) + 1)))
def test_files_are_in_layer_order_whatever_comes_first(
    expected: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    run = tmp_path_factory.mktemp("order") / "run"
    given_records = records(**SIZES)
    assert write(run, [given_records[at] for at in order], SIZES) == expected
    for array in ("attention", "features"):
        (file,) = data_files(run / "Safe_1", array)
        offsets = index_of(file)[..., 0].ravel()
        assert offsets[0] == 0
        assert (np.diff(offsets) > 0).all()


@settings(max_examples=8)
@given(data=st.data())
def test_rows_of_layers_may_come_in_any_order(
    expected_long: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    parts = [part for record in records(**LONG) for part in in_parts(record)]
    assert len(parts) > 8
    shuffled = data.draw(st.permutations(parts))
    assert write(tmp_path_factory.mktemp("rows") / "run", shuffled, LONG) == expected_long


def test_threads_write_the_same_bytes(
    expected: dict[str, bytes], expected_long: dict[str, bytes], tmp_path: Path
) -> None:
    long = [part for record in records(**LONG) for part in in_parts(record)]
    for number in range(3):
        for all_records, sizes, files in (
            (records(**SIZES), SIZES, expected),
            (long, LONG, expected_long),
        ):
            run = tmp_path / f"{len(sizes)}_{number}"
            with (
                fakes.make_trace_writer(run, **sizes) as writer,
                ThreadPoolExecutor(6) as pool,
            ):
                list(pool.map(writer.append, reversed(all_records)))
            assert fakes.files_in(run) == files


def test_rows_in_the_middle_of_a_chunk_are_refused(tmp_path: Path) -> None:
    writer = fakes.make_trace_writer(tmp_path / "run", **LONG)
    first = in_parts(records(**LONG)[0])[0]
    assert isinstance(first, LayerRecord)
    with pytest.raises(StoreError, match="attention start at 2, in the middle of a chunk"):
        writer.append(replace(first, start=2))
    assert first.attention is not None
    assert first.attention_mean is not None
    short = replace(
        first,
        attention=np.asarray(first.attention)[:, :3],
        attention_mean=first.attention_mean[:3],
    )
    with pytest.raises(StoreError, match="attention end at 3, in the middle of a chunk"):
        writer.append(short)


# --- what counts as stored ---------------------------------------------------------------------


def test_a_layer_counts_when_all_before_it_are_there(tmp_path: Path) -> None:
    writer = fakes.make_trace_writer(tmp_path / "run", **SIZES)
    one, two, five, six, tokens = records(**SIZES)
    for record, missing in ((five, LAYERS), (one, (2, 5, 6)), (six, (2, 5, 6)), (two, ())):
        writer.append(record)
        assert writer.missing_layers == missing
        assert fakes.make_trace_writer(tmp_path / "run", **SIZES).missing_layers == missing
        with pytest.raises(IncompleteError):
            writer.complete()
    assert writer.needs_tokens
    writer.append(tokens)
    assert not writer.needs_tokens
    assert not writer.is_published
    writer.finish()
    assert writer.is_published
    writer.finish()


def test_a_layer_counts_when_its_last_array_is_there(tmp_path: Path) -> None:
    writer = fakes.make_trace_writer(tmp_path / "run")
    good = records()[0]
    assert isinstance(good, LayerRecord)
    writer.append(replace(good, features={}))
    assert writer.missing_layers == fakes.LAYERS
    writer.append(replace(good, attention=None, attention_mean=None))
    assert writer.missing_layers == (2, 3)


def test_wrong_records_are_refused(tmp_path: Path) -> None:
    writer = fakes.make_trace_writer(tmp_path / "run")
    good = records()[0]
    assert isinstance(good, LayerRecord)
    for record, message in [
        (records(layers=(9,))[0], "layer 9 is not one of"),
        (records(tokens=6)[0], r"attention of layer 1 has shape \(2, 6, 6\)"),
        (records(tokens=8)[0], r"attention of layer 1 has shape \(2, 8, 8\)"),
        (replace(good, start=7), r"attention of layer 1 has shape .* from row 7"),
        (replace(good, features={"features_x": good.features["features"]}), "holds features_x"),
        (TokensRecord("Safe_1", np.zeros((7, 3)), np.zeros((7, 3)), np.zeros((7, 3))), "next_tok"),
    ]:
        with pytest.raises(StoreError, match=message):
            writer.append(record)
    assert writer.missing_layers == fakes.LAYERS


def test_layers_without_an_sae_need_none(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, without_sae=(2,))
    ds = zt.open_trace(run.trace)
    assert_equals(ds, run.truth["Safe_1"])
    assert np.isnan(ds.features.sel(layer=2)).all()
    assert not np.isnan(ds.attention).any()
    writer = fakes.make_trace_writer(tmp_path / "other", without_sae=(2,))
    with pytest.raises(StoreError, match="layer 2 holds features, which it should not"):
        writer.append(records(layers=(2,))[0])


def test_layers_by_array_of_several_saes(tmp_path: Path) -> None:
    """Each array has an SAE on some of the layers."""
    features = {"features": 16, "features_mlp": 8}
    first, second = fakes.make_saes((1,), 16)[0], fakes.make_saes((2,), 8)[0]
    plan = replace(
        fakes.make_plan(layers=(1, 2), features=features),
        saes=(first, second.model_copy(update={"variable": "features_mlp"})),
    )
    with TraceWriter(tmp_path / "run", plan) as writer:
        for record in records(layers=(1, 2), features=features):
            if isinstance(record, TokensRecord):
                writer.append(record)
                continue
            name = "features" if record.layer == 1 else "features_mlp"
            writer.append(replace(record, features={name: record.features[name]}))
    ds = zt.open_trace(tmp_path / "run" / "Safe_1")
    assert np.isnan(ds.features.sel(layer=2)).all()
    assert np.isnan(ds.features_mlp.sel(layer=1)).all()
    assert ds.sae_id.values.tolist() == ["l1", ""]
    assert ds.sae_id_mlp.values.tolist() == ["", "l2"]
    assert verify(tmp_path / "run" / "Safe_1") == []


def test_nonfinite_arrays_are_noted_by_layer(tmp_path: Path) -> None:
    *layers, tokens = records()
    bad = replace(layers[1], features={
        "features": replace(layers[1].features["features"], nonfinite=True)  # type: ignore[union-attr]
    })  # fmt: skip
    assert isinstance(tokens, TokensRecord)
    tokens = replace(tokens, next_token_logprob=np.full_like(tokens.next_token_logprob, np.nan))
    with TraceWriter(tmp_path / "run", fakes.make_plan(), allow_nonfinite=True) as writer:
        for record in (tokens, bad, layers[2], layers[0]):
            writer.append(record)
    attributes = zt.open_trace(tmp_path / "run" / "Safe_1").attrs
    assert attributes["nonfinite"] == {"features": "2", "next_token_logprob": ""}


# --- resuming ----------------------------------------------------------------------------------


def interrupted(run: Path, count: int) -> None:
    """Write the first records of the trace and leave it so, as a killed process does."""
    writer = fakes.make_trace_writer(run, **SIZES)
    for record in records(**SIZES)[:count]:
        writer.append(record)


def resumed(run: Path, sizes: dict[str, Any] = SIZES) -> list[int | str]:
    """Resume and finish; returns what was written now."""
    writer = fakes.make_trace_writer(run, **sizes)
    written: list[int | str] = []
    for record in records(**sizes):
        if isinstance(record, TokensRecord):
            if writer.needs_tokens:
                writer.append(record)
                written.append("tokens")
        elif record.layer in writer.missing_layers:
            writer.append(record)
            written.append(record.layer)
    writer.finish()
    return written


@pytest.mark.parametrize("count", range(6))
def test_a_resumed_trace_equals_an_uninterrupted_one(
    expected: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    run = tmp_path / "run"
    interrupted(run, count)
    assert resumed(run) == [*LAYERS, "tokens"][count:]
    assert fakes.files_in(run) == expected
    assert [path.name for path in run.iterdir()] == ["Safe_1"]


def test_a_trace_complete_but_not_published_is_resumed(
    expected: dict[str, bytes], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    writer = fakes.make_trace_writer(run, **SIZES)
    for record in records(**SIZES):
        writer.append(record)
    writer.complete()
    assert resumed(run) == []
    assert fakes.files_in(run) == expected


def journal_lines(run: Path) -> list[bytes]:
    return (staged(run) / "journal").read_bytes().splitlines(keepends=True)


def torn(lines: list[bytes]) -> bytes:
    return b"".join(lines)[:-9]


def without_end(lines: list[bytes]) -> bytes:
    return b"".join(lines)[:-1]


def garbage(lines: list[bytes]) -> bytes:
    return b"".join([*lines[:-1], b"\0" * len(lines[-1])])


def flipped(lines: list[bytes]) -> bytes:
    last = bytearray(lines[-1])
    last[40] ^= 1
    return b"".join([*lines[:-1], last])


def no_object(lines: list[bytes]) -> bytes:
    return b"".join([*lines[:-1], b'd87f7e0c "test"\n'])


@pytest.mark.parametrize("damage", [torn, without_end, garbage, flipped, no_object])
def test_a_damaged_last_line_ends_the_journal(
    expected: dict[str, bytes], tmp_path: Path, damage: Callable[[list[bytes]], bytes]
) -> None:
    run = tmp_path / "run"
    interrupted(run, 3)
    (staged(run) / "journal").write_bytes(damage(journal_lines(run)))
    assert fakes.make_trace_writer(run, **SIZES).missing_layers == (5, 6)
    assert len(journal_lines(run)) == 3  # header and two layers
    assert resumed(run) == [5, 6, "tokens"]
    assert fakes.files_in(run) == expected


@pytest.mark.parametrize("at", range(4))
def test_the_first_line_that_does_not_hold_ends_the_journal(
    expected: dict[str, bytes], tmp_path: Path, at: int
) -> None:
    run = tmp_path / "run"
    interrupted(run, 3)
    lines = journal_lines(run)
    lines[at] = b"x" + lines[at][1:]
    (staged(run) / "journal").write_bytes(b"".join(lines))
    assert resumed(run) == [*LAYERS[max(at - 1, 0) :], "tokens"]
    assert fakes.files_in(run) == expected


def test_bytes_behind_the_last_line_are_cut_off(expected: dict[str, bytes], tmp_path: Path) -> None:
    """Chunks of a layer that a killed process did not enter, files it did not rename."""
    run = tmp_path / "run"
    interrupted(run, 2)
    for array in ("attention", "features", "top_feature"):
        (file,) = data_files(staged(run), array)
        disk.append(file, [b"half a chunk"])
    (staged(run) / "features" / "c.7.0.0").write_bytes(b"a file of a later layer")
    (staged(run) / "next_token" / "c.0.0.partial").write_bytes(b"half")
    (staged(run) / "next_token" / "c.0.0").write_bytes(b"not entered")
    (staged(run) / "key" / "c.0.partial").write_bytes(b"half")
    (staged(run) / "zarr.json.partial").write_bytes(b"half")
    (staged(run) / "zarr.json").write_bytes(b"{}")
    assert resumed(run) == [5, 6, "tokens"]
    assert fakes.files_in(run) == expected


@pytest.mark.parametrize(
    "array", ["attention", "attention_mean", "features", "top_activation", "residual"]
)
def test_changed_bytes_of_a_journalled_layer_end_the_journal(
    expected: dict[str, bytes], tmp_path: Path, array: str
) -> None:
    """After a loss of power, a file may hold other bytes than were written; any of them."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    interrupted(run, 3)
    run.rename(kept)
    good = data_files(staged(kept), array)[0].read_bytes()
    for number, at in enumerate([0, len(good) // 2, len(good) - 5, len(good) - 1]):
        shutil.copytree(kept, run)
        bad = bytearray(good)
        bad[at] ^= 2
        data_files(staged(run), array)[0].write_bytes(bad)
        first = resumed(run)[0]
        assert first in (1, 2, 5), at
        assert first == [1, None, 5, 5][number] or number == 1
        assert fakes.files_in(run) == expected
        shutil.rmtree(run)


@pytest.mark.long
@pytest.mark.parametrize(
    ("array", "again"),
    [
        ("next_token", ["tokens"]),
        ("next_token_text", ["tokens"]),
        ("query_token", []),
        ("layer", []),
    ],
)
def test_changed_bytes_of_whole_files_are_written_again(
    expected: dict[str, bytes], tmp_path: Path, array: str, again: list[str]
) -> None:
    """Coordinates are known: nothing is computed for them."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    interrupted(run, 5)
    run.rename(kept)
    good = data_files(staged(kept), array)[0].read_bytes()
    for at in range(0, len(good), max(1, len(good) // 8)):
        shutil.copytree(kept, run)
        bad = bytearray(good)
        bad[at] ^= 2
        data_files(staged(run), array)[0].write_bytes(bad)
        assert resumed(run) == again, at
        assert fakes.files_in(run) == expected
        shutil.rmtree(run)
    shutil.copytree(kept, run)
    bad = bytearray(good)
    bad[-1] ^= 2  # of its own checksum
    data_files(staged(run), array)[0].write_bytes(bad)
    resumed(run)
    assert fakes.files_in(run) == expected


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_lost_files_of_a_journalled_layer_end_the_journal(
    expected: dict[str, bytes], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    run = tmp_path / "run"
    interrupted(run, 3)
    damage(data_files(staged(run), "top_feature")[0])
    assert resumed(run) == [*LAYERS, "tokens"]
    assert fakes.files_in(run) == expected


def test_another_plan_restarts_a_staged_trace(tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(run, 3)
    other = {"layers": LAYERS, "feature_dtype": "float16"}
    assert fakes.make_trace_writer(run, **other).missing_layers == LAYERS
    assert resumed(run, other) == [*LAYERS, "tokens"]
    assert fakes.files_in(run) == write(tmp_path / "alone", records(**other), other)


def test_a_long_trace_is_resumed_in_the_middle_of_a_layer(
    expected_long: dict[str, bytes], tmp_path: Path
) -> None:
    parts = [part for record in records(**LONG) for part in in_parts(record)]
    for count in (1, len(parts) // 3, len(parts) // 2 + 2):
        run = tmp_path / str(count)
        writer = fakes.make_trace_writer(run, **LONG)
        for part in parts[:count]:
            writer.append(part)
        assert resumed(run, LONG)[-1] == "tokens"
        assert fakes.files_in(run) == expected_long


# --- what readers see --------------------------------------------------------------------------


def assert_unseen(run: Path) -> None:
    """No reader, listing or glob finds any part of a trace."""
    assert not (run / "Safe_1").exists()
    assert [*run.glob("*")] in ([], [run / ".staged"])
    assert [*run.glob("[!.]*")] == []
    assert [*run.glob("*/*/zarr.json")] == [*run.glob(".staged/*/zarr.json")]
    with pytest.raises((IncompleteError, NotATraceError)):
        zt.open_trace(run / "Safe_1")
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(run / "Safe_1", consolidated=False)


def test_nothing_half_written_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    writer = fakes.make_trace_writer(run, **SIZES)
    assert_unseen(run)
    for record in records(**SIZES):
        writer.append(record)
        assert_unseen(run)
    writer.complete()
    assert_unseen(run)
    renamed = []
    original = Path.rename

    def rename(source: Path, target: Path) -> Path:
        assert_unseen(run)
        found = original(source, target)
        renamed.append(target.name)
        truth = fakes.truth_of(records(**SIZES), LAYERS, fakes.make_tokens(7))
        assert_equals(zt.open_trace(run / "Safe_1"), truth)
        assert_equals(xr.open_zarr(run / "Safe_1"), truth)
        assert not (run / "Safe_1" / "journal").exists()
        return found

    monkeypatch.setattr(Path, "rename", rename)
    writer.finish()
    assert renamed == ["Safe_1"]
    assert verify(run / "Safe_1") == []


def test_a_run_shows_only_complete_traces(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop={"Safe_1": (2,)})
    assert sorted(path.name for path in run.path.glob("[!.]*")) == ["Risky_2", "zarr.json"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the folder .staged, which is no group
        assert [*dict(zarr.open_group(run.path, mode="r").groups())] == ["Risky_2"]
        assert [*xr.open_datatree(run.path, engine="zarr", consolidated=False).children] == [
            "Risky_2"
        ]
    assert [one.complete for one in summarize(run.path).traces] == [False, True]
    with pytest.raises(IncompleteError, match="Safe_1"):
        open_run(run.path)


@pytest.mark.parametrize("chunks", [None, "auto"])
def test_a_staged_trace_is_read_as_far_as_it_is_journalled(tmp_path: Path, chunks: Any) -> None:
    run = tmp_path / "run"
    writer = fakes.make_trace_writer(run, **SIZES)
    one, two, five, six, tokens = records(**SIZES)
    there: list[Any] = []
    for record, now in (
        (one, [one]),
        (tokens, [tokens]),
        (six, []),
        (two, [two]),
        (five, [five, six]),
    ):
        writer.append(record)
        there += now
        truth = fakes.truth_of(there, LAYERS, fakes.make_tokens(7))
        ds = zt.open_trace(run / "Safe_1", missing="nan", chunks=chunks)
        if tokens not in there:
            assert np.isnan(ds.next_token_logprob).all()
            assert (ds.next_token == 2**32 - 1).all()
            assert (ds.next_token_text == "").all()
            ds = ds.drop_vars(["next_token", "next_token_logprob", "next_token_text"])
        assert_equals(ds, truth)
    with pytest.raises(IncompleteError, match=r"0 of 4 layers missing \(none\)"):
        zt.open_trace(run / "Safe_1")


def test_a_staged_trace_of_several_files_an_array_is_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = fakes.make_trace_writer(run, **LONG)
    first = records(**LONG)[0]
    writer.append(first)
    ds = zt.open_trace(run / "Safe_1", missing="nan")
    truth = fakes.truth_of([first], LONG["layers"], fakes.make_tokens(LONG["tokens"]))
    for name in ("attention", "attention_mean", "features", "top_feature", "top_activation"):
        np.testing.assert_array_equal(ds[name].values, truth[name], err_msg=name)


def test_a_torn_journal_is_read_as_far_as_it_holds(tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(run, 3)
    (staged(run) / "journal").write_bytes(torn(journal_lines(run)))
    ds = zt.open_trace(run / "Safe_1", missing="nan")
    layers = records(**SIZES)[:2]
    truth = fakes.truth_of(layers, LAYERS, fakes.make_tokens(7))
    np.testing.assert_array_equal(ds.attention.values, truth["attention"])
    np.testing.assert_array_equal(ds.features.values, truth["features"])


def test_a_trace_not_begun_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "run" / ".staged" / "Safe_1").mkdir(parents=True)
    for journal in (None, b"", b"x", b"00000000 {}\n"):
        if journal is not None:
            (tmp_path / "run" / ".staged" / "Safe_1" / "journal").write_bytes(journal)
        with pytest.raises(NotATraceError, match="no such folder"):
            zt.open_trace(tmp_path / "run" / "Safe_1", missing="nan")


# --- threads and disks -------------------------------------------------------------------------


def test_a_layer_whose_last_rows_come_from_two_threads_is_journalled_once(tmp_path: Path) -> None:
    good = records()[0]
    assert isinstance(good, LayerRecord)
    halves = [replace(good, features={}), replace(good, attention=None, attention_mean=None)]
    for number in range(20):
        run = tmp_path / str(number)
        writer = fakes.make_trace_writer(run)
        both = threading.Barrier(2)

        def append(half: LayerRecord, writer: Any = writer, both: Any = both) -> None:
            both.wait(10)
            writer.append(half)

        threads = [threading.Thread(target=append, args=(half,)) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(journal_lines(run)) == 2  # header and layer
        assert writer.missing_layers == (2, 3)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, NoSpaceError, "(?s)no space left.*same command again"),
        (errno.EDQUOT, NoSpaceError, "no space left"),
        (errno.EACCES, StoreError, "cannot be written"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
@pytest.mark.parametrize("failing", ["attention", "features", "top_feature", "journal"])
@pytest.mark.parametrize("same_writer", [True, False])
def test_a_full_disk_loses_only_the_layer_being_written(
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    number: int,
    kind: type[Exception],
    message: str,
    *,
    same_writer: bool,
) -> None:
    """Some bytes of the chunk may have arrived."""
    run, all_records = tmp_path / "run", records(**SIZES)
    writer = fakes.make_trace_writer(run, **SIZES)
    writer.append(all_records[0])
    with (
        fakes.full_disk(monkeypatch, failing, number),
        pytest.raises(kind, match=message),
    ):
        writer.append(all_records[1])
    assert writer.missing_layers == (2, 5, 6)
    # Once there is room, the trace goes on, be it in the same process.
    if not same_writer:
        writer = fakes.make_trace_writer(run, **SIZES)
        assert writer.missing_layers == (2, 5, 6)
    for record in all_records[1:]:
        writer.append(record)
    writer.finish()
    assert fakes.files_in(run) == expected


@pytest.mark.parametrize("failing", ["next_token_logprob", "journal"])
def test_next_tokens_are_appended_again_once_there_is_room(
    expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    run, (*layers, tokens) = tmp_path / "run", records(**SIZES)
    writer = fakes.make_trace_writer(run, **SIZES)
    writer.append(layers[0])
    with fakes.full_disk(monkeypatch, failing), pytest.raises(NoSpaceError):
        writer.append(tokens)
    assert writer.needs_tokens
    for record in (tokens, *layers[1:], tokens):  # a second record says nothing new
        writer.append(record)
    assert len(journal_lines(run)) == 2 + len(LAYERS)
    assert fakes.make_trace_writer(run, **SIZES).missing_layers == ()
    writer.finish()
    assert fakes.files_in(run) == expected


def test_a_disk_full_when_indexes_are_written_is_finished_later(
    expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    writer = fakes.make_trace_writer(run, **SIZES)
    for record in records(**SIZES):
        writer.append(record)
    original = disk.append

    def full(file: Path, parts: Any, *arguments: Any) -> None:
        if file.parent.name == "features":
            original(file, [b"".join(parts)[:11]], *arguments)
            raise OSError(errno.ENOSPC, "full")
        original(file, parts, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "append", full)
        with pytest.raises(NoSpaceError):
            writer.finish()
    assert_unseen(run)
    writer.finish()
    assert fakes.files_in(run) == expected


def test_the_journal_is_one_line_of_json_a_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(run, 5)
    lines = [json.loads(line.partition(b" ")[2]) for line in journal_lines(run)]
    assert [line.get("layer") for line in lines] == [None, 1, 2, 5, 6, None]
    for name in ("attention", "features"):
        (file,) = data_files(staged(run), name)
        lengths = [length for line in lines[1:-1] for length, _ in line["chunks"][name]]
        assert sum(lengths) == file.stat().st_size
        # Each chunk ends in the CRC-32C that the journal has.
        content = file.read_bytes()
        crcs = [crc for line in lines[1:-1] for _, crc in line["chunks"][name]]
        for end, crc in zip(itertools.accumulate(lengths), crcs, strict=True):
            assert content[end - 4 : end] == crc.to_bytes(4, "little")
