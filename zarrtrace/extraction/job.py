"""From options to a job: everything a run needs, checked against each other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, get_args

from zarrtrace import demo
from zarrtrace.errors import ConfigError, install_command
from zarrtrace.extraction.layers import choose_layers
from zarrtrace.extraction.processes import FEW_TRACES, WriterPool
from zarrtrace.extraction.reading_ahead import ReadAhead, weight_files
from zarrtrace.format.attributes import (
    ModelAttributes,
    SAEAttributes,
    TraceAttributes,
    ranges,
)
from zarrtrace.format.layout import TraceShape
from zarrtrace.hub import cache_if_unreachable
from zarrtrace.records import TracePlan
from zarrtrace.scenarios import Scenario, ScenarioStream, stream, suite_attributes
from zarrtrace.scenarios.positions import Positions, as_json, as_text, check_spans, positions_of

if TYPE_CHECKING:  # they import torch
    from zarrtrace.capture import CaptureLimits, LoadedModel, Prompt
    from zarrtrace.capture.saes import SAESource

#: What the embedded model is called in a trace.
DEMO_MODEL = "zarrtrace-demo"
#: How to ask for the embedded model and its SAEs, and for the embedded scenarios.
DEMO, SLOT_MACHINE = "demo", "slot-machine"

_LIBRARIES = ("zarrtrace", "numpy", "sae-lens", "torch", "transformers", "zarr")

P = ParamSpec("P")
SAEs = dict[int, tuple[SAEAttributes, ...]]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "float16"]
AttentionCapture = Literal["auto", "whole", "blocked"]
# Options that take one of a few words.
_CHOICES = {
    "dtype": Dtype,
    "attention_capture": AttentionCapture,
    "attention_dtype": StoredDtype,
    "feature_dtype": StoredDtype,
    "residual_dtype": StoredDtype,
}


@dataclass(frozen=True)
class Options:
    """What to extract.

    Without `model` and `scenarios` the embedded model runs over the embedded scenarios. One of the
    two without the other is refused.

    Attributes
    ----------
    model, revision, trust_remote_code
        The language model; ``"demo"`` is the embedded one.
    sae_release, sae_ids, sae_path
        The SAEs: a release that sae-lens knows with optional patterns of ids, or a folder.
    fold_decoder_norm
        Whether activations are scaled to decoder directions of norm 1.
    layers
        Indices of decoder blocks. None is all, with features all that have an SAE; of the embedded
        model, 1 to 31.
    layer_start, layer_end
        First and last block, instead of `layers`; None is the model's own.
    features, attention, residual
        What to store. `residual` is the residual stream at the hook point that the SAEs of
        ``features`` read, without SAEs the output of each block.
    scenarios
        What :func:`zarrtrace.scenarios.stream` takes; ``"slot-machine"`` is the embedded
        suite.
    only
        Names of scenarios; empty means all.
    device, dtype
        Where and how the model computes.
    batch_size
        Scenarios in one forward pass; None chooses from memory: 1 on a CPU.
    positions
        Token positions to store: ``"all"``, ``"last"``, ``"spans"`` (those of any span), names of
        spans, or integers, negative ones from the end.
    attention_positions
        Those of `positions` whose rows of attention are stored; None for all of them.
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
    residual_dtype
        Precision in which the residual stream is stored; values too large for it are refused.
    prepend_bos
        None does as the SAEs were trained, else if the tokenizer has a BOS token; of messages, as
        the chat template does.
    generation_prompt
        Whether chat templates begin the assistant's next message, for scenarios with messages that
        do not say it.
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
    residual: bool = False
    scenarios: object = None
    only: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: Dtype = "auto"
    batch_size: int | None = None
    positions: Positions = "all"
    attention_positions: Positions | None = None
    attention_capture: AttentionCapture = "auto"
    attention_dtype: StoredDtype | None = None
    attention_keepbits: int | None = None
    feature_dtype: StoredDtype = "float32"
    residual_dtype: StoredDtype = "float32"
    prepend_bos: bool | None = None
    generation_prompt: bool = True
    low_memory: bool = False

    @property
    def own_model(self) -> str | None:
        """Name or folder of the model; None for the embedded one."""
        return None if self.model == DEMO else self.model


