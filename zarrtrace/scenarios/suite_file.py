"""YAML and JSONL files of scenarios: parsed, and refused with their line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr

import yaml
from pydantic import ValidationError

from zarrtrace.errors import ScenarioError, readable
from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile, problem_of
from zarrtrace.scenarios.yaml_loader import YAMLLoader

#: Larger than any scenario, or any YAML file, which is read whole.
MAX_BYTES = 2**28
# Scenarios need 6. libyaml builds deeper ones by recursion that overflows the stack.
_MAX_YAML_DEPTH = 50


def parse_yaml(path: Path, text: str) -> tuple[SuiteFile, list[str]]:
    """Parse a YAML file; returns file and line of each scenario, too."""
    loader: Any = None
    try:
        # The reader of its first characters complains at once.
        loader = YAMLLoader(text)
        _refuse_deep_yaml(path, text)
        node = loader.get_single_node()
        _refuse_odd_yaml(path, node)
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # An unclosed bracket is noticed behind the last line.
        line = min(mark.line + 1, len(text.splitlines())) if mark is not None else 1
        reason = getattr(error, "problem", None) or str(error)
        raise ScenarioError(
            f"{path}:{line}: not valid YAML: {reason}",
            remedy="Check quotes, colons and indentation around that line.",
        ) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors raise it, for example for !!int without digits.
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
        line = _line_of(node, problem_of(error).location)
        raise _invalid(f"{path}:{line}", error) from None
    lines = [_line_of(node, ("scenarios", i)) for i in range(len(suite.scenarios))]
    return suite, [f"{path}:{line}" for line in lines]


def read_jsonl(path: Path) -> Iterator[tuple[ScenarioEntry, str]]:
    """Read a JSONL file line by line: entries, each with its file and line."""
    is_empty = True
    with path.open("rb") as file:
        # Bytes end at "\n" alone: JSON strings may hold U+2028 and its like as they are.
        for number, content in enumerate(lines_of(path, file), start=1):
            where = f"{path}:{number}"
            line = content.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
            if not line.strip():
                continue
            is_empty = False
            yield _entry_of(line, where), where
    if is_empty:
        raise ScenarioError(f"{path}: holds no scenario", remedy="Write one JSON object a line.")


def _entry_of(line: str, where: str) -> ScenarioEntry:
    try:
        return ScenarioEntry.model_validate(decode_json(line))
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error.what}", remedy=error.remedy) from None
    except ValidationError as error:
        raise _invalid(where, error) from None
    except (ValueError, RecursionError) as error:  # JSON, or an integer that is too long
        raise ScenarioError(
            f"{where}: not valid JSON: {error}",
            remedy="Each line of a .jsonl file is one JSON object: a scenario.",
        ) from None


def lines_of(path: Path, file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Read a file's lines, none of which fills the memory."""
    while line := file.readline(MAX_BYTES):
        if len(line) == MAX_BYTES:
            raise ScenarioError(
                f"{path}: holds a line of more than {readable(MAX_BYTES)}",
                why="No scenario is that large; it is probably another file.",
                remedy="Check its name.",
            )
        yield line


def refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object, whose keys must differ."""
    entry: dict[str, Any] = {}
    for key, value in pairs:
        if key in entry:
            raise ScenarioError(f"key {key!r} stands twice", remedy="Keep one of the two.")
        entry[key] = value
    return entry


#: Decode JSON whose keys differ.
decode_json = json.JSONDecoder(object_pairs_hook=refuse_double_keys).decode


def _refuse_deep_yaml(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=YAMLLoader):
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


def _invalid(where: str, error: ValidationError) -> ScenarioError:
    problem = problem_of(error)
    return ScenarioError(
        f"{where}: {problem.path or 'the file'}: {problem.reason}", remedy=problem.remedy
    )
