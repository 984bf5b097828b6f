"""What is not 0 of an array is written as the array itself would be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.sparse import csr_array

from zarrtrace.spec import ArrayLayout, Nonzeros
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


@given(layouts(), st.data())
def test_files_are_those_of_the_whole_array(layout: ArrayLayout, data: Any) -> None:
    values = st.one_of(st.just(0.0), st.sampled_from([1.5, -2.0, float("nan"), float("inf")]))
    dense = data.draw(npst.arrays(np.float32, layout.shape[1:], elements=values))
    stored = csr_array(dense)  # SciPy says what is not 0
    stored.sort_indices()
    rows = np.repeat(np.arange(len(dense), dtype=np.int64), np.diff(stored.indptr))
    sparse = Nonzeros(dense.shape, rows * dense.shape[1] + stored.indices, stored.data)
    np.testing.assert_array_equal(np.asarray(sparse), dense)
    at = (layout.shape[0] - 1, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        written = write_nonzeros(one, layout, at, sparse)
        assert written == write_block(other, layout, at, dense[np.newaxis])
        assert fakes.files_in(one) == fakes.files_in(other)


@pytest.mark.torch
@pytest.mark.parametrize("lengths", [[7], [3, 4], [1, 5, 1]])
def test_what_a_gpu_sends_is_the_features(lengths: list[int]) -> None:
    """A GPU's way to the host, on the CPU: its tensors are not 0 where the dense ones are not."""
    import torch

    from zarrtrace.capture.pipeline import _nonzeros

    features = torch.randn(7, 40, generator=torch.manual_seed(0)).relu_().half()
    features[4] = 0
    sent = _nonzeros(features, lengths)
    parts = torch.split(features.float(), lengths)
    for found, part in zip(sent, parts, strict=True):
        np.testing.assert_array_equal(np.asarray(found), part.numpy())


@pytest.mark.torch
def test_a_run_is_the_same_whichever_way_features_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zarrtrace.capture import pipeline
    from zarrtrace.extraction import Options, extract

    asked = Options(layers=(1, 4), only=("Risky_40", "Desperate_10"), batch_size=2)
    extract(tmp_path / "dense", asked)
    monkeypatch.setattr(pipeline, "_dense", pipeline._nonzeros)
    extract(tmp_path / "sparse", asked)
    for scenario in asked.only or ():
        one, other = (
            {
                name: content
                for name, content in fakes.files_in(tmp_path / way / scenario).items()
                if "/c/" in str(name)
            }
            for way in ("dense", "sparse")
        )
        assert one == other
        assert one
