"""Layout of tables: samples of many scenarios side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from zarrtrace.format.attributes import (
    CONVENTIONS,
    SEAL_DESCRIPTION,
    Fingerprint,
    Frozen,
    Layers,
    MetadataName,
    ModelAttributes,
    SAESetAttributes,
    Seal,
)
from zarrtrace.format.layout import (
    ARRAYS,
    DEFAULT_LIMITS,
    NEXT_TOKEN,
    NEXT_TOKENS,
    Array,
    ArrayLayout,
    Limits,
    feature_indexes,
    halved_rows,
    itemsize,
    lay_out,
    round_up,
)


@dataclass(frozen=True)
class TableShape:
    """The sizes that decide a table's layout.

    Attributes
    ----------
    layers, samples
        Their numbers.
    features
        Numbers of latents by array (``features``, ``features_NAME``); empty for none.
    channels
        Width of the residual stream; None for a table without `residual`.
    feature_dtype, residual_dtype
        Data types of `features` and `residual`.
    next_token
        Whether the most likely next tokens are stored.
    coordinates
        Data types of the coordinates along `sample`, by name.
    sae_fields
        Coordinates along `layer` that say more of each SAE.
    """

    layers: int
    samples: int
    features: Mapping[str, int] = field(default_factory=dict)
    channels: int | None = None
    feature_dtype: str | None = None
    residual_dtype: str | None = None
    next_token: bool = True
    coordinates: Mapping[str, str] = field(default_factory=dict)
    sae_fields: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS


# Numbers of a chunk of a table's features. One feature of all samples is read in narrow chunks, one
# sample in wide ones; each chunk costs plain readers about a millisecond: schema/README.md.
_TABLE_NUMBERS = 2**20
_NARROWEST, _WIDEST, _COLUMNS = 64, 1024, 32

_TABLE = {
    "features": Array("layer sample feature", *ARRAYS["features"][1:]),
    "residual": Array("layer sample channel", *ARRAYS["residual"][1:]),
    "next_token": Array("sample rank", *ARRAYS["next_token"][1:]),
    "next_token_logprob": Array("sample rank", *ARRAYS["next_token_logprob"][1:]),
    "next_token_text": Array("sample rank", *ARRAYS["next_token_text"][1:]),
}
_SAMPLE = {
    "scenario": "name of the scenario",
    "position": "position of the token in the prompt",
    "token": "text of the token",
    "token_id": "id of the token in the model's vocabulary",
    "special": "whether the tokenizer calls the token special",
    "span": "spans that hold the token",
    "tags": "tags of the scenario",
    "repeat": "number of the continuation",
    "generated": "whether the model generated the token",
    "choice": "option that was found in the continuation; empty for none",
}


def table_columns(features: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many features a chunk of a table holds: about a 32nd of them."""
    columns = _NARROWEST
    while columns < _WIDEST and columns * _COLUMNS < features:
        columns *= 2
    return min(columns, features, limits.features)


def table_block(shape: TableShape) -> int:
    """Return how many samples a block of a table holds: a power of two."""
    columns = [table_columns(size, shape.limits) for size in shape.features.values()]
    block = 1
    while block * 2 <= shape.limits.samples and block * 2 * max(columns, default=1) <= (
        _TABLE_NUMBERS
    ):
        block *= 2
    return block


def table_layout(shape: TableShape) -> dict[str, ArrayLayout]:
    """Lay out every array of a table, coordinates last.

    Returns
    -------
    dict
        :class:`ArrayLayout` by array name.
    """
    out: dict[str, ArrayLayout] = {}
    limits, block = shape.limits, table_block(shape)
    sizes = {"layer": shape.layers, "sample": shape.samples, "rank": NEXT_TOKENS}
    for name, features in shape.features.items():
        names = {"feature": f"feature{name.removeprefix('features')}"}
        steps = {"layer": 1, "sample": block, "feature": table_columns(features, limits)}
        all_sizes = {**sizes, "feature": features}
        layout = lay_out(
            _TABLE["features"], all_sizes, steps, names=names, dtype=shape.feature_dtype
        )
        out[name] = _in_sample_files(layout, limits)
    if shape.channels is not None:
        all_sizes = {**sizes, "channel": shape.channels}
        steps = {"layer": 1, "sample": halved_rows(block, shape.channels, limits)}
        layout = lay_out(_TABLE["residual"], all_sizes, steps, dtype=shape.residual_dtype)
        out["residual"] = _in_sample_files(layout, limits)
    if shape.next_token:
        rows = round_up(limits.labels, block)
        for name in NEXT_TOKEN:
            layout = lay_out(_TABLE[name], sizes, {"sample": block})
            rows_there = round_up(max(1, shape.samples), layout.chunks[0])
            shards = (min(rows, rows_there), NEXT_TOKENS)
            out[name] = layout.model_copy(update={"shards": shards})
    return out | _table_coordinates(shape, sizes)


