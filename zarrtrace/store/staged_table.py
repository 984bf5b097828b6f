"""A table that is being written: blocks of samples, and their journal.

It stands beside the place where it will be, ``.RUN.zarrtrace-new``, until it is complete; if that
is in an object store, in the system's folder of temporary files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from zarrtrace.errors import IncompleteError, IntegrityError
from zarrtrace.format.layout import ArrayLayout
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.storage import Location, locate
from zarrtrace.store.chunks import LayerGrid, read_index
from zarrtrace.store.codecs import checked
from zarrtrace.store.journal import (
    Line,
    StoredBlocks,
    chunk_places,
    read_lines,
    replay_blocks,
)
from zarrtrace.store.metadata import Group, check_nodes, parse_attributes
from zarrtrace.store.nodes import NONSENSE, array_metadata
from zarrtrace.store.publish import beside
from zarrtrace.store.seal import coordinate_names
from zarrtrace.store.staged import staging_folder
from zarrtrace.store.staged_files import StagedFiles


def table_folder(path: Location) -> Path:
    """Return the folder on a disk in which a table is written."""
    here = path.path
    return beside(staging_folder(path) if here is None else here, "new")


class StagedTable(StagedFiles[TableAttributes, StoredBlocks]):
    """The files of a table before it is published.

    Parameters
    ----------
    folder, attributes, layouts
        As for :class:`StagedFiles`.
    arrays
        The arrays that are written block by block, with their layers; None for next tokens.
    block, samples
        Samples of a block, and of the table.
    """

    def __init__(
        self,
        folder: Path,
        attributes: TableAttributes,
        layouts: Mapping[str, ArrayLayout],
        arrays: Sequence[tuple[str, int | None]],
        block: int,
        samples: int,
    ) -> None:
        self.arrays, self.block, self.samples = tuple(arrays), block, samples
        super().__init__(folder, attributes, layouts)

    def _clear(self) -> None:
        super()._clear()
        # Length and CRC-32C of chunks that the journal does not name yet, by array and layer.
        self._pending: dict[tuple[str, int | None], list[tuple[int, int]]] = {
            one: [] for one in self.arrays
        }

    def _nothing(self) -> StoredBlocks:
        return StoredBlocks()

    def _replay(self, lines: Iterator[Line]) -> list[Line]:
        return replay_blocks(lines, self.stored, self.places, self.arrays, self._is_there)

    def _found_while_writing(self) -> dict[str, Any]:
        return {"failed": dict(self.stored.failed)}

    def _compared(self, header: Line) -> Line:
        # The configuration is compared before, and named where it differs.
        attributes = {k: v for k, v in header["attributes"].items() if k != "config"}
        return {**header, "attributes": attributes}

    @property
    def done(self) -> int:
        """Number of samples stored in all layers."""
        return min(self.stored.blocks * self.block, self.samples)

    def chunks_of(self, name: str, block: int) -> int:
        """Return how many chunks a block of an array has in one layer."""
        encoding = self.encodings[name]
        axis = encoding.layout.row_axis
        rows = min(self.block, self.samples - block * self.block)
        columns = LayerGrid(encoding.layout.dims, encoding).columns
        return -(-rows // encoding.chunks[axis]) * columns

    def places(self, name: str, layer: int | None, block: int) -> list[tuple[str, int]]:
        """Return key of the file and number in it of each chunk of a block."""
        if not 0 <= block * self.block < self.samples:
            raise ValueError(f"no block {block}")
        first = block * self.chunks_of(name, 0)
        places = chunk_places(self._group, name, layer, first)
        return list(itertools.islice(places, self.chunks_of(name, block)))

    def append(self, name: str, layer: int | None, chunks: Sequence[bytes]) -> None:
        """Append the next chunks of a layer of an array to their files."""
        pending = self._pending[name, layer]
        first = self.stored.blocks * self.chunks_of(name, 0) + len(pending)
        places = chunk_places(self._group, name, layer, first)
        pending += self._append_chunks(name, itertools.islice(places, len(chunks)), chunks)

    @property
    def block_is_whole(self) -> bool:
        """Whether all chunks of the next block are appended."""
        block = self.stored.blocks
        return block * self.block < self.samples and all(
            len(self._pending[one]) >= self.chunks_of(one[0], block) for one in self.arrays
        )

    def end_block(self, failed: Mapping[str, str]) -> None:
        """Enter the next block in the journal, after all its chunks.

        Parameters
        ----------
        failed
            Why scenarios of the block were not computed, by name.
        """
        block = self.stored.blocks
        counts = [self.chunks_of(name, block) for name, _ in self.arrays]
        pending = [self._pending[one] for one in self.arrays]
        chunks = [found[:n] for found, n in zip(pending, counts, strict=True)]
        self._enter({"block": block, "chunks": chunks, "failed": dict(failed)})
        for found, n in zip(pending, counts, strict=True):
            del found[:n]
        self.stored.blocks += 1
        self.stored.failed |= failed

    def copy_sound(self, source: Group[TableAttributes], failed: Mapping[str, int]) -> None:
        """Copy the blocks of a table that stand before the first damaged one.

        The journal names them; :meth:`resume` cuts off what was copied of another one.

        Parameters
        ----------
        source
            The table.
        failed
            Number of the block that each failed scenario begins in.
        """
        try:
            is_same = source.nodes.keys() == self._group.nodes.keys() and all(
                array_metadata(encoding.layout, source.checksums[name]) == source.nodes[name]
                for name, encoding in self.encodings.items()
            )
            while is_same and self.done < self.samples:
                block = self.stored.blocks
                for name, layer in self.arrays:
                    places = self.places(name, layer, block)
                    self.append(name, layer, _sound_chunks(source, name, places))
                reasons = source.attributes.failed
                self.end_block({n: reasons[n] for n, at in failed.items() if at == block})
        except (OSError, ValueError, LookupError, IntegrityError):
            return  # a block is damaged


def _sound_chunks(
    source: Group[TableAttributes], name: str, places: Sequence[tuple[str, int]]
) -> list[bytes]:
    """Read chunks of a table.

    Raises
    ------
    OSError, ValueError, IntegrityError
        If any is damaged.
    """
    found: list[bytes] = []
    for key, in_file in itertools.groupby(places, itemgetter(0)):
        file = source.path / name / key
        index = read_index(file, source.encodings[name])
        source.checksums[name][key].refuse_other(index.checksum)
        ranges = [index.range_of(number) for _, number in in_file]
        found += file.read_ranges([one for one in ranges if one is not None])
    for chunk in found:
        checked(chunk)
    return found


def read_staged_table(path: Location) -> tuple[Group[TableAttributes], int] | None:
    """Read what there is of a table that is not published: being written, or interrupted.

    Parameters
    ----------
    path
        Where the table will be.

    Returns
    -------
    group
        Its metadata.
    done
        Number of samples in the journal.
    """
    folder = table_folder(path.resolved())
    lines = read_lines(folder)
    header, here = next(lines, {}), locate(folder)
    try:
        attributes = parse_attributes(here, header["attributes"], "table")
        encodings = check_nodes(header["arrays"], attributes, is_whole=False)
        labels = frozenset(coordinate_names(header["arrays"]).split())
    except (*NONSENSE, IntegrityError):
        return None
    block = max(e.chunks[e.layout.row_axis] for e in encodings.values() if e.is_sharded)
    done = min(sum(1 for _ in lines) * block, encodings["scenario"].shape[0])
    plain = header["attributes"]
    return Group(here, attributes, plain, labels, header["arrays"], encodings), done


def refuse_staged_table(path: Location) -> None:
    """Refuse to read a table that is still being written.

    Parameters
    ----------
    path
        Where the table will be.

    Raises
    ------
    IncompleteError
    """
    if not path.exists() and staged_header(table_folder(path.resolved())) is not None:
        raise IncompleteError(
            f"{path}: not complete: its samples are still being written",
            why="The extraction was interrupted, or is still running.",
            remedy="Run the same 'zarrtrace extract' again to resume it.",
        )


def staged_header(folder: Path) -> dict[str, Any] | None:
    """Return the attributes of a table that is being written in a folder; None if none is."""
    header = next(read_lines(folder), {})
    attributes = header.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("kind") != "table":
        return None
    return attributes if isinstance(attributes.get("config"), dict) else None
