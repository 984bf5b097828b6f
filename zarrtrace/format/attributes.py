"""Attributes of runs, traces, tables and indexes, as frozen values.

Each field is an attribute of its own in the ``zarr.json`` of the group, short enough to be read.
:mod:`zarrtrace.store` writes them, and ``schema/`` holds the JSON Schemas made from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

#: Version of the on-disk format. It is the only one that this code reads and writes.
FORMAT_VERSION = 2

#: Tells other software which convention the attributes follow.
CONVENTIONS: tuple[dict[str, str], ...] = (
    {
        "uuid": "6e1f8c2a-5d0b-4c57-9a53-2f9d1b7e4c02",
        "name": "zarrtrace",
        "description": "Attention and SAE features of a language model, by layer and token",
    },
)


class Frozen(BaseModel):
    """A value that never changes and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Extensible(Frozen):
    """A value some of whose fields are left out where they are None: older stores lack them."""

    left_out: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = write(self)
        return {k: v for k, v in found.items() if v is not None or k not in self.left_out}


# --- layers ------------------------------------------------------------------------------------

_RANGES = re.compile(r"([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?")
#: More blocks than any model has: a damaged range must not ask for memory.
MOST_LAYERS = 100_000


def ranges(layers: Sequence[int]) -> str:
    """Write layers compactly: ``1, 2, 3, 7`` as ``1-3,7``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts)


def layers_in(text: str) -> tuple[int, ...]:
    """Read what :func:`ranges` wrote.

    Raises
    ------
    ValueError
        If the text is not a list of ranges, or names a layer twice, or more than a model has.
    """
    if not _RANGES.fullmatch(text):
        raise ValueError(f"{text!r} is not a list of layers such as '0-30' or '1,5-7'")
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first) + 1
        if stop > MOST_LAYERS or stop - start + len(found) > MOST_LAYERS:
            raise ValueError(f"{text!r} names more layers than any model has")
        found += range(start, stop)
    if len(set(found)) < len(found):
        raise ValueError(f"{text!r} names a layer twice")
    return tuple(found)


#: Layers in a given order; on disk a text such as ``"1-31"``.
Layers = Annotated[
    tuple[NonNegativeInt, ...],
    BeforeValidator(lambda value: layers_in(value) if isinstance(value, str) else value),
    PlainSerializer(ranges, return_type=str),
    WithJsonSchema({"type": "string", "pattern": f"^{_RANGES.pattern}$"}),
]


def _ascending(layers: tuple[int, int]) -> tuple[int, int]:
    if layers[0] > layers[1]:
        raise ValueError(f"first layer {layers[0]} is above last layer {layers[1]}")
    return layers


#: First and last layer of a band, both included.
LayerRange = Annotated[tuple[NonNegativeInt, NonNegativeInt], AfterValidator(_ascending)]


# --- parts -------------------------------------------------------------------------------------


Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class SpanAttributes(Frozen):
    """Where a span is."""

    characters: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = Field(
        description="Character ranges [start, end) of the prompt; empty if not known."
    )
    tokens: tuple[NonNegativeInt, ...] = Field(description="Token positions: labels of `key`.")


class OptionAttributes(Frozen):
    """A named continuation whose probability matters."""

    text: str
    token_id: NonNegativeInt = Field(description="Its first token.")


class ChatAttributes(Frozen):
    """How a chat template made the prompt of messages."""

    template: Fingerprint = Field(description="BLAKE2b (8 bytes) of the template's text.")
    generation_prompt: bool = Field(
        description="Whether the template was asked to begin the assistant's next message."
    )
    continued: bool = Field(
        description="Whether the prompt ends within its last message, the assistant's."
    )


class GenerationAttributes(Frozen):
    """How a continuation was generated, and its text."""

    tokens: PositiveInt = Field(description="Number of tokens that were asked for, at most.")
    temperature: NonNegativeFloat = Field(
        description="Of sampling; 0 takes the most likely token at each step."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Sum of the probabilities of the most likely tokens among which one is sampled."
    )
    seed: NonNegativeInt
    samples: PositiveInt = Field(description="Number of repeats of each scenario.")
    stop: tuple[str, ...] = Field(default=(), description="Texts that end a continuation.")
    prompt_tokens: PositiveInt = Field(description="The first keys, which are the prompt.")
    text: str = Field(description="The continuation, without the end-of-sequence token.")
    ended_by: Literal["length", "stop", "end_of_sequence"]


class ModelAttributes(Frozen):
    """The language model that was traced."""

    id: str
    revision: str | None = Field(description="Commit of the weights, if they came from a hub.")
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
    fingerprint: Fingerprint | None = Field(
        default=None, description="Hash of names, shapes and some values of the loaded weights."
    )


class SAEAttributes(Frozen):
    """The sparse autoencoder of one layer."""

    layer: NonNegativeInt
    variable: str = Field(default="features", description="The array its latents are in.")
    release: str | None
    id: str
    hook_name: str
    architecture: str
    d_in: PositiveInt
    d_sae: PositiveInt
    dtype: str = Field(
        description="Precision of the encoder's arithmetic: a type, or "
        "'bfloat16 products, float32 sums'."
    )
    decoder_norm_folded: bool
    revision: str | None = Field(
        default=None, description="Commit of the weights, if they came from a hub."
    )
    fingerprint: Fingerprint | None = Field(
        default=None,
        description="Hash of names, shapes and some values of the weights, if they came from a "
        "folder.",
    )


class SAESetAttributes(Frozen):
    """The SAEs of one array, as far as its layers share it.

    In `hook_name`, ``{layer}`` stands for the layer's number. A field that differs otherwise is
    null, and stored by layer in a coordinate such as ``sae_dtype (layer)``.
    """

    release: str | None
    hook_name: str | None
    architecture: str | None
    d_in: PositiveInt
    d_sae: PositiveInt
    dtype: str | None
    decoder_norm_folded: bool
    revision: str | None = None


#: Fields of an SAE that always are coordinates along `layer`; others become one if they differ.
_BY_LAYER = ("id", "fingerprint")
_TEXTS = ("hook_name", "architecture", "dtype")
#: Fields of an SAE that may be coordinates along `layer`; see :func:`sae_coordinate`.
SAE_FIELDS = (*_BY_LAYER, *_TEXTS)


def sae_coordinate(field: str, variable: str) -> str:
    """Name the coordinate that holds a field of each layer's SAE."""
    return f"sae_{field}{variable.removeprefix('features')}"


