"""Files on a disk: reading regular files only, writing whole files, and errors with a remedy."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from zarrtrace.errors import IntegrityError, NoSpaceError, StoreError, readable
from zarrtrace.storage.backend import Content

# From linux/fs.h: renameat2 puts two folders in each other's place.
_EXCHANGE, _HERE = 2, -100
# The last three: a link or a pipe has the name of the file that is being written; a long name.
_NOT_WRITABLE = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENAMETOOLONG,
)


class Disk:
    """The file system, as a :class:`~zarrtrace.storage.backend.WritableBackend`; keys are paths."""

    writable = listable = True

    def get(self, key: str, last: int | None = None) -> Content:
        """Read a file, or its last bytes."""
        with _opened(key) as (handle, size):
            length = size if last is None else min(last, size)
            return Content(_pread(handle, length, size - length), size)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of a file."""
        with _opened(key) as (handle, size):  # memory is asked for what is there, not for more
            cut = [(min(start, size), min(end, size)) for start, end in ranges]
            return [_pread(handle, end - start, start) for start, end in cut]

    def size(self, key: str) -> int:
        """Return the size of a file."""
        with _reading(key):
            found = os.stat(key)  # noqa: PTH116 -- called for each file of a run
        if not stat.S_ISREG(found.st_mode):
            raise _odd(key)
        return found.st_size

    def put(self, key: str, data: bytes | Path) -> None:
        """Write a file whole or not at all."""
        with explained(key):
            write_whole(Path(key), data.read_bytes() if isinstance(data, Path) else data)

    def copy(self, source: str, target: str) -> None:
        """Copy a file."""
        self.put(target, self.get(source).data)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete files."""
        for key in keys:
            Path(key).unlink(missing_ok=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of every regular file below a folder."""
        return {
            path: os.stat(path).st_size  # noqa: PTH116 -- called for each file of a run
            for parent, _, names in os.walk(folder)
            for path in (f"{parent}/{name}" for name in names)
            if Path(path).is_file()
        }

    def children(self, folder: str) -> list[str]:
        """Return the names in a folder."""
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208 -- names are wanted
        except (FileNotFoundError, NotADirectoryError):
            return []


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """Open a regular file; a pipe in its place would be waited for without end."""
    with _reading(path):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise _odd(path)
        yield handle, found.st_size
    finally:
        os.close(handle)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Say what is in a file's place, or why it cannot be read."""
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, "No such file", path) from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP):  # a socket; links in a circle
            raise _odd(path) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise IntegrityError(
                f"{path}: cannot be read ({error.strerror})",
                why="Its permissions, or those of a folder above it, do not let you.",
                remedy="Ask its owner to let you read it.",
            ) from error
        raise


def refuse_link_out(path: str, folder: str) -> None:
    """Refuse a path from which links lead out of a folder that it is in.

    Raises
    ------
    IntegrityError
    """
    home = Path(folder).resolve()
    for parent in (home, *home.parents):
        # The Hugging Face cache keeps files in blobs/, and links to them in snapshots/REVISION/.
        cache = parent.parent.parent
        if parent.parent.name == "snapshots" and (cache / "blobs").is_dir():
            home = cache
            break
    if not Path(os.path.realpath(path)).is_relative_to(home):
        raise IntegrityError(
            f"{path}: is a link that leads elsewhere",
            why=f"What it leads to is not in {folder}: it may be of another run, or private.",
            remedy="Put the file or folder itself in its place.",
        )


def _odd(path: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: is not a regular file",
        why="A run holds files and folders only; something else was put in a file's place.",
        remedy="Remove it; 'zarrtrace verify' names everything else that is damaged.",
    )


def _pread(handle: int, length: int, start: int) -> bytes:
    """Read all of a range: one call returns at most 2 GiB."""
    data = os.pread(handle, length, start)
    while len(data) < length and (more := os.pread(handle, length - len(data), start + len(data))):
        data += more
    return data


# --- writing -----------------------------------------------------------------------------------


def write_whole(file: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = file.with_name(f".{file.name}.zarrtrace-partial")
    try:
        with open(partial, "wb", opener=open_own) as stream:
            stream.write(data)
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk, room for the next attempt
            partial.unlink()
        raise


def open_own(path: str, flags: int) -> int:
    """Open a file to write it, as :func:`open` asks: never through a link, and never a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def append(file: Path, parts: Sequence[bytes], size: int | None = None) -> None:
    """Append to a file; it is created if it does not exist.

    Parameters
    ----------
    size
        Bytes of the file that stay; what an append that failed left behind them is cut off. None
        keeps all.
    """
    with file.open("ab", buffering=0) as stream:
        if size is not None and stream.tell() > size:
            stream.truncate(size)
        view = memoryview(b"".join(parts))
        while view:
            view = view[stream.write(view) :]


def remove_folder(folder: Path) -> None:
    """Remove a folder and everything in it, or a link or a pipe in its place; never a file."""
    is_known = folder.is_dir() or folder.is_file() or not folder.exists()
    if folder.is_symlink() or not is_known:
        with contextlib.suppress(OSError):  # rmtree would wait for a pipe without end
            folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def sync(folder: Path) -> None:
    """Return when the disk holds everything written to a folder.

    On Linux with one call for its file system: file by file takes several times as long.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        syncfs = _libc("syncfs")
        if syncfs is None:
            for path in sorted([folder, *folder.rglob("*")]):
                sync_path(path)
        elif syncfs(handle):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


def sync_path(path: Path) -> None:
    """Return when the disk holds one file, or the names in one folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _libc(function: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), function)
    except (AttributeError, OSError, TypeError):  # not Linux
        return None


def exchange(one: Path, other: Path) -> bool:
    """Put two folders in each other's place at once; False where the file system cannot."""
    renameat2 = _libc("renameat2")
    if renameat2 is None:
        return False
    return not renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)


@contextlib.contextmanager
def explained(path: object) -> Iterator[None]:
    """Translate OSError into a zarrtrace error with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(path, error) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            why, remedy = ": a file is where a folder should be", "Choose another --output."
        elif error.errno == errno.EISDIR:
            path = error.filename2 or error.filename
            why, remedy = ": a folder is in its place", "Remove it, and run the same command again."
        elif error.errno in _NOT_WRITABLE:
            why, remedy = f" ({error.strerror})", "Choose an --output that you may write to."
        else:
            raise
        raise StoreError(f"{path}: cannot be written{why}", remedy=remedy) from error


def no_space(path: object, error: OSError) -> NoSpaceError:
    """Return the error that says what is used up: bytes, inodes or a quota."""
    return NoSpaceError(
        f"{path}: no space left on the disk",
        why=_why_full(path, error),
        remedy="Make room and run the same command again: it resumes where it stopped.",
    )


def _why_full(path: object, error: OSError) -> str:
    if error.errno == errno.EDQUOT:
        return "Your quota on this file system is used up: of bytes, or of files."
    folder = Path(str(path))
    with contextlib.suppress(OSError):
        while not folder.exists():
            folder = folder.parent
        found = os.statvfs(folder)
        if found.f_files and not found.f_favail:
            return "The file system has no inodes left: it holds as many files as it can."
        return f"{readable(found.f_bavail * found.f_frsize)} are free now."
    return ""
