"""How arrays are cut and encoded, and decoding their chunks.

What claims to hold more than a chunk is refused before memory is asked for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import VLenUTF8, Zstd, blosc

_TEXT = [{"name": "vlen-utf8", "configuration": {}}, {"name": "vlen-utf8"}]
#: What no chunk exceeds, nor the text of one; what claims more is refused unread.
_MAX_CHUNK, _MAX_TEXT = 2**31, 2**28
#: Gets the bytes and, but for text, how many must come out. What comes out of a compressed chunk
#: is good until this thread decodes the next.
Decode = Callable[[bytes, int | None], Any]

#: The CRC-32C of anything that is followed by its CRC-32C.
_CHECKED = 0x48674BC7
_ZSTD = Zstd()
_LOCAL = threading.local()


class Encoding:
    """How an array is cut and encoded: one object for all arrays that are alike.

    Parameters
    ----------
    metadata
        The array's ``zarr.json``.

    Attributes
    ----------
    shape, dtype, fill
        Of the array; `text` says whether it is of text.
    file_shape, chunks, shards
        Of what one file holds, of what is decoded at once, and of shards if there are any.
    order
        Of a chunk's dimensions in its bytes.
    decoders
        What to do to the bytes of a chunk, in order.
    grid, strides, count
        How many chunks a file has along each dimension, from one to the next, and in all.
    decoded, little
        Bytes of a chunk when it is decoded, and their type.

    Raises
    ------
    ValueError, KeyError, TypeError
        If it is encoded in another way than zarrtrace does.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.shape = tuple(map(int, metadata["shape"]))
        self.text = metadata["data_type"] == "string"
        self.dtype = np.dtype(object if self.text else metadata["data_type"])
        fill = metadata["fill_value"]
        self.fill: Any = fill if self.text else np.array(fill, dtype=self.dtype)[()]
        self.file_shape = tuple(map(int, metadata["chunk_grid"]["configuration"]["chunk_shape"]))
        self.chunks, self.shards = self.file_shape, None
        codecs = metadata["codecs"]
        if codecs[0]["name"] == "sharding_indexed":
            outer = codecs[0]["configuration"]
            names = [codec["name"] for codec in outer["index_codecs"]]
            if len(codecs) > 1 or outer["index_location"] != "end" or names != ["bytes", "crc32c"]:
                raise ValueError("another kind of shard")
            self.shards = self.file_shape
            self.chunks = tuple(map(int, outer["chunk_shape"]))
            codecs = outer["codecs"]
        self.order = tuple(range(len(self.chunks)))
        if codecs[0]["name"] == "transpose":
            self.order = tuple(map(int, codecs[0]["configuration"]["order"]))
            codecs = codecs[1:]
        self._axes = tuple(np.argsort(self.order).tolist())
        if sorted(self.order) != sorted(self._axes) or len(self.order) != len(self.chunks):
            raise ValueError("not an order of the dimensions")
        self._lies = tuple(self.chunks[at] for at in self.order)
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        plain = {"name": "bytes"}  # of one byte a value
        if codecs[0] not in (_TEXT if self.text else [little, plain]):
            raise ValueError("another serializer")
        self.decoders = [_DECODERS[codec["name"]] for codec in reversed(codecs[1:])]
        self.grid = [
            size // chunk for size, chunk in zip(self.file_shape, self.chunks, strict=True)
        ]
        self.strides = [math.prod(self.grid[at + 1 :]) for at in range(len(self.grid))]
        self.count = math.prod(self.grid)
        self.decoded = self.dtype.itemsize * math.prod(self.chunks)
        self.little = self.dtype.newbyteorder("<")

    def __repr__(self) -> str:
        """Write all that decides how bytes are read."""
        decoders = [decode.__name__ for decode in self.decoders]
        cut = (self.shape, self.dtype.str, self.fill, self.chunks, self.shards)
        said = (*cut, self.order, decoders)
        return f"Encoding{said}"

    def decode(self, content: bytes) -> np.ndarray:
        """Return the values of a chunk; codecs raise what they like."""
        for decode in self.decoders:
            content = decode(content, None if self.text else self.decoded)
        if self.text:
            text: np.ndarray = VLenUTF8().decode(content)
            return text
        return np.frombuffer(content, self.little).reshape(self._lies).transpose(self._axes)


def checked(content: bytes, _size: int | None = None) -> memoryview:
    """Return what a checksum at the end protects.

    Raises
    ------
    ValueError
        If it is not what the checksum is of.
    """
    # Of whatever ends in its own checksum: taken apart, the content would be copied.
    if google_crc32c.value(content) != _CHECKED:
        raise ValueError("the checksum is another")
    return memoryview(content)[:-4]


def _from_blosc(content: bytes, size: int | None) -> Any:
    # C-Blosc's header: four bytes of versions and flags, then the size of what is inside.
    _check_claim(int.from_bytes(content[4:8], "little"), size)
    return blosc.decompress(content, None if size is None else _scratch(size))


def _from_zstd(content: bytes, size: int | None) -> Any:
    _check_claim(_zstd_claims(content), size)
    # Verifies the checksum that frames carry.
    return _ZSTD.decode(content, None if size is None else _scratch(size))


def _zstd_claims(content: bytes) -> int:
    """Return how many bytes a Zstandard frame says it holds (RFC 8878, 3.1.1.1)."""
    descriptor = content[4]
    width = (descriptor >> 5 & 1, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not descriptor & 32) + (0, 1, 2, 4)[descriptor & 3]
    if not width:
        raise ValueError("it does not say how much it holds")
    return int.from_bytes(content[start : start + width], "little") + (256 if width == 2 else 0)


def _check_claim(claimed: int, size: int | None) -> None:
    """Refuse what claims to hold more, or less, than a chunk."""
    if (claimed > _MAX_TEXT) if size is None else (claimed != size or size > _MAX_CHUNK):
        wanted = "text" if size is None else f"{size} bytes"
        raise ValueError(f"it claims to hold {claimed} bytes, not {wanted}")


def _scratch(size: int) -> np.ndarray:
    """Return this thread's room for a chunk: fresh memory costs as much time as decoding."""
    room: np.ndarray | None = getattr(_LOCAL, "room", None)
    if room is None or room.size < size:
        room = _LOCAL.room = np.empty(size, np.uint8)
    return room[:size]


_DECODERS: dict[str, Decode] = {"blosc": _from_blosc, "crc32c": checked, "zstd": _from_zstd}
