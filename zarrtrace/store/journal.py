"""The journal of a trace that is being written, and the parts of the trace that it names.

A line is the CRC-32C of its JSON in hexadecimal digits, a blank, the JSON, and a line feed. The
first line holds the trace's metadata. The first line that does not hold ends the journal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import NEXT_TOKEN, ROWS
from zarrtrace.storage import disk
from zarrtrace.store.chunks import Checksum, LayerGrid, file_keys
from zarrtrace.store.codecs import CRC_BYTES
from zarrtrace.store.metadata import NONSENSE, Group, parse_checksums

#: Name of the file, beside the arrays of the trace.
JOURNAL = "journal"

Line = dict[str, Any]
#: A file of a trace: its array and its key.
FileId = tuple[str, str]
#: Checksums of files, by array and key.
Files = dict[str, dict[str, Checksum]]


@dataclass
class StoredParts:
    """Parts of a trace that are stored.

    Attributes
    ----------
    layers
        Layers of which all is stored, in order.
    chunks
        Number in its file, length and CRC-32C of each chunk ``(chunk, 3)``, by file.
    files
        Checksums of the files of arrays without layers, by array and key.
    nonfinite
        Layers by array in which the model computed NaN or infinity.
    """

    layers: list[int] = field(default_factory=list)
    chunks: dict[FileId, np.ndarray] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    nonfinite: dict[str, list[int]] = field(default_factory=dict)

    @property
    def has_tokens(self) -> bool:
        """Whether the next-token arrays are stored."""
        return not self.files.keys().isdisjoint(NEXT_TOKEN)

    def size(self, file: FileId) -> int:
        """Return how many bytes the chunks of a file have."""
        return int(self.chunks[file][:, 1].sum(dtype=np.int64)) if file in self.chunks else 0

    def add(self, others: StoredParts) -> None:
        """Add parts that are stored behind these."""
        self.layers += others.layers
        for file, chunks in others.chunks.items():
            known = self.chunks.get(file)
            self.chunks[file] = chunks if known is None else np.concatenate([known, chunks])
        self.files |= others.files
        for name, layers in others.nonfinite.items():
            self.nonfinite.setdefault(name, []).extend(layers)


def chunk_places(
    trace: Group[TraceAttributes], name: str, layer: int, first: int = 0
) -> Iterator[tuple[str, int]]:
    """Return key of the file and number in it of each chunk of a layer, from the first on.

    Raises
    ------
    ValueError
        If the array has no such layer.
    """
    dims = trace.nodes[name]["dimension_names"]
    if not trace.encodings[name].is_sharded or {*dims}.isdisjoint(ROWS):
        raise ValueError(f"{name!r} has no layers")
    grid = LayerGrid(dims, trace.encodings[name])
    place = trace.attributes.layers_of(dims[0]).index(layer)
    return (grid.file_of(place, number) for number in range(first, grid.count))


# --- lines -------------------------------------------------------------------------------------


def parse_line(
    line: Line,
    trace: Group[TraceAttributes],
    stored: StoredParts,
    expected: Mapping[int, Collection[str]] | None = None,
) -> StoredParts | None:
    """Return the parts that a line names; None if no such line was written.

    Parameters
    ----------
    line
        A line of the journal behind the first.
    trace
        The trace, as the first line describes it.
    stored
        The parts that the lines before it name.
    expected
        The arrays that each layer has; None if only the journal says that.
    """
    try:
        if "layer" in line:
            return _parse_layer(line, trace, stored, expected)
        return _parse_tokens(line, trace, stored)
    except NONSENSE:
        return None


def _parse_layer(
    line: Line,
    trace: Group[TraceAttributes],
    stored: StoredParts,
    expected: Mapping[int, Collection[str]] | None,
) -> StoredParts:
    layer, by_array = line["layer"], line["chunks"]
    # Chunks stand in the order of layers: no other layer can have come next.
    if type(layer) is not int or layer != trace.attributes.layers[len(stored.layers)]:
        raise ValueError(f"layer {layer!r}")
    if expected is not None and by_array.keys() != {*expected[layer]}:
        raise ValueError(f"arrays {sorted(by_array)}")
    found = StoredParts([layer], nonfinite=_nonfinite(line, by_array, [layer]))
    for name, chunks in by_array.items():
        for length, crc in chunks:
            if type(length) is not int or type(crc) is not int:
                raise TypeError(f"chunk {length!r}, {crc!r}")
            if not CRC_BYTES < length < 2**32 or not 0 <= crc < 2**32:
                raise ValueError(f"chunk {length}, {crc}")
        found.chunks |= by_file(name, chunk_places(trace, name, layer), chunks)
    return found


def _parse_tokens(line: Line, trace: Group[TraceAttributes], stored: StoredParts) -> StoredParts:
    files = {name: parse_checksums(of_array) for name, of_array in line["files"].items()}
    known = {
        name: file_keys(trace.encodings[name]) for name in NEXT_TOKEN if name in trace.encodings
    }
    if stored.has_tokens or {name: list(of_array) for name, of_array in files.items()} != known:
        raise ValueError(f"files {files}")
    return StoredParts(files=files, nonfinite=_nonfinite(line, files, []))


def _nonfinite(line: Line, names: Collection[str], layers: list[int]) -> dict[str, list[int]]:
    if not set(line["nonfinite"]) <= set(names):
        raise ValueError(f"nonfinite {line['nonfinite']}")
    return {name: list(layers) for name in line["nonfinite"]}


def by_file(
    name: str, places: Iterable[tuple[str, int]], chunks: Iterable[tuple[int, int]]
) -> dict[FileId, np.ndarray]:
    """Sort chunks of an array by their files, as :class:`StoredParts` has them.

    Parameters
    ----------
    places, chunks
        Of each chunk, key of the file and number in it, and length and CRC-32C.
    """
    found: dict[FileId, list[tuple[int, int, int]]] = {}
    for (key, number), (length, crc) in zip(places, chunks, strict=True):
        found.setdefault((name, key), []).append((number, length, crc))
    return {file: np.array(of_file, np.uint32) for file, of_file in found.items()}


def encode_line(line: Mapping[str, Any]) -> bytes:
    """Return the bytes of a line."""
    content = json.dumps(line, separators=(",", ":")).encode()
    return b"%08x %s\n" % (google_crc32c.value(content), content)


def read_lines(folder: Path) -> Iterator[Line]:
    """Yield the lines of the journal in a folder that hold."""
    try:
        content = disk.Disk().get(str(folder / JOURNAL)).data
    except (FileNotFoundError, IntegrityError):  # none, or no regular file
        return
    *lines, _ = content.split(b"\n")  # behind the last line feed, half a line may be
    for line in lines:
        crc, _, text = line.partition(b" ")
        if crc != b"%08x" % google_crc32c.value(text):
            return
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(parsed, dict):
            return
        yield parsed
