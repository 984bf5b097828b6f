"""Sizes that bound the memory of a capture."""

from __future__ import annotations

from dataclasses import dataclass

from zarrtrace.format.layout import DEFAULT_LIMITS, Limits


@dataclass(frozen=True)
class CaptureLimits:
    """Sizes from which a long prompt is captured in parts; tests make them small.

    Attributes
    ----------
    layout
        How arrays are cut into files, and layers into records. Encoders always cut features as the
        default says.
    whole_bytes
        Size up to which a layer's attention matrix is computed whole.
    block_bytes
        Size of the scores of a block of queries; eager functions hold about four times that. No
        larger: blocks grow with their keys, and the allocator keeps what it freed of each size.
    gpu_block_bytes
        The same on a GPU, which small blocks leave idle: it is done before the next is launched.
    block_rows
        Queries of a block: a multiple of this, and at least this.
    logit_rows
        Tokens whose logits are computed together: a vocabulary is large.
    mlp_tokens
        Tokens that an MLP computes together: within, it holds more than all else.
    """

    layout: Limits = DEFAULT_LIMITS
    whole_bytes: int = 256 * 2**20
    block_bytes: int = 8 * 2**20
    gpu_block_bytes: int = 256 * 2**20
    block_rows: int = 16
    logit_rows: int = 512
    mlp_tokens: int = 8192


DEFAULT_CAPTURE_LIMITS = CaptureLimits()
