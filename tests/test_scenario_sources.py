"""Every way of giving scenarios: Python, files and tables give the same ones, or say why not."""

from __future__ import annotations

import csv
import enum
import importlib.util
import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import strategies
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zarrtrace as zt
from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios import RESERVED, Scenario, as_scenarios, load_suite
from zarrtrace.scenarios.metadata import plain_value

# --- one scenario ------------------------------------------------------------------------------


def test_a_scenario_reads_its_marks() -> None:
    scenario = Scenario(
        "You hold [[balance:$90]], the goal is [[goal:$200]]. [[ -f x ]] a]] 1) Bet [[goal:2)]]",
        name="poor",
        tags=["risky", "risky", "low"],
        spans={"choice": "Bet", "hold": {"text": "o", "occurrence": "last"}, "you": [0, 3]},
        options={"bet": "1"},
        metadata={"balance": 90.0, "game": "g7", "won": False, "round": 3},
    )
    text = scenario.prompt
    assert text == "You hold $90, the goal is $200. [[ -f x ]] a]] 1) Bet 2)"
    found = {name: [text[a:b] for a, b in ranges] for name, ranges in scenario.spans.items()}
    assert found == {
        "balance": ["$90"],
        "goal": ["$200", "2)"],
        "choice": ["Bet"],
        "hold": ["o"],
        "you": ["You"],
    }
    assert scenario.spans["hold"][0][0] == text.rindex("o")
    assert (scenario.name, scenario.tags) == ("poor", ("risky", "low"))
    assert scenario.options == {"bet": "1"}
    assert Scenario("x", tags={"b", "a", "c"}).tags == ("a", "b", "c")  # type: ignore[arg-type]
    types = {name: type(value) for name, value in scenario.metadata.items()}
    assert types == {"balance": float, "game": str, "won": bool, "round": int}


@given(strategies.pieces)
def test_marks_are_where_their_text_is(pieces: list[tuple[str | None, str]]) -> None:
    marked = "".join(text if name is None else f"[[{name}:{text}]]" for name, text in pieces)
    expected = "".join(text for _, text in pieces)
    if not expected.strip():
        return
    scenario = Scenario(marked)
    assert scenario.prompt == expected
    for name in {name for name, _ in pieces if name}:
        texts = {text for n, text in pieces if n == name}
        assert {expected[a:b] for a, b in scenario.spans[name]} == texts
    assert Scenario(marked, marks=False).prompt == marked
    assert Scenario(marked, marks=False).spans == {}


def test_a_scenario_never_changes_and_survives_pickling() -> None:
    scenario = Scenario("[[a:x]] y", name="a", metadata={"n": 1})
    with pytest.raises(AttributeError):
        scenario.name = "b"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(scenario)) == scenario  # noqa: S301
    literal = Scenario("[[a:x]]", name="a", marks=False)
    with pytest.raises(ValueError, match="marks"):  # it would read the mark
        replace(literal, name="b")
    assert replace(literal, name="b", marks=False).prompt == "[[a:x]]"  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ""}, "'a': prompt: String should have at least 1 character"),
        ({"prompt": " "}, "'a': its prompt is empty"),
        ({"prompt": "[[s:x"}, "(?s)'a': span 's' is never closed.*marks=False"),
        ({"prompt": "[[s:]]"}, "'a': span 's' is empty"),
        ({"prompt": "[[s:a [[t:b]] c]]"}, "'a': the text opens span 't' inside span 's'"),
        ({"prompt": "[[decision:x]]"}, "'a': .*'decision' by mark"),
        ({"prompt": 5}, "'a': prompt: Input should be a valid string"),
        ({"prompt": None}, "'a': its prompt is empty"),
        ({"tags": "risky"}, "'a': tags: Input should be a valid list"),
        ({"name": "../x"}, "not safe as a folder name"),
        ({"name": 5}, "the scenario: name: Input should be a valid string"),
        ({"spans": {"s": "z"}}, "'a': span 's': 'z' is not in the prompt"),
        ({"spans": {"s": (0, 9)}}, r"'a': span 's' at \[0, 9\) is not in its prompt"),
        ({"spans": {"decision": "x"}}, "'a': span 'decision' is always the last token"),
        ({"spans": {"s": {"txt": "x"}}}, "(?s)'a': spans.s.txt: unknown field.*mean 'text'"),
        ({"options": {"bet": ""}}, "'a': options.bet: String should have at least 1"),
        ({"metadata": {"a b": 1}}, "'a': metadata.a b: a name of metadata is made of"),
        ({"metadata": {"1a": 1}}, "'a': metadata.1a: a name of metadata is made of"),
        ({"metadata": {"a": [1]}}, "'a': metadata.a: a value of type list"),
        ({"metadata": {"a": 10**30}}, "'a': metadata.a: a whole number of more than 64 bits"),
        ({"metadata": {"a": math.inf}}, "'a': metadata.a: an infinite number"),
        ({"metadata": {"a": "\ud83c"}}, "'a': metadata.a: text that is not valid Unicode"),
    ],
)
def test_wrong_scenarios_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message) as caught:
        Scenario(**{"prompt": "x", "name": "a", **given})
    assert caught.value.remedy


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_names_of_dimensions_are_refused(name: str, tmp_path: Path) -> None:
    assert len(RESERVED) == 15
    message = f"{name!r} is the name of a dimension or coordinate"
    with pytest.raises(ScenarioError, match=message):
        Scenario("x", metadata={name: 1})
    if name == "tags":
        return  # in a table, a field of the entry
    with pytest.raises(ScenarioError, match=message):
        as_scenarios(pd.DataFrame({"prompt": ["x"], name: [1]}))
    file = tmp_path / "a.csv"
    file.write_text(f"prompt,{name}\nx,1\n")
    with pytest.raises(ScenarioError, match=message) as caught:
        load_suite(file)
    assert str(caught.value).startswith(f"{file}:1: ")


