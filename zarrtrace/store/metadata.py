"""``zarr.json`` of groups and arrays: written, sealed, read and checked."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from pydantic import ValidationError

from zarrtrace.errors import (
    FormatVersionError,
    IntegrityError,
    NotATraceError,
    ScenarioError,
)
from zarrtrace.format.attributes import (
    FORMAT_VERSION,
    IndexAttributes,
    RunAttributes,
    TableAttributes,
    TraceAttributes,
)
from zarrtrace.format.layout import LABELS, NO_ID, ArrayLayout
from zarrtrace.scenarios import check_name
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store.chunks import Checksum, Checksums
from zarrtrace.store.codecs import ArrayEncoding, codecs_of
from zarrtrace.suggestions import closest_path

Kind = Literal["run", "trace", "table", "index"]
#: Metadata of arrays by name.
Nodes = dict[str, dict[str, Any]]

#: What to do about a damaged file.
REPAIR = (
    "'zarrtrace verify' names everything damaged; the 'zarrtrace extract' that made the run, with "
    "--repair, computes it again."
)
#: The attribute of an array that holds sizes and checksums of its files.
CHECKSUMS = "checksums"

_NO_SEAL = "0" * 16
_SEAL = re.compile(rb'"seal": "([0-9a-f]{16})"')
_GROUP = {"zarr_format": 3, "node_type": "group"}
# What no trace exceeds; above it, metadata would only make us ask for memory or for files.
_MOST_LABELS, _MOST_FILES, _MOST_BYTES, _MOST_SEALS = 2**24, 2**18, 2**30, 100
# Attributes by which xarray computes other numbers from those that are stored.
_SCALED = {"scale_factor", "add_offset", "_FillValue", "missing_value", "dtype", "_Unsigned",
           "units", "calendar"}  # fmt: skip
# What to do with a group of another kind than was asked for.
_OTHER_KIND = {
    "table": "A table holds samples of many scenarios: open it with zarrtrace.open_table.",
    "run": "A run holds one trace a scenario: open it with zarrtrace.open_run.",
    "trace": "A run holds one trace a scenario: open one with zarrtrace.open_trace.",
}
# What an array may hold where nothing is stored, by its data type.
_FILLS: dict[str, tuple[Any, ...]] = {
    "bool": (False,), "float16": ("NaN",), "float32": ("NaN",), "float64": ("NaN",),
    "string": ("",),
    "int64": (0,), "uint32": (0, NO_ID), "uint64": (0,),
}  # fmt: skip
# Names of arrays become folders.
_ARRAY_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{8}|[0-9a-f]{16}", re.ASCII)
_FILE_KEY = re.compile(r"c(\.(0|[1-9]\d{0,8}))+", re.ASCII)
#: What nonsense in JSON raises when it is parsed and taken for metadata.
NONSENSE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)

_Use = TypeVar("_Use")
_AnyAttributes = IndexAttributes | RunAttributes | TableAttributes | TraceAttributes
_Attributes = TypeVar(
    "_Attributes", IndexAttributes, RunAttributes, TableAttributes, TraceAttributes
)
_MODELS: dict[str, type[_AnyAttributes]] = {
    "run": RunAttributes,
    "trace": TraceAttributes,
    "table": TableAttributes,
    "index": IndexAttributes,
}


@dataclass(frozen=True)
class Group(Generic[_Attributes]):
    """A group as its ``zarr.json`` describes it.

    Attributes
    ----------
    path
        Its folder.
    attributes
        What was checked of its attributes.
    plain
        All of its attributes but the names of coordinates, as xarray shows them.
    labels
        Names of the coordinates that are no index.
    nodes
        Metadata of its arrays; of a run, of everything below it.
    encodings
        How its arrays are cut and encoded; empty for a run.
    """

    path: Location
    attributes: _Attributes
    plain: dict[str, Any]
    labels: frozenset[str]
    nodes: Nodes
    encodings: Mapping[str, ArrayEncoding]

    @cached_property
    def checksums(self) -> dict[str, dict[str, Checksum]]:
        """Sizes and checksums of its arrays' files, by array and key."""
        return {name: checksums_of(self.nodes[name]) for name in self.encodings}


# --- writing -----------------------------------------------------------------------------------


