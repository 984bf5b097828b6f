"""One writer of a run, and one of a trace, at a time.

On a disk the kernel holds locks, and drops them when their owner dies; in an object store they are
leases (:mod:`zarrtrace.store.leases`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from zarrtrace.errors import LockedError, StoreError
from zarrtrace.store.files import beside, remove_tree
from zarrtrace.store.leases import Lease, wait_for_owner
from zarrtrace.store.objects import Location, ObjectPath

#: What :func:`lock` returns.
Held = int | Lease

# What systems say where a file system has no locks, and where its lock service does not answer.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock(run: Location) -> Held:
    """Take the run's lock; it does not outlive its owner.

    Raises
    ------
    LockedError
        If another process has it.
    """
    if isinstance(run, ObjectPath):
        lease = Lease(_beats(run), [beside(run, "lock")], [run])
        if lease.take(seconds=0) is not None:
            raise _locked_run(run)
        return lease
    path = beside(run, "lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            taken = take_lock(handle, path)
        except StoreError:  # nobody has a lock there
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        if not taken:
            os.close(handle)
            raise _locked_run(run)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # its owner removed it between our open and our lock


def _beats(run: ObjectPath) -> ObjectPath:
    return beside(run, "beats")


def _locked_run(run: Location) -> LockedError:
    return LockedError(
        f"{run}: another process is writing this run",
        why="An extraction into the same folder is still going on.",
        remedy="Wait until it ends, or choose another --output.",
    )


def unlock(run: Location, held: Held) -> None:
    """Give the run's lock back."""
    if isinstance(held, Lease):
        held.give_back()
        return
    # The lock file goes first: whoever waits for it must not hold a file that has no name.
    with contextlib.suppress(OSError):
        beside(Path(str(run)), "lock").unlink()
    os.close(held)


def remove_trace_locks(run: Location) -> None:
    """Remove what locks of a run's traces leave, once nobody holds one."""
    remove_tree(beside(run, "locks"))


@contextlib.contextmanager
def only_writer(run: Location, scenarios: Iterable[str], *, seconds: float) -> Iterator[None]:
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
    if isinstance(run, ObjectPath):
        with _leased(run, tuple(scenarios), seconds):
            yield
        return
    folder = beside(run, "locks")
    folder.mkdir(exist_ok=True)
    until = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        for scenario in scenarios:
            stack.enter_context(_locked(folder / scenario, run, until))
        yield


def wait_for_writers(run: Location, *, seconds: float) -> None:
    """Wait until no worker of a client that is gone writes a trace; for the run's lock's owner.

    Raises
    ------
    LockedError
        If one still does after so many seconds.
    """
    folder: Location = beside(run, "locks")
    if not folder.is_dir():
        return
    until = time.monotonic() + seconds
    for file in sorted(folder.iterdir()):
        if isinstance(file, ObjectPath) and isinstance(run, ObjectPath):
            wait_for_owner(file, _beats(run), until)
            if time.monotonic() > until:
                raise _locked_trace(run / file.name)
        elif isinstance(file, Path):
            with _locked(file, run, until):
                pass
    remove_tree(folder)


@contextlib.contextmanager
def _leased(run: ObjectPath, scenarios: Sequence[str], seconds: float) -> Iterator[None]:
    folder = beside(run, "locks")
    lease = Lease(_beats(run), [folder / name for name in scenarios], [run / n for n in scenarios])
    refused = lease.take(seconds=seconds)
    if refused is not None:
        raise _locked_trace(run / refused.name)
    try:
        yield
    finally:
        lease.give_back()


def _locked_trace(trace: Location) -> LockedError:
    return LockedError(
        f"{trace}: another process is still writing this trace",
        why="A worker whose client or scheduler is gone has not ended.",
        remedy="End it, and run the same command again.",
    )


@contextlib.contextmanager
def _locked(file: Path, run: Location, until: float) -> Iterator[None]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not take_lock(handle, file):
            if time.monotonic() > until:
                raise _locked_trace(run / file.name)
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def take_lock(handle: int, path: Path) -> bool:
    """Take the lock of an open file or folder; return False if another process has it.

    Raises
    ------
    StoreError
        If the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StoreError(
            f"{path.parent}: files cannot be locked there ({error.strerror})",
            why="Its file system has no locks, as Lustre mounted without 'flock' and some network "
            "file systems; two writers of one run would damage it.",
            remedy="Choose an --output on another file system, or have this one mounted with "
            "locks (Lustre: -o flock).",
        ) from error
    return True
