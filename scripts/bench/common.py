"""Clocks, processes, tables and synthetic data of the benchmarks.

Imports torch and zarrtrace only where it needs them: some benchmarks measure imports and memory.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from zarrtrace.format.layout import Limits
    from zarrtrace.records import LayerRecord, TokensRecord, TracePlan
    from zarrtrace.store import RunWriter

#: Set before torch is loaded, as zarrtrace itself does: threads that wait do not spin.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
_TOP = 32  # features of a token that a trace indexes


# --- clocks and memory -------------------------------------------------------------------------


class Spent(NamedTuple):
    """Seconds of wall time, and of CPU time in all threads of this process."""

    wall: float
    cpu: float


def timed(act: Callable[[], object], cpu: Callable[[], float] = time.process_time) -> Spent:
    """Time one call; `cpu` returns CPU seconds so far."""
    wall, used = time.perf_counter(), cpu()
    act()
    return Spent(time.perf_counter() - wall, cpu() - used)


def turns(acts: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Spent]:
    """Return the medians of each call, measured in turns."""
    taken: dict[str, list[Spent]] = {name: [] for name in acts}
    for _ in range(repeats):
        for name, act in acts.items():
            taken[name].append(timed(act))
    return {name: middle(found) for name, found in taken.items()}


def middle(found: Sequence[Spent]) -> Spent:
    """Return the medians of wall and of CPU time."""
    walls, cpus = zip(*found, strict=True)
    return Spent(statistics.median(walls), statistics.median(cpus))


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure over runs that have the same figures."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def cpu_with_children() -> float:
    """Return the CPU seconds of this process and of those that it started and that ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(one)[:2]) for one in whose)


