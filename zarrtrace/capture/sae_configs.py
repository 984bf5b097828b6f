"""Configurations of SAEs, and errors about them."""

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
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from safetensors import SafetensorError, safe_open

from zarrtrace.errors import SAEError
from zarrtrace.format.attributes import SAEAttributes

# How ids and folders of releases name a layer: l12r_8x, layer_12/..., blocks.12.hook_resid_pre.
_LAYER_IN_ID = re.compile(r"(?:^[lL]|(?:^|[/._-])(?:blocks?|layers?)[._-]?)(\d+)(?!\d)")


#: Errors that loading a damaged SAE raises.
SAE_LOADING_ERRORS = (
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
#: sae-lens's architectures that encode each token by itself; tests compare every one with it.
ARCHITECTURES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "matching_pursuit",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
# Values of normalize_activations that sae-lens applies whenever an SAE encodes.
_APPLIED = ("none", "layer_norm", "constant_norm_rescale")
# TransformerLens reads hook_mlp_in before the norm, Gemma Scope 2 behind it.
_AMBIGUOUS = ".hook_mlp_in"
_BEHIND_THE_NORM = ".pre_feedforward_layernorm.output"
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
    except (*SAE_LOADING_ERRORS, RecursionError) as error:
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
            remedy="Add metadata.hook_name to its configuration, as in 'blocks.3.hook_resid_post'.",
        )
    if hook_name.endswith(_AMBIGUOUS):
        module = str(metadata_of(config, "hf_hook_name"))
        if not module.endswith(_BEHIND_THE_NORM):
            raise SAEError(
                f"SAE {name}: hook point {hook_name!r} may be before the MLP's norm or behind it",
                why="TransformerLens reads it before the norm, Gemma Scope 2 behind it, and the "
                "SAE's metadata.hf_hook_name does not name the module.",
                remedy="If the SAE reads what the norm returns, call its hook_name "
                f"{hook_name.removesuffix(_AMBIGUOUS) + '.mlp.hook_in'!r}.",
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


def check_config(what: str, config: dict[str, Any], *, scale_is_folded: bool = False) -> None:
    """Refuse an SAE that would not be encoded exactly.

    Parameters
    ----------
    what
        Folder or id of the SAE, for messages.
    config
        Configuration with sae-lens's defaults filled in.
    scale_is_folded
        Whether loading the SAE folds the scale of ``expected_average_only_in`` into its weights.

    Raises
    ------
    SAEError
        If its architecture, normalisation or head is not supported, or sae-lens refuses it.
    """
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        mixes = "A temporal SAE's features of a token depend on the tokens before it, "
        raise SAEError(
            f"{what}: SAEs of architecture {str(architecture)[:60]!r} cannot be captured",
            why=f"{mixes if architecture == 'temporal' else ''}zarrtrace encodes each token by "
            f"itself, which is exact for: {', '.join(ARCHITECTURES)}.",
            remedy="Choose SAEs of one of these architectures, or use --no-features.",
        )
    _check_normalisation(what, config, scale_is_folded=scale_is_folded)
    head = metadata_of(config, "hook_head_index")
    if head is not None:
        raise SAEError(
            f"{what}: was trained on head {str(head)[:20]} alone",
            why="Its metadata.hook_head_index names a head; zarrtrace gives an SAE all heads.",
            remedy="Choose SAEs that were trained on all heads, or use --no-features.",
        )
    shapes_of(what, config)


def _check_normalisation(what: str, config: dict[str, Any], *, scale_is_folded: bool) -> None:
    """Refuse an SAE that expects inputs scaled in a way that encoding does not apply."""
    kind = config.get("normalize_activations", "none") or "none"
    if kind in _APPLIED or (kind == "expected_average_only_in" and scale_is_folded):
        return
    folding = {
        "expected_average_only_in": "fold_activation_norm_scaling_factor",
        "covariance_whitening": "fold_activation_whitening",
    }
    if kind in folding:
        raise SAEError(
            f"{what}: its input scale is not folded into its weights",
            why=f"normalize_activations is {kind!r}, and neither loading nor encoding applies it: "
            "every feature would be wrong.",
            remedy=f"Save the SAE after sae.{folding[kind]}(...), or choose a release for which "
            "sae-lens lists norm_scaling_factor.",
        )
    raise SAEError(
        f"{what}: its normalize_activations is {str(kind)[:60]!r}",
        why=f"zarrtrace knows {', '.join(_APPLIED)} and folded {', '.join(folding)}.",
        remedy="Choose other SAEs, or use --no-features.",
    )


def shapes_of(what: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of an SAE, by name, from its configuration alone."""
    try:
        sae = SAE.from_dict({**config, "device": "meta", "dtype": "float32"})
    except SAE_LOADING_ERRORS as error:
        sizes = f"d_in {str(config.get('d_in'))[:30]}, d_sae {str(config.get('d_sae'))[:30]}"
        raise unreadable(f"{what} ({sizes})", error) from error
    return {name: tuple(weight.shape) for name, weight in sae.state_dict().items()}


def check_weights(path: Path, config: dict[str, Any]) -> None:
    """Compare weights with their configuration, before hours of work; reads a header only."""
    if not (path / "sae_weights.safetensors").is_file():
        raise SAEError(
            f"{path}: sae_weights.safetensors is missing",
            why="The download or copy was not finished.",
            remedy="Fetch the SAE again.",
        )
    try:
        with safe_open(path / "sae_weights.safetensors", framework="pt") as tensors:
            names = set(tensors.keys())
            stored = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SAE_LOADING_ERRORS as error:
        raise unreadable(str(path), error) from error
    check_shapes(str(path), config, stored)


def check_shapes(what: str, config: dict[str, Any], found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of an SAE's weights, by name, with its configuration.

    Raises
    ------
    SAEError
    """
    stored = dict(found)
    if "log_threshold" in stored:  # sae-lens renames that of older checkpoints
        stored["threshold"] = stored["log_threshold"]
    for name, shape in shapes_of(what, config).items():
        if stored.get(name) != shape:
            sizes = " × ".join(map(str, stored.get(name, ("no weights",))))
            raise SAEError(
                f"{what}: by its configuration, the SAE reads {config['d_in']} dimensions and has "
                f"{config['d_sae']} features (d_sae), but its {name} has {sizes}",
                why="Files of two SAEs are mixed, or one was edited.",
                remedy="Fetch the SAE again.",
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


def several_saes(where: str, layer: int, names: Sequence[str], remedy: str) -> SAEError:
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
        If one says it in something else than true or false, or two SAEs disagree.
    """
    said: dict[bool, str] = {}
    for name, config in configs.items():
        one = metadata_of(config, "prepend_bos")
        if not isinstance(one, bool | None):
            raise SAEError(
                f"SAE {name}: its configuration says prepend_bos: {str(one)[:60]!r}",
                why="Whether prompts begin with a BOS token changes every activation.",
                remedy="Set metadata.prepend_bos in its cfg.json to true or false.",
            )
        if one is not None:
            said.setdefault(one, name)
    if len(said) > 1:
        raise SAEError(
            f"SAE {said[True]} was trained with a BOS token, SAE {said[False]} without",
            why="All SAEs of a run read the same prompts, and a BOS token changes every "
            "activation.",
            remedy="Extract them in two runs, or choose for all with --prepend-bos or "
            "--no-prepend-bos.",
        )
    return next(iter(said), None)


def natural_key(path: Path) -> list[Any]:
    """Sort key that counts the numbers in a path."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