def array_metadata(layout: ArrayLayout, checksums: Checksums | None = None) -> dict[str, Any]:
    """Return the ``zarr.json`` of an array.

    zarr.create_array writes the same, but takes over a millisecond, and a run has thousands; a test
    compares the two.
    """
    fill = layout.fill_value
    attributes: dict[str, Any] = dict(layout.attributes)
    if checksums is not None:
        attributes[CHECKSUMS] = {key: list(one) for key, one in sorted(checksums.items())}
    return {
        "shape": list(layout.shape),
        "data_type": layout.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": list(layout.shards or layout.chunks)},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if isinstance(fill, float) and math.isnan(fill) else fill,
        "codecs": codecs_of(layout),
        "attributes": attributes,
        "dimension_names": list(layout.dims),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def encoded(node: Mapping[str, Any]) -> bytes:
    """Return the content of an array's ``zarr.json``."""
    return json.dumps(node, allow_nan=False).encode()


def sealed_group(attributes: _AnyAttributes, nodes: Nodes | None) -> bytes:
    """Return the content of a group's ``zarr.json``, with consolidated metadata and seal.

    The seal is BLAKE2b (8 bytes) of this very file, with zeros in place of the seal.

    Parameters
    ----------
    nodes
        Metadata of all nodes below; None leaves consolidated metadata out.
    """
    plain = attributes.model_dump(mode="json", exclude={"seal"})
    if isinstance(attributes, TraceAttributes | TableAttributes) and nodes is not None:
        plain["coordinates"] = labels_of(nodes)
    plain["seal"] = _NO_SEAL
    group: dict[str, Any] = {"attributes": plain, **_GROUP}
    if nodes is not None:
        group["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": nodes,
        }
    content = encoded(group)
    # The attributes come first, and the seal is the last of them.
    end = len(b'{"attributes": ') + len(encoded(plain)) - len(b'"}')
    return content[: end - len(_NO_SEAL)] + _hash(content).encode() + content[end:]


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def seal_holds(content: bytes) -> bool:
    """Whether a group's ``zarr.json`` is the one that was written."""
    # Something else may be called so, in the configuration of a run.
    return any(
        _hash(content[: found.start(1)] + _NO_SEAL.encode() + content[found.end(1) :])
        == found.group(1).decode()
        for found in itertools.islice(_SEAL.finditer(content), _MOST_SEALS)
    )


def labels_of(nodes: Nodes) -> str:
    """Name the coordinates that are no index, as xarray reads them in an attribute."""
    names = [name for name in LABELS if name in nodes]
    along_sample = [name for name, node in nodes.items() if node["dimension_names"] == ["sample"]]
    saes = sorted(name for name in nodes if name.startswith("sae_"))
    return " ".join(dict.fromkeys([*names, *sorted(along_sample), *saes]))


def repeated_nodes(trace: Group[TraceAttributes]) -> Nodes:
    """Return what a run repeats of a trace's metadata, by path below the trace."""
    group = {
        "attributes": {**trace.plain, "coordinates": labels_of(trace.nodes)},
        **_GROUP,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {}},
    }
    return {"": group, **trace.nodes}


# --- reading -----------------------------------------------------------------------------------


def read_run(path: Address) -> Group[RunAttributes]:
    """Read the metadata of a run.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "run")


def read_trace(path: Address) -> Group[TraceAttributes]:
    """Read the metadata of a trace.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "trace")


def read_table(path: Address) -> Group[TableAttributes]:
    """Read the metadata of a table.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "table")


def read_scenario(run: Location, name: str) -> Group[TraceAttributes]:
    """Read the metadata of a run's trace, which must be of the scenario that its folder names.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    trace = read_trace(run / name)
    if trace.attributes.scenario != name:
        raise IntegrityError(
            f"{run / name}: holds scenario {trace.attributes.scenario!r}",
            why="Folders of the run were renamed or exchanged.",
            remedy="Rename them back, or let the 'zarrtrace extract' that made the run write them "
            "again, with --repair.",
        )
    return trace


def each_trace(
    run: Location, names: Iterable[str], use: Callable[[Group[TraceAttributes]], _Use]
) -> list[_Use | None]:
    """Return what a function makes of each trace's metadata; None for those not complete.

    Raises
    ------
    FormatVersionError, IntegrityError
    """

    def used(name: str) -> _Use | None:
        try:
            return use(read_scenario(run, name))
        except NotATraceError:
            return None

    return run.each(used, names)