# --- whatever is given -------------------------------------------------------------------------


def test_strings_are_prompts_word_for_word() -> None:
    one, two = as_scenarios(["[[a:x]] {b}", "y"])
    assert (one.name, one.prompt, one.spans) == ("scenario_0", "[[a:x]] {b}", {})
    assert two.name == "scenario_1"
    assert [s.prompt for s in as_scenarios("Open the file data.csv")] == ["Open the file data.csv"]
    assert as_scenarios("one\nmine.yaml")[0].prompt == "one\nmine.yaml"
    assert as_scenarios(np.array(["x", "y"], object)) == as_scenarios(iter(["x", "y"]))
    assert as_scenarios(pd.Series(["x", "y"])) == as_scenarios(("x", "y"))


def test_a_string_that_names_a_file_is_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("prompt\nhello\n")
    Path("prompts.txt").write_text("hello\n")
    assert as_scenarios("mine.csv")[0].prompt == "hello"
    assert as_scenarios(Path("mine.csv")) == as_scenarios("mine.csv")
    assert as_scenarios(["mine.csv"])[0].prompt == "mine.csv"  # in a list, always a prompt
    assert as_scenarios(Scenario("mine.csv"))[0].prompt == "mine.csv"
    with pytest.raises(ScenarioError, match=r"other\.yaml: no such scenario file"):
        as_scenarios("other.yaml")
    with pytest.raises(ScenarioError, match=r"prompts\.txt: unknown kind of scenario file"):
        as_scenarios("prompts.txt")
    assert as_scenarios("x" * 5000)[0].prompt == "x" * 5000
    assert as_scenarios("a/" + "b" * 300 + ".csv x")


def test_names_are_by_place_and_unique() -> None:
    named = as_scenarios(["x", Scenario("y", name="b"), {"prompt": "z"}, Scenario("w")])
    assert [s.name for s in named] == ["scenario_0", "b", "scenario_2", "scenario_3"]
    assert as_scenarios(named) == named
    with pytest.raises(ScenarioError, match="'scenario_1' is taken"):
        as_scenarios([Scenario("x", name="scenario_1"), "y"])
    with pytest.raises(ScenarioError, match="'A' is taken by 'a'"):
        as_scenarios([Scenario("x", name="a"), Scenario("y", name="A")])


