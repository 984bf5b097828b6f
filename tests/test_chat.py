"""Scenarios of messages: rendered as transformers does, with spans cut where they were marked."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chat_templates import GEMMA, LLAMA, MISTRAL, TEMPLATES, WRITTEN, chat_tokenizer
from click.testing import CliRunner
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.torch

import zarrtrace as zt  # noqa: E402
from zarrtrace.capture.prompts import tokenize  # noqa: E402
from zarrtrace.capture.token_texts import TokenTexts, special_ids  # noqa: E402
from zarrtrace.cli import group  # noqa: E402
from zarrtrace.errors import ConfigError, ConfigMismatchError, ScenarioError  # noqa: E402
from zarrtrace.extraction.job import tokenized  # noqa: E402
from zarrtrace.extraction.options import Options  # noqa: E402
from zarrtrace.extraction.sae_sources import bos_notes  # noqa: E402
from zarrtrace.scenarios import Scenario, as_scenarios  # noqa: E402

USER = {"role": "user", "content": "You hold $90. Bet?"}
TURNS = [USER, {"role": "assistant", "content": " I bet 1, as "}]
TOKENIZERS = {name: chat_tokenizer(template) for name, template in TEMPLATES.items()}
# A character that no content has: it shows where text of a content is rendered.
SIGN = "\N{BLACK SQUARE}"


def model_of(tokenizer: Any) -> Any:
    """Return as much of a loaded model as tokenising takes."""
    return SimpleNamespace(
        tokenizer=tokenizer,
        max_tokens=None,
        model=SimpleNamespace(get_input_embeddings=lambda: None),
        texts=TokenTexts(tokenizer),
        special_ids=special_ids(tokenizer),
    )


def theirs(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """Return the ids that transformers makes of messages."""
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"]
    return ids


# --- rendering -----------------------------------------------------------------------------------

_texts = st.text("ab90 \n\t$.é😀[]<|", max_size=12).filter(lambda one: "[[" not in one)
_messages = st.lists(st.tuples(_texts, _texts, _texts), min_size=1, max_size=5)


@given(
    parts=_messages, system=st.booleans(), begins=st.booleans(), style=st.sampled_from([*TEMPLATES])
)
def test_spans_cut_the_same_text_out_of_messages(
    parts: list[tuple[str, str, str]], system: bool, begins: bool, style: str
) -> None:
    tokenizer = TOKENIZERS[style]
    begins_with_system = system and style != "mistral" and len(parts) > 1
    roles = ["system"] * begins_with_system + ["user", "assistant"] * len(parts)
    contents = [f"{one}{two}{three}" for one, two, three in parts]
    if not any(map(str.strip, contents)):
        return
    messages = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=False)]
    # A span of the middle part of each message, given by its occurrence in this message.
    spans: dict[str, Any] = {}
    for at, (before, marked, _) in enumerate(parts):
        if marked.strip():
            found = [i for i in range(len(contents[at])) if contents[at].startswith(marked, i)]
            which = found.index(len(before)) + 1
            spans[f"s{at}"] = {"text": marked, "message": at, "occurrence": which}
    scenario = Scenario(messages=messages, spans=spans, generation_prompt=begins, marks=False)
    if not begins and messages[-1]["role"] == "assistant" and not contents[-1].strip():
        with pytest.raises(ScenarioError, match="no text to continue"):
            scenario.render(tokenizer)
        return
    rendered = scenario.render(tokenizer)

    continued = not begins and messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": begins, "continue_final_message": continued}
    assert rendered.prompt == tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert rendered.spans.keys() == spans.keys()
    for at, (before, marked, after) in enumerate(parts):
        if not marked.strip():
            continue
        ((start, end),) = rendered.spans[f"s{at}"]
        assert rendered.prompt[start:end] in marked
        assert rendered.prompt[start:end].strip() == marked.strip()
        if before.strip() and after.strip():  # no template changes the middle of a content
            assert rendered.prompt[start:end] == marked
        # Transformers writes other characters at exactly these places.
        signs = "".join(sign if sign.isspace() else SIGN for sign in marked)
        other = [dict(message) for message in messages]
        other[at]["content"] = before + signs + after
        shown = tokenizer.apply_chat_template(other, tokenize=False, **options)
        places = [place for place, sign in enumerate(shown) if sign == SIGN]
        cut = rendered.prompt[start:end]
        assert places == [start + i for i, sign in enumerate(cut) if not sign.isspace()]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("turns", [[USER], TURNS, [*TURNS, USER]], ids=len)
@pytest.mark.parametrize("style", TEMPLATES)
def test_ids_are_those_of_transformers(style: str, turns: Any, begins: bool) -> None:
    tokenizer = TOKENIZERS[style]
    continued = not begins and turns[-1]["role"] == "assistant"
    expected = theirs(
        tokenizer, turns, add_generation_prompt=begins, continue_final_message=continued
    )
    scenario = Scenario(messages=turns, generation_prompt=begins).render(tokenizer)
    for prepend_bos in (True, False):  # which is for prompts: a template writes BOS or does not
        tokens = tokenize(model_of(tokenizer), scenario, prepend_bos=prepend_bos).tokens
        assert list(tokens.ids) == expected
    special = {*tokenizer.convert_tokens_to_ids(list(WRITTEN)), *tokenizer.all_special_ids}
    assert list(tokens.special) == [one in special for one in expected]
    assert scenario.prompt == tokenizer.decode(expected)
    assert scenario.chat is not None
    assert scenario.chat.continued == continued


def test_marks_and_texts_are_cut_where_they_stand() -> None:
    scenario = Scenario(
        messages=[
            {"role": "system", "content": " The [[goal:goal]] is $200. "},
            {"role": "user", "content": "I bet 1. [[all:You hold $90]]. Bet?"},
        ],
        spans={
            "header": "<|start_header_id|>assistant<|end_header_id|>",
            "bet": {"text": "Bet", "message": -1},
            "money": {"text": "$", "occurrence": "all"},
            "first": (0, 3),
            "goal": {"text": "$200", "message": 0},
        },
    )
    assert not scenario.prompt
    assert scenario.messages[1].content == "I bet 1. You hold $90. Bet?"
    rendered = scenario.render(TOKENIZERS["llama"])
    cut = {
        name: [rendered.prompt[start:end] for start, end in ranges]
        for name, ranges in rendered.spans.items()
    }
    assert cut == {
        "goal": ["goal", "$200"],
        "all": ["You hold $90"],
        "bet": ["Bet"],
        "header": ["<|start_header_id|>assistant<|end_header_id|>"],
        "money": ["$", "$"],
        "first": [rendered.prompt[:3]],
    }
    assert rendered.prompt.endswith("Bet?<|eot_id|>" + cut["header"][0] + "\n\n")
    assert scenario.span_names == rendered.span_names == tuple(rendered.spans)
    assert repr(rendered).startswith(f"Scenario(prompt={rendered.prompt!r}")
    assert rendered.render(TOKENIZERS["gemma"]) is rendered
    for one in (scenario, rendered):
        assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301
    named = {"name": "x", "marks": False}
    assert replace(rendered, **named) == replace(scenario, **named).render(TOKENIZERS["llama"])


def test_a_continuation_follows_the_rendered_text() -> None:
    tokenizer = TOKENIZERS["chatml"]
    scenario = Scenario(messages=TURNS, options={"one": "1"}, generation_prompt=False)
    prompt = tokenize(model_of(tokenizer), scenario.render(tokenizer), prepend_bos=True)
    whole = tokenizer(prompt.scenario.prompt + "1", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt.tokens.ids)] == prompt.tokens.ids
    assert prompt.options["one"].token_id == whole[len(prompt.tokens.ids)]


@pytest.mark.parametrize("style", ["chatml", "llama"])
def test_bos_stands_once_or_as_asked(style: str) -> None:
    tokenizer = TOKENIZERS[style]
    scenario = Scenario(messages=[USER], spans={"money": {"text": "$90", "message": 0}})
    rendered = scenario.render(tokenizer, prepend_bos=True)
    ids = tokenize(model_of(tokenizer), rendered, prepend_bos=True).tokens.ids
    assert [ids[0], ids.count(ids[0])] == [tokenizer.bos_token_id, 1]
    ((start, end),) = rendered.spans["money"]
    assert rendered.prompt[start:end] == "$90"
    if style == "chatml":
        assert scenario.render(tokenizer, prepend_bos=False) == scenario.render(tokenizer)
        assert rendered.prompt == tokenizer.bos_token + scenario.render(tokenizer).prompt
    else:
        assert rendered == scenario.render(tokenizer)
        with pytest.raises(ConfigError, match="template itself writes"):
            scenario.render(tokenizer, prepend_bos=False)


# --- refusals ------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "[[s:Be very brief.]]"}


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [USER], "(?s)has messages.*no chat template.*base models.*instruction-tuned"),
        (MISTRAL, [SYSTEM, USER], "(?s)'x': .*Only user and assistant roles.*system, user"),
        (GEMMA, [USER, USER], "(?s)'x': .*roles must alternate"),
        ("{% for m in messages %}{{ m.contents + 1 }}{% endfor %}", [USER], "refuses its messages"),
        (
            "{{ messages[-1]['content'] }}",
            [SYSTEM, USER],
            "'Be very brief.' of message 0",
        ),
        ("{{ messages[0].content * 2 }}", [SYSTEM], "'Be very brief.' of message 0"),
        (
            "{{ messages[0].content | upper }}",
            [SYSTEM],
            "'Be very brief.' of message 0",
        ),
        ("{{ messages[0].content | length }}{{ messages[0].content }}", [SYSTEM], "exactly once"),
        ("{{ messages[0].content | replace('Be', 'B') }}", [SYSTEM], "exactly once"),
        ("{{ 'long' if 'brief' in messages[0].content else '' }}", [SYSTEM], "exactly once"),
    ],
)
def test_templates_that_do_not_fit_are_refused(
    template: str | None, messages: Any, message: str
) -> None:
    tokenizer = chat_tokenizer(template)
    with pytest.raises((ScenarioError, ConfigError), match=message) as caught:
        Scenario(messages=messages, name="x").render(tokenizer)
    assert caught.value.remedy


def test_templates_of_which_no_place_is_needed_are_taken() -> None:
    tokenizer = chat_tokenizer("{{ messages[-1]['content'] | upper }}")
    assert Scenario(messages=[{"role": "x", "content": "Hi"}, USER]).render(tokenizer).prompt == (
        "YOU HOLD $90. BET?"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": None}]}, "without text, such as a call of"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "parts such as images"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages are empty"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages.0.role"),
        ({"messages": [USER | {"tool_calls": []}]}, "(?s)unknown field 'tool_calls'.*'role' and"),
        ({"messages": [USER], "prompt": "a"}, "has a prompt and messages"),
        ({"messages": [USER], "spans": {"a": {"text": "x", "message": 0}}}, "not in message 0"),
        ({"messages": [USER], "spans": {"a": {"text": "$", "message": 1}}}, "no message 1"),
        ({"messages": [USER], "spans": {"a": {"text": "o", "message": 0}}}, "in message 0 2 times"),
        ({"messages": [USER], "spans": {"decision": "$"}}, "always the last token"),
        ({"messages": [{"role": "user", "content": "[[a:x"}]}, "message 0: span 'a' is never"),
        ({"prompt": "a", "generation_prompt": False}, "generation_prompt, and no messages"),
        ({"prompt": "a", "spans": {"b": {"text": "a", "message": 0}}}, "span 'b' in message 0"),
    ],
)
def test_messages_that_are_wrong_are_refused_without_a_tokenizer(given: Any, message: str) -> None:
    with pytest.raises(ScenarioError, match=message) as caught:
        Scenario(**given)
    assert caught.value.remedy
    with pytest.raises(ScenarioError, match=message):
        as_scenarios([given | {"marks": True}])


def test_a_template_and_messages_are_refused_together() -> None:
    given = {"messages": [USER], "template": "{x}", "values": {"x": 1}}
    with pytest.raises(ScenarioError, match="has messages and a template"):
        as_scenarios([given])


def test_store_refuses_messages_without_a_prompt(tmp_path: Path) -> None:
    scenario = Scenario(messages=[USER], name="x")
    arrays = {0: np.eye(3, dtype="float32")[None]}
    tokens = ([1, 2, 3], ["a", "b", "c"])
    with pytest.raises(ScenarioError, match="not rendered") as caught:
        zt.write_trace(tmp_path / "run", scenario, tokens=tokens, attention=arrays)
    assert "render(tokenizer)" in str(caught.value)


# --- sources -------------------------------------------------------------------------------------

CHATS = [
    {"name": "a", "messages": [USER], "spans": {"money": {"text": "$90", "message": 0}}},
    {"name": "b", "messages": TURNS, "generation_prompt": False},
]


def _written(folder: Path, kind: str) -> Any:
    """Return the scenarios as a source of some kind."""
    path = folder / f"chats.{kind}"
    columns = {key: [chat.get(key) for chat in CHATS] for key in ("name", "messages")}
    columns["generation_prompt"] = [None, False]
    as_json = [json.dumps(one) for one in columns["messages"]]
    spans = [json.dumps(chat.get("spans", {})) for chat in CHATS]
    frame = pd.DataFrame({**columns, "spans": spans})
    if kind == "yaml":
        path.write_text(json.dumps({"scenarios": CHATS}))  # which is YAML, too
    elif kind == "jsonl":
        null = {"tool_calls": None}
        lines = [{**chat, "messages": [one | null for one in chat["messages"]]} for chat in CHATS]
        path.write_text("\n".join(map(json.dumps, lines)))
    elif kind == "csv":
        frame.assign(messages=as_json).to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path, index=False)
    elif kind == "texts":
        return frame.assign(messages=as_json)
    elif kind == "lists":
        lists = [{key: [one[key] for one in chat] for key in USER} for chat in columns["messages"]]
        return frame.assign(messages=lists)
    else:
        return {"frame": frame, "dataset": Dataset.from_pandas(frame), "list": CHATS}[kind]
    return path


@pytest.mark.parametrize(
    "kind", ["yaml", "jsonl", "csv", "parquet", "frame", "texts", "lists", "dataset", "list"]
)
def test_every_source_holds_messages(tmp_path: Path, kind: str) -> None:
    found = as_scenarios(_written(tmp_path, kind))
    assert found == tuple(Scenario(**chat, marks=False) for chat in CHATS)
    first, second = (one.render(TOKENIZERS["chatml"]).prompt for one in found)
    assert first.endswith("<|im_start|>assistant\n")
    assert second.endswith("<|im_start|>assistant\n I bet 1, as ")


def test_a_file_says_for_all_what_entries_may_say(tmp_path: Path) -> None:
    path = tmp_path / "chats.yaml"
    literal = {"messages": [{"role": "user", "content": "[[a:b]]"}]}
    scenarios = [
        {"messages": [{"role": "user", "content": "Hold [[money:$90]]."}]},
        {**literal, "marks": False, "generation_prompt": True},
        {"prompt": "Hold [[money:$10]]."},
        {"template": "Hold {text}", "values": {"text": "[[a:b]]"}},
    ]
    suite = {"marks": True, "generation_prompt": False, "scenarios": scenarios}
    path.write_text(json.dumps(suite))
    marked, verbatim, prompt, template = as_scenarios(path)
    assert marked.messages[0].spans == {"money": ((5, 8),)}
    assert [one.chat.generation_prompt for one in (marked, verbatim) if one.chat] == [False, True]
    assert verbatim.messages[0].content == "[[a:b]]"
    assert (prompt.prompt, prompt.spans) == ("Hold $10.", {"money": ((5, 8),)})
    assert template.prompt == "Hold [[a:b]]"


def test_rows_have_a_prompt_or_messages() -> None:
    frame = pd.DataFrame({"prompt": ["x", None], "messages": [None, [USER]]})
    assert [len(one.messages) for one in as_scenarios(frame)] == [0, 1]
    with pytest.raises(ScenarioError, match="row 1: messages: missing"):
        as_scenarios(pd.DataFrame({"messages": [[USER], None]}))


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose tokenizer has a template."""
    folder = tmp_path_factory.mktemp("chat-model")
    tokenizer = chat_tokenizer(LLAMA)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_says_how_its_prompts_were_made(tmp_path: Path, model_folder: Path) -> None:
    scenarios = [
        Scenario(
            messages=[{"role": "user", "content": "You hold [[money:$90]]. Bet?"}], name="chat"
        ),
        Scenario("You hold $90. Bet?", name="plain"),
    ]
    options = {"model": str(model_folder), "features": False, "quiet": True}
    run = zt.extract(tmp_path / "run", scenarios, **options)
    ds = run["chat"].to_dataset()
    tokenizer = chat_tokenizer(LLAMA)
    messages = [{"role": "user", "content": "You hold $90. Bet?"}]
    ids = theirs(tokenizer, messages, add_generation_prompt=True)
    assert ds.token_id.to_numpy().tolist() == ids
    assert ds.special.to_numpy().tolist() == [one in tokenizer.added_tokens_decoder for one in ids]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ds.attrs["prompt"] == ds.zt.prompt == text
    span = ds.attrs["spans"]["money"]
    assert [text[start:end] for start, end in span["characters"]] == ["$90"]
    assert "".join(ds.key_token.to_numpy()[span["tokens"]]).strip() == "$90"
    chat = ds.attrs["chat"]
    assert chat["generation_prompt"] is True
    assert chat["continued"] is False
    assert len(chat["template"]) == 16
    assert ds.attrs["model"]["prepend_bos"] is True
    assert run["plain"].attrs["chat"] is None
    # The same command resumes; another template or generation prompt is another run.
    zt.extract(tmp_path / "run", scenarios, **options)
    with pytest.raises(ConfigMismatchError, match=r"prompts: .*chat.* changed"):
        zt.extract(tmp_path / "run", scenarios, generation_prompt=False, **options)
    changed = chat_tokenizer(LLAMA + "{# the same text #}")
    with pytest.raises(ConfigMismatchError, match=r"prompts: .*chat.* changed"):
        zt.extract(tmp_path / "run", scenarios, tokenizer=changed, **options)
    with pytest.raises(ConfigError, match="template itself writes"):
        zt.extract(tmp_path / "other", scenarios, prepend_bos=False, **options)
    with pytest.raises(ConfigError, match="no chat template"):
        zt.extract(tmp_path / "other", scenarios, tokenizer=chat_tokenizer(None), **options)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("trained", [True, False, None])
@pytest.mark.parametrize("style", ["chatml", "llama"])
def test_a_template_that_disagrees_with_the_saes_on_bos_is_noted(
    style: str, trained: bool | None
) -> None:
    tokenizer = TOKENIZERS[style]
    model: Any = model_of(tokenizer)
    scenarios = [Scenario(messages=[USER]), Scenario("Bet?")]
    prompts = list(tokenized(Options(), model, scenarios, prepend_bos=True))
    source: Any = SimpleNamespace(prepend_bos=trained)
    notes = bos_notes(source, prompts, tokenizer.bos_token_id)
    assert len(notes) == (trained is not None and trained != (style == "llama"))
    assert all("BOS" in one for one in notes)


def test_the_command_reads_messages(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"name": "c", "messages": TURNS}))
    command = ["extract", "--model", str(model_folder), "--scenarios", str(path), "--no-features"]
    command += ["--no-generation-prompt", "-q", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(group, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    ds = zt.open_trace(tmp_path / "run" / "c")
    ids = theirs(chat_tokenizer(LLAMA), TURNS, continue_final_message=True)
    assert ds.token_id.to_numpy().tolist() == ids
    assert ds.attrs["chat"]["continued"] is True
