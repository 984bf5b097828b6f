"""One NPZ file: written as ``np.savez_compressed`` does, only faster; read with nothing trusted.

Its deflate is zlib-ng's, which releases the GIL, so that threads write files in parallel. The
archive around it is :mod:`zipfile`'s; all that it says is deterministic, dated 1980-01-01.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from zlib_ng import zlib_ng

from zarrtrace.errors import NPZError
from zarrtrace.npz.metadata import KEYS

_PIECE = 2**22
# Below this, time does not matter: everything is tried, so that no file is larger than NumPy's.
_SMALL_BYTES = 2**16
# No model has more of them; a header that says so would only make us ask for memory.
_MAX_HEADS, _MAX_FEATURES = 2**12, 2**22
# Deflate cannot shrink anything further than this.
_MAX_DEFLATE_RATIO = 1033

NewCompressor = Callable[[], Any]


# --- writing -----------------------------------------------------------------------------------


def _run_lengths() -> Any:
    """Compress by runs and entropy alone: fastest, and smallest unless numbers end in zeros."""
    return zlib_ng.compressobj(6, zlib_ng.DEFLATED, -15, 9, zlib_ng.Z_RLE)


def _run_lengths_in_small_blocks() -> Any:
    """Adapt more often, 15 % slower: diffuse float32 attention would else exceed NumPy's size."""
    return zlib_ng.compressobj(6, zlib_ng.DEFLATED, -15, 8, zlib_ng.Z_RLE)


def _matches() -> Any:
    """Search for repetitions: smallest for bfloat16 numbers held in float32."""
    return zlib_ng.compressobj(5, zlib_ng.DEFLATED, -15, 9)


def _as_numpy() -> Any:
    return zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -15)


def best_compressor(array: np.ndarray, pieces: Sequence[bytes | memoryview]) -> NewCompressor:
    """Return what makes the least of an array, which stands in `pieces` as bytes."""
    if array.nbytes <= _SMALL_BYTES:

        def size(new: NewCompressor) -> int:
            compressor = new()
            return sum(len(compressor.compress(p)) for p in pieces) + len(compressor.flush())

        every = (_run_lengths, _run_lengths_in_small_blocks, _matches, _as_numpy)
        return min(every, key=size)
    if array.dtype == np.float32:
        sample = array.reshape(-1)[:: max(1, array.size // 2**14) | 1].view(np.uint32)
        if np.count_nonzero(sample) > sample.size // 4:
            return _run_lengths_in_small_blocks if (sample & 0xFFFF).any() else _matches
    return _run_lengths if array.dtype.kind == "f" else _matches


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of an array in C order."""
    header = BytesIO()
    said = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(header, said)
    return header.getvalue()


def write_npz(out: IO[bytes], arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write C-contiguous arrays as an NPZ file, compressed, one at a time.

    Parameters
    ----------
    out
        Where to; must be seekable.
    arrays
        Keys and values.
    """
    with zipfile.ZipFile(out, "w") as archive:
        for key, array in arrays:
            data = array.reshape(-1).view(np.uint8).data
            pieces: list[bytes | memoryview] = [npy_header(array.dtype, array.shape)]
            pieces += pieces_of(data)
            compressor = best_compressor(array, pieces)()
            with member(archive, out, key) as info:
                for piece in pieces:
                    info.file_size += len(piece)
                    info.CRC = zlib_ng.crc32(piece, info.CRC)
                    out.write(compressor.compress(piece))
                out.write(compressor.flush())


def pieces_of(data: memoryview) -> list[memoryview]:
    """Cut bytes into pieces that are compressed one at a time."""
    return [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]


@contextlib.contextmanager
def member(archive: zipfile.ZipFile, out: IO[bytes], key: str) -> Iterator[zipfile.ZipInfo]:
    """Append an array to an NPZ file: write its deflate stream, set its size and checksum."""
    info = zipfile.ZipInfo(f"{key}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system, info.external_attr = 3, 0o644 << 16  # Unix, whatever wrote it
    info.file_size, info.CRC = 0, 0
    info.header_offset = out.tell()
    out.write(info.FileHeader(zip64=True))  # its length is known, its content not yet
    start = out.tell()
    yield info
    end = out.tell()
    info.compress_size = end - start
    out.seek(info.header_offset)
    out.write(info.FileHeader(zip64=True))
    out.seek(end)
    archive.filelist.append(info)
    archive.start_dir = end


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """Heads or features, and the dtype, that all files of a folder share."""

    size: int
    dtype: str


def keys_of(file: Path, archive: zipfile.ZipFile) -> tuple[str, ...]:
    """Return the keys of an NPZ file, which must be the layout's."""
    names = [info.filename for info in archive.infolist()]
    odd = [name for name in names if name not in {f"{key}.npy" for key in KEYS}]
    if odd or len(set(names)) < len(names):
        raise NPZError(
            f"{file}: holds {odd[0]!r}" if odd else f"{file}: holds an array twice",
            why="A file of this layout holds 'features' and 'attention' and nothing else.",
            remedy="Write the file again with these two keys.",
        )
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if any(info.compress_type not in methods for info in archive.infolist()):
        # A few kilobytes of bzip2 become gigabytes before anyone can look at their header.
        raise NPZError(
            f"{file}: compressed in another way than NumPy compresses",
            why="np.savez and np.savez_compressed store or deflate.",
            remedy="Write the file again with np.savez_compressed.",
        )
    return tuple(key for key in KEYS if f"{key}.npy" in names)


def read_header(file: Path, archive: zipfile.ZipFile, key: str, seq_len: int) -> Header:
    """Read and check what an array says of itself, decompressing no more than that."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _npy_header(stream)
        start = stream.tell()
    expected = (seq_len, -1) if key == "features" else (-1, seq_len, seq_len)
    limit = _MAX_FEATURES if key == "features" else _MAX_HEADS
    problem = ""
    if dtype.str not in ("<f2", "<f4"):
        problem = f"has dtype {dtype}, not float16 or float32"
    elif fortran:
        problem = "is in Fortran order"
    elif len(shape) != len(expected) or any(
        size != wanted if wanted > 0 else not 0 < size <= limit
        for size, wanted in zip(shape, expected, strict=True)
    ):
        shown = str(expected).replace("-1", "any")
        problem = f"has shape {shape}, not {shown}"
    elif info.file_size != start + math.prod(shape) * dtype.itemsize:
        problem = f"has {info.file_size} bytes, which do not fit its shape {shape}"
    elif info.file_size > info.compress_size * _MAX_DEFLATE_RATIO:
        problem = "claims more bytes than its compressed ones can hold"
    if problem:
        raise NPZError(
            f"{file}: {key!r} {problem}",
            why="It was damaged, edited, or belongs to another prompt or metadata file.",
            remedy="Write the file again as the documented layout says.",
        )
    return Header(shape[expected.index(-1)], dtype.name)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    # Later versions are for longer headers than plain numbers have; they may claim gigabytes.
    raise ValueError(f"npy format version {version} is not supported")


def read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Read an array whose header :func:`read_header` has accepted."""
    with archive.open(f"{key}.npy") as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    return array
