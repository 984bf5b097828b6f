"""Draws that depend on the seed, the scenario, the repeat and the step, and on nothing else.

The Gumbel-max trick: the largest sum of a log-probability and Gumbel noise is a draw from the
distribution [1]_. The noise of a token is made on the CPU in float64 for all devices.

.. [1] E. J. Gumbel, Statistical theory of extreme values and some practical applications, 1954;
   C. J. Maddison, D. Tarlow, T. Minka, A* sampling, NeurIPS 2014.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from zarrtrace.capture.host import to_device
from zarrtrace.errors import NonFiniteError
from zarrtrace.scenarios.sampling import Sampling


def gumbel_noise(seed: int, name: str, repeat: int, step: int, size: int) -> np.ndarray:
    """Return standard Gumbel noise that is a function of its arguments.

    Philox 4x64 with a key of the seed, the scenario and the repeat, and a counter of the step; its
    raw bits are turned to numbers here, so that no version of NumPy gives others.

    Parameters
    ----------
    seed, name, repeat, step
        The run's seed, the scenario's name, and the numbers of repeat and token, from 0.
    size
        Tokens of the vocabulary.

    Returns
    -------
    ndarray
        float64 ``(size,)``.
    """
    identity = f"{seed}\0{repeat}\0{name}".encode()
    digest = hashlib.blake2b(identity, digest_size=16, person=b"zarrtrace").digest()
    key = np.frombuffer(digest, dtype="<u8")
    bits = np.random.Philox(key=key, counter=[0, 0, step, 0]).random_raw(size)
    bits >>= np.uint64(12)
    noise = bits.astype(np.float64)  # in place from here: a vocabulary has a hundred thousand
    noise += 0.5  # 52 bits and a half: neither 0 nor 1, of which the noise would be infinite
    noise *= 2.0**-52
    for _ in range(2):
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    return noise


class Sampler(LogitsProcessor):  # type: ignore[misc]
    """Makes the largest score a draw from the model's distribution.

    Parameters
    ----------
    rows
        Name of the scenario and number of the repeat of each sequence.
    sampling
        Its temperature, top-p and seed.
    start
        Tokens in front of a continuation, padding included.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], sampling: Sampling, start: int) -> None:
        self._rows, self._sampling, self._start = rows, sampling, start
        self._has_nan: torch.Tensor | None = None
        self._warpers = LogitsProcessorList()
        if not sampling.is_greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores ``(sequence, vocabulary)`` of the next token."""
        # Kept on the device: a GPU would be waited for at each token.
        found = scores.isnan().any()
        self._has_nan = found if self._has_nan is None else self._has_nan | found
        if self._sampling.is_greedy:
            return scores
        wide = scores.double()
        wide = wide - wide.amax(-1, keepdim=True)  # 0 at most: no temperature makes it infinite
        warped: torch.Tensor = self._warpers(input_ids, wide)
        step, size = input_ids.shape[1] - self._start, scores.shape[1]
        noise = [gumbel_noise(self._sampling.seed, *row, step, size) for row in self._rows]
        return warped + to_device(torch.from_numpy(np.stack(noise)), scores.device)

    def refuse_nan(self, name: str) -> None:
        """Refuse tokens that were chosen among NaN.

        Raises
        ------
        NonFiniteError
        """
        if self._has_nan is not None and bool(self._has_nan):
            raise NonFiniteError(
                f"{name}: computes NaN while it continues a prompt",
                why="Values exceed what the model's precision can hold, often in float16.",
                remedy="Try --dtype bfloat16 or --dtype float32.",
            )
