"""Protocols of disks and object stores, and what their implementations share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from zarrtrace.errors import ConfigError


class Content(NamedTuple):
    """Bytes that were read, and the size of the whole file."""

    data: bytes
    size: int


class Backend(Protocol):
    """A disk or an object store, to read. A key that does not exist raises FileNotFoundError."""

    #: Whether it is a :class:`WritableBackend`, and whether it can list its keys.
    writable: bool
    listable: bool

    def get(self, key: str, last: int | None = None) -> Content:
        """Read a file, or its `last` bytes."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges ``[start, end)`` of a file."""

    def size(self, key: str) -> int:
        """Return the size of a file."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of every file below a folder, by key."""

    def children(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if it does not exist."""


class WritableBackend(Backend, Protocol):
    """A disk or an object store. Files are written whole or not at all."""

    def put(self, key: str, data: bytes | Path) -> None:
        """Write a file; the content of a file on a disk is read in parts."""

    def copy(self, source: str, target: str) -> None:
        """Copy a file within the store."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete files; those that do not exist are no error."""


def import_package(name: str, scheme: str) -> Any:
    """Import a package of the extra ``cloud`` that an address needs.

    Raises
    ------
    ConfigError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{scheme}:// needs {name}, which is not installed",
            why="Runs on a disk do not need it, so it is an extra.",
            remedy=f"Install it: pip install {name}. The extra 'cloud' names all such packages.",
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0]
