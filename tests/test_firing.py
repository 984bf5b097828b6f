"""Features that fire against sae-lens's own ``encode``, at thresholds and beside them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from zarrtrace.capture import encoder, firing
from zarrtrace.capture.features import _found
from zarrtrace.format.attributes import SAEAttributes

pytestmark = pytest.mark.torch

HOOK = SAEMetadata(hook_name="blocks.0.hook_resid_post")
CONFIG: dict[str, Any] = {"d_in": 3, "d_sae": 40, "metadata": HOOK}

#: Few numbers, so that sums meet thresholds exactly, or miss them by their last bit.
NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 1e-8, 2.0**-149, 3e38, -3e38, math.inf, -math.inf, math.nan,
     float(np.nextafter(np.float32(1), np.float32(2))), 1.1, 0.9, 16_777_216.0]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["jumprelu", "standard"]))
def test_firing_features_are_those_of_encode_bit_for_bit(data: st.DataObject, kind: str) -> None:
    def numbers(*shape: int) -> torch.Tensor:
        some = data.draw(st.lists(NUMBERS, min_size=1, max_size=12))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        return torch.tensor(rng.choice(np.array(some, np.float32), shape))

    sae: Any = (
        JumpReLUSAE(JumpReLUSAEConfig(**CONFIG))
        if kind == "jumprelu"
        else StandardSAE(StandardSAEConfig(**CONFIG))
    )
    sae.W_enc.data, sae.b_enc.data, sae.b_dec.data = numbers(3, 40), numbers(40), numbers(3)
    if kind == "jumprelu":
        sae.threshold.data = numbers(40)
    assert firing.has_thresholds(sae)
    tokens = numbers(7, 3)
    with torch.inference_mode():
        expected = sae.encode(tokens).numpy()
        at, values = firing.FiringFeatures(sae, 0, 48)(sae.process_sae_in(tokens))
        may_fire, values_at = firing.FiringOnGPU(sae)(tokens)
        place = may_fire.reshape(-1).nonzero()[:, 0]
        on_gpu = torch.zeros(7 * 40).index_put((place,), values_at(place)).numpy()
    found = np.zeros((7, 48), np.float32)
    found.reshape(-1)[at] = values
    assert not found[:, 40:].any()  # the block is wider than the SAE
    found = found[:, :40]
    np.testing.assert_array_equal(found.reshape(-1), on_gpu)
    assert np.array_equal(np.flatnonzero(expected), np.flatnonzero(found))
    is_nan = np.isnan(expected)  # the bits of a NaN are nobody's
    assert np.array_equal(np.isnan(found), is_nan)
    assert found[~is_nan].tobytes() == np.where(expected == 0, 0, expected)[~is_nan].tobytes()


@pytest.mark.parametrize(("start", "columns"), [(0, 48), (8, 32), (8, 24)])
def test_features_multiplied_some_at_a_time_keep_their_order(
    start: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers, whose sums are exact in any order."""
    monkeypatch.setattr(firing, "_TOGETHER", 10)
    rng = np.random.default_rng(1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.integers(-4, 5, shape).astype(np.float32))

    sae = JumpReLUSAE(JumpReLUSAEConfig(**CONFIG))
    sae.W_enc.data, sae.b_enc.data, sae.b_dec.data = numbers(3, 40), numbers(40), numbers(3)
    sae.threshold.data, tokens = numbers(40), numbers(50, 3)
    with torch.inference_mode():
        expected = sae.encode(tokens).numpy()[:, start : start + columns]
        given = sae.process_sae_in(tokens)
        at, values = firing.FiringFeatures(sae, start, columns)(given)
    assert (np.diff(at) > 0).all()
    found = np.zeros((50, columns), np.float32)
    found.reshape(-1)[at] = values
    assert np.array_equal(found[:, : expected.shape[1]], expected)
    assert np.count_nonzero(found) == np.count_nonzero(expected) > 100


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("columns", [16, 40, 64])
@pytest.mark.parametrize("room", [None, 400])
def test_what_a_gpu_finds_is_what_saelens_encodes(
    kind: str, columns: int, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does it, on a CPU: SAEs with thresholds, and others."""
    monkeypatch.setattr(encoder, "feature_columns", lambda _: columns)
    torch.manual_seed(0)
    sae: Any = (
        JumpReLUSAE(JumpReLUSAEConfig(**CONFIG))
        if kind == "jumprelu"
        else TopKSAE(TopKSAEConfig(**CONFIG, k=9))
    )
    sae.b_enc.data.normal_()
    tokens = torch.randn(11, 3)
    with torch.inference_mode():
        expected = sae.encode(tokens).numpy()
        found = _found(encoder.Encoder(sae, _attributes(kind)), tokens, room)
    assert firing.has_thresholds(sae) == (kind == "jumprelu")
    at, values = (one.numpy()[found.at.numpy() >= 0] for one in (found.at, found.values))
    assert (np.diff(at) > 0).all()
    block, token, column = np.unravel_index(at, (-(-40 // columns), 11, columns))
    dense = np.zeros((11, 40), np.float32)
    dense[token, block * columns + column] = values
    np.testing.assert_array_equal(dense, expected)
    assert np.count_nonzero(expected) > 50


def _attributes(kind: str) -> SAEAttributes:
    return SAEAttributes(
        layer=0,
        release=None,
        id="0",
        hook_name="blocks.0.hook_resid_post",
        architecture=kind,
        d_in=3,
        d_sae=40,
        dtype="float32",
        decoder_norm_folded=False,
    )


def test_saes_that_do_more_than_compare_with_thresholds_go_their_own_way() -> None:
    sae = JumpReLUSAE(JumpReLUSAEConfig(**CONFIG))
    assert firing.has_thresholds(sae)
    sae.hook_sae_acts_pre.register_forward_hook(lambda *_: None)
    assert not firing.has_thresholds(sae)
    assert not firing.has_thresholds(JumpReLUSAE(JumpReLUSAEConfig(**CONFIG, dtype="float16")))
    assert not firing.has_thresholds(TopKSAE(TopKSAEConfig(**CONFIG, k=2)))
    for change in (
        {"activation_fn": torch.nn.Tanh()},
        {"encode": lambda x: x},
        {"__class__": type("Own", (StandardSAE,), {})},
    ):
        other = StandardSAE(StandardSAEConfig(**CONFIG))
        assert firing.has_thresholds(other)
        for name, value in change.items():
            setattr(other, name, value)
        assert not firing.has_thresholds(other)
    hooked = StandardSAE(StandardSAEConfig(**CONFIG))
    hooked.hook_sae_input.register_forward_pre_hook(lambda *_: None)
    assert not firing.has_thresholds(hooked)
