"""SAEs of a release that sae-lens knows, fetched from the hub."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from sae_lens.loading.pretrained_saes_directory import (
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
)

from zarrtrace.capture.encoder import Encoder
from zarrtrace.capture.encoder_files import (
    encoder_stretches,
    load_encoder,
    read_config,
    reads_encoder_alone,
)
from zarrtrace.capture.hooks import KINDS, parse_hook
from zarrtrace.capture.sae_configs import (
    SAE_LOADING_ERRORS,
    cannot_fold,
    check_config,
    form_of,
    hook_name_of,
    layer_in_id,
    prepend_bos_of,
    sae_attributes,
    several_saes,
    unreadable,
)
from zarrtrace.capture.saes import Found
from zarrtrace.errors import ConfigError, SAEError
from zarrtrace.format.attributes import SAEAttributes, ranges

# More SAEs than this for one layer are not looked into: each is a file to fetch.
_MAX_CHOICES = 4
_SAY_WHICH = "Say which with --sae-id, writing {layer} for the layer's number."


class ReleaseSAEs:
    """SAEs of a release that sae-lens knows.

    Parameters
    ----------
    release
        Name in sae-lens's table, for example ``"llama_scope_lxr_8x"``.
    sae_ids
        Patterns of ids, for example ``"l{layer}r_8x"``, each of which gives one feature array;
        found from the table if empty.
    fold_decoder_norm
        Whether activations are scaled to decoder directions of norm 1.

    Raises
    ------
    SAEError
        If there is no such release.
    """

    def __init__(
        self, release: str, sae_ids: Sequence[str] = (), *, fold_decoder_norm: bool = False
    ) -> None:
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
        for pattern in sae_ids:
            if "{layer}" not in pattern:
                raise ConfigError(
                    f"--sae-id {pattern}: names one SAE for all layers",
                    remedy="Write {layer} where the layer's number stands, as in 'l{layer}r_8x'.",
                )
        self._release, self._patterns, self._fold = release, tuple(sae_ids), fold_decoder_norm
        self._ids = list(table[release].saes_map)
        self._encoder_alone = reads_encoder_alone(release) and not fold_decoder_norm
        self._configs: dict[str, dict[str, Any]] = {}
        self._used: dict[str, dict[str, Any]] = {}

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token; known after :meth:`find`."""
        return prepend_bos_of(self._used)

    def available(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of some layers for which the release has an SAE, by its ids."""
        if not self._patterns:
            numbers = {layer_in_id(name) for name in self._ids}
            return tuple(layer for layer in layers if layer in numbers)
        return tuple(
            layer
            for layer in layers
            if any(form.replace("{layer}", str(layer)) in self._ids for form in self._patterns)
        )

    def find(self, layers: Sequence[int]) -> Found:
        """Return the SAEs of each layer; layers for which the release has none are left out.

        Raises
        ------
        SAEError
            If no layer has one, if a pattern names one that is not there, or if a layer has
            several to choose from.
        """
        forms = self._patterns or self._forms(layers)
        chosen: dict[int, dict[str, str]] = {}
        kinds: dict[str, str] = {}
        for form in forms:
            for layer in layers:
                name = form.replace("{layer}", str(layer))
                if name not in self._ids:
                    if self._patterns:
                        raise self._no_such_id(name, layer)
                    continue
                kind = self._kind(name, layer)
                kinds.setdefault(form, kind)
                chosen.setdefault(layer, {})[form] = name
        names = _form_variables(kinds)
        chosen_names = {name for of_layer in chosen.values() for name in of_layer.values()}
        self._used = {name: self._configs[name] for name in sorted(chosen_names)}
        for name, config in self._used.items():
            scaled = get_norm_scaling_factor(self._release, name) is not None
            check_config(f"{self._release}/{name}", config, scale_is_folded=scaled)
        revision = self._commit(fetch=True)
        return {
            layer: tuple(
                sae_attributes(
                    layer,
                    names[form],
                    self._release,
                    name,
                    self._configs[name],
                    fold=self._fold,
                    revision=revision,
                )
                for form, name in of_layer.items()
            )
            for layer, of_layer in sorted(chosen.items())
        }

    def _forms(self, layers: Sequence[int]) -> tuple[str, ...]:
        """Return the forms of ids to use, ``{layer}`` for the number: one a hook point."""
        by_layer: dict[int, list[str]] = {}
        for name in self._ids:
            number = layer_in_id(name)
            if number is not None:
                by_layer.setdefault(number, []).append(name)
        if not any(layer in by_layer for layer in layers):
            raise SAEError(
                f"{self._release}: no SAE for layer {ranges(layers)}",
                why=f"The release has SAEs for layers {ranges(sorted(by_layer)) or 'none'}.",
                remedy="Give --layers that have one, or use --no-features.",
            )
        forms = Counter(form_of(name) for names in by_layer.values() for name in names)
        taken: dict[str, str] = {}
        for layer in layers:
            names = sorted(by_layer.get(layer, ()), key=lambda name: -forms[form_of(name)])
            if len(names) > _MAX_CHOICES:
                raise several_saes(self._release, layer, names, _SAY_WHICH)
            here: dict[str, str] = {}
            for name in names:
                kind, form = self._kind(name, layer), form_of(name)
                rival = here.setdefault(kind, form)
                if rival != form and forms[rival] == forms[form]:
                    raise several_saes(self._release, layer, names, _SAY_WHICH)
            taken |= {form: kind for kind, form in here.items()}
        return tuple(sorted(taken, key=lambda form: (-forms[form], KINDS.index(taken[form]))))

    def _no_such_id(self, name: str, layer: int) -> SAEError:
        close = difflib.get_close_matches(name, self._ids, n=3)
        return SAEError(
            f"{self._release}: no SAE {name!r} for layer {layer}",
            why=f"The release has ids like {', '.join(close or self._ids[:3])}.",
            remedy="Check --sae-id and --layers, or use --no-features.",
        )

    def _kind(self, name: str, layer: int) -> str:
        """Return the kind of hook point that an SAE of `layer` reads."""
        hook_name = hook_name_of(self._config(name), name)
        hook = parse_hook(hook_name)
        if hook.layer != layer:
            raise SAEError(
                f"{self._release}/{name}: reads {hook_name}, not layer {layer}",
                why="The id's number is not the block's index.",
                remedy="Give --sae-id a pattern whose number is.",
            )
        return hook.kind

    def _config(self, name: str) -> dict[str, Any]:
        if name not in self._configs:
            read = read_config if self._encoder_alone else load_sae_config_from_huggingface
            try:
                self._configs[name] = read(self._release, name)
            except (OSError, ValueError, KeyError, EntryNotFoundError) as error:
                raise unreadable(f"{self._release}/{name}", error) from error
        return self._configs[name]

    def _commit(self, *, fetch: bool) -> str:
        """Return the commit that sae-lens loads from: the hub's, else the cache's."""
        entry = get_pretrained_saes_directory()[self._release]
        revision = (entry.config_overrides or {}).get("revision")
        try:
            snapshot = snapshot_download(
                entry.repo_id,
                revision=str(revision) if revision else None,
                allow_patterns=".gitattributes",
                local_files_only=not fetch,
            )
        except (OSError, ValueError, EntryNotFoundError) as error:
            raise unreadable(self._release, error) from error
        return Path(snapshot).name

    def stretches(self, saes: Sequence[SAEAttributes]) -> list[tuple[Path, int, int]]:
        """Say what :meth:`load` will read, if it knows."""
        return encoder_stretches(self._release, saes) if self._encoder_alone else []

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Load one encoder from the hub's cache, fetching it if need be."""
        what = f"{self._release}/{attributes.id}"
        try:
            if self._encoder_alone:
                config = self._config(attributes.id)
                return Encoder(load_encoder(self._release, attributes, config, device), attributes)
            sae = SAE.from_pretrained(
                self._release,
                attributes.id,
                device=str(device),
                dtype=attributes.dtype,
                fold_W_dec_norm=attributes.decoder_norm_folded,
            )
        except NotImplementedError as error:
            raise cannot_fold(what, error) from error
        except SAE_LOADING_ERRORS as error:
            raise unreadable(what, error) from error
        commit = self._commit(fetch=False)
        if commit != attributes.revision:
            raise SAEError(
                f"{what}: loaded from commit {commit}, not from {attributes.revision}",
                why="The hub's repository was changed after this run began.",
                remedy="Replace the run with --overwrite, which takes all SAEs from the new "
                "commit.",
            )
        return Encoder(sae, attributes)


def _form_variables(kinds: Mapping[str, str]) -> dict[str, str]:
    """Name the feature array of each form of ids: ``features``, then ``features_<kind>``."""
    names: dict[str, str] = {}
    for form, kind in kinds.items():
        name = f"features_{kind}" if names else "features"
        count = sum(taken == name or taken.startswith(f"{name}_") for taken in names.values())
        names[form] = f"{name}_{count + 1}" if names and count else name
    return names
