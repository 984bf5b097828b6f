"""The README's examples run, and its commands are ones that tests run verbatim."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from zarrtrace.cli import group
from zarrtrace.scenarios import load_suite

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    text = README.read_text(encoding="utf-8")
    return [textwrap.dedent(found) for found in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def commands() -> list[list[str]]:
    """Return every zarrtrace command that the README shows, as arguments."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [
        shlex.split(line.removeprefix("$ zarrtrace "), comments=True)
        for line in lines
        if line.startswith("$ zarrtrace ")
    ]


@pytest.mark.torch
def test_python_examples_run(demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_run.parent.parent)
    assert demo_run.parts[-2:] == ("runs", "demo")
    for block in blocks("python"):
        for statement in block.split("\n"):
            assert len(statement) < 110
        exec(compile(block, "README", "exec"), {})  # noqa: S102 -- our own text


def test_scenario_file_example_is_valid(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    file = tmp_path / "own.yaml"
    file.write_text(example, encoding="utf-8")
    poor, rich = load_suite(file)
    assert poor.prompt.startswith("You hold $10,")
    assert [rich.prompt[a:b] for a, b in rich.spans["balance"]] == ["$180"]


def test_commands_parse() -> None:
    assert len(commands()) >= 7
    for arguments in commands():
        name, *rest = arguments
        command = group.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None, name
        command.make_context(name, rest)


def test_files_it_names_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`(scripts/\w[\w.]*)", text):
        assert (README.parent / target).exists(), target
