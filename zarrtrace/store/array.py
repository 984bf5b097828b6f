"""Reading arrays lazily: exactly the chunks that hold the answer, decoded by several threads.

Zarr reads the same. It is done here because one row of attention in every layer is many small
chunks, and Zarr's way through its event loop costs more time than decoding them (schema/README.md
has the figures), and because Zarr cannot notice that a file was exchanged for another one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.storage import Location
from zarrtrace.store.chunks import (
    Checksums,
    FileIndex,
    checksum_of,
    crc_of,
    file_key,
    read_index,
)
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.metadata import REPAIR, Group

#: Along one dimension: what is chosen, counted from the beginning.
Choice = range | np.ndarray
#: Along one dimension: the number of a chunk, where its part goes, and which part of it.
Part = tuple[int, slice | np.ndarray, slice | np.ndarray]
#: A chunk's number in its file, where its part goes, and which part of it.
Piece = tuple[int, tuple[slice | np.ndarray, ...], tuple[slice | np.ndarray, ...]]

_THREADS = os.cpu_count() or 1
# One thread decodes this much faster than others wake up.
_FEW_BYTES = 2**19


class StoredArray:
    """One array of a trace or an index, read chunk by chunk.

    Parameters
    ----------
    path
        Folder of the array.
    encoding
        How it is cut and encoded.
    checksums
        Size and checksum of each of its files; others do not exist.
    staged
        Index of each file of an array that is still being written.
    """

    def __init__(
        self,
        path: Location,
        encoding: ArrayEncoding,
        checksums: Checksums,
        staged: Mapping[str, FileIndex] | None = None,
    ) -> None:
        self.path, self.encoding, self.checksums = path, encoding, checksums
        self._staged = staged or {}

    def load(self) -> np.ndarray:
        """Read all of it.

        Raises
        ------
        IntegrityError
        """
        return self.read((slice(None),) * len(self.encoding.shape))

    def read(self, key: tuple[Any, ...]) -> np.ndarray:
        """Read what is chosen along each dimension by itself.

        Parameters
        ----------
        key
            For each dimension a number, a slice, or an array of numbers.

        Raises
        ------
        IntegrityError
            If a file is not the one that was there when the array was opened.
        IndexError
        """
        shape = self.encoding.shape
        choices = [_counted(one, size) for one, size in zip(key, shape, strict=True)]
        out = np.empty([len(one) for one in choices], self.encoding.dtype)
        by_file = self._pieces(choices)
        self.path.each(lambda file: self._read_file(file, by_file[file], out), by_file)
        squeezed = tuple(0 if isinstance(one, int | np.integer) else slice(None) for one in key)
        found: np.ndarray = out[squeezed]
        return found

    def _pieces(self, choices: Sequence[Choice]) -> dict[str, list[Piece]]:
        """Return which chunks of which files to read, by key of the file."""
        by_dimension: list[dict[int, list[Part]]] = []
        how = self.encoding
        for chosen, chunk, count, stride in zip(
            choices, how.chunks, how.grid, how.strides, strict=True
        ):
            files: dict[int, list[Part]] = {}
            for number, into, of in _parts(chosen, chunk):
                file, inside = divmod(number, count)
                files.setdefault(file, []).append((inside * stride, into, of))
            by_dimension.append(files)
        found: dict[str, list[Piece]] = {}
        for files_at in itertools.product(*(files.items() for files in by_dimension)):
            pieces = found.setdefault(file_key([file for file, _ in files_at]), [])
            for places in itertools.product(*(parts for _, parts in files_at)):
                number = sum(place for place, _, _ in places)
                goes_to = tuple(into for _, into, _ in places)
                pieces.append((number, goes_to, tuple(of for _, _, of in places)))
        return found

    def _read_file(self, key: str, pieces: Sequence[Piece], out: np.ndarray) -> None:
        """Read some chunks of a file and put their parts where they belong."""
        contents = self._contents(key, [number for number, _, _ in pieces])

        def put(piece: Piece) -> None:
            number, into, of = piece
            out[_outer(into)] = (
                self._decoded(key, number, contents[number])[_outer(of)]
                if number in contents
                else self.encoding.fill
            )

        if len(pieces) < 2 or self.encoding.decoded * len(pieces) < _FEW_BYTES:
            for piece in pieces:
                put(piece)
            return
        shares = [pieces[at :: 2 * _THREADS] for at in range(min(len(pieces), 2 * _THREADS))]
        for _ in _pool(os.getpid()).map(lambda share: list(map(put, share)), shares):
            pass

    def _contents(self, key: str, numbers: Sequence[int]) -> dict[int, bytes]:
        """Read the bytes of chunks that are stored, by their numbers in a file.

        Raises
        ------
        IntegrityError
            If the file is not the one that was there when the array was opened.
        """
        file, written, index = self.path / key, self.checksums.get(key), self._staged.get(key)
        try:
            if index is None:
                if written is None:
                    return {}
                if not self.encoding.is_sharded:
                    content = file.read()
                    written.refuse_other(checksum_of(content))
                    return {0: content}
                index = read_index(file, self.encoding)
                written.refuse_other(index.checksum)
            ranges = {number: index.range_of(number) for number in numbers}
            stored = {number: one for number, one in ranges.items() if one is not None}
            found = dict(zip(stored, file.read_ranges([*stored.values()]), strict=True))
            for number, crc in (index.crcs or {}).items():
                if number in found and crc_of(found[number]) != f"{crc:08x}":
                    raise ValueError(f"chunk {number} is not the one that the journal names")
        except (FileNotFoundError, ValueError) as error:
            gone = isinstance(error, FileNotFoundError)
            raise IntegrityError(
                f"{file}: {'is gone' if gone else error}",
                why="The run was replaced or removed since it was opened, or files were lost, cut "
                "short or exchanged.",
                remedy=f"Open it again; if that fails, too: {REPAIR}",
            ) from error
        return found

    def _decoded(self, key: str, number: int, content: bytes) -> np.ndarray:
        try:
            return self.encoding.decode(content)
        except Exception as error:  # codecs raise what they like
            place = list(map(int, np.unravel_index(number, self.encoding.grid)))
            raise IntegrityError(
                f"{self.path / key}: chunk {place} cannot be decoded: {error}",
                why="Its bytes are not the ones that were written.",
                remedy=REPAIR,
            ) from error


def open_array(
    group: Group[Any], name: str, staged: Mapping[str, FileIndex] | None = None
) -> StoredArray:
    """Return an array of a group, to be read; parameters as for :class:`StoredArray`."""
    return StoredArray(group.path / name, group.encodings[name], group.checksums[name], staged)


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return this process's threads: a fork has none of its parent's."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="zarrtrace-decode")


def _counted(key: Any, size: int) -> Choice:
    """Count indices from the beginning; neighbours become a range, which is faster to take."""
    if isinstance(key, slice):
        chosen = range(*key.indices(size))
        return chosen if chosen.step == 1 else np.asarray(chosen)
    at = np.atleast_1d(np.asarray(key, dtype=np.int64))
    counted = np.where(at < 0, at + size, at)
    if ((counted < 0) | (counted >= size)).any():
        raise IndexError(f"index {key} is out of bounds for a dimension of size {size}")
    if len(counted) and (np.diff(counted) == 1).all():
        return range(int(counted[0]), int(counted[-1]) + 1)
    return counted


def _parts(chosen: Choice, chunk: int) -> Iterator[Part]:
    """Cut what is chosen along one dimension into parts that lie in one chunk each."""
    if isinstance(chosen, range):
        for number in range(chosen.start // chunk, -(-chosen.stop // chunk)):
            first = max(chosen.start, number * chunk)
            last = min(chosen.stop, (number + 1) * chunk)
            into = slice(first - chosen.start, last - chosen.start)
            yield number, into, slice(first - number * chunk, last - number * chunk)
        return
    numbers = chosen // chunk
    for number in np.unique(numbers):
        into_at = np.flatnonzero(numbers == number)
        yield int(number), into_at, chosen[into_at] - number * chunk


def _outer(parts: Sequence[slice | np.ndarray]) -> Any:
    """Make an index that takes each dimension by itself."""
    arrays = [part for part in parts if not isinstance(part, slice)]
    if len(arrays) < 2:
        return tuple(parts)
    # NumPy would take several arrays together, so all become arrays of ranges.
    return np.ix_(
        *(np.arange(part.start, part.stop) if isinstance(part, slice) else part for part in parts)
    )
