"""Forward passes that pause after each block, so that many batches share one SAE at a time.

A pass runs the model's own ``forward`` in a greenlet. Hooks switch back to the caller with what a
block made, and the caller lets the pass go on when all other batches have come to the same block.
So each SAE is loaded once, whatever the number of scenarios, while between two blocks a batch
holds no more than its residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from zarrtrace.capture.blocked import IMPLEMENTATION, AttentionRows, Sink, collecting
from zarrtrace.capture.hooks import first_tensor, mlp_of, place
from zarrtrace.capture.model import LoadedModel
from zarrtrace.errors import ModelError

# Above this, logits are made some rows at a time: a vocabulary is large.
_LOGIT_ROWS = 512
# And so is what MLPs make within: of a long prompt, more than all else.
_MLP_TOKENS = 8192


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
        ``(sequence, token, d)`` by kind of hook point.
    """

    layer: int
    attention: torch.Tensor | None = None
    hooks: dict[str, torch.Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Let go of the tensors, once used: the pass that pauses with a state keeps it."""
        self.attention = None
        self.hooks.clear()


@dataclass
class Logits:
    """What the model would say next, for some rows.

    Attributes
    ----------
    start
        Token position of the first row.
    values
        ``(sequence, token, vocabulary)``.
    """

    start: int
    values: torch.Tensor


Step = AttentionRows | BlockState | Logits


class Pass(greenlet):
    """One batch's way through the model, step by step.

    Parameters
    ----------
    model
        The model, with :func:`taps` on it.
    ids, mask
        ``(sequence, token)``: token ids, and 1 where a token is no padding.
    blocked
        None captures whole attention matrices. Else attention is computed by blocks of queries:
        the layers whose rows are wanted, and which queries (None for all); one sequence only.
    """

    def __init__(
        self,
        model: LoadedModel,
        ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        blocked: tuple[frozenset[int], tuple[int, ...] | None] | None = None,
    ) -> None:
        super().__init__()
        self._model, self._ids, self._mask = model, ids, mask
        self.state = BlockState(0)
        self._sink = None if blocked is None else Sink(self.give, *blocked)

    @property
    def whole(self) -> bool:
        """Whether whole attention matrices are captured."""
        return self._sink is None

    def give(self, step: Step) -> None:
        """Pause with a step; called from within the pass."""
        assert self.parent is not None  # noqa: S101 -- a pass is only ever run by advance()
        self.parent.switch(step)

    def run(self) -> None:
        """Run the model; the greenlet's body."""
        model, inputs = self._model.model, {"attention_mask": self._mask, "use_cache": False}
        tokens = self._ids.shape[1]
        if tokens <= _LOGIT_ROWS:
            self.give(Logits(0, model(input_ids=self._ids, **inputs).logits))
            return
        base = getattr(model, model.base_model_prefix)
        made = base(input_ids=self._ids, **inputs)
        for start in range(0, tokens, _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            part = type(made)(last_hidden_state=made.last_hidden_state[:, rows])
            with _returning(base, part):  # the model's own way from its last norm to logits
                logits = model(input_ids=self._ids[:, rows], use_cache=False).logits
            self.give(Logits(start, logits))

    def advance(self) -> Step:
        """Go on to the next step; must be called under :func:`torch.inference_mode`."""
        step: Step
        if self._sink is None:
            step = self.switch()
        else:
            with collecting(self._sink), _implementation(self._model.model.config):
                step = self.switch()
        return step

    def stop(self) -> None:
        """End the pass where it is."""
        if self and not self.dead:
            self.throw(GreenletExit)


@contextmanager
def _returning(module: Any, output: Any) -> Iterator[None]:
    """Make a module return `output` instead of running."""
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _implementation(config: Any) -> Iterator[None]:
    """Let the model compute attention by blocks of queries."""
    before = config._attn_implementation  # noqa: SLF001 -- no other way
    config._attn_implementation = IMPLEMENTATION  # noqa: SLF001
    try:
        yield
    finally:
        config._attn_implementation = before  # noqa: SLF001


@contextmanager
def taps(
    model: LoadedModel, *, attention: bool, kinds: Mapping[int, frozenset[str]]
) -> Iterator[None]:
    """Put hooks on the model that feed the running :class:`Pass`; they go with the context.

    Parameters
    ----------
    attention
        Whether attention probabilities are wanted.
    kinds
        By layer, the hook points that are wanted (:data:`zarrtrace.capture.hooks.KINDS`).
    """
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            stack.enter_context(_some_tokens_at_a_time(mlp_of(block)))
            handles = []
            for kind in sorted(kinds.get(layer, ())):
                module, side = place(block, model.attentions.get(layer), kind)
                if side == "input":
                    handles.append(
                        module.register_forward_pre_hook(_before(kind), with_kwargs=True)
                    )
                else:
                    handles.append(module.register_forward_hook(_after(kind)))
            if attention and layer in model.attentions:
                handles.append(
                    model.attentions[layer].register_forward_hook(_after_attention(layer))
                )
            handles.append(block.register_forward_hook(_after_block(layer)))  # last: it pauses
            for handle in handles:
                stack.callback(handle.remove)
        yield


@contextmanager
def _some_tokens_at_a_time(mlp: nn.Module | None) -> Iterator[None]:
    """Let an MLP, which takes each token by itself, compute a long prompt in parts.

    Only one that takes a tensor and returns a tensor: others may look at all tokens.
    """
    if mlp is None:
        yield
        return
    whole, before = mlp.forward, vars(mlp).get("forward")

    def forward(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or hidden.ndim != 3 or hidden.shape[1] <= _MLP_TOKENS:
            return whole(hidden, *args, **kwargs)
        made = []
        for some in hidden.split(_MLP_TOKENS, dim=1):
            made.append(whole(some))
            if not isinstance(made[-1], torch.Tensor) or made[-1].shape[:2] != some.shape[:2]:
                return whole(hidden)
        return torch.cat(made, dim=1)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward
        if before is not None:
            mlp.forward = before


def _current() -> Pass | None:
    running = getcurrent()
    return running if isinstance(running, Pass) else None


def _before(kind: str) -> Any:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = _current()
        if running:
            running.state.hooks[kind] = args[0] if args else kwargs["hidden_states"]

    return hook


def _after(kind: str) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        running = _current()
        if running:
            running.state.hooks[kind] = first_tensor(output)

    return hook


def _after_attention(layer: int) -> Any:
    def hook(module: Any, _args: Any, output: Any) -> None:
        running = _current()
        if running is None or not running.whole:
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


def _after_block(layer: int) -> Any:
    def hook(_module: Any, _args: Any, _output: Any) -> None:
        running = _current()
        if running is None:
            return
        state, running.state = running.state, BlockState(layer + 1)
        state.layer = layer
        running.give(state)

    return hook
