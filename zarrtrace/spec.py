"""The on-disk format: names, dimensions, dtypes, chunks and attributes as frozen values.

Nothing here touches a disk. :mod:`zarrtrace.store` writes what this module describes, and
``schema/`` holds what this module generates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

#: Version of the on-disk format that this code writes. Older versions stay readable.
FORMAT_VERSION = 1

#: The attribute of a Zarr group under which everything of ours lives.
NAMESPACE = "zarrtrace"

#: How many of a token's strongest features ``top_feature`` and ``top_activation`` index.
TOP_FEATURES = 32
#: How many continuations ``next_token`` holds at each position.
NEXT_TOKENS = 10

#: The group of a run that indexes its features; no scenario may be called so.
INDEX = "index"
#: How many tokens the index keeps of each feature.
INDEX_TOKENS = 20

#: Compression level of attention.
ATTENTION_LEVEL = 1
#: Bytes that it compresses at once: a chunk, or a quarter of a large one. Left to itself, Blosc
#: takes 32 KiB, which costs a third more time, twice as much to read, and 3 % more room.
ATTENTION_BLOCK = 2**19
#: Compression level of features, and of those in runs that were begun token by token.
FEATURES_LEVEL, FEATURES_LEVEL_BY_TOKEN = 1, -5
#: Chunks of features are compressed feature by feature: one that fires often does so at tokens that
#: follow each other, and what never fires is one run of zeros.
FEATURES_ORDER = (0, 2, 1)

# Shards stay below this size, dense: one writer holds at most a few of them.
_MAX_SHARD_BYTES = 64 * 2**20
_MAX_KEYS_PER_CHUNK = 256
_FEATURES_PER_CHUNK = 4096
_TOKENS_PER_CHUNK = 64
# One feature is looked up: what is decoded for it stays small.
_FEATURES_PER_INDEX_CHUNK = 1024
_SCENARIOS_PER_CHUNK = 1024
# One row is often read, and all of its chunk is decoded for it; of a long prompt, chunks must not
# be too many.
_QUERIES_PER_CHUNK = 16
_QUERIES_PER_SHORT_CHUNK = 8


class Frozen(BaseModel):
    """A value that never changes and refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- attributes --------------------------------------------------------------------------------


Blake2b = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class SpanAttributes(Frozen):
    """Where a span is."""

    characters: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = Field(
        description="Character ranges [start, end) of the prompt; empty if not known."
    )
    tokens: tuple[NonNegativeInt, ...] = Field(description="Token positions: labels of `query`.")


class OptionAttributes(Frozen):
    """A named continuation whose probability matters."""

    text: str
    token_id: NonNegativeInt = Field(description="Its first token.")


class ModelAttributes(Frozen):
    """The language model that was traced."""

    id: str
    revision: str | None = Field(description="Commit of the weights, if they came from a hub.")
    fingerprint: Blake2b | None = Field(
        default=None, description="Hash of names, shapes and some values of the loaded weights."
    )
    architecture: str = Field(description="Class name in transformers.")
    n_layers: PositiveInt
    n_heads: PositiveInt = Field(description="Query heads.")
    d_model: PositiveInt
    dtype: str
    attn_implementation: str
    softmax_dtype: str = Field(description="Precision in which attention probabilities were made.")
    tokenizer: str = Field(description="Class of the tokenizer.")
    prepend_bos: bool
    quantization: str | None = Field(default=None, description="Method, if weights are quantised.")


class SAEAttributes(Frozen):
    """The sparse autoencoder of one layer."""

    layer: NonNegativeInt
    variable: str = Field(default="features", description="The array its latents are in.")
    release: str | None
    id: str
    revision: str | None = Field(
        default=None, description="Commit of the weights, if they came from a hub."
    )
    fingerprint: Blake2b | None = Field(
        default=None,
        description="Hash of names, shapes and some values of the weights, if they came from a "
        "folder.",
    )
    hook_name: str
    architecture: str
    d_in: PositiveInt
    d_sae: PositiveInt
    dtype: str = Field(description="Precision of the encoder's arithmetic.")
    decoder_norm_folded: bool


