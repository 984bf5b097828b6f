"""Writing a trace: records come in, and the trace is published when all are there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self

import numpy as np

from zarrtrace.errors import IncompleteError, StoreError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.format.layout import NEXT_TOKEN, ArrayLayout, trace_layout
from zarrtrace.format.shared_saes import share_saes
from zarrtrace.precision import cast_record, refusal
from zarrtrace.records import BFloat16, LayerRecord, Nonzeros, TokensRecord, TracePlan
from zarrtrace.storage import Address, Location, disk, locate
from zarrtrace.store.chunks import encode_file, encode_rows
from zarrtrace.store.damage import check_sizes
from zarrtrace.store.metadata import read_scenario
from zarrtrace.store.publish import end_publishing, old_of, publish_folder
from zarrtrace.store.repair import SoundParts, sound_parts
from zarrtrace.store.staged import StagedTrace, staging_folder

# Number of rows, and their chunks.
_Rows = tuple[int, list[bytes]]

_SAME_SIZES = "Give every record the sizes that the trace was created with."


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
        The trace; its name is that of the folder.
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
        self.path = run / plan.attributes.name
        self._attributes, self._layouts, self._coordinates = _described(plan)
        folder = staging_folder(run) / plan.attributes.name
        # On a disk the run that holds the folder was compared with what is asked for.
        settings = "" if run.path is not None else plan.settings
        self._expected = {
            layer: self._arrays_of_layer(layer, plan) for layer in (None, *self._attributes.layers)
        }
        self._staged = StagedTrace(
            folder, self._attributes, self._layouts, self._expected, settings
        )
        self._mutex = threading.Lock()
        self._begun, self._allow_nonfinite = False, allow_nonfinite
        # Whether the trace takes the place of another one.
        self._replaces = fresh
        self._source: SoundParts | None = None
        # By array and layer (None: next tokens) the encoded rows that wait, by first row.
        self._waiting: dict[tuple[str, int | None], dict[int, _Rows]] = {}
        self._nonfinite: dict[int | None, list[str]] = {}
        # Numbers of rows of the next layer and of next tokens are appended, by array.
        self._rows: dict[str, int] = {}
        with disk.explained(self.path):
            if self.path.path is not None:
                end_publishing(folder, self.path.path)
            if fresh:
                disk.remove_folder(folder)
            self._is_published = not fresh and self._open(repair=repair)
            if not self._is_published and self._source is None:
                self._begun = self._staged.resume(self._coordinates)

    def _open(self, *, repair: bool) -> bool:
        """Whether the trace is there, complete; notes its sound parts if it is to be repaired."""
        if not (self.path / "zarr.json").is_file():
            return False
        if not repair:
            check_sizes(read_scenario(self.path.parent, self.path.name))
            return True
        self._source = sound_parts(self.path, self._attributes, self._layouts)
        self._replaces = True
        return self._source is not None and self._source.is_whole

    # --- what is left to write -----------------------------------------------------------------

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers that are left to write."""
        if self._is_published:
            return ()
        stored = {*self._staged.stored.layers, *self._sound}
        return tuple(layer for layer in self._attributes.layers if layer not in stored)

    @property
    def needs_tokens(self) -> bool:
        """Whether the next-token arrays are left to write."""
        if self._is_published or None in self._sound:
            return False
        return bool(self._expected[None]) and not self._staged.stored.has_tokens

    @property
    def _sound(self) -> frozenset[int | None]:
        """Layers that are copied from the trace that is repaired; for next tokens, None."""
        return frozenset() if self._source is None else self._source.layers

    @property
    def is_published(self) -> bool:
        """Whether readers find the trace."""
        return self._is_published

    def _arrays_of_layer(self, layer: int | None, plan: TracePlan) -> dict[str, int]:
        """Return the arrays of a layer, or of next tokens, and the number of their rows."""
        attributes, expected = self._attributes, {}
        if layer is None:
            return {n: self._layouts[n].shape[0] for n in NEXT_TOKEN if n in self._layouts}
        variables = {sae.variable for sae in plan.saes if sae.layer == layer}
        for name, layout in self._layouts.items():
            if not layout.has_layers:
                continue
            if name.startswith("attention"):
                has = layer in attributes.layers_of(layout.dims[0])
            elif name == "residual":
                has = layer not in attributes.layers_without_residual
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
                layer, start, encoded = None, 0, self._encoded_tokens(record)
            else:
                layer, start, encoded = record.layer, record.start, self._encoded_layer(record)
            with self._mutex:
                for name, rows in encoded.items():
                    self._waiting.setdefault((name, layer), {})[start] = rows
                self._nonfinite.setdefault(layer, []).extend(record.nonfinite)
                self._append_next()

    def _encoded_layer(self, record: LayerRecord) -> dict[str, _Rows]:
        if record.layer not in self._expected:
            raise self._refused(
                f"layer {record.layer} is not one of this trace's layers",
                "Create the trace with all the layers that it will hold.",
            )
        return {
            name: self._encoded(record.layer, name, record.start, value)
            for name, value in _arrays_of(record).items()
        }

    def _encoded_tokens(self, record: TokensRecord) -> dict[str, _Rows]:
        encoded = {}
        for name in NEXT_TOKEN:
            value: np.ndarray = getattr(record, name)
            shape = self._layouts[name].shape if name in self._layouts else "none"
            if value.shape != shape:
                raise self._refused(f"{name} has shape {value.shape}, not {shape}", _SAME_SIZES)
            encoding, step = self._staged.encodings[name], self._layouts[name].chunks[0]
            parts = (value[start : start + step] for start in range(0, len(value), step))
            encoded[name] = len(value), [encode_file(encoding, part)[0] for part in parts]
        return encoded

    def _encoded(
        self, layer: int, name: str, start: int, value: np.ndarray | BFloat16 | Nonzeros
    ) -> _Rows:
        """Check and encode some rows of an array; returns their number and chunks."""
        if name not in self._expected[layer]:
            raise self._refused(
                f"the record of layer {layer} holds {name}, which it should not",
                "Create the trace with all the arrays that it will hold.",
            )
        layout = self._layouts[name]
        axis, inner = layout.row_axis - 1, layout.shape[1:]
        some_rows = value.shape[axis : axis + 1]
        end = start + sum(some_rows)
        if value.shape != (*inner[:axis], *some_rows, *inner[axis + 1 :]) or end > inner[axis]:
            raise self._refused(
                f"{name} of layer {layer} has shape {value.shape} from row {start} on; the array's "
                f"is {inner}",
                _SAME_SIZES,
            )
        step = layout.chunks[axis + 1]
        if start % step or (end % step and end < inner[axis]):
            where = f"start at {start}" if start % step else f"end at {end}"
            raise self._refused(
                f"rows of {name} {where}, in the middle of a chunk",
                f"Start and end records at multiples of {step} rows.",
            )
        return end - start, list(encode_rows(layout, self._staged.encodings[name], value))

    def _append_next(self) -> None:
        """Append what is there of next tokens, and of the next layers, in their order."""
        if not self._begun:
            versions = self._source.trace.attributes.versions if self._source else {}
            self._staged.create(self._coordinates, versions)
            self._begun = True
        if self._expected[None] and not self._staged.stored.has_tokens:
            self._append_layer(None)
        for layer in self._attributes.layers[len(self._staged.stored.layers) :]:
            if not self._append_layer(layer):
                return

    def _append_layer(self, layer: int | None) -> bool:
        """Append what is there of a layer, or of next tokens; returns whether that is all."""
        expected = self._expected[layer]
        if self._source is not None and layer in self._source.layers:
            for name, rows in expected.items():
                if name not in self._rows:  # else it was copied before the disk was full
                    self._staged.append(name, layer, self._source.chunks(name, layer))
                    self._rows[name] = rows
            self._nonfinite[layer] = self._source.nonfinite(expected, layer)
        elif layer not in self._nonfinite:  # no record of it has come
            return False
        for name, rows in expected.items():
            waiting = self._waiting.get((name, layer), {})
            while (start := self._rows.get(name, 0)) in waiting and start < rows:
                count, chunks = waiting[start]
                self._staged.append(name, layer, chunks)
                self._rows[name] = start + count
                del waiting[start]
        if any(self._rows.get(name, 0) < rows for name, rows in expected.items()):
            return False
        self._staged.end_layer(layer, list(dict.fromkeys(self._nonfinite[layer])))
        del self._nonfinite[layer]
        for name in expected:
            self._rows.pop(name, None)
            self._waiting.pop((name, layer), None)
        return True

    def _refused(self, what: str, remedy: str) -> StoreError:
        return StoreError(f"{self.path}: {what}", remedy=remedy)

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
            self._append_next()
            self._staged.complete()

    def publish(self) -> None:
        """Put the complete trace in its place; the disk holds what was written."""
        if self._is_published:
            return
        with disk.explained(self.path):
            if self.path.path is not None:
                self._staged.end()  # an upload that is interrupted still needs the journal
                publish_folder(self._staged.folder, self.path)
            elif not self._replaces and (self.path / "zarr.json").is_file():
                # Another writer of the same command was faster: its trace is whole.
                disk.remove_folder(self._staged.folder)
            else:
                publish_folder(self._staged.folder, self.path)
        self._is_published = True

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()


