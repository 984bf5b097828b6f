"""The yardstick: what the user's own script does, written from its description.

One forward pass with ``output_hidden_states`` and ``output_attentions``, the SAE token by token
with its decoder in memory, one compressed NPZ a layer. Its off-by-one (``hidden_states[N]`` is the
output of block N - 1) is kept: it costs the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


@torch.no_grad()
def extract(
    model: Any,
    tokenizer: Any,
    saes: Mapping[int, Any] | None,
    prompts: Mapping[str, str],
    layers: Sequence[int],
    output: Path,
    *,
    attention_dtype: torch.dtype = torch.float16,
) -> None:
    """Write ``<output>/<name>/layer_N.npz``; no features without `saes`.

    The script rounds attention to float16; in the model's own dtype nothing is lost.
    """
    for name, prompt in prompts.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        made = model(**inputs, output_hidden_states=True, output_attentions=True)
        for layer in layers:
            attention = made.attentions[layer - 1][0].to(attention_dtype)
            arrays = {"attention": attention.cpu().numpy()}
            if saes is not None:
                hidden = made.hidden_states[layer][0].float()
                rows = [saes[layer].encode(token.unsqueeze(0))[0] for token in hidden]
                arrays["features"] = torch.stack(rows).cpu().numpy()
            np.savez_compressed(folder / f"layer_{layer}.npz", **arrays)
