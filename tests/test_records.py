"""Records: sparse values are encoded as the dense array is, and batches hold their records."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.sparse import csr_array

from zarrtrace import records
from zarrtrace.format.layout import NO_ID, ArrayLayout, trace_layout
from zarrtrace.layer_batches import LayerBatch, Member, SparseFeatures
from zarrtrace.records import BFloat16, Nonzeros, strongest
from zarrtrace.store.chunks import LayerGrid, encode_file, encode_rows, tail_of
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding
from zarrtrace.store.nodes import array_metadata, encoded


@st.composite
def layouts(draw: st.DrawFn) -> ArrayLayout:
    """Layouts of features whose edges lie anywhere in the chunks and files."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 13)), draw(st.integers(1, 17)))
    rows = draw(st.integers(1, min(4, shape[1])))
    width = draw(st.integers(1, min(5, shape[2])))
    return ArrayLayout(
        dims=("layer", "query", "feature"),
        dtype=draw(st.sampled_from(["float32", "float16"])),
        shape=shape,
        chunks=(1, rows, width),
        shards=(1, -(-shape[1] // rows) * rows, -(-shape[2] // width) * width),
        codec="sparse",
        fill_value=float("nan"),
    )


def nonzeros_of(dense: np.ndarray, columns: int) -> Nonzeros:
    """Return SciPy's non-zero values by blocks of columns."""
    at, values = [], []
    for start in range(0, dense.shape[1], columns):
        stored = csr_array(dense[:, start : start + columns])
        stored.sort_indices()
        rows = np.repeat(np.arange(len(dense), dtype=np.int64), np.diff(stored.indptr))
        at.append(rows * columns + stored.indices)
        values.append(stored.data)
    return Nonzeros(dense.shape, columns, tuple(at), tuple(values))


VALUES = st.one_of(
    st.just(0.0), st.sampled_from([1.5, -2.0, 1e-7, float("nan"), float("inf"), -float("inf")])
)


@given(layouts(), st.data())
def test_sparse_rows_are_encoded_as_dense_ones_byte_for_byte(
    layout: ArrayLayout, data: Any
) -> None:
    dense = data.draw(npst.arrays(np.float32, layout.shape[1:], elements=VALUES))
    sparse = nonzeros_of(dense, layout.chunks[-1])
    np.testing.assert_array_equal(np.asarray(sparse), dense)
    encoding = ArrayEncoding(layout)
    chunks = list(encode_rows(layout, encoding, sparse))
    assert chunks == list(encode_rows(layout, encoding, dense))
    assert len(chunks) == LayerGrid(layout.dims, encoding).count
    # A file of these chunks and its end is what is made of the values at once.
    stored = {
        number: (len(chunk), int.from_bytes(chunk[-CRC_BYTES:], "little"))
        for number, chunk in enumerate(chunks)
    }
    tail, checksum = tail_of(encoding, stored)
    content, expected = encode_file(encoding, dense[np.newaxis])
    assert (b"".join([*chunks, tail]), checksum) == (content, expected)
    # And zarr-python reads it.
    place = layout.shape[0] - 1
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "zarr.json").write_bytes(encoded(array_metadata(layout)))
        (Path(folder) / f"c.{place}.0.0").write_bytes(content)
        found = np.asarray(zarr.open_array(folder, mode="r")[place])
    np.testing.assert_array_equal(found, dense.astype(layout.dtype))


@given(layouts(), st.data())
def test_parts_of_a_layer_are_encoded_as_the_whole_is(layout: ArrayLayout, data: Any) -> None:
    dense = data.draw(npst.arrays(np.float32, layout.shape[1:], elements=VALUES))
    sparse, encoding = nonzeros_of(dense, layout.chunks[-1]), ArrayEncoding(layout)
    cut = layout.chunks[1] * data.draw(st.integers(0, -(-layout.shape[1] // layout.chunks[1])))
    parts = [nonzeros_of(one, layout.chunks[-1]) for one in (dense[:cut], dense[cut:]) if len(one)]
    found = [chunk for part in parts for chunk in encode_rows(layout, encoding, part)]
    assert found == list(encode_rows(layout, encoding, sparse))


def test_sparse_rows_of_other_blocks_are_refused() -> None:
    layout = trace_layout(fakes.make_shape())["features"]
    sparse = nonzeros_of(np.ones((7, 16), np.float32), 5)
    with pytest.raises(ValueError, match="blocks of 5 features, not 16"):
        list(encode_rows(layout, ArrayEncoding(layout), sparse))


@given(npst.arrays(np.uint16, npst.array_shapes(max_dims=3, max_side=5)))
def test_bfloat16_equals_torch(bits: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(np.asarray(BFloat16(bits)), values)


@pytest.mark.torch
@pytest.mark.parametrize("lengths", [[2100], [900, 1200], [1, 2098, 1]])
@pytest.mark.parametrize("way", ["host", "device", "device, no room", "device, waiting"])
def test_records_hold_the_features(
    way: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies to the host, on a CPU, are non-zero where the dense tensors are."""
    import torch

    from zarrtrace.capture import features
    from zarrtrace.capture.host import to_host

    width, columns = 40, 16
    tokens = sum(lengths)
    dense = torch.randn(tokens, width, generator=torch.manual_seed(0))
    dense[dense.abs() < 0.7] = 0
    dense = dense.half()
    dense[4] = 0
    fake, inputs = _Fake(dense, columns), torch.arange(float(tokens))[:, None]
    monkeypatch.setattr(features, "begin_copy", lambda tensor: tensor)
    if way == "host":
        found = features.encode(fake, inputs)
    elif way == "device, waiting":
        rows = features._some_rows(inputs)
        assert [len(some) for some in rows] == [1050, 1050]
        made = [features._found(fake, some, None) for some in rows]
        parts = [features._on_host(one, to_host) for one in made]
        found = features._joined(fake, parts, np.ones(tokens, bool))
    else:
        encoding = features.Encoding(fake, inputs, None if way == "device" else -5.0)
        encoding.begin()
        inputs.zero_()  # as a model may do with what it has passed on
        found = encoding.arrived()
    assert len(found.nonzeros.at) == 3
    assert any((value < 0).any() for value in found.nonzeros.values)
    parts, start = torch.split(dense.float(), lengths), 0
    for length, part in zip(lengths, parts, strict=True):
        record = found.part(start, start + length).record()
        start += length
        assert isinstance(record.activations, Nonzeros)
        assert record.activations.columns == columns
        np.testing.assert_array_equal(np.asarray(record.activations), part.numpy())
        top = part.abs().topk(32).values  # of equal ones any, with the sign that is there
        np.testing.assert_array_equal(np.abs(record.top_activation), top.numpy())
        fires = record.top_activation != 0
        numbers = np.where(fires, record.top_feature, 0).astype(np.int64)
        there = np.take_along_axis(part.numpy(), numbers, 1)
        np.testing.assert_array_equal(there[fires], record.top_activation[fires])
        assert (record.top_feature[~fires] == NO_ID).all()
        assert not record.nonfinite


class _Fake:
    """An encoder whose features are known; tokens are their numbers."""

    def __init__(self, dense: Any, columns: int = 4096) -> None:
        self.attributes, self._dense = SimpleNamespace(d_sae=dense.shape[1]), dense
        self.columns = columns

    def __call__(self, inputs: Any) -> Any:
        return self._dense[inputs[:, 0].nan_to_num(posinf=0).long()]

    def firing(self, inputs: Any) -> Any:
        """Return what may fire, one feature too many, and what gives values."""
        encoded = self(inputs)
        fires = encoded != 0
        fires[:, 3] = True
        return fires, lambda at: encoded.reshape(-1)[at].float()

    def tiles(self, inputs: Any) -> Any:
        """Return blocks of some columns: positions ``row * columns + column``, and values."""

        def nonzero(block: Any) -> tuple[np.ndarray, np.ndarray]:
            row, column = np.nonzero(block.numpy())
            return row * self.columns + column, block.numpy()[row, column]

        return [partial(nonzero, one) for one in self(inputs).split(self.columns, dim=1)]


@pytest.mark.torch
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_are_noted_for_their_prompt(bad: float) -> None:
    import torch

    from zarrtrace.capture.features import encode

    dense = torch.ones(5, 40)
    dense[3, 7] = bad
    found = encode(_Fake(dense), torch.arange(5.0)[:, None])
    assert _nonfinite(found, [2, 2, 1]) == [False, True, False]
    inputs = torch.tensor([[0.0], [bad], [0.0]])
    assert _nonfinite(encode(_Fake(torch.ones(3, 40)), inputs), [1, 2]) == [False, True]


def _nonfinite(found: SparseFeatures, lengths: list[int]) -> list[bool]:
    members = [Member(str(number), length, length, length) for number, length in enumerate(lengths)]
    batch = LayerBatch(3, members, range(len(members)), features={"features": found})
    return [record.features["features"].nonfinite for record in batch.records()]


RANKED = st.one_of(st.just(0.0), st.sampled_from([-1.0, 0.5, 0.5, 2.0, float("nan"), float("inf")]))


@given(st.data(), st.integers(1, 4), st.integers(1, 150), st.integers(1, 60))
def test_strongest_features_are_those_that_sorting_finds(
    data: Any, tokens: int, width: int, columns: int
) -> None:
    dense = data.draw(npst.arrays(np.float32, (tokens, width), elements=RANKED))
    feature, activation = strongest(nonzeros_of(dense, columns))
    assert (feature.dtype, activation.dtype) == (np.uint32, np.float32)
    for row, found, values in zip(dense, feature, activation, strict=True):
        named = [(-np.inf if np.isnan(v) else -abs(v), n, v) for n, v in enumerate(row) if v != 0]
        best = sorted(named, key=lambda one: one[:2])[:32]
        empty = min(32, width) - len(best)
        np.testing.assert_array_equal(values, [v for *_, v in best] + [0.0] * empty)
        assert found.tolist() == [n for _, n, _ in best] + [NO_ID] * empty


def test_strongest_features_of_many_values_are_found_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many values as numbers of 64 bits can tell from each other, and more."""
    rng = np.random.default_rng(3)
    dense = rng.integers(1, 2_000, (37, 90)).astype(np.float32) * rng.choice([-1, 1], (37, 90))
    expected = strongest(nonzeros_of(dense, 32))
    order = np.lexsort((np.broadcast_to(np.arange(90), dense.shape), -np.abs(dense)))[:, :32]
    np.testing.assert_array_equal(expected[0], order)
    for tokens, values in ((5, 2**23), (2**10, 90), (2**10, 200), (2**10, 1)):
        monkeypatch.setattr(records, "_TOKENS_SORTED", tokens)
        monkeypatch.setattr(records, "_VALUES_SORTED", values)
        for one, other in zip(strongest(nonzeros_of(dense, 32)), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    monkeypatch.undo()
    whole = np.ones((1024, 8192), np.float32)  # 2**23 values
    whole[1023, 8191] = 2
    feature, _ = strongest(nonzeros_of(whole, 4096))
    assert feature[0].tolist() == [*range(32)]
    assert feature[1023].tolist() == [8191, *range(31)]


@given(st.data())
def test_parts_of_a_batch_have_its_records(data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    wanted = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    rng, longest = np.random.default_rng(0), max(lengths)
    dense = rng.random((sum(lengths), 20)).astype(np.float32).round()
    sparse = nonzeros_of(dense, 20)
    bits = rng.integers(0, 2**14, (len(lengths), 2, longest, longest)).astype(np.uint16)
    batch = LayerBatch(
        7,
        [
            Member(str(n), length, length, 1 if chosen[n] else length)
            for n, length in enumerate(lengths)
        ],
        sorted(wanted),
        BFloat16(bits),
        rng.random((len(lengths), longest, longest)).astype(np.float32),
        {"features": SparseFeatures(sparse, np.ones(len(dense), bool))},
    )
    starts = np.cumsum([0, *lengths])
    whole, each = list(batch.records()), [r for one in batch.each() for r in one.records()]
    some = list(batch.part(batch.wanted).records())
    assert [record.scenario for record in whole] == batch.scenarios
    for n, *same in zip(batch.wanted, whole, each, some, strict=True):
        rows = [0] if chosen[n] else range(lengths[n])
        for record in same:
            attention, mean = np.asarray(record.attention), record.attention_mean
            expected = np.asarray(BFloat16(bits[n]))[:, rows, : lengths[n]]
            np.testing.assert_array_equal(attention, expected)
            assert batch.attention_mean is not None
            np.testing.assert_array_equal(mean, batch.attention_mean[n][rows, : lengths[n]])
            np.testing.assert_array_equal(
                np.asarray(record.features["features"].activations),
                dense[starts[n] : starts[n + 1]],
            )
            assert (record.scenario, record.layer) == (str(n), 7)
