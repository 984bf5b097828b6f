"""Assembling attention rows into records that fill whole shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from zarrtrace.capture.blocked import AttentionRows
from zarrtrace.capture.host import to_host
from zarrtrace.capture.refusals import DTYPES
from zarrtrace.errors import ModelError
from zarrtrace.records import BFloat16


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
        Precision of what is taken: ``"float32"`` or ``"float16"``; bfloat16 is taken as it is where
        that is ``"float32"``.
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
        self._weights: np.ndarray | None = None  # its type is that of the first rows
        self._mean = np.zeros((rows, self._tokens), np.float32)

    def add(self, step: AttentionRows) -> Iterator[tuple[int, np.ndarray | BFloat16, np.ndarray]]:
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
        is_half = step.weights.dtype == torch.bfloat16 and self._dtype == "float32"
        kept = step.weights.view(torch.int16) if is_half else step.weights.to(DTYPES[self._dtype])
        weights = to_host(kept)
        weights = weights.view(np.uint16) if is_half else weights
        mean = to_host(step.weights.mean(0, dtype=torch.float32))
        at = 0
        while at < weights.shape[1]:
            rows = self._mean.shape[0]
            if self._weights is None:
                self._weights = np.zeros((self._heads, rows, self._tokens), weights.dtype)
            count = min(weights.shape[1] - at, rows - self._filled)
            into, of = slice(self._filled, self._filled + count), slice(at, at + count)
            self._weights[:, into, :keys] = weights[:, of]
            self._mean[into, :keys] = mean[of]
            self._filled += count
            at += count
            if self._filled == rows:
                made = BFloat16(self._weights) if is_half else self._weights
                yield self._start, made, self._mean
                self._start += self._filled
                self._new()
