"""Attention stored with loss: as NumPy rounds it, and said in the attributes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import zarrtrace as zt
from zarrtrace.errors import ConfigError
from zarrtrace.extraction import Options, extract, prepare

pytestmark = pytest.mark.torch

SMALL = {"layers": (3, 20), "features": False, "only": ("Risky_40",)}


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    run = extract(tmp_path_factory.mktemp("lossless") / "run", Options(**SMALL))
    return zt.open_trace(run / "Risky_40").attention.to_numpy()


@pytest.mark.parametrize("bits", [4, 10, 23])
def test_keepbits(tmp_path: Path, lossless: np.ndarray, bits: int) -> None:
    run = extract(tmp_path / "run", Options(**SMALL, attention_keepbits=bits))
    ds = zt.open_trace(run / "Risky_40")
    found = ds.attention.to_numpy()
    assert ds.attrs["attention_keepbits"] == bits
    np.testing.assert_allclose(found, lossless, rtol=2.0 ** -(bits + 1), atol=0)
    dropped = (1 << (23 - bits)) - 1
    assert not (found.view(np.uint32) & dropped).any()
    assert ((found == 0) == (lossless == 0)).all()


def test_float16(tmp_path: Path, lossless: np.ndarray) -> None:
    run = extract(tmp_path / "run", Options(**SMALL, attention_dtype="float16"))
    found = zt.open_trace(run / "Risky_40").attention
    np.testing.assert_array_equal(found, lossless.astype(np.float16))


@pytest.mark.parametrize(("bits", "dtype"), [(0, None), (24, None), (11, "float16")])
def test_impossible_bits(bits: int, dtype: str | None) -> None:
    with pytest.raises(ConfigError, match="mantissa"):
        prepare(Options(**SMALL, attention_keepbits=bits, attention_dtype=dtype), weights=False)
