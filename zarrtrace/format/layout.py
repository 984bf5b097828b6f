"""Layout of arrays on disk: names, dimensions, data types, chunks and files.

schema/README.md has the measurements behind the chunk shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
Codec = Literal["attention", "sparse", "plain"]


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
        Most that a chunk has along these dimensions: of `attention`, and of `features`.
    attention
        Numbers that a chunk of `attention` stays within: `queries` is halved until it does.
    """

    file_bytes: int = 2**29
    record_bytes: int = 2**26
    keys: int = 1024
    queries: int = 32
    tokens: int = 64
    features: int = 4096
    attention: int = 160 * 1024


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


#: Dimensions of token positions along which a layer may be written in parts.
ROWS = ("query", "attention_query")


@dataclass(frozen=True)
class TraceShape:
    """The sizes that decide a trace's layout.

    Attributes
    ----------
    layers, tokens
        Numbers of layers and of the prompt's tokens.
    heads
        Query heads; None for a trace without attention.
    features
        Numbers of latents by array (``features``, ``features_NAME``); empty for none.
    attention_dtype, feature_dtype
        Of `attention` and `features`.
    next_token
        Whether the most likely next tokens are stored.
    attention_layers, attention_queries
        How many layers and rows `attention` has if not all; None for all.
    special
        Whether the tokens are known that the tokenizer calls special.
    sae_fields
        Coordinates along `layer` that say more of each SAE.
    """

    layers: int
    tokens: int
    heads: int | None = None
    features: Mapping[str, int] = field(default_factory=dict)
    attention_dtype: str | None = None
    feature_dtype: str | None = None
    next_token: bool = True
    attention_layers: int | None = None
    attention_queries: int | None = None
    special: bool = True
    sae_fields: tuple[str, ...] = ()
    limits: Limits = field(default_factory=lambda: DEFAULT_LIMITS)


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
        out |= _feature_layouts(name, shape, features)
    if shape.next_token:
        out |= _next_token_layouts(shape.tokens)
    return out | _coordinate_layouts(shape)


# --- arrays by layer ---------------------------------------------------------------------------


def _attention_layouts(shape: TraceShape, heads: int) -> dict[str, ArrayLayout]:
    limits, tokens = shape.limits, shape.tokens
    dtype = shape.attention_dtype or "float32"
    layer = "layer" if shape.attention_layers is None else "attention_layer"
    query = "query" if shape.attention_queries is None else "attention_query"
    layers = shape.layers if shape.attention_layers is None else shape.attention_layers
    rows = tokens if shape.attention_queries is None else shape.attention_queries
    keys = min(tokens, limits.keys)
    step = attention_chunk_rows(tokens, heads, limits)
    record_rows = attention_rows(tokens, heads, dtype, limits)
    return {
        "attention": _by_layer(
            dims=(layer, "head", query, "key"),
            dtype=dtype,
            shape=(layers, heads, rows, tokens),
            chunks=(1, heads, min(rows, step), keys),
            limits=limits,
            codec="attention",
            attributes={
                "long_name": "attention probability",
                "description": "how much the query token attends to the key token, by query head",
            },
        ),
        "attention_mean": _by_layer(
            dims=(layer, query, "key"),
            dtype="float32",
            shape=(layers, rows, tokens),
            chunks=(1, min(rows, _SMALL * step, record_rows), keys),
            limits=limits,
            codec="attention",
            attributes={"long_name": "attention probability, mean over heads"},
        ),
    }


def attention_chunk_rows(tokens: int, heads: int, limits: Limits | None = None) -> int:
    """Return how many rows of attention a chunk holds: fewer where rows are large."""
    limits = limits or DEFAULT_LIMITS
    row, rows = heads * min(tokens, limits.keys), limits.queries
    while rows > 1 and rows * row > limits.attention:
        rows //= 2
    return rows


