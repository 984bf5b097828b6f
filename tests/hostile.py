"""Stores as somebody writes them who knows the format: seals, checksums and indexes fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

Change = Callable[[Any], object]

_TAIL = 8 + 4  # fingerprint and CRC-32C around the index of a file


def sealed(group: Any) -> bytes:
    """Return the content of a group's ``zarr.json``, with a seal that fits."""
    plain = group.get("attributes") if isinstance(group, dict) else None
    if not isinstance(plain, dict) or "seal" not in plain:
        return json.dumps(group).encode()
    plain["seal"] = "0" * 16
    content = json.dumps(group).encode()
    seal = hashlib.blake2b(content, digest_size=8).hexdigest()
    return content.replace(b'"seal": "' + b"0" * 16, f'"seal": "{seal}'.encode(), 1)


def change_group(folder: Path, change: Change) -> None:
    """Change the ``zarr.json`` of a trace or a run."""
    group = json.loads((folder / "zarr.json").read_bytes())
    change(group)
    (folder / "zarr.json").write_bytes(sealed(group))


def change_array(trace: Path, name: str, change: Change) -> None:
    """Change an array's metadata, in its own file and in the trace's."""

    def both(group: Any) -> None:
        node = group["consolidated_metadata"]["metadata"][name]
        change(node)
        (trace / name / "zarr.json").write_text(json.dumps(node), encoding="utf-8")

    change_group(trace, both)


def replace_file(trace: Path, name: str, content: bytes, checksum: str, key: str = "") -> None:
    """Replace a file of an array, its first one unless a key is given."""
    file = trace / name / key if key else first_file(trace / name)
    file.write_bytes(content)
    files = {file.name: [len(content), checksum]}
    change_array(trace, name, lambda node: node["attributes"]["checksums"].update(files))


def replace_chunk(trace: Path, name: str, compressed: bytes) -> None:
    """Replace the only chunk of a coordinate."""
    crc = google_crc32c.value(compressed)
    replace_file(trace, name, compressed + crc.to_bytes(4, "little"), f"{crc:08x}")


def replace_first_chunk(trace: Path, name: str, compressed: bytes) -> None:
    """Replace the first chunk of an array that is written layer by layer."""
    content = first_file(trace / name).read_bytes()
    entries = index_of(trace, name)
    crc = google_crc32c.value(compressed)
    chunk = compressed + crc.to_bytes(4, "little")
    moved = len(chunk) - int(entries[0, 1])
    content = chunk + content[int(entries[0, 1]) :]
    stored = entries[1:][entries[1:, 0] < 2**63]
    stored[:, 0] = (stored[:, 0].astype(np.int64) + moved).astype(np.uint64)
    entries[1:][entries[1:, 0] < 2**63] = stored
    entries[0] = 0, len(chunk)
    body = content[: -(entries.size * 8 + _TAIL)]
    crcs = [body[int(o) + int(n) - 4 : int(o) + int(n)] for o, n in entries if o < 2**63]
    mark = hashlib.blake2b(b"".join(crcs), digest_size=8).digest()
    replace_file(trace, name, body + mark + _index(entries), mark.hex())


def index_of(trace: Path, name: str) -> np.ndarray:
    """Return offset and length of each chunk of an array's first file ``(chunk, 2)``."""
    node = json.loads((trace / name / "zarr.json").read_bytes())
    outer = node["chunk_grid"]["configuration"]["chunk_shape"]
    inner = node["codecs"][0]["configuration"]["chunk_shape"]
    count = int(np.prod([a // b for a, b in zip(outer, inner, strict=True)]))
    content = first_file(trace / name).read_bytes()
    return np.frombuffer(content[-16 * count - 4 : -4], "<u8").reshape(count, 2).copy()


def replace_index(trace: Path, name: str, entries: np.ndarray) -> None:
    """Replace the index of an array's first file; its fingerprint stays."""
    file = first_file(trace / name)
    size = 16 * len(index_of(trace, name)) + 4
    file.write_bytes(file.read_bytes()[:-size] + _index(entries))


def _index(entries: np.ndarray) -> bytes:
    content = np.ascontiguousarray(entries, "<u8").tobytes()
    return content + google_crc32c.value(content).to_bytes(4, "little")


def first_file(array: Path) -> Path:
    """Return an array's first file."""
    return min(file for file in array.iterdir() if file.name.startswith("c."))


def journal_of(staged: Path) -> list[Any]:
    """Return what the lines of a journal say."""
    lines = (staged / "journal").read_bytes().splitlines()
    return [json.loads(line.partition(b" ")[2]) for line in lines]


def write_journal(staged: Path, lines: Sequence[Any]) -> None:
    """Write a journal whose lines say this; a line of bytes is taken as it is."""
    parts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    content = b"".join(b"%08x %s\n" % (google_crc32c.value(part), part) for part in parts)
    (staged / "journal").write_bytes(content)


def setting(*path: Any) -> Change:
    """Return a change that sets what stands at `path[:-1]` in nested JSON to `path[-1]`."""

    def act(found: Any) -> None:
        *way, key, value = path
        for step in way:
            found = found[step]
        found[key] = value

    return act
