"""What of a damaged trace is sound, and can be used again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from zarrtrace.errors import StoreError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import NEXT_TOKEN, ArrayLayout
from zarrtrace.storage import Location
from zarrtrace.store.array import StoredArray
from zarrtrace.store.chunks import LayerGrid, read_index
from zarrtrace.store.codecs import ArrayEncoding
from zarrtrace.store.damage import find_damage
from zarrtrace.store.metadata import Nodes, array_metadata, checksums_of, read_trace


@dataclass
class SoundParts:
    """Parts of a trace whose every byte is as it was written.

    Attributes
    ----------
    path
        The trace.
    attributes
        Its attributes.
    layouts
        Its arrays.
    layers
        Layers of which all arrays are sound.
    has_tokens
        Whether the next-token arrays are.
    is_whole
        Whether everything is.
    nonfinite
        Layers by array in which the model computed NaN or infinity.
    nodes, versions
        Metadata of its arrays, and the libraries it was made with.
    """

    path: Location
    attributes: TraceAttributes
    layouts: Mapping[str, ArrayLayout]
    layers: set[int] = field(default_factory=set)
    has_tokens: bool = False
    is_whole: bool = False
    nonfinite: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    nodes: Nodes = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def chunks(self, name: str, layer: int) -> list[bytes]:
        """Read the chunks of a layer of an array, in order."""
        layout = self.layouts[name]
        place = self.attributes.layers_of(layout.dims[0]).index(layer)
        encoding = ArrayEncoding(self.layouts[name])
        grid = LayerGrid(layout.dims, encoding)
        by_file: dict[str, list[int]] = {}
        for number in range(grid.count):
            key, inside = grid.file_of(place, number)
            by_file.setdefault(key, []).append(inside)
        found: list[bytes] = []
        for key, numbers in by_file.items():
            file = self.path / name / key
            index = read_index(file, encoding)
            ranges = [index.range_of(number) for number in numbers]
            found += file.read_ranges([one for one in ranges if one is not None])
        return found

    def tokens(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """Read the next-token arrays; returns those that hold NaN or infinity, too."""
        values = {
            name: StoredArray(
                self.path / name, ArrayEncoding(self.layouts[name]), checksums_of(self.nodes[name])
            ).load()
            for name in NEXT_TOKEN
        }
        return values, [name for name in NEXT_TOKEN if name in self.nonfinite]


def sound_parts(
    path: Location, attributes: TraceAttributes, layouts: Mapping[str, ArrayLayout]
) -> SoundParts:
    """Read every byte of a trace, and tell what is as it was written.

    Nothing is sound if its metadata is damaged, or is another trace's than `attributes`.

    Parameters
    ----------
    path
        The trace.
    attributes, layouts
        What it should be.
    """
    found = SoundParts(path, attributes, layouts)
    try:
        trace = read_trace(path)
    except StoreError:
        return found
    changing = {"nonfinite", "seal", "versions"}
    if trace.attributes.model_dump(exclude=changing) != attributes.model_dump(exclude=changing):
        return found
    expected = {
        name: array_metadata(layout, checksums_of(trace.nodes[name]))
        for name, layout in layouts.items()
        if name in trace.nodes
    }
    if expected != trace.nodes or expected.keys() != layouts.keys():
        return found
    damage = find_damage(trace)
    bad: set[int] = set()
    for one in damage:
        array = one.array or ""
        layout = layouts.get(array)
        # Metadata and files that do not belong there are written again without computing anything.
        if layout is not None and layout.has_layers and one.chunk in trace.checksums[array]:
            bad |= set(attributes.layers) if one.layer is None else {one.layer}
    found.layers = set(attributes.layers) - bad
    found.has_tokens = not any(one.array in NEXT_TOKEN for one in damage)
    found.is_whole = not damage
    found.nonfinite, found.nodes = trace.attributes.nonfinite, trace.nodes
    found.versions = trace.attributes.versions
    return found
