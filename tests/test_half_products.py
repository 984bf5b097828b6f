"""SAEs that multiply in bfloat16 and add up in float32, against SAELens and float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from zarrtrace.capture.encoder import Encoder
from zarrtrace.capture.half_products import HALF_PRODUCTS, HalfProducts
from zarrtrace.errors import ConfigError, SAEError
from zarrtrace.format.attributes import SAEAttributes

pytestmark = pytest.mark.torch

RELEASE, ID = "llama_scope_lxr_8x", "l3r_8x"
D_IN, D_SAE, TOKENS = 1_300, 600, 40  # no multiple of what is added up at once
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class _Source:
    """A source of one SAE."""

    prepend_bos = True

    def __init__(self, sae: Any, attributes: SAEAttributes) -> None:
        self._sae, self._attributes = sae, attributes

    def available(self, layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(layers)

    def stretches(self, saes: Sequence[SAEAttributes]) -> list[tuple[Path, int, int]]:
        return []

    def find(self, layers: Sequence[int]) -> dict[int, tuple[SAEAttributes, ...]]:
        return dict.fromkeys(layers, (self._attributes,))

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        assert attributes == self._attributes
        return Encoder(self._sae, attributes)


def _sae(device: str = "cpu", *, scale: float = 1.0, **options: Any) -> JumpReLUSAE:
    """Return an SAE whose weights are bfloat16 numbers times a scale."""
    config = JumpReLUSAEConfig(
        d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False, device=device, **options
    )
    sae = JumpReLUSAE(config)
    numbers = torch.Generator().manual_seed(1)
    weights = (torch.randn(D_IN, D_SAE, generator=numbers) / 30).bfloat16().float() * scale
    sae.W_enc.data = weights.to(device)
    sae.b_enc.data = torch.randn(D_SAE, generator=numbers).to(device)
    sae.threshold.data = torch.full((D_SAE,), 1.5, device=device)
    return sae


def _attributes(name: str = ID) -> SAEAttributes:
    return SAEAttributes(
        layer=3,
        variable="features",
        release=RELEASE,
        id=name,
        hook_name="blocks.3.hook_resid_post",
        architecture="jumprelu",
        d_in=D_IN,
        d_sae=D_SAE,
        dtype="float32",
        decoder_norm_folded=False,
    )


def _source(sae: Any, name: str = ID) -> HalfProducts:
    return HalfProducts(_Source(sae, _attributes(name)), "cuda", "bfloat16")


def _encoder(sae: Any, device: str = "cpu") -> Encoder:
    source = _source(sae)
    (described,) = source.find([3])[3]
    assert described.dtype == HALF_PRODUCTS
    return source.load(described, torch.device(device))


def _inputs(seed: int = 2) -> torch.Tensor:
    """Return what a model in bfloat16 makes: some channels are much larger than others."""
    numbers = torch.Generator().manual_seed(seed)
    channels = torch.randn(D_IN, generator=numbers).exp()
    return (torch.randn(TOKENS, D_IN, generator=numbers) * channels).bfloat16()


@pytest.fixture
def products_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a CPU do what only a GPU offers: bfloat16 factors, float32 sums; notes their number."""
    mm, addmm, summed = torch.mm, torch.addmm, list[int]()

    def product(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        summed.append(a.shape[1])
        return mm(a.float(), b.float())

    def added(
        total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype
    ) -> torch.Tensor:
        assert total.dtype == out_dtype == torch.float32
        summed.append(a.shape[1])
        return addmm(total, a.float(), b.float())

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "addmm", added)
    return summed


def _scale() -> float:
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    scale = get_norm_scaling_factor(RELEASE, ID)
    assert scale
    return float(scale)


@pytest.mark.parametrize("scaled", [False, True])
def test_features_are_those_of_saelens(products_on_a_cpu: list[int], scaled: bool) -> None:
    scale = _scale() if scaled else 1.0
    expected = _sae(scale=scale).encode(_inputs().float()).detach()
    with torch.inference_mode():
        found = _encoder(_sae(scale=scale))(_inputs())
    assert sum(products_on_a_cpu) == D_IN
    assert max(products_on_a_cpu) <= 512
    # Either adds up 1,300 products in float32, in another order.
    magnitude = _inputs().float().abs() @ _sae(scale=scale).W_enc.detach().abs()
    tolerance = D_IN * np.finfo(np.float32).eps * (1 + magnitude)
    active = (expected > 0) & (found > 0)
    assert active.sum() > 1_000
    assert ((found - expected).abs() <= tolerance)[active].all()
    near = ((expected + found - 1.5).abs() <= tolerance)[(expected > 0) != (found > 0)]
    assert near.all()


@needs_gpu
def test_sums_of_tensor_cores_err_by_less_than_float32_rounds() -> None:
    sae, inputs = _sae("cuda", scale=_scale()), _inputs().cuda()
    exact = inputs.double() @ sae.W_enc.double() + sae.b_enc.double()
    single = sae.encode(inputs.float())
    found = _encoder(_sae("cuda", scale=_scale()), "cuda")(inputs)
    active = (found > 0) & (single > 0)
    magnitude = inputs.double().abs() @ sae.W_enc.double().abs()
    errors = ((found - exact).abs() / magnitude)[active]
    assert errors.max() < D_IN * np.finfo(np.float32).eps
    assert errors.median() < np.finfo(np.float32).eps / 2


def test_weights_that_are_no_bfloat16_numbers_are_refused() -> None:
    with pytest.raises(SAEError, match="no bfloat16 numbers"):
        _encoder(_sae(scale=1.1))


def test_biased_inputs_are_refused() -> None:
    sae = _sae()
    sae.cfg.apply_b_dec_to_input = True
    with pytest.raises(SAEError, match="subtracts a bias"):
        _encoder(sae)


def test_saes_of_two_products_are_refused() -> None:
    sae = GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    with pytest.raises(SAEError, match="gated SAEs use their weights otherwise"):
        _encoder(sae)


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [("cpu", "bfloat16", "on the device cpu"), ("cuda", "float32", "a model in float32")],
)
def test_where_they_would_be_wrong_or_useless_they_are_refused(
    device: str, dtype: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        HalfProducts(_Source(_sae(), _attributes()), device, dtype)
