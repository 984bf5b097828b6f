"""Folders and files in object stores, addressed as ``s3://bucket/run``.

:class:`ObjectPath` has as much of :class:`pathlib.Path` as zarrtrace asks of a path, so that code
that does not care where a run is need not know. What an object store does otherwise is behind
:class:`Backend`: an object is there whole or not at all, there are no folders, nothing is renamed,
and every request takes time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from zarrtrace.errors import ConfigError, StoreError
from zarrtrace.text import without_secrets

#: How many requests a process has under way at most, multipart uploads aside.
REQUESTS_AT_ONCE = 16

_THREADS = "zarrtrace-requests"
_CREDENTIAL_WORDS = (
    "secret",
    "token",
    "password",
    "credential",
    "access_key",
    "account_key",
    "sas",
    "passphrase",
    "api_key",
    "pkey",
)

_In = TypeVar("_In")
_Out = TypeVar("_Out")


#: Stands for what an object holds, by names that its store knows; None where it has none.
Tag = tuple[tuple[str, str], ...] | None


class Content(NamedTuple):
    """Bytes that were read.

    Attributes
    ----------
    data
        What was asked for.
    size
        Of the whole object.
    tag
        Of the object as it is.
    """

    data: bytes
    size: int
    tag: Tag


class Changed(Exception):  # noqa: N818 -- an answer, not an error
    """The object is not, or no longer, what the caller took it for."""


class Backend(Protocol):
    """What is asked of an object store. A key that is not there raises FileNotFoundError."""

    #: Whether it can be written to, and whether it can say what there is.
    writable: bool
    listable: bool

    def get(self, key: str) -> Content:
        """Read an object."""

    def get_end(self, key: str, length: int) -> Content:
        """Read its last bytes."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read some ranges, from and up to; neighbours in one request."""

    def size(self, key: str) -> int:
        """Ask for an object's size."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whole or not at all."""

    def create(self, key: str, data: bytes) -> Tag:
        """Write one that is not there, and return its tag; raise Changed if it is."""

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag:
        """Write over the one that has a tag, and return the new one; raise Changed if it has not.

        A store that knows no such condition writes all the same.
        """

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the store."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return size by key of what begins with a prefix."""

    def children(self, prefix: str) -> list[str]:
        """Return the names in a folder: what follows its prefix, up to the next ``/``."""

    def zarr_store(self, *, read_only: bool) -> tuple[Any, str]:
        """Return a store of zarr-python's, and what keys begin with in it."""


@dataclass(frozen=True)
class ObjectPath:
    """A file or folder in an object store.

    Parameters
    ----------
    base
        Address of a folder, as ``s3://bucket``.
    key
        Path below it.
    options
        How to reach it: endpoint, region and so on; never credentials.
    """

    base: str
    key: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, address: str, options: Mapping[str, str] | None = None) -> ObjectPath:
        """Return the path of an address.

        Raises
        ------
        ConfigError
            If it names no folder, or an option looks like a credential.
        """
        scheme, _, rest = address.partition("://")
        shown = without_secrets(address)
        if shown != address and "?" not in address:
            raise _credential(f"the address {shown} holds a password or a key")
        parts = [part for part in rest.split("/") if part]
        # Of s3://bucket, nothing could lie beside the run: its lock does.
        if len(parts) < 2 or any(part in (".", "..") for part in parts) or "?" in address:
            raise ConfigError(
                f"{address}: not the address of a folder in an object store",
                why="A run has a name below a bucket, container or host.",
                remedy=f"Give an address such as {scheme}://bucket/runs/demo.",
            )
        for name in options or ():
            if any(word in name.lower() for word in _CREDENTIAL_WORDS):
                raise _credential(f"storage option {name!r} looks like a credential")
        given = tuple(sorted((str(name), str(value)) for name, value in (options or {}).items()))
        root = "/" if rest.startswith("/") else ""  # as in local:///folder
        return cls(f"{scheme}://{root}{'/'.join(parts[:-1])}", parts[-1], given)

    @property
    def backend(self) -> Backend:
        """The store, one a process and address."""
        return _backend(self.base, self.options, os.getpid())

    def __str__(self) -> str:
        return f"{self.base}/{self.key}" if self.key else self.base

    def __truediv__(self, name: str) -> ObjectPath:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        """The folder that it is in."""
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Return what has another name in the same folder."""
        return self.parent / name

    def absolute(self) -> ObjectPath:
        """Return itself."""
        return self

    resolve = absolute

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders are what keys make of them."""

    def read_bytes(self) -> bytes:
        """Read the object."""
        return self.backend.get(self.key).data

    def read_text(self, encoding: str, errors: str = "strict") -> str:
        """Read the object as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> None:
        """Write the object, whole or not at all.

        Raises
        ------
        LockedError
            If this process has lost the lock of the run that it is in.
        """
        check_guards(self)
        self.backend.put(self.key, data)

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.backend.size(self.key)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is anything below it; where that cannot be asked, a group of Zarr's."""
        if self.backend.listable:
            return bool(self.backend.children(f"{self.key}/" if self.key else ""))
        return (self / "zarr.json").is_file()

    def exists(self) -> bool:
        """Whether there is such an object, or anything below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield what is in the folder.

        Raises
        ------
        StoreError
            If the store cannot list.
        """
        _refuse_unlistable(self)
        for name in self.backend.children(f"{self.key}/" if self.key else ""):
            yield self / name

    def files(self) -> dict[str, int]:
        """Return the size of everything below it, by its path from here.

        Raises
        ------
        StoreError
            If the store cannot list.
        """
        _refuse_unlistable(self)
        prefix = f"{self.key}/"
        return {key.removeprefix(prefix): size for key, size in self.backend.sizes(prefix).items()}