_SEAL = (
    "BLAKE2b (8 bytes) of the other attributes here, as JSON with sorted keys, no spaces and ASCII "
    "alone; null if whoever wrote them did not say."
)


class Stored(Frozen):
    """What one array wrote for one layer: its files, taken together in the order of their keys."""

    bytes: NonNegativeInt
    blake2b: Blake2b


class TraceAttributes(Frozen):
    """Everything a trace says of itself, under the attribute ``zarrtrace`` of its group."""

    format_version: Literal[1] = 1
    kind: Literal["trace"] = "trace"
    scenario: str
    prompt: str | None
    tags: tuple[str, ...] = ()
    spans: dict[str, SpanAttributes]
    options: dict[str, OptionAttributes] = {}
    model: ModelAttributes | None = Field(description="Null if imported from NPZ files.")
    saes: tuple[SAEAttributes, ...] = ()
    layers: tuple[NonNegativeInt, ...]
    layers_without_sae: tuple[NonNegativeInt, ...] = ()
    layers_without_attention: dict[str, str] = Field(
        default_factory=dict,
        description="Layers whose block has no attention matrix, with the reason. If there are "
        "any, `attention` has a dimension `attention_layer` of its own.",
    )
    queries: tuple[NonNegativeInt, ...] | None = Field(
        default=None,
        description="Rows of `attention` that are stored; null for all. The others read as NaN.",
    )
    attention_dtype: Literal["float16", "float32"] | None = Field(
        description="Null if attention was not asked for."
    )
    attention_keepbits: Annotated[int, Field(ge=1, le=23)] | None = Field(
        default=None, description="Bits of the mantissa that `attention` keeps; null for all."
    )
    feature_dtype: Literal["float16", "float32"] | None = Field(
        description="Null if features were not asked for."
    )
    versions: dict[str, str] = Field(
        description="Libraries the trace was made with; if others completed it, both versions, as "
        "in '2.4.0, 2.13.0'."
    )
    complete: bool = Field(default=False, description="Whether every layer is stored.")
    stored: dict[str, dict[str, Stored]] = Field(
        default_factory=dict,
        description="Journal: what each array wrote, by layer; under 'tokens' for the next-token "
        "arrays, under 'coordinates' for the one-dimensional ones and under 'metadata' for each "
        "array's zarr.json. A layer that is not here is not stored.",
    )
    nonfinite: tuple[str, ...] = Field(
        default=(),
        description="Keys of `stored` whose arrays hold NaN or infinity: the model computed them, "
        "or values exceed the stored precision.",
    )
    blake2b: Blake2b | None = Field(default=None, description=_SEAL)

    def index_of(self, layer: int, dim: str) -> int:
        """Return where a layer is along the first dimension of an array."""
        if dim != "attention_layer":
            return self.layers.index(layer)
        with_attention = [n for n in self.layers if str(n) not in self.layers_without_attention]
        return with_attention.index(layer)

    @property
    def complete_layers(self) -> tuple[int, ...]:
        """Layers whose every array is stored."""
        return tuple(layer for layer in self.layers if str(layer) in self.stored)

    @property
    def missing_layers(self) -> tuple[int, ...]:
        """Layers that were asked for and are not stored."""
        return tuple(layer for layer in self.layers if str(layer) not in self.stored)


class RunAttributes(Frozen):
    """Everything a run says of itself, under the attribute ``zarrtrace`` of its group."""

    format_version: Literal[1] = 1
    kind: Literal["run"] = "run"
    scenarios: tuple[str, ...] = Field(description="Names of the traces, in the suite's order.")
    config: dict[str, Any] = Field(description="What was asked for; a resumed run must ask again.")
    complete: bool = False
    blake2b: Blake2b | None = Field(default=None, description=_SEAL)


