"""What must hold of a model before its traces may be called exact, found out by trying."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from zarrtrace.capture.blocked import AttentionRows, supports
from zarrtrace.capture.hooks import parse_hook
from zarrtrace.capture.lockstep import BlockState, Pass, taps
from zarrtrace.capture.model import LoadedModel
from zarrtrace.errors import SAEError

# A layer's whole attention matrix may be this large; beyond, it is computed by blocks of queries.
_WHOLE_BYTES = 256 * 2**20
_TOKENS = 40
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


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
    large = model.n_heads * tokens**2 * itemsize > _WHOLE_BYTES
    return mode == "blocked" or (mode == "auto" and large)


def blocks_are_exact(model: LoadedModel) -> bool:
    """Whether attention by blocks of queries gives what the whole matrix gives.

    Tried on a few random tokens, within rounding of the model's precision. Architectures that do
    not take their attention function from transformers' interface fail.
    """
    if model.model.device.type == "meta":
        return supports(list(model.attentions.values()))
    if not supports(list(model.attentions.values())):
        return False
    ids = _random_tokens(model)
    whole = {state.layer: state.attention for state in _states(model, ids)}
    tolerance = _TOLERANCE[model.model.dtype]
    for step in _steps(model, ids, blocked=(frozenset(model.attentions), None)):
        if isinstance(step, AttentionRows):
            expected = whole[step.layer]
            if expected is None:
                return False
            rows = expected[0, :, list(step.queries), : step.weights.shape[-1]]
            if not torch.allclose(rows.float(), step.weights.float(), rtol=0, atol=tolerance):
                return False
    return True


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
    for state in _states(model, _random_tokens(model), dict.fromkeys(layers, kinds)):
        if state.layer in layers:
            hooked = {kind: value.float() for kind, value in state.hooks.items()}
            made = hooked["resid_pre"] + hooked["attn_out"] + hooked["mlp_out"]
            scale = hooked["resid_post"].abs().max().item()
            tolerance = _TOLERANCE[model.model.dtype] * max(scale, 1e-6)
            if not torch.allclose(made, hooked["resid_post"], rtol=0, atol=tolerance):
                raise SAEError(
                    f"{model.attributes.id}: block {state.layer} adds something else than the "
                    "outputs of attention and MLP",
                    why="It scales them, or adds a third part.",
                    remedy="Choose SAEs on the residual stream.",
                )


def _random_tokens(model: LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, _TOKENS), generator=generator)
    return ids.to(model.device)


def _steps(
    model: LoadedModel, ids: torch.Tensor, kinds: Any = None, **options: Any
) -> Iterable[Any]:
    with taps(model, attention=True, kinds=kinds or {}):
        going = Pass(model, ids, torch.ones_like(ids), **options)
        while True:
            with torch.inference_mode():
                step = going.advance()
            if not isinstance(step, AttentionRows | BlockState):
                break
            yield step
        going.stop()


def _states(model: LoadedModel, ids: torch.Tensor, kinds: Any = None) -> Iterable[BlockState]:
    return (step for step in _steps(model, ids, kinds) if isinstance(step, BlockState))
