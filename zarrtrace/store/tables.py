"""Opening tables, lazily and labelled: samples of many scenarios in one store."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from zarrtrace.errors import NotATraceError
from zarrtrace.storage import Address, locate
from zarrtrace.store.damage import check_sizes
from zarrtrace.store.metadata import read_table
from zarrtrace.store.open import ChunkSpec, lazy_dataset
from zarrtrace.store.staged_table import refuse_staged_table


def open_table(
    path: Address,
    *,
    chunks: ChunkSpec = None,
    storage_options: Mapping[str, str] | None = None,
) -> xr.Dataset:
    """Open a table, lazily.

    Parameters
    ----------
    path
        Folder of the table, or its address: ``s3://bucket/run``, also ``gs://``, ``az://``,
        ``https://``, ``memory://``.
    chunks
        None indexes lazily without dask, best for point reads. ``"auto"`` or ``{}`` gives dask
        arrays in blocks of whole layers, or of samples of a large one; a mapping of dimensions to
        sizes, blocks of those.
    storage_options
        As for :func:`~zarrtrace.open_trace`.

    Returns
    -------
    xr.Dataset
        ``features (layer, sample, feature)``, ``residual (layer, sample, channel)`` and the rest of
        ``schema/README.md``. Only the coordinates of dimensions are read.

    Raises
    ------
    NotATraceError
        If `path` is not a table.
    FormatVersionError
        If another version of the format is there.
    IncompleteError
        If the table is still being written.
    IntegrityError
        If its metadata is damaged, or files are gone or have another size.
    """
    path = locate(path, storage_options)
    try:
        table = read_table(path)
    except NotATraceError:
        refuse_staged_table(path)
        raise
    check_sizes(table)
    return lazy_dataset(path, table, chunks)
