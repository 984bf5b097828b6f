"""Extract a table on a GPU at the shape of Llama-3.1-8B, and say how busy the GPU is.

Model and SAEs have random weights that are made on the device; the prompts are random words. Prints
times, the share of the time in which the GPU computes, peaks of memory, the floor (the same batches
through the model and the encoders alone), and how far the table is from plain hooks.

    python scripts/bench/gpu_table.py [--shape tiny --device cpu --prompts 200 --tokens 20]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_shape
import numpy as np
import torch
from common import cpu_with_children, size_of
from gpu_shape import LAYERS, SCALES, Scale
from gpu_workers import synchronize
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import zarrtrace as zt
from zarrtrace.extraction import table as table_module
from zarrtrace.store import verify

# Llama-3.1 has so many special tokens behind its words.
_SPECIAL = 256
_SAMPLED_EVERY = 0.1
_COMPARED = 64
# Prompts on which a profiler counts the kernels: more make it slow.
_PROFILED = 1_024


# --- what is run -------------------------------------------------------------------------------


def make_tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer of words ``w0``, ``w1`` … and of special tokens, the first one BOS."""
    words = {f"w{n}": n for n in range(vocabulary - _SPECIAL)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106 -- a word
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [f"<|special_{n}|>" for n in range(_SPECIAL)]
    plain.add_special_tokens([AddedToken(one, special=True) for one in special])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=special[0])


def make_prompts(count: int, tokens: int, vocabulary: int) -> list[str]:
    """Return prompts of so many tokens, BOS included."""
    draw = random.Random(0)
    words = range(vocabulary - _SPECIAL)
    return [" ".join(f"w{n}" for n in draw.choices(words, k=tokens - 1)) for _ in range(count)]


def make_model(scale: Scale, device: str) -> Any:
    """Return a model with random weights, made on the device."""
    given = gpu_shape.model_config(scale)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    return model.eval()


@torch.inference_mode()
def make_saes(model: Any, ids: torch.Tensor, scale: Scale) -> tuple[dict[int, SAE[Any]], float]:
    """Return an SAE a layer, and how many features fire a token; all share one decoder."""
    saes: dict[int, SAE[Any]] = {}
    active, decoder, device = 0.0, None, str(model.device)
    with torch.inference_mode(mode=False), torch.no_grad():
        kept = gpu_shape.residuals(model, [ids])
        for layer in LAYERS:
            hidden = torch.cat(kept.pop(layer)).flatten(0, 1).float().clone()
            config = JumpReLUSAEConfig(
                d_in=scale.width,
                d_sae=scale.features,
                device=device,
                apply_b_dec_to_input=False,
                metadata=SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post"),
            )
            sae = JumpReLUSAE(config)
            decoder = sae.W_dec if decoder is None else decoder
            sae.W_dec = decoder
            sae.W_enc.normal_(std=scale.width**-0.5)
            encoded = hidden @ sae.W_enc
            sae.threshold.fill_(gpu_shape.threshold_of(encoded))
            active += float((encoded > sae.threshold).sum()) / len(encoded) / len(LAYERS)
            for parameter in sae.parameters():
                parameter.requires_grad_(requires_grad=False)
            saes[layer] = sae
    return saes, active


# --- what is measured --------------------------------------------------------------------------


@dataclass
class Stages:
    """Begin and end of some functions of the extraction."""

    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def watching(self, around_filling: Callable[[], Any] | None = None) -> Iterator[None]:
        """Watch an extraction; `around_filling` makes a context for the filling."""
        names = {"prepare": "preparing", "survey": "survey", "_fill": "filling"}
        before = {name: getattr(table_module, name) for name in names}
        for name, label in names.items():
            around = around_filling if label == "filling" else None
            setattr(table_module, name, self._timed(before[name], label, around))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(table_module, name, function)

    def _timed(self, function: Any, label: str, around: Callable[[], Any] | None) -> Any:
        def timed(*given: Any, **named: Any) -> Any:
            synchronize()
            begun = time.perf_counter()
            try:
                with around() if around else _nothing():
                    return function(*given, **named)
            finally:
                synchronize()
                self.spans[label] = begun, time.perf_counter()

        return timed

    def seconds(self, label: str) -> float:
        """Return how long a stage took."""
        begun, ended = self.spans[label]
        return ended - begun


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Utilisation:
    """Samples the share of time in which the GPU runs kernels, as NVML says it."""

    def __init__(self, device: str) -> None:
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._read = _reader(device)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Utilisation:
        if self._read is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._read is not None:
            self._thread.join()

    def _watch(self) -> None:
        while self._read is not None and not self._stop.wait(_SAMPLED_EVERY):
            with suppress(Exception):  # a sample that is missing
                self.samples.append((time.perf_counter(), self._read()))

    def share(self, span: tuple[float, float]) -> float | None:
        """Return the mean over a span of time; None without samples."""
        found = [value for at, value in self.samples if span[0] <= at <= span[1]]
        return sum(found) / len(found) / 100 if found else None


