#!/usr/bin/env python3
"""Train the embedded demo: tokenizer, model, one SAE per block, and the model card.

The text is the template of the embedded suite (`zarrtrace/demo/slot_machine.yaml`), filled with
random game states and answered by a player with a fixed policy (`demo_games.player_policy`). Runs
on two CPU cores in under an hour and is seeded.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_model
import torch
from demo_games import Game, GameText, held_out_games, player_policy, sample_game
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zarrtrace import demo

STEPS = 2200
TOKENIZER_GAMES = 4000

SAE_FEATURES = 512
SAE_ACTIVE = 20
SAE_BATCH = 1024
SAE_STEPS = 800
SAE_GAMES = 500


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
        for part in demo_model.batches(games, 25):
            batch = demo_model.make_batch(part, text, tokenizer)
            mask = batch.targets != demo_model.IGNORED
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
            d_in=demo_model.HIDDEN,
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
    batch = demo_model.make_batch(games, text, tokenizer)
    lengths = (batch.targets != demo_model.IGNORED).sum(1)
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
    return {sample_game(rng) for _ in range(TOKENIZER_GAMES + steps * demo_model.BATCH)}


def make_model(text: GameText, seed: int, steps: int, out: Path) -> None:
    """Train tokenizer and model and save them below `out`."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} train")
    texts = [text.full(sample_game(rng)) for _ in range(TOKENIZER_GAMES)]
    tokenizer = demo_model.train_tokenizer(texts)
    model = demo_model.new_model(tokenizer)
    tokenizer.save_pretrained(out / "model")
    # transformers 5 writes a class name that transformers 4 does not know; both read this one.
    config = out / "model" / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    demo_model.train_model(model, tokenizer, text, rng, steps, out / "model")
    model.save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)


def make_saes(text: GameText, seed: int, steps: int, out: Path, model_seconds: float) -> None:
    """Train the SAEs of the model below `out`, measure everything, write the model card."""
    started = time.monotonic()
    model = LlamaForCausalLM.from_pretrained(out / "model", local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "model", local_files_only=True)
    seen = seen_games(seed, steps)
    figures = demo_model.model_figures(model, tokenizer, text, seed, seen)
    print(figures, flush=True)

    train = random.Random(f"{seed} saes")
    train_games = [sample_game(train) for _ in range(SAE_GAMES)]
    data = residuals(model, tokenizer, text, train_games)
    games = held_out_games(random.Random(f"{seed} saes held-out"), 200, seen | set(train_games))
    test = residuals(model, tokenizer, text, games)
    decisions = decision_rows(games, text, tokenizer)
    rows = []
    for block in range(demo_model.N_BLOCKS):
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
        batch=demo_model.BATCH,
        model_minutes=model_seconds / 60,
        sae_minutes=sae_minutes,
        blocks=demo_model.N_BLOCKS,
        hidden=demo_model.HIDDEN,
        parameters=model.num_parameters(),
        vocab=len(tokenizer),
        weight=demo_model.DECISION_WEIGHT,
        warmup=demo_model.warmup_steps(steps),
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
