"""Exports of samples, read back by NumPy, SciPy, pandas, datasets and safetensors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import command_line
import fakes
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import reading
import sample_tables
import xarray as xr
from scipy.sparse import coo_matrix

import zarrtrace as zt
from zarrtrace.errors import (
    ConfigError,
    IncompleteError,
    IntegrityError,
    NoSpaceError,
    NPZError,
    StoreError,
)
from zarrtrace.exports import folder, parquet_files
from zarrtrace.exports import samples as blocks

LAYERS, SAMPLES, FEATURES, CHANNELS, RANKS = (1, 2, 5), 37, 24, 6, 3
TEXTS = ["", "BK", "🎰 Ω", "a much longer text than all others"]


def make_table(seed: int = 0, *, dtype: str = "float32", failed: bool = True) -> xr.Dataset:
    """Return a dataset of samples as ``zt.table`` makes it: layer 2 has no SAE, layer 5 no hook."""
    rng = np.random.default_rng(seed)
    features = rng.exponential(2, (3, SAMPLES, FEATURES)).astype(dtype)
    features[rng.random(features.shape) > 0.2] = 0
    features[0, 4] = 0  # a row with no active feature
    features[0, 7, 3] = -1.5
    residual = rng.normal(0, 3, (3, SAMPLES, CHANNELS)).astype(dtype)
    names = np.array([f"Game_{at // 2}" for at in range(SAMPLES)], object)
    broken = np.isin(names, ["Game_3", "Game_9"]) & failed
    features[1], residual[2] = np.nan, np.nan
    features[:, broken], residual[:, broken] = np.nan, np.nan
    ids = rng.integers(0, 1000, (SAMPLES, RANKS), dtype=np.uint32)
    logprob = -np.sort(rng.exponential(3, (SAMPLES, RANKS))).astype(np.float32)

    def texts(values: Any) -> tuple[str, np.ndarray]:
        return "sample", np.array(values, object)

    return xr.Dataset(
        {
            "features": (("layer", "sample", "feature"), features),
            "residual": (("layer", "sample", "channel"), residual),
            "next_token": (("sample", "rank"), ids),
            "next_token_logprob": (("sample", "rank"), logprob),
        },
        {
            "layer": np.array(LAYERS),
            "feature": np.arange(FEATURES),
            "channel": np.arange(CHANNELS),
            "scenario": texts(names),
            "position": ("sample", rng.integers(0, 100, SAMPLES)),
            "token": texts([f" t{at}" for at in range(SAMPLES)]),
            "token_id": ("sample", rng.integers(0, 2**31, SAMPLES).astype(np.uint32)),
            "span": texts(["balance,decision", "decision"] * 18 + [""]),
            "tags": texts(["risky"] * SAMPLES),
            "option_bet": ("sample", rng.integers(-1, 9, SAMPLES)),
            "next_token_text": (("sample", "rank"), np.vectorize(str, otypes=[object])(ids)),
            "game_ids": ("sample", rng.integers(-(2**62), 2**62, SAMPLES)),
            "balances": ("sample", np.where(np.arange(SAMPLES) % 5, 12.5, np.nan)),
            "is_last_round": ("sample", np.arange(SAMPLES) % 3 == 0),
            "bet_types": texts([TEXTS[at % 4] for at in range(SAMPLES)]),
        },
        {
            "kind": "table",
            "format_version": 2,
            "scenarios": SAMPLES,
            "layers": "1-2,5",
            "layers_without_sae": "2",
            "layers_without_residual": [5],
            "model": {"id": "fake/model"},
            "residual_hook": "blocks.{layer}.hook_resid_post",
            "metadata": ["game_ids", "balances", "is_last_round", "bet_types"],
            "failed": {"Game_3": "NaN", "Game_9": "NaN"} if failed else {},
        },
    )


def columns_of(ds: xr.Dataset) -> dict[str, np.ndarray]:
    """Return the coordinates with one value a sample."""
    return {str(k): v.to_numpy() for k, v in ds.coords.items() if v.dims == ("sample",)}


def load(file: Path) -> dict[str, np.ndarray]:
    """Read an NPZ file, without pickle."""
    with np.load(file, allow_pickle=False) as found:
        return dict(found)


def matrix_of(found: dict[str, np.ndarray], key: str = "") -> coo_matrix:
    """Read a matrix as the user does; SciPy has no float16."""
    values = found[f"{key}values"].astype(np.float32)
    at = found[f"{key}row_indices"], found[f"{key}col_indices"]
    return coo_matrix((values, at), shape=tuple(found[f"{key}shape"]))


def names_of(ds: xr.Dataset) -> np.ndarray:
    return ds["scenario"].to_numpy().astype(str)


def valid_of(ds: xr.Dataset) -> np.ndarray:
    return ~np.isin(names_of(ds), list(ds.attrs["failed"]))


def dense(ds: xr.Dataset, layer: int, name: str = "features") -> np.ndarray:
    """Return features with zeros for scenarios that failed: a sparse matrix has no others."""
    values = ds[name].sel(layer=layer).to_numpy()
    return np.where(valid_of(ds)[:, None], values, values.dtype.type(0))


def check_columns(found: Any, ds: xr.Dataset) -> None:
    for name, values in columns_of(ds).items():
        stored = found[name]
        np.testing.assert_array_equal(stored, values.astype(stored.dtype))
        if values.dtype == object:
            assert stored.dtype.kind == "U"
        else:
            assert stored.dtype == values.dtype
    np.testing.assert_array_equal(found["valid_mask"], valid_of(ds))
    assert found["valid_mask"].dtype == bool


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few samples of one or two layers at a time, and texts of a few samples."""
    monkeypatch.setattr(blocks, "_BYTES", 3 * 5 * FEATURES * 4)
    monkeypatch.setattr(blocks, "_TEXTS", 16)