def read_index_group(path: Address) -> Group[IndexAttributes]:
    """Read the metadata of a run's index.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
    """
    return _read(locate(path), "index")


def kind_of(path: Address) -> Literal["run", "trace", "table"]:
    """Tell whether a folder is a run, a trace or a table.

    Raises
    ------
    NotATraceError
        If it is none of them.
    FormatVersionError, IntegrityError
    """
    _, group = _load(locate(path), "run or a trace")
    kind = group["attributes"]["kind"]
    return kind if kind in ("run", "table") else "trace"


def refuse_foreign(path: Location) -> None:
    """Refuse to write where something exists that is not a run, or where nothing can be written.

    Raises
    ------
    ConfigError, NotATraceError, FormatVersionError, IntegrityError
    """
    path.writable_backend()  # raises if it is read only
    is_file = path.is_file()
    if not is_file and not (path.is_folder() and any(True for _ in path.children())):
        return
    if is_file or (path.path is not None and not (path / "zarr.json").is_file()):
        raise NotATraceError(
            f"{path}: exists, but is not a zarrtrace run or trace",
            why="It is a file; a run is a folder." if is_file else "It has no zarr.json.",
            remedy="Choose another path; nothing there was changed.",
        )
    kind_of(path)


def _not_there(path: Location, wanted: str) -> NotATraceError:
    """Say why no ``zarr.json`` is at a path, and where one is that may be meant."""
    if not path.exists():
        near = None if path.path is None else closest_path(path.path)
        return NotATraceError(
            f"{path}: no such folder",
            remedy=f"Did you mean {str(near)!r}?"
            if near is not None
            else f"Give the folder of a {wanted}; check the path.",
        )
    if path.is_file():
        return NotATraceError(
            f"{path}: is a file, not the folder of a {wanted}",
            why="A run is a folder that holds zarr.json and a folder for each scenario.",
            remedy="Give that folder; nothing was changed.",
        )
    runs = [str(one) for one in _runs_below(path)]
    return NotATraceError(
        f"{path}: exists, but is not a zarrtrace run or trace",
        why="It has no zarr.json.",
        remedy=f"Did you mean {runs[0]!r}?"
        if len(runs) == 1
        else f"It holds runs or traces: {', '.join(runs[:5])}."
        if runs
        else "Choose another path; nothing there was changed.",
    )


def _runs_below(path: Location) -> list[Location]:
    """Return the folders in a folder of a disk that hold a ``zarr.json``."""
    if path.path is None:
        return []
    try:
        return [one for one in sorted(path.children(), key=str) if (one / "zarr.json").is_file()]
    except OSError:
        return []


def _read(path: Location, wanted: Kind) -> Group[Any]:
    content, group = _load(path, wanted)
    file, plain = path / "zarr.json", group["attributes"]
    if plain["kind"] != wanted:
        raise NotATraceError(
            f"{path}: is a {plain['kind']}, not a {wanted}",
            remedy=_OTHER_KIND.get(plain["kind"], "Give the folder of the run."),
        )
    if not seal_holds(content):
        raise IntegrityError(
            f"{file}: not the metadata that was written",
            why="The file was damaged, or edited by hand.",
            remedy=REPAIR,
        )
    labels = plain.pop("coordinates", "")
    attributes = parse_attributes(file, plain, wanted)
    try:
        nodes = (group.get("consolidated_metadata") or {"metadata": {}})["metadata"]
        if not isinstance(nodes, dict):
            raise TypeError("consolidated_metadata: not an object of objects")
        encodings = {} if wanted == "run" else check_nodes(nodes, attributes)
        coordinates = frozenset(str.split(labels))
    except NONSENSE as error:
        raise _damaged(file, error) from error
    return Group(path, attributes, plain, coordinates, nodes, encodings)


