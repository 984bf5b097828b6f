"""Groups of tokens that a span is compared with: of its size, and in no span."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Two prompts are variants of one if they share this part of the pairs of neighbouring tokens of
# the one that has fewer.
_LEAST_SHARED = 0.5
# Neighbours that are looked at together.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class AttendedPrompt:
    """One scenario as a test of its spans sees it.

    Attributes
    ----------
    scenario
        Its scenario's name: repeats of one have the same.
    ids
        ``(key,)`` token ids.
    own
        Token ids of the prompt, without generated text: repeats of a prompt have the same.
    attention
        ``(layer, key)`` float64: the attention that the target pays; NaN for missing layers.
    is_free
        ``(key,)`` bool: tokens that may be in a placebo, or beside a span.
    spans
        Token positions by the span's name.
    """

    scenario: str
    ids: np.ndarray
    own: np.ndarray
    attention: np.ndarray
    is_free: np.ndarray
    spans: dict[str, np.ndarray]


@dataclass(frozen=True)
class NeighbourContrast:
    """Attention to groups of tokens and to the tokens beside them, in variants of one prompt.

    Attributes
    ----------
    n
        ``(layer,)`` in how many scenarios the attention to the span is known.
    own, beside
        ``(group, layer)`` float64: means over the scenarios, of each over its repeats. The span
        comes first, then placebos.
    """

    n: np.ndarray
    own: np.ndarray
    beside: np.ndarray


def variants(prompts: Sequence[np.ndarray]) -> list[list[int]]:
    """Put prompts that are variants of one, as those of a template are, into one group.

    Parameters
    ----------
    prompts
        Token ids of each.

    Returns
    -------
    list
        Numbers of the prompts in each group. A prompt joins the group whose first member shares
        most of its pairs of neighbouring tokens, if these are at least half of the shorter
        prompt's.
    """
    found: list[list[int]] = []
    sizes: list[int] = []
    holders: dict[tuple[int, int], list[int]] = {}
    for number, ids in enumerate(prompts):
        pairs = set(pairwise(ids.tolist()))
        shared = Counter(group for pair in pairs for group in holders.get(pair, ()))
        variants_of = [
            (count, -group)
            for group, count in shared.items()
            if count >= _LEAST_SHARED * min(sizes[group], len(pairs))
        ]
        if variants_of:
            found[-max(variants_of)[1]].append(number)
            continue
        for pair in pairs:
            holders.setdefault(pair, []).append(len(found))
        found.append([number])
        sizes.append(len(pairs))
    return found


def aligned(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return where the tokens of one prompt are in a variant of it, −1 where they are not.

    Tokens between equal ones correspond, too, if there are as many: the values of a template.
    """
    if len(first) == len(second) and np.mean(first == second) >= _LEAST_SHARED:
        return np.arange(len(first))
    places = np.full(len(first), -1)
    matcher = difflib.SequenceMatcher(None, first.tolist(), second.tolist(), autojunk=False)
    for _, start, stop, other, end in matcher.get_opcodes():
        if stop - start == end - other:
            places[start:stop] = np.arange(other, end)
    return places


def compare(prompts: Sequence[AttendedPrompt], span: str, controls: int) -> NeighbourContrast:
    """Measure attention to a span and to its placebos, in variants of one prompt.

    A placebo has the shape of the span in the first prompt. The same tokens of the template are
    taken in all variants; a placebo that more than half of them lack is none.
    """
    groups = placebos(prompts[0], span)
    shape = (len(prompts), 1 + len(groups), len(prompts[0].attention))
    own, beside = np.full(shape, np.nan), np.full(shape, np.nan)
    exists = np.ones(shape[:2], bool)
    for number, prompt in enumerate(prompts):
        here = prompt.spans[span][None]
        own[number, :1], beside[number, :1] = against_neighbours(prompt, here, controls)
        if not len(groups):
            continue
        places = aligned(prompts[0].ids, prompt.ids)[groups]
        is_there = (places >= 0).all(1) & prompt.is_free[places].all(1)
        exists[number, 1:] = is_there
        rows = np.flatnonzero(is_there) + 1
        own[number, rows], beside[number, rows] = against_neighbours(
            prompt, places[is_there], controls
        )
    scenarios = np.unique([prompt.scenario for prompt in prompts], return_inverse=True)[1]
    repeats = [scenarios == number for number in range(scenarios.max() + 1)]
    own, beside = (np.stack([_mean(one[of]) for of in repeats]) for one in (own, beside))
    kept = np.stack([exists[of].any(0) for of in repeats]).mean(0) >= _LEAST_SHARED
    n = (~np.isnan(own[:, 0])).sum(0)
    return NeighbourContrast(n, _mean(own[:, kept]), _mean(beside[:, kept]))


def placebos(prompt: AttendedPrompt, span: str) -> np.ndarray:
    """Return all groups ``(group, token)`` of free tokens that have a span's shape."""
    tokens = prompt.spans[span]
    shape = tokens - tokens[0]
    starts = np.arange(len(prompt.ids) - shape[-1])
    groups = starts[:, None] + shape
    return np.asarray(groups[prompt.is_free[groups].all(1)])


def against_neighbours(
    prompt: AttendedPrompt, groups: np.ndarray, controls: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention to groups of tokens, and to the tokens beside them.

    Parameters
    ----------
    prompt
        With at least one free token.
    groups
        ``(group, token)`` positions.
    controls
        Neighbours of each token: the nearest free ones that are not in the group, of two as near
        the one behind.

    Returns
    -------
    own, beside
        ``(group, layer)`` means over a group's tokens, and over their neighbours; NaN beside a
        group that holds every free token.
    """
    size = groups.shape[1]
    own, beside = np.empty((2, len(groups), len(prompt.attention)))
    # A long span has many neighbours that are its own tokens.
    step = max(1, _BLOCK // (size * (controls + size)))
    for start in range(0, len(groups), step):
        some = groups[start : start + step]
        rows = np.arange(len(some))[:, None]
        near, is_used = neighbours(prompt.is_free, some, controls)
        weights = np.zeros((2, len(some), len(prompt.ids)))
        weights[0, rows, some] = 1 / size
        with np.errstate(invalid="ignore"):
            shares = is_used / is_used.sum(-1, keepdims=True) / size
        # A token may be beside several of the group.
        np.add.at(weights[1], (rows[..., None], near), shares)
        own[start : start + step], beside[start : start + step] = weights @ prompt.attention.T
    return own, beside


def neighbours(
    is_free: np.ndarray, groups: np.ndarray, controls: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions ``(group, token, near)`` and whether each is a neighbour that counts."""
    free, at = np.flatnonzero(is_free), np.arange(len(is_free))
    # The later of two equally near ones: it is the later one that attention favours.
    farness = 2 * np.abs(free - at[:, None]) + (free < at[:, None])
    nearest = free[np.argsort(farness, axis=1)][:, : controls + groups.shape[1]]
    near, rows = nearest[groups], np.arange(len(groups))[:, None]
    is_own = np.zeros((len(groups), len(is_free)), bool)
    is_own[rows, groups] = True
    is_other = ~is_own[rows[..., None], near]
    return near, is_other & (np.cumsum(is_other, -1) <= controls)


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of those along the first axis that have a value, else NaN."""
    has_value = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(has_value, values, 0).sum(0) / has_value.sum(0))