# --- the user's files --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_coo_is_the_matrix(tmp_path: Path, dtype: str) -> None:
    ds = make_table(dtype=dtype)
    assert zt.export(ds, tmp_path / "out", to="coo") == tmp_path / "out"
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["sae_features_L1.npz", "sae_features_L5.npz"]
    for layer in (1, 5):
        found = load(tmp_path / "out" / f"sae_features_L{layer}.npz")
        assert found["values"].dtype == dtype
        matrix = matrix_of(found)
        np.testing.assert_array_equal(matrix.toarray(), dense(ds, layer))
        assert int(found["layer"]) == layer
        check_columns(found, ds)
        order = np.lexsort((found["col_indices"], found["row_indices"]))
        assert (order == np.arange(len(order))).all()


def test_hidden_states_are_the_residual_stream(tmp_path: Path) -> None:
    ds = make_table()
    zt.export(ds, tmp_path, to="hidden")
    found = load(tmp_path / "phase_a_hidden_states.npz")
    np.testing.assert_array_equal(
        found["hidden_states"], ds["residual"].sel(layer=[1, 2]).to_numpy().transpose(1, 0, 2)
    )
    assert np.isnan(found["hidden_states"][~found["valid_mask"]]).all()
    assert np.isfinite(found["hidden_states"][found["valid_mask"]]).all()
    np.testing.assert_array_equal(found["layers"], [1, 2])
    check_columns(found, ds)


def test_both_stand_in_one_folder_and_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    ds = make_table()
    contents = []
    for threads in (1, 4):
        out = tmp_path / str(threads)
        zt.export(ds, out, to="coo", threads=threads)
        zt.export(ds, out, to="hidden", threads=threads)
        contents.append({file.name: file.read_bytes() for file in out.iterdir()})
        for name in contents[-1]:
            assert zipfile.ZipFile(out / name).testzip() is None
    assert len(contents[0]) == 3
    assert contents[0] == contents[1]


def test_files_are_no_larger_than_numpys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    values = rng.exponential(1, (1, 3000, 512)).astype(np.float32)
    values[rng.random(values.shape) > 0.05] = 0
    residual = rng.normal(0, 1, (1, 3000, 128)).astype(np.float32).view(np.uint32) & 0xFFFF0000
    ds = xr.Dataset(
        {
            "features": (("layer", "sample", "feature"), values),
            "residual": (("layer", "sample", "channel"), residual.view(np.float32)),
        },
        {"layer": [0], "scenario": ("sample", [f"s{at}" for at in range(3000)])},
        {"kind": "table"},
    )
    zt.export(ds, tmp_path, to="coo")
    zt.export(ds, tmp_path, to="hidden")
    for name in ("sae_features_L0.npz", "phase_a_hidden_states.npz"):
        np.savez_compressed(tmp_path / "numpy.npz", **load(tmp_path / name))
        assert (tmp_path / name).stat().st_size < 1.03 * (tmp_path / "numpy.npz").stat().st_size