def is_untouched(run: Location, scenarios: Collection[str]) -> bool:
    """Whether nothing is stored of some traces; False where an object store would be asked."""
    if run.path is None:
        return False
    staged = staging_folder(run)
    here = {*disk.Disk().children(str(run.path)), *disk.Disk().children(str(staged))}
    return here.isdisjoint({*scenarios, *(old_of(staged / name).name for name in scenarios)})


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
    own, generation = plan.attention_positions, plan.attributes.generation
    attributes = plan.attributes.model_copy(update={"saes": shared, "seal": None, "nonfinite": {}})
    shape = replace(
        plan.shape,
        sae_fields=tuple(by_layer),
        special=plan.tokens.special is not None,
        generated=generation is not None,
        positions=None if plan.positions is None else len(plan.positions),
        attention_positions=None if own is None else len(own),
    )
    layouts = trace_layout(shape)
    texts = np.asarray(plan.tokens.texts, dtype=object)
    stored = np.arange(len(texts)) if plan.positions is None else np.asarray(plan.positions)
    values: dict[str, Any] = {
        "layer": np.asarray(attributes.layers),
        "attention_layer": np.asarray(attributes.layers_of("attention_layer")),
        "query": stored,
        "attention_query": np.asarray(own or (), dtype=np.int64),
        "token_id": np.asarray(plan.tokens.ids, dtype=np.uint32),
        "key_token": texts,
        "query_token": texts[stored],
        "special": np.asarray(plan.tokens.special or (), dtype=bool),
        "generated": np.arange(len(texts)) >= (generation.prompt_tokens if generation else 0),
        **{name: np.asarray(found, dtype=object) for name, found in by_layer.items()},
    }
    coordinates = {
        name: values[name] if name in values else _numbers(layout.shape[0])
        for name, layout in layouts.items()
        if len(layout.dims) == 1
    }
    return attributes, layouts, coordinates


@lru_cache(16)
def _numbers(count: int) -> np.ndarray:
    """Return the values of a coordinate that counts: hundreds of traces share those of features."""
    numbers = np.arange(count)
    numbers.flags.writeable = False
    return numbers


def _arrays_of(record: LayerRecord) -> Mapping[str, np.ndarray | BFloat16 | Nonzeros]:
    values: dict[str, np.ndarray | BFloat16 | Nonzeros] = {}
    if record.attention is not None and record.attention_mean is not None:
        values = {"attention": record.attention, "attention_mean": record.attention_mean}
    if record.residual is not None:
        values["residual"] = record.residual
    for name, features in record.features.items():
        suffix = name.removeprefix("features")
        values[name] = features.activations
        values[f"top_feature{suffix}"] = features.top_feature
        values[f"top_activation{suffix}"] = features.top_activation
    return values
