"""Locks of the kernel on files: it releases them when their owner dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from zarrtrace.errors import LockedError, StoreError

_ABSENT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_SECONDS_A_TRY = 0.1


class FileLock:
    """An exclusive lock on a file, which is created if it does not exist.

    Parameters
    ----------
    file
        The file.
    subject
        Path that is locked, for messages.
    seconds
        How long to wait for another owner.

    Raises
    ------
    LockedError
        If another process still has it then.
    StoreError
        If the file system has no locks.
    """

    def __init__(self, file: Path, subject: object, *, seconds: float = 0) -> None:
        self.file = file
        until = time.monotonic() + seconds
        while True:
            self.handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                is_ours = take_lock(self.handle, file)
            except StoreError:  # the file system has no locks: nobody has one on the file
                self.release()
                raise
            except BaseException:
                os.close(self.handle)
                raise
            if is_ours:
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self.handle), file.stat()):
                        return
            os.close(self.handle)
            if is_ours:  # but its former owner has removed the file since it was opened
                continue
            if time.monotonic() >= until:
                raise LockedError(
                    f"{subject}: another process is writing it",
                    why="An extraction into the same folder is running, or has not ended yet.",
                    remedy="Wait until it ends, or choose another --output.",
                )
            time.sleep(_SECONDS_A_TRY)

    def release(self) -> None:
        """Remove the file, then release the lock: nobody locks a file without a name."""
        with contextlib.suppress(OSError):
            self.file.unlink()
        os.close(self.handle)


def take_lock(handle: int, file: Path) -> bool:
    """Lock an open file or folder; False if another process has it.

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
        if error.errno not in _ABSENT:
            raise
        raise StoreError(
            f"{file}: this file system has no locks ({error.strerror})",
            why="Two processes could write one run without noticing. Lustre and NFS have locks if "
            "they are mounted so.",
            remedy="Mount it with the option 'flock', or choose an --output on another one.",
        ) from error
    return True
