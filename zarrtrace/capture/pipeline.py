"""From prompts to records: batches through the model in step, each SAE loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from zarrtrace.capture.hooks import parse_hook
from zarrtrace.capture.lockstep import BlockState, Pass, taps
from zarrtrace.capture.model import DTYPES, LoadedModel
from zarrtrace.capture.prompts import Prompt
from zarrtrace.errors import ModelError
from zarrtrace.spec import (
    NEXT_TOKENS,
    TOP_FEATURES,
    FeatureRecord,
    LayerRecord,
    SAEAttributes,
    TokensRecord,
)

if TYPE_CHECKING:
    from zarrtrace.capture.saes import Encoder, SAESource

# What all batches of a wave may hold between two blocks. A wave walks through the layers once, so
# SAEs are loaded once a wave; on any but huge runs there is one.
_WAVE_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
_LOGIT_ROWS = 256


@dataclass(frozen=True)
class Request:
    """What is still wanted of one prompt.

    Attributes
    ----------
    prompt
        The tokenised scenario.
    layers
        Layers whose records are wanted.
    next_token
        Whether its most likely continuations are wanted.
    """

    prompt: Prompt
    layers: frozenset[int]
    next_token: bool

    @property
    def done(self) -> bool:
        """Whether nothing is wanted."""
        return not self.layers and not self.next_token


def capture(
    model: LoadedModel,
    requests: Sequence[Request],
    *,
    attention_dtype: str | None,
    saes: Mapping[int, SAEAttributes] | None = None,
    source: SAESource | None = None,
    batch_size: int = 1,
) -> Iterator[LayerRecord | TokensRecord]:
    """Run the model over prompts and yield what each block does, layer by layer.

    Parameters
    ----------
    model
        From :func:`zarrtrace.capture.load_model`.
    requests
        All scenarios of the run, done or not: batches are made of all, so that a resumed run
        computes with the same batches as an uninterrupted one.
    attention_dtype
        ``"float32"`` or ``"float16"``; None for no attention.
    saes, source
        The SAE of each layer that has one, and where to load it from; None for no features.
    batch_size
        Scenarios of similar length in one forward pass.

    Yields
    ------
    LayerRecord, TokensRecord
        All scenarios of a layer, then the next layer; at the end the continuations.

    Raises
    ------
    ModelError, SAEError
        If the model or an SAE does not do what it should.
    """
    saes = saes or {}
    kinds = frozenset(parse_hook(attributes.hook_name).kind for attributes in saes.values())
    batches = [batch for batch in _batches(model, requests, batch_size) if not batch.done]
    waves = list(_waves(model, batches))
    with (
        taps(model, attention=attention_dtype is not None, kinds=kinds),
        _Encoders(saes, source, model.device, _load_order(waves, saes)) as encoders,
    ):
        for wave in waves:
            yield from _run_wave(model, wave, attention_dtype, encoders)


# --- batches and waves -------------------------------------------------------------------------


class _Batch:
    """Prompts that go through the model together, padded on the right."""

    def __init__(self, model: LoadedModel, requests: Sequence[Request]) -> None:
        self._model = model
        self.requests = requests
        self.lengths = [len(request.prompt.tokens.ids) for request in requests]
        self.layers = frozenset[int]().union(*(request.layers for request in requests))
        self.next_token = any(request.next_token for request in requests)
        self.done = all(request.done for request in requests)
        self.rows = len(requests) * max(self.lengths)
        self._pass: Pass | None = None
        self._mask = torch.empty(0)

    def start(self) -> None:
        """Put the batch on the device."""
        shape = (len(self.requests), max(self.lengths))
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, request in enumerate(self.requests):
            ids[row, : self.lengths[row]] = torch.tensor(request.prompt.tokens.ids)
            mask[row, : self.lengths[row]] = 1
        device = self._model.device
        self._mask = mask.to(device)
        self._pass = Pass(self._model, ids.to(device), self._mask)

    def advance(self) -> BlockState | torch.Tensor:
        """Go on to the end of the next block, or to the logits."""
        if self._pass is None:
            self.start()
        assert self._pass is not None  # noqa: S101 -- start() made it
        return self._pass.advance()

    def stop(self) -> None:
        """End the pass where it is."""
        if self._pass is not None:
            self._pass.stop()
            self._pass = None

    def tokens(self, padded: torch.Tensor) -> torch.Tensor:
        """Take the real tokens ``(token, d)`` of ``(sequence, token, d)``."""
        return padded[0] if len(self.requests) == 1 else padded[self._mask.bool()]


def _batches(model: LoadedModel, requests: Sequence[Request], batch_size: int) -> Iterator[_Batch]:
    """Group scenarios of similar length; what is together depends on nothing but the suite."""
    if batch_size == 1:
        order = list(requests)
    else:
        order = sorted(requests, key=lambda request: len(request.prompt.tokens.ids))
    for start in range(0, len(order), batch_size):
        yield _Batch(model, order[start : start + batch_size])


def _waves(model: LoadedModel, batches: Sequence[_Batch]) -> Iterator[list[_Batch]]:
    """Cut the batches into groups whose residual streams and masks fit the budget."""
    itemsize = torch.empty(0, dtype=model.model.dtype).element_size()
    budget = _WAVE_BYTES.get(model.device.type, _WAVE_BYTES["cpu"])
    wave: list[_Batch] = []
    held = 0
    for batch in batches:
        cost = batch.rows * (2 * model.d_model + max(batch.lengths)) * itemsize
        if wave and held + cost > budget:
            yield wave
            wave, held = [], 0
        wave.append(batch)
        held += cost
    if wave:
        yield wave


def _load_order(
    waves: Sequence[Sequence[_Batch]], saes: Mapping[int, SAEAttributes]
) -> list[SAEAttributes]:
    order = []
    for wave in waves:
        wanted = frozenset[int]().union(*(batch.layers for batch in wave))
        order += [saes[layer] for layer in sorted(wanted) if layer in saes]
    return order


class _Encoders:
    """Load encoders in a known order, the next one while this one computes."""

    def __init__(
        self,
        saes: Mapping[int, SAEAttributes],
        source: SAESource | None,
        device: torch.device,
        order: Sequence[SAEAttributes],
    ) -> None:
        self._saes, self._source, self._device = saes, source, device
        self._order = iter(order)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zarrtrace-sae")
        self._next: Future[Encoder] | None = None

    def __enter__(self) -> Self:
        self._prefetch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _prefetch(self) -> None:
        attributes = next(self._order, None)
        source = self._source
        self._next = (
            None
            if attributes is None or source is None
            else self._pool.submit(source.load, attributes, self._device)
        )

    def take(self, layer: int) -> Encoder | None:
        """Return the encoder of the next layer in order; None if `layer` has none."""
        if layer not in self._saes or self._next is None:
            return None
        encoder = self._next.result()
        self._prefetch()
        return encoder


# --- one wave ----------------------------------------------------------------------------------


def _run_wave(
    model: LoadedModel,
    wave: Sequence[_Batch],
    attention_dtype: str | None,
    encoders: _Encoders,
) -> Iterator[LayerRecord | TokensRecord]:
    wanted = frozenset[int]().union(*(batch.layers for batch in wave))
    active = list(wave)
    try:
        for layer in range(len(model.blocks)):
            encoder = encoders.take(layer) if layer in wanted else None
            for batch in active:
                yield from _layer_records(model, batch, layer, attention_dtype, encoder)
                if not batch.next_token and layer == max(batch.layers):
                    batch.stop()
            active = [batch for batch in active if batch.next_token or layer < max(batch.layers)]
        for batch in active:
            yield from _tokens_records(batch)
    finally:
        for batch in wave:
            batch.stop()


# Lists and not generators: inference mode must not leak to whoever consumes the records.
@torch.inference_mode()
def _layer_records(
    model: LoadedModel,
    batch: _Batch,
    layer: int,
    attention_dtype: str | None,
    encoder: Encoder | None,
) -> list[LayerRecord]:
    """Let a batch go through one block and record what it did."""
    state = batch.advance()
    if not isinstance(state, BlockState) or state.layer != layer:
        raise ModelError(
            f"{model.attributes.id}: its blocks do not run in order",
            why=f"Block {layer} was expected to run next.",
            remedy="This architecture cannot be captured exactly; choose another.",
        )
    if layer not in batch.layers:
        return []
    features: list[FeatureRecord] = []
    if encoder is not None:
        encoded = encoder(batch.tokens(state.hooks[encoder.hook.kind]))
        features = [_feature_record(part) for part in torch.split(encoded, batch.lengths)]
    records = []
    for row, request in enumerate(batch.requests):
        if layer not in request.layers:
            continue
        attention = mean = None
        if attention_dtype is not None and state.attention is not None:
            length = batch.lengths[row]
            weights = state.attention[row, :, :length, :length]
            attention = _to_numpy(weights.to(DTYPES[attention_dtype]))
            mean = _to_numpy(weights.mean(0, dtype=torch.float32))
        records.append(
            LayerRecord(
                scenario=request.prompt.scenario.name,
                layer=layer,
                attention=attention,
                attention_mean=mean,
                features={"features": features[row]} if features else {},
            )
        )
    return records


def _feature_record(activations: torch.Tensor) -> FeatureRecord:
    """Index the strongest features of each token; where fewer fire, the index is 0."""
    top = activations.topk(min(TOP_FEATURES, activations.shape[-1]))
    return FeatureRecord(
        activations=_to_numpy(activations),
        top_feature=_to_numpy(top.indices.where(top.values > 0, 0).int()).astype(np.uint32),
        top_activation=_to_numpy(top.values.float()),
    )


@torch.inference_mode()
def _tokens_records(batch: _Batch) -> list[TokensRecord]:
    """Let a batch go to its end and record what the model would say next."""
    logits = batch.advance()
    assert isinstance(logits, torch.Tensor)  # noqa: S101 -- no block is left
    records = []
    for row, request in enumerate(batch.requests):
        if not request.next_token:
            continue
        ids, logprobs = [], []
        for part in torch.split(logits[row, : batch.lengths[row]], _LOGIT_ROWS):
            top = part.float().log_softmax(-1).topk(NEXT_TOKENS)
            ids.append(_to_numpy(top.indices.int()).astype(np.uint32))
            logprobs.append(_to_numpy(top.values))
        records.append(
            TokensRecord(
                scenario=request.prompt.scenario.name,
                next_token=np.concatenate(ids),
                next_token_logprob=np.concatenate(logprobs),
            )
        )
    return records


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array
