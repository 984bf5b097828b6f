"""Arrays of a trace on a disk whose files are checked when they are first read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.spec import NAMESPACE, Stored, TraceAttributes
from zarrtrace.store.attributes import METADATA, files_of
from zarrtrace.store.encoding import Encoding
from zarrtrace.store.files import fingerprint_of, size_of
from zarrtrace.store.lazy import Place, StoredArray
from zarrtrace.store.regular import REPAIR, read_regular


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
    stored
        By the journal's key: which of its files (those of a layer by its place, or None for all),
        and what the journal says of them.
    rows
        If only some rows are stored, which; a file is one row then.
    """

    trace: str
    name: str
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    metadata: Stored
    stored: dict[str, tuple[int | None, Stored]]
    rows: frozenset[int] | None

    @classmethod
    def of(
        cls, trace: str, name: str, encoding: Encoding, first: str, attributes: TraceAttributes
    ) -> Written:
        """Return what a trace's journal says of an array whose first dimension is `first`."""
        stored = {
            key: (attributes.index_of(int(key), first) if key.isdigit() else None, entry[name])
            for key, entry in attributes.stored.items()
            if name in entry and key != METADATA
        }
        metadata = attributes.stored[METADATA][name]
        chosen = attributes.queries if name in ("attention", "attention_mean") else None
        rows = None if chosen is None else frozenset(chosen)
        return cls(trace, name, encoding.shape, encoding.file_shape, metadata, stored, rows)

    def agrees_with(self, journal: Mapping[str, Any]) -> bool:
        """Tell whether the trace's journal, as it is now, says the same of the array."""
        said = {
            METADATA: self.metadata,
            **{key: stored for key, (_, stored) in self.stored.items()},
        }
        return all(
            Stored.model_validate(journal.get(key, {}).get(self.name)) == stored
            for key, stored in said.items()
        )

    def must_be_there(self, file: Sequence[int]) -> bool:
        """Whether a file, by its place in the grid of files, was written."""
        there = any(at in (None, file[0]) for at, _ in self.stored.values())
        return there and (self.rows is None or file[-2] in self.rows)

    def check(self) -> None:
        """Refuse an array whose files are gone, have another size, or whose metadata was changed.

        Raises
        ------
        IntegrityError
        """
        file = Path(self.trace, self.name, "zarr.json")
        try:
            same = fingerprint_of([read_regular(file)]) == self.metadata
        except FileNotFoundError:
            same = False
        if not same:
            raise IntegrityError(
                f"{file}: not the metadata that was written",
                why="The file was damaged, or edited by hand.",
                remedy=REPAIR,
            )
        for key, (at, written) in self.stored.items():
            found = size_of(self.trace, files_of(self.name, self.shape, self.file_shape, at))
            if found != written.bytes:
                of = f"layer {key}" if key.isdigit() else key
                raise IntegrityError(
                    f"{self.trace}: array {self.name!r} has {found} bytes on disk for {of}, "
                    f"not {written.bytes}",
                    why="Files were lost, cut short or replaced, for example by an interrupted "
                    "copy.",
                    remedy=REPAIR,
                )


class OpenedTrace:
    """A trace as it was when it was opened; shared by its arrays.

    Parameters
    ----------
    path
        Its folder.
    seal
        Hash of its attributes, of which the journal is one; None if it has none.
    """

    def __init__(self, path: str | Path, seal: str | None) -> None:
        self._file, self._seal = f"{path}/zarr.json", seal
        # The file's identity when all that it says was last seen to be what it said.
        self._seen: tuple[int, ...] | None = None

    def check(self, written: Written) -> None:
        """Refuse what was read of an array if its trace is not the one that was opened.

        Layers that were added since do not matter, nor what was written again as it was.

        Raises
        ------
        IntegrityError
        """
        try:
            found = os.stat(self._file)  # noqa: PTH116 -- at every read: no Path
            stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if self._seen == stamp:
                return
            now = json.loads(read_regular(Path(self._file)))["attributes"][NAMESPACE]
            if self._seal is not None and now.get("blake2b") == self._seal:
                self._seen = stamp
                return
            same = written.agrees_with(now["stored"])
        except FileNotFoundError:
            raise IntegrityError(
                f"{self._file}: gone",
                why="The run was removed or renamed since it was opened.",
                remedy="Open it again where it is now.",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            same = False
        if not same:
            raise IntegrityError(
                f"{written.trace}: was replaced or changed since it was opened",
                why="What is there now is not the trace that was opened; its numbers would be "
                "others.",
                remedy="Open it again; a 'zarrtrace view' has to be started again.",
            )


class CheckedArray(StoredArray):
    """An array of a trace whose files are checked before it is first read.

    Parameters
    ----------
    encoding
        How it is encoded.
    written
        What the journal says of it.
    trace
        Its trace; None while that is being opened.
    checked
        Whether somebody has looked at its files already.
    """

    def __init__(
        self,
        encoding: Encoding,
        written: Written,
        trace: OpenedTrace | None,
        *,
        checked: bool = False,
    ) -> None:
        super().__init__(f"{written.trace}/{written.name}", encoding)
        self.written, self._trace = written, trace
        self._unchecked = not checked

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        try:
            if self._unchecked:  # by several threads at once: each may look
                self.written.check()
                self._unchecked = False
            return super()._read(key)
        finally:
            # Afterwards: a trace that is still the one that was opened was it all the time.
            if self._trace is not None:
                self._trace.check(self.written)

    def _check_absent(self, path: str, file: Place) -> None:
        if self.written.must_be_there(file):
            raise IntegrityError(
                f"{path}: gone",
                why="It was lost or removed since the trace was opened.",
                remedy=REPAIR,
            )
