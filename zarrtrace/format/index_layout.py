"""Layout of the index of the features of a run or a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from zarrtrace.format.attributes import CONVENTIONS, SEAL_DESCRIPTION, Extensible, Layers, Seal
from zarrtrace.format.layout import ARRAYS, Array, ArrayLayout, feature_indexes, lay_out, round_up

#: Number of tokens that the index keeps of each feature.
INDEX_TOKENS = 20

# One feature is looked up: what is decoded for it stays small.
# The names of 100,000 scenarios are 13 files.
_INDEX_STEPS = {"layer": 1, "feature": 1024, "scenario": 8192}
_INDEX = {
    "maximum": Array("layer feature", "float32", "largest activation"),
    "mean": Array("layer feature", "float32", "mean activation over all tokens"),
    "frequency": Array(
        "layer feature", "float32", "fraction of tokens at which the feature fires"),
    "token_activation": Array(
        "layer feature token_rank", "float32",
        "activations at the strongest tokens, strongest first"),
    "token_scenario": Array("layer feature token_rank", "uint32", "numbers of their scenarios"),
    "token_position": Array("layer feature token_rank", "uint32", "their positions in the prompt"),
    "active": Array("layer feature", "int64", "number of tokens at which the feature fires"),
    "total": Array(
        "layer feature part", "int64", "sum of activations, in units of 2**-18 and of 2**-50"),
    "tokens": Array("layer", "int64", "number of tokens that were seen"),
}  # fmt: skip
_SCENARIOS = {
    "scenario": Array("scenario", "string", "name of the scenario, in the run's order"),
    "digest": Array("scenario", "uint64", "of the scenario's features; 0 if they are not indexed"),
    "start": Array("scenario", "int64", "number of the scenario's first sample in the table"),
}


def index_layout(
    layers: int, features: Mapping[str, int], scenarios: int, *, of_table: bool = False
) -> dict[str, ArrayLayout]:
    """Lay out every array of an index, those without features last.

    Parameters
    ----------
    layers, scenarios
        Their numbers.
    features
        Number of latents by array of features (``features``, ``features_NAME``).
    of_table
        Whether a table is indexed, rather than a run of traces.

    Returns
    -------
    dict
        :class:`ArrayLayout` by array name.
    """
    out: dict[str, ArrayLayout] = {}
    sizes = {"layer": layers, "scenario": scenarios, "token_rank": INDEX_TOKENS, "part": 2}
    for name, size in features.items():
        suffix = name.removeprefix("features")
        for array, found in _INDEX.items():
            names = {"feature": f"feature{suffix}"}
            layout = lay_out(found, {**sizes, "feature": size}, _INDEX_STEPS, names=names)
            if len(layout.dims) > 1:  # one file a layer, because layers are written apart
                _, step, *more = layout.chunks
                files = {"shards": (1, round_up(size, step), *more)}
                layout = layout.model_copy(update=files)
            out[f"{array}{suffix}"] = layout
    out |= feature_indexes(features)
    out["layer"] = lay_out(ARRAYS["layer"], sizes)
    for name in ("scenario", "start" if of_table else "digest"):
        out[name] = lay_out(_SCENARIOS[name], sizes, _INDEX_STEPS)
    return out


class IndexAttributes(Extensible):
    """The attributes of the group that indexes the features of a run or a table."""

    left_out: ClassVar[frozenset[str]] = frozenset(("table",))

    zarr_conventions: tuple[dict[str, str], ...] = CONVENTIONS
    format_version: Literal[2] = 2
    kind: Literal["index"] = "index"
    layers: Layers = Field(description="Index of the dimension `layer`.")
    features: dict[str, PositiveInt] = Field(
        description="Number of latents by array of features that is indexed."
    )
    scenarios: NonNegativeInt = Field(description="How many the run or the table has.")
    indexed: NonNegativeInt = Field(description="How many of them are in the index.")
    table: Seal | None = Field(
        default=None, description="Seal of the table that is indexed; absent for a run of traces."
    )
    special: bool = Field(
        default=True,
        description="Whether special tokens (BOS, chat markers) are counted; absent if they are.",
    )
    seal: Seal | None = Field(default=None, description=SEAL_DESCRIPTION)
