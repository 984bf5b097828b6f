"""From what a block did to records of features: what is not 0, and the strongest of each token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from zarrtrace.capture.host import to_host
from zarrtrace.spec import TOP_FEATURES, FeatureRecord, Nonzeros, feature_columns

if TYPE_CHECKING:
    from zarrtrace.capture.encoder import Encoder, Tile


@dataclass(frozen=True)
class Encoding:
    """Features of some tokens, as they were made; :func:`feature_records` makes records of them.

    Attributes
    ----------
    encoder
        What made them.
    sound
        Of each token, whether what was encoded is finite: thresholds turn NaN into 0.
    features
        ``(token, feature)``, or what is not 0 of each block of columns: where, and what.
    """

    encoder: Encoder
    sound: torch.Tensor
    features: torch.Tensor | list[tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def encode(encoder: Encoder, inputs: torch.Tensor) -> Encoding:
    """Encode the tokens of some prompts together ``(token, d_in)``; does not wait for a GPU."""
    sound = inputs.isfinite().all(-1)
    if inputs.device.type != "cpu":
        return Encoding(encoder, sound, encoder(inputs))
    # Some features at a time: what is made of them stays in the processor's cache.
    columns = feature_columns(encoder.attributes.d_sae)
    tiles = [partial(_nonzero, tile, columns) for tile in encoder.tiles(inputs)]
    if len(tiles) == 1:
        return Encoding(encoder, sound, [tiles[0]()])
    return Encoding(encoder, sound, list(_pool(os.getpid()).map(lambda tile: tile(), tiles)))


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return threads that each compute alone: a tile is small for several of torch's at once."""
    return ThreadPoolExecutor(
        torch.get_num_threads(), "zarrtrace-encode", torch.set_num_threads, (1,)
    )


@torch.inference_mode()
def _nonzero(encode_tile: Tile, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a block of columns and find what is not 0: NumPy does it ten times as fast."""
    tile = encode_tile()
    width, flat = tile.shape[1], tile.float().numpy().reshape(-1)
    at = np.flatnonzero(flat != 0)
    values = flat[at]
    if width < columns:
        at += at // width * (columns - width)
    return torch.from_numpy(at), torch.from_numpy(values)


@torch.inference_mode()
def feature_records(made: Encoding, lengths: Sequence[int]) -> list[FeatureRecord]:
    """Copy features to the host, what is not 0 of them, for nearly all of it is.

    Parameters
    ----------
    made
        From :func:`encode`, the prompts one after another.
    lengths
        Tokens of each prompt.

    Returns
    -------
    list
        One a prompt.
    """
    width, tokens = made.encoder.attributes.d_sae, len(made.sound)
    columns = feature_columns(width)
    blocks = made.features
    if isinstance(blocks, torch.Tensor):
        blocks = _blocks_of(blocks, columns)
    feature, activation = (to_host(part) for part in _strongest(blocks, tokens, width))
    finite = to_host(made.sound)
    at, values = ([to_host(block[i]) for block in blocks] for i in (0, 1))
    bounds = np.cumsum([0, *lengths])
    places = [np.searchsorted(of_block, bounds * columns).tolist() for of_block in at]
    out = []
    for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
        parts = [slice(*of_block[number : number + 2]) for of_block in places]
        here = tuple(of[part] for of, part in zip(values, parts, strict=True))
        whole = finite[start:stop].all() and all(np.isfinite(one).all() for one in here)
        out.append(
            FeatureRecord(
                activations=Nonzeros(
                    (stop - start, width),
                    columns,
                    tuple(of[part] - start * columns for of, part in zip(at, parts, strict=True)),
                    here,
                ),
                top_feature=feature[start:stop].astype(np.uint32),
                top_activation=activation[start:stop],
                nonfinite=not whole,
            )
        )
    return out


def _blocks_of(features: torch.Tensor, columns: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Find what is not 0 in each block of columns, in one pass."""
    width, flat = features.shape[1], features.flatten()
    found = flat.nonzero().squeeze(1)
    row, column = found // width, found % width
    block, order = (column // columns).sort(stable=True)
    inside = (row * columns + column % columns)[order].int()
    edges = torch.searchsorted(block, torch.arange(1, -(-width // columns), device=block.device))
    split = edges.tolist()
    values = flat[found[order]].float()
    return list(zip(inside.tensor_split(split), values.tensor_split(split), strict=True))


def _strongest(
    blocks: Sequence[tuple[torch.Tensor, torch.Tensor]], tokens: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the strongest features of each token among those that are not 0; 0 where fewer fire.

    Returns
    -------
    feature, activation
        ``(token, rank)``
    """
    columns, count = feature_columns(width), min(TOP_FEATURES, width)
    values = torch.cat([of_block for _, of_block in blocks])
    row = torch.cat([at // columns for at, _ in blocks])
    feature = torch.cat([at % columns + n * columns for n, (at, _) in enumerate(blocks)])
    row, order = row.sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(tokens + 1, device=row.device, dtype=row.dtype))
    room = max(count, int(starts.diff().max()))
    place = torch.arange(len(row), device=row.device) - starts[row]
    strength = values.new_zeros(tokens, room)
    strength[row, place] = values[order]
    named = feature.new_zeros(tokens, room)
    named[row, place] = feature[order]
    top = strength.topk(count)
    fires = ~(top.values <= 0)  # NaN is shown
    return named.gather(1, top.indices).where(fires, 0), top.values.where(fires, 0)