@pytest.mark.torch
def test_output_dtype(tmp_path: Path) -> None:
    ds = make_table()
    for to in ("coo", "hidden", "safetensors", "parquet"):
        zt.export(ds, tmp_path / to, to=to, output_dtype="float16")  # type: ignore[arg-type]
    half = ds["residual"].to_numpy().astype(np.float16)
    hidden = load(tmp_path / "hidden" / "phase_a_hidden_states.npz")["hidden_states"]
    np.testing.assert_array_equal(hidden, half[:2].transpose(1, 0, 2))
    found = load(tmp_path / "coo" / "sae_features_L1.npz")
    assert found["values"].dtype == np.float16
    tensors = read_safetensors(tmp_path / "safetensors", 1)
    np.testing.assert_array_equal(tensors["residual.layer_1"], half[0])
    row = pq.read_table(tmp_path / "parquet").to_pylist()[0]
    assert row["residual_layer_1"] == half[0, 0].tolist()
    ds["residual"][0, 0, 0] = 1e6
    with pytest.raises(NPZError, match="too large for float16"):
        zt.export(ds, tmp_path / "large", to="hidden", output_dtype="float16")
    assert not (tmp_path / "large").exists()


@pytest.mark.torch
def test_another_sae(tmp_path: Path) -> None:
    ds = make_table()
    more = ds["features"].rename(feature="feature_wide").drop_vars("feature_wide") * 2
    ds["features_wide"] = more
    for to in ("coo", "safetensors", "parquet"):
        zt.export(ds, tmp_path / to, to=to)  # type: ignore[arg-type]
    found = load(tmp_path / "coo" / "sae_features_wide_L5.npz")
    expected = dense(ds, 5, "features_wide")
    np.testing.assert_array_equal(found["values"], expected[expected != 0])
    assert "features_wide.layer_5.values" in read_safetensors(tmp_path / "safetensors", 5)
    assert "feature_indices_wide_layer_1" in pq.read_table(tmp_path / "parquet").column_names


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["run", "table"])
def test_layers_that_one_of_several_saes_lacks_are_left_out(tmp_path: Path, kind: str) -> None:
    """`features` have an SAE on layer 1 alone, `features_mlp` on layer 2 alone."""
    if kind == "run":
        run = fakes.make_run_of_two_saes(tmp_path)
        one, two = (
            np.stack([truth[name][at, -1] for truth in run.truth.values()])
            for at, name in enumerate(("features", "features_mlp"))
        )
    else:
        values = sample_tables.values_of(3, 50, 300, 12)
        sample_tables.write_table_of_two_saes(tmp_path / "run", values)
        one, two, _ = values.features
    for to in ("coo", "safetensors", "parquet"):
        zt.export(tmp_path / "run", tmp_path / to, to=to)  # type: ignore[arg-type]
    files = sorted(file.name for file in (tmp_path / "coo").iterdir())
    assert files == ["sae_features_L1.npz", "sae_features_mlp_L2.npz"]
    rows = pq.read_table(tmp_path / "parquet").to_pydict()
    lists = {name for name in rows if name.startswith("feature_values")}
    assert lists == {"feature_values_layer_1", "feature_values_mlp_layer_2"}
    for layer, array, dense in ((1, "", one), (2, "_mlp", two)):
        found = load(tmp_path / "coo" / f"sae_features{array}_L{layer}.npz")
        np.testing.assert_array_equal(matrix_of(found).toarray(), dense)
        tensors = read_safetensors(tmp_path / "safetensors", layer)
        names = [name for name in tensors if name.endswith("values")]
        assert names == [f"features{array}.layer_{layer}.values"]
        np.testing.assert_array_equal(tensors[names[0]], dense[dense != 0])
        assert rows[f"feature_values{array}_layer_{layer}"] == [r[r != 0].tolist() for r in dense]


