"""``--generate``: continuations from the model to traces and tables, resumed and chosen by name."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import fakes
import numpy as np
import processes
import pyarrow.parquet
import pytest
import torch
from architectures import Models
from chat_templates import LLAMA, chat_tokenizer
from click.testing import CliRunner
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.torch

import zarrtrace as zt  # noqa: E402
from zarrtrace import demo  # noqa: E402
from zarrtrace.capture import comparison  # noqa: E402
from zarrtrace.cli import group  # noqa: E402
from zarrtrace.errors import ConfigError, ConfigMismatchError, ScenarioError  # noqa: E402
from zarrtrace.exports import export  # noqa: E402
from zarrtrace.extraction import continuations  # noqa: E402
from zarrtrace.extraction.answers import find_answer  # noqa: E402
from zarrtrace.index import build_index, find_feature  # noqa: E402
from zarrtrace.scenarios import sample_names  # noqa: E402
from zarrtrace.store import verify  # noqa: E402

TEXTS = ("You now hold $90. Your choice:", "Bet or stop?", "You now hold $10. Your choice:")
PROMPTS = [zt.Scenario(text, name=f"s{n}", options={"a": "1"}) for n, text in enumerate(TEXTS)]
SAMPLED: dict[str, Any] = {"generate": 5, "temperature": 1.0, "samples": 2, "seed": 3}


def rounding_of(model: Any, ids: list[int], logits: torch.Tensor) -> float:
    """Return how far two orders of the same sums may lie apart in a log-probability.

    The bound of the probe that permits generation, and of test_generation.py: eight roundings, each
    as large as what one rounding of the embeddings changes; twice, because single values are
    compared.
    """
    exact = logits.log_softmax(-1)
    with comparison.other_rounding(SimpleNamespace(model=model)), torch.inference_mode():
        noisy = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    least = torch.finfo(torch.float32).eps * exact.abs().max()
    return float(8 * 2 * max((noisy - exact).abs().max(), least))


@pytest.fixture(scope="module")
def llama(models: Models) -> Mapping[str, Any]:
    """Return what a call with the tiny model needs."""
    path = models.path("Llama")
    with architectures.quiet():
        model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return {"model": model, "tokenizer": tokenizer, "features": False, "quiet": True}


@pytest.fixture(scope="module")
def sampled(llama: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract two continuations of each prompt."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    zt.extract(folder, PROMPTS, residual=True, **SAMPLED, **llama)
    return folder


def step_by_step(model: Any, ids: list[int], prompt: int) -> np.ndarray:
    """Return log-probabilities of the ten likeliest tokens, with a cache and a token at a time."""
    rows, cache = [], None
    with torch.inference_mode():
        for at in [ids[:prompt], *([one] for one in ids[prompt:])]:
            out = model(torch.tensor([at]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0].log_softmax(-1).topk(10).values)
    found: np.ndarray = torch.cat(rows).numpy()
    return found


# --- numbers ------------------------------------------------------------------------------------


def test_traces_hold_one_pass_over_prompt_and_continuation(
    models: Models, sampled: Path, llama: Mapping[str, Any]
) -> None:
    run = zt.open_run(sampled)
    assert [*run.children] == [f"s{n}~{repeat}" for n in range(3) for repeat in range(2)]
    assert verify(sampled) == []
    assert not [*sampled.parent.glob(".run*")]
    for name, node in run.children.items():
        ds = node.to_dataset()
        generation, ids = ds.attrs["generation"], ds["token_id"].values.tolist()
        prompt = generation["prompt_tokens"]
        text = TEXTS[int(name[1])]
        assert ds.attrs["prompt"] == text
        assert (ds.attrs["scenario"], ds.attrs["repeat"]) == (name[:2], int(name[-1]))
        assert ids[:prompt][-3:] == llama["tokenizer"](text)["input_ids"][-3:]
        assert ds["generated"].values.tolist() == [False] * prompt + [True] * (len(ids) - prompt)
        assert zt.span(ds, "decision") == [prompt - 1]
        assert zt.span(ds, "completion") == [*range(prompt, len(ids))]
        assert 1 <= len(ids) - prompt <= 5
        assert ds.sizes["query"] == len(ids)
        whole = architectures.reference("Llama", models.path("Llama"), ids)
        for layer in ds["layer"].values.tolist():
            np.testing.assert_array_equal(ds["attention"].sel(layer=layer), whole.attention[layer])
        stored = ds["next_token_logprob"].values
        np.testing.assert_array_equal(stored, whole.logits.log_softmax(-1).topk(10).values)
        steps = step_by_step(llama["model"], ids, prompt)
        assert np.abs(steps - stored).max() <= rounding_of(llama["model"], ids, whole.logits)


def test_greedy_is_what_transformers_generates(tmp_path: Path, llama: Mapping[str, Any]) -> None:
    run = zt.extract(tmp_path / "run", PROMPTS, generate=6, **llama)
    assert [*run.children] == ["s0", "s1", "s2"]
    for node in run.children.values():
        ds = node.to_dataset()
        assert "repeat" not in ds.attrs
        prompt, ids = ds.attrs["generation"]["prompt_tokens"], ds["token_id"].values.tolist()
        expected = llama["model"].generate(
            torch.tensor([ids[:prompt]]),
            attention_mask=torch.ones(1, prompt),
            max_new_tokens=6,
            do_sample=False,
        )
        assert ids == expected[0].tolist()


def test_continuations_do_not_depend_on_other_scenarios(
    tmp_path: Path, sampled: Path, llama: Mapping[str, Any]
) -> None:
    alone = zt.extract(tmp_path / "one", PROMPTS, scenario="s2", **SAMPLED, **llama)
    for name in ("s2~0", "s2~1"):
        ds = zt.open_trace(sampled / name)
        np.testing.assert_array_equal(alone[name]["token_id"], ds["token_id"])
        assert alone[name].attrs["generation"] == ds.attrs["generation"]
    other = zt.extract(tmp_path / "seed", PROMPTS[2:], **{**SAMPLED, "seed": 4}, **llama)
    texts = {name: node.attrs["generation"]["text"] for name, node in other.children.items()}
    assert texts != {name: alone[name].attrs["generation"]["text"] for name in texts}


def test_positions_count_over_prompt_and_continuation(
    tmp_path: Path, sampled: Path, llama: Mapping[str, Any]
) -> None:
    how = {**SAMPLED, **llama}
    run = zt.extract(tmp_path / "spans", PROMPTS, positions="completion,decision", **how)
    for name, node in run.children.items():
        whole, ds = zt.open_trace(sampled / name), node.to_dataset()
        prompt = ds.attrs["generation"]["prompt_tokens"]
        assert ds["query"].values.tolist() == [*range(prompt - 1, ds.sizes["key"])]
        np.testing.assert_array_equal(ds["attention"], whole["attention"].sel(query=ds["query"]))
    last = zt.extract(tmp_path / "last", PROMPTS, positions="last", **how)
    assert all(node["query"].item() == node.sizes["key"] - 1 for node in last.children.values())


# --- tables -------------------------------------------------------------------------------------


def test_a_table_has_a_sample_a_repeat(
    tmp_path: Path, sampled: Path, llama: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**SAMPLED, **llama, "attention": False, "residual": True, "layout": "table"}
    how["batch_size"] = 1  # as traces are computed on a CPU
    table = zt.extract(tmp_path / "table", PROMPTS, **how)
    run, at = zt.open_run(sampled), 0
    for node in run.children.values():
        ds, count = node.to_dataset(), node.sizes["query"]
        rows = table.isel(sample=slice(at, at + count))
        at += count
        assert {*rows["scenario"].values} == {ds.attrs["scenario"]}
        assert {*rows["repeat"].values.tolist()} == {ds.attrs["repeat"]}
        assert {*rows["choice"].values} == {ds.attrs.get("choice", "")}
        np.testing.assert_array_equal(rows["generated"], ds["generated"])
        np.testing.assert_array_equal(rows["token_id"], ds["token_id"])
        np.testing.assert_array_equal(rows["residual"], ds["residual"])
        spans = [one.split(",") for one in rows["span"].values]
        assert ["completion" in one for one in spans] == ds["generated"].values.tolist()
    assert at == table.sizes["sample"]
    assert table.attrs["scenarios"] == 6
    assert verify(tmp_path / "table") == []
    assert {file.name for file in tmp_path.iterdir()} == {"table"}
    monkeypatch.setattr(continuations, "_continued", None)  # nothing is generated again
    again = zt.extract(tmp_path / "table", PROMPTS, **how)
    assert again.identical(table)
    with pytest.raises(ConfigMismatchError, match="generation: seed: 3 there, 5 now"):
        zt.extract(tmp_path / "table", PROMPTS, **{**how, "seed": 5})


# --- answers ------------------------------------------------------------------------------------

CHOICES = {"bet": "1", "stop": " 2", "ten": "10"}


@pytest.mark.parametrize(
    ("text", "pattern", "answer", "choice"),
    [
        ("1", None, "1", "bet"),
        (" I take 2, not 1.", None, "2", "stop"),
        ("10", None, "10", "ten"),
        ("nothing of that, 12 21", None, None, None),
        ("Option 2? No: choice: 1", r"choice: (\d+)", "1", "bet"),
        ("Option 2? No: choice: 3", r"choice: (\d+)", "3", None),
        ("Option 2?", r"choice: (\d+)", None, None),
        ("take 1", "take .", "take 1", "bet"),
        ("take", "(x)?take", "take", None),
        ("1", "", None, None),
    ],
)
def test_answers(text: str, pattern: str | None, answer: str | None, choice: str | None) -> None:
    found = find_answer(text, pattern, CHOICES)
    where = found.characters
    assert (None if where is None else text[slice(*where)], found.choice) == (answer, choice)


def test_the_longest_option_at_a_place_counts() -> None:
    options = {"stop": "stop", "now": "stop now"}
    assert find_answer("I stop now", None, options) == ((2, 10), "now")


def test_answers_are_spans_of_tokens(tmp_path: Path, llama: Mapping[str, Any]) -> None:
    """Each continuation begins with some word: it is the answer, and found in the tokens."""
    how = {**llama, **SAMPLED, "generate": 8, "attention": False, "residual": True}
    run = zt.extract(tmp_path / "run", PROMPTS, answer=r"\w+", **how)
    found = 0
    for node in run.children.values():
        ds = node.to_dataset()
        if "answer" not in ds.attrs["spans"]:
            continue
        found += 1
        answer = "".join(ds["key_token"].values[zt.span(ds, "answer")])
        text = ds.attrs["generation"]["text"]
        assert text.index(answer.strip()) <= text.index(answer.strip()) + len(answer)
        assert {*zt.span(ds, "answer")} <= {*zt.span(ds, "completion")}
    assert found


# --- resume -------------------------------------------------------------------------------------


@pytest.mark.long
def test_nothing_is_generated_twice(
    tmp_path: Path, sampled: Path, llama: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each batch in turn: the same bytes, and each continuation is made once."""
    package, made, allowed = continuations.capture_package(), [0], [0]
    real = package.generate

    def generate(model: Any, requests: Any, sampling: Any) -> Any:
        if not allowed[0]:
            raise KeyboardInterrupt
        allowed[0] -= 1
        made[0] += len(requests)
        return real(model, requests, sampling)

    plan = package.plan_batches
    monkeypatch.setattr(package, "generate", generate)
    monkeypatch.setattr(package, "plan_batches", lambda *a: plan(*a, size=2))
    how = {**SAMPLED, **llama, "residual": True}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match=r"stopped after \d of 6 continuations"):
            zt.extract(tmp_path / "run", PROMPTS, **how)
        allowed[0] = 1
    kept = next(tmp_path.glob(".run.zarrtrace-continuations"))
    assert len(kept.read_bytes().splitlines()) == 5
    with kept.open("ab") as file:  # half a line, as a crash leaves it
        file.write(b'12345678 {"scenario": "s')
    zt.extract(tmp_path / "run", PROMPTS, **how)
    assert made[0] == 6
    assert not kept.exists()
    assert fakes.files_in(tmp_path / "run") == fakes.files_in(sampled)
    zt.extract(tmp_path / "run", PROMPTS, **how)  # from the traces themselves
    (tmp_path / "run" / "s1~1" / "zarr.json").unlink()
    allowed[0] = 1  # the batch in which it was
    zt.extract(tmp_path / "run", PROMPTS, repair=True, **how)
    assert fakes.files_in(tmp_path / "run") == fakes.files_in(sampled)


