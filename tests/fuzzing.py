"""Fuzzed readers of strangers' files, each fed with bytes or JSON."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fakes
import hostile
import numpy as np
from hypothesis import strategies as st

from zarrtrace.errors import IntegrityError, ZarrtraceError
from zarrtrace.format.layout import NO_ID
from zarrtrace.npz import import_npz
from zarrtrace.scenarios import as_scenarios, load_suite
from zarrtrace.store import open_run, open_trace, summarize, verify

#: Metadata of a run and of a trace that is fuzzed.
FILES = ["zarr.json", "Safe_1/zarr.json", "Safe_1/features/zarr.json"]

#: Metadata of a folder in the documented NPZ layout.
METADATA = "metadata_L1_2.json"

#: Numbers and texts that readers stumble over.
AWKWARD = [None, True, -1, 0, 10**18, 10**30, "", "../x", "1", "\ud800", "layer", "bytes"]

#: Any JSON.
anything: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(AWKWARD),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)

#: Fields of a scenario, right and wrong.
entries = st.dictionaries(
    st.sampled_from(
        ["name", "prompt", "template", "values", "spans", "tags", "options", "metadata", "promt"]
    ),
    st.one_of(anything, st.sampled_from(["a", "{x}", "[[goal:a]] b", {"goal": "a"}, ["risky"]])),
)

#: Pieces of CSV, glued together.
csv_text = st.lists(
    st.one_of(
        st.sampled_from(
            ["prompt,", "name,", "tags,", "spans,", "a,", "a b,", "\n", "\r", "x,", '"', "{", "[1]",
             '"{""s"": ""x""}",', "nan", "1e5", "007", "true", "\0", "\ufeff", ";"]
        ),
        st.text(max_size=6),
    ),
    max_size=16,
).map(lambda pieces: "prompt,a" + "".join(pieces))  # fmt: skip

#: Pieces of YAML, glued together.
yaml_text = st.lists(
    st.one_of(
        st.sampled_from(
            ["scenarios:\n", "- name: a\n", "  prompt: x\n", "  spans: {goal: x}\n", "[", "{",
             "&a ", "*a", "!!int ", "!!timestamp ", "!!binary ", "? ", "|\n", "'", '"', "\t",
             "---\n", "<<: "]
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)  # fmt: skip


@contextmanager
def only_our_errors() -> Iterator[None]:
    """Let through any exception but our own."""
    with warnings.catch_warnings(), suppress(ZarrtraceError):
        warnings.simplefilter("ignore")  # NumPy's about odd headers
        yield


class Targets:
    """Readers, with files to spoil below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        good = fakes.make_run(folder, name="good")
        self._run, self._truth = good.path, good.truth["Safe_1"]
        begun = fakes.make_run(folder, name="begun", drop={"Safe_1": fakes.LAYERS[-1:]})
        self._begun = begun.path
        self._layout = folder / "npz"
        make_layout(self._layout)

    def suite(self, content: bytes, ending: str) -> None:
        """Read a scenario file."""
        file = self._folder / f"suite{ending}"
        file.write_bytes(content)
        with only_our_errors():
            load_suite(file)

    def scenarios(self, given: Any) -> None:
        """Take scenarios from Python."""
        with only_our_errors():
            assert as_scenarios(as_scenarios(given))

    def store(self, name: str, change: Callable[[Any], Any]) -> None:
        """Open, summarise and verify a run after a change of one file's JSON; the seal fits."""
        found = change(json.loads((self._run / name).read_bytes()))
        content = hostile.sealed(found)
        with tempfile.TemporaryDirectory(dir=self._folder) as made:
            run = Path(made) / "run"
            shutil.copytree(self._run, run)
            (run / name).write_bytes(content)
            for read in (open_run, summarize, verify):
                with only_our_errors():
                    read(run)
            self._read_the_same(run)

    def _read_the_same(self, run: Path) -> None:
        """Read a trace: what was written, nothing where layers are missing, or an error."""
        with only_our_errors():
            ds = open_trace(run / "Safe_1", missing="nan")
            for name, expected in self._truth.items():
                if name not in ds.variables:
                    continue
                with suppress(IntegrityError):
                    found = ds[name].values
                    same = found == expected
                    if expected.dtype.kind == "f":
                        same |= np.isnan(found)
                    elif name in ("top_feature", "next_token"):
                        same |= found == NO_ID
                    elif name == "next_token_text":
                        same |= found == ""
                    assert np.all(same), name

    def journal(self, number: int, change: Callable[[Any], Any]) -> None:
        """Read and go on with a trace whose journal has another line; its checksum fits."""
        with tempfile.TemporaryDirectory(dir=self._folder) as made:
            run = Path(made) / "begun"
            shutil.copytree(self._begun, run)
            staged = run / ".staged" / "Safe_1"
            lines = hostile.journal_of(staged)
            lines[number % len(lines)] = change(lines[number % len(lines)])
            hostile.write_journal(staged, lines)
            with only_our_errors():
                summarize(run)
            self._read_the_same(run)
            again = fakes.make_run(Path(made), name="begun")
            assert verify(again.path) == []
            ds = open_trace(again.trace)
            for name, expected in self._truth.items():
                np.testing.assert_array_equal(ds[name].values, expected, err_msg=name)

    def index(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Read a trace of which the index of a file says other places; its checksum fits."""
        with tempfile.TemporaryDirectory(dir=self._folder) as made:
            run = Path(made) / "run"
            shutil.copytree(self._run, run)
            found = hostile.index_of(run / "Safe_1", "features")
            for chunk, offset, length in entries:
                found[chunk % len(found)] = offset, length
            hostile.replace_index(run / "Safe_1", "features", found)
            self._read_the_same(run)
            with only_our_errors():
                verify(run)

    def layer(self, content: bytes, *, whole: bool) -> None:
        """Import a folder in which a layer's file, or the array in it, is other bytes."""
        file = self._layout / "a" / "layer_2.npz"
        if whole:
            file.write_bytes(content)
        else:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("features.npy", content)
        self._import()

    def metadata(self, change: Callable[[Any], Any]) -> None:
        """Import a folder whose metadata file was changed."""
        make_layout(self._layout)
        found = change(json.loads((self._layout / METADATA).read_bytes()))
        (self._layout / METADATA).write_bytes(json.dumps(found).encode())
        self._import()

    def _import(self) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder) as made, only_our_errors():
            import_npz(self._layout, Path(made) / "run", threads=1)


def make_layout(layout: Path) -> None:
    """Write a small folder in the documented NPZ layout."""
    (layout / "a").mkdir(parents=True, exist_ok=True)
    features = np.arange(12, dtype=np.float32).reshape(3, 4)
    for layer in (1, 2):
        np.savez_compressed(layout / "a" / f"layer_{layer}.npz", features=features)
    metadata = {
        "timestamp": "20250101_000000",
        "n_scenarios": 1,
        "layer_range": [1, 2],
        "save_features": True,
        "save_attention": False,
        "scenarios": [
            {"scenario": "a", "tokens": ["x", "y", "z"], "token_ids": [1, 2, 3], "seq_len": 3,
             "key_positions": {"goal": [1]}}
        ],
    }  # fmt: skip
    (layout / METADATA).write_text(json.dumps(metadata), encoding="utf-8")


def changed(found: Any, way: list[int], value: Any) -> Any:
    """Follow numbers down into JSON, and replace what is there."""
    if not way or not isinstance(found, dict | list) or not found:
        return value
    keys = list(found) if isinstance(found, dict) else list(range(len(found)))
    key = keys[way[0] % len(keys)]
    found[key] = changed(found[key], way[1:], value)
    return found
