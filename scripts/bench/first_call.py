"""Time the first call of a notebook: ``zt.extract`` of three prompts with a loaded model.

    python scripts/bench/first_call.py [--repeats 5]

Importing libraries, loading the model and loading the SAEs are not timed. "forward" is the model's
own eager forward pass over the three prompts, with every SAE's ``encode`` behind its block: what is
left of a call is the cost of zarrtrace.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.capture import borrow, probe_model, take_model

PROMPTS = [
    "The capital of France is",
    "You hold $90, the goal is $200. 1) Bet 2) Stop. You choose:",
    "Round 3: you bet $20 and lost; you now hold $140. Bet or stop?",
]


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call."""
    start = clock()
    call()
    return clock() - start


def main() -> None:
    """Time calls on the embedded model, which has 32 blocks, with its SAEs and without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model = AutoModelForCausalLM.from_pretrained(demo.model_path())
    eager = AutoModelForCausalLM.from_pretrained(demo.model_path(), attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    saes = {
        layer: SAE.load_from_disk(demo.sae_path() / f"blocks.{layer}.hook_resid_post")
        for layer in demo.LAYERS
    }
    ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]

    def forward(*, features: bool) -> None:
        with torch.inference_mode():
            for one in ids:
                made = eager(
                    one, use_cache=False, output_attentions=True, output_hidden_states=True
                )
                for layer in saes if features else ():
                    saes[layer].encode(made.hidden_states[layer + 1][0])

    def probe() -> None:
        with borrow(model):
            probe_model(take_model(model, tokenizer, "demo"))

    def extract(folder: Path, **options: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        zt.extract(folder, PROMPTS, model=model, tokenizer=tokenizer, quiet=True, **options)

    zt.extract, zt.open_run  # noqa: B018 -- their imports are not timed
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    with tempfile.TemporaryDirectory() as home:
        for label, options in (("features", {"saes": saes}), ("attention", {"features": False})):
            first = seconds(partial(extract, Path(home) / "run", **options))
            print(f"{label}: first call {first:.2f} s")
            for kind, clock in clocks.items():
                call, own, probed = (
                    statistics.median(seconds(one, clock) for _ in range(repeats))
                    for one in (
                        partial(extract, Path(home) / "run", **options),
                        partial(forward, features="saes" in options),
                        probe,
                    )
                )
                print(
                    f"  {kind}: call {call:.2f} s, forward {own:.2f} s, beyond it "
                    f"{call - own:.2f} s, of which the probe {probed:.2f} s"
                )


if __name__ == "__main__":
    main()
