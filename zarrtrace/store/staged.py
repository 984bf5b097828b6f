"""A trace that is being written: files that grow chunk by chunk, and their journal.

It stands in a folder of its own, on a disk, until it is complete: ``RUN/.staged/NAME`` if the run
is on a disk, else in the system's folder of temporary files. Nothing there is a trace to readers.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import TraceAttributes, ranges
from zarrtrace.format.layout import STAGED, ArrayLayout
from zarrtrace.storage import Location, locate
from zarrtrace.storage.locks import FileLock
from zarrtrace.store.chunks import Checksum, FileIndex, index_entries
from zarrtrace.store.journal import Line, StoredParts, chunk_places, read_lines, replay
from zarrtrace.store.metadata import Group, check_nodes, parse_attributes
from zarrtrace.store.nodes import CHECKSUMS, NONSENSE
from zarrtrace.store.seal import coordinate_names
from zarrtrace.store.staged_files import StagedFiles, chunk_checksum, chunks_by_number


def staging_folder(run: Location) -> Path:
    """Return the folder on a disk in which traces of a run are written."""
    if (path := run.path) is not None:
        return path / STAGED
    digest = hashlib.blake2b(str(run).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"zarrtrace-{os.getuid()}" / digest


class StagedTrace(StagedFiles[TraceAttributes, StoredParts]):
    """The files of a trace before it is published; used by one thread at a time.

    Parameters
    ----------
    folder, attributes, layouts, settings
        As for :class:`StagedFiles`.
    expected
        The arrays of each layer; for None, those of next tokens.
    """

    def __init__(
        self,
        folder: Path,
        attributes: TraceAttributes,
        layouts: Mapping[str, ArrayLayout],
        expected: Mapping[int | None, Collection[str]],
        settings: str = "",
    ) -> None:
        self._expected = expected
        super().__init__(folder, attributes, layouts, settings)

    def _clear(self) -> None:
        super()._clear()
        # Length and CRC-32C of chunks that the journal does not name yet, by array.
        self._pending: dict[str, list[tuple[int, int]]] = {}

    def _nothing(self) -> StoredParts:
        return StoredParts()

    def _replay(self, lines: Iterator[Line]) -> list[Line]:
        return replay(
            lines, self._group, self.stored, expected=self._expected, is_there=self._is_there
        )

    def _found_while_writing(self) -> dict[str, Any]:
        nonfinite = {name: tuple(n) for name, n in sorted(self.stored.nonfinite.items())}
        return {"nonfinite": nonfinite}

    def append(self, name: str, layer: int | None, chunks: Sequence[bytes]) -> None:
        """Append the next chunks of an array to their files.

        Parameters
        ----------
        layer
            The layer that they belong to; None for next tokens.
        """
        known = self._pending.setdefault(name, [])
        places = chunk_places(self._group, name, layer, len(known))
        known += self._append_chunks(name, itertools.islice(places, len(chunks)), chunks)

    def end_layer(self, layer: int | None, nonfinite: Sequence[str]) -> None:
        """Enter a layer, or next tokens, in the journal, after all chunks of their arrays."""
        chunks = {name: self._pending[name] for name in self._expected[layer]}
        self._enter({"layer": layer, "chunks": chunks, "nonfinite": nonfinite})
        self.stored.end(layer, nonfinite)
        for name in chunks:
            del self._pending[name]


# --- reading -----------------------------------------------------------------------------------


def read_staged(
    path: Location,
) -> tuple[Group[TraceAttributes], tuple[int, ...], dict[str, dict[str, FileIndex]]] | None:
    """Read what there is of a trace that is not published: being written, or interrupted.

    Parameters
    ----------
    path
        Where the trace will be.

    Returns
    -------
    group
        Its metadata.
    missing
        Layers that it lacks.
    indexes
        Index of each file that grows, by array and key.
    """
    here = locate(staging_folder(path.parent) / path.name)
    lines = read_lines(Path(here))
    header: Line = next(lines, {})
    try:
        attributes = parse_attributes(here, header["attributes"], "trace")
        nodes = header["arrays"]
        labels = frozenset(coordinate_names(nodes).split())
        encodings = check_nodes(nodes, attributes, is_whole=False)
    except (*NONSENSE, IntegrityError):
        return None  # nor does a writer resume it: it begins again
    plain = dict(header["attributes"])
    group = Group(here, attributes, plain, labels, nodes, encodings)
    stored = StoredParts()
    replay(lines, group, stored)
    missing = attributes.layers[len(stored.layers) :]
    # Readers tell layers that are missing from NaN that the model computed.
    plain["missing_layers"] = ranges(missing)
    plain["nonfinite"] = {name: ranges(n) for name, n in sorted(stored.nonfinite.items())}
    indexes: dict[str, dict[str, FileIndex]] = {}
    for (name, key), chunks in stored.chunks.items():
        if encodings[name].is_sharded:
            entries, size = index_entries(encodings[name], chunks_by_number(chunks))
            crcs = dict(chunks[:, [0, 2]].tolist())
            indexes.setdefault(name, {})[key] = FileIndex(Checksum(size, ""), entries, crcs)
        else:
            nodes[name]["attributes"][CHECKSUMS][key] = chunk_checksum(*chunks[0, 1:].tolist())
    return group, missing, indexes


# --- several writers of one run ----------------------------------------------------------------


@contextlib.contextmanager
def only_writer(run: Location, scenarios: Iterable[str], *, seconds: float) -> Iterator[None]:
    """Hold the locks of some traces, for writers that are not the owner of the run's lock.

    A worker that a cluster has given up may be alive: its successor waits for it.

    Parameters
    ----------
    run, scenarios
        The traces; every writer must name them in the same order.
    seconds
        How long to wait for another writer.

    Raises
    ------
    LockedError
        If another process still writes one of them.
    """
    folder = staging_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for scenario in scenarios:
            lock = FileLock(folder / f"{scenario}.lock", run / scenario, seconds=seconds)
            stack.callback(lock.release)
        yield


def wait_for_writers(run: Location, *, seconds: float) -> None:
    """Wait until no worker of an earlier client writes a trace; for the owner of the run's lock.

    Raises
    ------
    LockedError
        If one still does after `seconds`.
    """
    for file in sorted(staging_folder(run).glob("*.lock")):
        FileLock(file, run / file.stem, seconds=seconds).release()
