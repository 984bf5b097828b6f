"""The format of generated continuations: attributes, a coordinate, spans, names of traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import zarrtrace as zt
from zarrtrace.errors import ConfigError, IntegrityError, ScenarioError
from zarrtrace.format.attributes import GenerationAttributes, TraceAttributes
from zarrtrace.npz import export_npz, import_npz
from zarrtrace.scenarios import check_trace_name, chosen_names, split_trace_name, trace_name
from zarrtrace.storage import locate
from zarrtrace.store import copy_run, read_run, read_trace, summarize, verify
from zarrtrace.store.metadata import check_nodes, parse_attributes

IDS, TEXTS = (0, 5, 6, 7, 8), ("<s>", "Pick", ":", " 1", ".")
GENERATION: dict[str, Any] = {
    "tokens": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "seed": 7,
    "samples": 2,
    "prompt_tokens": 3,
    "text": " 1.",
    "ended_by": "end_of_sequence",
}


def attention(tokens: int = 5) -> dict[int, np.ndarray]:
    rows = np.tril(np.ones((2, tokens, tokens), np.float32))
    return {1: rows / rows.sum(-1, keepdims=True)}


def write(run: Path, *, scenario: Any = "game", repeat: int | None = None, **given: Any) -> None:
    given = {"tokens": (IDS, TEXTS), "attention": attention(), "generation": GENERATION, **given}
    zt.write_trace(run, scenario, repeat=repeat, **given)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for repeat in range(2):
        write(tmp_path / "run", repeat=repeat, choice="bet" if repeat else None)
    write(tmp_path / "run", scenario=zt.Scenario("Pick:", name="other"), choice="stop")
    return tmp_path / "run"


def test_a_trace_says_what_was_generated(run: Path) -> None:
    ds = zt.open_trace(run / "game~1")
    assert (ds.attrs["scenario"], ds.attrs["repeat"], ds.attrs["choice"]) == ("game", 1, "bet")
    assert ds.attrs["generation"] == {**GENERATION, "stop": []}
    assert ds["generated"].values.tolist() == [False, False, False, True, True]
    assert zt.span(ds, "decision") == [2]
    assert zt.span(ds, "completion") == [3, 4]
    other = zt.open_trace(run / "other")
    assert "repeat" not in other.attrs
    assert "choice" not in zt.open_trace(run / "game~0").attrs
    # Other readers find the coordinate, too.
    plain = xr.open_zarr(run / "game~1", consolidated=True)
    assert plain.coords["generated"].dtype == bool
    assert zarr.open_group(run / "game~1", mode="r")["generated"][:].sum() == 2


def test_a_trace_without_generation_is_written_as_before(tmp_path: Path) -> None:
    zt.write_trace(tmp_path / "run", "plain", tokens=(IDS, TEXTS), attention=attention())
    written = json.loads((tmp_path / "run" / "plain" / "zarr.json").read_text("utf-8"))
    assert not {"repeat", "generation", "choice"} & written["attributes"].keys()
    assert not (tmp_path / "run" / "plain" / "generated").exists()


def test_a_run_of_repeats_is_verified_copied_and_summarised(run: Path, tmp_path: Path) -> None:
    names = ("game~0", "game~1", "other")
    assert read_run(run).attributes.scenarios == names
    assert verify(run) == []
    assert tuple(one.scenario for one in summarize(run).traces) == names
    copy_run(run, tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    (run / "game~0").rename(run / "away")
    (run / "game~1").rename(run / "game~0")
    (run / "away").rename(run / "game~1")
    assert any("exchanged" in str(problem) for problem in verify(run))


def test_a_name_chooses_all_repeats(run: Path) -> None:
    assert [*zt.open_run(run, scenarios=["game"]).children] == ["game~0", "game~1"]
    assert [*zt.open_run(run, scenarios=["game~1", "other"]).children] == ["game~1", "other"]
    with pytest.raises(ScenarioError, match="no scenario 'game~2'"):
        zt.open_run(run, scenarios=["game~2"])
    assert chosen_names(["a~0", "b", "a~1"], ["a"]) == ["a~0", "a~1"]


def test_export_and_import_keep_repeats(run: Path, tmp_path: Path) -> None:
    export_npz(run, tmp_path / "npz", scenarios=["game"])
    assert (tmp_path / "npz" / "game~0" / "layer_1.npz").is_file()
    assert not (tmp_path / "npz" / "other").exists()
    import_npz(tmp_path / "npz", tmp_path / "back")
    for name in ("game~0", "game~1"):
        before, after = zt.open_trace(run / name), zt.open_trace(tmp_path / "back" / name)
        for key in ("scenario", "repeat", "generation", "choice", "spans"):
            assert after.attrs.get(key) == before.attrs.get(key), key
        xr.testing.assert_equal(after["generated"], before["generated"])
        np.testing.assert_array_equal(after["attention"], before["attention"])


def test_names_of_traces() -> None:
    assert trace_name("a", None) == "a"
    assert trace_name("a", 12) == "a~12"
    assert split_trace_name("a~12") == ("a", 12)
    for name in ("a~", "a~01", "a~x", "a~-1", "a~1~2", "~1", "a~1/../b"):
        with pytest.raises(ScenarioError):
            check_trace_name(name)
    with pytest.raises(ScenarioError):
        zt.Scenario("x", name="a~1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generation": {**GENERATION, "prompt_tokens": 5}}, "prompt_tokens is 5, of 5"),
        ({"generation": {**GENERATION, "ended_by": "boredom"}}, "generation: ended_by"),
        ({"repeat": -1}, "repeat -1"),
        ({"spans": {"completion": [3]}}, "span 'completion'"),
        ({"spans": {"answer": [5]}}, r"span 'answer' at \[5\]"),
        (
            {"scenario": zt.Scenario("Pick:", name="game", spans={"completion": "Pick"})},
            "span 'completion'",
        ),
    ],
)
def test_wrong_continuations_are_refused(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "run", **given)


def test_damaged_attributes_are_refused(run: Path) -> None:
    found = zt.open_trace(run / "other").attrs
    attributes = TraceAttributes.model_validate(found)
    assert attributes.generation == GenerationAttributes.model_validate(GENERATION)
    with pytest.raises(IntegrityError, match="repeat"):
        parse_attributes(locate(run), {**found, "repeat": -1}, "trace")
    nodes = dict(read_trace(run / "other").nodes)
    with pytest.raises(ValueError, match="has no coordinate 'generated'"):
        check_nodes({name: node for name, node in nodes.items() if name != "generated"}, attributes)
    longer = {**found, "generation": {**found["generation"], "prompt_tokens": 6}}
    with pytest.raises(ValueError, match="prompt_tokens is more than the 5 tokens"):
        check_nodes(nodes, TraceAttributes.model_validate(longer))