@dataclass(frozen=True)
class Loaded:
    """Objects that the caller has loaded, instead of names.

    Attributes
    ----------
    model
        A model of transformers, borrowed while the job runs; :attr:`Options.model` is its name.
    tokenizer
        Used instead of the model's own.
    saes
        What :class:`zarrtrace.capture.loaded_saes.LoadedSAEs` takes.
    """

    model: Any = None
    tokenizer: Any = None
    saes: Any = None


_NOTHING = Loaded()


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

    def positions(self, prompt: Prompt) -> tuple[int, ...] | None:
        """Token positions that are stored; None for all.

        Raises
        ------
        ConfigError, ScenarioError
            If one is not in the prompt, or none is left.
        """
        found = _positions(self.options.positions, prompt, "--positions")
        return None if found == tuple(range(len(prompt.tokens.ids))) else found

    def attention_positions(self, prompt: Prompt) -> tuple[int, ...] | None:
        """Token positions whose rows of attention alone are stored; None for :meth:`positions`.

        Raises
        ------
        ConfigError, ScenarioError
            As :meth:`positions`; also if one is not among the stored positions.
        """
        wanted = self.options.attention_positions
        if wanted is None or wanted == self.options.positions:
            return None
        found = _positions(wanted, prompt, "--attention-positions")
        stored = self.positions(prompt)
        absent = [] if stored is None else sorted(set(found) - set(stored))
        if absent:
            raise ConfigError(
                f"--attention-positions {as_text(wanted)}: token {absent[0]} of scenario "
                f"{prompt.scenario.name!r} is not among the stored positions",
                why=f"--positions {as_text(self.options.positions)} leaves it out.",
                remedy="Choose more --positions, or fewer --attention-positions.",
            )
        return found

    def attention_rows(self, prompt: Prompt) -> tuple[int, ...] | None:
        """Token positions whose rows of attention are stored; None for all of the prompt."""
        own = self.attention_positions(prompt)
        return self.positions(prompt) if own is None else own

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

    @cached_property
    def residual(self) -> Mapping[int, str]:
        """Hook points of the residual stream that is stored, by layer; empty for none.

        Raises
        ------
        ConfigError
            If SAEs read different places in different blocks.
        """
        if not self.options.residual:
            return {}
        found: dict[int, str] = capture_package().residual_hooks(self.layers, self.saes)
        return found

    @property
    def channels(self) -> int | None:
        """Width of the residual stream that is stored; None for none."""
        if not self.residual:
            return None
        hook = next(iter(self.residual.values()))
        return self.model.width(capture_package().parse_hook(hook).kind)

    def shape(self, prompt: Prompt) -> TraceShape:
        """Sizes of a prompt's trace."""
        return TraceShape(
            layers=len(self.layers),
            tokens=len(prompt.tokens.ids),
            positions=_count(self.positions(prompt)),
            heads=self.model.n_heads if self.options.attention else None,
            features={sae.variable: sae.d_sae for found in self.saes.values() for sae in found},
            channels=self.channels,
            attention_dtype=self.attention_dtype,
            feature_dtype=self.options.feature_dtype if self.saes else None,
            residual_dtype=self.options.residual_dtype if self.residual else None,
            attention_layers=len(self.attention_layers)
            if self.options.attention and len(self.attention_layers) < len(self.layers)
            else None,
            attention_positions=_count(self.attention_positions(prompt)),
            limits=self.model.limits.layout,
        )

    def plan(self, prompt: Prompt) -> TracePlan:
        """Return everything that is known of a prompt's trace before it is computed."""
        return TracePlan(
            attributes=self._attributes(prompt),
            shape=self.shape(prompt),
            tokens=prompt.tokens,
            saes=tuple(sae for found in self.saes.values() for sae in found),
            positions=self.positions(prompt),
            attention_positions=self.attention_positions(prompt),
            settings=self._settings,
        )

    @property
    def _settings(self) -> str:
        """Hash what a run is asked for, its prompts and the versions of libraries left out."""
        asked = {k: v for k, v in self.config.items() if k not in ("prompts", "versions")}
        return hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()

    @property
    def _residual_form(self) -> str | None:
        """The hook point of the residual stream, ``{layer}`` for the number of the block."""
        for layer, hook in self.residual.items():
            return hook.replace(f"blocks.{layer}.", "blocks.{layer}.", 1)
        return None

    def _model_attributes(self, prompt: Prompt) -> ModelAttributes:
        """Return the model's attributes, with what differs from prompt to prompt."""
        update: dict[str, Any] = {}
        if prompt.scenario.name in self.blocked:
            update["attn_implementation"] = "blocked"
        if prompt.scenario.chat is not None:
            update["prepend_bos"] = prompt.tokens.ids[0] == self.model.tokenizer.bos_token_id
        return self.model.attributes.model_copy(update=update)

    def _attributes(self, prompt: Prompt) -> TraceAttributes:
        reasons: dict[str, list[int]] = {}
        for layer in self.layers if self.options.attention else ():
            if layer not in self.attention_layers:
                block = type(self.model.blocks[layer]).__name__
                reason = f"{block} mixes tokens without attention probabilities"
                reasons.setdefault(reason, []).append(layer)
        chat = prompt.scenario.chat
        return TraceAttributes(
            scenario=prompt.scenario.name,
            prompt=prompt.scenario.prompt,
            chat=None if chat is None else chat.attributes,
            tags=tuple(prompt.scenario.tags),
            spans=prompt.spans,
            options=prompt.options,
            metadata=dict(prompt.scenario.metadata),
            model=self._model_attributes(prompt),
            layers=self.layers,
            layers_without_sae=tuple(
                layer for layer in self.layers if self.saes and layer not in self.saes
            ),
            layers_without_attention={reason: tuple(found) for reason, found in reasons.items()},
            attention_dtype=self.attention_dtype,
            attention_keepbits=self.options.attention_keepbits,
            feature_dtype=self.options.feature_dtype if self.saes else None,
            residual_dtype=self.options.residual_dtype if self.residual else None,
            residual_hook=self._residual_form,
            layers_without_residual=tuple(
                layer for layer in self.layers if self.residual and layer not in self.residual
            ),
            versions=library_versions(),
        )


