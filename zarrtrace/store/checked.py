"""Arrays of a trace on a disk whose files are checked when they are first read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.spec import Stored, TraceAttributes
from zarrtrace.store.attributes import METADATA, REPAIR, files_of
from zarrtrace.store.encoding import Encoding
from zarrtrace.store.files import fingerprint_of, size_of
from zarrtrace.store.lazy import StoredArray


class Written(NamedTuple):
    """What the journal says of one array.

    Attributes
    ----------
    trace, name
        Folder of the trace, and the array's name.
    shape, file_shape
        Of the array, and of what one file holds.
    metadata
        Of its zarr.json.
    bytes
        By the journal's key: which of its files (those of a layer by its place, or None for all),
        and their size.
    """

    trace: str
    name: str
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    metadata: Stored
    bytes: dict[str, tuple[int | None, int]]

    @classmethod
    def of(
        cls, trace: str, name: str, encoding: Encoding, first: str, attributes: TraceAttributes
    ) -> Written:
        """Return what a trace's journal says of an array whose first dimension is `first`."""
        sizes = {
            key: (
                attributes.index_of(int(key), first) if key.isdigit() else None,
                entry[name].bytes,
            )
            for key, entry in attributes.stored.items()
            if name in entry and key != METADATA
        }
        metadata = attributes.stored[METADATA][name]
        return cls(trace, name, encoding.shape, encoding.file_shape, metadata, sizes)

    def check(self) -> None:
        """Refuse an array whose files are gone, have another size, or whose metadata was changed.

        Raises
        ------
        IntegrityError
        """
        file = Path(self.trace, self.name, "zarr.json")
        # A pipe in its place would be waited for forever.
        if not file.is_file() or fingerprint_of([file.read_bytes()]) != self.metadata:
            raise IntegrityError(
                f"{file}: not the metadata that was written",
                why="The file was damaged, or edited by hand.",
                remedy=REPAIR,
            )
        for key, (at, written) in self.bytes.items():
            found = size_of(self.trace, files_of(self.name, self.shape, self.file_shape, at))
            if found != written:
                of = f"layer {key}" if key.isdigit() else key
                raise IntegrityError(
                    f"{self.trace}: array {self.name!r} has {found} bytes on disk for {of}, "
                    f"not {written}",
                    why="Files were lost, cut short or replaced, for example by an interrupted "
                    "copy.",
                    remedy=REPAIR,
                )


class CheckedArray(StoredArray):
    """An array of a trace whose files are checked before it is first read.

    Parameters
    ----------
    encoding
        How it is encoded.
    written
        What the journal says of it.
    """

    def __init__(self, encoding: Encoding, written: Written) -> None:
        super().__init__(f"{written.trace}/{written.name}", encoding)
        self.written = written
        self._unchecked = True

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        if self._unchecked:  # by several threads at once: each may look
            self.written.check()
            self._unchecked = False
        return super()._read(key)
