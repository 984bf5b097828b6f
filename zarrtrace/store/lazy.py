"""Reading arrays lazily: exactly the chunks that hold the answer, several at a time.

Zarr reads the same. It is done here because one row of attention in every layer is many small
chunks, and Zarr's way through its event loop costs more time than decoding them (README.md has the
figures). Arrays with other codecs than ours are left to Zarr.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import VLenUTF8, Zstd, blosc
from xarray.backends import BackendArray
from xarray.core import indexing

from zarrtrace.errors import IntegrityError
from zarrtrace.store.attributes import REPAIR

_MISSING = 2**64 - 1
_TEXT = [{"name": "vlen-utf8", "configuration": {}}, {"name": "vlen-utf8"}]
#: What no chunk exceeds, nor the text of one; what claims more is refused unread.
_MAX_CHUNK, _MAX_TEXT = 2**31, 2**28
#: Gets the bytes and, but for text, how many must come out. What comes out of a compressed chunk
#: is good until this thread decodes the next.
Decode = Callable[[bytes, int | None], Any]

#: Along one dimension: the number of a chunk, where its part goes, and which part of it.
Part = tuple[int, slice | np.ndarray, slice | np.ndarray]

_LOCAL = threading.local()


class StoredArray(BackendArray):
    """One array of a trace, for xarray to index.

    Parameters
    ----------
    path
        Folder of the array.
    metadata
        Its ``zarr.json``.

    Raises
    ------
    ValueError
        If it is encoded in another way than zarrtrace does.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path = str(path)
        self.shape = tuple(map(int, metadata["shape"]))
        self._text = metadata["data_type"] == "string"
        self.dtype = np.dtype(object if self._text else metadata["data_type"])
        fill = metadata["fill_value"]
        self._fill: Any = fill if self._text else np.array(fill, dtype=self.dtype)[()]
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
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        plain = {"name": "bytes"}  # of one byte a value
        if codecs[0] not in (_TEXT if self._text else [little, plain]):
            raise ValueError("another serializer")
        self._decoders = [_DECODERS[codec["name"]] for codec in reversed(codecs[1:])]

    def __dask_tokenize__(self) -> tuple[str, str, int]:
        """Name what is read, so that dask may tell whether two graphs read the same."""
        return ("zarrtrace", self._path, os.stat(f"{self._path}/zarr.json").st_mtime_ns)  # noqa: PTH116

    def __getitem__(self, key: Any) -> Any:
        """Index as xarray asks."""
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def load(self) -> np.ndarray:
        """Read all of it."""
        return self._read((slice(None),) * len(self.shape))

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        key = tuple(_counted(one, size) for one, size in zip(key, self.shape, strict=True))
        parts = [
            list(_parts(one, size, chunk))
            for one, size, chunk in zip(key, self.shape, self.chunks, strict=True)
        ]
        shape = [_length(one, size) for one, size in zip(key, self.shape, strict=True)]
        out = np.empty(shape, self.dtype)
        pieces = list(itertools.product(*parts))
        # In a thread of somebody's, dask's or a server's, others read beside this one already.
        threads = (
            (os.cpu_count() or 1) if threading.current_thread() is threading.main_thread() else 1
        )
        step = max(1, -(-len(pieces) // (2 * threads)))
        groups = [pieces[start : start + step] for start in range(0, len(pieces), step)]
        if threads < 2 or len(groups) < 2:
            for group in groups:
                self._fetch(group, out)
        else:
            list(_pool(os.getpid()).map(lambda group: self._fetch(group, out), groups))
        squeezed = tuple(0 if isinstance(one, int | np.integer) else slice(None) for one in key)
        found: np.ndarray = out[squeezed]
        return found

    def _fetch(self, pieces: Sequence[tuple[Part, ...]], out: np.ndarray) -> None:
        """Read some chunks and put their parts where they belong."""
        for file, of_file in itertools.groupby(pieces, self._file):
            with _Shard(f"{self._path}/c/{'/'.join(map(str, file))}") as opened:
                for piece in of_file:
                    target = _outer([into for _, into, _ in piece])
                    chunk = self._chunk(opened, [number for number, _, _ in piece])
                    out[target] = (
                        self._fill if chunk is None else chunk[_outer([of for _, _, of in piece])]
                    )

    def _file(self, piece: Sequence[Part]) -> tuple[int, ...]:
        return tuple(
            number * chunk // size
            for (number, _, _), chunk, size in zip(piece, self.chunks, self.file_shape, strict=True)
        )

    def _chunk(self, file: _Shard, place: Sequence[int]) -> np.ndarray | None:
        """Return a chunk's values; None if it is left out, which stands for the fill value."""
        grid = [size // chunk for size, chunk in zip(self.file_shape, self.chunks, strict=True)]
        inside = [at % count for at, count in zip(place, grid, strict=True)]
        try:
            content = file.read(None if self.shards is None else (inside, grid))
            if content is None:
                return None
            size = None if self._text else self.dtype.itemsize * math.prod(self.chunks)
            for decode in self._decoders:
                content = decode(content, size)
            if self._text:
                text: np.ndarray = VLenUTF8().decode(content)
                return text
            return np.frombuffer(content, self.dtype.newbyteorder("<")).reshape(self.chunks)
        except IntegrityError:
            raise
        except Exception as error:  # codecs raise what they like
            at = "/".join(map(str, place))
            raise IntegrityError(
                f"{file.path}: chunk {at} cannot be decoded: {error}",
                why="Its bytes are not the ones that were written.",
                remedy=REPAIR,
            ) from error


def stored_array(path: Path) -> tuple[StoredArray, dict[str, Any]] | None:
    """Return an array and its metadata; None if it is encoded in another way than ours."""
    metadata = json.loads((path / "zarr.json").read_bytes())
    try:
        return StoredArray(path, metadata), metadata
    except (ValueError, KeyError, TypeError):
        return None


def as_lazy(array: StoredArray) -> Any:
    """Wrap an array as xarray's own backends do: lazy, read once, and safe to assign to."""
    lazy: Any = indexing.LazilyIndexedArray(array)
    cached: Any = indexing.MemoryCachedArray
    return cached(indexing.CopyOnWriteArray(lazy))


class _Shard:
    """A file of an array, open: a shard or a chunk; a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._index: np.ndarray | None = None

    def __enter__(self) -> _Shard:
        try:
            self._handle: int | None = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            self._handle = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def read(self, place: tuple[Sequence[int], Sequence[int]] | None) -> bytes | None:
        """Return the bytes of a chunk, at a place in the shard's grid; None if it is left out."""
        if self._handle is None:
            return None
        size = os.fstat(self._handle).st_size
        if place is None:
            return os.pread(self._handle, size, 0)
        inside, grid = place
        if self._index is None:
            self._index = self._read_index(size, math.prod(grid))
        offset, length = self._index[np.ravel_multi_index(tuple(inside), tuple(grid))].tolist()
        return None if offset == _MISSING else os.pread(self._handle, length, offset)

    def _read_index(self, size: int, chunks: int) -> np.ndarray:
        assert self._handle is not None  # noqa: S101 -- read() has looked
        length = 16 * chunks + 4
        content = os.pread(self._handle, length, max(0, size - length))
        return np.frombuffer(_checked(content), "<u8").reshape(chunks, 2)


def _checked(content: bytes, _size: int | None = None) -> bytes:
    """Return what a checksum at the end protects.

    Raises
    ------
    ValueError
        If it is not what the checksum is of.
    """
    content, checksum = content[:-4], content[-4:]
    if google_crc32c.value(content) != int.from_bytes(checksum, "little"):
        raise ValueError("the checksum is another")
    return content


def _from_blosc(content: bytes, size: int | None) -> Any:
    # C-Blosc's header: four bytes of versions and flags, then the size of what is inside.
    _check_claim(int.from_bytes(content[4:8], "little"), size)
    return blosc.decompress(content, None if size is None else _scratch(size))


def _from_zstd(content: bytes, size: int | None) -> Any:
    _check_claim(_zstd_claims(content), size)
    # Verifies the checksum that frames carry.
    return Zstd().decode(content, None if size is None else _scratch(size))


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


_DECODERS: dict[str, Decode] = {"blosc": _from_blosc, "crc32c": _checked, "zstd": _from_zstd}


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return this process's threads: a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="zarrtrace-read")


def _counted(key: Any, size: int) -> Any:
    """Count indices from the beginning."""
    if isinstance(key, slice):
        return key
    at = np.asarray(key)
    counted = np.where(at < 0, at + size, at)
    return int(counted) if at.ndim == 0 else counted


def _length(key: Any, size: int) -> int:
    if isinstance(key, slice):
        return len(range(*key.indices(size)))
    return 1 if isinstance(key, int | np.integer) else len(key)


def _parts(key: Any, size: int, chunk: int) -> Iterator[Part]:
    """Cut an index along one dimension into parts that lie in one chunk each."""
    if isinstance(key, slice):
        chosen = range(*key.indices(size))
        if chosen.step == 1:
            for number in range(chosen.start // chunk, -(-chosen.stop // chunk)):
                first = max(chosen.start, number * chunk)
                last = min(chosen.stop, (number + 1) * chunk)
                into = slice(first - chosen.start, last - chosen.start)
                yield number, into, slice(first - number * chunk, last - number * chunk)
            return
        key = np.asarray(chosen)
    chosen_at = np.atleast_1d(np.asarray(key, dtype=np.int64))
    numbers = chosen_at // chunk
    for number in np.unique(numbers):
        into_at = np.flatnonzero(numbers == number)
        yield int(number), into_at, chosen_at[into_at] - number * chunk


def _outer(parts: Sequence[slice | np.ndarray]) -> Any:
    """Make an index that takes each dimension by itself."""
    if all(isinstance(part, slice) for part in parts):
        return tuple(parts)
    arrays = [part for part in parts if not isinstance(part, slice)]
    if len(arrays) == 1:
        return tuple(parts)
    # Several arrays: NumPy would take them together, so all become arrays of ranges.
    return np.ix_(
        *(np.arange(part.start, part.stop) if isinstance(part, slice) else part for part in parts)
    )
