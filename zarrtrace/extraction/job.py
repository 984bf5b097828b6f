"""From options to a job: everything a run needs, checked against each other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

from zarrtrace import demo
from zarrtrace.errors import ConfigError, install_command
from zarrtrace.extraction.layers import choose_layers
from zarrtrace.extraction.processes import FEW_TRACES, WriterPool
from zarrtrace.extraction.reading_ahead import ReadAhead, weight_files
from zarrtrace.format.attributes import SAEAttributes, TraceAttributes, ranges
from zarrtrace.format.layout import TraceShape
from zarrtrace.hub import cache_if_unreachable
from zarrtrace.records import TracePlan
from zarrtrace.scenarios import Scenario, load_suite
from zarrtrace.scenarios.choice import only_named

if TYPE_CHECKING:  # they import torch
    from zarrtrace.capture import LoadedModel, Prompt
    from zarrtrace.capture.saes import SAESource

#: What the embedded model is called in a trace.
DEMO_MODEL = "zarrtrace-demo"

_LIBRARIES = ("zarrtrace", "numpy", "sae-lens", "torch", "transformers", "zarr")

P = ParamSpec("P")
SAEs = dict[int, tuple[SAEAttributes, ...]]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Options:
    """What to extract.

    Attributes
    ----------
    model, revision, trust_remote_code
        The language model; None is the embedded one.
    sae_release, sae_ids, sae_path
        The SAEs: a release that sae-lens knows with optional patterns of ids, or a folder.
    fold_decoder_norm
        Whether activations are scaled to decoder directions of norm 1.
    layers
        Indices of decoder blocks. None is all, with features all that have an SAE; of the embedded
        model, 1 to 31.
    layer_start, layer_end
        First and last block, instead of `layers`; None is the model's own.
    features, attention
        What to store.
    scenarios
        File of scenarios; None is the embedded suite.
    only
        Names of scenarios; empty means all.
    device, dtype
        Where and how the model computes.
    batch_size
        Scenarios in one forward pass; None chooses from memory: 1 on a CPU.
    queries
        Rows of attention to store: ``"last"``, ``"spans"`` or token positions, negative ones from
        the end; None for all.
    attention_capture
        ``"whole"`` takes attention as transformers' eager implementation makes it; ``"blocked"``
        block of queries by block, so that no whole matrix is held; ``"auto"`` the latter only
        where a matrix is large.
    attention_dtype
        None stores losslessly what the model computed; float16 makes 0 of weights below 3e-8.
    attention_keepbits
        Bits of the mantissa of attention to keep, 1 to 23 (10 for float16); None for all.
    feature_dtype
        Precision in which features are stored. Activations too large for it are refused; those too
        small for it become its smallest number, so that a feature that fires is not stored as 0.
    prepend_bos
        None does as the SAEs were trained, else if the tokenizer has a BOS token.
    low_memory
        Whether decoder blocks stay in host memory and come to the device one at a time.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    sae_release: str | None = None
    sae_ids: tuple[str, ...] = ()
    sae_path: Path | None = None
    fold_decoder_norm: bool = False
    layers: tuple[int, ...] | None = None
    layer_start: int | None = None
    layer_end: int | None = None
    features: bool = True
    attention: bool = True
    scenarios: Path | None = None
    only: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: Dtype = "auto"
    batch_size: int | None = None
    queries: str | tuple[int, ...] | None = None
    attention_capture: Literal["auto", "whole", "blocked"] = "auto"
    attention_dtype: StoredDtype | None = None
    attention_keepbits: int | None = None
    feature_dtype: StoredDtype = "float32"
    prepend_bos: bool | None = None
    low_memory: bool = False


