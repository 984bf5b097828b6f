"""From a run to a folder in the documented layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from zarrtrace.analysis.gaps import layers_without_sae
from zarrtrace.errors import ConfigError, IntegrityError, NPZError
from zarrtrace.format.attributes import TraceAttributes, ranges
from zarrtrace.npz.archive import write_npz
from zarrtrace.npz.files import DType, Progress, converted, replacing, run_jobs, writing
from zarrtrace.npz.metadata import KEYS, Metadata, Origin, ScenarioMetadata, write_metadata
from zarrtrace.scenarios import DECISION, chosen_names, name_of
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import kind_of, open_run, open_trace, refuse_inside
from zarrtrace.suggestions import did_you_mean


@dataclass(frozen=True)
class _Trace:
    """A trace as export reads it; `arrays` by key, read on demand; `without` features: layers."""

    path: Location
    attributes: TraceAttributes
    metadata: ScenarioMetadata
    arrays: Mapping[str, xr.DataArray]
    without: frozenset[int]

    def keys(self, layer: int) -> list[str]:
        return [
            key
            for key, array in self.arrays.items()
            if layer in self.attributes.layers_of(str(array.dims[0]))
            and (key != "features" or layer not in self.without)
        ]


def export_npz(
    run: Address,
    output: str | Path,
    *,
    scenarios: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    output_dtype: DType | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    timestamp: datetime | None = None,
) -> Path:
    """Write a run, or one trace, in the documented NPZ layout.

    Values are the store's, bit for bit, and the same call writes the same bytes. Arrays that the
    layout has no place for (means, indices, next tokens, residual stream, further feature arrays)
    are left out.

    Parameters
    ----------
    run
        Folder of a complete run or trace, or its address.
    output
        Folder to write into.
    scenarios, layers
        Scenarios and layers to export; by default all.
    output_dtype
        Convert both arrays; by default each keeps its own. Features too small for float16 become
        its smallest number, and not 0.
    overwrite
        Replace an export that is there, or was interrupted: its metadata file is removed first,
        and each layer file replaced at once.
    threads
        By default one a CPU. Each holds one array of one layer at a time.
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
    ConfigError, ScenarioError
        If a scenario or layer is not in the run, or it has neither attention nor features, or
        `output` is in a run, or holds an export and `overwrite` is false.
    NPZError
        If `output` holds layer files that this export would not write, or cannot be written.
    """
    if output_dtype not in (None, "float16", "float32"):
        raise ConfigError(
            f"output_dtype {output_dtype!r} is unknown", remedy="Give 'float16' or 'float32'."
        )
    output = Path(output)
    refuse_inside(output)
    traces = _traces(locate(run), scenarios)
    chosen = _choose_layers(traces, layers)
    metadata = _metadata(traces, chosen, timestamp or datetime.now())
    jobs = {
        output / trace.metadata.scenario / f"layer_{layer}.npz": (trace, layer)
        for trace in traces
        for layer in chosen
    }
    old = _refuse_stale(output, jobs, overwrite=overwrite)
    with writing(output):
        for file in old:  # it would name layers that are another export's meanwhile
            file.unlink()
        for trace in traces:
            (output / trace.metadata.scenario).mkdir(parents=True, exist_ok=True)
    run_jobs(
        [partial(_export_layer, file, *job, output_dtype) for file, job in jobs.items()],
        threads,
        progress,
    )
    return write_metadata(output, metadata)


def _traces(path: Location, names: Sequence[str] | None) -> list[_Trace]:
    if kind_of(path) == "run":
        folders = {name: path / name for name in open_run(path).children}
        # Every byte will be read: all files are looked at before the first is written.
        datasets = {name: open_trace(folder) for name, folder in folders.items()}
    else:
        ds = open_trace(path)
        name = name_of(ds.attrs)
        folders, datasets = {name: path}, {name: ds}
    if names is not None and not names:
        raise ConfigError(
            "no scenario was asked for", remedy=did_you_mean("", folders, label="It has")
        )
    return [_trace(folders[name], datasets[name]) for name in chosen_names([*folders], names)]


def _trace(path: Location, ds: xr.Dataset) -> _Trace:
    attributes = TraceAttributes.model_validate(ds.attrs)
    tokens = [str(text) for text in ds["key_token"].values]
    keys = [key for key in KEYS if key in ds.data_vars]
    if "features" in keys and ds.sizes["query"] < len(tokens):
        raise ConfigError(
            f"{path}: features of {ds.sizes['query']} of {len(tokens)} tokens are stored",
            why="It was extracted with --positions, and the NPZ layout has features of every "
            "token of a prompt: rows of others would be taken for theirs.",
            remedy="Extract it with all positions to export it, or read the trace with "
            "zarrtrace.open_trace.",
        )
    return _Trace(
        path=path,
        attributes=attributes,
        metadata=ScenarioMetadata(
            scenario=attributes.name,
            tokens=tokens,
            token_ids=[int(token) for token in ds["token_id"].values],
            seq_len=len(tokens),
            key_positions={
                name: list(span.tokens)
                for name, span in attributes.spans.items()
                if name != DECISION
            },
        ),
        arrays={key: ds[key] for key in keys},
        without=layers_without_sae(ds),
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
                remedy=f"{trace.metadata.scenario} has layers {ranges(there)}.",
            )
    return sorted(chosen)


def _metadata(traces: Sequence[_Trace], layers: Sequence[int], when: datetime) -> Metadata:
    saved = {key for trace in traces for layer in layers for key in trace.keys(layer)}
    if not saved:
        raise ConfigError(
            f"{traces[0].path}: there is neither attention nor features to export",
            why="The layout has no place for other arrays, and layers without an SAE have none.",
            remedy="Choose other layers, or read the trace with zarrtrace.open_trace.",
        )
    return Metadata(
        timestamp=when.strftime("%Y%m%d_%H%M%S"),
        n_scenarios=len(traces),
        layer_range=[layers[0], layers[-1]],
        save_features="features" in saved,
        save_attention="attention" in saved,
        scenarios=[trace.metadata for trace in traces],
        zarrtrace={
            trace.metadata.scenario: Origin(
                tags=trace.attributes.tags,
                prompt=trace.attributes.prompt,
                model=trace.attributes.model,
                generation=trace.attributes.generation,
                choice=trace.attributes.choice,
            )
            for trace in traces
        },
    )


def _refuse_stale(
    output: Path, planned: Mapping[Path, object], *, overwrite: bool
) -> Sequence[Path]:
    """Refuse another export's files, all or those that would stay; return its metadata files."""
    with writing(output):
        layers = sorted(output.glob("*/layer_*.npz"))
        metadata = sorted(output.glob("metadata_L*.json"))
    if (there := [*metadata, *layers]) and not overwrite:
        more = f" and {len(there) - 1} more files" if len(there) > 1 else ""
        raise ConfigError(
            f"{output}: holds an export already: {there[0].relative_to(output)}{more}",
            why="It was made earlier, or interrupted.",
            remedy="Choose another folder, or replace these files with --overwrite.",
        )
    if stale := [file for file in layers if file not in planned]:
        raise NPZError(
            f"{output}: has {len(stale)} layer files that this export would not write, "
            f"such as {stale[0].relative_to(output)}",
            why="They are another export's, and would look like part of this one.",
            remedy="Choose another folder, or remove those files first.",
        )
    return metadata


