"""Errors of torch, transformers and the hub, told in zarrtrace's words."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from zarrtrace.errors import ModelError, ZarrtraceError
from zarrtrace.hub import not_reached

#: Errors that transformers raises for files that are missing, damaged or of another kind.
LOADING_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def load_error(name: str, error: Exception) -> ModelError:  # noqa: PLR0911 -- one a cause
    """Say in our words why transformers could not load a model."""
    if isinstance(error, ModelError):
        return error
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    first_line = str(error).strip().partition("\n")[0]
    if any_of(GatedRepoError) or "gated repo" in str(error):
        return ModelError(
            f"{name}: you have no access to this gated model",
            why="Its owner asks you to accept a licence first.",
            remedy=f"Accept it on https://huggingface.co/{name}, then log in: hf auth login.",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{name}: comes with code of its own, which is not run unasked",
            why="Its configuration names classes that transformers does not have.",
            remedy="Read that code; if you trust it, add --trust-remote-code.",
        )
    if any_of(pickle.UnpicklingError):
        return ModelError(
            f"{name}: its weights are a pickle that holds more than tensors",
            why="Reading it could run code.",
            remedy="Use a copy of the model in safetensors.",
        )
    if any_of(RevisionNotFoundError):
        return ModelError(
            f"{name}: no such revision", remedy="Check --revision: a branch, tag or commit."
        )
    if any_of(RepositoryNotFoundError, HFValidationError):
        return ModelError(
            f"{name}: no such model",
            why="It is neither a folder here nor an id on the Hugging Face hub.",
            remedy="Check the spelling of --model; for a private model log in: hf auth login.",
        )
    if any_of(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return not_reached(name)
    return ModelError(
        f"{name}: transformers cannot load it: {first_line}",
        why="Files are missing or damaged, or the architecture is newer than the installed "
        "transformers.",
        remedy="Check the folder or id; pip install --upgrade transformers.",
    )


@contextmanager
def forward_errors(name: str) -> Iterator[None]:
    """Say in our words that a model's forward pass failed.

    Raises
    ------
    ModelError
        For any exception but zarrtrace's own, and a full memory, which has a message of its own.
    """
    try:
        yield
    except (ZarrtraceError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{name}: its forward pass failed: {type(error).__name__}: {first_line}",
            why="The model does not compute text alone in the installed versions of torch and "
            "transformers, or not in the way that was asked for.",
            remedy="Try the prompt with transformers alone; --attention-capture whole and "
            "--batch-size 1 are the plainest way.",
        ) from error


@contextmanager
def full_memory(name: str, device: torch.device) -> Iterator[None]:
    """Say in our words that the memory of the device is full.

    Raises
    ------
    ModelError
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{name}: the memory of {device} is full",
            why="The model fits, but not with what a pass or an SAE needs as well; or another "
            "process has taken the rest.",
            remedy="Try --low-memory, a smaller --batch-size, --attention-capture blocked, or "
            "--positions last. What was stored is kept; another --batch-size wants --overwrite.",
        ) from error