@dataclass(frozen=True)
class Job:
    """Options that were found to fit each other, with everything they refer to.

    Attributes
    ----------
    options
        What was asked for.
    model
        The language model; without weights if it was prepared so.
    prompts
        Tokenised scenarios.
    layers
        Ascending indices of decoder blocks.
    source, saes
        Where SAEs come from and which ones each layer has; None and empty without features.
    blocked
        Names of scenarios whose attention is computed by blocks of queries.
    batch_size
        Scenarios in one forward pass.
    config
        What a resumed run must agree with.
    notes
        Sentences about what is left out: layers without an SAE.
    """

    options: Options
    model: LoadedModel
    prompts: tuple[Prompt, ...]
    layers: tuple[int, ...]
    source: SAESource | None
    saes: SAEs
    blocked: frozenset[str]
    batch_size: int
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def queries(self, prompt: Prompt) -> tuple[int, ...] | None:
        """Token positions whose attention is stored; None for all.

        Raises
        ------
        ConfigError
            If one is not in the prompt.
        """
        wanted, tokens = self.options.queries, len(prompt.tokens.ids)
        if wanted is None or not self.options.attention:
            return None
        if wanted == "last":
            return (tokens - 1,)
        if wanted == "spans":
            return tuple(sorted({at for span in prompt.spans.values() for at in span.tokens}))
        for position in wanted:
            if not -tokens <= int(position) < tokens:
                raise ConfigError(
                    f"--queries {position}: scenario {prompt.scenario.name!r} has {tokens} tokens",
                    remedy=f"Give positions from {-tokens} to {tokens - 1}.",
                )
        return tuple(sorted({int(position) % tokens for position in wanted}))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose block has an attention matrix."""
        return tuple(layer for layer in self.layers if layer in self.model.attentions)

    @property
    def attention_dtype(self) -> StoredDtype | None:
        """Precision of stored attention: lossless unless asked otherwise."""
        if not self.options.attention:
            return None
        half = self.model.attributes.dtype == "float16"
        return self.options.attention_dtype or ("float16" if half else "float32")

    def shape(self, prompt: Prompt) -> TraceShape:
        """Sizes of a prompt's trace."""
        return TraceShape(
            layers=len(self.layers),
            tokens=len(prompt.tokens.ids),
            heads=self.model.n_heads if self.options.attention else None,
            features={sae.variable: sae.d_sae for found in self.saes.values() for sae in found},
            attention_dtype=self.attention_dtype,
            feature_dtype=self.options.feature_dtype if self.saes else None,
            attention_layers=len(self.attention_layers)
            if self.options.attention and len(self.attention_layers) < len(self.layers)
            else None,
        )

    def plan(self, prompt: Prompt) -> TracePlan:
        """Return everything that is known of a prompt's trace before it is computed."""
        return TracePlan(
            attributes=self._attributes(prompt),
            shape=self.shape(prompt),
            tokens=prompt.tokens,
            saes=tuple(sae for found in self.saes.values() for sae in found),
            queries=self.queries(prompt),
            settings=self._settings,
        )

    @property
    def _settings(self) -> str:
        """Hash what a run is asked for, its prompts and the versions of libraries left out."""
        asked = {k: v for k, v in self.config.items() if k not in ("prompts", "versions")}
        return hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()

    def _attributes(self, prompt: Prompt) -> TraceAttributes:
        reasons: dict[str, list[int]] = {}
        for layer in self.layers if self.options.attention else ():
            if layer not in self.attention_layers:
                block = type(self.model.blocks[layer]).__name__
                reason = f"{block} mixes tokens without attention probabilities"
                reasons.setdefault(reason, []).append(layer)
        return TraceAttributes(
            scenario=prompt.scenario.name,
            prompt=prompt.scenario.prompt,
            tags=tuple(prompt.scenario.tags),
            spans=prompt.spans,
            options=prompt.options,
            model=self.model.attributes.model_copy(
                update={"attn_implementation": "blocked"}
                if prompt.scenario.name in self.blocked
                else {}
            ),
            layers=self.layers,
            layers_without_sae=tuple(
                layer for layer in self.layers if self.saes and layer not in self.saes
            ),
            layers_without_attention={reason: tuple(found) for reason, found in reasons.items()},
            attention_dtype=self.attention_dtype,
            attention_keepbits=self.options.attention_keepbits,
            feature_dtype=self.options.feature_dtype if self.saes else None,
            versions=library_versions(),
        )


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, importlib.metadata.version(name)) for name in _LIBRARIES)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what is stored."""
    return dict(_versions())


def _asking_hub(
    function: Callable[Concatenate[Options, P], Job],
) -> Callable[Concatenate[Options, P], Job]:
    """Have a function use the hub's cache alone if the hub cannot be reached."""

    @wraps(function)
    def call(options: Options, /, *arguments: P.args, **settings: P.kwargs) -> Job:
        with cache_if_unreachable(options.model, options.sae_release):
            return function(options, *arguments, **settings)

    return call


