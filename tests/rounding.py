"""How far computed numbers may lie from the exact ones, on any processor.

The error model (Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapters 2 to 4):

- An operation is off by at most ``u`` times its result; ``u`` is half the distance from 1 to the
  next number of its format (:func:`unit`).
- A sum of ``n`` terms or products is off by at most ``n u`` times the sum of their absolute values,
  in whatever order, blocks and vectors a processor adds them, fused with the products or not
  (:func:`rounding`).
- Products of half-precision matrices are summed in float32, and the sum is rounded once:
  PyTorch and oneDNN promise that (:func:`product`).

Each of two computations is that far from the exact value, so that they are up to twice as far from
each other. Comparisons of float64 with float64 take pytest's and NumPy's own 1e-6 and 1e-7, which
are the rounding of hundreds of millions of terms. Nothing here was measured on a processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Significant bits, the implicit one among them.
_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
#: Smallest positive numbers: results below 2**-126, or float16's 2**-14, lose more than `u`.
_SMALLEST = {
    "float64": 2.0**-1074,
    "float32": 2.0**-149,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
}


def unit(dtype: str) -> float:
    """Return the largest relative error of one rounding."""
    return 2.0 ** -_BITS[dtype]


def rounding(dtype: str, terms: int, scale: Any = 1.0) -> Any:
    """Bound the error of a sum.

    Parameters
    ----------
    dtype
        Format in which it is summed.
    terms
        Number of terms, or of roundings one after another.
    scale
        Sum of the terms' absolute values.
    """
    error = terms * unit(dtype)
    assert error < 0.1, "too many terms: nothing would be compared"
    return error / (1 - error) * scale


def product(dtype: str, terms: int, scale: Any) -> Any:
    """Bound the error of a matrix product, given the product of the absolute values."""
    if dtype in ("float32", "float64"):
        return rounding(dtype, terms, scale)
    return rounding("float32", terms, scale) + rounding(dtype, 1, scale)


def softmax(dtype: str, exact: np.ndarray, score_error: np.ndarray) -> np.ndarray:
    """Bound the error of probabilities along the last axis.

    Scores that are off by at most `score_error` change the odds of each key against all others by
    a factor of at most ``exp(2 * score_error)``. Then come the roundings of the softmax itself: its
    sum in float32 or better, and a shift, an exponential (good to two units), a quotient and the
    stored result in `dtype`.

    Parameters
    ----------
    dtype
        Format of the probabilities.
    exact
        Probabilities; they need not sum to 1.
    score_error
        Largest error of any score of the row, with the row's dimensions, the last one of size 1.
    """
    odds = np.exp(2 * score_error)
    above = exact * odds / (1 - exact + exact * odds) - exact
    below = exact - exact / (exact + (1 - exact) * odds)
    terms = exact.shape[-1]
    own = rounding("float32", terms, exact) + rounding(dtype, 5, exact)
    return np.asarray(np.maximum(above, below) + own + _SMALLEST[dtype])


def assert_close(found: Any, exact: Any, error: Any) -> None:
    """Fail where `found` is farther from `exact` than `error`, saying by how much."""
    found, exact = (np.asarray(one, np.float64) for one in (found, exact))
    assert found.shape == exact.shape
    assert np.array_equal(np.isfinite(found), np.isfinite(exact))
    excess = np.where(np.isfinite(exact), np.abs(found - exact) - error, 0)
    at = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[at] <= 0, f"{found[at]} for {exact[at]} at {at}: {excess[at]:.3g} beyond rounding"


def assert_same_ranking(found: np.ndarray, expected: np.ndarray, values: Any, error: float) -> None:
    """Compare ids by rank, but for those that rounding may exchange.

    Parameters
    ----------
    found, expected
        ``(row, rank)``: ids.
    values
        ``(row, rank)``: descending values of `expected`.
    error
        How far `found`'s values may be from them.
    """
    gaps = -np.diff(np.asarray(values, np.float64), axis=-1) > 2 * error
    beyond = np.zeros_like(gaps[..., :1])  # behind the last rank someone else may wait
    certain = np.concatenate([~beyond, gaps], -1) & np.concatenate([gaps, beyond], -1)
    assert certain.any(), "nothing is certain: nothing would be compared"
    assert np.array_equal(found[certain], expected[certain])
