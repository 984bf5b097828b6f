"""Encoding and decoding chunks as their array's metadata says; every chunk ends in a CRC-32C."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc, VLenUTF8, Zstd, blosc

from zarrtrace.format.layout import NO_ID, ArrayLayout
from zarrtrace.records import BFloat16

#: Bytes of a checksum, at the end of what it is of.
CRC_BYTES = 4
#: Bytes of a file's fingerprint, which stands before the index of its chunks.
FINGERPRINT_BYTES = 8

_CRC = {"name": "crc32c"}
_TEXT = {"name": "vlen-utf8"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = {"name": "bytes"}  # types of one byte have no order of bytes
_ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
_INDEX_CODECS = [_BYTES, _CRC]
# Left to itself, Blosc compresses 32 KiB at once: a third more time, and twice as much to read.
_BLOSC_BLOCK = 2**19
# A decoded chunk, or a text, above these sizes is damage: it is refused before memory is allocated.
_MOST_DECODED, _MOST_TEXT = 2**31, 2**28
# Highest level of Zstandard.
_MOST_LEVEL = 22
_TYPES = ("bool", "float16", "float32", "int64", "string", "uint32", "uint64")
_FIELDS = {"attributes", "chunk_grid", "chunk_key_encoding", "codecs", "data_type",
           "dimension_names", "fill_value", "node_type", "shape", "storage_transformers",
           "zarr_format"}  # fmt: skip
# Attributes by which xarray computes other numbers from those that are stored.
_SCALED = {"scale_factor", "add_offset", "_FillValue", "missing_value", "dtype", "_Unsigned",
           "units", "calendar"}  # fmt: skip
# CRC-32C of anything that is followed by its own CRC-32C.
_CHECKED = 0x48674BC7

_LOCAL = threading.local()


def codecs_of(layout: ArrayLayout) -> list[dict[str, Any]]:
    """Return the codecs of an array's chunks, as ``zarr.json`` lists them."""
    if layout.codec == "attention":
        options = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": _BLOSC_BLOCK}
        typesize = np.dtype(layout.dtype).itemsize
        return [_BYTES, {"name": "blosc", "configuration": {"typesize": typesize, **options}}, _CRC]
    if layout.dtype == "string":
        return [_TEXT, _ZSTD, _CRC]
    return [_ONE_BYTE if layout.dtype == "bool" else _BYTES, _ZSTD, _CRC]


