"""Finding a language model's decoder blocks and attention modules, with or without its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from zarrtrace.errors import ModelError

# Names of a block's attention in architectures that do not declare it to transformers.
_ATTENTION = ("self_attn", "self_attention", "attn", "attention")


@dataclass(frozen=True)
class Attention:
    """A module that makes attention probabilities.

    Attributes
    ----------
    module
        Blocks may share it.
    index
        Position of the probabilities in the module's output, a tuple.
    """

    module: nn.Module
    index: int = 1

    def weights(self, output: Any) -> Any:
        """Return the probabilities of the module's output, None if there are none."""
        found = isinstance(output, tuple | list) and len(output) > self.index
        return output[self.index] if found else None

    @property
    def waits_to_be_asked(self) -> bool:
        """Whether the module returns probabilities only with ``output_attentions=True``."""
        return "output_attentions" in inspect.signature(self.module.forward).parameters


@dataclass(frozen=True)
class Decoder:
    """The part of a model that holds its decoder blocks; a vision-language model's text part.

    Attributes
    ----------
    module
        Runs all blocks, and returns the last hidden state.
    list_name
        Name of the module's list of blocks.
    blocks
        The blocks, in the order in which they run.
    attentions
        By index of the block; a block without attention has none.
    """

    module: nn.Module
    list_name: str
    blocks: tuple[nn.Module, ...]
    attentions: Mapping[int, Attention]


def find_decoder(model: Any, name: str) -> Decoder:
    """Find the list of decoder blocks, and in each block its attention.

    Attention is what transformers records for ``output_attentions``; in architectures that do not
    declare it, the block's child of a usual name. Whether that is true, a probe of the loaded model
    finds out (:mod:`zarrtrace.capture.probe`).

    Raises
    ------
    ModelError
        If there is no such list, or its blocks hold no attention, or several.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    root = model.get_decoder()
    lists = _lists(root, count)
    if not lists:  # some call another part their decoder
        root, lists = model, _lists(model, count)
    recorders = _recorders(root)
    for path, owner, child, blocks in lists:
        found = [
            _attentions_of(block, f".{path}.{child}.{at}", recorders)
            for at, block in enumerate(blocks)
        ]
        several = [at for at, attentions in enumerate(found) if len(attentions) > 1]
        if several:
            raise not_exact(
                name,
                model,
                f"Block {several[0]} holds {len(found[several[0]])} attention modules, and a "
                "trace has one attention matrix a block.",
            )
        if any(found):
            attentions = {at: one for at, ones in enumerate(found) for one in ones}
            return Decoder(owner, child, tuple(blocks), attentions)
    if lists:
        why = (
            f"Its blocks ({type(lists[0][-1][0]).__name__}) hold no attention module that "
            "transformers declares, or of a usual name."
        )
    else:
        why = f"It has no list of {count} decoder blocks."
    raise not_exact(name, model, why)


def _lists(root: nn.Module, count: Any) -> list[tuple[str, nn.Module, str, nn.ModuleList]]:
    """Return all lists of `count` modules: paths of their owners, these, and their names."""
    return [
        (path, owner, child, blocks)
        for path, owner in root.named_modules()
        for child, blocks in owner.named_children()
        if isinstance(blocks, nn.ModuleList) and len(blocks) == count
    ]


def not_exact(name: str, model: Any, why: str) -> ModelError:
    """Return the error for a model that is refused."""
    return ModelError(
        f"{name}: {type(model).__name__} cannot be captured exactly",
        why=why,
        remedy="Choose another architecture, or ask for this one on zarrtrace's tracker.",
    )


def _recorders(root: nn.Module) -> list[Any]:
    """Return what a model's parts declare to transformers of their attention."""
    for module in root.modules():
        declared = (getattr(module, "_can_record_outputs", None) or {}).get("attentions")
        if declared is not None:
            return declared if isinstance(declared, list) else [declared]
    return []


def _attentions_of(block: nn.Module, path: str, recorders: list[Any]) -> list[Attention]:
    if not recorders:
        named = (getattr(block, name, None) for name in _ATTENTION)
        return [Attention(module) for module in named if isinstance(module, nn.Module)][:1]
    found = []
    for name, module in block.named_modules():
        matching = (one for one in recorders if _matches(one, module, f"{path}.{name}"))
        recorder = next(matching, None)
        if recorder is not None:
            found.append(Attention(module, getattr(recorder, "index", 1)))
    return found


def _matches(recorder: Any, module: nn.Module, path: str) -> bool:
    """Whether transformers would record this module: its class, or its path's end, and its place.

    Parameters
    ----------
    recorder
        A class, the end of a path, or an ``OutputRecorder`` that has either.
    """
    target = getattr(recorder, "target_class", recorder)
    suffix = target if isinstance(target, str) else getattr(recorder, "class_name", None)
    if isinstance(target, type) and not isinstance(module, target):
        return False
    if not isinstance(target, type) and not (suffix and path.endswith(suffix)):
        return False
    place = (getattr(recorder, "layer_name", None) or "").strip(".")
    return not place or f".{place}." in f"{path}."
