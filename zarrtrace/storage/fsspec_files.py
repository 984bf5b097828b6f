"""Files that fsspec reads: sftp, HDFS, WebDAV and so on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from zarrtrace.errors import ConfigError, RemoteError
from zarrtrace.storage.backend import Content, first_line, import_package


class FsspecFiles:
    """A file system of fsspec, as a :class:`~zarrtrace.storage.backend.Backend`."""

    writable, listable = False, True

    def __init__(self, base: str, options: Mapping[str, str]) -> None:
        self._base = base
        fsspec = import_package("fsspec", base.partition("://")[0])
        try:
            self._files, self._root = fsspec.core.url_to_fs(base, **options)
        except Exception as error:  # noqa: BLE001 -- an unknown scheme, a missing package, options, a refusal
            raise ConfigError(
                f"{base}: {first_line(error)}",
                why="Neither obstore nor fsspec opens such an address here.",
                remedy="Check it, and install the package that fsspec needs for it, if any.",
            ) from None  # the cause quotes addresses

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(f"{self._base}/{key}") from error
        except Exception as error:  # noqa: BLE001 -- each package behind fsspec has its own
            raise RemoteError(
                f"{self._base}/{key}: {first_line(error) or type(error).__name__}",
                why="The server cannot be reached, or refuses.",
                remedy="Check address and credentials, and run the same command again.",
            ) from None  # the cause quotes addresses

    def get(self, key: str, last: int | None = None) -> Content:
        """Read a file, or its last bytes."""
        if last is not None:
            size = self.size(key)
            return Content(self.get_ranges(key, [(max(0, size - last), size)])[0], size)
        with self._explained(key):
            data = bytes(self._files.cat_file(self._path(key)))
        return Content(data, len(data))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of a file."""
        with self._explained(key):
            return [bytes(self._files.cat_file(self._path(key), *one)) for one in ranges]

    def size(self, key: str) -> int:
        """Return the size of a file."""
        with self._explained(key):
            found = self._files.info(self._path(key))
        if found["type"] != "file":
            raise FileNotFoundError(f"{self._base}/{key}")
        return int(found["size"])

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of every file below a folder."""
        with self._explained(folder):
            found = self._files.find(self._path(folder), detail=True)
        return {path[len(self._root) + 1 :]: int(one["size"]) for path, one in found.items()}

    def children(self, folder: str) -> list[str]:
        """Return the names in a folder."""
        try:
            with self._explained(folder):
                found = self._files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)
