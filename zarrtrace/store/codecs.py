"""Encoding and decoding chunks as their array's layout says; every chunk ends in a CRC-32C."""

from __future__ import annotations

import math
import threading
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc, VLenUTF8, Zstd, blosc

from zarrtrace.format.layout import ArrayLayout
from zarrtrace.records import BFloat16
from zarrtrace.store.causal_frames import causal_frame

#: Bytes of a checksum, at the end of what it is of.
CRC_BYTES = 4
#: Bytes of a file's fingerprint, which stands before the index of its chunks.
FINGERPRINT_BYTES = 8

_CRC = {"name": "crc32c"}
_TEXT = {"name": "vlen-utf8"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = {"name": "bytes"}  # types of one byte have no order of bytes
_LEVEL = 1
_ZSTD = {"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}
_INDEX_CODECS = [_BYTES, _CRC]
# Left to itself, Blosc compresses 32 KiB at once: a third more time, and twice as much to read.
_BLOSC_BLOCK = 2**19
_BLOSC_CODEC: Any = Blosc(
    cname="zstd", clevel=_LEVEL, shuffle=Blosc.SHUFFLE, blocksize=_BLOSC_BLOCK
)
_ZSTD_CODEC: Any = Zstd(level=_LEVEL)
# A decoded chunk, or a text, above these sizes is damage: it is refused before memory is allocated.
_MOST_DECODED, _MOST_TEXT = 2**31, 2**28
# CRC-32C of anything that is followed by its own CRC-32C.
_CHECKED = 0x48674BC7

_LOCAL = threading.local()


def codecs_of(layout: ArrayLayout) -> list[dict[str, Any]]:
    """Return an array's codecs, as ``zarr.json`` lists them."""
    if layout.codec == "shuffle":
        blosc_options = {
            "typesize": np.dtype(layout.dtype).itemsize,
            "cname": "zstd",
            "clevel": _LEVEL,
            "shuffle": "shuffle",
            "blocksize": _BLOSC_BLOCK,
        }
        codecs: list[dict[str, Any]] = [
            _BYTES,
            {"name": "blosc", "configuration": blosc_options},
            _CRC,
        ]
    else:
        serializer = {"string": _TEXT, "bool": _ONE_BYTE}.get(layout.dtype, _BYTES)
        codecs = [serializer, _ZSTD, _CRC]
    if layout.shards is None:
        return codecs
    sharding = {
        "chunk_shape": list(layout.chunks),
        "codecs": codecs,
        "index_codecs": _INDEX_CODECS,
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": sharding}]


class ArrayEncoding:
    """How an array is cut and encoded.

    Parameters
    ----------
    layout
        Its layout.

    Attributes
    ----------
    layout, shape
        Layout and shape of the array.
    dtype, fill
        Type of decoded values, and the value of those not stored; `is_text` tells whether it is
        text.
    file_shape, chunks, is_sharded
        Shape of what one file holds and of a chunk, and whether files hold several chunks.
    grid, strides, count
        Chunks of a file along each dimension, distance from one to the next, and their number.
    decoded
        Bytes of a decoded chunk.

    Raises
    ------
    ValueError
        If no array of zarrtrace's has its sizes.
    """

    def __init__(self, layout: ArrayLayout) -> None:
        self.layout, self.shape = layout, layout.shape
        self.is_text = layout.dtype == "string"
        self.dtype = np.dtype(object if self.is_text else layout.dtype)
        self.fill: Any = "" if self.is_text else self.dtype.type(layout.fill_value)
        self.chunks, self.is_sharded = layout.chunks, layout.shards is not None
        self.file_shape = layout.shards or layout.chunks
        self._check_sizes()
        self.grid = tuple(f // c for f, c in zip(self.file_shape, self.chunks, strict=True))
        self.strides = tuple(math.prod(self.grid[at + 1 :]) for at in range(len(self.grid)))
        self.count = math.prod(self.grid)
        self._is_blosc = layout.codec == "shuffle"
        self._is_attention = self._is_blosc and layout.dims[-1] == "key"
        self._compressor = _BLOSC_CODEC if self._is_blosc else _ZSTD_CODEC
        self._little = self.dtype.newbyteorder("<")

    def _check_sizes(self) -> None:
        """Refuse chunks larger than the array, and files that do not hold whole chunks of it."""
        for size, file, chunk in zip(self.shape, self.file_shape, self.chunks, strict=True):
            most = max(size, 1)
            if chunk > most or file % chunk or file > -(-most // chunk) * chunk:
                raise ValueError(
                    f"chunk_shape {list(self.chunks)} in {list(self.file_shape)}, the array's "
                    f"shape is {list(self.shape)}"
                )
        self.decoded = self.dtype.itemsize * math.prod(self.chunks)
        if self.decoded > _MOST_DECODED:
            raise ValueError(f"chunks of {self.decoded} bytes")

    @property
    def tail_bytes(self) -> int:
        """Bytes at the end of a file that hold its fingerprint, index and checksum."""
        return FINGERPRINT_BYTES + 16 * self.count + CRC_BYTES if self.is_sharded else CRC_BYTES

    def encode(self, values: np.ndarray | BFloat16) -> bytes:
        """Encode the values of one chunk; at the array's edge they may be fewer."""
        if self._is_attention and (frame := causal_frame(self._attention(values))) is not None:
            return with_checksum(frame)
        content = self._whole(np.asarray(values, self._little))
        if self.is_text:
            content = VLenUTF8().encode(content)
        return with_checksum(bytes(self._compressor.encode(content)))

    def _attention(self, values: np.ndarray | BFloat16) -> np.ndarray | BFloat16:
        """Return a chunk ``(head, query, key)``; bfloat16 stays as it is."""
        if isinstance(values, BFloat16):
            return BFloat16(self._whole(values.bits).reshape(-1, *self.chunks[-2:]))
        return self._whole(np.asarray(values, self._little)).reshape(-1, *self.chunks[-2:])

    def _whole(self, values: np.ndarray) -> np.ndarray:
        """Return values that lie side by side, with zeros beyond the array's edge."""
        if values.shape == self.chunks:
            return np.ascontiguousarray(values)
        padded = np.full(self.chunks, "" if self.is_text else 0, values.dtype)
        padded[tuple(map(slice, values.shape))] = values
        return padded

    def decode(self, content: bytes) -> np.ndarray:
        """Decode a chunk; the values are valid until this thread decodes the next.

        Raises
        ------
        Exception
            An error of any type, where bytes are not the ones that were written.
        """
        compressed = checked(content)
        if self.is_text:
            _check_size(_zstd_size(compressed), None)
            content = self._compressor.decode(compressed)
            # Memory for all texts is allocated before the first is read.
            _check_size(int.from_bytes(content[:CRC_BYTES], "little"), math.prod(self.chunks))
            text: np.ndarray = VLenUTF8().decode(content)
            return text.reshape(self.chunks)
        room = _scratch(self.decoded)
        if self._is_blosc:
            # Header of C-Blosc: four bytes of versions and flags, then the sizes of the content, of
            # a block, and of all of it. C-Blosc believes the last, and reads beyond the chunk.
            _check_size(int.from_bytes(compressed[4:8], "little"), self.decoded)
            _check_size(int.from_bytes(compressed[12:16], "little"), len(compressed))
            blosc.decompress(compressed, room)
        else:
            _check_size(_zstd_size(compressed), self.decoded)
            self._compressor.decode(compressed, room)
        return np.frombuffer(room, self._little).reshape(self.chunks)


def with_checksum(compressed: bytes) -> bytes:
    """Return a compressed chunk as it is stored."""
    return compressed + int(google_crc32c.value(compressed)).to_bytes(CRC_BYTES, "little")


def checked(content: bytes | memoryview) -> memoryview:
    """Return what a checksum at the end protects.

    Raises
    ------
    ValueError
        If it is another checksum.
    """
    if google_crc32c.value(content) != _CHECKED:
        raise ValueError("its checksum is another")
    return memoryview(content)[:-CRC_BYTES]


def _zstd_size(content: memoryview) -> int:
    """Return how many bytes a Zstandard frame claims to hold (RFC 8878, 3.1.1.1)."""
    descriptor = content[4]
    width = (descriptor >> 5 & 1, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not descriptor & 32) + (0, 1, 2, 4)[descriptor & 3]
    if not width:
        raise ValueError("it does not say how much it holds")
    return int.from_bytes(content[start : start + width], "little") + (256 if width == 2 else 0)


def _check_size(claimed: int, size: int | None) -> None:
    if (claimed > _MOST_TEXT) if size is None else (claimed != size):
        raise ValueError(f"it claims to hold {claimed} bytes")


def _scratch(size: int) -> np.ndarray:
    """Return this thread's memory for a chunk: fresh memory costs as much time as decoding."""
    room: np.ndarray | None = getattr(_LOCAL, "room", None)
    if room is None or room.size < size:
        room = _LOCAL.room = np.empty(size, np.uint8)
    return room[:size]
