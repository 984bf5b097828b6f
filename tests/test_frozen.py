"""Stores of format 2 that were written once are read for ever: every number, by every reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fakes
import frozen
import hostile
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from click.testing import CliRunner
from reading import with_tensorstore, with_zarr, with_zarrs

import zarrtrace as zt
from zarrtrace.cli import group
from zarrtrace.errors import FormatVersionError
from zarrtrace.index import build_index, find_feature
from zarrtrace.store import RunIndex, read_table, read_trace

#: A seal is a hash of a group's zarr.json, which holds the checksums of all files. These never
#: change: a format that needs other files is another version.
SEALS = {
    "run/chosen": "e211e208b29ec90d",
    "run/index": "90fc9fc7026ab740",
    "run/whole": "5f5eace699884bdb",
    "run": "11d1f6fca828e843",
    "table": "9d73f968dfb13801",
}
NAMES = [prompt.name for prompt in frozen.PROMPTS]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the frozen stores: locks and indexes are written beside them."""
    return Path(shutil.copytree(frozen.FORMAT2, tmp_path_factory.mktemp("frozen") / "format2"))


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same stores, written by today's code."""
    folder = tmp_path_factory.mktemp("again")
    frozen.write(folder)
    return folder


def expected(name: str) -> frozen.Arrays:
    if name == "table":
        return frozen.table_arrays()
    return frozen.trace_arrays(next(one for one in frozen.PROMPTS if name == f"run/{one.name}"))


def same(ds: xr.Dataset, wanted: frozen.Arrays) -> None:
    """Compare names, dimensions, types and every value."""
    assert {*ds.variables} == {*wanted}
    for name, (dims, values) in wanted.items():
        assert ds[name].dims == tuple(dims.split()), name
        found = ds[name].to_numpy()
        if values.dtype == object:
            found = found.astype(object)
        assert found.dtype == values.dtype, name
        np.testing.assert_array_equal(found, values, err_msg=name)


def attributes_on_disk(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "zarr.json").read_text("utf-8"))["attributes"]
    return found


# --- what was written is read ------------------------------------------------------------------


def test_frozen_files_are_those_that_were_frozen() -> None:
    found = {
        str(file.parent.relative_to(frozen.FORMAT2)): attributes["seal"]
        for file in frozen.FORMAT2.rglob("zarr.json")
        if "seal" in (attributes := attributes_on_disk(file.parent))
    }
    assert found == SEALS
    size = sum(file.stat().st_size for file in frozen.FORMAT2.rglob("*") if file.is_file())
    assert size < 300_000


def test_our_readers_and_plain_xarray_read_every_number(stores: Path) -> None:
    run, plain = zt.open_run(stores / "run"), xr.open_datatree(stores / "run", engine="zarr")
    assert [*run.children] == NAMES
    for name in NAMES:
        wanted = expected(f"run/{name}")
        same(zt.open_trace(stores / "run" / name), wanted)
        same(run[name].to_dataset(), wanted)
        same(plain[name].to_dataset(), wanted)
        same(xr.open_zarr(stores / "run" / name), wanted)
    for ds in (zt.open_table(stores / "table"), xr.open_zarr(stores / "table")):
        same(ds, expected("table"))
    for ds in (zt.open_trace(stores / "run" / "whole"), zt.open_table(stores / "table")):
        # Else nothing above has met an array in many files of many chunks.
        assert ds["features"].encoding["chunks"] < ds["features"].encoding["shards"]
        assert ds["features"].encoding["shards"] < ds["features"].shape


@pytest.mark.parametrize("name", ["run/chosen", "run/whole", "table"])
def test_other_readers_read_every_number(stores: Path, name: str) -> None:
    for array, (_, values) in expected(name).items():
        if values.dtype == object:  # of these, zarr-python alone reads text
            assert with_zarr(stores / name / array).tolist() == values.tolist()
            continue
        for read in (with_tensorstore, with_zarr, with_zarrs):
            np.testing.assert_array_equal(read(stores / name / array), values, err_msg=array)


