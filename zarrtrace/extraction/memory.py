"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any


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
