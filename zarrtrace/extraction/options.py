"""Options of an extraction, checked against each other."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from zarrtrace import demo
from zarrtrace.errors import ConfigError
from zarrtrace.scenarios import Sampling, Scenario, ScenarioStream, stream, suite_attributes
from zarrtrace.scenarios.positions import Positions, check_spans

#: How to ask for the embedded model and its SAEs, and for the embedded scenarios.
DEMO, SLOT_MACHINE = "demo", "slot-machine"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "float16"]
Products = Literal["float32", "bfloat16"]
AttentionCapture = Literal["auto", "whole", "blocked"]
# Options that take one of a few words.
_CHOICES = {
    "dtype": Dtype,
    "attention_capture": AttentionCapture,
    "attention_dtype": StoredDtype,
    "feature_dtype": StoredDtype,
    "residual_dtype": StoredDtype,
    "sae_products": Products,
}


@dataclass(frozen=True)
class Options:
    """Options of an extraction.

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
    sae_products
        ``"bfloat16"`` multiplies on a GPU's tensor cores and adds up in float32.
    layers
        Indices of decoder blocks. None is all, with features all that have an SAE; of the embedded
        model, 1 to 31.
    layer_start, layer_end
        First and last block, instead of `layers`; None is the model's own.
    features, attention, residual
        Whether to store each. `residual` is the residual stream at the hook point that the SAEs of
        ``features`` read, without SAEs the output of each block.
    scenarios
        Argument of :func:`zarrtrace.scenarios.stream`; ``"slot-machine"`` is the embedded
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
        The `positions` whose rows of attention are stored; None for all of them.
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
    generate
        How the model goes on after each prompt; None stores prompts alone.
    answer
        Regular expression of the answer in a continuation: its first group, or all of it.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    sae_release: str | None = None
    sae_ids: tuple[str, ...] = ()
    sae_path: Path | None = None
    fold_decoder_norm: bool = False
    sae_products: Products = "float32"
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
    generate: Sampling | None = None
    answer: str | None = None

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
        Argument of :class:`zarrtrace.capture.loaded_saes.LoadedSAEs`.
    """

    model: Any = None
    tokenizer: Any = None
    saes: Any = None


NOTHING_LOADED = Loaded()


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
    _check_generation(options)
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


def refuse_for_table(given: Mapping[str, Any]) -> None:
    """Refuse options that a table does not have; those that were not given are None.

    Raises
    ------
    ConfigError
    """
    for name in (name for name, value in given.items() if value is not None):
        why, remedy = "One process writes a table.", "Leave it out."
        if name.startswith("attention"):
            why = "A table holds no attention."
        if name == "allow_nonfinite":
            why = "In a table, all values of a scenario with NaN or infinity are NaN."
            remedy = "Leave it out; the table's attribute 'failed' names such scenarios."
        option = name.replace("_", "-")
        raise ConfigError(f"--{option} with --layout table", why=why, remedy=remedy)


def _check_generation(options: Options) -> None:
    if options.answer is None:
        return
    if options.generate is None:
        raise _without_generate("--answer")
    if not isinstance(options.answer, str):
        raise ConfigError(
            f"--answer {options.answer!r}: no text",
            why="It is a regular expression that is searched in what the model goes on to say.",
            remedy=r"Give one such as '[12]' or 'choice: (\w+)'.",
        )
    try:
        re.compile(options.answer)
    except re.error as error:
        raise ConfigError(
            f"--answer {options.answer!r}: no regular expression: {error}",
            why="It is searched in what the model goes on to say; signs such as ( and * have a "
            "meaning.",
            remedy=r"Give one such as '[12]' or 'choice: (\w+)'.",
        ) from None


def _without_generate(option: str) -> ConfigError:
    return ConfigError(
        f"{option} without --generate",
        why="Nothing is generated: the prompts alone are stored.",
        remedy="Add --generate N (in Python, generate=N), or leave it out.",
    )


def sampling_of(tokens: int | None, **settings: Any) -> Sampling | None:
    """Return the settings of continuations; None if none are asked for.

    Parameters
    ----------
    tokens
        Most tokens of a continuation; None generates nothing.
    settings
        Further fields of :class:`~zarrtrace.scenarios.Sampling`.

    Raises
    ------
    ConfigError
        If they do not fit each other, or are given for nothing.
    """
    settings["stop"] = _texts("--stop", settings.get("stop", ()))
    if tokens is not None:
        return Sampling(whole_number("--generate", tokens), **_numbers(settings))
    for name, value in settings.items():
        if value != getattr(Sampling, name):
            raise _without_generate(f"--{name.replace('_', '-')}")
    return None


def _texts(option: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(one, str) for one in texts):
        raise ConfigError(f"{option} {value!r}", remedy="Give a text, or several.")
    return texts


def whole_number(option: str, value: Any) -> int:
    """Return Python's own integer: NumPy's cannot be stored.

    Raises
    ------
    ConfigError
        If it is something else, such as 2.0 or a text.
    """
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise ConfigError(f"{option} {value!r}", remedy="Give a whole number.")


def _number(option: str, value: Any) -> float:
    try:
        return float("" if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise ConfigError(f"{option} {value!r}", remedy="Give a number.") from None


def _numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with Python's own numbers: equal ones are equal on disk, too."""
    found = dict(settings)
    for name in ("samples", "seed"):
        if name in found:
            found[name] = whole_number(f"--{name}", found[name])
    for name in ("temperature", "top_p"):
        if name in found:
            found[name] = _number(f"--{name.replace('_', '-')}", found[name])
    return found


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


def find_scenarios(options: Options, loaded: Loaded = NOTHING_LOADED) -> tuple[Scenario, ...]:
    """Read the scenarios that options name; the options are checked by themselves before.

    Raises
    ------
    ConfigError, ScenarioError
        If options contradict each other, or a scenario cannot be used.
    """
    _check(options, loaded)
    chosen = tuple(stream(_given(options)).only(options.only))
    generated = options.generate is not None
    check_spans(options.positions, chosen, "--positions", generated=generated)
    check_spans(options.attention_positions, chosen, "--attention-positions", generated=generated)
    return chosen


def find_stream(options: Options, loaded: Loaded = NOTHING_LOADED) -> ScenarioStream:
    """Return the scenarios that options name, for a table: as a stream.

    Raises
    ------
    ConfigError, ScenarioError
        As for :func:`find_scenarios`.
    """
    _check(replace(options, attention=False), loaded)
    scenarios = stream(_given(options)).only(options.only)
    generated = options.generate is not None
    check_spans(options.positions, scenarios, "--positions", generated=generated)
    return scenarios


def stated_by_suite(options: Options) -> dict[str, Any]:
    """Return attributes of the run that the suite file states: its bands of layers."""
    return suite_attributes(_given(options))


def _given(options: Options) -> Any:
    given = options.scenarios
    is_name = isinstance(given, str | Path) and str(given) == SLOT_MACHINE
    return demo.suite_path() if given is None or is_name else given
