"""Encoding arrays into the files of Zarr's chunk and shard layout.

Zarr writes the same values. It is done here because a layer is many small chunks, and Zarr's way
through its event loop costs more time than compressing them (schema/README.md has the figures).
Tests read every array back with Zarr and with tensorstore.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import google_crc32c
import numpy as np
from numcodecs import Blosc, VLenUTF8, Zstd

from zarrtrace.spec import (
    ATTENTION_BLOCK,
    ATTENTION_LEVEL,
    FEATURES_LEVEL,
    FEATURES_LEVEL_BY_TOKEN,
    FEATURES_ORDER,
    ArrayLayout,
    Nonzeros,
)
from zarrtrace.store.files import write_whole
from zarrtrace.store.objects import Location

#: Place of a chunk in its file's grid.
Place = tuple[int, ...]

_MISSING = 2**64 - 1
_ZSTD = Zstd(level=1, checksum=True)
_TEXT = VLenUTF8()
_BLOSC = Blosc(
    cname="zstd", clevel=ATTENTION_LEVEL, shuffle=Blosc.SHUFFLE, blocksize=ATTENTION_BLOCK
)
_OF_FEATURES, _BY_TOKEN = Zstd(level=FEATURES_LEVEL), Zstd(level=FEATURES_LEVEL_BY_TOKEN)
_CODECS = {"attention": _BLOSC, "sparse": _OF_FEATURES, "sparse_by_token": _BY_TOKEN}


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
    if layout.dtype != "string":
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
    (_, file_rows, _), tokens = layout.shards, block.shape[0]
    written: dict[str, bytes] = {}
    for number, start in enumerate(range(0, tokens, file_rows)):
        rows = range(start, min(start + file_rows, tokens))
        content = _sharded(_filled_chunks(block, rows, layout), layout)
        written |= _write_file(array, [at[0], at[1] // file_rows + number, 0], content)
    return written


def _filled_chunks(
    block: Nonzeros, rows: range, layout: ArrayLayout
) -> Iterator[tuple[Place, np.ndarray]]:
    """Yield the chunks of a file that holds some rows; each is good until the next."""
    (_, step, columns), width = layout.chunks, block.shape[1]
    assert columns == block.columns  # noqa: S101 -- the layout's blocks are the record's
    starts = range(rows.start, rows.stop, step)
    ends = np.array([*starts, rows.stop]) * columns
    parts = [
        (at, values, np.searchsorted(at, ends).tolist())
        for at, values in zip(block.at, block.values, strict=True)
    ]
    dtype = np.dtype(layout.dtype).newbyteorder("<")
    by_feature = layout.codec == "sparse"
    memory = np.zeros((1, columns, step) if by_feature else (1, step, columns), dtype)
    room = memory.transpose(FEATURES_ORDER) if by_feature else memory
    flat, inside = memory.reshape(-1), room[0]
    for down, start in enumerate(starts):
        for right, (at, values, places) in enumerate(parts):
            before, inside = inside, room[0, : rows.stop - start, : width - right * columns]
            if inside.shape != before.shape:  # it ends elsewhere at the array's edge
                room[:] = _beyond(layout)
                inside[:] = 0
            here = slice(*places[down : down + 2])
            filled = at[here] - start * columns
            if by_feature:
                row = filled // columns
                filled = (filled - row * columns) * step + row
            flat[filled] = values[here]
            yield (0, down, right), room
            flat[filled] = 0


def _write_file(array: Location, index: Sequence[int], content: bytes) -> dict[str, bytes]:
    """Write a file of an array; returns its content by key."""
    key = "/".join(("c", *map(str, index)))
    file = array / key
    try:
        write_whole(file, content)
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    return {key: content}


def _encode_file(values: np.ndarray, layout: ArrayLayout) -> bytes:
    if layout.shards is None:
        return _encode_chunk(_padded(values, layout), layout)
    return _sharded(
        (
            (place, _padded(part, layout))
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
    if layout.codec != "plain":
        if layout.codec == "sparse":
            values = np.ascontiguousarray(values.transpose(FEATURES_ORDER))
        compressed = bytes(_CODECS[layout.codec].encode(values))
        return compressed + _checksum(compressed)
    return bytes(_ZSTD.encode(_TEXT.encode(values) if layout.dtype == "string" else values))


def _checksum(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(4, "little")


def _pieces(values: np.ndarray, shape: tuple[int, ...]) -> Iterator[tuple[Place, np.ndarray]]:
    """Cut an array into pieces of a shape, smaller at its edges, with their places in the grid."""
    grid = [range(-(-size // step)) for size, step in zip(values.shape, shape, strict=True)]
    for place in itertools.product(*grid):
        corner = [n * step for n, step in zip(place, shape, strict=True)]
        ends = [start + step for start, step in zip(corner, shape, strict=True)]
        yield place, values[tuple(map(slice, corner, ends))]


def _beyond(layout: ArrayLayout) -> object:
    """Return what a chunk holds beyond the array's edge, which nobody reads."""
    # Feature by feature, another value would end the zeros of each.
    return 0 if layout.codec == "sparse" else layout.fill_value


def _padded(values: np.ndarray, layout: ArrayLayout) -> np.ndarray:
    if values.shape == layout.chunks:
        return np.ascontiguousarray(values)
    padded = np.full(layout.chunks, _beyond(layout), values.dtype)
    padded[tuple(slice(0, size) for size in values.shape)] = values
    return padded
