"""Records of batches, gathered in the order of a table's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from zarrtrace.format.layout import NEXT_TOKENS, NO_ID, TableShape, table_columns
from zarrtrace.records import (
    BFloat16,
    LayerBatch,
    LayerRecord,
    Nonzeros,
    SampleRecord,
    SampleTokens,
    TokensRecord,
)

# The upper half of a NaN in float32.
_NAN_BITS = 0x7FC0


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
class Group:
    """Some scenarios that go through the model together, and what was computed of them.

    Attributes
    ----------
    start
        Number of their first sample in the table.
    rows
        By scenario, numbers of its first sample and of the one behind its last, from `start` on.
    failed
        Why the values of a scenario are not stored; they are NaN.
    """

    start: int
    rows: Mapping[str, tuple[int, int]]
    failed: dict[str, str] = field(default_factory=dict)
    _parts: dict[int, list[_Part]] = field(default_factory=dict)
    _tokens: list[TokensRecord] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many samples the group has."""
        return max(stop for _, stop in self.rows.values())

    def add(
        self, record: LayerBatch | LayerRecord | TokensRecord, dtypes: tuple[str, str] | None
    ) -> None:
        """Take what was computed.

        Parameters
        ----------
        dtypes
            Precisions in which features and residual are stored: a scenario with a value that is
            not finite there fails. None takes all values.
        """
        if isinstance(record, TokensRecord):
            self._tokens.append(record)
            if dtypes is not None and record.nonfinite:
                self.fail(record.scenario, "log-probabilities hold NaN or infinity")
            return
        part, owners = _part_of(record, self.rows)
        self._parts.setdefault(record.layer, []).append(part)
        if dtypes is not None:
            for at in np.flatnonzero(~_is_sound(record, part, *dtypes)):
                reason = f"layer {record.layer} holds NaN, infinity, or values too large to store"
                self.fail(owners[at], reason)

    def fail(self, scenario: str, reason: str) -> None:
        """Note why a scenario has no values; the first reason counts."""
        self.failed.setdefault(scenario, reason)

    def layer(self, layer: int, shape: TableShape) -> SampleRecord:
        """Return one layer of all samples; values of scenarios that failed are NaN.

        Parameters
        ----------
        shape
            The sizes of the table's arrays.
        """
        parts, absent = self._parts.get(layer, []), self._absent()
        features = {
            name: _gathered(
                [(part.rows, part.features[name]) for part in parts if name in part.features],
                (self.samples, width),
                table_columns(width, shape.limits),
                absent,
            )
            for name, width in shape.features.items()
            if any(name in part.features for part in parts)
        }
        return SampleRecord(layer, self.start, features, self._residual(parts, absent))

    def _absent(self) -> np.ndarray:
        """Return the rows of scenarios that failed."""
        spans = [np.arange(*self.rows[name]) for name in self.failed]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)

    def _residual(
        self, parts: Sequence[_Part], absent: np.ndarray
    ) -> np.ndarray | BFloat16 | None:
        """Put rows of the residual stream in the order of samples."""
        found = [(part.rows, part.residual) for part in parts if part.residual is not None]
        if not found:
            return None
        _, first = found[0]
        is_half = isinstance(first, BFloat16)
        like = first.bits if isinstance(first, BFloat16) else first
        out = np.full(
            (self.samples, like.shape[1]), _NAN_BITS if is_half else np.nan, like.dtype
        )
        for rows, values in found:
            out[rows] = values.bits if isinstance(values, BFloat16) else values
        out[absent] = _NAN_BITS if is_half else np.nan
        return BFloat16(out) if is_half else out

    def tokens(self) -> SampleTokens:
        """Return the next tokens of all samples."""
        shape = (self.samples, NEXT_TOKENS)
        ids = np.full(shape, NO_ID, np.uint32)
        logprobs = np.full(shape, np.nan, np.float32)
        texts = np.full(shape, "", object)
        for record in self._tokens:
            if record.scenario not in self.failed:
                rows = slice(*self.rows[record.scenario])
                ids[rows], logprobs[rows] = record.next_token, record.next_token_logprob
                texts[rows] = record.next_token_text
        return SampleTokens(self.start, ids, logprobs, texts)


def _part_of(
    record: LayerBatch | LayerRecord, rows: Mapping[str, tuple[int, int]]
) -> tuple[_Part, list[str]]:
    """Return what a record holds, and the scenario that each of its rows is of."""
    if isinstance(record, LayerRecord):
        found = {name: _nonzeros(one.activations) for name, one in record.features.items()}
        arrays = [*found.values(), record.residual]
        count = next(array.shape[0] for array in arrays if array is not None)
        first = rows[record.scenario][0] + record.start
        part = _Part(np.arange(first, first + count), found, record.residual)
        return part, [record.scenario] * count
    names = [member.scenario for member in record.members]
    part = _Part(
        np.concatenate([np.arange(*rows[name]) for name in names]),
        {name: one.nonzeros for name, one in record.features.items()},
        record.residual,
    )
    return part, [one.scenario for one in record.members for _ in range(one.rows)]


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
        return np.isfinite(values.astype(dtype, copy=False))


def _gathered(
    parts: Sequence[tuple[np.ndarray, Nonzeros]],
    shape: tuple[int, int],
    columns: int,
    absent: np.ndarray,
) -> Nonzeros:
    """Put non-zero values in the order of samples, by blocks of so many columns.

    Parameters
    ----------
    parts
        Numbers of rows, and their values.
    absent
        Rows whose values are NaN.
    """
    count, width = shape
    keys, values = [], []
    for rows, found in parts:
        is_there = ~np.isin(rows, absent)
        for number, (at, some) in enumerate(zip(found.at, found.values, strict=True)):
            row, column = np.divmod(at, found.columns)
            kept = is_there[row]
            column = column[kept] + number * found.columns
            keys.append((column // columns * count + rows[row[kept]]) * columns + column % columns)
            values.append(some[kept])
    if len(absent):
        row, column = np.repeat(absent, width), np.tile(np.arange(width), len(absent))
        keys.append((column // columns * count + row) * columns + column % columns)
        values.append(np.full(len(row), np.nan, values[0].dtype))
    key, value = np.concatenate(keys), np.concatenate(values)
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    blocks = -(-width // columns)
    edges = np.arange(1, blocks) * count * columns
    at = np.split(key, np.searchsorted(key, edges))
    return Nonzeros(
        shape,
        columns,
        tuple(one - number * count * columns for number, one in enumerate(at)),
        tuple(np.split(value, np.searchsorted(key, edges))),
    )