def _reader(device: str) -> Callable[[], float] | None:
    """Return what reads the utilisation in percent; None without a GPU or NVML."""
    if device == "cpu":
        return None
    try:
        torch.cuda.utilization(device)
    except Exception as error:  # noqa: BLE001 -- of several libraries
        print(f"no utilisation by NVML: {error}", flush=True)
        return None
    return lambda: float(torch.cuda.utilization(device))


class Kernels:
    """Counts the time in which kernels run while the context is open."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "profile.json"
        self.busy = self.first_to_last = self.wall = 0.0
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Profile what happens in the context."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            begun = time.perf_counter()
            yield
            synchronize()
            self.wall = time.perf_counter() - begun
        profile.export_chrome_trace(str(self._file))
        found = json.loads(self._file.read_text())["traceEvents"]
        spans = sorted(
            (one["ts"] / 1e6, (one["ts"] + one["dur"]) / 1e6)
            for one in found
            if one.get("cat") == "kernel"
        )
        self.count, end = len(spans), float("-inf")
        for start, stop in spans:  # their union
            self.busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        if spans:
            self.first_to_last = end - spans[0][0]


def extract(folder: Path, setup: Setup, prompts: Sequence[str]) -> Any:
    """Extract a table of the last tokens."""
    return zt.extract(
        folder,
        list(prompts),
        model=setup.model,
        tokenizer=setup.tokenizer,
        saes=setup.saes,
        layout="table",
        positions="last",
        residual=True,
        batch_size=setup.batch_size,
        quiet=True,
    )


@dataclass(frozen=True)
class Setup:
    """Everything that the extraction is given.

    Attributes
    ----------
    batch_size
        Scenarios in one forward pass; None leaves the choice to zarrtrace.
    """

    model: Any
    tokenizer: Any
    saes: dict[int, SAE[Any]]
    prompts: list[str]
    batch_size: int | None

    def ids(self, start: int, stop: int) -> torch.Tensor:
        """Return the token ids of some prompts, which are equally long."""
        bos = self.tokenizer.bos_token_id
        found = self.tokenizer(self.prompts[start:stop])["input_ids"]
        return torch.tensor([[bos, *ids] for ids in found], device=self.model.device)


@torch.inference_mode()
def floor(setup: Setup, batch: int, count: int) -> dict[str, float]:
    """Time the same batches without zarrtrace; seconds for as many prompts as there are."""
    some = [setup.ids(at, at + batch) for at in range(0, min(count, len(setup.prompts)), batch)]
    hidden = gpu_shape.residuals(setup.model, some[:1])
    rows = {layer: of[0][:, -1].float() for layer, of in hidden.items()}

    def forward(ids: torch.Tensor) -> None:
        mask = torch.ones_like(ids)
        setup.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    def encode(_ids: torch.Tensor) -> None:
        for layer, sae in setup.saes.items():
            sae.encode(rows[layer])

    whole = len(setup.prompts) / sum(len(ids) for ids in some)
    found = {}
    for label, step in (("forward", forward), ("encoders", encode)):
        step(some[0])
        synchronize()
        begun = time.perf_counter()
        for ids in some:
            step(ids)
        synchronize()
        found[label] = (time.perf_counter() - begun) * whole
    return found


@torch.inference_mode()
def compare(found: Any, setup: Setup, batch: int) -> dict[str, float]:
    """Compare a table's first prompts with hooks on the model and ``sae.encode``."""
    count = min(_COMPARED, len(setup.prompts))
    batches = [setup.ids(at, min(at + batch, count)) for at in range(0, count, batch)]
    hidden = gpu_shape.residuals(setup.model, batches)
    out = {"residual: largest difference": 0.0, "residual: largest value": 0.0}
    out |= {"features: largest difference": 0.0, "features: largest value": 0.0}
    out |= {"features that fire": 0, "fire in one of the two": 0}
    some = found.isel(sample=slice(0, count))
    for layer, sae in setup.saes.items():
        here = some.sel(layer=layer)
        rows = torch.cat([one[:, -1] for one in hidden[layer]]).float()
        encoded = torch.cat([sae.encode(one[:, -1].float()) for one in hidden[layer]])
        pairs = {"residual": rows, "features": encoded}
        for name, expected in pairs.items():
            wanted, stored = expected.cpu().numpy(), np.asarray(here[name].values)
            for label, values in (("difference", stored - wanted), ("value", wanted)):
                key = f"{name}: largest {label}"
                out[key] = max(out[key], float(np.abs(values).max()))
        out["features that fire"] += int((stored > 0).sum())
        out["fire in one of the two"] += int(((stored > 0) != (wanted > 0)).sum())
    return out


