"""Writing runs and traces; the only module that writes Zarr.

What plain Zarr leaves open is settled here: a layer counts as stored only once the trace's journal
(its attribute ``zarrtrace.stored``) holds the size and hash of what each array wrote for it, a run
has one writer at a time, and a trace that is not complete says which layers it lacks.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec

from zarrtrace.errors import ConfigMismatchError, IncompleteError, StoreError
from zarrtrace.scenarios import check_name
from zarrtrace.spec import (
    LABELS,
    NAMESPACE,
    ArrayLayout,
    LayerRecord,
    RunAttributes,
    Stored,
    Tokens,
    TokensRecord,
    TraceAttributes,
    TraceShape,
    trace_layout,
)
from zarrtrace.store.attributes import (
    files_of,
    incomplete,
    read_run_attributes,
    read_trace_attributes,
)
from zarrtrace.store.files import (
    clear_errors,
    fingerprint,
    fsync,
    lock,
    remove_partial_files,
    unlock,
)

#: The journal's keys for arrays that have no layer: what comes next, and the coordinates.
TOKENS = "tokens"
COORDINATES = "coordinates"


class RunWriter:
    """Write a run, one trace a scenario; resumes where an earlier writer stopped.

    Parameters
    ----------
    path
        Folder of the run; created if need be.
    scenarios
        Names of the traces.
    config
        What was asked for, JSON values only. A run that exists must have been asked for alike.
    overwrite
        Replace a run that exists, once the new one is finished.

    Raises
    ------
    NotATraceError
        If `path` exists and is not a run.
    ConfigMismatchError
        If the run was started with another configuration.
    LockedError
        If another process is writing it.
    """

    def __init__(
        self,
        path: str | Path,
        scenarios: Sequence[str],
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        self._final = Path(path).absolute()
        self._attributes = RunAttributes(
            scenarios=tuple(check_name(name) for name in scenarios), config=dict(config)
        )
        self._overwrite = overwrite
        self.path = self._final

    def __enter__(self) -> Self:
        with clear_errors(self._final):
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._final)
            try:
                self._open()
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unlock()

    def _open(self) -> None:
        just_replaced = self._end_earlier_swap()
        remove_partial_files(self._final.glob("*.partial"))
        exists = self._final.is_dir() and any(self._final.iterdir())
        if exists or self._final.is_file():
            previous = read_run_attributes(self._final)
            same = not _differing(previous, self._attributes)
            if not self._overwrite:
                _refuse_other_config(self._final, previous, self._attributes)
            if not self._overwrite or (just_replaced and same):
                return
            self.path = self._new
            if self._can_go_on(self._new):
                return
            shutil.rmtree(self._new, ignore_errors=True)
        zarr.create_group(
            self.path,
            zarr_format=3,
            attributes={NAMESPACE: self._attributes.model_dump(mode="json")},
            overwrite=True,
        )

    @property
    def _new(self) -> Path:
        return self._final.with_name(f".{self._final.name}.new")

    @property
    def _old(self) -> Path:
        return self._final.with_name(f".{self._final.name}.old")

    def _can_go_on(self, path: Path) -> bool:
        """Whether an earlier writer, stopped while it replaced a run, was asked for the same."""
        try:
            return not _differing(read_run_attributes(path), self._attributes)
        except StoreError:
            return False

    def _end_earlier_swap(self) -> bool:
        """Bring to its end what a writer killed in :meth:`_swap` began; say if it did."""
        began = self._old.exists() and not self._final.exists()
        if began:
            (self._new if self._new.exists() else self._old).rename(self._final)
        shutil.rmtree(self._old, ignore_errors=True)
        return began

    def _swap(self) -> None:
        """Put the finished new run where the old one is; whole at any moment, if renamed."""
        shutil.rmtree(self._old, ignore_errors=True)
        self._final.rename(self._old)
        self._new.rename(self._final)
        self.path = self._final
        shutil.rmtree(self._old)

    def _unlock(self) -> None:
        unlock(self._final, self._lock)

    def trace(self, attributes: TraceAttributes, shape: TraceShape, tokens: Tokens) -> TraceWriter:
        """Return the writer of one scenario's trace, which may hold layers already."""
        return TraceWriter(self.path / attributes.scenario, attributes, shape, tokens)

    def finish(self) -> None:
        """Mark the run complete if its traces are, and consolidate its metadata.

        Raises
        ------
        IncompleteError
            If a scenario has layers missing; what is there stays readable.
        """
        missing = [
            name
            for name in self._attributes.scenarios
            if not (self.path / name).is_dir()
            or not read_trace_attributes(self.path / name).complete
        ]
        if missing:
            raise IncompleteError(
                f"{self._final}: {len(missing)} of {len(self._attributes.scenarios)} scenarios "
                f"are not complete: {', '.join(missing[:5])}",
                remedy="Run the same command again; it goes on where this one stopped.",
            )
        with clear_errors(self._final):
            group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            complete = self._attributes.model_copy(update={"complete": True})
            group.attrs[NAMESPACE] = complete.model_dump(mode="json")
            _consolidate(self.path)
            fsync(self.path / "zarr.json")
            if self.path != self._final:
                self._swap()