def _feature_layouts(name: str, shape: TraceShape, features: int) -> dict[str, ArrayLayout]:
    limits, suffix = shape.limits, name.removeprefix("features")
    layers, tokens = shape.layers, shape.tokens
    ranks = min(TOP_FEATURES, features)
    top_dims = ("layer", "query", f"feature_rank{suffix}")
    top_rows = min(_SMALL * limits.tokens, feature_rows(tokens, features, limits))
    top_shape, top_chunks = (layers, tokens, ranks), (1, top_rows, ranks)
    return {
        name: _by_layer(
            dims=("layer", "query", f"feature{suffix}"),
            dtype=shape.feature_dtype or "float32",
            shape=(layers, tokens, features),
            chunks=(1, min(tokens, limits.tokens), feature_columns(features, limits)),
            limits=limits,
            codec="sparse",
            attributes={"long_name": "SAE feature activation"},
        ),
        f"top_feature{suffix}": _by_layer(
            dims=top_dims,
            dtype="uint32",
            shape=top_shape,
            chunks=top_chunks,
            limits=limits,
            fill_value=NO_ID,
            attributes={
                "long_name": "strongest features of a token, strongest first",
                "description": f"by magnitude; {NO_ID} where no further feature fires",
            },
        ),
        f"top_activation{suffix}": _by_layer(
            dims=top_dims,
            dtype="float32",
            shape=top_shape,
            chunks=top_chunks,
            limits=limits,
            attributes={"long_name": "activations of the strongest features"},
        ),
    }


def feature_columns(features: int, limits: Limits | None = None) -> int:
    """Return how many features one chunk of features holds."""
    return min(features, (limits or DEFAULT_LIMITS).features)


