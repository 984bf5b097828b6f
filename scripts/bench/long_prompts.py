#!/usr/bin/env python3
"""Measure extraction from long prompts: peak memory and time against the length.

The model is a random Llama of 4 layers with 4 heads each, on the CPU, in float32. Each
measurement is a process of its own. Its baseline is what the process holds once everything is
imported and the model loaded; the peak is the highest resident set of the whole process.

``whole`` is what transformers does with ``output_attentions=True``: nothing is stored, and its
figure for lengths that were not run grows as the square. ``blocked`` and ``last`` are whole
extractions, with compression and writing: all rows of attention, and only the last one. Beside the
process's whole peak stands what ``zarrtrace extract --dry-run`` expects of them.

Run it with nothing else on the machine; 16,384 tokens take some 8 GB of disk:
``python scripts/bench/long_prompts.py [--tokens N ...] [--ways WAY ...] [--scratch FOLDER]``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from zarrtrace.extraction import Options

LAYERS, HEADS = 4, 4
TOKENS = (2048, 4096, 8192, 16384)
MOST, WAYS = 2**15, ("whole", "blocked", "last")
# What transformers keeps of attention is 2 x 4 x 4 x T^2 bytes at its peak: 4.3 GB at 8,192 tokens.
MOST_WHOLE = 4096
MIB = 2**20


def make_model(folder: Path) -> None:
    """Save a random Llama with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from zarrtrace import demo
    from zarrtrace.capture import hide_progress

    hide_progress()
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=MOST,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.model_max_length = MOST
    tokenizer.save_pretrained(folder)


def make_suite(file: Path, tokenizer: Any, tokens: int) -> None:
    """Write a suite of one prompt that has exactly `tokens` tokens, BOS included."""
    words = sorted(
        piece.replace("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", " ")
        for piece in tokenizer.get_vocab()
        if len(piece) > 4 and piece[1:].isalpha() and not piece[0].isascii()
    )
    chosen = random.Random(0).choices(words, k=tokens - 1)
    prompt = "".join(chosen)
    found = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if found != tokens - 1:
        raise SystemExit(f"the prompt has {found + 1} tokens, not {tokens}")
    file.write_text(
        json.dumps({"name": "long", "scenarios": [{"name": "long", "prompt": prompt}]}),
        encoding="utf-8",
    )


def make_options(way: str, tokens: int, work: Path) -> Options:
    """Return the options of an extraction, and write its suite."""
    from transformers import AutoTokenizer

    from zarrtrace.extraction import Options

    suite = work / f"{way}{tokens}.yaml"
    make_suite(suite, AutoTokenizer.from_pretrained(work / "model"), tokens)
    return Options(
        model=str(work / "model"),
        features=False,
        layers=tuple(range(LAYERS)),
        scenarios=suite,
        attention_capture="whole" if way == "whole" else "blocked",
        attention_positions="last" if way == "last" else None,
    )


def measure(way: str, tokens: int, work: Path) -> dict[str, Any]:
    """Measure one way in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from zarrtrace.capture import hide_progress
    from zarrtrace.extraction import estimate, extract_run, prepare

    hide_progress()
    options = make_options(way, tokens, work)
    job = prepare(options, weights=False)
    ids = torch.tensor([job.prompts[0].tokens.ids])
    model_path = str(options.model)
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    with torch.inference_mode():
        model(ids[:, :16], output_attentions=True)
    baseline = common.resident()
    start, cpu_start = time.perf_counter(), time.process_time()
    if way == "whole":
        with torch.inference_mode():
            made = model(ids, output_attentions=True, use_cache=False)
        result = sum(weights.nbytes for weights in made.attentions)
    else:
        run = work / f"{way}{tokens}"
        extract_run(run, options)
        result = common.size_of(run)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "baseline_bytes": baseline,
        "beyond_bytes": common.peak_bytes() - baseline,
        "expected_bytes": 0 if way == "whole" else estimate(job).host_bytes,
        "result_bytes": result,
    }


def in_process(way: str, tokens: int, work: Path) -> dict[str, Any]:
    """Measure one way in a fresh process, and delete what it stored."""
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        (Path(scratch) / "model").symlink_to(work / "model")
        asked = ("--measure", way, "--tokens", tokens, "--scratch", scratch)
        return common.in_process(__file__, *asked)


def main() -> None:
    """Measure every way at every length and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--most-whole", type=int, default=MOST_WHOLE, help="longest eager run")
    parser.add_argument("--scratch", type=Path, help="folder for what is stored, then deleted")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        found = measure(options.measure, options.tokens[0], options.scratch)
        print(json.dumps(found))
        return
    results: dict[str, dict[int, Any]] = {way: {} for way in options.ways}
    pairs, beyond = "CPU s a million pairs", "MiB beyond the model"
    peaks = "peak, MiB", "expected"
    common.print_head("tokens", "way", "s", "CPU s", pairs, beyond, *peaks, "MB made")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        work = Path(folder)
        make_model(work / "model")
        for tokens in options.tokens:
            for way, done in results.items():
                if way == "whole" and tokens > options.most_whole:
                    done[tokens] = extrapolated(done, tokens)
                    shown = "(from the last one)"
                else:
                    done[tokens] = in_process(way, tokens, work)
                    shown = f"{done[tokens]['seconds']:.1f}"
                row = done[tokens]
                expected = f"{row['expected_bytes'] / MIB:,.0f}" if way != "whole" else ""
                print(
                    f"| {tokens:,} | {way} | {shown} | {row['cpu_seconds']:.1f} "
                    f"| {row['cpu_seconds'] / tokens**2 * 1e6:.2f} "
                    f"| {row['beyond_bytes'] / MIB:,.0f} | {_peak(row) / MIB:,.0f} "
                    f"| {expected} | {row['result_bytes'] / 1e6:,.1f} |",
                    flush=True,
                )
    common.save(options.json, results)


def _peak(row: dict[str, Any]) -> int:
    return int(row["baseline_bytes"] + row["beyond_bytes"])


def extrapolated(done: dict[int, dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Let the longest measured run grow as the square."""
    longest = max(length for length in done if "extrapolated" not in done[length])
    growth = (tokens / longest) ** 2
    found = {name: value * growth for name, value in done[longest].items()}
    return {**found, "baseline_bytes": done[longest]["baseline_bytes"], "extrapolated": True}


if __name__ == "__main__":
    main()
