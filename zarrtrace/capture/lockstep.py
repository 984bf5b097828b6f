"""Forward passes that pause after each block, so that many batches share one SAE at a time.

A pass runs the model's own ``forward`` in a greenlet. Hooks switch back to the caller with what a
block made, and the caller lets the pass go on when all other batches have come to the same block.
So each SAE is loaded once, whatever the number of scenarios, while between two blocks a batch
holds no more than its residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from zarrtrace.capture.blocked import IMPLEMENTATION, AttentionRows, Sink, collecting
from zarrtrace.capture.hooks import first_tensor, mlp_of, place
from zarrtrace.capture.messages import forward_errors
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.modules import Attention, not_exact
from zarrtrace.errors import ModelError


@dataclass
class BlockState:
    """The output of one block for one batch.

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
    """Logits of the next tokens, for some rows.

    Attributes
    ----------
    start
        Number of the first of the wanted rows.
    values
        ``(sequence, row, vocabulary)``.
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
    rows
        Token positions whose logits are wanted ``(sequence, row)``; None for all.
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
        rows: torch.Tensor | None = None,
        blocked: tuple[frozenset[int], tuple[int, ...] | None] | None = None,
    ) -> None:
        super().__init__()
        self._model, self._ids, self._mask, self._rows = model, ids, mask, rows
        self.head = HeadInParts()
        self.state = BlockState(0)
        self._sink = None if blocked is None else Sink(self.give, *blocked, model.limits)

    @property
    def whole(self) -> bool:
        """Whether whole attention matrices are captured."""
        return self._sink is None

    def give(self, step: Step) -> None:
        """Pause with a step; called from within the pass."""
        assert self.parent is not None  # noqa: S101 -- a pass is only ever run by advance()
        self.parent.switch(step)

    def next_block(self) -> BlockState:
        """Start with the next block; return what the one before has made."""
        state, self.state = self.state, BlockState(self.state.layer + 1)
        if self._sink is not None:
            self._sink.layer += 1
        return state

    def run(self) -> None:
        """Run the model; the greenlet's body."""
        model, step, head = self._model.model, self._model.limits.logit_rows, self.head
        is_short = self._rows is None and self._ids.shape[1] <= step
        if is_short or not self._model.permitted.parts:
            logits = model(input_ids=self._ids, attention_mask=self._mask, use_cache=False).logits
            self.give(Logits(0, _taken(logits, self._rows)))
            return
        head.wants_output = True
        with suppress(_Decoded):
            model(input_ids=self._ids, attention_mask=self._mask, use_cache=False)
        kind, head.wants_output = type(head.output), False
        hidden = _taken(head.output.last_hidden_state, self._rows)
        ids, head.output = _taken(self._ids, self._rows), None
        for start in range(0, ids.shape[1], step):
            rows = slice(start, start + step)
            head.given = kind(last_hidden_state=hidden[:, rows])
            # The model's own way from its last norm to logits.
            logits = model(input_ids=ids[:, rows], use_cache=False).logits
            head.given = None
            self.give(Logits(start, logits))

    def advance(self) -> Step:
        """Go on to the next step; must be called under :func:`torch.inference_mode`."""
        with ExitStack() as stack:
            stack.enter_context(forward_errors(self._model.attributes.id))
            if self._sink is not None:
                stack.enter_context(collecting(self._sink))
                stack.enter_context(_implementation(self._model.model.config))
            step: Step = self.switch()
        return step

    def stop(self) -> None:
        """End the pass where it is."""
        if self and not self.dead:
            self.throw(GreenletExit)


@dataclass
class HeadInParts:
    """How a pass computes logits: first all blocks, then the head on some rows at a time.

    Attributes
    ----------
    wants_output
        Whether the pass is to end behind the decoder, which leaves what it makes in `output`.
    output
        Output of the decoder.
    given
        Output to return in place of computing; None if it is to compute.
    """

    wants_output: bool = False
    output: Any = None
    given: Any = None


