"""From a folder in the documented layout to a run."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from zarrtrace.errors import NPZError, ScenarioError
from zarrtrace.format.attributes import SpanAttributes
from zarrtrace.npz.archive import read_array
from zarrtrace.npz.files import Progress, reading, run_jobs
from zarrtrace.npz.folder import Folder, look_at
from zarrtrace.npz.metadata import Origin, ScenarioMetadata
from zarrtrace.npz.plausibility import check_attention
from zarrtrace.records import Tokens, with_strongest
from zarrtrace.scenarios import DECISION, load_suite, split_trace_name
from zarrtrace.storage import Address
from zarrtrace.store import RunWriter, TraceWriter, layer_record, trace_plan
from zarrtrace.suggestions import did_you_mean

# Rows of attention that a trace holds; None for all of them.
_Rows = tuple[int, ...] | None


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
    import is resumed when it is called again. The run has no next tokens: the layout does
    not hold them. It has tags, prompts and the model if the metadata file comes from
    :func:`export_npz`.

    Parameters
    ----------
    folder
        Folder that :func:`export_npz`, or the script that the layout comes from, wrote.
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
            rows = _stored_rows(source, scenario)
            origin = origins[scenario.scenario]
            trace = _trace_writer(source, scenario, origin, rows, writer)
            traces.append(trace)
            jobs += [
                partial(_import_layer, source, scenario, layer, rows, trace)
                for layer in trace.missing_layers
            ]
        run_jobs(jobs, threads, progress)
        for trace in traces:
            trace.finish()
        writer.finish()


def _origins(
    source: Folder, names: Sequence[str], scenarios: str | Path | None
) -> dict[str, Origin]:
    """Return each scenario's metadata; `scenarios` gives the tags."""
    origins = {name: source.metadata.zarrtrace.get(name, Origin()) for name in names}
    if scenarios is None:
        return origins
    tags = {scenario.name: tuple(scenario.tags) for scenario in load_suite(scenarios)}
    for name in names:
        if split_trace_name(name)[0] not in tags:
            raise ScenarioError(
                f"{scenarios}: no scenario {name!r}, which {source.path} holds",
                remedy=did_you_mean(name, tags, label="The file has"),
            )
    return {
        name: one.model_copy(update={"tags": tags[split_trace_name(name)[0]]})
        for name, one in origins.items()
    }


def _digest(origins: Mapping[str, Origin]) -> str:
    content = [(name, origin.model_dump(mode="json")) for name, origin in origins.items()]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _stored_rows(source: Folder, scenario: ScenarioMetadata) -> _Rows:
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
    rows: _Rows,
    run: RunWriter,
) -> TraceWriter:
    generation, (name, repeat) = origin.generation, split_trace_name(scenario.scenario)
    prompt = scenario.seq_len if generation is None else generation.prompt_tokens
    if prompt > scenario.seq_len:
        raise NPZError(
            f"{source.path}: {scenario.scenario}: generation.prompt_tokens is {prompt}, seq_len "
            f"{scenario.seq_len}",
            remedy="Restore the metadata file from where it was written.",
        )
    positions = {**scenario.key_positions, DECISION: [prompt - 1]}
    plan = trace_plan(
        scenario=name,
        repeat=repeat,
        generation=generation,
        choice=origin.choice,
        prompt=origin.prompt,
        tags=origin.tags,
        spans={
            name: SpanAttributes(characters=(), tokens=tuple(tokens))
            for name, tokens in positions.items()
        },
        model=origin.model,
        layers=source.layers,
        without_attention={"its NPZ file has none": source.without("attention")},
        without_sae=source.without("features"),
        heads=source.size("attention"),
        features=source.size("features"),
        attention_dtype=source.dtype("attention"),
        feature_dtype=source.dtype("features"),
        tokens=Tokens(ids=scenario.token_ids, texts=scenario.tokens),
        attention_positions=rows,
    )
    return run.trace(plan)


def _import_layer(
    source: Folder,
    scenario: ScenarioMetadata,
    layer: int,
    rows: _Rows,
    trace: TraceWriter,
) -> None:
    file = source.file(scenario, layer)
    with reading(file), zipfile.ZipFile(file) as archive:
        arrays = {key: read_array(archive, key) for key in source.keys[layer]}
    attention, features = arrays.get("attention"), arrays.get("features")
    if attention is not None and rows is not None:
        rest = np.delete(attention, rows, axis=1)
        arrays["attention"] = attention = attention[:, rows]
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
        check_attention(file, attention, np.asarray(rows or range(scenario.seq_len)))
    found = None if features is None else with_strongest(features)
    trace.append(layer_record(scenario.scenario, layer, attention, found))