class IndexAttributes(Frozen):
    """Everything a run's index says of itself, under the attribute ``zarrtrace`` of its group."""

    format_version: Literal[1] = 1
    kind: Literal["index"] = "index"
    layers: tuple[NonNegativeInt, ...] = Field(description="Index of the dimension `layer`.")
    features: dict[str, PositiveInt] = Field(
        description="Number of latents by array of the traces that is indexed."
    )
    scenarios: NonNegativeInt = Field(description="How many the run has.")
    indexed: NonNegativeInt = Field(description="How many of them are in the index.")
    stored: dict[str, dict[str, Stored]] = Field(
        description="What each array wrote, by layer; under 'coordinates' for those without "
        "layers and under 'metadata' for each array's zarr.json."
    )
    blake2b: Blake2b | None = Field(default=None, description=_SEAL)


# --- arrays ------------------------------------------------------------------------------------

Codec = Literal["attention", "sparse", "sparse_by_token", "plain"]


class ArrayLayout(Frozen):
    """How one array is laid out on disk."""

    model_config = ConfigDict(allow_inf_nan=True)

    dims: tuple[str, ...]
    dtype: str
    shape: tuple[NonNegativeInt, ...]
    chunks: tuple[PositiveInt, ...]
    shards: tuple[PositiveInt, ...] | None = None
    codec: Codec = "plain"
    fill_value: bool | float | int | str = 0
    skip_empty: bool = Field(
        default=False, description="Whether chunks that equal the fill value are left out."
    )
    attributes: dict[str, str] = {}


@dataclass(frozen=True)
class TraceShape:
    """The sizes that decide a trace's layout."""

    layers: int
    tokens: int
    heads: int | None = None
    features: Mapping[str, int] = field(default_factory=dict)
    attention_dtype: str | None = None
    feature_dtype: str | None = None
    next_token: bool = True
    #: Layers that have attention; None for all.
    attention_layers: int | None = None
    #: Whether only some rows of attention are stored.
    chosen_queries: bool = False


def trace_layout(shape: TraceShape) -> dict[str, ArrayLayout]:
    """Layout of every array of a trace, coordinates last.

    Parameters
    ----------
    shape
        ``heads`` is None for a trace without attention; ``features`` holds the number of latents
        by array name (``features``, ``features_<name>``) and is empty for one without.

    Returns
    -------
    dict
        :class:`ArrayLayout` by array name.
    """
    layers, tokens = shape.layers, shape.tokens
    out: dict[str, ArrayLayout] = {}
    if shape.heads is not None:
        out |= _attention_layouts(shape, shape.heads)
    for name, features in shape.features.items():
        out |= _feature_layouts(name, layers, tokens, features, shape.feature_dtype or "float32")
    if shape.next_token:
        out |= _next_token_layouts(tokens)
    return out | _coordinate_layouts(shape)


def _attention_layouts(shape: TraceShape, heads: int) -> dict[str, ArrayLayout]:
    tokens, dtype = shape.tokens, shape.attention_dtype or "float32"
    separate = shape.attention_layers is not None
    layer = "attention_layer" if separate else "layer"
    layers = shape.attention_layers if shape.attention_layers is not None else shape.layers
    keys = min(tokens, _MAX_KEYS_PER_CHUNK)
    all_keys = _round_up(tokens, keys)
    rows = attention_rows(tokens, heads, dtype)
    chunks, shards = (1, heads, _queries_per_chunk(tokens), keys), (1, heads, rows, all_keys)
    mean = (1, min(tokens, rows), min(tokens, 1024))
    if shape.chosen_queries:  # one file a row: what is not chosen takes no space
        chunks, mean = (1, heads, 1, tokens), (1, 1, tokens)
    # Tiles above the diagonal are all zero; where there are any, they are not stored.
    sparse = tokens > keys and not shape.chosen_queries
    return {
        "attention": ArrayLayout(
            dims=(layer, "head", "query", "key"),
            dtype=dtype,
            shape=(layers, heads, tokens, tokens),
            chunks=chunks,
            shards=None if shape.chosen_queries else shards,
            codec="attention",
            fill_value=0.0 if sparse else math.nan,
            skip_empty=sparse,
            attributes={
                "long_name": "attention probability",
                "description": "how much the query token attends to the key token, by query head",
            },
        ),
        "attention_mean": ArrayLayout(
            dims=(layer, "query", "key"),
            dtype="float32",
            shape=(layers, tokens, tokens),
            chunks=mean,
            codec="attention",
            fill_value=math.nan,
            attributes={"long_name": "attention probability, mean over heads"},
        ),
    }