def _taken(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Take rows ``(sequence, row)`` of ``(sequence, token, ...)``; None takes all."""
    if rows is None:
        return values
    return values[torch.arange(len(rows), device=rows.device)[:, None], rows]


class _Decoded(Exception):  # noqa: N818 -- control flow, not an error
    """Ends a forward pass behind its last block and norm."""


@contextmanager
def _head_in_parts(model: LoadedModel) -> Iterator[None]:
    """Let a decoder do what :class:`HeadInParts` of the running pass says.

    Passes take turns, so this is said once for all of them.
    """
    if not model.permitted.parts:
        yield
        return
    decoder = model.decoder.module
    whole = decoder.forward

    @wraps(whole)  # models look at its parameters
    def forward(*args: Any, **kwargs: Any) -> Any:
        running = _current()
        if running is None or not running.head.wants_output:
            given = None if running is None else running.head.given
            return whole(*args, **kwargs) if given is None else given
        running.head.output = whole(*args, **kwargs)
        raise _Decoded

    with _forward_of(decoder, forward):
        yield


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


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
        stack.enter_context(_head_in_parts(model))
        if attention:
            shared = {one.module: one for one in model.decoder.attentions.values()}  # hooked once
            for one in shared.values():
                handles = [one.module.register_forward_hook(_after_attention(model, one))]
                if one.waits_to_be_asked:
                    handles.append(
                        one.module.register_forward_pre_hook(_ask_for_attention, with_kwargs=True)
                    )
                for handle in handles:
                    stack.callback(handle.remove)
        for layer, block in enumerate(model.blocks):
            if model.permitted.parts:
                stack.enter_context(_some_tokens_at_a_time(mlp_of(block), model.limits.mlp_tokens))
            handles = []
            own = model.decoder.attentions.get(layer)
            for kind in sorted(kinds.get(layer, ())):
                module, side = place(block, own.module if own else None, kind)
                if side == "input":
                    handles.append(
                        module.register_forward_pre_hook(_before(kind), with_kwargs=True)
                    )
                else:
                    handles.append(module.register_forward_hook(_after(kind)))
            expected = attention and own is not None
            # Last: it pauses.
            handles.append(
                block.register_forward_hook(_after_block(model, layer, attention=expected))
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield


@contextmanager
def _some_tokens_at_a_time(mlp: nn.Module | None, tokens: int) -> Iterator[None]:
    """Let an MLP, which takes each token by itself, compute a long prompt in parts.

    Only one that takes a tensor and returns a tensor: others may look at all tokens.
    """
    if mlp is None:
        yield
        return
    whole = mlp.forward

    def forward(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or hidden.ndim != 3 or hidden.shape[1] <= tokens:
            return whole(hidden, *args, **kwargs)
        made = []
        for some in hidden.split(tokens, dim=1):
            made.append(whole(some))
            if not isinstance(made[-1], torch.Tensor) or made[-1].shape[:2] != some.shape[:2]:
                return whole(hidden)
        return torch.cat(made, dim=1)

    with _forward_of(mlp, forward):
        yield


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


def _not_exact(model: LoadedModel, why: str) -> ModelError:
    return not_exact(model.attributes.id, model.model, why)


def _ask_for_attention(
    _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "output_attentions": True}


def _after_attention(model: LoadedModel, attention: Attention) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        running = _current()
        if running is None or not running.whole:
            return
        if running.state.layer in model.decoder.attentions:
            running.state.attention = attention.weights(output)

    return hook


def _after_block(model: LoadedModel, layer: int, *, attention: bool) -> Any:
    def hook(module: Any, _args: Any, _output: Any) -> None:
        running = _current()
        if running is None:
            return
        state = running.next_block()
        if state.layer != layer:
            raise _not_exact(model, f"Block {layer} runs where block {state.layer} should.")
        if attention and running.whole and getattr(state.attention, "ndim", None) != 4:
            raise _not_exact(
                model,
                f"{type(module).__name__} of layer {layer} returns no attention probabilities.",
            )
        running.give(state)

    return hook
