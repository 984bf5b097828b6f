"""The journal of a trace that is being written: one line a step, appended.

A line is the CRC-32C of its JSON in hexadecimal digits, a blank, the JSON, and a line feed. The
first line holds the trace's metadata. The first line that does not hold ends the journal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from zarrtrace.errors import IntegrityError
from zarrtrace.format.layout import NEXT_TOKEN
from zarrtrace.storage import disk
from zarrtrace.store.chunks import Checksum, LayerGrid, file_keys
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding
from zarrtrace.store.metadata import parse_checksums

#: Name of the file, beside the arrays of the trace.
JOURNAL = "journal"

Line = dict[str, Any]


class StoredLayer(NamedTuple):
    """What the journal says of a layer.

    Attributes
    ----------
    layer
        Which one.
    chunks
        Length and CRC-32C of each of its chunks, by array.
    nonfinite
        Arrays in which the model computed NaN or infinity.
    """

    layer: int
    chunks: dict[str, list[tuple[int, int]]]
    nonfinite: list[str]


def stored_layer(line: Line, grids: Mapping[str, LayerGrid]) -> StoredLayer:
    """Take what a line says of a layer.

    Parameters
    ----------
    line
        A line of the journal.
    grids
        How the layers of arrays are cut.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError
        If no such line was written.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for name, pairs in line["chunks"].items():
        if len(pairs) != grids[name].count:
            raise ValueError(f"{len(pairs)} chunks of {name!r}")
        for length, crc in pairs:
            if type(length) is not int or type(crc) is not int:
                raise TypeError(f"chunk {length!r}, {crc!r}")
            if not CRC_BYTES < length < 2**32 or not 0 <= crc < 2**32:
                raise ValueError(f"chunk {length}, {crc}")
        found[name] = [(length, crc) for length, crc in pairs]
    nonfinite = line["nonfinite"]
    if type(line["layer"]) is not int or not set(nonfinite) <= found.keys():
        raise ValueError("no such layer")
    return StoredLayer(line["layer"], found, list(nonfinite))


class StoredTokens(NamedTuple):
    """What the journal says of the next-token arrays.

    Attributes
    ----------
    files
        Checksums of their files, by array and key.
    nonfinite
        Arrays in which the model computed NaN or infinity.
    """

    files: dict[str, dict[str, Checksum]]
    nonfinite: list[str]


def stored_tokens(line: Line, encodings: Mapping[str, ArrayEncoding]) -> StoredTokens:
    """Take what a line says of the next-token arrays.

    Parameters
    ----------
    line
        A line of the journal.
    encodings
        How the arrays of the trace are cut.

    Raises
    ------
    ValueError, LookupError, TypeError, AttributeError
        If no such line was written.
    """
    found = {name: parse_checksums(files) for name, files in line["files"].items()}
    known = {name: file_keys(encodings[name]) for name in NEXT_TOKEN if name in encodings}
    if {name: list(files) for name, files in found.items()} != known:
        raise ValueError(f"files {found}")
    nonfinite = line["nonfinite"]
    if not set(nonfinite) <= found.keys():
        raise ValueError(f"nonfinite {nonfinite}")
    return StoredTokens(found, list(nonfinite))


def stored_versions(versions: Any) -> dict[str, str]:
    """Take what a line says of libraries' versions.

    Raises
    ------
    TypeError, ValueError
        If no such line was written.
    """
    found = dict(versions)
    if not all(isinstance(text, str) for text in found.values()):
        raise TypeError(f"versions {versions!r}")
    return found


def append_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a line to the journal in a folder."""
    disk.append(folder / JOURNAL, [_encoded(line)])


def _encoded(line: Mapping[str, Any]) -> bytes:
    content = json.dumps(line, separators=(",", ":")).encode()
    return b"%08x %s\n" % (google_crc32c.value(content), content)


def read_lines(folder: Path) -> Iterator[tuple[Line, int]]:
    """Yield the lines of a journal that hold, each with the position behind it."""
    try:
        content = disk.Disk().get(str(folder / JOURNAL)).data
    except (FileNotFoundError, IntegrityError):  # none, or no regular file
        return
    start = 0
    while (end := content.find(b"\n", start)) >= 0:
        crc, _, text = content[start:end].partition(b" ")
        if crc != b"%08x" % google_crc32c.value(text):
            return
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(line, dict):
            return
        start = end + 1
        yield line, start


def cut_journal(folder: Path, length: int) -> None:
    """Cut off what follows the last line that holds."""
    with (folder / JOURNAL).open("rb+") as stream:
        stream.truncate(length)
