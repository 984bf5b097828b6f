"""Writing traces.

What plain Zarr leaves open is settled here: a layer counts as stored only once the trace's journal
(its attribute ``zarrtrace.stored``) holds the size and hash of what each array wrote for it, and a
trace that is not complete says which layers it lacks.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from zarrtrace.errors import StoreError
from zarrtrace.precision import cast_record, refusal
from zarrtrace.spec import (
    LayerRecord,
    Nonzeros,
    Stored,
    Tokens,
    TokensRecord,
    TraceAttributes,
    TraceShape,
    trace_layout,
)
from zarrtrace.store.attributes import (
    COORDINATES,
    METADATA,
    TOKENS,
    canonical,
    files_of_entry,
    incomplete,
    read_trace_attributes,
)
from zarrtrace.store.files import clear_errors, fingerprint, fingerprint_of, flush, fsync
from zarrtrace.store.nodes import consolidate, replace_journal, update_attributes
from zarrtrace.store.objects import Location, locate
from zarrtrace.store.resuming import as_stored, resume
from zarrtrace.store.shards import write_block, write_nonzeros


class TraceWriter:
    """Write one trace layer by layer, in any order, from any thread.

    Use it as a context manager, or call :meth:`finish` after the last record. A trace that exists
    is gone on with: :attr:`missing_layers` says what is still to come.

    Parameters
    ----------
    path
        Folder of the trace, or its address in an object store; created if need be.
    attributes
        What the trace says of itself; the journal is the writer's own.
    shape
        Sizes and dtypes of its arrays.
    tokens
        The prompt's tokens.
    repair
        Whether to read every byte of a trace that exists, and to take damaged layers for missing.
    allow_nonfinite
        Whether to store NaN and infinity and to name their layers in the attributes.

    Raises
    ------
    IntegrityError
        If the trace's metadata or coordinates are damaged, and `repair` is false.
    """

    def __init__(
        self,
        path: str | Location,
        attributes: TraceAttributes,
        shape: TraceShape,
        tokens: Tokens,
        *,
        repair: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        self._allow_nonfinite = allow_nonfinite
        self.path = locate(path)
        self._layout = as_stored(self.path, trace_layout(shape))
        # Written so far, by layer and array: how many rows from which row on.
        self._rows: defaultdict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        # What was written for a layer in one file need not be read again to be journalled.
        self._fingerprints: dict[tuple[str, str], Stored] = {}
        self._nonfinite: set[str] = set()
        self._mutex = threading.Lock()
        with clear_errors(self.path):
            found = resume(self.path, attributes, self._layout, tokens, repair=repair)
        # As text: over many scenarios, the journal's values would fill the memory.
        self._entries = {
            key: canonical({name: one.model_dump(mode="json") for name, one in entry.items()})
            for key, entry in found.stored.items()
        }
        self._attributes = found.model_copy(update={"stored": {}})

    def _at(self, key: str, name: str) -> int | None:
        """Return where a layer is in an array; None for the journal's other keys."""
        if not key.isdigit():
            return None
        return self._attributes.index_of(int(key), self._layout[name].dims[0])

    def _fingerprint(self, key: str, name: str) -> Stored:
        return fingerprint(self.path, self._files(key, name))

    def _files(self, key: str, name: str) -> list[str]:
        layout = self._layout[name]
        file_shape = layout.shards or layout.chunks
        return files_of_entry(self._attributes, key, name, layout.dims, layout.shape, file_shape)

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers that are still to be appended."""
        return tuple(n for n in self._attributes.layers if str(n) not in self._entries)

    @property
    def needs_tokens(self) -> bool:
        """Whether the next-token arrays are still to be appended."""
        return "next_token" in self._layout and TOKENS not in self._entries

    def append(self, record: LayerRecord | TokensRecord) -> None:
        """Store one record in the trace's precision; a layer counts once all its rows are there.

        Raises
        ------
        NonFiniteError
            If stored values would not be finite, and ``allow_nonfinite`` is false.
        StoreError
            If the record's layer or shape is not the trace's.
        NoSpaceError
            If the disk is full.
        """
        computed, record = record, cast_record(record, self._attributes)
        with clear_errors(self.path):
            if record.nonfinite:
                if not self._allow_nonfinite:
                    raise refusal(computed, record, self._attributes)
                key = TOKENS if isinstance(record, TokensRecord) else str(record.layer)
                self._nonfinite.add(key)
            if isinstance(record, TokensRecord):
                self._append_tokens(
                    {
                        "next_token": record.next_token,
                        "next_token_logprob": record.next_token_logprob,
                    }
                )
            elif record.layer in self._attributes.layers:
                self._append_rows(record)
            else:
                raise StoreError(
                    f"{self.path}: layer {record.layer} is not one of this trace's layers",
                    remedy="Create the trace with all the layers that it will hold.",
                )

    def _append_rows(self, record: LayerRecord) -> None:
        """Store some rows of a layer; it counts when the last rows of its last array are there."""
        key, expected = str(record.layer), self._expected(record.layer)
        for name, value in _arrays_of(record).items():
            if name not in expected:
                raise StoreError(
                    f"{self.path}: the record of layer {record.layer} holds {name}, which it "
                    "should not",
                    remedy="Create the trace with all the arrays that it will hold.",
                )
            self._write_rows(key, name, record.start, value)
            with self._mutex:
                self._rows[key, name][record.start] = value.shape[self._row_axis(name) - 1]
        with self._mutex:
            whole = all(
                sum(self._rows[key, name].values()) == rows for name, rows in expected.items()
            )
            if whole:  # for nobody else: two threads may write the last rows at the same time
                for name in expected:
                    del self._rows[key, name]
        if whole:
            self._journal(key, list(expected))

    def _expected(self, layer: int) -> dict[str, int]:
        """Return the rows of each array that a layer has."""
        attributes = self._attributes
        no_attention = str(layer) in attributes.layers_without_attention
        variables = {sae.variable for sae in attributes.saes if sae.layer == layer}
        expected: dict[str, int] = {}
        for name, layout in self._layout.items():
            if name in ("attention", "attention_mean"):
                if not no_attention:
                    expected[name] = (
                        layout.shape[-1] if attributes.queries is None else len(attributes.queries)
                    )
            elif len(layout.dims) > 1 and layout.dims[0] == "layer":
                suffix = name.removeprefix("features").removeprefix("top_feature")
                variable = f"features{suffix.removeprefix('top_activation')}"
                has_sae = variable in variables if attributes.saes else True
                if has_sae and layer not in attributes.layers_without_sae:
                    expected[name] = layout.shape[1]
        return expected

    def _row_axis(self, name: str) -> int:
        return self._layout[name].dims.index("query")

    def _write_rows(self, key: str, name: str, start: int, value: np.ndarray | Nonzeros) -> None:
        layout, axis = self._layout[name], self._row_axis(name)
        at = self._at(key, name)
        assert at is not None  # noqa: S101 -- the arrays of a layer have one
        chosen = self._attributes.queries if name in ("attention", "attention_mean") else None
        stop = start + value.shape[axis - 1] if value.ndim == len(layout.shape) - 1 else -1
        fits = (
            value.ndim == len(layout.shape) - 1
            and stop <= (layout.shape[axis] if chosen is None else len(chosen))
            and (*value.shape[: axis - 1], *value.shape[axis:])
            == (*layout.shape[1:axis], *layout.shape[axis + 1 :])
        )
        if not fits:
            raise StoreError(
                f"{self.path}: {name} of layer {key} has shape {value.shape} from row {start} on; "
                f"the array's is {layout.shape[1:]}",
                remedy="Give every record the sizes that the trace was created with.",
            )
        step = (layout.shards or layout.chunks)[axis]
        if chosen is None and start % step:
            raise StoreError(
                f"{self.path}: rows of {name} start at {start}, in the middle of a file",
                why="Two records would write one file, and one of them would be lost.",
                remedy=f"Start records at multiples of {step} rows.",
            )
        if chosen is not None and not isinstance(value, Nonzeros):
            for row, query in enumerate(chosen[start:stop]):
                one = value[(slice(None),) * (axis - 1) + (slice(row, row + 1),)]
                self._write_block(key, name, self._corner(name, at, query), one)
            return
        self._write_block(key, name, self._corner(name, at, start), value)

    def _corner(self, name: str, at: int, row: int) -> tuple[int, ...]:
        """Return the index of a block's first element."""
        axis = self._row_axis(name)
        return tuple(
            at if i == 0 else row if i == axis else 0 for i in range(len(self._layout[name].dims))
        )

    def _write_block(
        self, key: str, name: str, corner: tuple[int, ...], value: np.ndarray | Nonzeros
    ) -> None:
        file, layout = self.path / name, self._layout[name]
        if isinstance(value, Nonzeros):
            layer, row, feature = corner
            written = write_nonzeros(file, layout, (layer, row, feature), value)
        else:
            written = write_block(file, layout, corner, value[None] if key != TOKENS else value)
        if len(written) == 1 and len(self._files(key, name)) == 1:
            self._fingerprints[key, name] = fingerprint_of(written.values())

    def _append_tokens(self, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            if value.shape != self._layout[name].shape:
                raise StoreError(
                    f"{self.path}: {name} has shape {value.shape}, not {self._layout[name].shape}",
                    remedy="Give every record the sizes that the trace was created with.",
                )
            self._write_block(TOKENS, name, (0,) * value.ndim, value)
        self._journal(TOKENS, list(values))

    def _journal(self, key: str, names: Sequence[str]) -> None:
        """Say that the arrays of a layer, or of the tokens, are stored."""
        entry = {
            name: self._fingerprints.pop((key, name))
            if (key, name) in self._fingerprints
            else self._fingerprint(key, name)
            for name in names
        }
        with self._mutex:
            entries = dict(self._entries)
            entries[key] = canonical(
                {name: one.model_dump(mode="json") for name, one in entry.items()}
            )
            joined = ",".join(f'"{at}":{entries[at]}' for at in sorted(entries))
            journal = f"{{{joined}}}"
            if key in self._nonfinite:
                update_attributes(self.path, partial(self._with_journal, json.loads(journal)))
            else:
                replace_journal(self.path, journal)
            # Not before it is in the file: who finds nothing missing finishes the trace.
            self._entries = entries

    def _with_journal(self, journal: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
        """Return attributes with another journal."""
        nonfinite = self._nonfinite | {*attributes["nonfinite"]}
        found = [at for at in self._order if at in nonfinite and at in journal]
        return {**attributes, "stored": journal, "nonfinite": found}

    @property
    def _order(self) -> list[str]:
        """The journal's keys as they stand in a finished trace."""
        return [*map(str, self._attributes.layers), TOKENS, COORDINATES, METADATA]

    def finish(self, *, flushed: bool = False) -> None:
        """Mark the trace complete: everything is on the disk, and its metadata consolidated.

        Parameters
        ----------
        flushed
            Whether the disk holds all that was written since the last record.

        Raises
        ------
        IncompleteError
            If a layer was not appended.
        """
        found = read_trace_attributes(self.path)
        if self.missing_layers or self.needs_tokens:
            raise incomplete(self.path, found)
        with clear_errors(self.path):
            if not flushed:
                flush(self.path)
            stored = {key: found.stored[key] for key in self._order if key in found.stored}
            nonfinite = tuple(key for key in self._order if key in found.nonfinite)
            complete = found.model_copy(
                update={"complete": True, "stored": stored, "nonfinite": nonfinite}
            )
            consolidate(self.path, complete.model_dump(mode="json"))
            fsync(self.path / "zarr.json")
        self._entries = dict.fromkeys(self._entries, "")  # a run may have thousands of traces

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


def _arrays_of(record: LayerRecord) -> dict[str, np.ndarray | Nonzeros]:
    values: dict[str, np.ndarray | Nonzeros] = {}
    if record.attention is not None and record.attention_mean is not None:
        attention = np.asarray(record.attention)
        values = {"attention": attention, "attention_mean": record.attention_mean}
    for name, features in record.features.items():
        suffix = name.removeprefix("features")
        values[name] = features.activations
        values[f"top_feature{suffix}"] = features.top_feature
        values[f"top_activation{suffix}"] = features.top_activation
    return values
