"""The index of the features of a run or a table, on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.format.attributes import RunAttributes
from zarrtrace.format.index_layout import IndexAttributes, index_layout
from zarrtrace.format.layout import INDEX
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.storage import Address, Location, disk, locate
from zarrtrace.store.array import open_array
from zarrtrace.store.chunks import Checksum, encode_file, file_key, label_files
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.damage import check_sizes
from zarrtrace.store.indexable import Indexable, digest_of, read_run_or_table
from zarrtrace.store.metadata import Group, read_index_group, read_trace
from zarrtrace.store.nodes import Nodes, array_metadata, encoded
from zarrtrace.store.publish import beside, end_publishing, publish_folder, remove
from zarrtrace.store.run_writer import lock_run
from zarrtrace.store.seal import sealed_group
from zarrtrace.store.staged import staging_folder

_REBUILD = "Build the index again: 'zarrtrace index --rebuild'."


# --- reading the index -------------------------------------------------------------------------


class RunIndex:
    """The index of a run or a table, to read: one small chunk an array and feature.

    Parameters
    ----------
    run
        Its folder, or its address.

    Raises
    ------
    StoreError
        If it has no index.
    FormatVersionError, IntegrityError
        If it cannot be read.
    """

    def __init__(self, run: Address) -> None:
        self.path = locate(run) / INDEX
        if not (self.path / "zarr.json").is_file():
            read_run_or_table(run)  # says what is wrong if it is neither
            raise StoreError(
                f"{run}: has no index of its features",
                why="Extraction does not make one.",
                remedy=f"Run 'zarrtrace index {run}' once; later calls add what is new.",
            )
        self._group = read_index_group(self.path)
        self.attributes = self._group.attributes

    def read(self, array: str, *key: int | slice | np.ndarray) -> Any:
        """Read a part of one of its arrays."""
        try:
            return open_array(self._group, array).read(key)
        except IntegrityError as error:
            raise IntegrityError(error.what, why=error.why, remedy=_REBUILD) from error

    def check(self) -> None:
        """Refuse an index of which files are gone or have another size.

        Raises
        ------
        IntegrityError
        """
        check_sizes(self._group, _REBUILD)

    def layer(self, array: str, layer: int) -> dict[str, np.ndarray]:
        """Return all that is known of one layer of an array of features, by name."""
        suffix, at = array.removeprefix("features"), self.attributes.layers.index(layer)
        found = {}
        for name in _names(suffix):
            rest = len(self._group.encodings[name].shape) - 1
            if file_key([at, *[0] * rest]) in self._group.checksums[name]:
                found[name.removesuffix(suffix)] = self.read(name, at, *[slice(None)] * rest)
        return found


def _names(suffix: str) -> list[str]:
    """Return the arrays with layers that belong to one array of features."""
    layout = index_layout(1, {f"features{suffix}": 1}, 1)
    return [name for name, one in layout.items() if one.dims[0] == "layer" and name != "layer"]


def stale_scenarios(
    run: Group[RunAttributes] | Group[TableAttributes],
) -> Iterator[tuple[str | None, str]]:
    """Name scenarios whose features are not those of the index, and what to do."""
    index = RunIndex(run.path)
    if isinstance(run.attributes, TableAttributes):
        if index.attributes.table != run.attributes.seal:
            yield None, "is of another table: 'zarrtrace index' again"
        return
    names = run.attributes.scenarios
    if index.attributes.table is not None or (
        [str(name) for name in index.read("scenario", slice(None))] != list(names)
    ):
        yield None, "is of other scenarios: 'zarrtrace index' again"
        return
    for name, digest in zip(names, index.read("digest", slice(None)).tolist(), strict=True):
        try:
            is_same = digest in (0, digest_of(read_trace(run.path / name)))
        except StoreError:
            continue  # said of the trace itself
        if not is_same:
            yield name, "has changed since: 'zarrtrace index' again"


# --- writing the index -------------------------------------------------------------------------


@contextlib.contextmanager
def locked(run: Address) -> Iterator[None]:
    """Hold the lock of a run or a table, for its index to be written.

    An interrupted replacement of the index is ended first.

    Raises
    ------
    LockedError
        If another process is writing the run or its index.
    """
    run = locate(run).resolved()
    with disk.explained(run):
        lock = lock_run(run)
    try:
        if (index := (run / INDEX).path) is not None:
            with disk.explained(run):
                end_publishing(staging_folder(run) / INDEX, index)
        yield
    finally:
        lock.release()


class IndexWriter:
    """Write an index: layers in any order and from any process, then :meth:`finish`.

    A context manager, to be used while the run is :func:`locked`. The index that was there stays
    until the new one is whole.

    Parameters
    ----------
    run
        Folder of the run or the table.
    source
        The parts of it that are indexed.
    special
        Whether special tokens are counted.
    """

    def __init__(self, run: Address, source: Indexable, *, special: bool) -> None:
        self._special = special
        self._run, self._source = locate(run).resolved(), source
        # Tasks on other machines write it, too: in an object store it stands beside the run.
        is_remote = self._run.path is None
        staged = staging_folder(self._run) / INDEX
        self.path = beside(self._run, "index") if is_remote else locate(staged)
        layers, scenarios = len(source.layers), len(source.names)
        is_table = source.table is not None
        self._layout = index_layout(layers, source.features, scenarios, of_table=is_table)

    def __enter__(self) -> Self:
        with disk.explained(self._run):
            remove(self.path)
            if (folder := self.path.path) is not None:
                for name in self._layout:
                    (folder / name).mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        remove(self.path)
        if (folder := self.path.path) is not None:
            with contextlib.suppress(OSError):  # what else is staged stays
                folder.parent.rmdir()

    def finish(self, stored: Mapping[str, Mapping[str, Checksum]]) -> IndexAttributes:
        """Put the index in its place.

        Parameters
        ----------
        stored
            Results of :func:`write_index_layer`, by array.
        """
        source = self._source
        values: dict[str, np.ndarray] = {
            "layer": np.asarray(source.layers, np.int64),
            "scenario": np.asarray(source.names, dtype=object),
            "digest": source.by_scenario,
            "start": source.by_scenario,
        }
        attributes = IndexAttributes(
            layers=tuple(source.layers),
            features=source.features,
            scenarios=len(source.names),
            indexed=source.indexed,
            table=source.table,
            special=self._special,
        )
        nodes: Nodes = {}
        with disk.explained(self._run):
            for name, layout in sorted(self._layout.items()):
                found = dict(stored.get(name, {}))
                if len(layout.dims) == 1 and not name.startswith("tokens"):
                    value = values.get(name, np.arange(layout.shape[0]))
                    for key, content, checksum in label_files(ArrayEncoding(layout), value):
                        (self.path / name / key).write(content)
                        found[key] = checksum
                nodes[name] = array_metadata(layout, found)
                (self.path / name / "zarr.json").write(encoded(nodes[name]))
            (self.path / "zarr.json").write(sealed_group(attributes, nodes))
            if (folder := self.path.path) is not None:
                disk.sync(folder)
            publish_folder(self.path, self._run / INDEX)
        return attributes


def write_index_layer(
    folder: Location,
    layers: Sequence[int],
    features: Mapping[str, int],
    layer: int,
    arrays: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Checksum]]:
    """Write some arrays of one layer of an index that is being made; return their checksums.

    Parameters
    ----------
    folder
        Path of the new index: :attr:`IndexWriter.path`.
    layers, features
        Layers and numbers of latents of the index.
    layer
        Which of its layers.
    arrays
        Values by name, without the dimension of layers.
    """
    layout, at = index_layout(len(layers), features, 1), list(layers).index(layer)
    stored = {}
    with disk.explained(folder):
        for name, value in arrays.items():
            values = np.asarray(value)[np.newaxis]
            key = file_key([at, *[0] * (values.ndim - 1)])
            content, checksum = encode_file(ArrayEncoding(layout[name]), values)
            (folder / name / key).write(content)
            stored[name] = {key: checksum}
    return stored
