"""From options to a job: everything a run needs, checked against each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from zarrtrace import demo
from zarrtrace.errors import ConfigError
from zarrtrace.extraction.answers import expected_prompts
from zarrtrace.extraction.configuration import library_versions, run_config
from zarrtrace.extraction.layers import choose_layers
from zarrtrace.extraction.options import (
    NOTHING_LOADED,
    Loaded,
    Options,
    StoredDtype,
    find_scenarios,
)
from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.processes import FEW_TRACES, WriterPool
from zarrtrace.extraction.reading_ahead import ReadAhead, weight_files
from zarrtrace.extraction.sae_sources import (
    SAEs,
    begins_with_bos,
    bos_notes,
    find_saes,
    hooks_of,
    sae_source,
)
from zarrtrace.format.attributes import ModelAttributes, TraceAttributes, ranges
from zarrtrace.format.layout import TraceShape
from zarrtrace.hub import cache_if_unreachable
from zarrtrace.records import TracePlan
from zarrtrace.scenarios import Scenario
from zarrtrace.scenarios.positions import Positions, as_text, positions_of

if TYPE_CHECKING:  # they import torch
    from zarrtrace.capture import CaptureLimits, LoadedModel, Prompt
    from zarrtrace.capture.saes import SAESource

#: Name of the embedded model in a trace.
DEMO_MODEL = "zarrtrace-demo"

P = ParamSpec("P")


@dataclass(frozen=True)
class Job:
    """Options that were found to fit each other, with everything they refer to.

    Attributes
    ----------
    options
        The options of the extraction.
    model
        The language model; without weights if it was prepared so.
    prompts
        Tokenised scenarios, in the end with their continuations.
    layers
        Ascending indices of decoder blocks.
    source, saes
        Where SAEs come from and which ones each layer has; None and empty without features.
    blocked
        Names of scenarios whose attention is computed by blocks of queries.
    batch_size
        Scenarios in one forward pass.
    config
        Configuration that a resumed run must agree with.
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

    @cached_property
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

    @cached_property
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
        chat, continued = prompt.scenario.chat, prompt.continued
        name = prompt.scenario.name if continued is None else continued.prompt.scenario.name
        return TraceAttributes(
            scenario=name,
            repeat=None if continued is None else continued.repeat,
            generation=None if continued is None else continued.generation,
            choice=None if continued is None else continued.choice,
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
    loaded: Loaded = NOTHING_LOADED,
    weights: bool = True,
    progress: bool = True,
    pool: WriterPool | None = None,
    limits: CaptureLimits | None = None,
) -> Job:
    """Check options against the model, the SAEs and each other.

    Parameters
    ----------
    options
        Options of the extraction.
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
    source = sae_source(options, loaded, model) if options.features else None
    # A model whose weights are not read yet is on no device.
    device = options.device if loaded.model is None else model.device.type
    if pool and device != "cpu" and len(scenarios) >= FEW_TRACES:
        pool.start(len(scenarios))
    layers, notes = choose_layers(options, len(model.blocks), source)
    saes = {} if source is None else find_saes(source, layers, model)
    without = [layer for layer in layers if saes and layer not in saes]
    if without:
        notes += (f"layers {ranges(without)} have no SAE: they are stored without features",)
    if ahead and source is not None:
        ahead.add(source.stretches([sae for found in saes.values() for sae in found]))
    prepend_bos = begins_with_bos(options, model, source)
    prompts = tuple(tokenized(options, model, scenarios, prepend_bos=prepend_bos))
    notes += bos_notes(source, prompts, model.tokenizer.bos_token_id)
    if weights:
        if loaded.model is None:
            model = _load_model(options, loaded, capture, weights=True)
        model = capture.probe_model(model)
        capture.check_additions(model, hooks_of(saes))
        if options.generate is not None:
            capture.check_context(model, prompts, options.generate)
            model = capture.probe_generation(model)
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
    """Yield scenarios as the model reads them; chats are rendered as options say.

    Token ids for which the model has no embedding are refused.
    """
    capture = capture_package()
    rendered = (
        scenario.render(
            model.tokenizer,
            generation_prompt=options.generation_prompt,
            prepend_bos=options.prepend_bos,
        )
        for scenario in scenarios
    )
    for prompt in capture.tokenize_all(model, rendered, prepend_bos=prepend_bos):
        capture.refuse_unknown_ids(model, prompt.tokens.ids)
        yield prompt


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
    more = 0 if options.generate is None else options.generate.tokens
    lengths = [len(prompt.tokens.ids) + more for prompt in prompts]
    batch_size = capture.choose_batch_size(model, lengths, options.batch_size)
    blocked = _blocked(options, model, prompts)
    model = capture.renamed(model, options.own_model or DEMO_MODEL, prepend_bos=prepend_bos)
    settings = capture.settings_fingerprint(model.model.config)
    job = Job(
        options=options,
        model=model,
        prompts=prompts,
        layers=layers,
        source=source,
        saes=saes,
        blocked=blocked,
        batch_size=batch_size,
        config=run_config(options, model, layers, saes, prompts, batch_size, settings),
    )
    _ = job.residual  # refuses SAEs that read different places
    if (sampling := options.generate) is not None:
        capture.check_context(model, prompts, sampling)
        prompts = tuple(expected_prompts(model, prompts, sampling, 1))
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