def _export_layer(file: Path, trace: _Trace, layer: int, dtype: DType | None) -> None:
    with replacing(file) as out:
        write_npz(
            out,
            (
                (key, converted(file, _load(trace, key, layer), dtype, firing=key == "features"))
                for key in trace.keys(layer)
            ),
        )


def _load(trace: _Trace, key: str, layer: int) -> np.ndarray:
    try:
        array = trace.arrays[key]
        at = trace.attributes.layers_of(str(array.dims[0])).index(layer)
        values: np.ndarray = array[at].values
    except (IntegrityError, OSError, ValueError, RuntimeError) as error:
        said = error.what if isinstance(error, IntegrityError) else error
        raise IntegrityError(
            f"{trace.path}: {key} of layer {layer} cannot be read: {said}",
            why="Its bytes are not the ones that were written.",
            remedy="'zarrtrace verify' names everything damaged; the 'zarrtrace extract' that made "
            "the run makes a new one.",
        ) from error
    rows = str(array.dims[2])
    if key == "attention" and array.sizes[rows] < array.sizes["key"]:
        heads, _, keys = values.shape  # the layout has all rows: those not stored are NaN
        every = np.full((heads, keys, keys), np.nan, values.dtype)
        every[:, array[rows].values] = values
        return every
    return values
