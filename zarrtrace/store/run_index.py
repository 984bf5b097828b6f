"""The index of a run on disk: written beside the run, put in place when it is whole."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from xarray.core import indexing

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.spec import (
    INDEX,
    IndexAttributes,
    Stored,
    index_layout,
)
from zarrtrace.store.attributes import (
    COORDINATES,
    METADATA,
    ArrayMetadata,
    files_of,
    read_index_attributes,
    read_metadata,
    read_run_attributes,
)
from zarrtrace.store.files import (
    clear_errors,
    fingerprint,
    flush,
    fsync,
    made_whole,
    move,
    remove_tree,
    size_of,
)
from zarrtrace.store.lazy import stored_array
from zarrtrace.store.locks import lock, unlock
from zarrtrace.store.nodes import create_arrays, write_attributes
from zarrtrace.store.objects import Location, locate
from zarrtrace.store.shards import write_block


class RunIndex:
    """The index of a run, to read: one small chunk an array and feature.

    Parameters
    ----------
    run
        Folder of the run.

    Raises
    ------
    StoreError
        If the run has no index.
    FormatVersionError, IntegrityError
        If it cannot be read.
    """

    def __init__(self, run: str | Location) -> None:
        self.path = locate(run) / INDEX
        if not (self.path / "zarr.json").is_file():
            read_run_attributes(run)  # says what is wrong if it is no run
            raise StoreError(
                f"{run}: has no index of its features",
                why="Extraction does not make one.",
                remedy=f"Run 'zarrtrace index {run}' once; later calls add what is new.",
            )
        self.attributes = read_index_attributes(self.path)
        self._arrays: dict[str, Any] = {}

    def read(self, array: str, *key: int | slice) -> Any:
        """Return a part of one of its arrays."""
        if array not in self._arrays:
            opened = stored_array(self.path / array, self._metadata(array).metadata)
            if opened is None:
                raise IntegrityError(
                    f"{self.path / array}: is not encoded as zarrtrace does",
                    remedy="Build the index again: 'zarrtrace index --rebuild'.",
                )
            self._arrays[array] = opened[0]
        return self._arrays[array][indexing.BasicIndexer(key)]

    def check(self, *layers: int) -> None:
        """Refuse an index in which files of these layers are gone or have another size.

        Raises
        ------
        IntegrityError
        """
        for layer in layers:
            at = self.attributes.layers.index(layer)
            for name, stored in self.attributes.stored[str(layer)].items():
                array = self._metadata(name).array
                found = size_of(self.path, files_of(name, array.shape, array.file_shape, at))
                if found != stored.bytes:
                    raise IntegrityError(
                        f"{self.path / name}: {found} bytes on disk for layer {layer}, not "
                        f"{stored.bytes}",
                        why="Files were lost, cut short or replaced.",
                        remedy="Build the index again: 'zarrtrace index --rebuild'.",
                    )

    def _metadata(self, array: str) -> ArrayMetadata:
        """Read an array's metadata; refuse any but that which was written."""
        found = read_metadata(self.path / array)
        if self.attributes.stored.get(METADATA, {}).get(array) != found.stored:
            raise IntegrityError(
                f"{self.path / array / 'zarr.json'}: not the metadata that was written",
                why="The file was damaged, or edited by hand.",
                remedy="Build the index again: 'zarrtrace index --rebuild'.",
            )
        return found

    def layer(self, array: str, layer: int) -> dict[str, np.ndarray]:
        """Return all that is known of one layer of an array of features, by name."""
        suffix = array.removeprefix("features")
        entry, at = self.attributes.stored[str(layer)], self.attributes.layers.index(layer)
        out = {}
        for name in _names(suffix):
            if name in entry:
                rest = len(self._metadata(name).array.shape) - 1
                out[name.removesuffix(suffix)] = self.read(name, at, *[slice(None)] * rest)
        return out


def _names(suffix: str) -> list[str]:
    """Return the arrays with layers that belong to one array of features."""
    layout = index_layout(1, {f"features{suffix}": 1}, 1)
    return [name for name, one in layout.items() if one.dims[0] == "layer" and name != "layer"]


