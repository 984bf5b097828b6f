"""The bundle's layout: every file of it, made from a run on demand.

A bundle is the page, ``index.json`` and, under ``data/``, unsharded Zarr v3 arrays whose chunks
are gzip: a browser unpacks them without a library, and a host needs no byte ranges. Chunks are
sized so that what the page shows at once is one small request.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np
import xarray as xr
from zlib_ng import zlib_ng

from zarrtrace.analysis.special import special_keys
from zarrtrace.errors import ConfigError, IncompleteError
from zarrtrace.format.attributes import ranges, sae_coordinate
from zarrtrace.format.layout import LABELLED, NO_ID
from zarrtrace.index.labels import home_of, read_labels
from zarrtrace.index.neuronpedia import source_of
from zarrtrace.scenarios import chosen_names, name_of
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    kind_of,
    labelled_layers,
    open_run,
    open_trace,
    read_run,
    read_staged,
    read_trace,
)
from zarrtrace.text import terminal_text
from zarrtrace.viewer.arrays import BundleArray, run_arrays, trace_arrays

#: Version of the bundle's layout; the page refuses another.
BUNDLE_VERSION = 1

#: The page's own files, by the name they have in a bundle.
PAGE_FILES = (
    "index.html",
    "style.css",
    "main.js",
    "types.js",
    "store.js",
    "state.js",
    "draw.js",
    "plot.js",
    "overview.js",
    "align.js",
    "prompt.js",
    "attention.js",
    "maps.js",
    "code.js",
    "features.js",
    "labels.js",
    "compare.js",
)

#: The page holds names and tokens of all its scenarios: of more it would take long to open.
MOST_SCENARIOS = 500

_GZIP_LEVEL = 1


class Layout:
    """The files of a bundle of one run; the same bytes for every producer.

    Parameters
    ----------
    path
        A run, or a trace that stands alone.
    scenarios
        Only these, in the run's order; all if None.
    layers
        Only these decoder blocks; all if None.
    eight_bit
        Whether attention is rounded to 8 bits, which the page says.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        As for :func:`zarrtrace.open_run`.
    ConfigError
        If a scenario or layer asked for is not in the run, or there are more scenarios than
        :data:`MOST_SCENARIOS`.
    """

    def __init__(
        self,
        path: Address,
        *,
        scenarios: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        eight_bit: bool = False,
    ) -> None:
        self.path = locate(path)
        self.eight_bit = eight_bit
        names = _names(self.path, scenarios)
        self._missing = _missing_layers(self.path, names)
        self.traces = _only_layers(_open(self.path, names), layers)
        self._lock = threading.Lock()

    @cached_property
    def arrays(self) -> dict[str, BundleArray]:
        """Every array by its folder below ``data/``."""
        found = {
            f"{scenario}/{array.name}": array
            for scenario, ds in self.traces.items()
            for array in trace_arrays(ds, eight_bit=self.eight_bit)
        }
        return found | {f"@run/{array.name}": array for array in self._run_arrays}

    @cached_property
    def _run_arrays(self) -> list[BundleArray]:
        return run_arrays(self.traces)

    @cached_property
    def index(self) -> bytes:
        """``index.json``: what the page knows before it reads a chunk."""
        first = next(iter(self.traces.values()))
        model = first.attrs.get("model") or {}
        run: dict[str, Any] = {
            "version": BUNDLE_VERSION,
            "title": terminal_text(self.path.resolved().name),
            "model": model.get("id") and terminal_text(model["id"]),
            "vocabulary": _vocabulary(self.traces),
            "scenarios": [self._scenario(name, ds) for name, ds in self.traces.items()],
            "sources": _sources(self.traces),
            "run": {
                array.name: array.described(f"@run/{array.name}") for array in self._run_arrays
            },
        }
        if self._labelled:
            run["labels"] = self._labelled
        return json.dumps(run, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()

    @cached_property
    def _labelled(self) -> dict[str, list[int]]:
        """The layers that are shown and have labels, by array of features."""
        shown = {int(layer) for ds in self.traces.values() for layer in np.asarray(ds["layer"])}
        found = labelled_layers(home_of(self.path, LABELLED))
        kept = {array: [n for n in layers if n in shown] for array, layers in found.items()}
        return {array: layers for array, layers in kept.items() if layers}

    def label_files(self) -> list[str]:
        """Return the paths of the files of labels, one an array and layer."""
        return [
            f"data/@labels/{array}/{layer}.json.gz"
            for array, layers in self._labelled.items()
            for layer in layers
        ]

    def _scenario(self, name: str, ds: xr.Dataset) -> dict[str, Any]:
        attributes = ds.attrs
        layers = [int(layer) for layer in np.asarray(ds["layer"])]
        missing = self._missing.get(name, ())
        return {
            "name": name,
            "tags": [terminal_text(tag) for tag in attributes["tags"]],
            "tokens": [str(text) for text in np.asarray(ds["key_token"])],
            "special": np.flatnonzero(special_keys(ds)).tolist(),
            "token_ids": [int(token) for token in np.asarray(ds["token_id"])],
            "spans": {
                terminal_text(span): found["tokens"] for span, found in attributes["spans"].items()
            },
            "options": {
                terminal_text(option): found["token_id"]
                for option, found in attributes["options"].items()
            },
            **_generated(attributes),
            "layers": layers,
            "missing": [layer for layer in layers if layer in missing],
            "arrays": {
                array.name: array.described(path)
                for path, array in self.arrays.items()
                if path.startswith(f"{name}/")
            },
        }

    def files(self) -> Iterator[str]:
        """Yield the path of every file, the page first."""
        yield from PAGE_FILES
        yield "index.json"
        yield "data/zarr.json"
        for scenario in (*self.traces, *(["@run"] if self._run_arrays else [])):
            yield f"data/{scenario}/zarr.json"
        yield from self.label_files()
        for path, array in self.arrays.items():
            yield f"data/{path}/zarr.json"
            for place in array.grid():
                yield f"data/{path}/c/{'/'.join(map(str, place))}"

    def read(self, file: str) -> bytes:
        """Make one file.

        Raises
        ------
        KeyError
            If the bundle has no such file.
        """
        if file in PAGE_FILES:
            return page_file(file)
        if file == "index.json":
            with self._lock:
                return self.index
        folder, _, rest = file.partition("/")
        if folder != "data":
            raise KeyError(file)
        groups = ("", *(f"{name}/" for name in (*self.traces, "@run")))
        if rest in {f"{group}zarr.json" for group in groups}:
            return _as_json({"zarr_format": 3, "node_type": "group", "attributes": {}})
        parts = rest.split("/")
        if parts[0] == "@labels":
            return self._label_file(file)
        array = self.arrays["/".join(parts[:2])]
        if parts[2:] == ["zarr.json"]:
            return _as_json(array.metadata(_GZIP_LEVEL))
        if parts[2:3] != ["c"] or not all(re.fullmatch(r"[0-9]{1,9}", p) for p in parts[3:]):
            raise KeyError(file)
        place = tuple(map(int, parts[3:]))
        if [str(number) for number in place] != parts[3:] or not array.has(place):
            raise KeyError(file)
        return _gzip(array.chunk(place))

    def _label_file(self, file: str) -> bytes:
        if file not in self.label_files():
            raise KeyError(file)
        array, layer = file.removesuffix(".json.gz").split("/")[2:]
        found = read_labels(self.path, array=array, layers=[int(layer)])
        labels = map(terminal_text, found["label"])
        by_feature = dict(zip(map(str, found["feature"]), labels, strict=True))
        return _gzip(json.dumps(by_feature, ensure_ascii=True, separators=(",", ":")).encode())


def _generated(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what the page says of generated text; nothing if all tokens are the prompt."""
    found, choice = attributes.get("generation"), attributes.get("choice")
    if found is None:
        return {}
    return {
        "generated": {
            "from": found["prompt_tokens"],
            "text": terminal_text(found["text"]),
            "choice": choice and terminal_text(choice),
            "ended_by": found["ended_by"],
        }
    }


