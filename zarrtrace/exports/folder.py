"""Files of an export that appear together, once all are whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from zarrtrace.errors import ConfigError, NoSpaceError, StoreError
from zarrtrace.storage import disk
from zarrtrace.storage.locks import take_lock
from zarrtrace.store import refuse_inside


@contextlib.contextmanager
def staged(output: Path, patterns: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `output`, whose files move there at the end.

    Parameters
    ----------
    output
        The folder to write to. It may hold other files, which stay.
    patterns
        Names of files that the export may write; others of such a name are another export's.
    overwrite
        Replace them.

    Raises
    ------
    ConfigError
        If there are such files and they may not be replaced, or `output` is in a run.
    StoreError
        If it cannot be written.
    """
    output = output.resolve()
    _refuse(output, patterns, overwrite=overwrite)
    with _explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        folder = output.with_name(f".{output.name}.zarrtrace-export-{secrets.token_hex(4)}")
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(StoreError):  # no locks here: leftovers stay
                take_lock(handle, folder)
            yield folder
            _publish(folder, output, patterns)
        finally:
            os.close(handle)
            disk.remove_folder(folder)


@contextlib.contextmanager
def writing(file: Path) -> Iterator[IO[bytes]]:
    """Open a new file."""
    with open(file, "x+b", opener=disk.open_own) as out:
        yield out


def _refuse(output: Path, patterns: Sequence[str], *, overwrite: bool) -> None:
    refuse_inside(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(
            f"{output}: is not a folder", remedy="Choose a folder, or a name that is not taken."
        )
    there = _of_patterns(output, patterns)
    if there and not overwrite:
        raise ConfigError(
            f"{output}: holds an export already: {there[0].name}"
            + (f" and {len(there) - 1} more files" if len(there) > 1 else ""),
            remedy="Choose another folder, or replace these files with --overwrite.",
        )


def _of_patterns(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _remove_leftovers(output: Path) -> None:
    """Remove what exports that were killed have left: their locks are free."""
    for folder in output.parent.glob(f".{_plainly(output.name)}.zarrtrace-export-*"):
        with contextlib.suppress(OSError, StoreError):
            handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if take_lock(handle, folder):
                    disk.remove_folder(folder)
            finally:
                os.close(handle)


def _plainly(name: str) -> str:
    """Return a pattern that matches a name and nothing else."""
    return "".join(f"[{one}]" if one in "*?[" else one for one in name)


def _publish(folder: Path, output: Path, patterns: Sequence[str]) -> None:
    """Put files in their place; all at once unless the folder holds something."""
    if not output.exists() or not any(output.iterdir()):
        folder.replace(output)
        return
    stale = _of_patterns(output, patterns)
    written = sorted(folder.iterdir())
    for file in written:
        file.replace(output / file.name)
    for file in stale:
        if file.name not in {one.name for one in written}:
            file.unlink()


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Translate errors of the disk: an export does not resume."""
    try:
        with disk.explained(output):
            yield
    except NoSpaceError as error:
        raise NoSpaceError(
            error.what, why=error.why, remedy="Make room and run the same command again."
        ) from error
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise StoreError(
            f"{output}: too many files are open",
            why="An export keeps up to four files a layer open.",
            remedy="Raise the limit with 'ulimit -n 4096', or export fewer --layers at a time.",
        ) from error
