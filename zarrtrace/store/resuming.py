"""What an earlier writer left of a trace: kept, completed, or made whole again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zarrtrace.errors import IntegrityError, NotATraceError, StoreError
from zarrtrace.identity import combined_versions
from zarrtrace.spec import NAMESPACE, ArrayLayout, Stored, Tokens, TraceAttributes
from zarrtrace.store.attributes import (
    COORDINATES,
    METADATA,
    files_of,
    files_of_entry,
    other_scenario,
    read_group,
    read_metadata,
    read_trace_attributes,
    seal_broken,
    trace_attributes_of,
)
from zarrtrace.store.files import (
    each_of,
    fingerprint,
    fingerprint_of,
    made_whole,
    remove_partial_files,
    remove_tree,
    send,
    size_of,
    sizes_below,
)
from zarrtrace.store.nodes import create_trace, encoded_array, write_attributes
from zarrtrace.store.objects import Location
from zarrtrace.store.regular import REPAIR, clear_way
from zarrtrace.store.shards import write_block

Layout = Mapping[str, ArrayLayout]


def as_stored(path: Location, layout: Layout) -> Layout:
    """Cut and encode arrays as those on the disk: an earlier zarrtrace may have done otherwise.

    Parameters
    ----------
    path
        Folder of a trace, or where one will be.
    layout
        Its layout, if it is made anew.
    """
    try:
        journal = read_trace_attributes(path).stored.get(METADATA, {})
    except StoreError:
        return layout
    # What is written as it would be written now need not be read.
    others = [k for k, v in layout.items() if fingerprint_of([encoded_array(v)]) != journal.get(k)]

    def cut(array: Location) -> ArrayLayout:
        return _cut_as(array, layout[array.name], journal.get(array.name))

    found = each_of(cut, [path / name for name in others])
    return {**layout, **dict(zip(others, found, strict=True))}


def _cut_as(path: Location, layout: ArrayLayout, journal: Stored | None) -> ArrayLayout:
    """Cut and encode an array as the one on the disk is, unless that was damaged or edited."""
    try:
        array, metadata, stored = read_metadata(path)
    except IntegrityError:
        return layout
    if stored != journal or array.shape != layout.shape:
        return layout
    shards, codecs = array.file_shape, metadata["codecs"]
    sharded = codecs[0]["name"] == "sharding_indexed"
    chunks = shards
    if sharded:
        chunks = tuple(codecs[0]["configuration"]["chunk_shape"])
        codecs = codecs[0]["configuration"]["codecs"]
    cut: dict[str, Any] = {"chunks": chunks, "shards": shards if sharded else None}
    if layout.codec == "sparse" and codecs[0]["name"] != "transpose":
        own = codecs[-1]["name"] == "zstd"  # with a checksum of its own
        cut["codec"] = "plain" if own else "sparse_by_token"
    return layout.model_copy(update=cut)


def resume(
    path: Location, attributes: TraceAttributes, layout: Layout, tokens: Tokens, *, repair: bool
) -> TraceAttributes:
    """Make a trace ready for what it lacks, and return its attributes: those on the disk.

    Parameters
    ----------
    path
        Its folder; created if need be.
    attributes, layout, tokens
        What it should be; the journal comes from the disk.
    repair
        Whether to read every byte, and to make anew what is not as it was written. Otherwise a
        complete trace is trusted if its files have their sizes.

    Raises
    ------
    IntegrityError
        If metadata or coordinates are damaged, and `repair` is false.
    """
    fresh = attributes.model_copy(update={"stored": {}, "nonfinite": (), "complete": False})
    if repair and isinstance(path, Path):
        clear_way(path, _files(layout))
    earlier = _earlier(path, fresh, repair=repair)
    if earlier is None or COORDINATES not in earlier.stored:
        return _create(path, fresh, layout, tokens)
    remove_partial_files(path, deep=True)
    found = dict(earlier.stored)
    recut: set[str] = set()  # how they were cut, only their lost metadata knew
    if repair:
        journal = earlier.stored.get(METADATA, {})
        there = each_of(_metadata_of, [path / name for name in layout])
        unsure = {name for name, one in zip(layout, there, strict=True) if one != journal.get(name)}
        found |= _restore(path, fresh, layout, tokens)
        recut = {name for name in unsure if found[METADATA][name] != journal.get(name)}
    sizes = sizes_below(path)

    def intact(key: str) -> bool:
        def one(array: Location) -> bool:
            stored, cut = found[key][array.name], layout[array.name]
            return _intact(path, earlier, cut, key, array.name, stored, sizes, deep=repair)

        if not found[key].keys() <= layout.keys():
            return False
        # Of a layer, there may be several files an array, which are read at the same time.
        each = map if key.isdigit() else each_of
        return all(each(one, [path / name for name in found[key]]))

    kept = {
        key: entry
        for key, entry in found.items()
        if intact(key) and (key in (METADATA, COORDINATES) or not recut & entry.keys())
    }
    for key in (METADATA, COORDINATES):
        if key in found and key not in kept:
            raise IntegrityError(
                f"{path}: {key} of its arrays are not what was written",
                why="Files were lost or changed since.",
                remedy=REPAIR,
            )
    nonfinite = tuple(key for key in earlier.nonfinite if key in kept)
    complete = earlier.complete and kept.keys() == earlier.stored.keys()
    versions = earlier.versions if complete else combined_versions(earlier.versions, fresh.versions)
    resumed = fresh.model_copy(
        update={
            "stored": kept,
            "nonfinite": nonfinite,
            "complete": complete,
            "versions": versions,
        }
    )
    if repair or resumed != earlier.model_copy(update={"blake2b": None}):
        write_attributes(path, resumed.model_dump(mode="json"))
    return resumed


def _files(layout: Layout) -> Iterator[str]:
    yield "zarr.json"
    for name, one in layout.items():
        yield f"{name}/zarr.json"
        yield from files_of(name, one.shape, one.shards or one.chunks, None)


def _earlier(path: Location, fresh: TraceAttributes, *, repair: bool) -> TraceAttributes | None:
    """What the trace on disk says of itself; None if it has to be made anew."""
    if not (path / "zarr.json").exists():
        return None
    try:
        group = read_group(path, "trace")
        earlier = trace_attributes_of(path, group)
    except (IntegrityError, NotATraceError):
        if repair:
            return None
        raise
    if seal_broken(group["attributes"][NAMESPACE]):
        if repair:
            return earlier  # its journal is checked against the files, entry by entry
        raise IntegrityError(
            f"{path}/zarr.json: its attributes are not the ones that were written",
            why="The file was damaged, or edited by hand.",
            remedy=REPAIR,
        )
    if earlier.scenario != fresh.scenario:
        if repair:
            return None
        raise other_scenario(path, earlier)
    # A run whose own attributes were damaged can no longer refuse another configuration.
    return None if repair and _identity(earlier) != _identity(fresh) else earlier


def _identity(attributes: TraceAttributes) -> dict[str, Any]:
    """What a trace is of: not how far it is, nor the libraries that made it."""
    changing = {"stored", "nonfinite", "complete", "blake2b", "versions"}
    return attributes.model_dump(exclude=changing)


def _intact(
    path: Location,
    attributes: TraceAttributes,
    layout: ArrayLayout,
    key: str,
    name: str,
    stored: Stored,
    sizes: Mapping[str, int] | None,
    *,
    deep: bool,
) -> bool:
    files = files_of_entry(
        attributes, key, name, layout.dims, layout.shape, layout.shards or layout.chunks
    )
    # What a complete trace holds was on the disk before it was called complete.
    if key.isdigit() and attributes.complete and not deep:
        return size_of(path, files, sizes) == stored.bytes
    return fingerprint(path, files) == stored


def _create(
    path: Location, attributes: TraceAttributes, layout: Layout, tokens: Tokens
) -> TraceAttributes:
    if path.exists():
        remove_tree(path)
    with made_whole(path) as folder:
        return _create_in(folder, attributes, layout, tokens)


def _create_in(
    folder: Path, attributes: TraceAttributes, layout: Layout, tokens: Tokens
) -> TraceAttributes:
    create_trace(folder, attributes.model_dump(mode="json"), dict(layout))
    _write_coordinates(folder, attributes, layout, tokens)
    created = attributes.model_copy(update={"stored": _journal(folder, attributes, layout)})
    write_attributes(folder, created.model_dump(mode="json"))
    return created


def _restore(
    path: Location, attributes: TraceAttributes, layout: Layout, tokens: Tokens
) -> dict[str, dict[str, Stored]]:
    """Write metadata and coordinates anew: they need no model. Return their journal."""
    with tempfile.TemporaryDirectory() as folder:
        pattern = Path(folder) / path.name
        created = _create_in(pattern, attributes, layout, tokens)
        send(pattern, path)
    return dict(created.stored)


def _journal(
    path: Path, attributes: TraceAttributes, layout: Layout
) -> dict[str, dict[str, Stored]]:
    coordinates = {
        name: fingerprint(
            path, files_of_entry(attributes, COORDINATES, name, one.dims, one.shape, one.chunks)
        )
        for name, one in layout.items()
        if len(one.dims) == 1
    }
    metadata = {name: fingerprint(path, [f"{name}/zarr.json"]) for name in layout}
    return {COORDINATES: coordinates, METADATA: metadata}


def _metadata_of(array: Location) -> Stored | None:
    try:
        return read_metadata(array).stored
    except IntegrityError:
        return None


def _write_coordinates(
    path: Path, attributes: TraceAttributes, layout: Layout, tokens: Tokens
) -> None:
    without = attributes.layers_without_attention
    values: dict[str, Any] = {
        "layer": np.asarray(attributes.layers),
        "attention_layer": np.asarray(
            [layer for layer in attributes.layers if str(layer) not in without]
        ),
        "token_id": np.asarray(tokens.ids, dtype=np.uint32),
        "has_attention": np.isin(
            np.arange(len(tokens.ids)), np.asarray(attributes.queries or (), np.int64)
        ),
    }
    values["query_token"] = values["key_token"] = np.asarray(tokens.texts, dtype=object)
    for name, one in layout.items():
        if len(one.dims) == 1:
            write_block(path / name, one, (0,), values.get(name, np.arange(one.shape[0])))
