"""The embedded demo's tokenizer and model: how they are made, trained and measured."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_games import END, Game, GameText, held_out_games, player_policy, sample_game
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<|begin_of_text|>"
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
