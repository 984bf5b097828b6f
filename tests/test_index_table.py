"""The index of a table: what NumPy finds, and what the index of the traces holds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import rounding
import xarray as xr
from click.testing import CliRunner
from sample_tables import (
    SMALL,
    coordinates_of,
    expected,
    files_of,
    nonzeros,
    plan_of,
    records_of,
    values_of,
    write_table,
    write_table_of_two_saes,
)

import zarrtrace as zt
from zarrtrace.cli import group
from zarrtrace.errors import ConfigError, IntegrityError, NotATraceError
from zarrtrace.format.table_layout import TableAttributes, TableShape, table_columns
from zarrtrace.index import build_index, find_feature
from zarrtrace.records import SampleRecord, TablePlan
from zarrtrace.store import TableWriter

SAMPLES, SCENARIOS = 50, 25
SIGNED = values_of(3, SAMPLES, 300, 12)
# Some SAEs have negative activations; equal ones go by their order.
SIGNED.features[:, :, 7] = np.round(np.random.default_rng(1).normal(size=(3, SAMPLES)) * 3)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_table(tmp_path / "run", plan_of(SAMPLES), SIGNED)
    return tmp_path / "run"


def assert_index_is(path: Path, layer: int, features: np.ndarray, samples: np.ndarray) -> None:
    """Compare a layer of an index with features ``(sample, feature)`` of these samples."""
    ds = xr.open_zarr(path / "index", consolidated=False).sel(layer=layer)
    values = features.astype(np.float64)
    position = np.asarray(coordinates_of(SAMPLES)["position"])
    order = np.array([_strongest(column, samples) for column in values.T])
    strongest = np.take_along_axis(values.T, order, 1)
    of_rank = np.where(strongest != 0, samples[order], 0)
    np.testing.assert_array_equal(ds.token_activation, strongest)
    np.testing.assert_array_equal(ds.token_scenario, of_rank // 2)
    np.testing.assert_array_equal(ds.token_position, position[of_rank])
    np.testing.assert_array_equal(ds.maximum, strongest[:, 0])
    for name, one in (("mean", values), ("frequency", (values != 0).astype(float))):
        allowed = rounding.rounding("float32", 1, np.abs(one).mean(0))
        rounding.assert_close(ds[name].values, one.mean(0), allowed)
    assert ds.tokens == len(samples)


def _strongest(column: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the twenty rows of largest magnitude; of equals, by scenario and position."""
    position = np.asarray(coordinates_of(SAMPLES)["position"])[samples]
    return np.lexsort((position, samples // 2, -np.abs(column)))[:20]


def test_an_index_is_what_numpy_finds(table: Path) -> None:
    before = files_of(table)
    assert build_index(table) == ("built", SCENARIOS, SCENARIOS, SCENARIOS)
    index = xr.open_zarr(table / "index", consolidated=False)
    assert index.layer.values.tolist() == [1, 2]  # layer 5 has no SAE
    assert index.scenario.values.tolist() == [f"s{n}" for n in range(SCENARIOS)]
    for number, layer in enumerate((1, 2)):
        assert_index_is(table, layer, SIGNED.features[number], np.arange(SAMPLES))
    made = files_of(table)
    assert {name: made[name] for name in before} == before
    assert build_index(table) == ("unchanged", 0, SCENARIOS, SCENARIOS)
    assert build_index(table, rebuild=True).how == "built"
    assert files_of(table) == made


def test_readers_of_the_table_do_not_meet_its_index(table: Path) -> None:
    plain = xr.open_zarr(table).load()
    build_index(table)
    for consolidated in (True, False):
        xr.testing.assert_identical(xr.open_zarr(table, consolidated=consolidated).load(), plain)
    xr.testing.assert_equal(zt.open_table(table).load(), plain)
    assert zt.verify(table) == []
    with TableWriter(table, plan_of(SAMPLES), repair=True) as writer:
        assert writer.is_published
    said = CliRunner().invoke(group, ["info", str(table)])
    assert said.exit_code == 0, said.output
    assert "50 of 50 samples" in said.output


def test_a_layer_that_one_of_several_saes_lacks_has_no_values(tmp_path: Path) -> None:
    write_table_of_two_saes(tmp_path / "run", SIGNED)
    for is_indexed in (False, True):
        if is_indexed:
            build_index(tmp_path / "run")
        for layer, array in ((1, "features"), (2, "features_mlp")):
            found = find_feature(tmp_path / "run", layer, 7, array=array)
            column = SIGNED.features[layer - 1, :, 7]
            assert found.maximum == column[np.abs(column).argmax()]
            message = f"layer {3 - layer} has no values of '{array}'"
            with pytest.raises(ConfigError, match=message) as caught:
                find_feature(tmp_path / "run", 3 - layer, 7, array=array)
            assert caught.value.remedy == f"Layers that have values: {layer}."


def test_find_says_tokens_and_those_beside_them(table: Path) -> None:
    read = find_feature(table, 2, 31)
    build_index(table)
    indexed = find_feature(table, 2, 31)
    rounded = {"mean": float(np.float32(read.mean)), "frequency": float(np.float32(read.frequency))}
    assert indexed == dataclasses.replace(read, **rounded)
    truth, labels = SIGNED.features[1, :, 7], coordinates_of(SAMPLES)
    found = find_feature(table, 2, 7)
    order = _strongest(truth, np.arange(SAMPLES))
    assert [one.activation for one in found.tokens] == truth[order].tolist()
    assert (found.indexed, found.scenarios, found.maximum) == (SCENARIOS,) * 2 + (truth[order[0]],)
    for one, at in zip(found.tokens, order.tolist(), strict=True):
        assert (one.scenario, one.position) == (f"s{at // 2}", labels["position"][at])
        assert one.token == f" token{at}"
        first, second = labels["position"][at // 2 * 2 : at // 2 * 2 + 2]
        follows = second == first + 1  # else tokens between them are not stored
        assert one.after == (f" token{at + 1}" if follows and at % 2 == 0 else "")
        assert one.before == (f" token{at - 1}" if follows and at % 2 else "")


def test_a_table_and_traces_of_the_same_prompts_have_one_index(tmp_path: Path) -> None:
    run = fakes.make_run(
        tmp_path,
        scenarios=("Safe_1", "Risky_2", "Medium_3"),
        tokens=(7, 23, 15),
        features={"features": 16, "features_mlp": 40},
        active=0.4,
        without_sae=(2,),
    )
    ds = zt.table(zt.open_run(run.path), at="all").load()
    _store(tmp_path / "table", ds)
    build_index(run.path)
    build_index(tmp_path / "table")
    of_run, of_table = (
        xr.open_zarr(path / "index", consolidated=False).load()
        for path in (run.path, tmp_path / "table")
    )
    xr.testing.assert_equal(of_table.drop_vars("start"), of_run.drop_vars("digest"))
    assert of_table.start.values.tolist() == [0, 7, 30]
    for layer, feature, array in ((1, 3, "features"), (3, 31, "features_mlp")):
        assert find_feature(run.path, layer, feature, array=array) == (
            find_feature(tmp_path / "table", layer, feature, array=array)
        )


def _store(path: Path, ds: xr.Dataset) -> None:
    """Store the features of a dataset of samples."""
    arrays = {str(name): one for name, one in ds.data_vars.items() if "features" in str(name)}
    sizes = {name: one.shape[-1] for name, one in arrays.items()}
    layers, without = ds.layer.values.tolist(), (2,)
    attributes = TableAttributes(
        scenarios=ds.attrs["scenarios"], positions="all", model=None, layers=layers,
        layers_without_sae=without, feature_dtype="float32", versions={},
    )  # fmt: skip
    shape = TableShape(
        layers=len(layers), samples=ds.sizes["sample"], features=sizes, feature_dtype="float32",
        next_token=False, limits=SMALL,
    )  # fmt: skip
    labels = {name: ds[name].values for name in ("scenario", "position", "token", "special")}
    with TableWriter(path, TablePlan(attributes, shape, labels, {})) as writer:
        for number, layer in enumerate(layers):
            if layer not in without:
                found = {
                    name: nonzeros(one.values[number], table_columns(sizes[name], SMALL))
                    for name, one in arrays.items()
                }
                writer.append(SampleRecord(layer, 0, found, None))
        writer.finish()


def test_scenarios_that_failed_are_not_counted(tmp_path: Path) -> None:
    path, plan = tmp_path / "run", plan_of(SAMPLES)
    with TableWriter(path, plan) as writer:
        for record in records_of(plan, SIGNED, stop=20):
            writer.append(record)
        writer.fail("s10", "out of memory", 20, 2)
        for record in records_of(plan, SIGNED, start=22):
            writer.append(record)
        writer.finish()
    read = CliRunner().invoke(group, ["find", str(path), "--layer", "1", "--feature", "7"])
    assert build_index(path) == ("built", 24, 24, 25)
    samples = np.delete(np.arange(SAMPLES), [20, 21])
    assert_index_is(path, 1, SIGNED.features[0, samples], samples)
    said = CliRunner().invoke(group, ["index", str(path)])
    assert (said.exit_code, "24 of 25 in it" in said.output) == (3, True)
    said = CliRunner().invoke(group, ["find", str(path), "--layer", "1", "--feature", "7"])
    assert said.exit_code == 0, said.output
    for one in (read, said):
        assert "24 of 25 scenarios are indexed" in one.output


def test_the_index_of_another_table_is_not_used(table: Path) -> None:
    build_index(table)
    other, plan = table.with_name("other"), plan_of(SAMPLES)
    write_table(other, plan, values_of(3, SAMPLES, 300, 12, seed=1))
    shutil.copytree(table / "index", other / "index")
    found = find_feature(other, 1, 7)  # from the table itself
    assert found.maximum == zt.open_table(other).features.sel(layer=1, feature=7).max()
    (problem,) = zt.verify(other)
    assert (problem.array, problem.message.split(":")[0]) == ("index", "is of another table")
    assert build_index(other).how == "built"
    assert zt.verify(other) == []
    assert find_feature(other, 1, 7).tokens == found.tokens
    # A table that takes the place of another one has no index.
    write_table(table, replace(plan, config={}), SIGNED, overwrite=True)
    assert not (table / "index").exists()


def test_damage_and_what_does_not_belong(table: Path) -> None:
    build_index(table)
    file = table / "index" / "token_activation" / "c.1.0.0"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = zt.verify(table)
    assert (problem.array, problem.layer) == ("index/token_activation", 2)
    file.unlink()
    with pytest.raises(IntegrityError, match=r"token_activation/c\.1\.0\.0"):
        find_feature(table, 2, 0)
    assert build_index(table).how == "built"
    (table / "features/c.0.0.0").unlink()
    with pytest.raises(IntegrityError, match=r"features/c\.0\.0\.0"):
        build_index(table, rebuild=True)
    assert not (table / ".staged").exists()


def test_copies_and_object_stores(table: Path) -> None:
    build_index(table)
    address = f"memory://index-{table.parent.name}/run"
    zt.copy(table, address)
    assert zt.verify(address) == []
    assert find_feature(address, 1, 31) == find_feature(table, 1, 31)
    assert build_index(address).how == "unchanged"
    assert build_index(address, rebuild=True).how == "built"
    zt.copy(address, table.with_name("back"))
    assert files_of(table.with_name("back")) == files_of(table)
    assert zt.copy(address, table.with_name("back")).bytes == 0


def test_what_cannot_be_indexed(tmp_path: Path) -> None:
    plan = plan_of(SAMPLES)
    coordinates: dict[str, Any] = {**plan.coordinates, "index": np.arange(SAMPLES)}
    with pytest.raises(ConfigError, match="'index'"):
        TableWriter(tmp_path / "run", replace(plan, coordinates=coordinates))
    with pytest.raises(NotATraceError):
        build_index(tmp_path / "nothing")
    bare = plan_of(SAMPLES, layers=(5,))
    values = values_of(1, SAMPLES, 300, 12)
    write_table(tmp_path / "bare", bare, values)
    with pytest.raises(ConfigError, match="no scenario has features"):
        build_index(tmp_path / "bare")


def test_command_line(table: Path) -> None:
    made = CliRunner().invoke(group, ["index", str(table), "--threads", "1"])
    assert (made.exit_code, made.stderr) == (0, "")
    assert "25 of 25 in it" in made.stdout
    found = CliRunner().invoke(
        group, ["find", str(table), "--layer", "2", "--feature", "31", "--json"]
    )
    use = json.loads(found.stdout)
    column = expected(plan_of(SAMPLES), SIGNED).features[1, :, 31]
    at = int(np.argmax(column))
    assert use["tokens"][0]["activation"] == column[at]
    assert use["tokens"][0]["scenario"] == f"s{at // 2}"
