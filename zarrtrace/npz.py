"""Export to, and import from, the documented NPZ layout.

::

    <folder>/
      <scenario>/layer_1.npz ... layer_31.npz    keys 'features' and/or 'attention'
      metadata_L1_31_20251017_120000.json        tokens and key positions of every scenario

A layer without an SAE has no ``features`` in its file. Files are ordinary NPZ files, made with a
faster deflate (zlib-ng) than NumPy's: it releases the GIL, so threads write layers in parallel.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator
from zlib_ng import zlib_ng

from zarrtrace.errors import ConfigError, IntegrityError, NoSpaceError, NPZError, ScenarioError
from zarrtrace.scenarios import DECISION, check_name, name_key
from zarrtrace.spec import (
    NAMESPACE,
    TOP_FEATURES,
    FeatureRecord,
    LayerRecord,
    SpanAttributes,
    Tokens,
    TraceAttributes,
    TraceShape,
)
from zarrtrace.store import RunWriter, TraceWriter, kind_of, open_run, open_trace
from zarrtrace.store.reader import array_of

DType = Literal["float16", "float32"]
Progress = Callable[[int, int], None]

_KEYS = ("features", "attention")
_LAYER_FILE = re.compile(r"layer_(0|[1-9][0-9]{0,5})\.npz")
_PIECE = 2**22
_MAX_METADATA_BYTES = 2**28
# No model has more of them; a header that says so would only make us ask for memory.
_MAX_HEADS, _MAX_FEATURES = 2**12, 2**22
# Deflate cannot shrink anything further than this.
_MAX_DEFLATE_RATIO = 1033


# --- the metadata file -------------------------------------------------------------------------


class _ScenarioMetadata(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    scenario: str
    tokens: list[str] = Field(min_length=1)
    token_ids: list[Annotated[int, Field(ge=0, lt=2**32)]]
    seq_len: int
    key_positions: dict[str, list[NonNegativeInt]]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.tokens) == len(self.token_ids) == self.seq_len:
            raise ValueError(
                f"{len(self.tokens)} tokens, {len(self.token_ids)} token_ids and seq_len "
                f"{self.seq_len} differ"
            )
        for name, positions in self.key_positions.items():
            if any(position >= self.seq_len for position in positions):
                raise ValueError(f"key_positions.{name} is beyond seq_len {self.seq_len}")
        if self.key_positions.get(DECISION, [self.seq_len - 1]) != [self.seq_len - 1]:
            raise ValueError(f"key_positions.{DECISION} is not the last token")
        return self


class _Metadata(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    timestamp: str
    n_scenarios: int
    layer_range: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
    save_features: bool
    save_attention: bool
    scenarios: list[_ScenarioMetadata] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.n_scenarios != len(self.scenarios):
            raise ValueError(f"n_scenarios is {self.n_scenarios}, there are {len(self.scenarios)}")
        if not self.layer_range[0] <= self.layer_range[1] < 10**6:
            raise ValueError(f"layer_range {self.layer_range} is not [first, last]")
        if not (self.save_features or self.save_attention):
            raise ValueError("neither save_features nor save_attention is true")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(
            key
            for key, saved in zip(_KEYS, (self.save_features, self.save_attention), strict=True)
            if saved
        )


# --- export ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trace:
    """What export needs to know of one trace."""

    path: Path
    attributes: TraceAttributes
    metadata: _ScenarioMetadata
    arrays: Mapping[str, Any]


def export_npz(
    run: str | Path,
    output: str | Path,
    *,
    scenarios: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    dtype: DType | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    timestamp: datetime | None = None,
) -> Path:
    """Write a run, or one trace, in the documented NPZ layout.

    Values are the store's, bit for bit, and the same call writes the same bytes. Arrays that the
    layout has no place for (means, indices, next tokens, further feature arrays) are left out.

    Parameters
    ----------
    run
        Folder of a complete run or trace.
    output
        Folder to write into; files of the same name are replaced, each at once.
    scenarios, layers
        What to export; by default everything.
    dtype
        Convert both arrays; by default each keeps its own.
    workers
        Threads, by default one a CPU. Each holds one array of one layer at a time.
    progress
        Called with the number of files done and of all files.
    timestamp
        For the metadata file's name and field; by default now.

    Returns
    -------
    Path
        The metadata file, which is written last.

    Raises
    ------
    IncompleteError
        If layers or scenarios of the run are missing.
    ConfigError
        If a scenario or layer is not in the run.
    NPZError
        If `output` holds layer files that this export would not write, or cannot be written.
    """
    if dtype not in (None, "float16", "float32"):
        raise ConfigError(f"dtype {dtype!r} is unknown", remedy="Give 'float16' or 'float32'.")
    output = Path(output)
    traces = _traces(Path(run), scenarios)
    chosen = _choose_layers(traces, layers)
    jobs = {
        output / trace.metadata.scenario / f"layer_{layer}.npz": (trace, layer)
        for trace in traces
        for layer in chosen
    }
    _refuse_stale(output, jobs)
    with _writing(output):
        for trace in traces:
            (output / trace.metadata.scenario).mkdir(parents=True, exist_ok=True)
    _run_jobs(
        (partial(_export_layer, file, *job, dtype) for file, job in jobs.items()),
        len(jobs),
        workers,
        progress,
    )
    return _write_metadata(output, traces, chosen, timestamp or datetime.now())


def _traces(path: Path, names: Sequence[str] | None) -> list[_Trace]:
    if kind_of(path) == "run":
        tree = open_run(path)
        folders = {name: path / name for name in tree.children}
        datasets = {name: node.to_dataset() for name, node in tree.children.items()}
    else:
        ds = open_trace(path)
        name = str(ds.attrs[NAMESPACE]["scenario"])
        folders, datasets = {name: path}, {name: ds}
    unknown = [name for name in names or () if name not in folders]
    if unknown or (names is not None and not names):
        raise ConfigError(
            f"{path}: no scenario {unknown[0]!r}" if unknown else "no scenario was asked for",
            remedy=f"It has: {', '.join(folders)}.",
        )
    return [
        _trace(folders[name], datasets[name]) for name in folders if names is None or name in names
    ]


def _trace(path: Path, ds: Any) -> _Trace:
    attributes = TraceAttributes.model_validate(ds.attrs[NAMESPACE])
    tokens = [str(text) for text in ds["query_token"].values]
    return _Trace(
        path=path,
        attributes=attributes,
        metadata=_ScenarioMetadata(
            scenario=attributes.scenario,
            tokens=tokens,
            token_ids=[int(token) for token in ds["token_id"].values],
            seq_len=len(tokens),
            key_positions={
                name: list(span.tokens)
                for name, span in attributes.spans.items()
                if name != DECISION
            },
        ),
        arrays={key: array_of(path, key) for key in _KEYS if key in ds.data_vars},
    )


def _choose_layers(traces: Sequence[_Trace], wanted: Sequence[int] | None) -> list[int]:
    """Layers to export, ascending; every trace must have them all."""
    chosen = set(wanted if wanted is not None else traces[0].attributes.layers)
    for trace in traces:
        there = trace.attributes.layers
        # Without a wish, traces that hold different layers would lose some of them silently.
        absent = chosen - set(there) or (set() if wanted is not None else set(there) - chosen)
        if absent or not chosen:
            raise ConfigError(
                f"{trace.path}: layer {min(absent)} is not in every trace"
                if absent
                else "no layer was asked for",
                remedy=f"{trace.metadata.scenario} has layers {', '.join(map(str, there))}.",
            )
    return sorted(chosen)


def _refuse_stale(output: Path, planned: Mapping[Path, object]) -> None:
    with _writing(output):
        stale = sorted(file for file in output.glob("*/layer_*.npz") if file not in planned)
    if stale:
        raise NPZError(
            f"{output}: has {len(stale)} layer files that this export would not write, "
            f"such as {stale[0].relative_to(output)}",
            why="They are another export's, and would look like part of this one.",
            remedy="Choose another folder, or remove those files first.",
        )


def _export_layer(file: Path, trace: _Trace, layer: int, dtype: DType | None) -> None:
    keys = [
        key
        for key in trace.arrays
        if key != "features" or layer not in trace.attributes.layers_without_sae
    ]
    with _replacing(file) as out:
        _write_npz(
            out,
            ((key, _convert(file, _load(trace, key, layer), dtype)) for key in keys),
        )


def _load(trace: _Trace, key: str, layer: int) -> Any:
    try:
        return trace.arrays[key][trace.attributes.layers.index(layer)]
    except (OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            f"{trace.path}: {key} of layer {layer} cannot be read: {error}",
            why="Its bytes are not the ones that were written.",
            remedy="'zarrtrace verify' names what is damaged; 'zarrtrace extract --repair' makes "
            "it anew.",
        ) from error


def _convert(file: Path, values: Any, dtype: DType | None) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(values, dtype=dtype)
    except FloatingPointError:
        raise NPZError(
            f"{file}: a value is too large for {dtype}",
            why="float16 ends at 65504.",
            remedy="Export as float32.",
        ) from None


def _write_metadata(
    output: Path, traces: Sequence[_Trace], layers: Sequence[int], timestamp: datetime
) -> Path:
    stamp = timestamp.strftime("%Y%m%d_%H%M%S")
    metadata = _Metadata(
        timestamp=stamp,
        n_scenarios=len(traces),
        layer_range=[layers[0], layers[-1]],
        save_features=any("features" in trace.arrays for trace in traces),
        save_attention=any("attention" in trace.arrays for trace in traces),
        scenarios=[trace.metadata for trace in traces],
    )
    file = output / f"metadata_L{layers[0]}_{layers[-1]}_{stamp}.json"
    with _replacing(file) as out:
        text = json.dumps(metadata.model_dump(), indent=2, ensure_ascii=False)
        out.write(f"{text}\n".encode())
    return file


# --- an NPZ file -------------------------------------------------------------------------------


class _Compressor(Protocol):
    def compress(self, data: Any, /) -> bytes: ...
    def flush(self) -> bytes: ...


_Make = Callable[[], _Compressor]


def _run_lengths() -> _Compressor:
    """Compress by runs and entropy alone: fastest, and smallest unless numbers end in zeros."""
    return zlib_ng.compressobj(6, zlib_ng.DEFLATED, -15, 8, zlib_ng.Z_RLE)


def _matches() -> _Compressor:
    """Search for repetitions: half as fast, smallest for bfloat16 numbers held in float32."""
    return zlib_ng.compressobj(5, zlib_ng.DEFLATED, -15, 9)


def _as_numpy() -> _Compressor:
    return zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -15)


# Below this, time does not matter: everything is tried, so that no file is larger than NumPy's.
_SMALL_BYTES = 2**16


def _best_compressor(array: np.ndarray, pieces: Sequence[bytes | memoryview]) -> _Make:
    """Return what makes the least of an array, which stands in `pieces` as bytes."""
    if array.nbytes <= _SMALL_BYTES:

        def size(make: _Make) -> int:
            compressor = make()
            return sum(len(compressor.compress(p)) for p in pieces) + len(compressor.flush())

        return min(_run_lengths, _matches, _as_numpy, key=size)
    if array.dtype == np.float32:
        sample = array.reshape(-1)[:: max(1, array.size // 2**14) | 1].view(np.uint32)
        if not (sample & 0xFFFF).any() and np.count_nonzero(sample) > sample.size // 4:
            return _matches
    return _run_lengths


@dataclass
class _Member:
    """One file of a ZIP archive; its headers are deterministic, dated 1980-01-01."""

    name: bytes
    size: int
    offset: int
    crc: int = 0
    compressed: int = 0

    _LIMIT = 0xFFFFFFFF  # above it, sizes and offsets stand in a ZIP64 field

    @property
    def _zip64(self) -> bool:
        # Deflate may add a little to what it cannot shrink: decided before that is known.
        return max(self.size + self.size // 1000 + 64, self.offset) >= self._LIMIT

    def _common(self, values: tuple[int, ...]) -> bytes:
        extra = (4 + 8 * len(values)) if self._zip64 else 0
        sizes = (0xFFFFFFFF,) * 2 if self._zip64 else (self.compressed, self.size)
        # version needed, flags, deflate, time, date, CRC, sizes, lengths of name and extra
        version_needed = 45 if self._zip64 else 20
        return struct.pack(
            "<5H3L2H", version_needed, 0, 8, 0, 0x21, self.crc, *sizes, len(self.name), extra
        )

    def _extra(self, values: tuple[int, ...]) -> bytes:
        count = len(values)
        return struct.pack(f"<2H{count}Q", 1, 8 * count, *values) if self._zip64 else b""

    def local_header(self) -> bytes:
        values = (self.size, self.compressed)
        return b"PK\3\4" + self._common(values) + self.name + self._extra(values)

    def central_header(self) -> bytes:
        values = (self.size, self.compressed, self.offset)
        made_by = struct.pack("<H", 3 << 8 | 45)
        offset = 0xFFFFFFFF if self._zip64 else self.offset
        # comment length, disk, internal and external attributes, offset
        rest = struct.pack("<3H2L", 0, 0, 0, 0o644 << 16, offset)
        common = b"PK\1\2" + made_by + self._common(values)
        return common + rest + self.name + self._extra(values)


def _write_npz(out: IO[bytes], arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write arrays as an NPZ file, compressed, one at a time."""
    members = [_write_member(out, f"{name}.npy", array) for name, array in arrays]
    start = out.tell()
    out.write(b"".join(member.central_header() for member in members))
    size, count = out.tell() - start, len(members)
    if start >= _Member._LIMIT:
        out.write(
            struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
            + struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
        )
        start = 0xFFFFFFFF
    out.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0))