@pytest.mark.parametrize("to", ["coo", "hidden", "safetensors", "parquet"])
def test_a_scenario_that_lacks_a_layer_is_refused(tmp_path: Path, to: Any) -> None:
    run = fakes.make_run(tmp_path, channels=CHANNELS, drop={"Risky_2": (3,)})
    opened = zt.open_run(run.path, missing="nan")
    for source in (opened, zt.table(opened)):
        with pytest.raises(IncompleteError, match="Risky_2: layer 3 is not stored") as caught:
            zt.export(source, tmp_path / "out", to=to)
        assert "--layers" in caught.value.remedy
        assert not (tmp_path / "out").exists()
    zt.export(opened, tmp_path / "layers", to=to, layers=[1, 2])
    zt.export(opened, tmp_path / "scenarios", to=to, scenarios=["Safe_1"])
    if to == "coo":
        expected = np.stack([one["features"][1, -1] for one in run.truth.values()])
        found = load(tmp_path / "layers" / "sae_features_L2.npz")
        np.testing.assert_array_equal(matrix_of(found).toarray(), expected)
        found = load(tmp_path / "scenarios" / "sae_features_L3.npz")
        np.testing.assert_array_equal(
            matrix_of(found).toarray(), run.truth["Safe_1"]["features"][2, -1:]
        )


@pytest.mark.torch
def test_features_that_float16_cannot_hold_still_fire(tmp_path: Path) -> None:
    ds = make_table(failed=False)
    ds["features"][0, 0, :3] = [1e-8, -1e-8, 2e-7]
    ds["residual"][0, 0, 0] = 1e-8
    values = ds["features"].to_numpy()[0]
    expected = values.astype(np.float16)
    smallest = np.float16(2**-24)  # the store's, too
    expected[0, :2] = smallest, -smallest
    assert np.count_nonzero(expected) == np.count_nonzero(values)
    for to in ("coo", "safetensors", "parquet"):
        zt.export(ds, tmp_path / to, to=to, output_dtype="float16")  # type: ignore[arg-type]
    matrix = matrix_of(load(tmp_path / "coo" / "sae_features_L1.npz"))
    np.testing.assert_array_equal(matrix.toarray(), expected)
    tensors = read_safetensors(tmp_path / "safetensors", 1)
    found = matrix_of(tensors, "features.layer_1.")
    np.testing.assert_array_equal(found.toarray(), expected)
    assert tensors["residual.layer_1"][0, 0] == 0
    rows = pq.read_table(tmp_path / "parquet")["feature_values_layer_1"].to_pylist()
    assert rows == [row[row != 0].tolist() for row in expected]


# --- safetensors -------------------------------------------------------------------------------


def read_safetensors(folder: Path, layer: int) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = load_file(folder / f"layer_{layer}.safetensors")
    return found


@pytest.mark.torch
def test_safetensors(tmp_path: Path) -> None:
    ds = make_table()
    zt.export(ds, tmp_path / "out", to="safetensors")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *(f"layer_{layer}.safetensors" for layer in LAYERS),
        "samples.parquet",
    ]
    for layer in LAYERS:
        found = read_safetensors(tmp_path / "out", layer)
        if layer == 2:
            assert list(found) == ["residual.layer_2"]
        if layer != 5:
            np.testing.assert_array_equal(
                found[f"residual.layer_{layer}"], ds["residual"].sel(layer=layer)
            )
        if layer != 2:
            key = f"features.layer_{layer}."
            matrix = matrix_of(found, key)
            np.testing.assert_array_equal(matrix.toarray(), dense(ds, layer))
    rows = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    check_frame(rows, ds)


