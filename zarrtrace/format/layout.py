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

#: How many of a token's strongest features ``top_feature`` and ``top_activation`` hold.
TOP_FEATURES = 32
#: How many continuations ``next_token`` holds at each position.
NEXT_TOKENS = 10
#: The arrays of continuations.
NEXT_TOKEN = ("next_token", "next_token_logprob", "next_token_text")
#: Stands for no feature and no token in arrays of ids.
NO_ID = 2**32 - 1

#: The group of a run that indexes its features; no scenario may be called so.
INDEX = "index"
#: How many tokens the index keeps of each feature.
INDEX_TOKENS = 20

#: Coordinates that are no index; a group's ``coordinates`` attribute names those it has.
# Text among the data would make Dataset.where() of plain xarray fail: it has no NaN.
LABELS = ("token_id", "key_token", "special", "generated", "query_token", "next_token_text")

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
        Of `attention`, `features` and `residual`.
    next_token
        Whether the most likely next tokens are stored.
    attention_layers, attention_positions
        How many layers and rows `attention` has, in dimensions of its own; None for those of all
        arrays.
    special
        Whether the tokens are known that the tokenizer calls special.
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
    sae_fields: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS

    @property
    def rows(self) -> int:
        """Size of the dimension ``query``."""
        return self.tokens if self.positions is None else self.positions


# --- the arrays of a trace ---------------------------------------------------------------------


class _Array(NamedTuple):
    """An array without the sizes of its dimensions."""

    dims: str
    dtype: str
    long_name: str
    description: str = ""
    fill_value: float | None = None
    codec: Codec = "plain"


_ARRAYS = {
    "attention": _Array(
        "layer head query key", "float32", "attention probability",
        "how much the query token attends to the key token, by query head", codec="shuffle"),
    "attention_mean": _Array(
        "layer query key", "float32", "attention probability, mean over heads", codec="shuffle"),
    "features": _Array("layer query feature", "float32", "SAE feature activation", codec="sparse"),
    "top_feature": _Array(
        "layer query feature_rank", "uint32", "strongest features of a token, strongest first",
        f"by magnitude; {NO_ID} where no further feature fires", NO_ID),
    "top_activation": _Array(
        "layer query feature_rank", "float32", "activations of the strongest features"),
    # Its bytes are shuffled: two of each value of a bfloat16 model are 0.
    "residual": _Array(
        "layer query channel", "float32", "residual stream",
        "at the hook point that the attribute residual_hook names", codec="shuffle"),
    "next_token": _Array(
        "query rank", "uint32", "most likely next tokens, most likely first", fill_value=NO_ID),
    "next_token_logprob": _Array(
        "query rank", "float32", "natural logarithm of the next token's probability"),
    "next_token_text": _Array("query rank", "string", "texts of the most likely next tokens"),
    "layer": _Array("layer", "int64", "index of the decoder block, from 0"),
    "head": _Array("head", "int64", "query head"),
    "attention_layer": _Array(
        "attention_layer", "int64", "decoder block that has attention, from 0"),
    "attention_query": _Array(
        "attention_query", "int64", "position of a token whose row of attention is stored"),
    "feature": _Array("feature", "int64", "index of the SAE's latent"),
    "channel": _Array("channel", "int64", "index of the residual stream's channel"),
    "query": _Array("query", "int64", "position of the token in the prompt"),
    "key": _Array("key", "int64", "position of the token in the prompt"),
    "token_id": _Array("key", "uint32", "id of the token in the model's vocabulary"),
    "key_token": _Array("key", "string", "text of the token"),
    "query_token": _Array("query", "string", "text of the token"),
    "special": _Array("key", "bool", "whether the tokenizer calls the token special"),
}  # fmt: skip
_TOKENS = ("query", "key", "token_id", "key_token", "query_token", "special")


# Value of what is not stored, by data type; 0 of others.
_MISSING: dict[str, float | str | bool] = {
    **dict.fromkeys(("float16", "float32", "float64"), math.nan), "string": "", "bool": False,
}  # fmt: skip