def _credential(what: str) -> ConfigError:
    return ConfigError(
        what,
        why="What stands on a command line or in a notebook is read by others.",
        remedy="Put credentials into the environment, as AWS_SECRET_ACCESS_KEY.",
    )


def _refuse_unlistable(path: ObjectPath) -> None:
    if not path.backend.listable:
        raise StoreError(
            f"{path}: cannot be listed",
            why="A web server says what an address holds, not which addresses there are.",
            remedy="Give the address of the bucket, or copy the run to a disk.",
        )


#: Where something is: on a disk or in an object store.
Location = Path | ObjectPath


def locate(address: str | Location, storage_options: Mapping[str, str] | None = None) -> Location:
    """Return where an address leads to.

    Parameters
    ----------
    address
        A path, or an address such as ``s3://bucket/run``; ``gs://``, ``az://``, ``https://`` (to
        read), ``memory://`` (of this process), and whatever fsspec knows.
    storage_options
        How to reach the store, as obstore or fsspec name it: ``{"endpoint": "http://…"}``.
        Credentials are taken from the environment alone.

    Raises
    ------
    ConfigError
        If the address names no folder, or an option is a credential.
    """
    if isinstance(address, ObjectPath | Path):
        return address
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    return ObjectPath.of(address, storage_options) if "://" in address else Path(address)


def zarr_place(path: Location) -> Any:
    """Return what zarr-python opens to read what is there."""
    if isinstance(path, Path):
        return path
    from zarr.storage import StorePath  # noqa: PLC0415 -- half a second

    store, prefix = path.backend.zarr_store(read_only=True)
    return StorePath(store, f"{prefix}{path.key}")


def at_once(call: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
    """Call a function for each item, some at a time: requests spend their time waiting."""
    if threading.current_thread().name.startswith(_THREADS):  # waiting for its like might not end
        return list(map(call, items))
    return list(_pool(os.getpid()).map(call, items))


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix=_THREADS)


@cache
def _backend(base: str, options: tuple[tuple[str, str], ...], _process: int) -> Backend:
    from zarrtrace.store.backends import connect  # noqa: PLC0415 -- an extra, and slow to import

    return connect(base, dict(options))


# By address of a folder: raises if this process must no longer write below it.
_guards: dict[str, Callable[[], None]] = {}


def guard(path: ObjectPath, check: Callable[[], None]) -> None:
    """Have a function called before anything is written below a folder, or beside it for it."""
    _guards[str(path)] = check


def unguard(path: ObjectPath) -> None:
    """End what :func:`guard` began."""
    _guards.pop(str(path), None)


def check_guards(path: ObjectPath) -> None:
    """Raise if this process must no longer write there."""
    for folder, check in tuple(_guards.items()):
        parent, _, name = folder.rpartition("/")
        if str(path).startswith((f"{folder}/", f"{parent}/.{name}.")):
            check()
