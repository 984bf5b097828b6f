"""YAML and JSONL files of scenarios: parsed, and refused with their line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile, TextSpan

# How pydantic names the members of a union within an error's location.
_UNION_MEMBER = re.compile(r"constrained-|literal\[|list\[|tuple\[|TextSpan$|(?:str|int|float)$")
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Scenarios need 6. libyaml builds deeper ones by recursion that overflows the stack.
_MAX_YAML_DEPTH = 50


def parse_yaml(path: Path, text: str) -> tuple[SuiteFile, list[int]]:
    """Parse a YAML file; returns the line of each scenario, too."""
    loader: Any = None
    try:
        # The reader of its first characters complains at once.
        loader = _YAML_LOADER(text)
        _refuse_deep_yaml(path, text)
        node = loader.get_single_node()
        _refuse_odd_yaml(path, node)
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # What is never closed is noticed behind the last line.
        line = min(mark.line + 1, len(text.splitlines())) if mark is not None else 1
        reason = getattr(error, "problem", None) or str(error)
        raise ScenarioError(
            f"{path}:{line}: not valid YAML: {reason}",
            remedy="Check quotes, colons and indentation around that line.",
        ) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What PyYAML's constructors make of, for example, !!int without digits.
        raise ScenarioError(
            f"{path}: not usable YAML: {type(error).__name__}",
            why="It holds a date, number or tag that is none.",
            remedy="See schema/README.md for the shape of a scenario file.",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    try:
        suite = SuiteFile.model_validate(data)
    except ValidationError as error:
        raise _invalid(path, error, lambda loc: _line_of(node, loc)) from None
    return suite, [_line_of(node, ("scenarios", i)) for i in range(len(suite.scenarios))]


def parse_jsonl(path: Path, text: str) -> tuple[SuiteFile, list[int]]:
    """Parse a JSONL file; returns the line of each scenario, too."""
    entries, lines = [], []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line, object_pairs_hook=_refuse_double_keys)
            entries.append(ScenarioEntry.model_validate(entry))
        except ScenarioError as error:
            raise ScenarioError(f"{path}:{number}: {error.what}", remedy=error.remedy) from None
        except ValidationError as error:
            raise _invalid(path, error, lambda _loc, number=number: number) from None
        except (ValueError, RecursionError) as error:  # JSON, or an integer that is too long
            raise ScenarioError(
                f"{path}:{number}: not valid JSON: {error}",
                remedy="Each line of a .jsonl file is one JSON object: a scenario.",
            ) from None
        lines.append(number)
    if not entries:
        raise ScenarioError(f"{path}: holds no scenario", remedy="Write one JSON object a line.")
    return SuiteFile(scenarios=entries), lines


def _refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for key, value in pairs:
        if key in entry:
            raise ScenarioError(f"key {key!r} stands twice", remedy="Keep one of the two.")
        entry[key] = value
    return entry


def _refuse_deep_yaml(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_YAML_DEPTH:
            raise ScenarioError(
                f"{path}: not usable YAML: nested too deep",
                why=f"Scenarios need 6 levels; more than {_MAX_YAML_DEPTH} are not read.",
                remedy="See schema/README.md for the shape of a scenario file.",
            )


def _refuse_odd_yaml(path: Path, root: yaml.Node | None) -> None:
    """Refuse aliases (they can expand without bound) and keys that stand twice."""
    seen: set[int] = set()
    stack = [] if root is None else [root]
    while stack:
        node = stack.pop()
        line = node.start_mark.line + 1
        if id(node) in seen:
            raise ScenarioError(
                f"{path}:{line}: YAML anchors and aliases are not supported",
                why="A few lines of them can expand to more than fits into memory.",
                remedy="Use the file's own 'template' and 'defaults' for what entries share.",
            )
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key.value, str) and key.value in keys:
                    raise ScenarioError(
                        f"{path}:{key.start_mark.line + 1}: key {key.value!r} stands twice",
                        remedy="Keep one of the two.",
                    )
                keys.add(key.value if isinstance(key.value, str) else "")
                stack += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            stack += node.value


def _line_of(node: yaml.Node | None, loc: Sequence[str | int]) -> int:
    """Line of the innermost YAML node on the way along `loc`."""
    if node is None:
        return 1
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            children = [value for key, value in node.value if key.value == str(step)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            children = node.value[step : step + 1]
        else:
            break
        if not children:
            break
        node = children[0]
    return int(node.start_mark.line) + 1


def _invalid(path: Path, error: ValidationError, line_of: Any) -> ScenarioError:
    first, *others = error.errors()
    if _UNION_MEMBER.match(str(first["loc"][-1:] and first["loc"][-1])):
        # None of several forms fits: the one that fits furthest is what was meant.
        alike = [e for e in others if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
        first = max([first, *alike], key=lambda e: len(e["loc"]))
    loc = tuple(step for step in first["loc"] if not _UNION_MEMBER.match(str(step)))
    where = ".".join(str(step) for step in loc) or "the file"
    remedy = "See schema/scenarios.schema.json for what an entry may hold."
    if first["type"] == "extra_forbidden":
        known = [*ScenarioEntry.model_fields, *SuiteFile.model_fields, *TextSpan.model_fields]
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        if close:
            remedy = f"Did you mean {close[0]!r}? {remedy}"
        reason = f"unknown field {loc[-1]!r}"
    else:
        reason = first["msg"]
    return ScenarioError(f"{path}:{line_of(loc)}: {where}: {reason}", remedy=remedy)
