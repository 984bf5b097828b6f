"""Copying between NumPy and where a model computes."""

from __future__ import annotations

import numpy as np
import torch

# Below this, what a copy through memory that the GPU may write to saves is less than it costs.
_PINNED_BYTES = 2**20


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array of the host's; a CPU's is not copied."""
    if tensor.device.type == "cuda" and tensor.nbytes >= _PINNED_BYTES:
        # Torch keeps and uses such memory again once the array is gone.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        array: np.ndarray = pinned.copy_(tensor).numpy()
    else:
        array = tensor.cpu().numpy()
    return array


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host's on a device; a GPU copies it when it comes to it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Begin to copy to memory of the host that a GPU writes to by itself, in the current stream.

    Torch keeps and uses such memory again once the tensor is gone.
    """
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