def _positions(wanted: Positions, prompt: Prompt, option: str) -> tuple[int, ...]:
    name, tokens = prompt.scenario.name, len(prompt.tokens.ids)
    return positions_of(wanted, name, tokens, prompt.spans, option)


def _count(positions: tuple[int, ...] | None) -> int | None:
    return None if positions is None else len(positions)


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
        is_loaded = getattr(settings.get("loaded"), "model", None) is not None
        named = None if is_loaded else options.own_model
        with cache_if_unreachable(named, options.sae_release):
            return function(options, *arguments, **settings)

    return call


@_asking_hub
def prepare(
    options: Options,
    *,
    scenarios: Sequence[Scenario] | None = None,
    loaded: Loaded = _NOTHING,
    weights: bool = True,
    progress: bool = True,
    pool: WriterPool | None = None,
    limits: CaptureLimits | None = None,
) -> Job:
    """Check options against the model, the SAEs and each other.

    Parameters
    ----------
    options
        What to extract.
    scenarios
        The scenarios; None reads those that the options name.
    loaded
        A model, a tokenizer and SAEs that are in memory.
    weights
        False leaves out the model's weights; enough to estimate a run.
    progress
        Whether transformers may draw a bar while it loads weights.
    pool
        Is started where its processes will write, while the weights are read.
    limits
        From which sizes on long prompts are captured in parts; None for the usual ones.

    Raises
    ------
    ConfigError, ScenarioError, ModelError, SAEError
        As for :func:`extract`.
    """
    if scenarios is None:
        scenarios = find_scenarios(options, loaded)
    ahead, named = None, options.own_model if loaded.model is None else None
    if weights and named and options.device != "cpu":
        ahead = ReadAhead()
        ahead.add(weight_files(named, options.revision))
    capture = capture_package()
    capture.hide_progress(downloads=not progress)
    # All that can be wrong is found out before the weights are read, which takes minutes.
    model = _load_model(options, loaded, capture, weights=False)
    source = _sae_source(options, loaded) if options.features else None
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
    prompts = tuple(tokenized(options, model, scenarios, prepend_bos=prepend_bos))
    notes += _bos_notes(source, prompts, model.tokenizer.bos_token_id)
    if loaded.tokenizer is not None:
        capture.refuse_unknown_ids(model, (max(prompt.tokens.ids) for prompt in prompts))
    if weights:
        if loaded.model is None:
            model = _load_model(options, loaded, capture, weights=True)
        model = capture.probe_model(model)
        capture.check_additions(model, _kinds(saes))
    model = replace(model, limits=limits) if limits else model
    job = _assembled(options, model, layers, source, saes, prompts, prepend_bos=prepend_bos)
    return replace(job, notes=notes)


