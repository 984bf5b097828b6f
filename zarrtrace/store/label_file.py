"""The file of a run or a table that labels its features: Parquet, which other tools read as well.

Each of its pages has a checksum, which every read compares. The footer's own metadata holds a
digest of all rows, for :func:`check_labels`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from zarrtrace.errors import IntegrityError
from zarrtrace.format.layout import LABELLED
from zarrtrace.storage import Location, disk

#: Its columns; rows are sorted by the first three.
LABEL_COLUMNS = ("array", "layer", "feature", "label")
_DIGEST = b"zarrtrace.digest"


def read_label_file(
    run: Location, *, array: str | None = None, layers: Collection[int] | None = None
) -> pd.DataFrame:
    """Read the labels of a run or a table.

    Parameters
    ----------
    run
        Its folder, or its address.
    array, layers
        Only of this array of features, and of these layers; all if None.

    Returns
    -------
    pd.DataFrame
        With :data:`LABEL_COLUMNS`; without rows if it has none.

    Raises
    ------
    IntegrityError
        If the file is damaged.
    """
    chosen: list[tuple[str, str, Any]] = [] if array is None else [("array", "=", array)]
    if layers is not None:
        chosen.append(("layer", "in", set(layers)))
    table = _read(run, chosen)
    found: pd.DataFrame = (_schema().empty_table() if table is None else table).to_pandas()
    return found


def labelled_layers(run: Location) -> dict[str, list[int]]:
    """Return the layers that have labels, by array of features."""
    table = _read(run, [], LABEL_COLUMNS[:2])
    if table is None:
        return {}
    found: dict[str, list[int]] = {}
    for row in table.group_by(["array", "layer"]).aggregate([]).to_pylist():
        found.setdefault(row["array"], []).append(row["layer"])
    return {array: sorted(layers) for array, layers in sorted(found.items())}


def check_labels(run: Location) -> None:
    """Refuse a file of labels that is not as it was written.

    Raises
    ------
    IntegrityError
    """
    table = _read(run, [])
    if table is not None and (table.schema.metadata or {}).get(_DIGEST) != _digest(table):
        raise _damaged(run, "its rows are not the ones that were written")


def write_label_file(run: Location, frame: pd.DataFrame) -> None:
    """Replace the labels of a run or a table.

    Parameters
    ----------
    run
        Its folder, or its address; locked by the caller.
    frame
        With :data:`LABEL_COLUMNS`, no feature twice.
    """
    file = run / LABELLED
    frame = frame.sort_values([*LABEL_COLUMNS[:3]], kind="stable")
    table = pa.Table.from_pandas(frame, _schema(), preserve_index=False)
    table = table.replace_schema_metadata({_DIGEST: _digest(table)})
    out = pa.BufferOutputStream()
    options = {"compression": "zstd", "write_page_checksum": True}
    with disk.explained(run), pq.ParquetWriter(out, table.schema, **options) as writer:
        # A group of rows each layer: those of one are read alone.
        for _, part in frame.groupby(["array", "layer"], sort=False):
            rows = pa.Table.from_pandas(part, table.schema, preserve_index=False)
            writer.write_table(rows)
    with disk.explained(run):
        file.write(out.getvalue().to_pybytes())


def _schema() -> pa.Schema:
    types = (pa.string(), pa.int64(), pa.int64(), pa.string())
    return pa.schema(list(zip(LABEL_COLUMNS, types, strict=True)))


def _read(
    run: Location, chosen: list[tuple[str, str, Any]], columns: Sequence[str] = LABEL_COLUMNS
) -> pa.Table | None:
    file = run / LABELLED
    try:
        content = file.inside(run).read()
    except FileNotFoundError:
        return None
    try:
        table = pq.read_table(
            pa.BufferReader(content),
            columns=[*columns],
            filters=chosen or None,
            page_checksum_verification=True,
        )
    except (pa.ArrowException, OSError) as error:
        raise _damaged(run, "is damaged, or no Parquet file") from error
    if not table.schema.equals(pa.schema([_schema().field(name) for name in columns])):
        raise _damaged(run, f"has other columns than {', '.join(LABEL_COLUMNS)}")
    return table


def _digest(table: pa.Table) -> bytes:
    rows = json.dumps(table.select(LABEL_COLUMNS).to_pydict(), separators=(",", ":"))
    return hashlib.blake2b(rows.encode(), digest_size=16).hexdigest().encode()


def _damaged(run: Location, how: str) -> IntegrityError:
    return IntegrityError(
        f"{run / LABELLED}: {how}",
        why="The file was changed after zarrtrace wrote it, or the disk is failing.",
        remedy=f"Remove it, and label the features again: 'zarrtrace labels {run} FILE'.",
    )
