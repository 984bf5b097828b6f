"""Runs and traces on disk: other readers see the same, laziness, completeness, damage, locks."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import fakes
import numpy as np
import pytest
import strategies
import tensorstore
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarrtrace.store.encoding import Encoding

import zarrtrace as zt
from zarrtrace.errors import (
    ConfigMismatchError,
    FormatVersionError,
    IncompleteError,
    IntegrityError,
    LockedError,
    NoSpaceError,
    NotATraceError,
    ScenarioError,
    StoreError,
)
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.store import RunWriter, open_run, open_trace, summarize, trace_writer, verify


def assert_equals(ds: xr.Dataset, truth: fakes.Truth) -> None:
    """Compare every array that was written with what is read."""
    assert set(truth) == {*ds.data_vars, *ds.coords}
    for name, expected in truth.items():
        found = ds[name].values
        if expected.dtype != object:
            assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


def edit_attributes(node: Path, change: Callable[[dict[str, Any]], None]) -> None:
    metadata = json.loads((node / "zarr.json").read_text())
    change(metadata["attributes"][NAMESPACE])
    (node / "zarr.json").write_text(json.dumps(metadata))


def shard(trace: Path, array: str, at: int = 0) -> Path:
    """Return the first file of an array's layer."""
    path = trace / array / "c" / str(at)
    return path if path.is_file() else min(p for p in path.rglob("*") if p.is_file())


def in_subprocess(code: str, *arguments: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the same data for every reader ------------------------------------------------------------


def test_open_trace_reads_what_was_written(shared_run: fakes.FakeRun) -> None:
    for scenario, truth in shared_run.truth.items():
        assert_equals(zt.open_trace(shared_run.path / scenario), truth)


def test_open_run_reads_what_was_written(shared_run: fakes.FakeRun) -> None:
    tree = zt.open_run(shared_run.path)
    assert list(tree.children) == list(shared_run.truth)
    assert tree.attrs["complete"] is True
    for scenario, truth in shared_run.truth.items():
        assert_equals(tree[scenario].to_dataset(), truth)


PLAIN_XARRAY = """
    import sys
    import numpy as np
    import xarray as xr

    run, name, truth = sys.argv[1:]
    truth = np.load(truth)
    ds = xr.open_zarr(f"{run}/{name}")
    tree = xr.open_datatree(run, engine="zarr")
    for found in (ds, tree[name].to_dataset()):
        assert set(found.variables) == set(truth.files), set(found.variables) ^ set(truth.files)
        for array in truth.files:
            np.testing.assert_array_equal(
                found[array].values.astype(truth[array].dtype), truth[array], err_msg=array
            )
        assert found.attention.dims == ("layer", "head", "query", "key")
        assert found.features.dims == ("layer", "query", "feature")
        assert {"query_token", "key_token", "token_id"} <= set(found.coords)
        at = found.load().where(found.query_token == " balance", drop=True)
        assert at["query"].values.tolist() == [1], at["query"].values
        np.testing.assert_array_equal(at.features.values, truth["features"][:, 1:2])
        at = found.attention.sel(layer=2, key=found.key_token == "90")
        np.testing.assert_array_equal(at.values, truth["attention"][1][..., 2:3])
    assert "zarrtrace" not in sys.modules
    print("zarrtrace" in sys.modules, len(truth.files))
"""


def test_plain_xarray_reads_the_same(shared_run: fakes.FakeRun, tmp_path: Path) -> None:
    """In a process that never imports zarrtrace."""
    name, truth = next(iter(shared_run.truth.items()))
    plain = {key: v.astype(str) if v.dtype == object else v for key, v in truth.items()}
    np.savez(tmp_path / "truth.npz", **plain)  # type: ignore[arg-type]
    out = in_subprocess(PLAIN_XARRAY, shared_run.path, name, tmp_path / "truth.npz", cwd=tmp_path)
    assert out.split() == ["False", str(len(truth))]


def read_with_tensorstore(path: Path) -> np.ndarray:
    store = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, read=True
    ).result()
    found: np.ndarray = store.read().result()
    return found


