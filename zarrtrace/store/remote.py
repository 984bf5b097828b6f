"""Reading arrays of traces in object stores, in few requests.

A shard takes two: its index, which is at its end, and the chunks that are wanted, together where
they are neighbours; one if most of it is wanted. Several files are read at a time. That files have
the sizes in the journal is seen from the answers, which say how large the object is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.spec import TraceAttributes
from zarrtrace.store.encoding import Encoding, checked
from zarrtrace.store.lazy import (
    MISSING,
    Part,
    Place,
    StoredArray,
    _counted,
    _File,
    _length,
)
from zarrtrace.store.objects import ObjectPath, at_once
from zarrtrace.store.regular import REPAIR

# From this share of a shard's chunks on, all of it is read at once.
_MOST = 0.5


class Files(NamedTuple):
    """What the journal says of the files of one array.

    Attributes
    ----------
    sizes
        By number of the layer (None: the array has no layers): of its files together.
    rows
        Those that are stored, if only some are.
    """

    sizes: Mapping[int | None, int]
    rows: frozenset[int] | None

    @classmethod
    def of(cls, name: str, first: str, attributes: TraceAttributes) -> Files:
        """Return what a trace's journal says of an array whose first dimension is `first`."""
        sizes = {
            attributes.index_of(int(key), first) if key.isdigit() else None: entry[name].bytes
            for key, entry in attributes.stored.items()
            if name in entry and key != "metadata"
        }
        some = attributes.queries if name in ("attention", "attention_mean") else None
        return cls(sizes, None if some is None else frozenset(some))


class RemoteArray(StoredArray):
    """One array of a trace in an object store, for xarray to index.

    Parameters
    ----------
    path
        Folder of the array.
    encoding
        How it is encoded.
    files
        What the journal says of it; None if nobody has looked.
    """

    def __init__(self, path: ObjectPath, encoding: Encoding, files: Files | None = None) -> None:
        super().__init__(path, encoding)
        self._folder, self._files = path, files

    def __dask_tokenize__(self) -> tuple[str, str, str]:
        """Name what is read, so that dask may tell whether two graphs read the same."""
        content = repr((self.encoding, self._files))
        token = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        return ("zarrtrace", str(self._folder), token)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        key = tuple(_counted(one, size) for one, size in zip(key, self.shape, strict=True))
        shape = [_length(one, size) for one, size in zip(key, self.shape, strict=True)]
        out = np.empty(shape, self.dtype)
        by_file: dict[Place, list[tuple[Part, ...]]] = {}
        for file, pieces in self._jobs(key):
            by_file.setdefault(file, []).extend(pieces)
        at_once(lambda file: self._fetch(file, by_file[file], out), by_file)
        squeezed = tuple(0 if isinstance(one, int) else slice(None) for one in key)
        found: np.ndarray = out[squeezed]
        return found

    def _fetch(self, file: Place, pieces: Sequence[Sequence[Part]], out: np.ndarray) -> None:
        """Read some chunks of a file and put their parts where they belong."""
        path = self._folder / f"c/{'/'.join(map(str, file))}"
        places = [tuple(zip(*piece, strict=True)) for piece in pieces]
        try:
            fetched = self._contents(path, file, [sum(inside) for inside, _, _ in places])
        except ValueError as error:
            raise _damaged(f"{path}: its index cannot be decoded: {error}") from error
        for inside, into, of in places:
            chunk = self._chunk(fetched, file, sum(inside))
            self._put(out, into, chunk, of)

    def _contents(self, path: ObjectPath, file: Place, numbers: Sequence[int]) -> _Fetched:
        """Get chunks, by their numbers in a file."""
        whole = self.encoding.shards is None or len(numbers) >= _MOST * self.encoding.count
        length = 16 * self.encoding.count + 4
        try:
            found = path.backend.get(path.key) if whole else path.backend.get_end(path.key, length)
        except FileNotFoundError:
            if self._must_be_there(file):
                raise _damaged(f"{path}: gone") from None
            return _Fetched(path, {})
        self._check_size(path, file, found.size)
        if self.encoding.shards is None:
            return _Fetched(path, {0: found.data})
        index = np.frombuffer(checked(found.data[-length:]), "<u8").reshape(self.encoding.count, 2)
        ranges = {
            number: (offset, offset + size)
            for number, (offset, size) in zip(numbers, index[numbers].tolist(), strict=True)
            if offset != MISSING
        }
        if any(end > found.size for _, end in ranges.values()):
            raise ValueError("it points beyond the end")
        if whole:
            chunks = [found.data[start:end] for start, end in ranges.values()]
        else:
            chunks = path.backend.get_ranges(path.key, list(ranges.values())) if ranges else []
        return _Fetched(path, dict(zip(ranges, chunks, strict=True)))

    def _layer(self, file: Place) -> int | None:
        assert self._files is not None  # noqa: S101 -- callers have looked
        return None if None in self._files.sizes else file[0]

    def _must_be_there(self, file: Place) -> bool:
        """Whether a file that is not there was lost, and not left out."""
        if self._files is None or self._layer(file) not in self._files.sizes:
            return False
        # Where only some rows are stored, a file is one row.
        return self._files.rows is None or file[-2] in self._files.rows

    def _check_size(self, path: ObjectPath, file: Place, found: int) -> None:
        if self._files is None:
            return
        with_layers = None not in self._files.sizes
        inner = zip(self.shape[with_layers:], self.encoding.file_shape[with_layers:], strict=True)
        written = self._files.sizes.get(self._layer(file))
        alone = all(size <= step for size, step in inner)
        if alone and written is not None and found != written:
            raise _damaged(f"{path}: has {found} bytes, not {written}")


class _Fetched(_File):
    """What was read of a file: all of it, or chunks by their numbers."""

    def __init__(self, path: ObjectPath, chunks: Mapping[int, bytes]) -> None:
        super().__init__(str(path))
        self._chunks = chunks

    def read(self) -> bytes | None:
        return self._chunks.get(0)

    def part(self, number: int, parts: int) -> bytes | None:
        del parts
        return self._chunks.get(number)


def _damaged(what: str) -> IntegrityError:
    return IntegrityError(
        what,
        why="Files were lost, cut short or replaced, for example by an interrupted copy.",
        remedy=REPAIR,
    )
