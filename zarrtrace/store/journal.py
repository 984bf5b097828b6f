"""The journal of a trace or table that is being written, and the parts that it names.

A line is the CRC-32C of its JSON in hexadecimal digits, a blank, the JSON, and a line feed. The
first line holds the metadata. The first line that does not hold ends the journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import NEXT_TOKEN, ROWS
from zarrtrace.storage import disk
from zarrtrace.store.chunks import LayerGrid, file_keys
from zarrtrace.store.codecs import CRC_BYTES
from zarrtrace.store.metadata import Group
from zarrtrace.store.nodes import NONSENSE

_Stored = TypeVar("_Stored", bound="StoredChunks")
#: Name of the file, beside the arrays.
JOURNAL = "journal"

Line = dict[str, Any]
#: A file: its array and its key.
FileId = tuple[str, str]


@dataclass
class StoredChunks:
    """Chunks that are stored.

    Attributes
    ----------
    chunks
        Number in its file, length and CRC-32C of each chunk ``(chunk, 3)``, by file; but for
        coordinates, which are stored before all others.
    """

    chunks: dict[FileId, np.ndarray] = field(default_factory=dict)

    def size(self, file: FileId) -> int:
        """Return how many bytes the chunks of a file have."""
        return int(self.chunks[file][:, 1].sum(dtype=np.int64)) if file in self.chunks else 0

    def add_chunks(self, others: Mapping[FileId, np.ndarray]) -> None:
        """Add chunks that are stored behind these."""
        for file, chunks in others.items():
            known = self.chunks.get(file)
            self.chunks[file] = chunks if known is None else np.concatenate([known, chunks])


@dataclass
class StoredParts(StoredChunks):
    """Parts of a trace that are stored.

    Attributes
    ----------
    layers
        Layers of which all is stored, in order.
    nonfinite
        Layers by array in which the model computed NaN or infinity.
    has_tokens
        Whether all next tokens are stored.
    """

    layers: list[int] = field(default_factory=list)
    nonfinite: dict[str, list[int]] = field(default_factory=dict)
    has_tokens: bool = False

    def add(self, others: StoredParts) -> None:
        """Add parts that are stored behind these."""
        self.layers += others.layers
        self.add_chunks(others.chunks)
        for name, layers in others.nonfinite.items():
            self.nonfinite.setdefault(name, []).extend(layers)
        self.has_tokens = self.has_tokens or others.has_tokens

    def end(self, layer: int | None, nonfinite: Iterable[str]) -> None:
        """Note that all chunks of a layer are stored, or of next tokens."""
        layers = [] if layer is None else [layer]
        nonfinite_layers = dict.fromkeys(nonfinite, layers)
        self.add(StoredParts({}, layers, nonfinite_layers, has_tokens=layer is None))


@dataclass
class StoredBlocks(StoredChunks):
    """Parts of a table that are stored.

    Attributes
    ----------
    blocks
        Number of blocks of samples stored in all layers.
    failed
        Why scenarios of these samples were not computed, by name.
    """

    blocks: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def add_block(self, block: StoredBlocks) -> None:
        """Add the block of samples that follows these."""
        self.add_chunks(block.chunks)
        self.blocks += 1
        self.failed |= block.failed


def chunk_places(
    group: Group[Any], name: str, layer: int | None, first: int = 0
) -> Iterator[tuple[str, int]]:
    """Return key of the file and number in it of each chunk of an array, from the first on.

    Parameters
    ----------
    group
        A trace or a table.
    layer
        Which of its layers; None for next tokens, which have none.

    Raises
    ------
    ValueError
        If the array has no such layer.
    """
    dims, encoding = group.nodes[name]["dimension_names"], group.encodings[name]
    has_layers = encoding.layout.has_layers
    if has_layers != (layer is not None) or {*dims}.isdisjoint(ROWS):
        raise ValueError(f"{name!r} has no layer {layer}")
    if not encoding.is_sharded:
        return ((key, 0) for key in file_keys(encoding)[first:])
    place = 0 if layer is None else group.attributes.layers_of(dims[0]).index(layer)
    return LayerGrid(dims, encoding).places(place, first)


# --- lines -------------------------------------------------------------------------------------


def replay(
    lines: Iterable[Line],
    trace: Group[TraceAttributes],
    stored: StoredParts,
    *,
    expected: Mapping[int | None, Collection[str]] | None = None,
    is_there: Callable[[StoredParts], bool] = lambda _: True,
) -> list[Line]:
    """Add the parts that lines name, up to the first line that does not hold.

    Parameters
    ----------
    lines
        Lines of the journal behind the first.
    trace
        The trace, as the first line describes it.
    stored
        The parts that are stored; the others are added to it.
    expected
        The arrays of each layer; None if only the journal names them.
    is_there
        Whether files hold the parts of a line.

    Returns
    -------
    list
        The lines that hold.
    """
    return _valid_lines(
        lines, lambda line: _parts_of(line, trace, stored, expected), is_there, stored.add
    )


def _valid_lines(
    lines: Iterable[Line],
    parse: Callable[[Line], _Stored],
    is_there: Callable[[_Stored], bool],
    add: Callable[[_Stored], None],
) -> list[Line]:
    """Add lines up to the first that cannot be parsed or whose bytes are missing."""
    kept = []
    for line in lines:
        try:
            found = parse(line)
        except NONSENSE:  # nobody wrote such a line
            break
        if not is_there(found):
            break
        add(found)
        kept.append(line)
    return kept


def _parts_of(
    line: Line,
    trace: Group[TraceAttributes],
    stored: StoredParts,
    expected: Mapping[int | None, Collection[str]] | None,
) -> StoredParts:
    layer, arrays = line["layer"], line["chunks"]
    if layer is None:
        names, is_next = trace.nodes.keys() & NEXT_TOKEN, not stored.has_tokens
    else:  # chunks stand in the order of layers: no other layer can have come next
        names = {*(arrays if expected is None else expected[layer])}
        is_next = type(layer) is int and layer == trace.attributes.layers[len(stored.layers)]
    if not is_next or arrays.keys() != names or not names.issuperset(line["nonfinite"]):
        raise ValueError(f"no such line can follow: layer {layer!r}, arrays {sorted(arrays)}")
    found = StoredParts()
    for name, chunks in arrays.items():
        _check_chunks(chunks)
        found.chunks |= by_file(name, chunk_places(trace, name, layer), chunks)
    found.end(layer, line["nonfinite"])
    return found


def _check_chunks(chunks: Iterable[Sequence[Any]]) -> None:
    """Refuse lengths and CRC-32Cs that no chunk has."""
    for length, crc in chunks:
        if type(length) is not int or type(crc) is not int:
            raise TypeError(f"chunk {length!r}, {crc!r}")
        if not CRC_BYTES < length < 2**32 or not 0 <= crc < 2**32:
            raise ValueError(f"chunk {length}, {crc}")


def replay_blocks(
    lines: Iterable[Line],
    stored: StoredBlocks,
    places: Callable[[str, int | None, int], Sequence[tuple[str, int]]],
    expected: Sequence[tuple[str, int | None]],
    is_there: Callable[[StoredBlocks], bool],
) -> list[Line]:
    """Add the blocks of a table that lines name, up to the first line that does not hold.

    Parameters
    ----------
    lines, stored, is_there
        As for :func:`replay`.
    places
        Returns file and number in it of each chunk of an array and layer in a block.
    expected
        The arrays of a block, with their layers; None for next tokens.

    Returns
    -------
    list
        The lines that hold.
    """
    return _valid_lines(
        lines, lambda line: _block_of(line, stored, places, expected), is_there, stored.add_block
    )


def _block_of(
    line: Line,
    stored: StoredBlocks,
    places: Callable[[str, int | None, int], Sequence[tuple[str, int]]],
    expected: Sequence[tuple[str, int | None]],
) -> StoredBlocks:
    number, failed = line["block"], line["failed"]
    if type(number) is not int or number != stored.blocks or len(line["chunks"]) != len(expected):
        raise ValueError(f"no such line can follow: block {number!r}")
    if not all(isinstance(reason, str) for reason in failed.values()):
        raise TypeError("reasons are no texts")
    found = StoredBlocks(failed=dict(failed))
    for (name, layer), chunks in zip(expected, line["chunks"], strict=True):
        _check_chunks(chunks)
        found.add_chunks(by_file(name, places(name, layer, number), chunks))
    return found


def by_file(
    name: str, places: Iterable[tuple[str, int]], chunks: Iterable[tuple[int, int]]
) -> dict[FileId, np.ndarray]:
    """Sort chunks of an array by their files, as :class:`StoredParts` has them.

    Parameters
    ----------
    places, chunks
        Key of each chunk's file, its number there, its length and CRC-32C.
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
        parsed = decode_line(line + b"\n")
        if parsed is None:
            return
        yield parsed


def decode_line(content: bytes) -> Line | None:
    """Return the line that some bytes are; None if they do not hold."""
    crc, _, text = content.removesuffix(b"\n").partition(b" ")
    if not content.endswith(b"\n") or crc != b"%08x" % google_crc32c.value(text):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None
