"""Assembling attention rows into records that fill whole shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from zarrtrace.capture.blocked import AttentionRows
from zarrtrace.capture.model import DTYPES
from zarrtrace.errors import ModelError


class RowBuffer:
    """Rows of one layer of one prompt, given as they come and taken some at a time.

    Parameters
    ----------
    heads, tokens
        Sizes.
    rows
        Rows of a full buffer; the last one may be shorter.
    positions
        Token positions that will come; None for all.
    dtype
        Precision of what is taken: ``"float32"`` or ``"float16"``.
    """

    def __init__(
        self,
        heads: int,
        tokens: int,
        rows: int,
        positions: tuple[int, ...] | None,
        dtype: str,
    ) -> None:
        self._heads, self._tokens, self._dtype = heads, tokens, dtype
        self._total = tokens if positions is None else len(positions)
        self._rows = min(rows, self._total)
        self._start = 0
        self._new()

    def _new(self) -> None:
        rows = min(self._rows, self._total - self._start)
        self._filled = 0
        self._weights = np.zeros((self._heads, rows, self._tokens), self._dtype)
        self._mean = np.zeros((rows, self._tokens), np.float32)

    def add(self, step: AttentionRows) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Take rows in; yield every buffer that they fill.

        Yields
        ------
        start, weights, mean
            Number of the first row, ``(head, row, key)`` and ``(row, key)``.

        Raises
        ------
        ModelError
            If there are more rows than were announced.
        """
        if self._start + self._filled + len(step.queries) > self._total:
            raise ModelError(
                f"layer {step.layer} gives more than {self._total} rows of attention",
                why="Its block computes attention more than once.",
                remedy="Use --attention-capture whole.",
            )
        keys = step.weights.shape[-1]
        weights = step.weights.to(DTYPES[self._dtype]).cpu().numpy()
        mean = step.weights.mean(0, dtype=torch.float32).cpu().numpy()
        at = 0
        while at < weights.shape[1]:
            count = min(weights.shape[1] - at, self._weights.shape[1] - self._filled)
            into, of = slice(self._filled, self._filled + count), slice(at, at + count)
            self._weights[:, into, :keys] = weights[:, of]
            self._mean[into, :keys] = mean[of]
            self._filled += count
            at += count
            if self._filled == self._weights.shape[1]:
                yield self._start, self._weights, self._mean
                self._start += self._filled
                self._new()