def test_mappings_are_entries() -> None:
    entry = {
        "template": "Hold [[b:{b}]]",
        "values": {"b": 5},
        "tags": ("t",),
        "metadata": {"won": True, "n": np.int32(3), "x": np.float32(0.5)},
    }
    (scenario,) = as_scenarios(entry)
    assert (scenario.prompt, scenario.spans) == ("Hold 5", {"b": ((5, 6),)})
    assert scenario.metadata == {"b": 5, "won": True, "n": 3, "x": 0.5}
    assert [type(value) for value in scenario.metadata.values()] == [int, bool, int, float]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "cannot be taken from a value of type int"),
        (None, "cannot be taken from a value of type NoneType"),
        (b"x", "cannot be taken from a value of type bytes"),
        ({"x", "y"}, "cannot be taken from a value of type set"),
        ([], "there are no scenarios"),
        (["x", 5], "'scenario_1' is a value of type int"),
        (["x", ["y"]], "'scenario_1' is a value of type list"),
        (["x", Path("a.yaml")], "'scenario_1' is a value of type PosixPath"),
        ({}, "'scenario_0' has no prompt"),
        ([{"prmpt": "x"}], "(?s)'scenario_0': prmpt: unknown field.*mean 'prompt'"),
        ([{"prompt": "x", "outcome": 1}], "(?s)unknown field 'outcome'\n.*under 'metadata'"),
        ([{"name": "b", "messages": []}], "'b': messages: List should have at least 1 item"),
        (pd.DataFrame({"prompts": ["x"]}), "(?s)no column 'prompt'\n.*mean 'prompts'"),
        (pd.DataFrame({"prompt": []}), "holds no scenario"),
        (pd.DataFrame({"prompt": ["x", None]}), "row 1: prompt: missing"),
        (pd.DataFrame({"prompt": ["x", 5]}), "row 1: prompt: Input should be a valid string"),
        (pd.DataFrame({"prompt": ["x"], "messages": [[]]}), "row 0: messages: List should have"),
        (pd.DataFrame({"prompt": ["x"], "q id": [1]}), "column 'q id' cannot be metadata"),
        (pd.DataFrame({"prompt": ["x"], 7: [1]}), "column 7 cannot be metadata"),
        (pd.DataFrame([["x", "y"]], columns=["prompt"] * 2), "column 'prompt' stands twice"),
        (pd.DataFrame({"prompt": ["x"], "c": [["a"]]}), "row 0: metadata.c: a value of type list"),
        (pd.DataFrame({"prompt": ["x"], "spans": ["{"]}), "row 0: spans: not valid JSON"),
        (pd.DataFrame({"prompt": ["x"], "spans": [{"s": "y"}]}), "row 0: scenario 'scenario_0'"),
        (
            pd.DataFrame({"prompt": ["x"], "day": pd.to_datetime(["2024-01-01"])}),
            "row 0: metadata.day: a value of type Timestamp",
        ),
        (
            pd.DataFrame({"prompt": ["x", "y"], "won": [True, None]}),
            "'won' is true or false in scenario 'scenario_0' and missing in scenario 'scenario_1'",
        ),
    ],
)
def test_whatever_cannot_be_scenarios_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ScenarioError, match=message) as caught:
        as_scenarios(given)
    assert caught.value.remedy


def test_data_sets_with_splits_are_refused() -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"prompt": ["x"]})
    for splits in (datasets.DatasetDict(train=whole), whole.to_iterable_dataset()):
        with pytest.raises(ScenarioError, match=type(splits).__name__) as caught:
            as_scenarios(splits)
        assert "dataset['train']" in caught.value.remedy
    assert as_scenarios(datasets.DatasetDict(train=whole)["train"]) == as_scenarios("x")


