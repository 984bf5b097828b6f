"""NPZ files of arrays that no memory holds: compressed piece by piece, on threads.

Each piece is a deflate stream of its own up to its last block, so that pieces are compressed in
parallel and joined in order. The bytes do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from zlib_ng import zlib_ng

from zarrtrace.npz.archive import (
    NewCompressor,
    best_compressor,
    member,
    npy_header,
    pieces_of,
)

# A deflate block that is the last one, and empty.
_END = b"\x03\x00"
_ZEROS = bytes(2**20)


class ArrayStream:
    """Rows of an array, compressed as they come.

    Parameters
    ----------
    out
        Where the compressed bytes go.
    pool
        Threads that compress.
    dtype
        Type of all rows.

    Attributes
    ----------
    rows, size, checksum
        Number of rows, bytes and CRC-32 of what was appended.
    """

    def __init__(self, out: IO[bytes], pool: Executor, dtype: np.dtype[Any]) -> None:
        self.out, self.dtype = out, dtype
        self.rows = self.size = self.checksum = 0
        self._pool = pool
        self._compressor: NewCompressor | None = None

    def append(self, rows: np.ndarray) -> None:
        """Compress further rows."""
        rows = np.ascontiguousarray(rows, self.dtype)
        if not rows.size:
            return
        pieces = pieces_of(rows.reshape(-1).view(np.uint8).data)
        if self._compressor is None:
            self._compressor = best_compressor(rows, pieces)
        for piece, packed in zip(
            pieces, self._pool.map(partial(_packed, self._compressor), pieces), strict=True
        ):
            self.checksum = zlib_ng.crc32(piece, self.checksum)
            self.size += len(piece)
            self.out.write(packed)
        self.rows += len(rows)


class GrowingArray(ArrayStream):
    """An array whose number of rows is not known yet, in a file that has no name.

    Parameters
    ----------
    folder
        Where the file is; it vanishes with its process.
    pool, dtype
        As for :class:`ArrayStream`.
    """

    def __init__(self, folder: Path, pool: Executor, dtype: np.dtype[Any]) -> None:
        super().__init__(tempfile.TemporaryFile(dir=folder), pool, dtype)  # noqa: SIM115

    def close(self) -> None:
        """Remove the file."""
        self.out.close()


class NPZStream:
    """An NPZ file that is written array by array; use as a context manager.

    Parameters
    ----------
    out
        Where to; must be seekable.
    pool
        Threads that compress.
    """

    def __init__(self, out: IO[bytes], pool: Executor) -> None:
        self._out, self._pool = out, pool
        self._archive = zipfile.ZipFile(out, "w")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error, closing may fail as well: on a full disk.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._archive.close()

    def write(
        self, key: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[np.ndarray]
    ) -> None:
        """Write an array of a known shape, whose rows come in parts.

        Raises
        ------
        ValueError
            If the parts have more or fewer rows than the shape says.
        """
        header = npy_header(dtype, shape)
        with member(self._archive, self._out, key) as info:
            self._out.write(_packed(_plain, header))
            stream = ArrayStream(self._out, self._pool, dtype)
            stream.checksum = zlib_ng.crc32(header)
            for part in parts:
                stream.append(part)
            self._out.write(_END)
            info.file_size, info.CRC = len(header) + stream.size, stream.checksum
        if stream.size != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{key}: {stream.rows} rows do not fit the shape {shape}")

    def write_array(self, key: str, array: np.ndarray) -> None:
        """Write an array that memory holds."""
        self.write(key, array.dtype, array.shape, [np.atleast_1d(array)])

    def write_grown(self, key: str, grown: GrowingArray) -> None:
        """Write an array of one dimension that has all its rows now."""
        header = npy_header(grown.dtype, (grown.rows,))
        with member(self._archive, self._out, key) as info:
            self._out.write(_packed(_plain, header))
            grown.out.seek(0)
            shutil.copyfileobj(grown.out, self._out, 2**20)
            self._out.write(_END)
            info.file_size = len(header) + grown.size
            info.CRC = _joined(header, grown.checksum, grown.size)


def _plain() -> Any:
    return zlib_ng.compressobj(6, zlib_ng.DEFLATED, -15, 9)


def _packed(new: NewCompressor, data: bytes | memoryview) -> bytes:
    """Compress a piece; what follows it may be appended."""
    compressor = new()
    return bytes(compressor.compress(data) + compressor.flush(zlib_ng.Z_SYNC_FLUSH))


def _joined(head: bytes, checksum: int, size: int) -> int:
    """Return the CRC-32 of `head` and `size` bytes behind it whose own CRC-32 is `checksum`.

    CRC-32 is linear: as many zeros in place of these bytes tell how far they move the head's.
    """
    behind, alone = zlib_ng.crc32(head), 0
    while size:
        zeros = _ZEROS[:size]
        behind, alone = zlib_ng.crc32(zeros, behind), zlib_ng.crc32(zeros, alone)
        size -= len(zeros)
    return int(behind ^ alone ^ checksum)
