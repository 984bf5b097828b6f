"""Samples of one layer that wait until they fill a chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zarrtrace.format.layout import ArrayLayout
from zarrtrace.records import BFloat16, Nonzeros

# Records hold at most float32 and uint32.
_ITEM_BYTES = 4

_Rows = np.ndarray | BFloat16 | Nonzeros


class TableRows:
    """The samples of one layer, or next tokens, on their way into chunks.

    Parameters
    ----------
    layer
        The layer; None for next tokens.
    names
        Its arrays.
    layouts
        Layouts of all arrays.
    start
        Number of the first sample that is not stored.

    Attributes
    ----------
    next
        Number of the sample that must come next.
    mutex
        Held while samples are added.
    """

    def __init__(
        self,
        layer: int | None,
        names: Sequence[str],
        layouts: Mapping[str, ArrayLayout],
        start: int,
    ) -> None:
        self.layer, self.names, self.next = layer, tuple(names), start
        self.mutex = threading.Lock()
        self._layouts = {name: layouts[name] for name in names}
        self._waiting: dict[str, list[Any]] = {name: [] for name in names}

    @property
    def label(self) -> str:
        """Name of the rows in messages."""
        return "next tokens" if self.layer is None else f"layer {self.layer}"

    def problem(self, start: int, values: Mapping[str, _Rows], samples: int) -> str:
        """Say why samples cannot be added; empty if they can."""
        if values.keys() != {*self.names}:
            given, wanted = ", ".join(values) or "no array", ", ".join(self.names) or "none"
            return f"the record holds {given}; expected are {wanted}"
        if start != self.next:
            return f"samples from {start} on came, {self.next} must come next"
        counts = {value.shape[0] for value in values.values() if value.shape}
        for name, value in values.items():
            layout = self._layouts[name]
            rows, width = layout.shape[layout.row_axis], layout.shape[-1]
            if len(value.shape) != 2 or value.shape[1] != width or len(counts) != 1:
                return f"{name} has shape {value.shape}; the array's is ({rows}, {width})"
            if start + value.shape[0] > samples:
                return f"samples {start} to {start + value.shape[0] - 1}, the table has {samples}"
            if said := _odd_values(value, layout):
                return f"{name} {said}"
        return ""

    def add(self, values: Mapping[str, _Rows], samples: int) -> Iterator[tuple[str, Any]]:
        """Add samples, and yield the rows of whole chunks with the array that they belong to."""
        if not values:
            return
        self.next += next(iter(values.values())).shape[0]
        for name, value in values.items():
            layout, waiting = self._layouts[name], self._waiting[name]
            waiting.append(value)
            step = layout.chunks[layout.row_axis]
            count = sum(one.shape[0] for one in waiting)
            if count < step and self.next < samples:
                # Copied, lest a few rows keep the memory of a batch, or change with it.
                waiting[-1] = _copied(value)
                continue
            rows = _joined(waiting)
            whole = count if self.next == samples else count - count % step
            for at in range(0, whole, step):
                yield name, _part(rows, at, min(at + step, whole))
            waiting[:] = [_copied(_part(rows, whole, count))] if whole < count else []


def _odd_values(value: _Rows, layout: ArrayLayout) -> str:
    """Say what no table holds in an array; empty if it may."""
    if layout.codec == "sparse" or isinstance(value, Nonzeros):
        is_sparse = layout.codec == "sparse" and isinstance(value, Nonzeros)
        kind = type(value).__name__
        return _odd_nonzeros(value, layout.chunks[-1]) if is_sparse else f"is of type {kind}"
    if layout.dtype == "string":
        is_text = isinstance(value, np.ndarray) and all(isinstance(one, str) for one in value.flat)
        return "" if is_text else "holds something else than texts"
    dtype = np.dtype(np.float16 if isinstance(value, BFloat16) else value.dtype)
    kind = "u" if layout.dtype == "uint32" else "f"
    return "" if dtype.kind == kind and dtype.itemsize <= _ITEM_BYTES else f"is {dtype}"


def _odd_nonzeros(value: Any, columns: int) -> str:
    rows, width = value.shape
    blocks = -(-width // columns)
    if value.columns != columns or len(value.at) != blocks or len(value.values) != blocks:
        return f"has blocks of {value.columns} features, not {columns}"
    for number, (at, values) in enumerate(zip(value.at, value.values, strict=True)):
        last = min(columns, width - number * columns)
        if at.shape != values.shape or values.dtype.kind != "f":
            return "has positions without values, or values that are no floats"
        if len(at) and (
            at[0] < 0
            or at[-1] >= rows * columns
            or (np.diff(at) <= 0).any()
            or (last < columns and (at % columns >= last).any())
        ):
            return "has positions that do not ascend, or outside of the array"
    return ""


def _joined(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Nonzeros):
        return Nonzeros.joined(parts)
    return np.concatenate([np.asarray(part) for part in parts])


def _part(rows: Any, start: int, stop: int) -> Any:
    if isinstance(rows, Nonzeros):
        return rows if (start, stop) == (0, rows.shape[0]) else rows.part(start, stop)
    return rows[start:stop]


def _copied(rows: Any) -> Any:
    if isinstance(rows, Nonzeros):
        at, values = (tuple(one.copy() for one in found) for found in (rows.at, rows.values))
        return Nonzeros(rows.shape, rows.columns, at, values)
    if isinstance(rows, BFloat16):
        return BFloat16(rows.bits.copy())
    return rows.copy()


def nan_nonzeros(shape: tuple[int, int], columns: int, dtype: np.dtype[Any]) -> Nonzeros:
    """Return rows of NaN."""
    rows, width = shape
    at, values = [], []
    for first in range(0, width, columns):
        inside = np.arange(min(columns, width - first))
        at.append((np.arange(rows)[:, None] * columns + inside).ravel())
        values.append(np.full(len(at[-1]), np.nan, dtype))
    return Nonzeros(shape, columns, tuple(at), tuple(values))
