"""The features that fire, found without making all the others zero.

An SAE's ``encode`` adds biases, cuts off negative values, compares with thresholds and multiplies:
each makes an array as large as all features of all tokens, of which one in hundreds fires. On a CPU
that takes a third as long as the product. Here the product is compared once, with a bound that no
feature that fires stays below, and only those few go through the SAE's arithmetic, with equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE
from torch import nn

# Features multiplied at once: fewer values at a time than 4,096 features make are nearer to the
# processor when they are compared (scripts/bench/README.md, "Extraction on a CPU").
_TOGETHER = 1024
# Methods that a user may set on one SAE, and where torch keeps the hooks of a module.
_OF_ENCODING = {"encode", "process_sae_in"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


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
        self._bias, self._threshold, bound = (one.numpy() for one in _bounds(sae, start, columns))
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


class FiringOnGPU:
    """Finds which features fire, on a GPU, which is not waited for.

    Parameters
    ----------
    sae
        One that :func:`has_thresholds`.
    """

    def __init__(self, sae: Any) -> None:
        self._sae = sae
        self._bias, self._threshold, self._bound = _bounds(sae, 0, len(sae.b_enc))

    def __call__(
        self, activations: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Encode ``(token, d_in)``.

        Returns
        -------
        torch.Tensor
            Which features may fire ``(token, d_sae)``: all that do, and hardly any other.
        Callable
            Gives activations at some positions ``token * d_sae + feature``; 0 if one does not fire.
        """
        product = self._sae.process_sae_in(activations) @ self._sae.W_enc
        may_fire = (product <= self._bound).logical_not_()  # NaN is not low

        def values(at: torch.Tensor) -> torch.Tensor:
            feature = at % product.shape[1]
            before: torch.Tensor = product.view(-1)[at] + self._bias[feature]
            return before.relu() * (before > self._threshold[feature])

        return may_fire, values


def _bounds(sae: Any, start: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return biases, thresholds and bounds of some features: one that fires is above its bound."""
    bias = some_features(sae.b_enc, start, columns)
    is_jump = isinstance(sae, JumpReLUSAE)
    threshold = some_features(sae.threshold, start, columns) if is_jump else torch.zeros_like(bias)
    # Rounded sums keep their order: where value + bias is above a threshold once rounded, the
    # value is above threshold - bias, exactly.
    bound = torch.nextafter(threshold.clamp(min=0) - bias, bias.new_tensor(-torch.inf))
    # Infinity minus infinity, and infinity that stays below a threshold, are NaN to an SAE.
    is_finite = threshold.isfinite() & bias.isfinite()
    return bias, threshold, torch.where(is_finite, bound, torch.nan)


def some_features(weights: torch.Tensor, start: int, columns: int) -> torch.Tensor:
    """Return the weights of some features, which are the last dimension, side by side.

    A matrix that lies the other way round is left so: products depend on it.
    """
    some = weights.detach()[..., start : start + columns]
    return some if some.ndim == 2 and some.T.is_contiguous() else some.contiguous()


def is_plain(sae: Any) -> bool:
    """Whether an SAE encodes as sae-lens's class for its architecture does, and nothing is added.

    An SAE that its user has loaded may be of a class with an ``encode`` of its own, or have hooks.
    """
    registered, _ = SAE_CLASS_REGISTRY.get(sae.cfg.architecture(), (None, None))
    if type(sae) is not registered or _OF_ENCODING & vars(sae).keys():
        return False
    return not any(vars(module)[hooks] for module in sae.modules() for hooks in _HOOKS)


def has_thresholds(sae: Any) -> bool:
    """Whether thresholds alone decide which features of an SAE fire, in float32."""
    known = type(sae).encode in (JumpReLUSAE.encode, StandardSAE.encode)
    if not known or type(sae.activation_fn) is not nn.ReLU or sae.W_enc.dtype != torch.float32:
        return False
    return is_plain(sae)
