"""The features that fire, found without making all the others zero.

An SAE's ``encode`` adds biases, cuts off negative values, compares with thresholds and multiplies:
each makes an array as large as all features of all tokens, of which one in hundreds fires. On a CPU
that takes a third as long as the product. Here the product is compared once, with a bound that no
feature that fires stays below, and only those few go through the SAE's arithmetic, with equal bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE
from torch import nn


class FiringFeatures:
    """Finds the features that fire, on a CPU.

    Parameters
    ----------
    sae
        One that :func:`has_thresholds`.
    columns
        Features of a block, of which the SAE may have fewer.
    """

    def __init__(self, sae: Any, columns: int) -> None:
        self._sae, self._columns = sae, columns
        self._bias = sae.b_enc.detach().numpy()
        is_jump = isinstance(sae, JumpReLUSAE)
        self._threshold = sae.threshold.detach().numpy() if is_jump else np.zeros_like(self._bias)
        # Rounded sums keep their order: where value + bias is above a threshold once rounded, the
        # value is above threshold - bias, exactly.
        with np.errstate(invalid="ignore", over="ignore"):
            bound = np.maximum(self._threshold, np.float32(0)) - self._bias
        bound = np.nextafter(bound, np.float32(-np.inf))
        # Infinity minus infinity, and infinity that stays below a threshold, are NaN to an SAE.
        is_finite = np.isfinite(self._threshold) & np.isfinite(self._bias)
        self._bound = np.where(is_finite, bound, np.float32(np.nan))

    def __call__(self, activations: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Encode ``(token, d_in)``; returns ``token * columns + feature``, and activations."""
        product = (self._sae.process_sae_in(activations) @ self._sae.W_enc).numpy()
        is_low = product <= self._bound
        at = np.flatnonzero(np.logical_not(is_low, out=is_low))  # NaN is not low
        feature = at % product.shape[1]
        with np.errstate(invalid="ignore", over="ignore"):
            before = product.reshape(-1)[at] + self._bias[feature]
            values = np.maximum(before, np.float32(0)) * (before > self._threshold[feature])
        fires = values != 0
        return in_block(at, product.shape[1], self._columns)[fires], values[fires]


def in_block(at: np.ndarray, width: int, columns: int) -> np.ndarray:
    """Turn positions ``token * width + feature`` into those of a block of so many columns."""
    return at + at // width * (columns - width) if width < columns else at


def has_thresholds(sae: Any) -> bool:
    """Whether thresholds alone decide which features of an SAE fire, in float32."""
    known = type(sae).encode in (JumpReLUSAE.encode, StandardSAE.encode)
    if not known or type(sae.activation_fn) is not nn.ReLU or sae.W_enc.dtype != torch.float32:
        return False
    points = sae.hook_sae_acts_pre, sae.hook_sae_acts_post
    return not any(vars(point)["_forward_hooks"] for point in points)
