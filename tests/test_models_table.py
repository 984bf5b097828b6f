"""README's table of models: current, and made of the families that tests try."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models_table() -> Any:
    spec = importlib.util.spec_from_file_location(
        "models_table", ROOT / "scripts" / "models_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def readme(models_table: Any, tmp_path: Path) -> Path:
    file = tmp_path / "README.md"
    file.write_text(
        f"before\n{models_table.BEGIN}\nold\n{models_table.END}\nafter\n", encoding="utf-8"
    )
    return file


def _run(models_table: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["models_table.py", *map(str, arguments)])
    code: int = models_table.main()
    return code


def test_tables_of_models_are_current(models_table: Any) -> None:
    for file in sorted((ROOT / "zarrtrace").rglob("README.md")):
        text = file.read_text(encoding="utf-8")
        if models_table.BEGIN in text:
            assert models_table.with_table(text) == text, f"scripts/models_table.py {file}"


def test_every_family_is_in_the_row_of_its_outcome(models_table: Any) -> None:
    rows = [row.strip("| ").split(" | ") for row in models_table.table().splitlines()[2:]]
    outcomes = {label: row[0] for row in rows for label in row[-1].split(", ")}
    assert len(outcomes) == len(FAMILIES)
    for name, family in FAMILIES.items():
        outcome = outcomes[models_table.label(name)]
        assert outcome.partition(":")[0] == (
            "no" if family.refused else "yes" if family.attention is None else "partly"
        )
        assert (family.refused or family.without or "yes") in outcome


def test_check_tells_an_old_table_and_writes_nothing(
    models_table: Any,
    readme: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = readme.read_bytes()
    assert _run(models_table, monkeypatch, readme, "--check") == 1
    assert "not current" in capsys.readouterr().err
    assert readme.read_bytes() == before
    assert _run(models_table, monkeypatch, readme) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text.splitlines()
    assert _run(models_table, monkeypatch, readme, "--check") == 0


@pytest.mark.parametrize("text", ["", "{end}{begin}", "{begin}{end}{begin}{end}"])
def test_files_without_the_two_comments_are_refused(models_table: Any, text: str) -> None:
    with pytest.raises(SystemExit, match="must hold"):
        models_table.with_table(text.format(begin=models_table.BEGIN, end=models_table.END))
