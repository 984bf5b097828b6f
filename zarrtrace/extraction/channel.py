"""Sending objects with large arrays to another process of this machine.

Arrays go beside the pickled object as they are (pickle's protocol 5): one system call for all, so
that a thread that sends hardly holds Python's lock.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

# Linux takes no more pieces at once (IOV_MAX).
_PIECES = 1024


class Channel:
    """One end of a connection to a process that this one started, or that started this one.

    Parameters
    ----------
    end
        A connected stream socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, value: Any) -> None:
        """Send an object; its arrays should be contiguous."""
        buffers: list[pickle.PickleBuffer] = []
        header = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(header), *(buffer.raw() for buffer in buffers)]
        parts = [part for part in parts if part.nbytes or part.obj is header]
        sizes = [len(header), *(buffer.raw().nbytes for buffer in buffers)]
        self._send_all([memoryview(struct.pack(f"<q{len(sizes)}q", len(sizes), *sizes)), *parts])

    def _send_all(self, parts: Sequence[memoryview]) -> None:
        left = [part.cast("B") for part in parts]
        while left:
            sent = self._end.sendmsg(left[:_PIECES])
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]

    def receive(self) -> Any:
        """Wait for an object and return it.

        Raises
        ------
        EOFError
            If the other process is gone.
        """
        (count,) = struct.unpack("<q", self._exactly(8))
        sizes = struct.unpack(f"<{count}q", self._exactly(8 * count))
        content = memoryview(self._exactly(sum(sizes)))
        parts, start = [], 0
        for size in sizes:
            parts.append(content[start : start + size])
            start += size
        # From a process that this one started, or that started this one.
        return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301

    def _exactly(self, size: int) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            got = self._end.recv_into(view[done:])
            if not got:
                raise EOFError("the other process has ended")
            done += got
        return content

    def end(self) -> None:
        """Send no more; the other end then reads its end."""
        with contextlib.suppress(OSError):  # the other process has ended before
            self._end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end, as the end of its process does."""
        self._end.close()


def pair() -> tuple[Channel, socket.socket]:
    """Return a channel, and the end of it that another process is to have."""
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs
