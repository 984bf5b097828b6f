"""From files of hidden states to a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from zarrtrace.errors import ConfigError, NPZError
from zarrtrace.format.table_layout import TableAttributes, TableShape
from zarrtrace.imports.columns import Columns, archive_columns, file_columns, settle_columns
from zarrtrace.imports.hidden_files import HiddenStates, Rows, hidden_files, open_hidden
from zarrtrace.machine import cpus
from zarrtrace.npz.files import Progress
from zarrtrace.records import SampleRecord, TablePlan
from zarrtrace.storage import Address
from zarrtrace.store import TableWriter

_FAILED = "valid_mask is false"


def is_hidden(source: str | Path) -> bool:
    """Whether a file or folder holds hidden states that :func:`import_hidden` reads."""
    return bool(hidden_files(Path(source)))


def import_hidden(
    source: str | Path,
    run: Address,
    *,
    layers: Sequence[int] | None = None,
    metadata: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Turn files of hidden states into a table with ``residual (layer, sample, channel)``.

    Files are read by blocks of samples, so that memory does not depend on their number. An
    interrupted import is resumed when it is called again. A row whose ``valid_mask`` is false is
    NaN in the table, and its scenario is named in ``failed``.

    Parameters
    ----------
    source
        A file or folder; see :mod:`zarrtrace.imports`.
    run
        Folder of the table to write, or its address.
    layers
        For an array ``(sample, layer, channel)`` that does not name them: the decoder block after
        which each layer was taken, counted from 0. transformers' ``hidden_states[N]`` is the output
        of block N-1. Otherwise the layers to import; by default all.
    metadata
        CSV or Parquet file with one row a sample, in the same order. Columns ``scenario`` (a name),
        ``position``, ``token``, ``token_id``, ``span``, ``tags`` and ``valid_mask`` are taken as
        such, all others are metadata. By default the arrays of an NPZ file, and ``samples.parquet``
        beside safetensors files. A scenario without a name is called ``scenario_N`` by its row; a
        position that is not known is -1. If no spans are given and each scenario has one row, it is
        the scenario's ``decision``.
    overwrite
        Replace a run or table that exists.
    threads
        By default one a CPU.
    progress
        Called with the number of samples done and of all of them.

    Returns
    -------
    tuple of str
        Keys of the NPZ file that are not in the table: they do not have one value a sample.

    Raises
    ------
    NPZError
        If a file is missing, broken or unsafe, does not fit the others, or if a row holds zeros
        alone, NaN or infinity.
    ConfigError
        If the files do not name their layers, or lack one that is asked for.
    ConfigMismatchError
        If `run` exists and came from other files.
    """
    files = hidden_files(Path(source))
    if not files:
        raise NPZError(
            f"{source}: holds no hidden states",
            remedy="Give hidden_states.npy, layer_N.npy, layer_N.safetensors, or an NPZ file with "
            "'hidden_states'.",
        )
    states = open_hidden(files)
    samples = states.shape[0]
    columns, named, left_out = _columns(states, metadata)
    chosen = _choose_layers(states, named, layers)
    settled = settle_columns(Path(metadata or source), columns, samples)
    plan = _plan(states, settled, tuple(chosen))
    with TableWriter(run, plan, overwrite=overwrite) as writer:
        with ThreadPoolExecutor(threads or cpus()) as pool:
            for start, rows in states.read(writer.done) if writer.done < samples else ():
                stop = start + rows[0].shape[0]
                for row in np.flatnonzero(~settled.valid[start:stop]) + start:
                    name = settled.coordinates["scenario"][row]
                    writer.fail(name, _FAILED, int(row))
                parts = list(_valid_parts(settled.valid, start, stop))
                append = partial(_append, writer, states, start, parts)
                list(pool.map(append, chosen, [rows[at] for at in chosen.values()]))
                if progress is not None:
                    progress(stop, samples)
        writer.finish()
    return left_out


