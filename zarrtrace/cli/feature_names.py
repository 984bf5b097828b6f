"""Names of features in the tables of analyses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from zarrtrace.cli.shared import say

if TYPE_CHECKING:
    import pandas as pd

    from zarrtrace.storage import Location

# Characters of a label on a terminal.
_LONGEST = 32
# Words that stand for a label on a terminal.
_WORDS = 3

#: Names features, pairs of a layer and a feature; the flag says that words may stand for labels.
Namer = Callable[[Sequence[tuple[int, int]], bool], Mapping[tuple[int, int], str]]


def no_names(features: Sequence[tuple[int, int]], words: bool) -> dict[tuple[int, int], str]:  # noqa: FBT001
    """Name no feature."""
    del features, words
    return {}


def feature_namer(run: Location, sae: str | None) -> Namer:
    """Return what names the features of an SAE of a run.

    Where labels or index are damaged it warns, and names none: the result is shown all the same.
    """

    def name(features: Sequence[tuple[int, int]], words: bool) -> dict[tuple[int, int], str]:  # noqa: FBT001
        from zarrtrace.errors import StoreError
        from zarrtrace.index import names_of

        array = f"features_{sae}" if sae else "features"
        try:
            return names_of(run, features, array=array, words=_WORDS if words else 0)
        except StoreError as error:
            say(f"zarrtrace: warning: features are not named: {error.what}", err=True)
            return {}

    return name


def labelled(table: pd.DataFrame, namer: Namer, *, words: bool) -> pd.DataFrame:
    """Add a column ``label`` if a table is about features and one of them has a name."""
    if not {"layer", "feature"} <= {*table} or "label" in table:
        return table
    pairs = list(zip(table["layer"].tolist(), table["feature"].tolist(), strict=True))
    names = namer(pairs, words)
    return table.assign(label=[names.get(pair, "") for pair in pairs]) if names else table


def shortened(label: str) -> str:
    """Cut a label that is long for a column."""
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
