"""What is asked of a disk or an object store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Content(NamedTuple):
    """Bytes that were read, and the size of the whole file."""

    data: bytes
    size: int


class Backend(Protocol):
    """A disk or an object store. A key that does not exist raises FileNotFoundError.

    Files are written whole or not at all.
    """

    #: Whether it can be written to, and whether it can list its keys.
    writable: bool
    listable: bool

    def get(self, key: str) -> Content:
        """Read a file."""

    def get_end(self, key: str, length: int) -> Content:
        """Read the last bytes of a file, at most `length`."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges ``[start, end)`` of a file."""

    def size(self, key: str) -> int:
        """Return the size of a file."""

    def put(self, key: str, data: bytes | Path) -> None:
        """Write a file; the content of a file on a disk is read in parts."""

    def copy(self, source: str, target: str) -> None:
        """Copy a file within the store."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete files; those that do not exist are no error."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size of every file below a folder, by key."""

    def children(self, prefix: str) -> list[str]:
        """Return the names in a folder, sorted; none if it does not exist."""

    def zarr_store(self) -> tuple[Any, str]:
        """Return a read-only store of zarr-python, and the prefix of its keys."""
