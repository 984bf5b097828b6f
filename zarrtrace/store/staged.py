"""A trace that is being written: files that grow chunk by chunk, and their journal.

It stands in a folder of its own, on a disk, until it is complete: ``RUN/.staged/NAME`` if the run
is on a disk, else in the system's folder of temporary files. Nothing there is a trace to readers.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import ArrayLayout
from zarrtrace.identity import combined_versions
from zarrtrace.storage import Location, disk, locate
from zarrtrace.storage.locks import FileLock
from zarrtrace.store.chunks import (
    Checksum,
    FileIndex,
    encode_file,
    file_keys,
    index_entries,
    tail_of,
)
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding
from zarrtrace.store.journal import (
    JOURNAL,
    Line,
    StoredParts,
    by_file,
    chunk_places,
    encode_line,
    read_lines,
    replay,
)
from zarrtrace.store.metadata import (
    CHECKSUMS,
    NONSENSE,
    Group,
    array_metadata,
    check_nodes,
    encoded,
    labels_of,
    parse_attributes,
    sealed_group,
)

#: Name of the folder in a run in which traces are written.
STAGED = ".staged"


def staging_folder(run: Location) -> Path:
    """Return the folder on a disk in which traces of a run are written."""
    if (path := run.path) is not None:
        return path / STAGED
    digest = hashlib.blake2b(str(run).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"zarrtrace-{os.getuid()}" / digest


class StagedTrace:
    """The files of a trace before it is published; used by one thread at a time.

    Parameters
    ----------
    folder
        Where they are; :meth:`resume` or :meth:`create` makes it ready.
    attributes, layouts
        Attributes of the trace, and its arrays.
    expected
        The arrays of each layer; for None, those of next tokens.
    settings
        Hash of what else must be the same to resume it, where no run beside it says so.

    Attributes
    ----------
    stored
        The parts of it that are stored.
    encodings
        How its arrays are cut and encoded.
    """

    def __init__(
        self,
        folder: Path,
        attributes: TraceAttributes,
        layouts: Mapping[str, ArrayLayout],
        expected: Mapping[int | None, Collection[str]],
        settings: str = "",
    ) -> None:
        self.folder, self._expected, self._settings = folder, expected, settings
        self.encodings = {name: ArrayEncoding(layout) for name, layout in layouts.items()}
        nodes = {name: array_metadata(layout, {}) for name, layout in layouts.items()}
        self._trace = Group(locate(folder), attributes, {}, frozenset(), nodes, self.encodings)
        self._clear()

    def _clear(self) -> None:
        self.stored = StoredParts()
        # Length and CRC-32C of chunks that the journal does not name yet, by array.
        self._pending: dict[str, list[tuple[int, int]]] = {}
        self._versions: Mapping[str, str] = {}
        self._journal_bytes = 0

    # --- beginning -----------------------------------------------------------------------------

    def create(self, coordinates: Mapping[str, np.ndarray], versions: Mapping[str, str]) -> None:
        """Begin the trace: coordinates, then the first line of the journal.

        Parameters
        ----------
        coordinates
            Values by array.
        versions
            Libraries that made parts of it before, if it is repaired.
        """
        if not self.folder.is_symlink():
            # A folder without a journal is taken for complete: its metadata goes first.
            (self.folder / "zarr.json").unlink(missing_ok=True)
        disk.remove_folder(self.folder)
        self._clear()
        for name in self._trace.nodes:
            (self.folder / name).mkdir(parents=True)
        self._write_coordinates(coordinates)
        self._write_journal(versions, [])

    def resume(self, coordinates: Mapping[str, np.ndarray]) -> bool:
        """Continue what an earlier process left; False if there is nothing to continue.

        What follows the last line of the journal that holds is cut off. If other versions of
        libraries began the trace, both are named. Bytes of all chunks are compared with their
        checksums: after a loss of power, files may hold other bytes.

        Parameters
        ----------
        coordinates
            Values by array.
        """
        try:
            is_there = self._resume(coordinates)
        except (*NONSENSE, FileNotFoundError, IsADirectoryError, IntegrityError):
            is_there = False  # not what was written: to begin again loses nothing but time
        if not is_there:
            self._clear()
        return is_there

    def _resume(self, coordinates: Mapping[str, np.ndarray]) -> bool:
        lines = read_lines(self.folder)
        if (header := next(lines, None)) is None:
            return False
        if any(path.is_symlink() for path in self.folder.rglob("*")):
            return False  # what is appended must not go elsewhere
        self._write_coordinates(coordinates)
        versions = TraceAttributes.model_validate(header["attributes"]).versions
        if header != json.loads(json.dumps(self._header(versions))):
            return False
        kept = replay(
            lines, self._trace, self.stored, expected=self._expected, is_there=self._is_there
        )
        self._cut_files()
        self._write_journal(versions, kept)
        return True

    def _write_coordinates(self, coordinates: Mapping[str, np.ndarray]) -> None:
        for name, values in coordinates.items():
            checksums = self._trace.nodes[name]["attributes"][CHECKSUMS]
            for key in file_keys(self.encodings[name]):  # one, or none of an empty array
                content, checksums[key] = encode_file(self.encodings[name], values)
                disk.write_whole(self.folder / name / key, content)

    def _header(self, versions: Mapping[str, str]) -> Line:
        """Return the first line of the journal."""
        plain = self._trace.attributes.model_dump(mode="json", exclude={"seal", "nonfinite"})
        return {
            "attributes": {**plain, "versions": versions},
            "arrays": self._trace.nodes,
            "settings": self._settings,
        }

    def _write_journal(self, versions: Mapping[str, str], lines: Iterable[Line]) -> None:
        """Write the first line, which names today's libraries after those before, and others."""
        self._versions = combined_versions(versions, self._trace.attributes.versions)
        content = b"".join(map(encode_line, [self._header(self._versions), *lines]))
        disk.write_whole(self.folder / JOURNAL, content)
        self._journal_bytes = len(content)

    def _is_there(self, parts: StoredParts) -> bool:
        """Whether files hold the bytes that a line of the journal names."""
        for file, chunks in parts.chunks.items():
            start = self.stored.size(file)
            ends = list(itertools.accumulate(chunks[:, 1].tolist(), initial=start))
            try:
                path = str(self.folder.joinpath(*file))
                contents = disk.Disk().get_ranges(path, list(itertools.pairwise(ends)))
            except FileNotFoundError:
                return False
            for content, (_, length, crc) in zip(contents, chunks.tolist(), strict=True):
                crc_now = google_crc32c.value(content[:-CRC_BYTES])
                if _pair(content) != (length, crc) or crc_now != crc:
                    return False
        return True

    def _cut_files(self) -> None:
        """Cut off what was written after the last line of the journal that holds."""
        for path in self.folder.iterdir():
            if path.name not in self._trace.nodes and path.name != JOURNAL:
                path.unlink()
        for name, node in self._trace.nodes.items():
            for file in (self.folder / name).iterdir():
                if size := self.stored.size((name, file.name)):
                    os.truncate(file, size)
                elif file.name not in node["attributes"][CHECKSUMS]:
                    file.unlink()

    # --- adding --------------------------------------------------------------------------------

    def append(self, name: str, layer: int | None, chunks: Sequence[bytes]) -> None:
        """Append the next chunks of an array to their files.

        Parameters
        ----------
        layer
            The layer that they belong to; None for next tokens.
        """
        known, added = self._pending.setdefault(name, []), list(map(_pair, chunks))
        places = itertools.islice(chunk_places(self._trace, name, layer, len(known)), len(added))
        parts, rest = StoredParts(chunks=by_file(name, places, added)), iter(chunks)
        for file, of_file in parts.chunks.items():
            contents = list(itertools.islice(rest, len(of_file)))
            disk.append(self.folder.joinpath(*file), contents, self.stored.size(file))
        self.stored.add(parts)
        known += added

    def end_layer(self, layer: int | None, nonfinite: Sequence[str]) -> None:
        """Enter a layer, or next tokens, in the journal, after all chunks of their arrays."""
        chunks = {name: self._pending[name] for name in self._expected[layer]}
        content = encode_line({"layer": layer, "chunks": chunks, "nonfinite": nonfinite})
        disk.append(self.folder / JOURNAL, [content], self._journal_bytes)
        self._journal_bytes += len(content)
        self.stored.end(layer, nonfinite)
        for name in chunks:
            del self._pending[name]

    # --- completing ----------------------------------------------------------------------------

    def complete(self) -> None:
        """Write the indexes of files, and all metadata; the trace is ready to be published."""
        nodes = dict(sorted(self._trace.nodes.items()))
        for (name, key), chunks in self.stored.chunks.items():
            if self.encodings[name].is_sharded:
                tail, checksum = tail_of(self.encodings[name], _by_number(chunks))
                disk.append(self.folder / name / key, [tail], self.stored.size((name, key)))
            else:
                checksum = _checksum(*chunks[0, 1:].tolist())
            nodes[name]["attributes"][CHECKSUMS][key] = checksum
        for name, node in nodes.items():
            checksums = node["attributes"][CHECKSUMS]
            node["attributes"][CHECKSUMS] = dict(sorted(checksums.items()))
            disk.write_whole(self.folder / name / "zarr.json", encoded(node))
        nonfinite = {name: tuple(n) for name, n in sorted(self.stored.nonfinite.items())}
        update = {"nonfinite": nonfinite, "versions": self._versions}
        attributes = self._trace.attributes.model_copy(update=update)
        disk.write_whole(self.folder / "zarr.json", sealed_group(attributes, nodes))

    def end(self) -> None:
        """Remove the journal: the trace is complete, and the disk holds it."""
        (self.folder / JOURNAL).unlink()


