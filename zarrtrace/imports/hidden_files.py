"""Files of hidden states, read by blocks of samples: NumPy's, and safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from zarrtrace.errors import NPZError
from zarrtrace.npz.files import reading
from zarrtrace.records import BFloat16

#: The array of all layers, and what files with it are called.
HIDDEN = "hidden_states"
HIDDEN_FILES = (f"{HIDDEN}.npy", "phase_a_hidden_states.npz", f"{HIDDEN}.npz")

_LAYER_FILE = re.compile(r"layer_(\d{1,5})\.(npy|safetensors)")
_TYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
}
_MAX_HEADER = 2**24
# Deflate cannot shrink anything further than this.
_MAX_DEFLATE_RATIO = 1033
_BLOCK_BYTES = 2**24
_HASHED, _PIECE = 64, 2**14

Rows = np.ndarray | BFloat16


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of some layers, in files.

    Attributes
    ----------
    files
        All of them.
    layers
        Indices of decoder blocks; None if the files do not say them.
    shape
        Numbers of samples, layers and channels.
    dtype
        float16, if all layers are, or float32.
    read
        Yields blocks from a sample on: the number of the first sample, and the rows by layer.
    archive
        The NPZ file that may hold columns, too.
    """

    files: tuple[Path, ...]
    layers: tuple[int, ...] | None
    shape: tuple[int, int, int]
    dtype: str
    read: Callable[[int], Iterator[tuple[int, Sequence[Rows]]]]
    archive: Path | None = None

    def fingerprint(self) -> str:
        """Hash sizes of all files and a stride of their bytes."""
        found = hashlib.blake2b(digest_size=16)
        for file in self.files:
            size = file.stat().st_size
            found.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as source:
                for at in range(0, size, max(_PIECE, size // _HASHED)):
                    source.seek(at)
                    found.update(source.read(_PIECE))
                source.seek(max(0, size - _PIECE))
                found.update(source.read())
        return found.hexdigest()


def hidden_files(source: Path) -> list[Path]:
    """Return the files of hidden states that a path stands for; empty if there are none."""
    if source.is_file():
        return [source] if source.suffix in (".npy", ".npz", ".safetensors") else []
    for name in HIDDEN_FILES:
        if (source / name).is_file():
            return [source / name]
    found = [file for file in source.glob("layer_*") if _LAYER_FILE.fullmatch(file.name)]
    return sorted(found, key=_layer_of)


def open_hidden(files: Sequence[Path]) -> HiddenStates:
    """Look at files of hidden states; their numbers are read later.

    Raises
    ------
    NPZError
        If a file cannot be read, or does not fit the others.
    """
    if files[0].suffix == ".npz":
        return _open_npz(files[0])
    arrays = [_open_array(file) for file in files]
    if len(files) == 1 and len(arrays[0].shape) == 3:
        whole = arrays[0]
        return _of_arrays(files, None, [whole[:, at] for at in range(whole.shape[1])])
    numbers = [_layer_of(file) if _LAYER_FILE.fullmatch(file.name) else -1 for file in files]
    if len({*numbers}) < len(numbers):
        raise _wrong(files[-1], "is a second file of its layer", "Keep one file a layer.")
    layers = None if -1 in numbers else tuple(numbers)
    return _of_arrays(files, layers, arrays)


def _of_arrays(
    files: Sequence[Path], layers: tuple[int, ...] | None, arrays: Sequence[Rows]
) -> HiddenStates:
    first = arrays[0].shape
    for at, array in enumerate(arrays):
        if len(array.shape) != 2 or array.shape != first or 0 in array.shape:
            file = files[min(at, len(files) - 1)]
            raise _wrong(
                file,
                f"has shape {array.shape}"
                + (f", {files[0].name} has {first}" if array.shape != first else ""),
                "Give (sample, channel) a file, equal in all layers, or (sample, layer, channel).",
            )
    samples, channels = first
    sizes = [2 if _is_half(array) else 4 for array in arrays]
    step = max(1, _BLOCK_BYTES // (channels * sum(sizes)))

    def read(start: int) -> Iterator[tuple[int, list[Rows]]]:
        for at in range(start, samples, step):
            yield at, [array[at : at + step] for array in arrays]

    dtype = "float16" if all(_is_half(array) for array in arrays) else "float32"
    return HiddenStates(tuple(files), layers, (samples, len(arrays), channels), dtype, read)


def _is_half(array: Rows) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.itemsize == 2


def _open_array(file: Path) -> Rows:
    """Map a file's array into memory."""
    with reading(file):
        if file.suffix == ".safetensors":
            return _open_safetensors(file)
        array: np.ndarray = np.lib.format.open_memmap(file, mode="r")  # no pickle
    _check_dtype(file, array.dtype)
    return array


def _open_safetensors(file: Path) -> Rows:
    size = file.stat().st_size
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _wrong(file, "is not a safetensors file", "Write it again.")
        header = json.loads(source.read(length))
    tensors = {name: one for name, one in header.items() if name != "__metadata__"}
    number = _layer_of(file) if _LAYER_FILE.fullmatch(file.name) else ""
    name = f"residual.layer_{number}"
    if name not in tensors:
        if len(tensors) != 1:
            raise _wrong(
                file,
                f"holds {len(tensors)} tensors: {', '.join(sorted(tensors)[:5])}",
                f"Write one tensor a file, or call the hidden states {name!r}.",
            )
        (name,) = tensors
    tensor = tensors[name]
    shape = tuple(int(one) for one in tensor["shape"])
    begin, end = (int(one) for one in tensor["data_offsets"])
    dtype = _TYPES.get(tensor["dtype"])
    if dtype is None:
        raise _wrong_dtype(file, str(tensor["dtype"]))
    is_whole = end - begin == math.prod(shape) * dtype.itemsize
    if not is_whole or min(shape, default=0) < 1 or not 0 <= begin <= end <= size - 8 - length:
        raise _wrong(file, f"says that {name!r} is where it is not", "Write the file again.")
    array = np.memmap(file, dtype, "r", 8 + length + begin, shape)
    return BFloat16(array) if tensor["dtype"] == "BF16" else array


def _open_npz(file: Path) -> HiddenStates:
    with reading(file), zipfile.ZipFile(file) as archive:
        info = npz_member(file, archive, HIDDEN)
        with archive.open(info) as stream:
            shape, dtype = npy_header(file, HIDDEN, stream)
            start = stream.tell()
    _check_dtype(file, dtype)
    if len(shape) != 3 or 0 in shape:
        raise _wrong(file, f"{HIDDEN!r} has shape {shape}", "Write it as (sample, layer, channel).")
    size = start + math.prod(shape) * dtype.itemsize
    if info.file_size != size or size > info.compress_size * _MAX_DEFLATE_RATIO:
        raise _wrong(file, f"{HIDDEN!r} has not the bytes of its shape {shape}", "Write it again.")

    def read(first: int) -> Iterator[tuple[int, list[Rows]]]:
        with _member(file, HIDDEN) as stream:
            row = math.prod(shape[1:]) * dtype.itemsize
            step = max(1, _BLOCK_BYTES // row)
            for at in range(0, shape[0], step):
                stop = min(at + step, shape[0])
                content = stream.read((stop - at) * row)
                if stop > first:
                    block = np.frombuffer(content, dtype).reshape(stop - at, *shape[1:])
                    begin = max(first, at)
                    rows = block[begin - at :]
                    yield begin, [rows[:, layer] for layer in range(shape[1])]

    kind = "float16" if dtype.itemsize == 2 else "float32"
    return HiddenStates((file,), None, (shape[0], shape[1], shape[2]), kind, read, file)


@contextlib.contextmanager
def _member(file: Path, key: str) -> Iterator[IO[bytes]]:
    with reading(file), zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
        npy_header(file, key, stream)
        yield stream


def npz_member(file: Path, archive: zipfile.ZipFile, key: str) -> zipfile.ZipInfo:
    """Return an array's entry in an NPZ file.

    Raises
    ------
    NPZError
        If it has none, or more than one, or is compressed in another way than NumPy compresses.
    """
    found = [info for info in archive.infolist() if info.filename == f"{key}.npy"]
    if len(found) != 1:
        held = ", ".join(sorted(info.filename.removesuffix(".npy") for info in archive.infolist()))
        raise _wrong(
            file,
            f"holds {len(found)} arrays {key!r}",
            f"It holds: {held[:200]}. Call the hidden states {HIDDEN!r}.",
        )
    if found[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _wrong(
            file, "is compressed in another way than NumPy compresses", "Use np.savez_compressed."
        )
    return found[0]


def npy_header(file: Path, key: str, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an array; refuse one of Python objects, or in Fortran order."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy format version {version} is not supported")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise _wrong(
            file,
            f"{key!r} holds Python objects, which only pickle reads",
            f"Write {key}.astype(str), or numbers. Pickle can run any program, and is not read.",
        )
    if is_fortran and len(shape) > 1:
        raise _wrong(file, f"{key!r} is in Fortran order", "Write np.ascontiguousarray of it.")
    return shape, dtype


def _check_dtype(file: Path, dtype: np.dtype[Any]) -> None:
    if dtype.str not in ("<f2", "<f4"):
        raise _wrong_dtype(file, str(dtype))


def _wrong_dtype(file: Path, dtype: str) -> NPZError:
    return _wrong(
        file,
        f"holds hidden states of type {dtype}",
        "Write them as float16 or float32 (safetensors: bfloat16, too).",
    )


def _layer_of(file: Path) -> int:
    found = _LAYER_FILE.fullmatch(file.name)
    return int(found[1]) if found else 0


def _wrong(file: Path, what: str, remedy: str) -> NPZError:
    return NPZError(f"{file}: {what}", remedy=remedy)