def _layout(
    array: _Array,
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
        out |= {name: _layout(_ARRAYS[name], sizes, {"query": 4096}) for name in NEXT_TOKEN}
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
        layout = _layout(_ARRAYS[name], sizes, steps, names=names, dtype=kind)
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
        layout = _layout(_ARRAYS[name], sizes, steps, names=names, dtype=dtype)
        out[f"{name}{suffix}"] = _in_files(layout, limits)
    return out


def _residual_layout(shape: TraceShape, channels: int) -> ArrayLayout:
    sizes = {"layer": shape.layers, "query": shape.rows, "channel": channels}
    steps = {"layer": 1, "query": residual_chunk_rows(channels, shape.limits)}
    layout = _layout(_ARRAYS["residual"], sizes, steps, dtype=shape.residual_dtype)
    return _in_files(layout, shape.limits)


def _in_files(layout: ArrayLayout, limits: Limits) -> ArrayLayout:
    """Cut an array that is written layer by layer into files: as many layers each as fit."""
    chunks, axis = layout.chunks, layout.row_axis
    shards = [_round_up(size, step) for size, step in zip(layout.shape, chunks, strict=True)]
    layer_bytes = math.prod(shards[1:]) * _itemsize(layout.dtype)
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
    out = {name: _layout(_ARRAYS[name], indexes) for name in indexes}
    out |= _feature_indexes(shape.features)
    for name in shape.sae_fields:
        out[name] = _layout(_Array("layer", "string", f"{name} of the layer's SAE"), indexes)
    sizes = {"query": shape.rows, "key": shape.tokens}
    names = (name for name in _TOKENS if shape.special or name != "special")
    return out | {name: _layout(_ARRAYS[name], sizes) for name in names}


def _feature_indexes(features: Mapping[str, int]) -> dict[str, ArrayLayout]:
    names = {f"feature{name.removeprefix('features')}": size for name, size in features.items()}
    return {
        name: _layout(_ARRAYS["feature"], {"feature": size}, names={"feature": name})
        for name, size in names.items()
    }


# --- the arrays of a table ---------------------------------------------------------------------


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
        Of `features` and `residual`.
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
    "features": _Array("layer sample feature", *_ARRAYS["features"][1:]),
    "residual": _Array("layer sample channel", *_ARRAYS["residual"][1:]),
    "next_token": _Array("sample rank", *_ARRAYS["next_token"][1:]),
    "next_token_logprob": _Array("sample rank", *_ARRAYS["next_token_logprob"][1:]),
    "next_token_text": _Array("sample rank", *_ARRAYS["next_token_text"][1:]),
}
_SAMPLE = {
    "scenario": "name of the scenario",
    "position": "position of the token in the prompt",
    "token": "text of the token",
    "token_id": "id of the token in the model's vocabulary",
    "span": "spans that hold the token",
    "tags": "tags of the scenario",
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
        layout = _layout(
            _TABLE["features"], all_sizes, steps, names=names, dtype=shape.feature_dtype
        )
        out[name] = _in_sample_files(layout, limits)
    if shape.channels is not None:
        all_sizes = {**sizes, "channel": shape.channels}
        steps = {"layer": 1, "sample": _halved(block, shape.channels, limits)}
        layout = _layout(_TABLE["residual"], all_sizes, steps, dtype=shape.residual_dtype)
        out["residual"] = _in_sample_files(layout, limits)
    if shape.next_token:
        rows = _round_up(limits.labels, block)
        for name in NEXT_TOKEN:
            layout = _layout(_TABLE[name], sizes, {"sample": block})
            rows_there = _round_up(max(1, shape.samples), layout.chunks[0])
            shards = (min(rows, rows_there), NEXT_TOKENS)
            out[name] = layout.model_copy(update={"shards": shards})
    return out | _table_coordinates(shape, sizes)


def _in_sample_files(layout: ArrayLayout, limits: Limits) -> ArrayLayout:
    """Cut an array into files that hold one layer of as many whole chunk rows as fit."""
    chunks = layout.chunks
    shards = [
        _round_up(max(1, size), step) for size, step in zip(layout.shape, chunks, strict=True)
    ]
    row_bytes = chunks[1] * shards[2] * _itemsize(layout.dtype)
    rows = max(1, limits.file_bytes // row_bytes) * chunks[1]
    return layout.model_copy(update={"shards": (1, min(shards[1], rows), shards[2])})


def _table_coordinates(shape: TableShape, sizes: Mapping[str, int]) -> dict[str, ArrayLayout]:
    indexes = {"layer": shape.layers}
    if shape.channels is not None:
        indexes["channel"] = shape.channels
    out = {name: _layout(_ARRAYS[name], indexes) for name in indexes}
    out |= _feature_indexes(shape.features)
    for name in shape.sae_fields:
        out[name] = _layout(_Array("layer", "string", f"{name} of the layer's SAE"), indexes)
    for name, dtype in shape.coordinates.items():
        said = _SAMPLE.get(name, f"{name} of the scenario")
        if name.startswith("option_"):
            said = "id of the option's first token; -1 if the scenario has none"
        array = _Array("sample", dtype, said)
        out[name] = _layout(array, sizes, {"sample": shape.limits.labels})
    return out


# --- chunks and records ------------------------------------------------------------------------


def attention_chunk_rows(tokens: int, heads: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many rows of attention a chunk holds: fewer where rows are large."""
    return _halved(limits.queries, heads * min(tokens, limits.keys), limits)


def residual_chunk_rows(channels: int, limits: Limits = DEFAULT_LIMITS) -> int:
    """Return how many tokens a chunk of the residual stream holds, each with all channels."""
    return _halved(limits.tokens, channels, limits)


def _halved(rows: int, row: int, limits: Limits) -> int:
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
    return min(tokens, _record_rows(step, heads * tokens * _itemsize(dtype), limits))


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


# --- the index of a run ------------------------------------------------------------------------

# One feature is looked up: what is decoded for it stays small.
_INDEX_STEPS = {"layer": 1, "feature": 1024, "scenario": 1024}
_INDEX = {
    "maximum": _Array("layer feature", "float32", "largest activation"),
    "mean": _Array("layer feature", "float32", "mean activation over all tokens"),
    "frequency": _Array(
        "layer feature", "float32", "fraction of tokens at which the feature fires"),
    "token_activation": _Array(
        "layer feature token_rank", "float32",
        "activations at the strongest tokens, strongest first"),
    "token_scenario": _Array("layer feature token_rank", "uint32", "numbers of their scenarios"),
    "token_position": _Array("layer feature token_rank", "uint32", "their positions in the prompt"),
    "active": _Array("layer feature", "int64", "number of tokens at which the feature fires"),
    "total": _Array(
        "layer feature part", "int64", "sum of activations, in units of 2**-18 and of 2**-50"),
    "tokens": _Array("layer", "int64", "number of tokens that were seen"),
}  # fmt: skip
_SCENARIOS = {
    "scenario": _Array("scenario", "string", "name of the scenario, in the run's order"),
    "digest": _Array("scenario", "uint64", "of the scenario's features; 0 if they are not indexed"),
}


def index_layout(
    layers: int, features: Mapping[str, int], scenarios: int
) -> dict[str, ArrayLayout]:
    """Lay out every array of a run's index, those without features last.

    Parameters
    ----------
    layers, scenarios
        Their numbers.
    features
        Number of latents by array of the traces (``features``, ``features_NAME``).

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
            layout = _layout(found, {**sizes, "feature": size}, _INDEX_STEPS, names=names)
            if len(layout.dims) > 1:  # one file a layer, because layers are written apart
                _, step, *more = layout.chunks
                files = {"shards": (1, _round_up(size, step), *more)}
                layout = layout.model_copy(update=files)
            out[f"{array}{suffix}"] = layout
    out |= _feature_indexes(features)
    out["layer"] = _layout(_ARRAYS["layer"], sizes)
    return out | {name: _layout(one, sizes, _INDEX_STEPS) for name, one in _SCENARIOS.items()}


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _itemsize(dtype: str) -> int:
    return {"float16": 2, "float32": 4, "uint32": 4}[dtype]
