"""Scenarios of a suite by their names."""

from __future__ import annotations

from collections.abc import Sequence

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.scenario import Scenario
from zarrtrace.suggestions import did_you_mean


def only_named(scenarios: Sequence[Scenario], names: Sequence[str]) -> tuple[Scenario, ...]:
    """Return the scenarios that have one of some names, or all if no name is given.

    Raises
    ------
    ScenarioError
        If no scenario has one of the names.
    """
    known = [scenario.name for scenario in scenarios]
    for name in names:
        if name not in known:
            raise ScenarioError(
                f"no scenario {name!r}", remedy=did_you_mean(name, known, label="The suite has")
            )
    return tuple(one for one in scenarios if not names or one.name in names)
