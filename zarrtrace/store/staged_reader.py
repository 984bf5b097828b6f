"""Reading a trace that is still being written, or was interrupted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from zarrtrace.errors import IntegrityError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import ROWS
from zarrtrace.storage import Location, locate
from zarrtrace.store.chunks import Checksum, FileIndex, LayerGrid, index_entries
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.journal import Line, read_lines, stored_layer, stored_tokens, stored_versions
from zarrtrace.store.metadata import (
    CHECKSUMS,
    NONSENSE,
    Group,
    check_nodes,
    labels_of,
    parse_attributes,
)
from zarrtrace.store.staged import staging_folder


def read_staged(
    path: Location,
) -> tuple[Group[TraceAttributes], tuple[int, ...], dict[str, dict[str, FileIndex]]] | None:
    """Read what there is of a trace that is not published.

    Parameters
    ----------
    path
        Where the trace will be.

    Returns
    -------
    group
        Its metadata.
    missing
        Layers that it lacks.
    indexes
        Index of each file that grows, by array and key.
    """
    folder = staging_folder(path.parent) / path.name
    lines = read_lines(folder)
    header = next(lines, ({}, 0))[0]
    here = locate(folder)
    try:
        attributes: TraceAttributes = parse_attributes(here, header["attributes"], "trace")
        nodes, files = header["arrays"], header["files"]
        for name, node in nodes.items():
            node["attributes"][CHECKSUMS] = files.get(name, {})
        labels = labels_of(nodes).split()
        encodings = check_nodes(nodes, attributes, is_whole=False)
    except (*NONSENSE, IntegrityError):
        return None  # nor does a writer go on with it: it begins anew
    group = Group(here, attributes, header["attributes"], frozenset(labels), nodes, encodings)
    layers, chunks = _stored(lines, group)
    indexes = {
        name: _indexes(nodes[name]["dimension_names"], encodings[name], found)
        for name, found in chunks.items()
    }
    return group, attributes.layers[len(layers) :], indexes


def _stored(
    lines: Iterable[tuple[Line, int]], group: Group[TraceAttributes]
) -> tuple[list[int], dict[str, dict[int, list[tuple[int, int]]]]]:
    """Return stored layers, and length and CRC-32C of their chunks by array and place in it.

    Checksums of the next-token arrays are entered in the metadata. The first line that nobody
    wrote ends the journal.
    """
    dims = {name: node["dimension_names"] for name, node in group.nodes.items()}
    grids = {
        name: LayerGrid(dims[name], encoding)
        for name, encoding in group.encodings.items()
        if encoding.is_sharded and {*dims[name]} & {*ROWS}
    }
    layers: list[int] = []
    chunks: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for line, _ in lines:
        try:
            if "versions" in line:
                stored_versions(line["versions"])
                continue
            if "layer" not in line:
                for name, files in stored_tokens(line, group.encodings).files.items():
                    group.nodes[name]["attributes"][CHECKSUMS] = files
                continue
            found = stored_layer(line, grids)
            # Chunks stand in the order of layers: no other layer can have come next.
            if found.layer != group.attributes.layers[len(layers)]:
                break
            for name, pairs in found.chunks.items():
                place = group.attributes.layers_of(dims[name][0]).index(found.layer)
                chunks.setdefault(name, {})[place] = pairs
        except NONSENSE:
            break
        layers.append(found.layer)
    return layers, chunks


def _indexes(
    dims: Sequence[str],
    encoding: ArrayEncoding,
    chunks: Mapping[int, Sequence[tuple[int, int]]],
) -> dict[str, FileIndex]:
    """Return the index of each file of an array, from the chunks of its layers."""
    grid = LayerGrid(dims, encoding)
    stored: dict[str, dict[int, tuple[int, int]]] = {}
    for place, pairs in sorted(chunks.items()):
        for number, (length, crc) in enumerate(pairs):
            key, inside = grid.file_of(place, number)
            stored.setdefault(key, {})[inside] = length, crc
    found = {}
    for key, of_file in stored.items():
        entries, size = index_entries(encoding, of_file)
        crcs = {number: crc for number, (_, crc) in of_file.items()}
        found[key] = FileIndex(Checksum(size, ""), entries, crcs)
    return found
