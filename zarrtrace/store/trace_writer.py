"""Writing a trace: records come in, and the trace is published when all are there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from zarrtrace.errors import IncompleteError, StoreError
from zarrtrace.format.attributes import TraceAttributes, share_saes
from zarrtrace.format.layout import ArrayLayout, trace_layout
from zarrtrace.precision import cast_record, refusal
from zarrtrace.records import BFloat16, LayerRecord, Nonzeros, TokensRecord, TracePlan
from zarrtrace.storage import Address, Location, disk, locate
from zarrtrace.store.chunks import encode_rows
from zarrtrace.store.damage import check_sizes
from zarrtrace.store.metadata import read_scenario
from zarrtrace.store.publish import end_publishing, publish_folder
from zarrtrace.store.repair import SoundParts, sound_parts
from zarrtrace.store.staged import StagedTrace, staging_folder


class TraceWriter:
    """Write one trace layer by layer, in any order, from any thread.

    Chunks stand in the order of layers in their files: a layer that comes early waits, compressed,
    for those before it. Use it as a context manager, or call :meth:`finish` after the last record.
    An existing trace is resumed: :attr:`missing_layers` lists what is left to write.

    Parameters
    ----------
    run
        The run that the trace belongs to.
    plan
        The trace; its scenario names the folder.
    repair
        Whether to read every byte of an existing trace, and to write it again with its sound parts
        if any is damaged.
    allow_nonfinite
        Whether to store NaN and infinity, and to name their layers in the attributes.
    fresh
        Whether to write the whole trace, and to publish it in place of an existing one.

    Raises
    ------
    IntegrityError
        If an existing trace is damaged or another scenario's, and `repair` is false.
    """

    def __init__(
        self,
        run: Address,
        plan: TracePlan,
        *,
        repair: bool = False,
        allow_nonfinite: bool = False,
        fresh: bool = False,
    ) -> None:
        run = locate(run)
        self.path = run / plan.attributes.scenario
        self._attributes, self._layouts, self._coordinates = _described(plan)
        folder = staging_folder(run) / plan.attributes.scenario
        # On a disk the run that holds the folder was compared with what is asked for.
        settings = "" if run.path is not None else plan.settings
        self._staged = StagedTrace(folder, self._attributes, self._layouts, settings)
        self._mutex = threading.Lock()
        self._begun, self._allow_nonfinite = False, allow_nonfinite
        self._is_fresh = fresh
        self._source: SoundParts | None = None
        self._expected = {n: self._arrays_of_layer(n, plan) for n in self._attributes.layers}
        # Encoded rows that wait, by array and layer: number of rows and chunks, by first row.
        self._waiting: dict[tuple[str, int], dict[int, tuple[int, list[bytes]]]] = {}
        self._nonfinite: dict[int, list[str]] = {}
        self._rows: dict[str, int] = {}
        with disk.explained(self.path):
            if self.path.path is not None:
                end_publishing(folder, self.path.path)
            if fresh:
                disk.remove_folder(folder)
            self._is_published = not fresh and self._open(repair=repair)
            if not self._is_published and self._source is None:
                self._begun = self._staged.resume(self._coordinates, self._expected)

    def _open(self, *, repair: bool) -> bool:
        """Whether the trace is there, complete; notes its sound parts if it is to be repaired."""
        if not (self.path / "zarr.json").is_file():
            return False
        if repair:
            self._source = sound_parts(self.path, self._attributes, self._layouts)
            return self._source.is_whole
        check_sizes(read_scenario(self.path.parent, self.path.name))
        return True

    # --- what is left to write -----------------------------------------------------------------

    @property
    def _stored(self) -> set[int]:
        if self._is_published:
            return set(self._attributes.layers)
        sound = set() if self._source is None else self._source.layers
        return {*self._staged.layers, *sound}

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers that are left to write."""
        stored = self._stored
        return tuple(layer for layer in self._attributes.layers if layer not in stored)

    @property
    def needs_tokens(self) -> bool:
        """Whether the next-token arrays are left to write."""
        if "next_token" not in self._layouts or self._is_published or self._staged.has_tokens:
            return False
        return self._source is None or not self._source.has_tokens

    @property
    def is_published(self) -> bool:
        """Whether readers find the trace."""
        return self._is_published

    def _arrays_of_layer(self, layer: int, plan: TracePlan) -> dict[str, int]:
        """Return the arrays that a layer has, and the number of their rows."""
        attributes, expected = self._attributes, {}
        variables = {sae.variable for sae in plan.saes if sae.layer == layer}
        for name, layout in self._layouts.items():
            if not layout.has_layers:
                continue
            if name.startswith("attention"):
                has = layer in attributes.layers_of(layout.dims[0])
            else:
                suffix = layout.dims[-1].removeprefix("feature_rank").removeprefix("feature")
                has_sae = f"features{suffix}" in variables if plan.saes else True
                has = has_sae and layer not in attributes.layers_without_sae
            if has:
                expected[name] = layout.shape[layout.row_axis]
        return expected

    # --- adding --------------------------------------------------------------------------------

    def append(self, record: LayerRecord | TokensRecord) -> None:
        """Store one record in the trace's precision; a layer counts once all its rows are there.

        Raises
        ------
        StoreError
            If the record's layer or shape is not the trace's.
        NonFiniteError
            If stored values would not be finite, and `allow_nonfinite` is false.
        NoSpaceError
            If the disk is full.
        """
        computed, record = record, cast_record(record, self._attributes)
        if record.nonfinite and not self._allow_nonfinite:
            raise refusal(computed, record, self._attributes)
        with disk.explained(self.path):
            if isinstance(record, TokensRecord):
                self._append_tokens(record)
                return
            if record.layer not in self._expected:
                raise StoreError(
                    f"{self.path}: layer {record.layer} is not one of this trace's layers",
                    remedy="Create the trace with all the layers that it will hold.",
                )
            encoded = {
                name: self._encoded(record.layer, name, record.start, value)
                for name, value in _arrays_of(record).items()
            }
            with self._mutex:
                self._begin()
                for name, rows in encoded.items():
                    self._waiting.setdefault((name, record.layer), {})[record.start] = rows
                self._nonfinite.setdefault(record.layer, []).extend(record.nonfinite)
                self._append_next()

    def _encoded(
        self, layer: int, name: str, start: int, value: np.ndarray | BFloat16 | Nonzeros
    ) -> tuple[int, list[bytes]]:
        """Check and encode some rows of an array; returns their number and chunks."""
        layout = self._layouts.get(name)
        if layout is None or name not in self._expected[layer]:
            raise StoreError(
                f"{self.path}: the record of layer {layer} holds {name}, which it should not",
                remedy="Create the trace with all the arrays that it will hold.",
            )
        axis, inner = layout.row_axis - 1, layout.shape[1:]
        rows = value.shape[axis] if len(value.shape) == len(inner) else -1
        others = (*value.shape[:axis], *value.shape[axis + 1 :])
        if rows < 0 or start + rows > inner[axis] or others != (*inner[:axis], *inner[axis + 1 :]):
            raise StoreError(
                f"{self.path}: {name} of layer {layer} has shape {value.shape} from row {start} "
                f"on; the array's is {inner}",
                remedy="Give every record the sizes that the trace was created with.",
            )
        step, end = layout.chunks[axis + 1], start + rows
        if start % step or (end % step and end < inner[axis]):
            where = f"start at {start}" if start % step else f"end at {end}"
            raise StoreError(
                f"{self.path}: rows of {name} {where}, in the middle of a chunk",
                remedy=f"Start and end records at multiples of {step} rows.",
            )
        return rows, list(encode_rows(layout, self._staged.encodings[name], value))

    def _begin(self) -> None:
        if not self._begun:
            versions = None if self._source is None else self._source.versions
            self._staged.create(self._coordinates, versions)
            self._begun = True
            self._append_next()  # sound layers of a trace that is repaired

    def _append_next(self) -> None:
        """Append what is there of the next layers, in their order."""
        for layer in self._attributes.layers[len(self._staged.layers) :]:
            if self._source is not None and layer in self._source.layers:
                self._copy(self._source, layer)
                continue
            expected = self._expected[layer]
            if layer not in self._nonfinite:  # no record of it has come
                return
            for name, rows in expected.items():
                waiting = self._waiting.get((name, layer), {})
                while (start := self._rows.get(name, 0)) in waiting and start < rows:
                    count, chunks = waiting[start]
                    self._staged.append(name, layer, chunks)
                    self._rows[name] = start + count
                    del waiting[start]
            if any(self._rows.get(name, 0) < rows for name, rows in expected.items()):
                return
            found = dict.fromkeys(self._nonfinite[layer])
            self._staged.end_layer(layer, list(expected), list(found))
            del self._nonfinite[layer]
            self._rows.clear()
            for name in expected:
                self._waiting.pop((name, layer), None)

    def _copy(self, source: SoundParts, layer: int) -> None:
        """Copy the chunks of a layer from the trace that is repaired."""
        names = list(self._expected[layer])
        for name in names:
            self._staged.append(name, layer, source.chunks(name, layer))
        nonfinite = [name for name in names if layer in source.nonfinite.get(name, ())]
        self._staged.end_layer(layer, names, nonfinite)

    def _append_tokens(self, record: TokensRecord) -> None:
        values = {
            "next_token": record.next_token,
            "next_token_logprob": record.next_token_logprob,
            "next_token_text": record.next_token_text,
        }
        for name, value in values.items():
            if name not in self._layouts or value.shape != self._layouts[name].shape:
                wanted = self._layouts[name].shape if name in self._layouts else "none"
                raise StoreError(
                    f"{self.path}: {name} has shape {value.shape}, not {wanted}",
                    remedy="Give every record the sizes that the trace was created with.",
                )
        with self._mutex:
            self._begin()
            self._staged.add_tokens(values, record.nonfinite)

    # --- finishing -----------------------------------------------------------------------------

    def complete(self) -> None:
        """Write everything that a complete trace has, and publish it not yet.

        Raises
        ------
        IncompleteError
            If a layer was not appended.
        """
        if self._is_published:
            return
        if self.missing_layers or self.needs_tokens:
            raise incomplete(self.path, self._attributes.layers, self.missing_layers)
        with disk.explained(self.path), self._mutex:
            self._begin()
            self._append_next()
            if self._source is not None and not self._staged.has_tokens and self._source.has_tokens:
                self._staged.add_tokens(*self._source.tokens())
            self._staged.complete()

    def publish(self) -> None:
        """Put the complete trace in its place; the disk holds what was written."""
        if self._is_published:
            return
        with disk.explained(self.path):
            if self.path.path is not None:
                self._staged.end()  # an upload that is interrupted still needs the journal
                publish_folder(self._staged.folder, self.path)
            elif (
                self._source is None and not self._is_fresh and (self.path / "zarr.json").is_file()
            ):
                # Another writer of the same command was faster: its trace is whole.
                disk.remove_folder(self._staged.folder)
            else:
                publish_folder(self._staged.folder, self.path)
        self._is_published = True
        # A run may have thousands of traces.
        self._waiting, self._source = {}, None
        self._staged = StagedTrace(self._staged.folder, self._attributes, {})

    def finish(self) -> None:
        """Complete the trace, have the disk hold it, and publish it.

        Raises
        ------
        IncompleteError
            If a layer was not appended.
        """
        if self._is_published:
            return
        self.complete()
        with disk.explained(self.path):
            disk.sync(self._staged.folder)
        self.publish()
        with contextlib.suppress(OSError):  # the last trace that is staged leaves no folder
            self._staged.folder.parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()