def with_scenarios(job: Job, scenarios: Sequence[Scenario]) -> Job:
    """Return a job for other scenarios, with the model and the SAEs that it has."""
    bos = job.model.attributes.prepend_bos
    prompts = tuple(tokenized(job.options, job.model, scenarios, prepend_bos=bos))
    made = _assembled(
        job.options, job.model, job.layers, job.source, job.saes, prompts, prepend_bos=bos
    )
    return replace(made, notes=job.notes)


def with_prompts(job: Job, prompts: tuple[Prompt, ...]) -> Job:
    """Return a job for other prompts, which are computed in the batches that they make."""
    return replace(job, prompts=prompts, blocked=_blocked(job.options, job.model, prompts))


def tokenized(
    options: Options, model: LoadedModel, scenarios: Iterable[Scenario], *, prepend_bos: bool
) -> Iterator[Prompt]:
    """Yield scenarios as the model reads them; chats are rendered as options say."""
    rendered = (
        scenario.render(
            model.tokenizer,
            generation_prompt=options.generation_prompt,
            prepend_bos=options.prepend_bos,
        )
        for scenario in scenarios
    )
    found: Iterator[Prompt] = capture_package().tokenize_all(
        model, rendered, prepend_bos=prepend_bos
    )
    return found


def _bos_notes(
    source: SAESource | None, prompts: Sequence[Prompt], bos: int | None
) -> tuple[str, ...]:
    """Say where a chat template and the SAEs disagree on BOS."""
    begins = {prompt.tokens.ids[0] == bos for prompt in prompts if prompt.scenario.chat}
    # SAEs that disagree with each other are asked only where it matters.
    trained = None if source is None or not begins else source.prepend_bos
    if trained is None or begins <= {bool(trained)}:
        return ()
    if trained:
        return ("the chat template writes no BOS; the SAEs were trained with it (--prepend-bos)",)
    return ("the chat template writes BOS; the SAEs were trained without it",)


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
    model = capture.renamed(model, options.own_model or DEMO_MODEL, prepend_bos=prepend_bos)
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
    _ = job.residual  # refuses SAEs that read different places
    for prompt in prompts:
        job.shape(prompt)  # refuses positions that a prompt does not have
    return job


