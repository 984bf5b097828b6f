"""From a folder in the documented layout to a run."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from zarrtrace.errors import NPZError, ScenarioError
from zarrtrace.format.attributes import SpanAttributes, TraceAttributes
from zarrtrace.format.layout import NO_ID, TOP_FEATURES, TraceShape
from zarrtrace.npz.archive import read_array
from zarrtrace.npz.files import Progress, reading, run_jobs
from zarrtrace.npz.folder import Folder, look_at
from zarrtrace.npz.metadata import Origin, ScenarioMetadata
from zarrtrace.npz.plausibility import check_attention
from zarrtrace.records import FeatureRecord, LayerRecord, Tokens, TracePlan
from zarrtrace.scenarios import DECISION, load_suite
from zarrtrace.storage import Address
from zarrtrace.store import RunWriter, TraceWriter
from zarrtrace.suggestions import did_you_mean

# Rows of attention that a trace holds; None for all of them.
_Queries = tuple[int, ...] | None


def import_npz(
    folder: str | Path,
    run: Address,
    *,
    layers: Sequence[int] | None = None,
    metadata: str | None = None,
    scenarios: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Turn a folder in the documented NPZ layout into a run.

    Before anything is written, every file's headers are checked, and that no file is a copy of
    another's; when it is read, that attention is a causal model's. The layout does not hold what
    would tell whether layers, or scenarios with equally many tokens, were exchanged. An interrupted
    import goes on where it was when it is called again. The run has no next tokens: the layout does
    not hold them. It has tags, prompts and the model if the metadata file comes from
    :func:`export_npz`.

    Parameters
    ----------
    folder
        What :func:`export_npz`, or the script that the layout comes from, wrote.
    run
        Folder of the run to write, or its address.
    layers
        Layers to import; by default all of the metadata's ``layer_range``, none missing.
    metadata
        Name of the metadata file; needed if there are several that say different things.
    scenarios
        File of scenarios that gives the tags, instead of the metadata file.
    overwrite
        Replace a run that exists.
    threads
        By default one a CPU. Each holds one layer at a time.
    progress
        Called with the number of files done and of all files still to do.

    Raises
    ------
    NPZError
        If a file is missing, broken, unsafe, or does not fit the others.
    ConfigError
        If a layer is not in the folder.
    ScenarioError
        If `scenarios` lacks a scenario of the folder.
    ConfigMismatchError
        If `run` exists and came from other files.
    """
    source = look_at(Path(folder), metadata, layers)
    names = [scenario.scenario for scenario in source.metadata.scenarios]
    origins = _origins(source, names, scenarios)
    config = {
        "imported_from": "npz",
        "layers": list(source.layers),
        "attention_dtype": source.dtype("attention"),
        "feature_dtype": source.dtype("features"),
        "fingerprint": source.fingerprint,
        "origins": _digest(origins),
    }
    with RunWriter(run, names, config, overwrite=overwrite) as writer:
        traces: list[TraceWriter] = []
        jobs = []
        for scenario in source.metadata.scenarios:
            queries = _stored_queries(source, scenario)
            origin = origins[scenario.scenario]
            trace = _trace_writer(source, scenario, origin, queries, writer)
            traces.append(trace)
            jobs += [
                partial(_import_layer, source, scenario, layer, queries, trace)
                for layer in trace.missing_layers
            ]
        run_jobs(jobs, threads, progress)
        for trace in traces:
            trace.finish()
        writer.finish()


def _origins(
    source: Folder, names: Sequence[str], scenarios: str | Path | None
) -> dict[str, Origin]:
    """Return what is known of each scenario beside its numbers; `scenarios` gives the tags."""
    origins = {name: source.metadata.zarrtrace.get(name, Origin()) for name in names}
    if scenarios is None:
        return origins
    tags = {scenario.name: tuple(scenario.tags) for scenario in load_suite(scenarios)}
    for name in names:
        if name not in tags:
            raise ScenarioError(
                f"{scenarios}: no scenario {name!r}, which {source.path} holds",
                remedy=did_you_mean(name, tags, label="The file has"),
            )
    return {name: one.model_copy(update={"tags": tags[name]}) for name, one in origins.items()}


