"""Lengths of a forward pass beyond which all its rotary embeddings change.

LongRoPE (Phi-3 with 128k tokens, Phi-4 mini) has factors for short and for long sequences. The
longest sequence of a forward pass decides for the whole pass: a short prompt that is padded to a
long one, and the first part of a long prompt, would get the other's factors. Probes are shorter
than the limit (4,096 tokens in Phi-3) and do not see this.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from zarrtrace.capture.model import LoadedModel

# "su" is the name in the first Phi-3 checkpoints, whose own code reads it.
_BY_LENGTH = frozenset({"longrope", "su"})


def rope_limits(model: LoadedModel) -> list[int]:
    """Return the lengths beyond which rotary embeddings change, ascending; mostly none."""
    config = model.model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [one for one in found.values() if isinstance(one, Mapping)]
    limits = {_limit(config, one) for one in (found, *by_layer_type)}
    longest = model.max_tokens
    return sorted(
        limit for limit in limits if limit is not None and (longest is None or limit < longest)
    )


def _limit(config: Any, parameters: Mapping[str, Any]) -> int | None:
    kind = parameters.get("rope_type", parameters.get("type"))
    # Phi-3.5-MoE scales by length whatever the type is.
    if kind not in _BY_LENGTH and "long_mscale" not in parameters:
        return None
    name = "original_max_position_embeddings"
    limit: int | None = parameters.get(name) or getattr(config, name, None)
    return limit


def rope_sides(model: LoadedModel, lengths: Iterable[int]) -> list[int]:
    """Return how many of the limits each length is beyond: equal ones may share a pass."""
    limits = rope_limits(model)
    return [bisect_left(limits, length) for length in lengths]
