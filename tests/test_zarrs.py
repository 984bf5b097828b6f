"""Stores under zarrs, another codec pipeline for Zarr: read and written equally, damage refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import hostile
import numpy as np
import pytest
import xarray as xr
import zarr

import zarrtrace as zt
from zarrtrace.errors import IntegrityError
from zarrtrace.store import verify

#: 300 tokens have shards of several chunks, and chunks that are left out.
SIZES: dict[str, Any] = {"tokens": (7, 300), "features": 40, "layers": (1, 2)}

#: Arrays of text are read by zarr's own pipeline, which zarrs falls back to without a word.
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
#: Without that.
STRICT = {**ZARRS, "codec_pipeline.strict": True}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    return fakes.make_run(tmp_path_factory.mktemp("zarrs"), **SIZES)


@pytest.fixture
def pipeline() -> Iterator[None]:
    with zarr.config.set(ZARRS):
        yield


def arrays(group: zarr.Group) -> dict[str, zarr.Array[Any]]:
    return {array.name: array for _, child in group.groups() for _, array in child.arrays()}


def test_every_array_is_the_same_bit_for_bit(stored: fakes.FakeRun) -> None:
    opened = arrays(zarr.open_group(stored.path, mode="r"))
    assert len(opened) == sum(len(truth) + 1 for truth in stored.truth.values())  # and sae_id
    for name, array in opened.items():
        expected = np.asarray(array[:])
        settings = ZARRS if expected.dtype.kind in "TO" else STRICT
        with zarr.config.set(settings):
            other = zarr.open_array(stored.path / name.lstrip("/"), mode="r")
            assert type(other.async_array.codec_pipeline).__module__.startswith("zarrs")
            found = np.asarray(other[:])
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes() or found.tolist() == expected.tolist(), name


def test_labelled_readers_see_the_same(stored: fakes.FakeRun, pipeline: None) -> None:
    run, tree = zt.open_run(stored.path), xr.open_datatree(stored.path, engine="zarr")
    for name, truth in stored.truth.items():
        for ds in (run[name], tree[name], xr.open_zarr(stored.path / name)):
            for key, expected in truth.items():
                np.testing.assert_array_equal(ds[key].values, expected, err_msg=key)
            last = ds.attention[:, :, -1, [0, 3]].values
            np.testing.assert_array_equal(last, truth["attention"][:, :, -1, [0, 3]])
            one = ds.features.isel(feature=11).values
            np.testing.assert_array_equal(one, truth["features"][:, :, 11])


def test_a_run_written_under_it_is_the_same(
    stored: fakes.FakeRun, pipeline: None, tmp_path: Path
) -> None:
    again = fakes.make_run(tmp_path, **SIZES)
    assert verify(again.path) == []
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        first, second = (zarr.open_group(run.path, mode="r") for run in (stored, again))
        for name, array in arrays(second).items():
            np.testing.assert_array_equal(array[:], first[name.lstrip("/")][:], err_msg=name)


def test_copies_made_under_zarrs_read_equally_without_it(
    stored: fakes.FakeRun, tmp_path: Path
) -> None:
    """Arrays with our chunks, shards and codecs, written by zarr."""
    for name, array in arrays(zarr.open_group(stored.path, mode="r")).items():
        if array.ndim < 2:
            continue
        copy = tmp_path / name.lstrip("/")
        with zarr.config.set(ZARRS if array.dtype.kind in "TO" else STRICT):
            made = zarr.from_array(copy, data=array, write_data=False)
            made[:] = array[:]
        assert made.metadata.codecs == array.metadata.codecs
        np.testing.assert_array_equal(zarr.open_array(copy, mode="r")[:], array[:], err_msg=name)


@pytest.mark.parametrize("array", ["attention", "attention_mean", "features", "top_activation"])
@pytest.mark.parametrize("settings", [{}, ZARRS], ids=["zarr", "zarrs"])
def test_flipped_bits_never_read_as_other_numbers(
    run: fakes.FakeRun, array: str, settings: dict[str, Any]
) -> None:
    file = hostile.first_file(run.trace / array)
    good, truth = file.read_bytes(), run.truth["Safe_1"][array]
    refused = []
    for at in range(0, len(good), max(1, len(good) // 40)):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        file.write_bytes(bad)
        with zarr.config.set(settings):
            try:
                found = np.asarray(zarr.open_array(run.trace / array, mode="r")[:])
            except Exception:  # noqa: BLE001  whatever Zarr and its codecs raise
                refused.append(True)
            else:
                np.testing.assert_array_equal(found, truth)  # a bit that means nothing
                refused.append(False)
    assert np.mean(refused) > 0.9


@pytest.mark.parametrize("array", ["attention", "features"])
def test_lost_files_are_refused_on_opening(run: fakes.FakeRun, array: str, pipeline: None) -> None:
    """Zarr reads them as fill values under either pipeline; the metadata knows."""
    file = hostile.first_file(run.trace / array)
    file.unlink()
    assert np.isnan(zarr.open_array(run.trace / array, mode="r")[0]).all()
    with pytest.raises(IntegrityError, match=array):
        zt.open_trace(run.trace)
