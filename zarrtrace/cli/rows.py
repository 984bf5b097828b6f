"""Options that choose and sort the rows of an analysis' table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from zarrtrace.cli.commands import QUESTION, option
from zarrtrace.cli.option_types import FeaturePair, Layers
from zarrtrace.cli.tables import Choice, Layout

_LAYER = option(
    "--layer",
    "layers_shown",
    group=QUESTION,
    type=Layers(),
    help="Only rows of these layers, as 25 or 20-31; p and q stay those of all.",
)
_FEATURE = option(
    "--feature",
    "features_shown",
    group=QUESTION,
    type=FeaturePair(),
    multiple=True,
    help="Only rows of this layer and feature, as 25:250. Repeatable.",
)
_SORT = option(
    "--sort",
    group=QUESTION,
    metavar="COLUMN",
    help="Sort rows by it.  [default: strongest first]",
)
_TOP = option(
    "--top",
    "rows",
    group=QUESTION,
    type=click.IntRange(1),
    help="Rows to list or write.  [default: 20 on a terminal, all in a file]",
)


def row_options(layout: Layout, *, has_features: bool) -> list[Callable[..., Any]]:
    """Return the options that choose and sort the rows of a table.

    Parameters
    ----------
    layout
        Columns of the table.
    has_features
        Whether the command's own question has ``--feature``.
    """
    if layout.is_short:
        return []
    by_layer = [_LAYER] if "layer" in layout.filters else []
    by_feature = [_FEATURE] if "feature" in layout.filters and not has_features else []
    return [*by_layer, *by_feature, _SORT, _TOP]


def choice_of(given: dict[str, Any]) -> Choice:
    """Take the options that choose rows out of those that were given."""
    layers, rows = given.pop("layers_shown", None), given.pop("rows", None)
    if "features" in given:  # the question of feature-trajectory itself
        given["features"] = tuple(_with_layer(given["features"], layers))
    features = tuple(_with_layer(given.pop("features_shown", ()), layers))
    for feature in features:
        if not isinstance(feature, tuple):
            raise click.UsageError(
                f"--feature {feature}: of which layer? The same number is another feature in each "
                f"layer. Give both, as --feature 25:{feature}."
            )
    return Choice(layers, features, given.pop("sort", None), rows)


def _with_layer(
    features: Sequence[tuple[int, int] | int], layers: tuple[int, ...] | None
) -> list[Any]:
    """Return features as pairs where a single --layer says which layer a number belongs to."""
    one = layers[0] if layers is not None and len(layers) == 1 else None
    return [
        feature if one is None or isinstance(feature, tuple) else (one, feature)
        for feature in features
    ]