def _write_member(out: IO[bytes], name: str, array: np.ndarray) -> _Member:
    buffer = BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(buffer, header)
    data = array.reshape(-1).view(np.uint8).data
    member = _Member(name.encode(), len(buffer.getvalue()) + len(data), out.tell())
    out.write(member.local_header())
    pieces: list[bytes | memoryview] = [buffer.getvalue(), *_pieces(data)]
    compressor = _best_compressor(array, pieces)()
    start = out.tell()
    for piece in pieces:
        member.crc = zlib_ng.crc32(piece, member.crc)
        out.write(compressor.compress(piece))
    out.write(compressor.flush())
    end = out.tell()
    member.compressed = end - start
    out.seek(member.offset)
    out.write(member.local_header())
    out.seek(end)
    return member


def _pieces(data: memoryview) -> Iterator[memoryview]:
    return (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))


# --- import ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """Shape and dtype of one array, before any of its values is read."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Folder:
    """A folder in the documented layout, every file of it looked at."""

    path: Path
    metadata: _Metadata
    layers: tuple[int, ...]
    headers: dict[str, _Header]
    layers_without_features: tuple[int, ...]
    fingerprint: str

    def file(self, scenario: str, layer: int) -> Path:
        return self.path / scenario / f"layer_{layer}.npz"

    def dtype(self, key: str) -> Any:
        return self.headers[key].dtype if key in self.headers else None