def _by_layer(
    *,
    dims: tuple[str, ...],
    dtype: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    limits: Limits,
    attributes: dict[str, str],
    codec: Codec = "plain",
    fill_value: float = math.nan,
) -> ArrayLayout:
    """Lay out an array that is written layer by layer: as many layers a file as fit."""
    whole = [_round_up(size, step) for size, step in zip(shape, chunks, strict=True)]
    layer_bytes = math.prod(whole[1:]) * _itemsize(dtype)
    layers = max(1, min(shape[0], limits.file_bytes // layer_bytes))
    axis = next(at for at, dim in enumerate(dims) if dim in ROWS)
    rows = whole[axis]
    if layer_bytes > limits.file_bytes:
        chunk_rows = layer_bytes // rows * chunks[axis]
        rows = min(rows, max(1, limits.file_bytes // chunk_rows) * chunks[axis])
    shards = (layers, *whole[1:axis], rows, *whole[axis + 1 :])
    return ArrayLayout(
        dims=dims,
        dtype=dtype,
        shape=shape,
        chunks=chunks,
        shards=shards,
        codec=codec,
        fill_value=fill_value,
        attributes=attributes,
    )


def attention_rows(tokens: int, heads: int, dtype: str, limits: Limits | None = None) -> int:
    """Return how many rows of attention one record holds: whole chunks, within a bound."""
    limits = limits or DEFAULT_LIMITS
    step = attention_chunk_rows(tokens, heads, limits)
    return min(tokens, _record_rows(step, heads * tokens * _itemsize(dtype), limits))


def feature_rows(tokens: int, features: int, limits: Limits | None = None) -> int:
    """Return how many tokens one record of features holds: whole chunks, within a bound."""
    limits = limits or DEFAULT_LIMITS
    # Records hold float32, whatever is stored.
    return min(tokens, _record_rows(limits.tokens, features * 4, limits))


def _record_rows(step: int, row_bytes: int, limits: Limits) -> int:
    """Return the most rows of a record, in chunks of `step`: eight each where they fit."""
    if _SMALL * step * row_bytes <= limits.record_bytes:
        step *= _SMALL
    return max(1, limits.record_bytes // (row_bytes * step)) * step


# --- other arrays ------------------------------------------------------------------------------


def _next_token_layouts(tokens: int) -> dict[str, ArrayLayout]:
    def layout(dtype: str, fill_value: float | str, long_name: str) -> ArrayLayout:
        return ArrayLayout(
            dims=("query", "rank"),
            dtype=dtype,
            shape=(tokens, NEXT_TOKENS),
            chunks=(min(tokens, 4096), NEXT_TOKENS),
            fill_value=fill_value,
            attributes={"long_name": long_name},
        )

    return {
        "next_token": layout("uint32", NO_ID, "most likely next tokens, most likely first"),
        "next_token_logprob": layout(
            "float32", math.nan, "natural logarithm of the next token's probability"
        ),
        "next_token_text": layout("string", "", "texts of the most likely next tokens"),
    }


def _index_layout(dim: str, size: int, long_name: str) -> ArrayLayout:
    """Lay out the index of a dimension."""
    return _label_layout(dim, size, "int64", long_name)


def _label_layout(dim: str, size: int, dtype: str, long_name: str) -> ArrayLayout:
    """Lay out a coordinate of one dimension, in one chunk."""
    return ArrayLayout(
        dims=(dim,),
        dtype=dtype,
        shape=(size,),
        chunks=(max(size, 1),),
        fill_value={"string": "", "bool": False}.get(dtype, 0),
        attributes={"long_name": long_name},
    )


def _coordinate_layouts(shape: TraceShape) -> dict[str, ArrayLayout]:
    layers, tokens = shape.layers, shape.tokens
    out = {"layer": _index_layout("layer", layers, "index of the decoder block, from 0")}
    if shape.heads is not None:
        out["head"] = _index_layout("head", shape.heads, "query head")
        if shape.attention_layers is not None:
            out["attention_layer"] = _index_layout(
                "attention_layer",
                shape.attention_layers,
                "decoder block that has attention, from 0",
            )
        if shape.attention_queries is not None:
            out["attention_query"] = _index_layout(
                "attention_query",
                shape.attention_queries,
                "position of a token whose row of attention is stored",
            )
    for name, size in shape.features.items():
        dim = f"feature{name.removeprefix('features')}"
        out[dim] = _index_layout(dim, size, "index of the SAE's latent")
    for name in shape.sae_fields:
        out[name] = _label_layout("layer", layers, "string", f"{name} of the layer's SAE")
    out["query"] = _index_layout("query", tokens, "position of the token in the prompt")
    out["key"] = _index_layout("key", tokens, "position of the token in the prompt")
    labels = {
        "token_id": ("key", "uint32", "id of the token in the model's vocabulary"),
        "key_token": ("key", "string", "text of the token"),
        "query_token": ("query", "string", "text of the token"),
    }
    if shape.special:
        labels["special"] = ("key", "bool", "whether the tokenizer calls the token special")
    for name, (dim, dtype, long_name) in labels.items():
        out[name] = _label_layout(dim, tokens, dtype, long_name)
    return out


# --- the index of a run ------------------------------------------------------------------------

# One feature is looked up: what is decoded for it stays small.
_FEATURES_PER_INDEX_CHUNK = 1024
_SCENARIOS_PER_CHUNK = 1024


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
    for name, size in features.items():
        out |= _index_layouts(name.removeprefix("features"), layers, size)
    for name, size in features.items():
        dim = f"feature{name.removeprefix('features')}"
        out[dim] = _index_layout(dim, size, "index of the SAE's latent")

    def by_scenario(dtype: str, long_name: str) -> ArrayLayout:
        layout = _label_layout("scenario", scenarios, dtype, long_name)
        chunks = (min(max(scenarios, 1), _SCENARIOS_PER_CHUNK),)
        return layout.model_copy(update={"chunks": chunks})

    return out | {
        "layer": _index_layout("layer", layers, "index of the decoder block, from 0"),
        "scenario": by_scenario("string", "name of the scenario, in the run's order"),
        "digest": by_scenario("uint64", "of the scenario's features; 0 if they are not indexed"),
    }


def _index_layouts(suffix: str, layers: int, size: int) -> dict[str, ArrayLayout]:
    """Lay out what is known of each feature: one file a layer, for layers are written apart."""
    dims = ("layer", f"feature{suffix}")
    width = min(size, _FEATURES_PER_INDEX_CHUNK)
    whole = _round_up(size, width)

    def layout(dtype: str, long_name: str, dim: str = "", more: int = 0) -> ArrayLayout:
        tail = (more,) if dim else ()
        return ArrayLayout(
            dims=(*dims, dim) if dim else dims,
            dtype=dtype,
            shape=(layers, size, *tail),
            chunks=(1, width, *tail),
            shards=(1, whole, *tail),
            fill_value=math.nan if dtype == "float32" else 0,
            attributes={"long_name": long_name},
        )

    rank = ("token_rank", INDEX_TOKENS)
    tokens = ArrayLayout(
        dims=dims[:1],
        dtype="int64",
        shape=(layers,),
        chunks=(1,),
        attributes={"long_name": "number of tokens that were seen"},
    )
    return {
        f"maximum{suffix}": layout("float32", "largest activation"),
        f"mean{suffix}": layout("float32", "mean activation over all tokens"),
        f"frequency{suffix}": layout("float32", "fraction of tokens at which the feature fires"),
        f"token_activation{suffix}": layout(
            "float32", "activations at the strongest tokens, strongest first", *rank
        ),
        f"token_scenario{suffix}": layout("uint32", "numbers of their scenarios", *rank),
        f"token_position{suffix}": layout("uint32", "their positions in the prompt", *rank),
        f"active{suffix}": layout("int64", "number of tokens at which the feature fires"),
        f"total{suffix}": layout(
            "int64", "sum of activations, in units of 2**-18 and of 2**-50", "part", 2
        ),
        f"tokens{suffix}": tokens,
    }


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _itemsize(dtype: str) -> int:
    return {"float16": 2, "float32": 4, "uint32": 4}[dtype]
