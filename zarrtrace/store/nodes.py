"""Metadata of Zarr groups and arrays: creating, changing, consolidating."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.spec import (
    ATTENTION_BLOCK,
    ATTENTION_LEVEL,
    FEATURES_LEVEL,
    FEATURES_LEVEL_BY_TOKEN,
    FEATURES_ORDER,
    INDEX,
    LABELS,
    NAMESPACE,
    ArrayLayout,
)
from zarrtrace.store.attributes import canonical, hash_of, names_below, sealed
from zarrtrace.store.files import change_whole, no_collecting, write_whole
from zarrtrace.store.objects import Location, ObjectPath, at_once
from zarrtrace.store.regular import read_regular

#: Makes attributes of those that are there.
Update = Callable[[dict[str, Any]], dict[str, Any]]

_GROUP = {"zarr_format": 3, "node_type": "group"}
_CRC = {"name": "crc32c"}

# Of the text of a trace's zarr.json before it is consolidated.
_BEFORE, _BEHIND = f'"{NAMESPACE}":'.encode(), b'},"node_type":"group","zarr_format":3}'
_JOURNAL = b',"stored":'
_SEAL_LENGTH = len('"blake2b":"0123456789abcdef",')


def create_trace(path: Path, attributes: dict[str, Any], layout: dict[str, ArrayLayout]) -> None:
    """Create the group of a trace and its arrays, all empty."""
    own = {NAMESPACE: sealed(attributes), "coordinates": labels_of(layout)}
    create_arrays(path, own, layout)


def create_arrays(
    path: Location, attributes: dict[str, Any], layout: Mapping[str, ArrayLayout]
) -> None:
    """Create a group with its attributes and arrays, all empty."""
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / "zarr.json", _encoded({**_GROUP, "attributes": attributes}))
    for name, array in layout.items():
        (path / name).mkdir(exist_ok=True)
        write_whole(path / name / "zarr.json", encoded_array(array))


def labels_of(arrays: Iterable[str]) -> str:
    """Name the coordinates that are no index, as xarray's convention for Zarr wants it."""
    there = set(arrays)
    return " ".join(name for name in LABELS if name in there)


def encoded_array(layout: ArrayLayout) -> bytes:
    """Return the content of an array's ``zarr.json``."""
    return _encoded(array_metadata(layout))