def import_npz(
    folder: str | Path,
    run: str | Path,
    *,
    layers: Sequence[int] | None = None,
    metadata: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Turn a folder in the documented NPZ layout into a run.

    Every file's headers are checked before anything is written. An interrupted import goes on
    where it was when it is called again. The run has no model, prompt or next tokens: the layout
    does not hold them.

    Parameters
    ----------
    folder
        What :func:`export_npz`, or the script that the layout comes from, wrote.
    run
        Folder of the run to write.
    layers
        Layers to import; by default all of the metadata's ``layer_range``, none missing.
    metadata
        Name of the metadata file; needed if there are several that say different things.
    overwrite
        Replace a run that exists.
    workers
        Threads, by default one a CPU. Each holds one layer at a time.
    progress
        Called with the number of files done and of all files.

    Raises
    ------
    NPZError
        If a file is missing, broken, unsafe, or does not fit the others.
    """
    source = _look_at(Path(folder), metadata, layers)
    names = [scenario.scenario for scenario in source.metadata.scenarios]
    config = {
        "imported_from": "npz",
        "layers": list(source.layers),
        "attention_dtype": source.dtype("attention"),
        "feature_dtype": source.dtype("features"),
        "fingerprint": source.fingerprint,
    }
    total = len(names) * len(source.layers)
    with RunWriter(run, names, config, overwrite=overwrite) as writer:
        for at, scenario in enumerate(source.metadata.scenarios):
            done = at * len(source.layers)
            _import_scenario(source, scenario, writer, workers, _shifted(progress, done, total))
        writer.finish()


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return progress and (lambda done, _total: progress(before + done, total))


def _import_scenario(
    source: _Folder,
    scenario: _ScenarioMetadata,
    writer: RunWriter,
    workers: int | None,
    progress: Progress | None,
) -> None:
    headers = source.headers
    shape = TraceShape(
        layers=len(source.layers),
        tokens=scenario.seq_len,
        heads=headers["attention"].shape[0] if "attention" in headers else None,
        features={"features": headers["features"].shape[1]} if "features" in headers else {},
        attention_dtype=source.dtype("attention"),
        feature_dtype=source.dtype("features"),
        next_token=False,
    )
    tokens = Tokens(ids=scenario.token_ids, texts=scenario.tokens)
    with writer.trace(_trace_attributes(source, scenario), shape, tokens) as trace:
        missing = trace.missing_layers
        _run_jobs(
            (partial(_import_layer, source, scenario, layer, trace) for layer in missing),
            len(missing),
            workers,
            progress,
        )


def _trace_attributes(source: _Folder, scenario: _ScenarioMetadata) -> TraceAttributes:
    positions = {**scenario.key_positions, DECISION: [scenario.seq_len - 1]}
    return TraceAttributes(
        scenario=scenario.scenario,
        prompt=None,
        spans={
            name: SpanAttributes(characters=(), tokens=tuple(tokens))
            for name, tokens in positions.items()
        },
        model=None,
        layers=source.layers,
        layers_without_sae=source.layers_without_features,
        attention_dtype=source.dtype("attention"),
        feature_dtype=source.dtype("features"),
        versions={name: version(name) for name in ("numpy", "zarr")},
    )


def _import_layer(
    source: _Folder, scenario: _ScenarioMetadata, layer: int, trace: TraceWriter
) -> None:
    file = source.file(scenario.scenario, layer)
    arrays: dict[str, np.ndarray] = {}
    with _reading(file), zipfile.ZipFile(file) as archive:
        for key in _keys_of(file, archive):
            arrays[key] = _read_array(file, archive, key, source.headers[key])
    attention, features = arrays.get("attention"), arrays.get("features")
    trace.append(
        LayerRecord(
            scenario=scenario.scenario,
            layer=layer,
            attention=attention,
            attention_mean=None if attention is None else attention.mean(axis=0, dtype=np.float32),
            features={} if features is None else {"features": _with_top(features)},
        )
    )


def _with_top(activations: np.ndarray) -> FeatureRecord:
    """Find the strongest features of each token; of equals, the first."""
    tokens, features = activations.shape
    count = min(TOP_FEATURES, features)
    top = np.empty((tokens, count), dtype=np.uint32)
    for at in range(0, tokens, 32):
        rows = np.maximum(activations[at : at + 32].astype(np.float32), 0)
        # Bits of a positive float sort as the float does; lower indices win among equals.
        keys = rows.view(np.uint32).astype(np.uint64) << np.uint64(32)
        keys |= np.arange(features, dtype=np.uint64)[::-1]
        keys.partition(features - count, axis=1)
        strongest = np.sort(keys[:, features - count :], axis=1)[:, ::-1]
        top[at : at + 32] = features - 1 - (strongest & np.uint64(0xFFFFFFFF))
    values = np.take_along_axis(activations, top.astype(np.intp), axis=1).astype(np.float32)
    return FeatureRecord(activations, top, np.maximum(values, 0))


# --- looking at a folder -----------------------------------------------------------------------


def _look_at(folder: Path, name: str | None, layers: Sequence[int] | None) -> _Folder:
    if not folder.is_dir():
        raise NPZError(f"{folder}: no such folder", remedy="Check the path.")
    file, metadata = _find_metadata(folder, name)
    _check_names(file, metadata)
    first, last = metadata.layer_range
    chosen = tuple(sorted(set(layers))) if layers is not None else tuple(range(first, last + 1))
    outside = [layer for layer in chosen if not first <= layer <= last]
    if outside or not chosen:
        raise ConfigError(
            f"{folder}: layer {outside[0]} is not there" if outside else "no layer was asked for",
            remedy=f"{file.name} covers layers {first} to {last}.",
        )
    source = _Folder(folder, metadata, chosen, {}, (), "")
    _check_presence(source)
    return _look_at_files(source)


def _find_metadata(folder: Path, name: str | None) -> tuple[Path, _Metadata]:
    """Return the metadata file; of several that say the same, the newest."""
    files = sorted(folder.glob("metadata_L*.json"))
    if name is not None:
        files = [file for file in files if file.name == name]
    if not files:
        raise NPZError(
            f"{folder}: no metadata file {name or 'metadata_L*.json'}",
            why="It holds the tokens and key positions, and is written last.",
            remedy="Give the folder that holds the scenario folders and the metadata file; "
            "if its writer was interrupted, run it again.",
        )
    found = {file: _read_metadata(folder, file) for file in files}
    same = {
        metadata.model_copy(update={"timestamp": ""}).model_dump_json()
        for metadata in found.values()
    }
    if len(same) > 1:
        raise NPZError(
            f"{folder}: {len(files)} metadata files that say different things: "
            + ", ".join(file.name for file in files[:5]),
            why="Several runs wrote into this folder.",
            remedy="Say which one counts (metadata=NAME), or move the others away.",
        )
    newest = max(found, key=lambda file: (found[file].timestamp, file.name))
    return newest, found[newest]


def _read_metadata(folder: Path, file: Path) -> _Metadata:
    _check_inside(folder, file)
    remedy = "Restore the file from where it was written, or write the folder again."
    with _reading(file):
        if file.stat().st_size > _MAX_METADATA_BYTES:
            raise NPZError(f"{file}: larger than any metadata file", remedy=remedy)
        content = file.read_bytes()
    try:
        return _Metadata.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise NPZError(
            f"{file}: {where}: {first['msg']}" if where else f"{file}: {first['msg']}",
            why="It is cut short, edited, or not a metadata file of this layout.",
            remedy=remedy,
        ) from None


def _check_names(file: Path, metadata: _Metadata) -> None:
    taken: set[str] = set()
    for scenario in metadata.scenarios:
        try:
            key = name_key(check_name(scenario.scenario))
        except ScenarioError as error:
            raise NPZError(f"{file}: {error.what}", remedy=error.remedy) from None
        if key in taken:
            raise NPZError(
                f"{file}: scenario {scenario.scenario!r} stands twice",
                why="Names that differ only in case are one folder on many file systems.",
                remedy="Keep one of the two.",
            )
        taken.add(key)


def _check_presence(source: _Folder) -> None:
    missing = [
        f"{scenario.scenario}/layer_{layer}.npz"
        for scenario in source.metadata.scenarios
        for layer in source.layers
        if not source.file(scenario.scenario, layer).is_file()
    ]
    if missing:
        raise NPZError(
            f"{source.path}: {len(missing)} layer files are missing: {', '.join(missing[:8])}"
            + (", ..." if len(missing) > 8 else ""),
            why="Their writer was interrupted, or the copy of the folder is not whole.",
            remedy="Restore them, or say which layers to import (layers=...).",
        )


def _look_at_files(source: _Folder) -> _Folder:
    """Check every file's headers against the metadata and against each other."""
    described = [scenario.model_dump() for scenario in source.metadata.scenarios]
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=8)
    headers: dict[str, _Header] = {}
    without: dict[int, int] = {}
    for scenario in source.metadata.scenarios:
        for layer in source.layers:
            file = source.file(scenario.scenario, layer)
            _check_inside(source.path, file)
            with _reading(file), zipfile.ZipFile(file) as archive:
                digest.update(repr([(i.CRC, i.file_size) for i in archive.infolist()]).encode())
                keys = _keys_of(file, archive)
                found = {key: _read_header(file, archive, key, scenario.seq_len) for key in keys}
            _check_keys(file, source.metadata.keys, keys)
            _check_alike(file, found, headers)
            if "features" in source.metadata.keys and "features" not in keys:
                without[layer] = without.get(layer, 0) + 1
    _check_absent_features(source, without, headers)
    return _Folder(
        source.path,
        source.metadata,
        source.layers,
        headers,
        tuple(without),
        digest.hexdigest(),
    )


