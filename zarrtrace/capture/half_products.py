"""Encoders whose products a GPU's tensor cores compute: bfloat16 factors, float32 sums.

A product of two bfloat16 numbers is exact in float32, so that only the sums round. Tensor cores cut
off what they cannot hold instead of rounding it; summing a few hundred products at a time, and then
these sums in float32, brings the error below that of a product in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.loading.pretrained_saes_directory import (
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
)

from zarrtrace.capture.encoder import Encoder
from zarrtrace.capture.firing import is_plain
from zarrtrace.errors import ConfigError, SAEError
from zarrtrace.format.attributes import SAEAttributes

if TYPE_CHECKING:
    from zarrtrace.capture.saes import Found, SAESource

#: What :attr:`SAEAttributes.dtype` says of such an encoder.
HALF_PRODUCTS = "bfloat16 products, float32 sums"

# Products that tensor cores sum: of 4,096 at once, active features differ from float64 by 4e-6 of
# their value, of 512 by 4e-7; a product in float32 differs by 6e-7 (medians, one H200).
_SUMMED = 512
# Architectures that encode with one product of inputs and weights.
_ONE_PRODUCT = ("standard", "jumprelu", "topk", "transcoder", "jumprelu_transcoder")


class HalfProducts:
    """A source of SAEs that multiply in bfloat16.

    Parameters
    ----------
    source
        Where they come from.
    device, dtype
        Where and how the model computes whose activations they read.

    Raises
    ------
    ConfigError
        If the model is not on a GPU, is not in bfloat16, or torch is too old.
    """

    def __init__(self, source: SAESource, device: str, dtype: str) -> None:
        self._source = source
        if torch.device(device).type != "cuda":
            raise _useless(
                f"on the device {device}",
                why="The tensor cores of an NVIDIA GPU compute such products.",
                remedy="Give --device cuda, or leave it out.",
            )
        if dtype != "bfloat16":
            raise _useless(
                f"with a model in {dtype}",
                why="Rounded to bfloat16, what the SAEs read would be something else.",
                remedy="Leave it out.",
            )
        if not hasattr(torch.ops.aten.mm, "dtype"):
            raise _useless(
                f"with torch {torch.__version__}",
                why="It cannot add up products of bfloat16 in float32.",
                remedy="Install a newer torch, or leave it out.",
            )

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token."""
        return self._source.prepend_bos

    def available(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of some layers that have an SAE."""
        return self._source.available(layers)

    def stretches(self, saes: Sequence[SAEAttributes]) -> list[tuple[Path, int, int]]:
        """Say which bytes of which files are needed."""
        return self._source.stretches(saes)

    def find(self, layers: Sequence[int]) -> Found:
        """Return the SAEs of each layer.

        Raises
        ------
        SAEError
            If loaded SAEs are not in float32.
        """
        found = self._source.find(layers)
        for sae in (one for of_layer in found.values() for one in of_layer):
            if sae.dtype != "float32":
                raise _refused(sae, f"it computes in {sae.dtype}")
        return {
            layer: tuple(one.model_copy(update={"dtype": HALF_PRODUCTS}) for one in of_layer)
            for layer, of_layer in found.items()
        }

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Load one encoder.

        Raises
        ------
        SAEError
            If its inputs or its weights are no bfloat16 numbers, up to one factor of all weights.
        """
        exact = attributes.model_copy(update={"dtype": "float32"})
        encoder = self._source.load(exact, device)
        encoder.attributes = attributes
        encoder.replace_matrix(lambda sae: HalfMatrix(sae, attributes))
        return encoder


class HalfMatrix:
    """The matrix of an encoder, for the right of ``@``.

    Parameters
    ----------
    sae
        As sae-lens loads it, in float32.
    attributes
        Its description.

    Raises
    ------
    SAEError
        As :meth:`HalfProducts.load`.
    """

    def __init__(self, sae: Any, attributes: SAEAttributes) -> None:
        config = sae.cfg
        if config.architecture() not in _ONE_PRODUCT:
            raise _refused(attributes, f"{config.architecture()} SAEs use their weights otherwise")
        if config.apply_b_dec_to_input or config.normalize_activations != "none":
            raise _refused(attributes, "it subtracts a bias from its inputs, or scales them")
        if not is_plain(sae):
            raise _refused(attributes, "it has hooks, or an encode of its own")
        weights = sae.W_enc.data
        for scale in _scales(attributes):
            halves = (weights / scale).bfloat16()
            if torch.equal(halves.float() * scale, weights):
                break
        else:
            raise _refused(attributes, "its weights are no bfloat16 numbers")
        self.device, self.dtype, self._scale = weights.device, weights.dtype, scale
        self._halves = halves.T.contiguous().T  # a feature's weights side by side
        self.shape = weights.shape

    def __rmatmul__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply inputs ``(token, d_in)``, which are bfloat16 numbers in float32."""
        halves, total = inputs.bfloat16(), None
        for at in range(0, self.shape[0], _SUMMED):
            rows, weights = halves[:, at : at + _SUMMED], self._halves[at : at + _SUMMED]
            if total is None:
                total = torch.mm(rows, weights, out_dtype=torch.float32)
            else:
                total = torch.addmm(total, rows, weights, out_dtype=torch.float32)
        assert total is not None  # noqa: S101 -- an SAE has inputs
        return total if self._scale == 1 else total.mul_(self._scale)


def _scales(attributes: SAEAttributes) -> list[float]:
    """Return by which factors loading may have multiplied an encoder's weights."""
    known = get_pretrained_saes_directory().get(attributes.release or "")
    if known is None or attributes.id not in known.saes_map:
        return [1.0]
    return [1.0, get_norm_scaling_factor(attributes.release, attributes.id) or 1.0]


def _useless(where: str, *, why: str, remedy: str) -> ConfigError:
    return ConfigError(f"--sae-products bfloat16 {where}", why=why, remedy=remedy)


def _refused(attributes: SAEAttributes, why: str) -> SAEError:
    return SAEError(
        f"{attributes.id}: this SAE cannot multiply in bfloat16: {why}",
        why="Rounded to bfloat16, inputs or weights would be others.",
        remedy="Leave out --sae-products bfloat16; with --overwrite, if the run has begun.",
    )
