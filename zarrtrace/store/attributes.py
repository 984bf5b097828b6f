"""What runs and traces say of themselves: reading and checking the attribute ``zarrtrace``."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from zarrtrace.errors import (
    FormatVersionError,
    IncompleteError,
    IntegrityError,
    NotATraceError,
    ScenarioError,
)
from zarrtrace.scenarios import check_name
from zarrtrace.spec import (
    FORMAT_VERSION,
    NAMESPACE,
    IndexAttributes,
    RunAttributes,
    Stored,
    TraceAttributes,
)
from zarrtrace.store.files import fingerprint_of
from zarrtrace.store.objects import Location, ObjectPath, locate

#: The journal's keys that are no layers: what comes next, coordinates, each array's zarr.json.
TOKENS, COORDINATES, METADATA = "tokens", "coordinates", "metadata"

#: What to do about a damaged file.
REPAIR = (
    "'zarrtrace verify' names everything damaged; the 'zarrtrace extract' that made the run, with "
    "--repair, makes it anew."
)

# What no trace exceeds; beyond it, metadata would only make us ask for memory or for files.
_MAX_LABELS, _MAX_FILES = 2**24, 2**18
# What arrays are called: names become folders.
_ARRAY_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)

# By the specification of Zarr v3; where chunks are.
_SLASH = {"separator": "/"}
_KEYS = {"name": "default", "configuration": _SLASH}
_FIELDS = {
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs",
    "fill_value", "attributes", "dimension_names", "storage_transformers",
}  # fmt: skip
# By the CF conventions, xarray computes other numbers from what is stored.
_SCALING = {
    "scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "valid_min",
    "valid_max", "valid_range", "dtype", "calendar",
}  # fmt: skip

_Attributes = TypeVar("_Attributes", IndexAttributes, RunAttributes, TraceAttributes)


class ArrayOnDisk(NamedTuple):
    """What an array's ``zarr.json`` says of it."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str
    #: Shape of what one file holds: a shard, or a chunk if there are no shards.
    file_shape: tuple[int, ...]


class ArrayMetadata(NamedTuple):
    """An array's ``zarr.json``: read once, for it is needed in three ways."""

    array: ArrayOnDisk
    #: All of it.
    metadata: dict[str, Any]
    #: Size and hash of the file.
    stored: Stored


def read_array(path: Location) -> ArrayOnDisk:
    """Read an array's metadata; Zarr itself would take a hundred times as long.

    Raises
    ------
    IntegrityError
        If it is gone or damaged.
    """
    return read_metadata(path).array


def read_metadata(path: Location) -> ArrayMetadata:
    """Read an array's metadata, with all that it says of encoding, and its hash.

    Raises
    ------
    IntegrityError
        If it is gone or damaged.
    """
    read: dict[str, Any] = {}

    def metadata() -> Any:
        read["content"] = _read(path / "zarr.json")
        read["metadata"] = json.loads(read["content"])
        return read["metadata"]

    array = parse_array(path, metadata)
    return ArrayMetadata(array, read["metadata"], fingerprint_of([read["content"]]))


def parse_array(path: Location, metadata: Callable[[], Any]) -> ArrayOnDisk:
    """Take from an array's metadata what it says of the array.

    Raises
    ------
    IntegrityError
        If it is gone or damaged.
    """
    try:
        found: dict[str, Any] = metadata()
        _refuse_other_rules(found)
        array = ArrayOnDisk(
            shape=tuple(map(int, found["shape"])),
            dims=tuple(found["dimension_names"]),
            dtype=str(found["data_type"]),
            file_shape=tuple(map(int, found["chunk_grid"]["configuration"]["chunk_shape"])),
        )
        _check_plausible(array)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise IntegrityError(
            f"{path / 'zarr.json'}: gone or damaged: {error}",
            why="It is not the metadata that zarrtrace wrote.",
            remedy=REPAIR,
        ) from error
    return array


def _refuse_other_rules(found: Mapping[str, Any]) -> None:
    """Refuse metadata by which other readers would find other numbers than ours."""
    separator = found.get("chunk_key_encoding", _KEYS)
    if isinstance(separator, dict):
        separator = {**separator, "configuration": separator.get("configuration") or _SLASH}
    if separator != _KEYS:
        raise ValueError(f"another chunk_key_encoding: {separator}")
    if found.get("storage_transformers"):
        raise ValueError(f"storage_transformers: {found['storage_transformers']}")
    if (found.get("zarr_format"), found.get("node_type")) != (3, "array"):
        raise ValueError("not an array of Zarr v3")
    if found["chunk_grid"].get("name") != "regular":
        raise ValueError(f"another chunk_grid: {found['chunk_grid'].get('name')}")
    # The specification: an unknown field is to be understood unless it says that it need not be.
    for name, value in found.items():
        optional = isinstance(value, dict) and value.get("must_understand") is False
        if name not in _FIELDS and not optional:
            raise ValueError(f"unknown field {name!r}")
    attributes = found.get("attributes") or {}
    scaled = sorted(_SCALING & set(attributes))
    if scaled or "since" in str(attributes.get("units", "")):
        raise ValueError(f"attribute {scaled[0] if scaled else 'units'!r} asks for other numbers")