def page_file(name: str) -> bytes:
    """Return a file of the page."""
    return resources.files("zarrtrace.viewer").joinpath("page", name).read_bytes()


def _gzip(content: bytes) -> bytes:
    # A live server compresses while someone waits. Floats hold few repeats but the zeros: looking
    # for runs only takes half the time of level 1's search and makes attention no larger.
    packer = zlib_ng.compressobj(
        _GZIP_LEVEL, zlib_ng.DEFLATED, 16 + zlib_ng.MAX_WBITS, 9, zlib_ng.Z_RLE
    )
    return packer.compress(content) + packer.flush()


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()


def _names(path: Location, chosen: Sequence[str] | None) -> list[str]:
    """Return the scenarios to show, in the run's order.

    Raises
    ------
    ConfigError
        If there are too many.
    ScenarioError
        If one of those that were chosen is not there.
    """
    kind = kind_of(path)
    known = (
        [read_trace(path).attributes.name]
        if kind == "trace"
        else [*read_run(path).attributes.scenarios]
    )
    names = [*chosen_names(known, chosen)]
    if len(names) > MOST_SCENARIOS:
        raise ConfigError(
            f"{path}: {len(names):,} scenarios, one page shows at most {MOST_SCENARIOS}",
            why="It lists all its scenarios, and reads the tokens of each when it opens.",
            remedy="Choose some: --scenario NAME, repeatable. 'zarrtrace info' lists them.",
        )
    return names


