"""Files of a group that is being written: they grow chunk by chunk beside a journal."""

from __future__ import annotations

import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import google_crc32c
import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import ArrayLayout
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.identity import combined_versions
from zarrtrace.storage import disk, locate
from zarrtrace.store.chunks import Checksum, label_files, tail_of
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding
from zarrtrace.store.journal import (
    JOURNAL,
    FileId,
    Line,
    StoredChunks,
    by_file,
    encode_line,
    read_lines,
)
from zarrtrace.store.metadata import Group
from zarrtrace.store.nodes import CHECKSUMS, NONSENSE, array_metadata, encoded
from zarrtrace.store.seal import sealed_group

_Attributes = TypeVar("_Attributes", TableAttributes, TraceAttributes)
_Stored = TypeVar("_Stored", bound=StoredChunks)


class StagedFiles(ABC, Generic[_Attributes, _Stored]):
    """The files of a trace or a table before it is published.

    Parameters
    ----------
    folder
        Where they are; :meth:`resume` or :meth:`create` makes it ready.
    attributes, layouts
        Attributes of the group, and its arrays.
    settings
        Hash of all else that must be equal to resume it, where nothing else records that.

    Attributes
    ----------
    stored
        The parts of it that are stored.
    encodings
        How its arrays are cut and encoded.
    """

    stored: _Stored

    def __init__(
        self,
        folder: Path,
        attributes: _Attributes,
        layouts: Mapping[str, ArrayLayout],
        settings: str = "",
    ) -> None:
        self.folder, self._settings = folder, settings
        self.encodings = {name: ArrayEncoding(layout) for name, layout in layouts.items()}
        nodes = {name: array_metadata(layout, {}) for name, layout in layouts.items()}
        self._group: Group[_Attributes] = Group(
            locate(folder), attributes, {}, frozenset(), nodes, self.encodings
        )
        self._clear()

    def _clear(self) -> None:
        self.stored = self._nothing()
        self._versions: Mapping[str, str] = {}
        self._journal_bytes = 0

    @abstractmethod
    def _nothing(self) -> _Stored:
        """Return what is stored at the beginning."""

    @abstractmethod
    def _replay(self, lines: Iterator[Line]) -> list[Line]:
        """Add what lines of the journal name, and return those that hold."""

    @abstractmethod
    def _found_while_writing(self) -> dict[str, Any]:
        """Return the attributes that are known when all is stored."""

    # --- beginning -----------------------------------------------------------------------------

    def create(self, coordinates: Mapping[str, np.ndarray], versions: Mapping[str, str]) -> None:
        """Begin: coordinates, then the first line of the journal.

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
        self.folder.mkdir(parents=True)
        (self.folder / JOURNAL).touch()  # tells from now on whose folder it is
        for name in self._group.nodes:
            (self.folder / name).mkdir()
        self._write_coordinates(coordinates)
        self._write_journal(versions, [])

    def resume(self, coordinates: Mapping[str, np.ndarray]) -> bool:
        """Continue what an earlier process left; False if there is nothing to continue.

        Bytes behind the last valid line of the journal are cut off. If other versions of
        libraries began it, both are named. Bytes of all chunks are compared with their
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
        attributes = type(self._group.attributes).model_validate(header["attributes"])
        versions = attributes.versions
        if self._compared(header) != self._compared(json.loads(json.dumps(self._header(versions)))):
            return False
        kept = self._replay(lines)
        self._cut_files()
        self._write_journal(versions, kept)
        return True

    def _compared(self, header: Line) -> Line:
        """Return what of a first line must be the same to resume."""
        return header

    def _write_coordinates(self, coordinates: Mapping[str, np.ndarray]) -> None:
        for name, values in coordinates.items():
            checksums = self._group.nodes[name]["attributes"][CHECKSUMS]
            for key, content, checksum in label_files(self.encodings[name], values):
                disk.write_whole(self.folder / name / key, content)
                checksums[key] = checksum

    def _header(self, versions: Mapping[str, str]) -> Line:
        """Return the first line of the journal."""
        found_later = {"seal", *self._found_while_writing()}
        plain = self._group.attributes.model_dump(mode="json", exclude=found_later)
        return {
            "attributes": {**plain, "versions": versions},
            "arrays": self._group.nodes,
            "settings": self._settings,
        }

    def _write_journal(self, versions: Mapping[str, str], lines: Iterable[Line]) -> None:
        """Write the first line, which names today's libraries after those before, and others."""
        self._versions = combined_versions(versions, self._group.attributes.versions)
        content = b"".join(map(encode_line, [self._header(self._versions), *lines]))
        disk.write_whole(self.folder / JOURNAL, content)
        self._journal_bytes = len(content)

    def _is_there(self, parts: StoredChunks) -> bool:
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
                if length_and_crc(content) != (length, crc) or crc_now != crc:
                    return False
        return True

    def _cut_files(self) -> None:
        """Cut off what was written after the last line of the journal that holds."""
        for path in self.folder.iterdir():
            if path.name not in self._group.nodes and path.name != JOURNAL:
                path.unlink()
        for name, node in self._group.nodes.items():
            for file in (self.folder / name).iterdir():
                if size := self.stored.size((name, file.name)):
                    os.truncate(file, size)
                elif file.name not in node["attributes"][CHECKSUMS]:
                    file.unlink()

    # --- adding --------------------------------------------------------------------------------

    def _append_chunks(
        self, name: str, places: Iterable[tuple[str, int]], chunks: Sequence[bytes]
    ) -> list[tuple[int, int]]:
        """Append chunks of an array to their files; returns their lengths and CRC-32Cs.

        Parameters
        ----------
        places
            Key of the file and number in it of each chunk.
        """
        added, rest = list(map(length_and_crc, chunks)), iter(chunks)
        parts: dict[FileId, np.ndarray] = by_file(name, places, added)
        for file, of_file in parts.items():
            contents = list(itertools.islice(rest, len(of_file)))
            disk.append(self.folder.joinpath(*file), contents, self.stored.size(file))
        self.stored.add_chunks(parts)
        return added

    def _enter(self, line: Line) -> None:
        """Add a line to the journal."""
        content = encode_line(line)
        disk.append(self.folder / JOURNAL, [content], self._journal_bytes)
        self._journal_bytes += len(content)

    # --- completing ----------------------------------------------------------------------------

    def complete(self) -> None:
        """Write the indexes of files, and all metadata; it is ready to be published."""
        nodes = dict(sorted(self._group.nodes.items()))
        for (name, key), chunks in self.stored.chunks.items():
            if self.encodings[name].is_sharded:
                tail, checksum = tail_of(self.encodings[name], chunks_by_number(chunks))
                disk.append(self.folder / name / key, [tail], self.stored.size((name, key)))
            else:
                checksum = chunk_checksum(*chunks[0, 1:].tolist())
            nodes[name]["attributes"][CHECKSUMS][key] = checksum
        for name, node in nodes.items():
            checksums = node["attributes"][CHECKSUMS]
            node["attributes"][CHECKSUMS] = dict(sorted(checksums.items()))
            disk.write_whole(self.folder / name / "zarr.json", encoded(node))
        update = {**self._found_while_writing(), "versions": self._versions}
        attributes = self._group.attributes.model_copy(update=update)
        disk.write_whole(self.folder / "zarr.json", sealed_group(attributes, nodes))

    def end(self) -> None:
        """Remove the journal: all is complete, and the disk holds it."""
        (self.folder / JOURNAL).unlink()


def length_and_crc(chunk: bytes) -> tuple[int, int]:
    """Return length and CRC-32C of a chunk."""
    return len(chunk), int.from_bytes(chunk[-CRC_BYTES:], "little")


def chunk_checksum(length: int, crc: int) -> Checksum:
    """Return the checksum of a file of one chunk."""
    return Checksum(length, f"{crc:08x}")


def chunks_by_number(chunks: np.ndarray) -> dict[int, tuple[int, int]]:
    """Return length and CRC-32C of chunks by their number in the file."""
    return {number: (length, crc) for number, length, crc in chunks.tolist()}
