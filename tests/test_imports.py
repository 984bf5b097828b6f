"""What is imported when: reading needs no torch, and help needs next to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fakes
import pytest

HEAVY = (
    "torch", "transformers", "sae_lens", "zarr", "xarray", "pydantic", "pandas", "matplotlib",
    "obstore",
)  # fmt: skip


def imported(code: str, *arguments: str) -> set[str]:
    """Return which of the heavy packages a program has imported when it ends."""
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: sys.stderr.write('HEAVY ' + ' '.join(set({HEAVY!r}) "
        "& set(sys.modules))))\n"
        f"{code}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert "HEAVY" in done.stderr, done.stderr
    return set(done.stderr.rpartition("HEAVY")[2].split())


CLI = "from zarrtrace.cli import main\nmain()"


def test_import_is_light() -> None:
    assert imported("import zarrtrace") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["extract", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    assert imported(CLI, *arguments) == set()


def test_reading_needs_no_torch(shared_run: fakes.FakeRun, tmp_path: Path) -> None:
    run = str(shared_run.path)
    assert imported(CLI, "info", run) == {"pydantic"}
    for arguments in (["verify", run], ["export", run, "-o", str(tmp_path / "npz")]):
        assert not imported(CLI, *arguments) & {"torch", "transformers", "sae_lens", "obstore"}
    opened = imported(f"import zarrtrace; zarrtrace.open_run({run!r})")
    assert "xarray" in opened
    assert "obstore" not in opened


def test_the_proof_can_fail() -> None:
    assert "xarray" in imported("import zarrtrace, xarray")
