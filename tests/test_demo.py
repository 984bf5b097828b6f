"""The embedded model has learnt its game, its SAEs explain its blocks, and all of it is small."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zarrtrace import demo
from zarrtrace.scenarios import load_suite, span_positions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sae_lens = pytest.importorskip("sae_lens")

import numerics  # noqa: E402 -- imports torch
import rounding  # noqa: E402

SEED = "a seed that training does not use"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``scripts/train_demo.py`` as a module."""
    path = Path(__file__).parents[1] / "scripts" / "train_demo.py"
    spec = importlib.util.spec_from_file_location("train_demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # where its other modules are
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        demo.model_path(), local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo.model_path(), local_files_only=True)


def card() -> str:
    return (demo.model_path().parent / "README.md").read_text(encoding="utf-8")


def card_agreement() -> float:
    found = re.search(r"agrees with the player \| ([\d.]+)%", card())
    assert found
    return float(found[1]) / 100


def card_figures() -> dict[int, tuple[float, float, int]]:
    """Median L0, explained variance and dead features by block."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| \S+ \| (\S+) \| \S+ \| (\d+) \|$", card(), re.M)
    return {int(n): (float(l0), float(variance), int(dead)) for n, l0, variance, dead in rows}


def test_model_is_the_one_the_mission_needs(model: Any) -> None:
    config = model.config
    assert type(model) is transformers.LlamaForCausalLM
    assert config.num_hidden_layers == 32
    assert config.num_key_value_heads < config.num_attention_heads
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.long  # of files that no code changes
def test_choices_agree_with_the_policy(script: ModuleType, model: Any, tokenizer: Any) -> None:
    seen = script.seen_games(seed=0, steps=script.STEPS)
    games = script.held_out_games(random.Random(SEED), 200, seen)
    text = script.GameText()
    agreement = script.demo_model.policy_agreement(model, tokenizer, text, games)
    assert agreement >= 0.9
    assert agreement == pytest.approx(card_agreement(), abs=0.03)  # of other games
    answers = [text.answer(game) for game in games]
    assert max(map(answers.count, set(answers))) / len(answers) < 0.75, "one answer would do"


@pytest.mark.parametrize(
    ("name", "choice"),
    [("Desperate_10", "bet"), ("Very_risky_25", "bet"), ("Goal_achieved_200", "stop"),
     ("Big_success_280", "stop")],
)  # fmt: skip
def test_choice_in_scenario(name: str, choice: str, model: Any, tokenizer: Any) -> None:
    (scenario,) = (s for s in load_suite(demo.suite_path()) if s.name == name)
    ids = tokenizer(scenario.prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = tokenizer.decode(model(ids).logits[0, -1].argmax())
    assert said == scenario.options[choice]


@pytest.mark.long  # of files that no code changes
def test_learnt_more_than_a_bigram(script: ModuleType, model: Any, tokenizer: Any) -> None:
    text, rng = script.GameText(), random.Random(SEED)
    games = [script.sample_game(rng) for _ in range(100)]
    train = [text.full(script.sample_game(rng)) for _ in range(500)]
    baselines = script.demo_model.baseline_losses(
        tokenizer, train, [text.full(game) for game in games]
    )
    assert script.demo_model.mean_loss(model, tokenizer, text, games) < 0.7 * min(baselines)


def test_prompts_have_the_length_and_spans_of_the_mission(tokenizer: Any) -> None:
    suite = load_suite(demo.suite_path())
    assert len(suite) == 10
    for scenario in suite:
        encoded = tokenizer(scenario.prompt, return_offsets_mapping=True)
        assert 100 <= len(encoded["input_ids"]) <= 125
        spans = span_positions(scenario, encoded["offset_mapping"])
        assert {"balance", "goal", "probability", "choices", "decision"} <= set(spans)
        assert spans["decision"] == [len(encoded["input_ids"]) - 1]


def test_bos_is_prepended_once(tokenizer: Any) -> None:
    ids = tokenizer("Your choice:\n")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in tokenizer("a", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["naïve 12345 €", "日本語 🎰🎰 end", "\x00\t\r\n  mixed  "])
def test_any_text_survives_with_exact_offsets(text: str, tokenizer: Any) -> None:
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    covered: set[int] = set()
    for token, (start, end) in zip(
        encoded["input_ids"][1:], encoded["offset_mapping"][1:], strict=True
    ):
        covered.update(range(start, end))
        piece = tokenizer.decode([token])
        assert piece == text[start:end] or "\N{REPLACEMENT CHARACTER}" in piece
    assert covered == set(range(len(text)))


def test_numbers_group_in_threes(tokenizer: Any) -> None:
    encoded = tokenizer("1234567", return_offsets_mapping=True)
    ends = {end for _, end in encoded["offset_mapping"]}
    assert {3, 6, 7} <= ends


@pytest.mark.long  # of files that no code changes
def test_saes_explain_every_block(script: ModuleType, model: Any, tokenizer: Any) -> None:
    seen = script.seen_games(seed=0, steps=script.STEPS)
    games = script.held_out_games(random.Random(SEED), 40, seen)
    captured = script.residuals(model, tokenizer, script.GameText(), games)
    decisions = script.decision_rows(games, script.GameText(), tokenizer)
    for block, data in enumerate(captured):
        folder = demo.sae_path() / f"blocks.{block}.hook_resid_post"
        sae = sae_lens.SAE.load_from_disk(folder, dtype="float32")
        assert sae.cfg.metadata.hook_name == f"blocks.{block}.hook_resid_post"
        assert sae.cfg.normalize_activations == "none"
        assert sae.cfg.architecture() in ("jumprelu", "topk")
        assert sae.cfg.d_sae >= 512
        features = sae.encode(data)
        assert features.dtype == torch.float32
        figures = script.sae_figures(folder, data, decisions)
        assert figures.explained_variance >= 0.8, block
        assert 1 <= figures.median_l0 <= 64, block
        median_l0, explained_variance, _ = card_figures()[block]  # of other games
        assert figures.median_l0 == pytest.approx(median_l0, abs=3), block
        assert figures.explained_variance == pytest.approx(explained_variance, abs=0.002), block


def test_residuals_are_block_outputs(script: ModuleType, model: Any, tokenizer: Any) -> None:
    text = script.GameText()
    game = next(iter(text.suite_games().values()))
    captured = script.residuals(model, tokenizer, text, [game])
    ids = torch.tensor([tokenizer(text.full(game))["input_ids"]])

    def states() -> dict[str, Any]:
        """The first block's output, and the last one's behind the final norm."""
        with torch.no_grad():
            found = model(ids, output_hidden_states=True).hidden_states
        return {"first": found[1][0, :-1], "last": found[-1][0, :-1]}

    with torch.no_grad():
        last = model.model.norm(captured[-1])
    expected, allowed = states(), numerics.deviations(states)  # one token more: other rounding
    rounding.assert_close(captured[0], expected["first"], allowed["first"])
    rounding.assert_close(last, expected["last"], allowed["last"])


def test_files_are_small_and_plain() -> None:
    files = [
        path
        for folder in (demo.model_path(), demo.sae_path())
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 14_000_000


def test_card_tells_what_was_measured() -> None:
    text = card()
    loss, bigram, unigram = (
        float(re.search(rf"^\| {row}[^|]*\| ([\d.]+) nats", text, re.M)[1])  # type: ignore[index]
        for row in ("loss of the model", "bigram baseline", "unigram baseline")
    )
    assert loss < bigram < unigram
    assert card_agreement() >= 0.9
    assert sorted(card_figures()) == list(range(32))
    for block, (median_l0, explained_variance, dead) in card_figures().items():
        assert 1 <= median_l0 <= 64, block
        assert explained_variance >= 0.8, block
        assert dead < 512 / 2, block
