"""Frames of attention: any Blosc decodes them to the chunk, or zstd itself makes them."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc

from zarrtrace.format.layout import ArrayLayout
from zarrtrace.records import BFloat16
from zarrtrace.store import causal_frames as module
from zarrtrace.store import sparse_frames
from zarrtrace.store.causal_frames import causal_frame
from zarrtrace.store.chunks import encode_rows, tail_of
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding
from zarrtrace.store.nodes import array_metadata, encoded

KINDS = ("bfloat16", "float32", "float16")


@pytest.fixture(autouse=True)
def other_check() -> Iterator[None]:
    """Check the library again where a test changed it."""
    yield
    sparse_frames.sequences_library.cache_clear()
    sparse_frames._LOCAL.__dict__.clear()


@pytest.fixture
def every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make frames of small chunks, and of those with few zeros in runs or many elsewhere, too."""
    monkeypatch.setattr(module, "_LEAST_NUMBERS", 0)
    monkeypatch.setattr(module, "_LEAST_IN_RUNS", 0)
    monkeypatch.setattr(module, "_MOST_ELSEWHERE", 1)


def bits_of(values: np.ndarray | BFloat16) -> bytes:
    """Return the bytes of the dense chunk, without the code under test."""
    if isinstance(values, BFloat16):
        return (values.bits.astype(np.uint32) << 16).astype("<u4").tobytes()
    return values.tobytes()


def as_kind(bits: np.ndarray, kind: str) -> np.ndarray | BFloat16:
    """Take bits of float32 as values of a kind."""
    if kind == "float32":
        return bits.astype(np.uint32).view(np.float32)
    half = (bits >> 16).astype(np.uint16)
    return BFloat16(half) if kind == "bfloat16" else half.view(np.float16)


def attention(
    rng: np.random.Generator, heads: int, keys: int, rows: slice, kind: str
) -> np.ndarray | BFloat16:
    """Causal softmax weights, as a model computes them."""
    scores = np.exp(2 * rng.standard_normal((heads, keys, keys))) * np.tri(keys)
    weights = (scores / scores.sum(-1, keepdims=True))[:, rows]
    if kind == "float16":
        return np.ascontiguousarray(weights, np.float16)
    return as_kind(np.ascontiguousarray(weights, np.float32).view(np.uint32), kind)


#: Bits of float32: -0.0, subnormal ones, NaNs with a payload, infinity, bfloat16's, and zeros.
BITS = st.one_of(
    st.sampled_from([0, 0x80000000, 1, 0x7FC00001, 0xFFC01234, 0x7F800000, 0xFF800000, 0x3FC00000]),
    st.integers(0, 2**16 - 1).map(lambda high: high << 16),
    st.integers(0, 2**32 - 1),
)


@st.composite
def chunks_of_runs(draw: st.DrawFn) -> np.ndarray | BFloat16:
    """Chunks whose rows begin and end anywhere, the same in all heads or not."""
    kind = draw(st.sampled_from(KINDS))
    heads, rows = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    keys = draw(st.one_of(st.integers(1, 9), st.integers(1, 300), st.just(2**17 // rows)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    some = np.array(draw(st.lists(BITS, min_size=1, max_size=40)), np.uint32)
    bits = rng.choice(some, (heads, rows, keys))
    shape = draw(st.sampled_from(["causal", "window", "any", "per head", "whole", "empty"]))
    key, row = np.arange(keys), np.arange(rows)[:, None]
    start = draw(st.integers(0, keys))
    if shape == "causal":
        bits[:, key > row + start] = 0
    elif shape == "window":
        bits[:, (key > row + start) | (key < row + start - draw(st.integers(0, 50)))] = 0
    elif shape == "any":
        ends = np.sort(rng.integers(0, keys + 1, (2, rows)), axis=0)[..., None]
        bits[:, (key < ends[0]) | (key >= ends[1])] = 0
    elif shape == "per head":
        bits[key >= rng.integers(0, keys + 1, (heads, rows, 1))] = 0
    elif shape == "empty":
        bits[:] = 0
    return as_kind(bits, kind)


@pytest.mark.usefixtures("every_chunk")
@settings(max_examples=80, deadline=None)
@given(chunks_of_runs())
def test_frames_decode_to_the_chunk(chunk: np.ndarray | BFloat16) -> None:
    frame = causal_frame(chunk)
    if frame is None:  # a block that libzstd cannot make smaller
        return
    expected = bits_of(chunk)
    assert bytes(Blosc().decode(frame)) == expected
    assert struct.unpack_from("<I", frame, 4) == (len(expected),)
    assert struct.unpack_from("<I", frame, 12) == (len(frame),)
    # A frame depends on nothing but its chunk.
    module._runs.cache_clear()
    assert causal_frame(chunk) == frame


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "keys", "rows"),
    [(32, 121, slice(32, 64)), (8, 277, slice(64, 96)), (32, 277, slice(0, 16)),
     (2, 700, slice(300, 304))],
)  # fmt: skip
def test_frames_of_causal_attention_are_smaller_than_blosc_makes_them(
    heads: int, keys: int, rows: slice, kind: str
) -> None:
    chunk = attention(np.random.default_rng(0), heads, keys, rows, kind)
    if bits_of(chunk).count(0) == 0 or np.prod(chunk.shape) < module._LEAST_NUMBERS:
        assert causal_frame(chunk) is None
        return
    frame = causal_frame(chunk)
    assert frame is not None
    assert bytes(Blosc().decode(frame)) == bits_of(chunk)
    dense = np.frombuffer(bits_of(chunk), np.float16 if kind == "float16" else np.float32)
    usual = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, blocksize=2**19).encode(dense)
    assert len(frame) < len(usual)