def _in_sample_files(layout: ArrayLayout, limits: Limits) -> ArrayLayout:
    """Cut an array into files that hold one layer of as many whole chunk rows as fit."""
    chunks = layout.chunks
    shards = [round_up(max(1, size), step) for size, step in zip(layout.shape, chunks, strict=True)]
    row_bytes = chunks[1] * shards[2] * itemsize(layout.dtype)
    rows = max(1, limits.file_bytes // row_bytes) * chunks[1]
    return layout.model_copy(update={"shards": (1, min(shards[1], rows), shards[2])})


def _table_coordinates(shape: TableShape, sizes: Mapping[str, int]) -> dict[str, ArrayLayout]:
    indexes = {"layer": shape.layers}
    if shape.channels is not None:
        indexes["channel"] = shape.channels
    out = {name: lay_out(ARRAYS[name], indexes) for name in indexes}
    out |= feature_indexes(shape.features)
    for name in shape.sae_fields:
        out[name] = lay_out(Array("layer", "string", f"{name} of the layer's SAE"), indexes)
    for name, dtype in shape.coordinates.items():
        said = _SAMPLE.get(name, f"{name} of the scenario")
        if name.startswith("option_"):
            said = "id of the option's first token; -1 if the scenario has none"
        array = Array("sample", dtype, said)
        out[name] = lay_out(array, sizes, {"sample": shape.limits.labels})
    return out


class TableAttributes(Frozen):
    """The attributes of a table's group: samples of many scenarios in one store."""

    zarr_conventions: tuple[dict[str, str], ...] = CONVENTIONS
    format_version: Literal[2] = 2
    kind: Literal["table"] = "table"
    scenarios: NonNegativeInt = Field(
        description="How many scenarios the samples are of; each repeat counts."
    )
    positions: str = Field(description="Token positions that were asked for, as 'last'.")
    spans: tuple[str, ...] = Field(default=(), description="Names of the scenarios' spans.")
    options: tuple[str, ...] = Field(
        default=(), description="Each has a coordinate `option_NAME`: the id of its first token."
    )
    metadata: tuple[MetadataName, ...] = Field(
        default=(), description="Names of the coordinates that are columns of metadata."
    )
    failed: dict[str, str] = Field(
        default_factory=dict,
        description="Why scenarios were not computed; all values of their samples are NaN. With "
        "repeats, names are `SCENARIO~REPEAT`.",
    )
    chat_template: Fingerprint | None = Field(
        default=None,
        description="BLAKE2b (8 bytes) of the chat template's text; null if no scenario is a chat.",
    )
    model: ModelAttributes | None = Field(description="Null if not known.")
    saes: dict[str, SAESetAttributes] = Field(
        default_factory=dict, description="By array: `features`, `features_NAME`."
    )
    layers: Layers = Field(description="Index of the dimension `layer`.")
    layers_without_sae: Layers = ()
    layers_without_residual: Layers = ()
    feature_dtype: Literal["float16", "float32"] | None = Field(
        description="Null if features were not asked for."
    )
    residual_dtype: Literal["float16", "float32"] | None = Field(
        default=None, description="Null if the residual stream was not asked for."
    )
    residual_hook: str | None = Field(
        default=None,
        description="Hook point that `residual` is from, by TransformerLens's name; `{layer}` "
        "stands for the layer's number. Null if not known.",
    )
    versions: dict[str, str] = Field(
        description="Libraries the table was made with; if others completed it, both versions, as "
        "in '2.4.0, 2.13.0'."
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="What was asked for; a resumed extraction must ask again.",
    )
    seal: Seal | None = Field(default=None, description=SEAL_DESCRIPTION)

    def layers_of(self, _dim: str) -> tuple[int, ...]:
        """Return the layers along an array's first dimension."""
        return self.layers
