"""Frames of sparse chunks: any zstd decodes them to the dense chunk, or zstd itself makes them."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Zstd

from zarrtrace.format.layout import ArrayLayout
from zarrtrace.records import Nonzeros
from zarrtrace.store import sparse_frames as module
from zarrtrace.store.chunks import encode_file, encode_rows, tail_of
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding
from zarrtrace.store.nodes import array_metadata, encoded
from zarrtrace.store.sparse_frames import sparse_frames

BLOCK = 2**17


@pytest.fixture(autouse=True)
def other_check() -> Iterator[None]:
    """Check the library again where a test changed it."""
    yield
    module.sequences_library.cache_clear()
    module._LOCAL.__dict__.clear()


@pytest.fixture
def every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make frames of small and dense chunks, too."""
    monkeypatch.setattr(module, "_LEAST_BYTES", 0)
    monkeypatch.setattr(module, "_BYTES_A_VALUE", 0)


def dense_of(at: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    dense = np.zeros(size, values.dtype)
    dense[at] = values
    return dense


def check(
    frames: list[bytes | None], chunks: list[tuple[np.ndarray, np.ndarray]], size: int
) -> None:
    """Compare what two libraries decode, of their own versions of libzstd, with NumPy's array."""
    for frame, (at, values) in zip(frames, chunks, strict=True):
        assert frame is not None
        expected = dense_of(at, values, size).tobytes()
        assert zstandard.get_frame_parameters(frame).content_size == len(expected)
        assert bytes(Zstd().decode(frame)) == expected
        assert zstandard.ZstdDecompressor().decompress(frame) == expected


#: Bits of float32: zeros of both signs, subnormal ones, NaNs with a payload, infinity, bfloat16's.
BITS = st.one_of(
    st.sampled_from([0, 0x80000000, 1, 0x7FC00001, 0xFFC01234, 0x7F800000, 0xFF800000, 0x3FC00000]),
    st.integers(0, 2**16 - 1).map(lambda high: high << 16),
    st.integers(0, 2**32 - 1),
)


@st.composite
def sparse_chunks(draw: st.DrawFn) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Chunks of up to four blocks, with runs of zeros of all kinds: none, short, long, whole."""
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    edge = BLOCK // np.dtype(dtype).itemsize
    size = draw(st.one_of(st.integers(1, 5000), st.integers(1, 4).map(lambda n: n * edge),
                          st.integers(edge - 2, 4 * edge)))  # fmt: skip
    is_bfloat16 = draw(st.booleans())
    chunks = []
    for _ in range(draw(st.integers(1, 4))):
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        longest = draw(st.sampled_from([1, 2, 3, 20, 40, 300, 20_000]))
        start = draw(st.integers(0, size - 1))
        at = start + np.cumsum(rng.integers(1, longest + 1, draw(st.integers(0, 3000))))
        more = draw(st.lists(st.integers(0, size - 1), max_size=9))
        near = [n + d for n in range(0, size + 1, edge) for d in (-34, -33, -32, -2, -1, 0, 1, 32)]
        more += draw(st.lists(st.sampled_from(near), max_size=9))
        at = np.unique(np.concatenate([at, np.array(more, np.int64)]).astype(np.int64))
        at = at[(at >= 0) & (at < size)]
        some = draw(st.lists(BITS, min_size=1, max_size=30))
        bits = np.resize(np.array(some, np.uint32), len(at))
        if dtype == np.float16:
            values = (bits >> 16).astype(np.uint16).view(np.float16)
        else:
            values = (bits & 0xFFFF0000 if is_bfloat16 else bits).astype(np.uint32).view(np.float32)
        chunks.append((at, values))
    return chunks, size


@pytest.mark.usefixtures("every_chunk")
@settings(max_examples=60)
@given(sparse_chunks())
def test_frames_decode_to_the_dense_chunks(
    made: tuple[list[tuple[np.ndarray, np.ndarray]], int],
) -> None:
    chunks, size = made
    module_frames = sparse_frames(chunks, (1, size))
    # A chunk that libzstd cannot make smaller, as one of a few bytes, has none.
    both = [(f, c) for f, c in zip(module_frames, chunks, strict=True) if f is not None]
    check([f for f, _ in both], [c for _, c in both], size)
    if size * chunks[0][1].itemsize >= BLOCK and all(len(at) < size // 20 for at, _ in chunks):
        assert len(both) == len(chunks)
    # A frame depends on nothing but its chunk's values, and on whether all are bfloat16.
    assert sparse_frames(chunks, (1, size)) == module_frames


def features(rng: np.random.Generator, size: int, active: int, dtype: Any) -> Any:
    at = np.sort(rng.choice(size, active, replace=False))
    return at, (rng.gamma(2.0, size=active) + 0.3).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_chunks_as_they_are_written(dtype: Any) -> None:
    rng, size = np.random.default_rng(0), 64 * 4096
    chunks = [features(rng, size, active, dtype) for active in (0, 1, 30, 400, 1000, 400, 7, 900)]
    frames = sparse_frames(chunks, (1, size))
    check(frames, chunks, size)
    dense = [Zstd(level=1).encode(dense_of(*chunk, size)) for chunk in chunks]
    assert sum(len(frame or b"") for frame in frames) < 1.02 * sum(map(len, dense))


def test_a_frame_is_the_same_in_every_thread_and_in_any_company() -> None:
    rng, size = np.random.default_rng(1), 64 * 4096
    chunks = [features(rng, size, active, np.float32) for active in (400, 30, 500, 0)]
    found: list[list[bytes | None]] = []
    threads = [
        threading.Thread(target=lambda: found.append(sparse_frames(chunks, (1, size))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.append(sparse_frames(chunks[::-1], (1, size))[::-1])
    assert None not in found[0]
    assert found == [found[0]] * 4


def test_dense_chunks_and_small_amounts_are_left_to_zstd() -> None:
    rng, size = np.random.default_rng(2), 64 * 4096
    some, many = (features(rng, size, active, np.float32) for active in (400, 5000))
    frames = sparse_frames([some, many, some, some], (64, 4096))
    assert [frame is None for frame in frames] == [False, True, False, False]
    assert sparse_frames([some], (64, 4096)) == [None]
    assert (
        sparse_frames([(at[:3], values[:3]) for at, values in [some] * 8], (1, 4096)) == [None] * 8
    )


@pytest.mark.parametrize(("share", "is_left"), [(0.5, False), (0.9, True)])
def test_rows_that_repeat_are_left_to_zstd(share: float, is_left: bool) -> None:
    rng, dense = np.random.default_rng(4), np.zeros((64, 4096), np.float32)
    columns = rng.choice(4096, 20, replace=False)
    for row in dense:
        columns = np.where(rng.random(20) < share, columns, rng.choice(4096, 20))
        row[columns] = rng.gamma(2.0, size=20) + 0.3
    at = np.flatnonzero(dense)
    frames = sparse_frames([(at, dense.reshape(-1)[at])] * 2, dense.shape)
    assert [frame is None for frame in frames] == [is_left] * 2


@pytest.mark.usefixtures("every_chunk")
@pytest.mark.parametrize("places", [[5, 5], [7, 5], [3, 2**16, 2**16]])
def test_places_that_do_not_ascend_are_refused(places: list[int]) -> None:
    chunk = np.array(places), np.ones(len(places), np.float32)
    with pytest.raises(ValueError, match="do not ascend"):
        sparse_frames([chunk], (1, 2**17))


# --- without the library -----------------------------------------------------------------------


class Tampered:
    """libzstd's functions, one of which differs."""

    def __init__(self, library: Any, **changes: Any) -> None:
        self.ffi, self._real, self._changes = library.ffi, library.lib, changes

    @property
    def lib(self) -> Tampered:
        return self

    def __getattr__(self, name: str) -> Any:
        if name in self._changes:
            if self._changes[name] is None:
                raise AttributeError(name)
            return self._changes[name]
        return getattr(self._real, name)


def _fails(*arguments: Any) -> int:
    return 2**64 - 1  # what ZSTD_isError takes for an error


def _flips_a_bit(real: Any, ffi: Any) -> Any:
    def compress(context: Any, target: Any, *rest: Any) -> int:
        written: int = real(context, target, *rest)
        ffi.buffer(target, written)[written - 1 : written] = b"\x55"
        return written

    return compress


def _tampered(name: str) -> Any:
    library = importlib.import_module("zstandard._cffi")
    real = library.lib.ZSTD_compressSequencesAndLiterals
    return {
        "no such function": Tampered(library, ZSTD_compressSequencesAndLiterals=None),
        "no such parameter": Tampered(library, ZSTD_c_repcodeResolution=None),
        "a refused parameter": Tampered(library, ZSTD_CCtx_setParameter=_fails),
        "an error": Tampered(library, ZSTD_compressSequencesAndLiterals=_fails),
        "wrong frames": Tampered(
            library, ZSTD_compressSequencesAndLiterals=_flips_a_bit(real, library.ffi)
        ),
        "nothing is wrong": Tampered(library),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["no module", "no such function", "no such parameter", "a refused parameter", "an error",
     "wrong frames", "nothing is wrong"],
)  # fmt: skip
def test_what_does_not_pass_its_check_is_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, rows = written_features(np.dtype(np.float32))
    encoding = ArrayEncoding(layout)
    dense = list(encode_rows(layout, encoding, np.asarray(rows)))
    made = list(encode_rows(layout, encoding, rows))
    assert made != dense
    module.sequences_library.cache_clear()
    module._LOCAL.__dict__.clear()
    if name == "no module":
        monkeypatch.setitem(sys.modules, "zstandard._cffi", None)
    else:
        tampered = _tampered(name)
        monkeypatch.setitem(sys.modules, "zstandard._cffi", tampered)
    found = list(encode_rows(layout, encoding, rows))
    assert found == (made if name == "nothing is wrong" else dense)


# --- files -------------------------------------------------------------------------------------


def written_features(dtype: np.dtype[Any]) -> tuple[ArrayLayout, Nonzeros]:
    """Two layers' layout, 121 tokens whose last chunk of columns is narrower, and one layer."""
    rng, shape, columns = np.random.default_rng(3), (121, 4 * 4096 - 100), 4096
    layout = ArrayLayout(
        dims=("layer", "query", "feature"),
        dtype=dtype.name,
        shape=(1, *shape),
        chunks=(1, 64, columns),
        shards=(1, 128, 4 * columns),
        codec="sparse",
        fill_value=float("nan"),
    )
    dense = np.zeros(shape, np.float32)
    dense[rng.random(shape) < 0.0015] = 1.5
    dense *= rng.gamma(2.0, size=shape).astype(np.float32)
    dense[5] = 1  # every feature
    dense[70, :3] = -0.0, np.nan, -np.inf
    at, values = [], []
    for start in range(0, shape[1], columns):
        block = np.zeros((shape[0], columns), np.float32)
        part = dense[:, start : start + columns]
        block[:, : part.shape[1]] = part
        at.append(np.flatnonzero(block.view(np.uint32)))
        values.append(block.reshape(-1)[at[-1]].astype(dtype))
    return layout, Nonzeros(shape, columns, tuple(at), tuple(values))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_reader_decodes_them(dtype: str, tmp_path: Path) -> None:
    layout, rows = written_features(np.dtype(dtype))
    encoding, expected = ArrayEncoding(layout), np.asarray(rows)
    chunks = list(encode_rows(layout, encoding, rows))
    stored = {
        number: (len(chunk), int.from_bytes(chunk[-CRC_BYTES:], "little"))
        for number, chunk in enumerate(chunks)
    }
    content = b"".join([*chunks, tail_of(encoding, stored)[0]])
    assert content != encode_file(encoding, expected[np.newaxis])[0]
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "zarr.json").write_bytes(encoded(array_metadata(layout)))
    (folder / "c.0.0.0").write_bytes(content)
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    (tmp_path / "zarr.json").write_text(json.dumps(group))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    readers = {
        "zarr-python": np.asarray(zarr.open_array(folder, mode="r")[0]),
        "xarray": xr.open_zarr(tmp_path, consolidated=False)["features"][0].to_numpy(),
        "tensorstore": np.asarray(tensorstore.open(spec).result()[0].read().result()),
        "zarrtrace": _read_by_chunks(encoding, chunks, expected.shape),
    }
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        readers["zarrs"] = np.asarray(zarr.open_array(folder, mode="r")[0])
    for reader, found in readers.items():
        assert found.tobytes() == expected.tobytes(), reader


def _read_by_chunks(
    encoding: ArrayEncoding, chunks: list[bytes], shape: tuple[int, int]
) -> np.ndarray:
    found, across = np.zeros((128, 4 * 4096), encoding.dtype), 4
    for number, chunk in enumerate(chunks):
        down, right = divmod(number, across)
        place = slice(down * 64, down * 64 + 64), slice(right * 4096, right * 4096 + 4096)
        found[place] = encoding.decode(chunk)[0]
    return np.ascontiguousarray(found[: shape[0], : shape[1]])
