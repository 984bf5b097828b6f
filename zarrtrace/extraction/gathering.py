"""Records of batches, gathered in the order of a table's samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from zarrtrace.format.layout import NEXT_TOKENS
from zarrtrace.format.table_layout import TableShape, table_columns
from zarrtrace.layer_batches import LayerBatch
from zarrtrace.records import (
    BFloat16,
    LayerRecord,
    Nonzeros,
    SampleRecord,
    SampleTokens,
    TokensRecord,
)


class _Part(NamedTuple):
    """Some rows of one layer, in any order.

    Attributes
    ----------
    rows
        Their numbers among the samples of the group.
    features
        By array name ``(row, feature)``.
    residual
        ``(row, channel)``, or None.
    """

    rows: np.ndarray
    features: Mapping[str, Nonzeros]
    residual: np.ndarray | BFloat16 | None


@dataclass
class SampleGroup:
    """Some scenarios that go through the model together, and what was computed of them.

    Attributes
    ----------
    start
        Number of their first sample in the table.
    rows
        By scenario, numbers of its first sample and of the one behind its last, from `start` on.
    failed
        Why a scenario has no values.
    """

    start: int
    rows: Mapping[str, tuple[int, int]]
    failed: dict[str, str] = field(default_factory=dict)
    _parts: dict[int, list[_Part]] = field(default_factory=dict)
    _tokens: list[TokensRecord] = field(default_factory=list)
    # Rows of a batch, by its first scenario.
    _rows_of: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples in the group."""
        return max(stop for _, stop in self.rows.values())

    def add(self, record: LayerBatch | LayerRecord | TokensRecord, dtypes: tuple[str, str]) -> None:
        """Take what was computed.

        Parameters
        ----------
        dtypes
            Precisions in which features and residual are stored: a scenario with a value that is
            not finite there fails.
        """
        if isinstance(record, TokensRecord):
            self._tokens.append(record)
            if record.nonfinite:
                self.fail(record.scenario, "log-probabilities hold NaN or infinity")
            return
        part = self._part_of(record)
        self._parts.setdefault(record.layer, []).append(part)
        for at in np.flatnonzero(~_is_sound(record, part, *dtypes)):
            reason = f"layer {record.layer} holds NaN, infinity, or values too large to store"
            self.fail(self._owner(int(part.rows[at])), reason)

    def _part_of(self, record: LayerBatch | LayerRecord) -> _Part:
        """Return what a record holds."""
        if isinstance(record, LayerRecord):
            found = {name: _nonzeros(one.activations) for name, one in record.features.items()}
            arrays = [*found.values(), record.residual]
            count = next(array.shape[0] for array in arrays if array is not None)
            first = self.rows[record.scenario][0] + record.start
            return _Part(np.arange(first, first + count), found, record.residual)
        rows = self._rows_of.get(record.members[0].scenario)
        if rows is None:  # once a batch, which has many layers
            each = [np.arange(*self.rows[one.scenario]) for one in record.members]
            rows = self._rows_of[record.members[0].scenario] = np.concatenate(each)
        features = {name: one.nonzeros for name, one in record.features.items()}
        return _Part(rows, features, record.residual)

    def _owner(self, row: int) -> str:
        """Return the scenario that a row is of."""
        return next(name for name, (start, stop) in self.rows.items() if start <= row < stop)

    def fail(self, scenario: str, reason: str) -> None:
        """Note why a scenario has no values; the first reason counts."""
        self.failed.setdefault(scenario, reason)

    def layer(self, layer: int, shape: TableShape, done: int) -> Iterator[SampleRecord]:
        """Yield one layer of the samples that are not stored and did not fail.

        Parameters
        ----------
        shape
            The sizes of the table's arrays.
        done
            Number of the first sample that is not stored.
        """
        parts = self._parts.get(layer, [])
        features = {
            name: _gathered(
                [(part.rows, part.features[name]) for part in parts if name in part.features],
                (self.samples, width),
                table_columns(width, shape.limits),
            )
            for name, width in shape.features.items()
            if any(name in part.features for part in parts)
        }
        residual = self._residual(parts)
        for start, stop in self._stretches(done):
            yield SampleRecord(
                layer,
                self.start + start,
                {name: found.part(start, stop) for name, found in features.items()},
                None if residual is None else residual[start:stop],
            )

    def tokens(self, done: int) -> Iterator[SampleTokens]:
        """Yield the next tokens of these samples."""
        shape = (self.samples, NEXT_TOKENS)
        ids, logprobs = np.zeros(shape, np.uint32), np.zeros(shape, np.float32)
        texts = np.full(shape, "", object)
        for record in self._tokens:
            rows = slice(*self.rows[record.scenario])
            ids[rows], logprobs[rows] = record.next_token, record.next_token_logprob
            texts[rows] = record.next_token_text
        for start, stop in self._stretches(done):
            rows = slice(start, stop)
            yield SampleTokens(self.start + start, ids[rows], logprobs[rows], texts[rows])

    def _stretches(self, done: int) -> list[tuple[int, int]]:
        """Return the rows that are not stored, between those of scenarios that failed."""
        first, last = max(0, done - self.start), self.samples
        failed = sorted(self.rows[name] for name in self.failed)
        edges = [first, *(edge for rows in failed for edge in rows), last]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(max(first, start), stop) for start, stop in pairs if stop > max(first, start)]

    def _residual(self, parts: Sequence[_Part]) -> np.ndarray | BFloat16 | None:
        """Put rows of the residual stream in the order of samples."""
        found = [(part.rows, part.residual) for part in parts if part.residual is not None]
        if not found:
            return None
        _, first = found[0]
        like = first.bits if isinstance(first, BFloat16) else first
        out = np.zeros((self.samples, like.shape[1]), like.dtype)
        for rows, values in found:
            out[rows] = values.bits if isinstance(values, BFloat16) else values
        return BFloat16(out) if isinstance(first, BFloat16) else out