def _digest(origins: Mapping[str, Origin]) -> str:
    content = [(name, origin.model_dump(mode="json")) for name, origin in origins.items()]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _stored_queries(source: Folder, scenario: ScenarioMetadata) -> _Queries:
    """Return the rows of attention that are numbers: export writes those not stored as NaN."""
    layer = next((layer for layer in source.layers if "attention" in source.keys[layer]), None)
    if layer is None:
        return None
    file = source.file(scenario, layer)
    with reading(file), zipfile.ZipFile(file) as archive:
        stored = np.flatnonzero(~np.isnan(read_array(archive, "attention")[0, :, 0]))
    return tuple(stored.tolist()) if 0 < len(stored) < scenario.seq_len else None


def _trace_writer(
    source: Folder,
    scenario: ScenarioMetadata,
    origin: Origin,
    queries: _Queries,
    run: RunWriter,
) -> TraceWriter:
    without_attention = source.without("attention")
    features = source.size("features")
    shape = TraceShape(
        layers=len(source.layers),
        tokens=scenario.seq_len,
        heads=source.size("attention"),
        features={} if features is None else {"features": features},
        attention_dtype=source.dtype("attention"),
        feature_dtype=source.dtype("features"),
        next_token=False,
        attention_layers=len(source.layers) - len(without_attention) if without_attention else None,
    )
    positions = {**scenario.key_positions, DECISION: [scenario.seq_len - 1]}
    without_sae = source.without("features")
    attributes = TraceAttributes(
        scenario=scenario.scenario,
        prompt=origin.prompt,
        tags=origin.tags,
        spans={
            name: SpanAttributes(characters=(), tokens=tuple(tokens))
            for name, tokens in positions.items()
        },
        model=origin.model,
        layers=source.layers,
        layers_without_sae=tuple(without_sae),
        layers_without_attention={"its NPZ file has none": tuple(without_attention)}
        if without_attention
        else {},
        attention_dtype=source.dtype("attention"),
        feature_dtype=source.dtype("features"),
        versions={name: version(name) for name in ("numpy", "zarr")},
    )
    tokens = Tokens(ids=scenario.token_ids, texts=scenario.tokens)
    return run.trace(TracePlan(attributes, shape, tokens, queries=queries))


def _import_layer(
    source: Folder,
    scenario: ScenarioMetadata,
    layer: int,
    queries: _Queries,
    trace: TraceWriter,
) -> None:
    file = source.file(scenario, layer)
    with reading(file), zipfile.ZipFile(file) as archive:
        arrays = {key: read_array(archive, key) for key in source.keys[layer]}
    attention, features = arrays.get("attention"), arrays.get("features")
    if attention is not None and queries is not None:
        rest = np.delete(attention, queries, axis=1)
        arrays["attention"] = attention = attention[:, queries]
        if not np.isnan(rest).all():
            raise NPZError(
                f"{file}: 'attention' has other rows than the files before it",
                why="In one scenario, the same rows are NaN in all layers: those not captured.",
                remedy="Write the file again.",
            )
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise NPZError(
                f"{file}: {key!r} holds NaN or infinity",
                why="The model overflowed, or the file is damaged.",
                remedy="Extract this scenario again, with a wider dtype.",
            )
    if attention is not None:
        check_attention(file, attention, np.asarray(queries or range(scenario.seq_len)))
    trace.append(
        LayerRecord(
            scenario=scenario.scenario,
            layer=layer,
            attention=attention,
            attention_mean=None if attention is None else attention.mean(axis=0, dtype=np.float32),
            features={} if features is None else {"features": with_strongest(features)},
        )
    )


def with_strongest(activations: np.ndarray) -> FeatureRecord:
    """Find the features of largest magnitude of each token; of equals, the first.

    Parameters
    ----------
    activations
        ``(query, feature)``, float16 or float32.
    """
    tokens, features = activations.shape
    count = min(TOP_FEATURES, features)
    top = np.empty((tokens, count), dtype=np.uint32)
    for at in range(0, tokens, 32):
        rows = np.abs(activations[at : at + 32].astype(np.float32))
        # Bits of a positive float sort as the float does; lower indices win among equals.
        keys = rows.view(np.uint32).astype(np.uint64) << np.uint64(32)
        keys |= np.arange(features, dtype=np.uint64)[::-1]
        keys.partition(features - count, axis=1)
        best = np.sort(keys[:, features - count :], axis=1)[:, ::-1]
        top[at : at + 32] = features - 1 - (best & np.uint64(0xFFFFFFFF))
    values = np.take_along_axis(activations, top.astype(np.intp), axis=1).astype(np.float32)
    return FeatureRecord(activations, np.where(values != 0, top, np.uint32(NO_ID)), values)
