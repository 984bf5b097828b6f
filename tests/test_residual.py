"""The residual stream of a trace, in every part of the store."""

from __future__ import annotations

from pathlib import Path

import fakes
import numpy as np
import pytest
import xarray as xr
from reading import assert_equals, data_files, every_reader_equals, flip_byte_of_layer

import zarrtrace as zt
from zarrtrace.cli.info_ import as_text
from zarrtrace.errors import IntegrityError, NonFiniteError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.npz import export_npz
from zarrtrace.precision import cast_record, refusal
from zarrtrace.records import BFloat16, LayerRecord
from zarrtrace.store import TraceWriter, copy_run, summarize, verify
from zarrtrace.viewer.arrays import trace_arrays

CHANNELS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    return fakes.make_run(tmp_path_factory.mktemp("residual"), channels=CHANNELS)


def test_every_reader_reads_what_was_written(made: fakes.FakeRun) -> None:
    for scenario, truth in made.truth.items():
        assert truth["residual"].shape == (3, 7, CHANNELS)
        assert_equals(zt.open_run(made.path)[scenario].to_dataset(), truth)
        every_reader_equals(made.path / scenario, truth)
    assert verify(made.path) == []


def test_the_zeros_of_bfloat16_take_no_space(tmp_path: Path) -> None:
    """At the width of a model of 8 billion parameters, against NumPy's way to store float16."""
    values = np.random.default_rng(0).normal(0, 0.5, (64, 4096)).astype(np.float32)
    bits = BFloat16((values.view(np.uint32) >> 16).astype(np.uint16))
    sizes = {"tokens": 64, "heads": None, "features": 0, "channels": 4096}
    plan = fakes.make_plan(layers=(1,), next_token=False, **sizes)
    with TraceWriter(tmp_path, plan) as writer:
        writer.append(LayerRecord("Safe_1", 1, residual=bits))
    ds = xr.open_zarr(tmp_path / "Safe_1")
    np.testing.assert_array_equal(ds.residual[0], np.asarray(bits))
    assert ds.residual.dtype == np.float32
    np.savez_compressed(tmp_path / "half.npz", np.asarray(bits).astype(np.float16))
    (file,) = data_files(tmp_path / "Safe_1", "residual")
    assert file.stat().st_size <= 1.1 * (tmp_path / "half.npz").stat().st_size


def test_damage_is_noticed_named_and_repaired(tmp_path: Path, made: fakes.FakeRun) -> None:
    run = fakes.make_run(tmp_path, channels=CHANNELS)
    flip_byte_of_layer(run.trace, "residual", 1)
    with pytest.raises(IntegrityError):
        zt.open_trace(run.trace).residual.load()
    (problem,) = verify(run.path)
    assert (problem.scenario, problem.array, problem.layer) == ("Safe_1", "residual", 2)
    again = fakes.make_run(tmp_path, channels=CHANNELS, repair=True)
    assert again.written == [("Safe_1", 2)]
    assert fakes.files_in(run.path) == fakes.files_in(made.path)


def test_a_copy_and_a_summary_have_it(tmp_path: Path, made: fakes.FakeRun) -> None:
    copy_run(made.path, tmp_path / "copy")
    assert fakes.files_in(tmp_path / "copy") == fakes.files_in(made.path)
    summary = summarize(made.path)
    assert summary.traces[0].arrays["residual"] == (3, 7, CHANNELS)
    assert f"residual (3 × 7 × {CHANNELS})" in as_text(summary)


def test_missing_layers_read_nan(tmp_path: Path) -> None:
    made = fakes.make_run(tmp_path, channels=CHANNELS, drop={"Safe_1": [2, 3]})
    ds = zt.open_trace(made.trace, missing="nan")
    np.testing.assert_array_equal(ds.residual, made.truth["Safe_1"]["residual"])
    assert np.isnan(ds.residual.sel(layer=[2, 3])).all()


def test_viewer_and_npz_leave_it_out(tmp_path: Path, made: fakes.FakeRun) -> None:
    names = {array.name for array in trace_arrays(zt.open_trace(made.trace))}
    assert "features" in names
    assert "residual" not in names
    export_npz(made.path, tmp_path / "npz")
    with np.load(tmp_path / "npz" / "Safe_1" / "layer_2.npz") as found:
        assert {*found} == {"attention", "features"}


# --- precision ---------------------------------------------------------------------------------


def attributes(dtype: str) -> TraceAttributes:
    return fakes.make_trace_attributes(residual_dtype=dtype)


@pytest.mark.parametrize("as_bits", [True, False])
def test_float16_is_rounded_to_nearest(*, as_bits: bool) -> None:
    values = np.float32([[0.1, -3.14159, 1e-9, 65504, 65519, -0.0]])
    given: np.ndarray | BFloat16 = values
    if as_bits:
        given = BFloat16((values.view(np.uint32) >> 16).astype(np.uint16)[:, :4])
        values = np.asarray(given)
    found = cast_record(LayerRecord("Safe_1", 1, residual=given), attributes("float16"))
    assert isinstance(found, LayerRecord)
    assert isinstance(found.residual, np.ndarray)
    assert found.residual.dtype == np.float16
    np.testing.assert_array_equal(found.residual, values.astype(np.float16))
    assert found.nonfinite == ()


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (65520, "float16", "residual of layer 1 has values that are infinite in float16"),
        (np.inf, "float16", "computed NaN or infinity in layer 1 (residual)"),
        (np.nan, "float32", "computed NaN or infinity in layer 1 (residual)"),
    ],
)
def test_values_that_are_not_finite_as_stored_are_refused(
    tmp_path: Path, value: float, dtype: str, said: str
) -> None:
    sizes = {"heads": None, "features": 0, "channels": 4, "tokens": 1, "residual_dtype": dtype}
    record = LayerRecord("Safe_1", 1, residual=np.float32([[1, 2, value, 3]]))
    writer = fakes.make_trace_writer(tmp_path, layers=(1,), next_token=False, **sizes)
    with pytest.raises(NonFiniteError) as error:
        writer.append(record)
    assert said in str(error.value)
    stored = cast_record(record, attributes(dtype))
    assert stored.nonfinite == ("residual",)
    assert ("--residual-dtype float32" in str(refusal(record, stored, attributes(dtype)))) == (
        value == 65520
    )


def test_values_that_are_not_finite_are_named_on_demand(tmp_path: Path) -> None:
    plan = fakes.make_plan(
        layers=(1, 2), heads=None, features=0, channels=4, tokens=1, next_token=False
    )
    rows = {1: np.float32([[1, 2, 3, 4]]), 2: np.float32([[1, np.nan, np.inf, 4]])}
    with TraceWriter(tmp_path, plan, allow_nonfinite=True) as writer:
        for layer, values in rows.items():
            writer.append(LayerRecord("Safe_1", layer, residual=values))
    ds = xr.open_zarr(tmp_path / "Safe_1")
    np.testing.assert_array_equal(ds.residual, np.stack([*rows.values()]))
    assert ds.attrs["nonfinite"] == {"residual": "2"}