def attention_rows(tokens: int, heads: int, dtype: str) -> int:
    """Return how many rows of attention one shard holds."""
    queries = _queries_per_chunk(tokens)
    all_keys = _round_up(tokens, min(tokens, _MAX_KEYS_PER_CHUNK))
    return _rows_per_shard(tokens, queries, heads * all_keys * _itemsize(dtype))


def _queries_per_chunk(tokens: int) -> int:
    short = tokens <= _MAX_KEYS_PER_CHUNK
    return min(tokens, _QUERIES_PER_SHORT_CHUNK if short else _QUERIES_PER_CHUNK)


def feature_rows(tokens: int, features: int, dtype: str = "float32") -> int:
    """Return how many tokens one shard of features holds."""
    all_features = _round_up(features, feature_columns(features))
    return _rows_per_shard(tokens, min(tokens, _TOKENS_PER_CHUNK), all_features * _itemsize(dtype))


def feature_columns(features: int) -> int:
    """Return how many features one chunk of features holds."""
    return min(features, _FEATURES_PER_CHUNK)


def _feature_layouts(
    name: str, layers: int, tokens: int, features: int, dtype: str
) -> dict[str, ArrayLayout]:
    rows = min(tokens, _TOKENS_PER_CHUNK)
    width = feature_columns(features)
    all_features = _round_up(features, width)
    suffix = name.removeprefix("features")
    return {
        name: ArrayLayout(
            dims=("layer", "query", f"feature{suffix}"),
            dtype=dtype,
            shape=(layers, tokens, features),
            chunks=(1, rows, width),
            shards=(1, feature_rows(tokens, features, dtype), all_features),
            codec="sparse",
            fill_value=math.nan,
            attributes={"long_name": "SAE feature activation"},
        ),
        f"top_feature{suffix}": ArrayLayout(
            dims=("layer", "query", f"feature_rank{suffix}"),
            dtype="uint32",
            shape=(layers, tokens, min(TOP_FEATURES, features)),
            chunks=(
                1,
                min(tokens, feature_rows(tokens, features, dtype)),
                min(TOP_FEATURES, features),
            ),
            attributes={
                "long_name": "strongest features of a token, strongest first",
                "description": "valid where the activation of the same rank is above 0",
            },
        ),
        f"top_activation{suffix}": ArrayLayout(
            dims=("layer", "query", f"feature_rank{suffix}"),
            dtype="float32",
            shape=(layers, tokens, min(TOP_FEATURES, features)),
            chunks=(
                1,
                min(tokens, feature_rows(tokens, features, dtype)),
                min(TOP_FEATURES, features),
            ),
            fill_value=math.nan,
            attributes={"long_name": "activations of the strongest features"},
        ),
    }


def _next_token_layouts(tokens: int) -> dict[str, ArrayLayout]:
    shape, chunks = (tokens, NEXT_TOKENS), (min(tokens, 4096), NEXT_TOKENS)
    dims = ("query", "rank")
    return {
        "next_token": ArrayLayout(
            dims=dims,
            dtype="uint32",
            shape=shape,
            chunks=chunks,
            attributes={"long_name": "most likely next tokens, most likely first"},
        ),
        "next_token_logprob": ArrayLayout(
            dims=dims,
            dtype="float32",
            shape=shape,
            chunks=chunks,
            fill_value=math.nan,
            attributes={"long_name": "natural logarithm of the next token's probability"},
        ),
    }


