"""Forward passes that pause after each block, so that many batches share one SAE at a time.

A pass runs the model's own ``forward`` in a greenlet. A hook on every block switches back to the
caller with what the block made, and the caller lets the pass go on when all other batches have
come to the same block. So each SAE is loaded once, whatever the number of scenarios, while
between two blocks a batch holds no more than its residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from zarrtrace.capture.model import LoadedModel
from zarrtrace.errors import ModelError


@dataclass
class BlockState:
    """What one block made of one batch.

    Attributes
    ----------
    layer
        Index of the block.
    attention
        ``(sequence, head, query, key)``, or None.
    hooks
        ``(sequence, token, d_model)`` by kind of hook point.
    """

    layer: int
    attention: torch.Tensor | None = None
    hooks: dict[str, torch.Tensor] = field(default_factory=dict)


class Pass(greenlet):
    """One batch's way through the model, block by block.

    Parameters
    ----------
    model
        The model, with :func:`taps` on it.
    ids, mask
        ``(sequence, token)``: token ids, and 1 where a token is no padding.
    """

    def __init__(self, model: LoadedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__()
        self._model, self._ids, self._mask = model, ids, mask
        self.state = BlockState(0)

    def run(self) -> torch.Tensor:
        """Run the model; the greenlet's body."""
        out: torch.Tensor = self._model.model(
            input_ids=self._ids, attention_mask=self._mask, use_cache=False
        ).logits
        return out

    def advance(self) -> BlockState | torch.Tensor:
        """Go on to the end of the next block, or to the logits ``(sequence, token, vocabulary)``.

        Must be called under :func:`torch.inference_mode`, always from the same thread.
        """
        result: BlockState | torch.Tensor = self.switch()
        return result

    def stop(self) -> None:
        """End the pass where it is."""
        if self and not self.dead:
            self.throw(GreenletExit)


@contextmanager
def taps(model: LoadedModel, *, attention: bool, kinds: frozenset[str]) -> Iterator[None]:
    """Put hooks on the model that feed the running :class:`Pass`; they go with the context.

    Parameters
    ----------
    attention
        Whether attention probabilities are wanted.
    kinds
        Hook points that are wanted (:data:`zarrtrace.capture.hooks.KINDS`).
    """
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            handles = [block.register_forward_hook(_after_block(layer, kinds))]
            if "resid_pre" in kinds:
                handles.append(block.register_forward_pre_hook(_before_block, with_kwargs=True))
            if attention and layer in model.attentions:
                handles.append(
                    model.attentions[layer].register_forward_hook(_after_attention(layer))
                )
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _current() -> Pass | None:
    running = getcurrent()
    return running if isinstance(running, Pass) else None


def _before_block(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    running = _current()
    if running:
        running.state.hooks["resid_pre"] = args[0] if args else kwargs["hidden_states"]


def _after_attention(layer: int) -> Any:
    def hook(module: Any, _args: Any, output: Any) -> None:
        running = _current()
        if running is None:
            return
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.ndim != 4:
            raise ModelError(
                f"{type(module).__name__} of layer {layer} gives no attention probabilities",
                why="It does not compute them eagerly.",
                remedy="Use --no-attention, or choose another architecture.",
            )
        running.state.attention = weights

    return hook


def _after_block(layer: int, kinds: frozenset[str]) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        running = _current()
        if running is None:
            return
        state, running.state = running.state, BlockState(layer + 1)
        state.layer = layer
        if "resid_post" in kinds:
            state.hooks["resid_post"] = output[0] if isinstance(output, tuple) else output
        parent = running.parent
        assert parent is not None  # noqa: S101 -- a pass is only ever run by advance()
        parent.switch(state)

    return hook
