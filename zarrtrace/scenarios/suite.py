"""Suites: files of scenarios, read and built."""

from __future__ import annotations

import functools
import stat
from collections.abc import Sequence
from pathlib import Path

from zarrtrace.errors import ScenarioError, readable
from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile
from zarrtrace.scenarios.names import check_name, name_key
from zarrtrace.scenarios.scenario import DECISION, CharRange, Scenario
from zarrtrace.scenarios.spans import find_span, occurrences_of
from zarrtrace.scenarios.suite_file import parse_jsonl, parse_yaml
from zarrtrace.scenarios.templates import render_template, value_names

_MAX_FILE_BYTES = 2**28
_MAX_PROMPT = 2**22


def load_suite(path: str | Path) -> tuple[Scenario, ...]:
    """Read scenarios from a YAML file (``.yaml``, ``.yml``) or a JSONL file (``.jsonl``).

    Parameters
    ----------
    path
        YAML holds a list under ``scenarios``; JSONL holds one such entry a line.

    Raises
    ------
    ScenarioError
        If the file cannot be read or is not valid; the message names file, line and reason.
    """
    path = Path(path)
    try:
        _refuse_odd_file(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ScenarioError(
            f"{path}: no such scenario file", remedy="Give --scenarios a YAML or JSONL file."
        ) from None
    except (OSError, ValueError) as error:
        raise ScenarioError(
            f"{path}: cannot be read as UTF-8 text ({error})",
            remedy="Save the file as UTF-8 and check its permissions.",
        ) from error
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        suite, lines = parse_jsonl(path, text)
    elif suffix in (".yaml", ".yml"):
        suite, lines = parse_yaml(path, text)
    else:
        raise ScenarioError(
            f"{path}: unknown kind of scenario file {suffix or '(no ending)'!r}",
            remedy="Name it .yaml (a list under 'scenarios') or .jsonl (one scenario a line).",
        )
    return _build_all(path, suite, lines)


def _refuse_odd_file(path: Path) -> None:
    """Refuse what would never end, or not fit into memory, before it is read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ScenarioError(
            f"{path}: cannot be read: not a regular file",
            why="It is a folder, a pipe or a device.",
            remedy="Give --scenarios a YAML or JSONL file.",
        )
    if status.st_size > _MAX_FILE_BYTES:
        raise ScenarioError(
            f"{path}: larger than {readable(_MAX_FILE_BYTES)}",
            why="No file of scenarios is that large; it is probably another file.",
            remedy="Check --scenarios, or split the file.",
        )


def _build_all(path: Path, suite: SuiteFile, lines: Sequence[int]) -> tuple[Scenario, ...]:
    scenarios: list[Scenario] = []
    taken: dict[str, str] = {}
    for entry, line in zip(suite.scenarios, lines, strict=True):
        try:
            scenario = _build(entry, suite)
            key = name_key(scenario.name)
            if key in taken:
                raise ScenarioError(
                    f"scenario name {scenario.name!r} is taken by {taken[key]!r}",
                    why="Names that differ only in case or Unicode form are one folder on many "
                    "file systems.",
                    remedy="Rename one of the two.",
                )
        except ScenarioError as error:
            raise ScenarioError(
                f"{path}:{line}: {error.what}", why=error.why, remedy=error.remedy
            ) from None
        taken[key] = scenario.name
        scenarios.append(scenario)
    return tuple(scenarios)


def _build(entry: ScenarioEntry, suite: SuiteFile) -> Scenario:
    check_name(entry.name)
    if entry.prompt is not None and (entry.template is not None or entry.values):
        raise ScenarioError(
            f"scenario {entry.name!r} has a prompt and a template or values",
            remedy="Give either 'prompt', or 'template' and 'values'.",
        )
    spans: dict[str, tuple[CharRange, ...]] = {}
    template = entry.template or suite.template
    if entry.prompt is not None:
        prompt = entry.prompt
    elif template is not None:
        unused = set(entry.values) - set(value_names(template))
        if unused:
            raise ScenarioError(
                f"scenario {entry.name!r}: value {min(unused)!r} is not in its template",
                remedy=f"The template takes: {', '.join(value_names(template)) or 'none'}.",
            )
        prompt, spans = render_template(template, {**suite.defaults, **entry.values})
    else:
        raise ScenarioError(
            f"scenario {entry.name!r} has no prompt",
            remedy="Give it 'prompt', or 'template' (its own or the file's) and 'values'.",
        )
    _check_text(entry.name, prompt)
    occurrences = functools.cache(functools.partial(occurrences_of, prompt))
    for name, given in entry.spans.items():
        if name == DECISION:
            raise ScenarioError(
                f"scenario {entry.name!r}: span {DECISION!r} is always the last token",
                remedy="Give your span another name.",
            )
        spans[name] = (
            *spans.get(name, ()),
            *find_span(entry.name, name, given, prompt, occurrences),
        )
    return Scenario(
        name=entry.name,
        prompt=prompt,
        spans={name: tuple(sorted(set(ranges))) for name, ranges in spans.items()},
        tags=tuple(dict.fromkeys(entry.tags)),
        options=suite.options if entry.options is None else entry.options,
    )


def _check_text(name: str, prompt: str) -> None:
    if not prompt.strip():
        raise ScenarioError(f"scenario {name!r}: its prompt is empty", remedy="Give it text.")
    if len(prompt) > _MAX_PROMPT:
        raise ScenarioError(
            f"scenario {name!r}: its prompt has {len(prompt):,} characters",
            why=f"Up to {_MAX_PROMPT:,} are read, about a million tokens.",
            remedy="Shorten it, or split it into several scenarios.",
        )
