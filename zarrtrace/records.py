"""What capture hands to whoever stores it: layers of one prompt, or of several in one piece.

A batch goes to its writers in one piece: to copy, send and split it prompt by prompt would keep the
process that drives a GPU busier than the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from zarrtrace.format.attributes import SAEAttributes, TraceAttributes
from zarrtrace.format.layout import NO_ID, TOP_FEATURES, TraceShape


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
        """Arrays that hold NaN or infinity, or were computed from such values."""
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
    """Everything that is known of a trace before its first layer is computed.

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
    queries
        Positions whose rows of attention are stored; None for all.
    settings
        Hash of everything else that decides what is computed.
    """

    attributes: TraceAttributes
    shape: TraceShape
    tokens: Tokens
    saes: tuple[SAEAttributes, ...] = ()
    queries: tuple[int, ...] | None = None
    settings: str = ""


_Array = np.ndarray | BFloat16


@dataclass(frozen=True)
class Member:
    """A prompt of a batch.

    Attributes
    ----------
    scenario
        Its name.
    length
        Its tokens; what a batch holds beyond them is padding.
    queries
        Token positions whose attention is stored; None for all.
    """

    scenario: str
    length: int
    queries: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SparseFeatures:
    """What is not 0 of the features of some prompts, one behind another.

    Attributes
    ----------
    width
        Features of the SAE.
    columns
        Width of a block of features, as a chunk has it.
    at, values
        Of each block, places ``token * columns + column`` ``(n,)``, ascending, and what is there.
    sound
        Of each token, whether what was encoded is finite: thresholds turn NaN into 0.
    top
        Number and activation of each token's strongest features (of largest magnitude) and of one
        more, strongest first, ``(token, rank)``; equal ones in any order. None if not known yet.
    """

    width: int
    columns: int
    at: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    sound: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        parts = (*self.at, *self.values, self.sound, *(self.top or ()))
        return sum(part.nbytes for part in parts)

    def part(self, start: int, stop: int) -> SparseFeatures:
        """Return some of the tokens; nothing is copied but places."""
        if not start and stop == len(self.sound):
            return self
        cuts = [np.searchsorted(at, [n * self.columns for n in (start, stop)]) for at in self.at]
        kept = [slice(*cut.tolist()) for cut in cuts]
        return replace(
            self,
            at=tuple(at[k] - start * self.columns for at, k in zip(self.at, kept, strict=True)),
            values=tuple(values[k] for values, k in zip(self.values, kept, strict=True)),
            sound=self.sound[start:stop],
            top=self.top and (self.top[0][start:stop], self.top[1][start:stop]),
        )

    def record(self) -> FeatureRecord:
        """Return the record of all tokens, which are one prompt's."""
        found = Nonzeros((len(self.sound), self.width), self.columns, self.at, self.values)
        top = None if self.top is None else settled(*self.top)
        top_feature, top_activation = strongest(found) if top is None else top
        finite = self.sound.all() and all(np.isfinite(one).all() for one in self.values)
        return FeatureRecord(found, top_feature, top_activation, nonfinite=not finite)


