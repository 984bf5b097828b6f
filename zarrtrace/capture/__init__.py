"""Running models: exact attention and SAE features, layer by layer.

The only package that imports torch. It yields plain records of :mod:`zarrtrace.spec` and knows
nothing of Zarr. Its module `saes` imports sae-lens, which takes seconds: attention alone does
without it.
"""

from zarrtrace.capture.model import LoadedModel, hide_progress, load_model, renamed
from zarrtrace.capture.pipeline import Request, capture
from zarrtrace.capture.prompts import Prompt, tokenize

__all__ = [
    "LoadedModel",
    "Prompt",
    "Request",
    "capture",
    "hide_progress",
    "load_model",
    "renamed",
    "tokenize",
]
