"""Files as the writer needs them, on a disk or in an object store; errors that help."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from zarrtrace.errors import LockedError, NoSpaceError, StoreError
from zarrtrace.spec import Stored
from zarrtrace.store.objects import Changed, Location, ObjectPath, at_once, check_guards

# Smaller files go to the disk together.
_WORTH_BEGINNING = 2**17

# How many keys an object store lists in one request.
_PER_LISTING = 1000

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def fingerprint(trace: Location, files: Sequence[str]) -> Stored:
    """Return size and hash of some files of a trace, taken together."""
    if isinstance(trace, ObjectPath):
        return fingerprint_of(read_all([trace / file for file in files]))

    def contents() -> Iterator[bytes]:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                yield (trace / file).read_bytes()

    return fingerprint_of(contents())


def read_all(files: Iterable[Location]) -> list[bytes]:
    """Read some files, those of an object store at the same time; one that is gone is empty."""

    def read(file: Location) -> bytes:
        try:
            return file.read_bytes()
        except FileNotFoundError:
            return b""

    return each_of(read, list(files))


def each_of(call: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """Call a function for each file or folder, for those in an object store at the same time."""
    if len(items) > 1 and isinstance(items[0], ObjectPath):
        return at_once(call, items)
    return [call(item) for item in items]


@contextlib.contextmanager
def no_collecting() -> Iterator[None]:
    """Pause the garbage collector: it would look at all that is read again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def fingerprint_of(contents: Iterable[bytes]) -> Stored:
    """Return size and hash of some files' contents, taken together."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    for content in contents:
        digest.update(content)
        size += len(content)
    return Stored(bytes=size, blake2b=digest.hexdigest())


def names_there(folder: Location, names: Sequence[str]) -> list[str]:
    """Return those names that a folder has, in their order.

    One listing answers for all of them: asking for each takes a second per 100,000 on a disk.
    """
    if isinstance(folder, ObjectPath):
        if not folder.backend.listable or len(names) <= _PER_LISTING:
            return list(names)  # whoever reads them finds out
        there = {child.name for child in folder.iterdir()}
    else:
        there = set(os.listdir(folder))  # noqa: PTH208 -- names alone
    return [name for name in names if name in there]


def sizes_below(trace: Location) -> Mapping[str, int] | None:
    """Return the sizes of all files of a trace, for :func:`size_of`; None if it asks for each."""
    if isinstance(trace, ObjectPath) and trace.backend.listable:
        return trace.files()
    return None


def size_of(
    trace: str | Location, files: Sequence[str], sizes: Mapping[str, int] | None = None
) -> int:
    """Return the bytes of some files of a trace, taken together; one that is gone has none."""
    if isinstance(trace, ObjectPath):
        return _size_there(trace, files, sizes)
    total, root = 0, str(trace)
    for file in files:
        try:
            total += os.stat(f"{root}/{file}").st_size  # noqa: PTH116  thousands a run: no Path
        except FileNotFoundError:
            continue
    return total


def _size_there(trace: ObjectPath, files: Sequence[str], sizes: Mapping[str, int] | None) -> int:
    if sizes is None and len(files) > 1 and trace.backend.listable:
        below = trace / os.path.commonpath(files)
        sizes = {
            f"{below.key}/{file}"[len(trace.key) + 1 :]: n for file, n in below.files().items()
        }

    def size(file: str) -> int:
        if sizes is not None and file in sizes:
            return sizes[file]
        try:  # some servers list what is new a moment later
            return trace.backend.size(f"{trace.key}/{file}")
        except FileNotFoundError:
            return 0

    return sum(at_once(size, files) if sizes is None and len(files) > 1 else map(size, files))


def write_whole(file: Location, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    if isinstance(file, ObjectPath):
        file.write_bytes(content)
        return
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            _begin_writing(stream.fileno(), len(content))
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk, room for the next attempt
            partial.unlink()
        raise


def _begin_writing(handle: int, size: int) -> None:
    """Have the disk begin with a file that is not small, and do not wait for it.

    Left to :func:`flush`, much would be written at the end, while nothing else is done.
    """
    if size >= _WORTH_BEGINNING:
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def change_whole(file: Location, change: Callable[[bytes], bytes]) -> None:
    """Replace a file by what a function makes of it, at once.

    In an object store only if nobody else has changed it meanwhile, where the store can tell: an
    attempt of a process that stood still must not undo what its successor wrote.

    Raises
    ------
    LockedError
        If somebody has.
    """
    if not isinstance(file, ObjectPath):
        write_whole(file, change(file.read_bytes()))
        return
    before = file.backend.get(file.key)
    check_guards(file)
    try:
        file.backend.replace(file.key, change(before.data), before.tag)
    except Changed as error:
        raise LockedError(
            f"{file}: was changed by another process",
            why="It writes the same run: this one stood still, and was taken for dead.",
            remedy="Run the same command again; it goes on where the run is.",
        ) from error


@contextlib.contextmanager
def made_whole(folder: Location) -> Iterator[Path]:
    """Yield a folder of a disk to write to: itself, or one that is sent to an object store.

    Its own zarr.json is sent last: what it speaks of is there.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="zarrtrace-") as name:
        made = Path(name) / folder.name
        yield made
        send(made, folder)