def array_metadata(layout: ArrayLayout) -> dict[str, Any]:
    """Return the ``zarr.json`` of an array as `layout` says.

    What zarr.create_array writes, but that takes over a millisecond, and a run has thousands; a
    test compares the two.
    """
    inner = _codecs(layout)
    codecs = inner if layout.shards is None else [_sharding(layout.chunks, inner)]
    fill = layout.fill_value
    return {
        "shape": list(layout.shape),
        "data_type": layout.dtype,
        "chunk_grid": _named("regular", chunk_shape=list(layout.shards or layout.chunks)),
        "chunk_key_encoding": _named("default", separator="/"),
        "fill_value": "NaN" if isinstance(fill, float) and math.isnan(fill) else fill,
        "codecs": codecs,
        "attributes": dict(layout.attributes),
        "dimension_names": list(layout.dims),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _named(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": name, "configuration": configuration} if configuration else {"name": name}


def _codecs(layout: ArrayLayout) -> list[dict[str, Any]]:
    # Every chunk carries a checksum: a flipped bit must raise, never read as another number.
    if layout.dtype == "string":
        serializer = _named("vlen-utf8")
    elif layout.dtype == "bool":
        serializer = _named("bytes")
    else:
        serializer = _named("bytes", endian="little")
    if layout.codec == "attention":
        size = np.dtype(layout.dtype).itemsize
        options = {"cname": "zstd", "clevel": ATTENTION_LEVEL, "shuffle": "shuffle"}
        blosc = _named("blosc", typesize=size, **options, blocksize=ATTENTION_BLOCK)
        return [serializer, blosc, _CRC]
    if layout.codec == "sparse":
        turn = _named("transpose", order=list(FEATURES_ORDER))
        return [turn, serializer, _named("zstd", level=FEATURES_LEVEL, checksum=False), _CRC]
    if layout.codec == "sparse_by_token":
        return [serializer, _named("zstd", level=FEATURES_LEVEL_BY_TOKEN, checksum=False), _CRC]
    return [serializer, _named("zstd", level=1, checksum=True)]


def _sharding(chunks: Sequence[int], inner: list[dict[str, Any]]) -> dict[str, Any]:
    index = [_named("bytes", endian="little"), _CRC]
    return _named(
        "sharding_indexed",
        chunk_shape=list(chunks),
        codecs=inner,
        index_codecs=index,
        index_location="end",
    )


def write_attributes(path: Location, attributes: dict[str, Any]) -> None:
    """Replace what a group says of itself, at once; its consolidated metadata goes."""
    update_attributes(path, lambda _: attributes)


def update_attributes(path: Location, update: Update) -> None:
    """Change what a group says of itself, at once; its consolidated metadata goes."""
    change_whole(path / "zarr.json", lambda content: _updated(content, update))


def _updated(content: bytes, update: Update) -> bytes:
    group = json.loads(content)
    group.pop("consolidated_metadata", None)
    own = sealed(update(group["attributes"].get(NAMESPACE, {})))
    # On one line and sorted until it is consolidated: see _spliced.
    return canonical({**group, "attributes": {**group["attributes"], NAMESPACE: own}}).encode()


def replace_journal(path: Location, journal: str) -> None:
    """Change a trace's journal, and nothing else, at once; its consolidated metadata goes.

    Parameters
    ----------
    path
        The trace.
    journal
        Its attribute ``stored`` as :func:`canonical` writes it.
    """

    def changed(content: bytes) -> bytes:
        return _spliced(content, journal) or _updated(
            content, lambda attributes: {**attributes, "stored": json.loads(journal)}
        )

    change_whole(path / "zarr.json", changed)


def _spliced(content: bytes, journal: str) -> bytes | None:
    """Put another journal into the text that :func:`_updated` makes; None if it is another's.

    Reading and writing it all as JSON takes ten times as long, once a layer.
    """
    start, end = content.find(_BEFORE), len(content) - len(_BEHIND)
    own = content[start + len(_BEFORE) : end]
    # Keys are sorted: before the seal no value is an object, and behind the journal none is one
    # that could have a key of this name.
    seal, first = own.find(b'"blake2b":'), own.rfind(_JOURNAL) + len(_JOURNAL)
    last = own.find(b',"tags":[', first)
    if start < 0 or content[end:] != _BEHIND or min(seal, first - len(_JOURNAL), last) < 0:
        return None
    without = own[:seal] + own[seal + _SEAL_LENGTH : first] + journal.encode() + own[last:]
    stamp = f'"blake2b":"{hash_of(without)}",'.encode()
    new = (content[: start + len(_BEFORE)], without[:seal], stamp, without[seal:], _BEHIND)
    return b"".join(new)


def consolidate(path: Location, attributes: dict[str, Any]) -> None:
    """Say the last of a group, and copy the metadata of all nodes below it into its own.

    That is an extra that readers may ignore. It is what zarr.consolidate_metadata writes, but that
    warns, and warnings cannot be silenced in one thread alone.
    """
    with no_collecting():
        found = consolidated(path, trusting=True)

    def said(content: bytes) -> bytes:
        group = json.loads(content)
        own = {**group["attributes"], NAMESPACE: sealed(attributes)}
        return _encoded({**group, "attributes": own, "consolidated_metadata": found})

    change_whole(path / "zarr.json", said)


def consolidated(path: Location, *, trusting: bool = False) -> dict[str, Any]:
    """Return the metadata of all nodes below a group as its consolidated metadata holds it.

    Parameters
    ----------
    path
        The group.
    trusting
        Take what groups below it have consolidated.
    """
    return _inline(_nodes_below(path, trusting=trusting))


def _inline(nodes: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": nodes}


def _alone(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node's metadata without that of the nodes below it."""
    if node["node_type"] == "group":
        node["consolidated_metadata"] = _inline({})
    return node


def _nodes_below(path: Location, *, trusting: bool) -> dict[str, Any]:
    """Read the metadata of all nodes below a group, in the order of their files."""

    def below(folder: Location) -> list[tuple[str, dict[str, Any]]]:
        name = folder.name
        try:
            node = _node(folder)
        except FileNotFoundError:
            return []
        known = (node.get("consolidated_metadata") or {}).get("metadata")
        found = [(name, _alone(node))]
        if node["node_type"] == "group":
            if known is None or not trusting:
                known = _nodes_below(folder, trusting=trusting)
            found += [(f"{name}/{array}", one) for array, one in known.items()]
        return found

    # The index changes after the run is finished.
    folders = [path / name for name in names_below(path) if name != INDEX]
    found = itertools.chain.from_iterable(
        at_once(below, folders) if isinstance(path, ObjectPath) else map(below, folders)
    )
    return dict(sorted(found, key=lambda node: f"{node[0]}/zarr.json".split("/")))


def _node(folder: Location) -> dict[str, Any]:
    try:
        node = dict(json.loads(read_regular(folder / "zarr.json")))
        node["node_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{folder}/zarr.json: is no metadata of Zarr's: {error}",
            why="zarrtrace did not write it.",
            remedy="Move the folder away, if it does not belong to the run.",
        ) from error
    return node


def create_run(path: Location, attributes: dict[str, Any]) -> None:
    """Write the group of a run; traces below it stay."""
    create_arrays(path, {NAMESPACE: sealed(attributes)}, {})


def _encoded(node: dict[str, Any]) -> bytes:
    return json.dumps(node, allow_nan=False).encode()
