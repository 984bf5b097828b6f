"""Hook points: where in a block an SAE reads, and which module that is.

The names are TransformerLens's, as SAEs carry them. They mean here:

==============  ===================================================================
``resid_pre``   the block's input
``resid_post``  the block's output
``attn_out``    what attention adds to the residual stream
``mlp_out``     what the MLP adds to the residual stream
``hook_z``      the heads' outputs, side by side, before the output projection
``mlp_in``      the MLP's input, behind its norm (transcoders)
==============  ===================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from zarrtrace.errors import ConfigError, SAEError
from zarrtrace.format.attributes import SAEAttributes

_HOOK = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<site>[a-z_0-9.]+)")
_KIND_OF_SITE = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "hook_z",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_in": "mlp_in",
}
#: Kinds of hook points; where a layer has several SAEs, the first of them is ``features``.
KINDS = tuple(dict.fromkeys(["resid_post", *_KIND_OF_SITE.values()]))

# Names of the same thing in different architectures.
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_OUTPUT_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj")

Side = Literal["input", "output"]


@dataclass(frozen=True)
class HookPoint:
    """A place in a decoder block.

    Attributes
    ----------
    layer
        Index of the block.
    kind
        One of :data:`KINDS`.
    """

    layer: int
    kind: str


def parse_hook(name: str) -> HookPoint:
    """Understand a hook point's name, for example ``blocks.3.hook_resid_post``.

    Raises
    ------
    SAEError
        If it is none that zarrtrace reads.
    """
    match = _HOOK.fullmatch(name)
    kind = _KIND_OF_SITE.get(match["site"]) if match else None
    if match is None or kind is None:
        why = "zarrtrace reads " + ", ".join(f"blocks.N.{site}" for site in _KIND_OF_SITE) + "."
        if match and match["site"] == "ln2.hook_normalized":
            why = "Whether it is taken before or behind the norm's scale depends on how the model "
            why += "was loaded when the SAE was trained, and its configuration does not say."
        raise SAEError(
            f"hook point {name!r} cannot be read",
            why=why,
            remedy="Choose SAEs that were trained on another hook point.",
        )
    return HookPoint(int(match["layer"]), kind)


def residual_hooks(
    layers: Sequence[int], saes: Mapping[int, Sequence[SAEAttributes]]
) -> dict[int, str]:
    """Return by layer the hook point of the residual stream that is stored.

    That is the one that the SAEs of ``features`` read, without SAEs the block's output. Where SAEs
    read something else than the residual stream, layers without an SAE have none.

    Parameters
    ----------
    layers
        Indices of decoder blocks.
    saes
        The SAEs of each layer that has some.

    Raises
    ------
    ConfigError
        If SAEs read different places in different blocks.
    """
    read = {
        layer: sae.hook_name
        for layer, found in saes.items()
        for sae in found
        if sae.variable == "features"
    }
    forms = {name.replace(f"blocks.{n}.", "blocks.{layer}.", 1) for n, name in read.items()}
    if len(forms) > 1:
        raise ConfigError(
            f"SAEs read {' and '.join(sorted(forms))}",
            why="The array residual holds one place of each block.",
            remedy="Choose SAEs of one kind with --sae-id, or leave out --residual.",
        )
    form = forms.pop() if forms else "blocks.{layer}.hook_resid_post"
    everywhere = parse_hook(form.format(layer=0)).kind in ("resid_pre", "resid_post")
    return {n: form.format(layer=n) for n in layers if everywhere or n in read}


def place(block: nn.Module, attention: nn.Module | None, kind: str) -> tuple[nn.Module, Side]:
    """Return the module of a block at which a hook point is read, and on which side of it.

    Parameters
    ----------
    block, attention
        A decoder block and its attention module, None if it has none.
    kind
        One of :data:`KINDS`.

    Raises
    ------
    SAEError
        If the block has no such place.
    """
    if kind == "resid_pre":
        return block, "input"
    if kind == "resid_post":
        return block, "output"
    # Norms behind attention and MLP (Gemma 2 and 3, OLMo 2): they make what is added.
    normed = hasattr(block, "post_feedforward_layernorm")
    found: nn.Module | None
    if kind == "attn_out":
        found = getattr(block, "post_attention_layernorm", None) if normed else attention
    elif kind == "hook_z":
        found = _child(attention, _OUTPUT_PROJECTION)
    elif kind == "mlp_out" and normed:
        found = getattr(block, "post_feedforward_layernorm", None)
    else:
        found = mlp_of(block)
    if found is None:
        raise SAEError(
            f"{type(block).__name__} has no place for hook point {kind!r}",
            why="Its parts have other names than zarrtrace knows, or it has no such part.",
            remedy="Choose SAEs on the residual stream.",
        )
    return found, "input" if kind in ("hook_z", "mlp_in") else "output"


def mlp_of(block: nn.Module) -> nn.Module | None:
    """Return a block's MLP, None if it has none by a known name."""
    return _child(block, _MLP)


def _child(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)


def first_tensor(value: Any) -> torch.Tensor:
    """Return the tensor of a module's output, which may be a tuple or list that starts with it."""
    tensor: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return tensor
