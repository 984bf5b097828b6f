"""Layers of a batch of prompts, as capture hands them to the writers.

A batch goes to its writers in one piece: to copy, send and split it prompt by prompt would keep the
process that drives a GPU busier than the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zarrtrace.records import (
    BFloat16,
    FeatureRecord,
    LayerRecord,
    Nonzeros,
    strongest,
)


@dataclass(frozen=True)
class Member:
    """A prompt of a batch.

    Attributes
    ----------
    scenario
        Its name.
    length
        Number of its tokens; shorter rows of a batch are padded.
    rows, attention_rows
        Numbers of its stored tokens, and of stored rows of attention.
    """

    scenario: str
    length: int
    rows: int
    attention_rows: int


@dataclass(frozen=True)
class SparseFeatures:
    """Features of the tokens of some prompts, one prompt behind another.

    Attributes
    ----------
    nonzeros
        ``(token, feature)``
    is_finite
        Whether the input of the encoder is finite, by token: thresholds turn NaN into 0.
    """

    nonzeros: Nonzeros
    is_finite: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.nonzeros.nbytes + self.is_finite.nbytes

    def part(self, start: int, stop: int) -> SparseFeatures:
        """Return some of the tokens; only positions are copied."""
        if not start and stop == len(self.is_finite):
            return self
        return SparseFeatures(self.nonzeros.part(start, stop), self.is_finite[start:stop])

    def record(self) -> FeatureRecord:
        """Return the record of all tokens, which are one prompt's."""
        found = self.nonzeros
        finite = self.is_finite.all() and all(np.isfinite(one).all() for one in found.values)
        return FeatureRecord(found, *strongest(found), nonfinite=not finite)


@dataclass(frozen=True)
class LayerBatch:
    """One layer of several prompts.

    Attributes
    ----------
    layer
        Index of the decoder block.
    members
        The prompts, in the order of the arrays.
    wanted
        Indices of the prompts whose records are wanted.
    attention
        ``(sequence, head, query, key)`` of the stored rows, with padding at the end of both, or
        None.
    attention_mean
        ``(sequence, query, key)`` float32, or None.
    features
        Features of the stored tokens by array name.
    residual
        ``(token, channel)`` of the stored tokens, one prompt behind another without padding, or
        None.
    """

    layer: int
    members: Sequence[Member]
    wanted: Sequence[int]
    attention: np.ndarray | BFloat16 | None = None
    attention_mean: np.ndarray | None = None
    features: Mapping[str, SparseFeatures] = field(default_factory=dict)
    residual: np.ndarray | BFloat16 | None = None

    @property
    def scenarios(self) -> list[str]:
        """Names of the prompts whose records are wanted."""
        return [self.members[at].scenario for at in self.wanted]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        arrays = (self.attention, self.attention_mean, self.residual, *self.features.values())
        return sum(array.nbytes for array in arrays if array is not None)

    def part(self, wanted: Sequence[int]) -> LayerBatch:
        """Return the smallest batch that holds some of the wanted prompts."""
        start, stop = min(wanted), max(wanted) + 1
        if stop - start == len(self.members):
            return replace(self, wanted=wanted)
        token = np.cumsum([0, *(one.rows for one in self.members)]).tolist()
        attention, mean, residual = self.attention, self.attention_mean, self.residual
        return LayerBatch(
            self.layer,
            self.members[start:stop],
            [at - start for at in wanted],
            None if attention is None else attention[start:stop],
            None if mean is None else mean[start:stop],
            {name: f.part(token[start], token[stop]) for name, f in self.features.items()},
            None if residual is None else residual[token[start] : token[stop]],
        )

    def each(self) -> Iterator[LayerBatch]:
        """Yield a batch of each of the wanted prompts."""
        return (self.part([at]) for at in self.wanted)

    def records(self) -> Iterator[LayerRecord]:
        """Yield the records of the wanted prompts."""
        for batch in self.each():
            (one,), attention, mean = batch.members, batch.attention, batch.attention_mean
            rows, keys = slice(one.attention_rows), slice(one.length)
            yield LayerRecord(
                scenario=one.scenario,
                layer=self.layer,
                attention=None if attention is None else attention[0][:, rows, keys],
                attention_mean=None if mean is None else mean[0][rows, keys],
                features={name: found.record() for name, found in batch.features.items()},
                residual=batch.residual,
            )