def settled(feature: np.ndarray, activation: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Make of the strongest features what :func:`strongest` does.

    Parameters
    ----------
    feature, activation
        As ``top`` of :class:`SparseFeatures`.

    Returns
    -------
    tuple or None
        None where one that is left out may be equal to one that is not.
    """
    rank = _rank(activation)
    count = min(TOP_FEATURES, rank.shape[1])
    equal = (rank[:, 1:] == rank[:, :-1]) & (rank[:, 1:] < 0)
    if equal[:, count - 1 :].any():
        return None
    first = np.arange(count)[None]
    if equal.any():
        first = np.lexsort((feature, rank), axis=1)[:, :count]
    top, numbers = (np.take_along_axis(one, first, 1) for one in (activation, feature))
    fires = top != 0
    return (
        np.where(fires, numbers.astype(np.uint32, copy=False), np.uint32(NO_ID)),
        np.where(fires, top, np.float32(0)),
    )


def _rank(activation: np.ndarray) -> np.ndarray:
    """Sort key of activations: largest magnitude first, NaN before all."""
    return np.where(np.isnan(activation), -np.inf, -np.abs(activation))


def strongest(features: Nonzeros) -> tuple[np.ndarray, np.ndarray]:
    """Find the features of largest magnitude of each token.

    Of equal ones, those of lower number come first. Some SAEs (AbsTopK) have negative activations.

    Parameters
    ----------
    features
        ``(query, feature)``

    Returns
    -------
    feature, activation
        ``(query, rank)`` uint32 and float32 with its sign, strongest first; NO_ID and 0 where fewer
        features fire, which means that they are not 0. NaN comes before all.
    """
    (tokens, width), columns = features.shape, features.columns
    count = min(TOP_FEATURES, width)
    token = np.concatenate([at // columns for at in features.at])
    number = np.concatenate([at % columns + n * columns for n, at in enumerate(features.at)])
    value = np.concatenate(features.values).astype(np.float32, copy=False)
    # Stable, and of 16 bits where that is enough: NumPy then sorts by digits.
    order = np.argsort(token.astype(np.uint16 if tokens <= 2**16 else np.int64), kind="stable")
    token = token[order]
    each = np.bincount(token, minlength=tokens)
    place = np.arange(len(token)) - np.repeat(np.cumsum(each) - each, each)
    room = max(count, int(each.max(initial=0)))
    values = np.zeros((tokens, room), np.float32)
    values[token, place] = value[order]
    numbers = np.zeros((tokens, room), np.uint32)
    numbers[token, place] = number[order]
    rank = _rank(values)
    if room > 2 * count:  # most need not be sorted
        some = np.sort(np.argpartition(rank, count - 1, axis=1)[:, :count], axis=1)
        values, numbers, rank = (np.take_along_axis(a, some, 1) for a in (values, numbers, rank))
    first = np.argsort(rank, axis=1, kind="stable")[:, :count]
    top = np.take_along_axis(values, first, 1)
    fires = top != 0
    return (
        np.where(fires, np.take_along_axis(numbers, first, 1), np.uint32(NO_ID)),
        np.where(fires, top, np.float32(0)),
    )


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


@dataclass(frozen=True)
class LayerBatch:
    """One layer of several prompts.

    Attributes
    ----------
    layer
        Index of the decoder block.
    members
        The prompts, in the order of the arrays.
    wanted
        Places of those whose records are wanted.
    attention
        ``(sequence, head, query, key)`` with padding at the end of both, or None.
    attention_mean
        ``(sequence, query, key)`` float32, or None.
    features
        By array name, the prompts' tokens one behind another.
    """

    layer: int
    members: Sequence[Member]
    wanted: Sequence[int]
    attention: np.ndarray | BFloat16 | None = None
    attention_mean: np.ndarray | None = None
    features: Mapping[str, SparseFeatures] = field(default_factory=dict)

    @property
    def scenarios(self) -> list[str]:
        """Names of the prompts whose records are wanted."""
        return [self.members[at].scenario for at in self.wanted]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        arrays = (self.attention, self.attention_mean, *self.features.values())
        return sum(array.nbytes for array in arrays if array is not None)

    def part(self, wanted: Sequence[int]) -> LayerBatch:
        """Return a batch of those of the wanted prompts that lie together."""
        start, stop = min(wanted), max(wanted) + 1
        if stop - start == len(self.members):
            return replace(self, wanted=wanted)
        token = np.cumsum([0, *(one.length for one in self.members)])
        attention, mean = self.attention, self.attention_mean
        return LayerBatch(
            self.layer,
            self.members[start:stop],
            [at - start for at in wanted],
            None if attention is None else _of(attention, slice(start, stop)),
            None if mean is None else mean[start:stop],
            {name: f.part(token[start], token[stop]) for name, f in self.features.items()},
        )

    def each(self) -> Iterator[LayerBatch]:
        """Yield a batch of each of the prompts that are wanted."""
        return (self.part([at]) for at in self.wanted)

    def records(self) -> Iterator[LayerRecord]:
        """Yield the records of the prompts that are wanted."""
        tokens = np.cumsum([0, *(one.length for one in self.members)])
        edges = list(pairwise(tokens.tolist()))
        for at in self.wanted:
            one = self.members[at]
            attention, mean = self.attention, self.attention_mean
            keys = slice(one.length)
            queries = keys if one.queries is None else list(one.queries)
            if attention is not None:
                attention = _of(_of(attention, at), (slice(None), queries, keys))
            yield LayerRecord(
                scenario=one.scenario,
                layer=self.layer,
                attention=attention,
                attention_mean=None if mean is None else mean[at][queries, keys],
                features={name: f.part(*edges[at]).record() for name, f in self.features.items()},
            )


def _of(array: _Array, index: Any) -> _Array:
    part: np.ndarray = (array.bits if isinstance(array, BFloat16) else array)[index]
    return BFloat16(part) if isinstance(array, BFloat16) else part
