"""Which scenarios a run is of: prompts given as they are, or some of a suite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.scenario import Scenario
from zarrtrace.suggestions import did_you_mean


def from_prompts(prompts: Iterable[str]) -> tuple[Scenario, ...]:
    """Make scenarios of prompts, word for word, named ``scenario_0`` and so on.

    Raises
    ------
    ScenarioError
        If a prompt is empty.
    """
    scenarios = tuple(Scenario(f"scenario_{at}", text) for at, text in enumerate(prompts))
    for scenario in scenarios:
        if not scenario.prompt:
            raise ScenarioError(
                f"{scenario.name}: the prompt is empty", remedy="Give at least one word."
            )
    return scenarios


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
