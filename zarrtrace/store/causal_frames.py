"""Blosc frames of attention, made from the places of its zeros.

No token attends to those behind it: half of a chunk is zeros, in runs whose places are known. zstd
looks for them, and for copies of the weights between them, which have none. Here each run is a copy
of one zero, and everything else is left to the codes of single bytes, as
:mod:`zarrtrace.store.sparse_frames` does for features. The frames are ordinary ones of Blosc 1.

In a block of Blosc's the bytes stand plane by plane: all first bytes of its numbers, then all
second ones. Here a block holds whole heads, in which the runs are the same, and a plane is one
block of zstd's. Planes that are all zeros, as the lower two of bfloat16's, are one run.
"""

from __future__ import annotations

import itertools
import math
import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from zarrtrace.records import BFloat16
from zarrtrace.store.sparse_frames import MARGIN, ZSTD_BLOCK, Parse, compressed, sequences_library

# Shorter runs are not copied: a copy has at least 3 bytes, and the zero before it.
_SHORTEST = 4
# Below this share of zeros in runs, and above this one of zeros elsewhere, zstd makes shorter ones.
_LEAST_IN_RUNS, _MOST_ELSEWHERE = 1 / 16, 1 / 4
# zstd itself is as fast below this many numbers.
_LEAST_NUMBERS = 2**14
# Versions of Blosc's format and of zstd's in it, and its flags: shuffled, one stream a block, zstd.
_VERSIONS, _FLAGS = (2, 1), 0x01 | 0x10 | 4 << 5


def causal_frame(values: np.ndarray | BFloat16) -> bytes | None:
    """Return a Blosc frame of a chunk; None where it is to be compressed as usual.

    Parameters
    ----------
    values
        A whole chunk ``(head, query, key)``, contiguous, little endian.
    """
    bits = values.bits if isinstance(values, BFloat16) else values.view(f"<u{values.itemsize}")
    itemsize = 4 if isinstance(values, BFloat16) else values.itemsize
    size = bits[0].size
    if bits.size < _LEAST_NUMBERS or size > ZSTD_BLOCK or (found := sequences_library()) is None:
        return None
    is_used = np.bitwise_or.reduce(bits, axis=0) != 0
    runs = _runs(is_used.shape, np.packbits(is_used).tobytes())
    if not len(runs.copied) or size - len(runs.literal) < _LEAST_IN_RUNS * size:
        return None
    literals = bits.reshape(len(bits), -1).take(runs.literal, axis=1)
    elsewhere = literals.size - np.count_nonzero(literals) - len(bits) * len(runs.copied)
    if elsewhere > _MOST_ELSEWHERE * literals.size:
        return None
    together = min(ZSTD_BLOCK // size, len(bits))
    frames = []
    for head in range(0, len(bits), together):
        some = literals[head : head + together]
        parse, total = _parse(runs, some, itemsize, size), itemsize * size * len(some)
        (frame,) = compressed(found, parse, total)
        if frame is None:
            return None
        frames.append(frame)
    return _blosc(frames, itemsize, itemsize * bits.size, itemsize * size * together)


class _Runs(NamedTuple):
    """Runs of zeros that all heads have.

    Attributes
    ----------
    literal
        Places of the numbers that are written; the others are copies of zeros.
    before, copied
        Literals before each run, and zeros that are copied there.
    """

    literal: np.ndarray
    before: np.ndarray
    copied: np.ndarray


@lru_cache(128)
def _runs(shape: tuple[int, int], used: bytes) -> _Runs:
    """Find the zeros before the first number of each row ``(query, key)`` and behind the last.

    They are those of all layers of a trace, and of all traces of its length.

    Parameters
    ----------
    used
        Which numbers are not zero in every head, as bits.
    """
    keys = shape[1]
    bits = np.unpackbits(np.frombuffer(used, np.uint8), count=math.prod(shape))
    key, is_used = np.arange(keys), bits.view(bool).reshape(shape)
    has_any = is_used.any(axis=1)
    first = np.where(has_any, is_used.argmax(axis=1), keys)
    last = keys - np.where(has_any, is_used[:, ::-1].argmax(axis=1), keys)
    is_kept = ((key >= first[:, None]) & (key < last[:, None])).reshape(-1)
    edges = np.flatnonzero(np.diff(is_kept, prepend=True, append=True))
    starts, ends = edges[::2], edges[1::2]
    is_long = ends - starts >= _SHORTEST
    starts, ends = starts[is_long] + 1, ends[is_long]  # behind the zero that is copied
    steps = np.zeros(len(is_kept) + 1, np.int8)
    steps[starts], steps[ends] = 1, -1
    literal = np.flatnonzero(np.cumsum(steps[:-1], dtype=np.int8) == 0)
    copied = ends - starts
    return _Runs(literal, np.diff(starts - np.cumsum(copied) + copied, prepend=0), copied)


def _parse(runs: _Runs, literals: np.ndarray, itemsize: int, size: int) -> Parse:
    """Describe some heads ``(head, literal)`` plane by plane."""
    heads, width = len(literals), literals.itemsize
    sequences = np.zeros((heads * len(runs.copied) + 1, 4), np.uint32)
    sequences[:-1, 0] = 1
    sequences[:-1, 1] = np.tile(runs.before, heads)
    sequences[:-1, 2] = np.tile(runs.copied, heads)
    rest = literals.shape[1] - int(runs.before.sum())  # behind the last run of a head
    sequences[len(runs.copied) :: len(runs.copied), 1] += np.uint32(rest)
    of_zeros = np.array([[1, 1, heads * size - 1, 0], [0] * 4], np.uint32)

    used, each = int(np.bitwise_or.reduce(literals, axis=None)), literals.reshape(-1).view(np.uint8)
    parts, copies = [], []
    for plane in range(width - itemsize, width):
        if plane < 0 or not used >> 8 * plane & 0xFF:
            parts.append(np.zeros(1, np.uint8))
            copies.append(of_zeros)
        else:
            parts.append(each[plane::width])
            copies.append(sequences)
    content = np.concatenate([*parts, np.zeros(MARGIN, np.uint8)])
    joined = np.concatenate(copies)
    return joined, content, [(len(joined), len(content) - MARGIN)]


def _blosc(frames: list[bytes], itemsize: int, size: int, block: int) -> bytes:
    """Put frames of zstd's, each of a block, into one of Blosc's."""
    parts = [struct.pack("<i", len(frame)) + frame for frame in frames]
    starts = [*itertools.accumulate(map(len, parts), initial=16 + 4 * len(parts))]
    header = struct.pack("<4B3I", *_VERSIONS, _FLAGS, itemsize, size, block, starts[-1])
    return b"".join([header, struct.pack(f"<{len(parts)}i", *starts[:-1]), *parts])
