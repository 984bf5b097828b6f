"""Messages between the client of a cluster and its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zarrtrace.extraction.options import Options
from zarrtrace.records import Continuation
from zarrtrace.scenarios import Scenario
from zarrtrace.storage import Location

# Larger tasks would be lost with a worker, and leave others idle at the end.
_SCENARIOS_A_TASK = 32
_TOKENS_A_TASK = 8192
_TASKS_A_WORKER = 4


@dataclass(frozen=True)
class Setup:
    """Model and SAEs that a worker loads once and keeps.

    Attributes
    ----------
    options
        Options of the extraction; the client has read the scenarios.
    base
        Where the client runs: relative paths begin there.
    """

    options: Options
    base: Path


@dataclass(frozen=True)
class Order:
    """Options that all tasks of a run share.

    Attributes
    ----------
    run
        Name of this client's work, under which workers report.
    setup
        Model and SAEs to load.
    folder
        The run, which the client has created and holds the lock of.
    batch_size
        Scenarios in one forward pass.
    repair, allow_nonfinite
        As for :func:`zarrtrace.extraction.extract_run`.
    config
        Versions, weights and options that every worker must find; without the scenarios.
    """

    run: str
    setup: Setup
    folder: Location
    batch_size: int
    repair: bool
    allow_nonfinite: bool
    config: Mapping[str, Any]


@dataclass(frozen=True)
class TokenizedScenarios:
    """Some scenarios as the model's tokenizer reads them.

    Attributes
    ----------
    tokens
        Length of each.
    blocked
        Scenarios whose attention is computed by blocks of queries.
    digests
        Digests that a resumed run compares.
    disk_bytes
        Expected size of their traces.
    worker, config
        The worker's name, and its configuration of a run without the scenarios.
    """

    tokens: Mapping[str, int]
    blocked: frozenset[str]
    digests: Mapping[str, str]
    disk_bytes: int
    worker: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class RunSettings:
    """Settings that hold for all scenarios of a run.

    Attributes
    ----------
    config
        Configuration that a resumed run must agree with; without the scenarios.
    batch_size
        Scenarios in one forward pass.
    groups
        Indices of the scenarios that go through the model together.
    layers
        Number of layers of each scenario.
    notes
        Sentences about what is left out.
    """

    config: Mapping[str, Any]
    batch_size: int
    groups: Sequence[Sequence[int]]
    layers: int
    notes: tuple[str, ...]


class Item(NamedTuple):
    """A trace to be written.

    Attributes
    ----------
    scenario
        Its scenario.
    number
        Number of the continuation; 0 if there is one, or none.
    name
        The trace's name.
    continuation
        The continuation; None without.
    """

    scenario: Scenario
    number: int
    name: str
    continuation: Continuation | None = None


Group = tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """The plan of a run on a cluster."""

    setup: Setup
    items: tuple[Item, ...]
    tokens: Mapping[str, int]
    disk_bytes: int
    settings: RunSettings
    config: Mapping[str, Any]

    def tasks(self, workers: int) -> list[tuple[Group, ...]]:
        """Pack groups into tasks of similar length, the longest first."""
        groups = [tuple(self.items[at] for at in group) for group in self.settings.groups]
        lengths = [sum(self.tokens[one.name] for one in group) for group in groups]
        if self.settings.batch_size == 1:  # else they are in order already, and must stay in it
            order = sorted(range(len(groups)), key=lambda at: lengths[at])
            groups, lengths = [groups[at] for at in order], [lengths[at] for at in order]
        parts = _TASKS_A_WORKER * workers if workers > 1 else 1
        most = min(_TOKENS_A_TASK, sum(lengths) / parts)
        tasks: list[list[Group]] = []
        tokens = 0.0
        for group, length in zip(groups, lengths, strict=True):
            held = sum(map(len, tasks[-1])) if tasks else 0
            if not tasks or tokens + length > most or held + len(group) > _SCENARIOS_A_TASK:
                tasks.append([])
                tokens = 0
            tasks[-1].append(group)
            tokens += length
        return [tuple(task) for task in reversed(tasks)]