KILLED = (
    processes.COUNTED
    + """
import zarrtrace as zt
from zarrtrace.storage import disk
from zarrtrace.store import continuations
layout = sys.argv[3]

from zarrtrace import capture
plan = capture.plan_batches
capture.plan_batches = lambda *given: plan(*given, size=3)
counted(capture, "generate")
counted(continuations.ContinuationFile, "add")
counted(disk, "append")
counted(disk, "sync")
counted(os, "rename")
prompts = [zt.Scenario(f"You hold ${n}. Bet?", name=f"s{n}") for n in range(3)]
zt.extract(folder, prompts, model="demo", layers=[3, 20], attention=layout == "traces",
           layout=layout, generate=2, samples=3, temperature=1, quiet=True)
print(steps)
"""
)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["traces", "table"])
def test_kill_9(tmp_path: Path, layout: str) -> None:
    """While it generates, between continuations, and in the pass that stores them."""
    done = processes.python(KILLED, tmp_path / "expected", 0, layout)
    assert done.returncode == 0, done.stderr
    expected = fakes.files_in(tmp_path / "expected")
    # Before and behind generate, behind a batch that is kept, in the third batch, and in the pass.
    for at in (1, 2, 4, 6, *((40, 60) if layout == "traces" else (8, 10))):
        done = processes.python(KILLED, tmp_path / "run", at, layout)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = processes.python(KILLED, tmp_path / "run", 0, layout)
    assert done.returncode == 0, done.stderr
    assert fakes.files_in(tmp_path / "run") == expected
    assert {file.name for file in tmp_path.iterdir()} == {"expected", "run"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.5}, "generation: temperature: 1.0 there, 0.5 now"),
        ({"samples": 3}, "generation: samples: 2 there, 3 now"),
        ({"generate": 6}, "generation: tokens: 5 there, 6 now"),
        ({"stop": "."}, r"generation: stop: \[\] there, \['.'\] now"),
        ({"answer": "1"}, "generation: answer: None there, '1' now"),
        (
            {"generate": None, "temperature": 0, "samples": 1, "seed": 0},
            "generation: 7 .* None now",
        ),
    ],
)
def test_changed_settings_are_refused(
    sampled: Path, llama: Mapping[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigMismatchError, match=message):
        zt.extract(sampled, PROMPTS, **{**SAMPLED, **llama, "residual": True, **changed})


def test_changed_ends_of_sequences_are_refused(
    sampled: Path, llama: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no continuation that was kept with other ends is taken for one with these."""
    own, how = llama["model"].generation_config, {**SAMPLED, **llama, "residual": True}
    before = own.eos_token_id

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # all are generated, and none is stored
        patch.setattr(continuations, "with_continuation", interrupt)
        with pytest.raises(KeyboardInterrupt):
            zt.extract(tmp_path / "run", PROMPTS, **how)
    assert next(tmp_path.glob(".run.zarrtrace-continuations")).stat().st_size > 1000
    first = zt.open_run(sampled)["s0~0"]
    token = int(first["token_id"][first.attrs["generation"]["prompt_tokens"] + 1])
    monkeypatch.setattr(own, "eos_token_id", [token, before])
    named = rf"end-of-sequence tokens of the model: \[{before}\] there, \[.*{token}.*\] now"
    with pytest.raises(ConfigMismatchError, match=named):
        zt.extract(sampled, PROMPTS, **how)
    run = zt.extract(tmp_path / "run", PROMPTS, overwrite=True, **how)
    assert run["s0~0"].attrs["generation"]["ended_by"] == "end_of_sequence"
    new = zt.extract(tmp_path / "new", PROMPTS, **how)
    for name, one in new.children.items():
        assert one.to_dataset().identical(run[name].to_dataset())


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"temperature": 1}, ConfigError, "--temperature without --generate"),
        ({"answer": "1"}, ConfigError, "--answer without --generate"),
        ({"stop": "x"}, ConfigError, "--stop without --generate"),
        ({"generate": 1, "answer": "("}, ConfigError, "no regular expression"),
        ({"generate": 1, "samples": 2}, ConfigError, "--samples 2 without --temperature"),
        ({"generate": 1.5}, ConfigError, "--generate 1.5"),
        ({"generate": 10**6}, ConfigError, "do not fit the model's context"),
        ({"generate": 1, "positions": "answer"}, ScenarioError, "none of these spans"),
        ({"generate": 1, "positions": "answr"}, ScenarioError, "(?s)no span.*|no scenario has"),
        ({"generate": 1, "positions": [40]}, ConfigError, "40"),
    ],
)
def test_wrong_settings_are_refused(
    tmp_path: Path, llama: Mapping[str, Any], given: dict[str, Any], kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        zt.extract(tmp_path / "run", PROMPTS, **{**llama, **given})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "scenario",
    [
        zt.Scenario("a completion", name="x", spans={"completion": "a"}),
        zt.Scenario("an answer", name="x", spans={"answer": "answer"}),
        zt.Scenario("a choice", name="x", metadata={"choice": "a"}),
    ],
)
def test_names_of_the_continuation_are_taken(
    tmp_path: Path, llama: Mapping[str, Any], scenario: zt.Scenario
) -> None:
    with pytest.raises(ScenarioError, match="with --generate"):
        zt.extract(tmp_path / "run", scenario, generate=1, **llama)


# --- chats, the command line, the demo ----------------------------------------------------------


@pytest.mark.long
def test_chats_go_on_after_the_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(LLAMA)
    with architectures.quiet():
        model = AutoModelForCausalLM.from_pretrained(demo.model_path())
        model.resize_token_embeddings(len(tokenizer))
    chat = zt.Scenario(messages=[{"role": "user", "content": "You hold $90. Bet?"}], name="chat")
    run = zt.extract(
        tmp_path / "run", chat, model=model, tokenizer=tokenizer, features=False, layers=[1],
        generate=3, quiet=True,
    )  # fmt: skip
    ds = run["chat"].to_dataset()
    prompt, ids = ds.attrs["generation"]["prompt_tokens"], ds["token_id"].values.tolist()
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "You hold $90. Bet?"}], add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]  # fmt: skip
    assert ids[:prompt] == rendered
    expected = model.generate(
        torch.tensor([rendered]), attention_mask=torch.ones(1, prompt), max_new_tokens=3,
        do_sample=False,
    )  # fmt: skip
    assert ids == expected[0].tolist()


@pytest.mark.long
def test_command_line(tmp_path: Path) -> None:
    runner, run = CliRunner(), tmp_path / "run"
    how = ["--layers", "3", "--no-features", "--scenario", "Risky_40", "--generate", "2"]
    how += ["--temperature", "1", "--samples", "3", "-o", str(run)]
    dry = runner.invoke(group, ["extract", *how, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "3 continuations of 1 scenarios" in dry.output
    expected = int(dry.stdout.split("Risky_40")[1].split()[0])
    done = runner.invoke(group, ["extract", *how])
    assert done.exit_code == 0, done.output
    assert "of the time in generate" in done.stderr
    assert "Risky_40~2" in done.stdout
    export = runner.invoke(
        group, ["export", str(run), "-o", str(tmp_path / "npz"), "--scenario", "Risky_40"]
    )
    assert export.exit_code == 0, export.output
    assert len([*(tmp_path / "npz").glob("Risky_40~*/layer_3.npz")]) == 3
    other = runner.invoke(group, ["extract", *how, "--seed", "1"])
    assert isinstance(other.exception, ConfigMismatchError)
    assert "generation: seed: 0 there, 1 now" in str(other.exception)
    said = json.loads(runner.invoke(group, ["info", str(run), "--json"]).stdout)
    assert [one["scenario"] for one in said["traces"]] == [f"Risky_40~{n}" for n in range(3)]
    assert {one["tokens"] for one in said["traces"]} == {expected}


@pytest.mark.long
def test_samples_of_a_table_are_found_by_repeat(tmp_path: Path) -> None:
    """The positions of two repeats are the same: their texts and features must not be mixed."""
    table = zt.extract(
        tmp_path / "table", "slot-machine", model="demo", scenario=("Risky_40", "Medium_60"),
        layers=[3], layout="table", generate=2, samples=2, temperature=1, quiet=True,
        positions="completion",
    )  # fmt: skip
    values = table["features"].sel(layer=3).values
    names = sample_names(table["scenario"].values, table["repeat"].values)
    places = [*zip(names, table["position"].values.tolist(), strict=True)]
    assert len({*places}) == table.sizes["sample"]
    feature = int(np.abs(values).max(axis=0).argmax())
    for is_indexed in (False, True):
        if is_indexed:
            build_index(tmp_path / "table")
        found = find_feature(tmp_path / "table", 3, feature)
        assert found.tokens
        for use in found.tokens:
            at = places.index((use.scenario, use.position))
            assert use.activation == values[at, feature]
            assert use.token == table["token"].values[at]
    for chosen, repeats in (("Risky_40~1", {1}), ("Risky_40", {0, 1})):
        export(tmp_path / "table", tmp_path / chosen, to="parquet", scenarios=[chosen])
        kept = pyarrow.parquet.read_table(tmp_path / chosen)
        assert {*kept["repeat"].to_pylist()} == repeats
        assert {*kept["scenario"].to_pylist()} == {"Risky_40"}


@pytest.mark.long
def test_the_demo_bets_as_often_as_its_probabilities_say(tmp_path: Path) -> None:
    """Ten scenarios, 20 continuations of one token each: exact binomial intervals of 99.9 %."""
    run = zt.extract(
        tmp_path / "run", generate=1, samples=20, temperature=1, layers=[3], features=False,
        attention=True, positions="decision,completion", quiet=True,
    )  # fmt: skip
    assert len(run.children) == 200
    by_scenario = itertools.groupby(run.children.values(), lambda node: node.attrs["scenario"])
    expected = chosen = 0.0
    for name, nodes in by_scenario:
        repeats = list(nodes)
        first = repeats[0].to_dataset()
        row = first.sel(query=zt.span(first, "decision")[0])
        logprobs = dict(
            zip(row["next_token"].values, row["next_token_logprob"].values, strict=True)
        )
        for option, one in first.attrs["options"].items():
            probability = float(np.exp(logprobs[one["token_id"]]))
            count = sum(node.attrs.get("choice") == option for node in repeats)
            test = stats.binomtest(count, len(repeats), probability)
            assert test.pvalue > 1e-3, (name, option, count, probability)
            if option == "bet":
                expected, chosen = expected + probability, chosen + count / 20
        for node in repeats:  # the choice is the token
            text = node.attrs["generation"]["text"].strip()
            options = {one["text"]: key for key, one in first.attrs["options"].items()}
            assert node.attrs.get("choice") == options.get(text)
    assert 0 < chosen < 10  # both happen
    assert abs(expected - chosen) < 4 * np.sqrt(10 * 0.25 / 20)
