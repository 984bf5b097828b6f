"""The index of a run's features on disk, and what of the run can be indexed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.format.attributes import IndexAttributes, TraceAttributes
from zarrtrace.format.index_layout import index_layout
from zarrtrace.format.layout import INDEX
from zarrtrace.storage import Address, Location, disk, locate
from zarrtrace.store.array import open_array
from zarrtrace.store.chunks import Checksum, encode_file, file_key, label_files
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.damage import check_sizes
from zarrtrace.store.metadata import (
    REPAIR,
    Group,
    each_trace,
    read_index_group,
    read_run,
    read_trace,
    sealed_group,
)
from zarrtrace.store.nodes import Nodes, array_metadata, encoded
from zarrtrace.store.publish import end_publishing, publish_folder, remove
from zarrtrace.store.run_writer import lock_run
from zarrtrace.store.staged import staging_folder

_REBUILD = "Build the index again: 'zarrtrace index --rebuild'."


# --- what can be indexed -----------------------------------------------------------------------


class IndexableTrace(NamedTuple):
    """A scenario whose features can be indexed.

    Attributes
    ----------
    number
        Its place in the run.
    path
        Folder of its trace.
    digest
        Stands for the content of its features; never 0.
    features
        Number of latents by array.
    layers
        Layers of which it has features, by array.
    positions
        Token positions of their rows; None for all tokens of the prompt.
    """

    number: int
    path: Location
    digest: int
    features: dict[str, int]
    layers: dict[str, tuple[int, ...]]
    positions: tuple[int, ...] | None


def indexable_traces(run: Address) -> list[IndexableTrace]:
    """Return the complete traces of a run that have features.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        If the run, or one of its traces, cannot be read.
    """
    run = locate(run)
    names = read_run(run).attributes.scenarios
    numbers = {name: number for number, name in enumerate(names)}
    found = each_trace(
        run, run.present(names), lambda trace: _indexable(numbers[trace.path.name], trace)
    )
    return [trace for trace in found if trace is not None and trace.features]


def _indexable(number: int, trace: Group[TraceAttributes]) -> IndexableTrace:
    arrays = _feature_arrays(trace)
    return IndexableTrace(
        number=number,
        path=trace.path,
        digest=digest_of(trace),
        features={name: int(trace.nodes[name]["shape"][-1]) for name in arrays},
        layers={name: _layers_with(trace, name) for name in arrays},
        positions=_positions(trace),
    )


def _positions(trace: Group[TraceAttributes]) -> tuple[int, ...] | None:
    """Return the token positions that a trace stores; None for all."""
    if "query" not in trace.nodes or trace.nodes["query"]["shape"] == trace.nodes["key"]["shape"]:
        return None
    return tuple(open_array(trace, "query").load().tolist())


def _feature_arrays(trace: Group[TraceAttributes]) -> list[str]:
    return sorted(name for name in trace.nodes if name.split("_")[0] == "features")


def _layers_with(trace: Group[TraceAttributes], name: str) -> tuple[int, ...]:
    """Return the layers of which an array of features holds values."""
    without = set(trace.attributes.layers_without_sae)
    ids = f"sae_id{name.removeprefix('features')}"
    if ids in trace.nodes:
        pairs = zip(trace.attributes.layers, open_array(trace, ids).load(), strict=True)
        without |= {layer for layer, sae in pairs if not sae}
    return tuple(layer for layer in trace.attributes.layers if layer not in without)


def digest_of(trace: Group[TraceAttributes]) -> int:
    """Return a number that stands for the features of a trace; never 0."""
    names = (*_feature_arrays(trace), *({"query"} & trace.checksums.keys()))
    content = {name: trace.checksums[name] for name in names}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) or 1


def read_features(trace: IndexableTrace, array: str, layer: int) -> np.ndarray | None:
    """Read the activations ``(query, feature)`` of one layer; None if the trace has none.

    Raises
    ------
    IntegrityError
        If files are gone, cut short or damaged.
    """
    if layer not in trace.layers.get(array, ()):
        return None
    found = read_trace(trace.path)
    at = found.attributes.layers.index(layer)
    return open_array(found, array).read((at, slice(None), slice(None)))


def read_token_texts(trace: Location) -> list[str]:
    """Read the texts of a trace's tokens.

    Raises
    ------
    IntegrityError
        If they are gone or damaged.
    """
    found = read_trace(trace)
    if "key_token" not in found.nodes:
        raise IntegrityError(f"{trace}: has no 'key_token'", remedy=REPAIR)
    return [str(text) for text in open_array(found, "key_token").load()]


# --- reading the index -------------------------------------------------------------------------


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

    def __init__(self, run: Address) -> None:
        self.path = locate(run) / INDEX
        if not (self.path / "zarr.json").is_file():
            read_run(run)  # says what is wrong if it is no run
            raise StoreError(
                f"{run}: has no index of its features",
                why="Extraction does not make one.",
                remedy=f"Run 'zarrtrace index {run}' once; later calls add what is new.",
            )
        self._group = read_index_group(self.path)
        self.attributes = self._group.attributes

    def read(self, array: str, *key: int | slice) -> Any:
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


def stale_scenarios(run: Location, names: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """Name scenarios whose features are not those of the index, and what to do."""
    index = RunIndex(run)
    if [str(name) for name in index.read("scenario", slice(None))] != list(names):
        yield None, "is of other scenarios: 'zarrtrace index' again"
        return
    for name, digest in zip(names, index.read("digest", slice(None)).tolist(), strict=True):
        try:
            is_same = digest in (0, digest_of(read_trace(run / name)))
        except StoreError:
            continue  # said of the trace itself
        if not is_same:
            yield name, "has changed since: 'zarrtrace index' again"


# --- writing the index -------------------------------------------------------------------------


@contextlib.contextmanager
def locked(run: Address) -> Iterator[None]:
    """Hold a run's lock, for its index to be written; an interrupted replacement is ended first.

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

    def __init__(self, run: Address, layers: Sequence[int], features: Mapping[str, int]) -> None:
        self._run = locate(run).resolved()
        # Tasks on other machines write it, too: in an object store it stands beside the run.
        is_remote = self._run.path is None
        beside = self._run.with_name(f".{self._run.name}.zarrtrace-index")
        self.path = beside if is_remote else locate(staging_folder(self._run) / INDEX)
        self._layers, self._features = tuple(layers), dict(features)
        self._names = read_run(self._run).attributes.scenarios
        self.scenarios = len(self._names)
        self._layout = index_layout(len(layers), features, len(self._names))

    def __enter__(self) -> Self:
        with disk.explained(self._run):
            remove(self.path)
            if (folder := self.path.path) is not None:
                for name in self._layout:
                    (folder / name).mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        remove(self.path)
        if (folder := self.path.path) is not None:
            with contextlib.suppress(OSError):  # what else is staged stays
                folder.parent.rmdir()

    def finish(
        self, digests: Sequence[int], stored: Mapping[str, Mapping[str, Checksum]]
    ) -> IndexAttributes:
        """Put the index in its place.

        Parameters
        ----------
        digests
            Of each scenario of the run; 0 for those that are not in it.
        stored
            What :func:`write_index_layer` returned, by array.
        """
        values: dict[str, np.ndarray] = {
            "layer": np.asarray(self._layers, np.int64),
            "scenario": np.asarray(self._names, dtype=object),
            "digest": np.asarray(digests, np.uint64),
        }
        attributes = IndexAttributes(
            layers=self._layers,
            features=self._features,
            scenarios=len(self._names),
            indexed=sum(digest != 0 for digest in digests),
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
        Of the new index: :attr:`IndexWriter.path`.
    layers, features
        What the index holds.
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
