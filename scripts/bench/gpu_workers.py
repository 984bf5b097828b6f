"""What the GPU benchmark runs in processes of their own; each prints one JSON line."""

from __future__ import annotations

import functools
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_shape
import numpy as np
import torch
from common import size_of
from gpu_shape import LAYERS, RELEASE, Scale


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clocks:
    """Time spent in wrapped functions, each without the wrapped functions that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._mutex, self._local = threading.Lock(), threading.local()

    def wrap(self, owner: Any, name: str, label: str, *, device: bool = False) -> None:
        """Time ``owner.name``; `device` waits for the GPU before and after."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            stack: list[float] = self._local.__dict__.setdefault("stack", [])
            if device:
                synchronize()
            stack.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if device:
                    synchronize()
                taken = time.perf_counter() - start
                inner = stack.pop()
                if stack:
                    stack[-1] += taken
                with self._mutex:
                    self.seconds[label] += taken - inner

        setattr(owner, name, timed)


def _wrap_all(clocks: Clocks) -> None:
    from zarrtrace.capture import batches, copies, encoder_prefetch
    from zarrtrace.extraction.processes import WriterProcesses

    clocks.wrap(batches.Batch, "advance", "forward", device=True)
    clocks.wrap(copies.Copy, "__init__", "encoding", device=True)
    clocks.wrap(copies.Copy, "arrived", "copying to the host", device=True)
    clocks.wrap(copies.BlockOutput, "on_host", "encoding and copying, on a CPU")
    clocks.wrap(encoder_prefetch.Encoders, "_load", "loading SAEs (a thread of its own)")
    clocks.wrap(encoder_prefetch.Encoders, "take", "waiting for SAEs")
    clocks.wrap(WriterProcesses, "__init__", "opening traces")
    clocks.wrap(WriterProcesses, "submit", "waiting for writers")
    clocks.wrap(WriterProcesses, "__exit__", "waiting for the last records")