def test_chunks_without_runs_are_left_to_zstd() -> None:
    rng = np.random.default_rng(1)
    seen = rng.random((8, 32, 121)).astype(np.float32)  # every token attends to every other
    assert causal_frame(seen) is None
    per_head = seen.copy()
    per_head[0, :, 60:] = 0  # of one head alone
    assert causal_frame(per_head) is None
    sharp = seen * (rng.random(seen.shape) < 0.3) * np.tri(32, 121, 40)  # most weights are 0
    assert causal_frame(sharp.astype(np.float32)) is None
    small = attention(rng, 2, 60, slice(0, 32), "float32")
    assert causal_frame(small) is None
    # One head is more than a block of zstd's.
    wide = np.zeros((1, 2, 2**17), np.float32)
    wide[..., :10] = 1
    assert causal_frame(wide) is None


# --- arrays ------------------------------------------------------------------------------------


def layer_of(dtype: str) -> tuple[ArrayLayout, ArrayEncoding]:
    """A layer of 61 tokens in chunks of 32 rows, the last of which is not full."""
    layout = ArrayLayout(
        dims=("layer", "head", "query", "key"),
        dtype=dtype,
        shape=(1, 16, 61, 61),
        chunks=(1, 16, 32, 61),
        shards=(1, 16, 64, 61),
        codec="shuffle",
        fill_value=float("nan"),
    )
    return layout, ArrayEncoding(layout)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_decodes_them(kind: str, tmp_path: Path) -> None:
    layout, encoding = layer_of("float16" if kind == "float16" else "float32")
    layer = attention(np.random.default_rng(2), 16, 61, slice(None), kind)
    expected = np.frombuffer(bits_of(layer), encoding.dtype).reshape(16, 61, 61)
    chunks = list(encode_rows(layout, encoding, layer))
    assert [chunk[2] for chunk in chunks] == [0x91, 0x91]  # flags
    stored = {
        number: (len(chunk), int.from_bytes(chunk[-CRC_BYTES:], "little"))
        for number, chunk in enumerate(chunks)
    }
    folder = tmp_path / "attention"
    folder.mkdir()
    (folder / "zarr.json").write_bytes(encoded(array_metadata(layout)))
    (folder / "c.0.0.0.0").write_bytes(b"".join([*chunks, tail_of(encoding, stored)[0]]))
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    (tmp_path / "zarr.json").write_text(json.dumps(group))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    readers = {
        "zarr-python": np.asarray(zarr.open_array(folder, mode="r")[0]),
        "xarray": xr.open_zarr(tmp_path, consolidated=False)["attention"][0].to_numpy(),
        "tensorstore": np.asarray(tensorstore.open(spec).result()[0].read().result()),
        "zarrtrace": np.concatenate([encoding.decode(c)[0].copy() for c in chunks], axis=1)[:, :61],
    }
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        readers["zarrs"] = np.asarray(zarr.open_array(folder, mode="r")[0])
    for reader, found in readers.items():
        assert found.tobytes() == expected.tobytes(), reader


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_zstd_makes_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, encoding = layer_of("float16" if kind == "float16" else "float32")
    layer: Any = attention(np.random.default_rng(3), 16, 61, slice(None), kind)
    made = list(encode_rows(layout, encoding, layer))
    sparse_frames.sequences_library.cache_clear()
    monkeypatch.setitem(sys.modules, "zstandard._cffi", None)
    usual = list(encode_rows(layout, encoding, layer))
    assert made != usual
    for one, other in zip(made, usual, strict=True):
        assert encoding.decode(one).tobytes() == encoding.decode(other).copy().tobytes()
    # Without it, a padded batch's view is compressed as a copy is.
    padded = np.zeros((16, 70, 70), layer.bits.dtype if kind == "bfloat16" else layer.dtype)
    padded[:, :61, :61] = layer.bits if kind == "bfloat16" else layer
    view = padded[:, :61, :61]
    again = encode_rows(layout, encoding, BFloat16(view) if kind == "bfloat16" else view)
    assert list(again) == usual
