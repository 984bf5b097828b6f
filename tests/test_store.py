"""Traces and runs as read: the same in every reader, lazy, whole or refused by name."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import fakes
import numpy as np
import pytest
import strategies
import xarray as xr
import zarr
from everyday import mostly_long
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import (
    assert_equals,
    data_files,
    every_reader_equals,
    flip_byte_of_layer,
    in_subprocess,
    index_of,
    permuted,
)

import zarrtrace as zt
from zarrtrace.errors import IncompleteError, IntegrityError, NotATraceError
from zarrtrace.format.layout import Limits
from zarrtrace.records import TokensRecord
from zarrtrace.store import RunWriter, open_run, open_trace, read_run, summarize, verify

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
        assert set(found.variables) == {*truth.files, "sae_id"}, set(found.variables)
        for array in truth.files:
            np.testing.assert_array_equal(
                found[array].values.astype(truth[array].dtype), truth[array], err_msg=array
            )
        assert found.attention.dims == ("layer", "head", "query", "key")
        assert found.features.dims == ("layer", "query", "feature")
        labels = {"query_token": "query", "key_token": "key", "token_id": "key", "special": "key"}
        assert all(found.coords[label].dims == (dim,) for label, dim in labels.items())
        assert found.coords["next_token_text"].dims == ("query", "rank")
        assert found.sae_id.values.tolist() == ["l1", "l2", "l3"]
        at = found.load().where(found.query_token == " balance", drop=True)
        assert at["query"].values.tolist() == [1], at["query"].values
        np.testing.assert_array_equal(at.features.values, truth["features"][:, 1:2])
        at = found.attention.sel(layer=2, key=found.key_token == "90")
        np.testing.assert_array_equal(at.values, truth["attention"][1][..., 2:3])
    print("zarrtrace" in sys.modules, len(truth.files))
"""


@pytest.mark.long
def test_plain_xarray_reads_the_same(shared_run: fakes.FakeRun, tmp_path: Path) -> None:
    """In a process that never imports zarrtrace."""
    name, truth = next(iter(shared_run.truth.items()))
    plain = {key: v.astype(str) if v.dtype == object else v for key, v in truth.items()}
    np.savez(tmp_path / "truth.npz", **plain)  # type: ignore[arg-type]
    out = in_subprocess(PLAIN_XARRAY, shared_run.path, name, tmp_path / "truth.npz", cwd=tmp_path)
    assert out.split() == ["False", str(len(truth))]


def test_xarray_zarr_zarrs_and_tensorstore_read_the_same(shared_run: fakes.FakeRun) -> None:
    for scenario, truth in shared_run.truth.items():
        every_reader_equals(shared_run.path / scenario, truth)


def test_text_is_standard_string_data(shared_run: fakes.FakeRun) -> None:
    """As the Zarr string extension says: variable-length UTF-8, no fixed-width text."""
    metadata = json.loads((shared_run.trace / "query_token" / "zarr.json").read_text())
    assert metadata["data_type"] == "string"
    assert [codec["name"] for codec in metadata["codecs"]] == ["vlen-utf8", "zstd", "crc32c"]


def test_codecs_are_those_that_every_reader_has(shared_run: fakes.FakeRun) -> None:
    def names(codecs: list[dict[str, Any]]) -> set[str]:
        inner = [c["configuration"] for c in codecs if c["name"] == "sharding_indexed"]
        return {c["name"] for c in codecs}.union(
            *(names(i["codecs"]) | names(i["index_codecs"]) for i in inner)
        )

    for file in shared_run.trace.glob("*/zarr.json"):
        metadata = json.loads(file.read_text())
        known = {"bytes", "sharding_indexed", "crc32c", "zstd", "blosc"}
        if metadata["data_type"] == "string":
            known.add("vlen-utf8")
        assert names(metadata["codecs"]) <= known
        assert "crc32c" in names(metadata["codecs"])


@pytest.mark.long
@settings(max_examples=10)
@given(strategies.trace_sizes, st.none() | strategies.small_limits)
def test_any_sizes_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, Any], limits: Limits | None
) -> None:
    run = tmp_path_factory.mktemp("any") / "run"
    if limits is not None:  # a thousand chunks take Zarr a second
        sizes = {**sizes, "tokens": min(sizes["tokens"], 20)}
    records = list(fakes.make_records(**sizes))
    with fakes.make_trace_writer(run, **sizes, limits=limits or Limits()) as writer:
        for record in reversed(records):  # any order
            writer.append(record)
    truth = fakes.truth_of(records, sizes["layers"], fakes.make_tokens(sizes["tokens"]))
    trace = run / "Safe_1"
    assert_equals(zt.open_trace(trace), truth)
    every_reader_equals(trace, truth)
    assert verify(trace) == []
    assert [path.name for path in run.iterdir()] == ["Safe_1"]


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    one = fakes.make_run(tmp_path, name="one")
    two = fakes.make_run(tmp_path, name="two")
    assert fakes.files_in(one.path) == fakes.files_in(two.path)


