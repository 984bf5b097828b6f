"""Encoding arrays into the files of Zarr's chunk and shard layout.

Zarr writes the same bytes. It is done here because a layer is many small chunks, and Zarr's way
through its event loop costs more time than compressing them (schema/README.md has the figures).
Tests read every array back with Zarr and with tensorstore.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import Blosc, Zstd

from zarrtrace.spec import ATTENTION_LEVEL, ArrayLayout
from zarrtrace.store.files import write_whole

_MISSING = 2**64 - 1
_ZSTD = Zstd(level=1, checksum=True)
_BLOSC = Blosc(cname="zstd", clevel=ATTENTION_LEVEL, shuffle=Blosc.SHUFFLE)


def write_block(
    array: Path, layout: ArrayLayout, at: tuple[int, ...], block: np.ndarray
) -> dict[str, bytes]:
    """Write a block of an array that fills whole files, but for the array's own edges.

    Parameters
    ----------
    array
        Folder of the array.
    layout
        Its layout.
    at
        Index of the block's first element; a multiple of the shape of a file in every dimension.
    block
        Values, with as many dimensions as the array.

    Returns
    -------
    dict
        Content by key (``c/...``), in the order of the keys.
    """
    file_shape = layout.shards or layout.chunks
    block = np.ascontiguousarray(block, dtype=np.dtype(layout.dtype).newbyteorder("<"))
    written = {}
    for place, values in _pieces(block, file_shape):
        index = (start // size + n for start, size, n in zip(at, file_shape, place, strict=True))
        key = "/".join(("c", *map(str, index)))
        content = _encode_file(values, layout)
        file = array / key
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
        written[key] = content
    return written


def _encode_file(values: np.ndarray, layout: ArrayLayout) -> bytes:
    if layout.shards is None:
        return _encode_chunk(_padded(values, layout.chunks, layout.fill_value), layout)
    # A shard is its chunks, one after another, and an index of offsets and sizes with a checksum.
    grid = [shard // chunk for shard, chunk in zip(layout.shards, layout.chunks, strict=True)]
    index = np.full((math.prod(grid), 2), _MISSING, "<u8")
    chunks, offset = [], 0
    for place, part in _pieces(values, layout.chunks):
        if layout.skip_empty and not part.any():
            continue
        chunk = _encode_chunk(_padded(part, layout.chunks, layout.fill_value), layout)
        index[np.ravel_multi_index(place, grid)] = offset, len(chunk)
        chunks.append(chunk)
        offset += len(chunk)
    end = index.tobytes()
    return b"".join([*chunks, end, _checksum(end)])


def _encode_chunk(values: np.ndarray, layout: ArrayLayout) -> bytes:
    # Every chunk carries a checksum: a flipped bit must raise, never read as another number.
    if layout.codec == "attention":
        compressed = bytes(_BLOSC.encode(values))
        return compressed + _checksum(compressed)
    return bytes(_ZSTD.encode(values))


def _checksum(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(4, "little")


def _pieces(
    values: np.ndarray, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Cut an array into pieces of a shape, smaller at its edges, with their places in the grid."""
    grid = [range(-(-size // step)) for size, step in zip(values.shape, shape, strict=True)]
    for place in itertools.product(*grid):
        corner = [n * step for n, step in zip(place, shape, strict=True)]
        ends = [start + step for start, step in zip(corner, shape, strict=True)]
        yield place, values[tuple(map(slice, corner, ends))]


def _padded(values: np.ndarray, shape: tuple[int, ...], fill: object) -> np.ndarray:
    if values.shape == shape:
        return np.ascontiguousarray(values)
    padded = np.full(shape, fill, values.dtype)
    padded[tuple(slice(0, size) for size in values.shape)] = values
    return padded
