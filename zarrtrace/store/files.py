"""Files as the writer needs them: fingerprints, one writer at a time, errors that help."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from zarrtrace.errors import LockedError, NoSpaceError, StoreError
from zarrtrace.spec import Stored


def fingerprint(trace: Path, files: Sequence[str]) -> Stored:
    """Return size and hash of some files of a trace, taken together."""

    def contents() -> Iterator[bytes]:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                yield (trace / file).read_bytes()

    return fingerprint_of(contents())


def fingerprint_of(contents: Iterable[bytes]) -> Stored:
    """Return size and hash of some files' contents, taken together."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    for content in contents:
        digest.update(content)
        size += len(content)
    return Stored(bytes=size, blake2b=digest.hexdigest())


def size_of(trace: str | Path, files: Sequence[str]) -> int:
    """Return the bytes of some files of a trace, taken together; one that is gone has none."""
    total, root = 0, str(trace)
    for file in files:
        try:
            total += os.stat(f"{root}/{file}").st_size  # noqa: PTH116  thousands a run: no Path
        except FileNotFoundError:
            continue
    return total


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk, room for the next attempt
            partial.unlink()
        raise


def remove_partial_files(files: Iterable[Path]) -> None:
    """Remove what Zarr was writing when an earlier writer was killed."""
    for file in list(files):
        file.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock_path(run: Path) -> Path:
    return run.with_name(f".{run.name}.lock")


def lock(run: Path) -> int:
    """Take the run's lock; the kernel drops it when its owner dies."""
    path = _lock_path(run)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise LockedError(
                f"{run}: another process is writing this run",
                why="An extraction into the same folder is still going on.",
                remedy="Wait until it ends, or choose another --output.",
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # its owner removed it between our open and our lock


def unlock(run: Path, handle: int) -> None:
    """Give the run's lock back."""
    # The lock file goes first: whoever waits for it must not hold a file that has no name.
    with contextlib.suppress(OSError):
        _lock_path(run).unlink()
    os.close(handle)


def trace_locks(run: Path) -> Path:
    """Return the folder of the locks of a run's traces; beside it, for its readers list it."""
    return run.with_name(f".{run.name}.locks")


@contextlib.contextmanager
def only_writer(run: Path, scenarios: Iterable[str], *, seconds: float) -> Iterator[None]:
    """Hold the locks of some traces, for writers that are not the owner of the run's lock.

    A worker that was given up may be alive; whoever does its work again waits for it.

    Parameters
    ----------
    run, scenarios
        The traces; everybody must name them in the same order.
    seconds
        How long to wait for another writer.

    Raises
    ------
    LockedError
        If another process still writes one of them.
    """
    folder = trace_locks(run)
    folder.mkdir(exist_ok=True)
    until = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        for scenario in scenarios:
            stack.enter_context(_locked(folder / scenario, run, until))
        yield


def wait_for_writers(run: Path, *, seconds: float) -> None:
    """Wait until no worker of a client that is gone writes a trace; for the run's lock's owner.

    Raises
    ------
    LockedError
        If one still does after so many seconds.
    """
    folder = trace_locks(run)
    if not folder.is_dir():
        return
    until = time.monotonic() + seconds
    for file in sorted(folder.iterdir()):
        with _locked(file, run, until):
            pass
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(file: Path, run: Path, until: float) -> Iterator[None]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _taken(handle):
            if time.monotonic() > until:
                raise LockedError(
                    f"{run / file.name}: another process is still writing this trace",
                    why="A worker whose client or scheduler is gone has not ended.",
                    remedy="End it, and run the same command again.",
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
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
