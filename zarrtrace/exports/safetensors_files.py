"""Safetensors files of samples: one a layer, beside a Parquet file that says what each row is."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from zarrtrace.errors import ConfigError
from zarrtrace.exports.folder import writing
from zarrtrace.exports.numpy_files import nonzero_coordinates
from zarrtrace.exports.parquet_files import write_coordinates
from zarrtrace.exports.samples import LayeredArray, Samples
from zarrtrace.npz.files import DType, converted

SAFETENSORS_FILES = ("layer_*.safetensors", "samples.parquet")

_TYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64"}

Step = Callable[[int], None]


class _Tensor:
    """A tensor whose rows are appended, in a file that has no name."""

    def __init__(self, folder: Path, dtype: np.dtype, inner: tuple[int, ...] = ()) -> None:
        self.dtype, self.inner, self.rows = dtype, inner, 0
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    @property
    def shape(self) -> list[int]:
        return [self.rows, *self.inner]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def append(self, rows: np.ndarray) -> None:
        content = np.ascontiguousarray(rows, self.dtype)
        self.file.write(content.reshape(-1).view(np.uint8).data)
        self.rows += len(rows)


def write_safetensors(samples: Samples, folder: Path, dtype: DType | None, step: Step) -> None:
    """Write ``layer_{N}.safetensors`` and ``samples.parquet``.

    Tensors are ``residual.layer_N`` ``(sample, channel)``, and of features
    ``features.layer_N.row_indices``, ``.col_indices``, ``.values`` and ``.shape``.
    """
    arrays = [array for array in (samples.residual, *samples.features) if array and array.layers]
    if not arrays:
        raise ConfigError(
            "the samples have neither features nor residual stream",
            remedy="Extract with features or --residual, or choose other --layers.",
        )
    layers = [layer for layer in samples.layers if any(layer in one.layers for one in arrays)]
    at_once = min(array.layers_at_once for array in arrays)
    for at in range(0, len(layers), at_once):
        _write_layers(samples, arrays, layers[at : at + at_once], folder, dtype, step)
    write_coordinates(samples, folder / "samples.parquet")


def _write_layers(
    samples: Samples,
    arrays: Sequence[LayeredArray],
    layers: Sequence[int],
    folder: Path,
    dtype: DType | None,
    step: Step,
) -> None:
    with contextlib.ExitStack() as stack:
        tensors: dict[int, dict[str, _Tensor]] = {layer: {} for layer in layers}

        def new(layer: int, name: str, kind: np.dtype, *inner: int) -> _Tensor:
            tensor = tensors[layer][name] = _Tensor(folder, kind, inner)
            stack.enter_context(tensor.file)
            return tensor

        for array in arrays:
            chosen = [layer for layer in layers if layer in array.layers]
            if chosen:
                append = _residual if array.array.name == "residual" else _features
                append(samples, array, chosen, folder, dtype, new, step)
        for layer in layers:
            _write_file(samples, folder / f"layer_{layer}.safetensors", layer, tensors[layer])


_New = Callable[..., _Tensor]


def _residual(
    samples: Samples,
    array: LayeredArray,
    layers: Sequence[int],
    folder: Path,
    dtype: DType | None,
    new: _New,
    step: Step,
) -> None:
    kind = np.dtype(dtype or array.dtype)
    tensors = [new(layer, f"residual.layer_{layer}", kind, array.width) for layer in layers]
    rows = array.rows(len(layers))
    for start in range(0, samples.count, rows):
        block = array.read(layers, start, min(start + rows, samples.count))
        for tensor, values in zip(tensors, block.values, strict=True):
            tensor.append(converted(folder, values, dtype))
        step(len(layers) * (block.stop - start))


def _features(
    samples: Samples,
    array: LayeredArray,
    layers: Sequence[int],
    folder: Path,
    dtype: DType | None,
    new: _New,
    step: Step,
) -> None:
    index, kind = np.dtype(np.int32), np.dtype(dtype or array.dtype)
    tensors = [
        [
            new(layer, f"{array.array.name}.layer_{layer}.{key}", one)
            for key, one in (("row_indices", index), ("col_indices", index), ("values", kind))
        ]
        for layer in layers
    ]
    rows = array.rows(len(layers))
    for start in range(0, samples.count, rows):
        block = array.read(layers, start, min(start + rows, samples.count))
        valid = samples.valid(start, block.stop)
        for (row, column, found), dense in zip(tensors, block.values, strict=True):
            cast = converted(folder, dense, dtype, firing=True)
            parts = nonzero_coordinates(cast, valid)
            row.append(parts[0] + np.int32(start))
            column.append(parts[1])
            found.append(parts[2])
        step(len(layers) * (block.stop - start))
    for layer in layers:
        name = f"{array.array.name}.layer_{layer}.shape"
        new(layer, name, np.dtype(np.int64)).append(np.array([samples.count, array.width]))


def _write_file(samples: Samples, file: Path, layer: int, tensors: Mapping[str, _Tensor]) -> None:
    """Write a file: the length of its header, the header, then tensors by the size of their type.

    So every tensor begins at a multiple of its type's size, as safetensors' own writer has it.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    attributes = {key: samples.ds.attrs.get(key) for key in ("model", "saes", "residual_hook")}
    said = {key: one if isinstance(one, str) else json.dumps(one, default=str)
            for key, one in attributes.items() if one is not None}  # fmt: skip
    header: dict[str, object] = {"__metadata__": {"layer": str(layer), **said}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        kind = _TYPES[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with writing(file) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensors[name].file.seek(0)
            shutil.copyfileobj(tensors[name].file, out, 2**20)
            tensors[name].file.close()
