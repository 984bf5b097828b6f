"""Reading arrays lazily: exactly the chunks that hold the answer, several at a time.

Zarr reads the same. It is done here because one row of attention in every layer is many small
chunks, and Zarr's way through its event loop costs more time than decoding them (README.md has the
figures). Arrays with other codecs than ours are left to Zarr.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from zarrtrace.errors import IntegrityError
from zarrtrace.store.attributes import REPAIR, read_metadata
from zarrtrace.store.encoding import Encoding, checked
from zarrtrace.store.objects import Location, ObjectPath

MISSING = 2**64 - 1
#: Along one dimension: the number of a chunk, where its part goes, and which part of it.
Part = tuple[int, slice | np.ndarray, slice | np.ndarray]
#: Of a file in the grid of files.
Place = tuple[int, ...]
#: A file, and some of its chunks, by dimension.
Job = tuple[Place, list[tuple[Part, ...]]]

_THREADS = os.cpu_count() or 1
#: Into how many jobs the chunks of one file are cut, for threads to share.
_PORTIONS = 4 * _THREADS
#: What is decoded faster by one thread than it takes to wake others.
_FEW_BYTES = 2**19
#: How many columns are copied at once where rows do not lie together.
_COLUMNS = 256
_ENTRY = struct.Struct("<QQ")


class StoredArray(BackendArray):
    """One array of a trace, for xarray to index.

    Parameters
    ----------
    path
        Folder of the array.
    encoding
        How it is encoded.
    """

    def __init__(self, path: str | Location, encoding: Encoding) -> None:
        self._path = str(path)
        self.encoding = encoding
        self.shape, self.dtype = encoding.shape, encoding.dtype

    def __dask_tokenize__(self) -> tuple[str, str, int | str]:
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
        out = np.empty(
            [_length(one, size) for one, size in zip(key, self.shape, strict=True)], self.dtype
        )
        jobs = self._jobs(key)
        _each(
            lambda job: self._fetch(*job, out),
            jobs,
            self.encoding.decoded * sum(len(pieces) for _, pieces in jobs),
        )
        squeezed = tuple(0 if isinstance(one, int) else slice(None) for one in key)
        found: np.ndarray = out[squeezed]
        return found

    def _jobs(self, key: tuple[Any, ...]) -> list[Job]:
        """Return what to read: files, and which chunks of them, in portions of some chunks."""
        # By dimension: which files, and by file where in it chunks are and which parts of them.
        by_file: list[dict[int, list[Part]]] = []
        how = self.encoding
        for one, size, chunk, count, stride in zip(
            key, self.shape, how.chunks, how.grid, how.strides, strict=True
        ):
            files: dict[int, list[Part]] = {}
            for number, into, of in _parts(one, size, chunk):
                file, inside = divmod(number, count)
                files.setdefault(file, []).append((inside * stride, into, of))
            by_file.append(files)
        jobs = []
        portions = _PORTIONS if _alone() else 1
        for found in itertools.product(*(files.items() for files in by_file)):
            pieces = list(itertools.product(*(parts for _, parts in found)))
            place = tuple(file for file, _ in found)
            step = max(1, -(-len(pieces) // portions))
            jobs += [(place, pieces[at : at + step]) for at in range(0, len(pieces), step)]
        return jobs

    def _fetch(self, file: Place, pieces: Sequence[Sequence[Part]], out: np.ndarray) -> None:
        """Read some chunks of a file and put their parts where they belong."""
        with _File(f"{self._path}/c/{'/'.join(map(str, file))}") as opened:
            for piece in pieces:
                inside, into, of = zip(*piece, strict=True)
                chunk = self._chunk(opened, file, sum(inside))
                self._put(out, into, chunk, of)

    def _put(
        self,
        out: np.ndarray,
        into: Sequence[slice | np.ndarray],
        chunk: np.ndarray | None,
        of: Sequence[slice | np.ndarray],
    ) -> None:
        """Copy a part of a chunk to where it belongs."""
        if chunk is None:
            out[_outer(into)] = self.encoding.fill
            return
        part, columns = chunk[_outer(of)], into[-1]
        together = part.strides[-1] == part.itemsize or part.nbytes < _FEW_BYTES // 4
        if together or isinstance(columns, np.ndarray):
            out[_outer(into)] = part
            return
        # It lies column by column: many at once would fall out of the processor's cache.
        for start in range(0, part.shape[-1], _COLUMNS):
            stop = min(start + _COLUMNS, part.shape[-1])
            some = slice(columns.start + start, columns.start + stop)
            out[_outer([*into[:-1], some])] = part[..., start:stop]

    def _chunk(self, opened: _File, file: Place, number: int) -> np.ndarray | None:
        """Return a chunk's values; None if it is left out, which stands for the fill value."""
        how = self.encoding
        try:
            whole = how.shards is None
            content = opened.read() if whole else opened.part(number, how.count)
            return None if content is None else how.decode(content)
        except Exception as error:  # codecs raise what they like
            inside = np.unravel_index(number, how.grid)
            place = [at * count + by for at, count, by in zip(file, how.grid, inside, strict=True)]
            raise IntegrityError(
                f"{opened.path}: chunk {'/'.join(map(str, place))} cannot be decoded: {error}",
                why="Its bytes are not the ones that were written.",
                remedy=REPAIR,
            ) from error


