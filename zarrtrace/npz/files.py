"""Files that appear whole, errors that help, and jobs on threads."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Literal

import numpy as np

from zarrtrace.errors import NoSpaceError, NPZError, ZarrtraceError
from zarrtrace.machine import cpus
from zarrtrace.precision import keep_firing
from zarrtrace.storage import disk

Progress = Callable[[int, int], None]
DType = Literal["float16", "float32"]


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what a hostile or broken file makes Python raise into an error that helps."""
    try:
        yield
    except ZarrtraceError:
        raise
    except Exception as error:  # what NumPy and zipfile raise depends on what is broken
        raise NPZError(
            f"{file}: cannot be read: {error}",
            why="It is cut short, damaged, encrypted, or not an NPZ file of plain numbers.",
            remedy="Restore it from a copy, or write it again.",
        ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk says into errors that help."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = disk.no_space(path, error)
            remedy = "Make room, and run the same command again with --overwrite."
            raise NoSpaceError(full.what, why=full.why, remedy=remedy) from error
        raise NPZError(
            f"{path}: cannot be written: {error.strerror or error}",
            remedy="Choose a folder that you may write to.",
        ) from error


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only once it is whole."""
    partial = file.with_name(f".{file.name}.zarrtrace-partial")
    with writing(file):
        try:
            with open(partial, "wb", opener=disk.open_own) as out:
                yield out
            partial.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a file that a symbolic link leads out of the folder.

    Raises
    ------
    NPZError
    """
    if not file.resolve().is_relative_to(folder.resolve()):
        raise NPZError(
            f"{file}: leads out of {folder}",
            why="It is, or is behind, a symbolic link.",
            remedy="Put the file itself there.",
        )


def run_jobs(
    jobs: Iterable[Callable[[], None]], threads: int | None, progress: Progress | None
) -> None:
    """Run jobs on threads, by default one a CPU; after an error, begin no further job."""
    with ThreadPoolExecutor(threads or cpus()) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def converted(
    file: Path, values: np.ndarray, dtype: DType | None, *, firing: bool = False
) -> np.ndarray:
    """Return values in C order and another precision; refuse those that become infinite.

    With `firing`, activations too small for it become its smallest number, as in a store.
    """
    try:
        with np.errstate(over="raise"):
            cast = np.ascontiguousarray(values, dtype=dtype)
            return keep_firing(cast, values) if firing else cast
    except FloatingPointError:
        raise NPZError(
            f"{file}: a value is too large for {dtype}",
            why="float16 ends at 65504.",
            remedy="Export as float32.",
        ) from None