def _check_keys(file: Path, expected: Sequence[str], found: Sequence[str]) -> None:
    unexpected = [key for key in found if key not in expected]
    absent = [key for key in expected if key not in found and key != "features"]
    if unexpected or absent:
        raise NPZError(
            f"{file}: has no {absent[0]!r}" if absent else f"{file}: holds {unexpected[0]!r}",
            why=f"By the metadata file, each layer holds: {', '.join(expected)}.",
            remedy="Write this file again, or give the metadata file that belongs to it.",
        )


def _check_absent_features(
    source: _Folder, without: Mapping[int, int], headers: Mapping[str, _Header]
) -> None:
    """Refuse layers without features in some scenarios only, and no features at all."""
    partly = [layer for layer, n in without.items() if n < len(source.metadata.scenarios)]
    if partly or any(key not in headers for key in source.metadata.keys):
        layer = partly[0] if partly else source.layers[0]
        files = (source.file(scenario.scenario, layer) for scenario in source.metadata.scenarios)
        file = next(file for file in files if "features" not in _keys_of_file(file))
        raise NPZError(
            f"{file}: has no 'features'",
            why="By the metadata file, features were saved; "
            + ("other scenarios have them in this layer." if partly else "no file has any."),
            remedy="Write this file again, or give the metadata file that belongs to it.",
        )


