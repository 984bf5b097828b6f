"""A trace that is being written: files that grow chunk by chunk, and their journal.

It stands in a folder of its own, on a disk, until it is complete: ``RUN/.staged/NAME`` if the run
is on a disk, else in the system's folder of temporary files. Nothing there is a trace to readers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import ArrayLayout
from zarrtrace.identity import combined_versions
from zarrtrace.storage import Location, disk
from zarrtrace.storage.locks import FileLock
from zarrtrace.store.chunks import (
    Checksum,
    LayerGrid,
    crc_of,
    encode_file,
    file_key,
    tail_of,
)
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding
from zarrtrace.store.journal import (
    JOURNAL,
    Line,
    StoredLayer,
    StoredTokens,
    append_line,
    cut_journal,
    read_lines,
    stored_layer,
    stored_tokens,
    stored_versions,
)
from zarrtrace.store.metadata import NONSENSE, Nodes, array_metadata, encoded, sealed_group

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
    attributes
        The attributes that the trace will have.
    layouts
        Its arrays.
    settings
        Hash of what else must be the same to resume it, where no run beside it says so.

    Attributes
    ----------
    layers
        Layers that are stored, in order.
    has_tokens
        Whether the next-token arrays are stored.
    """

    def __init__(
        self,
        folder: Path,
        attributes: TraceAttributes,
        layouts: Mapping[str, ArrayLayout],
        settings: str = "",
    ) -> None:
        self.folder, self._attributes, self._layouts = folder, attributes, layouts
        self._settings = settings
        self.encodings = {name: ArrayEncoding(layout) for name, layout in layouts.items()}
        self.grids = {
            name: LayerGrid(layout.dims, self.encodings[name])
            for name, layout in layouts.items()
            if layout.has_layers
        }
        self._clear()

    def _clear(self) -> None:
        self.layers: list[int] = []
        self.has_tokens = False
        # Length and CRC-32C of each chunk of a layer, by array and the layer's place in it.
        self._chunks: dict[tuple[str, int], np.ndarray] = {}
        # Bytes of files that grow, and checksums of those written at once; by array and key.
        self._sizes: dict[tuple[str, str], int] = {}
        self._whole: dict[str, dict[str, Checksum]] = {}
        self._nonfinite: dict[str, list[int]] = {}

    # --- beginning -----------------------------------------------------------------------------

    def _header(self) -> Line:
        plain = self._attributes.model_dump(mode="json", exclude={"seal", "nonfinite"})
        nodes = {name: array_metadata(layout) for name, layout in self._layouts.items()}
        return {"attributes": plain, "arrays": nodes, "settings": self._settings}

    def create(
        self, coordinates: Mapping[str, np.ndarray], versions: Mapping[str, str] | None = None
    ) -> None:
        """Begin the trace: coordinates, then the first line of the journal.

        Parameters
        ----------
        coordinates
            Values by array.
        versions
            Libraries that made parts of it before, if it is repaired.
        """
        combined = combined_versions(versions or {}, self._attributes.versions)
        self._attributes = self._attributes.model_copy(update={"versions": combined})
        disk.remove_folder(self.folder)
        self._clear()
        self.folder.mkdir(parents=True)
        for name in self._layouts:
            (self.folder / name).mkdir()
        for name, values in coordinates.items():
            self._write_whole(name, values)
        append_line(self.folder, {**self._header(), "files": self._recorded(coordinates)})

    def resume(
        self, coordinates: Mapping[str, np.ndarray], expected: Mapping[int, Iterable[str]]
    ) -> bool:
        """Continue what an earlier process left; False if there is nothing to continue.

        What follows the last line of the journal that holds is cut off. If other versions of
        libraries began the trace, both are named. Bytes of all chunks are compared with their
        checksums: after a loss of power, files may hold other bytes.

        Parameters
        ----------
        coordinates
            Values of coordinates.
        expected
            The arrays that each layer has.
        """
        self._clear()
        try:
            is_there = self._resume(coordinates, expected)
        except (*NONSENSE, FileNotFoundError, IsADirectoryError, IntegrityError):
            is_there = False  # not what was written: to begin anew loses nothing but time
        if not is_there:
            self._clear()
        return is_there

    def _resume(
        self, coordinates: Mapping[str, np.ndarray], expected: Mapping[int, Iterable[str]]
    ) -> bool:
        if any(path.is_symlink() for path in self.folder.rglob("*")):
            return False  # what is appended must not go elsewhere
        lines = read_lines(self.folder)
        header, end = next(lines, ({}, 0))
        files, wanted = header.pop("files", None), json.loads(json.dumps(self._header()))
        now = wanted["attributes"].pop("versions")
        known = stored_versions(header.get("attributes", {}).pop("versions", {}))
        if wanted != header or not isinstance(files, dict):
            return False
        for name, values in coordinates.items():
            content, checksum = encode_file(self.encodings[name], values)
            if files.get(name) != {"c.0": list(checksum)} or self._read(name, "c.0") != content:
                return False
            self._whole[name] = {"c.0": checksum}
        for line, behind in lines:
            if not self._holds(line, expected):
                break
            known, end = line.get("versions", known), behind
        cut_journal(self.folder, end)
        self._cut_files()
        versions = combined_versions(known, now)
        self._attributes = self._attributes.model_copy(update={"versions": versions})
        if versions != known:
            append_line(self.folder, {"versions": versions})
        return True

    def _read(self, name: str, key: str) -> bytes:
        try:
            return disk.Disk().get(str(self.folder / name / key)).data
        except FileNotFoundError:
            return b""

    def _holds(self, line: Line, expected: Mapping[int, Iterable[str]]) -> bool:
        """Take a line of the journal, if its bytes are there."""
        try:
            if "versions" in line:
                return bool(stored_versions(line["versions"]))
            if "layer" not in line:
                return self._tokens_hold(stored_tokens(line, self.encodings))
            return self._layer_holds(stored_layer(line, self.grids), expected)
        except NONSENSE:
            return False

    def _tokens_hold(self, found: StoredTokens) -> bool:
        if self.has_tokens or any(
            not _is_written(self._read(name, key), one)
            for name, files in found.files.items()
            for key, one in files.items()
        ):
            return False
        self._whole |= found.files
        self.has_tokens = True
        self._note_nonfinite(found.nonfinite, None)
        return True

    def _layer_holds(self, found: StoredLayer, expected: Mapping[int, Iterable[str]]) -> bool:
        # Chunks stand in the order of layers: no other layer can have come next.
        if [*self.layers, found.layer] != [*self._attributes.layers[: len(self.layers) + 1]]:
            return False
        if set(found.chunks) != set(expected[found.layer]):
            return False
        before = dict(self._sizes)
        for name, pairs in found.chunks.items():
            if not self._chunks_hold(name, self._place(name, found.layer), pairs):
                self._sizes = before
                return False
        for name, pairs in found.chunks.items():
            self._chunks[name, self._place(name, found.layer)] = np.array(pairs, np.uint32)
        self.layers.append(found.layer)
        self._note_nonfinite(found.nonfinite, found.layer)
        return True

    def _chunks_hold(self, name: str, layer: int, pairs: Sequence[tuple[int, int]]) -> bool:
        by_file: dict[str, list[tuple[int, int]]] = {}
        for number, pair in enumerate(pairs):
            by_file.setdefault(self.grids[name].file_of(layer, number)[0], []).append(pair)
        for key, found in by_file.items():
            start = self._sizes.get((name, key), 0)
            ranges = []
            for length, _ in found:
                ranges.append((start, start + length))
                start += length
            try:
                contents = disk.Disk().get_ranges(str(self.folder / name / key), ranges)
            except FileNotFoundError:
                return False
            for content, (length, crc) in zip(contents, found, strict=True):
                end = crc.to_bytes(CRC_BYTES, "little")
                if len(content) != length or content[-CRC_BYTES:] != end:
                    return False
                if google_crc32c.value(content[:-CRC_BYTES]) != crc:
                    return False
            self._sizes[name, key] = start
        return True

    def _cut_files(self) -> None:
        """Cut off what was written after the last line of the journal."""
        for file in self.folder.iterdir():
            if file.name not in self._layouts and file.name != JOURNAL:
                file.unlink()
        for name in self._layouts:
            for file in (self.folder / name).iterdir():
                if name in self._whole:
                    if file.name not in self._whole[name]:
                        file.unlink()
                elif size := self._sizes.get((name, file.name)):
                    with file.open("rb+") as stream:
                        stream.truncate(size)
                else:
                    file.unlink()

    # --- adding --------------------------------------------------------------------------------

    def _place(self, name: str, layer: int) -> int:
        """Return the place of a layer along an array's first dimension."""
        return self._attributes.layers_of(self._layouts[name].dims[0]).index(layer)

    def append(self, name: str, layer: int, chunks: Sequence[bytes]) -> None:
        """Append the next chunks of a layer to their files."""
        place, grid = self._place(name, layer), self.grids[name]
        known = self._chunks.get((name, place), np.empty((0, 2), np.uint32))
        by_file: dict[str, list[bytes]] = {}
        for number, chunk in enumerate(chunks, len(known)):
            by_file.setdefault(grid.file_of(place, number)[0], []).append(chunk)
        sizes = {}
        for key, parts in by_file.items():
            size = self._sizes.get((name, key), 0)
            disk.append(self.folder / name / key, parts, size)
            sizes[name, key] = size + sum(map(len, parts))
        self._sizes |= sizes
        pairs = [(len(one), int.from_bytes(one[-CRC_BYTES:], "little")) for one in chunks]
        self._chunks[name, place] = np.concatenate([known, np.array(pairs, np.uint32)])

    def end_layer(self, layer: int, names: Sequence[str], nonfinite: Sequence[str]) -> None:
        """Enter a layer in the journal, after all chunks of its arrays."""
        chunks = {name: self._chunks[name, self._place(name, layer)].tolist() for name in names}
        line = {"layer": layer, "chunks": chunks, "nonfinite": list(nonfinite)}
        append_line(self.folder, line)
        self.layers.append(layer)
        self._note_nonfinite(nonfinite, layer)

    def add_tokens(self, values: Mapping[str, np.ndarray], nonfinite: Sequence[str]) -> None:
        """Write the next-token arrays, and enter them in the journal."""
        for name, value in values.items():
            self._write_whole(name, value)
        line = {"files": self._recorded(values), "nonfinite": list(nonfinite)}
        append_line(self.folder, line)
        self.has_tokens = True
        self._note_nonfinite(nonfinite, None)

    def _note_nonfinite(self, names: Sequence[str], layer: int | None) -> None:
        for name in names:
            self._nonfinite.setdefault(name, []).extend([] if layer is None else [layer])

    def _write_whole(self, name: str, values: np.ndarray) -> None:
        """Write all files of an array that has no layers."""
        step = self._layouts[name].chunks[0]
        self._whole[name] = {}
        for number, start in enumerate(range(0, len(values), step)):
            content, checksum = encode_file(self.encodings[name], values[start : start + step])
            key = file_key([number, *[0] * (values.ndim - 1)])
            disk.write_whole(self.folder / name / key, content)
            self._whole[name][key] = checksum

    def _recorded(self, names: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
        return {n: {k: list(c) for k, c in self._whole[n].items()} for n in names}

    # --- completing ----------------------------------------------------------------------------

    def _stored_chunks(self) -> list[tuple[str, str, dict[int, tuple[int, int]]]]:
        """Return length and CRC-32C of the chunks of each file that grows, in their order."""
        found: dict[tuple[str, str], dict[int, tuple[int, int]]] = {}
        for (name, place), pairs in sorted(self._chunks.items()):
            for number, (length, crc) in enumerate(pairs.tolist()):
                key, inside = self.grids[name].file_of(place, number)
                found.setdefault((name, key), {})[inside] = length, crc
        return [(name, key, stored) for (name, key), stored in found.items()]

    def complete(self) -> None:
        """Write the indexes of files, and all metadata; the trace is ready to be published."""
        checksums = {name: dict(self._whole.get(name, {})) for name in self._layouts}
        for name, key, stored in self._stored_chunks():
            tail, checksums[name][key] = tail_of(self.encodings[name], stored)
            disk.append(self.folder / name / key, [tail], self._sizes[name, key])
        nodes: Nodes = {}
        for name, layout in sorted(self._layouts.items()):
            nodes[name] = array_metadata(layout, checksums[name])
            disk.write_whole(self.folder / name / "zarr.json", encoded(nodes[name]))
        order = {layer: at for at, layer in enumerate(self._attributes.layers)}
        nonfinite = {
            name: tuple(sorted(layers, key=order.__getitem__))
            for name, layers in sorted(self._nonfinite.items())
        }
        attributes = self._attributes.model_copy(update={"nonfinite": nonfinite})
        disk.write_whole(self.folder / "zarr.json", sealed_group(attributes, nodes))

    def end(self) -> None:
        """Remove the journal: the trace is complete, and the disk holds it."""
        (self.folder / JOURNAL).unlink()


def _is_written(content: bytes, checksum: Checksum) -> bool:
    """Whether a file of one chunk is the one that was written."""
    crc = f"{google_crc32c.value(content[:-CRC_BYTES]):08x}"
    return (len(content), crc, crc_of(content)) == (*checksum, checksum.checksum)


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