def test_a_run_is_few_files_and_nothing_else(shared_run: fakes.FakeRun) -> None:
    files = fakes.files_in(shared_run.path)
    arrays = len(shared_run.truth["Safe_1"]) + 1  # and sae_id
    assert len(files) == 1 + 2 * (1 + 2 * arrays)
    assert [path.name for path in shared_run.path.parent.iterdir()] == ["run"]
    assert sorted(path.name for path in shared_run.path.iterdir()) == [
        "Risky_2",
        "Safe_1",
        "zarr.json",
    ]


# --- long prompts ------------------------------------------------------------------------------

#: Of 1,100 tokens and one head, a layer of attention is 9 MiB dense.
BY_LAYER = Limits(file_bytes=20 * 2**20)
BY_ROWS = Limits(file_bytes=4 * 2**20)
#: Shorter and longer than what one chunk of rows holds, than what one chunk of keys holds.
LENGTHS = mostly_long(lambda tokens: tokens in (7, 301), [7, 300, 301, 1100])


@pytest.mark.long
@pytest.mark.parametrize(
    ("limits", "files"),
    [pytest.param(Limits(), 1, marks=pytest.mark.long), (BY_LAYER, 2), (BY_ROWS, 9)],
)
def test_long_prompts_are_cut_by_layers_and_then_by_rows(
    tmp_path: Path, limits: Limits, files: int
) -> None:
    run = fakes.make_run(
        tmp_path, tokens=1100, heads=1, features=8, scenarios=("a",), limits=limits
    )
    assert len(data_files(run.trace, "attention")) == files
    assert zarr.open_array(run.trace / "attention", mode="r").chunks == (1, 1, 32, 1024)
    truth = run.truth["a"]
    ds = zt.open_trace(run.trace)
    assert_equals(ds, truth)
    np.testing.assert_array_equal(
        ds.attention.isel(query=[0, 1024, 1099], key=[1023, 1024]),
        truth["attention"][:, :, [0, 1024, 1099]][..., [1023, 1024]],
    )
    if limits is BY_ROWS:
        every_reader_equals(run.trace, truth)
    assert verify(run.path) == []
    data_files(run.trace, "attention")[-1].unlink()
    with pytest.raises(IntegrityError, match=r"attention/c\.\d\.0\.\d\.0: is gone"):
        zt.open_trace(run.trace)
    assert [problem.layer for problem in verify(run.path)] in ([3], [None])


