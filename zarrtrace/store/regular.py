"""Regular files: reading them and nothing else, and clearing what is in their place.

A pipe would be waited for for ever, a device never ends, and a link may lead to what does not
belong to the run.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.store.objects import Location, ObjectPath

#: What to do about a damaged file.
REPAIR = (
    "'zarrtrace verify' names everything damaged; the 'zarrtrace extract' that made the run, with "
    "--repair, makes it anew."
)


def open_regular(path: str | Path) -> int | None:
    """Open a file to read it; return its handle, None if there is none.

    Raises
    ------
    IntegrityError
        If there is a pipe, a device or a folder: reading might wait for ever, or never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ELOOP):  # of a socket, of a link to itself
            raise
        raise _odd(path, oddity(path) or "a link") from error
    found = _kind(os.fstat(handle).st_mode)
    if found is not None:
        os.close(handle)
        raise _odd(path, found)
    return handle


def oddity(path: str | Path, inside: Path | None = None) -> str | None:
    """Say what is there in place of a file; None if it is a file, or nothing.

    Parameters
    ----------
    path
        Where a file is expected.
    inside
        Folder that no link may lead out of; None to follow links.
    """
    if inside is not None and not _leads_inside(path, inside):
        return "a link that leads elsewhere"
    try:
        return _kind(os.stat(path).st_mode)  # noqa: PTH116 -- of thousands of files
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"what cannot be read: {error.strerror}"


def _kind(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _odd(path: str | Path, what: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: is {what}, not a file",
        why="Something else was put in its place.",
        remedy=REPAIR,
    )


def read_regular(file: Location, inside: Location | None = None) -> bytes:
    """Read a file, and nothing but a file.

    Parameters
    ----------
    file
        Its path.
    inside
        Folder that no link may lead out of; None to follow links.

    Raises
    ------
    FileNotFoundError
        If there is none.
    IntegrityError
        If there is something else.
    """
    if isinstance(file, ObjectPath):
        return file.read_bytes()
    if isinstance(inside, Path) and not _leads_inside(file, inside):
        raise _odd(file, "a link that leads elsewhere")
    handle = open_regular(file)
    if handle is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    with open(handle, "rb") as stream:  # noqa: PTH123 -- it is open
        return stream.read()


def _leads_inside(path: str | Path, folder: Path) -> bool:
    real, home = os.path.realpath(path), _home(folder)
    return real == home or real.startswith(f"{home.rstrip(os.sep)}{os.sep}")


@lru_cache(256)
def _home(folder: Path) -> str:
    """Return the folder that holds all files of a run or trace."""
    real = folder.resolve()
    for parent in (real, *real.parents):
        # The Hugging Face cache keeps files in blobs/, and links to them in snapshots/REVISION/.
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            return str(parent.parent.parent)
    return str(real)


def own_file(path: str, flags: int) -> int:
    """Open a file to write it, for :func:`open`: never through a link, and never a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def clear_way(folder: Path, files: Iterable[str]) -> None:
    """Remove what is in place of some files of a folder, and is no file: pipes, links, devices.

    Raises
    ------
    StoreError
        If it is a folder that is not empty.
    """
    for file in files:
        parents = Path(file).parents
        for part in [*(str(one) for one in reversed(parents)), file]:
            path = folder / part
            odd = oddity(path, folder)
            if odd is None or (odd == "a folder" and part != file):
                continue
            if odd != "a folder" or path.is_symlink():
                path.unlink()
                continue
            try:
                path.rmdir()
            except OSError as error:
                raise StoreError(
                    f"{path}: is a folder, not a file",
                    why="Something else was put in the file's place, and it is not empty.",
                    remedy="Move the folder away, and run the same command again.",
                ) from error