def test_neither_pandas_nor_datasets_is_imported() -> None:
    code = (
        "import sys; from zarrtrace.scenarios import as_scenarios; as_scenarios(['x', 'y']); "
        "print({'pandas', 'datasets', 'pyarrow', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- tables ------------------------------------------------------------------------------------


def test_tables_hold_tags_spans_and_options_in_several_forms(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "prompt": "bet or bet",
            "tags": "a; b,a",
            "spans": {"s": {"text": "bet", "occurrence": 2}},
        },
        {"prompt": "x", "tags": ["c"], "options": {"bet": "1"}},
        {"prompt": "y", "tags": '["d;e"]', "spans": '{"t": [0, 1]}', "name": "n"},
    ]
    one, two, three = as_scenarios(pd.DataFrame(rows))
    assert (one.tags, one.spans) == (("a", "b"), {"s": ((7, 10),)})
    assert (two.tags, two.spans, two.options) == (("c",), {}, {"bet": "1"})
    assert (three.name, three.tags, three.spans) == ("n", ("d;e",), {"t": ((0, 1),)})
    # Arrow's structs hold every field in every row, its maps are lists of pairs.
    struct = pa.table(
        {"prompt": ["bet", "x"], "spans": [{"s": {"text": "b"}}, {"t": {"text": "x"}}]}
    )
    pq.write_table(struct, tmp_path / "a.parquet")
    assert [s.spans for s in load_suite(tmp_path / "a.parquet")] == [
        {"s": ((0, 1),)},
        {"t": ((0, 1),)},
    ]
    kind = pa.map_(pa.string(), pa.string())
    table = pa.table({"prompt": ["bet"], "spans": pa.array([[("s", "b"), ("t", "et")]], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_suite(tmp_path / "a.parquet")[0].spans == {"s": ((0, 1),), "t": ((1, 3),)}


def test_named_levels_of_an_index_are_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame({"name": ["a", "b"], "prompt": ["x", "y"], "n": [1, 2]})
    by_name = as_scenarios(frame.set_index(["name", "n"]))
    assert by_name == as_scenarios(frame)
    odd = frame.set_index(pd.Index([7, 3]))
    odd.to_parquet(tmp_path / "a.parquet")
    assert as_scenarios(odd) == load_suite(tmp_path / "a.parquet") == as_scenarios(frame)


def test_cells_of_csv_are_typed_by_column(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"\xef\xbb\xbfprompt, whole,part,won,label,gap,id,mixed,quote\r\n"
        b'"one\r\ntwo",1,0.5,true,007,,9223372036854775808,5," x"\r\n'
        b"\r\n"
        b"three,-2,1e3,FALSE,012,,1,n/a,\r\n"
    )
    one, two = load_suite(file)
    assert one.prompt == "one\r\ntwo"
    assert one.metadata == {
        "whole": 1,
        "part": 0.5,
        "won": True,
        "label": "007",
        "gap": pytest.approx(math.nan, nan_ok=True),
        "id": "9223372036854775808",
        "mixed": "5",
        "quote": " x",
    }
    assert (two.metadata["whole"], two.metadata["part"], two.metadata["won"]) == (-2, 1000.0, False)
    assert two.metadata["quote"] == ""
    frame = pd.read_csv(file, skipinitialspace=True)
    for name in ("whole", "part", "won"):
        column = [s.metadata[name] for s in (one, two)]
        assert column == frame[name].tolist()


@pytest.mark.parametrize(
    "cells",
    [
        ["18446744073709551614", "18446744073709551615"],
        ["9223372036854775808", "-9223372036854775809"],
        ["9007199254740993", "9007199254740992", "0.5"],
        ["0.5", "9007199254740993", "9007199254740992"],
        ["9" * 5000, f"{'9' * 4999}8", "1"],
    ],
)
def test_whole_numbers_of_csv_are_never_rounded(tmp_path: Path, cells: list[str]) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,game\n" + "".join(f"x,{cell}\n" for cell in cells))
    assert [s.metadata["game"] for s in load_suite(file)] == cells
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"prompt": "x", "metadata": {{"game": {cell}}}}}\n' for cell in cells)
    )
    with pytest.raises(ScenarioError):
        load_suite(tmp_path / "a.jsonl")


def test_whole_numbers_of_csv_that_floats_hold_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,game\nx,9007199254740994\nx,0.5\nx,\n")
    first, second, third = (s.metadata["game"] for s in load_suite(file))
    assert (first, second, str(third)) == (9007199254740994, 0.5, "nan")


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", None, "is empty"),
        ("prompt\n", 1, "holds no scenario"),
        ("prompt;name\nx;a\n", 1, "(?s)by semicolons, not by commas.*Save .* with commas"),
        ("name\tprompt\na\tx\n", 1, "(?s)by tabs, not by commas.*Save .* with commas"),
        (",prompt\n0,x\n", 1, "(?s)column '' has no name.*index=False"),
        ("prompt,name\nx,a\n\nHello, world,b\n", 4, "3 cells, and the header has 2"),
        ('prompt\n"x\n', 2, "not valid CSV"),
        ('prompt,name\n"a\nb",c\n,d\n', 4, "prompt: missing"),
        ('prompt,spans\nx,"{""s"": ""y""}"\n', 2, "span 's': 'y' is not in the prompt"),
        ("prompt,name\nx,a\ny,A\n", 3, "'A' is taken by 'a'"),
        ('prompt,spans\nx,"{""s"": 1, ""s"": 2}"\n', 2, "'s' stands twice"),
    ],
)
def test_wrong_csv_is_refused_with_its_line(
    tmp_path: Path, content: str, line: int | None, message: str
) -> None:
    file = tmp_path / "a.csv"
    file.write_text(content)
    with pytest.raises(ScenarioError, match=message) as caught:
        load_suite(file)
    assert str(caught.value).startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert "Rename it to" not in str(caught.value)


