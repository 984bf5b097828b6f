"""Records that capture hands to the store: plans, layers, tokens and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from zarrtrace.format.attributes import SAEAttributes, TraceAttributes
from zarrtrace.format.layout import NO_ID, TOP_FEATURES, TraceShape
from zarrtrace.format.table_layout import TableAttributes, TableShape

# Tokens, and values that they can have, that are sorted at once: numbers of so many need 10 and 23
# bits, and the magnitude of a float32, up to infinity, 31.
_TOKENS_SORTED, _VALUES_SORTED = 2**10, 2**23
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


@dataclass(frozen=True)
class Nonzeros:
    """The non-zero values of an array ``(query, feature)``: a hundredth of it, and often less.

    They come by blocks of columns, as wide as the chunks of the array that they go to.

    Attributes
    ----------
    shape
        Shape of the array.
    columns
        Width of a block; the last one of the array may be narrower.
    at
        Positions ``row * columns + column`` in each block, ascending ``(n,)``.
    values
        Values at these positions, by block ``(n,)``.
    """

    shape: tuple[int, int]
    columns: int
    at: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(part.nbytes for part in (*self.at, *self.values))

    def part(self, start: int, stop: int) -> Nonzeros:
        """Return some of the rows; only positions are copied."""
        cuts = [np.searchsorted(at, [n * self.columns for n in (start, stop)]) for at in self.at]
        kept = [slice(*cut.tolist()) for cut in cuts]
        return Nonzeros(
            (stop - start, self.shape[1]),
            self.columns,
            tuple(at[k] - start * self.columns for at, k in zip(self.at, kept, strict=True)),
            tuple(values[k] for values, k in zip(self.values, kept, strict=True)),
        )

    @classmethod
    def joined(cls, parts: Sequence[Nonzeros]) -> Nonzeros:
        """Return the rows of several arrays of equal width, one array behind another."""
        if len(parts) == 1:
            return parts[0]
        first, blocks = parts[0], range(len(parts[0].at))
        starts = np.cumsum([0, *(part.shape[0] for part in parts)]) * first.columns
        return cls(
            (sum(part.shape[0] for part in parts), first.shape[1]),
            first.columns,
            tuple(
                np.concatenate([p.at[k] + start for p, start in zip(parts, starts, strict=False)])
                for k in blocks
            ),
            tuple(np.concatenate([part.values[k] for part in parts]) for k in blocks),
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001 -- NumPy's protocol
        """Return the array."""
        dense = np.zeros(self.shape, dtype or self.values[0].dtype)
        for number, (at, values) in enumerate(zip(self.at, self.values, strict=True)):
            row, column = np.divmod(at, self.columns)
            dense[row, number * self.columns + column] = values
        return dense


@dataclass(frozen=True)
class BFloat16:
    """An array of bfloat16, for which NumPy has no type.

    Attributes
    ----------
    bits
        The upper halves of the values in float32, uint16.
    """

    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.bits.shape

    def __getitem__(self, key: Any) -> BFloat16:
        """Return a part, indexed as NumPy does; nothing is copied for slices."""
        return BFloat16(self.bits[key])

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
        ``(query, feature)``, dense or its non-zero values.
    top_feature, top_activation
        ``(query, feature_rank)``: the features of largest magnitude, largest first, and their
        activations with their signs.
    nonfinite
        Whether activations, or the inputs of the SAE, hold NaN or infinity.
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
        Number of the first row: an index into the stored positions, of attention into those of its
        own.
    attention
        ``(head, query, key)``, or None.
    attention_mean
        ``(query, key)`` float32, or None.
    features
        By array name; empty if there is no SAE on this layer.
    residual
        ``(query, channel)``, or None.
    """

    scenario: str
    layer: int
    start: int = 0
    attention: np.ndarray | BFloat16 | None = None
    attention_mean: np.ndarray | None = None
    features: Mapping[str, FeatureRecord] = field(default_factory=dict)
    residual: np.ndarray | BFloat16 | None = None

    @cached_property
    def nonfinite(self) -> tuple[str, ...]:
        """Arrays that hold NaN or infinity, or were computed from such values."""
        names = tuple(name for name, features in self.features.items() if features.nonfinite)
        if self.residual is not None and not np.isfinite(np.asarray(self.residual)).all():
            names = (*names, "residual")
        attention, mean = self.attention, self.attention_mean
        # One NaN in any head shows in the mean, which is taken before attention is cast.
        finite = mean is None or np.isfinite(mean).all()
        if isinstance(attention, np.ndarray) and attention.dtype == np.float16:
            finite = finite and np.isfinite(attention).all()
        return names if finite else ("attention", *names)


