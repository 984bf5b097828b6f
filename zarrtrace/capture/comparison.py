"""Whether two ways to compute the same differ by rounding alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zarrtrace.capture.model import LoadedModel

# Two ways to compute differ by several roundings of each number. The measure is what one rounding
# of the embeddings changes, so that it fits the model, its dtype and any processor.
_ROUNDINGS = 8


def within_rounding(
    model: LoadedModel, found: torch.Tensor, expected: torch.Tensor, noise: float
) -> bool:
    """Whether two ways to compute ``(..., token, d)`` differ by no more than rounding.

    Parameters
    ----------
    model
        Its dtype and width count.
    found, expected
        Results of the two ways.
    noise
        :func:`distance` between `expected` and the same under :func:`other_rounding`.
    """
    epsilon = torch.finfo(model.model.dtype).eps
    # A sum of d products is rounded about sqrt(d) times in float32, and once to the dtype.
    in_sums = math.sqrt(model.d_model) * torch.finfo(torch.float32).eps / epsilon
    least = epsilon * distance(expected, torch.zeros_like(expected))
    return distance(found, expected) <= _ROUNDINGS * (1 + in_sums) * max(noise, least)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square difference of the token that differs most."""
    if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    difference = torch.nan_to_num(found.float()) - torch.nan_to_num(expected.float())
    squares = difference.square().mean(-1)  # (..., token)
    return float(squares.reshape(-1, squares.shape[-1]).mean(0).max().sqrt())


@contextmanager
def other_rounding(model: LoadedModel) -> Iterator[None]:
    """Let every number of the embeddings be another by about one rounding."""

    def change(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output * (1 + signs * torch.finfo(output.dtype).eps).to(output)

    handle = model.model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
