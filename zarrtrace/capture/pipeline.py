"""From prompts to records: batches through the model in step, each SAE loaded once."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from zarrtrace.capture.batches import Batch, Request, batches, goes_in_several_waves, waves
from zarrtrace.capture.blocked import AttentionRows
from zarrtrace.capture.copies import BlockOutput, Copies
from zarrtrace.capture.encoder_prefetch import Encoders, keeping
from zarrtrace.capture.hooks import parse_hook
from zarrtrace.capture.host import to_host
from zarrtrace.capture.lockstep import BlockState, Logits, taps
from zarrtrace.capture.messages import full_memory
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.rows import RowBuffer
from zarrtrace.capture.token_texts import TokenTexts
from zarrtrace.errors import ModelError
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.format.layout import (
    NEXT_TOKENS,
    Limits,
    attention_rows,
    feature_rows,
    residual_rows,
)
from zarrtrace.layer_batches import LayerBatch
from zarrtrace.records import LayerRecord, TokensRecord

if TYPE_CHECKING:
    from zarrtrace.capture.encoder import Encoder
    from zarrtrace.capture.saes import SAESource

Captured = LayerBatch | LayerRecord | TokensRecord

# Rows of logits whose probabilities are computed at once, unless one prompt has more.
_LOGIT_ROWS = 64


def capture(
    model: LoadedModel,
    requests: Sequence[Request],
    *,
    attention_dtype: str | None,
    saes: Mapping[int, Sequence[SAEAttributes]] | None = None,
    source: SAESource | None = None,
    residual: Mapping[int, str] | None = None,
    batch_size: int = 1,
) -> Generator[Captured, None, None]:
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
        The SAEs of each layer that has some, and where to load them from; None for no features.
    residual
        The hook points of the residual stream that is stored, by layer; None for none.
    batch_size
        Scenarios of similar length in one forward pass.

    Yields
    ------
    LayerBatch, LayerRecord, TokensRecord
        As many scenarios as go in step: their first layer, batch by batch, then the next layer; at
        the end their continuations. A layer whose arrays are large comes in several records, each
        of which fills whole shards.

    Raises
    ------
    ModelError, SAEError
        If the model or an SAE does not do what it should.
    """
    saes, residual = saes or {}, residual or {}
    hooks = {layer: [attributes.hook_name for attributes in of] for layer, of in saes.items()}
    for layer, hook in residual.items():
        hooks.setdefault(layer, []).append(hook)
    kinds = {layer: frozenset(parse_hook(hook).kind for hook in of) for layer, of in hooks.items()}
    streams = {layer: parse_hook(hook).kind for layer, hook in residual.items()}
    wanted = attention_dtype is not None
    made = batches(model, requests, batch_size, attention=wanted)
    todo = [batch for batch in made if not batch.done]
    every = [sae for found in saes.values() for sae in found]
    if source is not None and goes_in_several_waves(model, todo):
        source = keeping(source)
    in_step: deque[list[Batch]] = deque()

    def order() -> Iterator[list[int]]:
        """Yield layers whose encoders are needed next; an encoder is loaded before its turn."""
        for wave in waves(model, todo, every, source):
            in_step.append(wave)
            yield [layer for layer in sorted(_layers(wave)) if layer in saes]

    with (
        full_memory(model.attributes.id, model.device),
        taps(model, attention=wanted, kinds=kinds),
        Encoders(saes, source, model.device, order()) as encoders,
    ):
        while in_step:
            yield from _run_wave(model, in_step.popleft(), attention_dtype, encoders, streams)


def _layers(wave: Sequence[Batch]) -> frozenset[int]:
    return frozenset[int]().union(*(batch.layers for batch in wave))


def _run_wave(
    model: LoadedModel,
    wave: Sequence[Batch],
    attention_dtype: str | None,
    encoders: Encoders,
    streams: Mapping[int, str],
) -> Iterator[Captured]:
    """Let batches go in step; `streams` says by layer the kind of residual stream to store."""
    wanted, copies = _layers(wave), Copies(model.device)
    active = list(wave)
    try:
        for layer in range(len(model.blocks)):
            here = encoders.take(layer) if layer in wanted else []
            stream = streams.get(layer)
            for batch in active:
                yield from _through_block(
                    model, batch, layer, attention_dtype, here, stream, copies
                )
                if not batch.next_token and layer == max(batch.layers):
                    batch.stop()
            active = [batch for batch in active if batch.next_token or layer < max(batch.layers)]
        yield from copies.rest()
        for batch in active:
            yield from _tokens_records(batch, model.texts)
            batch.stop()  # it holds the logits
    finally:
        for batch in wave:
            batch.stop()


