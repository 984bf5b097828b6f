"""The journal of a trace that is being written: one line a step, appended.

A line is the CRC-32C of its JSON in hexadecimal digits, a blank, the JSON, and a line feed. The
first line holds the trace's metadata. The first line that does not hold ends the journal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from zarrtrace.storage import disk

#: Name of the file, beside the arrays of the trace.
JOURNAL = "journal"

Line = dict[str, Any]


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
    except FileNotFoundError:
        return
    start = 0
    while (end := content.find(b"\n", start)) >= 0:
        crc, _, text = content[start:end].partition(b" ")
        if crc != b"%08x" % google_crc32c.value(text):
            return
        line = json.loads(text)
        if not isinstance(line, dict):
            return
        start = end + 1
        yield line, start


def cut_journal(folder: Path, length: int) -> None:
    """Cut off what follows the last line that holds."""
    with (folder / JOURNAL).open("rb+") as stream:
        stream.truncate(length)
