"""A model that the caller has loaded: captured as it is, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zarrtrace.capture.model import LoadedModel, describe_model
from zarrtrace.capture.refusals import refuse_encoder_decoder
from zarrtrace.errors import ConfigError, ModelError

_UNSET = object()
# Set while sizes are read; transformers would write it into a saved config.json.
_PER_LAYER = "allow_global_per_layer_attribute_access"


@contextmanager
def borrow(model: Any) -> Iterator[None]:
    """Let a loaded model compute attention eagerly and in evaluation mode, as long as the context.

    Afterwards, also after an error, its attention implementations, its modules' modes and its
    buffers are as before. Parameters are never touched.

    Parameters
    ----------
    model
        A model of transformers.

    Raises
    ------
    ModelError
        If it is something else, compiled, or spread over several devices.
    """
    _check(model)
    configs = _configs(model)
    implementations = [vars(config)["_attn_implementation_internal"] for config in configs]
    per_layer = [vars(config).get(_PER_LAYER, _UNSET) for config in configs]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for config in configs:
            vars(config)["_attn_implementation_internal"] = "eager"
        model.eval()
        yield
    finally:
        for config, implementation, flag in zip(configs, implementations, per_layer, strict=True):
            vars(config)["_attn_implementation_internal"] = implementation
            if flag is _UNSET:
                vars(config).pop(_PER_LAYER, None)
        for module, mode in modes:
            module.training = mode
        _end_inference(model)


def take_model(model: Any, tokenizer: Any, name: str) -> LoadedModel:
    """Find the pieces of a borrowed model.

    Parameters
    ----------
    model, tokenizer
        As transformers loads them.
    name
        Stored with the traces.

    Raises
    ------
    ModelError
        If it cannot be captured exactly.
    """
    refuse_encoder_decoder(model.config, name)
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{name}: {type(model).__name__} does not say a next token",
            why="It is a model without the head that makes logits.",
            remedy="Load it with AutoModelForCausalLM.",
        )
    commit = getattr(model.config, "_commit_hash", None)
    return describe_model(model, tokenizer, name, revision=commit, weights=True)


def refuse_unknown_ids(model: LoadedModel, ids: Sequence[int]) -> None:
    """Refuse token ids for which the model has no embedding.

    Raises
    ------
    ConfigError
    """
    try:
        embeddings = model.model.get_input_embeddings()
    except NotImplementedError:  # transformers does not find them in some models' own code
        return
    count = getattr(embeddings, "num_embeddings", None)
    largest = max(ids, default=0)
    if isinstance(count, int) and largest >= count:
        raise ConfigError(
            f"{model.attributes.id}: the tokenizer gives id {largest}, the model has {count} "
            "embeddings",
            why="The tokenizer is another model's, or tokens were added to it alone.",
            remedy="Give the tokenizer that belongs to the model, or give the model embeddings for "
            "the new tokens: model.resize_token_embeddings(len(tokenizer)).",
        )


def _check(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not isinstance(
        getattr(model, "config", None), PreTrainedConfig
    ):
        raise ModelError(
            f"model: {type(model).__module__}.{name} is no model of transformers",
            why="zarrtrace captures models of the transformers library.",
            remedy="Load it with AutoModelForCausalLM, or give its name; zarrtrace.write_trace "
            "stores what another library captured.",
        )
    modules = list(model.modules())
    if hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in modules
    ):
        raise ModelError(
            f"model: {name} is compiled",
            why="torch.compile may leave out the hooks that capture reads from.",
            remedy="Give the model as it was before torch.compile.",
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise ModelError(
            f"model: its weights are on {', '.join(sorted(map(str, devices))) or 'no device'}",
            why="device_map spread it over devices, or left weights on a disk.",
            remedy="Load it on one device, or give its name with low_memory=True.",
        )


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Return all configurations that a model's modules read, each once."""
    found: dict[int, PreTrainedConfig] = {}
    left = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    left.append(model.config)
    while left:
        config = left.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            left += [part for part in parts if isinstance(part, PreTrainedConfig)]
    return list(found.values())


def _end_inference(model: nn.Module) -> None:
    """Replace tensors that modules made in inference mode, such as caches of rotary embeddings.

    Training would refuse to use them.
    """
    for module in model.modules():
        for tensors in (module._buffers, vars(module)):  # noqa: SLF001 -- no other way to set them
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor) and value.is_inference():
                    tensors[name] = value.clone()
