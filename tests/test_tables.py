"""Tables on disk: written block by block, read by others, resumed, checked, copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from sample_tables import (
    Values,
    coordinates_of,
    expected,
    files_of,
    plan_of,
    records_of,
    values_of,
    write_table,
)

import zarrtrace as zt
from zarrtrace.records import TablePlan

SAMPLES = 50


@pytest.fixture
def plan() -> TablePlan:
    return plan_of(SAMPLES)


@pytest.fixture(scope="module")
def values() -> Values:
    return values_of(3, SAMPLES, 300, 12)


@pytest.fixture
def table(tmp_path: Path, plan: TablePlan, values: Values) -> Path:
    write_table(tmp_path / "run", plan, values)
    return tmp_path / "run"


def _same(ds: xr.Dataset, plan: TablePlan, values: Values) -> None:
    wanted = expected(plan, values)
    assert set(ds.data_vars) == {"features", "residual", "next_token", "next_token_logprob"}
    assert ds.features.dims == ("layer", "sample", "feature")
    assert ds.residual.dims == ("layer", "sample", "channel")
    np.testing.assert_array_equal(ds.features.values, wanted.features)
    np.testing.assert_array_equal(ds.residual.values, wanted.residual)
    np.testing.assert_array_equal(ds.next_token.values, wanted.next_token)
    np.testing.assert_array_equal(ds.next_token_logprob.values, wanted.next_token_logprob)
    np.testing.assert_array_equal(ds.next_token_text.values, wanted.next_token_text)
    assert "next_token_text" in ds.coords
    for name, labels in coordinates_of(plan.shape.samples).items():
        assert ds.coords[name].dims == ("sample",)
        found = ds.coords[name].values
        np.testing.assert_array_equal(found, np.asarray(labels, found.dtype))
    assert ds.layer.values.tolist() == list(plan.attributes.layers)
    assert ds.sae_id.values.tolist() == ["l1", "l2", ""]
    assert set(ds.indexes) == {"layer", "feature", "channel"}
    assert ds.features.sel(layer=2, feature=299).shape == (plan.shape.samples,)
    assert ds.attrs["kind"] == "table"
    assert ds.attrs["config"] == dict(plan.config)


def test_plain_xarray_and_ours_read_what_was_written(
    table: Path, plan: TablePlan, values: Values
) -> None:
    _same(xr.open_zarr(table), plan, values)
    _same(zt.open_table(table), plan, values)
    _same(zt.open_table(table, chunks="auto"), plan, values)
    files = [file for file in (table / "features").iterdir() if file.name != "zarr.json"]
    assert len(files) > 2  # layers, and more than one file a layer


@pytest.mark.parametrize("step", [1, 16, 50])
def test_bytes_do_not_depend_on_the_size_of_records(
    table: Path, plan: TablePlan, values: Values, step: int
) -> None:
    other = table.with_name("other")
    write_table(other, plan, values, step=step)
    assert files_of(other) == files_of(table)


def test_resume_after_any_record_gives_the_same_bytes(
    table: Path, plan: TablePlan, values: Values
) -> None:
    path = table.with_name("interrupted")
    done = []
    for count in range(0, 33, 8):
        with zt.store.TableWriter(path, plan) as writer:
            done.append(writer.done)
            for record, _ in zip(
                records_of(plan, values, start=writer.done), range(count), strict=False
            ):
                writer.append(record)
        assert not path.exists()
    write_table(path, plan, values)
    assert files_of(path) == files_of(table)
    assert done == sorted(done)
    assert {*done} == {0, 16, 50}


def test_failed_scenarios_are_nan_and_named(
    tmp_path: Path, plan: TablePlan, values: Values
) -> None:
    path = tmp_path / "run"
    with zt.store.TableWriter(path, plan) as writer:
        for record in records_of(plan, values, stop=20, step=5):
            writer.append(record)
        writer.fail("s10", "out of memory", 20, 2)
        for record in records_of(plan, values, start=22, step=5):
            writer.append(record)
    with zt.store.TableWriter(path, plan) as writer:
        assert writer.done == 50
        writer.finish()
    ds = xr.open_zarr(path)
    assert ds.attrs["failed"] == {"s10": "out of memory"}
    failed = [20, 21]
    for name in ("features", "residual", "next_token_logprob"):
        assert np.isnan(ds[name].isel(sample=failed)).all()
    assert (ds.next_token.isel(sample=failed) == 2**32 - 1).all()
    rest = [n for n in range(SAMPLES) if n not in failed]
    wanted = expected(plan, values).features[:, rest]
    np.testing.assert_array_equal(ds.features.isel(sample=rest), wanted)
