"""Putting what is complete in its place: on a disk by one rename, in an object store by uploads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from zarrtrace.errors import RemoteError, StoreError
from zarrtrace.storage import Address, Location, disk, locate
from zarrtrace.store.journal import JOURNAL

_METADATA = "zarr.json"
_Path = TypeVar("_Path", Path, Location)


def publish_folder(folder: Address, target: Location) -> None:
    """Put a complete folder in its place, instead of what is there.

    Readers find the old one or the new one. In an object store, where nothing can be exchanged at
    once, ``zarr.json`` is deleted first and written last: readers find the old one, nothing, or the
    new one.

    Parameters
    ----------
    folder
        On a disk, or in the object store of `target`; if both are on a disk, on one file system. It
        is gone afterwards.
    target
        Where it belongs.

    Raises
    ------
    RemoteError
        If the store holds other files afterwards.
    """
    source = locate(folder)
    if source.path is None:
        remove(target)
        store = source.writable_backend()
        for names in _in_order(source.files()):
            target.each(lambda n: store.copy((source / n).key, (target / n).key), names)
        remove(source)
    elif target.path is None:
        upload(source.path, target)
        disk.remove_folder(source.path)
    else:
        put_in_place(source.path, target.path)


def put_in_place(folder: Path, target: Path) -> None:
    """Put a folder in the place of another one, which is removed.

    Raises
    ------
    StoreError
        If a file is there: somebody else wrote it.
    """
    if target.is_file() and not target.is_symlink():
        raise StoreError(
            f"{target}: cannot be written: a file is where a folder should be",
            remedy="Move it away, and run the same command again.",
        )
    old = old_of(folder)
    exchange_folders(folder, target, old)
    for left in (folder, old):
        disk.remove_folder(left)


def exchange_folders(folder: Path, target: Path, aside: Path) -> None:
    """Put a folder in a place, and what is there in the folder's.

    Where the file system cannot exchange two folders, there is a moment in which neither is in
    place; the one before is `aside` from then on.
    """
    if not target.exists() or not disk.exchange(folder, target):
        if target.exists():
            target.rename(aside)
        folder.rename(target)
    with contextlib.suppress(OSError):  # not every file system does that for folders
        disk.sync_path(target.parent)


def old_of(folder: Path) -> Path:
    """Return where a trace is while a staged one takes its place."""
    return folder.with_name(f"{folder.name}.old")


def end_publishing(folder: Path, target: Path) -> None:
    """Publish a staged trace that was complete when its writer was killed, or undo half of that."""
    if target.exists():
        return
    if (folder / "zarr.json").is_file() and not (folder / JOURNAL).exists():
        folder.rename(target)
    elif old_of(folder).is_dir():
        old_of(folder).rename(target)


def beside(path: _Path, what: str) -> _Path:
    """Return the path of a file or folder of zarrtrace's own beside a run.

    A user may well have a `.run.old`, but no name that zarrtrace is a part of.
    """
    return path.with_name(f".{path.name}.zarrtrace-{what}")


def upload(folder: Path, target: Location) -> None:
    """Write a folder to an object store, its ``zarr.json`` last and its journal not at all.

    Another writer of the same command may upload at the same time. On equal hardware its bytes are
    the same; else sizes tell, and all is written once more. ``verify`` names
    a mixture of bytes that differ and have one size.

    Raises
    ------
    RemoteError
        If the store holds other files than were written.
    """
    sizes = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != JOURNAL
    }
    values, metadata, _ = _in_order(sizes)
    for _ in range(2):
        remove(target)
        for names in (values, metadata):
            target.each(lambda name: (target / name).write(folder / name), names)
        # The other writer may have written its zarr.json by now.
        if {**target.files(), _METADATA: sizes[_METADATA]} == sizes:
            (target / _METADATA).write(folder / _METADATA)
            return
    raise RemoteError(
        f"{target}: holds other files than were written",
        why="Another process writes the same run.",
        remedy="Let one process write a run; then run the same command again.",
    )


def _in_order(names: Iterable[str]) -> list[list[str]]:
    """Sort files by the order in which they are written: values, metadata, the group's own."""
    steps: list[list[str]] = [[], [], []]
    for name in sorted(names):
        steps[(name == _METADATA) + (name.rpartition("/")[2] == _METADATA)].append(name)
    return steps


def remove(folder: Location) -> None:
    """Remove a folder; in an object store its ``zarr.json`` first."""
    if (path := folder.path) is not None:
        disk.remove_folder(path)
        return
    for names in reversed(_in_order(folder.files())):
        folder.writable_backend().delete([(folder / name).key for name in names])