# --- the table of results ----------------------------------------------------------------------


def say(what: str, value: Any) -> None:
    """Print a line of the table."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    print(f"{what:56}{value}", flush=True)


def build(given: argparse.Namespace) -> Setup:
    """Make the model, the SAEs and the prompts."""
    scale, begun = SCALES[given.shape], time.perf_counter()
    torch.manual_seed(0)
    model = make_model(scale, given.device)
    synchronize()
    say("making the model s", time.perf_counter() - begun)
    begun = time.perf_counter()
    tokenizer = make_tokenizer(scale.vocabulary)
    prompts = make_prompts(given.prompts, given.tokens, scale.vocabulary)
    setup = Setup(model, tokenizer, {}, prompts, given.batch_size)
    saes, active = make_saes(model, setup.ids(0, min(4, len(prompts))), scale)
    setup.saes.update(saes)
    synchronize()
    say("making SAEs, tokenizer and prompts s", time.perf_counter() - begun)
    say("features that fire a token", active)
    return setup


def run(given: argparse.Namespace, folder: Path) -> None:
    """Extract, measure, and print."""
    setup = build(given)
    on_gpu, count = given.device != "cpu", len(setup.prompts)
    extract(folder / "warm", setup, setup.prompts[: given.warm])  # libraries, kernels
    shutil.rmtree(folder / "warm")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    stages, cpu = Stages(), cpu_with_children()
    begun = time.perf_counter()
    with Utilisation(given.device) as seen, stages.watching():
        found = extract(folder / "run", setup, setup.prompts)
    whole, cpu = time.perf_counter() - begun, cpu_with_children() - cpu
    for label in ("preparing", "survey", "filling"):
        say(f"{label} s", stages.seconds(label))
    say("the rest: opening, publishing s", whole - sum(map(stages.seconds, stages.spans)))
    after = whole - stages.seconds("preparing")
    say("prompts a second, filling", count / stages.seconds("filling"))
    say("prompts a second, all after preparing", count / after)
    say("CPU s", cpu)
    say("host memory, peak GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    if on_gpu:
        say("device memory, peak GB", torch.cuda.max_memory_allocated() / 1e9)
        say("device memory, peak reserved GB", torch.cuda.max_memory_reserved() / 1e9)
    say("the table GB", size_of(folder / "run") / 1e9)
    share = seen.share(stages.spans["filling"])
    say("GPU busy while filling, NVML", "not measured" if share is None else share)
    batch = int(found.attrs["config"]["batch_size"])
    say("batch size", batch)
    lowest = floor(setup, batch, given.floor)
    say("floor, forward passes s", lowest["forward"])
    say("floor, encoders s", lowest["encoders"])
    total = sum(lowest.values())
    say("filling / floor", stages.seconds("filling") / total)
    say("floor / all after preparing", total / after)
    for label, value in compare(found, setup, batch).items():
        say(label, value)
    begun = time.perf_counter()
    problems = verify(folder / "run")
    say("verify s", time.perf_counter() - begun)
    say("problems found by verify", len(problems))
    if on_gpu:
        count_kernels(setup, folder)


def count_kernels(setup: Setup, folder: Path) -> None:
    """Profile the filling of a shorter table."""
    kernels, stages = Kernels(folder), Stages()
    some = setup.prompts[:_PROFILED]
    with stages.watching(kernels.counted):
        extract(folder / "profiled", setup, some)
    shutil.rmtree(folder / "profiled")
    say("profiled: prompts", len(some))
    say("profiled: kernels", kernels.count)
    say("profiled: filling s", kernels.wall)
    say("profiled: kernels run s", kernels.busy)
    say("profiled: GPU busy, of the filling", kernels.busy / kernels.wall)
    if kernels.count:
        say("profiled: GPU busy, first to last kernel", kernels.busy / kernels.first_to_last)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=5_000)
    parser.add_argument("--tokens", type=int, default=110)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--shape", choices=list(SCALES), default="true")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--warm", type=int, default=64, help="prompts of a run that is not timed")
    parser.add_argument("--floor", type=int, default=1_280, help="prompts for the floor")
    parser.add_argument("--folder", type=Path, help="for the table; a temporary one if left out")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpu-table-", dir=given.folder))
    try:
        run(given, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
