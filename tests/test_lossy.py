"""Values stored with loss: as NumPy rounds them, said in the attributes, and finite as stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.errors import ConfigError, NonFiniteError
from zarrtrace.extraction import Options, extract_run, prepare
from zarrtrace.precision import cast_record
from zarrtrace.records import BFloat16, LayerRecord
from zarrtrace.store import TraceWriter, open_trace, verify

pytestmark = pytest.mark.torch

SMALL = {"layers": (3, 20), "features": False, "only": ("Risky_40",)}


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    run = extract_run(tmp_path_factory.mktemp("lossless") / "run", Options(**SMALL))
    return zt.open_trace(run / "Risky_40").attention.to_numpy()


@pytest.mark.parametrize("bits", [4, 10, 23])
def test_keepbits(tmp_path: Path, lossless: np.ndarray, bits: int) -> None:
    run = extract_run(tmp_path / "run", Options(**SMALL, attention_keepbits=bits))
    ds = zt.open_trace(run / "Risky_40")
    found = ds.attention.to_numpy()
    assert ds.attrs["attention_keepbits"] == bits
    np.testing.assert_allclose(found, lossless, rtol=2.0 ** -(bits + 1), atol=0)
    dropped = (1 << (23 - bits)) - 1
    assert not (found.view(np.uint32) & dropped).any()
    assert ((found == 0) == (lossless == 0)).all()


def test_float16(tmp_path: Path, lossless: np.ndarray) -> None:
    run = extract_run(tmp_path / "run", Options(**SMALL, attention_dtype="float16"))
    found = zt.open_trace(run / "Risky_40").attention
    np.testing.assert_array_equal(found, lossless.astype(np.float16))


@pytest.mark.parametrize(("bits", "dtype"), [(0, None), (24, None), (11, "float16")])
def test_impossible_bits(bits: int, dtype: str | None) -> None:
    with pytest.raises(ConfigError, match="mantissa"):
        prepare(Options(**SMALL, attention_keepbits=bits, attention_dtype=dtype), weights=False)


# --- finite as stored ---------------------------------------------------------------------------


def _scaled_saes(folder: Path, scale: float) -> Path:
    """The embedded SAE of layer 3, its activations some times as large."""
    from sae_lens import SAE

    name = "blocks.3.hook_resid_post"
    shutil.copytree(demo.sae_path() / name, folder / name)
    sae = SAE.load_from_disk(folder / name)
    for weight in (sae.W_enc, sae.b_enc, sae.threshold):
        weight.data *= scale
    sae.save_model(folder / name)
    return folder


def _features(run: Path) -> np.ndarray:
    return open_trace(run / "Risky_40").features.to_numpy()[0]


FEATURES = {"layers": (3,), "attention": False, "only": ("Risky_40",)}


def test_activations_beyond_float16_are_refused_or_named(tmp_path: Path) -> None:
    saes = _scaled_saes(tmp_path / "saes", 1e5)
    options = Options(**FEATURES, sae_path=saes, feature_dtype="float16")
    with pytest.raises(NonFiniteError) as caught:
        extract_run(tmp_path / "run", options)
    said = caught.value
    assert said.what == "Risky_40: features of layer 3 has values that are infinite in float16"
    assert "--feature-dtype float32" in said.remedy
    extract_run(tmp_path / "run", options, allow_nonfinite=True)
    assert zt.open_trace(tmp_path / "run/Risky_40").attrs["nonfinite"] == {"features": "3"}
    assert verify(tmp_path / "run") == []
    extract_run(tmp_path / "exact", replace(options, feature_dtype="float32"))
    exact = _features(tmp_path / "exact")
    assert np.isfinite(exact).all()
    assert zt.open_trace(tmp_path / "exact/Risky_40").attrs["nonfinite"] == {}
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(_features(tmp_path / "run"), exact.astype(np.float16))


def test_features_that_fire_are_not_stored_as_silent(tmp_path: Path) -> None:
    saes = _scaled_saes(tmp_path / "saes", 1e-9)
    options = Options(**FEATURES, sae_path=saes)
    exact = _features(extract_run(tmp_path / "exact", options))
    assert (np.abs(exact[exact != 0]) < 2.0**-25).any()
    found = _features(extract_run(tmp_path / "run", replace(options, feature_dtype="float16")))
    np.testing.assert_array_equal(found != 0, exact != 0)
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=2**-11, atol=2**-24)


def _writer(run: Path, **sizes: Any) -> TraceWriter:
    return fakes.make_trace_writer(run, layers=(1,), next_token=False, **sizes)


def _record(change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
    (record,) = fakes.make_records(layers=(1,), next_token=False)
    assert isinstance(record, LayerRecord)
    return change(record)


def _with_attention(values: np.ndarray | BFloat16) -> Callable[[LayerRecord], LayerRecord]:
    def change(record: LayerRecord) -> LayerRecord:
        mean = np.asarray(values, np.float32).mean(0)
        return replace(record, attention=values, attention_mean=mean)

    return change


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16 already"])
def test_attention_beyond_float16_is_refused(tmp_path: Path, form: str) -> None:
    """No softmax gives such weights; attention of another kind may."""
    values = np.full((2, 7, 7), 2.0**17, np.float32)
    given: np.ndarray | BFloat16 = values
    if form == "bfloat16":
        given = BFloat16((values.view(np.uint32) >> 16).astype(np.uint16))
    record = _record(_with_attention(given))
    if form == "float16 already":  # as a GPU casts it
        with np.errstate(over="ignore"):
            record = replace(record, attention=values.astype(np.float16))
    writer = _writer(tmp_path / "run", attention_dtype="float16")
    with pytest.raises(NonFiniteError) as caught:
        writer.append(record)
    assert "attention of layer 1 has values that are infinite in float16" in caught.value.what
    assert "--attention-dtype float32" in caught.value.remedy
    _writer(tmp_path / "exact").append(
        record if form != "float16 already" else _record(_with_attention(values))
    )


def test_large_finite_values_are_not_taken_for_infinite(tmp_path: Path) -> None:
    """Sums of float32 overflow where no value does."""
    record = _record(_with_attention(np.full((2, 7, 7), 3e37, np.float32)))
    with np.errstate(over="ignore"):
        assert np.isinf(record.attention_mean.sum())
    with _writer(tmp_path / "run") as writer:
        writer.append(record)
    assert open_trace(tmp_path / "run/Safe_1").attrs["nonfinite"] == {}


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0x7FFF0000])
def test_rounding_keeps_what_is_not_finite(bits: int) -> None:
    """GPUs write NaN as 0x7fffffff, which carries over into -0 when it is rounded."""
    values = np.full((2, 7, 7), 0.3, np.float32)
    values.view(np.uint32)[1, 2, 0] = bits
    attributes = fakes.make_trace_attributes(attention_keepbits=4)
    found = cast_record(_record(_with_attention(values)), attributes)
    assert isinstance(found, LayerRecord)
    rounded = np.asarray(found.attention)
    np.testing.assert_array_equal(np.isfinite(rounded), np.isfinite(values))
    np.testing.assert_array_equal(rounded[1, 2, 0], values[1, 2, 0])
    assert found.nonfinite == ("attention",)


@given(npst.arrays(np.float32, (3, 4), elements=st.floats(width=32)), st.booleans())
def test_a_cast_never_hides_infinity_nor_makes_silence(values: np.ndarray, rounds: bool) -> None:
    attributes = fakes.make_trace_attributes(
        feature_dtype="float16", attention_keepbits=3 if rounds else None
    )
    features = {"features": replace(fakes.make_features(3, 4), activations=values)}
    record = LayerRecord("Safe_1", 1, features=features)
    features["features"] = replace(features["features"], nonfinite=not np.isfinite(values).all())
    found = cast_record(record, attributes)
    stored = np.asarray(found.features["features"].activations)
    assert stored.dtype == np.float16
    assert bool(found.nonfinite) == (not np.isfinite(stored).all())
    np.testing.assert_array_equal(stored != 0, values != 0)
    np.testing.assert_array_equal(np.signbit(stored), np.signbit(values))
    assert cast_record(found, attributes).features["features"] is found.features["features"]
