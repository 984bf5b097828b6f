"""NPZ files of samples: features as coordinates, and the residual stream of all layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from zarrtrace.errors import ConfigError
from zarrtrace.exports.folder import writing
from zarrtrace.exports.samples import VALID, LayeredArray, Samples
from zarrtrace.npz.files import DType, converted
from zarrtrace.npz.streams import GrowingArray, NPZStream

#: Names of files, as patterns.
COO_FILES = ("sae_features*_L*.npz",)
HIDDEN_FILES = ("phase_a_hidden_states.npz",)

_COO = ("row_indices", "col_indices", "values", "shape", "layer", VALID)
_HIDDEN = ("hidden_states", "layers", VALID)

Step = Callable[[int], None]


class GrowingCoordinates:
    """The non-zero values of one layer, in the order of rows, then columns.

    Parameters
    ----------
    new
        Makes an array that grows.
    dtype
        Type of the values.
    """

    def __init__(self, new: Callable[[np.dtype], GrowingArray], dtype: np.dtype) -> None:
        index = np.dtype(np.int32)
        self.rows, self.columns, self.values = new(index), new(index), new(dtype)

    def append(self, start: int, values: np.ndarray, valid: np.ndarray) -> None:
        """Append samples; those of failed scenarios, which are NaN, have no values here."""
        row, column, found = nonzero_coordinates(values, valid)
        self.rows.append(row + np.int32(start))
        self.columns.append(column)
        self.values.append(found)

    def close(self) -> None:
        """Remove the files."""
        for one in (self.rows, self.columns, self.values):
            one.close()


def nonzero_coordinates(
    values: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, columns and values of what is not zero in valid rows, row by row."""
    is_there = values != 0
    is_there[~valid] = False
    at = np.flatnonzero(is_there)
    row, column = np.divmod(at, values.shape[1])
    return row.astype(np.int32), column.astype(np.int32), values.reshape(-1)[at]


def refuse_without_features(samples: Samples) -> None:
    """Refuse samples that have no features.

    Raises
    ------
    ConfigError
    """
    if not any(array.layers for array in samples.features):
        raise ConfigError(
            "the samples have no features",
            why="The run was extracted with --no-features, or none of the layers has an SAE.",
            remedy="Export to 'hidden' or 'parquet', or choose other --layers.",
        )


def write_coo(
    samples: Samples, folder: Path, dtype: DType | None, pool: Executor, step: Step
) -> None:
    """Write ``sae_features_L{N}.npz``: row and column indices, values and shape, by layer."""
    refuse_without_features(samples)
    samples.refuse_columns(_COO)
    for array in samples.features:
        for layers in array.groups():
            _write_layers(samples, array, layers, folder, dtype, pool, step)


def _write_layers(
    samples: Samples,
    array: LayeredArray,
    layers: Sequence[int],
    folder: Path,
    dtype: DType | None,
    pool: Executor,
    step: Step,
) -> None:
    kind = np.dtype(dtype or array.dtype)
    files = {layer: folder / f"sae_features{array.suffix}_L{layer}.npz" for layer in layers}
    with contextlib.ExitStack() as stack:
        found: dict[int, GrowingCoordinates] = {}
        for layer in layers:
            found[layer] = GrowingCoordinates(lambda one: GrowingArray(folder, pool, one), kind)
            stack.callback(found[layer].close)
        rows = array.rows(len(array.layers))
        for start in range(0, samples.count, rows):
            block = array.read(layers, start, min(start + rows, samples.count))
            valid = samples.valid(block.start, block.stop)
            for layer, values in zip(layers, block.values, strict=True):
                cast = converted(files[layer], values, dtype, firing=True)
                found[layer].append(start, cast, valid)
            step(len(layers) * (block.stop - block.start))
        for layer, file in files.items():
            with writing(file) as out, NPZStream(out, pool) as npz:
                npz.write_grown("row_indices", found[layer].rows)
                npz.write_grown("col_indices", found[layer].columns)
                npz.write_grown("values", found[layer].values)
                npz.write_array("shape", np.array([samples.count, array.width], np.int64))
                npz.write_array("layer", np.array(layer, np.int64))
                _write_columns(npz, samples)
            found[layer].close()


def write_hidden(
    samples: Samples, folder: Path, dtype: DType | None, pool: Executor, step: Step
) -> None:
    """Write ``phase_a_hidden_states.npz``: the residual stream of all samples and layers."""
    array = samples.residual
    if array is None or not array.layers:
        raise ConfigError(
            "the samples have no residual stream",
            why="A run stores it only if it is asked to.",
            remedy="Extract with --residual, or export features with --to coo.",
        )
    samples.refuse_columns(_HIDDEN)
    file = folder / HIDDEN_FILES[0]

    def parts(residual: LayeredArray) -> Iterator[np.ndarray]:
        layers = residual.layers
        rows = residual.rows_of_all
        for start in range(0, samples.count, rows):
            block = residual.read(layers, start, min(start + rows, samples.count))
            yield converted(file, block.values.transpose(1, 0, 2), dtype)
            step(len(layers) * (block.stop - start))

    with writing(file) as out, NPZStream(out, pool) as npz:
        shape = (samples.count, len(array.layers), array.width)
        npz.write("hidden_states", np.dtype(dtype or array.dtype), shape, parts(array))
        npz.write_array("layers", np.array(array.layers, np.int64))
        _write_columns(npz, samples)


def _write_columns(npz: NPZStream, samples: Samples) -> None:
    """Write one array a coordinate; texts as Unicode of a fixed width, which need no pickle."""
    count = (samples.count,)
    valid = (samples.valid(window.start, window.stop) for window in samples.windows())
    npz.write(VALID, np.dtype(bool), count, valid)
    for name in samples.columns:
        column = samples.ds[name]
        dtype = np.dtype(column.dtype)
        if dtype.kind not in "biuf":
            windows = (column[window].values for window in samples.windows())
            width = max(_width(name, texts) for texts in windows)
            dtype = np.dtype(f"<U{width}")
        values = (column[window].values.astype(dtype) for window in samples.windows())
        npz.write(name, dtype, count, values)


def _width(name: str, texts: np.ndarray) -> int:
    """Return the length of the longest text; refuse one that NumPy would cut."""
    for text in texts:
        if str(text).endswith("\0"):
            raise ConfigError(
                f"column {name!r} has a text that ends in a null character",
                why="NumPy's arrays of text drop null characters at the end.",
                remedy="Export to 'parquet', which keeps them.",
            )
    return max((len(str(text)) for text in texts), default=1) or 1
