"""The process that writers are forked from: it imports libraries once, for all of them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future
from typing import Any

from zarrtrace.extraction.channel import Channel
from zarrtrace.extraction.writers import OpenTraces, Traces

# From linux/prctl.h.
_SIGNAL_AT_PARENTS_DEATH = 1
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from zarrtrace.extraction.writer_template import fork_writers; "
    "fork_writers(int(sys.argv[2]), int(sys.argv[3]))"
)
_MUTEX = threading.Lock()
_TEMPLATES: dict[int, _Template] = {}


def fork_writer(end: socket.socket) -> None:
    """Start a process that writes what comes through a socket; it is not waited for.

    The first call starts the process that it is forked from, which ends with this one.

    Parameters
    ----------
    end
        The socket's end that the process is to have.
    """
    with _MUTEX:
        found = _TEMPLATES.get(os.getpid())  # a process that was forked has none of its own
        if found is not None and found.has_ended:
            found.end.close()
            found = None
        if found is None:
            found = _TEMPLATES[os.getpid()] = _Template()
        socket.send_fds(found.end, [b"f"], [end.fileno()])


class _Template:
    """The process that others are forked from, as this process sees it.

    Attributes
    ----------
    end
        Takes the sockets of those that it is to fork.
    """

    def __init__(self) -> None:
        self.end, theirs = socket.socketpair()
        started: Future[subprocess.Popen[bytes]] = Future()
        # Linux ends it with the thread that starts it, so that one stays.
        threading.Thread(
            target=_start, args=(theirs.fileno(), started), name="zarrtrace-template", daemon=True
        ).start()
        try:
            self._process = started.result()
        except OSError:
            self.end.close()
            raise
        finally:
            theirs.close()
        atexit.register(self.end.close)  # which lets it end

    @property
    def has_ended(self) -> bool:
        """Whether it cannot fork any more: it was killed."""
        return self._process.poll() is not None


def _start(descriptor: int, started: Future[subprocess.Popen[bytes]]) -> None:
    """Start the process that others are forked from, and wait for its end."""
    # Ctrl-C is for this process to handle, also while the other one imports libraries.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    arguments = [json.dumps(sys.path), str(descriptor), str(os.getpid())]
    try:
        process = subprocess.Popen(  # noqa: S603 -- Python itself
            [sys.executable, "-c", _PROGRAM, *arguments],
            pass_fds=[descriptor],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # no threads that a fork would lose
        )
    except OSError as error:
        started.set_exception(error)
        return
    started.set_result(process)
    process.wait()


# --- in the other processes ---------------------------------------------------------------------


def fork_writers(descriptor: int, parent: int) -> None:
    """Fork a process for each socket that comes, until the other end is closed.

    Parameters
    ----------
    descriptor
        File descriptor of the socket that they come through.
    parent
        Number of the process that has the other end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    die_with(parent)
    asked = socket.socket(fileno=descriptor)
    while True:
        _, descriptors, _, _ = socket.recv_fds(asked, 1, 1)
        if not descriptors:
            return
        me = os.getpid()
        if os.fork() == 0:
            asked.close()
            try:
                die_with(me)
                _write(descriptors[0])
            except BaseException:  # noqa: BLE001 -- the parent learns only that it has ended
                traceback.print_exc()
            os._exit(0)
        os.close(descriptors[0])


def _write(descriptor: int) -> None:
    """Write what comes through a socket, until its other end is closed."""
    os.nice(10)  # the process that drives the GPU goes first
    channel = Channel(socket.socket(fileno=descriptor))
    traces: OpenTraces | None = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            value = channel.receive()
            try:
                if isinstance(value, Traces):
                    traces = OpenTraces(value)
                    answer: Any = traces.lacks
                elif value is None:
                    answer = traces.close() if traces else []
                    traces = None
                else:
                    assert traces is not None  # noqa: S101 -- they came first
                    answer = traces.append(value)
            except Exception as error:  # noqa: BLE001 -- the parent raises it
                answer = error
            channel.send(answer)
    if traces is not None:  # the capture failed, which the parent reports; what is complete stays
        with contextlib.suppress(Exception):
            traces.close()


def die_with(parent: int) -> None:
    """End this process at once where its parent is killed: no one else may find it writing."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(_SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
