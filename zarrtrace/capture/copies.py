"""Outputs of blocks, copied to the host while a GPU computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zarrtrace.capture.batches import Batch
from zarrtrace.capture.features import Encoding, encode
from zarrtrace.capture.host import begin_copy, to_host
from zarrtrace.capture.lockstep import BlockState
from zarrtrace.capture.refusals import DTYPES
from zarrtrace.layer_batches import LayerBatch, SparseFeatures
from zarrtrace.records import BFloat16, LayerRecord

if TYPE_CHECKING:
    from zarrtrace.capture.encoder import Encoder

# Copies on their way at once, where they hold no attention: a GPU has work for the milliseconds
# in which other threads hold Python's lock.
_LATE = 4


@dataclass(frozen=True)
class BlockOutput:
    """The output of a block for a batch, on its device.

    Attributes
    ----------
    batch, layer
        Whose it is.
    attention, mean
        ``(sequence, head, query, key)`` of the wanted rows, bfloat16 as int16, and its mean over
        heads; or None.
    inputs
        Inputs of encoders, with the encoders ``(token, d_in)``, by array name.
    residual
        ``(token, channel)``, bfloat16 as int16, or None.
    start
        Number of the first row, where these are some rows of one prompt; None for all of the batch.
    """

    batch: Batch
    layer: int
    attention: torch.Tensor | None
    mean: torch.Tensor | None
    inputs: Mapping[str, tuple[Encoder, torch.Tensor]]
    residual: torch.Tensor | None = None
    start: int | None = None

    @classmethod
    def by(
        cls,
        batch: Batch,
        state: BlockState,
        dtype: str | None,
        encoders: Sequence[Encoder],
        residual: torch.Tensor | None = None,
    ) -> BlockOutput:
        """Take what is wanted of a block; `dtype` is the precision of stored attention."""
        attention, mean = state.attention if dtype else None, None
        with torch.inference_mode():
            if attention is not None and dtype is not None:
                # The mean of some rows alone is added up in another order: it rounds differently.
                mean = attention.mean(1, dtype=torch.float32)
                if batch.attention_rows is not None:
                    mean = _taken_rows(mean[:, None], batch.attention_rows)[:, 0]
                    attention = _taken_rows(attention, batch.attention_rows)
                halves = attention.dtype == torch.bfloat16 and dtype == "float32"
                attention = attention.view(torch.int16) if halves else attention.to(DTYPES[dtype])
            inputs = {
                one.attributes.variable: (
                    one,
                    batch.tokens(state.hooks[one.hook.kind], one.attributes.d_in),
                )
                for one in encoders
            }
        return cls(batch, state.layer, attention, mean, inputs, _own(residual))

    @classmethod
    def parts(
        cls, batch: Batch, layer: int, rows: int, hidden: torch.Tensor, encoder: Encoder | None
    ) -> Iterator[BlockOutput]:
        """Cut inputs of an encoder, or else a residual stream, of one prompt into so many rows."""
        for start in range(0, len(hidden), rows):
            some = hidden[start : start + rows]
            if encoder is None:
                yield cls(batch, layer, None, None, {}, _own(some), start)
            else:
                inputs = {encoder.attributes.variable: (encoder, some)}
                yield cls(batch, layer, None, None, inputs, start=start)

    def on_host(self) -> LayerBatch | LayerRecord:
        """Encode the tokens of a batch together, and bring all to the host."""
        return self.of(
            None if self.attention is None else to_host(self.attention),
            None if self.mean is None else to_host(self.mean),
            {name: encode(*inputs) for name, inputs in self.inputs.items()},
            None if self.residual is None else to_host(self.residual),
        )

    def of(
        self,
        attention: np.ndarray | None,
        mean: np.ndarray | None,
        features: Mapping[str, SparseFeatures],
        residual: np.ndarray | None,
    ) -> LayerBatch | LayerRecord:
        """Return the record of what was brought to the host."""
        requests = self.batch.requests
        if self.start is not None:
            return LayerRecord(
                scenario=requests[0].prompt.scenario.name,
                layer=self.layer,
                start=self.start,
                features={name: found.record() for name, found in features.items()},
                residual=None if residual is None else _with_halves(residual),
            )
        return LayerBatch(
            self.layer,
            self.batch.members,
            [at for at, one in enumerate(requests) if self.layer in one.layers],
            None if attention is None else _with_halves(attention),
            mean,
            features,
            None if residual is None else _with_halves(residual),
        )


def _taken_rows(attention: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Take rows ``(sequence, row)`` of ``(sequence, head, query, key)``."""
    at = rows[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3])
    return attention.gather(2, at)


@torch.inference_mode()
def _own(hidden: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy, bfloat16 as int16: the model may change what it passes on."""
    if hidden is None:
        return None
    copied = hidden.clone()
    return copied.view(torch.int16) if copied.dtype == torch.bfloat16 else copied


def _with_halves(array: np.ndarray) -> np.ndarray | BFloat16:
    """Return an array of the host's in which bfloat16 is int16."""
    return BFloat16(array.view(np.uint16)) if array.dtype == np.int16 else array


class Copies:
    """Brings what blocks made to the host: on a GPU some batches late, while it computes others.

    Nothing here waits for the GPU but the end of a copy that began some batches ago.

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
        self._waiting: deque[Copy] = deque()
        self._most: dict[str, float] = {}

    def of(self, made: BlockOutput) -> Iterator[LayerBatch | LayerRecord]:
        """Yield what has arrived: on a GPU, what was given some batches before."""
        if self._side is None:
            yield made.on_host()
            return
        self._waiting.append(Copy(made, self._side, self._most))
        # Until they have arrived, the device holds attention, which is large, and the SAEs.
        late = _LATE if made.attention is None else 1
        while len(self._waiting) > late or self._waiting[0].layer != made.layer:
            yield self._waiting.popleft().arrived(self._most)

    def rest(self) -> Iterator[LayerBatch | LayerRecord]:
        """Yield what is still on its way."""
        while self._waiting:
            yield self._waiting.popleft().arrived(self._most)


class Copy:
    """The output of a block for a batch, on its way to the host.

    Parameters
    ----------
    made
        Output to copy.
    side
        The stream that copies.
    most
        By array name, most non-zero features of any token.
    """

    @torch.inference_mode()
    def __init__(self, made: BlockOutput, side: Any, most: Mapping[str, float]) -> None:
        self._made, self.layer = made, made.layer
        # To wait for it does not keep a core busy: those that write have none too many.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._features = {
            name: Encoding(*inputs, most.get(name)) for name, inputs in made.inputs.items()
        }
        side.wait_stream(torch.cuda.current_stream(made.batch.device))
        with torch.cuda.stream(side):
            self._attention = None if made.attention is None else begin_copy(made.attention)
            self._mean = None if made.mean is None else begin_copy(made.mean)
            self._residual = None if made.residual is None else begin_copy(made.residual)
            for encoding in self._features.values():
                encoding.begin()
            self._done.record(side)

    def arrived(self, most: dict[str, float]) -> LayerBatch | LayerRecord:
        """Wait for the copy; note the most non-zero features in `most`."""
        self._done.synchronize()
        features = {name: encoding.arrived() for name, encoding in self._features.items()}
        for name, found in features.items():
            active = sum(map(len, found.nonzeros.at)) / max(1, len(found.is_finite))
            most[name] = max(most.get(name, 0.0), active)
        attention, mean, residual = (
            None if one is None else one.numpy()
            for one in (self._attention, self._mean, self._residual)
        )
        return self._made.of(attention, mean, features, residual)