@dataclass(frozen=True)
class TokensRecord:
    """The most likely next tokens at each stored position of one scenario.

    Attributes
    ----------
    scenario
        Name of the scenario.
    next_token, next_token_logprob
        ``(query, rank)``: ids and natural log-probabilities, most likely first.
    next_token_text
        ``(query, rank)``: texts of the ids.
    """

    scenario: str
    next_token: np.ndarray
    next_token_logprob: np.ndarray
    next_token_text: np.ndarray

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
    special
        Whether the tokenizer calls each of them special; None if that is not known.
    """

    ids: Sequence[int]
    texts: Sequence[str]
    special: Sequence[bool] | None = None


@dataclass(frozen=True)
class TracePlan:
    """A trace before its first layer is computed.

    Attributes
    ----------
    attributes
        The attributes of its group; SAEs and seal are left to the writer.
    shape
        Sizes and data types of its arrays.
    tokens
        The prompt's tokens.
    saes
        The SAEs of its layers.
    positions
        Token positions that are stored, ascending; None for all.
    attention_positions
        Positions of stored rows of attention, if attention has a dimension of its own for them;
        None for `positions`.
    settings
        Hash of everything else that decides what is computed.
    """

    attributes: TraceAttributes
    shape: TraceShape
    tokens: Tokens
    saes: tuple[SAEAttributes, ...] = ()
    positions: tuple[int, ...] | None = None
    attention_positions: tuple[int, ...] | None = None
    settings: str = ""


@dataclass(frozen=True)
class TablePlan:
    """A table before its first sample is computed.

    Attributes
    ----------
    attributes
        The attributes of its group; `config` and seal are left to the writer, and `saes`, too,
        where they are given here.
    shape
        Sizes and data types of its arrays; those of coordinates are left to the writer.
    coordinates
        Values along `sample` by name: ``scenario``, ``position`` and so on, and metadata.
    config
        Options of the extraction, JSON values only; an existing table must have equal ones.
    saes
        The SAEs of its layers.
    """

    attributes: TableAttributes
    shape: TableShape
    coordinates: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    saes: tuple[SAEAttributes, ...] = ()


@dataclass(frozen=True)
class SampleRecord:
    """Some samples of one layer.

    Attributes
    ----------
    layer
        Index of the decoder block.
    start
        Number of the first sample in the table.
    features
        Non-zero values ``(sample, feature)`` by array, in blocks as wide as
        :func:`~zarrtrace.format.table_layout.table_columns` says; empty if there is no SAE on this
        layer.
    residual
        ``(sample, channel)``, or None.
    """

    layer: int
    start: int
    features: Mapping[str, Nonzeros] = field(default_factory=dict)
    residual: np.ndarray | BFloat16 | None = None


@dataclass(frozen=True)
class SampleTokens:
    """The most likely next tokens of some samples.

    Attributes
    ----------
    start
        Number of the first sample in the table.
    next_token, next_token_logprob
        ``(sample, rank)``: ids and natural log-probabilities, most likely first.
    next_token_text
        ``(sample, rank)``: texts of the ids.
    """

    start: int
    next_token: np.ndarray
    next_token_logprob: np.ndarray
    next_token_text: np.ndarray


def strongest(features: Nonzeros) -> tuple[np.ndarray, np.ndarray]:
    """Find the features of largest magnitude of each token.

    Lower numbers come first among equals. Some SAEs (AbsTopK) have negative activations.

    Parameters
    ----------
    features
        ``(query, feature)``

    Returns
    -------
    feature, activation
        ``(query, rank)`` uint32 and float32 with its sign, strongest first; NO_ID and 0 if fewer
        features are non-zero. NaN counts as infinity.
    """
    (tokens, width), columns = features.shape, features.columns
    step = max(1, min(_TOKENS_SORTED, _VALUES_SORTED // width))
    if tokens > step:
        starts = range(0, tokens, step)
        parts = [strongest(features.part(at, min(at + step, tokens))) for at in starts]
        numbers, values = zip(*parts, strict=True)
        return np.concatenate(numbers), np.concatenate(values)
    token = np.concatenate([at // columns for at in features.at])
    number = np.concatenate([at % columns + n * columns for n, at in enumerate(features.at)])
    value = np.concatenate(features.values).astype(np.float32, copy=False)
    counts = np.bincount(token, minlength=tokens)
    rank = np.arange(min(TOP_FEATURES, width))
    fires = rank < counts[:, None]
    first = (np.cumsum(counts) - counts)[:, None]
    taken = _strongest_first(token, value)[(first + rank)[fires]]
    feature, activation = np.full(fires.shape, NO_ID, np.uint32), np.zeros(fires.shape, np.float32)
    feature[fires], activation[fires] = number[taken], value[taken]
    return feature, activation


def _strongest_first(token: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the order of tokens, and of values by magnitude in a token; equal ones as they come.

    Token, magnitude and place share the 64 bits of a number: NumPy sorts numbers by themselves
    several times as fast as it finds their order.
    """
    size = np.minimum(value.view(np.uint32) & _MAGNITUDE, _INFINITY)
    bits = np.uint64((len(value) - 1).bit_length())
    key = token.astype(np.uint64) << np.uint64(31)
    key = (key | (_MAGNITUDE - size)) << bits | np.arange(len(value), dtype=np.uint64)
    key.sort()
    order: np.ndarray = key & ((np.uint64(1) << bits) - np.uint64(1))
    return order.astype(np.intp)


