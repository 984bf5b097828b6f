#!/usr/bin/env python3
"""Train the embedded demo: tokenizer, model, one SAE per block, and the model card.

The text is the template of the embedded suite (`zarrtrace/demo/slot_machine.yaml`), filled with
random game states and answered by a player with a fixed policy (`player_policy`). Runs on two CPU
cores in under an hour and is seeded.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from zarrtrace import demo
from zarrtrace.scenarios import render_template

BOS, END = "<|begin_of_text|>", "<|end_of_text|>"
IGNORED = -100

# Llama 3's word splitting: contractions, words, groups of 1-3 digits, punctuation, white space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB_SIZE = 480
N_BLOCKS = 32
HIDDEN = 64
BATCH = 16
DECISION_WEIGHT = 30.0
STEPS = 2200
TOKENIZER_GAMES = 4000

SAE_FEATURES = 512
SAE_ACTIVE = 20
SAE_BATCH = 1024
SAE_STEPS = 800
SAE_GAMES = 500


# --- the games -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Game:
    """The state of one game before the player's choice.

    Attributes
    ----------
    balance, goal
        Dollars held, and dollars at which the player wants to stop.
    history
        Outcomes of the last spins, at most three, newest last: dollars won, or lost if negative.
    round
        Number of the coming spin.
    win_percent, payout
        The odds the machine states.
    """

    balance: int
    goal: int
    history: tuple[int, ...]
    round: int
    win_percent: int
    payout: int


def player_policy(balance: int, goal: int, history: Sequence[int]) -> str:
    """What the player of the training games chooses: ``"bet"`` or ``"stop"``.

    The player stops at the goal or above it. Below it, two or more losses in a row make them chase
    the losses and bet. Otherwise they stop once they hold 60 % of the goal, and bet below that.

    Parameters
    ----------
    balance, goal
        Dollars held and dollars wanted.
    history
        Outcomes of the last spins, newest last; negative is a loss.
    """
    if balance >= goal:
        return "stop"
    if len(history) >= 2 and history[-1] < 0 and history[-2] < 0:
        return "bet"
    return "stop" if balance >= 0.6 * goal else "bet"


def sample_game(rng: random.Random) -> Game:
    """Draw a game state; about half of them lead to each choice."""
    goal = rng.randrange(100, 301, 10)
    top = 350 if rng.random() < 0.5 else int(1.2 * goal)
    n_spins = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8))
    history = tuple(
        -5 * rng.randint(1, 12) if rng.random() < 0.55 else 5 * rng.randint(1, 12)
        for _ in range(min(n_spins, 3))
    )
    return Game(
        balance=5 * rng.randint(1, top // 5),
        goal=goal,
        history=history,
        round=n_spins + 1,
        win_percent=rng.randrange(10, 61, 5),
        payout=rng.randint(2, 5),
    )


class GameText:
    """Renders games with the template of the embedded suite."""

    def __init__(self) -> None:
        suite = yaml.safe_load(demo.suite_path().read_text(encoding="utf-8"))
        self.template: str = suite["template"]
        self.options: dict[str, str] = suite["options"]
        self._scenarios = {s["name"]: suite["defaults"] | s["values"] for s in suite["scenarios"]}

    def suite_games(self) -> dict[str, Game]:
        """The states of the suite's scenarios, by name."""
        games = {}
        for name, values in self._scenarios.items():
            spins = values["history"] if isinstance(values["history"], list) else []
            signs = {"won": 1, "lost": -1}
            history = tuple(
                signs[verb] * int(dollars[1:]) for verb, dollars in map(str.split, spins)
            )
            games[name] = Game(**{**values, "history": history})
        return games

    def prompt(self, game: Game) -> str:
        """The text before the choice."""
        history = [f"won ${x}" if x > 0 else f"lost ${-x}" for x in game.history]
        values = {
            "balance": game.balance,
            "goal": game.goal,
            "history": history or "none yet",
            "round": game.round,
            "win_percent": game.win_percent,
            "payout": game.payout,
        }
        return render_template(self.template, values)[0]

    def answer(self, game: Game) -> str:
        """The option the player names, for example ``"1"``."""
        return self.options[player_policy(game.balance, game.goal, game.history)]

    def full(self, game: Game) -> str:
        """Prompt, choice and end of text."""
        return f"{self.prompt(game)}{self.answer(game)}\n{END}"


