"""Sparse autoencoders: finding one for each layer, and loading just its encoder.

Everything is loaded through sae-lens, so that its architectures and conversions hold here, too.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class

from zarrtrace.capture.encoder import Encoder
from zarrtrace.capture.fingerprint import sae_fingerprint
from zarrtrace.capture.hooks import KINDS, HookPoint, parse_hook, place
from zarrtrace.capture.model import LoadedModel
from zarrtrace.capture.sae_configs import (
    SAE_LOADING_ERRORS,
    cannot_fold,
    check_config,
    check_weights,
    hook_name_of,
    natural_key,
    prepend_bos_of,
    read_config,
    sae_attributes,
    several_saes,
    unreadable,
)
from zarrtrace.errors import SAEError
from zarrtrace.format.attributes import SAEAttributes, ranges

# sae-lens warns once for each place of its code that the model should be loaded without
# TransformerLens's processing of weights. transformers' own models never are processed so.
warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs")


Found = dict[int, tuple[SAEAttributes, ...]]


class SAESource(Protocol):
    """Where SAEs come from."""

    def available(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of some layers that have an SAE."""
        ...

    def find(self, layers: Sequence[int]) -> Found:
        """Return the SAEs of each layer that has some, without loading weights."""
        ...

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Load one encoder."""
        ...

    def stretches(self, saes: Sequence[SAEAttributes]) -> list[tuple[Path, int, int]]:
        """Say which bytes of which files :meth:`load` will read: a file, from, to."""
        ...

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs that :meth:`find` returned were trained behind a BOS token.

        None if they do not say; SAEs that disagree raise SAEError.
        """
        ...


