"""Run zarrtrace on a GPU at the true shape: Llama-3.1-8B with Llama Scope's 31 SAEs.

Weights are random, for the true ones cannot be had everywhere; sizes, files and dtypes are true.
Every stage runs in a fresh process and leaves ``<json>/<stage>.json`` as soon as it is done. Cold
stages start with the system's file cache dropped, if that is allowed; each says so.

    python scripts/bench/gpu.py --json FOLDER [--only STAGE ...] [--scale tiny --device cpu]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_shape
import torch
from common import demo_prompts, size_of, write_suite
from gpu_shape import SCALES, Scale
from gpu_workers import WORKERS

_READERS = 4
_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Bench:
    """Where the benchmark runs.

    Attributes
    ----------
    home
        Holds the Hugging Face cache and everything else.
    scale, scale_name, device
        Sizes, what they are called, and where the model computes.
    limit
        Seconds after which a stage is stopped.
    """

    home: Path
    scale: Scale
    scale_name: str
    device: str
    limit: float


# --- processes ---------------------------------------------------------------------------------


def drop_cache() -> bool:
    """Empty the system's file cache; returns whether that was allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


def own_memory(process: int) -> int:
    """Return the bytes of memory of a process and those it started that are no pages of files."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        own = 1024 * sum(
            int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))
        )
        tasks = Path(f"/proc/{process}/task").glob("*/children")
        children = " ".join(task.read_text(encoding="ascii") for task in tasks).split()
        return own + sum(own_memory(int(child)) for child in children)
    return 0


def used_on_device(device: str) -> int:
    """Return the bytes that all processes hold on the GPU."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


class Watch:
    """Runs a command and watches its memory."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._stop = bench, threading.Event()
        self.host = self.device = 0

    def run(self, command: list[str]) -> tuple[float, int, str]:
        """Return seconds, exit code and standard output."""
        environment = {
            **os.environ,
            "HF_HOME": str(self._bench.home),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        before = used_on_device(self._bench.device)
        with (self._bench.home / "errors.txt").open("w+") as errors:
            start = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
            thread = threading.Thread(target=self._watch, args=(process.pid, before))
            thread.start()
            try:
                said, _ = process.communicate(timeout=self._bench.limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                said, _ = process.communicate()
            seconds = time.perf_counter() - start
            self._stop.set()
            thread.join()
            if process.returncode:
                errors.seek(0)
                sys.stderr.write(errors.read()[-3000:])
        return seconds, process.returncode, said

    def _watch(self, process: int, before: int) -> None:
        while not self._stop.wait(0.02):
            self.host = max(self.host, own_memory(process))
            self.device = max(self.device, used_on_device(self._bench.device) - before)


def worker(bench: Bench, name: str, **asked: Any) -> dict[str, Any]:
    """Run a worker in a fresh process; returns what it found and its peaks of memory."""
    if bench.scale_name == "tiny" and asked.get("clocks", True) and "repeats" in asked:
        asked["repeats"] = 0
    given = json.dumps([name, str(bench.home), bench.scale_name, bench.device, asked])
    watch = Watch(bench)
    seconds, code, said = watch.run([sys.executable, __file__, "--one", given])
    if code == 0:
        found = json.loads(said.splitlines()[-1])
    else:
        found = {"failed": code, "bytes when it stopped": size_of(bench.home / "warm")}
        shutil.rmtree(bench.home / "warm", ignore_errors=True)
    peaks = {"process s": seconds, "host peak bytes, no files' pages": watch.host}
    return {**found, **peaks, "device peak bytes of the process": watch.device}


def cold(bench: Bench, *options: str) -> dict[str, Any]:
    """Run the command line from disk to finished store."""
    dropped = drop_cache()
    libraries = [_imports(bench) for _ in range(2)][1]
    found = typed(bench, *options)
    return {"file cache of weights dropped": dropped, "importing libraries s": libraries, **found}


def typed(bench: Bench, *options: str) -> dict[str, Any]:
    """Run the command line as a user types it."""
    output = bench.home / "typed"
    shutil.rmtree(output, ignore_errors=True)
    watch = Watch(bench)
    command = [sys.executable, "-m", "zarrtrace", "extract", "-o", str(output), "--quiet"]
    command += ["--layers", f"{gpu_shape.LAYERS[0]}-{gpu_shape.LAYERS[-1]}"]
    command += ["--model", gpu_shape.MODEL, "--device", bench.device.partition(":")[0], *options]
    if "--scenarios" not in options:
        command += ["--scenarios", "slot-machine"]
    if "--no-features" not in options:
        command += ["--sae-release", gpu_shape.RELEASE]
    seconds, code, _ = watch.run(command)
    found = {
        "command": " ".join(["zarrtrace", *command[3:]]),
        "exit code": code,
        "seconds": seconds,
        "bytes": size_of(output),
        "host peak bytes, no files' pages": watch.host,
        "device peak bytes of the process": watch.device,
    }
    shutil.rmtree(output, ignore_errors=True)
    return found


def _imports(bench: Bench) -> float:
    """Import what the command imports; the second time from the system's file cache."""
    libraries = "import torch, transformers, sae_lens, zarrtrace.capture.saes, zarrtrace.store"
    seconds, _, _ = Watch(bench).run([sys.executable, "-c", libraries])
    return seconds


