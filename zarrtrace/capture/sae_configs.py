"""What the configurations of SAEs say, and errors about them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from pydantic import ValidationError
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from safetensors import SafetensorError

from zarrtrace.errors import SAEError
from zarrtrace.spec import SAEAttributes

# How ids and folders of releases name a layer: l12r_8x, layer_12/..., blocks.12.hook_resid_pre.
_LAYER_IN_ID = re.compile(r"(?:^[lL]|(?:^|[/._-])(?:blocks?|layers?)[._-]?)(\d+)(?!\d)")


#: What loading a damaged SAE raises.
LOADING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
# A hook point's name is shorter; the number in a longer one may be no number that Python reads.
_MAX_HOOK_NAME = 200


def layer_in_id(name: str) -> int | None:
    """Return the number of the layer that an id names."""
    match = _LAYER_IN_ID.search(name)
    return int(match[1]) if match else None


def read_config(file: Path) -> dict[str, Any]:
    """Read an SAE's ``cfg.json`` with sae-lens's defaults filled in."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found.get("metadata", {}), dict):
            raise TypeError("its metadata is not an object")
        config: dict[str, Any] = handle_config_defaulting(found)
    except (*LOADING_ERRORS, RecursionError) as error:
        raise unreadable(str(file), error) from error
    return config


def metadata_of(config: dict[str, Any], key: str) -> Any:
    """Return what a configuration says, in its metadata or, if old, at its top."""
    return config.get("metadata", {}).get(key, config.get(key))


def hook_name_of(config: dict[str, Any], name: str) -> str:
    """Return the name of the hook point that an SAE reads."""
    hook_name = metadata_of(config, "hook_name")
    if not isinstance(hook_name, str) or len(hook_name) > _MAX_HOOK_NAME:
        raise SAEError(
            f"SAE {name}: does not say which hook point it reads",
            why="Its configuration lacks hook_name.",
            remedy="Add metadata.hook_name to its cfg.json, as in 'blocks.3.hook_resid_post'.",
        )
    return hook_name


def sae_attributes(
    layer: int,
    variable: str,
    release: str | None,
    name: str,
    config: dict[str, Any],
    *,
    fold: bool,
    revision: str | None = None,
    fingerprint: str | None = None,
) -> SAEAttributes:
    """Return what a trace says of an SAE."""
    try:
        return SAEAttributes(
            layer=layer,
            variable=variable,
            release=release,
            id=name,
            revision=revision,
            fingerprint=fingerprint,
            hook_name=hook_name_of(config, name),
            architecture=str(config["architecture"]),
            d_in=config["d_in"],
            d_sae=config["d_sae"],
            dtype="float32",
            decoder_norm_folded=fold,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise unreadable(name, ValueError(f"its {where}: {first['msg']}")) from error
    except KeyError as error:
        raise unreadable(name, error) from error


def refuse_unfolded(path: str, config: dict[str, Any]) -> None:
    """Refuse an SAE whose input scale is not folded into its weights."""
    if config.get("normalize_activations") == "expected_average_only_in":
        raise SAEError(
            f"{path}: its input scale is not folded into its weights",
            why="normalize_activations is 'expected_average_only_in', and loading from a folder "
            "does not fold it: every feature would be wrong by that factor.",
            remedy="Load the release with --sae-release, or save it after "
            "sae.fold_activation_norm_scaling_factor(...).",
        )


def unreadable(what: str, error: Exception) -> SAEError:
    """Say in our words why sae-lens could not load an SAE."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, GatedRepoError):
        return SAEError(
            f"{what}: you have no access to these SAEs",
            why="Their owner asks you to accept a licence first.",
            remedy="Accept it on the hub, then log in: hf auth login.",
        )
    if isinstance(error, LocalEntryNotFoundError | RepositoryNotFoundError):
        return SAEError(
            f"{what}: not in the local cache, and not to be had from the Hugging Face hub",
            why="There is no connection, HF_HUB_OFFLINE is set, or the repository is gone.",
            remedy="Connect, or copy the SAEs into HF_HOME.",
        )
    return SAEError(
        f"{what}: sae-lens cannot load it: {reason}",
        why="Files are missing or damaged, or it needs a newer sae-lens.",
        remedy="Fetch the SAE again; pip install --upgrade sae-lens.",
    )


def cannot_fold(what: str, error: Exception) -> SAEError:
    """Say that an architecture's decoder norm cannot be folded."""
    return SAEError(
        f"{what}: its decoder norm cannot be folded: {error}",
        why="Which features fire would change.",
        remedy="Drop --fold-decoder-norm.",
    )


def several(where: str, layer: int, names: Sequence[str], remedy: str) -> SAEError:
    """Say that a layer has several SAEs to choose from."""
    return SAEError(
        f"{where}: {len(names)} SAEs for layer {layer}: {', '.join(names[:6])}"
        + (", ..." if len(names) > 6 else ""),
        why="They differ in width or sparsity.",
        remedy=remedy,
    )


def form_of(name: str) -> str:
    """Write ``{layer}`` for the number of the layer in an id."""
    match = _LAYER_IN_ID.search(name)
    return f"{name[: match.start(1)]}{{layer}}{name[match.end(1) :]}" if match else name


def prepend_bos_of(configs: Mapping[str, dict[str, Any]]) -> bool | None:
    """Whether SAEs, by name, were trained behind a BOS token; None if none says.

    Raises
    ------
    SAEError
        If one says it in something else than true or false.
    """
    said = {name: metadata_of(config, "prepend_bos") for name, config in configs.items()}
    for name, one in said.items():
        if not isinstance(one, bool | None):
            raise SAEError(
                f"SAE {name}: its configuration says prepend_bos: {str(one)[:60]!r}",
                why="Whether prompts begin with a BOS token changes every activation.",
                remedy="Set metadata.prepend_bos in its cfg.json to true or false.",
            )
    return None if set(said.values()) <= {None} else True in said.values()


def natural(path: Path) -> list[Any]:
    """Sort key that counts the numbers in a path."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