def _columns(
    states: HiddenStates, metadata: str | Path | None
) -> tuple[dict[str, np.ndarray], tuple[int, ...] | None, tuple[str, ...]]:
    """Return columns, the layers that the files name, and keys that are left out."""
    columns: dict[str, np.ndarray] = {}
    left_out: tuple[str, ...] = ()
    layers, samples = states.layers, states.shape[0]
    if states.archive is not None:
        columns, left_out = archive_columns(states.archive, samples)
        if "layers" in columns:
            layers = tuple(map(int, columns.pop("layers")))
    beside = states.files[0].with_name("samples.parquet")
    if metadata is None and states.files[0].suffix == ".safetensors" and beside.is_file():
        metadata = beside
    if metadata is not None:
        more = file_columns(Path(metadata), samples)
        twice = sorted(columns.keys() & more.keys())
        if twice:
            raise NPZError(
                f"{metadata}: column {twice[0]!r} is in {states.archive}, too",
                remedy="Leave out one of the two.",
            )
        columns |= more
    return columns, layers, left_out


def _choose_layers(
    states: HiddenStates, named: tuple[int, ...] | None, asked: Sequence[int] | None
) -> dict[int, int]:
    """Return the place in the files of each layer that is imported, ascending."""
    file, count = states.files[0], states.shape[1]
    names = named or (None if asked is None else tuple(asked))
    if names is None:
        raise ConfigError(
            f"{file}: does not say which layers its {count} are",
            why="transformers' hidden_states begins with the embeddings: its N is the output of "
            "block N-1.",
            remedy=f"Give the decoder blocks, as --layers 0-{count - 1}.",
        )
    if len(names) != count or len({*names}) != count or min(names) < 0:
        raise ConfigError(
            f"{file}: holds {count} layers, and {len({*names})} are named",
            remedy="Give --layers, one decoder block for each.",
        )
    places = {layer: at for at, layer in enumerate(names)}
    wanted = sorted(names if asked is None else asked)
    for layer in wanted:
        if layer not in places:
            raise ConfigError(
                f"{file}: no layer {layer}", remedy=f"It has {', '.join(map(str, sorted(names)))}."
            )
    return {layer: places[layer] for layer in wanted}


def _plan(states: HiddenStates, columns: Columns, layers: tuple[int, ...]) -> TablePlan:
    samples, _, channels = states.shape
    versions = {name: version(name) for name in ("zarrtrace", "numpy", "zarr")}
    spans = (one.split(",") for one in dict.fromkeys(columns.coordinates.get("span", ())))
    return TablePlan(
        attributes=TableAttributes(
            scenarios=len(dict.fromkeys(columns.coordinates["scenario"])),
            positions="imported",
            spans=tuple(dict.fromkeys(name for names in spans for name in names if name)),
            options=columns.options,
            metadata=columns.metadata,
            model=None,
            layers=layers,
            layers_without_sae=layers,
            feature_dtype=None,
            residual_dtype=states.dtype,
            versions=versions,
        ),
        shape=TableShape(
            layers=len(layers),
            samples=samples,
            channels=channels,
            residual_dtype=states.dtype,
            next_token=False,
        ),
        coordinates=columns.coordinates,
        config={
            "imported_from": "hidden states",
            "layers": list(layers),
            "fingerprint": states.fingerprint(),
            "columns": _digest(columns),
        },
    )


def _digest(columns: Columns) -> str:
    found = hashlib.blake2b(columns.valid.tobytes(), digest_size=8)
    for name, values in columns.coordinates.items():
        content = repr(values.tolist()).encode("utf-8", "surrogatepass")
        found.update(f"{name} {values.dtype} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _valid_parts(valid: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last sample, exclusive, of each part without failed samples."""
    edges = np.flatnonzero(np.diff(np.r_[False, valid[start:stop], False]))
    yield from ((start + int(a), start + int(b)) for a, b in edges.reshape(-1, 2))


def _append(
    writer: TableWriter,
    states: HiddenStates,
    start: int,
    parts: Sequence[tuple[int, int]],
    layer: int,
    rows: Rows,
) -> None:
    for begin, end in parts:
        part = rows[begin - start : end - start]
        _refuse_never_computed(states, begin, layer, part)
        writer.append(SampleRecord(layer, begin, residual=part))


def _refuse_never_computed(states: HiddenStates, start: int, layer: int, rows: Rows) -> None:
    """Refuse rows that no model computes, but that scripts leave where they failed."""
    values = np.asarray(rows)
    for odd, what in (
        (~np.isfinite(values).all(axis=1), "holds NaN or infinity"),
        (~values.any(axis=1), "holds zeros alone, as one that was never computed"),
    ):
        if odd.any():
            raise NPZError(
                f"{states.files[0]}: row {start + int(odd.argmax())} of layer {layer} {what}",
                remedy="Name such rows in 'valid_mask' (false), in the NPZ file or in --metadata.",
            )
