"""Files of many chunks: where chunks stand in them, their index, and their fingerprint.

A file of a sharded array holds its chunks in the order of their indices, then

- its fingerprint: BLAKE2b (8 bytes) of its chunks' CRC-32Cs, 4 little-endian bytes each, in order;
- the index of Zarr's ``sharding_indexed`` codec: offset and length of each chunk, and a CRC-32C.

The fingerprint stands outside the index, where other readers do not look. The metadata of the array
holds it, too: a file exchanged for another one is noticed by every reader of the index.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from zarrtrace.format.layout import ROWS, ArrayLayout
from zarrtrace.records import BFloat16, Nonzeros
from zarrtrace.storage.location import Location
from zarrtrace.store.codecs import (
    CRC_BYTES,
    FINGERPRINT_BYTES,
    ArrayEncoding,
    checked,
    with_checksum,
)
from zarrtrace.store.sparse_frames import sparse_frames

#: Offset and length of a chunk that is not stored.
ABSENT = 2**64 - 1

_LOCAL = threading.local()


class Checksum(NamedTuple):
    """Size and checksum of a file: a sharded file's fingerprint, or a chunk's CRC-32C."""

    bytes: int
    checksum: str

    def refuse_other(self, found: Checksum) -> None:
        """Refuse a file with another size or checksum than was written.

        Raises
        ------
        ValueError
        """
        if found.bytes != self.bytes:
            raise ValueError(f"has {found.bytes} bytes, {self.bytes} were written")
        if found.checksum != self.checksum:
            raise ValueError("is not the file that belongs to this array")


Checksums = Mapping[str, Checksum]


class LayerGrid:
    """How the chunks of one layer of an array are numbered, and which file each is in.

    A chunk holds all of the dimensions between layers and rows: chunks come in the order of rows.

    Parameters
    ----------
    dims
        Dimensions of an array that is written layer by layer.
    encoding
        How it is cut.
    """

    def __init__(self, dims: Sequence[str], encoding: ArrayEncoding) -> None:
        self._axis = axis = next(at for at, dim in enumerate(dims) if dim in ROWS)
        counts = [-(-s // c) for s, c in zip(encoding.shape, encoding.chunks, strict=True)]
        self._axes = len(dims)
        self.columns = math.prod(counts[axis + 1 :])
        #: Chunks of a layer.
        self.count = counts[axis] * self.columns
        self._file_layers, self._file_rows = encoding.grid[0], encoding.grid[axis]

    def places(self, layer: int, first: int = 0) -> Iterator[tuple[str, int]]:
        """Yield key of the file and number in it of each chunk of a layer, from the first on."""
        place, key, here = [0] * self._axes, "", -1
        place[0], layer_inside = divmod(layer, self._file_layers)
        for chunk in range(first, self.count):
            row, column = divmod(chunk, self.columns)
            block, inside = divmod(row, self._file_rows)
            if block != here:
                place[self._axis] = here = block
                key = file_key(place)
            yield key, (layer_inside * self._file_rows + inside) * self.columns + column


def file_key(place: Sequence[int]) -> str:
    """Return the key of a file in its array."""
    return ".".join(("c", *map(str, place)))


def file_keys(encoding: ArrayEncoding) -> list[str]:
    """Return the keys of all files of an array that is cut along its first dimension alone."""
    count = -(-encoding.shape[0] // encoding.file_shape[0])
    return [file_key([at, *[0] * (len(encoding.shape) - 1)]) for at in range(count)]


def encode_rows(
    layout: ArrayLayout, encoding: ArrayEncoding, rows: np.ndarray | BFloat16 | Nonzeros
) -> Iterator[bytes]:
    """Encode some rows of one layer, as chunks in order.

    Parameters
    ----------
    rows
        Values without the dimension of layers, from the first row of a chunk on.
    """
    if isinstance(rows, Nonzeros):
        yield from _encode_nonzeros(layout, encoding, rows)
        return
    axis = layout.row_axis - 1
    sizes, steps = rows.shape, layout.chunks[1:]
    for start in range(0, sizes[axis], steps[axis]):
        for column in range(0, sizes[-1], steps[-1]):
            part: list[slice | None] = [None, *[slice(None)] * len(sizes)]
            part[axis + 1] = slice(start, start + steps[axis])
            if axis < len(sizes) - 1:
                part[-1] = slice(column, column + steps[-1])
            yield encoding.encode(rows[tuple(part)])


def _encode_nonzeros(
    layout: ArrayLayout, encoding: ArrayEncoding, rows: Nonzeros
) -> Iterator[bytes]:
    """Encode the chunks of sparse rows; those that hold many values are made dense first."""
    (_, step, columns), (tokens, _) = layout.chunks, rows.shape
    if columns != rows.columns:
        raise ValueError(f"blocks of {rows.columns} features, not {columns}")
    starts = range(0, tokens, step)
    ends = np.array([*starts, tokens]) * columns
    dtype = np.dtype(layout.dtype).newbyteorder("<")
    parts = [
        (at, values.astype(dtype, copy=False), np.searchsorted(at, ends).tolist())
        for at, values in zip(rows.at, rows.values, strict=True)
    ]
    for down, start in enumerate(starts):
        chunks = []
        for at, values, places in parts:
            here = slice(*places[down : down + 2])
            chunks.append((at[here] - start * columns, values[here]))
        for chunk, frame in zip(chunks, sparse_frames(chunks, (step, columns)), strict=True):
            yield _encode_dense(encoding, dtype, *chunk) if frame is None else with_checksum(frame)


def _encode_dense(
    encoding: ArrayEncoding, dtype: np.dtype[Any], at: np.ndarray, values: np.ndarray
) -> bytes:
    """Encode a chunk from its non-zero values.

    One chunk's memory is filled and cleared again and again: to make all rows dense first takes
    longer than to compress them. Each thread keeps its own, for fresh memory costs time, too.
    """
    memory: np.ndarray | None = _LOCAL.__dict__.pop("zeros", None)
    if memory is None or memory.shape != encoding.chunks or memory.dtype != dtype:
        memory = np.zeros(encoding.chunks, dtype)
    flat = memory.reshape(-1)
    flat[at] = values
    encoded = encoding.encode(memory)
    flat[at] = 0
    _LOCAL.zeros = memory  # unless something failed before: then it may hold values
    return encoded


# --- whole files -------------------------------------------------------------------------------


def encode_file(encoding: ArrayEncoding, values: np.ndarray) -> tuple[bytes, Checksum]:
    """Encode all that one file holds; at the array's edge it may be less.

    Parameters
    ----------
    values
        With all dimensions of the array.
    """
    if not encoding.is_sharded:
        content = encoding.encode(values)
        return content, checksum_of(content)
    chunks: dict[int, bytes] = {}
    for place in np.ndindex(
        *(-(-s // c) for s, c in zip(values.shape, encoding.chunks, strict=True))
    ):
        part = tuple(slice(n * c, (n + 1) * c) for n, c in zip(place, encoding.chunks, strict=True))
        number = sum(n * stride for n, stride in zip(place, encoding.strides, strict=True))
        chunks[number] = encoding.encode(values[part])
    stored = {
        number: (len(chunk), int.from_bytes(chunk[-CRC_BYTES:], "little"))
        for number, chunk in chunks.items()
    }
    tail, checksum = tail_of(encoding, stored)
    return b"".join([*chunks.values(), tail]), checksum


def label_files(
    encoding: ArrayEncoding, values: np.ndarray
) -> Iterator[tuple[str, bytes, Checksum]]:
    """Encode all files of an array of one dimension: key, content and checksum of each."""
    step = encoding.file_shape[0]
    for number, key in enumerate(file_keys(encoding)):
        yield key, *encode_file(encoding, values[number * step : (number + 1) * step])


def index_entries(
    encoding: ArrayEncoding, stored: Mapping[int, tuple[int, int]]
) -> tuple[np.ndarray, int]:
    """Return offset and length of each chunk of a file ``(chunk, 2)``, and where they end.

    Parameters
    ----------
    stored
        Length and CRC-32C of each chunk by its number in the file, in the order of the file.
    """
    entries = np.full((encoding.count, 2), ABSENT, "<u8")
    offset = 0
    for number, (length, _) in stored.items():
        entries[number] = offset, length
        offset += length
    return entries, offset


def tail_of(
    encoding: ArrayEncoding, stored: Mapping[int, tuple[int, int]]
) -> tuple[bytes, Checksum]:
    """Return what follows the chunks of a file, and the file's checksum.

    Parameters
    ----------
    stored
        As for :func:`index_entries`.
    """
    index, offset = index_entries(encoding, stored)
    mark = fingerprint(crc for _, crc in stored.values())
    content = index.tobytes()
    crc = google_crc32c.value(content).to_bytes(CRC_BYTES, "little")
    tail = mark + content + crc
    return tail, Checksum(offset + len(tail), mark.hex())


def fingerprint(crcs: Any) -> bytes:
    """Return the fingerprint of chunks, by their CRC-32Cs."""
    content = b"".join(int(crc).to_bytes(CRC_BYTES, "little") for crc in crcs)
    return hashlib.blake2b(content, digest_size=FINGERPRINT_BYTES).digest()


def crc_of(content: bytes | memoryview) -> str:
    """Return the CRC-32C at the end of a chunk, in hexadecimal digits."""
    return bytes(content[-CRC_BYTES:])[::-1].hex()


def checksum_of(content: bytes) -> Checksum:
    """Return what tells a file of one chunk from others; whether it is sound is not compared."""
    return Checksum(len(content), crc_of(content))


class FileIndex(NamedTuple):
    """The end of a file of many chunks.

    Attributes
    ----------
    checksum
        Size of the file, and its fingerprint; no fingerprint while the file grows.
    entries
        Offset and length by number of the chunk ``(chunk, 2)``.
    crcs
        CRC-32C of each chunk by its number, where a journal says it.
    """

    checksum: Checksum
    entries: np.ndarray
    crcs: Mapping[int, int] | None = None

    def range_of(self, number: int) -> tuple[int, int] | None:
        """Return start and end of a chunk's bytes; None if it is not stored."""
        offset, length = self.entries[number].tolist()
        return None if offset == ABSENT else (offset, offset + length)


