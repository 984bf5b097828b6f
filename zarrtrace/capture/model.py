"""Loading a language model and finding its pieces: blocks, attention modules, sizes."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors import SafetensorError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from zarrtrace.capture.fingerprint import model_fingerprint
from zarrtrace.capture.streaming import BlockStream
from zarrtrace.errors import ConfigError, ModelError
from zarrtrace.format.attributes import ModelAttributes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# What transformers raises for files that are missing, damaged or of another kind.
_LOADING_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class LoadedModel:
    """A language model and where its pieces are.

    Attributes
    ----------
    model, tokenizer
        As transformers loads them; the model computes attention eagerly.
    blocks
        The decoder blocks, in order.
    attentions
        The module that makes a block's attention probabilities, by the block's index.
    n_heads, d_model, d_heads
        Query heads, width of the residual stream, and of all heads' outputs side by side.
    max_tokens
        Longest prompt, or None if the model has no limit.
    attributes
        What a trace says of the model.
    """

    model: Any
    tokenizer: Any
    blocks: tuple[nn.Module, ...]
    attentions: Mapping[int, nn.Module]
    n_heads: int
    d_model: int
    d_heads: int
    max_tokens: int | None
    attributes: ModelAttributes

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        device: torch.device = self.model.device
        return device


def load_model(
    name: str,
    *,
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
    source = _source(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{name}: an encoder-decoder model",
                why="zarrtrace traces decoder-only models: one sequence, one attention a block.",
                remedy="Choose a causal language model.",
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        to = "meta" if not weights else "cpu" if low_memory else device
        model = _build(source, config, dtype, options, to)
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
    except _LOADING_ERRORS as error:
        raise _load_error(name, error) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name}: its tokenizer gives no character offsets",
            why="Only 'fast' tokenizers do, and spans are found through them.",
            remedy="Convert the tokenizer to tokenizer.json (transformers does it on saving).",
        )
    blocks, attentions = find_pieces(model, name)
    fingerprint = model_fingerprint(model) if weights else None
    if weights and low_memory:
        BlockStream(model, blocks, torch.device(device))
    text_config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        blocks=blocks,
        attentions=attentions,
        n_heads=int(text_config.num_attention_heads),
        d_model=int(text_config.hidden_size),
        d_heads=_d_heads(text_config),
        max_tokens=getattr(text_config, "max_position_embeddings", None),
        attributes=ModelAttributes(
            id=name,
            revision=_commit(source, options) or revision,
            fingerprint=fingerprint,
            architecture=type(model).__name__,
            n_layers=len(blocks),
            n_heads=int(text_config.num_attention_heads),
            d_model=int(text_config.hidden_size),
            dtype=str(model.dtype).removeprefix("torch."),
            attn_implementation=text_config._attn_implementation,  # noqa: SLF001 -- no other way
            softmax_dtype=_softmax_dtype(model, attentions),
            tokenizer=type(tokenizer).__name__,
            quantization=_quantization(model.config),
            prepend_bos=False,  # the SAEs have a say in it, see `tokenize`
        ),
    )


def hide_progress() -> None:
    """Keep transformers and the hub from drawing bars of their own."""
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def renamed(model: LoadedModel, name: str, *, prepend_bos: bool) -> LoadedModel:
    """Return the model under the name and with the BOS rule that its traces will say."""
    attributes = model.attributes.model_copy(update={"id": name, "prepend_bos": prepend_bos})
    return replace(model, attributes=attributes)


def _build(source: str, config: Any, dtype: str, options: Mapping[str, Any], device: str) -> Any:
    """Build the model on a device, its weights read straight to it; on "meta" without them."""
    wanted = getattr(config.get_text_config(), "dtype", None) if dtype == "auto" else DTYPES[dtype]
    if device == "meta":
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation="eager",
                dtype=wanted,
                trust_remote_code=options["trust_remote_code"],
            )
        return model.eval().to(device)
    # On the CPU, weights are the files' own pages; a map would read them into memory.
    place = {} if device == "cpu" else {"device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=wanted or "auto", **place, **options
    )
    return model.eval()


def gpu_count() -> int:
    """Count the GPUs that this process may use: ``CUDA_VISIBLE_DEVICES`` holds here, too."""
    return torch.cuda.device_count()


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


def _source(name: str) -> str:
    """Return `name`, refusing a folder that is none."""
    path = Path(name)
    if path.is_absolute() or name.startswith("."):
        if not path.is_dir():
            raise ModelError(f"{name}: no such folder", remedy="Check --model.")
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name}: holds no config.json",
                why="It is not a model in Hugging Face's layout.",
                remedy="Give the folder that save_pretrained wrote.",
            )
    return name


def _load_error(name: str, error: Exception) -> ModelError:  # noqa: PLR0911 -- one a cause
    """Say in our words why transformers could not load a model."""
    if isinstance(error, ModelError):
        return error
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    first_line = str(error).strip().partition("\n")[0]
    if any_of(GatedRepoError) or "gated repo" in str(error):
        return ModelError(
            f"{name}: you have no access to this gated model",
            why="Its owner asks you to accept a licence first.",
            remedy=f"Accept it on https://huggingface.co/{name}, then log in: hf auth login.",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{name}: comes with code of its own, which is not run unasked",
            why="Its configuration names classes that transformers does not have.",
            remedy="Read that code; if you trust it, add --trust-remote-code.",
        )
    if any_of(pickle.UnpicklingError):
        return ModelError(
            f"{name}: its weights are a pickle that holds more than tensors",
            why="Reading it could run code.",
            remedy="Use a copy of the model in safetensors.",
        )
    if any_of(RevisionNotFoundError):
        return ModelError(
            f"{name}: no such revision", remedy="Check --revision: a branch, tag or commit."
        )
    if any_of(RepositoryNotFoundError, HFValidationError):
        return ModelError(
            f"{name}: no such model",
            why="It is neither a folder here nor an id on the Hugging Face hub.",
            remedy="Check the spelling of --model; for a private model log in: hf auth login.",
        )
    if any_of(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return ModelError(
            f"{name}: not in the local cache, and the Hugging Face hub cannot be reached",
            why="There is no connection, or HF_HUB_OFFLINE is set.",
            remedy="Connect, or copy the model into HF_HOME; check the spelling of --model, too.",
        )
    return ModelError(
        f"{name}: transformers cannot load it: {first_line}",
        why="Files are missing or damaged, or the architecture is newer than the installed "
        "transformers.",
        remedy="Check the folder or id; pip install --upgrade transformers.",
    )


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


def _d_heads(config: Any) -> int:
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def find_pieces(model: Any, name: str) -> tuple[tuple[nn.Module, ...], Mapping[int, nn.Module]]:
    """Find decoder blocks and attention modules from what transformers declares of the class.

    Raises
    ------
    ModelError
        If the architecture does not declare them, or they are not where its declaration says.
    """
    base = getattr(model, model.base_model_prefix, model)
    declared = getattr(base, "_can_record_outputs", None) or {}
    block_class, attention_class = (
        getattr(kind, "target_class", kind)
        for kind in (declared.get("hidden_states"), declared.get("attentions"))
    )
    if block_class is None or attention_class is None:
        raise ModelError(
            f"{name}: {type(model).__name__} cannot be captured exactly",
            why="transformers does not declare which of its modules are decoder blocks and "
            "attention.",
            remedy="Choose another architecture, or ask for this one on zarrtrace's tracker.",
        )
    blocks = tuple(module for module in base.modules() if isinstance(module, block_class))
    attentions: dict[int, nn.Module] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, attention_class):
                if index in attentions or getattr(module, "layer_idx", None) != index:
                    raise ModelError(
                        f"{name}: {type(model).__name__} cannot be captured exactly",
                        why=f"Block {index} holds attention of layer "
                        f"{getattr(module, 'layer_idx', None)}, or more than one.",
                        remedy="Choose another architecture.",
                    )
                attentions[index] = module
    return blocks, attentions


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


def _softmax_dtype(model: Any, attentions: Mapping[int, nn.Module]) -> str:
    """Find out in which precision the model makes attention probabilities."""
    if not attentions or model.device.type == "meta":
        return str(model.dtype).removeprefix("torch.")
    first = attentions[min(attentions)]

    def stop(*_: object) -> None:
        raise _Enough

    handle = first.register_forward_hook(stop)
    mode = _FirstSoftmax()  # type: ignore[no-untyped-call]
    try:
        with torch.inference_mode(), mode, warnings.catch_warnings():
            model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return str(mode.dtype or model.dtype).removeprefix("torch.")
