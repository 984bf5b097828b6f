"""Attributes that the SAEs of all layers share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import (
    _BY_LAYER,
    _TEXTS,
    SAE_FIELDS,
    SAEAttributes,
    SAESetAttributes,
    sae_coordinate,
)


def share_saes(
    saes: Sequence[SAEAttributes], layers: Sequence[int]
) -> tuple[dict[str, SAESetAttributes], dict[str, list[str]]]:
    """Split what is known of SAEs into what layers share and what is said of each layer.

    Parameters
    ----------
    saes
        SAEs of all layers.
    layers
        The trace's layers, in order.

    Returns
    -------
    shared
        By array.
    by_layer
        Texts by coordinate, one a layer; empty where a layer has no SAE.
    """
    shared: dict[str, SAESetAttributes] = {}
    by_layer: dict[str, list[str]] = {}
    for variable in dict.fromkeys(sae.variable for sae in saes):
        found = {sae.layer: sae for sae in saes if sae.variable == variable}
        first = next(iter(found.values()))
        texts: dict[str, str | None] = {}
        for field in SAE_FIELDS:
            values = {layer: getattr(sae, field) or "" for layer, sae in found.items()}
            templates = {  # "float32" of layer 32 names no layer
                _template(value, layer) if field == "hook_name" else value
                for layer, value in values.items()
            }
            texts[field] = templates.pop() if len(templates) == 1 else None
            if texts[field] is None or (field in _BY_LAYER and any(values.values())):
                by_layer[sae_coordinate(field, variable)] = [values.get(n, "") for n in layers]
        same = ("release", "revision", "d_in", "d_sae", "decoder_norm_folded")
        for sae in found.values():
            for field in same:
                if getattr(sae, field) != getattr(first, field):
                    raise ConfigError(
                        f"SAEs of layers {first.layer} and {sae.layer} differ in {field}: "
                        f"{getattr(first, field)!r} and {getattr(sae, field)!r}",
                        why="SAEs whose features are stored in one array must agree in it.",
                        remedy="Choose SAEs of one kind with --sae-id.",
                    )
        shared[variable] = SAESetAttributes(
            **{field: getattr(first, field) for field in same},
            **{field: texts[field] for field in _TEXTS},
        )
    return shared, by_layer


def _template(value: str, layer: int) -> str:
    return re.sub(rf"(?<!\d){layer}(?!\d)", "{layer}", value)