def _blocked(options: Options, model: LoadedModel, prompts: Sequence[Prompt]) -> frozenset[str]:
    """Name the scenarios whose attention is computed by blocks of queries."""
    capture = capture_package()
    return frozenset(
        prompt.scenario.name
        for prompt in prompts
        if capture.wants_blocks(model, len(prompt.tokens.ids), mode=options.attention_capture)
    )


def _load_model(options: Options, loaded: Loaded, capture: Any, *, weights: bool) -> LoadedModel:
    model: LoadedModel
    if loaded.model is not None:
        model = capture.take_model(loaded.model, loaded.tokenizer, options.model)
        return model
    model = capture.load_model(
        options.own_model or str(demo.model_path()),
        tokenizer=loaded.tokenizer,
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


def _check(options: Options, loaded: Loaded) -> None:
    _check_presence(options)
    for name, kind in _CHOICES.items():
        value = getattr(options, name)
        if value is not None and value not in get_args(kind):
            raise ConfigError(
                f"--{name.replace('_', '-')} {value}",
                remedy=f"Give one of {', '.join(get_args(kind))}.",
            )
    if not (options.attention or options.features or options.residual):
        raise ConfigError(
            "--no-attention and --no-features leave nothing to extract",
            remedy="Drop one of the two, or add --residual.",
        )
    _check_layers(options)
    _check_saes(options, loaded)
    bits = 10 if options.attention_dtype == "float16" else 23
    if options.attention_keepbits is not None and not 1 <= options.attention_keepbits <= bits:
        raise ConfigError(
            f"--attention-keepbits {options.attention_keepbits}",
            why=f"The mantissa of what is stored has {bits} bits.",
            remedy=f"Give 1 to {bits}.",
        )
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}", remedy="Give 1 or more.")
    if options.attention_positions is not None and not options.attention:
        raise ConfigError(
            "--attention-positions with --no-attention",
            why="No attention is stored.",
            remedy="Leave one of the two out; --positions chooses for all arrays.",
        )


def _check_presence(options: Options) -> None:
    """Refuse a model without scenarios, and scenarios without a model."""
    if options.model is not None and options.scenarios is None:
        raise ConfigError(
            f"no scenarios given for {options.model}",
            why="The embedded ten are prompts of one experiment, a slot machine.",
            remedy="Give your own prompts (--scenarios FILE; in Python, the second argument), or "
            f"ask for the embedded ones by name: {SLOT_MACHINE}.",
        )
    if options.scenarios is not None and options.model is None:
        raise ConfigError(
            "no model given for these scenarios",
            why="The embedded model is for demonstrations: it was trained on the embedded "
            "scenarios alone.",
            remedy=f"Give --model (in Python, model), or ask for the embedded one: {DEMO}.",
        )


def _check_layers(options: Options) -> None:
    start, end = options.layer_start, options.layer_end
    if options.layers is not None and (start, end) != (None, None):
        raise ConfigError(
            "--layers, and --layer-start or --layer-end, both choose layers",
            remedy="Give one of the two.",
        )
    if start is not None and end is not None and end < start:
        raise ConfigError(
            f"--layer-end {end} is before --layer-start {start}",
            remedy="Exchange the two.",
        )


def _check_saes(options: Options, loaded: Loaded) -> None:
    if loaded.saes is not None:
        if options.fold_decoder_norm:
            raise ConfigError(
                "--fold-decoder-norm with SAEs in memory",
                why="They are used as they are.",
                remedy="Call their method fold_W_dec_norm() before.",
            )
        return
    if options.sae_release and options.sae_path:
        raise ConfigError(
            "--sae-release and --sae-path both say where SAEs come from",
            remedy="Give one of the two.",
        )
    if options.sae_ids and not options.sae_release:
        raise ConfigError(
            "--sae-id chooses from a release, and none is given", remedy="Add --sae-release."
        )
    if options.own_model and options.features and not (options.sae_release or options.sae_path):
        raise ConfigError(
            f"no SAEs given for {options.model}",
            why="Features need SAEs that were trained on this model.",
            remedy="Add --sae-release or --sae-path (in Python, saes), or use --no-features "
            "(features=False).",
        )


