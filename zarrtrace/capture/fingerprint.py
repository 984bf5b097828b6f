"""Fingerprints of weights: a few values of every tensor, whatever they were loaded from.

A model's is taken from its tensors as they are in memory, behind everything that loading does:
sharded or pickled files, adapters, quantisation, fused experts. So a model that was loaded by name
and one that is handed over have the same, if their classes and dtypes are. An SAE's is taken from
the tensors in its file, as float32, and equals that of the ``state_dict()`` of what sae-lens loads
from there. Changes that spare all values looked at, as of a single row, are not found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Number of stretches read of each tensor, and elements of a stretch.
_STRETCHES, _ELEMENTS = 32, 32
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Fields of a configuration about names, files, precision and returned values.
_NOT_OF_MODELS = (
    "_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: Shape and some values of each tensor.
Samples = dict[str, tuple[tuple[int, ...], torch.Tensor]]
_NOT_OF_SAES = ("device", "dtype", "metadata")


def fingerprint(
    tensors: Mapping[str, torch.Tensor],
    settings: object = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Return a hash of names, shapes and some values of tensors.

    Parameters
    ----------
    tensors
        By name, on any device; those that map a file are read where they are looked at.
    settings
        Further content of the fingerprint, as JSON.
    dtype
        Dtype to convert values to first; None takes their bits as they are.
    """
    samples = {
        name: (tuple(tensor.shape), _some(tensor)) for name, tensor in _plain(tensors).items()
    }
    return _digest(samples, settings, dtype)


def _digest(samples: Samples, settings: object, dtype: torch.dtype | None) -> str:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, (shape, some) in sorted(samples.items()):
        values = some if dtype is None else some.to(dtype)
        digest.update(f"{name} {shape} {values.dtype} ".encode())
        digest.update(_bits(values).cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Take apart tensors that consist of others, as quantised ones do."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            out |= _plain({f"{name}.{part}": getattr(tensor, part) for part in parts})
        else:
            out[name] = tensor.detach()
    return out


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Return values at the beginning, at the end and evenly in between."""
    size = tensor.numel()
    if size <= _STRETCHES * _ELEMENTS:
        return tensor.reshape(-1)
    starts = _starts(size)
    at = (torch.tensor(starts)[:, None] + torch.arange(_ELEMENTS)).reshape(-1)
    # Not flattened: that would copy what is transposed. As integers: few operations know float8.
    where = torch.unravel_index(at.to(tensor.device), tensor.shape)
    return _bits(tensor)[where].view(tensor.dtype)


def _starts(size: int) -> list[int]:
    return [(size - _ELEMENTS) * n // (_STRETCHES - 1) for n in range(_STRETCHES)]


def _read_samples(file: Path) -> Samples:
    """Read what :func:`_some` takes of each tensor in a safetensors file, and nothing else.

    The system would read mapped pages ahead: all of a file of 1.6 GB.
    """
    header, data = read_header(file)
    out: Samples = {}
    with file.open("rb", buffering=0) as content:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, size = _DTYPES[entry["dtype"]], math.prod(entry["shape"])
            starts, count = [0], size
            if size > _STRETCHES * _ELEMENTS:
                starts, count = _starts(size), _ELEMENTS
            some = bytearray()
            for start in starts:
                content.seek(data + entry["data_offsets"][0] + start * dtype.itemsize)
                some += content.read(count * dtype.itemsize)
            if len(some) != len(starts) * count * dtype.itemsize:
                raise OSError(f"{file} ends within {name}")
            empty = torch.empty(0, dtype=dtype)
            values = torch.frombuffer(some, dtype=dtype) if some else empty
            out[name] = (tuple(entry["shape"]), values)
    return out


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file holds, and where its data begins."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header: dict[str, Any] = json.loads(content.read(size))
    return header, 8 + size


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def model_fingerprint(model: Any) -> str:
    """Return the fingerprint of a model's parameters and of the buffers that it saves.

    Other buffers follow from its configuration. Code that came with the model counts, too.
    """
    tensors = {
        name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    return fingerprint(tensors, _own_code(model))


def _own_code(model: Any) -> list[str]:
    """Return the source files of classes that are not transformers' own."""
    kinds = {type(module) for module in model.modules()}
    own = (kind for kind in kinds if kind.__module__.startswith("transformers_modules."))
    files = {inspect.getfile(kind) for kind in own}
    return sorted(Path(file).read_text(encoding="utf-8") for file in files)


def settings_fingerprint(config: Any) -> str:
    """Return a hash of what a model's configuration says of its arithmetic."""
    return fingerprint({}, _without(config.to_diff_dict(), _NOT_OF_MODELS))


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without(one, names) for key, one in value.items() if key not in names}


def sae_fingerprint(config: Any, weights: Path | Mapping[str, torch.Tensor]) -> str:
    """Return the fingerprint of an SAE.

    Parameters
    ----------
    config
        Its configuration as sae-lens makes it; fields that have their defaults do not count.
    weights
        Its file, or its ``state_dict()``.
    """
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NOT_OF_SAES and getattr(config, field.name) != field.default
    }
    said = [config.architecture(), settings]
    if isinstance(weights, Path):
        return _digest(_read_samples(weights), said, torch.float32)
    return fingerprint(weights, said, torch.float32)