@pytest.mark.torch
def test_safetensors_are_read_by_torch(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    ds = make_table(dtype="float16")
    zt.export(ds, tmp_path, to="safetensors")
    tensors = load_file(tmp_path / "layer_1.safetensors")
    at = torch.stack([tensors["features.layer_1.row_indices"],
                      tensors["features.layer_1.col_indices"]])  # fmt: skip
    sparse = torch.sparse_coo_tensor(
        at,
        tensors["features.layer_1.values"],
        tensors["features.layer_1.shape"].tolist(),
        check_invariants=True,
    )
    np.testing.assert_array_equal(sparse.to_dense().numpy(), dense(ds, 1))
    with safe_open(tmp_path / "layer_1.safetensors", "np") as file:
        said = file.metadata()
    assert said["layer"] == "1"
    assert json.loads(said["model"]) == {"id": "fake/model"}


# --- Parquet -----------------------------------------------------------------------------------


def check_frame(rows: pd.DataFrame, ds: xr.Dataset) -> None:
    for name, values in columns_of(ds).items():
        stored = rows[name].to_numpy()
        np.testing.assert_array_equal(stored, values)
        if values.dtype != object:
            assert stored.dtype == values.dtype
    valid = valid_of(ds)
    np.testing.assert_array_equal(rows["valid_mask"], valid)
    for name in ("next_token", "next_token_logprob", "next_token_text"):
        for row, expected, there in zip(rows[name], ds[name].values, valid, strict=True):
            assert (list(row) == expected.tolist()) if there else row is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_read_by_pandas(tmp_path: Path, dtype: str) -> None:
    ds = make_table(dtype=dtype)
    zt.export(ds, tmp_path, to="parquet")
    rows = pd.read_parquet(tmp_path)
    check_frame(rows, ds)
    valid = valid_of(ds)
    for layer in LAYERS:
        names = (f"residual_layer_{layer}", f"feature_indices_layer_{layer}")
        assert (names[0] in rows) == (layer != 5)
        assert (names[1] in rows) == (layer != 2)
        for at in range(SAMPLES):
            if layer != 5:
                found = rows[names[0]][at]
                assert (found is None) == (not valid[at])
                if valid[at]:
                    assert found.dtype == dtype
                    np.testing.assert_array_equal(found, ds["residual"].sel(layer=layer)[at])
            if layer != 2:
                index, values = (
                    rows[f"feature_{k}_layer_{layer}"][at] for k in ("indices", "values")
                )
                assert (index is None) == (values is None) == (not valid[at])
                if valid[at]:
                    row = np.zeros(FEATURES, dtype)
                    row[index] = values
                    np.testing.assert_array_equal(row, dense(ds, layer)[at])
                    assert len(index) == np.count_nonzero(row)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_read_by_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(parquet_files, "_FILE_BYTES", 10_000)
    datasets = pytest.importorskip("datasets")
    ds = make_table(dtype=dtype)
    zt.export(ds, tmp_path / "out", to="parquet")
    files = sorted(map(str, (tmp_path / "out").iterdir()))
    assert len(files) > 1
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(found) == SAMPLES
    for at, row in enumerate(found):
        assert row["scenario"] == ds["scenario"].to_numpy()[at]
        assert row["bet_types"] == ds["bet_types"].to_numpy()[at]
        if row["valid_mask"]:
            assert row["residual_layer_1"] == ds["residual"].to_numpy()[0, at].tolist()
            values = dense(ds, 5)[at]
            assert row["feature_indices_layer_5"] == np.flatnonzero(values).tolist()
            assert row["feature_values_layer_5"] == values[values != 0].tolist()
        else:
            assert row["residual_layer_1"] is None


# --- parts of a table --------------------------------------------------------------------------


def test_scenarios_and_layers(tmp_path: Path) -> None:
    ds = make_table()
    zt.export(ds, tmp_path, to="coo", scenarios=["Game_17", "Game_3", "Game_4"], layers=[5])
    part = ds.isel(sample=np.isin(names_of(ds), ["Game_3", "Game_4", "Game_17"]))
    (file,) = tmp_path.iterdir()
    found = load(file)
    assert file.name == "sae_features_L5.npz"
    check_columns(found, part)
    matrix = matrix_of(found)
    np.testing.assert_array_equal(matrix.toarray(), dense(part, 5))


@pytest.mark.parametrize("to", ["coo", "parquet"])
def test_dask_and_another_order_of_dimensions_are_the_same(tmp_path: Path, to: Any) -> None:
    ds = make_table()
    other = ds.transpose("sample", "feature", "channel", "rank", "layer").chunk(sample=10, layer=1)
    zt.export(ds, tmp_path / "one", to=to)
    zt.export(other, tmp_path / "two", to=to)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
    for name in names:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        if to == "parquet":
            assert pq.read_table(one).to_pandas().equals(pq.read_table(two).to_pandas())
            continue
        expected, found = load(one), load(two)
        assert set(expected) == set(found)
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])


