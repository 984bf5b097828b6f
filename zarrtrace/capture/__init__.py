"""Running models: exact attention and SAE features, layer by layer.

The only package that imports torch. It yields plain records of :mod:`zarrtrace.spec` and knows
nothing of Zarr.
"""

from zarrtrace.capture.model import LoadedModel, load_model, renamed
from zarrtrace.capture.pipeline import Request, capture
from zarrtrace.capture.prompts import Prompt, tokenize
from zarrtrace.capture.saes import FolderSAEs, ReleaseSAEs, SAESource, check_width

__all__ = [
    "FolderSAEs",
    "LoadedModel",
    "Prompt",
    "ReleaseSAEs",
    "Request",
    "SAESource",
    "capture",
    "check_width",
    "load_model",
    "renamed",
    "tokenize",
]
