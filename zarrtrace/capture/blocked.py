"""Attention block of queries by block, so that no whole (head, query, key) matrix is ever held.

Each block runs the architecture's own eager function on some rows of the query, with the rows of
the mask that transformers itself makes for them: scaling, windows, soft caps and sinks are the
architecture's, and a row of a softmax does not depend on the others. The difference from the whole
matrix is the rounding of a smaller matrix product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from zarrtrace.capture.limits import CaptureLimits

#: The name under which transformers finds this implementation.
IMPLEMENTATION = "zarrtrace_blocked"


@dataclass
class AttentionRows:
    """Attention probabilities of some queries.

    Attributes
    ----------
    layer
        Index of the block.
    queries
        Token positions of the rows, ascending.
    weights
        ``(head, query, key)``; keys behind the last query are left out, they are 0.
    """

    layer: int
    queries: range | tuple[int, ...]
    weights: torch.Tensor


@dataclass
class Sink:
    """Where attention rows go while a pass runs, and which of them are wanted.

    Attributes
    ----------
    take
        Called with each :class:`AttentionRows`, in order.
    layers
        Layers whose rows are wanted.
    queries
        Token positions; None for all.
    limits
        Sizes of the blocks.
    layer
        The block that runs; blocks may share their attention module.
    """

    take: Callable[[AttentionRows], None]
    layers: frozenset[int]
    queries: tuple[int, ...] | None
    limits: CaptureLimits
    layer: int = 0


_sinks: list[Sink] = []


@contextmanager
def collecting(sink: Sink) -> Iterator[None]:
    """Send attention rows to `sink` while the context is open."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


class _Mask:
    """The rows of a mask that are asked for, made by transformers' own functions."""

    def __init__(self, **arguments: Any) -> None:
        arguments.pop("allow_is_causal_skip", None)
        self._q_offset: int = arguments.pop("q_offset", 0)
        self._kv_offset: int = arguments.pop("kv_offset", 0)
        arguments.pop("q_length")
        arguments.pop("kv_length")
        self._added = partial(eager_mask, **arguments)
        arguments.pop("dtype", None)
        self._boolean = partial(sdpa_mask, allow_is_causal_skip=False, **arguments)

    def added(self, start: int, stop: int) -> torch.Tensor:
        """``(sequence, 1, query, key)``: 0, or the lowest number where a query may not look."""
        mask: torch.Tensor = self._added(**self._rows(start, stop))
        return mask

    def boolean(self, start: int, stop: int) -> torch.Tensor:
        """``(sequence, 1, query, key)``: whether a query may look."""
        mask: torch.Tensor = self._boolean(**self._rows(start, stop))
        return mask

    def _rows(self, start: int, stop: int) -> dict[str, int]:
        # Keys behind the last query are hidden from all of them.
        return {
            "q_length": stop - start,
            "q_offset": self._q_offset + start,
            "kv_length": stop,
            "kv_offset": self._kv_offset,
        }


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _Mask,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers' attention functions do, sending weights to the sink."""
    running = _sinks[-1]
    sink = running if running.layer in running.layers else None
    eager = partial(_eager(module), module, **kwargs)
    heads = query.shape[1]
    if (sink is None or sink.queries is not None) and _plain(kwargs):
        if sink is not None:
            _chosen_rows(sink, eager, query, key, value, attention_mask)
        scaling = kwargs.get("scaling")
        return _fast(query, key, value, attention_mask, scaling, running.limits), None
    out = []
    for rows in _blocks(query, heads, key.shape[2], running.limits):
        keys = slice(0, rows.stop)
        part, weights = eager(
            query[:, :, rows.start : rows.stop],
            key[:, :, keys],
            value[:, :, keys],
            attention_mask.added(rows.start, rows.stop),
        )
        out.append(part)
        if sink is not None:
            _send(sink, rows, weights)
        del weights
    return torch.cat(out, dim=1), None


def _send(sink: Sink, rows: range, weights: torch.Tensor) -> None:
    if sink.queries is None:
        sink.take(AttentionRows(sink.layer, rows, weights[0]))
        return
    wanted = tuple(query for query in sink.queries if query in rows)
    if wanted:
        at = [query - rows.start for query in wanted]
        sink.take(AttentionRows(sink.layer, wanted, weights[0][:, at]))


def _chosen_rows(
    sink: Sink,
    eager: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Mask,
) -> None:
    """Compute probabilities of the chosen queries alone."""
    for position in sink.queries or ():
        stop = position + 1
        _, weights = eager(
            query[:, :, position:stop],
            key[:, :, :stop],
            value[:, :, :stop],
            mask.added(position, stop),
        )
        sink.take(AttentionRows(sink.layer, (position,), weights[0]))


def _fast(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Mask,
    scaling: float | None,
    limits: CaptureLimits,
) -> torch.Tensor:
    """Torch's fused attention, block by block so that its mask stays small."""
    out = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, rows.start : rows.stop],
            key[:, :, : rows.stop],
            value[:, :, : rows.stop],
            attn_mask=mask.boolean(rows.start, rows.stop),
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        for rows in _blocks(query, 1, key.shape[2], limits)
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def _plain(kwargs: dict[str, Any]) -> bool:
    """Whether torch's fused attention computes the same: no soft cap and no sinks."""
    return kwargs.get("softcap") is None and kwargs.get("s_aux") is None


def _eager(module: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    found: Callable[..., tuple[torch.Tensor, torch.Tensor]] = sys.modules[
        type(module).__module__
    ].eager_attention_forward
    return found


def _blocks(query: torch.Tensor, heads: int, keys: int, limits: CaptureLimits) -> Iterator[range]:
    """Cut queries ``(sequence, head, query, d)`` so that a block has scores of a certain size."""
    tokens, rows = query.shape[2], limits.block_rows
    size = limits.block_bytes if query.device.type == "cpu" else limits.gpu_block_bytes
    step = max(rows, size // (heads * keys * 4) // rows * rows)
    for start in range(0, tokens, step):
        yield range(start, min(start + step, tokens))


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _Mask)