def test_attributes_are_what_was_said(stores: Path) -> None:
    for prompt in frozen.PROMPTS:
        found = read_trace(stores / "run" / prompt.name).attributes
        said = frozen.trace_attributes(prompt)
        written = {"saes", "nonfinite", "seal"}
        assert found.model_dump(exclude=written) == said.model_dump(exclude=written)
        assert {name: sae.d_sae for name, sae in found.saes.items()} == frozen.FEATURES
        assert found.saes["features"].hook_name == frozen.MLP_OUT
        assert found.saes["features"].dtype is None
    odd = read_trace(stores / "run" / "chosen").attributes.nonfinite
    assert odd == {"features_small": (2,), "residual": (0,)}
    table = read_table(stores / "table").attributes
    written = {"saes", "failed", "config", "seal"}
    said_of_table = frozen.table_attributes().model_dump(exclude=written)
    assert table.model_dump(exclude=written) == said_of_table
    assert table.failed == {frozen.FAILED: "out of memory"}
    assert {name: sae.d_sae for name, sae in table.saes.items()} == frozen.FEATURES
    run = zt.open_run(stores / "run").attrs
    assert (run["complete"], run["scenarios"]) == (True, NAMES)
    assert run["config"] == table.config == frozen.CONFIG


def test_nothing_is_damaged(stores: Path) -> None:
    assert zt.verify(stores / "run") == []
    assert zt.verify(stores / "table") == []


# --- the index ---------------------------------------------------------------------------------


def test_index_is_read_and_up_to_date(stores: Path) -> None:
    index = RunIndex(stores / "run")
    index.check()
    assert index.attributes.scenarios == index.attributes.indexed == len(NAMES)
    for name, size in frozen.FEATURES.items():
        for layer in index.attributes.layers:
            rows = [
                (number, position, values[name][row])
                for number, prompt in enumerate(frozen.PROMPTS)
                if name in (values := frozen.layer_values(prompt, layer))
                for row, position in enumerate(prompt.rows)
            ]
            found = index.layer(name, layer)
            assert int(found.get("tokens", 0)) == len(rows)
            if not rows:
                continue
            dense = np.nan_to_num(np.stack([one for *_, one in rows]), posinf=0, neginf=0)
            active = (dense != 0).sum(0)
            assert len(active) == size
            np.testing.assert_array_equal(found["active"], active)
            frequency = (active / len(rows)).astype(np.float32)
            np.testing.assert_array_equal(found["frequency"], frequency)
            np.testing.assert_allclose(found["mean"], dense.mean(0), rtol=1e-6)
            strongest = np.abs(dense).argmax(0)
            maximum = dense[strongest, np.arange(size)]
            np.testing.assert_array_equal(found["maximum"], maximum)
            for part, place in (("scenario", 0), ("position", 1)):
                where = np.array([rows[at][place] for at in strongest])
                first = found[f"token_{part}"][:, 0]
                np.testing.assert_array_equal(first[active > 0], where[active > 0])
    assert build_index(stores / "run", special=True).how == "unchanged"


def test_index_that_counts_special_tokens_is_read(stores: Path) -> None:
    layer = 2
    special = {
        one.name: {*np.flatnonzero(frozen.trace_arrays(one)["special"][1]).tolist()}
        for one in frozen.PROMPTS
    }
    found = [find_feature(stores / "run", layer, number, special=True) for number in range(40)]
    every = next(
        use for use in found if any(one.position in special[one.scenario] for one in use.tokens)
    )
    feature = every.feature
    usual = find_feature(stores / "run", layer, feature)
    assert usual.tokens == tuple(
        one for one in every.tokens if one.position not in special[one.scenario]
    )
    assert (usual.special, usual.maximum) == (True, every.maximum)
    shown = CliRunner().invoke(
        group, ["find", str(stores / "run"), "--layer", str(layer), "--feature", str(feature)]
    )
    assert "these numbers count special tokens" in shown.output


# --- what takes stores takes these -------------------------------------------------------------


def test_commands_and_analyses_take_them(stores: Path, tmp_path: Path) -> None:
    run, table = zt.open_run(stores / "run"), zt.open_table(stores / "table")
    shown = CliRunner().invoke(group, ["info", str(stores / "run")])
    assert (shown.exit_code, "chosen" in shown.output) == (0, True), shown.output
    attended = zt.analysis.attention_to(run, ["balance"])
    assert np.isfinite(attended.to_numpy()).any()
    samples = zt.table(run, at="decision")
    wanted = [frozen.layer_values(one, 2)["features"][-1] for one in frozen.PROMPTS]
    np.testing.assert_array_equal(samples["features"].sel(layer=2), wanted)
    assert samples["balance"].to_numpy()[1] == 90.25
    trajectory = zt.analysis.feature_trajectory(table, [(2, 4)], at="decision")
    last = ["decision" in str(names).split(",") for names in table["span"].to_numpy()]
    expected = table["features"].sel(layer=2, feature=4).to_numpy()[last]
    np.testing.assert_array_equal(trajectory.isel(pair=0), expected)
    zt.export(stores / "run", tmp_path / "coo", to="coo")
    with np.load(tmp_path / "coo" / "sae_features_L2.npz") as file:
        dense = np.zeros(file["shape"])
        dense[file["row_indices"], file["col_indices"]] = file["values"]
    np.testing.assert_array_equal(dense, wanted)
    zt.export(stores / "table", tmp_path / "parquet", to="parquet")
    rows = pd.concat(map(pd.read_parquet, sorted((tmp_path / "parquet").glob("*.parquet"))))
    assert rows["scenario"].tolist() == table["scenario"].to_numpy().tolist()
    assert rows["valid_mask"].tolist() == [name != frozen.FAILED for name in rows["scenario"]]