@_asking_hub
def prepare(
    options: Options,
    *,
    scenarios: Sequence[Scenario] | None = None,
    weights: bool = True,
    progress: bool = True,
    pool: WriterPool | None = None,
) -> Job:
    """Check options against the model, the SAEs and each other.

    Parameters
    ----------
    options
        What to extract.
    scenarios
        The scenarios; None reads those that the options name.
    weights
        False leaves out the model's weights; enough to estimate a run.
    progress
        Whether transformers may draw a bar while it loads weights.
    pool
        Is started where its processes will write, while the weights are read.

    Raises
    ------
    ConfigError, ScenarioError, ModelError, SAEError
        As for :func:`extract`.
    """
    _check(options)
    if scenarios is None:
        scenarios = find_scenarios(options)
    ahead = ReadAhead() if weights and options.model and options.device != "cpu" else None
    if ahead and options.model:
        ahead.add(weight_files(options.model, options.revision))
    capture = capture_package()
    capture.hide_progress(downloads=not progress)
    # All that can be wrong is found out before the weights are read, which takes minutes.
    model = _load_model(options, capture, weights=False)
    source = _sae_source(options) if options.features else None
    if pool and model.device.type != "cpu" and len(scenarios) >= FEW_TRACES:
        pool.start(len(scenarios))
    layers, notes = choose_layers(options, len(model.blocks), source)
    saes = {} if source is None else _find_saes(source, layers, model)
    without = [layer for layer in layers if saes and layer not in saes]
    if without:
        notes += (f"layers {ranges(without)} have no SAE: they are stored without features",)
    if ahead and source is not None:
        ahead.add(source.stretches([sae for found in saes.values() for sae in found]))
    prepend_bos = _prepend_bos(options, model, source)
    prompts = tuple(
        capture.tokenize(model, scenario, prepend_bos=prepend_bos) for scenario in scenarios
    )
    if weights:
        model = capture.probe_model(_load_model(options, capture, weights=True))
        capture.check_additions(model, _kinds(saes))
    job = _assembled(options, model, layers, source, saes, prompts, prepend_bos=prepend_bos)
    return replace(job, notes=notes)


def with_scenarios(job: Job, scenarios: Sequence[Scenario]) -> Job:
    """Return a job for other scenarios, with the model and the SAEs that it has."""
    capture, bos = capture_package(), job.model.attributes.prepend_bos
    prompts = tuple(
        capture.tokenize(job.model, scenario, prepend_bos=bos) for scenario in scenarios
    )
    made = _assembled(
        job.options, job.model, job.layers, job.source, job.saes, prompts, prepend_bos=bos
    )
    return replace(made, notes=job.notes)


def _assembled(
    options: Options,
    model: LoadedModel,
    layers: tuple[int, ...],
    source: SAESource | None,
    saes: SAEs,
    prompts: tuple[Prompt, ...],
    *,
    prepend_bos: bool,
) -> Job:
    capture = capture_package()
    lengths = [len(prompt.tokens.ids) for prompt in prompts]
    batch_size = capture.choose_batch_size(model, lengths, options.batch_size)
    blocked = _blocked(options, model, prompts)
    model = capture.renamed(model, options.model or DEMO_MODEL, prepend_bos=prepend_bos)
    job = Job(
        options=options,
        model=model,
        prompts=prompts,
        layers=layers,
        source=source,
        saes=saes,
        blocked=blocked,
        batch_size=batch_size,
        config=_config(options, model, layers, saes, prompts, batch_size),
    )
    for prompt in prompts:
        job.queries(prompt)  # refuses positions that a prompt does not have
    return job


def _blocked(options: Options, model: LoadedModel, prompts: Sequence[Prompt]) -> frozenset[str]:
    """Name the scenarios whose attention is computed by blocks of queries."""
    capture = capture_package()
    return frozenset(
        prompt.scenario.name
        for prompt in prompts
        if capture.wants_blocks(model, len(prompt.tokens.ids), mode=options.attention_capture)
    )


def _load_model(options: Options, capture: Any, *, weights: bool) -> LoadedModel:
    model: LoadedModel = capture.load_model(
        options.model or str(demo.model_path()),
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        weights=weights,
        low_memory=options.low_memory,
    )
    return model


def capture_package() -> Any:
    """Return :mod:`zarrtrace.capture`, which needs torch.

    Raises
    ------
    ConfigError
        If the extra ``extract`` is not installed.
    """
    # Torch's threads spin while they wait for each other, and take the cores from the writers;
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # On a GPU: memory that one size of tensors leaves is used for others.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        from zarrtrace import capture  # noqa: PLC0415 -- torch takes seconds
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"extracting needs {error.name}, which is not installed",
            why="Reading and analysing work without torch, so it is an extra.",
            remedy=install_command("extract"),
        ) from error
    return capture


