"""Filling the system's file cache with weights while libraries are still being imported.

Importing torch and sae-lens takes seconds in which the disk would idle, and afterwards weights are
copied to a GPU tensor by tensor, which asks the disk for little at a time. Several threads that
read the files in order keep it busy; what they read is thrown away, the system keeps the pages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue

from zarrtrace.hub import snapshot_folder
from zarrtrace.machine import memory_sizes

_THREADS = 3

#: A file, and the bytes of it from ... to ... that are needed.
Stretch = tuple[Path, int, int]


class ReadAhead:
    """Reads files into the system's cache, in threads that end with the process.

    Parameters
    ----------
    limit
        Share of the available memory to fill. Files beyond it are not read: they would be gone
        again before they are used.
    step
        Bytes of one read. After each one a thread wants Python's lock, which imports give away
        every few milliseconds.
    idle
        Seconds without files after which the threads end. Importing sae-lens, between the model's
        files and the SAEs', takes longer than reading them.
    """

    def __init__(self, *, limit: float = 0.5, step: int = 32 * 2**20, idle: float = 60) -> None:
        self._step, self._idle = step, idle
        self._room = limit * memory_sizes().get("MemAvailable", 0)
        self._parts: Queue[tuple[Path, int]] = Queue()
        self._threads: list[threading.Thread] = []

    def add(self, stretches: Iterable[Stretch]) -> None:
        """Read stretches of files, after those that were added before."""
        for file, start, stop in stretches:
            if stop - start > self._room:
                break
            self._room -= stop - start
            for at in range(start, stop, self._step):
                self._parts.put((file, at))
        if not self._threads and not self._parts.empty():
            self._threads = [
                threading.Thread(target=self._work, name="zarrtrace-ahead", daemon=True)
                for _ in range(_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        buffer = bytearray(self._step)
        while True:
            try:
                file, start = self._parts.get(timeout=self._idle)
            except Empty:
                return
            # The reader that needs the file reports what is wrong with it.
            with suppress(OSError):
                self._read(file, start, buffer)

    def _read(self, file: Path, start: int, buffer: bytearray) -> None:
        with file.open("rb", buffering=0) as content:
            content.seek(start)
            content.readinto(buffer)


def weight_files(model: str, revision: str | None = None) -> list[Stretch]:
    """Find a model's safetensors on this machine, without importing anything large.

    Parameters
    ----------
    model
        A folder, or an id on the Hugging Face hub.
    revision
        Commit, tag or branch on the hub.

    Returns
    -------
    list
        Empty if it is not here.
    """
    folder = snapshot_folder(model, revision)
    return [(file, 0, file.stat().st_size) for file in sorted(folder.glob("*.safetensors"))]