# --- stages ------------------------------------------------------------------------------------


def build(bench: Bench) -> dict[str, Any]:
    """Write the weights, unless they are there."""
    done = bench.home / "built.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    start = time.perf_counter()
    gpu_shape.build_model(bench.home, bench.scale, bench.device)
    middle = time.perf_counter()
    active = gpu_shape.build_saes(bench.home, bench.scale, bench.device)
    made = {"model s": middle - start, "SAEs s": time.perf_counter() - middle}
    found = {**made, "bytes": size_of(bench.home / "hub"), "active features a token": active}
    done.write_text(json.dumps(found))
    os.sync()  # what is measured next should not wait for it
    if bench.device != "cpu":
        torch.cuda.empty_cache()
    return found


def machine(bench: Bench) -> dict[str, Any]:
    """Measure the machine's rates, and how long the needed weights take to read."""
    found = worker(bench, "machine")
    found["file cache dropped"] = drop_cache()
    snapshot = gpu_shape.Repository(bench.home, gpu_shape.MODEL).snapshot
    files = sorted(snapshot.glob("*.safetensors"))
    for readers, some in ((1, files[:1]), (_READERS, files[1:])):
        drop_cache()
        start = time.perf_counter()
        size = _read(some, readers)
        found[f"disk, read by {readers}"] = size / (time.perf_counter() - start)
    rate = max(found["disk, read by 1"], found[f"disk, read by {_READERS}"])
    needed = {"model": gpu_shape.model_bytes(bench.scale)}
    needed["encoders"] = gpu_shape.encoder_bytes(bench.scale)
    found["needed bytes"] = needed
    found["floor, reading the model s"] = needed["model"] / rate
    found["floor, reading model and encoders s"] = sum(needed.values()) / rate
    return found


