"""Finding what of a group's files is not as it was written; every byte is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.storage import at_once
from zarrtrace.store.chunks import Checksum, checksum_of, fingerprint, parse_index
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding, checked
from zarrtrace.store.metadata import REPAIR, Group, checksums_of

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


def find_damage(group: Group[Any]) -> list[Damage]:
    """Read all files of a group's arrays, and compare them with the group's metadata."""
    each = map if group.path.path is not None else at_once
    found: list[Damage] = []
    for some in each(lambda name: list(_array(group, name)), group.nodes):
        found += some
    return found + list(_unknown_files(group))


def _array(group: Group[Any], name: str) -> Iterator[Damage]:
    try:
        content = (group.path / name / _METADATA).inside(group.path).read()
        if json.loads(content) != group.nodes[name]:
            yield Damage(name, _METADATA, (), "is not the metadata that was written")
    except (IntegrityError, OSError) as error:
        yield Damage(name, _METADATA, (), _said(error))
    except (ValueError, RecursionError):
        yield Damage(name, _METADATA, (), "is not JSON")
    encoding = group.encodings[name]
    for key, written in checksums_of(group.nodes[name]).items():
        size = encoding.file_shape[0]
        start = size * int(key.split(".")[1])
        try:
            content = (group.path / name / key).inside(group.path).read()
        except (IntegrityError, OSError) as error:
            yield Damage(name, key, tuple(range(start, start + size)), _said(error))
            continue
        for place, message in compare_file(content, encoding, written):
            places = range(size) if place is None else [place]
            yield Damage(name, key, tuple(start + one for one in places), message)


def compare_file(
    content: bytes, encoding: ArrayEncoding, written: Checksum
) -> Iterator[tuple[int | None, str]]:
    """Compare a file's content with what was written, chunk by chunk.

    Yields
    ------
    place
        Along the array's first dimension, in this file; None for all of them.
    message
        What is wrong.
    """
    if not encoding.is_sharded:
        if not _is_sound(content):
            yield None, "is damaged: its checksum is another"
        elif checksum_of(content) != written:
            yield None, "is not the file that was written"
        return
    try:
        index = parse_index(content[-encoding.tail_bytes :], len(content), encoding)
    except ValueError as error:
        yield None, f"its index is damaged: {error}"
        return
    crcs, damaged = [], dict[int, list[int]]()
    for number in range(encoding.count):
        if (place := index.range_of(number)) is not None:
            chunk = content[slice(*place)]
            crcs.append(int.from_bytes(chunk[-CRC_BYTES:], "little"))
            if not _is_sound(chunk):
                damaged.setdefault(number // encoding.strides[0], []).append(number)
    for layer, numbers in damaged.items():
        shown = ", ".join(map(str, numbers[:3])) + (", …" if len(numbers) > 3 else "")
        yield layer, f"{len(numbers)} chunks are damaged ({shown})"
    if not damaged and (index.checksum != written or fingerprint(crcs).hex() != written.checksum):
        yield None, "is not the file that was written: files of two runs were exchanged"


def _is_sound(chunk: bytes) -> bool:
    try:
        checked(chunk)
    except ValueError:
        return False
    return True


def _said(error: BaseException) -> str:
    """Return what an error says, without the path that is said beside it."""
    if isinstance(error, FileNotFoundError):
        return "is gone"
    what = error.what if isinstance(error, StoreError) else str(error)
    return what.rpartition(": ")[2] or type(error).__name__


def _unknown_files(group: Group[Any]) -> Iterator[Damage]:
    """Name what is in the group's folders and does not belong there."""
    if not group.path.backend.listable:
        return
    for child in group.path.children():
        if child.name not in group.nodes and child.name != _METADATA:
            yield Damage(child.name, None, (), "does not belong to the trace")
    for name, node in group.nodes.items():
        known = {_METADATA, *checksums_of(node)}
        for child in (group.path / name).children():
            if child.name not in known:
                yield Damage(name, child.name, (), "does not belong to the trace")