class FolderSAEs:
    """SAEs that sae-lens saved below a folder: ``cfg.json`` and ``sae_weights.safetensors`` each.

    Parameters
    ----------
    folder
        It, or any folder below it, holds one SAE.
    fold_decoder_norm
        Whether activations are scaled to decoder directions of norm 1.

    Raises
    ------
    SAEError
        If no SAE is there, or one's configuration cannot be read.
    """

    def __init__(self, folder: str | Path, *, fold_decoder_norm: bool = False) -> None:
        self._folder, self._fold = Path(folder), fold_decoder_norm
        if not self._folder.is_dir():
            raise SAEError(f"{folder}: no such folder", remedy="Check --sae-path.")
        self._configs: dict[str, dict[str, Any]] = {}
        self._used: dict[str, dict[str, Any]] = {}
        for file in sorted(self._folder.rglob("cfg.json"), key=natural_key):
            self._configs[file.parent.relative_to(self._folder).as_posix()] = read_config(file)
        if not self._configs:
            raise SAEError(
                f"{folder}: no SAE there",
                why="No folder below it holds a cfg.json, as SAE.save_model writes it.",
                remedy="Give --sae-path the folder that holds the SAEs' folders.",
            )

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token; known after :meth:`find`."""
        return prepend_bos_of(self._used)

    def available(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of some layers that have an SAE."""
        there = {place.layer for place in self._by_place()}
        return tuple(layer for layer in layers if layer in there)

    def _by_place(self) -> dict[HookPoint, list[str]]:
        found: dict[HookPoint, list[str]] = {}
        for name, config in self._configs.items():
            found.setdefault(parse_hook(hook_name_of(config, name)), []).append(name)
        return found

    def find(self, layers: Sequence[int]) -> Found:
        """Return the SAEs of each layer.

        Raises
        ------
        SAEError
            If a layer has none, or several on one hook point.
        """
        by_place = self._by_place()
        there = {place.layer for place in by_place}
        missing = [layer for layer in layers if layer not in there]
        if missing:
            raise SAEError(
                f"{self._folder}: no SAE for layer {ranges(missing)}",
                why=f"It holds SAEs for layers {ranges(sorted(there))}.",
                remedy="Give --layers that have one, fetch the others, or use --no-features.",
            )
        chosen = {place: names for place, names in by_place.items() if place.layer in layers}
        variables = variables_of(chosen)
        found: Found = {}
        self._used = {}
        for layer in layers:
            found[layer] = tuple(
                self._attributes(layer, names, variable)
                for kind, variable in variables.items()
                if (names := chosen.get(HookPoint(layer, kind)))
            )
        return found

    def _attributes(self, layer: int, names: Sequence[str], variable: str) -> SAEAttributes:
        if len(names) > 1:
            raise several_saes(
                str(self._folder), layer, names, "Give --sae-path a folder that holds one of them."
            )
        path = self._folder / names[0]
        config = self._used[names[0]] = self._configs[names[0]]
        check_config(str(path), config)
        check_weights(path, config)
        return sae_attributes(
            layer,
            variable,
            None,
            names[0],
            config,
            fold=self._fold,
            fingerprint=_fingerprint(path, config),
        )

    def stretches(self, saes: Sequence[SAEAttributes]) -> list[tuple[Path, int, int]]:
        """Say what :meth:`load` will read: whole files."""
        files = [self._folder / sae.id / "sae_weights.safetensors" for sae in saes]
        return [(file, 0, file.stat().st_size) for file in files if file.is_file()]

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Load one encoder from its folder."""
        path = self._folder / attributes.id
        try:
            sae = SAE.load_from_disk(
                path,
                device=str(device),
                dtype=attributes.dtype,
                fold_W_dec_norm=attributes.decoder_norm_folded,
            )
        except NotImplementedError as error:
            raise cannot_fold(str(path), error) from error
        except SAE_LOADING_ERRORS as error:
            raise unreadable(str(path), error) from error
        now = _fingerprint(path, self._configs[attributes.id])
        if now != attributes.fingerprint:
            raise SAEError(
                f"{path}: its weights have fingerprint {now}, not {attributes.fingerprint}",
                why="The file was replaced after this run began.",
                remedy="Restore it, or replace the run with --overwrite.",
            )
        return Encoder(sae, attributes)


def variables_of(places: Mapping[HookPoint, object]) -> dict[str, str]:
    """Name the feature array of each kind of hook point: the commonest is ``features``."""
    counts = Counter(place.kind for place in places)
    kinds = sorted(counts, key=lambda kind: (-counts[kind], KINDS.index(kind)))
    return {kind: "features" if i == 0 else f"features_{kind}" for i, kind in enumerate(kinds)}


def check_fit(found: Found, model: LoadedModel) -> None:
    """Refuse SAEs that were made for another width, and several widths in one array.

    Raises
    ------
    SAEError
    """
    widths: dict[str, SAEAttributes] = {}
    for layer, of_layer in found.items():
        for attributes in of_layer:
            first = widths.setdefault(attributes.variable, attributes)
            if first.d_sae != attributes.d_sae:
                raise SAEError(
                    f"SAE {attributes.id} of layer {layer} has {attributes.d_sae} features, "
                    f"{first.id} has {first.d_sae}",
                    why="One array holds the features of all layers.",
                    remedy="Choose SAEs of one width with --sae-id, or extract in two runs.",
                )
            kind = parse_hook(attributes.hook_name).kind
            if attributes.d_in != (width := model.width(kind)):
                raise SAEError(
                    f"SAE {attributes.id} of layer {layer} reads {attributes.d_in} dimensions, "
                    f"{kind} of the model has {width}",
                    why="The SAE was trained on another model.",
                    remedy="Choose SAEs that were trained on --model.",
                )
            place(model.blocks[layer], model.attentions.get(layer), kind)


def _fingerprint(path: Path, config: dict[str, Any]) -> str:
    """Return the fingerprint of an SAE in a folder; a stride of its weights is read."""
    try:
        _, config_class = get_sae_class(config["architecture"])
        return sae_fingerprint(config_class.from_dict(config), path / "sae_weights.safetensors")
    except SAE_LOADING_ERRORS as error:
        raise unreadable(str(path), error) from error
