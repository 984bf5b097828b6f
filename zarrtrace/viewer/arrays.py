"""Arrays of a bundle, with their chunks and how to read one."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from zarrtrace.analysis import contrast, word_associations
from zarrtrace.errors import UsageError
from zarrtrace.format.layout import NO_ID

#: Prompts up to this length are shown whole; of longer ones, the page shows a window.
WINDOW = 256
_ROWS = 64
_MAX_CHUNK_BYTES = 4 * 2**20
_FEATURES_PER_TABLE = 4096
# Attention that is read at once.
_READ_BYTES = 32 * 2**20
# Rows of the map of heads in a chunk: choosing a token reads one.
_QUERIES_PER_MAP = 16
#: The last place of the map of heads: the single token that a head attends to most.
STRONGEST = "@strongest"
_WORDS = 5
#: 8-bit attention: value = code / 254; 255 is a missing value.
_STEPS, _MISSING = 254, 255

STATISTICS = ("mean_a", "mean_b", "difference", "cohens_d", "p_permutation", "q_permutation")
_MAX_PAIRS = 6

Load = Callable[[tuple[slice, ...]], np.ndarray]


@dataclass(frozen=True)
class BundleArray:
    """An array of a bundle.

    Attributes
    ----------
    load
        Returns the values in a box of the array, in its dtype.
    attributes
        Attributes for Zarr readers and the page, beside shape and dtype.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    load: Load
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fill_value(self) -> str | int:
        """Value that pads the last chunks: NaN, or 0 for integers."""
        return "NaN" if self.dtype.startswith("float") else 0

    def grid(self) -> Iterator[tuple[int, ...]]:
        """Yield the place of every chunk, in order of keys."""
        return itertools.product(*(range(n) for n in self._grid_shape))

    def has(self, place: tuple[int, ...]) -> bool:
        """Whether there is a chunk at `place`."""
        return len(place) == len(self.shape) and all(
            at < n for at, n in zip(place, self._grid_shape, strict=True)
        )

    @property
    def _grid_shape(self) -> tuple[int, ...]:
        return tuple(-(-n // step) for n, step in zip(self.shape, self.chunks, strict=True))

    def chunk(self, place: tuple[int, ...]) -> bytes:
        """Return a chunk's values: little-endian, C order, padded to full shape."""
        box = tuple(
            slice(at * step, min(n, (at + 1) * step))
            for at, step, n in zip(place, self.chunks, self.shape, strict=True)
        )
        dtype = np.dtype(self.dtype).newbyteorder("<")
        values = np.ascontiguousarray(self.load(box), dtype=dtype)
        if values.shape != self.chunks:
            whole = np.full(self.chunks, np.nan if dtype.kind == "f" else 0, dtype)
            whole[tuple(slice(n) for n in values.shape)] = values
            values = whole
        return values.tobytes()

    def metadata(self, level: int) -> dict[str, Any]:
        """Return the array's ``zarr.json``."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.chunks)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.fill_value,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "gzip", "configuration": {"level": level}},
            ],
            "dimension_names": list(self.dims),
            "attributes": dict(self.attributes),
        }

    def described(self, path: str) -> dict[str, Any]:
        """Return what ``index.json`` says of the array."""
        return {
            "path": path,
            "dims": list(self.dims),
            "shape": list(self.shape),
            "chunks": list(self.chunks),
            "dtype": self.dtype,
            **self.attributes,
        }


# --- of one trace ------------------------------------------------------------------------------


def trace_arrays(ds: xr.Dataset, *, eight_bit: bool = False) -> list[BundleArray]:
    """Return one scenario's arrays; norms stand for the residual stream."""
    stored = [
        _of_variable(str(name), variable, ds.sizes["key"], eight_bit=eight_bit)
        for name, variable in sorted(ds.data_vars.items())
        if variable.ndim > 1
        and variable.dtype.kind != "O"  # text is in index.json
        and name != "residual"
    ]
    stored += [_attention_to_spans(ds)] if "attention" in ds else []
    return [*stored, *([_residual_norm(ds)] if "residual" in ds else [])]


def _residual_norm(ds: xr.Dataset) -> BundleArray:
    """Return norms of the residual stream, ``(layer, query)``.

    A position that is not stored is NaN.
    """
    residual = ds["residual"]
    stored, tokens = np.asarray(residual["query"]), ds.sizes["key"]

    def load(box: tuple[slice, ...]) -> np.ndarray:
        at = np.flatnonzero((stored >= box[1].start) & (stored < box[1].stop))
        out = np.full([part.stop - part.start for part in box], np.nan, np.float32)
        for number, layer in enumerate(range(box[0].start, box[0].stop)):  # one in memory at a time
            vectors = residual.isel(layer=layer, query=at).transpose("query", "channel").values
            norms = np.linalg.norm(vectors.astype(np.float64), axis=-1)
            out[number, stored[at] - box[1].start] = norms
        return out

    return BundleArray(
        name="residual_norm",
        dims=("layer", "query"),
        shape=(residual.sizes["layer"], tokens),
        chunks=(residual.sizes["layer"], min(_ROWS, tokens)),
        dtype="float32",
        load=load,
        attributes={
            "layers": [int(layer) for layer in np.asarray(residual["layer"])],
            "hook": ds.attrs["residual_hook"] or "",
        },
    )


def _attention_to_spans(ds: xr.Dataset) -> BundleArray:
    """Return each head's attention to each span ``(query, layer, head, place)``.

    Attention to a span is the sum over its tokens. The last place, :data:`STRONGEST`, is the
    largest weight of one token. The query itself is left out of it, and so is the first token,
    which many heads attend to if they find nothing else.
    """
    attention = ds["attention"]
    row = "attention_query" if "attention_query" in attention.dims else "query"
    first = str(attention.dims[0])
    stored = np.asarray(attention[row])
    spans = {str(name): list(span["tokens"]) for name, span in ds.attrs["spans"].items()}
    tokens = ds.sizes["key"]
    shape = (tokens, attention.sizes[first], attention.sizes["head"], len(spans) + 1)

    def load(box: tuple[slice, ...]) -> np.ndarray:
        out = np.full([part.stop - part.start for part in box], np.nan, np.float32)
        at = np.flatnonzero((stored >= box[0].start) & (stored < box[0].stop))
        rows = stored[at] - box[0].start
        # Several layers at once take a third of the time that they take one by one.
        each = max(1, _READ_BYTES // (4 * max(1, len(at)) * shape[2] * tokens))
        for start in range(box[1].start, box[1].stop, each):
            layers = slice(start, min(start + each, box[1].stop))
            chosen = attention.isel({first: layers, "head": box[2], row: at})
            weights = chosen.transpose(first, row, "head", "key").values.astype(np.float32)
            places = [weights[..., keys].sum(-1) for keys in spans.values()]
            absent = np.isnan(weights[..., 0])
            weights[..., 0] = 0
            weights[:, np.arange(len(at)), :, stored[at]] = 0
            places.append(np.where(absent, np.nan, weights.max(-1)))
            found = np.stack(places, axis=-1)[..., box[3]]
            out[rows, start - box[1].start : layers.stop - box[1].start] = found.swapaxes(0, 1)
        return out

    return BundleArray(
        name="attention_to_spans",
        dims=("query", "layer", "head", "place"),
        shape=shape,
        chunks=(min(_QUERIES_PER_MAP, tokens) if tokens <= WINDOW else 1, *shape[1:]),
        dtype="float32",
        load=load,
        attributes={
            "layers": [int(layer) for layer in np.asarray(ds[first])],
            "places": [*spans, STRONGEST],
        },
    )


def _of_variable(name: str, variable: xr.DataArray, tokens: int, *, eight_bit: bool) -> BundleArray:
    """Return an array with one row for each token."""

    def of_box(box: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(variable.isel(dict(zip(variable.dims, box, strict=True))).values)

    load: Callable[[tuple[slice, ...]], np.ndarray] = of_box
    dims, shape = tuple(map(str, variable.dims)), variable.shape
    attributes: dict[str, Any] = {}
    row = next((dim for dim in ("attention_query", "query") if dim in dims), None)
    if row is not None and variable.sizes[row] < tokens:
        axis = dims.index(row)
        load = _with_all_rows(variable, row)
        dims = (*dims[:axis], "query", *dims[axis + 1 :])
        shape = (*shape[:axis], tokens, *shape[axis + 1 :])
        if row != "query":
            attributes["row"] = row
    eight_bit = eight_bit and name == "attention"
    first = str(variable.dims[0])
    if first in ("layer", "attention_layer"):
        attributes["layers"] = [int(layer) for layer in np.asarray(variable[first])]
    dtype = "uint32" if variable.dtype.kind in "iu" else "float32"  # browsers lack float16
    if eight_bit:
        attributes |= {"scale": 1 / _STEPS, "missing": _MISSING, "bits": 8}
        dtype = "uint8"
    return BundleArray(
        name=name,
        dims=dims,
        shape=shape,
        chunks=_chunks(name, shape),
        dtype=dtype,
        load=(lambda box: _eight_bit(load(box))) if eight_bit else load,
        attributes=attributes,
    )


def _with_all_rows(variable: xr.DataArray, row: str) -> Load:
    """Return a loader with a row for every token.

    Rows that are not stored are NaN, or :data:`NO_ID` in arrays of ids.
    """
    axis = variable.dims.index(row)
    stored = np.asarray(variable[row])
    missing = np.nan if variable.dtype.kind == "f" else NO_ID

    def load(box: tuple[slice, ...]) -> np.ndarray:
        rows = box[axis]
        at = np.flatnonzero((stored >= rows.start) & (stored < rows.stop))
        wanted = {**dict(zip(variable.dims, box, strict=True)), row: at}
        out = np.full([part.stop - part.start for part in box], missing, variable.dtype)
        out[(slice(None),) * axis + (stored[at] - rows.start,)] = variable.isel(wanted).values
        return out

    return load


def _chunks(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(max(1, n) for n in shape)
    if name == "attention":  # a layer
        tokens = shape[2]
        return (1, shape[1], *_window(tokens))
    if name == "attention_mean":  # all layers: the overview and the flow into a token
        return (shape[0], *_window(shape[1]))
    tokens = min(shape[-2], WINDOW)
    if name.startswith("features"):  # a few features over all layers: their timelines
        fitting = _MAX_CHUNK_BYTES // (4 * shape[0] * tokens)
        return (shape[0], tokens, min(shape[2], max(16, 2 ** int(math.log2(max(1, fitting))))))
    return (*shape[:-2], tokens, shape[-1])


def _window(tokens: int) -> tuple[int, int]:
    return (tokens, tokens) if tokens <= WINDOW else (_ROWS, WINDOW)


def _eight_bit(values: np.ndarray) -> np.ndarray:
    codes = np.full(values.shape, _MISSING, np.uint8)
    known = ~np.isnan(values)
    codes[known] = np.clip(np.rint(values[known].astype(np.float32) * _STEPS), 0, _STEPS)
    return codes


# --- of the run: results of analyses for every feature ------------------------------------------


def run_arrays(traces: Mapping[str, xr.Dataset]) -> list[BundleArray]:
    """Return words and contrasts of every feature, if there are features."""
    having = {name: ds for name, ds in traces.items() if "features" in ds}
    if not having:
        return []
    layers = sorted({int(layer) for ds in having.values() for layer in np.asarray(ds["layer"])})
    features = max(ds.sizes["feature"] for ds in having.values())
    return [*_word_arrays(having, layers, features), *_contrast_arrays(having, layers, features)]


def _word_arrays(
    traces: Mapping[str, xr.Dataset], layers: Sequence[int], features: int
) -> list[BundleArray]:
    words = list(
        dict.fromkeys(str(text) for ds in traces.values() for text in np.asarray(ds["query_token"]))
    )
    table = _PerLayer(lambda at: _words_of_layer(traces, layers[at], features, words))

    def array(name: str, dtype: str, **more: Any) -> BundleArray:
        return BundleArray(
            name=name,
            dims=("layer", "feature", "word_rank"),
            shape=(len(layers), features, _WORDS),
            chunks=(1, min(features, _FEATURES_PER_TABLE), _WORDS),
            dtype=dtype,
            load=lambda box: table(box[0].start)[name][box[1], box[2]][None],
            attributes={"layers": list(layers), **more},
        )

    return [
        array("word", "uint32", words=words),
        array("word_score", "float32"),
        array("word_count", "uint32"),
    ]


def _words_of_layer(
    traces: Mapping[str, xr.Dataset], layer: int, features: int, words: Sequence[str]
) -> dict[str, np.ndarray]:
    found = word_associations(_tree(traces, [layer]), top=_WORDS)
    number = {word: i for i, word in enumerate(words)}
    out = {
        "word": np.zeros((features, _WORDS), np.uint32),
        "word_score": np.full((features, _WORDS), np.nan, np.float32),
        "word_count": np.zeros((features, _WORDS), np.uint32),
    }
    row = np.asarray(found["feature"])
    # Rows come by feature, best word first: a row's rank is its distance from its feature's first.
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    out["word"][row, rank] = [number[str(word)] for word in np.asarray(found["word"])]
    out["word_score"][row, rank] = np.asarray(found["score"])
    out["word_count"][row, rank] = np.asarray(found["count"])
    return out


def _contrast_arrays(
    traces: Mapping[str, xr.Dataset], layers: Sequence[int], features: int
) -> list[BundleArray]:
    pairs = _pairs(traces)
    if not pairs:
        return []
    tables = _PerLayer(lambda at: _contrast_of(traces, layers, pairs[at], features))
    return [
        BundleArray(
            name="contrast",
            dims=("pair", "layer", "feature", "statistic"),
            shape=(len(pairs), len(layers), features, len(STATISTICS)),
            chunks=(1, 1, min(features, _FEATURES_PER_TABLE), len(STATISTICS)),
            dtype="float32",
            load=lambda box: tables(box[0].start)["contrast"][box[1], box[2]][None],
            attributes={
                "layers": list(layers),
                "pairs": [list(pair) for pair in pairs],
                "statistics": list(STATISTICS),
            },
        )
    ]


def _pairs(traces: Mapping[str, xr.Dataset]) -> list[tuple[str, str]]:
    """Return pairs of disjoint tags with two or more scenarios each."""
    groups: dict[str, set[str]] = {}
    for name, ds in traces.items():
        for tag in ds.attrs["tags"]:
            groups.setdefault(tag, set()).add(name)
    large = [tag for tag, members in groups.items() if len(members) >= 2]
    return [(a, b) for a, b in itertools.combinations(large, 2) if not groups[a] & groups[b]][
        :_MAX_PAIRS
    ]


def _contrast_of(
    traces: Mapping[str, xr.Dataset],
    layers: Sequence[int],
    pair: tuple[str, str],
    features: int,
) -> dict[str, np.ndarray]:
    out = np.full((len(layers), features, len(STATISTICS)), np.nan, np.float32)
    try:
        found = contrast(_tree(traces, layers), *pair)
    except UsageError:  # nothing to compare: the groups are silent at the decision
        return {"contrast": out}
    layer = np.searchsorted(layers, np.asarray(found["layer"]))
    feature = np.asarray(found["feature"])
    for at, name in enumerate(STATISTICS):
        out[layer, feature, at] = np.asarray(found[name])
    return {"contrast": out}


def _tree(traces: Mapping[str, xr.Dataset], layers: Sequence[int]) -> xr.DataTree:
    def only(ds: xr.Dataset) -> xr.Dataset:
        kept = np.flatnonzero(np.isin(np.asarray(ds["layer"]), layers))
        return ds.isel(layer=kept)

    root = xr.Dataset(attrs={"kind": "run", "scenarios": list(traces)})
    return xr.DataTree.from_dict({"/": root, **{name: only(ds) for name, ds in traces.items()}})


class _PerLayer:
    """Tables that are computed on first use, once for all threads."""

    def __init__(self, compute: Callable[[int], dict[str, np.ndarray]]) -> None:
        self._compute = compute
        self._found: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, at: int) -> dict[str, np.ndarray]:
        with self._lock:
            if at not in self._found:
                self._found[at] = self._compute(at)
            return self._found[at]
