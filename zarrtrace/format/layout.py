"""Layout of arrays on disk: names, dimensions, data types, chunks and files.

schema/README.md has the measurements behind the chunk shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from zarrtrace.format.attributes import Frozen

#: Number of strongest features in ``top_feature`` and ``top_activation``, by token.
TOP_FEATURES = 32
#: Number of continuations in ``next_token`` at each position.
NEXT_TOKENS = 10
#: The arrays of continuations.
NEXT_TOKEN = ("next_token", "next_token_logprob", "next_token_text")
#: Stands for no feature and no token in arrays of ids.
NO_ID = 2**32 - 1

#: The group of a run or a table that indexes its features; no scenario and no array of a table may
#: be called so.
INDEX = "index"
#: The folder of a run in which traces are written, and the index of a run or a table.
STAGED = ".staged"
#: The file of a run or a table with the labels of its features. No name of a scenario or an array
#: begins with a dot.
LABELLED = ".labels.parquet"

#: The coordinate that tells which tokens are special, such as BOS.
SPECIAL = "special"
#: Coordinates that are no index; a group's ``coordinates`` attribute names those it has.
# Text among the data would make Dataset.where() of plain xarray fail: it has no NaN.
PLAIN_COORDINATES = (
    "token_id",
    "key_token",
    "special",
    "generated",
    "query_token",
    "next_token_text",
)

#: How chunks are compressed: schema/README.md, "Codecs".
Codec = Literal["shuffle", "sparse", "plain"]


@dataclass(frozen=True)
class Limits:
    """Sizes that decide how arrays are cut; tests make them small.

    Attributes
    ----------
    file_bytes
        Dense size that a file of a sharded array stays within, unless one chunk row is larger.
    record_bytes
        Dense size of the rows that a record of a long prompt holds.
    keys, queries, tokens, features
        Most that a chunk has along these dimensions: of `attention`, and of `features` and
        `residual`.
    samples, labels
        Samples of a table's block, at most, and those that a chunk of its coordinates holds.
    attention
        Numbers that a chunk of `attention` or `residual` stays within: its rows, `queries` or
        `tokens`, are halved until it does.
    """

    file_bytes: int = 2**29
    record_bytes: int = 2**26
    keys: int = 1024
    queries: int = 32
    tokens: int = 64
    features: int = 4096
    attention: int = 160 * 1024
    samples: int = 4096
    labels: int = 65_536


DEFAULT_LIMITS = Limits()

# Chunks of `attention_mean`, `top_feature` and `top_activation` hold this many times the rows of a
# chunk of `attention` or `features`, but no more rows than a record: records of a long prompt begin
# at multiples of both.
_SMALL = 8


class ArrayLayout(Frozen):
    """How one array is laid out on disk.

    `shards` is the shape of what one file holds, for arrays whose files hold many chunks.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    dims: tuple[str, ...]
    dtype: str
    shape: tuple[NonNegativeInt, ...]
    chunks: tuple[PositiveInt, ...]
    shards: tuple[PositiveInt, ...] | None = None
    codec: Codec = "plain"
    fill_value: bool | float | int | str = 0
    attributes: dict[str, str] = Field(default_factory=dict)

    @property
    def has_layers(self) -> bool:
        """Whether the array is written layer by layer."""
        return self.shards is not None and self.dims[0] in ("layer", "attention_layer")

    @property
    def row_axis(self) -> int:
        """Number of the dimension along which a layer is written in parts."""
        return next(at for at, dim in enumerate(self.dims) if dim in ROWS)


#: Dimensions of token positions and samples along which a layer may be written in parts.
ROWS = ("query", "attention_query", "sample")


