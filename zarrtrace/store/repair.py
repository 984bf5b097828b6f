"""The sound parts of a damaged trace, which are used again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from zarrtrace.errors import FormatVersionError, StoreError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import NEXT_TOKEN, ArrayLayout
from zarrtrace.storage import Location
from zarrtrace.store.chunks import read_index
from zarrtrace.store.damage import find_damage
from zarrtrace.store.journal import chunk_places
from zarrtrace.store.metadata import Group, read_trace
from zarrtrace.store.nodes import array_metadata, stored_checksums


@dataclass(frozen=True)
class SoundParts:
    """Parts of a trace whose every byte is as it was written.

    Attributes
    ----------
    trace
        The trace, whose metadata is sound.
    layers
        Layers of which all arrays are sound; None among them stands for next tokens.
    is_whole
        Whether everything is sound.
    """

    trace: Group[TraceAttributes]
    layers: frozenset[int | None]
    is_whole: bool

    def chunks(self, name: str, layer: int | None) -> list[bytes]:
        """Read the chunks of a layer of an array, or of next tokens, in order."""
        found: list[bytes] = []
        for key, in_file in groupby(chunk_places(self.trace, name, layer), itemgetter(0)):
            file = self.trace.path / name / key
            if layer is None:
                found.append(file.read())
                continue
            index = read_index(file, self.trace.encodings[name])
            ranges = [index.range_of(number) for _, number in in_file]
            found += file.read_ranges([one for one in ranges if one is not None])
        return found

    def nonfinite(self, names: Iterable[str], layer: int | None) -> list[str]:
        """Return the arrays in which the model computed NaN or infinity in a layer."""
        known = self.trace.attributes.nonfinite
        return [name for name in names if name in known and layer in (None, *known[name])]


def sound_parts(
    path: Location, attributes: TraceAttributes, layouts: Mapping[str, ArrayLayout]
) -> SoundParts | None:
    """Read every byte of a trace, and tell what is as it was written.

    None if its metadata is damaged, or is another trace's than `attributes`.

    Parameters
    ----------
    path
        The trace.
    attributes, layouts
        Attributes and arrays that it should have.

    Raises
    ------
    FormatVersionError
        If a newer zarrtrace wrote it.
    """
    try:
        trace = read_trace(path)
    except FormatVersionError:  # sound, and more than this code could write again
        raise
    except StoreError:
        return None
    changing = {"nonfinite", "seal", "versions"}
    if trace.attributes.model_dump(exclude=changing) != attributes.model_dump(exclude=changing):
        return None
    if layouts.keys() != trace.nodes.keys() or any(
        array_metadata(layout, stored_checksums(trace.nodes[name])) != trace.nodes[name]
        for name, layout in layouts.items()
    ):
        return None
    damage = find_damage(trace)
    bad: set[int | None] = set()
    for one in damage:
        name = one.array or ""
        if name in NEXT_TOKEN:
            bad.add(None)
        # Metadata and files that do not belong there are written again without computing anything.
        elif name in layouts and layouts[name].has_layers and one.chunk in trace.checksums[name]:
            bad |= set(attributes.layers) if one.layer is None else {one.layer}
    return SoundParts(trace, frozenset({*attributes.layers, None} - bad), is_whole=not damage)
