"""Arguments of a Python call, told from each other: names, numbers and loaded objects."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zarrtrace.errors import ConfigError
from zarrtrace.extraction.options import DEMO, Loaded, Options, whole_number
from zarrtrace.extraction.packages import capture_package
from zarrtrace.format.attributes import layers_in

# Options that are whole numbers, and those that are true or false.
_NUMBERS = ("layer_start", "layer_end", "batch_size", "attention_keepbits")
_TRUTHS = (
    "trust_remote_code", "fold_decoder_norm", "features", "attention", "residual", "prepend_bos",
    "generation_prompt", "low_memory",
)  # fmt: skip


def layers_of(given: int | str | Iterable[int] | None) -> tuple[int, ...] | None:
    """Return layers as options hold them.

    Raises
    ------
    ConfigError
        If they are neither integers nor text such as ``"1-31"``.
    """
    if given is None:
        return None
    if isinstance(given, str):
        try:
            return layers_in(given)
        except ValueError as error:
            raise ConfigError(
                f"layers: {error}", remedy="Give indices such as [1, 2], or text such as '1-31'."
            ) from None
    return _integers("layers", given)


def _integers(name: str, given: int | Iterable[int]) -> tuple[int, ...]:
    try:
        values = tuple(given) if isinstance(given, Iterable) else (given,)
        return tuple(value.__index__() for value in values)
    except (AttributeError, TypeError):
        raise ConfigError(
            f"{name} {given!r} are no integers", remedy="Give integers such as [1, 2]."
        ) from None


def plain(options: Options) -> Options:
    """Return options with Python's own numbers and truth values, as a caller may give NumPy's.

    Raises
    ------
    ConfigError
        If one is something else.
    """
    found: dict[str, Any] = {}
    for name in (*_NUMBERS, *_TRUTHS):
        if (value := getattr(options, name)) is not None:
            kind = whole_number if name in _NUMBERS else _truth
            found[name] = kind(f"--{name.replace('_', '-')}", value)
    return replace(options, **found)


def _truth(option: str, value: Any) -> bool:
    if not isinstance(value, int | np.bool_) or value not in (0, 1):
        raise ConfigError(f"{option} {value!r}", remedy="Give True or False.")
    return bool(value)


def of_model(
    options: Options, model: object, tokenizer: object, *, device_given: bool
) -> tuple[Options, Loaded]:
    """Tell a model's name or folder from a loaded one."""
    loaded = Loaded(tokenizer=tokenizer)
    if model is None or isinstance(model, str | Path):
        return replace(options, model=None if model is None else str(model)), loaded
    given = {
        "revision": options.revision is not None,
        "device": device_given,
        "dtype": options.dtype != "auto",
        "low_memory": options.low_memory,
        "trust_remote_code": options.trust_remote_code,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(
            f"{' and '.join(names)} with a loaded model",
            why="A loaded model is used as it is, where it is.",
            remedy="Leave that out, or give the model's name instead.",
        )
    name = getattr(model, "name_or_path", "") or type(model).__name__
    device = str(getattr(model, "device", "cpu"))
    options = replace(options, model=f"./{DEMO}" if name == DEMO else str(name), device=device)
    return options, replace(loaded, model=model)


def with_saes(options: Options, loaded: Loaded, saes: object) -> tuple[Options, Loaded]:
    """Tell a release, a folder and loaded SAEs from each other."""
    if saes is None:
        return options, loaded
    if isinstance(saes, Path) or (isinstance(saes, str) and _is_folder(saes)):
        return replace(options, sae_path=Path(saes).expanduser()), loaded
    names = (saes,) if isinstance(saes, str) else saes
    if isinstance(names, list | tuple) and names and all(isinstance(one, str) for one in names):
        release, *ids = names
        return replace(options, sae_release=release, sae_ids=tuple(ids)), loaded
    return options, replace(loaded, saes=saes)


def _is_folder(text: str) -> bool:
    return os.path.isdir(text) or text.startswith((".", "~", os.sep))  # noqa: PTH112 -- of any text


def with_tokenizer(options: Options, loaded: Loaded) -> Loaded:
    """Load the tokenizer that was named, or the one that belongs to a loaded model."""
    given, name = loaded.tokenizer, options.model
    if isinstance(given, str | Path):
        name = str(given)
    elif given is not None or loaded.model is None:
        return loaded
    tokenizer = capture_package().load_tokenizer(name)
    if tokenizer is None:
        raise ConfigError(
            f"no tokenizer {name}" if given else f"no tokenizer for the loaded model {name}",
            why="It is neither a folder nor in the local cache."
            if given
            else "A model does not hold its tokenizer, and there is none where it was loaded from.",
            remedy="Give what AutoTokenizer.from_pretrained returns as the argument tokenizer.",
        )
    return replace(loaded, tokenizer=tokenizer)
