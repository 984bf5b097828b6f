"""Metadata of Zarr groups and arrays: creating, changing, consolidating."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec

from zarrtrace.spec import ATTENTION_LEVEL, INDEX, LABELS, NAMESPACE, ArrayLayout
from zarrtrace.store.attributes import names_below, sealed
from zarrtrace.store.files import change_whole, write_whole
from zarrtrace.store.objects import Location, ObjectPath, at_once


def create_trace(path: Path, attributes: dict[str, Any], layout: dict[str, ArrayLayout]) -> None:
    """Create the group of a trace and its arrays, all empty."""
    group = zarr.create_group(
        path,
        zarr_format=3,
        attributes={
            NAMESPACE: sealed(attributes),
            "coordinates": labels_of(layout),
        },
    )
    for name, array in layout.items():
        create_array(group, name, array)


def labels_of(arrays: Iterable[str]) -> str:
    """Name the coordinates that are no index, as xarray's convention for Zarr wants it."""
    there = set(arrays)
    return " ".join(name for name in LABELS if name in there)


def create_array(group: zarr.Group, name: str, layout: ArrayLayout) -> zarr.Array[Any]:
    """Create one array of a trace as `layout` says."""
    text = layout.dtype == "string"
    return group.create_array(
        name,
        shape=layout.shape,
        dtype=str if text else layout.dtype,
        chunks=layout.chunks,
        shards=layout.shards,
        dimension_names=layout.dims,
        fill_value=layout.fill_value,
        attributes=dict(layout.attributes),
        serializer="auto" if text else BytesCodec(endian="little"),
        compressors=_compressors(layout),
        # A chunk that equals the fill value must exist all the same: a missing one is a fault.
        config={"write_empty_chunks": not layout.skip_empty},
    )


def _compressors(layout: ArrayLayout) -> list[BytesBytesCodec]:
    # Every chunk carries a checksum: a flipped bit must raise, never read as another number.
    if layout.codec == "attention":
        return [BloscCodec(cname="zstd", clevel=ATTENTION_LEVEL, shuffle="shuffle"), Crc32cCodec()]
    return [ZstdCodec(level=1, checksum=True)]


def write_attributes(path: Location, attributes: dict[str, Any]) -> None:
    """Replace what a group says of itself, at once; its consolidated metadata goes."""
    update_attributes(path, lambda _: attributes)


def update_attributes(path: Location, update: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a group says of itself, at once; its consolidated metadata goes.

    Once a layer: on one line, for which Python has a faster encoder, until :func:`consolidate`.
    """

    def updated(content: bytes) -> bytes:
        group = json.loads(content)
        group.pop("consolidated_metadata", None)
        group["attributes"][NAMESPACE] = sealed(update(group["attributes"].get(NAMESPACE, {})))
        return _encoded(group, indent=None)

    change_whole(path / "zarr.json", updated)


def consolidate(path: Location) -> None:
    """Copy the metadata of all nodes below a group into its own: an extra that readers may ignore.

    What zarr.consolidate_metadata writes, but that warns, and warnings cannot be silenced in one
    thread alone.
    """
    found = consolidated(path, trusting=True)
    change_whole(
        path / "zarr.json",
        lambda content: _encoded({**json.loads(content), "consolidated_metadata": found}),
    )


def consolidated(path: Location, *, trusting: bool = False) -> dict[str, Any]:
    """Return the metadata of all nodes below a group as its consolidated metadata holds it.

    Parameters
    ----------
    path
        The group.
    trusting
        Take what groups below it have consolidated, where each file is a request.
    """
    if isinstance(path, ObjectPath):
        return _inline(_nodes_there(path, trusting=trusting))
    nodes: dict[str, Any] = {}
    for file in sorted([*path.glob("*/zarr.json"), *path.glob("*/*/zarr.json")]):
        if file.relative_to(path).parts[0] == INDEX:
            continue  # it changes after the run is finished
        nodes[file.parent.relative_to(path).as_posix()] = _alone(json.loads(file.read_bytes()))
    return _inline(nodes)


def _inline(nodes: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": nodes}


def _alone(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node's metadata without that of the nodes below it."""
    if node["node_type"] == "group":
        node["consolidated_metadata"] = _inline({})
    return node


def _nodes_there(path: ObjectPath, *, trusting: bool) -> dict[str, Any]:
    """Read the metadata of all nodes below a group in an object store, in their order."""

    def below(name: str) -> list[tuple[str, dict[str, Any]]]:
        try:
            node = json.loads((path / name / "zarr.json").read_bytes())
        except FileNotFoundError:
            return []
        known = (node.get("consolidated_metadata") or {}).get("metadata")
        found = [(name, _alone(node))]
        if node["node_type"] == "group":
            if known is None or not trusting:
                known = _nodes_there(path / name, trusting=trusting)
            found += [(f"{name}/{array}", one) for array, one in known.items()]
        return found

    names = [name for name in names_below(path) if name != INDEX]
    found = itertools.chain.from_iterable(at_once(below, names))
    return dict(sorted(found, key=lambda node: f"{node[0]}/zarr.json".split("/")))  # as files


def create_run(path: Location, attributes: dict[str, Any]) -> None:
    """Write the group of a run; traces below it stay."""
    path.mkdir(parents=True, exist_ok=True)
    group = {"zarr_format": 3, "node_type": "group"}
    content = _encoded({**group, "attributes": {NAMESPACE: sealed(attributes)}})
    write_whole(path / "zarr.json", content)


def _encoded(group: dict[str, Any], indent: int | None = 2) -> bytes:
    return json.dumps(group, indent=indent, allow_nan=False).encode()
