"""Encoding arrays into the files of Zarr's chunk and shard layout.

Zarr writes the same bytes. It is done here because a layer is many small chunks, and Zarr's way
through its event loop costs more time than compressing them (schema/README.md has the figures).
Tests read every array back with Zarr and with tensorstore.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import google_crc32c
import numpy as np
from numcodecs import Blosc, Zstd

from zarrtrace.spec import ATTENTION_LEVEL, ArrayLayout, Nonzeros
from zarrtrace.store.files import write_whole
from zarrtrace.store.objects import Location

#: Place of a chunk in its file's grid.
Place = tuple[int, ...]

_MISSING = 2**64 - 1
_ZSTD = Zstd(level=1, checksum=True)
_BLOSC = Blosc(cname="zstd", clevel=ATTENTION_LEVEL, shuffle=Blosc.SHUFFLE)


def write_block(
    array: Location, layout: ArrayLayout, at: tuple[int, ...], block: np.ndarray
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
    written: dict[str, bytes] = {}
    for place, values in _pieces(block, file_shape):
        index = [start // size + n for start, size, n in zip(at, file_shape, place, strict=True)]
        written |= _write_file(array, index, _encode_file(values, layout))
    return written


def write_nonzeros(
    array: Location, layout: ArrayLayout, at: tuple[int, int, int], block: Nonzeros
) -> dict[str, bytes]:
    """Write what is not 0 of a sharded array's rows ``(query, feature)``, as :func:`write_block`.

    Chunks are filled one at a time in memory that is used again: making the whole block first
    takes longer than compressing it.
    """
    assert layout.shards is not None and not layout.skip_empty  # noqa: S101, PT018 -- of features
    (_, rows, _), (tokens, width) = layout.shards, block.shape
    written: dict[str, bytes] = {}
    starts = np.searchsorted(block.at, np.arange(0, tokens + rows, rows) * width)
    for number, (first, last) in enumerate(itertools.pairwise(starts)):
        start = number * rows
        part = Nonzeros(
            (min(rows, tokens - start), width),
            block.at[first:last] - start * width,
            block.values[first:last],
        )
        content = _sharded(_filled_chunks(part, layout), layout)
        written |= _write_file(array, [at[0], at[1] // rows + number, 0], content)
    return written


def _filled_chunks(part: Nonzeros, layout: ArrayLayout) -> Iterator[tuple[Place, np.ndarray]]:
    """Yield the chunks of a file; each is good until the next."""
    (_, rows, columns), (tokens, width) = layout.chunks, part.shape
    across = -(-width // columns)
    row, column = np.divmod(part.at, width)
    chunk = row // rows * across + column // columns
    order = np.argsort(chunk, kind="stable")
    inside = ((row % rows) * columns + column % columns)[order]
    values = part.values[order]
    ends = np.searchsorted(chunk[order], np.arange(-(-tokens // rows) * across + 1))
    room = np.zeros((1, rows, columns), np.dtype(layout.dtype).newbyteorder("<"))
    flat = room.reshape(-1)
    for number, (first, last) in enumerate(itertools.pairwise(ends)):
        down, right = divmod(number, across)
        within = (0, slice(tokens - down * rows), slice(width - right * columns))
        if room[within].size < room.size:  # beyond the array's edge
            room[:] = layout.fill_value
            room[within] = 0
        flat[inside[first:last]] = values[first:last]
        yield (0, down, right), room
        if room[within].size < room.size:
            room[:] = 0
        else:
            flat[inside[first:last]] = 0


def _write_file(array: Location, index: Sequence[int], content: bytes) -> dict[str, bytes]:
    """Write a file of an array; returns its content by key."""
    key = "/".join(("c", *map(str, index)))
    file = array / key
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)
    return {key: content}


def _encode_file(values: np.ndarray, layout: ArrayLayout) -> bytes:
    if layout.shards is None:
        return _encode_chunk(_padded(values, layout.chunks, layout.fill_value), layout)
    return _sharded(
        (
            (place, _padded(part, layout.chunks, layout.fill_value))
            for place, part in _pieces(values, layout.chunks)
            if not layout.skip_empty or part.any()
        ),
        layout,
    )


def _sharded(chunks: Iterable[tuple[Place, np.ndarray]], layout: ArrayLayout) -> bytes:
    """Encode chunks one after another, and an index of offsets and sizes with a checksum."""
    assert layout.shards is not None  # noqa: S101 -- the caller has looked
    grid = [shard // chunk for shard, chunk in zip(layout.shards, layout.chunks, strict=True)]
    index = np.full((math.prod(grid), 2), _MISSING, "<u8")
    encoded, offset = [], 0
    for place, values in chunks:
        chunk = _encode_chunk(values, layout)
        index[np.ravel_multi_index(place, grid)] = offset, len(chunk)
        encoded.append(chunk)
        offset += len(chunk)
    end = index.tobytes()
    return b"".join([*encoded, end, _checksum(end)])


def _encode_chunk(values: np.ndarray, layout: ArrayLayout) -> bytes:
    # Every chunk carries a checksum: a flipped bit must raise, never read as another number.
    if layout.codec == "attention":
        compressed = bytes(_BLOSC.encode(values))
        return compressed + _checksum(compressed)
    return bytes(_ZSTD.encode(values))


def _checksum(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(4, "little")


def _pieces(values: np.ndarray, shape: tuple[int, ...]) -> Iterator[tuple[Place, np.ndarray]]:
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
