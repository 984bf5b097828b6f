"""Reading stores in several ways, and damaging them, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import tensorstore
import xarray as xr
import zarr


def assert_equals(ds: xr.Dataset, truth: fakes.Truth) -> None:
    """Compare every array that was written with what is read."""
    assert {*ds.data_vars, *ds.coords} - set(truth) <= {"sae_id"}
    assert set(truth) <= {*ds.data_vars, *ds.coords}
    for name, expected in truth.items():
        found = ds[name].values
        if expected.dtype != object:
            assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


def with_tensorstore(path: Path) -> np.ndarray:
    """Read an array with tensorstore."""
    store = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, read=True
    ).result()
    found: np.ndarray = store.read().result()
    return found


def with_zarr(path: Path) -> np.ndarray:
    """Read an array with zarr-python."""
    return np.asarray(zarr.open_array(path, mode="r")[...])


def with_zarrs(path: Path) -> np.ndarray:
    """Read an array with zarrs, which may not fall back to zarr-python."""
    strict = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(strict):
        return with_zarr(path)


def every_reader_equals(trace: Path, truth: fakes.Truth) -> None:
    """Compare what plain xarray, zarr-python, zarrs and tensorstore read with the truth."""
    assert_equals(xr.open_zarr(trace), truth)
    for name, expected in truth.items():
        readers = [with_zarr, with_zarrs, with_tensorstore]
        if expected.dtype == object:  # of these, zarr-python alone reads the string data type
            readers = [with_zarr]
        for reader in readers:
            found = reader(trace / name)
            np.testing.assert_array_equal(found, expected, err_msg=f"{reader.__name__} {name}")


def data_files(trace: Path, array: str) -> list[Path]:
    """Return the files of an array but its metadata, in order of their indices."""
    return sorted(
        (trace / array).glob("c.*"), key=lambda file: [int(n) for n in file.name.split(".")[1:]]
    )


def index_of(file: Path) -> np.ndarray:
    """Read the shard index at the end of a file, ``(layer, …, 2)``, as the Zarr codec says."""
    metadata = json.loads((file.parent / "zarr.json").read_text())
    outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    inner = metadata["codecs"][0]["configuration"]["chunk_shape"]
    grid = [a // b for a, b in zip(outer, inner, strict=True)]
    size = 16 * int(np.prod(grid))
    return np.frombuffer(file.read_bytes()[-4 - size : -4], "<u8").reshape(*grid, 2)


def flip_byte_of_layer(trace: Path, array: str, place: int) -> None:
    """Flip a bit in the first chunk of a layer, by its place along the first dimension."""
    file = data_files(trace, array)[0]
    offset, length = index_of(file)[place].reshape(-1, 2)[0].tolist()
    content = bytearray(file.read_bytes())
    content[offset + length // 2] ^= 4
    file.write_bytes(content)


def in_subprocess(code: str, *arguments: object, cwd: Path | None = None) -> str:
    """Run Python code in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def permuted(records: list[Any]) -> list[Any]:
    """Give each layer the values of the next one: other numbers in files of the same size."""
    layers = [one for one in records if hasattr(one, "layer")]
    numbers = [one.layer for one in layers]
    moved = [
        replace(one, layer=number)
        for one, number in zip(layers, [*numbers[1:], numbers[0]], strict=True)
    ]
    return [*moved, *(one for one in records if not hasattr(one, "layer"))]
