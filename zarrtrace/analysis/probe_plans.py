"""The question of a probe in numbers: target, groups, folds, permutations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from zarrtrace.analysis.crossvalidation import group_folds
from zarrtrace.analysis.scores import auc, r_squared
from zarrtrace.analysis.targets import (
    PermutedTarget,
    Target,
    exchanged,
    read_confounds,
    read_groups,
    read_target,
)
from zarrtrace.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Target, samples and folds of a probe.

    Attributes
    ----------
    target
        With its name.
    groups_name
        The column of groups.
    groups
        ``(sample,)`` numbers from 0 of those kept; −1 of others.
    confounds
        ``(sample, column)``.
    confound_names
        As given.
    kept
        ``(sample,)`` bool: all of target, group and confounds are known.
    fold
        ``(sample,)``, −1 where not kept.
    exchange
        The target of the kept samples, and its permutations.
    seed
        Seed of resampled groups.
    """

    target: Target
    groups_name: str
    groups: np.ndarray
    confounds: np.ndarray
    confound_names: tuple[str, ...]
    kept: np.ndarray
    fold: np.ndarray
    exchange: PermutedTarget
    seed: int

    @property
    def n_permutations(self) -> int:
        """Permutations besides the observed order."""
        return int(self.exchange.columns.shape[1]) - 1

    def score(
        self, y: np.ndarray, predicted: np.ndarray, fold: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Return scores by weights ``(k, n)`` of samples."""
        if self.target.classes:
            return auc(y, predicted, fold, weights)
        return r_squared(y, predicted, weights)


def make_plan(
    rows: xr.Dataset,
    target: str | xr.DataArray,
    groups: str | None,
    confounds: Sequence[str],
    folds: int,
    n_permutations: int,
    seed: int,
) -> Plan:
    """Read target, groups and confounds; assign folds; permute.

    Parameters are those of :func:`zarrtrace.analysis.probe`.

    Raises
    ------
    ScenarioError, ConfigError
        If there is no such column, or too few groups to answer.
    """
    if isinstance(confounds, str):
        confounds = [confounds]
    wanted = read_target(rows, target)
    name, codes = read_groups(rows, groups)
    beside = read_confounds(rows, confounds)
    kept = np.isfinite(wanted.values) & (codes >= 0) & np.isfinite(beside).all(1)
    numbers = np.full(len(kept), -1)
    numbers[kept] = np.unique(codes[kept], return_inverse=True)[1]
    require_groups(int(numbers.max()) + 1, folds, name)
    fold = np.full(len(kept), -1)
    fold[kept] = group_folds(numbers[kept], folds, seed)
    y = wanted.values[kept]
    require_values(wanted, y, fold[kept])
    exchange = exchanged(y, numbers[kept], beside[kept], n_permutations, seed)
    return Plan(wanted, name, numbers, beside, tuple(confounds), kept, fold, exchange, seed)


def require_groups(n_groups: int, folds: int, name: str) -> None:
    """Refuse fewer groups than folds, and folds that leave one group to train on."""
    if folds < 2:
        raise ConfigError(
            f"folds={folds}", why="A probe is scored on samples that it was not trained on.",
            remedy="Give at least 2.",
        )  # fmt: skip
    if n_groups < folds or n_groups - -(-n_groups // folds) < 2:
        raise ConfigError(
            f"{n_groups} group(s) of {name!r} are too few for {folds} folds",
            why="A fold holds whole groups, and two groups at least must remain to choose a "
            "penalty.",
            remedy="Extract more groups, or ask for fewer folds.",
        )


def require_values(target: Target, y: np.ndarray, fold: np.ndarray) -> None:
    """Refuse folds in which there is nothing to learn, or nothing to tell apart."""
    numbers = np.unique(fold)
    both = [len(np.unique(y[fold == number])) > 1 for number in numbers]
    learnt = [len(np.unique(y[fold != number])) > 1 for number in numbers]
    if all(learnt) and (any(both) or not target.classes):
        return
    raise ConfigError(
        f"the target {target.name!r} has one value in "
        + ("each fold" if all(learnt) else "all folds but one"),
        why="Its other values are in too few groups.",
        remedy="Extract more groups of the rarer value, ask for fewer folds, or try another seed.",
    )