def _load(path: Location, wanted: str) -> tuple[bytes, dict[str, Any]]:
    """Read a group's ``zarr.json``, if its attributes are those of zarrtrace's format."""
    file = path / "zarr.json"
    try:
        if path.path is not None and (size := file.size()) > _MOST_BYTES:
            raise ValueError(f"no zarr.json has {size} bytes")
        content = file.read()
        group: dict[str, Any] = json.loads(content, parse_constant=_refuse_constant)
        if not isinstance(plain := group["attributes"], dict):
            raise TypeError("its attributes are not an object")
    except (FileNotFoundError, NotADirectoryError):
        raise _not_there(path, wanted) from None
    except (OSError, *NONSENSE) as error:
        raise _damaged(file, error) from error
    if "zarrtrace" in plain:
        raise FormatVersionError(
            f"{path}: format version 1, which this zarrtrace does not read",
            why="It was written before the first release.",
            remedy="Extract it again.",
        )
    is_known = plain.get("kind") in list(_MODELS)
    if "seal" in plain and not is_known:
        raise _damaged(file, f"attribute kind: {plain.get('kind')!r}")
    if not is_known or "format_version" not in plain:
        why = "Its zarr.json lacks the attributes 'kind' and 'format_version'."
        raise _not_ours(path, wanted, why)
    version = plain["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {version}, this zarrtrace reads version {FORMAT_VERSION}",
            why="It was written by a newer zarrtrace.",
            remedy="Install a newer zarrtrace.",
        )
    return content, group


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _not_ours(path: Location, wanted: str, why: str) -> NotATraceError:
    return NotATraceError(
        f"{path}: exists, but is not a zarrtrace {wanted}",
        why=why,
        remedy="Choose another path; nothing there was changed.",
    )


def _damaged(file: Location, error: object) -> IntegrityError:
    return IntegrityError(
        f"{file}: damaged: {error}",
        why="It is not the metadata that zarrtrace wrote.",
        remedy=REPAIR,
    )


def parse_attributes(file: Location, plain: Mapping[str, Any], kind: Kind) -> Any:
    """Check a group's attributes.

    Raises
    ------
    IntegrityError
    """
    try:
        attributes = _MODELS[kind].model_validate(plain)
        # Names become folders: a file from elsewhere must not lead out of the run.
        if isinstance(attributes, RunAttributes):
            for name in attributes.scenarios:
                check_name(name)
        elif isinstance(attributes, TraceAttributes):
            check_name(attributes.scenario)
    except ScenarioError as error:
        raise IntegrityError(
            f"{file}: {error.what}",
            why="zarrtrace writes no such name.",
            remedy="Do not use this file; ask where it comes from.",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(file, f"attribute {where}: {first['msg']}") from None
    return attributes


def check_nodes(
    nodes: Nodes,
    attributes: TraceAttributes | TableAttributes | IndexAttributes,
    *,
    is_whole: bool = True,
) -> dict[str, ArrayEncoding]:
    """Refuse metadata that no group of zarrtrace has, before anything is read by it.

    Returns how the arrays are encoded.

    Parameters
    ----------
    nodes
        Metadata of arrays by name.
    attributes
        Of the group.
    is_whole
        Whether no file may be missing of arrays that are not written layer by layer; of coordinates
        none ever may.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError, OverflowError
    """
    if not nodes:
        raise ValueError("it has no consolidated metadata")
    sizes = {"layer": len(attributes.layers)}
    if isinstance(attributes, TraceAttributes):
        sizes["attention_layer"] = len(attributes.layers_of("attention_layer"))
    encodings = {}
    for name, node in nodes.items():
        try:
            encodings[name] = ArrayEncoding(layout_of(node))
            _check_dims(name, encodings[name], sizes)
            _check_files(checksums_of(node), encodings[name], is_whole=is_whole)
        except NONSENSE as error:
            raise ValueError(f"array {name!r}: {error}") from error
    if isinstance(attributes, TraceAttributes) and not {"layer", "key"} <= nodes.keys():
        raise ValueError("it has no coordinates 'layer' and 'key'")
    if isinstance(attributes, TableAttributes) and not {"layer", "scenario"} <= nodes.keys():
        raise ValueError("it has no coordinates 'layer' and 'scenario'")
    return encodings


def layout_of(node: Mapping[str, Any]) -> ArrayLayout:
    """Return the layout that an array's ``zarr.json`` describes.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError
        If it is not what :func:`array_metadata` writes for that layout: another meaning of bytes
        or numbers, which zarrtrace does not know, would be read wrongly.
    """
    attributes = {name: one for name, one in node["attributes"].items() if name != CHECKSUMS}
    if found := sorted(_SCALED & attributes.keys()):
        raise ValueError(f"attribute {found[0]!r} would change its numbers")
    dims, dtype, fill = node["dimension_names"], node["data_type"], node["fill_value"]
    if not isinstance(dims, list) or not all(map(_ARRAY_NAME.fullmatch, dims)):
        raise TypeError(f"dimensions {dims!r}")
    file_shape, codecs = node["chunk_grid"]["configuration"]["chunk_shape"], node["codecs"]
    chunks, shards = file_shape, None
    if codecs[0]["name"] == "sharding_indexed":
        chunks, shards = codecs[0]["configuration"]["chunk_shape"], file_shape
        codecs = codecs[0]["configuration"]["codecs"]
    try:
        layout = ArrayLayout(
            dims=dims,
            dtype=dtype,
            shape=node["shape"],
            chunks=chunks,
            shards=shards,
            codec="shuffle" if "blosc" in [one["name"] for one in codecs] else "plain",
            fill_value=math.nan if fill == "NaN" else fill,
            attributes=attributes,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]} {first['input']!r}: {first['msg']}") from None
    if fill not in _FILLS.get(layout.dtype, ()):
        raise ValueError(f"fill_value {fill!r} of data_type {dtype!r}")
    expected = {**array_metadata(layout), "attributes": node["attributes"]}
    if node != expected:
        raise ValueError(_difference(node, expected))
    return layout