@pytest.mark.parametrize("tokens", LENGTHS)
def test_missing_values_read_nan_in_plain_xarray_at_every_length(
    tmp_path: Path, tokens: int
) -> None:
    run = fakes.make_run(
        tmp_path, tokens=tokens, heads=1, features=4, without_sae=(2,), scenarios=("a",)
    )
    for ds in (zt.open_trace(run.trace), xr.open_zarr(run.trace)):
        for name in ("features", "top_feature", "top_activation"):
            np.testing.assert_array_equal(ds[name].values, run.truth["a"][name])
        assert np.isnan(ds.features.sel(layer=2)).all()
        assert (ds.top_feature.sel(layer=2) == 2**32 - 1).all()
        assert ds.sae_id.sel(layer=2).values.item() == ""
        assert not np.isnan(ds.attention.isel(query=[0, -1])).any()
    for name in ("attention", "attention_mean", "features", "next_token_logprob"):
        for file in data_files(run.trace, name):
            file.unlink()
        rows = {"query": [0, 1, tokens // 2, -1]}
        assert np.isnan(xr.open_zarr(run.trace)[name].isel(rows)).all()
        with pytest.raises(IntegrityError, match=f"{name}/.* is gone"):
            zt.open_run(run.path)["a"][name].load()


# --- lazily ------------------------------------------------------------------------------------


def files_of(opened: list[str], array: str) -> list[str]:
    return [path.rpartition("/")[2] for path in opened if f"/{array}/" in path]


@pytest.mark.parametrize("chunks", [None, "auto"])
def test_opening_reads_one_file_a_trace(
    shared_run: fakes.FakeRun, opened_files: list[str], chunks: Any
) -> None:
    zt.open_trace(shared_run.trace, chunks=chunks)
    assert opened_files == [str(shared_run.trace / "zarr.json")]
    opened_files.clear()
    zt.open_run(shared_run.path, chunks=chunks)
    groups = [shared_run.path, *(shared_run.path / name for name in shared_run.truth)]
    assert sorted(opened_files) == sorted(str(group / "zarr.json") for group in groups)


def test_a_selection_reads_only_its_files(tmp_path: Path, opened_files: list[str]) -> None:
    limits = Limits(file_bytes=600, queries=4, tokens=4)
    run = fakes.make_run(tmp_path, limits=limits, scenarios=("a",))
    assert len(data_files(run.trace, "attention")) == 3
    assert len(data_files(run.trace, "features")) == 3
    ds = zt.open_trace(run.trace)
    opened_files.clear()
    ds.attention.sel(layer=2).isel(query=-1).load()
    assert files_of(opened_files, "attention") == ["c.1.0.0.0"] * 2  # its index, then chunks
    assert files_of(opened_files, "features") == []
    ds.features.isel(layer=[0, 2], feature=5).load()
    assert sorted(set(files_of(opened_files, "features"))) == ["c.0.0.0", "c.2.0.0"]
    assert len(files_of(opened_files, "attention")) == 2


class Reads:
    """Bytes read through ``os.pread``, in any thread."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes, self._pread = 0, os.pread
        patch.setattr(os, "pread", self)

    def __call__(self, handle: int, length: int, offset: int) -> bytes:
        found = self._pread(handle, length, offset)
        self.bytes += len(found)
        return found


def test_one_feature_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a file's index and the chunks that hold the feature are read."""
    run = fakes.make_run(tmp_path, layers=(1,), features=4 * 4096, tokens=40, active=0.5)
    (file,) = data_files(run.trace, "features")
    ds = zt.open_trace(run.trace)
    reads = Reads(monkeypatch)
    values = ds.features.sel(feature=5000).values
    np.testing.assert_array_equal(values, run.truth["Safe_1"]["features"][..., 5000])
    offset, length = index_of(file)[0, 0, 1].tolist()
    assert reads.bytes == length + 8 + 16 * 4 + 4
    assert offset > 0


def test_one_layer_reads_its_chunks(
    shared_run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = data_files(shared_run.trace, "attention")
    ds = zt.open_trace(shared_run.trace)
    reads = Reads(monkeypatch)
    ds.attention.variable[1].load()
    index = index_of(file)
    assert reads.bytes == index[1].reshape(-1, 2)[:, 1].sum() + 8 + index.nbytes + 4


@pytest.mark.parametrize("chunks", ["auto", {}])
def test_dask_blocks_are_whole_chunks(shared_run: fakes.FakeRun, chunks: Any) -> None:
    ds = zt.open_trace(shared_run.trace, chunks=chunks)
    for name in ("attention", "features", "top_feature"):
        array = ds[name]
        step = zarr.open_array(shared_run.trace / name, mode="r").chunks
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


# --- reading chunks ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2**16, 2**13], ids=["by layers", "by rows"])
def shared_long(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> fakes.FakeRun:
    """Several files an array, and several chunks along every dimension but heads."""
    limits = Limits(file_bytes=request.param, keys=16, queries=8, tokens=16, features=64)
    folder = tmp_path_factory.mktemp("long")
    run = fakes.make_run(folder, scenarios=("Safe_1",), tokens=50, features=200, limits=limits)
    assert len(data_files(run.trace, "attention")) == {2**16: 2, 2**13: 12}[request.param]
    return run


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


@pytest.mark.long
def test_datasets_equal_those_of_plain_xarray(shared_long: fakes.FakeRun) -> None:
    ours = zt.open_trace(shared_long.trace)
    plain = xr.open_zarr(shared_long.trace, consolidated=False)
    for variable in plain.variables.values():
        assert len(variable.attrs.pop("checksums")) >= 1
    xr.testing.assert_identical(ours, plain)
    every_reader_equals(shared_long.trace, shared_long.truth["Safe_1"])


@pytest.mark.parametrize("query", [7, -8, [0, 7], [-8]])
def test_indices_out_of_bounds_raise(shared_run: fakes.FakeRun, query: int | list[int]) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        zt.open_trace(shared_run.trace).attention.isel(query=query).load()


# --- completeness ------------------------------------------------------------------------------


@pytest.fixture
def partial(tmp_path: Path) -> fakes.FakeRun:
    """A run whose first trace lacks layer 2."""
    return fakes.make_run(tmp_path, drop={"Safe_1": (2,)})


def test_an_incomplete_trace_is_refused_by_name(partial: fakes.FakeRun) -> None:
    # Layer 3 came, but waits for layer 2.
    with pytest.raises(IncompleteError, match=r"2 of 3 layers missing \(2, 3\)") as caught:
        zt.open_trace(partial.trace)
    assert caught.value.exit_code == 3
    with pytest.raises(IncompleteError, match="1 of 2 scenarios are not complete: Safe_1"):
        zt.open_run(partial.path)
    (problem,) = verify(partial.path)
    assert problem.scenario == "Safe_1"
    assert "not there" in problem.message
    summary = summarize(partial.path)
    assert not summary.complete
    assert [(trace.complete, trace.missing_layers) for trace in summary.traces] == [
        (False, (2, 3)),
        (True, ()),
    ]
    assert read_run(partial.path).attributes.complete is False


@pytest.mark.parametrize("chunks", [None, "auto"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_missing_layers_can_be_read_as_nan(tmp_path: Path, tokens: int, chunks: Any) -> None:
    run = fakes.make_run(
        tmp_path, drop={"a": (2, 3)}, tokens=tokens, scenarios=("a",), features=4, heads=1
    )
    alone = zt.open_trace(run.trace, missing="nan", chunks=chunks)
    in_run = zt.open_run(run.path, missing="nan", chunks=chunks)["a"].to_dataset()
    for ds in (alone, in_run):
        assert_equals(ds, run.truth["a"])
        for name in ("attention", "attention_mean", "features", "top_activation"):
            assert np.isnan(ds[name].sel(layer=[2, 3])).all()
            assert not np.isnan(ds[name].sel(layer=1)).any()


def test_scenarios_not_begun_are_left_out(run: fakes.FakeRun) -> None:
    shutil.rmtree(run.path / "Risky_2")
    with pytest.raises(IncompleteError, match="1 of 2 scenarios are not complete: Risky_2"):
        zt.open_run(run.path)
    assert list(zt.open_run(run.path, missing="nan").children) == ["Safe_1"]
    assert "Risky_2" in {problem.scenario for problem in verify(run.path)}
    assert summarize(run.path).scenarios_missing == ("Risky_2",)


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, "auto"])
def test_a_run_opens_as_its_traces_do(tmp_path: Path, chunks: Any) -> None:
    run = fakes.make_run(tmp_path, tokens=(7, 9), features={"features": 16, "features_mlp": 8})
    tree = zt.open_run(run.path, chunks=chunks)
    for name, child in tree.children.items():
        alone = zt.open_trace(run.path / name, chunks=chunks)
        xr.testing.assert_identical(child.to_dataset(), alone)
        for array, variable in alone.data_vars.items():
            assert child[array].chunks == variable.chunks
            assert child[array].encoding == variable.encoding
        assert_equals(child.to_dataset(), run.truth[name])


@pytest.mark.parametrize("chunks", [None, "auto"])
def test_changes_to_one_scenario_leave_the_others(run: fakes.FakeRun, chunks: Any) -> None:
    tree = zt.open_run(run.path, chunks=chunks)
    tree["Safe_1"]["query_token"].values[0] = "changed"
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


# --- damage ------------------------------------------------------------------------------------


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def empty(file: Path) -> None:
    file.write_bytes(b"")


ARRAYS = ("attention", "attention_mean", "features", "top_feature", "next_token", "query_token")


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, lengthen, empty])
@pytest.mark.parametrize("array", ARRAYS)
def test_lost_bytes_are_noticed(
    run: fakes.FakeRun, array: str, damage: Callable[[Path], None]
) -> None:
    damage(data_files(run.trace, array)[0])
    with pytest.raises(IntegrityError, match=rf"{array}/c[.0]+: (is gone|has \d+ bytes)"):
        zt.open_trace(run.trace)
    # Of a run, only files that are read are looked at.
    for chunks in (None, "auto"):
        opened = zt.open_run(run.path, chunks=chunks)["Safe_1"]
        with pytest.raises(IntegrityError, match=f"{array}/c"):
            opened[array][0].load()
        opened["next_token_logprob"].variable.load()
    assert {(one.scenario, one.array) for one in verify(run.path)} == {("Safe_1", array)}


def test_lost_coordinates_of_dimensions_are_noticed_on_opening(run: fakes.FakeRun) -> None:
    """Plain Zarr would read them as zeros."""
    for array in ("layer", "head", "feature", "key"):
        file = data_files(run.trace, array)[0]
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(IntegrityError, match=f"{array}/c.0: is gone"):
            zt.open_trace(run.trace)
        assert [problem.array for problem in verify(run.path)] == [array]
        file.write_bytes(content)


@pytest.mark.parametrize("bits", [5, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize("array", [*ARRAYS, "token_id", "next_token_text"])
def test_a_flipped_bit_never_reads_as_another_number(
    run: fakes.FakeRun, array: str, bits: int
) -> None:
    file = data_files(run.trace, array)[0]
    good, truth = file.read_bytes(), run.truth["Safe_1"][array]
    for at in range(0, len(good), max(1, len(good) // bits)):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        file.write_bytes(bad)
        problems = verify(run.path)
        assert {(one.array, one.chunk) for one in problems} == {(array, file.name)}
        with pytest.raises(IntegrityError, match=f"{array}/c"):
            zt.open_trace(run.trace)[array].load()
        try:
            found = xr.open_zarr(run.trace)[array].values
        except Exception:  # noqa: BLE001, S112 -- whatever Zarr and its codecs raise
            continue
        np.testing.assert_array_equal(found, truth)  # our fingerprint, which others do not read


@pytest.mark.parametrize("array", ["attention", "attention_mean", "features", "top_feature"])
def test_damage_is_named_by_layer(run: fakes.FakeRun, array: str) -> None:
    flip_byte_of_layer(run.trace, array, 1)
    (problem,) = verify(run.path)
    assert (problem.scenario, problem.array, problem.layer) == ("Safe_1", array, 2)
    ds = zt.open_trace(run.trace)
    truth = run.truth["Safe_1"][array]
    np.testing.assert_array_equal(ds[array].sel(layer=[1, 3]), truth[[0, 2]])
    with pytest.raises(IntegrityError, match=rf"{array}/c[.0]+: chunk .* cannot be decoded"):
        ds[array].sel(layer=2).load()


def make_exchangeable(tmp_path: Path) -> tuple[fakes.FakeRun, fakes.FakeRun]:
    """Make two runs whose files are of the same sizes, with layers in another order."""
    one = fakes.make_run(tmp_path, name="one", scenarios=("Safe_1",))
    records = permuted(list(fakes.make_records("Safe_1")))
    with RunWriter(tmp_path / "two", ["Safe_1"], fakes.CONFIG) as run:
        writer = run.trace(fakes.make_plan("Safe_1"))
        for record in records:
            writer.append(record)
        writer.finish()
        run.finish()
    truth = fakes.truth_of(records, fakes.LAYERS, fakes.make_tokens(7))
    two = fakes.FakeRun(tmp_path / "two", {"Safe_1": truth}, [])
    for array in ("attention", "features"):
        files = [data_files(run.trace, array)[0] for run in (one, two)]
        assert files[0].stat().st_size == files[1].stat().st_size
        assert files[0].read_bytes() != files[1].read_bytes()
    return one, two


@pytest.mark.parametrize(
    "array", ["attention", "attention_mean", "features", "top_feature", "top_activation"]
)
def test_files_exchanged_with_those_of_another_run_raise_on_reading(
    tmp_path: Path, array: str
) -> None:
    one, two = make_exchangeable(tmp_path)
    shutil.copy(data_files(two.trace, array)[0], data_files(one.trace, array)[0])
    ds = zt.open_trace(one.trace)  # sizes are right
    for selection in ({}, {"layer": 2}):
        with pytest.raises(IntegrityError, match="is not the file that belongs to this array"):
            ds[array].sel(selection).load()
    (problem,) = verify(one.path)
    assert problem.array == array
    assert "files of two runs were exchanged" in problem.message


def test_token_files_exchanged_with_those_of_another_run_raise(tmp_path: Path) -> None:
    """Files of one chunk: of the same size, because each holds one number again and again."""
    *layers, _ = fakes.make_records("Safe_1")
    for name, token in (("one", 7), ("two", 8)):
        with fakes.make_trace_writer(tmp_path / name) as writer:
            for record in layers:
                writer.append(record)
            ids, logprobs = np.full((7, 10), token, np.uint32), np.zeros((7, 10), np.float32)
            texts = np.full((7, 10), str(token), dtype=object)
            writer.append(TokensRecord("Safe_1", ids, logprobs, texts))
    for array in ("next_token", "next_token_text"):
        one, two = (data_files(tmp_path / name / "Safe_1", array)[0] for name in ("one", "two"))
        assert one.stat().st_size == two.stat().st_size
        shutil.copy(two, one)
        with pytest.raises(IntegrityError, match="is not the file that belongs to this array"):
            zt.open_trace(tmp_path / "one" / "Safe_1")[array].load()
    problems = verify(tmp_path / "one" / "Safe_1")
    assert [problem.array for problem in problems] == ["next_token", "next_token_text"]


def test_a_dataset_opened_before_its_run_was_replaced_raises(tmp_path: Path) -> None:
    """Also where the new files have the same sizes."""
    one, two = make_exchangeable(tmp_path)
    before = zt.open_trace(one.trace)
    np.testing.assert_array_equal(before.features.sel(layer=1), one.truth["Safe_1"]["features"][0])
    one.path.rename(tmp_path / "old")
    two.path.rename(one.path)
    for array in ("attention", "features"):
        with pytest.raises(IntegrityError, match=r"(?s)not the file .*was replaced"):
            before[array].sel(layer=2).load()
    assert_equals(zt.open_trace(one.trace), two.truth["Safe_1"])
    new = fakes.make_run(tmp_path, name="one", scenarios=("Safe_1",), seed=5, overwrite=True)
    for array in ("attention", "features"):
        with pytest.raises(IntegrityError):
            before[array].load()
    assert_equals(zt.open_trace(new.trace), new.truth["Safe_1"])


def test_exchanged_and_renamed_traces_are_noticed(run: fakes.FakeRun) -> None:
    (run.path / "Safe_1").rename(run.path / "x")
    (run.path / "Risky_2").rename(run.path / "Safe_1")
    (run.path / "x").rename(run.path / "Risky_2")
    with pytest.raises(IntegrityError, match=r"Safe_1: holds scenario 'Risky_2'"):
        zt.open_run(run.path)
    messages = {problem.scenario: problem.message for problem in verify(run.path)}
    assert "holds scenario 'Risky_2'" in messages["Safe_1"]


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run: fakes.FakeRun) -> None:
    (file,) = data_files(run.trace, "features")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(IntegrityError, match="not a regular file"):
        zt.open_trace(run.trace)
    with pytest.raises(IntegrityError, match="not a regular file"):
        zt.open_run(run.path)["Safe_1"]["features"].load()
    assert [problem.array for problem in verify(run.path)] == ["features"]


def test_metadata_of_an_array_is_verified(run: fakes.FakeRun) -> None:
    """Our reader takes the sealed copy in the group; others read this file."""
    metadata = run.trace / "features" / "zarr.json"
    good = metadata.read_text()
    for bad in (good[:50], good.replace("16", "17", 1), ""):
        metadata.write_text(bad)
        (problem,) = verify(run.path)
        assert (problem.array, problem.chunk) == ("features", "zarr.json")
    metadata.unlink()
    assert [problem.message for problem in verify(run.path)] == ["is gone"]
    assert_equals(zt.open_trace(run.trace), run.truth["Safe_1"])


@pytest.mark.parametrize("content", ["{", "", "[]", '{"attributes": 3}', "\0\0\0"])
def test_damaged_metadata_of_a_group_is_named(run: fakes.FakeRun, content: str) -> None:
    (run.trace / "zarr.json").write_text(content)
    for opening, path in ((zt.open_trace, run.trace), (zt.open_run, run.path)):
        with pytest.raises(IntegrityError, match=r"Safe_1/zarr\.json: damaged"):
            opening(path)
    assert {problem.scenario for problem in verify(run.path)} == {"Safe_1"}


def test_foreign_files_are_named(run: fakes.FakeRun) -> None:
    left = [run.trace / "features" / "c.0.0.0.partial", run.trace / "zarr.json.partial"]
    for path in left:
        path.write_bytes(b"half")
    assert_equals(zt.open_trace(run.trace), run.truth["Safe_1"])
    found = {(one.array, one.chunk) for one in verify(run.path)}
    assert found == {("features", "c.0.0.0.partial"), ("zarr.json.partial", None)}


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
            said = "is a file, not" if path == file else "exists, but is not a zarrtrace"
            with pytest.raises(NotATraceError, match=said):
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