def peak_bytes() -> int:
    """Return the most memory that this process held (Linux).

    Not ``ru_maxrss``: a process that another one starts inherits that of its parent.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def resident() -> int:
    """Return the bytes of memory that this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory this process holds while the context is open, above what it held before."""

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        self._before, self.bytes = resident(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, resident() - self._before)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- processes and tables ----------------------------------------------------------------------


def in_process(
    *arguments: object, python: str | Path = sys.executable, **environment: str
) -> dict[str, float]:
    """Run Python in a fresh process, and return the JSON on its last line.

    Raises
    ------
    SystemExit
        If the process fails; with what it wrote to standard error.
    """
    done = subprocess.run(
        [str(python), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, **os.environ, **environment},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_head(*cells: object) -> None:
    """Print the head of a table in Markdown."""
    print_row(*cells)
    print("|---" * len(cells) + "|", flush=True)


def print_row(*cells: object) -> None:
    """Print a row of a table in Markdown."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def save(file: Path | None, found: object) -> None:
    """Write figures as JSON, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# --- prompts -----------------------------------------------------------------------------------


def demo_prompts(count: int) -> dict[str, str]:
    """Return prompts of the embedded suite by name, repeated under other names."""
    from zarrtrace import demo
    from zarrtrace.scenarios import load_suite

    suite = load_suite(demo.suite_path())
    return {f"{suite[i % len(suite)].name}_{i}": suite[i % len(suite)].prompt for i in range(count)}


def write_suite(file: Path, prompts: Mapping[str, str]) -> None:
    """Write prompts as a scenario file in JSONL."""
    lines = [json.dumps({"name": name, "prompt": text}) for name, text in prompts.items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- synthetic traces --------------------------------------------------------------------------


def attention(rng: np.random.Generator, heads: int, tokens: int) -> np.ndarray:
    """Return causal softmax attention ``(head, query, key)``; the first token is a sink."""
    found = np.empty((heads, tokens, tokens), np.float32)
    for head in found:
        weights = np.exp(2 * rng.standard_normal((tokens, tokens), np.float32))
        weights[:, 0] *= 20
        weights *= np.tri(tokens, dtype=np.float32)
        head[:] = weights / weights.sum(-1, keepdims=True)
    return found


def features(rng: np.random.Generator, tokens: int, count: int, active: int) -> np.ndarray:
    """Return ``(query, feature)`` of which `active` a token are above 0, float32."""
    values = np.zeros((tokens, count), np.float32)
    for row in values:
        row[rng.choice(count, active, replace=False)] = rng.gamma(2.0, size=active) + 0.3
    return values


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 values, rounded towards 0."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def trace_plan(
    name: str,
    layers: Iterable[int],
    tokens: int,
    *,
    heads: int | None,
    features: int | None,
    spans: Mapping[str, Sequence[int]] | None = None,
    attention_dtype: Any = "float32",
    limits: Limits | None = None,
    next_token: bool = True,
    words: int | None = None,
    **attributes: Any,
) -> TracePlan:
    """Return the plan of a synthetic trace; `decision` is its last token.

    Its words repeat after `words` of them; None, never.
    """
    from zarrtrace.format.attributes import SpanAttributes, TraceAttributes
    from zarrtrace.format.layout import DEFAULT_LIMITS, TraceShape
    from zarrtrace.records import Tokens, TracePlan

    layers, marked = tuple(layers), {**(spans or {}), "decision": (tokens - 1,)}
    dtypes: dict[str, Any] = {
        "attention_dtype": None if heads is None else attention_dtype,
        "feature_dtype": None if features is None else "float32",
    }
    described = TraceAttributes(
        scenario=name,
        prompt=None,
        spans={k: SpanAttributes(characters=(), tokens=tuple(v)) for k, v in marked.items()},
        model=None,
        layers=layers,
        versions={},
        **dtypes,
        **attributes,
    )
    shape = TraceShape(
        layers=len(layers),
        tokens=tokens,
        heads=heads,
        features={} if features is None else {"features": features},
        limits=DEFAULT_LIMITS if limits is None else limits,
        next_token=next_token,
        **dtypes,
    )
    texts = [f" word{at % (words or tokens)}" for at in range(tokens)]
    return TracePlan(described, shape, Tokens(range(tokens), texts))


def layer_record(name: str, layer: int, weights: np.ndarray, values: np.ndarray) -> LayerRecord:
    """Return a layer with its strongest features, as capture makes it."""
    from zarrtrace.records import FeatureRecord, LayerRecord

    top = np.argsort(-values, axis=1)[:, :_TOP]
    found = FeatureRecord(values, top.astype(np.uint32), np.take_along_axis(values, top, axis=1))
    return LayerRecord(name, layer, 0, weights, weights.mean(0), {"features": found})


def tokens_record(rng: np.random.Generator, name: str, tokens: int) -> TokensRecord:
    """Return the most likely next tokens of each position."""
    from zarrtrace.format.layout import NEXT_TOKENS
    from zarrtrace.records import TokensRecord

    ids = rng.integers(0, 128_000, (tokens, NEXT_TOKENS), dtype=np.uint32)
    logprobs = -np.sort(rng.exponential(3, ids.shape)).astype(np.float32)
    texts = np.vectorize(lambda number: f" word{number}", otypes=[object])(ids)
    return TokensRecord(name, ids, logprobs, texts)


def write_trace(
    run: RunWriter, plan: TracePlan, seed: int, active: int, likely: np.ndarray | None = None
) -> None:
    """Write what is missing of a synthetic trace, with `active` features a token.

    `likely` are the ids of its next tokens ``(token, rank)``; None for random ones.
    """
    rng = np.random.default_rng(seed)
    name, tokens = plan.attributes.scenario, plan.shape.tokens
    heads, latents = plan.shape.heads or 0, plan.shape.features["features"]
    with run.trace(plan) as trace:
        for layer in trace.missing_layers:
            weights = attention(rng, heads, tokens)
            values = features(rng, tokens, latents, active)
            trace.append(layer_record(name, layer, weights, values))
        if trace.needs_tokens:
            record = tokens_record(rng, name, tokens)
            trace.append(record if likely is None else replace(record, next_token=likely))