def test_everything_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    ds = make_table()
    out = tmp_path / "out"
    nulls = np.array(["a\0"] * SAMPLES, object)
    bad: list[tuple[str, dict[str, Any], xr.Dataset]] = [
        ("no format 'cou'.*\n?.*Did you mean 'coo'", {"to": "cou"}, ds),
        ("no scenario 'Game_99'", {"scenarios": ["Game_99"]}, ds),
        ("no scenario was asked", {"scenarios": []}, ds),
        ("no layer 3", {"layers": [3]}, ds),
        ("no features", {"layers": [2]}, ds),
        ("no residual stream", {"to": "hidden", "layers": [5]}, ds),
        ("no residual stream", {"to": "hidden"}, ds.drop_vars("residual")),
        ("no features", {}, ds.drop_vars("features")),
        ("neither", {"to": "safetensors"}, ds.drop_vars(["features", "residual"])),
        ("no samples", {}, ds.isel(sample=slice(0))),
        ("holds no samples", {}, ds.isel(sample=3)),
        ("not a trace", {}, ds.drop_attrs()),
        ("'values'", {}, ds.rename(balances="values")),
        ("'valid_mask'", {"to": "parquet"}, ds.rename(balances="valid_mask")),
        ("'layers'", {"to": "hidden"}, ds.rename(balances="layers")),
        ("residual_layer_7", {"to": "parquet"}, ds.rename(balances="residual_layer_7")),
        ("null character", {}, ds.assign_coords(token=("sample", nulls))),
        ("output_dtype", {"output_dtype": "int8"}, ds),
        ("of a dataset", {"to": "npz"}, ds),
        ("no 'at'", {"to": "npz", "at": "decision"}, ds),
    ]
    for message, options, one in bad:
        with pytest.raises(ConfigError, match=message):
            zt.export(one, out, **{"to": "coo", **options})
        assert list(tmp_path.iterdir()) == []


# --- files that appear together ----------------------------------------------------------------


def test_an_earlier_export_is_replaced_only_if_asked(tmp_path: Path) -> None:
    ds = make_table()
    out = tmp_path / "out"
    zt.export(ds, out, to="coo")
    (out / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ConfigError, match=r"sae_features_L1.npz and 1 more(.|\n)*--overwrite"):
        zt.export(ds, out, to="coo", layers=[1])
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    zt.export(make_table(1), out, to="coo", layers=[1], overwrite=True)
    assert sorted(file.name for file in out.iterdir()) == ["notes.txt", "sae_features_L1.npz"]
    assert (out / "sae_features_L1.npz").read_bytes() != before["sae_features_L1.npz"]
    assert list(tmp_path.iterdir()) == [out]


