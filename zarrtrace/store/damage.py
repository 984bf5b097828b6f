"""Finding what of a group's files is not as it was written; every byte is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.format.attributes import IndexAttributes, TableAttributes
from zarrtrace.store.chunks import Checksum, checksum_of, fingerprint, parse_index
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding, checked
from zarrtrace.store.metadata import REPAIR, Group

_METADATA = "zarr.json"


class Problem(BaseModel):
    """Something that is wrong with a run, and where.

    Attributes
    ----------
    scenario
        None if it is about the run itself.
    array, layer
        None if it is about all of them.
    chunk
        Key of the damaged file in its array, such as ``c.0.0.0.0``; None if it is about all.
    message
        What is wrong.
    """

    scenario: str | None
    array: str | None = None
    layer: int | None = None
    chunk: str | None = None
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
    for name, files in group.checksums.items():
        for key, written in files.items():
            place = f"{name}/{key}"
            file = group.path / place
            try:
                found = file.size() if sizes is None else sizes.get(place)
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


def find_damage(group: Group[Any], scenario: str | None = None) -> list[Problem]:
    """Read all files of a group's arrays, and compare them with the group's metadata."""
    problem = partial(Problem, scenario=scenario)
    found = list(_unknown_files(group, problem))
    for some in group.path.each(lambda name: list(_array(group, name, problem)), group.nodes):
        found += some
    return found


def _array(group: Group[Any], name: str, problem: Callable[..., Problem]) -> Iterator[Problem]:
    try:
        content = (group.path / name / _METADATA).inside(group.path).read()
        if json.loads(content) != group.nodes[name]:
            said = "is not the metadata that was written"
            yield problem(array=name, chunk=_METADATA, message=said)
    except (IntegrityError, OSError) as error:
        yield problem(array=name, chunk=_METADATA, message=_said(error))
    except (ValueError, RecursionError):
        yield problem(array=name, chunk=_METADATA, message="is not JSON")
    encoding = group.encodings[name]
    for key, written in group.checksums[name].items():
        try:
            content = (group.path / name / key).inside(group.path).read()
            damage = list(compare_file(content, encoding, written))
        except (IntegrityError, OSError) as error:
            damage = [(None, _said(error))]
        for place, message in damage:
            for layer in _layers(group, name, int(key.split(".")[1]), place):
                yield problem(array=name, layer=layer, chunk=key, message=message)


def _layers(group: Group[Any], name: str, file: int, place: int | None) -> Sequence[int | None]:
    """Return the layers at a place in a file; None stands for all of them, and for no layer."""
    encoding, attributes = group.encodings[name], group.attributes
    dim, size = encoding.layout.dims[0], encoding.file_shape[0]
    if dim not in ("layer", "attention_layer"):
        return [None]
    is_index = isinstance(attributes, IndexAttributes)
    layers = attributes.layers if is_index else attributes.layers_of(dim)
    start = file * size
    here = layers[start : start + size] if place is None else layers[start + place :][:1]
    return here if 0 < len(here) < max(len(attributes.layers), 2) else [None]


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


def _unknown_files(group: Group[Any], problem: Callable[..., Problem]) -> Iterator[Problem]:
    """Name what is in the group's folders and does not belong there."""
    if not group.path.backend.listable:
        return
    is_table = isinstance(group.attributes, TableAttributes)
    said = f"does not belong to the {'table' if is_table else 'trace'}"
    for child in group.path.children():
        if child.name not in group.nodes and child.name != _METADATA:
            yield problem(array=child.name, message=said)
    for name, files in group.checksums.items():
        for child in (group.path / name).children():
            if child.name not in files and child.name != _METADATA:
                yield problem(array=name, chunk=child.name, message=said)
