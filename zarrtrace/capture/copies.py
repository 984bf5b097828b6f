"""From what a block made of a batch to records, copied while a GPU computes the next batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zarrtrace.capture.batches import Batch
from zarrtrace.capture.features import Encoding, encode, feature_records
from zarrtrace.capture.host import to_host
from zarrtrace.capture.lockstep import BlockState
from zarrtrace.capture.model import DTYPES
from zarrtrace.spec import BFloat16, LayerRecord

if TYPE_CHECKING:
    from zarrtrace.capture.encoder import Encoder

Weights = np.ndarray | BFloat16 | None


@dataclass(frozen=True)
class Made:
    """What a block made of a batch, on the device that did it.

    Attributes
    ----------
    batch, layer
        Whose it is.
    dtype
        Precision of stored attention.
    attention, mean
        ``(sequence, head, query, key)`` and its mean over heads, or None.
    features
        By array name.
    """

    batch: Batch
    layer: int
    dtype: str | None
    attention: torch.Tensor | None
    mean: torch.Tensor | None
    features: dict[str, Encoding]

    @classmethod
    def by(
        cls, batch: Batch, state: BlockState, dtype: str | None, encoders: Sequence[Encoder]
    ) -> Made:
        """Encode the tokens of a batch at once; does not wait for a GPU."""
        attention = state.attention if dtype else None
        with torch.inference_mode():
            mean = None if attention is None else attention.mean(1, dtype=torch.float32)
        features = {
            one.attributes.variable: encode(one, batch.tokens(state.hooks[one.hook.kind]))
            for one in encoders
        }
        return cls(batch, state.layer, dtype, attention, mean, features)

    def records(self) -> list[LayerRecord]:
        """Copy to the host, all prompts together: over a GPU's bus, waiting takes the time."""
        attention = self._attention()
        features = {
            name: feature_records(made, self.batch.lengths) for name, made in self.features.items()
        }
        return [
            LayerRecord(
                scenario=request.prompt.scenario.name,
                layer=self.layer,
                attention=attention[row][0],
                attention_mean=attention[row][1],
                features={name: records[row] for name, records in features.items()},
            )
            for row, request in enumerate(self.batch.requests)
            if self.layer in request.layers
        ]

    @torch.inference_mode()
    def _attention(self) -> list[tuple[Weights, np.ndarray | None]]:
        weights, mean, dtype = self.attention, self.mean, self.dtype
        if weights is None or mean is None or dtype is None:
            return [(None, None)] * len(self.batch.lengths)
        halves = weights.dtype == torch.bfloat16 and dtype == "float32"
        means = to_host(mean)
        moved = to_host(weights.view(torch.int16) if halves else weights.to(DTYPES[dtype]))
        out: list[tuple[Weights, np.ndarray | None]] = []
        for row, request in enumerate(self.batch.requests):
            length = self.batch.lengths[row]
            rows = slice(length) if request.queries is None else list(request.queries)
            here = moved[row, :, :length, :length][:, rows]
            kept = BFloat16(here.view(np.uint16)) if halves else here
            out.append((kept, means[row, :length, :length][rows]))
        return out


class Copies:
    """Makes records of what blocks made: on a GPU one batch late, while it computes the next.

    Parameters
    ----------
    device
        Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: Any = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiting: tuple[Made, Any] | None = None

    def of(self, made: Made) -> Iterator[LayerRecord]:
        """Yield records that are ready: those of what was given before, on a GPU."""
        if self._side is None:
            yield from made.records()
            return
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self._device))
        before, self._waiting = self._waiting, (made, ready)
        yield from self._copied(before)

    def rest(self) -> Iterator[LayerRecord]:
        """Yield the last records."""
        before, self._waiting = self._waiting, None
        yield from self._copied(before)

    def _copied(self, waiting: tuple[Made, Any] | None) -> list[LayerRecord]:
        if waiting is None:
            return []
        made, ready = waiting
        with torch.cuda.stream(self._side):
            self._side.wait_event(ready)
            # All that is read was copied when this returns: its memory may be used again.
            return made.records()