def stored_array(
    path: Location, metadata: dict[str, Any] | None = None
) -> tuple[StoredArray, dict[str, Any]] | None:
    """Return an array and its metadata; None if it is encoded in another way than ours."""
    if metadata is None:
        metadata = read_metadata(path).metadata
    try:
        encoding = Encoding(metadata)
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(path, ObjectPath):
        from zarrtrace.store.remote import RemoteArray  # noqa: PLC0415 -- made of this

        return RemoteArray(path, encoding), metadata
    return StoredArray(path, encoding), metadata


def as_lazy(array: StoredArray) -> Any:
    """Wrap an array as xarray's own backends do: lazy, read once, and safe to assign to."""
    lazy: Any = indexing.LazilyIndexedArray(array)
    cached: Any = indexing.MemoryCachedArray
    return cached(indexing.CopyOnWriteArray(lazy))


class _File:
    """A file of an array, open: a shard or a chunk; a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._index: memoryview | None = None

    def __enter__(self) -> _File:
        try:
            self._handle: int | None = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            self._handle = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def read(self) -> bytes | None:
        """Return all of it; None if there is none."""
        if self._handle is None:
            return None
        return os.pread(self._handle, os.lseek(self._handle, 0, os.SEEK_END), 0)

    def part(self, number: int, parts: int) -> bytes | None:
        """Return the bytes of one of a shard's chunks; None if it is left out."""
        if self._handle is None:
            return None
        if self._index is None:
            length = 16 * parts + 4
            start = max(0, os.lseek(self._handle, 0, os.SEEK_END) - length)
            self._index = checked(os.pread(self._handle, length, start))
        offset, size = _ENTRY.unpack_from(self._index, 16 * number)
        return None if offset == MISSING else os.pread(self._handle, size, offset)


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return this process's threads: a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="zarrtrace-read")


def _each(do: Callable[[Job], object], jobs: Sequence[Job], decoded: int) -> None:
    """Do all jobs; several at a time if that pays."""
    if not _alone() or decoded < _FEW_BYTES or len(jobs) < 2:
        for job in jobs:
            do(job)
        return
    shares = [jobs[at :: 2 * _THREADS] for at in range(min(len(jobs), 2 * _THREADS))]
    list(_pool(os.getpid()).map(lambda share: list(map(do, share)), shares))


def _alone() -> bool:
    """Tell whether nobody reads beside this thread: in dask's and a server's, others do already."""
    return threading.current_thread() is threading.main_thread()


def _counted(key: Any, size: int) -> Any:
    """Count indices from the beginning; neighbours become a slice, which is faster to take."""
    if isinstance(key, slice):
        return key
    at = np.asarray(key)
    counted = np.where(at < 0, at + size, at)
    if ((counted < 0) | (counted >= size)).any():
        raise IndexError(f"index {key} is out of bounds for a dimension of size {size}")
    if at.ndim == 0:
        return int(counted)
    neighbours = len(at) > 0 and counted[0] + len(at) == counted[-1] + 1
    if neighbours and (np.diff(counted) == 1).all():
        return slice(int(counted[0]), int(counted[-1]) + 1)
    return counted


def _length(key: Any, size: int) -> int:
    if isinstance(key, slice):
        return len(range(*key.indices(size)))
    return 1 if isinstance(key, int | np.integer) else len(key)


def _parts(key: Any, size: int, chunk: int) -> Iterator[Part]:
    """Cut an index along one dimension into parts that lie in one chunk each."""
    if isinstance(key, int):
        key = slice(key, key + 1)
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