def _difference(node: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Name the first field that differs."""
    if unknown := sorted(node.keys() - expected.keys()):
        return f"unknown field {unknown[0]!r}"
    field = next(name for name, one in expected.items() if node.get(name) != one)
    return f"{field} is {node.get(field)!r}, not {expected[field]!r}"


def _check_dims(name: str, encoding: ArrayEncoding, sizes: dict[str, int]) -> None:
    """Compare an array's dimensions with its name, and with the `sizes` of those seen so far."""
    dims, shape = encoding.layout.dims, encoding.shape
    if not _ARRAY_NAME.fullmatch(name):
        raise ValueError("zarrtrace writes no such name")
    if not dims or len(shape) != len(dims) or len(set(dims)) < len(dims):
        raise ValueError(f"shape {shape} does not fit dimensions {dims}")
    for dim, size in zip(dims, shape, strict=True):
        if sizes.setdefault(dim, size) != size:
            raise ValueError(f"shape {shape}: others have {sizes[dim]} along {dim}")
    if name in dims and dims != (name,):
        raise ValueError(f"it is the index of a dimension, and has dimensions {dims}")
    if len(shape) == 1 and shape[0] > _MOST_LABELS:
        raise ValueError(f"no array has shape {shape}")


def _check_files(files: Checksums, encoding: ArrayEncoding, *, is_whole: bool) -> None:
    """Compare an array's files with how many there can be along each dimension."""
    shape, file_shape = encoding.shape, encoding.file_shape
    counts = [-(-size // step) for size, step in zip(shape, file_shape, strict=True)]
    if math.prod(counts) > _MOST_FILES:
        raise ValueError(f"no array has shape {shape} in files of {file_shape}")
    for key in files:
        place = list(map(int, key.split(".")[1:]))
        if len(place) != len(counts) or any(at >= n for at, n in zip(place, counts, strict=True)):
            raise ValueError(f"no file {key!r} belongs to it")
    # A layer that is missing reads as NaN, and is seen; a label that is missing would be wrong.
    must_be_whole = len(shape) == 1 or (is_whole and not encoding.is_sharded)
    if must_be_whole and len(files) < math.prod(counts):
        raise ValueError("files are missing")


def checksums_of(node: Mapping[str, Any]) -> dict[str, Checksum]:
    """Return sizes and checksums of an array's files, by key.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError
        If they are missing or damaged.
    """
    return parse_checksums(node["attributes"][CHECKSUMS])


def parse_checksums(files: Mapping[str, Sequence[Any]]) -> dict[str, Checksum]:
    """Return sizes and checksums of files as they stand in JSON, by key.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError
        If they are damaged.
    """
    found = {key: Checksum(*one) for key, one in files.items()}
    for key, one in found.items():
        if not _FILE_KEY.fullmatch(key) or type(one.bytes) is not int or one.bytes < 0:
            raise ValueError(f"no file {key!r} belongs to an array")
        if not _CHECKSUM.fullmatch(one.checksum):
            raise ValueError(f"no checksum of {key!r}: {one.checksum!r}")
    return found