class IndexWriter:
    """Write the index of a run: layers in any order and from any process, then :meth:`finish`.

    A context manager, to be used while the run is :func:`locked`. The index that was there stays
    until the new one is whole.

    Parameters
    ----------
    run
        Folder of the run.
    layers, features
        What it holds: layers in order, latents by array.
    """

    def __init__(
        self, run: str | Location, layers: Sequence[int], features: Mapping[str, int]
    ) -> None:
        self._run = locate(run).absolute()
        # Of its own: tasks of an attempt that failed may still be writing to theirs.
        self.path = self._run.with_name(f"{_beside(self._run)}{secrets.token_hex(4)}")
        self._layers, self._features = tuple(layers), dict(features)
        self._names = read_run_attributes(self._run).scenarios
        self.scenarios = len(self._names)
        self._layout = index_layout(len(layers), features, len(self._names))

    def __enter__(self) -> Self:
        with clear_errors(self._run):
            for left in self._run.parent.iterdir():
                if left.name.startswith(_beside(self._run)):
                    remove_tree(left)
            with made_whole(self.path) as folder:
                create_arrays(folder, {}, self._layout)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        remove_tree(self.path)

    def finish(
        self, digests: Sequence[int], stored: Mapping[str, Mapping[str, Stored]]
    ) -> IndexAttributes:
        """Put the index in its place.

        Parameters
        ----------
        digests
            Of each scenario of the run; 0 for those that are not in it.
        stored
            What :func:`write_index_layer` returned, by layer.
        """
        with clear_errors(self._run):
            values = {
                "layer": np.asarray(self._layers, np.int64),
                "scenario": np.asarray(self._names, dtype=object),
                "digest": np.asarray(digests, np.uint64),
            }
            coordinates = [name for name, one in self._layout.items() if len(one.dims) == 1]
            coordinates = [name for name in coordinates if not name.startswith("tokens")]
            for name in coordinates:
                one = self._layout[name]
                write_block(self.path / name, one, (0,), values.get(name, np.arange(one.shape[0])))
            attributes = IndexAttributes(
                layers=self._layers,
                features=self._features,
                scenarios=len(self._names),
                indexed=sum(digest != 0 for digest in digests),
                stored={
                    **{str(layer): dict(stored[str(layer)]) for layer in self._layers},
                    COORDINATES: {name: self._fingerprint(name, None) for name in coordinates},
                    METADATA: {
                        name: fingerprint(self.path, [f"{name}/zarr.json"]) for name in self._layout
                    },
                },
            )
            write_attributes(self.path, attributes.model_dump(mode="json"))
            fsync(self.path)
            flush(self.path)
            self._put_in_place()
        return attributes

    def _put_in_place(self) -> None:
        index, old = self._run / INDEX, _old(self._run)
        if isinstance(index, Path) and index.exists():
            move(index, old)
        move(self.path, index)
        fsync(self._run)
        remove_tree(old)

    def _fingerprint(self, name: str, at: int | None) -> Stored:
        one = self._layout[name]
        return fingerprint(self.path, files_of(name, one.shape, one.shards or one.chunks, at))


def write_index_layer(
    path: Location,
    layers: Sequence[int],
    features: Mapping[str, int],
    layer: int,
    arrays: Mapping[str, np.ndarray],
) -> dict[str, Stored]:
    """Write some arrays of one layer of an index that is being made; return its journal entry.

    Parameters
    ----------
    path
        Folder of the new index: :attr:`IndexWriter.path`.
    layers, features
        What the index holds.
    layer
        Which of its layers.
    arrays
        Values by name, without the dimension of layers.
    """
    layout, at = index_layout(len(layers), features, 1), list(layers).index(layer)
    out = {}
    with clear_errors(path):
        for name, value in arrays.items():
            one = layout[name]
            corner = (at, *[0] * value.ndim)
            write_block(path / name, one, corner, value[np.newaxis])
            files = files_of(name, one.shape, one.shards or one.chunks, at)
            out[name] = fingerprint(path, files)
    return out


def _beside(run: Location) -> str:
    """Return how the names of folders begin in which an index of a run is being made."""
    return f".{run.name}.index."


def _old(run: Location) -> Location:
    return run.with_name(f"{_beside(run)}old")


@contextlib.contextmanager
def locked(run: str | Location) -> Iterator[None]:
    """Hold a run's lock, for its index to be written.

    Raises
    ------
    LockedError
        If another process is writing the run or its index.
    """
    run = locate(run).absolute()
    with clear_errors(run):
        handle = lock(run)
    try:
        if isinstance(run, Path) and _old(run).exists() and not (run / INDEX).exists():
            move(_old(run), run / INDEX)  # a writer was killed between two renames
        yield
    finally:
        unlock(run, handle)
