"""Circular shifts of token positions: what is exchanged where the tokens of a prompt depend.

Features of one word fire together, neighbouring tokens resemble each other, and scenarios of one
template repeat both. A span that is moved along the prompt keeps all of that, and breaks only the
link between the span and the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import fft

from zarrtrace.analysis.traces import (
    Data,
    independent,
    metadata,
    require_whole_scenarios,
    scenario_names,
)
from zarrtrace.errors import ConfigError
from zarrtrace.suggestions import did_you_mean

#: Makes every scenario, with its repeats, a block of its own; no column of metadata is called so.
EACH = "scenario"

# Sums of the same numbers by another way differ by rounding, and must count as equal.
_TIE = 1e-9


def blocks_of(data: Data, column: str | None) -> np.ndarray:
    """Return the number of each scenario's block ``(scenario,)``.

    Parameters
    ----------
    data
        A run or a trace.
    column
        Column of metadata whose values are the blocks; ``"scenario"`` for one each; None for one
        block of all.

    Raises
    ------
    ConfigError
        If there is no such column.
    """
    count = len(scenario_names(data))
    if column is None:
        return np.zeros(count, np.int64)
    if column == EACH:
        return np.asarray(pd.factorize(independent(data))[0])
    columns = metadata(data)
    if column not in columns:
        raise ConfigError(
            f"block={column!r}: the scenarios have no such metadata",
            why="Blocks are the values of a column of metadata, such as the template or the game.",
            remedy=did_you_mean(column, [*columns, EACH]),
        )
    require_whole_scenarios(data, columns[column], column)
    return np.asarray(np.unique(columns[column], return_inverse=True)[1]).ravel()


class Shifts:
    """Shifts by which the token positions of each scenario are moved, in the same order for all.

    The first is 0, the observed place. Scenarios of one block are always moved together: by the
    same number of tokens, so that what a template repeats stays aligned. One block has every
    shift, from half a prompt backwards to half a prompt forwards; several blocks have shifts drawn
    independently.

    Parameters
    ----------
    lengths
        Tokens that are moved, by number of the scenario; those without any are left out.
    blocks
        Number of each scenario's block, see :func:`blocks_of`.
    n_permutations
        Shifts to draw if there are several blocks.
    seed
        Seed of the shifts drawn.

    Attributes
    ----------
    count
        Shifts, the observed one among them; 0 if there are no tokens.
    """

    def __init__(
        self,
        lengths: Mapping[int, int],
        blocks: np.ndarray,
        n_permutations: int,
        seed: int,
    ) -> None:
        self._lengths = {scenario: n for scenario, n in lengths.items() if n}
        self._blocks, self._seed = blocks, seed
        self._longest: dict[int, int] = {}
        for scenario, n in self._lengths.items():
            block = int(blocks[scenario])
            self._longest[block] = max(n, self._longest.get(block, 0))
        self._is_one = len(self._longest) == 1
        self.count = n_permutations + 1 if self._longest else 0
        if self._is_one:
            (self.count,) = self._longest.values()

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that the shifts can give; NaN if there are none."""
        return 1 / self.count if self.count else np.nan

    def of(self, scenario: int) -> np.ndarray:
        """Return the shifts of a scenario ``(count,)``, from 0 to its tokens exclusive."""
        block = int(self._blocks[scenario])
        longest = self._longest[block]
        # Half backwards: near the place itself no template is torn where prompts differ in length.
        if self._is_one:
            shifts = np.arange(longest) - (longest - 1) // 2
            shifts = np.append(0, shifts[shifts != 0])
        else:
            drawn = np.random.default_rng((self._seed, block)).integers(
                -((longest - 1) // 2), longest // 2 + 1, self.count - 1
            )
            shifts = np.append(0, drawn)
        return np.asarray(shifts % self._lengths[scenario])


def shifted_products(weights: np.ndarray, series: np.ndarray) -> np.ndarray:
    """Return the sum of products of weights and series, by how far the series are moved.

    Parameters
    ----------
    weights
        ``(token,)``.
    series
        ``(token, column)``.

    Returns
    -------
    np.ndarray
        ``(column, shift)``: ``Σ_t weights[t] · series[t − shift]``, circular.
    """
    n = len(weights)
    product = fft.rfft(weights)[:, None] * np.conj(fft.rfft(series, axis=0))
    return np.asarray(fft.irfft(product, n, axis=0).T)


def p_of_shifts(statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two-sided p-values of statistics whose first column is the observed one.

    Parameters
    ----------
    statistics
        ``(row, shift)``; NaN where a shift has no value, and first in rows without values.

    Returns
    -------
    p, p_familywise
        ``(row,)``: share of shifts with a value that reach the observed magnitude, itself counted
        (Phipson & Smyth 2010), and the share in which the largest standardised magnitude of any
        row does (Westfall & Young 1993, single step). NaN in rows without values.
    """
    p, familywise = np.full((2, len(statistics)), np.nan)
    if not statistics.shape[1]:
        return p, familywise
    known = ~np.isnan(statistics[:, 0])
    size = np.abs(statistics[known])
    has_value = ~np.isnan(size)
    spread = np.sqrt(np.mean(size**2, axis=1, keepdims=True, where=has_value))
    size = np.divide(size, spread, out=np.zeros_like(size), where=has_value & (spread > 0))
    p[known] = np.mean(size >= size[:, :1] - _TIE, axis=1, where=has_value)
    largest = np.max(size, axis=0, initial=0, where=has_value)[has_value.any(0)]
    familywise[known] = [(largest >= one - _TIE).mean() for one in size[:, 0]]
    return p, familywise


def sentence_of_smallest(shifts: Sequence[Shifts], block: str | None) -> str:
    """Say how small a p-value the shifts allow, and why."""
    possible = [one.smallest_p for one in shifts if one.count]
    if not possible:
        return "No p-value: no scenario has tokens that can be compared."
    text = f"No p-value can fall below {min(possible):.2g}"
    if max(possible) > min(possible):
        text += f" ({max(possible):.2g} where a span has the fewest places to be)"
    if block is None:
        return (
            f"{text}: its scenarios are moved together, because they may share a template. If "
            f"prompts were written independently, block={EACH!r} or a column of metadata allows "
            "smaller ones."
        )
    return f"{text}; scenarios of one {block} are moved together."
