"""Running models: exact attention and SAE features, layer by layer.

The only package that imports torch. It yields plain records (:mod:`zarrtrace.records`,
:mod:`zarrtrace.format`) and knows nothing of Zarr. Its module `saes` imports sae-lens, which takes
seconds: attention alone does without it.
"""

from zarrtrace.capture.batches import Request, grouped
from zarrtrace.capture.borrow import borrow, refuse_unknown_ids, take_model
from zarrtrace.capture.checks import check_additions, choose_batch_size, wants_blocks
from zarrtrace.capture.encoder_prefetch import keeping
from zarrtrace.capture.fingerprint import settings_fingerprint
from zarrtrace.capture.generation import (
    check_context,
    continuation_text,
    end_of_sequence_ids,
    generate,
    plan_batches,
)
from zarrtrace.capture.generation_probe import probe_generation
from zarrtrace.capture.hooks import parse_hook, residual_hooks
from zarrtrace.capture.limits import CaptureLimits
from zarrtrace.capture.model import (
    LoadedModel,
    gpu_count,
    hide_progress,
    load_model,
    load_tokenizer,
    renamed,
    was_forked_from_gpu,
)
from zarrtrace.capture.pipeline import capture
from zarrtrace.capture.probe import probe_model
from zarrtrace.capture.prompts import Continued, Prompt, tokenize, tokenize_all

__all__ = [
    "CaptureLimits",
    "Continued",
    "LoadedModel",
    "Prompt",
    "Request",
    "borrow",
    "capture",
    "check_additions",
    "check_context",
    "choose_batch_size",
    "continuation_text",
    "end_of_sequence_ids",
    "generate",
    "gpu_count",
    "grouped",
    "hide_progress",
    "keeping",
    "load_model",
    "load_tokenizer",
    "parse_hook",
    "plan_batches",
    "probe_generation",
    "probe_model",
    "refuse_unknown_ids",
    "renamed",
    "residual_hooks",
    "settings_fingerprint",
    "take_model",
    "tokenize",
    "tokenize_all",
    "wants_blocks",
    "was_forked_from_gpu",
]