def _coordinate_layouts(shape: TraceShape) -> dict[str, ArrayLayout]:
    layers, tokens, heads = shape.layers, shape.tokens, shape.heads

    def index(dim: str, size: int, long_name: str) -> ArrayLayout:
        return ArrayLayout(
            dims=(dim,),
            dtype="int64",
            shape=(size,),
            chunks=(max(size, 1),),
            attributes={"long_name": long_name},
        )

    def text(dim: str) -> ArrayLayout:
        return ArrayLayout(
            dims=(dim,),
            dtype="string",
            shape=(tokens,),
            chunks=(tokens,),
            fill_value="",
            attributes={"long_name": f"text of the {dim} token"},
        )

    out = {"layer": index("layer", layers, "index of the decoder block, from 0")}
    if heads is not None:
        out["head"] = index("head", heads, "query head")
        out["key"] = index("key", tokens, "position of the token attended to")
        out["key_token"] = text("key")
    if heads is not None and shape.attention_layers is not None:
        out["attention_layer"] = index(
            "attention_layer", shape.attention_layers, "decoder block that has attention, from 0"
        )
    if heads is not None and shape.chosen_queries:
        out["has_attention"] = ArrayLayout(
            dims=("query",),
            dtype="bool",
            shape=(tokens,),
            chunks=(tokens,),
            fill_value=False,
            attributes={"long_name": "whether this row of attention is stored"},
        )
    for name, size in shape.features.items():
        dim = f"feature{name.removeprefix('features')}"
        out[dim] = index(dim, size, "index of the SAE's latent")
    return out | {
        "query": index("query", tokens, "position of the token that attends"),
        "query_token": text("query"),
        "token_id": ArrayLayout(
            dims=("query",),
            dtype="uint32",
            shape=(tokens,),
            chunks=(tokens,),
            attributes={"long_name": "id of the query token in the model's vocabulary"},
        ),
    }


def index_layout(
    layers: int, features: Mapping[str, int], scenarios: int
) -> dict[str, ArrayLayout]:
    """Layout of every array of a run's index, those without features last.

    Parameters
    ----------
    layers, scenarios
        Their numbers.
    features
        Number of latents by array of the traces (``features``, ``features_<name>``).

    Returns
    -------
    dict
        :class:`ArrayLayout` by array name.
    """
    out: dict[str, ArrayLayout] = {}
    for name, size in features.items():
        out |= _index_layouts(name.removeprefix("features"), layers, size)

    def by_scenario(dtype: str, long_name: str) -> ArrayLayout:
        return ArrayLayout(
            dims=("scenario",),
            dtype=dtype,
            shape=(scenarios,),
            chunks=(min(max(scenarios, 1), _SCENARIOS_PER_CHUNK),),
            fill_value="" if dtype == "string" else 0,
            attributes={"long_name": long_name},
        )

    def labels(dim: str, size: int, long_name: str) -> ArrayLayout:
        return ArrayLayout(
            dims=(dim,),
            dtype="int64",
            shape=(size,),
            chunks=(max(size, 1),),
            attributes={"long_name": long_name},
        )

    for name, size in features.items():
        dim = f"feature{name.removeprefix('features')}"
        out[dim] = labels(dim, size, "index of the SAE's latent")
    return out | {
        "layer": labels("layer", layers, "index of the decoder block, from 0"),
        "scenario": by_scenario("string", "name of the scenario, in the run's order"),
        "digest": by_scenario("uint64", "of the scenario's features; 0 if they are not indexed"),
    }


def _index_layouts(suffix: str, layers: int, size: int) -> dict[str, ArrayLayout]:
    """Layouts of what is known of each feature."""
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
        f"maximum{suffix}": layout("float32", "activation of largest magnitude"),
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


