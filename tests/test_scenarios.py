"""Scenario files, templates and spans: what is accepted, what is refused, where spans lie."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import strategies
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from zarrtrace import demo
from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios import (
    Scenario,
    check_name,
    load_suite,
    name_key,
    render_template,
    span,
    span_positions,
    suite_attributes,
    token_positions,
)


def write(folder: Path, text: str, name: str = "suite.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def marked(scenario: Scenario, name: str) -> list[str]:
    """Return the text of each range of a span."""
    return [scenario.prompt[start:end] for start, end in scenario.spans[name]]


# --- templates ---------------------------------------------------------------------------------


def test_template_takes_values_and_marks_spans() -> None:
    prompt, spans = render_template(
        "{{{who}}} has [[balance:${balance}]] of [[goal:${goal}]]; [[goal:goal]] {history}",
        {"who": "Ann", "balance": 90, "goal": 200, "history": ["won $5", "lost $3"]},
    )
    assert prompt == "{Ann} has $90 of $200; goal won $5, lost $3"
    assert {name: [prompt[a:b] for a, b in found] for name, found in spans.items()} == {
        "balance": ["$90"],
        "goal": ["$200", "goal"],
    }


def test_values_are_text_and_never_template() -> None:
    value = "{goal} [[goal:x]] }} {{"
    prompt, spans = render_template("[[balance:{balance}]]", {"balance": value})
    assert prompt == value
    assert spans == {"balance": ((0, len(value)),)}


@given(strategies.pieces)
def test_marks_are_where_their_text_is(pieces: list[tuple[str | None, str]]) -> None:
    template = "".join(text if name is None else f"[[{name}:{text}]]" for name, text in pieces)
    prompt, spans = render_template(template, {})
    assert prompt == "".join(text for _, text in pieces)
    for name in {name for name, _ in pieces if name}:
        assert [prompt[a:b] for a, b in spans[name]] == [t for n, t in pieces if n == name]
    assert set(spans) == {name for name, _ in pieces if name}


@given(st.dictionaries(strategies.identifiers, st.text() | st.integers(), min_size=1))
def test_any_value_arrives_unchanged(values: dict[str, Any]) -> None:
    template = "|".join(f"[[s{i}:x{{{name}}}]]" for i, name in enumerate(values))
    prompt, spans = render_template(template, values)
    assert prompt == "|".join(f"x{value}" for value in values.values())
    found = [prompt[slice(*spans[f"s{i}"][0])] for i in range(len(values))]
    assert found == [f"x{value}" for value in values.values()]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{balnce}", "needs a value 'balnce'.*\n.*Did you mean 'balance'"),
        ("{balance", "lone '{' at character 0"),
        ("a } b", "lone '}' at character 2"),
        ("{a b}", "lone '{'"),
        ("[[balance:x", "'balance' is never closed"),
        ("[[balance:a [[goal:b]] c]]", "'goal' inside span 'balance'"),
        ("[[balance:]]", "'balance' is empty"),
        ("[[decision:x]]", "'decision' by mark"),
    ],
)
def test_wrong_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=f"(?s){message}"):
        render_template(template, {"balance": 90})


# --- files -------------------------------------------------------------------------------------


def test_yaml_suite(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        name: mine
        template: "Goal [[goal:${goal}]], you hold [[balance:${balance}]]. {payout}"
        defaults: {goal: 200, payout: 3}
        options: {bet: "1", stop: "2"}
        scenarios:
          - name: Low
            values: {balance: 10}
            tags: [risky, risky, low]
          - name: High
            values: {balance: 140, payout: [2, 3]}
            options: {}
          - name: Own
            prompt: "Bet 5 or 5 or 55?"
            spans:
              first: {text: "5", occurrence: 1}
              last: {text: "5", occurrence: last}
              every: {text: "5", occurrence: all}
              word: Bet
              range: [0, 3]
              ranges: [[0, 3], [4, 5]]
        """,
    )
    low, high, own = load_suite(path)
    assert low.prompt == "Goal $200, you hold $10. 3"
    assert marked(low, "balance") == ["$10"]
    assert low.tags == ("risky", "low")
    assert low.options == {"bet": "1", "stop": "2"}
    assert high.prompt == "Goal $200, you hold $140. 2, 3"
    assert high.options == {}
    assert own.spans == {
        "first": ((4, 5),),
        "last": ((15, 16),),
        "every": ((4, 5), (9, 10), (14, 15), (15, 16)),
        "word": ((0, 3),),
        "range": ((0, 3),),
        "ranges": ((0, 3), (4, 5)),
    }


