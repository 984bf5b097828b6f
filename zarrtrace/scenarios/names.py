"""Names of scenarios, which become folders and Zarr nodes, and of what stands in them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zarrtrace.errors import ScenarioError
from zarrtrace.suggestions import did_you_mean

#: The span that every scenario has: its last token, where the model decides what to say next.
DECISION = "decision"

#: Spans of what a model generated: all of it, and the answer that was found in it.
COMPLETION, ANSWER = "completion", "answer"

#: Stands between a scenario's name and the number of its repeat in the name of a trace.
REPEAT = "~"

#: Names of spans, values, marks and metadata.
IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"

_SAFE_NAME = re.compile(r"[^\W_][\w.\-]*")
_REPEAT_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
_DEVICE_NAMES = frozenset(
    {"con", "prn", "aux", "nul", "clock$"}
    | {f"{port}{i}" for port in ("com", "lpt") for i in range(10)}
)
_RESERVED_NAMES = frozenset({"zarr.json", "index"}) | _DEVICE_NAMES
_MAX_NAME = 100


def check_name(name: str) -> str:
    """Return `name` if it is safe as a folder and Zarr node name.

    Raises
    ------
    ScenarioError
        If it is empty, too long, reserved, or could leave its folder.
    """
    rule = (
        "A name starts with a letter or digit and goes on with letters, digits, '_', '-' or '.', "
        f"at most {_MAX_NAME} in all; it becomes a folder of the run."
    )
    problem = ""
    if not name:
        problem = "is empty"
    elif len(name.encode("utf-8", "replace")) > _MAX_NAME:
        problem = f"is longer than {_MAX_NAME} bytes"
    elif not _SAFE_NAME.fullmatch(name) or name.endswith("."):
        problem = "is not safe as a folder name"
    elif unicodedata.normalize("NFC", name) != name:
        problem = "is not in Unicode normal form NFC"
    elif name.casefold() in _RESERVED_NAMES or name.casefold().split(".")[0] in _DEVICE_NAMES:
        problem = "is reserved"
    if problem:
        shown = ascii(name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}...")
        raise ScenarioError(f"scenario name {shown} {problem}", remedy=rule)
    return name


def trace_name(scenario: str, repeat: int | None) -> str:
    """Name the trace of a scenario's repeat; None if there is only one."""
    return scenario if repeat is None else f"{scenario}{REPEAT}{repeat}"


def name_of(attributes: Mapping[Any, Any]) -> str:
    """Return a trace's name, which is unique in its run, by the attributes of its dataset."""
    return trace_name(str(attributes["scenario"]), attributes.get("repeat"))


def sample_names(scenarios: Iterable[Any], repeats: Iterable[int] | None) -> list[str]:
    """Name the traces that samples are of, by the table's coordinates `scenario` and `repeat`."""
    if repeats is None:
        return [str(name) for name in scenarios]
    return [trace_name(str(name), int(n)) for name, n in zip(scenarios, repeats, strict=True)]


def split_trace_name(name: str) -> tuple[str, int | None]:
    """Return the scenario of a trace and the number of its repeat, by the trace's name."""
    scenario, _, number = name.partition(REPEAT)
    return (scenario, int(number)) if _REPEAT_NUMBER.fullmatch(number) else (name, None)


def first_repeats(names: Iterable[str]) -> list[bool]:
    """Tell which traces are the first of their scenario, by the names of all in order."""
    scenarios = [split_trace_name(name)[0] for name in names]
    first = {scenario: number for number, scenario in reversed([*enumerate(scenarios)])}
    return [first[scenario] == number for number, scenario in enumerate(scenarios)]


def check_trace_name(name: str) -> str:
    """Return `name` if a trace may have it: that of a scenario, or of one of its repeats.

    Raises
    ------
    ScenarioError
        As :func:`check_name`.
    """
    check_name(split_trace_name(name)[0])
    return name


def chosen_names(names: Sequence[str], chosen: Sequence[str] | None) -> Sequence[str]:
    """Return the traces that were chosen, in the run's order; all if None.

    Parameters
    ----------
    names
        Names of all traces.
    chosen
        Names of traces, or of scenarios, which stand for all their repeats.

    Raises
    ------
    ScenarioError
        If the run has no such trace or scenario.
    """
    if chosen is None:
        return names
    scenario_of = {name: split_trace_name(name)[0] for name in names}
    known = {*names, *scenario_of.values()}
    for name in chosen:
        if name not in known:
            raise ScenarioError(
                f"the run has no scenario {name!r}",
                remedy=did_you_mean(name, names, label="It has"),
            )
    wanted = set(chosen)
    return [name for name in names if name in wanted or scenario_of[name] in wanted]


def name_key(name: str) -> str:
    """Return what two names share if a file system may take them for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def default_name(place: int) -> str:
    """Name a scenario without a name by its place in the suite, counted from 0."""
    return f"scenario_{place}"


def label(name: str) -> str:
    """Return what messages call a scenario; `name` is empty until a suite names it."""
    return f"scenario {name!r}" if name else "the scenario"
