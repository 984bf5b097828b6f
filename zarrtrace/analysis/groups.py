"""Two groups of scenarios, and what is exchanged between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from zarrtrace.analysis.repeats import SCENARIO_NAME
from zarrtrace.analysis.resampling import TwoGroups, paired_blocks, two_groups
from zarrtrace.analysis.traces import (
    Data,
    metadata,
    repeats,
    require_whole_scenarios,
    scenario_names,
    scenario_tags,
)
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import Value, chosen_names, is_missing
from zarrtrace.suggestions import did_you_mean

#: A tag, names of scenarios, or a value of a column of metadata.
Group = Value | Sequence[str]
#: A column of metadata, or one label a scenario in the run's order.
Block = str | Sequence[Value]

_SHOWN = 10


class Groups(NamedTuple):
    """Names of the scenarios of two groups, and what the groups are called."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    name_a: str
    name_b: str


def groups_of(data: Data, group_a: Any, group_b: Any, by: str | None) -> Groups:
    """Return the scenarios of both groups.

    Parameters
    ----------
    data
        A run, or a table.
    group_a, group_b
        Tags or names of scenarios; values of `by` if that is given. None: that of the only two
        tags, or with `by` both of the only two values.
    by
        A column of metadata.

    Raises
    ------
    ConfigError
        If a group is not given and there are other than two tags.
    ScenarioError
        If a group names no scenario, is too small, or overlaps the other; if there is no column
        `by`, or it has other than two values and no groups are given.
    """
    if by is None:
        a, b = _two_tags(data, group_a, group_b)
        members = _members(data, a), _members(data, b)
    else:
        a, b = _two_values(data, group_a, group_b, by)
        column = metadata(data)[by]
        names = np.array(scenario_names(data), dtype=object)
        members = tuple(names[column == a]), tuple(names[column == b])
    _check(*members)
    called = [str(one) if isinstance(one, Value) else other for one, other in ((a, "A"), (b, "B"))]
    return Groups(*members, *called)


def _sizes_of_tags(data: Data) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for own in scenario_tags(data).values():
        for tag in own:
            sizes[tag] = sizes.get(tag, 0) + 1
    return sizes


def _two_tags(data: Data, group_a: Any, group_b: Any) -> tuple[Any, Any]:
    """Return the groups that are given; of two tags that there are, the one that is not."""
    given = [one for one in (group_a, group_b) if one is not None]
    if not all(isinstance(one, str | Sequence) for one in given):
        raise _needs_groups(data)
    for one in given:
        _members(data, one)  # refuses a name that is unknown
    if len(given) == 2:
        return group_a, group_b
    tags = list(_sizes_of_tags(data))
    if len(tags) != 2 or not all(one in tags for one in given):
        raise _needs_groups(data)
    if group_a is not None:
        return group_a, tags[1 - tags.index(group_a)]
    return (tags[1 - tags.index(group_b)], group_b) if group_b is not None else (tags[0], tags[1])


def _needs_groups(data: Data) -> ConfigError:
    sizes = _sizes_of_tags(data)
    shown = ", ".join(f"{tag!r} ({size})" for tag, size in list(sizes.items())[:_SHOWN])
    more = ", …" if len(sizes) > _SHOWN else ""
    return ConfigError(
        "contrast needs two groups",
        why=f"The run's tags, with the number of scenarios: {shown or 'none'}{more}. Only if there "
        "are exactly two are they taken without being named.",
        remedy="Give two tags or two lists of scenarios as group_a and group_b, or by= a column of "
        "metadata.",
    )


