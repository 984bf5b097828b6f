"""Sparse autoencoders: finding one for each layer, and loading just its encoder.

Everything is loaded through sae-lens, so that its architectures and conversions hold here, too.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import (
    handle_config_defaulting,
    load_sae_config_from_huggingface,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from zarrtrace.capture.hooks import HookPoint, parse_hook
from zarrtrace.errors import ConfigError, SAEError
from zarrtrace.spec import SAEAttributes, ranges

# How ids and folders of releases name a layer: l12r_8x, layer_12/..., blocks.12.hook_resid_pre.
_LAYER_IN_ID = re.compile(r"(?:^[lL]|(?:^|[/._-])(?:blocks?|layers?)[._-]?)(\d+)(?!\d)")


class Encoder:
    """The encoder half of one SAE.

    Parameters
    ----------
    sae
        As sae-lens loads it; its decoder is dropped.
    attributes
        What a trace says of it.
    """

    def __init__(self, sae: Any, attributes: SAEAttributes) -> None:
        self.attributes = attributes
        self.hook: HookPoint = parse_hook(attributes.hook_name)
        self._sae = sae
        _drop_decoder(sae)

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """Encode ``(token, d_in)`` to ``(token, d_sae)``."""
        encoded: torch.Tensor = self._sae.encode(activations)
        return encoded

    def to(self, device: torch.device) -> Encoder:
        """Move to a device."""
        self._sae.to(device=device)
        return self


class SAESource(Protocol):
    """Where SAEs come from."""

    def find(self, layers: Sequence[int]) -> dict[int, SAEAttributes]:
        """Return the SAE of each layer that has one, without loading weights."""
        ...

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Load one encoder."""
        ...

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token; None if they do not say."""
        ...


class FolderSAEs:
    """SAEs that sae-lens saved below a folder: ``cfg.json`` and ``sae_weights.safetensors`` each.

    Parameters
    ----------
    folder
        It, or any folder below it, holds one SAE.

    Raises
    ------
    SAEError
        If no SAE is there, or one's configuration cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise SAEError(f"{folder}: no such folder", remedy="Check --sae-path.")
        self._configs: dict[str, dict[str, Any]] = {}
        for file in sorted(self._folder.rglob("cfg.json"), key=_natural):
            self._configs[file.parent.relative_to(self._folder).as_posix()] = _read_config(file)
        if not self._configs:
            raise SAEError(
                f"{folder}: no SAE there",
                why="No folder below it holds a cfg.json, as SAE.save_model writes it.",
                remedy="Give --sae-path the folder that holds the SAEs' folders.",
            )

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token."""
        said = {_metadata(config, "prepend_bos") for config in self._configs.values()} - {None}
        return None if not said else True in said

    def find(self, layers: Sequence[int]) -> dict[int, SAEAttributes]:
        """Return the SAE of each layer.

        Raises
        ------
        SAEError
            If a layer has none, or several.
        """
        by_layer: dict[int, list[str]] = {}
        for name, config in self._configs.items():
            by_layer.setdefault(parse_hook(_hook_name(config, name)).layer, []).append(name)
        missing = [layer for layer in layers if layer not in by_layer]
        if missing:
            raise SAEError(
                f"{self._folder}: no SAE for layer {', '.join(map(str, missing))}",
                why=f"It holds SAEs for layers {ranges(sorted(by_layer))}.",
                remedy="Give --layers that have one, fetch the others, or use --no-features.",
            )
        found = {}
        for layer in layers:
            if len(by_layer[layer]) > 1:
                raise _several(str(self._folder), layer, by_layer[layer])
            name = by_layer[layer][0]
            config = self._configs[name]
            _refuse_unfolded(f"{self._folder / name}", config)
            found[layer] = _attributes(layer, None, name, config)
        return found

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Load one encoder from its folder."""
        path = self._folder / attributes.id
        if not (path / "sae_weights.safetensors").is_file():
            raise SAEError(
                f"{path}: sae_weights.safetensors is missing",
                why="The download or copy was not finished.",
                remedy="Fetch the SAE again.",
            )
        try:
            sae = SAE.load_from_disk(path, device=str(device), dtype=attributes.dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _unreadable(str(path), error) from error
        return Encoder(sae, attributes)


class ReleaseSAEs:
    """SAEs of a release that sae-lens knows.

    Parameters
    ----------
    release
        Name in sae-lens's table, for example ``"llama_scope_lxr_8x"``.
    sae_id
        Pattern of the ids, for example ``"l{layer}r_8x"``; found from the table if None.

    Raises
    ------
    SAEError
        If there is no such release.
    """

    def __init__(self, release: str, sae_id: str | None = None) -> None:
        table = get_pretrained_saes_directory()
        if release not in table:
            close = difflib.get_close_matches(release, table, n=3)
            raise SAEError(
                f"{release}: no such SAE release",
                why="sae-lens does not list it.",
                remedy=f"Did you mean {' or '.join(close)}?"
                if close
                else "See the table of pretrained SAEs in sae-lens's documentation.",
            )
        if sae_id is not None and "{layer}" not in sae_id:
            raise ConfigError(
                f"--sae-id {sae_id}: names one SAE for all layers",
                remedy="Write {layer} where the layer's number stands, as in 'l{layer}r_8x'.",
            )
        self._release, self._pattern = release, sae_id
        self._ids = list(table[release].saes_map)
        self._prepend_bos: bool | None = None

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token; known after :meth:`find`."""
        return self._prepend_bos

    def find(self, layers: Sequence[int]) -> dict[int, SAEAttributes]:
        """Return the SAE of each layer; layers for which the release has none are left out.

        Raises
        ------
        SAEError
            If no layer has one, if a pattern names one that is not there, or if a layer has
            several to choose from.
        """
        found = {}
        for layer, name in self._choose(layers).items():
            config = self._config(name)
            hook_name = _hook_name(config, name)
            if parse_hook(hook_name).layer != layer:
                raise SAEError(
                    f"{self._release}/{name}: reads {hook_name}, not layer {layer}",
                    why="The id's number is not the block's index.",
                    remedy="Give --sae-id a pattern whose number is.",
                )
            if self._prepend_bos is None:
                self._prepend_bos = _metadata(config, "prepend_bos")
            found[layer] = _attributes(layer, self._release, name, config)
        return found

    def _choose(self, layers: Sequence[int]) -> dict[int, str]:
        """Return the id of each layer's SAE."""
        if self._pattern is not None:
            chosen = {layer: self._pattern.format(layer=layer) for layer in layers}
            for layer, name in chosen.items():
                if name not in self._ids:
                    close = difflib.get_close_matches(name, self._ids, n=3)
                    raise SAEError(
                        f"{self._release}: no SAE {name!r} for layer {layer}",
                        why=f"The release has ids like {', '.join(close or self._ids[:3])}.",
                        remedy="Check --sae-id and --layers, or use --no-features.",
                    )
            return chosen
        by_layer: dict[int, list[str]] = {}
        for name in self._ids:
            match = _LAYER_IN_ID.search(name)
            if match:
                by_layer.setdefault(int(match[1]), []).append(name)
        if not any(layer in by_layer for layer in layers):
            raise SAEError(
                f"{self._release}: no SAE for layer {ranges(layers)}",
                why=f"The release has SAEs for layers {ranges(sorted(by_layer)) or 'none'}.",
                remedy="Give --layers that have one, or use --no-features.",
            )
        return {layer: self._only(layer, by_layer[layer]) for layer in layers if layer in by_layer}

    def _only(self, layer: int, names: Sequence[str]) -> str:
        if len(names) > 1:
            # One kind of hook point may stand beside another on a layer or two: take the
            # release's own, which is the one that most layers have.
            usual = _shape_of(self._ids, layer)
            names = [name for name in names if _without_layer(name) == usual] or names
        if len(names) > 1:
            raise _several(self._release, layer, names)
        return names[0]

    def _config(self, name: str) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config: dict[str, Any] = load_sae_config_from_huggingface(self._release, name)
        except (OSError, ValueError, KeyError, EntryNotFoundError) as error:
            raise _unreadable(f"{self._release}/{name}", error) from error
        return config

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Load one encoder from the hub's cache, fetching it if need be."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="norm_scaling_factor not found")
                sae = SAE.from_pretrained(
                    self._release, attributes.id, device=str(device), dtype=attributes.dtype
                )
        except UserWarning as error:
            raise SAEError(
                f"{self._release}/{attributes.id}: its input scale is not known",
                why="It expects inputs of average norm, and sae-lens has no factor for it.",
                remedy="Use a release that lists norm_scaling_factor.",
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _unreadable(f"{self._release}/{attributes.id}", error) from error
        return Encoder(sae, attributes)


def check_width(found: dict[int, SAEAttributes], d_model: int) -> None:
    """Refuse SAEs that were made for another width.

    Raises
    ------
    SAEError
    """
    for layer, attributes in found.items():
        if attributes.d_in != d_model:
            raise SAEError(
                f"SAE {attributes.id} of layer {layer} reads {attributes.d_in} dimensions, the "
                f"model's residual stream has {d_model}",
                why="The SAE was trained on another model.",
                remedy="Choose SAEs that were trained on --model.",
            )


def _drop_decoder(sae: Any) -> None:
    """Free the decoder: half of an SAE, and not needed to encode."""
    uses_decoder = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    if not uses_decoder and sae.cfg.architecture() not in ("matching_pursuit", "temporal"):
        sae.W_dec = torch.nn.Parameter(torch.empty(0, device=sae.W_enc.device))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = handle_config_defaulting(
            json.loads(file.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(str(file), error) from error
    return config


def _metadata(config: dict[str, Any], key: str) -> Any:
    return config.get("metadata", {}).get(key, config.get(key))


def _hook_name(config: dict[str, Any], name: str) -> str:
    hook_name = _metadata(config, "hook_name")
    if not isinstance(hook_name, str):
        raise SAEError(
            f"SAE {name}: does not say which hook point it reads",
            why="Its configuration lacks hook_name.",
            remedy="Add metadata.hook_name to its cfg.json, as in 'blocks.3.hook_resid_post'.",
        )
    return hook_name


def _attributes(
    layer: int, release: str | None, name: str, config: dict[str, Any]
) -> SAEAttributes:
    try:
        return SAEAttributes(
            layer=layer,
            release=release,
            id=name,
            hook_name=_hook_name(config, name),
            architecture=str(config["architecture"]),
            d_in=config["d_in"],
            d_sae=config["d_sae"],
            dtype="float32",
            decoder_norm_folded=False,
        )
    except (KeyError, ValueError) as error:
        raise _unreadable(name, error) from error


def _refuse_unfolded(path: str, config: dict[str, Any]) -> None:
    if config.get("normalize_activations") == "expected_average_only_in":
        raise SAEError(
            f"{path}: its input scale is not folded into its weights",
            why="normalize_activations is 'expected_average_only_in', and loading from a folder "
            "does not fold it: every feature would be wrong by that factor.",
            remedy="Load the release with --sae-release, or save it after "
            "sae.fold_activation_norm_scaling_factor(...).",
        )


def _unreadable(what: str, error: Exception) -> SAEError:
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


def _several(where: str, layer: int, names: Sequence[str]) -> SAEError:
    return SAEError(
        f"{where}: {len(names)} SAEs for layer {layer}: {', '.join(names[:6])}"
        + (", ..." if len(names) > 6 else ""),
        why="They differ in hook point, width or sparsity.",
        remedy="Say which with --sae-id, writing {layer} for the layer's number.",
    )


def _without_layer(name: str) -> str:
    return _LAYER_IN_ID.sub("{}", name, count=1)


def _shape_of(names: Sequence[str], layer: int) -> str:
    """Return the commonest form of an id, the layer's number apart, among those of `layer`."""
    forms = [_without_layer(name) for name in names]
    own = {
        _without_layer(name)
        for name in names
        if (match := _LAYER_IN_ID.search(name)) and int(match[1]) == layer
    }
    counts = {form: forms.count(form) for form in own}
    most = max(counts.values())
    winners = [form for form, count in counts.items() if count == most]
    return winners[0] if len(winners) == 1 else ""


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
