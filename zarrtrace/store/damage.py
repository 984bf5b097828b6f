"""Finding what of a group's files is not as it was written; every byte is read."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from zarrtrace.errors import IntegrityError, StoreError
from zarrtrace.format.attributes import RunAttributes
from zarrtrace.format.index_layout import IndexAttributes
from zarrtrace.format.layout import INDEX, LABELLED, STAGED
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.storage import Location
from zarrtrace.storage.backend import Content
from zarrtrace.store.chunks import Checksum, FileIndex, checksum_of, fingerprint, parse_index
from zarrtrace.store.codecs import CRC_BYTES, ArrayEncoding, checked
from zarrtrace.store.metadata import REPAIR, Group

_METADATA = "zarr.json"
#: Beside the traces of a run, or the arrays of a table, these belong to it.
OF_RUN = frozenset({_METADATA, "README.md", INDEX, LABELLED, STAGED})
# Bytes of a file that are read at once. Files of a table have 512 MB.
_PART_BYTES = 16 * 2**20


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
        The damage, in words.
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


def find_damage(
    group: Group[Any],
    scenario: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Read all files of a group's arrays, and compare them with the group's metadata.

    Parameters
    ----------
    group
        The group.
    scenario
        Named in the problems.
    progress
        Called with the bytes that were compared, and all of them.
    """
    problem = partial(Problem, scenario=scenario)
    found = list(_unknown_files(group, problem))
    total = sum(one.bytes for files in group.checksums.values() for one in files.values())
    mutex, done = threading.Lock(), 0

    def count(size: int) -> None:
        nonlocal done
        with mutex:
            done += size
            if progress is not None:
                progress(done, total)

    def array(name: str) -> list[Problem]:
        return list(_array(group, name, problem, count))

    for some in group.path.each(array, group.nodes):
        found += some
    return found


def _array(
    group: Group[Any], name: str, problem: Callable[..., Problem], count: Callable[[int], None]
) -> Iterator[Problem]:
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
            file = (group.path / name / key).inside(group.path)
            damage = list(_compare_parts(file, encoding, written, count))
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
        The damage, in words.
    """
    if encoding.is_sharded:
        tail = Content(content[-encoding.tail_bytes :], len(content))
        yield from _compare_chunks(tail, encoding, written, lambda start, end: content[start:end])
    elif not _is_sound(content):
        yield None, "is damaged: its checksum is another"
    elif checksum_of(content) != written:
        yield None, "is not the file that was written"


def _compare_parts(
    file: Location, encoding: ArrayEncoding, written: Checksum, count: Callable[[int], None]
) -> Iterator[tuple[int | None, str]]:
    """Compare a file as :func:`compare_file`, with no more than a part of it in memory."""
    if not encoding.is_sharded:
        yield from compare_file(file.read(), encoding, written)
        count(written.bytes)
        return

    def read(start: int, end: int) -> bytes:
        (content,) = file.read_ranges([(start, end)])
        count(end - start)
        return content

    yield from _compare_chunks(file.read_end(encoding.tail_bytes), encoding, written, read)
    count(encoding.tail_bytes)


def _compare_chunks(
    tail: Content,
    encoding: ArrayEncoding,
    written: Checksum,
    read: Callable[[int, int], bytes],
) -> Iterator[tuple[int | None, str]]:
    """Compare the chunks of a file, some megabytes at a time."""
    try:
        index = parse_index(tail.data, tail.size, encoding)
    except ValueError as error:
        yield None, f"its index is damaged: {error}"
        return
    crcs, damaged = [], dict[int, list[int]]()
    for part in _parts(index, encoding.count):
        start = part[0][1]
        content = read(start, part[-1][2])
        for number, first, end in part:
            chunk = content[first - start : end - start]
            crcs.append(int.from_bytes(chunk[-CRC_BYTES:], "little"))
            if not _is_sound(chunk):
                damaged.setdefault(number // encoding.strides[0], []).append(number)
    for layer, numbers in damaged.items():
        shown = ", ".join(map(str, numbers[:3])) + (", …" if len(numbers) > 3 else "")
        yield layer, f"{len(numbers)} chunks are damaged ({shown})"
    if not damaged and (index.checksum != written or fingerprint(crcs).hex() != written.checksum):
        yield None, "is not the file that was written: files of two runs were exchanged"


def _parts(index: FileIndex, count: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield number, start and end of the chunks that are read at once; they are neighbours."""
    part: list[tuple[int, int, int]] = []
    for number in range(count):
        if (place := index.range_of(number)) is not None:
            part.append((number, *place))
            if place[1] - part[0][1] >= _PART_BYTES:
                yield part
                part = []
    if part:
        yield part


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


def unknown_entries(group: Group[Any]) -> list[str]:
    """Name what is in the folder of a run, a trace or a table and does not belong to it."""
    if not group.path.backend.listable:
        return []
    attributes = group.attributes
    own = attributes.scenarios if isinstance(attributes, RunAttributes) else group.nodes
    beside = OF_RUN if isinstance(attributes, RunAttributes | TableAttributes) else (_METADATA,)
    known = {*own, *beside}
    return [child.name for child in group.path.children() if child.name not in known]


def _unknown_files(group: Group[Any], problem: Callable[..., Problem]) -> Iterator[Problem]:
    """Name what is in the group's folders and does not belong there."""
    if not group.path.backend.listable:
        return
    is_table = isinstance(group.attributes, TableAttributes)
    said = f"does not belong to the {'table' if is_table else 'trace'}"
    for name in unknown_entries(group):
        yield problem(array=name, message=said)
    for name, files in group.checksums.items():
        for child in (group.path / name).children():
            if child.name not in files and child.name != _METADATA:
                yield problem(array=name, chunk=child.name, message=said)
