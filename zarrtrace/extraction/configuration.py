"""The configuration that decides a run's content; a resumed run must agree."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any

from zarrtrace.extraction.options import Options
from zarrtrace.extraction.packages import capture_package
from zarrtrace.format.attributes import SAEAttributes, ranges
from zarrtrace.scenarios.positions import as_json

if TYPE_CHECKING:  # they import torch
    from zarrtrace.capture import LoadedModel, Prompt

_LIBRARIES = ("zarrtrace", "numpy", "sae-lens", "torch", "transformers", "zarr")


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, importlib.metadata.version(name)) for name in _LIBRARIES)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what is stored."""
    return dict(_versions())


def run_config(
    options: Options,
    model: LoadedModel,
    layers: Sequence[int],
    saes: Mapping[int, Sequence[SAEAttributes]],
    prompts: Sequence[Prompt],
    batch_size: int,
    model_settings: str,
) -> dict[str, Any]:
    """Return everything that decides what is stored, as JSON.

    Parameters
    ----------
    model_settings
        Hash of the model's configuration.
    """
    attributes = model.attributes
    generation: dict[str, Any] = {}
    if options.generate is not None:
        ends = capture_package().end_of_sequence_ids(model)
        generation = {"generation": generation_config(options), "end_of_sequence": sorted(ends)}
    return {
        "model": attributes.id,
        "revision": attributes.revision,
        "model_fingerprint": attributes.fingerprint,
        "model_settings": model_settings,
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
        "sae_hooks": {sae.id: sae.hook_name for found in saes.values() for sae in found},
        "sae_dtype": sorted({sae.dtype for found in saes.values() for sae in found}),
        "fold_decoder_norm": options.fold_decoder_norm,
        "prompts": {prompt.scenario.name: prompt_digest(prompt) for prompt in prompts},
        "versions": library_versions(),
        **generation,
    }


def generation_config(options: Options) -> dict[str, Any]:
    """Return the settings of continuations, as JSON."""
    settings = {} if options.generate is None else asdict(options.generate)
    return {**settings, "stop": list(settings.get("stop", ())), "answer": options.answer}


def prompt_digest(prompt: Prompt) -> str:
    """Hash a scenario, and what the tokenizer makes of it; of a continuation, its prompt."""
    if prompt.continued is not None:
        prompt = prompt.continued.prompt
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
