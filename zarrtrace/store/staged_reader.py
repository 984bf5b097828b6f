"""Reading a trace that is still being written, or was interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.storage import Location, locate
from zarrtrace.store.chunks import FileIndex, LayerGrid, index_entries
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.journal import read_lines
from zarrtrace.store.metadata import (
    CHECKSUMS,
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
    if "arrays" not in header:
        return None
    here = locate(folder)
    nodes, files = header["arrays"], header["files"]
    attributes: TraceAttributes = parse_attributes(here, header["attributes"], "trace")
    chunks: dict[str, dict[int, list[list[int]]]] = {}
    layers = set()
    for line, _ in lines:
        files |= line.get("files", {})
        if "layer" in line:
            layers.add(line["layer"])
            for name, pairs in line["chunks"].items():
                dim = nodes[name]["dimension_names"][0]
                place = attributes.layers_of(dim).index(line["layer"])
                chunks.setdefault(name, {})[place] = pairs
    for name, node in nodes.items():
        node["attributes"][CHECKSUMS] = files.get(name, {})
    check_nodes(nodes)
    indexes = {name: _indexes(nodes[name], found) for name, found in chunks.items()}
    plain = header["attributes"]
    labels = frozenset(labels_of(nodes).split())
    group = Group(here, attributes, plain, labels, nodes)
    return group, tuple(n for n in attributes.layers if n not in layers), indexes


def _indexes(
    node: Mapping[str, Any], chunks: Mapping[int, Sequence[Sequence[int]]]
) -> dict[str, FileIndex]:
    """Return the index of each file of an array, from the chunks of its layers."""
    encoding = ArrayEncoding(node)
    grid = LayerGrid(node["dimension_names"], encoding)
    stored: dict[str, dict[int, tuple[int, int]]] = {}
    for place, pairs in sorted(chunks.items()):
        for number, (length, crc) in enumerate(pairs):
            key, inside = grid.file_of(place, number)
            stored.setdefault(key, {})[inside] = length, crc
    found = {}
    for key, of_file in stored.items():
        entries, size = index_entries(encoding, of_file)
        found[key] = FileIndex(size, "", entries)
    return found
