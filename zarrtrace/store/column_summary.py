"""Columns of a table's metadata at a glance: groups and ranges."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel

from zarrtrace.errors import StoreError
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.store.array import open_array
from zarrtrace.store.metadata import Group

# A text or number with more values than this is no group of samples.
_MOST_GROUPS = 12


class ColumnSummary(BaseModel):
    """A column of metadata at a glance.

    Attributes
    ----------
    distinct
        Number of its values.
    missing
        Samples without a value: an empty text, or NaN.
    groups
        Number of samples by value; empty if there are too many values.
    least, greatest
        None unless it holds numbers.
    """

    distinct: int
    missing: int = 0
    groups: dict[str, int] = {}
    least: float | None = None
    greatest: float | None = None


def summarize_columns(table: Group[TableAttributes]) -> dict[str, ColumnSummary]:
    """Summarise tags and columns of metadata; those that cannot be read are left out."""
    found: dict[str, ColumnSummary] = {}
    for name in ("tags", *table.attributes.metadata):
        if name not in table.nodes:
            continue
        try:
            values = open_array(table, name).load()
        except StoreError:
            continue
        found[name] = _of_tags(values) if name == "tags" else _of_column(values)
    return found


def _of_tags(values: np.ndarray) -> ColumnSummary:
    counts: dict[str, int] = {}
    for joined, count in _counted(values):
        for tag in filter(None, joined.split(",")):
            counts[tag] = counts.get(tag, 0) + count
    shown = dict(sorted(counts.items(), key=lambda one: -one[1])[:_MOST_GROUPS])
    return ColumnSummary(distinct=len(counts), missing=int((values == "").sum()), groups=shown)


def _of_column(values: np.ndarray) -> ColumnSummary:
    # NaN alone differs from itself.
    is_missing = values == "" if values.dtype == object else values != values  # noqa: PLR0124
    known = values[~is_missing]
    counts = _counted(known)
    is_number = values.dtype.kind in "iuf" and len(known) > 0
    return ColumnSummary(
        distinct=len(counts),
        missing=int(is_missing.sum()),
        groups=dict(counts) if len(counts) <= _MOST_GROUPS else {},
        least=float(known.min()) if is_number else None,
        greatest=float(known.max()) if is_number else None,
    )


def _counted(values: np.ndarray) -> list[tuple[str, int]]:
    """Return the values as text, each with how often it occurs, the most frequent first."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(str(found[at]), int(counts[at])) for at in order]
