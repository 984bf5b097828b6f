"""The house style, as far as it can be counted: sizes, names and first words."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "zarrtrace"
TESTS = sorted(Path(__file__).parent.glob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 450
MOST_FUNCTION_LINES = 40
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Words that begin a sentence without its subject.
SUBJECTLESS = re.compile(r"(What|Who|Whoever|Of|Those|How many)\b")
IDIOMS = re.compile(
    r"\b(gone on with|anew|whoever|beside each other|what is not 0|(is|are) not 0)\b", re.I
)


def nodes(files: list[Path], kinds: tuple[type[ast.AST], ...]) -> Iterator[tuple[Path, Any]]:
    """Yield the nodes of some kinds in the syntax of some files."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield file, node


def is_near(one: str, other: str) -> bool:
    """Whether one letter more, less or another makes one name the other."""
    short, long = sorted((one, other), key=len)
    if len(long) == len(short):
        return sum(a != b for a, b in zip(short, long, strict=True)) == 1
    return any(long[:at] + long[at + 1 :] == short for at in range(len(long)))


def test_names_a_letter_apart_are_near() -> None:
    assert is_near("encoder", "encoders")
    assert is_near("labels", "labeld")
    assert not is_near("table", "trace")
    assert not is_near("labels", "labels")


def test_modules_are_short() -> None:
    lengths = {
        str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines())
        for file in MODULES
    }
    assert {name for name, n in lengths.items() if n > MOST_LINES} == set()


def test_no_two_modules_of_a_package_are_a_letter_apart() -> None:
    pairs = [
        (str(one), str(other))
        for one, other in itertools.combinations(MODULES, 2)
        if one.parent == other.parent and is_near(one.stem, other.stem)
    ]
    assert pairs == []


def test_most_functions_fit_a_screen() -> None:
    lengths = sorted(node.end_lineno - node.lineno + 1 for _, node in nodes(MODULES, FUNCTIONS))
    assert lengths[int(len(lengths) * 0.95)] <= MOST_FUNCTION_LINES


def test_docstrings_begin_with_their_subject() -> None:
    found = [
        f"{file.name}: {line.strip()}"
        for file, node in nodes([*MODULES, *TESTS], (ast.Module, ast.ClassDef, *FUNCTIONS))
        for line in (ast.get_docstring(node) or "").splitlines()
        if SUBJECTLESS.match(line.strip())
    ]
    assert found == []


def test_idioms_of_no_meaning_are_gone() -> None:
    found = [
        f"{file.name}: {line.strip()}"
        for file in MODULES
        for line in file.read_text(encoding="utf-8").splitlines()
        if IDIOMS.search(line)
    ]
    assert found == []
