"""Models that are refused before their weights are read."""

from __future__ import annotations

from typing import Any

import torch

from zarrtrace.errors import ModelError

#: Precisions in which a model may compute, by name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Refuse a model that reads one sequence and writes another.

    Raises
    ------
    ModelError
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: an encoder-decoder model",
            why="zarrtrace traces decoder-only models: one sequence, one attention a block.",
            remedy="Choose a causal language model.",
        )


def refuse_dtype(model: Any, name: str) -> None:
    """Refuse a model in a precision that traces do not store.

    Raises
    ------
    ModelError
    """
    if model.dtype not in DTYPES.values():
        raise ModelError(
            f"{name}: its weights are {model.dtype}",
            why=f"Traces hold what a model computes in {', '.join(DTYPES)}.",
            remedy="Call model.float(), or load it by name with --dtype float32 (in Python, "
            "dtype='float32').",
        )
