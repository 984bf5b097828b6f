"""Parquet files and folders of data sets as scenarios, read batch by batch."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.entries import ScenarioEntry
from zarrtrace.scenarios.tables import BATCH, Row, numbered, table_entries

if TYPE_CHECKING:
    import pyarrow as pa

# As pandas stores an index without a name.
_INDEX = re.compile(r"__index_level_\d+__")
# Files of one split on the hub, as train-00000-of-00012.parquet.
_SHARD = re.compile(r"(?P<split>.+?)-\d{3,}-of-\d{3,}.*")
# Parts of a column; by default all columns of a row group are read at once, often the whole file.
_BY_PARTS: dict[str, Any] = {"buffer_size": 2**16, "pre_buffer": False}
# Not any number of folders deep: somebody's prompt may be the name of a folder.
_PARQUET = ("*.parquet", "[!.]*/*.parquet", "[!.]*/[!.]*/*.parquet")
_LFS_POINTER = b"version https://git-lfs"


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder holds a data set that ``datasets`` saved, or Parquet files."""
    patterns = ("state.json", "dataset_dict.json", *_PARQUET)
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def folder_files(folder: Path) -> list[Path]:
    """Return the files of a data set's folder, in order.

    Raises
    ------
    ScenarioError
        If it is no data set, or several.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.parent.name for one in folder.glob("*/state.json"))
        raise _several(folder, splits, f"Give the folder of one, as {folder / (*splits, '')[0]}.")
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    files = _parquet_files(folder)
    if not files:
        raise ScenarioError(
            f"{folder}: holds no data set",
            why="It has neither Parquet files nor the state.json of Dataset.save_to_disk.",
            remedy="Give a YAML, JSONL, CSV or Parquet file, or such a folder.",
        )
    splits = sorted({str(_split(file).relative_to(folder)) for file in files})
    if len(splits) > 1:
        remedy = "Give one file, or put the files of one split into a folder of their own."
        raise _several(folder, splits, remedy)
    return files


def arrow_entries(where: Path, files: Sequence[Path]) -> Iterator[tuple[ScenarioEntry, str]]:
    """Yield the entries of Parquet or Arrow files with equal columns, each with file and row.

    Parameters
    ----------
    where
        The file or folder, for messages.
    files
        Files that end in ``.parquet`` or ``.arrow``.
    """
    header: list[str] = []

    def rows() -> Iterator[tuple[str, Row]]:
        for file in files:
            names, batches = _opened(file)
            if names != header:
                odd = sorted({*names} ^ {*header}) or ["their order"]
                raise ScenarioError(
                    f"{file}: has other columns than {files[0].name}: {', '.join(odd[:5])}",
                    remedy="Give all files of a data set the same columns in one order.",
                )
            yield from numbered(str(file), _rows(batches))

    header += _opened(files[0])[0]
    return table_entries(str(where), header, rows())


def arrow_columns(file: Path) -> dict[str, list[Any]]:
    """Read the columns of a Parquet file that need not hold prompts, but those of lists."""
    import pyarrow as pa  # noqa: PLC0415

    names, batches = _opened(file)
    if len({*names}) < len(names):
        raise ScenarioError(f"{file}: two columns have one name", remedy="Rename one.")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for batch in batches:
        for name, column in zip(names, batch.columns, strict=True):
            if pa.types.is_nested(column.type):
                columns.pop(name, None)
            else:
                columns[name] += column.to_pylist()
    return columns


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            part = batch.slice(start, BATCH)
            yield from zip(*(column.to_pylist() for column in part.columns), strict=True)


def _opened(file: Path) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """Return the names of a file's columns, and its rows in batches."""
    with _translated(file):
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq  # noqa: PLC0415 -- rarely needed

            with pq.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
        else:
            import pyarrow as pa  # noqa: PLC0415

            with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as stream:
                names = stream.schema.names
    kept = [name for name in names if not _INDEX.fullmatch(name)]
    return kept, _batches(file, [names.index(name) for name in kept])


def _batches(file: Path, columns: list[int]) -> Iterator[pa.RecordBatch]:
    with _translated(file):
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq  # noqa: PLC0415

            with pq.ParquetFile(file, **_BY_PARTS) as parquet:
                for batch in parquet.iter_batches(batch_size=BATCH, use_threads=False):
                    yield batch.select(columns)
        else:
            import pyarrow as pa  # noqa: PLC0415

            # Not mapped into memory: pages that were read would count as the process's.
            with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    yield batch.select(columns)


@contextlib.contextmanager
def _translated(file: Path) -> Iterator[None]:
    """Raise Arrow's errors as ours."""
    import pyarrow as pa  # noqa: PLC0415 -- rarely needed

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        remedy = "Write it again."
        with file.open("rb") as source:
            if source.read(len(_LFS_POINTER)) == _LFS_POINTER:
                remedy = "It is a pointer of git LFS: run git lfs pull in its folder."
        kind = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
        raise ScenarioError(f"{file}: not a usable {kind} file: {error}", remedy=remedy) from None


def _saved_files(folder: Path) -> list[Path]:
    """Return the files that ``Dataset.save_to_disk`` names in state.json."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [one["filename"] for one in state["_data_files"]]
        if not names or not all(name and Path(name).name == name for name in names):
            raise ValueError("it names no files of its folder")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ScenarioError(
            f"{folder / 'state.json'}: not one of Dataset.save_to_disk: {error}",
            remedy="Save the data set again.",
        ) from None
    return [folder / name for name in names]


def _parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder, in the order of the numbers in their names."""
    files = [file for pattern in _PARQUET for file in folder.glob(pattern)]
    return sorted(files, key=lambda file: [_ordered(part) for part in file.parts])


def _ordered(name: str) -> list[tuple[int, str]]:
    """Order ``part.2`` before ``part.10``."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _split(file: Path) -> Path:
    """Name what a Parquet file belongs to: its folder, and its split if its name says one."""
    shard = _SHARD.fullmatch(file.stem)
    return file.with_name(shard["split"]) if shard else file.parent


def _several(folder: Path, splits: Sequence[str], remedy: str) -> ScenarioError:
    return ScenarioError(
        f"{folder}: holds several data sets: {', '.join(splits[:10])}",
        why="Scenarios are taken from one split.",
        remedy=remedy,
    )