class TraceWriter:
    """Write one trace layer by layer, in any order, from any thread.

    Use it as a context manager, or call :meth:`finish` after the last record. A trace that exists
    is gone on with: :attr:`missing_layers` says what is still to come.

    Parameters
    ----------
    path
        Folder of the trace; created if need be.
    attributes
        What the trace says of itself; the journal is the writer's own.
    shape
        Sizes and dtypes of its arrays.
    tokens
        The prompt's tokens.
    """

    def __init__(
        self, path: str | Path, attributes: TraceAttributes, shape: TraceShape, tokens: Tokens
    ) -> None:
        self.path = Path(path)
        self._layout = trace_layout(shape)
        self._attributes = attributes
        # Written so far, by layer and array: how many rows from which row on.
        self._rows: defaultdict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        self._mutex = threading.Lock()
        with clear_errors(self.path):
            earlier = self._journal_of_earlier_writer()
            self._attributes = attributes.model_copy(update={"stored": earlier, "complete": False})
            if COORDINATES in earlier:
                remove_partial_files(self.path.rglob("*.partial"))
                self._group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            else:
                self._create(tokens)
            self._arrays: dict[str, zarr.Array[Any]] = {
                name: self._group[name]  # type: ignore[misc]
                for name in self._layout
            }

    def _journal_of_earlier_writer(self) -> dict[str, dict[str, Stored]]:
        """Entries of an existing journal whose files are still what they were."""
        if not all((self.path / name / "zarr.json").exists() for name in ("", *self._layout)):
            return {}
        attributes = read_trace_attributes(self.path)
        return {
            key: entry
            for key, entry in attributes.stored.items()
            if all(self._fingerprint(key, name) == stored for name, stored in entry.items())
        }

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
        return files_of(name, layout.shape, file_shape, self._at(key, name))

    def _create(self, tokens: Tokens) -> None:
        self._attributes = self._attributes.model_copy(update={"stored": {}})
        if self.path.exists():
            shutil.rmtree(self.path)
        self._group = zarr.create_group(
            self.path,
            zarr_format=3,
            attributes={
                NAMESPACE: self._attributes.model_dump(mode="json"),
                # xarray's convention for coordinates that are no index
                "coordinates": " ".join(name for name in LABELS if name in self._layout),
            },
        )
        values: dict[str, Any] = {
            "layer": np.asarray(self._attributes.layers),
            "attention_layer": np.asarray(
                [
                    layer
                    for layer in self._attributes.layers
                    if str(layer) not in self._attributes.layers_without_attention
                ]
            ),
            "token_id": np.asarray(tokens.ids, dtype=np.uint32),
            "has_attention": np.isin(
                np.arange(len(tokens.ids)), np.asarray(self._attributes.queries or (), np.int64)
            ),
        }
        values["query_token"] = values["key_token"] = np.asarray(tokens.texts, dtype=object)
        for name, layout in self._layout.items():
            array = create_array(self._group, name, layout)
            if len(layout.dims) == 1:
                array[:] = values.get(name, np.arange(layout.shape[0]))
        coordinates = [name for name, layout in self._layout.items() if len(layout.dims) == 1]
        entry = {name: self._fingerprint(COORDINATES, name) for name in coordinates}
        self._write_attributes(stored={COORDINATES: entry})

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers that are still to be appended."""
        return self._attributes.missing_layers

    @property
    def needs_tokens(self) -> bool:
        """Whether the next-token arrays are still to be appended."""
        return "next_token" in self._layout and TOKENS not in self._attributes.stored

    def append(self, record: LayerRecord | TokensRecord) -> None:
        """Store one record; a layer counts once all its rows are there.

        Raises
        ------
        StoreError
            If the record's layer or shape is not the trace's.
        NoSpaceError
            If the disk is full.
        """
        with clear_errors(self.path):
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

    def _write_rows(self, key: str, name: str, start: int, value: np.ndarray) -> None:
        array, layout, axis = self._arrays[name], self._layout[name], self._row_axis(name)
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
        if chosen is not None:
            for row, query in enumerate(chosen[start:stop]):
                array[at, ..., query, :] = value[..., row, :]
            return
        # Zarr would read what is there, and it may be damaged.
        for file in self._files(key, name):
            if start // step <= int(file.split("/")[2 + axis]) < -(-stop // step):
                (self.path / file).unlink(missing_ok=True)
        array[at, ..., start:stop, :] = value

    def _append_tokens(self, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            if value.shape != self._layout[name].shape:
                raise StoreError(
                    f"{self.path}: {name} has shape {value.shape}, not {self._layout[name].shape}",
                    remedy="Give every record the sizes that the trace was created with.",
                )
            for file in self._files(TOKENS, name):
                (self.path / file).unlink(missing_ok=True)
            self._arrays[name][...] = value
        self._journal(TOKENS, list(values))

    def _journal(self, key: str, names: Sequence[str]) -> None:
        """Say that the arrays of a layer, or of the tokens, are stored."""
        entry = {name: self._fingerprint(key, name) for name in names}
        with self._mutex:
            for name in names:
                self._rows.pop((key, name), None)
            stored = {**self._attributes.stored, key: entry}
            order = [*map(str, self._attributes.layers), TOKENS, COORDINATES]
            self._write_attributes(
                stored={key: stored[key] for key in order if key in stored},
            )

    def _write_attributes(self, **update: Any) -> None:
        self._attributes = self._attributes.model_copy(update=update)
        self._group.attrs[NAMESPACE] = self._attributes.model_dump(mode="json")

    def finish(self) -> None:
        """Mark the trace complete: everything is on the disk, and its metadata consolidated.

        Raises
        ------
        IncompleteError
            If a layer was not appended.
        """
        if self.missing_layers or self.needs_tokens:
            raise incomplete(self.path, self._attributes)
        with clear_errors(self.path):
            for file in sorted(self.path.rglob("*")):
                fsync(file)
            self._write_attributes(complete=True)
            _consolidate(self.path)
            fsync(self.path / "zarr.json")

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


def create_array(group: zarr.Group, name: str, layout: ArrayLayout) -> zarr.Array[Any]:
    """Create one array of a trace as `layout` says."""
    text = layout.dtype == "string"
    return group.create_array(
        name,
        shape=layout.shape,
        dtype=str if text else layout.dtype,
        chunks=layout.chunks,
        shards=layout.shards,
        dimension_names=layout.dims,
        fill_value=layout.fill_value,
        attributes=dict(layout.attributes),
        serializer="auto" if text else BytesCodec(endian="little"),
        compressors=_compressors(layout),
        # A chunk that equals the fill value must exist all the same: a missing one is a fault.
        config={"write_empty_chunks": not layout.skip_empty},
    )


def _compressors(layout: ArrayLayout) -> list[BytesBytesCodec]:
    # Every chunk carries a checksum: a flipped bit must raise, never read as another number.
    if layout.codec == "attention":
        return [BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"), Crc32cCodec()]
    return [ZstdCodec(level=1, checksum=True)]


def _arrays_of(record: LayerRecord) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    if record.attention is not None and record.attention_mean is not None:
        values = {"attention": record.attention, "attention_mean": record.attention_mean}
    for name, features in record.features.items():
        suffix = name.removeprefix("features")
        values[name] = features.activations
        values[f"top_feature{suffix}"] = features.top_feature
        values[f"top_activation{suffix}"] = features.top_activation
    return values


def _consolidate(path: Path) -> None:
    """Copy the metadata of all nodes below a group into its own: an extra that readers may ignore.

    What zarr.consolidate_metadata writes, but that warns, and warnings cannot be silenced in one
    thread alone.
    """
    inline = {"kind": "inline", "must_understand": False}
    nodes: dict[str, Any] = {}
    for file in sorted([*path.glob("*/zarr.json"), *path.glob("*/*/zarr.json")]):
        node = json.loads(file.read_bytes())
        if node["node_type"] == "group":
            node["consolidated_metadata"] = {**inline, "metadata": {}}
        nodes[file.parent.relative_to(path).as_posix()] = node
    group = json.loads((path / "zarr.json").read_bytes())
    group["consolidated_metadata"] = {**inline, "metadata": nodes}
    partial = path / "zarr.json.partial"
    partial.write_text(json.dumps(group, indent=2, allow_nan=False), encoding="utf-8")
    partial.replace(path / "zarr.json")


def _differing(old: RunAttributes, new: RunAttributes) -> list[str]:
    before = {**old.config, "scenarios": list(old.scenarios)}
    after = {**new.config, "scenarios": list(new.scenarios)}
    return [
        f"  {key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def _refuse_other_config(path: Path, old: RunAttributes, new: RunAttributes) -> None:
    if differing := _differing(old, new):
        raise ConfigMismatchError(
            f"{path}: this run was started with another configuration:\n" + "\n".join(differing),
            remedy="Repeat the old options to go on, choose another --output, or replace the run "
            "with --overwrite.",
        )
