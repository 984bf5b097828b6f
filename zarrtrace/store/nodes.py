"""Metadata of Zarr groups and arrays: creating, changing, consolidating."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec

from zarrtrace.spec import ATTENTION_LEVEL, INDEX, LABELS, NAMESPACE, ArrayLayout
from zarrtrace.store.attributes import sealed
from zarrtrace.store.files import write_whole


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


def write_attributes(path: Path, attributes: dict[str, Any]) -> None:
    """Replace what a group says of itself, at once; its consolidated metadata goes."""
    update_attributes(path, lambda _: attributes)


def update_attributes(path: Path, update: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a group says of itself, at once; its consolidated metadata goes.

    Once a layer: on one line, for which Python has a faster encoder, until :func:`consolidate`.
    """
    group = json.loads((path / "zarr.json").read_bytes())
    group.pop("consolidated_metadata", None)
    group["attributes"][NAMESPACE] = sealed(update(group["attributes"].get(NAMESPACE, {})))
    _write(path, group, indent=None)


def consolidate(path: Path) -> None:
    """Copy the metadata of all nodes below a group into its own: an extra that readers may ignore.

    What zarr.consolidate_metadata writes, but that warns, and warnings cannot be silenced in one
    thread alone.
    """
    group = json.loads((path / "zarr.json").read_bytes())
    group["consolidated_metadata"] = consolidated(path)
    _write(path, group)


def consolidated(path: Path) -> dict[str, Any]:
    """Return the metadata of all nodes below a group as its consolidated metadata holds it."""
    inline = {"kind": "inline", "must_understand": False}
    nodes: dict[str, Any] = {}
    for file in sorted([*path.glob("*/zarr.json"), *path.glob("*/*/zarr.json")]):
        if file.relative_to(path).parts[0] == INDEX:
            continue  # it changes after the run is finished
        node = json.loads(file.read_bytes())
        if node["node_type"] == "group":
            node["consolidated_metadata"] = {**inline, "metadata": {}}
        nodes[file.parent.relative_to(path).as_posix()] = node
    return {**inline, "metadata": nodes}


def create_run(path: Path, attributes: dict[str, Any]) -> None:
    """Write the group of a run; traces below it stay."""
    path.mkdir(parents=True, exist_ok=True)
    group = {"zarr_format": 3, "node_type": "group"}
    _write(path, {**group, "attributes": {NAMESPACE: sealed(attributes)}})


def _write(path: Path, group: dict[str, Any], indent: int | None = 2) -> None:
    text = json.dumps(group, indent=indent, allow_nan=False)
    write_whole(path / "zarr.json", text.encode())