def _pair(chunk: bytes) -> tuple[int, int]:
    """Return length and CRC-32C of a chunk."""
    return len(chunk), int.from_bytes(chunk[-CRC_BYTES:], "little")


def _checksum(length: int, crc: int) -> Checksum:
    """Return the checksum of a file of one chunk."""
    return Checksum(length, f"{crc:08x}")


def _by_number(chunks: np.ndarray) -> dict[int, tuple[int, int]]:
    """Return length and CRC-32C of chunks by their number in the file."""
    return {number: (length, crc) for number, length, crc in chunks.tolist()}


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
        labels = frozenset(labels_of(nodes).split())
        encodings = check_nodes(nodes, attributes, is_whole=False)
    except (*NONSENSE, IntegrityError):
        return None  # nor does a writer resume it: it begins again
    group = Group(here, attributes, header["attributes"], labels, nodes, encodings)
    stored = StoredParts()
    replay(lines, group, stored)
    indexes: dict[str, dict[str, FileIndex]] = {}
    for (name, key), chunks in stored.chunks.items():
        if encodings[name].is_sharded:
            entries, size = index_entries(encodings[name], _by_number(chunks))
            crcs = dict(chunks[:, [0, 2]].tolist())
            indexes.setdefault(name, {})[key] = FileIndex(Checksum(size, ""), entries, crcs)
        else:
            nodes[name]["attributes"][CHECKSUMS][key] = _checksum(*chunks[0, 1:].tolist())
    return group, attributes.layers[len(stored.layers) :], indexes


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
        If one still does after so many seconds.
    """
    for file in sorted(staging_folder(run).glob("*.lock")):
        FileLock(file, run / file.stem, seconds=seconds).release()