def incomplete(path: Location, layers: Sequence[int], missing: Sequence[int]) -> IncompleteError:
    """Return the error that names what a trace lacks."""
    named = ", ".join(map(str, missing)) or "none"
    return IncompleteError(
        f"{path}: not complete: {len(missing)} of {len(layers)} layers missing ({named})",
        why="The extraction was interrupted, or is still running.",
        remedy="Run the same 'zarrtrace extract' again to resume it, or open it with "
        "missing='nan'.",
    )


def _described(
    plan: TracePlan,
) -> tuple[TraceAttributes, dict[str, ArrayLayout], dict[str, np.ndarray]]:
    """Return attributes, layouts, and the values of coordinates."""
    shared, by_layer = share_saes(plan.saes, plan.attributes.layers)
    attributes = plan.attributes.model_copy(update={"saes": shared, "seal": None, "nonfinite": {}})
    shape = replace(
        plan.shape,
        sae_fields=tuple(by_layer),
        special=plan.tokens.special is not None,
        attention_queries=None if plan.queries is None else len(plan.queries),
    )
    layouts = trace_layout(shape)
    texts = np.asarray(plan.tokens.texts, dtype=object)
    values: dict[str, Any] = {
        "layer": np.asarray(attributes.layers),
        "attention_layer": np.asarray(attributes.layers_of("attention_layer")),
        "attention_query": np.asarray(plan.queries or (), dtype=np.int64),
        "token_id": np.asarray(plan.tokens.ids, dtype=np.uint32),
        "key_token": texts,
        "query_token": texts,
        "special": np.asarray(plan.tokens.special or (), dtype=bool),
        **{name: np.asarray(found, dtype=object) for name, found in by_layer.items()},
    }
    coordinates = {
        name: values.get(name, np.arange(layout.shape[0]))
        for name, layout in layouts.items()
        if len(layout.dims) == 1
    }
    return attributes, layouts, coordinates


def _arrays_of(record: LayerRecord) -> Mapping[str, np.ndarray | BFloat16 | Nonzeros]:
    values: dict[str, np.ndarray | BFloat16 | Nonzeros] = {}
    if record.attention is not None and record.attention_mean is not None:
        values = {"attention": record.attention, "attention_mean": record.attention_mean}
    for name, features in record.features.items():
        suffix = name.removeprefix("features")
        values[name] = features.activations
        values[f"top_feature{suffix}"] = features.top_feature
        values[f"top_activation{suffix}"] = features.top_activation
    return values
