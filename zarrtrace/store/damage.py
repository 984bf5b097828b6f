"""Finding what of a group's files is not as it was written; every byte is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.storage import Location, at_once
from zarrtrace.store.chunks import ABSENT, Checksum, fingerprint
from zarrtrace.store.codecs import CRC_BYTES, FINGERPRINT_BYTES, ArrayEncoding, checked
from zarrtrace.store.metadata import REPAIR, Group, Nodes, checksums_of

_METADATA = "zarr.json"


class Damage(NamedTuple):
    """Something that is wrong with an array.

    Attributes
    ----------
    array
        Its name.
    file
        Key of the file in the array; None if it is about all of them.
    first
        Places along the array's first dimension that are damaged; None for all.
    message
        What is wrong.
    """

    array: str
    file: str | None
    first: tuple[int, ...] | None
    message: str


def check_sizes(group: Group[Any], remedy: str = REPAIR) -> None:
    """Refuse a group in which files are gone or have another size.

    Where files cannot be listed, that is said when one of them is read.

    Raises
    ------
    IntegrityError
    """
    sizes = None
    if group.path.path is None:
        if not group.path.backend.listable:
            return
        sizes = group.path.files()
    for name, node in group.nodes.items():
        for key, written in checksums_of(node).items():
            file = group.path / name / key
            try:
                found = file.size() if sizes is None else sizes.get(f"{name}/{key}")
            except FileNotFoundError:
                found = None
            if found != written.bytes:
                raise IntegrityError(
                    f"{file}: {'is gone' if found is None else f'has {found} bytes'}, "
                    f"{written.bytes} bytes were written",
                    why="Files were lost, cut short or replaced, for example by an interrupted "
                    "copy.",
                    remedy=remedy,
                )


def find_damage(group: Location, nodes: Nodes) -> list[Damage]:
    """Read all files of a group's arrays, and compare them with the metadata in the group.

    Parameters
    ----------
    group
        Its folder.
    nodes
        Metadata of its arrays, as the sealed ``zarr.json`` of the group holds it.
    """
    each = map if group.path is not None else at_once
    found = [one for some in each(lambda name: list(_array(group, name, nodes[name])), nodes)
             for one in some]  # fmt: skip
    return found + list(_unknown_files(group, nodes))


def _array(group: Location, name: str, node: Mapping[str, Any]) -> Iterator[Damage]:
    path = group / name
    try:
        if json.loads((path / _METADATA).inside(group).read()) != node:
            yield Damage(name, _METADATA, (), "is not the metadata that was written")
    except FileNotFoundError:
        yield Damage(name, _METADATA, (), "is gone")
    except (IntegrityError, ValueError, RecursionError, OSError) as error:
        yield Damage(name, _METADATA, (), _said(error))
    encoding = ArrayEncoding(node)
    for key, written in checksums_of(node).items():
        yield from _file(group, key, name, encoding, written)


def _file(
    group: Location, key: str, name: str, encoding: ArrayEncoding, written: Checksum
) -> Iterator[Damage]:
    first = int(key.split(".")[1])
    step = encoding.grid[0] if encoding.is_sharded else 1
    all_of_it = tuple(range(first * step, (first + 1) * step))
    try:
        content = (group / name / key).inside(group).read()
    except FileNotFoundError:
        yield Damage(name, key, all_of_it, "is gone")
        return
    except (IntegrityError, OSError) as error:
        yield Damage(name, key, all_of_it, _said(error))
        return
    yield from file_damage(content, key, name, encoding, written)


def file_damage(
    content: bytes,
    key: str,
    name: str,
    encoding: ArrayEncoding,
    written: Checksum,
) -> Iterator[Damage]:
    """Compare a file's content with its checksums."""
    step = encoding.grid[0] if encoding.is_sharded else 1
    first = int(key.split(".")[1])
    all_of_it = tuple(range(first * step, (first + 1) * step))
    if not encoding.is_sharded:
        if _crc(content[:-CRC_BYTES]) != content[-CRC_BYTES:]:
            yield Damage(name, key, all_of_it, "is damaged: its checksum is another")
        elif (len(content), content[-CRC_BYTES:][::-1].hex()) != written:
            yield Damage(name, key, all_of_it, "is not the file that was written")
        return
    try:
        if len(content) < encoding.tail_bytes:
            raise ValueError("the file is too short to hold it")
        entries = np.frombuffer(checked(content[-16 * encoding.count - CRC_BYTES :]), "<u8")
    except ValueError as error:
        yield Damage(name, key, all_of_it, f"its index is damaged: {error}")
        return
    yield from _chunks(content, entries.reshape(-1, 2), key, name, encoding, written)


def _chunks(
    content: bytes,
    entries: np.ndarray,
    key: str,
    name: str,
    encoding: ArrayEncoding,
    written: Checksum,
) -> Iterator[Damage]:
    start = int(key.split(".")[1]) * encoding.grid[0]
    crcs, bad = [], []
    for number, (offset, length) in enumerate(entries.tolist()):
        if offset == ABSENT:
            continue
        chunk = content[offset : offset + length]
        crcs.append(int.from_bytes(chunk[-CRC_BYTES:], "little"))
        if len(chunk) != length or _crc(chunk[:-CRC_BYTES]) != chunk[-CRC_BYTES:]:
            bad.append(number)
    if bad:
        layers = sorted({start + number // encoding.strides[0] for number in bad})
        shown = ", ".join(map(str, bad[:3])) + (", …" if len(bad) > 3 else "")
        for layer in layers:
            here = [n for n in bad if start + n // encoding.strides[0] == layer]
            yield Damage(name, key, (layer,), f"{len(here)} chunks are damaged ({shown})")
        return
    mark = content[len(content) - encoding.tail_bytes :][:FINGERPRINT_BYTES].hex()
    if (len(content), mark) != written or fingerprint(crcs).hex() != mark:
        size = encoding.grid[0]
        yield Damage(name, key, tuple(range(start, start + size)), "is not the file that was "
                     "written: files of two runs were exchanged")  # fmt: skip


def _crc(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")


def _said(error: BaseException) -> str:
    """Return what an error says, without the path that is said beside it."""
    what = error.what if isinstance(error, StoreError) else str(error)
    return what.rpartition(": ")[2] or type(error).__name__


def _unknown_files(group: Location, nodes: Nodes) -> Iterator[Damage]:
    """Name what is in the group's folders and does not belong there."""
    if not group.backend.listable:
        return
    for child in group.children():
        if child.name not in nodes and child.name != _METADATA:
            yield Damage(child.name, None, (), "does not belong to the trace")
    for name, node in nodes.items():
        known = {_METADATA, *checksums_of(node)}
        for child in (group / name).children():
            if child.name not in known:
                yield Damage(name, child.name, (), "does not belong to the trace")
