"""SAEs that the caller has loaded: used as they are, and left as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from torch import nn

from zarrtrace.capture.encoder import Encoder, copied, needs_decoder
from zarrtrace.capture.fingerprint import sae_fingerprint
from zarrtrace.capture.hooks import HookPoint, parse_hook
from zarrtrace.capture.sae_configs import (
    check_config,
    check_shapes,
    hook_name_of,
    prepend_bos_of,
    sae_attributes,
    several_saes,
)
from zarrtrace.capture.saes import Found, variables_of
from zarrtrace.errors import SAEError
from zarrtrace.format.attributes import SAEAttributes, ranges


class LoadedSAEs:
    """SAEs of sae-lens in memory, as a source of encoders.

    Parameters
    ----------
    saes
        One, several, or by layer one or several. Each says by its metadata which hook point it
        reads.

    Raises
    ------
    SAEError
        If one is something else, does not say what it reads, would not be encoded exactly, or if
        two read one hook point.
    """

    def __init__(self, saes: object) -> None:
        self._saes: dict[HookPoint, Any] = {}
        self._configs: dict[HookPoint, dict[str, Any]] = {}
        self._used: dict[str, dict[str, Any]] = {}
        for layer, sae in _each(saes):
            self._add(layer, sae)
        if not self._saes:
            raise SAEError("saes: holds no SAE", remedy="Give SAEs, or features=False.")

    def _add(self, layer: int | None, sae: Any) -> None:
        where = "saes" if layer is None else f"saes[{layer}]"
        _check_kind(where, sae)
        config = handle_config_defaulting(copy.deepcopy(sae.cfg.to_dict()))
        name = hook_name_of(config, where)
        hook = parse_hook(name)
        if layer is not None and hook.layer != layer:
            raise SAEError(
                f"{where}: reads {name}, not layer {layer}",
                why="The SAE's metadata names the hook point that it was trained on.",
                remedy=f"Give it as saes={{{hook.layer}: sae}}.",
            )
        if hook in self._saes:
            raise several_saes(
                "saes", hook.layer, [name, name], "Give one SAE for each hook point."
            )
        check_config(f"{where} ({name})", config)
        _check_precision(where, sae)
        found = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
        check_shapes(f"{where} ({name})", config, found)
        self._saes[hook], self._configs[hook] = sae, config

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token; known after :meth:`find`."""
        return prepend_bos_of(self._used)

    def available(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of some layers that have an SAE."""
        there = {hook.layer for hook in self._saes}
        return tuple(layer for layer in layers if layer in there)

    def find(self, layers: Sequence[int]) -> Found:
        """Return the SAEs of each layer; layers that have none are left out.

        Raises
        ------
        SAEError
            If no layer has one.
        """
        chosen = [hook for hook in self._saes if hook.layer in layers]
        if not chosen:
            raise SAEError(
                f"saes: none for layer {ranges(layers)}",
                why=f"They are for layers {ranges(sorted({hook.layer for hook in self._saes}))}.",
                remedy="Choose layers that have one, or use features=False.",
            )
        variables = variables_of(dict.fromkeys(chosen))
        found: dict[int, tuple[SAEAttributes, ...]] = {}
        self._used = {}
        for layer in layers:
            hooks = [HookPoint(layer, kind) for kind in variables]
            here = [
                self._attributes(hook, variables[hook.kind]) for hook in hooks if hook in chosen
            ]
            if here:
                found[layer] = tuple(here)
        return found

    def _attributes(self, hook: HookPoint, variable: str) -> SAEAttributes:
        sae, config = self._saes[hook], self._configs[hook]
        # Folders of SAEs are usually called by their hook points, too.
        name = hook_name_of(config, "saes")
        self._used[name] = config
        attributes = sae_attributes(
            hook.layer,
            variable,
            None,
            name,
            config,
            fold=False,
            fingerprint=sae_fingerprint(sae.cfg, sae.state_dict()),
        )
        dtype = str(sae.W_enc.dtype).removeprefix("torch.")
        return attributes.model_copy(update={"dtype": dtype})

    def stretches(self, _saes: Sequence[SAEAttributes]) -> list[tuple[Path, int, int]]:
        """Say what :meth:`load` will read: no file."""
        return []

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Return one encoder; its weights are copied only if they are on another device."""
        hook = parse_hook(attributes.hook_name)
        return Encoder(_sharing(self._saes[hook], device), attributes)


def _each(saes: object) -> Iterator[tuple[int | None, Any]]:
    """Yield each SAE, and the layer under which it was given."""
    if isinstance(saes, Mapping):
        for layer, given in saes.items():
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise SAEError(
                    f"saes[{layer!r}]: no index of a layer",
                    remedy="Give a mapping from layers to SAEs, as {8: sae}.",
                )
            for _, sae in _each(given):
                yield layer, sae
    elif isinstance(saes, list | tuple):
        for sae in saes:
            yield None, sae
    else:
        yield None, saes


def _check_kind(where: str, sae: object) -> None:
    if isinstance(sae, TrainingSAE):
        raise SAEError(
            f"{where}: {type(sae).__name__} is an SAE in training",
            why="In training, SAEs may add noise, or choose features by batch.",
            remedy="Call its save_inference_model, and load it with SAE.load_from_disk.",
        )
    if not isinstance(sae, SAE):
        raise SAEError(
            f"{where}: {type(sae).__module__}.{type(sae).__name__} is no SAE of sae-lens",
            why="zarrtrace encodes with the SAEs of the sae_lens library.",
            remedy="Give what SAE.from_pretrained or SAE.load_from_disk returns, the name of a "
            "release, or a folder.",
        )


def _check_precision(where: str, sae: Any) -> None:
    weights = sae.W_enc.dtype
    if sae.dtype != weights or weights not in (torch.float32, torch.bfloat16, torch.float16):
        raise SAEError(
            f"{where}: its weights are {weights}, its inputs {sae.dtype}",
            why="An SAE is cast by its method to(), which keeps the two together.",
            remedy="Call sae.to(dtype=torch.float32).",
        )


def _sharing(sae: Any, device: torch.device) -> Any:
    """Return a copy of an SAE that shares its weights, or has them on another device."""
    weights: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to(device), requires_grad=False)
        for name, value in sae.named_parameters()
        if name != "W_dec" or needs_decoder(sae)
    }
    weights |= {id(value): value.to(device) for value in sae.buffers()}
    # How its last inputs were scaled: what gradients flow through is not copied.
    weights |= {id(one): one.detach() for one in vars(sae).values() if torch.is_tensor(one)}
    if not needs_decoder(sae):
        weights[id(sae.W_dec)] = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
    own = copied(sae, weights)
    own.device, own.cfg.device = device, str(device)
    return own.eval()