def _nonzeros(activations: np.ndarray | Nonzeros) -> Nonzeros:
    if not isinstance(activations, Nonzeros):
        raise TypeError("captured features come as their non-zero values")
    return activations


def _is_sound(
    record: LayerBatch | LayerRecord, part: _Part, feature_dtype: str, residual_dtype: str
) -> np.ndarray:
    """Whether all values of each row are finite as they are stored."""
    sound = np.ones(len(part.rows), bool)
    for name, found in part.features.items():
        if isinstance(record, LayerBatch):
            sound &= record.features[name].is_finite
        elif record.features[name].nonfinite:
            sound[:] = False  # whose rows are of one scenario
        for at, values in zip(found.at, found.values, strict=True):
            sound[at[~_is_finite(values, feature_dtype)] // found.columns] = False
    if part.residual is not None:
        sound &= _is_finite(np.asarray(part.residual), residual_dtype).all(axis=1)
    return sound


def _is_finite(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        finite: np.ndarray = np.isfinite(values.astype(dtype, copy=False))
    return finite


def _gathered(
    parts: Sequence[tuple[np.ndarray, Nonzeros]], shape: tuple[int, int], columns: int
) -> Nonzeros:
    """Put non-zero values in the order of samples, by blocks of some columns.

    Parameters
    ----------
    parts
        Numbers of rows, and their values.
    """
    (count, width), keys = shape, []
    for rows, found in parts:
        for number, at in enumerate(found.at):
            row, column = np.divmod(at, found.columns)
            block, column = np.divmod(column + number * found.columns, columns)
            keys.append((block * count + rows[row]) * columns + column)
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    key = key[order]
    value = np.concatenate([one for _, found in parts for one in found.values])[order]
    first = np.arange(-(-width // columns)) * count * columns  # of each block
    cuts = np.searchsorted(key, first[1:])
    blocks = zip(np.split(key, cuts), first.tolist(), strict=True)
    # Half as wide where that is enough: a block of a table waits until it is whole.
    kind = np.int32 if count * columns < 2**31 else np.int64
    positions = tuple((block - start).astype(kind) for block, start in blocks)
    return Nonzeros(shape, columns, positions, tuple(np.split(value, cuts)))
