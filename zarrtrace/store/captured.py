"""Arrays that something else captured: their shapes, precisions and values are checked."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zarrtrace.errors import ConfigError, NonFiniteError
from zarrtrace.format.attributes import MOST_LAYERS
from zarrtrace.format.layout import feature_columns
from zarrtrace.records import (
    BFloat16,
    FeatureRecord,
    LayerRecord,
    Nonzeros,
    strongest,
    with_strongest,
)

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


def whole_numbers(given: Iterable[Any]) -> list[int]:
    """Return integers of Python, NumPy or torch as Python's.

    Raises
    ------
    TypeError
        If one is a fraction, which int() would cut, or a boolean, which belongs to a mask.
    """
    found = [one.tolist() if hasattr(one, "tolist") else one for one in given]
    if any(isinstance(one, bool) for one in found):
        raise TypeError("a boolean is no whole number")
    return [operator.index(one) for one in found]


def token_positions(what: str, given: Iterable[Any]) -> list[int]:
    """Return token positions as integers.

    Parameters
    ----------
    what
        Names the scenario and the positions in messages.
    given
        Positions, of any integer type.

    Raises
    ------
    ConfigError
        If one is a boolean or a fraction.
    """
    try:
        return whole_numbers(given)
    except TypeError:
        raise ConfigError(
            f"{what}: not token positions: {given!s:.80}",
            why="Positions are whole numbers from 0, in a sequence. A mask of true and false, or "
            "a fraction, is none.",
            remedy="Of a mask, give numpy.flatnonzero(mask).",
        ) from None


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


class CapturedArrays:
    """The arrays of a trace, by layer, whose shapes and precisions agree.

    Parameters
    ----------
    label
        Names the scenario in messages.
    tokens
        Tokens of the prompt.
    given
        ``attention``, ``features`` and ``residual``, each by layer; empty where there are none.
    positions, attention_positions
        As for :func:`zarrtrace.write_trace`.

    Attributes
    ----------
    layers
        All layers, ascending.
    without
        Layers that others have an array of and these lack, by array; none if all do.
    sizes
        Sizes and precisions, as :func:`~zarrtrace.store.write.trace_plan` takes them.
    positions, attention_positions
        Checked; None for all of them.
    """

    def __init__(
        self,
        label: str,
        tokens: int,
        given: Mapping[str, Mapping[int, Any]],
        positions: Sequence[int] | None,
        attention_positions: Sequence[int] | None,
    ) -> None:
        self._label = label
        self._arrays = {
            name: {layer: _shaped(value) for layer, value in by_layer.items()}
            for name, by_layer in given.items()
        }
        layers = {layer for by_layer in given.values() for layer in by_layer}
        if not layers:
            raise ConfigError(
                f"{label}: no array was given", remedy="Give attention, features or residual."
            )
        for layer in layers:
            is_index = isinstance(layer, int) and not isinstance(layer, bool)
            if not is_index or not 0 <= layer < MOST_LAYERS:
                raise ConfigError(
                    f"{label}: {layer!r} is no layer",
                    why=f"No model has {MOST_LAYERS:,} layers; it may be the id of something else."
                    if is_index and layer > 0
                    else "",
                    remedy="Give arrays by the index of the decoder block, an int from 0.",
                )
        self.layers = tuple(sorted(layers))
        self.without = {
            name: tuple(layer for layer in self.layers if by_layer and layer not in by_layer)
            for name, by_layer in self._arrays.items()
        }
        self.positions = self._rows("positions", positions, range(tokens))
        stored = range(tokens) if self.positions is None else self.positions
        self.attention_positions = self._rows("attention_positions", attention_positions, stored)
        own = self.attention_positions
        self._attention_rows = np.asarray(stored if own is None else own)
        self.sizes: dict[str, Any] = {
            "heads": self._size("attention", (None, len(self._attention_rows), tokens)),
            "features": self._size("features", (len(stored), None)),
            "channels": self._size("residual", (len(stored), None)),
            "attention_dtype": _precision(self._arrays["attention"].values()),
            "feature_dtype": _precision(self._arrays["features"].values()),
            "residual_dtype": _precision(self._arrays["residual"].values()),
        }

    def _rows(
        self, name: str, given: Sequence[int] | None, known: Sequence[int]
    ) -> tuple[int, ...] | None:
        """Return positions among those that are known; None for all of them."""
        if given is None:
            return None
        rows = tuple(token_positions(f"{self._label}: {name}", given))
        if not rows or list(rows) != sorted(set(rows)) or not set(rows) <= set(known):
            of = f"the {len(known)} tokens" if name == "positions" else "the stored positions"
            raise ConfigError(
                f"{self._label}: {name} {list(rows)}",
                why=f"They are positions of {of}, ascending.",
                remedy="Give positions from 0, in order, each once.",
            )
        return None if len(rows) == len(known) else rows

    def _size(self, name: str, expected: tuple[int | None, ...]) -> int | None:
        """Return the size of the dimension that `expected` leaves open; None without arrays."""
        at, size = expected.index(None), None
        for layer, array in self._arrays[name].items():
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
            if size == 0:
                raise ConfigError(
                    f"{self._label}: {name} of layer {layer} is empty: its shape is {shape}",
                    why=f"It is ({_DIMS[name]}), and has at least one of each.",
                    remedy=f"Leave {name} out if there is none.",
                )
        return size

    def record(self, scenario: str, layer: int) -> LayerRecord:
        """Return the record of a layer, after a look at its values."""
        attention, features, residual = (one.get(layer) for one in self._arrays.values())
        return layer_record(
            scenario,
            layer,
            None if attention is None else self._attention(layer, attention),
            None if features is None else self._features(layer, features),
            None if residual is None else self._finite("residual", layer, residual),
        )

    def _attention(self, layer: int, given: Any) -> _Array:
        attention = self._finite("attention", layer, given)
        rows = self._attention_rows
        if problem := attention_problem(np.asarray(attention), rows, causal=False):
            raise ConfigError(
                f"{self._label}: attention of layer {layer} {problem}",
                why="It holds scores before the softmax, is transposed, or was never filled in.",
                remedy="Give the weights behind the softmax, (head, query, key).",
            )
        if self.sizes["attention_dtype"] == "float32" and isinstance(attention, np.ndarray):
            attention = attention.astype(np.float32, copy=False)
        return attention

    def _features(self, layer: int, given: Any) -> FeatureRecord:
        if hasattr(given, "tocsr"):
            found = _nonzeros(given)
            self._check_finite("features", layer, found.values)
            return FeatureRecord(found, *strongest(found))
        return with_strongest(np.ascontiguousarray(self._finite("features", layer, given)))

    def _finite(self, name: str, layer: int, given: Any) -> _Array:
        """Return an array as NumPy's, all of whose values are finite."""
        found = _on_host(given)
        self._check_finite(name, layer, [found])
        return found

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
