"""Decoder blocks that stay in host memory and come to the device one at a time.

All batches go through a block before any goes on to the next (:mod:`zarrtrace.capture.lockstep`),
so a block travels once a wave, and the next one travels while this one computes. Weights that
transformers maps from safetensors files stay what they are: pages of the file, which the system
reads as they are needed and may drop again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn


class BlockStream:
    """Brings each block to the device when it is about to run, and at most one more.

    Parameters
    ----------
    model
        The whole model, on the CPU; all of it but `blocks` moves to `device` here, for good.
    blocks
        Its decoder blocks, in order.
    device
        Where the blocks compute.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        self._host = [[tensor.data for tensor in tensors] for tensors in self._tensors]
        self._resident: int | None = None
        self._coming: tuple[int, list[torch.Tensor], Future[Any]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zarrtrace-block")
        self._side = _stream(device)
        streamed = {id(tensor) for tensors in self._tensors for tensor in tensors}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in streamed:
                tensor.data = tensor.data.to(device)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._hook(index), prepend=True)

    def _hook(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            # Weights outlive the pass, which runs in inference mode.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._bring(index)

        return hook

    def _bring(self, index: int) -> None:
        """Make a block resident, let go of the one before, and send for the next."""
        if index == self._resident:
            return
        if self._coming is None or self._coming[0] != index:
            self._drop_coming()
            self._send_for(index)
        assert self._coming is not None  # noqa: S101 -- just sent for
        _, arrived, copied = self._coming
        copied.result()
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        self._coming = None
        self._put_back()
        for tensor, here in zip(self._tensors[index], arrived, strict=True):
            tensor.data = here
        self._resident = index
        if index + 1 < len(self._tensors):
            self._send_for(index + 1)

    def _put_back(self) -> None:
        if self._resident is not None:
            index, self._resident = self._resident, None
            for tensor, host in zip(self._tensors[index], self._host[index], strict=True):
                tensor.data = host

    def _send_for(self, index: int) -> None:
        # Memory is taken on the stream that computes, so that it is reused in that stream's order.
        host = self._host[index]
        into = [torch.empty_like(tensor, device=self._device) for tensor in host]
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._coming = index, into, self._pool.submit(self._copy, into, host)

    def _copy(self, into: Sequence[torch.Tensor], host: Sequence[torch.Tensor]) -> None:
        with torch.cuda.stream(self._side):  # does nothing where there is none
            for there, here in zip(into, host, strict=True):
                there.copy_(here, non_blocking=True)
        if self._side is not None:
            self._side.synchronize()

    def _drop_coming(self) -> None:
        if self._coming is not None:
            self._coming[2].result()
            self._coming = None


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