def read_index(file: Location, encoding: ArrayEncoding) -> FileIndex:
    """Read the index at the end of a file.

    Raises
    ------
    FileNotFoundError
    ValueError
        If it is damaged, or names other places than those of chunks one after the other.
    """
    return parse_index(*file.read_end(encoding.tail_bytes), encoding)


def parse_index(data: bytes, size: int, encoding: ArrayEncoding) -> FileIndex:
    """Take the index from the last `tail_bytes` of a file of `size` bytes.

    Raises
    ------
    ValueError
        As for :func:`read_index`.
    """
    if len(data) < encoding.tail_bytes:
        raise ValueError("it is too short to hold its index")
    entries = np.frombuffer(checked(data[FINGERPRINT_BYTES:]), "<u8").reshape(encoding.count, 2)
    is_absent = entries[:, 0] == ABSENT
    offsets, lengths = entries[~is_absent].T
    ends = np.cumsum(lengths, dtype=np.uint64)
    if (
        (lengths > size).any()
        or (offsets != ends - lengths).any()
        or size != encoding.tail_bytes + int(ends[-1] if len(ends) else 0)
        or (entries[is_absent, 1] != ABSENT).any()
    ):
        raise ValueError("its index does not say where its chunks are")
    return FileIndex(Checksum(size, data[:FINGERPRINT_BYTES].hex()), entries)
