"""The columns beside hidden states: scenarios, positions, metadata, and which rows are valid."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zarrtrace.errors import NPZError, ScenarioError
from zarrtrace.format.layout import NO_ID
from zarrtrace.imports.hidden_files import HIDDEN, npy_header
from zarrtrace.npz.files import reading
from zarrtrace.scenarios import DECISION, check_metadata_name, check_name, read_columns
from zarrtrace.scenarios.names import default_name

_VALID = "valid_mask"
_TEXTS = ("token", "span", "tags")
_OPTION = "option_"


@dataclass(frozen=True)
class Columns:
    """Columns of scenarios, positions and metadata, one row a sample.

    Attributes
    ----------
    coordinates
        Values along `sample` by name: ``scenario``, ``position``, others if they are known, and
        metadata.
    valid
        False for samples that were not computed.
    metadata
        Names of metadata.
    left_out
        Names of arrays that are not one value a sample.
    """

    coordinates: dict[str, np.ndarray]
    valid: np.ndarray
    metadata: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the scenarios' options."""
        names = (name for name in self.coordinates if name not in self.metadata)
        return tuple(name.removeprefix(_OPTION) for name in names if name.startswith(_OPTION))


def archive_columns(file: Path, samples: int) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read the arrays of an NPZ file that are no hidden states.

    Returns
    -------
    columns, left_out
        Arrays of one value a sample, and ``layers``, by key; and keys of all others.
    """
    columns, left_out = {}, []
    with reading(file), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")
            if key == HIDDEN:
                continue
            with archive.open(info) as stream:
                shape, _ = npy_header(file, key, stream)
            if len(shape) != 1 or (key != "layers" and shape != (samples,)):
                left_out.append(key)
                continue
            with archive.open(info) as stream:
                columns[key] = np.lib.format.read_array(stream, allow_pickle=False)
    return columns, tuple(left_out)


def file_columns(file: Path, samples: int) -> dict[str, np.ndarray]:
    """Read a CSV or Parquet file with one row a sample."""
    found = {
        name: np.array(values, object if isinstance(values[0], str) else None)
        for name, values in read_columns(file).items()
        if values
    }
    for name, values in found.items():
        if values.shape != (samples,):
            raise NPZError(
                f"{file}: column {name!r} has {len(values)} rows, the hidden states {samples}",
                remedy="Give one row a sample, in the order of the hidden states.",
            )
    return found


def settle_columns(where: Path, given: Mapping[str, np.ndarray], samples: int) -> Columns:
    """Check columns, and give them the types and names of a table.

    Raises
    ------
    NPZError
        If a column has no type or name that a table has, or scenarios are mixed up.
    """
    coordinates: dict[str, np.ndarray] = {}
    metadata = []
    for name, values in given.items():
        if name == _VALID:
            continue
        coordinates[name] = _typed(where, name, values)
        is_known = name in ("scenario", "position", "token_id", *_TEXTS)
        if is_known or (name.startswith(_OPTION) and coordinates[name].dtype == np.int64):
            continue
        try:
            metadata.append(check_metadata_name(name))
        except ValueError as error:
            raise _wrong(where, name, f"cannot be metadata: {error}") from None
    valid = np.asarray(given.get(_VALID, np.ones(samples, bool)))
    if valid.dtype != bool:
        raise _wrong(where, _VALID, f"is {valid.dtype}, not bool")
    if "scenario" not in coordinates:
        coordinates["scenario"] = np.array([default_name(n) for n in range(samples)], object)
    # Last tokens of prompts whose length is not known.
    coordinates.setdefault("position", np.full(samples, -1))
    coordinates.setdefault("token_id", np.full(samples, NO_ID, np.uint32))
    is_one_each = len({*coordinates["scenario"].tolist()}) == samples
    coordinates.setdefault("span", np.full(samples, DECISION if is_one_each else "", object))
    for name in _TEXTS:
        coordinates.setdefault(name, np.full(samples, "", object))
    columns = Columns(coordinates, valid, tuple(metadata))
    _check_scenarios(where, columns)
    return columns


def _typed(where: Path, name: str, values: np.ndarray) -> np.ndarray:
    kind = values.dtype.kind
    if kind in "UO":
        typed = np.array([str(one) for one in values], object)
    elif kind == "b":
        typed = values
    elif kind in "iu":
        if kind == "u" and len(values) and values.max() > 2**63 - 1:
            raise _wrong(where, name, "has whole numbers of more than 63 bits")
        typed = values.astype(np.int64)
    elif kind == "f":
        typed = values.astype(np.float64)
        if np.isinf(typed).any():
            raise _wrong(where, name, "has infinite numbers")
    else:
        raise _wrong(where, name, f"is of type {values.dtype}; write numbers, texts or booleans")
    wanted = {"position": "int64", "token_id": "int64", "scenario": "object"}
    wanted |= dict.fromkeys(_TEXTS, "object")
    if typed.dtype.name != wanted.get(name, typed.dtype.name):
        raise _wrong(where, name, f"is {values.dtype}, not {wanted[name]}")
    return _token_ids(where, typed) if name == "token_id" else typed


def _token_ids(where: Path, ids: np.ndarray) -> np.ndarray:
    """Refuse numbers that a token's id cannot be: a cast would make other ids of them."""
    if (wrong := np.flatnonzero((ids < 0) | (ids > NO_ID))).size:
        row = int(wrong[0])
        raise NPZError(
            f"{where}: row {row}: column 'token_id' has {ids[row]}, which is no token's id",
            why=f"Ids are whole numbers from 0; training code often marks tokens with -100 that "
            f"it ignores. {NO_ID} stands for a token that is not known.",
            remedy=f"Write the tokens' ids, or {NO_ID} where there is none, or leave out the "
            "column.",
        )
    return ids.astype(np.uint32)


def _check_scenarios(where: Path, columns: Columns) -> None:
    """Refuse scenarios whose samples are apart, twice at one position, or valid only in part."""
    seen: dict[str, bool] = {}
    before: str | None = None
    positions: set[int] = set()
    names, places = columns.coordinates["scenario"], columns.coordinates["position"].tolist()
    for row, (name, place, valid) in enumerate(
        zip(names, places, columns.valid.tolist(), strict=True)
    ):
        problem = ""
        if name != before:
            problem = "stands in rows that are apart" if name in seen else ""
            positions = set()
        elif place in positions:
            problem = f"has position {place} twice"
        elif valid != seen[name]:
            problem = "has valid and other rows"
        if problem:
            raise NPZError(
                f"{where}: row {row}: scenario {name!r} {problem}",
                remedy="Give a scenario's rows one after the other, each with its own position.",
            )
        if name != before:
            try:
                check_name(name)
            except ScenarioError as error:
                raise NPZError(f"{where}: row {row}: {error.what}", remedy=error.remedy) from None
        before, seen[name] = name, valid
        positions.add(place)


def _wrong(where: Path, name: str, problem: str) -> NPZError:
    return NPZError(
        f"{where}: column {name!r} {problem}", remedy="Rename, convert or leave out the column."
    )
