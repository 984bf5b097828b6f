"""What of a run can be indexed: its traces' features, layer by layer, and their tokens' texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import zarr
from xarray.core import indexing

from zarrtrace.errors import IntegrityError
from zarrtrace.spec import Stored, TraceAttributes
from zarrtrace.store.attributes import (
    REPAIR,
    files_of,
    read_array,
    read_run_attributes,
    read_trace_attributes,
)
from zarrtrace.store.files import each_of, names_there, size_of
from zarrtrace.store.lazy import stored_array
from zarrtrace.store.objects import Location, locate, zarr_place


class IndexableTrace(NamedTuple):
    """A scenario whose features can be indexed.

    Attributes
    ----------
    number
        Its place in the run.
    path
        Folder of its trace.
    digest
        Of its features' journal: another one means other features.
    features
        Number of latents by array.
    layers
        Its layers, in order: where they are in its arrays.
    stored
        Bytes of each layer's features, by layer and array; what is not there has none.
    """

    number: int
    path: Location
    digest: int
    features: dict[str, int]
    layers: tuple[int, ...]
    stored: dict[int, dict[str, int]]


def indexable_traces(run: str | Location) -> Iterator[IndexableTrace]:
    """Yield the complete traces of a run that have features.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        If the run, or one of its traces, cannot be read.
    """
    run = locate(run)
    names = read_run_attributes(run).scenarios
    there = set(names_there(run, names))
    numbers = [number for number, name in enumerate(names) if name in there]
    found = each_of(_indexable, [run / names[number] for number in numbers])
    for number, trace in zip(numbers, found, strict=True):
        if trace is not None:
            yield trace._replace(number=number)


def _indexable(path: Location) -> IndexableTrace | None:
    if not (path / "zarr.json").is_file():
        return None
    attributes = read_trace_attributes(path)
    found = _features_of(attributes)
    if not attributes.complete or not found:
        return None
    arrays = {array for entry in found.values() for array in entry}
    return IndexableTrace(
        number=-1,
        path=path,
        digest=digest_of(attributes),
        features={array: read_array(path / array).shape[-1] for array in sorted(arrays)},
        layers=attributes.layers,
        stored={
            layer: {array: stored.bytes for array, stored in entry.items()}
            for layer, entry in found.items()
        },
    )


def digest_of(attributes: TraceAttributes) -> int:
    """Return a number that stands for the features of a trace; never 0."""
    content = {
        layer: {array: stored.blake2b for array, stored in entry.items()}
        for layer, entry in _features_of(attributes).items()
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) or 1


def _features_of(attributes: TraceAttributes) -> dict[int, dict[str, Stored]]:
    found = {
        int(key): {name: one for name, one in entry.items() if name.startswith("features")}
        for key, entry in attributes.stored.items()
        if key.isdigit()
    }
    return {layer: entry for layer, entry in found.items() if entry}


def read_features(trace: IndexableTrace, array: str, layer: int) -> np.ndarray | None:
    """Return the activations ``(query, feature)`` of one layer; None if the trace has none.

    Raises
    ------
    IntegrityError
        If files are gone, cut short or damaged.
    """
    written = trace.stored.get(layer, {}).get(array)
    if written is None:
        return None
    at, path = trace.layers.index(layer), trace.path / array
    metadata = read_array(path)
    found = size_of(trace.path, files_of(array, metadata.shape, metadata.file_shape, at))
    if found != written:
        raise IntegrityError(
            f"{path}: {found} bytes on disk for layer {layer}, not {written}",
            why="Files were lost, cut short or replaced.",
            remedy=REPAIR,
        )
    opened = stored_array(path)
    if opened is None:
        values = zarr.open_array(zarr_place(path), mode="r")[at]
    else:
        values = opened[0][indexing.BasicIndexer((at, slice(None), slice(None)))]
    return np.asarray(values)


def read_token_texts(trace: Location) -> list[str]:
    """Return the texts of a trace's tokens.

    Raises
    ------
    IntegrityError
        If they are gone or damaged.
    """
    path = trace / "query_token"
    (size,) = read_array(path).shape
    opened = stored_array(path)
    texts = zarr.open_array(zarr_place(path), mode="r")[:] if opened is None else opened[0].load()
    found = [str(text) for text in np.asarray(texts)]
    if not size or not any(found):
        raise IntegrityError(
            f"{path}: holds no text", why="Its file was lost or cut short.", remedy=REPAIR
        )
    return found
