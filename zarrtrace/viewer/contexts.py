"""Strongest tokens of features, from a run's index."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from zarrtrace.errors import ConfigError, IntegrityError, ZarrtraceError
from zarrtrace.format.layout import INDEX
from zarrtrace.index.labels import home_of
from zarrtrace.index.names import WORDS, distinct_words
from zarrtrace.index.uses import AFTER, BEFORE
from zarrtrace.scenarios import check_trace_name
from zarrtrace.storage import Location
from zarrtrace.store import RunIndex, digest_of, read_special, read_token_texts, read_trace
from zarrtrace.text import terminal_text

#: Features in a file. Their tokens may come from as many scenarios, whose texts are read.
_FEATURES = 256
#: In a larger run a file holds one feature: each scenario's texts take 3 ms to read.
_MOST_SCENARIOS = 500
#: Different contexts of a feature that are listed.
_LISTED = 10


class _Scenario(NamedTuple):
    """Token texts of a scenario, prompt length, and special tokens."""

    name: str
    texts: list[str]
    prompt: int
    special: np.ndarray


#: An activation, the scenario, the position.
_Use = tuple[float, _Scenario, int]


class Contexts:
    """Files with the strongest tokens of a block of features each.

    Parameters
    ----------
    path
        A run, or a trace of a run.
    layers
        The decoder blocks that are shown.
    shown
        Number of scenarios that are shown.
    """

    def __init__(self, path: Location, layers: Collection[int], shown: int) -> None:
        self._home = home_of(path, INDEX)
        self._layers, self._shown = layers, shown
        self._scenario = functools.lru_cache(maxsize=4096)(self._read_scenario)

    @functools.cached_property
    def _index(self) -> RunIndex:
        index = RunIndex(self._home)
        attributes = index.attributes
        if self._shown <= _MOST_SCENARIOS < attributes.scenarios:
            raise ConfigError(
                f"the index is of {attributes.scenarios:,} scenarios, of which this page shows "
                f"{self._shown:,}",
                remedy="'zarrtrace find' shows the strongest tokens of a feature.",
            )
        return index

    @functools.cached_property
    def described(self) -> dict[str, Any] | None:
        """Description in ``index.json``; None if the run has no index."""
        if not (self._home / INDEX / "zarr.json").is_file():
            return None
        try:
            found = self._index.attributes
        except ZarrtraceError as error:
            return {"problem": terminal_text(str(error))}
        return {
            "arrays": dict(found.features),
            "layers": [layer for layer in found.layers if layer in self._layers],
            "step": _FEATURES if found.scenarios <= _MOST_SCENARIOS else 1,
            "special": found.special,
            "indexed": found.indexed,
            "scenarios": found.scenarios,
        }

    def files(self) -> Iterator[str]:
        """Yield the paths of all files."""
        found = self.described or {}
        for array, features in found.get("arrays", {}).items():
            for layer in found["layers"]:
                for block in range(-(-features // found["step"])):
                    yield f"data/@strongest/{array}/{layer}/{block}.json.gz"

    def read(self, file: str) -> dict[str, Any]:
        """Return the content of one file.

        Raises
        ------
        KeyError
            If there is no such file.
        IntegrityError
            If the index is damaged, or of a run that has changed since.
        """
        found = self.described or {}
        parts = re.fullmatch(
            r"data/@strongest/([^/]+)/(0|[1-9]\d{,8})/(0|[1-9]\d{,8})\.json\.gz", file
        )
        if parts is None or int(parts[2]) not in found.get("layers", ()):
            raise KeyError(file)
        array, layer = parts[1], int(parts[2])
        first, features = int(parts[3]) * found["step"], found["arrays"][array]
        if first >= features:
            raise KeyError(file)
        return self._block(array, layer, range(first, min(features, first + found["step"])))

    def _block(self, array: str, layer: int, features: range) -> dict[str, Any]:
        index = self._index
        suffix, at = array.removeprefix("features"), index.attributes.layers.index(layer)
        part = slice(features.start, features.stop)
        active, mean = (index.read(f"{name}{suffix}", at, part) for name in ("active", "mean"))
        columns = [
            index.read(f"token_{name}{suffix}", at, part, slice(None))
            for name in ("activation", "scenario", "position")
        ]
        return {
            "tokens": int(index.read(f"tokens{suffix}", at)),
            "features": {
                str(feature): {
                    "active": int(active[row]),
                    "mean": _number(mean[row]),
                    **self._strongest(*(column[row] for column in columns)),
                }
                for row, feature in enumerate(features)
                if active[row]
            },
        }

    def _strongest(
        self, activations: np.ndarray, scenarios: np.ndarray, positions: np.ndarray
    ) -> dict[str, Any]:
        """Return activations, words and contexts of a feature, special tokens left out."""
        kept: list[_Use] = []
        for value, number, position in zip(
            activations[activations != 0], scenarios.tolist(), positions.tolist(), strict=False
        ):
            found = self._scenario(number)
            if position >= len(found.texts):
                raise self._of_another_run()
            if not found.special[position]:
                kept.append((_number(value), found, position))
        return {
            "activations": [value for value, _, _ in kept],
            "words": distinct_words((found.texts[at] for _, found, at in kept), WORDS),
            "contexts": _contexts(kept),
        }

    @functools.cached_property
    def _names(self) -> list[str]:
        return [str(name) for name in self._index.read("scenario", slice(None))]

    @functools.cached_property
    def _digests(self) -> np.ndarray:
        return np.asarray(self._index.read("digest", slice(None)))

    def _read_scenario(self, number: int) -> _Scenario:
        """Read a scenario's texts, if its features are the indexed ones."""
        if number >= len(self._names):
            raise self._of_another_run()
        # It becomes a path: a file from elsewhere must not lead out of the run.
        name = check_trace_name(self._names[number])
        trace = read_trace(self._home / name)
        if digest_of(trace) != self._digests[number]:
            raise self._of_another_run()
        texts, prompt = read_token_texts(self._home / name)
        return _Scenario(name, texts, prompt, read_special(trace, np.arange(len(texts))))

    def _of_another_run(self) -> IntegrityError:
        return IntegrityError(
            f"{self._home}: its index is not of what is there now",
            why="The run was changed since, or the index is damaged.",
            remedy="Build the index again: 'zarrtrace index --rebuild'.",
        )


def _contexts(uses: Sequence[_Use]) -> list[list[Any]]:
    """Return each different context with its strongest use and count.

    Prompts of one template share most of their text: 20 tokens may be 20 times the same words.
    """
    found: dict[tuple[str, str, str], list[Any]] = {}
    for value, of, at in uses:
        before, after = of.texts[max(0, at - BEFORE) : at], of.texts[at + 1 : at + 1 + AFTER]
        text = ("".join(before), of.texts[at], "".join(after))
        first = found.setdefault(text, [of.name, at, value, *text, int(at >= of.prompt), 0])
        first[-1] += 1
    return list(found.values())[:_LISTED]


def _number(value: np.floating[Any]) -> float:
    """Return a float32 with as few digits as it takes."""
    return float(str(value))
