"""Which prompts are variants of one template, as far as their texts tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from zarrtrace.analysis.tables import is_table
from zarrtrace.analysis.traces import Data, traces

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+")
# A template has at least this many words outside its values, and at least half of the letters.
_FEWEST_WORDS = 3


def number_of_templates(data: Data, names: Sequence[str]) -> int | None:
    """Count the templates that prompts are variants of.

    Prompts are of one template if they are equal without their spans, numbers and texts of
    metadata. A prompt that is mostly made of these is its own template.

    Parameters
    ----------
    data
        A run, or a table.
    names
        Names of the scenarios.

    Returns
    -------
    int or None
        None if a prompt is not known: a table does not hold prompts, and imported runs may lack
        them.
    """
    if is_table(data):
        return None
    runs = traces(data)
    found = [_template(runs[name]) for name in names]
    if any(one is None for one in found):
        return None
    return len({one or f"\0{name}" for one, name in zip(found, names, strict=True)})


def _template(ds: xr.Dataset) -> str | None:
    """Return what stays of a prompt; empty if too little does, None without a prompt."""
    prompt = ds.attrs.get("prompt")
    if not prompt:
        return None
    stays = np.ones(len(prompt), bool)
    for one in ds.attrs["spans"].values():
        for start, stop in _characters(one):
            stays[start:stop] = False
    text = "".join(
        letter if kept else "\0" for letter, kept in zip(prompt, stays.tolist(), strict=True)
    )
    values = [v for v in ds.attrs.get("metadata", {}).values() if isinstance(v, str) and v.strip()]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "\0")
    words = _WORD.findall(text)
    is_short = len(words) < _FEWEST_WORDS
    is_mostly_values = 2 * sum(map(len, words)) < sum(map(len, _WORD.findall(prompt)))
    if is_short or is_mostly_values:
        return ""
    return re.sub(r"[\s\0]+", " ", _NUMBER.sub("\0", text)).strip()


def _characters(one: Mapping[str, Sequence[Sequence[int]]]) -> Sequence[Sequence[int]]:
    return one.get("characters", ())
