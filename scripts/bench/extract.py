"""Compare extraction with the old way and with the floor, on the `proxy` model.

Every contender runs in a process of its own, in turns; the clock starts when libraries and model
are loaded; on a busy machine compare CPU time. The floor is the bare forward passes, one matrix
product a layer and prompt, and writing as many bytes as zarrtrace leaves on the disk.

    python scripts/bench/extract.py [--active 50] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

LAYERS = tuple(range(1, 32))
#: The old way is slow: it is timed on so many scenarios and scaled to ten.
OLD_SCENARIOS = 2


# --- contenders, each in its own process ------------------------------------------------------


def zarrtrace_way(
    folder: Path, count: int, *, features: bool, attention: bool = True
) -> dict[str, float]:
    """Extract with zarrtrace."""
    from zarrtrace.capture import hide_progress
    from zarrtrace.extraction import Options, prepare, running

    suite = folder / f"suite{count}.jsonl"
    common.write_suite(suite, common.demo_prompts(count))
    options = Options(
        model=str(folder / "model"),
        sae_path=folder / "saes" if features else None,
        features=features,
        attention=attention,
        scenarios=suite,
        layers=LAYERS,
    )
    hide_progress()
    job = prepare(options)
    # The model is loaded, its weights are in memory: the clock starts here.
    for weight in job.model.model.parameters():
        weight.sum()
    setattr(running, "prepare", lambda *_, **__: job)  # noqa: B010
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    with common.Peak() as peak:
        spent = common.timed(lambda: running.extract_run(output, options))
    found = {"seconds": spent.wall, "cpu_seconds": spent.cpu, "peak": peak.bytes}
    return {
        **found,
        "bytes": common.size_of(output),
        **(features_and_entropy(output) if features else {}),
    }


def features_and_entropy(run: Path) -> dict[str, float]:
    """Return the bytes of a run's features, and of their entropy.

    That is which of them are not 0, each as likely as any other, the entropy of signs and
    exponents, and 23 bits of mantissa.
    """
    import zarrtrace as zt

    size = bits = 0.0
    for name in zt.open_run(run).children:
        size += common.size_of(run / name / "features")
        layers = zt.open_trace(run / name)["features"]
        for at in range(len(layers)):
            values = layers[at].values
            active = values[values != 0]
            share = len(active) / values.size
            bits += values.size * _entropy(np.array([share, 1 - share]))
            counts = np.bincount(active.view(np.uint32) >> 23)
            bits += len(active) * (23 + _entropy(counts / counts.sum()))
    return {"features": size, "entropy": bits / 8}


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder / "model")


def old_way(
    folder: Path, count: int, *, features: bool, dtype: torch.dtype = torch.float16
) -> dict[str, float]:
    """Extract as the user's script does, SAEs loaded beforehand."""
    import npz_script as script
    from sae_lens import SAE

    model, tokenizer = _load(folder)
    saes = None
    if features:
        names = {layer: f"blocks.{layer}.hook_resid_post" for layer in LAYERS}
        saes = {layer: SAE.load_from_disk(folder / "saes" / name) for layer, name in names.items()}
    output = folder / "old"
    shutil.rmtree(output, ignore_errors=True)
    some = dict(list(common.demo_prompts(count).items())[:OLD_SCENARIOS])
    with common.Peak() as peak:
        spent = common.timed(
            lambda: script.extract(
                model, tokenizer, saes, some, LAYERS, output, attention_dtype=dtype
            )
        )
    return {
        "seconds": spent.wall * count / len(some),
        "cpu_seconds": spent.cpu * count / len(some),
        "bytes": common.size_of(output) * count / len(some),
        "peak": peak.bytes,
    }


def floor(folder: Path, count: int, *, features: bool) -> dict[str, float]:
    """Do what cannot be left out."""
    model, tokenizer = _load(folder)
    tokens = [tokenizer(text, return_tensors="pt") for text in common.demo_prompts(count).values()]
    content = np.random.default_rng(0).bytes(int(os.environ["ZARRTRACE_BENCH_BYTES"]))
    encoder = torch.randn(model.config.hidden_size, 32_768)

    @torch.inference_mode()
    def act() -> None:
        for inputs in tokens:
            model(**inputs, use_cache=False)
        if features:
            for inputs in tokens:
                hidden = torch.ones(inputs["input_ids"].shape[1], model.config.hidden_size)
                for _ in LAYERS:
                    hidden @ encoder
        (folder / "floor.bin").write_bytes(content)

    spent = common.timed(act)
    return {"seconds": spent.wall, "cpu_seconds": spent.cpu, "bytes": len(content), "peak": 0}


CONTENDERS: dict[str, Callable[..., dict[str, float]]] = {
    "zarrtrace": zarrtrace_way,
    "old way": old_way,
    "old way, lossless": partial(old_way, dtype=torch.float32),
    "floor": floor,
}


# --- the comparison ---------------------------------------------------------------------------


def in_process(folder: Path, who: str, mode: str, count: int, size: float = 0) -> dict[str, float]:
    """Run one contender in a fresh process."""
    bytes_written = {"ZARRTRACE_BENCH_BYTES": str(int(size))}
    return common.in_process(__file__, "--one", folder, who, mode, count, **bytes_written)


def compare(folder: Path, mode: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return medians of each contender's figures."""
    found: dict[str, list[dict[str, float]]] = {who: [] for who in CONTENDERS}
    for _ in range(repeats):
        for who, runs in found.items():
            size = found["zarrtrace"][0]["bytes"] if found["zarrtrace"] else 0
            runs.append(in_process(folder, who, mode, 10, size))
    return {who: common.medians(runs) for who, runs in found.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--active", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=["full", "attention"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, who, mode, count = given.one
        # Features alone are asked of zarrtrace only (peers.py).
        wanted = {"attention": False} if mode == "features" else {}
        contender = CONTENDERS[who]
        print(
            json.dumps(contender(Path(folder), int(count), features=mode != "attention", **wanted))
        )
        return
    from proxy import build

    folder = Path(tempfile.mkdtemp(prefix="zarrtrace-bench-"))
    try:
        build(folder, given.active)
        results = {mode: compare(folder, mode, given.repeats) for mode in given.modes}
        print(f"proxy, 10 scenarios, {given.active} active features a token; medians\n")
        common.print_head(
            "mode",
            "zarrtrace s",
            "old way, float16 attention",
            "old way, same values",
            "zarrtrace / floor",
            "of CPU time",
            "MB",
            "MB of NPZ, same values",
            "peak MB",
        )
        for mode, found in results.items():
            ours, old, same, least = (found[who]["seconds"] for who in CONTENDERS)
            cpu = found["zarrtrace"]["cpu_seconds"] / found["floor"]["cpu_seconds"]
            npz = found["old way, lossless"]["bytes"] / 1e6
            megabytes = found["zarrtrace"]["bytes"] / 1e6
            peak = found["zarrtrace"]["peak"] / 1e6
            print(
                f"| {mode} | {ours:.1f} | {old / ours:.1f}x | {same / ours:.1f}x | "
                f"{ours / least:.2f}x | {cpu:.2f}x | {megabytes:.0f} | {npz:.0f} | {peak:.0f} |"
            )
        if "full" in results:
            ours, least = (results["full"]["zarrtrace"][key] for key in ("features", "entropy"))
            print(f"\nfeatures: {ours / 1e6:.2f} MB, {ours / least:.2f} x their entropy")
        common.save(given.json, results)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