@dataclass(frozen=True)
class TraceShape:
    """The sizes that decide a trace's layout.

    Attributes
    ----------
    layers, tokens
        Numbers of layers and of the prompt's tokens, which are the keys.
    positions
        Number of stored token positions; None for all tokens.
    heads
        Query heads; None for a trace without attention.
    features
        Numbers of latents by array (``features``, ``features_NAME``); empty for none.
    channels
        Width of the residual stream; None for a trace without `residual`.
    attention_dtype, feature_dtype, residual_dtype
        Data types of `attention`, `features` and `residual`.
    next_token
        Whether the most likely next tokens are stored.
    attention_layers, attention_positions
        Numbers of layers and rows of `attention`, in dimensions of its own; None for those of all
        arrays.
    special
        Whether the tokens are known that the tokenizer calls special.
    generated
        Whether the last of the tokens were generated.
    sae_fields
        Coordinates along `layer` that say more of each SAE.
    """

    layers: int
    tokens: int
    positions: int | None = None
    heads: int | None = None
    features: Mapping[str, int] = field(default_factory=dict)
    channels: int | None = None
    attention_dtype: str | None = None
    feature_dtype: str | None = None
    residual_dtype: str | None = None
    next_token: bool = True
    attention_layers: int | None = None
    attention_positions: int | None = None
    special: bool = True
    generated: bool = False
    sae_fields: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS

    @property
    def rows(self) -> int:
        """Size of the dimension ``query``."""
        return self.tokens if self.positions is None else self.positions


# --- the arrays of a trace ---------------------------------------------------------------------


class Array(NamedTuple):
    """An array without the sizes of its dimensions."""

    dims: str
    dtype: str
    long_name: str
    description: str = ""
    fill_value: float | None = None
    codec: Codec = "plain"


ARRAYS = {
    "attention": Array(
        "layer head query key", "float32", "attention probability",
        "how much the query token attends to the key token, by query head", codec="shuffle"),
    "attention_mean": Array(
        "layer query key", "float32", "attention probability, mean over heads", codec="shuffle"),
    "features": Array("layer query feature", "float32", "SAE feature activation", codec="sparse"),
    "top_feature": Array(
        "layer query feature_rank", "uint32", "strongest features of a token, strongest first",
        f"by magnitude; {NO_ID} where no further feature fires", NO_ID),
    "top_activation": Array(
        "layer query feature_rank", "float32", "activations of the strongest features"),
    # Its bytes are shuffled: two of each value of a bfloat16 model are 0.
    "residual": Array(
        "layer query channel", "float32", "residual stream",
        "at the hook point that the attribute residual_hook names", codec="shuffle"),
    "next_token": Array(
        "query rank", "uint32", "most likely next tokens, most likely first", fill_value=NO_ID),
    "next_token_logprob": Array(
        "query rank", "float32", "natural logarithm of the next token's probability"),
    "next_token_text": Array("query rank", "string", "texts of the most likely next tokens"),
    "layer": Array("layer", "int64", "index of the decoder block, from 0"),
    "head": Array("head", "int64", "query head"),
    "attention_layer": Array(
        "attention_layer", "int64", "decoder block that has attention, from 0"),
    "attention_query": Array(
        "attention_query", "int64", "position of a token whose row of attention is stored"),
    "feature": Array("feature", "int64", "index of the SAE's latent"),
    "channel": Array("channel", "int64", "index of the residual stream's channel"),
    "query": Array("query", "int64", "position of the token in the prompt"),
    "key": Array("key", "int64", "position of the token in the prompt"),
    "token_id": Array("key", "uint32", "id of the token in the model's vocabulary"),
    "key_token": Array("key", "string", "text of the token"),
    "query_token": Array("query", "string", "text of the token"),
    "special": Array("key", "bool", "whether the tokenizer calls the token special"),
    "generated": Array("key", "bool", "whether the model generated the token"),
}  # fmt: skip
_TOKENS = ("query", "key", "token_id", "key_token", "query_token", "special", "generated")


# Value of what is not stored, by data type; 0 of others.
_MISSING: dict[str, float | str | bool] = {
    **dict.fromkeys(("float16", "float32", "float64"), math.nan), "string": "", "bool": False,
}  # fmt: skip


