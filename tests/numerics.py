"""Bounds on PyTorch's rounding: by layer in float64, or by trial.

Over several layers no formula holds: a unit in the last place of an early layer grows through
norms and softmaxes, and where it changes the experts that a token goes to, without limit. So
attention of any precision is compared layer by layer, with what the layer's own queries and keys
give in float64 (:func:`attention_in_float64`). What a whole float32 model may make otherwise is
found by rounding it otherwise (:func:`deviations`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import rounding
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zarrtrace.capture.blocked import IMPLEMENTATION

# Between the product of queries and keys and the softmax: scaling, a soft cap's quotient, tanh
# (good to two units) and product, the mask, and a shift by the largest, at most twice as large.
_SCORE_ROUNDINGS = 8


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, from the model's forward.

    Attributes
    ----------
    module
        The attention module.
    query, key, value
        ``(sequence, head, token, d_head)``.
    options
        Further arguments: scaling, soft cap, ...
    output
        ``(sequence, token, head, d_head)``.
    weights
        ``(sequence, head, query, key)``; None from implementations that return none.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: Mapping[str, Any]
    output: torch.Tensor
    weights: torch.Tensor | None

    @property
    def layer(self) -> int:
        """The block's index."""
        return int(self.module.layer_idx)


def eager_function(module: Any) -> Any:
    """Return the eager attention function of an attention module's architecture."""
    return sys.modules[type(module).__module__].eager_attention_forward


@contextmanager
def attention_calls() -> Iterator[list[AttentionCall]]:
    """Record every call of eager and of blocked attention while the context is open."""
    calls: list[AttentionCall] = []
    blocked = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def recorded(function: Callable[[Any], Any]) -> Any:
        def call(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
            made = function(module)(module, query, key, value, mask, **options)
            calls.append(AttentionCall(module, query, key, value, options, *made))
            return made

        return call

    ALL_ATTENTION_FUNCTIONS["eager"] = recorded(eager_function)
    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = recorded(lambda _module: blocked)
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]


@dataclass(frozen=True)
class Exact:
    """A layer's attention in float64, and how far rounding may move each number.

    Attributes
    ----------
    weights, weights_error
        ``(head, query, key)``.
    output, output_error
        ``(query, head, d_head)``.
    """

    weights: np.ndarray
    weights_error: np.ndarray
    output: np.ndarray
    output_error: np.ndarray


@torch.no_grad()
def attention_in_float64(
    call: AttentionCall, window: int | None, sequence: int = 0, tokens: int | None = None
) -> Exact:
    """Compute a call's attention by the architecture's own function in float64.

    Parameters
    ----------
    call
        Where queries, keys and values come from.
    window
        Number of tokens that a query sees, itself included; None for all up to it.
    sequence, tokens
        Which sequence of a batch, and how many of its tokens are no padding.
    """
    query, key, value = (
        one[sequence : sequence + 1, :, :tokens].double()
        for one in (call.query, call.key, call.value)
    )
    dtype = str(call.query.dtype).removeprefix("torch.")
    length, d_head = query.shape[2:]
    behind = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (behind < 0) | (behind >= (window or length))
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    eager = eager_function(call.module)
    output, weights = eager(call.module, query, key, value, mask, **call.options)
    scaling = call.options.get("scaling")
    shared = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(shared, dim=1) for one in (key, value))
    scores = query.abs() @ key.abs().mT * (d_head**-0.5 if scaling is None else scaling)
    size = scores[0].masked_fill(hidden, 0).amax(-1, keepdim=True).numpy()
    if (sinks := call.options.get("s_aux")) is not None:
        size += sinks.abs().double().numpy()[:, None, None]
    score_error = rounding.product(dtype, d_head, size)
    score_error += rounding.rounding(dtype, _SCORE_ROUNDINGS, size)
    exact = weights[0].double().numpy()
    error = rounding.softmax(dtype, exact, score_error)
    values = value[0].abs().numpy()
    output_error = error @ values + rounding.product(dtype, length, (exact + error) @ values)
    return Exact(exact, error, output[0].double().numpy(), output_error.swapaxes(0, 1))


