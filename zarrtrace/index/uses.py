"""Results of looking a feature up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zarrtrace.errors import ConfigError
from zarrtrace.format.attributes import ranges
from zarrtrace.storage import Location

#: Which tokens are listed.
Text = Literal["all", "prompt", "generated"]
#: Tokens of context that are shown.
BEFORE, AFTER = 6, 3


@dataclass(frozen=True)
class TokenUse:
    """One token at which a feature fires.

    Attributes
    ----------
    activation
        In the SAE's units.
    scenario, position
        Where it is.
    token
        Its text.
    before, after
        The text around it: six tokens and three, as far as the table stores them.
    generated
        Whether the model generated it, behind the prompt.
    """

    activation: float
    scenario: str
    position: int
    token: str
    before: str
    after: str
    generated: bool = False


@dataclass(frozen=True)
class FeatureUse:
    """Maximum, mean and strongest tokens of one feature.

    Attributes
    ----------
    layer, feature, array
        Which: ``array`` is ``features`` or ``features_<name>``.
    maximum, mean
        Activation of largest magnitude, with its sign, and mean activation over all tokens, in the
        SAE's units; a token at which the feature is silent counts as 0. Among a scenario's repeats
        the prompt counts once.
    frequency
        Fraction of tokens at which it fires: its activation is non-zero.
    tokens
        The tokens of largest magnitude, largest first; of equals, the first in the run.
    special
        Whether maximum, mean and frequency count special tokens. If an index counts them that are
        not asked for, `tokens` lacks them and may be fewer.
    indexed, scenarios
        Numbers of scenarios in the index, and in the run; a table's index lacks those
        that failed, also where the table itself is read.
    label
        Its label; empty if the run has none for it.
    """

    layer: int
    feature: int
    array: str
    maximum: float
    mean: float
    frequency: float
    tokens: tuple[TokenUse, ...]
    indexed: int
    scenarios: int
    special: bool
    label: str = ""


def no_values(run: Location, layer: int, array: str, having: Sequence[int]) -> ConfigError:
    """Return the error that says that no token of a layer has values; `having` are layers with."""
    return ConfigError(
        f"{run}: layer {layer} has no values of {array!r}",
        why="The array has no SAE there, or none of the layer's tokens was computed and counted.",
        remedy="Layers that have values: "
        f"{ranges([one for one in having if one != layer]) or 'none'}.",
    )
