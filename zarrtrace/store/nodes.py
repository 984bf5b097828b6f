"""Metadata of Zarr groups and arrays: creating, changing, consolidating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec

from zarrtrace.spec import ATTENTION_LEVEL, LABELS, NAMESPACE, ArrayLayout


def create_trace(path: Path, attributes: dict[str, Any], layout: dict[str, ArrayLayout]) -> None:
    """Create the group of a trace and its arrays, all empty."""
    group = zarr.create_group(
        path,
        zarr_format=3,
        attributes={
            NAMESPACE: attributes,
            # xarray's convention for coordinates that are no index
            "coordinates": " ".join(name for name in LABELS if name in layout),
        },
    )
    for name, array in layout.items():
        create_array(group, name, array)


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
    group = json.loads((path / "zarr.json").read_bytes())
    group.pop("consolidated_metadata", None)
    group["attributes"][NAMESPACE] = attributes
    _write(path, group)


def consolidate(path: Path) -> None:
    """Copy the metadata of all nodes below a group into its own: an extra that readers may ignore.

    What zarr.consolidate_metadata writes, but that warns, and warnings cannot be silenced in one
    thread alone.
    """
    inline = {"kind": "inline", "must_understand": False}
    nodes: dict[str, Any] = {}
    for file in sorted([*path.glob("*/zarr.json"), *path.glob("*/*/zarr.json")]):
        node = json.loads(file.read_bytes())
        if node["node_type"] == "group":
            node["consolidated_metadata"] = {**inline, "metadata": {}}
        nodes[file.parent.relative_to(path).as_posix()] = node
    group = json.loads((path / "zarr.json").read_bytes())
    group["consolidated_metadata"] = {**inline, "metadata": nodes}
    _write(path, group)


def _write(path: Path, group: dict[str, Any]) -> None:
    partial = path / "zarr.json.partial"
    partial.write_text(json.dumps(group, indent=2, allow_nan=False), encoding="utf-8")
    partial.replace(path / "zarr.json")