def lay_out(
    array: Array,
    sizes: Mapping[str, int],
    steps: Mapping[str, int] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> ArrayLayout:
    """Lay out an array; along a dimension without a step, a chunk has all.

    `names` and `dtype` replace the names of dimensions and the data type of the table.
    """
    dims, steps, names, dtype = array.dims.split(), steps or {}, names or {}, dtype or array.dtype
    missing = _MISSING.get(dtype, 0)
    described = {"description": array.description} if array.description else {}
    return ArrayLayout(
        dims=tuple(names.get(dim, dim) for dim in dims),
        dtype=dtype,
        shape=tuple(sizes[dim] for dim in dims),
        chunks=tuple(max(1, min(sizes[dim], steps.get(dim, sizes[dim]))) for dim in dims),
        codec=array.codec,
        fill_value=missing if array.fill_value is None else array.fill_value,
        attributes={"long_name": array.long_name, **described},
    )


def trace_layout(shape: TraceShape) -> dict[str, ArrayLayout]:
    """Lay out every array of a trace, coordinates last.

    Returns
    -------
    dict
        :class:`ArrayLayout` by array name.
    """
    out: dict[str, ArrayLayout] = {}
    if shape.heads is not None:
        out |= _attention_layouts(shape, shape.heads)
    for name, features in shape.features.items():
        out |= _feature_layouts(name.removeprefix("features"), shape, features)
    if shape.channels is not None:
        out["residual"] = _residual_layout(shape, shape.channels)
    if shape.next_token:
        sizes = {"query": shape.rows, "rank": NEXT_TOKENS}
        out |= {name: lay_out(ARRAYS[name], sizes, {"query": 4096}) for name in NEXT_TOKEN}
    return out | _coordinate_layouts(shape)


def _attention_layouts(shape: TraceShape, heads: int) -> dict[str, ArrayLayout]:
    limits, tokens, dtype = shape.limits, shape.tokens, shape.attention_dtype or "float32"
    sizes = {"layer": shape.layers, "head": heads, "query": shape.rows, "key": tokens}
    names = {}
    for dim, size in (("layer", shape.attention_layers), ("query", shape.attention_positions)):
        if size is not None:
            sizes[dim], names[dim] = size, f"attention_{dim}"
    step = attention_chunk_rows(tokens, heads, limits)
    rows = min(_SMALL * step, attention_rows(tokens, heads, dtype, limits))
    out = {}
    for name, most, kind in (("attention", step, dtype), ("attention_mean", rows, "float32")):
        steps = {"layer": 1, "query": most, "key": limits.keys}
        layout = lay_out(ARRAYS[name], sizes, steps, names=names, dtype=kind)
        out[name] = _in_files(layout, limits)
    return out


def _feature_layouts(suffix: str, shape: TraceShape, features: int) -> dict[str, ArrayLayout]:
    limits, positions = shape.limits, shape.rows
    ranks = min(TOP_FEATURES, features)
    sizes = {"layer": shape.layers, "query": positions, "feature": features, "feature_rank": ranks}
    names = {dim: f"{dim}{suffix}" for dim in ("feature", "feature_rank")}
    rows = min(_SMALL * limits.tokens, feature_rows(positions, features, limits))
    out = {}
    for name in ("features", "top_feature", "top_activation"):
        most, dtype = (limits.tokens, shape.feature_dtype) if name == "features" else (rows, None)
        steps = {"layer": 1, "query": most, "feature": limits.features}
        layout = lay_out(ARRAYS[name], sizes, steps, names=names, dtype=dtype)
        out[f"{name}{suffix}"] = _in_files(layout, limits)
    return out


def _residual_layout(shape: TraceShape, channels: int) -> ArrayLayout:
    sizes = {"layer": shape.layers, "query": shape.rows, "channel": channels}
    steps = {"layer": 1, "query": residual_chunk_rows(channels, shape.limits)}
    layout = lay_out(ARRAYS["residual"], sizes, steps, dtype=shape.residual_dtype)
    return _in_files(layout, shape.limits)


def _in_files(layout: ArrayLayout, limits: Limits) -> ArrayLayout:
    """Cut an array that is written layer by layer into files: as many layers each as fit."""
    chunks, axis = layout.chunks, layout.row_axis
    shards = [round_up(size, step) for size, step in zip(layout.shape, chunks, strict=True)]
    layer_bytes = math.prod(shards[1:]) * itemsize(layout.dtype)
    shards[0] = max(1, min(layout.shape[0], limits.file_bytes // layer_bytes))
    if layer_bytes > limits.file_bytes:
        row_bytes = layer_bytes // shards[axis] * chunks[axis]
        rows = max(1, limits.file_bytes // row_bytes) * chunks[axis]
        shards[axis] = min(shards[axis], rows)
    return layout.model_copy(update={"shards": tuple(shards)})


def _coordinate_layouts(shape: TraceShape) -> dict[str, ArrayLayout]:
    indexes = {"layer": shape.layers}
    if shape.heads is not None:
        indexes["head"] = shape.heads
        if shape.attention_layers is not None:
            indexes["attention_layer"] = shape.attention_layers
        if shape.attention_positions is not None:
            indexes["attention_query"] = shape.attention_positions
    if shape.channels is not None:
        indexes["channel"] = shape.channels
    out = {name: lay_out(ARRAYS[name], indexes) for name in indexes}
    out |= feature_indexes(shape.features)
    for name in shape.sae_fields:
        out[name] = lay_out(Array("layer", "string", f"{name} of the layer's SAE"), indexes)
    sizes = {"query": shape.rows, "key": shape.tokens}
    absent = {"special": not shape.special, "generated": not shape.generated}
    names = (name for name in _TOKENS if not absent.get(name))
    return out | {name: lay_out(ARRAYS[name], sizes) for name in names}


def feature_indexes(features: Mapping[str, int]) -> dict[str, ArrayLayout]:
    """Lay out the indexes of the dimensions of features, by number of latents by array."""
    names = {f"feature{name.removeprefix('features')}": size for name, size in features.items()}
    return {
        name: lay_out(ARRAYS["feature"], {"feature": size}, names={"feature": name})
        for name, size in names.items()
    }


# --- chunks and records ------------------------------------------------------------------------


def attention_chunk_rows(tokens: int, heads: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many rows of attention a chunk holds: fewer where rows are large."""
    return halved_rows(limits.queries, heads * min(tokens, limits.keys), limits)


def residual_chunk_rows(channels: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many tokens a chunk of the residual stream holds, each with all channels."""
    return halved_rows(limits.tokens, channels, limits)


def halved_rows(rows: int, row: int, limits: Limits) -> int:
    """Halve a number of rows until their numbers, `row` in each, stay within a chunk's limit."""
    while rows > 1 and rows * row > limits.attention:
        rows //= 2
    return rows


def feature_columns(features: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many features one chunk of features holds."""
    return min(features, limits.features)


def attention_rows(tokens: int, heads: int, dtype: str, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many rows of attention one record holds: whole chunks, within a bound."""
    step = attention_chunk_rows(tokens, heads, limits)
    return min(tokens, _record_rows(step, heads * tokens * itemsize(dtype), limits))


def feature_rows(tokens: int, features: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many tokens one record of features holds: whole chunks, within a bound."""
    # Records hold float32, whatever is stored.
    return min(tokens, _record_rows(limits.tokens, features * 4, limits))


def residual_rows(tokens: int, channels: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many tokens one record of residual holds: whole chunks, within a bound."""
    return min(tokens, _record_rows(residual_chunk_rows(channels, limits), channels * 4, limits))


def _record_rows(step: int, row_bytes: int, limits: Limits) -> int:
    """Return the most rows of a record, in chunks of `step`: eight each where they fit."""
    if _SMALL * step * row_bytes <= limits.record_bytes:
        step *= _SMALL
    return max(1, limits.record_bytes // (row_bytes * step)) * step


def round_up(size: int, multiple: int) -> int:
    """Round a size up to a multiple."""
    return -(-size // multiple) * multiple


def itemsize(dtype: str) -> int:
    """Return the bytes of a number."""
    return {"float16": 2, "bfloat16": 2, "float32": 4, "uint32": 4}[dtype]