def _read(files: list[Path], readers: int) -> int:
    parts = [(f, at) for f in files for at in range(0, f.stat().st_size, _READ_BYTES)]
    queue, lock, size = iter(parts), threading.Lock(), [0] * readers

    def work(number: int) -> None:
        buffer = bytearray(_READ_BYTES)
        while True:
            with lock:
                part = next(queue, None)
            if part is None:
                return
            with part[0].open("rb", buffering=0) as content:
                content.seek(part[1])
                size[number] += content.readinto(buffer) or 0

    threads = [threading.Thread(target=work, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(size)


def full(bench: Bench) -> dict[str, Any]:
    """Time ten scenarios, attention and features."""
    return {"from disk": cold(bench), "weights loaded": worker(bench, "warm", repeats=3)}


def attention(bench: Bench) -> dict[str, Any]:
    """Time ten scenarios, attention alone."""
    loaded = worker(bench, "warm", repeats=3, features=False)
    return {"from disk": cold(bench, "--no-features"), "weights loaded": loaded}


def low_memory(bench: Bench) -> dict[str, Any]:
    """Time ten scenarios, decoder blocks in host memory."""
    loaded = worker(bench, "warm", repeats=1, low_memory=True)
    return {"from disk": cold(bench, "--low-memory"), "weights loaded": loaded}


def old(bench: Bench) -> dict[str, Any]:
    """Time the user's script."""
    return {
        "full": worker(bench, "old"),
        "attention": worker(bench, "old", features=False),
    }


def many(bench: Bench) -> dict[str, Any]:
    """Measure throughput over many scenarios."""
    suite = bench.home / "many.jsonl"
    write_suite(suite, demo_prompts(bench.scale.many))
    found = worker(bench, "warm", repeats=1, clocks=False, scenarios=str(suite))
    return {**found, "floor": floor(bench, found.get("tokens", 0))}


def many_half(bench: Bench) -> dict[str, Any]:
    """Measure the same with SAEs that multiply in bfloat16."""
    suite = bench.home / "many.jsonl"
    write_suite(suite, demo_prompts(bench.scale.many))
    given = {"scenarios": str(suite), "sae_products": "bfloat16"}
    return worker(bench, "warm", repeats=1, clocks=False, **given)


def _two_gpus(size: str) -> Callable[[Bench], dict[str, Any]]:
    def stage(bench: Bench) -> dict[str, Any]:
        """Time the command with one GPU, and with two workers; the system caches all files."""
        count = getattr(bench.scale, size)
        suite = bench.home / f"{size}.jsonl"
        write_suite(suite, demo_prompts(count))
        given = ("--scenarios", str(suite))
        one = typed(bench, *given)
        two = typed(bench, *given, "--workers", "2")
        faster = one["seconds"] / two["seconds"]
        return {"scenarios": count, "one GPU": one, "two workers": two, "times as fast": faster}

    return stage


def clusters(bench: Bench) -> dict[str, Any]:
    """Time one process, one worker and two workers with the weights loaded."""
    figures = bench.home / "clusters.json"
    layers = f"{gpu_shape.LAYERS[0]}-{gpu_shape.LAYERS[-1]}"
    command = [sys.executable, str(Path(__file__).with_name("cluster.py")), "--layers", layers]
    command += ["--model", gpu_shape.MODEL, "--sae-release", gpu_shape.RELEASE, "--repeats", "2"]
    command += ["--device", bench.device.partition(":")[0], "--json", str(figures)]
    seconds, code, said = Watch(bench).run([*command, "--scenarios", str(bench.scale.few)])
    taken = json.loads(figures.read_text()) if code == 0 else {}
    return {"process s": seconds, "exit code": code, "wall s, CPU s": taken, "said": said}


def floor(bench: Bench, tokens: int) -> dict[str, float]:
    """Operations of model and encoders for so many tokens; matrix products alone."""
    scale = bench.scale
    weights = gpu_shape.model_bytes(scale) / 2 - scale.vocabulary * scale.width
    encoders = len(gpu_shape.LAYERS) * scale.width * scale.features
    return {"model operations": 2 * weights * tokens, "SAE operations": 2 * encoders * tokens}


def _long(number: int, **asked: Any) -> Callable[[Bench], dict[str, Any]]:
    def stage(bench: Bench) -> dict[str, Any]:
        """Time one long prompt."""
        tokens = bench.scale.long[number]
        suite = bench.home / f"long{tokens}.jsonl"
        gpu_shape.write_long(suite, bench.home, tokens)
        given = {"attention_capture": "blocked", "scenarios": str(suite), "repeats": 1, **asked}
        found = worker(bench, "warm", **given)
        return {**found, "asked": given, "floor": floor(bench, found.get("tokens", 0))}

    return stage


STAGES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "build": build,
    "machine": machine,
    "full": full,
    "attention": attention,
    "low_memory": low_memory,
    "correctness": lambda bench: worker(bench, "correctness", scenarios=2),
    "old": old,
    "arithmetic": lambda bench: worker(bench, "arithmetic"),
    "long_a_last": _long(0, attention_positions="last"),
    "long_b_last": _long(1, attention_positions="last", repeats=0),
    "long_a_all": _long(0, layers=[1, 16], features=False, repeats=0),
    "many": many,
    "many_half": many_half,
    "two_gpus": _two_gpus("few"),
    "clusters": clusters,
    "two_gpus_long": _two_gpus("most"),
    "long_b_all": _long(1, layers=[16], features=False, repeats=0),
}


def short(found: Any) -> Any:
    """Round numbers for the table on standard output."""
    if isinstance(found, dict):
        return {key: short(value) for key, value in found.items()}
    if isinstance(found, list):
        return [short(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


def run(bench: Bench, names: list[str], into: Path) -> Iterator[str]:
    """Run stages; yields a line for each."""
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        try:
            found = STAGES[name](bench)
        except Exception as error:  # noqa: BLE001 -- the stages behind it are still worth their time
            found = {"failed": repr(error)}
        found["stage s"] = time.perf_counter() - start
        (into / f"{name}.json").write_text(json.dumps(found, indent=2))
        yield f"{name}: {json.dumps(short(found))}"


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench_gpu"))
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--scale", choices=list(SCALES), default="true")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if left out")
    parser.add_argument("--limit", type=float, default=240, help="seconds of one process")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, home, scale, device, asked = json.loads(given.one)
        print(json.dumps(WORKERS[name](Path(home), SCALES[scale], device, asked)))
        return
    home = given.folder or Path(tempfile.mkdtemp(prefix="zarrtrace-gpu-"))
    home.mkdir(parents=True, exist_ok=True)
    bench = Bench(home, SCALES[given.scale], given.scale, given.device, given.limit)
    names = given.only if "build" in given.only else ["build", *given.only]
    try:
        for line in run(bench, names, given.json):
            print(line, flush=True)
    finally:
        if given.folder is None:
            shutil.rmtree(home)


if __name__ == "__main__":
    main()