# --- today's writer ----------------------------------------------------------------------------

#: Texts for people, which may be put better.
_WORDING = {"long_name", "description"}
#: They differ with bytes, which are any that decode to the values.
_HASHES = {"seal", "checksums"}


def same_attributes(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Compare attributes. One that the format gets later is left out where it has its default.

    Else every store would have it, and an older zarrtrace could read none.
    """
    assert {name: one for name, one in new.items() if name not in _HASHES} == {
        name: one for name, one in old.items() if name not in _HASHES
    }


@pytest.mark.parametrize("name", ["run/chosen", "run/whole", "table"])
def test_todays_writer_writes_the_same(stores: Path, again: Path, name: str) -> None:
    old, new = xr.open_zarr(stores / name), xr.open_zarr(again / name)
    same(new, expected(name))
    assert {*old.coords} == {*new.coords}
    same_attributes(new.attrs, old.attrs)
    for array in old.variables:
        attributes, wanted = (
            {k: v for k, v in ds[array].attrs.items() if k not in _WORDING | _HASHES}
            for ds in (new, old)
        )
        assert attributes == wanted
        fills = [json.loads((folder / name / str(array) / "zarr.json").read_text())["fill_value"]
                 for folder in (again, stores)]  # fmt: skip
        assert fills[0] == fills[1], array


def test_todays_writer_writes_the_same_run_and_index(stores: Path, again: Path) -> None:
    for name in ("run", "run/index"):
        same_attributes(attributes_on_disk(again / name), attributes_on_disk(stores / name))
    old, new = (
        xr.open_zarr(folder / "run" / "index").drop_vars("digest") for folder in (stores, again)
    )
    xr.testing.assert_equal(old, new)


# --- tomorrow's writer -------------------------------------------------------------------------


def test_marks_of_generated_tokens_will_be_read(tmp_path: Path) -> None:
    """``generated (key)`` is reserved: an array more breaks no reader."""
    trace = Path(shutil.copytree(frozen.FORMAT2 / "run" / "whole", tmp_path / "whole"))
    shutil.copytree(trace / "special", trace / "generated")

    def add(group: Any) -> None:
        nodes = group["consolidated_metadata"]["metadata"]
        nodes["generated"] = nodes["special"]
        group["attributes"]["coordinates"] += " generated"

    hostile.change_group(trace, add)
    assert zt.verify(trace) == []
    wanted = frozen.trace_arrays(frozen.WHOLE)
    for ds in (zt.open_trace(trace), xr.open_zarr(trace)):
        assert "generated" in ds.coords
        same(ds, wanted | {"generated": wanted["special"]})


@pytest.mark.parametrize("name", ["run", "run/whole", "table"])
def test_unknown_attributes_are_refused_as_newer(tmp_path: Path, name: str) -> None:
    """An older zarrtrace cannot know what an attribute means for the numbers; nor may it repair."""
    shutil.copytree(frozen.FORMAT2, tmp_path, dirs_exist_ok=True)
    hostile.change_group(tmp_path / name, lambda group: group["attributes"].update(attempt=3))
    before = fakes.files_in(tmp_path)
    kind = "open_" + {"run/whole": "trace"}.get(name, name)
    with pytest.raises(FormatVersionError, match=r"(?s)attribute attempt,.*Install a newer"):
        getattr(zt, kind)(tmp_path / name)
    write = frozen.write_table if name == "table" else frozen.write_run
    with pytest.raises(FormatVersionError, match="newer zarrtrace"):
        write(tmp_path / name.partition("/")[0], repair=True)
    assert fakes.files_in(tmp_path) == before
