"""The command line in processes of its own that tests interrupt, and that never outlive a test."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

# What a process imports that extracts; sae-lens alone takes ten seconds of a core.
_IMPORTS = [
    "zarrtrace.extraction.worker",
    "zarrtrace.capture.saes",
    "zarrtrace.store",
    "transformers.models.llama.modeling_llama",
]

#: Begins a script that kills itself at a step: before or after a call of a function that it names
#: by ``counted(module, name)``. Its arguments are a folder and the number of the step, 0 for none.
COUNTED = """
import os, signal, sys
folder, at = sys.argv[1], int(sys.argv[2])
steps = 0
def counted(module, name):
    real = getattr(module, name)
    def call(*given, **options):
        global steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*given, **options)
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(module, name, call)
"""

# Who runs tests in a script's background has SIGINT ignored, and children inherit it.
_CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from zarrtrace.cli import main
main()
"""


def import_once() -> None:
    """Have a process import what extraction needs; those that are forked from it need not.

    Dask's workers are, too, where its ``worker.multiprocessing-method`` is ``forkserver``.
    """
    multiprocessing.set_forkserver_preload(_IMPORTS)
    forkserver.ensure_running()


class Forked:
    """A process that runs some code, with what `subprocess.Popen` says of one.

    Its stderr goes into the folder, or to a terminal.
    """

    def __init__(
        self, folder: Path, code: str, arguments: list[str], *, terminal: Path | None = None
    ) -> None:
        import_once()
        self._said = folder / "stdout", terminal or folder / "stderr"
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_execute, args=(code, arguments, dict(os.environ), Path.cwd(), self._said)
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        if self.wait(timeout) is None:
            raise subprocess.TimeoutExpired("zarrtrace", timeout or 0)
        out, err = (file.read_text("utf-8") if file.is_file() else "" for file in self._said)
        return out, err


def _execute(
    code: str,
    arguments: list[str],
    environment: dict[str, str],
    folder: Path,
    said: tuple[Path, Path],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as the environment says
    os.chdir(folder)
    for file, number in zip(said, (1, 2), strict=True):
        end = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY)
        os.dup2(end, number)
        os.close(end)
    faulthandler.enable(file=2)
    sys.argv = ["zarrtrace", *arguments]
    exec(code, {"__name__": "__main__"})  # noqa: S102 -- of our tests


@contextlib.contextmanager
def forked(code: str, *arguments: object, terminal: Path | None = None) -> Iterator[Forked]:
    """Run code while the test runs, in a process that has imported what extraction needs.

    It is killed if it still runs when the test ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = Forked(Path(folder), code, [*map(str, arguments)], terminal=terminal)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in such a process, to its end."""
    with forked(code, *arguments) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(sys.argv, process.returncode or 0, out, err)


@contextlib.contextmanager
def extracting(*arguments: object, terminal: Path | None = None) -> Iterator[Forked]:
    """Run ``zarrtrace extract``."""
    with forked(_CODE, "extract", *arguments, terminal=terminal) as process:
        yield process


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the command line in an interpreter of its own; it is killed likewise."""
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


def said_after(process: Any, number: int = signal.SIGINT, seconds: float = 60) -> str:
    """Send a signal and wait for the end; what stderr says, or where each thread hangs."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(f"still runs:\n{process.communicate(timeout=60)[1]}") from None