def test_tensorstore_reads_the_same_numbers(shared_run: fakes.FakeRun) -> None:
    for scenario, truth in shared_run.truth.items():
        for name, expected in truth.items():
            if expected.dtype == object:
                continue  # this tensorstore has no driver for the string data type
            found = read_with_tensorstore(shared_run.path / scenario / name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_text_is_standard_string_data(shared_run: fakes.FakeRun) -> None:
    """As the Zarr string extension says: variable-length UTF-8, no fixed-width text."""
    metadata = json.loads((shared_run.trace / "query_token" / "zarr.json").read_text())
    assert metadata["data_type"] == "string"
    assert [codec["name"] for codec in metadata["codecs"]] == ["vlen-utf8", "zstd"]


def test_only_codecs_that_every_reader_has(shared_run: fakes.FakeRun) -> None:
    def names(codecs: list[dict[str, Any]]) -> set[str]:
        inner = [c["configuration"] for c in codecs if c["name"] == "sharding_indexed"]
        return {c["name"] for c in codecs}.union(
            *(names(i["codecs"]) | names(i["index_codecs"]) for i in inner)
        )

    for file in shared_run.trace.glob("*/zarr.json"):
        metadata = json.loads(file.read_text())
        known = {"bytes", "transpose", "sharding_indexed", "crc32c", "zstd", "blosc", "gzip"}
        if metadata["data_type"] == "string":
            known.add("vlen-utf8")
        assert names(metadata["codecs"]) <= known


@settings(max_examples=12)
@given(strategies.trace_sizes)
def test_round_trip_of_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "trace"
    records = list(fakes.make_records(**sizes))
    with fakes.make_trace_writer(path, **sizes) as writer:
        for record in reversed(records):  # any order
            writer.append(record)
    truth = fakes.truth_of(records, sizes["layers"], fakes.make_tokens(sizes["tokens"]))
    assert_equals(zt.open_trace(path), truth)
    assert_equals(xr.open_zarr(path), truth)
    for name in {"attention", "features"} & set(truth):
        np.testing.assert_array_equal(read_with_tensorstore(path / name), truth[name])
    assert verify(path) == []


def test_many_shards_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers beyond the size of a shard are cut into blocks of queries."""
    monkeypatch.setattr("zarrtrace.spec._MAX_SHARD_BYTES", 2**17)
    run = fakes.make_run(tmp_path, tokens=300, features=64, scenarios=("a",))
    assert len(list((run.trace / "attention" / "c" / "0").rglob("*/*"))) > 3
    assert_equals(zt.open_trace(run.trace), run.truth["a"])
    assert verify(run.path) == []
    shard(run.trace, "attention", 2).unlink()
    with pytest.raises(IntegrityError, match=r"'attention' .* for layer 3"):
        zt.open_trace(run.trace)


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    one = fakes.make_run(tmp_path, name="one")
    two = fakes.make_run(tmp_path, name="two")
    assert fakes.files_in(one.path) == fakes.files_in(two.path)


# --- lazily ------------------------------------------------------------------------------------


def shards_in(opened: list[str], array: str) -> set[str]:
    return {
        path.split(f"/{array}/c/")[1].split("/")[0] for path in opened if f"/{array}/c/" in path
    }


def test_opening_reads_no_data(shared_run: fakes.FakeRun, opened_files: list[str]) -> None:
    for chunks in (None, "auto"):
        ds = zt.open_trace(shared_run.trace, chunks=chunks)
        for name in ds.data_vars:
            assert shards_in(opened_files, str(name)) == set(), name


def test_a_slice_reads_only_its_shards(shared_run: fakes.FakeRun, opened_files: list[str]) -> None:
    ds = zt.open_trace(shared_run.trace)
    opened_files.clear()
    ds.attention.sel(layer=2).isel(query=-1).load()
    assert shards_in(opened_files, "attention") == {"1"}
    assert shards_in(opened_files, "features") == set()
    ds.features.isel(layer=[0, 2], feature=5).load()
    assert shards_in(opened_files, "features") == {"0", "2"}
    assert shards_in(opened_files, "attention") == {"1"}


def test_token_texts_are_loaded(shared_run: fakes.FakeRun, opened_files: list[str]) -> None:
    ds = zt.open_trace(shared_run.trace)
    opened_files.clear()
    text = " balance"
    assert np.flatnonzero(ds.query_token == text).tolist() == [1]
    assert opened_files == []


def test_one_feature_reads_little(tmp_path: Path) -> None:
    """Of a shard, only its index and the chunks that hold the feature."""
    run = fakes.make_run(tmp_path, layers=(1,), features=4 * 4096, tokens=40, active=0.5)
    file = shard(run.trace, "features")
    ds = zt.open_trace(run.trace)
    read = 0
    original = os.pread

    def counting(handle: int, length: int, offset: int) -> bytes:
        nonlocal read
        found = original(handle, length, offset)
        read += len(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", counting)
        values = ds.features.sel(feature=5000).values
    np.testing.assert_array_equal(values, run.truth["Safe_1"]["features"][..., 5000])
    assert 0 < read < 0.4 * file.stat().st_size


@pytest.mark.parametrize("chunks", ["auto", {}])
def test_dask_chunks_are_whole_shards(shared_run: fakes.FakeRun, chunks: Any) -> None:
    ds = zt.open_trace(shared_run.trace, chunks=chunks)
    for name in ("attention", "features", "top_feature"):
        array = ds[name]
        stored = zarr.open_array(shared_run.trace / name, mode="r")
        step = stored.shards or stored.chunks
        assert dask.is_dask_collection(array)
        assert array.chunks is not None
        for sizes, whole in zip(array.chunks, step, strict=True):
            assert all(size % whole == 0 for size in sizes[:-1]), name
    np.testing.assert_array_equal(ds.attention.compute(), shared_run.truth["Safe_1"]["attention"])


def test_chunks_may_be_given(shared_run: fakes.FakeRun) -> None:
    ds = zt.open_trace(shared_run.trace, chunks={"layer": 2})
    assert ds.attention.chunks is not None
    assert ds.attention.chunks[0] == (2, 1)
    tree = zt.open_run(shared_run.path, chunks="auto")
    assert all(dask.is_dask_collection(tree[name].attention) for name in shared_run.truth)


# --- completeness and damage -------------------------------------------------------------------


@pytest.fixture
def partial(tmp_path: Path) -> fakes.FakeRun:
    """A run whose first trace lacks layer 2."""
    return fakes.make_run(tmp_path, drop={"Safe_1": (2,)})


def test_an_incomplete_trace_is_refused_by_name(partial: fakes.FakeRun) -> None:
    with pytest.raises(IncompleteError, match=r"1 of 3 layers missing \(2\)") as caught:
        zt.open_trace(partial.trace)
    assert caught.value.exit_code == 3
    with pytest.raises(IncompleteError, match="Safe_1"):
        zt.open_run(partial.path)
    (problem,) = verify(partial.path)
    assert (problem.scenario, problem.layer, problem.message) == ("Safe_1", 2, "not stored")
    summary = summarize(partial.path)
    assert not summary.complete
    assert [trace.missing_layers for trace in summary.traces] == [(2,), ()]


def test_missing_layers_can_be_read_as_nan(partial: fakes.FakeRun) -> None:
    ds = zt.open_trace(partial.trace, missing="nan")
    assert np.isnan(ds.features.sel(layer=2)).all()
    assert_equals(ds, partial.truth["Safe_1"])
    assert_equals(
        zt.open_run(partial.path, missing="nan")["Safe_1"].to_dataset(), partial.truth["Safe_1"]
    )


@pytest.mark.parametrize("chunks", [None, "auto"])
def test_missing_layers_of_long_prompts_are_nan_too(tmp_path: Path, chunks: Any) -> None:
    """Above 256 tokens, attention leaves out chunks of zeros: its fill value is 0."""
    sizes = {"tokens": 300, "scenarios": ("a",), "features": 4}
    run = fakes.make_run(tmp_path, drop={"a": (2,)}, **sizes)  # type: ignore[arg-type]
    ds = zt.open_trace(run.trace, missing="nan", chunks=chunks)
    assert_equals(ds, run.truth["a"])
    assert np.isnan(ds.attention.sel(layer=2, query=7, key=3)).all()
    done = fakes.make_run(tmp_path, **sizes)  # type: ignore[arg-type]
    assert_equals(zt.open_trace(done.trace, chunks=chunks), done.truth["a"])


@pytest.mark.parametrize("chunks", [None, "auto"])
def test_a_run_opens_as_its_traces_do(tmp_path: Path, opened_files: list[str], chunks: Any) -> None:
    run = fakes.make_run(tmp_path, tokens=(7, 9), features={"features": 16, "features_mlp": 8})
    opened_files.clear()
    tree = zt.open_run(run.path, chunks=chunks)
    # The group's metadata, and indexes of the two dimensions whose length is its own.
    assert len([file for file in opened_files if "/Risky_2/" in file]) == 1 + 2 * 2
    for name, child in tree.children.items():
        alone = zt.open_trace(run.path / name, chunks=chunks)
        xr.testing.assert_identical(child.to_dataset(), alone)
        for array, variable in alone.data_vars.items():
            assert child[array].chunks == variable.chunks
            assert child[array].encoding == variable.encoding
        assert_equals(child.to_dataset(), run.truth[name])


@pytest.mark.parametrize("damage", [Path.write_text, None])
def test_a_run_refuses_an_array_with_other_metadata(
    run: fakes.FakeRun, damage: Callable[[Path, str], None] | None
) -> None:
    file = run.trace / "features" / "zarr.json"
    content = file.read_text(encoding="utf-8")
    if damage is None:
        file.unlink()
        os.mkfifo(file)  # waited for forever if it were read
    else:
        damage(file, content.replace("16", "17", 1))
    opened = zt.open_run(run.path)["Safe_1"]
    with pytest.raises(IntegrityError, match=r"features/zarr\.json: (not the metadata|is a pipe)"):
        opened["features"].load()


def test_traces_do_not_share_texts(run: fakes.FakeRun) -> None:
    tree = zt.open_run(run.path)
    tree["Safe_1"]["query_token"].values[0] = "changed"
    assert tree["Risky_2"]["query_token"].values[0] == "<s>"


@pytest.mark.parametrize("chunks", [None, "auto"])
def test_what_is_changed_in_one_scenario_is_not_in_another(run: fakes.FakeRun, chunks: Any) -> None:
    """Scenarios of one length are made of one pattern."""
    tree = zt.open_run(run.path, chunks=chunks)
    changed = tree["Safe_1"]
    changed.attrs["spans"].clear()
    for variable in changed.variables.values():
        variable.attrs["long_name"] = "changed"
        variable.encoding["chunks"] = "changed"
    changed["features"] = changed["features"] + 1
    changed["token_id"].values[:] = 0
    changed.coords["layer"] = -changed["layer"]
    if chunks is None:
        changed["attention"][:] = 7
    alone = zt.open_trace(run.path / "Risky_2", chunks=chunks)
    found = tree["Risky_2"].to_dataset()
    xr.testing.assert_identical(found, alone)
    assert {name: one.encoding for name, one in found.data_vars.items()} == {
        name: one.encoding for name, one in alone.data_vars.items()
    }
    xr.testing.assert_identical(
        zt.open_run(run.path)["Safe_1"].to_dataset(), zt.open_trace(run.trace)
    )


def test_a_run_is_copied_and_pickled(run: fakes.FakeRun) -> None:
    tree = zt.open_run(run.path)
    for other in (copy.deepcopy(tree), tree.copy(), pickle.loads(pickle.dumps(tree))):  # noqa: S301
        xr.testing.assert_identical(other, tree)
        assert_equals(other["Risky_2"].to_dataset(), run.truth["Risky_2"])


def test_consolidated_metadata_is_the_trace_s_own(run: fakes.FakeRun) -> None:
    """Its hashes in the journal are not compared with it, so they do not say what is alike."""
    file = run.path / "Risky_2" / "zarr.json"
    group = json.loads(file.read_text())
    features = group["consolidated_metadata"]["metadata"]["features"]
    features["attributes"]["long_name"] = "edited"
    file.write_text(json.dumps(group))
    tree = zt.open_run(run.path)
    assert tree["Risky_2"]["features"].attrs["long_name"] == "edited"
    assert tree["Safe_1"]["features"].attrs["long_name"] == "SAE feature activation"


def test_absent_scenarios(run: fakes.FakeRun) -> None:
    shutil.rmtree(run.path / "Risky_2")
    with pytest.raises(IncompleteError, match="1 of 2 scenarios are not there: Risky_2"):
        zt.open_run(run.path)
    assert list(zt.open_run(run.path, missing="nan").children) == ["Safe_1"]
    assert [p.scenario for p in verify(run.path)] == ["Risky_2"]
    assert summarize(run.path).scenarios_missing == ("Risky_2",)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, empty])
@pytest.mark.parametrize("array", ["attention", "features", "top_feature", "attention_mean"])
def test_lost_bytes_are_noticed(
    run: fakes.FakeRun, array: str, damage: Callable[[Path], None]
) -> None:
    damage(shard(run.trace, array, 1))
    with pytest.raises(IntegrityError, match=f"array '{array}' .* for layer 2"):
        zt.open_trace(run.trace)
    # Of a run, only what is read is looked at, whichever layer of it.
    for chunks in (None, "auto"):
        opened = zt.open_run(run.path, chunks=chunks)["Safe_1"]
        with pytest.raises(IntegrityError, match=f"array '{array}' .* for layer 2"):
            opened[array][0].load()
        opened["next_token"].load()
    (problem,) = verify(run.path)
    assert (problem.scenario, problem.array, problem.layer) == ("Safe_1", array, 2)


@pytest.mark.parametrize("array", ["query_token", "layer", "token_id", "next_token"])
def test_lost_coordinates_are_noticed_on_opening(run: fakes.FakeRun, array: str) -> None:
    """Plain Zarr would read them as empty text and zeros."""
    shard(run.trace, array).unlink()
    with pytest.raises(IntegrityError, match=f"array '{array}'"):
        zt.open_trace(run.trace)
    assert [problem.array for problem in verify(run.path)] == [array]


@pytest.mark.parametrize("array", ["attention", "attention_mean", "features", "next_token"])
def test_a_flipped_bit_never_reads_as_another_number(run: fakes.FakeRun, array: str) -> None:
    file = shard(run.trace, array)
    good, truth = file.read_bytes(), run.truth["Safe_1"][array]
    refused: list[bool] = []
    for at in range(0, len(good), max(1, len(good) // 40)):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        file.write_bytes(bad)
        (problem,) = verify(run.path)
        assert problem.array == array
        if problem.chunk is None:
            assert problem.message == "its bytes are not the ones that were written"
        else:
            assert (run.trace / array / problem.chunk) == file
            assert "cannot be decoded" in problem.message
        try:
            found = zt.open_trace(run.trace)[array].values
        except Exception:  # noqa: BLE001  whatever Zarr and its codecs raise
            refused.append(True)
        else:
            np.testing.assert_array_equal(found, truth)  # a bit that means nothing
            refused.append(False)
    assert np.mean(refused) > 0.9


def test_damaged_metadata_is_named(run: fakes.FakeRun) -> None:
    metadata = run.trace / "features" / "zarr.json"
    good = metadata.read_text()
    metadata.write_text(good[:50])
    with pytest.raises(IntegrityError, match=r"features/zarr\.json: gone or damaged"):
        zt.open_trace(run.trace)
    assert {problem.array for problem in verify(run.path)} == {"features"}
    metadata.write_text(good)
    edit_attributes(run.trace, lambda found: found.pop("layers"))
    with pytest.raises(IntegrityError, match=r"attribute zarrtrace\.layers: Field required"):
        zt.open_trace(run.trace)
    (problem,) = verify(run.path)
    assert "layers" in problem.message
    (run.trace / "zarr.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"zarr\.json: damaged"):
        zt.open_run(run.path)


def test_left_overs_of_a_kill_do_no_harm(run: fakes.FakeRun) -> None:
    """Zarr writes ``0.<hex>.partial`` and renames it; a kill leaves it."""
    file = shard(run.trace, "features")
    left = [file.with_name("0.c0ffee.partial"), run.trace / "zarr.c0ffee.partial"]
    for path in left:
        path.write_bytes(b"half")
    assert_equals(zt.open_trace(run.trace), run.truth["Safe_1"])
    assert verify(run.path) == []
    again = fakes.make_run(run.path.parent)
    assert not any(path.exists() for path in left)
    assert_equals(zt.open_trace(again.trace), run.truth["Safe_1"])


def test_works_without_consolidated_metadata(run: fakes.FakeRun) -> None:
    for node in (run.path, *(run.path / name for name in run.truth)):
        metadata = json.loads((node / "zarr.json").read_text())
        assert metadata.pop("consolidated_metadata")["kind"] == "inline"
        (node / "zarr.json").write_text(json.dumps(metadata))
    tree = zt.open_run(run.path)
    for scenario, truth in run.truth.items():
        assert_equals(tree[scenario].to_dataset(), truth)
        assert_equals(xr.open_zarr(run.path / scenario, consolidated=False), truth)
    assert verify(run.path) == []


# --- what is not ours --------------------------------------------------------------------------


def test_what_is_no_run_is_refused_and_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("x")
    zarr.create_group(tmp_path / "other.zarr", zarr_format=3, attributes={"a": 1})
    file = tmp_path / "file"
    file.write_text("x")
    before = fakes.files_in(tmp_path)
    for path in (folder, tmp_path / "other.zarr", file):
        for opening in (open_run, open_trace, verify, summarize):
            with pytest.raises(NotATraceError, match="exists, but is not a zarrtrace"):
                opening(path)
        for overwrite in (False, True):
            with (
                pytest.raises(NotATraceError),
                RunWriter(path, ["a"], {}, overwrite=overwrite),
            ):
                pass
    with pytest.raises(NotATraceError, match="no such folder"):
        open_run(tmp_path / "none")
    assert fakes.files_in(tmp_path) == before


def test_a_run_is_not_a_trace(shared_run: fakes.FakeRun) -> None:
    with pytest.raises(NotATraceError, match="is a run, not a trace"):
        open_trace(shared_run.path)
    with pytest.raises(NotATraceError, match="is a trace, not a run"):
        open_run(shared_run.trace)


def test_a_newer_format_version_is_refused(run: fakes.FakeRun) -> None:
    for node in (run.path, run.trace):
        edit_attributes(node, lambda found: found.update(format_version=99, surprise=True))
    for opening, path in ((open_run, run.path), (open_trace, run.trace), (summarize, run.path)):
        with pytest.raises(FormatVersionError, match=r"(?s)version 99.*newer.*pip install") as e:
            opening(path)
        assert e.value.exit_code == 1


@pytest.mark.parametrize("name", ["../x", "/etc/x", "", "zarr.json", "a/b"])
def test_unsafe_names_never_become_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ScenarioError, match="scenario name"):
        RunWriter(tmp_path / "run", [name], {})
    assert list(tmp_path.iterdir()) == []


def test_names_read_from_a_run_are_checked(run: fakes.FakeRun) -> None:
    """A run from elsewhere must not make us read outside of it."""
    edit_attributes(run.path, lambda found: found.update(scenarios=["../elsewhere"]))
    for opening in (open_run, verify, summarize):
        with pytest.raises(IntegrityError, match="scenario name"):
            opening(run.path)


# --- writing -----------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, shared_run: fakes.FakeRun
) -> None:
    drop = {"Safe_1": (2, 3), "Risky_2": (1, 2, 3)}
    begun = fakes.make_run(tmp_path, drop=drop)
    writer_saw: list[tuple[int, ...]] = []
    with RunWriter(begun.path, fakes.SCENARIOS, fakes.CONFIG) as again:
        for name in fakes.SCENARIOS:
            writer = again.trace(fakes._attributes_for(name, {}), fakes.make_shape(), tokens())
            writer_saw.append(writer.missing_layers)
            assert not writer.needs_tokens
    assert writer_saw == [(2, 3), (1, 2, 3)]
    done = fakes.make_run(tmp_path)
    assert fakes.files_in(done.path) == fakes.files_in(shared_run.path)


def tokens() -> Any:
    return fakes.make_tokens(7)


def test_damaged_layers_are_written_anew(run: fakes.FakeRun, shared_run: fakes.FakeRun) -> None:
    shard(run.trace, "attention", 2).unlink()
    cut_short(shard(run.trace, "features", 0))
    writer = fakes.make_trace_writer(run.trace)
    assert writer.missing_layers == (1, 3)
    again = fakes.make_run(run.path.parent)
    assert fakes.files_in(again.path) == fakes.files_in(shared_run.path)


def test_a_trace_without_its_metadata_is_written_anew(
    run: fakes.FakeRun, shared_run: fakes.FakeRun
) -> None:
    (run.trace / "zarr.json").unlink()
    assert fakes.make_trace_writer(run.trace).missing_layers == fakes.LAYERS
    again = fakes.make_run(run.path.parent)
    assert fakes.files_in(again.path) == fakes.files_in(shared_run.path)


def test_the_journal_says_what_is_on_disk(partial: fakes.FakeRun) -> None:
    metadata = json.loads((partial.trace / "zarr.json").read_text())
    found = TraceAttributes.model_validate(metadata["attributes"][NAMESPACE])
    assert found.complete_layers == (1, 3)
    assert set(found.stored) == {"1", "3", "tokens", "coordinates", "metadata"}
    assert found.stored["1"]["attention"].bytes == shard(partial.trace, "attention").stat().st_size


def test_the_journal_is_computed_as_the_format_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done again from ``schema/README.md``, with several files a layer."""
    monkeypatch.setattr("zarrtrace.spec._MAX_SHARD_BYTES", 2**15)
    trace = fakes.make_run(tmp_path, tokens=200, scenarios=("a",), layers=(4, 7)).trace
    stored = json.loads((trace / "zarr.json").read_text())["attributes"][NAMESPACE]["stored"]
    several = 0
    for key, entry in stored.items():
        for array, found in entry.items():
            if key == "metadata":
                content = (trace / array / "zarr.json").read_bytes()
                digest = hashlib.blake2b(content, digest_size=8).hexdigest()
                assert found == {"bytes": len(content), "blake2b": digest}
                continue
            chunks = {
                tuple(map(int, file.relative_to(trace / array / "c").parts)): file.read_bytes()
                for file in (trace / array / "c").rglob("*")
                if file.is_file()
            }
            own = [
                chunks[at]
                for at in sorted(chunks)
                if not key.isdigit() or at[0] == ["4", "7"].index(key)
            ]
            digest = hashlib.blake2b(b"".join(own), digest_size=8).hexdigest()
            assert found == {"bytes": sum(map(len, own)), "blake2b": digest}
            several += len(own) > 1
    assert several


def test_a_run_is_not_finished_without_its_layers(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", fakes.SCENARIOS, {}) as run:
        with pytest.raises(IncompleteError, match="2 of 2 scenarios are not complete: Safe_1"):
            run.finish()
        writer = run.trace(fakes._attributes_for("Safe_1", {}), fakes.make_shape(), tokens())
        with pytest.raises(IncompleteError, match="3 of 3 layers missing"):
            writer.finish()


def test_wrong_records_are_refused(tmp_path: Path) -> None:
    writer = fakes.make_trace_writer(tmp_path / "trace")
    good = next(iter(fakes.make_records()))
    assert isinstance(good, LayerRecord)
    for record, message in [
        (next(iter(fakes.make_records(layers=(9,)))), "layer 9 is not one of"),
        (next(iter(fakes.make_records(tokens=6))), r"attention of layer 1 has shape \(2, 6, 6\)"),
        (replace(good, features={"features_x": good.features["features"]}), "holds features_x"),
        (TokensRecord("Safe_1", np.zeros((7, 3)), np.zeros((7, 3))), "next_token"),
    ]:
        with pytest.raises(StoreError, match=message):
            writer.append(record)
    assert writer.missing_layers == fakes.LAYERS


def test_a_layer_counts_when_its_last_array_is_there(tmp_path: Path) -> None:
    writer = fakes.make_trace_writer(tmp_path / "trace")
    good = next(iter(fakes.make_records()))
    assert isinstance(good, LayerRecord)
    writer.append(replace(good, features={}))
    assert writer.missing_layers == fakes.LAYERS
    writer.append(replace(good, attention=None, attention_mean=None))
    assert writer.missing_layers == (2, 3)


def test_a_layer_counts_only_once_the_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds nothing missing finishes the trace, while another thread may be writing."""
    writer = fakes.make_trace_writer(tmp_path / "trace")
    real, missing = trace_writer.replace_journal, []

    def replace_journal(path: Any, journal: str) -> None:
        missing.append((*writer.missing_layers, writer.needs_tokens))
        real(path, journal)

    monkeypatch.setattr(trace_writer, "replace_journal", replace_journal)
    for record in fakes.make_records():
        writer.append(record)
    assert missing == [(1, 2, 3, True), (2, 3, True), (3, True), (True,)]


class Meeting:
    """A lock that two threads hold; after the last time but one, and the last, both wait."""

    def __init__(self, times: dict[str, int]) -> None:
        self._times, self._lock, self._both = times, threading.Lock(), threading.Barrier(2)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        name = threading.current_thread().name
        self._times[name] -= 1
        if self._times[name] in (1, 0):
            self._both.wait(10)


def test_a_layer_whose_last_rows_come_from_two_threads_is_journalled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = fakes.make_trace_writer(tmp_path / "trace")
    good = next(iter(fakes.make_records()))
    assert isinstance(good, LayerRecord)
    real, journals = trace_writer.replace_journal, []

    def replace_journal(path: Any, journal: str) -> None:
        journals.append(journal)
        real(path, journal)

    monkeypatch.setattr(trace_writer, "replace_journal", replace_journal)
    # Once for each array, and once to look if the layer is whole: both see all that was written.
    monkeypatch.setattr(writer, "_mutex", Meeting({"attention": 2 + 1, "features": 3 + 1}))
    halves = {
        "attention": replace(good, features={}),
        "features": replace(good, attention=None, attention_mean=None),
    }
    threads = [
        threading.Thread(target=writer.append, args=(half,), name=name)
        for name, half in halves.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journals) == 1
    assert writer.missing_layers == (2, 3)


def test_layers_without_an_sae(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, without_sae=(2,))
    ds = zt.open_trace(run.trace)
    assert_equals(ds, run.truth["Safe_1"])
    assert np.isnan(ds.features.sel(layer=2)).all()
    assert not np.isnan(ds.attention).any()


def test_another_configuration_is_refused_by_name(run: fakes.FakeRun) -> None:
    before = fakes.files_in(run.path)
    other = {**fakes.CONFIG, "layers": [1, 2], "batch_size": 4}
    with pytest.raises(ConfigMismatchError) as caught, RunWriter(run.path, ["b"], other):
        pass
    message = str(caught.value)
    assert "layers: [1, 2, 3] there, [1, 2] now" in message
    assert "batch_size: None there, 4 now" in message
    assert "scenarios: ['Safe_1', 'Risky_2'] there, ['b'] now" in message
    assert "model" not in message
    assert caught.value.exit_code == 2
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
        assert in_subprocess(LOCK, path) == (
            f"locked: {path}: another process is writing this run\n"
        )
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
        attributes = fakes._attributes_for("Safe_1", {})
        assert again.trace(attributes, fakes.make_shape(), tokens()).missing_layers == (3,)
    other = {**fakes.CONFIG, "layers": "1-3"}
    with RunWriter(run.path, fakes.SCENARIOS, other, overwrite=True) as again:
        missing = again.trace(attributes, fakes.make_shape(), tokens()).missing_layers
        assert missing == fakes.LAYERS


# --- the disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, NoSpaceError, "(?s)no space left.*same command again"),
        (errno.EDQUOT, NoSpaceError, "no space left"),
        (errno.EACCES, StoreError, "cannot be written"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_what_the_disk_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
    message: str,
) -> None:
    records = list(fakes.make_records())
    writer = fakes.make_trace_writer(tmp_path / "trace")
    writer.append(records[0])
    original = os.replace

    def full(source: Any, target: Any) -> None:
        if "features" in str(target):
            raise OSError(number, os.strerror(number))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(kind, match=message):
            writer.append(records[1])
    assert writer.missing_layers == (2, 3)
    # Once there is room, the same trace goes on.
    again = fakes.make_trace_writer(tmp_path / "trace")
    assert again.missing_layers == (2, 3)
    with again:
        for record in records[1:]:
            again.append(record)
    assert_equals(
        zt.open_trace(tmp_path / "trace"), fakes.truth_of(records, fakes.LAYERS, tokens())
    )


# --- reading chunks ----------------------------------------------------------------------------


@given(data=st.data())
def test_any_selection_equals_numpy(shared_long: fakes.FakeRun, data: st.DataObject) -> None:
    """Integers, slices and arrays of positions, counted from either end, in every dimension."""
    name = data.draw(st.sampled_from(["attention", "features", "attention_mean", "query_token"]))
    truth = shared_long.truth["Safe_1"][name]

    def index(size: int) -> st.SearchStrategy[Any]:
        one = st.integers(-size, size - 1)
        # xarray itself fails at slices that go backwards and hold nothing.
        slices = st.slices(size).filter(
            lambda one: (one.step or 1) > 0 or len(range(*one.indices(size))) > 0
        )
        return one | slices | st.lists(one, max_size=5).map(_as_index)

    key = tuple(data.draw(index(size)) for size in truth.shape)
    ds = zt.open_trace(shared_long.trace)
    found = ds[name].isel(dict(zip(ds[name].dims, key, strict=True)))
    expected = truth
    for axis, one in reversed(list(enumerate(key))):  # from the last: integers drop dimensions
        expected = expected[(slice(None),) * axis + (one,)]
    np.testing.assert_array_equal(found.values, expected)


def _as_index(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


@pytest.fixture(scope="module")
def shared_long(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    """Several shards a layer, and empty chunks above the diagonal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zarrtrace.spec._MAX_SHARD_BYTES", 2**16)
        patch.setattr("zarrtrace.spec._MAX_KEYS_PER_CHUNK", 16)
        patch.setattr("zarrtrace.spec._QUERIES_PER_CHUNK", 8)
        patch.setattr("zarrtrace.spec._FEATURES_PER_CHUNK", 64)
        folder = tmp_path_factory.mktemp("long")
        return fakes.make_run(folder, scenarios=("Safe_1",), tokens=50, features=200)


def test_what_we_read_is_what_zarr_reads(shared_long: fakes.FakeRun) -> None:
    ours = zt.open_trace(shared_long.trace)
    xr.testing.assert_identical(ours, xr.open_zarr(shared_long.trace, consolidated=False))
    assert (shared_long.trace / "attention" / "c" / "0").is_dir()


@pytest.mark.parametrize("query", [7, -8, [0, 7], [-8]])
def test_indices_out_of_bounds_raise(shared_run: fakes.FakeRun, query: int | list[int]) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        zt.open_trace(shared_run.trace).attention.isel(query=query).load()


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], [0, 2, 5], [1, 0, 2, 3], None])
def test_what_is_no_order_of_the_dimensions_is_not_decoded(
    shared_run: fakes.FakeRun, order: list[int] | None
) -> None:
    metadata = json.loads((shared_run.trace / "features" / "zarr.json").read_bytes())
    transpose = metadata["codecs"][0]["configuration"]["codecs"][0]
    assert transpose == {"name": "transpose", "configuration": {"order": [0, 2, 1]}}
    transpose["configuration"]["order"] = order
    with pytest.raises((ValueError, TypeError)):
        Encoding(metadata)


def test_other_codecs_are_left_to_zarr(run: fakes.FakeRun) -> None:
    """Someone may have written an array anew with codecs of their own."""
    values = run.truth["Safe_1"]["attention_mean"]
    zarr.create_array(
        run.trace / "extra",
        data=values,
        chunks=(1, 3, 3),
        compressors=[zarr.codecs.GzipCodec()],
        dimension_names=("layer", "query", "key"),
    )
    np.testing.assert_array_equal(zt.open_trace(run.trace)["extra"], values)