def _through_block(
    model: LoadedModel,
    batch: Batch,
    layer: int,
    attention_dtype: str | None,
    encoders: Sequence[Encoder],
    stream: str | None,
    copies: Copies,
) -> Iterator[LayerBatch | LayerRecord]:
    """Let a batch go through one block and yield what it did."""
    buffer = None
    while True:
        # Inference mode must not leak to the consumer of the records.
        with torch.inference_mode():
            step = batch.advance()
        if not isinstance(step, AttentionRows):
            break
        if attention_dtype is None:
            continue
        request = batch.requests[0]
        if buffer is None:
            rows = attention_rows(
                request.length, model.n_heads, attention_dtype, model.limits.layout
            )
            buffer = RowBuffer(
                model.n_heads, request.length, rows, request.attention_positions, attention_dtype
            )
        for start, weights, mean in buffer.add(step):
            yield LayerRecord(
                scenario=request.prompt.scenario.name,
                layer=layer,
                start=start,
                attention=weights,
                attention_mean=mean,
            )
    if not isinstance(step, BlockState) or step.layer != layer:
        raise ModelError(
            f"{model.attributes.id}: its blocks do not run in order",
            why=f"Block {layer} was expected to run next.",
            remedy="This architecture cannot be captured exactly; choose another.",
        )
    tokens = max(batch.lengths)
    if step.attention is not None and step.attention.shape[2:] != (tokens, tokens):
        raise ModelError(
            f"{model.attributes.id}: attention of layer {layer} is no matrix over {tokens} tokens",
            why=f"Its shape is {tuple(step.attention.shape)}: prompts of this length are computed "
            "in another way than short ones.",
            remedy="Choose another architecture, or shorter prompts.",
        )
    if layer in batch.layers:
        limits = model.limits.layout
        hidden = batch.tokens(step.hooks[stream], model.width(stream)) if stream else None
        yield from _block_records(batch, step, attention_dtype, encoders, hidden, copies, limits)
    step.clear()


def _block_records(
    batch: Batch,
    state: BlockState,
    attention_dtype: str | None,
    encoders: Sequence[Encoder],
    hidden: torch.Tensor | None,
    copies: Copies,
    limits: Limits,
) -> Iterator[LayerBatch | LayerRecord]:
    """Yield what a block did: features and residual some rows at a time if they are large.

    `hidden` is the residual stream to store ``(token, channel)``.
    """
    stored = max(batch.rows)
    large = [e for e in encoders if stored > feature_rows(stored, e.attributes.d_sae, limits)]
    if len(batch.requests) > 1:
        large = []
    whole = [encoder for encoder in encoders if encoder not in large]
    cut = None
    if hidden is not None and len(batch.requests) == 1:
        rows = residual_rows(stored, hidden.shape[1], limits)
        if stored > rows:
            cut, hidden = BlockOutput.parts(batch, state.layer, rows, hidden, None), None
    yield from copies.of(BlockOutput.by(batch, state, attention_dtype, whole, hidden))
    for part in cut or ():
        yield from copies.of(part)
    for encoder in large:
        rows = feature_rows(stored, encoder.attributes.d_sae, limits)
        inputs = batch.tokens(state.hooks[encoder.hook.kind], encoder.attributes.d_in)
        for part in BlockOutput.parts(batch, state.layer, rows, inputs, encoder):
            yield from copies.of(part)


def _tokens_records(batch: Batch, texts: TokenTexts) -> list[TokensRecord]:
    """Let a batch go to its end and record what the model would say next."""
    ids: list[list[np.ndarray]] = [[] for _ in batch.requests]
    logprobs: list[list[np.ndarray]] = [[] for _ in batch.requests]
    done = 0
    while done < max(batch.rows):
        with torch.inference_mode():
            step = batch.advance()
            assert isinstance(step, Logits)  # noqa: S101 -- no block is left
            # Prompts of few rows are done together: a GPU is waited for each time.
            together = max(1, _LOGIT_ROWS // step.values.shape[1])
            for first in range(0, len(batch.rows), together):
                left = [stored - step.start for stored in batch.rows[first : first + together]]
                values = step.values[first : first + together, : max(0, *left)]
                top = values.float().log_softmax(-1).topk(NEXT_TOKENS)
                found = to_host(top.indices.int()).astype(np.uint32), to_host(top.values)
                for number, rows in enumerate(left):
                    ids[first + number].append(found[0][number, : max(0, rows)])
                    logprobs[first + number].append(found[1][number, : max(0, rows)])
            done = step.start + step.values.shape[1]
    records = []
    for row, request in enumerate(batch.requests):
        if request.next_token:
            token, name = np.concatenate(ids[row]), request.prompt.scenario.name
            logprob = np.concatenate(logprobs[row])
            records.append(TokensRecord(name, token, logprob, texts.of(token)))
    return records
