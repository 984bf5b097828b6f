"""Where files are: a path on a disk, or an address such as ``s3://bucket/run``."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from zarrtrace.errors import ConfigError, StoreError
from zarrtrace.storage.backend import Backend, Content, WritableBackend
from zarrtrace.storage.disk import Disk, refuse_link_out
from zarrtrace.storage.fsspec_files import FsspecFiles
from zarrtrace.storage.object_store import SCHEMES, ObjectStore
from zarrtrace.text import without_secrets

#: Number of requests a process makes at once, multipart uploads aside.
REQUESTS_AT_ONCE = 16

_THREADS = "zarrtrace-requests"
_CREDENTIAL = re.compile(
    "secret|token|password|credential|access_key|account_key|api_key|passphrase|pkey|sas",
    re.IGNORECASE,
)

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Location:
    """A file or folder on a disk or in an object store.

    Parameters
    ----------
    base
        Address of a folder in an object store, such as ``s3://bucket``; empty on a disk.
    key
        Path below it; on a disk, the path.
    options
        How to reach the store: endpoint, region and so on; never credentials.
    """

    base: str
    key: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def backend(self) -> Backend:
        """The disk or the store: one object a process and address."""
        return _backend(self.base, self.options, os.getpid())

    @property
    def path(self) -> Path | None:
        """The path on a disk; None in an object store."""
        return None if self.base else Path(self.key)

    def __str__(self) -> str:
        return "/".join(part for part in (self.base, self.key) if part)

    def __fspath__(self) -> str:
        """Return the path on a disk, for Python's own functions."""
        if self.base:
            raise TypeError(f"{self}: is not on a disk")
        return self.key

    def __truediv__(self, name: str) -> Location:
        return replace(self, key=f"{self.key.rstrip('/')}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> Location:
        """The folder that it is in."""
        if not self.base:
            return replace(self, key=str(Path(self.key).parent))
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> Location:
        """Return a location of another name in the same folder."""
        return self.parent / name

    def resolved(self) -> Location:
        """Return the absolute path, links followed; an address is returned as it is.

        Raises
        ------
        StoreError
            If it is a link that leads to itself.
        """
        if self.base:
            return self
        try:
            return replace(self, key=str(Path(self.key).resolve()))
        except (OSError, RuntimeError) as error:
            raise StoreError(
                f"{self}: cannot be followed: {error}",
                why="It is, or is behind, a link that leads to itself.",
                remedy="Remove the link, or give the path of a folder.",
            ) from error

    def inside(self, folder: Location) -> Location:
        """Return this location, from which no link leads out of a folder that it is in.

        Raises
        ------
        IntegrityError
            If one does.
        """
        if not self.base:
            refuse_link_out(self.key, folder.key)
        return self

    def read(self) -> bytes:
        """Read the file."""
        return self.backend.get(self.key).data

    def read_end(self, length: int) -> Content:
        """Read the last bytes of the file, at most `length`."""
        return self.backend.get(self.key, length)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges ``[start, end)`` of the file."""
        return self.backend.get_ranges(self.key, ranges) if ranges else []

    def size(self) -> int:
        """Return the size of the file."""
        return self.backend.size(self.key)

    def write(self, data: bytes | Path) -> None:
        """Write the file, whole or not at all; a path stands for the content of that file."""
        self.writable_backend().put(self.key, data)

    def writable_backend(self) -> WritableBackend:
        """Return the backend to write to.

        Raises
        ------
        ConfigError
            If it is a web server or one of fsspec's, which are only read.
        """
        if not self.backend.writable:
            raise ConfigError(
                f"{self}: such addresses are read only",
                why="zarrtrace writes to disks, Amazon S3, Google Cloud Storage and Azure.",
                remedy="Write to a disk, or to the bucket behind a web server, as "
                "s3://bucket/run; other tools can copy a run from a disk to anywhere.",
            )
        return cast("WritableBackend", self.backend)

    def is_file(self) -> bool:
        """Whether there is such a file."""
        if (path := self.path) is not None:
            return path.is_file()
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def is_folder(self) -> bool:
        """Whether there is anything below it; where that cannot be asked, a Zarr group."""
        if (path := self.path) is not None:
            return path.is_dir()
        if self.backend.listable:
            return bool(self.backend.children(self.key))
        return (self / "zarr.json").is_file()

    def exists(self) -> bool:
        """Whether there is such a file, or anything below it."""
        if (path := self.path) is not None:
            return path.exists()
        return self.is_file() or self.is_folder()

    def children(self) -> Iterator[Location]:
        """Yield what is in the folder, sorted by name.

        Raises
        ------
        StoreError
            If the store cannot list.
        """
        self._refuse_unlistable()
        for name in self.backend.children(self.key):
            yield self / name

    def present(self, names: Sequence[str]) -> list[str]:
        """Return which names may be in the folder: all of them if the store cannot list.

        To ask for each of a million scenarios that are not there would take a minute.
        """
        if not self.backend.listable:
            return list(names)
        there = set(self.backend.children(self.key))
        return [name for name in names if name in there]

    def each(self, call: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
        """Call a function that reads or writes below here for each item.

        In an object store some calls run at the same time, because requests mostly wait.
        """
        # A thread that waited for its own pool would hang.
        if self.path is not None or threading.current_thread().name.startswith(_THREADS):
            return list(map(call, items))
        return list(_pool(os.getpid()).map(call, items))

    def files(self) -> dict[str, int]:
        """Return the size of every file below the folder, by its path from here.

        Raises
        ------
        StoreError
            If the store cannot list.
        """
        self._refuse_unlistable()
        start = len(self.key) + 1 if self.key else 0
        return {key[start:]: size for key, size in self.backend.sizes(self.key).items()}

    def _refuse_unlistable(self) -> None:
        if not self.backend.listable:
            raise StoreError(
                f"{self}: cannot be listed",
                why="A web server says what an address holds, not which addresses there are.",
                remedy="Give the address of the bucket, or copy the run to a disk.",
            )


#: A path, an address such as ``s3://bucket/run``, or a location.
Address = str | os.PathLike[str]


def locate(address: Address, storage_options: Mapping[str, str] | None = None) -> Location:
    """Return the location of a path or an address.

    Parameters
    ----------
    address
        A path, or an address such as ``s3://bucket/run``; ``gs://``, ``az://``, ``https://`` (to
        read), ``memory://`` (of this process), and others that fsspec can read.
    storage_options
        How to reach the store, as obstore or fsspec name it: ``{"endpoint": "http://…"}``.
        Credentials are taken from the environment alone.

    Raises
    ------
    ConfigError
        If the address names no folder, or an option is a credential.
    """
    if isinstance(address, Location):
        return address
    text = os.fspath(address).removeprefix("file://")
    return _remote(text, storage_options) if "://" in text else Location("", str(Path(text)))


def _remote(address: str, options: Mapping[str, str] | None) -> Location:
    scheme, _, rest = address.partition("://")
    parts = [part for part in rest.split("/") if part]
    shown = without_secrets(address)
    if shown != address and "?" not in address:
        raise _credential(f"the address {shown} holds a password or a key")
    # Below s3://bucket itself nothing can lie beside the run, where its successor is written.
    if len(parts) < 2 or any(part in (".", "..") for part in parts) or "?" in address:
        raise ConfigError(
            f"{shown}: not the address of a folder in an object store",
            why="A run has a name below a bucket, container or host.",
            remedy=f"Give an address such as {scheme}://bucket/runs/demo.",
        )
    for name in options or ():
        if _CREDENTIAL.search(name):
            raise _credential(f"storage option {name!r} looks like a credential")
    given = tuple(sorted((str(name), str(value)) for name, value in (options or {}).items()))
    root = "/" if rest.startswith("/") else ""  # as in local:///folder
    return Location(f"{scheme}://{root}{'/'.join(parts[:-1])}", parts[-1], given)


def _credential(what: str) -> ConfigError:
    return ConfigError(
        what,
        why="What stands on a command line or in a notebook is read by others.",
        remedy="Put credentials into the environment, as AWS_SECRET_ACCESS_KEY.",
    )


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix=_THREADS)


@cache
def _backend(base: str, options: tuple[tuple[str, str], ...], _process: int) -> Backend:
    if not base:
        return Disk()
    kind = ObjectStore if base.partition("://")[0] in SCHEMES else FsspecFiles
    return kind(base, dict(options))