def send(made: Path, folder: Location) -> None:
    """Write the files of a folder to another place, its own zarr.json last."""
    names = [file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()]

    def write(name: str) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, (made / name).read_bytes())

    if isinstance(folder, ObjectPath):
        at_once(write, [name for name in names if name != "zarr.json"])
    else:
        for name in names:
            if name != "zarr.json":
                write(name)
    write("zarr.json")


def remove_tree(folder: Location) -> None:
    """Remove a folder and all in it; in an object store its own zarr.json first."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    check_guards(folder)
    names = folder.files()
    if "zarr.json" in names:
        folder.backend.delete([f"{folder.key}/zarr.json"])
    folder.backend.delete([f"{folder.key}/{name}" for name in names if name != "zarr.json"])


def move(source: Location, target: Location) -> None:
    """Put a folder in another's place: on a disk, where there is none, at once.

    In an object store what is there goes first, its zarr.json before all else, and the new one's
    comes last. Who is interrupted may begin again.
    """
    if isinstance(source, Path) and isinstance(target, Path):
        source.rename(target)
        return
    assert isinstance(source, ObjectPath) and isinstance(target, ObjectPath)  # noqa: S101, PT018
    remove_tree(target)
    backend = source.backend

    def copy(name: str) -> None:
        backend.copy(f"{source.key}/{name}", f"{target.key}/{name}")

    at_once(copy, [name for name in source.files() if name != "zarr.json"])
    copy("zarr.json")
    remove_tree(source)


def remove_partial_files(folder: Location, *, deep: bool) -> None:
    """Remove what Zarr was writing when an earlier writer was killed; objects are never partial."""
    if isinstance(folder, Path):
        for file in list(folder.rglob("*.partial") if deep else folder.glob("*.partial")):
            file.unlink(missing_ok=True)


def flush(folder: Location) -> None:
    """Have the disk hold all that was written to a folder and below; an object store does.

    On Linux all that waits for its file system is written at once: file by file takes several
    hundred times as long, for a trace is hundreds of files.
    """
    if isinstance(folder, ObjectPath):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        syncfs = _syncfs()
        if syncfs is None:
            for path in sorted([folder, *folder.rglob("*")]):
                fsync(path)
        elif syncfs(handle):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


@cache
def _syncfs() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None, use_errno=True).syncfs
    except (AttributeError, OSError, TypeError):  # macOS
        return None
    return found


def fsync(path: Location) -> None:
    """Have the disk hold what was written to a file or folder; an object store holds it already."""
    if isinstance(path, ObjectPath):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def clear_errors(path: Location) -> Iterator[None]:
    """Turn what the disk says into errors that help."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{path}: no space left on the disk",
                remedy="Make room and run the same command again: it goes on where it stopped.",
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise StoreError(
                f"{path}: cannot be written: a file is where a folder should be",
                remedy="Choose another --output.",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StoreError(
                f"{path}: cannot be written ({error.strerror})",
                remedy="Choose an --output that you may write to.",
            ) from error
        raise
