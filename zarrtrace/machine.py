"""Cores and memory of this machine, giving freed memory back to the system, and garbage."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def cpus() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


@contextmanager
def no_garbage() -> Iterator[None]:
    """Let Python not look for garbage while much is made that stays: libraries, open traces.

    To walk through all of it again and again takes a fifth of the time of importing torch,
    transformers and sae-lens, and a quarter of that of opening hundreds of traces. The collector
    stays enabled, and has nothing to begin with: Dask asks while it is imported whether it is
    enabled, and would disable it for good with each slice.
    """
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        yield
    finally:
        if before[0]:  # else another thread, or the caller, has it so
            gc.set_threshold(*before)


def release_freed() -> None:
    """Let the C library return what it holds of freed memory; does nothing where it is not glibc.

    Blocks of attention differ in size, and glibc keeps freed pieces below 32 MiB for later ones:
    several hundred MiB in a long prompt.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        found: Callable[[int], Any] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return None
    return found


def keep_freed() -> None:
    """Undo Dask's ``MALLOC_TRIM_THRESHOLD_`` in a worker; does nothing where it is not glibc.

    Every large array would be mapped again, page by page. These are the thresholds that glibc comes
    to by itself where nothing is set.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ and _malloc_trim() is not None:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def memory_sizes() -> dict[str, int]:
    """Return Linux's account of memory in bytes, such as ``MemAvailable``; empty elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    except (OSError, ValueError, IndexError):
        return {}
