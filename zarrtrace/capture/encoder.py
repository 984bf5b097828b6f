"""The encoder half of a sparse autoencoder, whole or some features at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from torch import nn

from zarrtrace.capture.firing import (
    FiringFeatures,
    FiringOnGPU,
    has_thresholds,
    is_plain,
    some_features,
)
from zarrtrace.capture.hooks import HookPoint, parse_hook
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.format.layout import feature_columns

#: Encodes a block of features: positions ``token * columns + feature`` of those that fire, and
#: their activations.
Tile = Callable[[], tuple[np.ndarray, np.ndarray]]

# Architectures in which what a feature does depends on no other, and which parameters are a
# feature's own, by their last dimension.
_EACH_ALONE = ("standard", "jumprelu", "gated", "transcoder", "jumprelu_transcoder")
_OF_FEATURES = ("W_enc", "b_enc", "threshold", "b_gate", "r_mag", "b_mag")


class Encoder:
    """The encoder half of one SAE.

    Parameters
    ----------
    sae
        As sae-lens loads it; its decoder is dropped.
    attributes
        Description of the SAE that traces store.
    """

    def __init__(self, sae: Any, attributes: SAEAttributes) -> None:
        self.attributes = attributes
        #: Features of a tile, as many as a chunk holds.
        self.columns = feature_columns(attributes.d_sae)
        self.hook: HookPoint = parse_hook(attributes.hook_name)
        self._sae = sae
        self._parts: list[Callable[[torch.Tensor], tuple[np.ndarray, np.ndarray]]] = []
        self._on_gpu: FiringOnGPU | None = None
        # What parts share: done once.
        self._prepare: Callable[[torch.Tensor], torch.Tensor] = nn.Identity()
        if self.hook.kind == "hook_z":
            sae.turn_off_forward_pass_hook_z_reshaping()  # heads come side by side already
        if not needs_decoder(sae):  # half of the SAE
            sae.W_dec = nn.Parameter(torch.empty(0, device=sae.W_enc.device))

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """Encode ``(token, d_in)`` to ``(token, d_sae)``."""
        encoded: torch.Tensor = self._sae.encode(activations)
        return encoded

    def replace_matrix(self, other: Callable[[Any], Any]) -> None:
        """Let the SAE multiply with another object than its matrix, made of the SAE."""
        matrix = other(self._sae)
        del self._sae.W_enc
        self._sae.W_enc = matrix

    def split(self) -> None:
        """Get ready to encode some features at a time, where no feature depends on another.

        Each part has its weights side by side: the processor multiplies them faster. One that is
        ready, kept from an earlier wave, stays as it is.
        """
        width, columns = self.attributes.d_sae, self.columns
        if self._parts or width <= columns or not _is_each_alone(self._sae):
            return
        for parameter in self._sae.parameters():
            if parameter.ndim == 1:  # a view of its file holds all of that in memory
                parameter.data = parameter.data.clone()
        starts = range(0, width, columns)
        if has_thresholds(self._sae):
            self._parts = [FiringFeatures(self._sae, at, columns) for at in starts]
            self._prepare = self._sae.process_sae_in
            self._sae.W_enc = nn.Parameter(torch.empty(0))  # it has been copied
        else:
            self._parts = [partial(_encode, self._part(at), columns) for at in starts]
            self._sae = None

    def _part(self, start: int) -> Any:
        """Return an SAE of some of the features."""
        taken = {id(tensor): tensor for tensor in (*self._sae.parameters(), *self._sae.buffers())}
        for name, value in self._sae.named_parameters():
            if name in _OF_FEATURES:
                some = some_features(value, start, self.columns)
                taken[id(value)] = nn.Parameter(some, requires_grad=False)
        return copied(self._sae, taken)

    def firing(
        self, activations: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Encode on a GPU as :class:`FiringOnGPU` does, ``(token, d_in)``."""
        if has_thresholds(self._sae):
            self._on_gpu = self._on_gpu or FiringOnGPU(self._sae)
            return self._on_gpu(activations)
        encoded = self(activations)
        return encoded != 0, lambda at: encoded.reshape(-1)[at].float()

    def tiles(self, activations: torch.Tensor) -> list[Tile]:
        """Return what encodes ``(token, d_in)`` some features at a time, in any thread.

        Each encodes as many features as a chunk holds, the last one fewer.
        Without :meth:`split`, all are encoded here.
        """
        if self._parts:
            given = self._prepare(activations)
            return [partial(part, given) for part in self._parts]
        whole = torch.split(self(activations), self.columns, dim=1)
        return [partial(_nonzero, one, self.columns) for one in whole]


def _encode(sae: Any, columns: int, activations: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return _nonzero(sae.encode(activations), columns)


def _nonzero(block: torch.Tensor, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Find non-zero values of a block: NumPy does it ten times as fast as torch."""
    flat = block.float().contiguous().numpy().reshape(-1)
    at = np.flatnonzero(flat != 0)
    width = block.shape[1]
    return (at + at // width * (columns - width) if width < columns else at), flat[at]


def _is_each_alone(sae: Any) -> bool:
    """Whether no feature of an SAE depends on another: not so where a user's code may see all."""
    known = sae.cfg.architecture() in _EACH_ALONE and type(sae.activation_fn) is nn.ReLU
    return known and is_plain(sae)


def needs_decoder(sae: Any) -> bool:
    """Whether an SAE encodes with its decoder, or a user's code in it may."""
    scales = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    with_decoder = sae.cfg.architecture() in ("matching_pursuit", "temporal")
    return bool(scales) or with_decoder or not is_plain(sae)


def copied(sae: Any, memo: dict[int, Any]) -> Any:
    """Copy an SAE, but for the tensors in `memo`, so that the two share no state.

    sae-lens scales inputs in functions that close over the SAE and set its attributes, by which
    ``decode`` scales back; a deep copy has the same functions.
    """
    own = copy.deepcopy(sae, memo)
    for name, value in vars(own).items():
        if isinstance(value, FunctionType) and value.__module__ == SAE.__module__:
            vars(own)[name] = _closing_over(own, value)
    return own


def _closing_over(sae: Any, function: FunctionType) -> FunctionType:
    """Return a function that reads and sets attributes of this SAE instead of another one."""
    cells = tuple(
        CellType(sae) if isinstance(cell.cell_contents, SAE) else cell
        for cell in function.__closure__ or ()
    )
    rest = function.__globals__, function.__name__, function.__defaults__, cells or None
    return FunctionType(function.__code__, *rest)
