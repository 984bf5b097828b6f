"""Parquet files of samples: a row a sample, with lists of features and residual stream."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zarrtrace.exports.folder import writing
from zarrtrace.exports.numpy_files import nonzero_coordinates
from zarrtrace.exports.samples import VALID, LayeredArray, Samples
from zarrtrace.npz.files import DType, converted

PARQUET_FILES = ("samples-*.parquet",)

_NEXT = ("next_token", "next_token_text", "next_token_logprob")
_LISTS = r"(residual|feature_(indices|values).*)_layer_[0-9]+"
# A file is complete when it exceeds this, as the Hugging Face hub advises.
_FILE_BYTES = 5 * 10**8

Step = Callable[[int], None]
Columns = dict[str, pa.Array]


def write_parquet(samples: Samples, folder: Path, dtype: DType | None, step: Step) -> None:
    """Write ``samples-00000.parquet``, and further files when that is large."""
    samples.refuse_columns((VALID, *_NEXT), _LISTS)
    with _Files(folder, str(PARQUET_FILES[0])) as files:
        for columns in _batches(samples, folder, dtype, step):
            files.write(_record(samples, columns))


def write_coordinates(samples: Samples, file: Path) -> None:
    """Write a file with the coordinates and next tokens of all samples, and no arrays by layer."""
    samples.refuse_columns((VALID, *_NEXT))
    with _Files(file.parent, file.name) as files:
        for window in samples.windows():
            files.write(_record(samples, _coordinates(samples, window.start, window.stop)))


# --- columns -----------------------------------------------------------------------------------


def _batches(samples: Samples, folder: Path, dtype: DType | None, step: Step) -> Iterator[Columns]:
    """Yield the columns of some samples, as many as a row group holds."""
    residual = samples.residual if samples.residual and samples.residual.layers else None
    features = [array for array in samples.features if array.layers]
    read = min((array.rows(len(array.layers)) for array in features), default=samples.count)
    group = residual.rows_of_all if residual else read
    for window in samples.windows():
        coordinates = _coordinates(samples, window.start, window.stop)
        for start in range(window.start, window.stop, read):
            stop = min(start + read, window.stop)
            sparse: Columns = {}
            for array in features:
                sparse |= _feature_lists(samples, array, start, stop, folder, dtype)
                step(len(array.layers) * (stop - start))
            for first in range(start, stop, group):
                last = min(first + group, stop)
                columns = _part(coordinates, first - window.start, last - window.start)
                if residual:
                    columns |= _residual_lists(samples, residual, first, last, folder, dtype)
                    step(len(residual.layers) * (last - first))
                yield columns | _part(sparse, first - start, last - start)


def _part(columns: Columns, start: int, stop: int) -> Columns:
    return {name: column.slice(start, stop - start) for name, column in columns.items()}


def _coordinates(samples: Samples, start: int, stop: int) -> Columns:
    """Return columns with one value a sample, and the next tokens."""
    columns: Columns = {}
    for name in samples.columns:
        values = samples.ds[name][start:stop].values
        columns[name] = pa.array(values) if values.dtype.kind in "biuf" else _texts(values)
    columns[VALID] = pa.array(samples.valid(start, stop))
    valid = samples.valid(start, stop)
    for name in _NEXT:
        if name in samples.ds.variables:
            values = samples.ds[name].transpose("sample", "rank")[start:stop].values
            columns[name] = _lists(values, valid)
    return columns


def _texts(values: np.ndarray) -> pa.Array:
    return pa.array(list(map(str, values)), pa.string())


def _lists(values: np.ndarray, valid: np.ndarray) -> pa.Array:
    """Return a list a row, null where it is not valid."""
    rows, width = values.shape
    flat = values.reshape(-1)
    offsets = np.arange(rows + 1, dtype=np.int32) * width
    content = pa.array(flat) if flat.dtype.kind in "biuf" else _texts(flat)
    return pa.ListArray.from_arrays(pa.array(offsets), content, mask=pa.array(~valid))


def _residual_lists(
    samples: Samples,
    array: LayeredArray,
    start: int,
    stop: int,
    folder: Path,
    dtype: DType | None,
) -> Columns:
    block = array.read(array.layers, start, stop)
    valid = samples.valid(start, stop)
    return {
        f"residual_layer_{layer}": _lists(converted(folder, values, dtype), valid)
        for layer, values in zip(block.layers, block.values, strict=True)
    }


def _feature_lists(
    samples: Samples,
    array: LayeredArray,
    start: int,
    stop: int,
    folder: Path,
    dtype: DType | None,
) -> Columns:
    valid = samples.valid(start, stop)
    missing = pa.array(~valid)
    columns: Columns = {}
    for layers in array.groups():
        block = array.read(layers, start, stop)
        for layer, dense in zip(layers, block.values, strict=True):
            cast = converted(folder, dense, dtype, firing=True)
            row, column, values = nonzero_coordinates(cast, valid)
            ends = np.searchsorted(row, np.arange(stop - start + 1)).astype(np.int32)
            for name, content in (("indices", column), ("values", values)):
                columns[f"feature_{name}{array.suffix}_layer_{layer}"] = pa.ListArray.from_arrays(
                    pa.array(ends), pa.array(content), mask=missing
                )
    return columns


# --- files -------------------------------------------------------------------------------------


def _record(samples: Samples, columns: Columns) -> pa.RecordBatch:
    batch = pa.RecordBatch.from_pydict(columns)
    said = json.dumps(samples.ds.attrs, default=str)
    return batch.replace_schema_metadata({"zarrtrace": said})


class _Files:
    """Parquet files of limited size, one after the other.

    Parameters
    ----------
    folder
        Where they go.
    name
        Name, in which ``*`` stands for the number; without it there is one file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._number = 0
        self._open: Any = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, closing may fail as well: on a full disk.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a row group."""
        if self._open is None:
            context = writing(self._folder / self._name.replace("*", f"{self._number:05d}"))
            out = context.__enter__()
            texts = [
                field.name
                for field in batch.schema
                if not pa.types.is_list(field.type) and not pa.types.is_floating(field.type)
            ]
            writer = pq.ParquetWriter(out, batch.schema, compression="zstd", use_dictionary=texts)
            self._open = context, out, writer
        _, out, writer = self._open
        writer.write_batch(batch, row_group_size=max(1, batch.num_rows))
        if "*" in self._name and out.tell() > _FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            context, _, writer = self._open
            self._open = None
            self._number += 1
            try:
                writer.close()
            finally:
                context.__exit__(None, None, None)