@pytest.mark.parametrize(
    ("value", "metadata"),
    [
        # Numbers, dates and booleans of YAML 1.1 alone, and numbers of YAML 1.2 alone, are text.
        *((text, text) for text in ("12:30", "1:30.5", "0123", "-007", "1_000", "1_0.5", "0b11")),
        *((text, text) for text in ("no", "Yes", "on", "OFF", "y", "N", "2024-01-01", "=")),
        *((text, text) for text in ("1e3", "0o17", "-0x1F", "'1.50'", '"true"')),
        # Numbers of both have the text of the file, and are numbers in metadata.
        *(("1.50", 1.5), ("+5", 5), ("-0", 0), ("0x1F", 31), ("1.0e+3", 1000.0), (".5", 0.5)),
        *(("7", 7), ("-2.25", -2.25), ("9007199254740993.0", 9007199254740992.0), ("5.", 5.0)),
        ("[1.50, a, 12:30, 007, 2]", "1.50, a, 12:30, 007, 2"),
    ],
)
def test_plain_values_of_yaml_enter_prompts_as_they_stand(
    tmp_path: Path, value: str, metadata: Any
) -> None:
    text = value.strip("'\"[]")
    if isinstance(metadata, str):
        metadata = text
    template = 'template: "At {t} go"\n'
    for content in (
        f"{template}scenarios: [values: {{t: {value}}}]",
        f"{template}defaults: {{t: {value}}}\nscenarios: [{{}}]",
    ):
        (scenario,) = load_suite(write(tmp_path, content))
        assert scenario.prompt == f"At {text} go"
        assert scenario.metadata == {"t": metadata}
        assert type(scenario.metadata["t"]) is type(metadata)


def test_plain_values_of_yaml_elsewhere(tmp_path: Path) -> None:
    (scenario,) = load_suite(
        write(
            tmp_path,
            """
            scenarios:
            - {prompt: "[[a:b]]", name: 1_0, tags: [no, 12:30], options: {bet: yes}, marks: no,
               metadata: {a: 12:30, b: 1.50, c: off, d: true, e: 0x1F}}
            """,
        )
    )
    assert (scenario.name, scenario.tags) == ("1_0", ("no", "12:30"))
    assert (dict(scenario.options), scenario.prompt) == ({"bet": "yes"}, "[[a:b]]")
    expected: dict[str, Any] = {"a": "12:30", "b": 1.5, "c": "off", "d": True, "e": 31}
    assert scenario.metadata == expected
    assert [type(one) for one in scenario.metadata.values()] == [str, float, str, bool, int]