def _check(options: Options) -> None:
    if not options.attention and not options.features:
        raise ConfigError(
            "--no-attention and --no-features leave nothing to extract",
            remedy="Drop one of the two.",
        )
    if options.sae_release and options.sae_path:
        raise ConfigError(
            "--sae-release and --sae-path both say where SAEs come from",
            remedy="Give one of the two.",
        )
    if options.sae_ids and not options.sae_release:
        raise ConfigError(
            "--sae-id chooses from a release, and none is given", remedy="Add --sae-release."
        )
    if options.model and options.features and not (options.sae_release or options.sae_path):
        raise ConfigError(
            f"no SAEs given for {options.model}",
            why="Features need SAEs that were trained on this model.",
            remedy="Add --sae-release or --sae-path, or use --no-features.",
        )
    bits = 10 if options.attention_dtype == "float16" else 23
    if options.attention_keepbits is not None and not 1 <= options.attention_keepbits <= bits:
        raise ConfigError(
            f"--attention-keepbits {options.attention_keepbits}",
            why=f"The mantissa of what is stored has {bits} bits.",
            remedy=f"Give 1 to {bits}.",
        )
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}", remedy="Give 1 or more.")


def find_scenarios(options: Options) -> tuple[Scenario, ...]:
    """Read the scenarios that options name; the options are checked by themselves before.

    Raises
    ------
    ConfigError, ScenarioError
        If options contradict each other, or a scenario cannot be used.
    """
    _check(options)
    scenarios = load_suite(options.scenarios or demo.suite_path())
    return only_named(scenarios, options.only)


def _sae_source(options: Options) -> SAESource:
    from zarrtrace.capture.saes import FolderSAEs, ReleaseSAEs  # noqa: PLC0415 -- takes seconds

    if options.sae_release:
        return ReleaseSAEs(
            options.sae_release, options.sae_ids, fold_decoder_norm=options.fold_decoder_norm
        )
    return FolderSAEs(
        options.sae_path or demo.sae_path(), fold_decoder_norm=options.fold_decoder_norm
    )


def _find_saes(source: SAESource, layers: Sequence[int], model: LoadedModel) -> SAEs:
    from zarrtrace.capture.saes import check_fit  # noqa: PLC0415

    found: SAEs = source.find(layers)
    check_fit(found, model)
    return found


def _kinds(saes: SAEs) -> set[tuple[int, str]]:
    """Layers and hook points that SAEs read."""
    return {(sae.layer, sae.hook_name) for found in saes.values() for sae in found}


def _prepend_bos(options: Options, model: LoadedModel, source: SAESource | None) -> bool:
    if options.prepend_bos is not None:
        return options.prepend_bos
    trained = None if source is None else source.prepend_bos
    return model.tokenizer.bos_token_id is not None if trained is None else bool(trained)


def _config(
    options: Options,
    model: LoadedModel,
    layers: Sequence[int],
    saes: SAEs,
    prompts: Sequence[Prompt],
    batch_size: int,
) -> dict[str, Any]:
    """Everything that decides what is stored, as JSON."""
    attributes, queries = model.attributes, options.queries
    return {
        "model": attributes.id,
        "revision": attributes.revision,
        "model_fingerprint": attributes.fingerprint,
        "model_settings": capture_package().settings_fingerprint(model.model.config),
        "dtype": attributes.dtype,
        "prepend_bos": attributes.prepend_bos,
        "device": model.device.type,
        "batch_size": batch_size,
        "queries": list(queries) if isinstance(queries, tuple) else queries,
        "attention_capture": options.attention_capture,
        "layers": ranges(layers),
        "attention": options.attention,
        "attention_dtype": options.attention_dtype,
        "attention_keepbits": options.attention_keepbits,
        "features": options.features,
        "feature_dtype": options.feature_dtype,
        "sae_release": options.sae_release,
        "saes": {
            sae.id: sae.fingerprint or sae.revision for found in saes.values() for sae in found
        },
        "fold_decoder_norm": options.fold_decoder_norm,
        "prompts": {prompt.scenario.name: _digest(prompt) for prompt in prompts},
        "versions": library_versions(),
    }


def _digest(prompt: Prompt) -> str:
    """Hash a scenario, and what the tokenizer makes of it."""
    scenario = prompt.scenario
    content = [
        scenario.prompt,
        sorted(scenario.spans.items()),
        list(scenario.tags),
        sorted(scenario.options.items()),
        list(prompt.tokens.ids),
        list(prompt.tokens.texts),
        sorted((name, span.tokens) for name, span in prompt.spans.items()),
        sorted((name, option.token_id) for name, option in prompt.options.items()),
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
