"""Compare extraction with the field's tools that store the same, on the `proxy` model.

Contenders: sae-lens with TransformerLens, nnsight, and for one half alone delphi's latent cache
(features) and TransformerLens (attention); see ``peer_tools.py``. They run in turns with zarrtrace,
each in a process of its own, all in one virtual environment that this script makes. The clock
starts when libraries and model are loaded; reading SAEs is in everybody's time.

What everybody stored of the first scenario is compared with zarrtrace's before anything is printed.

    python scripts/bench/peers.py [--scenarios 10] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-peers"
#: delphi's own dependencies hold vLLM, for models that explain features: what its cache needs is
#: named here instead.
DELPHI = ("asyncer", "blobfile", "faiss-cpu", "orjson", "sentence-transformers")
TOOLS = ("zarrtrace", "sae-lens", "transformer-lens", "nnsight", "eai-delphi", "torch")
#: What is stored, and who stores it, zarrtrace first.
TABLES = {
    "full": (
        "sae-lens + TransformerLens, NPZ",
        "nnsight, NPZ",
        "sae-lens + TransformerLens, torch.save",
        "nnsight, torch.save",
    ),
    "features": ("delphi",),
    "attention": ("TransformerLens, NPZ", "TransformerLens, torch.save"),
}
#: Layers whose values are compared.
COMPARED = (1, 16, 31)
#: Float32 rounds otherwise where the same is summed in another order.
ATTENTION_DIFFERENCE, FEATURE_DIFFERENCE, FIRING_DIFFERENCE = 1e-4, 1e-3, 1e-3


def make_environment() -> Path:
    """Install zarrtrace and its peers into an environment beside this repository's; once."""
    python, installed = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    constraints = ROOT / "scripts" / "constraints.txt"
    wanted = constraints.read_text(encoding="utf-8")
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        print(f"making {ENVIRONMENT.name}", file=sys.stderr)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pins = ["--constraint", str(constraints)]
        subprocess.run([*pip, *pins, "-e", f"{ROOT}[extract]", "nnsight", *DELPHI], check=True)
        subprocess.run([*pip, "--no-deps", "eai-delphi"], check=True)
        installed.write_text(wanted, encoding="utf-8")
    return python


# --- what was stored --------------------------------------------------------------------------


def read_zarrtrace(run: Path, name: str, layer: int) -> dict[str, np.ndarray]:
    """Read a layer of a trace."""
    import zarrtrace as zt

    ds = zt.open_trace(run / name).sel(layer=layer)
    return {key: ds[key].values for key in ("attention", "features") if key in ds}


def read_peer(output: Path, name: str, layer: int, features: int) -> dict[str, np.ndarray]:
    """Read a layer of what a peer saved."""
    import torch
    from safetensors.numpy import load_file

    if (output / f"{name}.pt").exists():
        saved = torch.load(output / f"{name}.pt", mmap=True)[layer]
        return {key: value.numpy() for key, value in saved.items()}
    if (output / name / f"layer_{layer}.npz").exists():
        with np.load(output / name / f"layer_{layer}.npz") as arrays:
            return dict(arrays)
    active = load_file(output / name / f"model.layers.{layer}.safetensors")
    dense = np.zeros((active["tokens"].shape[1], features), np.float32)
    _, token, feature = active["locations"].T
    dense[token, feature] = active["activations"]
    return {"features": dense}


def refuse_other_values(who: str, ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> None:
    """End the benchmark if a peer has not computed the same."""
    if set(ours) != set(theirs):
        sys.exit(f"{who} stored {sorted(theirs)}, not {sorted(ours)}")
    if "attention" in ours:
        apart = np.abs(ours["attention"] - theirs["attention"]).max()
        if apart > ATTENTION_DIFFERENCE:
            sys.exit(f"{who}: attention differs by {apart:.1e}")
    if "features" in ours:
        one, other = ours["features"], theirs["features"]
        both, either = (one > 0) & (other > 0), (one > 0) | (other > 0)
        apart = (np.abs(one - other)[both] / one[both]).max()
        firing = 1 - both.sum() / either.sum()
        if apart > FEATURE_DIFFERENCE or firing > FIRING_DIFFERENCE:
            sys.exit(f"{who}: features differ by {apart:.1e}, {firing:.2%} fire for one alone")


# --- the comparison ---------------------------------------------------------------------------


def compare(
    python: Path, folder: Path, mode: str, scenarios: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Return medians of each contender's figures."""
    from proxy import FEATURES

    scripts, output = ROOT / "scripts" / "bench", folder / "peer"
    ours = [scripts / "extract.py", "--one", folder, "zarrtrace"]
    found: dict[str, list[dict[str, float]]] = {who: [] for who in ("zarrtrace", *TABLES[mode])}
    first = next(iter(common.demo_prompts(1)))
    for repeat in range(repeats):
        for who, runs in found.items():
            if who == "zarrtrace":
                runs.append(common.in_process(*ours, mode, scenarios, python=python))
                stored = {at: read_zarrtrace(folder / "run", first, at) for at in COMPARED}
                continue
            theirs = [scripts / "peer_tools.py", who, folder, output, scenarios]
            runs.append(common.in_process(*theirs, python=python))
            if repeat == 0:
                for at, arrays in stored.items():
                    peer = read_peer(output, first, at, FEATURES)
                    refuse_other_values(f"{who}, layer {at}", arrays, peer)
            shutil.rmtree(output)
            print(f"{mode}: {who}: {runs[-1]}", file=sys.stderr, flush=True)
    return {who: common.medians(runs) for who, runs in found.items()}


def show(mode: str, found: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    ours = found["zarrtrace"]
    print()
    common.print_head(mode, "s", "CPU s", "against zarrtrace", "CPU s", "MB", "peak MB")
    for who, row in found.items():
        cells = [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
        cells += [f"{row[key] / ours[key]:.2f}x" for key in ("seconds", "cpu_seconds")]
        cells += [f"{row[key] / 1e6:.0f}" for key in ("bytes", "peak")]
        common.print_row(who, *cells)


def main() -> None:
    """Print a table for each mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--active", type=int, default=50)
    parser.add_argument("--modes", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    python = make_environment()
    if Path(sys.prefix).resolve() != ENVIRONMENT:
        os.execv(python, [str(python), __file__, *sys.argv[1:]])  # noqa: S606 -- the same script
    from proxy import build

    folder = Path(tempfile.mkdtemp(prefix="zarrtrace-peers-"))
    try:
        build(folder, given.active)
        print(", ".join(f"{tool} {version(tool)}" for tool in TOOLS))
        print(
            f"{given.scenarios} scenarios, {given.active} active features a token, medians of ",
            end="",
        )
        print(given.repeats)
        results = {}
        for mode in given.modes:
            results[mode] = compare(python, folder, mode, given.scenarios, given.repeats)
            show(mode, results[mode])
        common.save(given.json, results)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
