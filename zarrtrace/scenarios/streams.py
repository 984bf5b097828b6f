"""Streams of scenarios: read twice, so that each one is final without all in memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.metadata import Column, Value
from zarrtrace.scenarios.names import name_key
from zarrtrace.scenarios.scenario import Scenario, changed
from zarrtrace.suggestions import did_you_mean


@dataclass(frozen=True)
class Draft:
    """A scenario before its suite has typed its metadata.

    Attributes
    ----------
    where
        Its entry's place, as messages begin.
    from_template
        Metadata that its template took as values.
    """

    scenario: Scenario
    where: str = ""
    from_template: frozenset[str] = frozenset()


@dataclass
class _Facts:
    """The findings of the first pass: a few bytes a scenario."""

    columns: dict[str, Column] = field(default_factory=dict)
    types: dict[str, type[Value]] = field(default_factory=dict)
    contents: array[int] = field(default_factory=lambda: array("q"))  # hashes by place


class Source:
    """Drafts of scenarios that can be read again and again.

    Parameters
    ----------
    drafts
        Reads them from the beginning.
    where
        How messages about the whole begin; a file's path.
    """

    def __init__(self, drafts: Callable[[], Iterator[Draft]], where: str = "") -> None:
        self.drafts = drafts
        self.where = where

    @cached_property
    def facts(self) -> _Facts:
        """Read all drafts once: check names against each other, and type the metadata."""
        facts, names, first = _Facts(), array("q"), None
        for draft in self.drafts():
            scenario = draft.scenario
            names.append(hash(name_key(scenario.name)))
            facts.contents.append(_content(scenario))
            for name in scenario.metadata:
                if name not in facts.columns:
                    facts.columns[name] = Column(name, lacking=first)
            for name, column in facts.columns.items():
                column.add(
                    scenario.name,
                    scenario.metadata.get(name),
                    from_template=name in draft.from_template,
                )
            first = first or scenario.name
        self._refuse_doubles(names)
        try:
            facts.types = {name: column.settle() for name, column in facts.columns.items()}
        except ScenarioError as error:
            raise placed(self.where, error) from None
        return facts

    def _refuse_doubles(self, names: array[int]) -> None:
        """Refuse names that a file system may take for one; equal hashes are looked at again."""
        hashes, counts = np.unique(np.frombuffer(names, np.int64), return_counts=True)
        suspects = set(hashes[counts > 1].tolist())
        if not suspects:
            return
        taken: dict[str, str] = {}
        for draft in self.drafts():
            name = draft.scenario.name
            key = name_key(name)
            if hash(key) not in suspects:
                continue
            if key in taken:
                error = ScenarioError(
                    f"scenario name {name!r} is taken by {taken[key]!r}",
                    why="Names that differ only in case or Unicode form are one folder on many "
                    "file systems.",
                    remedy="Rename one of the two.",
                )
                raise placed(draft.where, error)
            taken[key] = name

    def scenarios(self) -> Iterator[Scenario]:
        """Read the drafts again, each made final and compared with that of the first pass."""
        facts, count = self.facts, 0
        for draft in self.drafts():
            if facts.contents[count : count + 1].tolist() != [_content(draft.scenario)]:
                raise changed_error(draft.where)
            count += 1
            given = draft.scenario.metadata
            typed = {name: one.typed(given.get(name)) for name, one in facts.columns.items()}
            yield changed(draft.scenario, metadata=typed)
        if count != len(facts.contents):
            raise changed_error(self.where)


class ScenarioStream:
    """Scenarios of a file, a table or a sequence, one by one, as often as they are asked for.

    The first use reads all of them once, to check them, to compare their names and to find the type
    of each column of metadata; it keeps a few bytes a scenario. Every later pass yields final
    scenarios, and raises if they are not those of the first pass. :func:`stream` makes one.

    >>> suite = stream("prompts.jsonl")
    >>> len(suite), suite.metadata
    (100000, {'game': <class 'str'>, 'balance': <class 'float'>})
    >>> for scenario in suite: ...
    """

    def __init__(self, source: Source, chosen: frozenset[str] | None = None) -> None:
        self._source = source
        self._chosen = chosen

    def __iter__(self) -> Iterator[Scenario]:
        """Yield the scenarios in order."""
        every = self._source.scenarios()
        if self._chosen is None:
            return every
        return (scenario for scenario in every if scenario.name in self._chosen)

    def __len__(self) -> int:
        """Return the number of scenarios."""
        return len(self._source.facts.contents) if self._chosen is None else len(self._chosen)

    @property
    def metadata(self) -> dict[str, type[Value]]:
        """Type of each column of metadata in the whole source: bool, int, float or str."""
        return dict(self._source.facts.types)

    def only(self, names: Iterable[str]) -> ScenarioStream:
        """Return a stream of the scenarios that have one of some names; of all for no name.

        Raises
        ------
        ScenarioError
            If no scenario has one of the names.
        """
        wanted = dict.fromkeys(names)
        if not wanted:
            return self
        found = {scenario.name for scenario in self if scenario.name in wanted}
        for name in wanted:
            if name not in found:
                known = [scenario.name for scenario in self]
                raise ScenarioError(
                    f"no scenario {name!r}", remedy=did_you_mean(name, known, label="The suite has")
                )
        return ScenarioStream(self._source, frozenset(wanted))


def placed(where: str, error: ScenarioError) -> ScenarioError:
    """Return an error that begins with a place."""
    what = f"{where}: {error.what}" if where else error.what
    return ScenarioError(what, why=error.why, remedy=error.remedy)


def changed_error(where: str) -> ScenarioError:
    """Return the error for scenarios that are not those of the first pass."""
    error = ScenarioError(
        "the scenarios have changed since they were first read",
        why="They are read several times, and something wrote to them in between.",
        remedy="Start again when they are complete.",
    )
    return placed(where, error)


def _content(scenario: Scenario) -> int:
    """Hash all that a draft says, types included."""
    return hash(repr(vars(scenario)))
