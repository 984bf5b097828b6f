"""Zstandard frames of chunks that are mostly zeros, made from their non-zero values.

In such a chunk zstd reads a megabyte of zeros to find some hundred runs whose places are known.
Since version 1.5.7 libzstd also takes them as *literals*, the bytes that are not copied, and
*sequences*: how many literals come next, and how many bytes are copied then, from how far back. The
frames are ordinary ones. That function is experimental, trusts what it is given, and stands in a
private module of ``zstandard``: once a process, frames are decoded and compared before any is used.
If that fails, chunks are compressed as usual.

Zeros behind a value are copied from before it, `_RUN` bytes, and the rest from `_RUN` bytes back.
Copies from nearer take less room and longer to decode: from 32 bytes back nearly twice as long as
zstd's own frames, from 128 bytes as long.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numcodecs import Zstd

#: Bytes of a block of zstd's: the most that the format allows.
ZSTD_BLOCK = 2**17
# Bytes of zeros that are copied at once.
_RUN = 128
# No copy may be shorter than 3 bytes.
_SHORTEST = 4
# zstd itself is as fast below these: bytes of the chunks of one call, bytes for each value in one.
_LEAST_BYTES, _BYTES_A_VALUE = 2**21, 512
# Share of values that stand right below another; from here on frames are larger than zstd's own.
_MOST_REPEATED = 0.7
#: libzstd may read this far behind the literals.
MARGIN = 8

_LOCAL = threading.local()

#: Places in a chunk, ascending, and the values there, little endian.
SparseChunk = tuple[np.ndarray, np.ndarray]
#: Sequences ``(n, 4)`` and literals of chunks one behind another, and where those of each end.
Parse = tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]


def sparse_frames(chunks: Sequence[SparseChunk], shape: tuple[int, int]) -> list[bytes | None]:
    """Return a frame of each chunk; None where it is to be compressed as usual.

    Parameters
    ----------
    chunks
        Their non-zero values, all of one data type.
    shape
        Rows and columns of each.

    Raises
    ------
    ValueError
        If places do not ascend.
    """
    size, total = math.prod(shape), math.prod(shape) * chunks[0][1].itemsize
    fits = [len(at) * _BYTES_A_VALUE <= total for at, _ in chunks]
    library = sequences_library() if sum(fits) * total >= _LEAST_BYTES else None
    chosen = [chunk for chunk, fit in zip(chunks, fits, strict=True) if fit]
    if library is None or _repeats_rows(max((at for at, _ in chosen), key=len), shape[1]):
        return [None] * len(chunks)
    frames = iter(compressed(library, _parse(chosen, size), total))
    return [next(frames) if fit else None for fit in fits]


def _repeats_rows(at: np.ndarray, columns: int) -> bool:
    """Whether most values stand below others: then zstd finds longer copies, from a row back."""
    above = at - columns
    found = np.append(at, -1)[np.searchsorted(at, above)] == above
    return bool(np.count_nonzero(found) > _MOST_REPEATED * len(at))


def compressed(library: Any, parse: Parse, total: int) -> list[bytes | None]:
    """Make frames of `total` bytes; None where a block would not be smaller than its content."""
    ffi, lib = library.ffi, library.lib
    context, room = _context(library), np.empty(total, np.uint8)
    sequences = ffi.from_buffer("ZSTD_Sequence[]", parse[0])
    literals, target = ffi.from_buffer(parse[1]), ffi.from_buffer(room)
    frames: list[bytes | None] = []
    for (first, start), (last, stop) in pairwise([(0, 0), *parse[2]]):
        written = lib.ZSTD_compressSequencesAndLiterals(
            context, target, total, sequences + first, last - first,
            literals + start, stop - start, stop - start + MARGIN, total,
        )  # fmt: skip
        frames.append(None if lib.ZSTD_isError(written) else room[:written].tobytes())
    return frames


def _parse(chunks: Sequence[SparseChunk], size: int) -> Parse:
    """Describe chunks as literals and copies."""
    item, count = chunks[0][1].itemsize, len(chunks)
    values = np.concatenate([one for _, one in chunks])
    # The low bytes of bfloat16's values are zeros: they end the run of zeros before the value.
    low = 2 if item == 4 and not (values.view(np.uint32) & 0xFFFF).any() else 0
    places = [at + number * size for number, (at, _) in enumerate(chunks)]
    start_bytes = np.concatenate(places, dtype=np.int64) * item + low
    # A piece is a value and the zeros behind it, or the zeros at a block's start: copies, too, end
    # with their block.
    first = np.arange(0, size * item, ZSTD_BLOCK)
    blocks = (first + size * item * np.arange(count)[:, None]).ravel()
    opens = np.searchsorted(start_bytes, blocks) + np.arange(len(blocks))
    has_value = np.ones(len(values) + len(blocks), bool)
    has_value[opens] = False
    start = np.empty(len(has_value) + 1, np.int64)
    start[:-1][has_value] = start_bytes
    start[opens], start[-1] = blocks, size * item * count
    width = has_value * (item - low)

    zeros = np.diff(start) - width
    if (zeros < 0).any():
        raise ValueError("places of values do not ascend")
    zeros_before = np.roll(zeros, 1)
    zeros_before[opens[:: len(first)]] = 0  # nothing stands before a chunk
    is_long = zeros >= _RUN + _SHORTEST
    from_before = is_long & (zeros_before >= _RUN)
    # Otherwise the first zero is a literal, and is copied; up to three are all literals.
    spelt = np.where(zeros < _SHORTEST, zeros, ~from_before)
    in_two = is_long & ~(from_before & (width == 0))

    # By piece: its first copy, the rest of it, and the end of its block.
    sequences = np.zeros((len(zeros), 3, 4), np.uint32)
    sequences[:, 0, 0] = np.where(from_before, _RUN + width, 1)
    sequences[:, 1, 0] = _RUN
    sequences[:, 0, 2] = np.where(in_two, _RUN, zeros) - spelt
    sequences[:, 1, 2] = np.where(in_two, zeros - _RUN, 0)
    is_there = sequences[:, :, 2] > 0
    is_there[opens[1:] - 1, 2] = is_there[-1, 2] = True
    kept = np.flatnonzero(is_there)
    sequences = sequences.reshape(-1, 4).take(kept, axis=0)
    behind = np.cumsum(width + spelt)
    sequences[:, 1] = np.diff(behind.take(kept // 3), prepend=0)

    literals = np.zeros(behind[-1] + MARGIN, np.uint8)
    at = (behind - width - spelt)[has_value]
    for number in range(low, item):
        literals[at + (number - low)] = values.view(np.uint8)[number::item]
    last = np.append(opens[len(first) :: len(first)], len(zeros)) - 1
    ends = zip(np.searchsorted(kept, last * 3 + 3).tolist(), behind[last].tolist(), strict=True)
    return sequences, literals, list(ends)


def _context(library: Any) -> Any:
    """Return this thread's context of libzstd: to make one takes longer than to use it."""
    context = getattr(_LOCAL, "context", None)
    if context is None:
        lib = library.lib
        context = library.ffi.gc(lib.ZSTD_createCCtx(), lib.ZSTD_freeCCtx)
        if not context:
            raise MemoryError("libzstd gets no memory")
        for parameter, value in (
            (lib.ZSTD_c_compressionLevel, 1),
            # From this strategy on it weighs its tables of codes: a seventh less for few values.
            (lib.ZSTD_c_strategy, lib.ZSTD_lazy),
            (lib.ZSTD_c_blockDelimiters, lib.ZSTD_sf_explicitBlockDelimiters),
            (lib.ZSTD_c_repcodeResolution, lib.ZSTD_ps_enable),
        ):
            if lib.ZSTD_isError(lib.ZSTD_CCtx_setParameter(context, parameter, value)):
                raise ValueError("libzstd refuses a parameter")
        _LOCAL.context = context
    return context


@cache
def sequences_library() -> Any:
    """Return the module of libzstd's functions; None if it is missing or makes wrong frames."""
    try:
        library = importlib.import_module("zstandard._cffi")
        is_right = _makes_right_frames(library)
    except Exception:  # noqa: BLE001 -- a private module: whatever it raises, zstd itself remains
        return None
    return library if is_right else None


def _makes_right_frames(library: Any) -> bool:
    """Compare what frames decode to with what they were made of."""
    rising = np.cumsum(np.arange(1, 400))  # runs of every length up to some hundred
    size = 5 * ZSTD_BLOCK // 8  # float32 values of two blocks and a half
    numbers = np.arange(1, 400, dtype=np.uint32)
    for values in (numbers << 16, numbers * 0x01010101, numbers.astype(np.uint16)):
        places = (rising[:0], rising, np.array([0, size - 1]))
        chunks = [(at, values[: len(at)]) for at in places]
        frames = compressed(library, _parse(chunks, size), size * values.itemsize)
        for (at, value), frame in zip(chunks, frames, strict=True):
            dense = np.zeros(size, values.dtype)
            dense[at] = value
            if frame is None or bytes(Zstd().decode(frame)) != dense.tobytes():
                return False
    return True