#: Matrix products, and which argument's last dimension they sum over.
_PRODUCTS = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "_grouped_mm"), 0),
    **dict.fromkeys(("addmm", "baddbmm", "convolution"), 1),
}


class _RoundedOtherwise(TorchDispatchMode):
    """Change each element of each matrix product by what another order of summing may change.

    That is a random part of ``sqrt(n) u`` times the sum of the products' absolute values: the bound
    that rounding errors of random sign keep (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        if name not in _PRODUCTS:
            return out
        self.products += 1
        terms = args[_PRODUCTS[name]].shape[-1]
        sizes = [
            abs(one) if torch.is_floating_point(one) else one
            for one in args[:3]
            if isinstance(one, torch.Tensor)
        ]
        scale = func(*sizes, *args[len(sizes) :], **(kwargs or {}))
        part = 2 * torch.rand(out.shape, generator=self._generator) - 1
        return out + rounding.unit("float32") * terms**0.5 * part * scale


def deviations(compute: Callable[[], Mapping[str, Any]]) -> dict[str, float]:
    """Find how far apart rounding may bring two runs of a float32 model, by three trials.

    Parameters
    ----------
    compute
        Runs the model; returns arrays by name.
    """
    plain = compute()
    most: dict[str, float] = {}
    for seed in range(3):
        with _RoundedOtherwise(seed) as mode:
            moved = compute()
        assert mode.products, "no matrix product was rounded otherwise"
        for name, value in plain.items():
            difference = np.abs(np.asarray(moved[name]) - np.asarray(value)).max()
            most[name] = max(most.get(name, 0.0), float(difference))
    return {name: 2 * largest for name, largest in most.items()}  # either may be that far off


@cache
def whole_model_deviations(name: str, path: Path, ids: tuple[int, ...]) -> dict[str, float]:
    """Find how far rounding may move a prompt's attention, blocks and log-probabilities."""

    def compute() -> dict[str, torch.Tensor]:
        made = architectures.reference(name, path, ids)
        return {
            "attention": torch.stack([*made.attention.values()]),
            "blocks": torch.stack([*made.blocks.values()]),
            "logprob": made.logits.log_softmax(-1),
        }

    return deviations(compute)


def assert_features_close(
    one: np.ndarray, other: np.ndarray, sae: Any, input_error: float, size: float
) -> None:
    """Compare features of inputs that differ by rounding, ``(token, feature)``.

    A feature adds up the differences of its inputs and rounds its own product. A JumpReLU's falls
    from its threshold to 0, so that it may be there in one of them alone.

    Parameters
    ----------
    one, other
        The features.
    sae
        As sae-lens loads it.
    input_error, size
        Largest difference and largest absolute value of the inputs.
    """
    parameters = {name: value.detach().double() for name, value in sae.named_parameters()}
    total = parameters["W_enc"].abs().sum(0)
    if "r_mag" in parameters:  # a gated SAE's weights, scaled for the magnitudes
        total *= parameters["r_mag"].exp().clamp(min=1)
    biases = [parameters[name].abs() for name in ("b_enc", "b_gate", "b_mag") if name in parameters]
    bias = torch.stack(biases).amax(0)
    product = rounding.product("float32", sae.cfg.d_in + 1, total * size + bias)
    error = (total * input_error + 2 * product).numpy()
    threshold = getattr(sae, "threshold", torch.zeros(len(bias))).detach().numpy()
    crossed = (one == 0) != (other == 0)
    beyond = np.maximum(one, other) - threshold
    assert (beyond <= error)[crossed].all()
    rounding.assert_close(np.where(crossed, 0, other), np.where(crossed, 0, one), error)
    assert (one[~crossed] != 0).any()
