"""Encoding what a block did, and bringing what is not 0 of the features to the host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from zarrtrace.capture.host import begin_copy, to_host
from zarrtrace.spec import feature_columns
from zarrtrace.together import SparseFeatures

if TYPE_CHECKING:
    from zarrtrace.capture.encoder import Encoder, Tile

# Tokens that a GPU encodes at once: twice as many are hardly faster.
_ROWS = 1024
# Features of a token that are not 0: room for these is made before any were counted.
_ACTIVE = 256


@torch.inference_mode()
def encode(encoder: Encoder, inputs: torch.Tensor) -> SparseFeatures:
    """Encode the tokens of some prompts together ``(token, d_in)``, and bring them to the host.

    Nearly all features are 0; what is not comes. A GPU is waited for.
    """
    width, sound = encoder.attributes.d_sae, to_host(inputs.isfinite().all(-1))
    if inputs.device.type != "cpu":
        found = [_nonzero_there(encoder(rows)) for rows in _some_rows(inputs)]
        return _joined(width, found, sound)
    # Some features at a time: what is made of them stays in the processor's cache.
    columns = feature_columns(width)
    tiles = [partial(_nonzero, tile, columns) for tile in encoder.tiles(inputs)]
    made = [tiles[0]()] if len(tiles) == 1 else _pool(os.getpid()).map(lambda tile: tile(), tiles)
    at, values = zip(*made, strict=True)
    return SparseFeatures(width, columns, at, values, sound)


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return threads that each compute alone: a tile is small for several of torch's at once."""
    return ThreadPoolExecutor(
        torch.get_num_threads(), "zarrtrace-encode", torch.set_num_threads, (1,)
    )


@torch.inference_mode()
def _nonzero(encode_tile: Tile, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode a block of columns and find what is not 0: NumPy does it ten times as fast."""
    tile = encode_tile()
    width, flat = tile.shape[1], tile.float().numpy().reshape(-1)
    at = np.flatnonzero(flat != 0)
    values = flat[at]
    if width < columns:
        at += at // width * (columns - width)
    return at, values


def _some_rows(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut tokens so that their features, whole, do not fill the memory of a GPU."""
    return inputs.tensor_split(max(1, -(-len(inputs) // _ROWS)))


def _nonzero_there(features: torch.Tensor) -> tuple[int, np.ndarray, np.ndarray]:
    flat = features.flatten()
    at = flat.nonzero().squeeze(1)
    return len(features), to_host(at), to_host(flat[at].float())


def _joined(
    width: int, parts: Sequence[tuple[int, np.ndarray, np.ndarray]], sound: np.ndarray
) -> SparseFeatures:
    """Put what is not 0 of some tokens each, where and what, behind one another."""
    if len(parts) == 1:
        (_, at, values) = parts[0]
        return SparseFeatures(width, width, (at,), (values,), sound)
    starts = np.cumsum([0, *(tokens for tokens, *_ in parts)]) * width
    at = np.concatenate([one + start for start, (_, one, _) in zip(starts, parts, strict=False)])
    return SparseFeatures(width, width, (at,), (np.concatenate([v for *_, v in parts]),), sound)


class Encoding:
    """Features on their way from a GPU, which is not waited for.

    How many are not 0, only the GPU knows: so room is made for more than there were before. Where
    that is not enough, the tokens are encoded anew.

    Parameters
    ----------
    encoder
        What encodes.
    inputs
        ``(token, d_in)``
    active
        How many features of a token were not 0, at most; None if that is not known.
    """

    @torch.inference_mode()
    def __init__(self, encoder: Encoder, inputs: torch.Tensor, active: float | None) -> None:
        self._encoder, self._inputs = encoder, inputs
        each = _ACTIVE if active is None else int(1.5 * active) + 16
        self._sound = inputs.isfinite().all(-1)
        self._found = [
            _packed(encoder(rows).flatten(), len(rows) * each) for rows in _some_rows(inputs)
        ]

    @torch.inference_mode()
    def begin(self) -> None:
        """Begin to copy, in the stream that is current."""
        # Held until the copies have ended: the memory of what is dropped is used at once again.
        self._held = self._sound, self._found
        self._sound = begin_copy(self._sound)
        self._found = [(begin_copy(at), begin_copy(values)) for at, values in self._found]

    def arrived(self) -> SparseFeatures:
        """Return what was copied, once the copy has ended."""
        parts = []
        for rows, (at, values) in zip(_some_rows(self._inputs), self._found, strict=True):
            places = at.numpy()
            count = int(np.count_nonzero(places >= 0))
            if count == len(places):  # there may be more
                return encode(self._encoder, self._inputs)
            parts.append((len(rows), places[:count], values.numpy()[:count]))
        return _joined(self._encoder.attributes.d_sae, parts, self._sound.numpy())


def _packed(flat: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find what is not 0 without waiting for a GPU: places, -1 behind the last one; and values."""
    at = torch.nonzero_static(flat, size=room, fill_value=-1).squeeze(1)
    return at, flat[at].float()