# --- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits text as Llama 3's does and prepends BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Trimming is off: offsets cover a token's leading space, as Llama 3's do.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


# --- model ---------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A 32-block Llama whose residual branches start small, so that its depth trains."""
    model: LlamaForCausalLM = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=N_BLOCKS,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=False,
        )
    )
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.div_(math.sqrt(2 * N_BLOCKS))
            block.mlp.down_proj.weight.div_(math.sqrt(2 * N_BLOCKS))
    return model


@dataclass(frozen=True)
class Batch:
    """Token ids, right-padded, and what to predict.

    Attributes
    ----------
    ids
        ``(batch, position)``.
    targets
        The next token at each position; padding is `IGNORED`.
    decisions
        Index of each text's last prompt token, where the choice is predicted.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    decisions: torch.Tensor


def make_batch(games: Sequence[Game], text: GameText, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Tokenize games; causal attention makes a mask of the right padding unnecessary."""
    rows = tokenizer([text.full(game) for game in games])["input_ids"]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    targets = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    # A text ends with choice, new line and end token.
    decisions = torch.tensor([len(row) - 4 for row in rows])
    return Batch(ids, targets, decisions)


def token_losses(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each prediction in nats, ``(batch, position)``; 0 at padding."""
    logits = model(input_ids=batch.ids).logits
    return F.cross_entropy(
        logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none"
    )


def warmup_steps(steps: int) -> int:
    """Steps over which the learning rate rises."""
    return min(200, steps // 5)


def train_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: GameText,
    rng: random.Random,
    steps: int,
    out: Path,
) -> None:
    """Train on fresh games with AdamW; every batch is new, so there are no epochs."""
    peak, warmup = 2e-3, warmup_steps(steps)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.97),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    started, recent = time.monotonic(), []
    for step in range(steps):
        batch = make_batch([sample_game(rng) for _ in range(BATCH)], text, tokenizer)
        losses = token_losses(model, batch)
        weights = (batch.targets != IGNORED).float()
        rows = torch.arange(len(losses))
        weights[rows, batch.decisions] = DECISION_WEIGHT
        optimizer.zero_grad()
        torch.autograd.backward((losses * weights).sum() / weights.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(losses[rows, batch.decisions].mean().item())
        if (step + 1) % 50 == 0:
            mean = losses.sum().item() / (batch.targets != IGNORED).sum().item()
            print(
                f"step {step + 1}/{steps}  loss {mean:.3f}  decision {sum(recent) / 50:.3f}"
                f"  {time.monotonic() - started:.0f} s",
                flush=True,
            )
            recent = []
        if (step + 1) % 500 == 0:
            model.save_pretrained(out)


# --- figures of the model ------------------------------------------------------------------------


def held_out_games(rng: random.Random, count: int, seen: set[Game]) -> list[Game]:
    """Draw games that the model was not trained on."""
    games: list[Game] = []
    while len(games) < count:
        game = sample_game(rng)
        if game not in seen:
            games.append(game)
    return games


def batches(games: Sequence[Game], size: int) -> Iterator[Sequence[Game]]:
    """Consecutive slices of at most `size` games."""
    for i in range(0, len(games), size):
        yield games[i : i + size]


@torch.no_grad()
def policy_agreement(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: GameText,
    games: Sequence[Game],
) -> float:
    """Share of games in which the model's likeliest next token is the player's choice."""
    agreed = 0
    for part in batches(games, 50):
        batch = make_batch(part, text, tokenizer)
        rows = torch.arange(len(part))
        greedy = model(input_ids=batch.ids).logits[rows, batch.decisions].argmax(-1)
        agreed += int((greedy == batch.targets[rows, batch.decisions]).sum())
    return agreed / len(games)


@torch.no_grad()
def mean_loss(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: GameText,
    games: Sequence[Game],
) -> float:
    """Mean cross-entropy of all predicted tokens, in nats."""
    total = count = 0.0
    for part in batches(games, 50):
        batch = make_batch(part, text, tokenizer)
        total += token_losses(model, batch).sum().item()
        count += (batch.targets != IGNORED).sum().item()
    return total / count


def baseline_losses(
    tokenizer: PreTrainedTokenizerFast, train: Sequence[str], held_out: Sequence[str]
) -> tuple[float, float]:
    """Mean cross-entropy of a unigram and of a bigram model, in nats; counts smoothed by 0.1."""
    size = len(tokenizer)
    pairs = torch.full((size, size), 0.1)
    for row in tokenizer(list(train))["input_ids"]:
        ids = torch.tensor(row)
        pairs.index_put_((ids[:-1], ids[1:]), torch.ones(len(row) - 1), accumulate=True)
    unigram = (pairs.sum(0) / pairs.sum()).log()
    bigram = (pairs / pairs.sum(1, keepdim=True)).log()
    sums, count = [0.0, 0.0], 0
    for row in tokenizer(list(held_out))["input_ids"]:
        ids = torch.tensor(row)
        sums[0] -= unigram[ids[1:]].sum().item()
        sums[1] -= bigram[ids[:-1], ids[1:]].sum().item()
        count += len(row) - 1
    return sums[0] / count, sums[1] / count


def model_figures(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: GameText,
    seed: int,
    seen: set[Game],
) -> dict[str, float]:
    """Measure the model and its baselines on games it has not seen."""
    games = held_out_games(random.Random(f"{seed} held-out"), 1000, seen)
    sample = random.Random(f"{seed} baseline")
    unigram, bigram = baseline_losses(
        tokenizer,
        [text.full(sample_game(sample)) for _ in range(4000)],
        [text.full(game) for game in games],
    )
    bets = sum(player_policy(g.balance, g.goal, g.history) == "bet" for g in games)
    return {
        "held_out_games": len(games),
        "agreement": policy_agreement(model, tokenizer, text, games),
        "majority": max(bets, len(games) - bets) / len(games),
        "loss": mean_loss(model, tokenizer, text, games),
        "unigram": unigram,
        "bigram": bigram,
    }


# --- sparse autoencoders -------------------------------------------------------------------------


@torch.no_grad()
def residuals(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: GameText,
    games: Sequence[Game],
) -> list[torch.Tensor]:
    """Outputs of every decoder block, ``(token, hidden)``, without padding."""
    kept: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    mask = torch.empty(0)

    def keep(block: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept[block].append(hidden[mask].clone())

        return hook

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(model.model.layers)]
    try:
        for part in batches(games, 25):
            batch = make_batch(part, text, tokenizer)
            mask = batch.targets != IGNORED
            model.model(input_ids=batch.ids)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in kept]


def shuffled(data: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of rows, each epoch in a new order."""
    while True:
        order = torch.randperm(len(data), generator=generator)
        for i in range(0, len(data) - size + 1, size):
            yield data[order[i : i + size]]


def train_sae(data: torch.Tensor, block: int, seed: int, folder: Path) -> None:
    """Train one BatchTopK SAE with sae-lens and save it, as sae-lens does, as a JumpReLU SAE.

    The scale of the activations is folded into the weights. The two matrices are stored in
    float16; the configuration says float32, so that sae-lens computes in float32.

    Parameters
    ----------
    data
        Outputs of the block, ``(token, hidden)``.
    block
        Index of the block.
    seed
        Seed of weights and batches.
    folder
        Where to save.
    """
    torch.manual_seed(seed * 1000 + block)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=HIDDEN,
            d_sae=SAE_FEATURES,
            k=SAE_ACTIVE,
            topk_threshold_lr=0.02,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(
                model_name="zarrtrace-demo",
                hook_name=f"blocks.{block}.hook_resid_post",
                prepend_bos=True,
                context_size=512,
            ),
        )
    )
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=SAE_STEPS * SAE_BATCH,
            train_batch_size_samples=SAE_BATCH,
            lr=2e-3,
            lr_end=2e-4,
            lr_warm_up_steps=20,
            lr_decay_steps=SAE_STEPS // 3,
            dead_feature_window=50,
            n_batches_for_norm_estimate=20,
        ),
        sae=sae,
        data_provider=shuffled(data, SAE_BATCH, torch.Generator().manual_seed(seed)),
    )
    weights, _ = trainer.fit().save_inference_model(folder)
    stored = load_file(weights)
    save_file({k: v.half() if v.ndim == 2 else v for k, v in stored.items()}, weights)
    weights.chmod(0o644)


