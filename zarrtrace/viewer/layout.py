"""Layout of a bundle, whose files are made on demand.

A bundle is the page, ``index.json`` and, under ``data/``, unsharded Zarr v3 arrays whose chunks
are gzip: a browser unpacks them without a library, and a host needs no byte ranges. Chunks are
sized so that one view takes one small request.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import xarray as xr
from zlib_ng import zlib_ng

from zarrtrace.analysis.special import special_keys
from zarrtrace.format.attributes import sae_coordinate
from zarrtrace.format.layout import LABELLED, NO_ID
from zarrtrace.index.labels import home_of, read_labels
from zarrtrace.index.neuronpedia import source_of
from zarrtrace.storage import Address, locate
from zarrtrace.store import labelled_layers
from zarrtrace.text import terminal_text
from zarrtrace.viewer.arrays import BundleArray, run_arrays, trace_arrays
from zarrtrace.viewer.contexts import Contexts
from zarrtrace.viewer.page_files import PAGE_FILES, page_file
from zarrtrace.viewer.traces import Traces

#: Version of the bundle's layout; the page refuses another.
BUNDLE_VERSION = 2

#: Scenarios whose tags and metadata are in one file.
LISTED = 500
_GZIP_LEVEL = 1
# Folders below ``data/`` whose files are compressed JSON.
_TEXTS = ("@labels", "@strongest", "@scenarios", "@listing")


class Layout:
    """Files of a run's bundle, the same bytes for every producer; a live index has a source.

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
    seals
        The seal that a trace must have, by name, if it was opened before.
    is_live
        Whether the page is read where the run is: its index then holds `path` as it was given,
        for lines of Python. A bundle travels, and tells no paths of the machine it is from.

    Raises
    ------
    NotATraceError, FormatVersionError, IntegrityError
        As for :func:`zarrtrace.open_run`.
    ConfigError, ScenarioError
        If a layer or a scenario asked for is not in the run.
    """

    def __init__(
        self,
        path: Address,
        *,
        scenarios: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        eight_bit: bool = False,
        seals: Mapping[str, str | None] | None = None,
        is_live: bool = False,
    ) -> None:
        self.path = locate(path)
        self.eight_bit, self._is_live = eight_bit, is_live
        self.traces = Traces(self.path, scenarios=scenarios, layers=layers, seals=seals)
        self._arrays_of = lru_cache(maxsize=LISTED)(self._describe_arrays)
        self._lock = threading.Lock()

    @cached_property
    def arrays(self) -> dict[str, BundleArray]:
        """Every array by its folder below ``data/``."""
        groups = (*self.traces, "@run")
        return {path: array for group in groups for path, array in self._arrays_of(group).items()}

    def _describe_arrays(self, group: str) -> dict[str, BundleArray]:
        """Return arrays of a scenario or the run by folder."""
        if group == "@run":
            found = self._run_arrays
        else:
            found = trace_arrays(self.traces[group], eight_bit=self.eight_bit)
        return {f"{group}/{array.name}": array for array in found}

    @cached_property
    def _run_arrays(self) -> list[BundleArray]:
        # Words and contrasts read every scenario.
        return [] if self.traces.is_large else run_arrays(self.traces)

    @cached_property
    def index(self) -> bytes:
        """Content of ``index.json``, which the page reads first."""
        first = next(iter(self.traces.values()))
        model = first.attrs.get("model") or {}
        run: dict[str, Any] = {
            "version": BUNDLE_VERSION,
            "title": terminal_text(self.path.resolved().name),
            "model": model.get("id") and terminal_text(model["id"]),
            "scenarios": [*self.traces],
            "listed": LISTED,
            "run": {
                array.name: array.described(f"@run/{array.name}") for array in self._run_arrays
            },
        }
        if self._labelled:
            run["labels"] = self._labelled
        if self._contexts.described:
            run["strongest"] = self._contexts.described
        if self._is_live:
            run["source"] = self._source()
        return _compact(run)

    def _source(self) -> dict[str, str]:
        """Return the function of zarrtrace that opens the path, and its arguments."""
        options = dict(self.path.options)
        given = f", storage_options={options!r}" if options else ""
        return {
            "call": "open_run" if self.traces.is_run else "open_trace",
            "arguments": f"{str(self.path)!r}{given}",
        }

    @cached_property
    def _labelled(self) -> dict[str, list[int]]:
        """Layers with labels, by array of features."""
        shown = self.traces.layers
        found = labelled_layers(home_of(self.path, LABELLED))
        kept = {array: [n for n in layers if n in shown] for array, layers in found.items()}
        return {array: layers for array, layers in kept.items() if layers}

    @cached_property
    def _contexts(self) -> Contexts:
        return Contexts(self.path, self.traces.layers, len(self.traces))

    def context_files(self) -> list[str]:
        """Return the paths of files of strongest tokens."""
        return list(self._contexts.files())

    def label_files(self) -> list[str]:
        """Return the paths of files of labels, by array and layer."""
        return [
            f"data/@labels/{array}/{layer}.json.gz"
            for array, layers in self._labelled.items()
            for layer in layers
        ]

    def scenario_files(self) -> list[str]:
        """Return the paths of scenarios' files and of their list."""
        parts = range(-(-len(self.traces) // LISTED))
        return [
            *(f"data/@scenarios/{name}.json.gz" for name in self.traces),
            *(f"data/@listing/{part}.json.gz" for part in parts),
        ]

    def _listing(self, at: int) -> dict[str, Any]:
        """Return tags and metadata of the scenarios of one file."""
        names = [*itertools.islice(self.traces, at * LISTED, (at + 1) * LISTED)]
        if not names:
            raise KeyError(at)
        found = self.traces.about(names)
        return {
            "tags": [one and [terminal_text(tag) for tag in one[0]] for one in found],
            "metadata": [_readable(one[1]) if one else {} for one in found],
        }

    def _scenario(self, name: str) -> dict[str, Any]:
        """Return a description of a scenario, all but its chunks."""
        ds = self.traces[name]
        attributes = ds.attrs
        layers = [int(layer) for layer in np.asarray(ds["layer"])]
        missing = self.traces.missing(name)
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
            "metadata": _readable(attributes["metadata"]),
            **_generated(attributes),
            "layers": layers,
            "missing": [layer for layer in layers if layer in missing],
            "arrays": {
                array.name: array.described(path) for path, array in self._arrays_of(name).items()
            },
            "vocabulary": _vocabulary(ds),
            "sources": _sources(ds),
        }

    def files(self) -> Iterator[str]:
        """Yield the path of every file, the page first."""
        yield from PAGE_FILES
        yield "index.json"
        yield "data/zarr.json"
        for scenario in (*self.traces, *(["@run"] if self._run_arrays else [])):
            yield f"data/{scenario}/zarr.json"
        yield from self.label_files()
        yield from self.scenario_files()
        yield from self._contexts.files()
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
        group, *parts = rest.split("/")
        if group in _TEXTS:
            return _gzip_text(_compact(self._text_file(group, file)))
        is_group = parts == ["zarr.json"] and (group in self.traces or group == "@run")
        if rest == "zarr.json" or is_group:
            return _as_json({"zarr_format": 3, "node_type": "group", "attributes": {}})
        return self._array_file(group, parts)

    def _array_file(self, group: str, parts: list[str]) -> bytes:
        """Make the metadata or a chunk of an array."""
        array = self._arrays_of(group)["/".join([group, *parts[:1]])]
        if parts[1:] == ["zarr.json"]:
            return _as_json(array.metadata(_GZIP_LEVEL))
        if parts[1:2] != ["c"] or not all(re.fullmatch(r"[0-9]{1,9}", p) for p in parts[2:]):
            raise KeyError("/".join(parts))
        place = tuple(map(int, parts[2:]))
        if [str(number) for number in place] != parts[2:] or not array.has(place):
            raise KeyError("/".join(parts))
        return _gzip(array.chunk(place))

    def _text_file(self, group: str, file: str) -> Mapping[str, Any]:
        """Return labels, strongest tokens, a scenario or a part of the list."""
        if group == "@labels":
            return self._label_file(file)
        if group == "@strongest":
            return self._contexts.read(file)
        name = file.removeprefix(f"data/{group}/").removesuffix(".json.gz")
        if file != f"data/{group}/{name}.json.gz":
            raise KeyError(file)
        if group == "@scenarios":
            return self._scenario(name)
        if re.fullmatch("0|[1-9][0-9]{0,8}", name):
            return self._listing(int(name))
        raise KeyError(file)

    def _label_file(self, file: str) -> dict[str, str]:
        if file not in self.label_files():
            raise KeyError(file)
        array, layer = file.removesuffix(".json.gz").split("/")[2:]
        found = read_labels(self.path, array=array, layers=[int(layer)])
        labels = map(terminal_text, found["label"])
        return dict(zip(map(str, found["feature"]), labels, strict=True))


def _generated(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a description of generated text; empty if there is none."""
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


def _readable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata without control characters in its texts."""
    return {
        terminal_text(str(name)): terminal_text(value) if isinstance(value, str) else value
        for name, value in metadata.items()
    }


def _gzip(content: bytes) -> bytes:
    # A live server compresses while someone waits. Floats hold few repeats but the zeros: looking
    # for runs only takes half the time of level 1's search and makes attention no larger.
    packer = zlib_ng.compressobj(
        _GZIP_LEVEL, zlib_ng.DEFLATED, 16 + zlib_ng.MAX_WBITS, 9, zlib_ng.Z_RLE
    )
    return packer.compress(content) + packer.flush()


def _compact(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _gzip_text(content: bytes) -> bytes:
    # Text repeats itself: with the search, contexts take a third of the bytes.
    packer = zlib_ng.compressobj(_GZIP_LEVEL, zlib_ng.DEFLATED, 16 + zlib_ng.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()


def _vocabulary(ds: xr.Dataset) -> dict[str, str]:
    """Return the text of every token id of a trace."""
    found = {int(one["token_id"]): str(one["text"]) for one in ds.attrs["options"].values()}
    found |= _texts_by_id(ds["token_id"], ds["key_token"])
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


def _sources(ds: xr.Dataset) -> dict[str, dict[str, str]]:
    """Return sources of features on Neuronpedia, by array and layer."""
    out: dict[str, dict[str, str]] = {}
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
