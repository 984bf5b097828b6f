"""The SAEs that options name, and what they say of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zarrtrace import demo
from zarrtrace.extraction.options import (
    Loaded,
    Options,
)
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.machine import no_garbage

if TYPE_CHECKING:  # they import torch
    from zarrtrace.capture import LoadedModel, Prompt
    from zarrtrace.capture.saes import SAESource

SAEs = dict[int, tuple[SAEAttributes, ...]]


def sae_source(options: Options, loaded: Loaded, model: LoadedModel) -> SAESource:
    """Return where SAEs come from, and how they multiply."""
    with no_garbage():
        source = _place(options, loaded)
    if options.sae_products == "float32":
        return source
    from zarrtrace.capture.half_products import HalfProducts  # noqa: PLC0415

    return HalfProducts(source, options.device, model.attributes.dtype)


def _place(options: Options, loaded: Loaded) -> SAESource:
    """Return where SAEs come from: memory, a release or a folder."""
    if loaded.saes is not None:
        from zarrtrace.capture.loaded_saes import LoadedSAEs  # noqa: PLC0415 -- takes seconds

        return LoadedSAEs(loaded.saes)
    from zarrtrace.capture.release_saes import ReleaseSAEs  # noqa: PLC0415
    from zarrtrace.capture.saes import FolderSAEs  # noqa: PLC0415

    if options.sae_release:
        return ReleaseSAEs(
            options.sae_release, options.sae_ids, fold_decoder_norm=options.fold_decoder_norm
        )
    return FolderSAEs(
        options.sae_path or demo.sae_path(), fold_decoder_norm=options.fold_decoder_norm
    )


def find_saes(source: SAESource, layers: Sequence[int], model: LoadedModel) -> SAEs:
    """Return the SAEs of each layer, which must fit the model."""
    from zarrtrace.capture.saes import check_fit  # noqa: PLC0415

    found: SAEs = source.find(layers)
    check_fit(found, model)
    return found


def hooks_of(saes: SAEs) -> set[tuple[int, str]]:
    """Return layers and hook points that SAEs read."""
    return {(sae.layer, sae.hook_name) for found in saes.values() for sae in found}


def begins_with_bos(options: Options, model: LoadedModel, source: SAESource | None) -> bool:
    """Whether prompts begin with BOS: as asked, as SAEs were trained, or if there is one."""
    if options.prepend_bos is not None:
        return options.prepend_bos
    trained = None if source is None else source.prepend_bos
    return model.tokenizer.bos_token_id is not None if trained is None else bool(trained)


def bos_notes(
    source: SAESource | None, prompts: Sequence[Prompt], bos: int | None
) -> tuple[str, ...]:
    """Say where a chat template and the SAEs disagree on BOS."""
    begins = {prompt.tokens.ids[0] == bos for prompt in prompts if prompt.scenario.chat}
    # SAEs that disagree with each other are asked only where it matters.
    trained = None if source is None or not begins else source.prepend_bos
    if trained is None or begins <= {bool(trained)}:
        return ()
    if trained:
        return ("the chat template writes no BOS; the SAEs were trained with it (--prepend-bos)",)
    return ("the chat template writes BOS; the SAEs were trained without it",)
