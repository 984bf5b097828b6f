"""Reading the encoder out of an SAE's file and leaving the decoder, half of it, unread.

sae-lens reads whole files. Its conversion of Llama Scope's is done here with its own functions but
for the decoder; tests compare the two bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from sae_lens.loading.pretrained_sae_loaders import (
    get_conversion_loader_name,
    get_llama_scope_config_from_hf,
    handle_config_defaulting,
)
from sae_lens.loading.pretrained_saes_directory import (
    get_config_overrides,
    get_norm_scaling_factor,
    get_repo_id_and_folder_name,
)
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from safetensors import safe_open

from zarrtrace.capture.fingerprint import read_header
from zarrtrace.format.attributes import SAEAttributes

_FILE = "checkpoints/final.safetensors"
_ENCODER, _THRESHOLD = "encoder.weight", "jump_relu_threshold"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_READERS, _PIECE = 3, 16 * 2**20


def encoder_stretches(release: str, saes: Iterable[SAEAttributes]) -> list[tuple[Path, int, int]]:
    """Say which bytes of which files :func:`load_encoder` will read, of those that are here.

    Parameters
    ----------
    release, saes
        As for :func:`load_encoder`.

    Returns
    -------
    list
        A file, and the bytes of it from ... to ... that hold the encoder's matrix.
    """
    out = []
    for sae in saes:
        repository, folder = get_repo_id_and_folder_name(release, sae.id)
        found = try_to_load_from_cache(repository, f"{folder}/{_FILE}")
        if isinstance(found, str):
            header, data = read_header(Path(found))
            start, stop = header[_ENCODER]["data_offsets"]
            out.append((Path(found), data + start, data + stop))
    return out


def _matrix(file: Path, device: torch.device) -> torch.Tensor:
    """Bring the encoder's matrix to a GPU, through memory that it may read by itself.

    safetensors copies from the file's pages, which the driver does piece by piece: at a fifth of
    the bus's speed.
    """
    header, start = read_header(file)
    entry = header[_ENCODER]
    first, last = (start + offset for offset in entry["data_offsets"])
    # Copied while the GPU computes, but into memory of the stream that computes.
    matrix = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device=device)
    flat = matrix.view(-1).view(torch.uint8)
    side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))

    def bring(pieces: range) -> None:
        pinned = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
        room = pinned.numpy().data
        with file.open("rb", buffering=0) as content, torch.cuda.stream(side):
            for at in pieces:
                content.seek(first + at)
                size = min(_PIECE, last - first - at)
                done = 0
                while done < size:
                    got = content.readinto(room[done:size])
                    if not got:
                        raise OSError(f"{file} ends at {first + at + done}")
                    done += got
                flat[at : at + size].copy_(pinned[:size], non_blocking=True)
                side.synchronize()

    step = _READERS * _PIECE
    with ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(bring, [range(n * _PIECE, last - first, step) for n in range(_READERS)]))
    return matrix


def reads_encoder_alone(release: str) -> bool:
    """Whether a release's files are laid out so that :func:`load_encoder` can read them."""
    return bool(get_conversion_loader_name(release) == "llama_scope")


def read_config(release: str, name: str) -> dict[str, Any]:
    """Read the configuration of one of Llama Scope's SAEs: sae-lens's, and the threshold."""
    repository, folder = get_repo_id_and_folder_name(release, name)
    overrides = get_config_overrides(release, name)
    config = get_llama_scope_config_from_hf(repository, folder, "cpu", cfg_overrides=overrides)
    return {**handle_config_defaulting(config), _THRESHOLD: config[_THRESHOLD]}


def load_encoder(
    release: str, attributes: SAEAttributes, config: Mapping[str, Any], device: torch.device
) -> JumpReLUSAE:
    """Load one of Llama Scope's SAEs without its decoder, from the hub's cache or the hub.

    Parameters
    ----------
    release, attributes
        Which one, and the commit; its decoder's norm must not be asked to be folded.
    config
        Its configuration, by :func:`read_config`.
    device
        Where it computes.

    Returns
    -------
    JumpReLUSAE
        Its ``encode`` gives what that of ``SAE.from_pretrained`` gives; ``W_dec`` is empty.
    """
    repository, folder = get_repo_id_and_folder_name(release, attributes.id)
    scale = get_norm_scaling_factor(release, attributes.id)
    # Named by its commit, a file that is in the cache is taken without asking the hub.
    file = hf_hub_download(repository, f"{folder}/{_FILE}", revision=attributes.revision)
    dtype: torch.dtype = getattr(torch, attributes.dtype)
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        encoder = _matrix(Path(file), device) if device.type == "cuda" else None
        encoder_bias, decoder_bias = (
            tensors.get_tensor(name).to(dtype) for name in ("encoder.bias", "decoder.bias")
        )
        encoder = (tensors.get_tensor(_ENCODER) if encoder is None else encoder).to(dtype)
    settings = {**config, "device": "meta", "dtype": attributes.dtype}
    threshold = settings.pop(_THRESHOLD)
    sae = JumpReLUSAE(JumpReLUSAEConfig.from_dict(settings))
    sae.cfg.device = str(device)
    state = {
        "W_enc": encoder.T,
        "b_enc": encoder_bias,
        "b_dec": decoder_bias,
        "W_dec": torch.empty(0, dtype=dtype, device=device),
        "threshold": torch.ones(encoder.shape[0], dtype=dtype, device=device) * threshold,
    }
    for name, value in state.items():
        setattr(sae, name, torch.nn.Parameter(value, requires_grad=False))
    if config["normalize_activations"] == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(scale)
    return sae
