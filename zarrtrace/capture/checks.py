"""Choosing how to capture, and what must hold of a model for that."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from zarrtrace.capture.batches import default_batch_size
from zarrtrace.capture.hooks import parse_hook
from zarrtrace.capture.lockstep import BlockState, Pass, taps
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.probe import random_tokens
from zarrtrace.errors import SAEError
from zarrtrace.text import terminal_text

_log = logging.getLogger(__name__)

_TOKENS = 40


def wants_blocks(model: LoadedModel, tokens: int, *, mode: str) -> bool:
    """Whether attention over `tokens` is to be computed by blocks of queries.

    Parameters
    ----------
    model, tokens
        The model, and the length of a prompt.
    mode
        ``"whole"``, ``"blocked"``, or ``"auto"``: where a whole matrix is larger than 256 MiB.
    """
    itemsize = torch.empty(0, dtype=model.model.dtype).element_size()
    large = model.n_heads * tokens**2 * itemsize > model.limits.whole_bytes
    wanted = mode == "blocked" or (mode == "auto" and large)
    if wanted and not model.permitted.blocks:
        _warn_once(
            f"{model.attributes.id}: attention is captured whole, because by blocks of queries "
            "this architecture computes something else; long prompts take more memory"
        )
    return wanted and model.permitted.blocks


def choose_batch_size(model: LoadedModel, lengths: Iterable[int], wanted: int | None) -> int:
    """Choose how many prompts go through the model together.

    Parameters
    ----------
    model, lengths
        The model, and the lengths of the prompts.
    wanted
        Batch size that was asked for; None chooses from the memory of the device, 1 on a CPU.
    """
    size = wanted or default_batch_size(model, lengths)
    if size > 1 and not model.permitted.batches:
        _warn_once(
            f"{model.attributes.id}: one prompt at a time instead of {size}, because this model "
            "computes something else for prompts of unequal lengths together"
        )
        return 1
    return size


@cache
def _warn_once(message: str) -> None:
    _log.warning("zarrtrace: %s", terminal_text(message))


def check_additions(model: LoadedModel, hooks: Iterable[tuple[int, str]]) -> None:
    """Refuse SAEs on what attention or MLP add, if the model adds something else.

    The input of a block and what zarrtrace takes for the two additions must make its output;
    models that scale them do not.

    Parameters
    ----------
    model
        The model, with its weights.
    hooks
        Layers and hook points that SAEs read.

    Raises
    ------
    SAEError
    """
    layers = {layer for layer, name in hooks if parse_hook(name).kind in ("attn_out", "mlp_out")}
    if not layers:
        return
    kinds = frozenset({"resid_pre", "attn_out", "mlp_out", "resid_post"})
    for state in _states(model, random_tokens(model, _TOKENS)[:1], dict.fromkeys(layers, kinds)):
        if state.layer in layers:
            hooked = {kind: value.float() for kind, value in state.hooks.items()}
            made = hooked["resid_pre"] + hooked["attn_out"] + hooked["mlp_out"]
            # Two additions, and what is added may have been rounded to the dtype as well.
            added = (hooked[kind].abs() for kind in ("resid_pre", "attn_out", "mlp_out"))
            size = torch.stack([*added]).sum(0).max().item()
            tolerance = 4 * torch.finfo(model.model.dtype).eps * size
            if not torch.allclose(made, hooked["resid_post"], rtol=0, atol=tolerance):
                raise SAEError(
                    f"{model.attributes.id}: block {state.layer} adds something else than the "
                    "outputs of attention and MLP",
                    why="It scales them, or adds a third part.",
                    remedy="Choose SAEs on the residual stream.",
                )


def _states(model: LoadedModel, ids: torch.Tensor, kinds: Any) -> Iterable[BlockState]:
    with taps(model, attention=False, kinds=kinds):
        going = Pass(model, ids, torch.ones_like(ids))
        while True:
            with torch.inference_mode():
                step = going.advance()
            if not isinstance(step, BlockState):
                break
            yield step
        going.stop()