def test_no_export_into_a_run_or_a_file(tmp_path: Path, shared_run: fakes.FakeRun) -> None:
    ds = make_table()
    for output in (shared_run.path, shared_run.path / "new"):
        with pytest.raises(ConfigError, match="is in a run"):
            zt.export(ds, output, to="coo")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a folder"):
        zt.export(ds, tmp_path / "file", to="coo")
    with pytest.raises(StoreError, match="cannot be written"):
        zt.export(ds, tmp_path / "file" / "out", to="coo")
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "out").mkdir()
    zt.export(ds, tmp_path / "link", to="coo")
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("to", ["coo", "hidden", "safetensors", "parquet"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    ds = make_table()
    monkeypatch.setattr(folder.disk, "open_own", lambda *_: os.open("/dev/full", os.O_RDWR))
    with pytest.raises(NoSpaceError, match="run the same command again"):
        zt.export(ds, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
import zarrtrace as zt
from test_exports import make_table
from zarrtrace.exports import samples
samples._BYTES = 200
read = samples.LayeredArray.read
def slow(self, layers, start, stop):
    if start > 20:
        print("there", flush=True)
        import time
        time.sleep(60)
    return read(self, layers, start, stop)
samples.LayeredArray.read = slow
zt.export(make_table(), sys.argv[1], to="coo")
"""


@pytest.mark.long
def test_a_killed_export_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"there\n"
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".out.zarrtrace-export-")
        zt.export(make_table(1), tmp_path / "out", to="hidden")  # while the other is alive
        assert left.exists()
        job.send_signal(signal.SIGKILL)
        job.wait()
    zt.export(make_table(), out, to="coo")
    assert list(tmp_path.iterdir()) == [out]
    assert len(list(out.iterdir())) == 3


# --- runs of traces ----------------------------------------------------------------------------


def test_a_run_of_traces(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, channels=CHANNELS, without_sae=[2])
    zt.export(run.path, tmp_path / "last", to="coo")
    found = load(tmp_path / "last" / "sae_features_L3.npz")
    matrix = matrix_of(found)
    expected = np.stack([one["features"][2, -1] for one in run.truth.values()])
    np.testing.assert_array_equal(matrix.toarray(), expected)
    assert found["scenario"].tolist() == list(run.truth)
    assert found["position"].tolist() == [6, 6]
    zt.export(zt.open_run(run.path), tmp_path / "spans", to="hidden", at=["balance", -1])
    found = load(tmp_path / "spans" / "phase_a_hidden_states.npz")
    assert found["position"].tolist() == [1, 2, 6] * 2
    expected = np.concatenate([one["residual"][:, [1, 2, 6]] for one in run.truth.values()], 1)
    np.testing.assert_array_equal(found["hidden_states"], expected.transpose(1, 0, 2))


def test_a_damaged_run_leaves_nothing(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, channels=CHANNELS)
    reading.flip_byte_of_layer(run.trace, "features", 1)
    for to in ("coo", "safetensors", "parquet"):
        with pytest.raises(IntegrityError, match="Safe_1"):
            zt.export(run.path, tmp_path / "out", to=to)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == [run.path]


# --- tables on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 10**6])
def test_a_table_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Its chunks hold 16 samples; blocks are parts of a chunk, or several layers of chunks."""
    monkeypatch.setattr(blocks, "_BYTES", step * 300 * 4)
    plan, values = sample_tables.plan_of(), sample_tables.values_of(3, 50, 300, 12)
    sample_tables.write_table(tmp_path / "table", plan, values)
    zt.export(tmp_path / "table", tmp_path / "out", to="coo")
    zt.export(tmp_path / "table", tmp_path / "out", to="hidden")
    for number, layer in enumerate((1, 2)):  # layer 5 has no SAE
        found = load(tmp_path / "out" / f"sae_features_L{layer}.npz")
        matrix = matrix_of(found)
        np.testing.assert_array_equal(matrix.toarray(), values.features[number])
        for name, expected in plan.coordinates.items():
            np.testing.assert_array_equal(found[name], expected)
    hidden = load(tmp_path / "out" / "phase_a_hidden_states.npz")["hidden_states"]
    np.testing.assert_array_equal(hidden, values.residual.transpose(1, 0, 2))
    with pytest.raises(ConfigError, match="is a table"):
        zt.export(tmp_path / "table", tmp_path / "npz")


# --- the command line --------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        done = command_line.call(*arguments)
        return done.returncode, done.stdout, done.stderr

    run = fakes.make_run(tmp_path, channels=CHANNELS)
    for to in ("coo", "hidden", "safetensors", "parquet"):
        out = tmp_path / to
        command = ("export", run.path, "-o", out, "--to", to)
        assert call(*command, "--at", "balance,decision") == (0, f"{out}\n", "")
        if to == "parquet":
            assert pq.read_table(out)["position"].to_pylist() == [1, 2, 6] * 2
        code, _, error = call(*command, "--at", "last")
        assert code == 2
        assert "--overwrite" in error
        assert "Traceback" not in error
        assert call(*command, "--at", "last", "--overwrite")[0] == 0
    assert load(tmp_path / "coo" / "sae_features_L1.npz")["position"].tolist() == [6, 6]
    code, _, error = call("export", run.path, "-o", tmp_path / "npz", "--at", "last")
    assert code == 2
    assert "'npz' has no 'at'" in error
    _, help_text, _ = call("export", "--help")
    assert max(map(len, help_text.splitlines())) <= 80
