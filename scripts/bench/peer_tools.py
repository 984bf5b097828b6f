"""What the field's tools do for the same job, each as its own documentation has it.

Run by ``peers.py``, one contender in one process, in an environment that has the tools:

    python scripts/bench/peer_tools.py CONTENDER FOLDER OUTPUT SCENARIOS

`FOLDER` holds ``model`` and ``saes`` (see ``proxy.py``). One line of JSON is printed: wall and CPU
seconds from the loaded model on, with reading SAEs, bytes on disk, and the most memory held beyond
the model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Peak, demo_prompts, size_of
from extract import LAYERS
from sae_lens import SAE, HookedSAETransformer

#: ``attention`` (head, query, key) and ``features`` (query, feature) of one layer, as far as asked.
Arrays = dict[str, torch.Tensor]
#: Arrays by layer, of one prompt's token ids (1, token) and SAEs by layer; none, no features.
Capture = Callable[[torch.Tensor, dict[int, Any]], dict[int, Arrays]]
Save = Callable[[Path, dict[int, Arrays]], None]


class Clock:
    """Wall and CPU seconds of a contender, and its memory."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextmanager
    def runs(self) -> Iterator[None]:
        """Time the job, from the loaded model on."""
        with Peak() as peak:
            wall, cpu = time.perf_counter(), time.process_time()
            yield
            self.found["seconds"] = time.perf_counter() - wall
            self.found["cpu_seconds"] = time.process_time() - cpu
        self.found["peak"] = peak.bytes


def load_model(folder: Path) -> Any:
    """Load the model as all tools that wrap one of transformers' want it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="eager"
    ).eval()


def load_saes(folder: Path) -> dict[int, Any]:
    """Load whole SAEs, as sae-lens does."""
    names = {layer: f"blocks.{layer}.hook_resid_post" for layer in LAYERS}
    return {layer: SAE.load_from_disk(folder / "saes" / name) for layer, name in names.items()}


# --- saving -----------------------------------------------------------------------------------


def save_npz(path: Path, layers: dict[int, Arrays]) -> None:
    """Save a compressed NPZ a layer."""
    path.mkdir()
    for layer, arrays in layers.items():
        values: dict[str, Any] = {key: value.numpy() for key, value in arrays.items()}
        np.savez_compressed(path / f"layer_{layer}.npz", **values)


def save_torch(path: Path, layers: dict[int, Arrays]) -> None:
    """Save all layers with ``torch.save``, which does not compress."""
    torch.save(layers, path.with_suffix(".pt"))


# --- capturing --------------------------------------------------------------------------------


def hooked(folder: Path, hf_model: Any) -> Capture:
    """TransformerLens' ``run_with_cache``, with sae-lens' ``run_with_cache_with_saes`` for SAEs.

    The error term is on: without it the model would compute on with what the SAEs reconstruct.
    """
    from transformer_lens import loading_from_pretrained as loading

    # What ``from_pretrained_no_processing`` does, which takes only names of published models.
    name = str(folder / "model")
    config = loading.get_pretrained_model_config(name, device="cpu")
    model = HookedSAETransformer(config)
    model.load_and_process_state_dict(
        loading.get_pretrained_state_dict(name, config, hf_model),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    attention = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in LAYERS}
    features = {layer: f"blocks.{layer}.hook_resid_post.hook_sae_acts_post" for layer in LAYERS}

    def capture(ids: torch.Tensor, saes: dict[int, Any]) -> dict[int, Arrays]:
        if not saes:
            _, cache = model.run_with_cache(ids, names_filter=list(attention.values()))
            return {layer: {"attention": cache[name][0]} for layer, name in attention.items()}
        _, cache = model.run_with_cache_with_saes(
            ids,
            saes=list(saes.values()),
            use_error_term=True,
            names_filter=[*attention.values(), *features.values()],
        )
        return {
            layer: {"attention": cache[attention[layer]][0], "features": cache[features[layer]][0]}
            for layer in LAYERS
        }

    return capture


def nnsight(_folder: Path, hf_model: Any) -> Capture:
    """Capture with a trace of nnsight; SAEs encode within it."""
    import nnsight as package

    model = package.NNsight(hf_model)

    def capture(ids: torch.Tensor, saes: dict[int, Any]) -> dict[int, Arrays]:
        with model.trace(ids):
            kept = package.save({})
            for layer in LAYERS:
                block = model.model.layers[layer]
                kept[layer] = {"attention": block.self_attn.output[1][0]}
                if saes:
                    kept[layer]["features"] = saes[layer].encode(block.output)[0]
        found: dict[int, Arrays] = kept
        return found

    return capture


def delphi(folder: Path, output: Path, ids: dict[str, torch.Tensor], clock: Clock) -> None:
    """EleutherAI's cache of active latents: features alone, prompt by prompt.

    Its batches have one length, and padding would be stored: hence a cache for each prompt.
    """
    from delphi.latents.cache import LatentCache

    model = load_model(folder)
    with clock.runs():
        saes = load_saes(folder)
        encoders = {f"model.layers.{layer}": sae.encode for layer, sae in saes.items()}
        for name, tokens in ids.items():
            cache = LatentCache(model, encoders, batch_size=1)
            cache.run(tokens.numel(), tokens)
            (output / name).mkdir()
            cache.save(output / name)


def common(
    make: Callable[[Path, Any], Capture],
    save: Save,
    *,
    features: bool,
) -> Callable[[Path, Path, dict[str, torch.Tensor], Clock], None]:
    """Return a contender: capture a prompt, save it, go on."""

    def run(folder: Path, output: Path, ids: dict[str, torch.Tensor], clock: Clock) -> None:
        capture = make(folder, load_model(folder))
        with clock.runs():
            saes = load_saes(folder) if features else {}
            for name, tokens in ids.items():
                save(output / name, capture(tokens, saes))

    return run


CONTENDERS = {
    "sae-lens + TransformerLens, NPZ": common(hooked, save_npz, features=True),
    "sae-lens + TransformerLens, torch.save": common(hooked, save_torch, features=True),
    "nnsight, NPZ": common(nnsight, save_npz, features=True),
    "nnsight, torch.save": common(nnsight, save_torch, features=True),
    "delphi": delphi,
    "TransformerLens, NPZ": common(hooked, save_npz, features=False),
    "TransformerLens, torch.save": common(hooked, save_torch, features=False),
}


def main() -> None:
    """Run one contender."""
    who, folder, output, count = sys.argv[1:]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    ids = {
        name: tokenizer(text, return_tensors="pt")["input_ids"]
        for name, text in demo_prompts(int(count)).items()
    }
    Path(output).mkdir()
    clock = Clock()
    with torch.no_grad():
        CONTENDERS[who](Path(folder), Path(output), ids, clock)
    print(json.dumps({**clock.found, "bytes": size_of(Path(output))}))


if __name__ == "__main__":
    main()
