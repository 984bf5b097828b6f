"""Interruptions that wait for a moment at which they do no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM wait until they are asked for; yields what asks.

    Python raises KeyboardInterrupt between any two instructions of the main thread, also between
    the taking of a lock and the ``with`` that gives it back, in our code and in the standard
    library's queues and pools. Threads that need the lock would wait for it forever, and so
    would a thread that joins them.

    Only the first signal waits; a second finds the handler that was there before. In other threads
    than the main one, which gets no interruptions, this does nothing.
    """
    came: list[tuple[int, FrameType | None]] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        restore()

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)

    def ask() -> None:
        if came:
            number, frame = came.pop()
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # A handler that is no function ends the process, or is ignored: no harm in either.
            if callable(handler := signal.getsignal(number)):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield ask
    finally:
        restore()
    ask()