def with_strongest(activations: np.ndarray) -> FeatureRecord:
    """Find the features of largest magnitude of each token; of equals, the first.

    Parameters
    ----------
    activations
        ``(query, feature)``, float16 or float32.
    """
    tokens, features = activations.shape
    count = min(TOP_FEATURES, features)
    top = np.empty((tokens, count), dtype=np.uint32)
    for at in range(0, tokens, 32):
        rows = np.abs(activations[at : at + 32].astype(np.float32))
        # Bits of a positive float sort as the float does; lower indices win among equals.
        keys = rows.view(np.uint32).astype(np.uint64) << np.uint64(32)
        keys |= np.arange(features, dtype=np.uint64)[::-1]
        keys.partition(features - count, axis=1)
        best = np.sort(keys[:, features - count :], axis=1)[:, ::-1]
        top[at : at + 32] = features - 1 - (best & np.uint64(0xFFFFFFFF))
    values = np.take_along_axis(activations, top.astype(np.intp), axis=1).astype(np.float32)
    return FeatureRecord(activations, np.where(values != 0, top, np.uint32(NO_ID)), values)


class Continuation(NamedTuple):
    """The model's continuation of a prompt.

    Attributes
    ----------
    tokens
        Ids of the new tokens, at least one. The last one may be the end-of-sequence token, which
        is a token like any other: the model chose it.
    text
        Text of the tokens, without the end-of-sequence token; a stop text, and what the token that
        completes it says behind it, are part of it.
    ended_by
        ``"length"`` if as many tokens were generated as were asked for, ``"stop"`` if a stop text
        appeared, ``"end_of_sequence"`` if the model ended.
    """

    tokens: tuple[int, ...]
    text: str
    ended_by: Literal["length", "stop", "end_of_sequence"]