def _open(path: Location, names: Sequence[str]) -> dict[str, xr.Dataset]:
    if kind_of(path) == "trace":
        ds = open_trace(path, missing="nan")
        return {name_of(ds.attrs): ds}
    run = open_run(path, scenarios=names, missing="nan")
    found = {name: run[name].to_dataset() for name in names if name in run.children}
    if not found:
        raise IncompleteError(
            f"{path}: no scenario is stored yet",
            why="The extraction was interrupted, or is still running.",
            remedy="Run the same 'zarrtrace extract' again to resume it.",
        )
    return found


def _missing_layers(path: Location, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the layers that traces lack, of a run that is not complete."""
    if kind_of(path) == "trace" or read_run(path).attributes.complete:
        return {}
    staged = {name: read_staged(path / name) for name in names}
    return {name: found[1] for name, found in staged.items() if found is not None}


def _only_layers(
    traces: dict[str, xr.Dataset], layers: Sequence[int] | None
) -> dict[str, xr.Dataset]:
    if layers is None:
        return traces
    found = {}
    for name, ds in traces.items():
        absent = sorted(set(layers) - {int(layer) for layer in np.asarray(ds["layer"])})
        if absent:
            raise ConfigError(
                f"{name} has no layer {absent[0]}",
                remedy=f"It has layers {ranges(np.asarray(ds['layer']).tolist())}.",
            )
        chosen = {
            dim: np.isin(np.asarray(ds[dim]), layers)
            for dim in ("layer", "attention_layer")
            if dim in ds.dims
        }
        found[name] = ds.isel({dim: np.flatnonzero(kept) for dim, kept in chosen.items()})
    return found


def _vocabulary(traces: dict[str, xr.Dataset]) -> dict[str, str]:
    """Return the text of every token id that the run holds."""
    found: dict[int, str] = {}
    for ds in traces.values():
        for option in ds.attrs["options"].values():
            found.setdefault(int(option["token_id"]), str(option["text"]))
    for ds in traces.values():
        found |= _texts_by_id(ds["token_id"], ds["key_token"])
    for ds in traces.values():
        if "next_token" in ds:
            found |= _texts_by_id(ds["next_token"], ds["next_token_text"])
    found.pop(NO_ID, None)
    return {str(number): found[number] for number in sorted(found)}


def _texts_by_id(ids: xr.DataArray, texts: xr.DataArray) -> dict[int, str]:
    numbers, first = np.unique(np.asarray(ids).ravel(), return_index=True)
    return {
        int(number): str(text)
        for number, text in zip(numbers, np.asarray(texts).ravel()[first], strict=True)
    }


def _sources(traces: dict[str, xr.Dataset]) -> dict[str, dict[str, str]]:
    """Return where Neuronpedia shows an SAE's features, by array and layer."""
    out: dict[str, dict[str, str]] = {}
    for ds in traces.values():
        for variable, sae in ds.attrs["saes"].items():
            ids = np.asarray(ds[sae_coordinate("id", variable)])
            for layer, sae_id in zip(np.asarray(ds["layer"]), ids, strict=True):
                source = source_of(sae["release"], str(sae_id))
                if source:
                    out.setdefault(variable, {})[str(layer)] = source
    return out


def dense_bytes(array: BundleArray) -> int:
    """Return the size of an array's chunks, not compressed."""
    itemsize = np.dtype(array.dtype).itemsize
    return itemsize * math.prod(array.chunks) * sum(1 for _ in array.grid())


def sample(array: BundleArray) -> list[tuple[int, ...]]:
    """Return some places of an array's chunks, spread evenly over them."""
    # Not first, middle and last: those of a triangular matrix are not like the others.
    places = list(itertools.islice(array.grid(), 100_000))
    step = len(places) / min(len(places), 16)
    return [places[int((i + 0.5) * step)] for i in range(min(len(places), 16))]