def _stored(value: Any) -> Any:
    """Return a value of metadata as JSON holds it: NaN, a missing number, is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


MetadataName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_Int64 = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
MetadataValue = Annotated[
    StrictBool | _Int64 | StrictFloat | StrictStr | None, BeforeValidator(_stored)
]

# --- whole groups ------------------------------------------------------------------------------

Seal = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]

SEAL_DESCRIPTION = (
    "BLAKE2b (8 bytes) of this very zarr.json, with sixteen zeros in place of the seal."
)


class TraceAttributes(Extensible):
    """The attributes of a trace's group."""

    left_out: ClassVar[frozenset[str]] = frozenset(("repeat", "generation", "choice"))

    zarr_conventions: tuple[dict[str, str], ...] = CONVENTIONS
    format_version: Literal[2] = 2
    kind: Literal["trace"] = "trace"
    scenario: str
    repeat: NonNegativeInt | None = Field(
        default=None,
        description="Number of the continuation, if the run has several of each prompt: the trace "
        "is called `SCENARIO~REPEAT` then. Left out if there is one.",
    )
    prompt: str | None = Field(
        description="Text without special tokens, of a chat with those that its template writes; "
        "null if not known."
    )
    chat: ChatAttributes | None = Field(
        default=None, description="Null if the prompt was not made of messages."
    )
    tags: tuple[str, ...] = ()
    spans: dict[str, SpanAttributes]
    options: dict[str, OptionAttributes] = {}
    generation: GenerationAttributes | None = Field(
        default=None, description="Left out if all tokens are the prompt."
    )
    choice: str | None = Field(
        default=None,
        description="The option that was found in the continuation; left out if none was.",
    )
    metadata: dict[MetadataName, MetadataValue] = Field(
        default_factory=dict,
        description="Columns of the run: the same names, each with one type, in all its traces. A "
        "missing text is empty, a missing number null.",
        json_schema_extra={"additionalProperties": False},
    )
    model: ModelAttributes | None = Field(description="Null if imported from NPZ files.")
    saes: dict[str, SAESetAttributes] = Field(
        default_factory=dict, description="By array: `features`, `features_NAME`."
    )
    layers: Layers = Field(description="Index of the dimension `layer`.")
    layers_without_sae: Layers = ()
    layers_without_attention: dict[str, Layers] = Field(
        default_factory=dict,
        description="Layers whose block has no attention matrix, by reason. If there are any, "
        "`attention` has a dimension `attention_layer` of its own.",
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
    residual_dtype: Literal["float16", "float32"] | None = Field(
        default=None, description="Null if the residual stream was not asked for."
    )
    residual_hook: str | None = Field(
        default=None,
        description="Hook point that `residual` is from, by TransformerLens's name; `{layer}` "
        "stands for the layer's number. Null if not known.",
    )
    layers_without_residual: Layers = ()
    versions: dict[str, str] = Field(
        description="Libraries the trace was made with; if others completed it, both versions, as "
        "in '2.4.0, 2.13.0'."
    )
    nonfinite: dict[str, Layers] = Field(
        default_factory=dict,
        description="Layers in which arrays hold NaN or infinity: the model computed them, or "
        "values exceed the stored precision. No layers for an array without layers.",
    )
    seal: Seal | None = Field(default=None, description=SEAL_DESCRIPTION)

    @property
    def name(self) -> str:
        """The trace's name, which is that of its folder in a run."""
        return self.scenario if self.repeat is None else f"{self.scenario}~{self.repeat}"

    def layers_of(self, dim: str) -> tuple[int, ...]:
        """Return the layers along an array's first dimension."""
        if dim != "attention_layer":
            return self.layers
        without = {n for layers in self.layers_without_attention.values() for n in layers}
        return tuple(n for n in self.layers if n not in without)


class RunAttributes(Extensible):
    """The attributes of a run's group."""

    left_out: ClassVar[frozenset[str]] = frozenset(("bands", "task_spans"))

    zarr_conventions: tuple[dict[str, str], ...] = CONVENTIONS
    format_version: Literal[2] = 2
    kind: Literal["run"] = "run"
    scenarios: tuple[str, ...] = Field(description="Names of the traces, in the suite's order.")
    model: str | None = Field(default=None, description="As in `config`, for people.")
    dtype: str | None = Field(default=None, description="As in `config`.")
    layers: str | None = Field(default=None, description="As in `config`.")
    sae_release: str | None = Field(default=None, description="As in `config`.")
    bands: dict[str, LayerRange] | None = Field(
        default=None,
        description="First and last layer of the bands that the suite file states; left out if it "
        "states none.",
    )
    task_spans: tuple[str, ...] | None = Field(
        default=None,
        description="Spans that state the task, by the suite file; left out if it names none.",
    )
    config: dict[str, Any] = Field(description="What was asked for; a resumed run must ask again.")
    complete: bool = False
    seal: Seal | None = Field(default=None, description=SEAL_DESCRIPTION)

    @model_validator(mode="before")
    @classmethod
    def _repeat_for_people(cls, given: Any) -> Any:
        """Repeat what a reader asks first; xarray folds ten attributes or more."""
        config = given.get("config") if isinstance(given, dict) else None
        if not isinstance(config, dict):
            return given
        keys = ("model", "dtype", "layers", "sae_release")
        return {**{key: config[key] for key in keys if isinstance(config.get(key), str)}, **given}


def is_trace(attributes: Mapping[Any, Any]) -> bool:
    """Whether attributes of a dataset are a trace's."""
    return attributes.get("kind") == "trace" and "scenario" in attributes
