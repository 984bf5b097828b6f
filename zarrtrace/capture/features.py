"""Encoding the activations of a block, and bringing non-zero features to the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from zarrtrace.capture.host import begin_copy, to_host
from zarrtrace.layer_batches import SparseFeatures
from zarrtrace.records import Nonzeros

if TYPE_CHECKING:
    from zarrtrace.capture.encoder import Encoder, Tile

# Tokens that a GPU encodes at once: fewer, and its launches take longer than its work.
_ROWS = 2048
# Non-zero features of a token for which space is allocated before any were counted.
_ACTIVE = 256


@torch.inference_mode()
def encode(encoder: Encoder, inputs: torch.Tensor) -> SparseFeatures:
    """Encode the tokens of some prompts together ``(token, d_in)``, and bring them to the host.

    Nearly all features are 0; only the others are brought. A GPU is waited for.
    """
    columns, sound = encoder.columns, to_host(_sound(inputs))
    if inputs.device.type != "cpu":
        found = [_found(encoder, rows, None) for rows in _some_rows(inputs)]
        return _joined(encoder, [_on_host(one, to_host) for one in found], sound)
    # Some features at a time: what is made of them stays in the processor's cache.
    tiles = encoder.tiles(inputs)
    threads, left = min(len(tiles), torch.get_num_threads()), enumerate(tiles)
    made = [_run(left)] if threads == 1 else _pool(os.getpid()).map(_run, [left] * threads)
    _, at, values = zip(*sorted(chain(*made), key=itemgetter(0)), strict=True)
    shape = len(inputs), encoder.attributes.d_sae
    return SparseFeatures(Nonzeros(shape, columns, at, values), sound)


def _sound(inputs: torch.Tensor) -> torch.Tensor:
    """Whether each token is finite in float32, in which encoders compute."""
    return inputs.float().isfinite().all(-1)


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return threads that each compute alone: a tile is small for several of torch's at once."""
    return ThreadPoolExecutor(
        torch.get_num_threads(), "zarrtrace-encode", torch.set_num_threads, (1,)
    )


@torch.inference_mode()
def _run(tiles: Iterator[tuple[int, Tile]]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Encode tiles as long as some are left: threads that share them wake each other once."""
    return [(number, *tile()) for number, tile in tiles]


def _some_rows(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut tokens so that their features, whole, do not fill the memory of a GPU."""
    return inputs.tensor_split(max(1, -(-len(inputs) // _ROWS)))


class _Found(NamedTuple):
    """Non-zero features of some tokens.

    Attributes
    ----------
    tokens
        Number of tokens.
    at, values
        Positions in blocks of :attr:`Encoder.columns`, one block behind the other, and values, of
        which some may be 0.
    """

    tokens: int
    at: Any
    values: Any


def _found(encoder: Encoder, rows: torch.Tensor, room: int | None) -> _Found:
    """Find non-zero features on a device.

    With a fixed `room` the GPU is not waited for: unused positions are -1.
    """
    fires, values = encoder.firing(rows)
    (tokens, width), columns = fires.shape, encoder.columns
    whole = nn.functional.pad(fires, (0, -width % columns))
    flat = whole.view(tokens, -1, columns).transpose(0, 1).flatten()
    if room is None:
        at = flat.nonzero().squeeze(1)
    else:
        at = torch.nonzero_static(flat, size=room, fill_value=-1).squeeze(1)
    block, inner = at // (tokens * columns), at % (tokens * columns)
    there = inner // columns * width + block * columns + inner % columns
    return _Found(tokens, at, values(there.clamp_(min=0)))


def _on_host(found: _Found, copy: Callable[[torch.Tensor], Any]) -> _Found:
    return _Found(found.tokens, *map(copy, found[1:]))


def _joined(encoder: Encoder, parts: Sequence[_Found], sound: np.ndarray) -> SparseFeatures:
    """Put what was found of some tokens each, on the host, behind one another."""
    width, columns = encoder.attributes.d_sae, encoder.columns
    blocks, start = range(-(-width // columns)), 0
    at: list[list[np.ndarray]] = [[] for _ in blocks]
    values: list[list[np.ndarray]] = [[] for _ in blocks]
    for part in map(_without_zeros, parts):
        size = part.tokens * columns
        ends = np.searchsorted(part.at, [size * block for block in (*blocks, len(blocks))])
        for block, here in enumerate(map(slice, ends[:-1], ends[1:])):
            at[block].append(part.at[here] + (start * columns - block * size))
            values[block].append(part.values[here])
        start += part.tokens
    found = tuple(map(np.concatenate, at)), tuple(map(np.concatenate, values))
    return SparseFeatures(Nonzeros((start, width), columns, *found), sound)


def _without_zeros(part: _Found) -> _Found:
    """Leave out what could have fired and did not."""
    fires = part.values != 0
    return part if fires.all() else part._replace(at=part.at[fires], values=part.values[fires])


class Encoding:
    """Features on their way from a GPU, which is not waited for.

    Only the GPU knows the number of non-zero values, so more space than before is taken. Where
    that is not enough, the tokens are encoded again.

    Parameters
    ----------
    encoder
        The encoder.
    inputs
        ``(token, d_in)``
    active
        Most non-zero features of any token so far; None if that is not known.
    """

    @torch.inference_mode()
    def __init__(self, encoder: Encoder, inputs: torch.Tensor, active: float | None) -> None:
        # Copied, for the model may change what it passes on before they are encoded again.
        self._encoder, self._inputs = encoder, inputs.clone()
        each = _ACTIVE if active is None else int(1.5 * active) + 16
        self._sound = _sound(inputs)
        self._found = [_found(encoder, rows, len(rows) * each) for rows in _some_rows(inputs)]

    @torch.inference_mode()
    def begin(self) -> None:
        """Begin to copy, in the stream that is current."""
        # Held until the copies have ended: the memory of what is dropped is used at once again.
        self._held = self._sound, self._found
        self._sound = begin_copy(self._sound)
        self._found = [_on_host(found, begin_copy) for found in self._found]

    def arrived(self) -> SparseFeatures:
        """Return what was copied, once the copy has ended."""
        parts = []
        for found in self._found:
            part = _on_host(found, torch.Tensor.numpy)
            count = int(np.count_nonzero(part.at >= 0))
            if count == len(part.at):  # there may be more
                return encode(self._encoder, self._inputs)
            parts.append(part._replace(at=part.at[:count], values=part.values[:count]))
        return _joined(self._encoder, parts, self._sound.numpy())
