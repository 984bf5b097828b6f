"""Estimate of disk and memory before a run starts."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zarrtrace.extraction.continuations import expected
from zarrtrace.extraction.job import Job
from zarrtrace.extraction.packages import capture_package
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.format.layout import TraceShape, feature_rows, itemsize, trace_layout
from zarrtrace.format.table_layout import table_layout

if TYPE_CHECKING:
    from zarrtrace.extraction.table import TableJob

# Bytes on disk, fitted to measured stores; schema/README.md has the tables. Attention is taken by
# the precision in which the model computes, per element of the full square.
_ATTENTION = {"float32": 1.85, "bfloat16": 0.8, "float16": 0.95}
_ATTENTION_MEAN = 1.9
# Likewise per value of the residual stream: random ones of Llama-3.1-8B's width, float32 with
# heavy tails. float16, too, if it is stored so.
_RESIDUAL = {"float32": 3.4, "bfloat16": 1.4, "float16": 1.8}
_PER_ACTIVE_FEATURE = 8.5
_PER_INDEXED_FEATURE = 6.5
_PER_NEXT_TOKEN = 70
_PER_TRACE = 100_000
# Next tokens and coordinates of a sample of a table.
_PER_SAMPLE = 90
_ACTIVE_FEATURES = 64
# Python, torch, transformers and sae-lens before the first tensor; buffers of codecs.
_LIBRARIES_BYTES = 900 * 2**20
# The one that a thread compresses and the one that waits, and bytes of an active feature in them.
_RECORDS_HELD, _FEATURE_BYTES = 2, 8


@dataclass(frozen=True)
class Estimate:
    """Disk and memory that a run will need.

    Attributes
    ----------
    tokens
        Tokens by scenario; empty for a table.
    dense_bytes
        Size of all arrays without compression.
    disk_bytes
        Expected size on disk.
    host_bytes, device_bytes
        Expected peaks of memory; `device_bytes` is 0 if the model runs on the CPU.
    """

    tokens: dict[str, int]
    dense_bytes: int
    disk_bytes: int
    host_bytes: int
    device_bytes: int


def estimate(job: Job) -> Estimate:
    """Estimate what a job needs, assuming 64 active features a token.

    Parameters
    ----------
    job
        From :func:`zarrtrace.extraction.prepare`; weights are not needed.
    """
    job = expected(job)
    dense, disk, record, stored = 0, 0.0, 0.0, 0
    layers = max(1, len(job.layers))
    for prompt in job.prompts:
        shape = job.shape(prompt)
        stored = max(stored, shape.rows)
        sizes = {
            name: math.prod(layout.shape) * _itemsize(layout.dtype)
            for name, layout in trace_layout(shape).items()
        }
        dense += sum(sizes.values())
        disk += _on_disk(job, shape)
        most = shape.limits.record_bytes if prompt.scenario.name in job.blocked else math.inf
        held = [size // layers for name, size in sizes.items() if name not in shape.features]
        active = shape.rows * len(shape.features) * _ACTIVE_FEATURES * _FEATURE_BYTES
        record = max(record, sum(min(size, most) for size in held) + active)
    host, device = _memory(job, {len(prompt.tokens.ids) for prompt in job.prompts}, stored)
    return Estimate(
        tokens={prompt.scenario.name: len(prompt.tokens.ids) for prompt in job.prompts},
        dense_bytes=dense,
        disk_bytes=round(disk),
        host_bytes=host + round(_RECORDS_HELD * record),
        device_bytes=device,
    )


def estimate_table(table: TableJob) -> Estimate:
    """Estimate what a table needs, assuming 64 active features a sample.

    Parameters
    ----------
    table
        From :func:`zarrtrace.extraction.table.prepare_table`; weights are not needed.
    """
    job, samples, longest = table.job, table.survey.samples, table.survey.longest
    sizes = {
        name: math.prod(layout.shape) * _itemsize(layout.dtype)
        for name, layout in table_layout(table.shape).items()
    }
    group = min(samples, table.most_samples)
    held = group * (_values_on_disk(job) + len(job.layers) * 4 * (job.channels or 0))
    # The others have any length: also the one whose attention is computed whole and the largest.
    size = itemsize(job.model.attributes.dtype)
    whole = math.isqrt(job.model.limits.whole_bytes // (job.model.n_heads * size))
    host, device = _memory(job, {longest, min(longest, whole)}, longest)
    return Estimate(
        tokens={},
        dense_bytes=sum(sizes.values()),
        disk_bytes=round(samples * (_PER_SAMPLE + _values_on_disk(job))),
        # A group is written while the next one is computed.
        host_bytes=host + round(2 * held),
        device_bytes=device,
    )


def _memory(job: Job, lengths: Collection[int], stored: int) -> tuple[int, int]:
    """Return bytes on host and device for prompts of these lengths."""
    on_device = job.options.device != "cpu"
    weights = _bytes_of(job.model.model)
    if on_device and job.options.low_memory:
        blocks = [_bytes_of(block) for block in job.model.blocks]
        weights += 2 * max(blocks) - sum(blocks)  # the one that computes and the one that comes
    encoder = max((4 * sae.d_in * sae.d_sae for sae in _all(job)), default=0)
    computing = max(_block_bytes(job, tokens, min(tokens, stored)) for tokens in lengths)
    # One encoder in use; the next is loaded whole, with its decoder.
    needed = weights + 3 * encoder + computing
    if on_device:
        return _LIBRARIES_BYTES, needed
    return _LIBRARIES_BYTES + needed, 0


def _bytes_of(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _on_disk(job: Job, shape: TraceShape) -> float:
    layers, stored = len(job.layers), shape.rows
    size = float(_PER_TRACE + _PER_NEXT_TOKEN * stored)
    if job.attention_dtype is not None:
        computed = job.model.attributes.dtype
        precision = "float16" if job.attention_dtype == "float16" else computed
        per_head = _ATTENTION[precision] * job.model.n_heads
        rows = stored if shape.attention_positions is None else shape.attention_positions
        size += layers * rows * shape.tokens * (per_head + _ATTENTION_MEAN)
    indexed = sum(min(32, sae.d_sae) for sae in _all(job))
    return size + stored * (indexed * _PER_INDEXED_FEATURE + _values_on_disk(job))


def _values_on_disk(job: Job) -> float:
    """Return bytes of features and residual stream of one token."""
    size = 0.0
    if job.channels is not None:
        computed = job.model.attributes.dtype
        half = job.options.residual_dtype == "float16" and computed == "float32"
        each = _RESIDUAL["float16" if half else computed]
        size += len(job.residual) * job.channels * each
    active = sum(min(_ACTIVE_FEATURES, sae.d_sae) for sae in _all(job))
    return size + active * _PER_ACTIVE_FEATURE


def _block_bytes(job: Job, tokens: int, stored: int) -> int:
    """Activations of one decoder block of one batch: attention some times over, features twice."""
    model, batch = job.model, job.batch_size
    size = itemsize(model.attributes.dtype)
    widest = max((sae.d_sae for sae in _all(job)), default=0)
    attention = 3 * model.n_heads * batch * tokens**2 * size
    if capture_package().wants_blocks(model, tokens, mode=job.options.attention_capture):
        batch, limits = 1, model.limits
        on_cpu = job.options.device == "cpu"
        scores = limits.block_bytes if on_cpu else limits.gpu_block_bytes
        of_row = 4 * model.n_heads * tokens
        attention = 4 * min(max(scores, of_row * limits.block_rows), of_row * tokens)
    # Features of a prompt alone are cut as records are.
    encoded = stored * batch if batch > 1 or not widest else feature_rows(stored, widest)
    return attention + 2 * 4 * encoded * widest + 16 * batch * tokens * model.d_model * size


def _all(job: Job) -> list[SAEAttributes]:
    return [sae for found in job.saes.values() for sae in found]


def _itemsize(dtype: str) -> int:
    known = {"float16": 2, "float32": 4, "uint32": 4, "int64": 8}
    return known.get(dtype, 8)
