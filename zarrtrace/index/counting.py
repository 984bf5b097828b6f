"""Exact statistics of a layer's features, whatever the order of scenarios.

Sums of floating-point numbers depend on their order; these are sums of integers, so that an index
that grew scenario by scenario equals one that was built at once, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np

from zarrtrace.format.index_layout import INDEX_TOKENS

# An activation is a multiple of 2**-18 and, of what is left, one of 2**-50: float32 is never
# rounded above 2**-26.
_HIGH, _LOW = 2.0**18, 2.0**32
# Largest magnitude whose sum fits int64, with 2**11 such tokens a feature.
_LARGEST = 2.0**34
# Entries that wait to be ranked: 24 bytes each.
_MAX_WAITING = 2**20

#: Tokens of features: number of the feature, activation, number of the scenario, position.
_Entries = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class FeatureCounts:
    """Sum, count and strongest tokens of every feature of one layer.

    A feature fires at a token if its activation is non-zero; the strongest tokens have the largest
    magnitude. Some SAEs (AbsTopK) have negative activations.

    Parameters
    ----------
    features
        Number of latents.

    Attributes
    ----------
    tokens
        Number of tokens added.
    active, total
        Number of tokens at which the feature fires ``(feature,)`` int64; sum of its activations
        ``(feature, 2)`` int64, in units of 2⁻¹⁸ and of 2⁻⁵⁰.
    """

    def __init__(self, features: int) -> None:
        self.tokens = 0
        self.active = np.zeros(features, np.int64)
        self.total = np.zeros((features, 2), np.int64)
        self._ranked = _no_entries()
        self._waiting: list[_Entries] = []
        # The magnitude that an activation must reach to be among a feature's strongest.
        self._bar = np.zeros(features, np.float32)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the counts that :meth:`arrays` gave."""
        out = cls(len(arrays["active"]))
        out.tokens = int(arrays["tokens"])
        out.active = np.array(arrays["active"], np.int64)
        out.total = np.array(arrays["total"], np.int64)
        feature, rank = np.nonzero(arrays["token_activation"])
        out._waiting.append(
            (
                feature,
                arrays["token_activation"][feature, rank],
                arrays["token_scenario"][feature, rank],
                arrays["token_position"][feature, rank],
            )
        )
        out.rank()
        return out

    def add(
        self,
        scenario: int | np.ndarray,
        activations: np.ndarray,
        positions: np.ndarray | None = None,
    ) -> None:
        """Add some tokens.

        Parameters
        ----------
        scenario
            Number of their scenario in the run, or that of each token.
        activations
            ``(token, feature)``; NaN and infinity count as silent, and magnitudes above 2³⁴ as
            2³⁴ in the sum.
        positions
            Positions of the tokens in the prompt; None for all tokens of the prompt.
        """
        tokens, width = activations.shape
        flat = np.ascontiguousarray(activations).reshape(-1)
        at = np.flatnonzero((flat != 0) & np.isfinite(flat))
        token, feature = at // width, at % width
        value = flat[at].astype(np.float32)
        self.tokens += tokens
        self.active[:width] += np.bincount(feature, minlength=width)
        scaled = np.clip(value.astype(np.float64), -_LARGEST, _LARGEST) * _HIGH
        high = np.floor(scaled)
        low = np.floor((scaled - high) * _LOW)
        for column, units in enumerate((high, low)):
            summed = np.bincount(feature, weights=units, minlength=width)
            self.total[:width, column] += summed.astype(np.int64)
        self._carry()
        strong = np.abs(value) >= self._bar[feature]
        token = token[strong]
        at_token = token if positions is None else positions[token]
        of_token = np.broadcast_to(scenario, tokens)[token]
        self._wait(
            (
                feature[strong],
                value[strong],
                of_token.astype(np.uint32),
                at_token.astype(np.uint32),
            )
        )

    def merge(self, other: FeatureCounts) -> None:
        """Add what was counted of other scenarios."""
        self.tokens += other.tokens
        width = len(other.active)
        self.active[:width] += other.active
        self.total[:width] += other.total
        self._carry()
        for entries in (other._ranked, *other._waiting):
            self._wait(entries)

    def _carry(self) -> None:
        """Keep the second unit below the first: one sum has one way to be written."""
        self.total[:, 0] += self.total[:, 1] >> 32
        self.total[:, 1] &= 2**32 - 1

    def _wait(self, entries: _Entries) -> None:
        self._waiting.append(entries)
        if sum(len(one[0]) for one in self._waiting) > _MAX_WAITING:
            self.rank()

    def rank(self) -> None:
        """Keep each feature's strongest tokens alone; of equals, those of the first scenario."""
        feature, value, scenario, position = (
            np.concatenate(parts) for parts in zip(self._ranked, *self._waiting, strict=True)
        )
        order = np.lexsort((position, scenario, -np.abs(value), feature))
        feature = feature[order]
        rank = _ranks(feature)
        kept = order[rank < INDEX_TOKENS]
        self._ranked = (
            feature[rank < INDEX_TOKENS],
            value[kept],
            scenario[kept],
            position[kept],
        )
        self._waiting = []
        last = rank == INDEX_TOKENS - 1
        self._bar[feature[last]] = np.abs(value[order[last]])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what the index holds of this layer: arrays by name, without the layer.

        Returns
        -------
        dict
            ``maximum``, ``mean``, ``frequency``, ``active`` ``(feature,)``, ``total (feature,
            part)``, ``token_activation``, ``token_scenario``, ``token_position`` ``(feature,
            token_rank)``, ``tokens ()``. Ranks with activation 0 hold no token. ``maximum`` is the
            activation of largest magnitude, with its sign: that of the first rank.
        """
        self.rank()
        feature, value, scenario, position = self._ranked
        rank = _ranks(feature)
        shape = (len(self.active), INDEX_TOKENS)
        columns = {
            "token_activation": np.zeros(shape, np.float32),
            "token_scenario": np.zeros(shape, np.uint32),
            "token_position": np.zeros(shape, np.uint32),
        }
        for column, values in zip(columns.values(), (value, scenario, position), strict=True):
            column[feature, rank] = values
        total = self.total[:, 0] / _HIGH + self.total[:, 1] / (_HIGH * _LOW)
        tokens = self.tokens or np.nan
        return {
            "maximum": columns["token_activation"][:, 0].copy(),
            "mean": (total / tokens).astype(np.float32),
            "frequency": (self.active / tokens).astype(np.float32),
            **columns,
            "active": self.active,
            "total": self.total,
            "tokens": np.asarray(self.tokens, np.int64),
        }


def _ranks(feature: np.ndarray) -> np.ndarray:
    """Number equal neighbours from 0."""
    starts = np.flatnonzero(np.diff(feature, prepend=-1))
    counts = np.diff(np.append(starts, len(feature)))
    return np.arange(len(feature)) - np.repeat(starts, counts)


def _no_entries() -> _Entries:
    return (
        np.empty(0, np.int64),
        np.empty(0, np.float32),
        np.empty(0, np.uint32),
        np.empty(0, np.uint32),
    )