def test_spans_beside_a_template_add_to_its_marks(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        scenarios:
          - name: a
            template: "[[goal:200]] and {more}"
            values: {more: 300}
            spans: {goal: "300", more: and}
        """,
    )
    (scenario,) = load_suite(path)
    assert marked(scenario, "goal") == ["200", "300"]
    assert marked(scenario, "more") == ["and"]


def test_jsonl_suite(tmp_path: Path) -> None:
    entries = [
        {"name": "a", "prompt": "Stop?", "spans": {"choices": "Stop"}},
        {
            "name": "b",
            "template": "Hold [[balance:{b}]]",
            "values": {"b": 1},
            "options": {"x": "1"},
        },
    ]
    lines = "\n\n".join(json.dumps(entry) for entry in entries) + "\n"
    path = write(tmp_path, lines, "suite.jsonl")
    a, b = load_suite(path)
    assert marked(a, "choices") == ["Stop"]
    assert (b.prompt, b.options) == ("Hold 1", {"x": "1"})


PROMPT = "scenarios:\n- name: a\n  prompt: Bet 5 or 5?\n"


def test_bands_of_layers_are_stated_by_a_suite(tmp_path: Path) -> None:
    text = (
        "bands: {local: [1, 10], decision: [21, 31]}\ntask_spans: [goal]\nscenarios: [{prompt: a}]"
    )
    path = write(tmp_path, text)
    stated = {"bands": {"local": (1, 10), "decision": (21, 31)}, "task_spans": ["goal"]}
    assert suite_attributes(path) == suite_attributes(str(path)) == stated
    (scenario,) = load_suite(path)
    assert scenario.prompt == "a"
    lines = write(tmp_path, '{"prompt": "a"}', "suite.jsonl")
    for other in ("a prompt", [Scenario("a")], lines):
        assert suite_attributes(other) == {}
    assert suite_attributes(write(tmp_path, "scenarios: [{prompt: a}]", "plain.yaml")) == {}
    assert suite_attributes(demo.suite_path())["bands"]["task"] == (11, 20)
    wrong = write(tmp_path, "scenarios: [{prompt: a}]\nbands: {local: [3, 1]}", "wrong.yaml")
    with pytest.raises(ScenarioError, match=r"wrong.yaml:2.*first layer 3 is above last layer 1"):
        load_suite(wrong)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("scenarios: [", 1, "not valid YAML"),
        ("scenarios:\n- name: a\n  prompt: 'x\n", 3, "not valid YAML"),
        ("", 1, "the file: Input should be a valid dictionary"),
        ("- name: a\n  prompt: x\n", 1, "the file: Input should be a valid dictionary"),
        ("scenarios: []\n", 1, "at least 1 item"),
        ("name: x\n", 1, "scenarios: Field required"),
        ("scenarios:\n- name: 5\n  prompt: x\n", 2, r"scenarios\.0\.name: .*valid string"),
        ("scenarios:\n- name: a\n", 2, "has no prompt"),
        ("scenarios:\n- name: a\n  prompt: ''\n", 3, "at least 1 character"),
        ("scenarios:\n- name: a\n  prompt: '  '\n", 2, "its prompt is empty"),
        ("scenarios:\n- name: a\n  prmpt: x\n", 3, "unknown field 'prmpt'(?s:.*)mean 'prompt'"),
        ("templte: x\nscenarios:\n- name: a\n", 1, "'templte'(?s:.*)mean 'template'"),
        ("scenarios:\n- name: a\n  name: b\n  prompt: x\n", 3, "key 'name' stands twice"),
        ("scenarios:\n- &a\n  name: a\n  prompt: x\n- *a\n", 2, "anchors and aliases"),
        ("scenarios:\n- name: a\n  prompt: 5\n", 3, "valid string"),
        ("scenarios:\n- name: a\n  prompt: x\n  tags: risky\n", 4, "valid list"),
        ("scenarios:\n- name: a\n  prompt: x\n  template: y\n", 2, "prompt and a template"),
        ("scenarios:\n- name: a\n  template: '{b}'\n", 2, "needs a value 'b'"),
        (
            "scenarios:\n- name: a\n  template: '{b}'\n  values: {b: 1, c: 2}\n",
            2,
            "value 'c' is not in its template",
        ),
        (PROMPT + "  spans: {s: Stop}\n", 2, "span 's': 'Stop' is not in the prompt"),
        (PROMPT + "  spans: {s: '5'}\n", 2, "stands in the prompt 2 times"),
        (PROMPT + "  spans:\n    s: {text: '5', occurrence: 3}\n", 2, "occurrence 3 of '5'"),
        (
            PROMPT + "  spans:\n    s: {text: '5', occurrence: 0}\n",
            5,
            r"spans\.s\.occurrence: Input should be greater",
        ),
        (PROMPT + "  spans: {s: [4, 40]}\n", 2, r"at \[4, 40\) is not in its prompt"),
        (PROMPT + "  spans: {s: [4, 4]}\n", 2, r"at \[4, 4\) is not in its prompt"),
        (PROMPT + "  spans: {decision: '?'}\n", 2, "'decision' is always the last token"),
        (PROMPT + "  spans: {'a b': '?'}\n", 4, "should match pattern"),
        (PROMPT + "- name: A\n  prompt: x\n", 4, "name 'A' is taken by 'a'"),
        ('scenarios:\n- name: a\n  prompt: "\\ud83c"\n', 3, "not valid YAML"),
        ("scenarios:\n- name: ../x\n  prompt: x\n", 2, "not safe as a folder name"),
    ],
)
def test_wrong_yaml_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ScenarioError, match=reason) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"name": "a", "prompt": "x"}\n\n{"name": ', 3, "not valid JSON"),
        ('{"name": "a", "prompt": "x"}\n[]\n', 2, "valid dictionary"),
        ('\n{"name": "a", "promt": "x"}\n', 2, "unknown field 'promt'(?s:.*)'prompt'"),
        ('{"name": "a", "prompt": "x"}\n{"name": "a", "prompt": "y"}\n', 2, "is taken by"),
        ('{"name": "a", "name": "b", "prompt": "x"}\n', 1, "key 'name' stands twice"),
        ('{"name": "a", "prompt": "x\\ud83c"}', 1, "as a unicode string"),
        ("[" * 100_000, 1, "not valid JSON"),
    ],
)
def test_wrong_jsonl_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    path = write(tmp_path, text, "suite.jsonl")
    with pytest.raises(ScenarioError, match=reason) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_text_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 as it is; it does not end a line."""
    text = json.dumps({"name": "a", "prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    (scenario,) = load_suite(write(tmp_path, text + "\n", "suite.jsonl"))
    assert scenario.prompt == "one\u2028two\x85three"


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none\.yaml: no such scenario file"):
        load_suite(tmp_path / "none.yaml")
    with pytest.raises(ScenarioError, match=r"unknown kind of scenario file '\.txt'"):
        load_suite(write(tmp_path, "x", "suite.txt"))
    with pytest.raises(ScenarioError, match="holds no scenario"):
        load_suite(write(tmp_path, "\n", "empty.jsonl"))
    with pytest.raises(ScenarioError, match="holds no data set"):
        load_suite(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("scenarios: [{name: a, prompt: 'für'}]".encode("latin-1"))
    with pytest.raises(ScenarioError, match="cannot be read as UTF-8"):
        load_suite(latin)
    deep = tmp_path / "deep.yaml"
    deep.write_text("scenarios: " + "[" * 20_000)
    with pytest.raises(ScenarioError, match=r"not (usable|valid) YAML"):
        load_suite(deep)


def test_yaml_never_makes_objects(tmp_path: Path) -> None:
    path = write(tmp_path, "scenarios: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ScenarioError, match="could not determine a constructor"):
        load_suite(path)


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/etc",
        "a/b",
        "a\\b",
        "C:",
        "a b",
        "-a",
        "_a",
        ".a",
        "a.",
        "a\n",
        "a\0",
        "zarr.json",
        "Zarr.JSON",
        "index",
        "con",
        "COM1",
        "nul.txt",
        "x" * 101,
        "e\u0301",  # not NFC
        "\u202ea",
        "🎰",
    ],
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(ScenarioError, match="scenario name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "Bankruptcy_90_all_in", "v1.2-x", "Überlegung", "漢字", "9"])
def test_safe_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("one", "other"),
    [("Safe", "safe"), ("straße", "STRASSE"), ("\u212bngstrom", "ångstrom"), ("\ufb01", "FI")],
)
def test_names_that_a_file_system_may_take_for_one(one: str, other: str) -> None:
    assert name_key(one) == name_key(other)


@given(st.text(max_size=20))
def test_a_name_that_passes_stays_in_its_folder(name: str) -> None:
    try:
        check_name(name)
    except ScenarioError:
        return
    assert (Path("run") / name).parts == ("run", name)


# --- from characters to tokens -----------------------------------------------------------------


def offsets_of(pieces: list[str], *, bos: bool) -> list[tuple[int, int]]:
    """Offsets of tokens that are exactly `pieces`."""
    out, at = [(0, 0)] if bos else [], 0
    for piece in pieces:
        out.append((at, at + len(piece)))
        at += len(piece)
    return out


@given(st.lists(strategies.marked_text, min_size=1), st.booleans(), st.data())
def test_positions_are_the_tokens_that_share_a_character(
    pieces: list[str], bos: bool, data: st.DataObject
) -> None:
    length = sum(map(len, pieces))
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    offsets = offsets_of(pieces, bos=bos)
    # One character at a time, each by the token that holds it.
    owner = [i + bos for i, piece in enumerate(pieces) for _ in piece]
    assert token_positions([(start, end)], offsets) == sorted(set(owner[start:end]))


def test_several_tokens_of_one_character_all_belong_to_it() -> None:
    assert token_positions([(1, 2)], [(0, 0), (0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]) == [2, 3, 4]


def test_decision_is_the_last_token() -> None:
    scenario = Scenario("ab", name="a", spans={"s": ((0, 1),)})
    assert span_positions(scenario, [(0, 0), (0, 1), (1, 2)]) == {"s": [1], "decision": [2]}


def test_a_span_without_a_token_is_refused() -> None:
    with pytest.raises(ScenarioError, match="span 's' covers no token"):
        span_positions(Scenario("a b", name="a", spans={"s": ((1, 2),)}), [(0, 1), (2, 3)])


def test_span_of_a_dataset() -> None:
    attributes = fakes.make_trace_attributes().model_dump(mode="json")
    ds = xr.Dataset(attrs=attributes)
    assert span(ds, "balance") == [1, 2]
    with pytest.raises(ScenarioError, match=r"(?s)no span 'blance'.*balance, decision"):
        span(ds, "blance")


@pytest.fixture(scope="module")
def trained() -> Any:
    """A byte-level BPE tokenizer whose numbers split and whose rare characters are bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["balance goal $90 $200 Bet or Stop? "] * 20, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(demo.model_path() / "tokenizer.json"))


def check_spans_against_bytes(tokenizer: Any, prompt: str, spans: dict[str, Any]) -> None:
    """Compare positions with the bytes that each token decodes to: no offsets involved."""
    encoding = tokenizer.encode(prompt)
    byte_of = {chr(code): byte for byte, code in _byte_level().items()}
    at, extents = 0, []
    for text in encoding.tokens:
        size = 0 if text.startswith("<") and text not in prompt and len(text) > 1 else len(text)
        assert size == 0 or all(char in byte_of for char in text)
        extents.append((at, at + size))
        at += size
    assert at == len(prompt.encode())
    positions = span_positions(
        Scenario(prompt, name="a", spans=spans, marks=False), encoding.offsets
    )
    for name, ranges in spans.items():
        expected = set()
        for start, end in ranges:
            first, last = len(prompt[:start].encode()), len(prompt[:end].encode())
            expected |= {i for i, (a, b) in enumerate(extents) if a < b and a < last and first < b}
        # Tokens that hold a part of a character's bytes all belong to that character.
        assert set(positions[name]) >= expected
        extra = set(positions[name]) - expected
        assert not extra, (name, extra)


def _byte_level() -> dict[int, int]:
    """GPT-2's table from bytes to the characters that stand for them in a vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: byte for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: 256 + i for i, byte in enumerate(others)}


@pytest.mark.torch
@given(pieces=strategies.pieces)
def test_spans_match_the_bytes_of_a_trained_tokenizer(
    trained: Any, pieces: list[tuple[str | None, str]]
) -> None:
    template = "".join(text if name is None else f"[[{name}:{text}]]" for name, text in pieces)
    prompt, spans = render_template(template, {})
    if prompt:
        check_spans_against_bytes(trained, prompt, spans)


@pytest.mark.torch
@pytest.mark.parametrize("bos", [True, False])
def test_the_same_number_twice_and_split_numbers(trained: Any, bos: bool) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    prompt, spans = render_template("Goal 12345, [[balance:12345]] 🎰 [[goal:🎰é]]", {})
    tokenizer = tokenizers.Tokenizer.from_str(trained.to_str())
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    encoding = tokenizer.encode(prompt)
    positions = span_positions(
        Scenario(prompt, name="a", spans=spans, marks=False), encoding.offsets
    )
    text = trained.decode([encoding.ids[i] for i in positions["balance"]])
    assert text.strip() == "12345"
    assert len(positions["balance"]) > 1
    second = [i for i, (start, _) in enumerate(encoding.offsets) if start >= prompt.rindex("1")]
    assert positions["balance"][-1] >= second[0]
    assert trained.decode([encoding.ids[i] for i in positions["goal"]]).strip() == "🎰é"
    assert (encoding.tokens[0] == "<s>") == bos
    assert positions["decision"] == [len(encoding.ids) - 1]


# --- the embedded scenarios --------------------------------------------------------------------

TEN = [
    "Bankruptcy_90_all_in",
    "Desperate_10",
    "Safe_130_one_win",
    "Risky_40",
    "Safe_140_near_goal",
    "Initial_100_first_round",
    "Medium_60",
    "Goal_achieved_200",
    "Very_risky_25",
    "Big_success_280",
]


def test_the_ten_scenarios() -> None:
    suite = load_suite(demo.suite_path())
    assert [scenario.name for scenario in suite] == TEN
    for scenario in suite:
        (balance,) = [part for part in scenario.name.split("_") if part.isdigit()]
        assert marked(scenario, "balance") == [f"${balance}"]
        assert marked(scenario, "goal") == ["$200"]
        assert marked(scenario, "probability") == ["30%"]
        assert marked(scenario, "choices") == ["1) Bet", "2) Stop"]
        assert scenario.options == {"bet": "1", "stop": "2"}
        assert scenario.tags
        assert "decision" not in scenario.spans
    assert {"risky", "safe"} <= {tag for scenario in suite for tag in scenario.tags}


@pytest.mark.torch
@pytest.mark.parametrize("scenario", load_suite(demo.suite_path()), ids=lambda s: s.name)
def test_the_ten_scenarios_in_tokens(demo_tokenizer: Any, scenario: Scenario) -> None:
    encoding = demo_tokenizer.encode(scenario.prompt)
    positions = span_positions(scenario, encoding.offsets)
    for name in ("balance", "goal", "probability"):
        text = demo_tokenizer.decode([encoding.ids[i] for i in positions[name]])
        # Whole tokens: a full stop may hang on to a percent sign.
        assert text.strip().rstrip(".") == marked(scenario, name)[0]
    assert positions["decision"] == [len(encoding.ids) - 1]
    check_spans_against_bytes(demo_tokenizer, scenario.prompt, dict(scenario.spans))


def test_positions_equal_those_of_a_scan_over_all_ranges() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        starts = rng.integers(0, 30, 12)
        offsets = [(int(at), int(at + rng.integers(0, 5))) for at in starts]
        ranges = [(int(at), int(at + rng.integers(1, 9))) for at in rng.integers(0, 30, 3)]
        scanned = [
            position
            for position, (start, end) in enumerate(offsets)
            if start < end and any(start < stop and begin < end for begin, stop in ranges)
        ]
        assert token_positions(ranges, offsets) == scanned


@pytest.mark.long
@pytest.mark.parametrize("names", ["one", "many"])
def test_time_for_marks_grows_with_their_number(names: str) -> None:
    """Ten times as many marks must not take a hundred times as long."""

    def seconds(count: int) -> float:
        template = " ".join(f"[[s{n if names == 'many' else ''}:x]]" for n in range(count))
        start = time.process_time()
        prompt, spans = render_template(template, {})
        offsets = [(at, at + 1) for at in range(len(prompt))]
        span_positions(Scenario(prompt, name="a", spans=spans, marks=False), offsets)
        return time.process_time() - start

    few = min(seconds(2_000) for _ in range(3))
    assert min(seconds(20_000) for _ in range(3)) < 40 * few


@pytest.mark.long
def test_time_for_texts_grows_with_their_number(tmp_path: Path) -> None:
    entry = {
        "name": "a",
        "prompt": "x " * 20_000,
        "spans": {f"s{n}": {"text": "x", "occurrence": n + 1} for n in range(20_000)},
    }
    (tmp_path / "suite.jsonl").write_text(json.dumps(entry))
    start = time.process_time()
    (scenario,) = load_suite(tmp_path / "suite.jsonl")
    assert scenario.spans["s7"] == ((14, 15),)
    # A search through the prompt for each name is 400 million steps, minutes anywhere.
    assert time.process_time() - start < 20


def test_occurrences_may_overlap(tmp_path: Path) -> None:
    entry = {"name": "a", "prompt": "aaa", "spans": {"s": {"text": "aa", "occurrence": "all"}}}
    (tmp_path / "suite.jsonl").write_text(json.dumps(entry))
    assert load_suite(tmp_path / "suite.jsonl")[0].spans["s"] == ((0, 2), (1, 3))