def _read(file: Location) -> bytes:
    """Read a file; a pipe in its place would be waited for forever."""
    if not isinstance(file, ObjectPath) and not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("not a file")
    return file.read_bytes()


def _check_plausible(array: ArrayOnDisk) -> None:
    """Refuse sizes that no trace has, before anything is counted, read or asked memory for."""
    shape, steps = array.shape, array.file_shape
    if len(shape) != len(array.dims) or len(set(array.dims)) < len(array.dims):
        raise ValueError(f"dimensions {array.dims} do not fit shape {shape}")
    if not all(isinstance(dim, str) for dim in array.dims):
        raise ValueError("dimension_names are not text")
    if not shape or min(shape) < 0:
        raise ValueError(f"no array has shape {shape}")
    if len(steps) != len(shape) or min(steps) < 1:
        raise ValueError(f"chunk_shape {steps} does not fit shape {shape}")
    files = math.prod(-(-size // step) for size, step in zip(shape, steps, strict=True))
    if files > _MAX_FILES or (len(shape) == 1 and shape[0] > _MAX_LABELS):
        raise ValueError(f"no array of a trace has shape {shape} in chunks of {steps}")


def files_of(
    name: str, shape: Sequence[int], file_shape: Sequence[int], at: int | None
) -> list[str]:
    """Return the keys of the files that hold an array, or its layer `at`, in order."""
    grid = [range(-(-size // step)) for size, step in zip(shape, file_shape, strict=True)]
    if at is not None:
        grid[0] = range(at, at + 1)
    return [f"{name}/c/{'/'.join(map(str, place))}" for place in itertools.product(*grid)]


def files_of_entry(
    attributes: TraceAttributes,
    key: str,
    name: str,
    dims: Sequence[str],
    shape: Sequence[int],
    file_shape: Sequence[int],
) -> list[str]:
    """Return the files that the journal's entry `key` of an array speaks of, in order."""
    if key == METADATA:
        return [f"{name}/zarr.json"]
    at = attributes.index_of(int(key), dims[0]) if key.isdigit() else None
    return files_of(name, shape, file_shape, at)


def read_run_attributes(path: str | Location) -> RunAttributes:
    """Read what a run says of itself.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _parse(RunAttributes, locate(path), "run")


def read_trace_attributes(path: str | Location) -> TraceAttributes:
    """Read what a trace says of itself.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _parse(TraceAttributes, locate(path), "trace")


def trace_attributes_of(path: Location, group: Mapping[str, Any]) -> TraceAttributes:
    """Take what a trace says of itself from its group's metadata, which has been read.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _parse(TraceAttributes, path, "trace", group)


def read_index_attributes(path: str | Location) -> IndexAttributes:
    """Read what a run's index says of itself.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _parse(IndexAttributes, locate(path), "index")


def refuse_foreign(path: Location) -> None:
    """Refuse to write where something is that is no run; what a killed writer left is none.

    Raises
    ------
    NotATraceError
    """
    if path.is_file() or (
        path.is_dir() and any(not file.name.endswith(".partial") for file in path.iterdir())
    ):
        kind_of(path)


def kind_of(path: str | Location) -> Literal["run", "trace"]:
    """Tell whether a folder is a run or a trace.

    Raises
    ------
    NotATraceError
        If it is neither.
    """
    kind = _namespace(locate(path), "run or a trace").get("kind")
    return "run" if kind == "run" else "trace"


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes with their hash, for what they say has no checksum otherwise."""
    return {**attributes, "blake2b": _seal(attributes)}


def seal_broken(attributes: Mapping[str, Any]) -> bool:
    """Tell whether attributes are not the ones that were sealed; what has no seal is trusted."""
    return attributes.get("blake2b") not in (None, _seal(attributes))


def _seal(attributes: Mapping[str, Any]) -> str:
    content = {key: value for key, value in attributes.items() if key != "blake2b"}
    return hash_of(canonical(content).encode())


def canonical(value: Any) -> str:
    """Write JSON as it is hashed: with sorted keys, no spaces and ASCII alone."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def hash_of(content: bytes) -> str:
    """Return the hash that seals attributes."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def read_group(path: Location, wanted: str = "run or a trace") -> dict[str, Any]:
    """Read a group's metadata.

    Raises
    ------
    NotATraceError
        If there is none.
    IntegrityError
        If it is damaged.
    """
    return _group(path, wanted, json.loads)


def _group(path: Location, wanted: str, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        found = parse(_read(path / "zarr.json"))
        found["attributes"].get(NAMESPACE)
        if not isinstance(found["attributes"].get("coordinates", ""), str):
            raise TypeError("attribute coordinates is not text")
    except (FileNotFoundError, NotADirectoryError):
        if not path.exists():
            raise NotATraceError(
                f"{path}: no such folder", remedy=f"Give the folder of a {wanted}; check the path."
            ) from None
        raise NotATraceError(
            f"{path}: exists, but is not a zarrtrace run or trace",
            why="It has no zarr.json.",
            remedy="Choose another path; nothing there was changed.",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path}/zarr.json: damaged: {error}",
            why="It is not the metadata that zarrtrace wrote.",
            remedy=REPAIR,
        ) from error
    return dict(found)


class _Said(BaseModel):
    """Of a group's metadata, what it says of itself."""

    attributes: dict[str, Any]


def _said(content: bytes) -> Any:
    """Parse a group's metadata, but not what it has consolidated: of a run, nearly all of it."""
    try:
        return {"attributes": _Said.model_validate_json(content).attributes}
    except ValidationError:
        return json.loads(content)  # which says what is wrong in fewer words


def names_below(path: Location) -> list[str]:
    """Return the names of the groups or arrays in a group, sorted.

    In an object store they are those of which its attributes speak: it may not be able to list.
    """
    if not isinstance(path, ObjectPath):
        return sorted(file.parent.name for file in path.glob("*/zarr.json"))
    found = read_group(path)["attributes"].get(NAMESPACE, {})
    if found.get("kind") == "run":
        return sorted(found["scenarios"])
    return sorted(found["stored"].get(METADATA, {}))


def _namespace(
    path: Location, wanted: str, group: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    found = (group or _group(path, wanted, _said))["attributes"].get(NAMESPACE)
    if not isinstance(found, dict):
        raise NotATraceError(
            f"{path}: exists, but is not a zarrtrace {wanted}",
            why="Its zarr.json lacks the attribute 'zarrtrace'.",
            remedy="Choose another path; nothing there was changed.",
        )
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {version}, this zarrtrace reads up to {FORMAT_VERSION}",
            why="It was written by a newer zarrtrace.",
            remedy="pip install --upgrade zarrtrace",
        )
    return found


def _parse(
    model: type[_Attributes], path: Location, wanted: str, group: Mapping[str, Any] | None = None
) -> _Attributes:
    found = _namespace(path, wanted, group)
    if found.get("kind") != wanted:
        raise NotATraceError(
            f"{path}: is a {found.get('kind')}, not a {wanted}",
            remedy="A run holds one trace a scenario; give the other folder.",
        )
    try:
        attributes = model.model_validate(found)
        # They become folders: a file from elsewhere must not lead out of the run.
        if isinstance(attributes, RunAttributes):
            for name in attributes.scenarios:
                check_name(name)
        elif isinstance(attributes, TraceAttributes):
            check_name(attributes.scenario)
            _check_journal(path, attributes, [TOKENS, COORDINATES, METADATA])
        else:
            _check_journal(path, attributes, [COORDINATES, METADATA])
    except ScenarioError as error:
        raise IntegrityError(
            f"{path}/zarr.json: {error.what}",
            why="zarrtrace writes no such name.",
            remedy="Do not use this file; ask where it comes from.",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{path}/zarr.json: attribute {NAMESPACE}.{where}: {first['msg']}",
            why="The attributes are not what zarrtrace writes.",
            remedy=REPAIR,
        ) from None
    return attributes


def _check_journal(
    path: Location, attributes: TraceAttributes | IndexAttributes, others: Sequence[str]
) -> None:
    """Refuse entries of layers that are none of the trace's, and names that are no array's."""
    known = {*others, *map(str, attributes.layers)}
    odd = [key for key in attributes.stored if key not in known]
    odd += [
        name
        for entry in attributes.stored.values()
        for name in entry
        if not _ARRAY_NAME.fullmatch(name)
    ]
    if odd:
        raise IntegrityError(
            f"{path}/zarr.json: attribute {NAMESPACE}.stored: unknown {odd[0]!r}",
            why="The journal names layers and arrays of its trace, and nothing else.",
            remedy="Do not use this file; ask where it comes from.",
        )


def incomplete(path: Location, attributes: TraceAttributes) -> IncompleteError:
    """Return the error that names what a trace lacks."""
    layers = ", ".join(map(str, attributes.missing_layers)) or "none"
    return IncompleteError(
        f"{path}: not complete: {len(attributes.missing_layers)} of {len(attributes.layers)} "
        f"layers missing ({layers})",
        why="The extraction was interrupted, or is still going on.",
        remedy="Run the same 'zarrtrace extract' again to go on, or open it with missing='nan'.",
    )
