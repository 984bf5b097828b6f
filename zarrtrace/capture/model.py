"""Loading a language model, and its sizes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from zarrtrace.capture.fingerprint import model_fingerprint
from zarrtrace.capture.limits import DEFAULT_CAPTURE_LIMITS, CaptureLimits
from zarrtrace.capture.messages import LOADING_ERRORS, forward_errors, load_error
from zarrtrace.capture.modules import Decoder, find_decoder, not_exact
from zarrtrace.capture.refusals import DTYPES, refuse_dtype, refuse_encoder_decoder
from zarrtrace.capture.streaming import BlockStream
from zarrtrace.capture.token_texts import TokenTexts, special_ids
from zarrtrace.errors import ConfigError, ModelError
from zarrtrace.format.attributes import ModelAttributes
from zarrtrace.hub import refuse_non_model_folder


@dataclass(frozen=True)
class Permitted:
    """Ways to compute that give what a prompt alone gives, in one piece.

    Attributes
    ----------
    blocks
        Attention by blocks of queries (:mod:`zarrtrace.capture.blocked`).
    batches
        Prompts of unequal lengths, padded on the right, in one forward pass.
    parts
        MLPs and logits of a long prompt, some tokens at a time.
    cache
        Keys and values kept between the tokens of a continuation.
    cached_parts
        Keys and values of a long prompt, some tokens at a time, before its continuation.
    cached_batches
        Continuations of equally long prompts together.
    left_padding
        Continuations of prompts of unequal lengths, padded on the left, together.
    """

    blocks: bool = True
    batches: bool = True
    parts: bool = True
    cache: bool = True
    cached_parts: bool = True
    cached_batches: bool = True
    left_padding: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A language model and where its pieces are.

    Attributes
    ----------
    model, tokenizer
        As transformers loads them; the model computes attention eagerly.
    decoder
        Its decoder blocks and their attention.
    n_heads, d_model, d_heads
        Query heads, width of the residual stream, and of all heads' outputs side by side.
    max_tokens
        Longest prompt, or None if the model has no limit.
    attributes
        Description of the model that traces store.
    permitted
        Findings of a probe of the model (:mod:`zarrtrace.capture.probe`).
    limits
        From which sizes on it computes a prompt in parts.
    is_streamed
        Whether its blocks come to the device one at a time.
    """

    model: Any
    tokenizer: Any
    decoder: Decoder
    n_heads: int
    d_model: int
    d_heads: int
    max_tokens: int | None
    attributes: ModelAttributes
    permitted: Permitted = Permitted()
    limits: CaptureLimits = DEFAULT_CAPTURE_LIMITS
    is_streamed: bool = False

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder blocks, in order."""
        return self.decoder.blocks

    @cached_property
    def attentions(self) -> Mapping[int, nn.Module]:
        """By index of the block, the attention module of the blocks that have one."""
        return {layer: one.module for layer, one in self.decoder.attentions.items()}

    @cached_property
    def texts(self) -> TokenTexts:
        """Texts of the tokenizer's tokens."""
        return TokenTexts(self.tokenizer)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens: to ask for them takes longer than to tokenise."""
        return special_ids(self.tokenizer)

    def width(self, kind: str) -> int:
        """Return the width of a kind of hook point (:data:`zarrtrace.capture.hooks.KINDS`)."""
        return self.d_heads if kind == "hook_z" else self.d_model

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        device: torch.device = self.model.device
        return device


def load_model(
    name: str,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    weights: bool = True,
    low_memory: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer through transformers.

    Parameters
    ----------
    name
        A folder, or an id on the Hugging Face hub.
    tokenizer
        Used instead of the one that comes with the model.
    revision
        Commit, tag or branch on the hub.
    device
        For example ``"cpu"`` or ``"cuda:0"``.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for the checkpoint's own.
    trust_remote_code
        Whether code that comes with the model may run.
    weights
        False builds the model without its weights: enough to know all sizes, not to run it.
    low_memory
        Whether decoder blocks stay in host memory and come to the device one at a time.

    Raises
    ------
    ModelError
        If there is no such model, no access to it, or it cannot be captured exactly.
    ConfigError
        If the device does not exist.
    """
    check_device(device)
    refuse_non_model_folder(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        refuse_encoder_decoder(config, name)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        to = "meta" if not weights else "cpu" if low_memory else device
        model = _build(_auto_class(config, name), name, config, dtype, options, to)
    except ImportError as error:
        raise ModelError(
            f"{name}: transformers needs another package to load it: {error}",
            why="Quantised models, and some architectures, compute with packages of their own.",
            remedy="Install what it names, or choose a model that is not quantised.",
        ) from error
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{name}: does not fit into the memory of {device}",
            why="Its weights are larger than what is free there.",
            remedy="Try --low-memory, --dtype bfloat16, or another --device.",
        ) from error
    except LOADING_ERRORS as error:
        raise load_error(name, error) from error
    return describe_model(
        model,
        tokenizer,
        name,
        revision=_commit(name, options) or revision,
        weights=weights,
        stream_to=torch.device(device) if weights and low_memory else None,
    )


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer from a folder or the local cache; None if it is in neither."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except LOADING_ERRORS:
        return None