def _check_alike(file: Path, found: Mapping[str, _Header], headers: dict[str, _Header]) -> None:
    """Compare what must be the same in all files: heads, features, dtypes."""
    for key, header in found.items():
        first = headers.setdefault(key, header)
        size, first_size = _own_size(key, header), _own_size(key, first)
        if (size, header.dtype) != (first_size, first.dtype):
            what = {"features": "features", "attention": "heads"}[key]
            raise NPZError(
                f"{file}: {key!r} has {size} {what} as {header.dtype}, the files before it "
                f"{first_size} as {first.dtype}",
                why="Files of different models or runs are mixed.",
                remedy="Keep one run in a folder.",
            )


def _own_size(key: str, header: _Header) -> int:
    return header.shape[1] if key == "features" else header.shape[0]


def _check_inside(folder: Path, file: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise NPZError(
            f"{file}: leads out of {folder}",
            why="It is, or is behind, a symbolic link.",
            remedy="Put the file itself there.",
        )


# --- reading one file --------------------------------------------------------------------------


def _keys_of_file(file: Path) -> list[str]:
    with _reading(file), zipfile.ZipFile(file) as archive:
        return _keys_of(file, archive)


def _keys_of(file: Path, archive: zipfile.ZipFile) -> list[str]:
    names = [info.filename for info in archive.infolist()]
    odd = [name for name in names if name not in {f"{key}.npy" for key in _KEYS}]
    if odd or len(set(names)) < len(names):
        raise NPZError(
            f"{file}: holds {odd[0]!r}" if odd else f"{file}: holds an array twice",
            why="A file of this layout holds 'features' and 'attention' and nothing else.",
            remedy="Write the file again with these two keys.",
        )
    return [key for key in _KEYS if f"{key}.npy" in names]


def _read_header(file: Path, archive: zipfile.ZipFile, key: str, seq_len: int) -> _Header:
    """Read and check what an array says of itself, decompressing no more than that."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _npy_header(stream)
        start = stream.tell()
    expected = (seq_len, -1) if key == "features" else (-1, seq_len, seq_len)
    limit = _MAX_FEATURES if key == "features" else _MAX_HEADS
    problem = ""
    if dtype.str not in ("<f2", "<f4"):
        problem = f"has dtype {dtype}, not float16 or float32"
    elif fortran:
        problem = "is in Fortran order"
    elif len(shape) != len(expected) or any(
        size != wanted if wanted > 0 else not 0 < size <= limit
        for size, wanted in zip(shape, expected, strict=True)
    ):
        shown = str(expected).replace("-1", "any")
        problem = f"has shape {shape}, not {shown}"
    elif info.file_size != start + math.prod(shape) * dtype.itemsize:
        problem = f"has {info.file_size} bytes, which do not fit its shape {shape}"
    elif info.file_size > info.compress_size * _MAX_DEFLATE_RATIO:
        problem = "claims more bytes than its compressed ones can hold"
    if problem:
        raise NPZError(
            f"{file}: {key!r} {problem}",
            why="It was damaged, edited, or belongs to another prompt or metadata file.",
            remedy="Write the file again as the documented layout says.",
        )
    return _Header(shape, dtype.name)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    npy_version = np.lib.format.read_magic(stream)
    if npy_version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if npy_version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy format version {npy_version} is not supported")


def _read_array(file: Path, archive: zipfile.ZipFile, key: str, like: _Header) -> np.ndarray:
    """Read an array whose header :func:`_read_header` has accepted."""
    with archive.open(f"{key}.npy") as stream:
        shape, _, dtype = _npy_header(stream)
        if _own_size(key, _Header(shape, dtype.name)) != _own_size(key, like):
            raise ValueError("it changed while it was read")
        array = np.empty(shape, dtype)
        for piece in _pieces(array.reshape(-1).view(np.uint8).data):
            content = stream.read(len(piece))
            if len(content) != len(piece):
                raise ValueError("it ends early")
            piece[:] = content
        if stream.read(1):
            raise ValueError("it goes on after its end")
    if not np.isfinite(array).all():
        raise NPZError(
            f"{file}: {key!r} holds NaN or infinity",
            why="The model overflowed, or the file is damaged.",
            remedy="Extract this scenario again, with a wider dtype.",
        )
    return array


# --- files and threads -------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what a hostile or broken file makes Python raise into an error that helps."""
    try:
        yield
    except (
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise NPZError(
            f"{file}: cannot be read: {error}",
            why="It is cut short, damaged, encrypted, or not an NPZ file of plain numbers.",
            remedy="Restore it from a copy, or write it again.",
        ) from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{path}: no space left on the disk",
                why="NPZ files take about as much room as the run they come from.",
                remedy="Make room and export again, or choose another folder.",
            ) from error
        raise NPZError(
            f"{path}: cannot be written: {error.strerror or error}",
            remedy="Choose a folder that you may write to.",
        ) from error


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only once it is whole."""
    partial = file.with_name(f"{file.name}.partial")
    with _writing(file):
        try:
            with partial.open("wb") as out:
                yield out
            os.replace(partial, file)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _run_jobs(
    jobs: Iterable[Callable[[], None]], total: int, workers: int | None, progress: Progress | None
) -> None:
    """Run jobs on threads, never more of them under way than there are threads."""
    count = max(1, workers if workers is not None else _cpus())
    pending: set[Future[None]] = set()
    done = 0

    def settle(finished: set[Future[None]]) -> None:
        nonlocal done
        for future in finished:
            future.result()
            done += 1
            if progress is not None:
                progress(done, total)

    with ThreadPoolExecutor(count) as pool:
        for job in jobs:
            if len(pending) >= count:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                settle(finished)
            pending.add(pool.submit(job))
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            settle(finished)


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
