"""The decoder blocks that a run captures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from zarrtrace import demo
from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import ranges

if TYPE_CHECKING:
    from zarrtrace.extraction.options import Options

# SAEs of larger models than this are not looked for.
_MOST_BLOCKS = 1000


class LayerChoice(NamedTuple):
    """Blocks to capture.

    Attributes
    ----------
    layers
        Ascending indices.
    notes
        Sentences that name blocks and SAEs which the default leaves out.
    """

    layers: tuple[int, ...]
    notes: tuple[str, ...] = ()


def choose_layers(options: Options, blocks: int, source: Any) -> LayerChoice:
    """Choose the blocks that options ask for.

    Without any option, these are all of the model's blocks, or with features all that have an SAE.

    Parameters
    ----------
    options
        Options of the extraction.
    blocks
        Number of the model's blocks.
    source
        Where SAEs come from; None without features.

    Raises
    ------
    ConfigError
        If the model lacks a block that was asked for.
    SAEError
        If no block has an SAE.
    """
    own = tuple(range(blocks)) if options.own_model else demo.LAYERS
    if options.layers is None and options.layer_start is options.layer_end is None:
        return LayerChoice(own) if source is None else _with_saes(own, blocks, source)
    wanted = options.layers
    if wanted is None:
        first = own[0] if options.layer_start is None else options.layer_start
        last = own[-1] if options.layer_end is None else options.layer_end
        wanted = tuple(range(first, last + 1)) or (first,)
    layers = tuple(sorted(set(wanted)))
    outside = [layer for layer in layers if not 0 <= layer < blocks]
    if outside or not layers:
        raise ConfigError(
            f"--layers {ranges(outside) or '(none)'}: the model has blocks 0 to {blocks - 1}",
            why="A layer is the decoder block's own index, counted from 0.",
            remedy=f"Give layers within 0-{blocks - 1}.",
        )
    return LayerChoice(layers)


def _with_saes(own: tuple[int, ...], blocks: int, source: Any) -> LayerChoice:
    """Choose the blocks that have an SAE; name the others."""
    having = source.available(own)
    if not having:
        return LayerChoice(own)  # to find SAEs for them is refused, with the reason
    notes = []
    without = [layer for layer in own if layer not in having]
    if without:
        notes.append(
            f"layers {ranges(without)} have no SAE and are left out; --no-features captures the "
            "attention of all layers"
        )
    beyond = source.available(range(blocks, _MOST_BLOCKS))
    if beyond:
        notes.append(
            f"SAEs of layers {ranges(beyond)} are not used: the model has blocks 0 to {blocks - 1}"
        )
    return LayerChoice(having, tuple(notes))