def decision_rows(
    games: Sequence[Game], text: GameText, tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Rows of the result of `residuals` that belong to the games' last prompt tokens."""
    batch = make_batch(games, text, tokenizer)
    lengths = (batch.targets != IGNORED).sum(1)
    return lengths.cumsum(0) - lengths + batch.decisions


@dataclass(frozen=True)
class SaeFigures:
    """Measured quality of one SAE.

    Attributes
    ----------
    median_l0, mean_l0
        Active features a token.
    explained_variance, explained_at_decision
        Share of the variance explained over all tokens, and over the decision tokens alone.
    dead
        Features that no token activates.
    """

    median_l0: float
    mean_l0: float
    explained_variance: float
    explained_at_decision: float
    dead: int


def explained(data: torch.Tensor, reconstructed: torch.Tensor) -> float:
    """Share of the variance of `data` that `reconstructed` explains."""
    total = (data - data.mean(0)).pow(2).sum()
    return (1 - (data - reconstructed).pow(2).sum() / total).item()


@torch.no_grad()
def sae_figures(folder: Path, data: torch.Tensor, decisions: torch.Tensor) -> SaeFigures:
    """Load an SAE from disk and measure it on activations it was not trained on."""
    sae = SAE.load_from_disk(folder)
    features = sae.encode(data)
    reconstructed = sae.decode(features)
    active = features > 0
    per_token = active.sum(-1).float()
    return SaeFigures(
        median_l0=per_token.median().item(),
        mean_l0=per_token.mean().item(),
        explained_variance=explained(data, reconstructed),
        explained_at_decision=explained(data[decisions], reconstructed[decisions]),
        dead=int((~active.any(0)).sum()),
    )


# --- model card ----------------------------------------------------------------------------------

CARD = """\
# The embedded demo model

A small Llama that plays a text slot machine, and one sparse autoencoder (SAE) for each of its
blocks. They let zarrtrace run its main job without a download. They are a demonstration, made to
be traced; they know nothing but the template of `slot_machine.yaml`.

Made by `scripts/train_demo.py` with seed {seed}. On two CPU cores the model took {steps} steps of
{batch} games and {model_minutes:.0f} minutes, the SAEs {sae_minutes:.0f} minutes.

The script measured every figure below on what it had written.

## Model (`model/`)

`LlamaForCausalLM`, {blocks} blocks of width {hidden}, 8 query heads and 4 key-value heads of 16
dimensions, SwiGLU of width 128, tied embeddings, {parameters:,} parameters in float32, at most 512
tokens. The tokenizer is a byte-level BPE of {vocab} tokens trained on the same text; it splits
words as Llama 3's does (numbers in groups of one to three digits; rare ones split further) and
prepends `<|begin_of_text|>` once.

**Data.** The suite's template filled with random states: balance $5 to $360 in steps of 5, goal
$100 to $300 in steps of 10, up to three last spins of $5 to $60 each, round 1 to 9, win probability
10 to 60 %, payout 2 to 5. Then the choice, `1` or `2`. Balances and spins are drawn independently:
the start balance is not part of the text.

**Policy** (`player_policy`). The player stops at the goal or above it. Below it, two or more
losses in a row make them chase the losses and bet. Otherwise they stop once they hold 60 % of the
goal, and bet below that. Round, win probability and payout do not matter to them.

**Loss.** Cross-entropy of the next token, where the choice counts {weight:.0f} times as much as any
other token. AdamW, peak rate 2e-3, {warmup} warm-up steps, cosine decay.

Measured on {held_out_games} games that were not in the training data:

| figure | value |
|---|---|
| greedy choice agrees with the player | {agreement:.1%} |
| always naming the commoner choice | {majority:.1%} |
| loss of the model, all tokens equal | {loss:.3f} nats a token |
| bigram baseline | {bigram:.3f} nats a token |
| unigram baseline | {unigram:.3f} nats a token |

What is left of the loss is mostly the numbers, which are random.

Choice in the ten scenarios, with its probability and the player's:

| scenario | model | probability | player |
|---|---|---|---|
{choices}

## SAEs (`saes/blocks.N.hook_resid_post/`)

One SAE of {features} features for the output of each decoder block, the last one before the final
norm. Trained with sae-lens as BatchTopK with {active} active features on average and saved by it as
JumpReLU, with the activations' scale folded into the weights; matrices stored in float16, computed
in float32. {sae_steps} steps of {sae_batch} tokens, drawn from {train_tokens:,} tokens.

BOS counts as any other token, in training and below: here its residual is no outlier.

Measured on {test_tokens:,} tokens of held-out games, from the saved files. Dead: active on none of
them. Most of the variance is between the words of the template; "at the decision" is the share
explained of the variance **between games** at the last prompt token, which is small in early blocks
(little has reached that token yet) and may then be lost entirely (negative: worse than the mean).

| block | median L0 | mean L0 | explained variance | at the decision | dead of {features} |
|---|---|---|---|---|---|
{saes}

## Limits

Not a language model: any other text gives noise. A trace of it shows how the tools work, and
nothing about Llama-3.1-8B or about gambling.
"""


@torch.no_grad()
def scenario_choices(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: GameText
) -> str:
    """Table rows: the model's and the player's choice in each scenario of the suite."""
    rows = []
    for name, game in text.suite_games().items():
        ids = torch.tensor([tokenizer(text.prompt(game))["input_ids"]])
        probability = model(input_ids=ids).logits[0, -1].softmax(-1)
        token = int(probability.argmax())
        word = {mark: option for option, mark in text.options.items()}
        said = word.get(str(tokenizer.decode([token])), "something else")
        wanted = player_policy(game.balance, game.goal, game.history)
        rows.append(f"| {name} | {said} | {probability[token].item():.3f} | {wanted} |")
    return "\n".join(rows)


# --- all of it -----------------------------------------------------------------------------------


def seen_games(seed: int, steps: int) -> set[Game]:
    """The games that training with `seed` draws."""
    rng = random.Random(f"{seed} train")
    return {sample_game(rng) for _ in range(TOKENIZER_GAMES + steps * BATCH)}


def make_model(text: GameText, seed: int, steps: int, out: Path) -> None:
    """Train tokenizer and model and save them below `out`."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} train")
    texts = [text.full(sample_game(rng)) for _ in range(TOKENIZER_GAMES)]
    tokenizer = train_tokenizer(texts)
    model = new_model(tokenizer)
    tokenizer.save_pretrained(out / "model")
    # transformers 5 writes a class name that transformers 4 does not know; both read this one.
    config = out / "model" / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    train_model(model, tokenizer, text, rng, steps, out / "model")
    model.save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)


def make_saes(text: GameText, seed: int, steps: int, out: Path, model_seconds: float) -> None:
    """Train the SAEs of the model below `out`, measure everything, write the model card."""
    started = time.monotonic()
    model = LlamaForCausalLM.from_pretrained(out / "model", local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "model", local_files_only=True)
    seen = seen_games(seed, steps)
    figures = model_figures(model, tokenizer, text, seed, seen)
    print(figures, flush=True)

    train = random.Random(f"{seed} saes")
    train_games = [sample_game(train) for _ in range(SAE_GAMES)]
    data = residuals(model, tokenizer, text, train_games)
    games = held_out_games(random.Random(f"{seed} saes held-out"), 200, seen | set(train_games))
    test = residuals(model, tokenizer, text, games)
    decisions = decision_rows(games, text, tokenizer)
    rows = []
    for block in range(N_BLOCKS):
        folder = out / "saes" / f"blocks.{block}.hook_resid_post"
        train_sae(data[block], block, seed, folder)
        sae = sae_figures(folder, test[block], decisions)
        print(block, sae, f"{time.monotonic() - started:.0f} s", flush=True)
        rows.append(
            f"| {block} | {sae.median_l0:.0f} | {sae.mean_l0:.1f} "
            f"| {sae.explained_variance:.4f} | {sae.explained_at_decision:.2f} | {sae.dead} |"
        )
    sae_minutes = (time.monotonic() - started) / 60
    card = CARD.format(
        **figures,
        seed=seed,
        steps=steps,
        batch=BATCH,
        model_minutes=model_seconds / 60,
        sae_minutes=sae_minutes,
        blocks=N_BLOCKS,
        hidden=HIDDEN,
        parameters=model.num_parameters(),
        vocab=len(tokenizer),
        weight=DECISION_WEIGHT,
        warmup=warmup_steps(steps),
        choices=scenario_choices(model, tokenizer, text),
        features=SAE_FEATURES,
        active=SAE_ACTIVE,
        sae_steps=SAE_STEPS,
        sae_batch=SAE_BATCH,
        train_tokens=len(data[0]),
        test_tokens=len(test[0]),
        saes="\n".join(rows),
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Train everything and write it below ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=demo.model_path().parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the model")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = GameText()
    started = time.monotonic()
    make_model(text, arguments.seed, arguments.steps, arguments.out)
    seconds = time.monotonic() - started
    make_saes(text, arguments.seed, arguments.steps, arguments.out, seconds)


if __name__ == "__main__":
    main()
