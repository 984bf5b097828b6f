"""Storing what something else captured, trace by trace."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from zarrtrace.errors import ConfigError, NonFiniteError, ScenarioError
from zarrtrace.format.attributes import (
    ChatAttributes,
    ModelAttributes,
    SpanAttributes,
    TraceAttributes,
    ranges,
)
from zarrtrace.format.layout import TraceShape, feature_columns
from zarrtrace.records import (
    BFloat16,
    FeatureRecord,
    LayerRecord,
    Nonzeros,
    Tokens,
    TracePlan,
    strongest,
    with_strongest,
)
from zarrtrace.scenarios import DECISION, CharRange, Scenario, span_positions
from zarrtrace.storage import Address, locate
from zarrtrace.store.run_writer import RunExtension
from zarrtrace.store.trace_writer import TraceWriter

_Array = np.ndarray | BFloat16
# A softmax that multiplies by the reciprocal of a sum may exceed 1 by a unit of its precision, here
# bfloat16's. One bit of the mantissa, the least that 'extract --attention-keepbits' leaves, rounds
# each weight of a row by at most a quarter of it.
_LARGEST_WEIGHT, _LARGEST_SUM = 1 + 2**-7, 1.25 * (1 + 2**-7)
# A sum of rounded weights is itself rounded, in float32, once a weight at most.
_EPSILON = float(np.finfo(np.float32).eps)
_DIMS = {
    "attention": "head, query, key",
    "features": "query, feature",
    "residual": "query, channel",
}


def write_trace(
    run: Address,
    scenario: str | Scenario,
    *,
    tokens: tuple[Sequence[int], Sequence[str]],
    attention: Mapping[int, Any] | None = None,
    features: Mapping[int, Any] | None = None,
    residual: Mapping[int, Any] | None = None,
    positions: Sequence[int] | None = None,
    attention_positions: Sequence[int] | None = None,
    spans: Mapping[str, Sequence[int]] | None = None,
    offsets: Sequence[CharRange] | None = None,
    special: Sequence[bool] | None = None,
    model: str | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, str] | None = None,
) -> None:
    """Store attention, features and residual stream of one prompt that something else captured.

    The first call creates the run, further calls add traces to it. After each call the run is
    complete and can be opened. All its traces have the same layers, sizes and precisions. They
    have no next tokens and no description of the model. One process writes a run at a time.

    Parameters
    ----------
    run
        Folder of the run, or its address in an object store.
    scenario
        A name, or a :class:`zarrtrace.Scenario` that has one. Its prompt, spans, tags and metadata
        are stored; it must have no options, because these need a tokenizer.
    tokens
        Ids and texts of the prompt's tokens, all of them.
    attention
        By layer, weights behind the softmax, ``(head, query, key)``.
    features
        By layer, activations ``(query, feature)``; SciPy's sparse ones, too. Layers may have
        attention, features, residual, or several of them.
    residual
        By layer, the residual stream ``(query, channel)``, as the outputs of the decoder blocks.
        The trace does not say which hook point it is from.
    positions
        Token positions of the rows (`query`) of all arrays, ascending. By default all tokens.
    attention_positions
        Token positions of the rows of attention, if it has fewer: some of `positions`.
    spans
        Token positions by name. Other spans of `scenario` are found by their characters.
    offsets
        Characters ``(start, end)`` of the prompt for which each token stands; ``(0, 0)`` for none.
        By default found from the texts, if these put together end with the prompt.
    special
        Which tokens are special, such as BOS. By default not known.
    model
        Name of the model, for people; the same in all calls.
    overwrite
        Replace the scenario's trace if the run has one.
    storage_options
        How to reach an object store.

    Notes
    -----
    Arrays are those of NumPy or torch, on any device: float16, bfloat16 or float32, which are
    stored losslessly, bfloat16 as float32.

    Raises
    ------
    ConfigError, ScenarioError
        If shapes or precisions do not agree, attention holds no probabilities, a span cannot be
        found, or the run has the scenario and `overwrite` is false.
    ConfigMismatchError
        If the run has other layers, sizes or precisions.
    NonFiniteError
        If an array holds NaN or infinity.
    NotATraceError
        If `run` is something else than a run that this function writes.
    LockedError
        If another process is writing the run.
    """
    location = locate(run, storage_options)
    given = Scenario(".", name=scenario, marks=False) if isinstance(scenario, str) else scenario
    label = f"scenario {given.name!r}"
    if not given.name:
        raise ScenarioError("the scenario has no name", remedy="Give Scenario(…, name=…).")
    if given.messages and not given.prompt:
        raise ScenarioError(
            f"{label}: has messages, which are not rendered",
            why="A tokenizer's chat template makes the prompt of them.",
            remedy="Give scenario.render(tokenizer).",
        )
    if given.options:
        raise ConfigError(
            f"{label}: has options",
            why="An option is a token that may come next, and no tokenizer is at hand.",
            remedy="Leave options out.",
        )
    texts = _tokens(label, tokens, special)
    arrays = _Arrays(
        label,
        len(texts.ids),
        attention or {},
        features or {},
        residual or {},
        positions,
        attention_positions,
    )
    found = _spans(label, given, texts.texts, spans or {}, offsets)
    plan = trace_plan(
        scenario=given.name,
        prompt=None if isinstance(scenario, str) else given.prompt,
        chat=None if given.chat is None else given.chat.attributes,
        tags=given.tags,
        spans={
            name: SpanAttributes(characters=given.spans.get(name, ()), tokens=tuple(positions))
            for name, positions in found.items()
        },
        metadata=given.metadata,
        layers=arrays.layers,
        without_attention={"none was given": arrays.without(arrays.attention)},
        without_sae=arrays.without(arrays.features),
        without_residual=arrays.without(arrays.residual),
        heads=arrays.heads,
        features=arrays.width,
        channels=arrays.channels,
        attention_dtype=arrays.attention_dtype,
        feature_dtype=arrays.feature_dtype,
        residual_dtype=arrays.residual_dtype,
        tokens=texts,
        positions=arrays.positions,
        attention_positions=arrays.attention_positions,
    )
    config = {
        "written_by": "zarrtrace.write_trace",
        "model": model,
        "layers": ranges(arrays.layers),
        "layers_without_attention": ranges(arrays.without(arrays.attention)),
        "layers_without_features": ranges(arrays.without(arrays.features)),
        "layers_without_residual": ranges(arrays.without(arrays.residual)),
        "heads": arrays.heads,
        "features": arrays.width,
        "channels": arrays.channels,
        "attention_dtype": arrays.attention_dtype,
        "feature_dtype": arrays.feature_dtype,
        "residual_dtype": arrays.residual_dtype,
        "metadata": {name: type(value).__name__ for name, value in given.metadata.items()},
    }
    with RunExtension(location, config) as extended:
        extended.begin(given.name, overwrite=overwrite)
        with TraceWriter(extended.path, plan, fresh=True) as trace:
            for layer in arrays.layers:
                trace.append(arrays.record(given.name, layer))
        extended.add(given.name)


# --- shared with imports ------------------------------------------------------------------------


def trace_plan(
    *,
    scenario: str,
    prompt: str | None,
    tags: Sequence[str],
    spans: Mapping[str, SpanAttributes],
    layers: Sequence[int],
    without_attention: Mapping[str, Sequence[int]],
    without_sae: Sequence[int],
    heads: int | None,
    features: int | None,
    attention_dtype: Any,
    feature_dtype: Any,
    tokens: Tokens,
    positions: tuple[int, ...] | None = None,
    attention_positions: tuple[int, ...] | None = None,
    without_residual: Sequence[int] = (),
    channels: int | None = None,
    residual_dtype: Any = None,
    metadata: Mapping[str, Any] | None = None,
    model: ModelAttributes | None = None,
    chat: ChatAttributes | None = None,
) -> TracePlan:
    """Describe a trace whose arrays are there already, and which has no next tokens.

    Parameters
    ----------
    scenario, prompt, tags, spans, metadata, model, chat
        As the trace's attributes have them.
    layers
        Ascending.
    without_attention, without_sae, without_residual
        Layers that lack attention, by reason, and layers that lack features and residual.
    heads, features, channels
        Sizes; None for none.
    attention_dtype, feature_dtype, residual_dtype
        Precisions.
    tokens, positions, attention_positions
        The prompt's tokens; those that are stored, and those whose rows of attention are, as in
        :class:`zarrtrace.records.TracePlan`.
    """
    reasons = {reason: tuple(found) for reason, found in without_attention.items() if found}
    lacking = sum(map(len, reasons.values()))
    if heads is None:
        reasons, lacking = {}, 0
    return TracePlan(
        attributes=TraceAttributes(
            scenario=scenario,
            prompt=prompt,
            chat=chat,
            tags=tuple(tags),
            spans=dict(spans),
            metadata=dict(metadata or {}),
            model=model,
            layers=tuple(layers),
            layers_without_sae=() if features is None else tuple(without_sae),
            layers_without_attention=reasons,
            layers_without_residual=tuple(without_residual),
            attention_dtype=attention_dtype,
            feature_dtype=feature_dtype,
            residual_dtype=residual_dtype,
            versions={name: version(name) for name in ("numpy", "zarr")},
        ),
        shape=TraceShape(
            layers=len(layers),
            tokens=len(tokens.ids),
            heads=heads,
            features={} if features is None else {"features": features},
            channels=channels,
            attention_dtype=attention_dtype,
            feature_dtype=feature_dtype,
            residual_dtype=residual_dtype,
            next_token=False,
            attention_layers=len(layers) - lacking if lacking else None,
        ),
        tokens=tokens,
        positions=positions,
        attention_positions=attention_positions,
    )


def layer_record(
    scenario: str,
    layer: int,
    attention: _Array | None,
    features: FeatureRecord | None,
    residual: _Array | None = None,
) -> LayerRecord:
    """Return the record of a layer, with the mean of its attention over heads."""
    mean = None
    if attention is not None:
        mean = np.asarray(attention).mean(axis=0, dtype=np.float32)
    return LayerRecord(
        scenario=scenario,
        layer=layer,
        attention=attention,
        attention_mean=mean,
        features={} if features is None else {"features": features},
        residual=residual,
    )


def attention_problem(attention: np.ndarray, queries: np.ndarray, *, causal: bool) -> str:
    """Say why finite weights ``(head, query, key)`` are no attention; empty if they may be.

    Parameters
    ----------
    attention
        The weights.
    queries
        Positions of its rows.
    causal
        Whether no token may attend to one behind it.
    """
    problem = ""
    low, high = float(attention.min()), float(attention.max())
    tokens = attention.shape[-1]
    sums = attention.sum(axis=-1, dtype=np.float32)
    behind = np.arange(tokens) > queries[:, np.newaxis]
    if low < 0 or high > _LARGEST_WEIGHT:
        problem = f"holds {low if low < 0 else high:.4g}, which is no probability"
    elif causal and any(head[behind].any() for head in attention):
        problem = "has tokens that attend to tokens behind them"
    elif (largest := float(sums.max())) > _LARGEST_SUM + tokens * _EPSILON:
        problem = f"has a row whose weights sum to {largest:.4g}"
    elif not attention.any(axis=(0, 2)).all():
        empty = int(queries[np.flatnonzero(~attention.any(axis=(0, 2)))[0]])
        problem = f"is 0 in every head at token {empty}"
    return problem


# --- what a caller gives ------------------------------------------------------------------------


class _Arrays:
    """The arrays of a trace, by layer, whose shapes and precisions agree."""

    def __init__(
        self,
        label: str,
        tokens: int,
        attention: Mapping[int, Any],
        features: Mapping[int, Any],
        residual: Mapping[int, Any],
        positions: Sequence[int] | None,
        attention_positions: Sequence[int] | None,
    ) -> None:
        self._label = label
        self.attention = {layer: _shaped(value) for layer, value in attention.items()}
        self.features = {layer: _shaped(value) for layer, value in features.items()}
        self.residual = {layer: _shaped(value) for layer, value in residual.items()}
        layers = {*attention, *features, *residual}
        if not layers:
            raise ConfigError(
                f"{label}: no array was given", remedy="Give attention, features or residual."
            )
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ConfigError(
                    f"{label}: {layer!r} is no layer",
                    remedy="Give arrays by the index of the decoder block, an int from 0.",
                )
        self.layers = tuple(sorted(layers))
        self.positions = self._rows("positions", positions, range(tokens))
        stored = range(tokens) if self.positions is None else self.positions
        self.attention_positions = self._rows("attention_positions", attention_positions, stored)
        own = self.attention_positions
        self._attention_rows = np.asarray(stored if own is None else own)
        self.heads = self._size(
            "attention", self.attention, (None, len(self._attention_rows), tokens)
        )
        self.width = self._size("features", self.features, (len(stored), None))
        self.channels = self._size("residual", self.residual, (len(stored), None))
        self.attention_dtype = _precision(self.attention.values())
        self.feature_dtype = _precision(self.features.values())
        self.residual_dtype = _precision(self.residual.values())

    def _rows(
        self, name: str, given: Sequence[int] | None, known: Sequence[int]
    ) -> tuple[int, ...] | None:
        """Return positions among those that are known; None for all of them."""
        if given is None:
            return None
        rows = tuple(int(one) for one in given)
        if not rows or list(rows) != sorted(set(rows)) or not set(rows) <= set(known):
            of = f"the {len(known)} tokens" if name == "positions" else "the stored positions"
            raise ConfigError(
                f"{self._label}: {name} {list(rows)}",
                why=f"They are positions of {of}, ascending.",
                remedy="Give positions from 0, in order, each once.",
            )
        return None if len(rows) == len(known) else rows

    def _size(
        self, name: str, arrays: Mapping[int, Any], expected: tuple[int | None, ...]
    ) -> int | None:
        """Return the size of the dimension that `expected` leaves open; None without arrays."""
        at, size = expected.index(None), None
        for layer, array in arrays.items():
            shape, dtype = tuple(array.shape), _dtype(array)
            if dtype not in ("float16", "bfloat16", "float32"):
                raise ConfigError(
                    f"{self._label}: {name} of layer {layer} is {dtype}",
                    why="Stored are float16 and float32; bfloat16 fits into float32.",
                    remedy="Convert it, as array.astype('float32').",
                )
            if size is None and len(shape) == len(expected):
                size = shape[at]
            wanted = tuple(size if one is None else one for one in expected)
            if shape != wanted:
                said = tuple("any" if one is None else one for one in wanted)
                raise ConfigError(
                    f"{self._label}: {name} of layer {layer} has shape {shape}, not "
                    f"({', '.join(map(str, said))})",
                    why=f"It is ({_DIMS[name]}) of one prompt, of the same sizes in all layers.",
                    remedy="Take one prompt out of a batch, as array[0]; check the tokens.",
                )
        return size

    def without(self, arrays: Mapping[int, Any]) -> tuple[int, ...]:
        """Return the layers that others have an array of and these lack; none if all do."""
        return tuple(layer for layer in self.layers if layer not in arrays) if arrays else ()

    def record(self, scenario: str, layer: int) -> LayerRecord:
        """Return the record of a layer, after a look at its values."""
        attention = features = residual = None
        if layer in self.attention:
            attention = _on_host(self.attention[layer])
            self._check_finite("attention", layer, [attention])
            rows = self._attention_rows
            if problem := attention_problem(np.asarray(attention), rows, causal=False):
                raise ConfigError(
                    f"{self._label}: attention of layer {layer} {problem}",
                    why="It holds scores before the softmax, is transposed, or was never filled "
                    "in.",
                    remedy="Give the weights behind the softmax, (head, query, key).",
                )
            if self.attention_dtype == "float32" and isinstance(attention, np.ndarray):
                attention = attention.astype(np.float32, copy=False)
        if layer in self.features:
            features = self._features(layer)
        if layer in self.residual:
            residual = _on_host(self.residual[layer])
            self._check_finite("residual", layer, [residual])
        return layer_record(scenario, layer, attention, features, residual)

    def _features(self, layer: int) -> FeatureRecord:
        given = self.features[layer]
        if hasattr(given, "tocsr"):
            found = _nonzeros(given)
            self._check_finite("features", layer, found.values)
            return FeatureRecord(found, *strongest(found))
        values = np.ascontiguousarray(_on_host(given))
        self._check_finite("features", layer, [values])
        return with_strongest(values)

    def _check_finite(self, name: str, layer: int, arrays: Iterable[_Array]) -> None:
        if not all(np.isfinite(np.asarray(one)).all() for one in arrays):
            raise NonFiniteError(
                f"{self._label}: {name} of layer {layer} holds NaN or infinity",
                why="The model overflowed, or the array was never filled in.",
                remedy="Capture this prompt again, with a wider dtype.",
            )


def _shaped(value: Any) -> Any:
    """Return an array that says its shape; a sequence becomes NumPy's."""
    return value if hasattr(value, "shape") and hasattr(value, "dtype") else np.asarray(value)


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _precision(arrays: Iterable[Any]) -> str | None:
    """Return the precision that holds all arrays exactly; None without arrays."""
    found = {_dtype(array) for array in arrays}
    return ("float16" if found == {"float16"} else "float32") if found else None