#: Coordinates that are not an index; a group's ``coordinates`` attribute names those it has.
LABELS = ("query_token", "key_token", "token_id", "has_attention")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _rows_per_shard(rows: int, rows_per_chunk: int, row_bytes: int) -> int:
    """Rows of a shard: all of them, or as many whole chunks as stay below the bound."""
    fitting = max(1, _MAX_SHARD_BYTES // (row_bytes * rows_per_chunk)) * rows_per_chunk
    return min(_round_up(rows, rows_per_chunk), fitting)


def _itemsize(dtype: str) -> int:
    return {"float16": 2, "float32": 4}[dtype]


def ranges(layers: Sequence[int]) -> str:
    """Write layers for people: ``1, 2, 3, 7`` as ``1-3,7``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts)


# --- what capture yields and the writer takes --------------------------------------------------


@dataclass(frozen=True)
class Nonzeros:
    """What is not 0 of an array ``(query, feature)``: a hundredth of it, and often less.

    It comes by blocks of columns, as wide as the chunks of the array that it goes to.

    Attributes
    ----------
    shape
        Of the array.
    columns
        Width of a block; the last one of the array may be narrower.
    at
        Of each block, places ``row * columns + column`` ``(n,)``, ascending.
    values
        Of each block, what is there ``(n,)``.
    """

    shape: tuple[int, int]
    columns: int
    at: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    @property
    def ndim(self) -> int:
        """How many dimensions the array has."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(part.nbytes for part in (*self.at, *self.values))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001 -- NumPy's protocol
        """Return the array."""
        dense = np.zeros(self.shape, dtype or self.values[0].dtype)
        for number, (at, values) in enumerate(zip(self.at, self.values, strict=True)):
            row, column = np.divmod(at, self.columns)
            dense[row, number * self.columns + column] = values
        return dense


@dataclass(frozen=True)
class BFloat16:
    """An array of bfloat16, for which NumPy has no type; its values are float32's as well.

    Attributes
    ----------
    bits
        The upper halves of the float32 values, uint16.
    """

    bits: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.bits.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001 -- NumPy's protocol
        """Return the values, float32 unless asked otherwise."""
        wide = self.bits.astype(np.uint32)
        wide <<= 16
        values: np.ndarray = wide.view(np.float32)
        return values if dtype is None else values.astype(dtype, copy=False)


@dataclass(frozen=True)
class FeatureRecord:
    """SAE features of one layer.

    Attributes
    ----------
    activations
        ``(query, feature)``, whole or what is not 0 of it.
    top_feature, top_activation
        ``(query, feature_rank)``: the features of largest magnitude, largest first, and their
        activations with their signs.
    nonfinite
        Whether activations, or what the SAE reads, hold NaN or infinity.
    """

    activations: np.ndarray | Nonzeros
    top_feature: np.ndarray
    top_activation: np.ndarray
    nonfinite: bool = False


@dataclass(frozen=True)
class LayerRecord:
    """One layer of one scenario, or some rows of it.

    Attributes
    ----------
    scenario
        Name of the scenario.
    layer
        Index of the decoder block.
    start
        Number of the first row: a token position, or a place in the chosen queries.
    attention
        ``(head, query, key)``, or None.
    attention_mean
        ``(query, key)`` float32, or None.
    features
        By array name; empty if there is no SAE on this layer.
    """

    scenario: str
    layer: int
    start: int = 0
    attention: np.ndarray | BFloat16 | None = None
    attention_mean: np.ndarray | None = None
    features: Mapping[str, FeatureRecord] = field(default_factory=dict)

    @cached_property
    def nonfinite(self) -> tuple[str, ...]:
        """Arrays that hold NaN or infinity, or were computed from such."""
        names = tuple(name for name, features in self.features.items() if features.nonfinite)
        attention, mean = self.attention, self.attention_mean
        # One NaN in any head shows in the mean, which is taken before attention is cast.
        finite = mean is None or np.isfinite(mean).all()
        if isinstance(attention, np.ndarray) and attention.dtype == np.float16:
            finite = finite and np.isfinite(attention).all()
        return names if finite else ("attention", *names)


@dataclass(frozen=True)
class TokensRecord:
    """What the model says next, after the last layer of one scenario.

    Attributes
    ----------
    scenario
        Name of the scenario.
    next_token, next_token_logprob
        ``(query, rank)``: ids and natural log-probabilities, most likely first.
    """

    scenario: str
    next_token: np.ndarray
    next_token_logprob: np.ndarray

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Arrays that hold NaN or infinity."""
        return () if np.isfinite(self.next_token_logprob).all() else ("next_token_logprob",)


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt.

    Attributes
    ----------
    ids, texts
        Token ids and their texts, one a position.
    """

    ids: Sequence[int]
    texts: Sequence[str]