def describe_model(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    revision: str | None,
    weights: bool,
    stream_to: torch.device | None = None,
) -> LoadedModel:
    """Find a model's pieces and sizes.

    Parameters
    ----------
    model, tokenizer
        As transformers loads them; the model computes attention eagerly.
    name, revision
        Stored with the traces.
    weights
        Whether the model has its weights.
    stream_to
        Device to which decoder blocks come one at a time; None leaves them where they are.

    Raises
    ------
    ModelError
        If it cannot be captured exactly.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name}: its tokenizer gives no character offsets",
            why="Only 'fast' tokenizers do, and spans are found through them.",
            remedy="Convert the tokenizer to tokenizer.json (transformers does it on saving).",
        )
    refuse_dtype(model, name)
    decoder = find_decoder(model, name)
    fingerprint = model_fingerprint(model) if weights else None
    if stream_to is not None:
        BlockStream(model, decoder.blocks, stream_to)
    text_config = model.config.get_text_config()
    n_heads, d_model, d_heads = _sizes(model, name)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        decoder=decoder,
        n_heads=n_heads,
        d_model=d_model,
        d_heads=d_heads,
        max_tokens=getattr(text_config, "max_position_embeddings", None),
        is_streamed=stream_to is not None,
        attributes=ModelAttributes(
            id=name,
            revision=revision,
            fingerprint=fingerprint,
            architecture=type(model).__name__,
            n_layers=len(decoder.blocks),
            n_heads=n_heads,
            d_model=d_model,
            dtype=str(model.dtype).removeprefix("torch."),
            attn_implementation=text_config._attn_implementation,  # noqa: SLF001 -- no other way
            softmax_dtype=_softmax_dtype(model, decoder, name),
            tokenizer=type(tokenizer).__name__,
            quantization=_quantization(model.config),
            prepend_bos=False,  # the SAEs have a say in it, see `tokenize`
        ),
    )


def hide_progress(*, downloads: bool = True) -> None:
    """Keep transformers from drawing bars of its own, and the hub as well unless told otherwise.

    Parameters
    ----------
    downloads
        Whether bars of downloads, which may take an hour, are hidden, too.
    """
    transformers_logging.disable_progress_bar()
    if downloads:
        disable_progress_bars()


def renamed(model: LoadedModel, name: str, *, prepend_bos: bool) -> LoadedModel:
    """Return the model under the name and with the BOS rule that its traces will say."""
    attributes = model.attributes.model_copy(update={"id": name, "prepend_bos": prepend_bos})
    return replace(model, attributes=attributes)


def _build(
    kind: Any, source: str, config: Any, dtype: str, options: Mapping[str, Any], device: str
) -> Any:
    """Build the model on a device, its weights read straight to it; on "meta" without them."""
    wanted = getattr(config.get_text_config(), "dtype", None) if dtype == "auto" else DTYPES[dtype]
    if device == "meta":
        with torch.device(device):
            model = kind.from_config(
                config,
                attn_implementation="eager",
                dtype=wanted,
                trust_remote_code=options["trust_remote_code"],
            )
        return model.eval().to(device)
    # On the CPU, weights are the files' own pages; a map would read them into memory.
    place = {} if device == "cpu" else {"device_map": {"": device}}
    model = kind.from_pretrained(
        source, attn_implementation="eager", dtype=wanted or "auto", **place, **options
    )
    return model.eval()


def _auto_class(config: Any, name: str) -> Any:
    """Return the class of transformers that loads a model: a vision-language model has its own."""
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:  # noqa: SLF001 -- no other way
            return kind
    if getattr(config, "auto_map", None):
        return AutoModelForCausalLM  # of the model's own code
    raise ModelError(
        f"{name}: transformers has no class that continues text for a {config.model_type} model",
        why="It is an encoder, or a model of something else than text.",
        remedy="Choose a causal language model.",
    )


def gpu_count() -> int:
    """Count the GPUs that this process may use: ``CUDA_VISIBLE_DEVICES`` holds here, too."""
    return torch.cuda.device_count()


def was_forked_from_gpu() -> bool:
    """Whether this process was forked from one that used CUDA, and cannot use it itself."""
    return bool(torch.cuda._is_in_bad_fork())  # noqa: SLF001 -- it has no public name


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises
    ------
    ConfigError
    """
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise ConfigError(
            f"--device {device}: not available ({str(error).splitlines()[0]})",
            why=f"torch sees {count} GPU(s) here.",
            remedy="Use --device cpu"
            + (f", or --gpu 0 to {count - 1}." if count else ", or install a CUDA build of torch."),
        ) from None