def test_wrong_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 is not enough PAR1")
    with pytest.raises(ScenarioError, match=r"a\.parquet: not a usable Parquet file"):
        load_suite(file)
    pq.write_table(pa.table({"prompt": ["x", None]}), file)
    with pytest.raises(ScenarioError, match=r"a\.parquet: row 1: prompt: missing"):
        load_suite(file)


# --- metadata ----------------------------------------------------------------------------------


def columns(suite: tuple[Scenario, ...]) -> pd.DataFrame:
    return pd.DataFrame([s.metadata for s in suite], index=[s.name for s in suite])


def test_missing_values_by_type() -> None:
    rows = [{"n": 1, "x": 0.5, "t": "a"}, {}, {"n": None, "x": math.nan, "t": None, "m": 2}]
    suite = as_scenarios([Scenario("p", metadata=row) for row in rows])
    expected = pd.DataFrame(rows, index=["scenario_0", "scenario_1", "scenario_2"])
    found = columns(suite)
    pd.testing.assert_frame_equal(
        found[["n", "x", "m"]], expected[["n", "x", "m"]].astype("float64")
    )
    assert found["t"].tolist() == ["a", "", ""]
    assert [type(s.metadata["n"]) for s in suite] == [float] * 3
    whole = as_scenarios(
        [Scenario("p", metadata={"n": 2**53 + 1}), {"prompt": "q", "metadata": {"n": 3}}]
    )
    assert [s.metadata["n"] for s in whole] == [2**53 + 1, 3]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (1, "a", "'c' is a number in scenario 'scenario_0' and text in scenario 'b'"),
        ("a", True, "'c' is text in scenario 'scenario_0' and true or false in scenario 'b'"),
        (True, 1, "'c' is true or false in scenario 'scenario_0' and a number in scenario 'b'"),
        (None, True, "true or false in scenario 'b' and missing in scenario 'scenario_0'"),
        (2**53 + 1, None, "'c' of scenario 'scenario_0' is 9007199254740993, which no float"),
        (0.5, 2**53 + 1, "'c' of scenario 'b' is 9007199254740993, which no float holds"),
    ],
)
def test_columns_of_two_types_are_refused(first: Any, second: Any, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        as_scenarios(
            [Scenario("x", metadata={"c": first}), Scenario("y", name="b", metadata={"c": second})]
        )


class _Game(enum.IntEnum):
    SLOTS = 3


@pytest.mark.parametrize(
    ("given", "plainly"),
    [
        (_Game.SLOTS, 3),
        (np.longdouble(1.5), 1.5),
        (np.array(2, np.longdouble), 2.0),
        (np.datetime64("NaT", "ns"), None),
    ],
)
def test_metadata_is_of_types_of_python(given: Any, plainly: Any) -> None:
    kept = Scenario("x", name="a", metadata={"m": given}).metadata["m"]
    assert kept == plainly
    assert type(kept) is type(plainly)
    assert plain_value(given) == plainly


@pytest.mark.parametrize("given", [2**63, -(2**63) - 1, enum.IntEnum("Big", {"A": 2**63}).A])
def test_whole_numbers_beyond_64_bits_are_refused(given: int) -> None:
    with pytest.raises(ScenarioError, match="more than 64 bits"):
        Scenario("x", name="a", metadata={"m": given})


@pytest.mark.parametrize("unit", ["D", "s", "ns"])
@pytest.mark.parametrize("make", [np.datetime64, np.timedelta64])
def test_dates_and_durations_never_become_numbers(make: Any, unit: str) -> None:
    given = make(5, unit)
    for value in (given, np.array(given)):
        with pytest.raises(ScenarioError, match=f"m: a value of type {make.__name__}"):
            Scenario("x", name="a", metadata={"m": value})
        for several in (value, [value], np.array([given])):
            with pytest.raises(ScenarioError, match=f"m: a value of type {make.__name__}"):
                as_scenarios({"template": "{m}", "values": {"m": several}})


def test_values_of_templates_are_metadata(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        """
        template: "{a} {b} {layer} {flag}"
        defaults: {b: 2, layer: 9, unused: 1, flag: true}
        scenarios:
        - values: {a: [x, y]}
        - values: {a: z, b: 3}
          metadata: {b: 30, own: text}
        - prompt: word for word
        """
    )
    one, two, three = load_suite(file)
    assert [s.prompt for s in (one, two)] == ["x, y 2 9 True", "z 3 9 True"]
    # A name of a dimension is left out; explicit metadata wins; a boolean that is missing in a
    # prompt without the template makes the column text.
    assert one.metadata == {"a": "x, y", "b": 2.0, "flag": "True", "own": ""}
    assert two.metadata == {"a": "z", "b": 30.0, "flag": "True", "own": "text"}
    assert three.metadata["a"] == three.metadata["flag"] == ""
    assert math.isnan(three.metadata["b"])  # type: ignore[arg-type]


def test_values_of_two_types_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    template = 'template: "{a}"\nscenarios:\n- values: {a: 3}\n- values: {a: [2, 3]}\n'
    file.write_text(template + "- values: {a: .inf}\n- values: {a: true}\n")
    assert [s.metadata["a"] for s in load_suite(file)] == ["3", "2, 3", "inf", "True"]
    file.write_text(template + "- {prompt: x, metadata: {a: true}}\n")
    with pytest.raises(ScenarioError, match=rf"{file}: metadata 'a' is a number in"):
        load_suite(file)


# --- all ways give the same --------------------------------------------------------------------

_WORDS = st.text(
    st.characters(
        codec="utf-8", categories=("L", "N", "P", "S", "Z"), include_characters="\n\r\t[]{}\"',;#"
    ),
    min_size=1,
)
_LETTERS = st.text(st.sampled_from("abcdefghABCÄß漢 "), min_size=1).map(lambda text: f"a{text}z")
_KINDS: dict[str, st.SearchStrategy[Any]] = {
    "whole": st.integers(-(2**52), 2**52),
    "part": st.floats(allow_nan=False, allow_infinity=False),
    "text": _LETTERS,
    "won": st.booleans(),
}


@st.composite
def suites(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Entries with columns of all types, some values missing."""
    kinds = draw(st.lists(st.sampled_from(list(_KINDS)), unique=True))
    rows = []
    for number in range(draw(st.integers(1, 4))):
        prompt = draw(_WORDS.filter(str.strip))
        start = draw(st.integers(0, len(prompt) - 1))
        row: dict[str, Any] = {
            "prompt": prompt,
            "tags": draw(st.lists(_LETTERS.map(str.strip), max_size=2)),
            "spans": draw(st.sampled_from([{}, {"s": [start, len(prompt)]}, {"t": [[0, 1]]}])),
            "metadata": {
                kind: draw(_KINDS[kind])
                for kind in kinds
                if kind == "won" or draw(st.integers(0, 3))
            },
        }
        if draw(st.booleans()):
            row["name"] = f"n{number}"
        rows.append(row)
    return rows


def _flat(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return entries as columns."""
    flat = [
        {
            "prompt": row["prompt"],
            "name": row.get("name"),
            "tags": json.dumps(row["tags"]),
            "spans": json.dumps(row["spans"]),
            **row["metadata"],
        }
        for row in rows
    ]
    names = dict.fromkeys(name for row in flat for name in row)
    return {name: [row.get(name) for row in flat] for name in names}


def _yaml(rows: list[dict[str, Any]], folder: Path) -> Any:
    text = yaml.safe_dump({"scenarios": rows}, allow_unicode=True)
    (folder / "a.yaml").write_text(text, encoding="utf-8")
    return folder / "a.yaml"


def _jsonl(rows: list[dict[str, Any]], folder: Path) -> Any:
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "a.jsonl").write_text(text, encoding="utf-8")
    return folder / "a.jsonl"


def _csv(rows: list[dict[str, Any]], folder: Path) -> Any:
    flat = _flat(rows)
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(flat)
        writer.writerows(zip(*flat.values(), strict=True))
    return folder / "a.csv"


def _pandas_csv(rows: list[dict[str, Any]], folder: Path) -> Any:
    # pandas leaves a lone carriage return without quotes.
    pd.DataFrame(_flat(rows)).to_csv(folder / "b.csv", index=False, quoting=csv.QUOTE_ALL)
    return folder / "b.csv"


def _parquet(rows: list[dict[str, Any]], folder: Path) -> Any:
    pq.write_table(pa.table(_flat(rows)), folder / "a.parquet")
    return folder / "a.parquet"


def _pandas_parquet(rows: list[dict[str, Any]], folder: Path) -> Any:
    pd.DataFrame(_flat(rows)).to_parquet(folder / "b.parquet")
    return str(folder / "b.parquet")


def _frame(rows: list[dict[str, Any]], _: Path) -> Any:
    flat = {name: [row[name] for row in rows] for name in ("tags", "spans")}
    return pd.DataFrame(_flat(rows) | flat)


def _nullable_frame(rows: list[dict[str, Any]], _: Path) -> Any:
    frame = pd.DataFrame(_flat(rows))
    kinds = {"whole": "Int64", "part": "Float64", "text": "string", "won": "boolean"}
    return frame.astype({name: kind for name, kind in kinds.items() if name in frame})


def _dataset(rows: list[dict[str, Any]], _: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(_flat(rows) | {"tags": [row["tags"] for row in rows]})


def _saved_dataset(rows: list[dict[str, Any]], folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    shutil.rmtree(folder / "saved", ignore_errors=True)
    _dataset(rows, folder).save_to_disk(folder / "saved", num_shards=min(2, len(rows)))
    return folder / "saved"


def _parquet_folder(rows: list[dict[str, Any]], folder: Path) -> Any:
    """As a checkout from the hub: two files below a folder, with one schema."""
    table = pa.table(_flat(rows))
    shutil.rmtree(folder / "hub", ignore_errors=True)
    (folder / "hub" / "data").mkdir(parents=True)
    for number, rows_of in enumerate((table.slice(0, 1), table.slice(1))):
        file = folder / "hub" / "data" / f"train-{number:05}-of-00002.parquet"
        pq.write_table(rows_of, file, row_group_size=2)
    return str(folder / "hub")


def _generator(rows: list[dict[str, Any]], _: Path) -> Any:
    return (row for row in rows)


def _python(rows: list[dict[str, Any]], _: Path) -> Any:
    return [Scenario(**row, marks=False) for row in rows]


def _mappings(rows: list[dict[str, Any]], _: Path) -> Any:
    return rows


_WAYS: tuple[Callable[[list[dict[str, Any]], Path], Any], ...] = (
    _yaml,
    _jsonl,
    _csv,
    _pandas_csv,
    _parquet,
    _pandas_parquet,
    _frame,
    _nullable_frame,
    _python,
    _generator,
    _parquet_folder,
    *([_dataset, _saved_dataset] if importlib.util.find_spec("datasets") else []),
)


def _comparable(suite: tuple[Scenario, ...]) -> list[Any]:
    """Return all fields, columns in order of their names, with types; NaN as a word."""
    return [
        (
            s.name,
            s.prompt,
            s.tags,
            s.spans,
            s.options,
            [(name, type(value), repr(value)) for name, value in sorted(s.metadata.items())],
        )
        for s in suite
    ]


@pytest.mark.long
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=suites())
def test_every_way_gives_the_same_scenarios(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = _comparable(as_scenarios(_mappings(rows, tmp_path)))
    assert [one[1] for one in expected] == [row["prompt"] for row in rows]
    for way in _WAYS:
        assert _comparable(as_scenarios(way(rows, tmp_path))) == expected, way.__name__


@settings(max_examples=60)
@given(rows=suites())
def test_columns_are_those_that_pandas_makes(rows: list[dict[str, Any]]) -> None:
    found = columns(as_scenarios(rows))
    given: list[Mapping[str, Any]] = [row["metadata"] for row in rows]
    expected = pd.DataFrame(given, index=found.index)
    if "text" in expected:
        expected["text"] = expected["text"].fillna("")
    pd.testing.assert_frame_equal(found, expected, check_like=True, check_dtype=True)


def test_scenario_is_the_same_class_everywhere() -> None:
    assert zt.Scenario is Scenario
    assert isinstance(as_scenarios("x")[0], zt.Scenario)
