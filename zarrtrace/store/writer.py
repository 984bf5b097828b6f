"""Writing runs and traces; the only module that writes Zarr.

What plain Zarr leaves open is settled here: a layer counts as stored only once the trace's journal
(its attribute ``zarrtrace.stored``) holds the size and hash of what each array wrote for it, a run
has one writer at a time, and a trace that is not complete says which layers it lacks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec

from zarrtrace.errors import (
    ConfigMismatchError,
    IncompleteError,
    LockedError,
    NoSpaceError,
    StoreError,
)
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
from zarrtrace.store.attributes import incomplete, read_run_attributes, read_trace_attributes

#: The journal's key for the arrays that have no layer.
TOKENS = "tokens"


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
        with _clear_errors(self._final):
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._final)
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
        exists = self._final.is_dir() and any(self._final.iterdir())
        if exists or self._final.is_file():
            previous = read_run_attributes(self._final)
            if not self._overwrite:
                _refuse_other_config(self._final, previous, self._attributes)
                return
            self.path = self._final.with_name(f".{self._final.name}.new")
            if self.path.exists():
                shutil.rmtree(self.path)
        zarr.create_group(
            self.path,
            zarr_format=3,
            attributes={NAMESPACE: self._attributes.model_dump(mode="json")},
            overwrite=True,
        )

    def _unlock(self) -> None:
        # The lock file goes first: whoever waits for it must not hold a file that has no name.
        with contextlib.suppress(OSError):
            _lock_path(self._final).unlink()
        os.close(self._lock)

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
        with _clear_errors(self._final):
            group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            complete = self._attributes.model_copy(update={"complete": True})
            group.attrs[NAMESPACE] = complete.model_dump(mode="json")
            _consolidate(self.path)
            if self.path != self._final:
                old = self._final.with_name(f".{self._final.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                self._final.rename(old)
                self.path.rename(self._final)
                self.path = self._final
                shutil.rmtree(old)


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
        self._index = {layer: i for i, layer in enumerate(attributes.layers)}
        self._mutex = threading.Lock()
        with _clear_errors(self.path):
            earlier = self._journal_of_earlier_writer()
            self._attributes = attributes.model_copy(update={"stored": earlier, "complete": False})
            if earlier:
                self._group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            else:
                self._create(tokens)
            self._arrays: dict[str, zarr.Array[Any]] = {
                name: self._group[name]  # type: ignore[misc]
                for name in self._layout
            }

    def _journal_of_earlier_writer(self) -> dict[str, dict[str, Stored]]:
        """Entries of an existing journal whose files are still what they were."""
        if not (self.path / "zarr.json").exists():
            return {}
        attributes = read_trace_attributes(self.path)
        return {
            key: entry
            for key, entry in attributes.stored.items()
            if all(
                fingerprint(self.path, files_of(name, self._layout[name], self._at(key))) == stored
                for name, stored in entry.items()
                if name in self._layout
            )
        }

    def _at(self, key: str) -> int | None:
        return None if key == TOKENS else self._index[int(key)]

    def _create(self, tokens: Tokens) -> None:
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
            "token_id": np.asarray(tokens.ids, dtype=np.uint32),
        }
        values["query_token"] = values["key_token"] = np.asarray(tokens.texts, dtype=object)
        for name, layout in self._layout.items():
            array = create_array(self._group, name, layout)
            if len(layout.dims) == 1:
                array[:] = values.get(name, np.arange(layout.shape[0]))

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers that are still to be appended."""
        return self._attributes.missing_layers

    @property
    def needs_tokens(self) -> bool:
        """Whether the next-token arrays are still to be appended."""
        return "next_token" in self._layout and TOKENS not in self._attributes.stored

    def append(self, record: LayerRecord | TokensRecord) -> None:
        """Store one record; it counts once this returns.

        Raises
        ------
        StoreError
            If the record's layer or shape is not the trace's.
        NoSpaceError
            If the disk is full.
        """
        with _clear_errors(self.path):
            if isinstance(record, TokensRecord):
                self._commit(
                    TOKENS,
                    {
                        "next_token": record.next_token,
                        "next_token_logprob": record.next_token_logprob,
                    },
                )
            elif record.layer in self._index:
                self._commit(str(record.layer), _arrays_of(record))
            else:
                raise StoreError(
                    f"{self.path}: layer {record.layer} is not one of this trace's layers",
                    remedy="Create the trace with all the layers that it will hold.",
                )

    def _commit(self, key: str, values: Mapping[str, np.ndarray]) -> None:
        at = self._at(key)
        entry = {}
        for name, value in values.items():
            array, layout = self._arrays[name], self._layout[name]
            expected = layout.shape if at is None else layout.shape[1:]
            if value.shape != expected:
                raise StoreError(
                    f"{self.path}: {name} of {key} has shape {value.shape}, not {expected}",
                    remedy="Give every record the sizes that the trace was created with.",
                )
            array[... if at is None else at] = value
            entry[name] = fingerprint(self.path, files_of(name, layout, at))
        with self._mutex:
            stored = {**self._attributes.stored, key: entry}
            order = [*map(str, self._attributes.layers), TOKENS]
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
        with _clear_errors(self.path):
            for file in sorted(self.path.rglob("*")):
                _fsync(file)
            self._write_attributes(complete=True)
            _consolidate(self.path)

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
        config={"write_empty_chunks": True},
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


def files_of(name: str, layout: ArrayLayout, at: int | None) -> list[str]:
    """Return the keys of the files that hold an array, or its layer `at`, in order."""
    grid = [
        range(-(-size // step))
        for size, step in zip(layout.shape, layout.shards or layout.chunks, strict=True)
    ]
    if at is not None:
        grid[0] = range(at, at + 1)
    return [f"{name}/c/{'/'.join(map(str, place))}" for place in itertools.product(*grid)]


def fingerprint(trace: Path, files: Sequence[str]) -> Stored:
    """Return size and hash of some files of a trace, taken together."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            content = (trace / file).read_bytes()
            digest.update(content)
            size += len(content)
    return Stored(bytes=size, blake2b=digest.hexdigest())


def _consolidate(path: Path) -> None:
    with warnings.catch_warnings():
        # It is an extra that readers may ignore: everything works without it, too.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(path, zarr_format=3)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- one writer at a time ----------------------------------------------------------------------


def _lock_path(run: Path) -> Path:
    return run.with_name(f".{run.name}.lock")


def _lock(run: Path) -> int:
    """Take the run's lock; the kernel drops it when its owner dies."""
    path = _lock_path(run)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise LockedError(
                f"{run}: another process is writing this run",
                why="An extraction into the same folder is still going on.",
                remedy="Wait until it ends, or choose another --output.",
            ) from None
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # its owner removed it between our open and our lock


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says into errors that help."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{path}: no space left on the disk",
                why="--dry-run says how much a run needs.",
                remedy="Make room and run the same command again: it goes on where it stopped.",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StoreError(
                f"{path}: cannot be written ({error.strerror})",
                remedy="Choose an --output that you may write to.",
            ) from error
        raise


def _refuse_other_config(path: Path, old: RunAttributes, new: RunAttributes) -> None:
    before = {**old.config, "scenarios": list(old.scenarios)}
    after = {**new.config, "scenarios": list(new.scenarios)}
    differing = [
        f"  {key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    if differing:
        raise ConfigMismatchError(
            f"{path}: this run was started with another configuration:\n" + "\n".join(differing),
            remedy="Repeat the old options to go on, choose another --output, or replace the run "
            "with --overwrite.",
        )
