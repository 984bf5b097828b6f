"""Hook points: where in a block an SAE reads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zarrtrace.errors import SAEError

_HOOK = re.compile(r"blocks\.(?P<layer>\d+)\.(?:hook_)?(?P<kind>[a-z_.]+)")

#: Hook points that can be read, in TransformerLens's names.
KINDS = ("resid_post", "resid_pre")


@dataclass(frozen=True)
class HookPoint:
    """A place in a decoder block.

    Attributes
    ----------
    layer
        Index of the block.
    kind
        One of :data:`KINDS`.
    """

    layer: int
    kind: str


def parse_hook(name: str) -> HookPoint:
    """Understand a hook point's name, for example ``blocks.3.hook_resid_post``.

    Raises
    ------
    SAEError
        If it is none that zarrtrace reads.
    """
    match = _HOOK.fullmatch(name)
    if match is None or match["kind"] not in KINDS:
        raise SAEError(
            f"hook point {name!r} cannot be read",
            why="zarrtrace knows " + ", ".join(f"blocks.N.hook_{kind}" for kind in KINDS) + ".",
            remedy="Choose SAEs that were trained on one of these.",
        )
    return HookPoint(int(match["layer"]), match["kind"])
