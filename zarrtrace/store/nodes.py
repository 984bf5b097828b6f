"""``zarr.json`` of arrays: written, read and checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from zarrtrace.format.layout import NO_ID, ArrayLayout
from zarrtrace.store.chunks import Checksum, Checksums
from zarrtrace.store.codecs import ArrayEncoding, codecs_of

#: Metadata of arrays by name.
Nodes = dict[str, dict[str, Any]]
#: The attribute of an array that holds sizes and checksums of its files.
CHECKSUMS = "checksums"

# No array exceeds these; above them, metadata would only make us ask for memory or for files.
_MOST_LABELS, _MOST_FILES = 2**24, 2**18
# Attributes by which xarray computes other numbers from those that are stored.
_SCALED = {"scale_factor", "add_offset", "_FillValue", "missing_value", "dtype", "_Unsigned",
           "units", "calendar"}  # fmt: skip
# Fill values that an array may have, by its data type.
_FILLS: dict[str, tuple[Any, ...]] = {
    "bool": (False,), "float16": ("NaN",), "float32": ("NaN",), "float64": ("NaN",),
    "string": ("",),
    "int64": (0,), "uint32": (0, NO_ID), "uint64": (0,),
}  # fmt: skip
# Names of arrays become folders.
_ARRAY_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{8}|[0-9a-f]{16}", re.ASCII)
_FILE_KEY = re.compile(r"c(\.(0|[1-9]\d{0,8}))+", re.ASCII)
#: Errors that nonsense in JSON raises when it is parsed as metadata.
NONSENSE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


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


def check_array(
    name: str, node: Mapping[str, Any], sizes: dict[str, int], *, is_whole: bool
) -> ArrayEncoding:
    """Refuse metadata that no array of zarrtrace has; return how the array is encoded.

    Parameters
    ----------
    name, node
        Name and metadata of the array.
    sizes
        Sizes of dimensions that are known already; its own are added.
    is_whole
        As for :func:`~zarrtrace.store.metadata.check_nodes`.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError, OverflowError
    """
    encoding = ArrayEncoding(layout_of(node))
    _check_dims(name, encoding, sizes)
    _check_files(stored_checksums(node), encoding, is_whole=is_whole)
    return encoding


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


def stored_checksums(node: Mapping[str, Any]) -> dict[str, Checksum]:
    """Return sizes and checksums of an array's files, by key.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError
        If they are missing or damaged.
    """
    found = {key: Checksum(*one) for key, one in node["attributes"][CHECKSUMS].items()}
    for key, one in found.items():
        if not _FILE_KEY.fullmatch(key) or type(one.bytes) is not int or one.bytes < 0:
            raise ValueError(f"no file {key!r} belongs to an array")
        if not _CHECKSUM.fullmatch(one.checksum):
            raise ValueError(f"no checksum of {key!r}: {one.checksum!r}")
    return found
