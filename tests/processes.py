"""The command line in processes of its own that tests interrupt, and that never outlive a test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

# Who runs tests in a script's background has SIGINT ignored, and children inherit it.
_CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from zarrtrace.cli import main
main()
"""


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the command line; killed if it still runs when the test ends."""
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", _CODE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said_after(
    process: subprocess.Popen[str], number: int = signal.SIGINT, seconds: float = 60
) -> str:
    """Send a signal and wait for the end; what stderr says, or where each thread hangs."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(f"still runs:\n{process.communicate(timeout=60)[1]}") from None