def _quantization(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    return str(method or getattr(found, "quant_method", "unknown")) if found else None


def _commit(source: str, options: Mapping[str, Any]) -> str | None:
    """Return the commit of a model from the hub, None for a folder."""
    if Path(source).is_dir():
        return None
    file = cached_file(source, "config.json", revision=options["revision"])
    parent = Path(file).parent  # .../snapshots/<commit>
    return parent.name if parent.parent.name == "snapshots" else None


def _sizes(model: Any, name: str) -> tuple[int, int, int]:
    """Return a model's heads, the width of its residual stream, and of all heads' outputs."""
    config = model.config.get_text_config()
    # Sizes that differ between layers raise; the probe finds heads that do.
    config.allow_global_per_layer_attribute_access = True
    heads, width = (getattr(config, size, None) for size in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(width, int):
        raise not_exact(
            name, model, "Its configuration gives no single number of attention heads and width."
        )
    return heads, width, heads * int(getattr(config, "head_dim", None) or width // heads)


class _FirstSoftmax(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the dtype of the first softmax that runs."""

    dtype: torch.dtype | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.dtype is None and "softmax" in str(func):
            self.dtype = out.dtype
        return out


class _Enough(Exception):  # noqa: N818 -- control flow, not an error
    """Ends a forward pass early."""


def _softmax_dtype(model: Any, decoder: Decoder, name: str) -> str:
    """Find out in which precision the model makes attention probabilities."""
    if model.device.type == "meta":
        return str(model.dtype).removeprefix("torch.")
    first = decoder.attentions[min(decoder.attentions)].module

    def stop(*_: object) -> None:
        raise _Enough

    handle = first.register_forward_hook(stop)
    mode = _FirstSoftmax()  # type: ignore[no-untyped-call]
    try:
        with (
            torch.inference_mode(),
            mode,
            warnings.catch_warnings(),
            forward_errors(name),
            contextlib.suppress(_Enough),
        ):
            model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return str(mode.dtype or model.dtype).removeprefix("torch.")