def _on_host(value: Any) -> _Array:
    """Return an array of NumPy or torch, from any device, as NumPy's; bfloat16 as its bits."""
    if hasattr(value, "detach"):
        tensor = value.detach().to_dense().cpu()
        if _dtype(tensor) == "bfloat16":
            # Torch is there if it made the tensor; here it is not imported.
            bits = tensor.contiguous().view(sys.modules["torch"].int16).numpy()
            return BFloat16(bits.view(np.uint16))
        array: np.ndarray = tensor.numpy()
        return array
    if _dtype(value) == "bfloat16":
        return BFloat16(np.ascontiguousarray(value).view(np.uint16))
    return np.asarray(value)


def _nonzeros(matrix: Any) -> Nonzeros:
    """Take apart one of SciPy's sparse matrices, by blocks of columns."""
    rows = matrix.tocsr(copy=True)
    rows.sum_duplicates()  # and sorts
    rows.eliminate_zeros()
    tokens, width = rows.shape
    columns = feature_columns(width)
    token = np.repeat(np.arange(tokens), np.diff(rows.indptr))
    block, column = np.divmod(rows.indices.astype(np.int64), columns)
    here = [block == number for number in range(-(-width // columns))]
    return Nonzeros(
        (tokens, width),
        columns,
        at=tuple(token[one] * columns + column[one] for one in here),
        values=tuple(rows.data[one] for one in here),
    )


def _tokens(
    label: str, given: tuple[Sequence[int], Sequence[str]], special: Sequence[bool] | None
) -> Tokens:
    error = ConfigError(
        f"{label}: tokens are no ids and texts of one prompt",
        why="Each token has an id in the model's vocabulary and a text.",
        remedy="Give tokens=(ids, texts), equally many; special, if given, as many, too.",
    )
    try:
        first, second = given
        ids, texts = [int(one) for one in first], list(second)
    except (TypeError, ValueError):
        raise error from None
    is_odd = not all(isinstance(one, str) for one in texts) or any(
        not 0 <= one < 2**32 for one in ids
    )
    marks = None if special is None else [bool(one) for one in special]
    if is_odd or not ids or {len(texts), len(ids if marks is None else marks)} != {len(ids)}:
        raise error
    return Tokens(ids, texts, marks)


def _spans(
    label: str,
    scenario: Scenario,
    texts: Sequence[str],
    given: Mapping[str, Sequence[int]],
    offsets: Sequence[CharRange] | None,
) -> dict[str, list[int]]:
    """Return token positions of all spans, ``decision`` included."""
    last = len(texts) - 1
    found = {name: sorted({int(at) for at in positions}) for name, positions in given.items()}
    for name, positions in found.items():
        if name == DECISION or not positions or positions[0] < 0 or positions[-1] > last:
            raise ConfigError(
                f"{label}: span {name!r} at {positions}",
                why=f"The prompt has tokens 0 to {last}; {DECISION!r} is always the last one.",
                remedy="Give positions of the prompt's tokens.",
            )
    if rest := [name for name in scenario.spans if name not in found]:
        places = _offsets(scenario.prompt, texts) if offsets is None else list(offsets)
        if places is None or len(places) != len(texts):
            raise ConfigError(
                f"{label}: no token positions for span {rest[0]!r}",
                why="The texts of the tokens, put together, do not end with the prompt."
                if places is None
                else f"offsets are for {len(places)} tokens, and there are {len(texts)}.",
                remedy="Give spans={name: positions}, or offsets as fast tokenizers do with "
                "return_offsets_mapping=True.",
            )
        positions_of = span_positions(scenario, places)
        found |= {name: positions_of[name] for name in rest}
    return {**found, DECISION: [last]}


def _offsets(prompt: str, texts: Sequence[str]) -> list[CharRange] | None:
    """Find the characters of each token, if the texts end with the prompt."""
    joined = "".join(texts)
    if not joined.endswith(prompt):
        return None
    # In front of the prompt stands a special token, or the space that SentencePiece adds.
    edges = np.cumsum([0, *map(len, texts)]) - (len(joined) - len(prompt))
    starts, ends = (np.maximum(one, 0).tolist() for one in (edges[:-1], edges[1:]))
    return list(zip(starts, ends, strict=True))