def sharding(layout: ArrayLayout) -> list[dict[str, Any]]:
    """Return the codec of files that hold many chunks and an index at their end."""
    configuration = {
        "chunk_shape": list(layout.chunks),
        "codecs": codecs_of(layout),
        "index_codecs": _INDEX_CODECS,
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


class ArrayEncoding:
    """How an array is cut and encoded.

    Parameters
    ----------
    metadata
        The array's ``zarr.json``.

    Attributes
    ----------
    shape, dtype, fill
        Of the array; `is_text` tells whether it holds text.
    file_shape, chunks, is_sharded
        Shape of what one file holds and of a chunk, and whether files hold several chunks.
    grid, strides, count
        Chunks of a file along each dimension, distance from one to the next, and their number.
    decoded
        Bytes of a decoded chunk.

    Raises
    ------
    ValueError, KeyError, TypeError, AttributeError, LookupError, OverflowError
        If it is encoded in another way than zarrtrace does.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        _refuse_foreign(metadata)
        self.shape = _whole_numbers(metadata["shape"])
        self.is_text = metadata["data_type"] == "string"
        self.dtype = np.dtype(object if self.is_text else metadata["data_type"])
        self.fill: Any = _fill(metadata["fill_value"], self.dtype)
        self.file_shape = _whole_numbers(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = metadata["codecs"]
        self.chunks, self.is_sharded = self.file_shape, codecs[0]["name"] == "sharding_indexed"
        if self.is_sharded:
            outer = codecs[0]["configuration"]
            index_codecs = _plain(outer["index_codecs"])
            if (len(codecs), outer["index_location"], index_codecs) != (1, "end", _INDEX_CODECS):
                raise ValueError("another kind of shard")
            self.chunks = _whole_numbers(outer["chunk_shape"])
            codecs = outer["codecs"]
        codecs = _plain(codecs)
        if codecs[-1] != _CRC or len(codecs) != 3:
            raise ValueError("other codecs than zarrtrace's")
        serializer, compressor, _ = codecs
        if serializer not in ([_TEXT] if self.is_text else [_BYTES, _ONE_BYTE]) or (
            serializer == _ONE_BYTE and self.dtype.itemsize > 1
        ):
            raise ValueError("another serializer")
        self._is_blosc = compressor["name"] == "blosc"
        if not self._is_blosc and compressor["name"] != "zstd":
            raise ValueError(f"unknown codec {compressor['name']!r}")
        self._compressor: Any = _compressor(compressor, self.dtype.itemsize)
        self._check_sizes()
        self.grid = tuple(f // c for f, c in zip(self.file_shape, self.chunks, strict=True))
        self.strides = tuple(math.prod(self.grid[at + 1 :]) for at in range(len(self.grid)))
        self.count = math.prod(self.grid)
        self.decoded = self.dtype.itemsize * math.prod(self.chunks)
        if self.decoded > _MOST_DECODED:
            raise ValueError(f"chunks of {self.decoded} bytes")
        self._little = self.dtype.newbyteorder("<")

    def _check_sizes(self) -> None:
        """Refuse chunks larger than the array, and files that do not hold whole chunks of it."""
        for size, file, chunk in zip(self.shape, self.file_shape, self.chunks, strict=True):
            most = max(size, 1)
            if not 1 <= chunk <= most or file % chunk or not 1 <= file <= -(-most // chunk) * chunk:
                raise ValueError(
                    f"chunk_shape {list(self.chunks)} in {list(self.file_shape)}, the array's "
                    f"shape is {list(self.shape)}"
                )

    @property
    def tail_bytes(self) -> int:
        """Bytes at the end of a file that hold its fingerprint, index and checksum."""
        return FINGERPRINT_BYTES + 16 * self.count + CRC_BYTES if self.is_sharded else CRC_BYTES

    def encode(self, values: np.ndarray | BFloat16) -> bytes:
        """Encode the values of one chunk; at the array's edge they may be fewer."""
        content = np.ascontiguousarray(values, self._little)
        if content.shape != self.chunks:
            padded = np.full(self.chunks, "" if self.is_text else 0, self._little)
            padded[tuple(map(slice, content.shape))] = content
            content = padded
        if self.is_text:
            content = VLenUTF8().encode(content)
        return with_checksum(bytes(self._compressor.encode(content)))

    def decode(self, content: bytes) -> np.ndarray:
        """Decode a chunk; the values are valid until this thread decodes the next.

        Raises
        ------
        Exception
            Of any type, where bytes are not the ones that were written.
        """
        compressed = checked(content)
        if self.is_text:
            _check_size(_zstd_size(compressed), None)
            content = self._compressor.decode(compressed)
            # Memory for so many texts is allocated before the first is read.
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


def _refuse_foreign(metadata: Mapping[str, Any]) -> None:
    """Refuse what would change the meaning of bytes or numbers, and zarrtrace never writes."""
    if metadata["zarr_format"] != 3 or metadata["node_type"] != "array":
        raise ValueError("not an array of Zarr's format 3")
    if unknown := sorted(metadata.keys() - _FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r}")
    if metadata["data_type"] not in _TYPES:
        raise ValueError(f"data_type {metadata['data_type']!r}")
    key = metadata["chunk_key_encoding"]
    if key != {"name": "default", "configuration": {"separator": "."}}:
        raise ValueError(f"chunk_key_encoding is {key}")
    if metadata["chunk_grid"]["name"] != "regular":
        raise ValueError(f"chunk_grid is {metadata['chunk_grid']['name']!r}")
    if metadata.get("storage_transformers"):
        raise ValueError("it has storage_transformers")
    if found := sorted(_SCALED & {*metadata["attributes"]}):
        raise ValueError(f"attribute {found[0]!r} would change its numbers")


def _whole_numbers(sizes: Any) -> tuple[int, ...]:
    """Return sizes as they stand in JSON: no fractions, no truth values, no text."""
    if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"sizes {sizes!r}")
    return tuple(sizes)


def _fill(value: Any, dtype: np.dtype[Any]) -> Any:
    """Return the value of what is not stored: NaN, no text, false, 0 or no id."""
    if dtype.kind == "f" and value == "NaN":
        return dtype.type(math.nan)
    kinds: dict[str, list[Any]] = {"O": [""], "b": [False], "f": []}
    known = kinds.get(dtype.kind, [0, NO_ID])
    if not any(value == one and type(value) is type(one) for one in known):
        raise ValueError(f"fill_value {value!r}")
    return value if dtype.kind == "O" else dtype.type(value)


def _compressor(codec: Mapping[str, Any], itemsize: int) -> Any:
    """Return the codec of numcodecs."""
    options = codec["configuration"]
    is_blosc = codec["name"] == "blosc"
    level, block = options["clevel" if is_blosc else "level"], options.get("blocksize", 1)
    expected = (
        {"typesize": itemsize, "cname": "zstd", "shuffle": "shuffle", "clevel": level}
        if is_blosc
        else {"level": level, "checksum": False}
    )
    if (
        options != (expected | {"blocksize": block} if is_blosc else expected)
        or any(type(size) is not int or size < 1 for size in (level, block))
        or level > _MOST_LEVEL
        or block > _MOST_DECODED
    ):
        raise ValueError(f"codec with {options!r}")
    if not is_blosc:
        return Zstd(level=level)
    return Blosc(cname="zstd", clevel=level, shuffle=Blosc.SHUFFLE, blocksize=block)


def _plain(codecs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out configurations that are empty."""
    return [{k: v for k, v in codec.items() if k == "name" or v} for codec in codecs]


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