def _two_values(data: Data, group_a: Any, group_b: Any, by: str) -> tuple[Value, Value]:
    columns = metadata(data)
    if by not in columns:
        raise ScenarioError(
            f"the run has no column of metadata {by!r}",
            remedy=did_you_mean(by, columns, label="It has"),
        )
    values = [one for one in np.unique(columns[by]).tolist() if one != "" and not is_missing(one)]
    given = [one for one in (group_a, group_b) if one is not None]
    unknown = [one for one in given if not isinstance(one, Value) or one not in values]
    if unknown or len(given) == 1 or (not given and len(values) != 2):
        shown = ", ".join(map(repr, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")
        problem = f"has {len(values)} values"
        if given:
            problem = f"has no value {unknown[0]!r}" if unknown else "needs a second value"
        raise ScenarioError(
            f"metadata {by!r} {problem}",
            why=f"Its values are: {shown or 'all missing'}.",
            remedy="Give two of them as group_a and group_b.",
        )
    a, b = given or values
    return a, b


def _members(data: Data, group: Any) -> tuple[str, ...]:
    tagged = scenario_tags(data)
    if isinstance(group, str):
        found = tuple(name for name, own in tagged.items() if group in own)
        if not found:
            known = sorted({tag for own in tagged.values() for tag in own})
            raise ScenarioError(
                f"no scenario has the tag {group!r}",
                why="A group is a tag, or a list of names of scenarios.",
                remedy=did_you_mean(group, known, label="Tags there are"),
            )
        return found
    return tuple(chosen_names(list(tagged), list(group)))


def _check(a: Sequence[str], b: Sequence[str]) -> None:
    others = set(b)
    both = [name for name in a if name in others]
    if both:
        raise ScenarioError(
            f"scenario {both[0]!r} is in both groups", remedy="Leave it out of one of them."
        )
    for name, group in (("A", a), ("B", b)):
        if len(group) < 2:
            raise ScenarioError(
                f"group {name} has {len(group)} scenario(s): {', '.join(group) or 'none'}",
                why="A variance needs at least two.",
                remedy="Extract more scenarios, or choose a larger group.",
            )


# --- what is exchanged -------------------------------------------------------------------------


class Units(NamedTuple):
    """The units exchanged between the groups: scenarios, or blocks of them.

    Attributes
    ----------
    weights_a
        ``(unit, scenario)``: a unit's value is this mean of its scenarios' values. With
        `weights_b` those of group A alone.
    weights_b
        The same of group B, if each unit is a block that has scenarios of both; else None.
    in_a
        ``(unit,)`` which units are group A's; all if `weights_b` is given.
    """

    weights_a: np.ndarray
    weights_b: np.ndarray | None
    in_a: np.ndarray

    @property
    def sizes(self) -> tuple[int, int]:
        """Return how many units each group has."""
        n = len(self.in_a)
        in_a = int(self.in_a.sum())
        return (in_a, n - in_a) if self.weights_b is None else (n, n)

    def test(self, values: np.ndarray, n_permutations: int, seed: int) -> TwoGroups:
        """Compare the groups in values ``(scenario, m)``."""
        a = self.weights_a @ values
        if self.weights_b is None:
            return two_groups(a, self.in_a, n_permutations=n_permutations, seed=seed)
        b = self.weights_b @ values
        return paired_blocks(a, b, n_permutations=n_permutations, seed=seed)


class Exchange:
    """Scenarios of two groups, and the blocks that are exchanged as a whole.

    Parameters
    ----------
    in_a
        ``(scenario,)`` bool.
    blocks
        ``(scenario,)`` number of each one's block; None if scenarios are exchanged.
    unit
        Word for observations.
    """

    def __init__(
        self, in_a: np.ndarray, blocks: np.ndarray | None = None, unit: str = "scenarios"
    ) -> None:
        self.in_a, self.blocks, self.unit = in_a, blocks, unit
        mixed = np.intersect1d(*([], []) if blocks is None else (blocks[in_a], blocks[~in_a]))
        #: Whether blocks have scenarios of both groups, which then are compared within blocks.
        self.is_paired = len(mixed) > 0
        #: Scenarios that cannot be compared: others of their block are all in their own group.
        self.left_out = (
            np.zeros(len(in_a), bool)
            if blocks is None or not self.is_paired
            else ~np.isin(blocks, mixed)
        )

    def units(self, rows: np.ndarray) -> Units | None:
        """Return what is exchanged if these scenarios have values; None if it is too little."""
        in_a = self.in_a[rows]
        if self.blocks is None:
            found = Units(np.eye(len(in_a)), None, in_a)
        else:
            codes, blocks = pd.factorize(self.blocks[rows])
            member = codes == np.arange(len(blocks))[:, None]
            if self.is_paired:
                member = member[(member & in_a).any(1) & (member & ~in_a).any(1)]
                a, b = member & in_a, member & ~in_a
                found = Units(_means(a), _means(b), np.ones(len(member), bool))
            else:
                found = Units(_means(member), None, (member & in_a).any(1))
        return found if min(found.sizes) >= 2 else None

    def sizes(self, rows: np.ndarray) -> tuple[int, int]:
        """Return how many scenarios, or blocks, of each group these are."""
        if self.blocks is None:
            return int((rows & self.in_a).sum()), int((rows & ~self.in_a).sum())
        a, b = (np.unique(self.blocks[rows & own]) for own in (self.in_a, ~self.in_a))
        if self.is_paired:
            return (len(np.intersect1d(a, b)),) * 2
        return len(a), len(b)


def _means(member: np.ndarray) -> np.ndarray:
    return np.asarray(member / np.maximum(member.sum(1, keepdims=True), 1))


def exchange_of(data: Data, groups: Groups, block: Block | None) -> Exchange:
    """Return what is exchanged between two groups.

    Without `block`, the repeats of a scenario are one.

    Raises
    ------
    ScenarioError
        If there is no such column, a scenario's block is missing, or blocks are too few.
    ConfigError
        If repeats of a scenario are in several blocks.
    """
    chosen = (*groups.a, *groups.b)
    in_a = np.arange(len(chosen)) < len(groups.a)
    unit = "scenarios" if block is None else "blocks"
    if block is None and SCENARIO_NAME not in repeats(data):
        return Exchange(in_a)
    labels, called = _labels(data, SCENARIO_NAME if block is None else block)
    require_whole_scenarios(data, np.array(labels, dtype=object), called)
    at = pd.Index(scenario_names(data)).get_indexer(pd.Index(chosen))
    own = [labels[int(number)] for number in at]
    missing = [name for name, one in zip(chosen, own, strict=True) if one == "" or is_missing(one)]
    if missing:
        raise ScenarioError(
            f"scenario {missing[0]!r} is in no block: {called!r} is missing there",
            why=f"So it is for {len(missing)} of the {len(chosen)} scenarios that are compared.",
            remedy="Give it a value, or compare scenarios that have one.",
        )
    numbers = np.unique(np.array(own, dtype=object), return_inverse=True)[1]
    exchange = Exchange(in_a, numbers, unit)
    sizes = exchange.sizes(np.ones(len(chosen), bool))
    if min(sizes) < 2:
        raise _too_few(exchange, sizes, groups)
    return exchange


def _labels(data: Data, block: Block) -> tuple[Sequence[Any], str]:
    if isinstance(block, str):
        columns = metadata(data)
        if block not in columns:
            raise ScenarioError(
                f"the run has no column of metadata {block!r} for blocks",
                remedy=did_you_mean(block, columns, label="It has"),
            )
        return columns[block].tolist(), block
    names = scenario_names(data)
    if len(block) != len(names):
        raise ScenarioError(
            f"block has {len(block)} labels, and the run {len(names)} scenarios",
            remedy="Give one label a scenario in the run's order, or a column of metadata.",
        )
    return list(block), "block"


def _too_few(exchange: Exchange, sizes: tuple[int, int], groups: Groups) -> ScenarioError:
    one = exchange.unit.removesuffix("s")
    inner = "scenarios" if one == "block" else "repeats"
    remedy = "Extract scenarios of more blocks (templates)."
    if exchange.is_paired:
        what = f"{sizes[0]} {one} has {inner} of both groups"
        why = (
            f"Where groups differ within {one}s, a {one} is one observation: its difference. One "
            f"{one} cannot tell how much {one}s differ."
        )
    else:
        which = 0 if sizes[0] < 2 else 1
        what = f"group {(groups.name_a, groups.name_b)[which]} has {sizes[which]} {one}"
        why = f"A {one} is one observation, and a variance needs at least two."
    if one == "scenario":
        remedy = "Extract more scenarios: repeats of one are no further ones."
    return ScenarioError(what, why=why, remedy=remedy)
