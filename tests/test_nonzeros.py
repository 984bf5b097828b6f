"""What is not 0 of an array is written as the array itself would be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.sparse import csr_array

from zarrtrace.spec import ArrayLayout, BFloat16, Nonzeros
from zarrtrace.store.shards import write_block, write_nonzeros


@st.composite
def layouts(draw: st.DrawFn) -> ArrayLayout:
    """Layouts of features whose edges lie anywhere in the chunks and files."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 13)), draw(st.integers(1, 17)))
    files = rows * draw(st.integers(1, 3))
    return ArrayLayout(
        dims=("layer", "query", "feature"),
        dtype=draw(st.sampled_from(["float32", "float16"])),
        shape=shape,
        chunks=(1, rows, width),
        shards=(1, files, -(-shape[2] // width) * width),
        codec="sparse",
        fill_value=draw(st.sampled_from([float("nan"), 0.0])),
    )


def nonzeros_of(dense: np.ndarray, columns: int) -> Nonzeros:
    """What SciPy says is not 0, by blocks of columns."""
    at, values = [], []
    for start in range(0, dense.shape[1], columns):
        stored = csr_array(dense[:, start : start + columns])
        stored.sort_indices()
        rows = np.repeat(np.arange(len(dense), dtype=np.int64), np.diff(stored.indptr))
        at.append(rows * columns + stored.indices)
        values.append(stored.data)
    return Nonzeros(dense.shape, columns, tuple(at), tuple(values))


@given(layouts(), st.data())
def test_files_are_those_of_the_whole_array(layout: ArrayLayout, data: Any) -> None:
    values = st.one_of(st.just(0.0), st.sampled_from([1.5, -2.0, float("nan"), float("inf")]))
    dense = data.draw(npst.arrays(np.float32, layout.shape[1:], elements=values))
    sparse = nonzeros_of(dense, layout.chunks[-1])
    np.testing.assert_array_equal(np.asarray(sparse), dense)
    at = (layout.shape[0] - 1, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        written = write_nonzeros(one, layout, at, sparse)
        assert written == write_block(other, layout, at, dense[np.newaxis])
        assert fakes.files_in(one) == fakes.files_in(other)


@given(npst.arrays(np.uint16, npst.array_shapes(max_dims=3, max_side=5)))
def test_bfloat16_is_what_torch_says(bits: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(np.asarray(BFloat16(bits)), values)


@pytest.mark.torch
@pytest.mark.parametrize("lengths", [[7], [3, 4], [1, 5, 1]])
@pytest.mark.parametrize("way", ["host", "device"])
def test_records_are_the_features(
    way: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to the host, on a CPU: tensors are not 0 where the dense ones are not."""
    import torch

    from zarrtrace.capture import features

    width, columns = 40, 16
    dense = torch.randn(7, width, generator=torch.manual_seed(0)).relu_().half()
    dense[4] = 0
    fake: Any = _Fake(dense, SimpleNamespace(d_sae=width))
    monkeypatch.setattr(features, "feature_columns", lambda _: columns)
    made = features.encode(fake, torch.zeros(7, 1))
    if way == "device":
        made = features.Encoding(fake, made.sound, dense)
    records = features.feature_records(made, lengths)
    parts = torch.split(dense.float(), lengths)
    for record, part in zip(records, parts, strict=True):
        np.testing.assert_array_equal(np.asarray(record.activations), part.numpy())
        top = part.topk(32)
        np.testing.assert_array_equal(record.top_activation, top.values.numpy())
        there = np.take_along_axis(part.numpy(), record.top_feature.astype(np.int64), 1)
        fires = record.top_activation > 0
        np.testing.assert_array_equal(there[fires], record.top_activation[fires])
        assert not record.top_feature[~fires].any()
        assert not record.nonfinite


class _Fake:
    """An encoder whose features are known."""

    def __init__(self, dense: Any, attributes: Any) -> None:
        self.attributes, self._dense = attributes, dense

    def __call__(self, _inputs: Any) -> Any:
        return self._dense

    def tiles(self, _inputs: Any) -> Any:
        from zarrtrace.capture import features

        columns = features.feature_columns(self.attributes.d_sae)
        return [part.contiguous for part in self._dense.split(columns, dim=1)]


@pytest.mark.torch
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said_of_its_prompt(bad: float) -> None:
    import torch

    from zarrtrace.capture.features import encode, feature_records

    dense = torch.ones(5, 40)
    dense[3, 7] = bad
    fake: Any = _Fake(dense, SimpleNamespace(d_sae=40))
    records = feature_records(encode(fake, torch.zeros(5, 1)), [2, 2, 1])
    assert [record.nonfinite for record in records] == [False, True, False]
    inputs = torch.tensor([[0.0], [bad], [0.0]])
    fake = _Fake(torch.ones(3, 40), SimpleNamespace(d_sae=40))
    records = feature_records(encode(fake, inputs), [1, 2])
    assert [record.nonfinite for record in records] == [False, True]