def find_scenarios(options: Options, loaded: Loaded = _NOTHING) -> tuple[Scenario, ...]:
    """Read the scenarios that options name; the options are checked by themselves before.

    Raises
    ------
    ConfigError, ScenarioError
        If options contradict each other, or a scenario cannot be used.
    """
    _check(options, loaded)
    chosen = tuple(stream(_given(options)).only(options.only))
    check_spans(options.positions, chosen, "--positions")
    check_spans(options.attention_positions, chosen, "--attention-positions")
    return chosen


def find_stream(options: Options, loaded: Loaded = _NOTHING) -> ScenarioStream:
    """Return the scenarios that options name, for a table: as a stream.

    Raises
    ------
    ConfigError, ScenarioError
        As for :func:`find_scenarios`.
    """
    _check(replace(options, attention=False), loaded)
    scenarios = stream(_given(options)).only(options.only)
    check_spans(options.positions, scenarios, "--positions")
    return scenarios


def stated_by_suite(options: Options) -> dict[str, Any]:
    """Return attributes of the run that the suite file states: its bands of layers."""
    return suite_attributes(_given(options))


def _given(options: Options) -> Any:
    given = options.scenarios
    is_name = isinstance(given, str | Path) and str(given) == SLOT_MACHINE
    return demo.suite_path() if given is None or is_name else given


def _sae_source(options: Options, loaded: Loaded) -> SAESource:
    if loaded.saes is not None:
        from zarrtrace.capture.loaded_saes import LoadedSAEs  # noqa: PLC0415 -- takes seconds

        return LoadedSAEs(loaded.saes)
    from zarrtrace.capture.saes import FolderSAEs, ReleaseSAEs  # noqa: PLC0415

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
    attributes = model.attributes
    return {
        "model": attributes.id,
        "revision": attributes.revision,
        "model_fingerprint": attributes.fingerprint,
        "model_settings": capture_package().settings_fingerprint(model.model.config),
        "dtype": attributes.dtype,
        "prepend_bos": attributes.prepend_bos,
        "device": model.device.type,
        "batch_size": batch_size,
        "positions": as_json(options.positions),
        "attention_positions": as_json(options.attention_positions),
        "attention_capture": options.attention_capture,
        "layers": ranges(layers),
        "attention": options.attention,
        "attention_dtype": options.attention_dtype,
        "attention_keepbits": options.attention_keepbits,
        "features": options.features,
        "feature_dtype": options.feature_dtype,
        "residual": options.residual,
        "residual_dtype": options.residual_dtype,
        "sae_release": options.sae_release,
        "saes": {
            sae.id: sae.fingerprint or sae.revision for found in saes.values() for sae in found
        },
        "sae_dtype": sorted({sae.dtype for found in saes.values() for sae in found}),
        "fold_decoder_norm": options.fold_decoder_norm,
        "prompts": {prompt.scenario.name: prompt_digest(prompt) for prompt in prompts},
        "versions": library_versions(),
    }


def prompt_digest(prompt: Prompt) -> str:
    """Hash a scenario, and what the tokenizer makes of it."""
    scenario = prompt.scenario
    content = [
        scenario.prompt,
        sorted(scenario.spans.items()),
        list(scenario.tags),
        sorted(scenario.options.items()),
        sorted((name, repr(value)) for name, value in scenario.metadata.items()),
        list(prompt.tokens.ids),
        list(prompt.tokens.texts),
        sorted((name, span.tokens) for name, span in prompt.spans.items()),
        sorted((name, option.token_id) for name, option in prompt.options.items()),
        scenario.chat and (scenario.chat.template, scenario.chat.generation_prompt),
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
