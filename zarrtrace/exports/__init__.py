"""Export a run, its samples, or a table, to the files that other tools read.

``npz`` is the documented layout of :mod:`zarrtrace.npz`, with attention. All others hold samples,
one row a sample, in the order of ``zt.table(run)``::

    coo          sae_features_L{N}.npz          row_indices, col_indices, values, shape, layer
    hidden       phase_a_hidden_states.npz      hidden_states (sample, layer, channel), layers
    safetensors  layer_{N}.safetensors          residual.layer_N, features.layer_N.values, ...
                 samples.parquet                what each row is
    parquet      samples-00000.parquet, ...     a row a sample, with lists

Every coordinate of the samples, metadata among them, is an array or column, and so is
``valid_mask``, which is false for scenarios that could not be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import xarray as xr

from zarrtrace.analysis.samples import At, table
from zarrtrace.errors import ConfigError
from zarrtrace.exports.folder import staged
from zarrtrace.exports.numpy_files import COO_FILES, HIDDEN_FILES, write_coo, write_hidden
from zarrtrace.exports.parquet_files import PARQUET_FILES, write_parquet
from zarrtrace.exports.safetensors_files import SAFETENSORS_FILES, write_safetensors
from zarrtrace.exports.samples import Samples, choose_samples
from zarrtrace.machine import cpus
from zarrtrace.npz.exporting import export_npz
from zarrtrace.npz.files import DType, Progress
from zarrtrace.scenarios import DECISION
from zarrtrace.storage import Address, locate
from zarrtrace.store import kind_of, open_run, open_table, open_trace
from zarrtrace.suggestions import did_you_mean

__all__ = ["FORMATS", "export"]

Format = Literal["npz", "coo", "hidden", "safetensors", "parquet"]
FORMATS: tuple[str, ...] = get_args(Format)

_FILES = {
    "coo": COO_FILES,
    "hidden": HIDDEN_FILES,
    "safetensors": SAFETENSORS_FILES,
    "parquet": PARQUET_FILES,
}


def export(
    source: Address | xr.Dataset | xr.DataTree,
    output: str | Path,
    *,
    to: Format = "npz",
    at: At | None = None,
    scenarios: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    output_dtype: DType | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a run, or its samples, in a format that other tools read.

    Values are the store's, bit for bit. Samples are read, converted and written in blocks, so that
    memory does not depend on their number. Files appear together, when all are whole.

    Parameters
    ----------
    source
        A run, trace or table, opened or by its folder or address; or part of a dataset of samples
        such as ``zt.table(run).isel(sample=slice(100))``. ``npz`` takes a folder or address only.
    output
        Folder to write to.
    to
        The format; see :mod:`zarrtrace.exports`.
    at
        Which positions are samples, as for ``zt.table``: by default ``"decision"``, of a table all
        that it holds. ``npz`` holds all positions.
    scenarios, layers
        Scenarios and layers to export; by default all.
    output_dtype
        Convert features, residual stream and attention; by default each is as stored. Activations
        too small for float16 become its smallest number, as in a store, and not 0.
    overwrite
        Replace files of an earlier export in the same format. Other files stay.
    threads
        By default one a CPU.
    progress
        Called with the amount of work done and of all of it.

    Returns
    -------
    Path
        `output`; of ``npz``, the metadata file.

    Raises
    ------
    ConfigError
        If the format does not fit what is stored, a scenario or layer does not exist, a column has
        the name of a key of the format, or `output` holds an export and is not to be overwritten.
    StoreError
        If the samples cannot be read or the files not be written, or a scenario lacks layers that
        others have.
    """
    if to not in FORMATS:
        raise ConfigError(f"no format {to!r}", remedy=did_you_mean(str(to), FORMATS))
    if output_dtype not in (None, "float16", "float32"):
        raise ConfigError(
            f"output_dtype {output_dtype!r} is unknown", remedy="Give 'float16' or 'float32'."
        )
    if to == "npz":
        return export_npz(
            _folder_of(source, at),
            output,
            scenarios=scenarios,
            layers=layers,
            output_dtype=output_dtype,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    samples = choose_samples(_open_samples(source, at), scenarios, layers)
    step = _counted(samples, to, progress)
    with (
        ThreadPoolExecutor(threads or cpus()) as pool,
        staged(Path(output), _FILES[to], overwrite=overwrite) as folder,
    ):
        _write(samples, to, folder, output_dtype, pool, step)
    return Path(output)


def _write(
    samples: Samples,
    to: Format,
    folder: Path,
    dtype: DType | None,
    pool: Executor,
    step: Callable[[int], None],
) -> None:
    if to == "coo":
        write_coo(samples, folder, dtype, pool, step)
    elif to == "hidden":
        write_hidden(samples, folder, dtype, pool, step)
    elif to == "safetensors":
        write_safetensors(samples, folder, dtype, step)
    else:
        write_parquet(samples, folder, dtype, step)


def _open_samples(source: Address | xr.Dataset | xr.DataTree, at: At | None) -> xr.Dataset:
    """Return the samples of a run, trace or table."""
    data = source
    if not isinstance(data, xr.Dataset | xr.DataTree):
        path = locate(data)
        kind = kind_of(path)
        if kind == "table":
            data = open_table(path)
        else:
            data = open_run(path) if kind == "run" else open_trace(path)
    if isinstance(data, xr.Dataset) and data.attrs.get("kind") == "table" and at is None:
        return data
    return table(data, at=DECISION if at is None else at)


def _folder_of(source: Address | xr.Dataset | xr.DataTree, at: At | None) -> Address:
    """Return where a run is; refuse what the layout of :mod:`zarrtrace.npz` is not made of."""
    others = f"Choose another format: {', '.join(FORMATS[1:])}."
    if at is not None:
        raise ConfigError("the format 'npz' has no 'at': it holds all positions", remedy=others)
    if isinstance(source, xr.Dataset | xr.DataTree):
        raise ConfigError(
            "the format 'npz' is made of a run's folder, not of a dataset",
            remedy=f"Give the run's path. {others}",
        )
    if kind_of(locate(source)) == "table":
        raise ConfigError(
            f"{source}: is a table, and the format 'npz' has a folder for each prompt",
            remedy=others,
        )
    return source


def _counted(samples: Samples, to: Format, progress: Progress | None) -> Callable[[int], None]:
    """Return a function that adds work done, and tells of it: samples of a layer."""
    arrays = [] if to == "hidden" else list(samples.features)
    if samples.residual is not None and to != "coo":
        arrays.append(samples.residual)
    total = sum(len(array.layers) for array in arrays) * samples.count
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return step
