"""Which token positions of a prompt are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.format.attributes import SpanAttributes
from zarrtrace.scenarios.names import ANSWER, COMPLETION, DECISION
from zarrtrace.scenarios.scenario import Scenario
from zarrtrace.suggestions import did_you_mean

#: ``"all"``, ``"last"``, ``"spans"``, names of spans, or integers, negative ones from the end.
Positions = str | tuple[str, ...] | tuple[int, ...]

_WORDS = ("all", "last", "spans")


def parse_positions(given: str | int | Iterable[int] | Iterable[str], option: str) -> Positions:
    """Return positions as options hold them; text is a word, or names or integers with commas.

    Parameters
    ----------
    given
        Argument of a caller.
    option
        Its name in errors.

    Raises
    ------
    ConfigError
        If it is nothing of this kind.
    """
    if isinstance(given, str) and given in _WORDS:
        return given
    if isinstance(given, str):
        parts: list[object] = [part.strip() for part in given.split(",")]
        if all(_is_number(str(part)) for part in parts):
            parts = [int(str(part)) for part in parts]
    elif isinstance(given, Iterable):
        parts = list(given)
    else:
        parts = [given]
    if parts and all(isinstance(part, str) and part for part in parts):
        return tuple(dict.fromkeys(map(str, parts)))
    try:
        numbers = [part.__index__() for part in parts]  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        raise _unknown(option, given) from None
    if not numbers or any(isinstance(part, bool) for part in parts):
        raise _unknown(option, given)
    return tuple(numbers)


def _unknown(option: str, given: object) -> ConfigError:
    return ConfigError(
        f"{option} {given}",
        why="These are no positions of tokens.",
        remedy="Give all, last, spans, names of spans, or positions such as 0,5,-1.",
    )


def _is_number(text: str) -> bool:
    digits = text.removeprefix("-")
    # Lengths too: Python refuses to read thousands of digits.
    return digits.isdecimal() and len(digits) < 10


def as_text(positions: Positions) -> str:
    """Return positions as the command line takes them."""
    return positions if isinstance(positions, str) else ",".join(map(str, positions))


def as_json(positions: Positions | None) -> Any:
    """Return positions as a run's configuration holds them: a word, or a sorted list."""
    return sorted(positions, key=str) if isinstance(positions, tuple) else positions


def _names(positions: Positions | None) -> tuple[str, ...]:
    """Return the names of spans among positions."""
    if positions is None or isinstance(positions, str):
        return ()
    return tuple(one for one in positions if isinstance(one, str))


def check_spans(
    positions: Positions | None,
    scenarios: Iterable[Scenario],
    option: str,
    *,
    generated: bool = False,
) -> None:
    """Refuse names that no scenario has as a span, and scenarios that have none of the names.

    Parameters
    ----------
    positions
        Which ones; None and words name no spans.
    scenarios, option
        The suite, and what chose the positions, for errors.
    generated
        Whether there are continuations: each is a span, and may hold the answer.

    Raises
    ------
    ConfigError, ScenarioError
    """
    if isinstance(positions, str) and positions not in _WORDS:
        raise _unknown(option, positions)
    wanted = _names(positions)
    if not wanted:
        return
    known: dict[str, None] = {}
    without = None
    for scenario in scenarios:
        own = {*scenario.spans, DECISION, *([COMPLETION] if generated else [])}
        known |= dict.fromkeys([*own, *([ANSWER] if generated else [])])
        if without is None and own.isdisjoint(wanted):
            without = scenario.name
    for name in wanted:
        if name not in known:
            raise ScenarioError(
                f"{option}: no scenario has a span {name!r}",
                why=f"Names are those of spans, or one of {', '.join(_WORDS)}.",
                remedy=did_you_mean(name, sorted(known)),
            )
    if without is not None:
        raise _none_left(without, option, wanted)


def _none_left(scenario: str | None, option: str, wanted: Iterable[str]) -> ScenarioError:
    return ScenarioError(
        f"{option} {','.join(wanted)}: scenario {scenario!r} has none of these spans",
        why="No position of it would be stored.",
        remedy="Add a span that it has, such as decision, or leave it out (--scenario).",
    )


def positions_of(
    wanted: Positions, name: str, tokens: int, spans: Mapping[str, SpanAttributes], option: str
) -> tuple[int, ...]:
    """Return the token positions of a prompt, ascending.

    Parameters
    ----------
    wanted
        Which ones.
    name, tokens, spans
        Name, number of tokens and spans of the scenario.
    option
        Option that chose them, for errors.

    Raises
    ------
    ConfigError
        If one is not in the prompt.
    ScenarioError
        If the scenario has none of the spans.
    """
    if isinstance(wanted, str):
        if wanted == "all":
            return tuple(range(tokens))
        if wanted == "last":
            return (tokens - 1,)
        names = tuple(spans)
    else:
        names = _names(wanted)
        for position in wanted:
            if isinstance(position, int) and not -tokens <= position < tokens:
                raise ConfigError(
                    f"{option} {position}: scenario {name!r} has {tokens} tokens",
                    remedy=f"Give positions from {-tokens} to {tokens - 1}.",
                )
        if not names:
            return tuple(sorted({int(position) % tokens for position in wanted}))
    found = {at for one in names if one in spans for at in spans[one].tokens}
    if not found:
        raise _none_left(name, option, names)
    return tuple(sorted(found))
