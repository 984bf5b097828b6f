"""Repeats: several sampled continuations of one scenario, which are no independent scenarios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

#: Which tokens count.
Text = Literal["all", "prompt", "generated"]
#: Column with the name of the scenario that a repeat is of.
SCENARIO_NAME = "scenario_name"
#: Column with the number of a repeat, and with the option that was found in the continuation.
REPEAT, CHOICE = "repeat", "choice"
# Values of a block of permuted statistics, and rounding within which statistics are equal.
_BLOCK_VALUES, _TIE = 4_000_000, 1e-9


def columns_of_repeats(
    scenarios: Iterable[str], repeats: Iterable[int | None], choices: Iterable[str | None] | None
) -> dict[str, np.ndarray]:
    """Return what is known of repeats as columns, a value a trace.

    Parameters
    ----------
    scenarios
        Name of each trace's scenario.
    repeats
        Number of each repeat; None, or a negative number, for a scenario that has no others.
    choices
        The option that each continuation holds, None or empty without one; None if no text was
        generated.

    Returns
    -------
    dict
        ``scenario_name`` and ``repeat`` (−1 for none) if there are repeats, ``choice`` (empty for
        none) if text was generated.
    """
    numbers = np.array([-1 if one is None else int(one) for one in repeats], np.int64)
    out: dict[str, np.ndarray] = {}
    if choices is not None:
        out[CHOICE] = np.array([one or "" for one in choices], object)
    if (numbers >= 0).any():
        out[REPEAT] = numbers
        out[SCENARIO_NAME] = np.array(list(scenarios), object)
    return out


def columns_of_traces(traces: Iterable[Mapping[Any, Any]]) -> dict[str, np.ndarray]:
    """Return the same of traces, from their attributes."""
    stored = list(traces)
    is_generated = any(one.get("generation") or one.get(CHOICE) for one in stored)
    return columns_of_repeats(
        [str(one["scenario"]) for one in stored],
        [one.get(REPEAT) for one in stored],
        [one.get(CHOICE) for one in stored] if is_generated else None,
    )


def beside(columns: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return columns of metadata beside those of repeats, which keep their names.

    A column of metadata that is called as one of them becomes ``metadata_NAME``.
    """
    renamed = {f"metadata_{name}" if name in own else name: at for name, at in columns.items()}
    return {**own, **renamed}


def varies_within(values: np.ndarray, blocks: np.ndarray) -> bool:
    """Tell whether values ``(n,)`` differ among the rows of any block ``(n,)``."""
    codes = pd.factorize(values)[0]
    _, first, of_block = np.unique(blocks, return_index=True, return_inverse=True)
    return bool((codes != codes[first][of_block]).any())


def correlations_within(
    outcome: np.ndarray,
    values: np.ndarray,
    blocks: np.ndarray,
    *,
    n_permutations: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Rank-correlate every column with an outcome within blocks of rows.

    Parameters
    ----------
    outcome
        ``(n,)``, finite.
    values
        ``(n, m)``, finite.
    blocks
        ``(n,)`` number of each row's block.
    n_permutations, seed
        Number and seed of the orders drawn, in which rows of a block change places.

    Returns
    -------
    rho, p
        ``(m,)`` correlation of the ranks within blocks, each block's mean taken off, and its
        two-sided permutation p-value; NaN where one does not vary within any block.
    smallest_p
        The smallest p-value that a permutation can give.
    """
    order = _ranks_within(outcome[:, None], blocks)[:, 0]
    ranks = _ranks_within(values, blocks)
    rho = order @ ranks
    rng = np.random.default_rng(seed)
    permuted = np.tile(order, (n_permutations + 1, 1))
    arrangements = 0.0
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        permuted[1:, rows] = rng.permuted(permuted[1:, rows], axis=1)
        same = np.unique(outcome[rows], return_counts=True)[1]
        arrangements += math.lgamma(len(rows) + 1) - sum(math.lgamma(n + 1) for n in same)
    count = np.zeros(len(rho))
    step = max(1, _BLOCK_VALUES // len(permuted))
    for start in range(0, len(rho), step):
        some = slice(start, start + step)
        reached = np.abs(permuted @ ranks[:, some]) >= np.abs(rho[some]) - _TIE
        count[some] = reached.sum(0)
    p = np.where(np.isnan(rho), np.nan, count / len(permuted))
    return rho, p, max(1 / len(permuted), math.exp(-arrangements))


def _ranks_within(columns: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Ranks of each column ``(n, m)`` within blocks, centred there, of length 1 in all."""
    centred = np.empty(columns.shape)
    for block in np.unique(blocks):
        rows = blocks == block
        ranks = stats.rankdata(columns[rows], axis=0)
        centred[rows] = ranks - ranks.mean(0)
    length = np.sqrt((centred**2).sum(0))
    return np.asarray(
        np.divide(centred, length, out=np.full_like(centred, np.nan), where=length > 0)
    )