def warm(home: Path, scale: Scale, device: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Extract with the weights loaded: `repeats` times, then once more with clocks if asked for.

    The clocks wait for the GPU at every step, so that nothing overlaps.
    """
    del scale
    from zarrtrace.capture import hide_progress
    from zarrtrace.extraction import Options, prepare, running

    hide_progress()
    given = dict(asked)
    repeats, output = given.pop("repeats", 2), home / "warm"
    with_clocks = given.pop("clocks", True)
    given["layers"] = tuple(given.get("layers", LAYERS))
    if given.get("features", True):
        given["sae_release"] = RELEASE
    given["scenarios"] = given.get("scenarios", "slot-machine")
    options = Options(model=gpu_shape.MODEL, device=device, **given)
    start = time.perf_counter()
    job = prepare(options)
    synchronize()
    out: dict[str, Any] = {"preparing s (libraries, weights)": time.perf_counter() - start}
    out["tokens"] = sum(len(prompt.tokens.ids) for prompt in job.prompts)
    out["shortest, longest"] = [
        f(len(prompt.tokens.ids) for prompt in job.prompts) for f in (min, max)
    ]
    out["batch size"], out["layers"] = job.batch_size, len(job.layers)
    setattr(running, "prepare", lambda *_, **__: job)  # noqa: B010 -- the weights are loaded
    if device != "cpu":
        out["device bytes of the model"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    out["seconds"], clocks = [], Clocks()
    for i in range(repeats + with_clocks):
        if i == repeats:
            _wrap_all(clocks)
        shutil.rmtree(output, ignore_errors=True)
        start = time.perf_counter()
        running.extract_run(output, options)
        out["seconds"].append(time.perf_counter() - start)
    if with_clocks:
        out["seconds with clocks"] = out["seconds"].pop()
        out["split s"] = dict(clocks.seconds)
    out["bytes"] = size_of(output)
    best = min(out["seconds"] or [out["seconds with clocks"]])
    out["tokens/s"] = out["tokens"] / best
    if device != "cpu":
        out["device peak bytes"] = torch.cuda.max_memory_allocated()
        out["device peak bytes, reserved"] = torch.cuda.max_memory_reserved()
    shutil.rmtree(output, ignore_errors=True)
    return out


def old(home: Path, scale: Scale, device: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Extract as the user's script does."""
    import npz_script
    from sae_lens import SAE

    start = time.perf_counter()
    model, tokenizer = gpu_shape.load(home, device)
    synchronize()
    out: dict[str, Any] = {"loading weights s": time.perf_counter() - start}
    saes = None
    if asked.get("features", True):
        start = time.perf_counter()
        saes = {n: SAE.from_pretrained(RELEASE, f"l{n}r_8x", device=device) for n in LAYERS}
        synchronize()
        out["loading SAEs s"] = time.perf_counter() - start
    some = dict(gpu_shape.prompts(scale.old))
    start = time.perf_counter()
    npz_script.extract(model, tokenizer, saes, some, LAYERS, home / "old")
    out["seconds"] = (time.perf_counter() - start) * 10 / len(some)
    out["timed on"], out["scaled to"] = len(some), 10
    out["bytes"] = size_of(home / "old") * 10 / len(some)
    if device != "cpu":
        out["device peak bytes"] = torch.cuda.max_memory_allocated()
    shutil.rmtree(home / "old")
    return out


# --- correctness and arithmetic ----------------------------------------------------------------


@torch.inference_mode()
def reference(model: Any, ids: np.ndarray) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return attention ``(head, query, key)`` and output ``(token, d)`` of each block."""
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    tokens = torch.tensor(np.asarray(ids, np.int64)[None], device=model.device)
    made = model(tokens, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return [attention[0] for attention in made.attentions], outputs


@torch.inference_mode()
def correctness(home: Path, scale: Scale, device: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Compare stored arrays with transformers' eager attention and sae-lens's ``encode``."""
    del scale
    from sae_lens import SAE

    from zarrtrace import open_trace
    from zarrtrace.extraction import Options, extract_run

    out: dict[str, Any] = {}
    model, _ = gpu_shape.load(home, device)
    names = tuple(name for name, _ in gpu_shape.prompts(asked["scenarios"]))
    folders = {}
    for label, size, low in (("alone", 1, False), ("batched", None, False), ("streamed", 1, True)):
        folders[label] = home / f"check_{label}"
        shutil.rmtree(folders[label], ignore_errors=True)
        options = Options(
            model=gpu_shape.MODEL,
            scenarios="slot-machine",
            sae_release=RELEASE,
            layers=LAYERS,
            only=names,
            device=device,
            batch_size=size,
            low_memory=low,
        )
        extract_run(folders[label], options)
        out[label] = {"layers": 0, "attention equal": 0, "features equal": 0}
        out[label] |= {"attention: largest difference": 0.0, "features: largest difference": 0.0}
        out[label] |= {"members that differ": 0, "members": 0}
    for name in names:
        traces = {label: open_trace(folder / name) for label, folder in folders.items()}
        attentions, outputs = reference(model, traces["alone"].token_id.values)
        for layer in LAYERS:
            sae = SAE.from_pretrained(RELEASE, f"l{layer}r_8x", device=device)
            features = sae.encode(outputs[layer]).cpu().numpy()
            attention = attentions[layer].float().cpu().numpy()
            for label, trace in traces.items():
                here, found = trace.sel(layer=layer), out[label]
                stored = np.asarray(here.features.values)
                gap = float(np.abs(here.attention.values - attention).max())
                other = float(np.abs(stored - features).max())
                found["layers"] += 1
                found["attention equal"] += gap == 0
                found["features equal"] += other == 0
                found["members"] += int((features > 0).sum())
                found["members that differ"] += int(((stored > 0) != (features > 0)).sum())
                for what, value in (("attention", gap), ("features", other)):
                    key = f"{what}: largest difference"
                    found[key] = max(found[key], value)
    for folder in folders.values():
        shutil.rmtree(folder)
    return out


@torch.inference_mode()
def arithmetic(home: Path, scale: Scale, device: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Encode the same residuals in float32, TF32 and bfloat16, and count what differs."""
    del scale, asked
    from sae_lens import SAE

    model, tokenizer = gpu_shape.load(home, device)
    kept: list[list[torch.Tensor]] = [[] for _ in range(32)]
    for _, text in gpu_shape.prompts(10):
        ids = tokenizer(text)["input_ids"]
        for layer, hidden in enumerate(reference(model, np.array(ids))[1]):
            kept[layer].append(hidden[1:])
    del model
    totals: dict[str, dict[str, float]] = {}
    for layer in LAYERS:
        hidden = torch.cat(kept[layer])
        exact = SAE.from_pretrained(RELEASE, f"l{layer}r_8x", device=device)
        half = SAE.from_pretrained(RELEASE, f"l{layer}r_8x", device=device, dtype="bfloat16")
        expected, _ = _timed(exact, hidden)
        for label, sae in (("float32", exact), ("tf32", exact), ("bfloat16", half)):
            torch.backends.cuda.matmul.allow_tf32 = label == "tf32"
            made, seconds = _timed(sae, hidden)
            torch.backends.cuda.matmul.allow_tf32 = False
            _compare(totals.setdefault(label, defaultdict(float)), expected, made.float())
            totals[label]["encode ms"] += 1e3 * seconds / len(LAYERS)
    for found in totals.values():
        found["median of relative differences"] /= len(LAYERS)
        found["active a token"] = found["members"] / found["tokens"]
    return {label: dict(found) for label, found in totals.items()}


def _timed(sae: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, float]:
    made: torch.Tensor = sae.encode(hidden)
    synchronize()
    start = time.perf_counter()
    made = sae.encode(hidden)
    synchronize()
    return made, time.perf_counter() - start


def _compare(found: dict[str, float], expected: torch.Tensor, made: torch.Tensor) -> None:
    before, after = expected > 0, made > 0
    both = before & after
    relative = ((made - expected).abs() / expected)[both]
    found["tokens"] += len(expected)
    found["members"] += int(before.sum())
    found["lost"] += int((before & ~after).sum())
    found["gained"] += int((after & ~before).sum())
    found["median of relative differences"] += float(relative.median())
    found["largest relative difference"] = max(
        found["largest relative difference"], float(relative.max())
    )


# --- the machine -------------------------------------------------------------------------------


def machine(home: Path, scale: Scale, device: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the rates that the floors are made of, bytes or operations a second."""
    del scale, asked
    out: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__}
    big = device != "cpu"
    count = (2**30 if big else 2**22) // 4
    host, side = torch.randn(count), 8192 if big else 256
    out["host copy"] = 2 * 4 * count / _median(host.clone)
    if big:
        out["device"] = torch.cuda.get_device_name()
        out["device bytes"] = torch.cuda.get_device_properties(0).total_memory
        pinned, there = host.pin_memory(), host.to(device)
        for label, source in (("pinned", pinned), ("pageable", host)):
            up = _median(functools.partial(there.copy_, source))
            down = _median(functools.partial(source.copy_, there))
            out[f"to the device, {label}"] = 4 * count / up
            out[f"from the device, {label}"] = 4 * count / down
        out["device copy (read and written)"] = 2 * 4 * count / _median(there.clone)
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=device).to(dtype)
        rate = 2 * side**3 / _median(functools.partial(torch.matmul, a, a))
        out[f"matrix product, {str(dtype).removeprefix('torch.')}"] = rate
    content = np.random.default_rng(0).bytes(2**31 if big else 2**22)
    start = time.perf_counter()
    with (home / "written").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    out["disk, written and synchronized"] = len(content) / (time.perf_counter() - start)
    (home / "written").unlink()
    return out


def _median(function: Callable[[], Any], repeats: int = 7) -> float:
    function()
    taken = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2]


WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "warm": warm,
    "old": old,
    "correctness": correctness,
    "arithmetic": arithmetic,
    "machine": machine,
}
