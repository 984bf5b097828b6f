"""The features that fire, found without making all the others zero.

An SAE's ``encode`` adds biases, cuts off negative values, compares with thresholds and multiplies:
each makes an array as large as all features of all tokens, of which one in hundreds fires. On a CPU
that takes a third as long as the product. Here the product is compared once, with a bound that no
feature that fires stays below, and only those few go through the SAE's arithmetic, with equal bits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE
from torch import nn

# Features multiplied at once: fewer values at a time than 4,096 features make are nearer to the
# processor when they are compared (scripts/bench/README.md, "Extraction on a CPU").
_TOGETHER = 1024


class FiringFeatures:
    """Finds which features of a block fire, on a CPU.

    Parameters
    ----------
    sae
        One that :func:`has_thresholds`.
    start, columns
        The block's first feature, and how many it has; at the SAE's end there may be fewer.
    """

    def __init__(self, sae: Any, start: int, columns: int) -> None:
        self._columns = columns
        self._bias = some_features(sae.b_enc, start, columns).numpy()
        is_jump = isinstance(sae, JumpReLUSAE)
        threshold = (
            some_features(sae.threshold, start, columns).numpy()
            if is_jump
            else np.zeros_like(self._bias)
        )
        self._threshold = threshold
        # Rounded sums keep their order: where value + bias is above a threshold once rounded, the
        # value is above threshold - bias, exactly.
        with np.errstate(invalid="ignore", over="ignore"):
            bound = np.maximum(threshold, np.float32(0)) - self._bias
        bound = np.nextafter(bound, np.float32(-np.inf))
        # Infinity minus infinity, and infinity that stays below a threshold, are NaN to an SAE.
        is_finite = np.isfinite(threshold) & np.isfinite(self._bias)
        bound = np.where(is_finite, bound, np.float32(np.nan))
        ends = [*range(0, len(bound), _TOGETHER), len(bound)]
        self._parts = [
            (first, some_features(sae.W_enc, start + first, last - first), bound[first:last])
            for first, last in pairwise(ends)
        ]

    def __call__(self, inputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Encode ``(token, d_in)``; returns ``token * columns + feature``, and activations.

        `inputs` are what the SAE's ``process_sae_in`` makes of activations.
        """
        at, products = [], []
        for start, matrix, bound in self._parts:
            product = (inputs @ matrix).numpy()
            is_low = product <= bound
            here = np.flatnonzero(np.logical_not(is_low, out=is_low))  # NaN is not low
            token, feature = np.divmod(here, len(bound))
            at.append(token * self._columns + (start + feature))
            products.append(product.reshape(-1)[here])
        position = np.concatenate(at)
        order = np.argsort(position, kind="stable")
        position = position[order]
        feature = position % self._columns
        with np.errstate(invalid="ignore", over="ignore"):
            before = np.concatenate(products)[order] + self._bias[feature]
            values = np.maximum(before, np.float32(0)) * (before > self._threshold[feature])
        fires = values != 0
        return position[fires], values[fires]


def some_features(weights: torch.Tensor, start: int, columns: int) -> torch.Tensor:
    """Return the weights of some features, which are the last dimension, side by side.

    A matrix that lies the other way round is left so: products depend on it.
    """
    some = weights.detach()[..., start : start + columns]
    return some if some.ndim == 2 and some.T.is_contiguous() else some.contiguous()


def has_thresholds(sae: Any) -> bool:
    """Whether thresholds alone decide which features of an SAE fire, in float32."""
    known = type(sae).encode in (JumpReLUSAE.encode, StandardSAE.encode)
    if not known or type(sae.activation_fn) is not nn.ReLU or sae.W_enc.dtype != torch.float32:
        return False
    points = sae.hook_sae_acts_pre, sae.hook_sae_acts_post
    return not any(vars(point)["_forward_hooks"] for point in points)
