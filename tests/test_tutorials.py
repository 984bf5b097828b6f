"""The tutorials: valid notebooks without outputs, that the command copies and that run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_size import call

from zarrtrace import demo

ROOT = Path(__file__).parent.parent
NAMES = [path.name for path in demo.tutorial_paths()]
#: In the outputs of each: the finding with its limits, the figure; the probe.
EXPECTED = {
    "tutorial_finding.ipynb": (
        "features differ in mean between poor (6) and rich (6 scenarios)",
        "all 924 permutations",  # 12 over 6
        "image/png",
    ),
    "tutorial_samples.ipynb": (
        "150 samples in 30 groups",
        "3 of 3 layers predict it better than chance",
    ),
}


def test_notebooks_are_all_of_the_folder() -> None:
    assert sorted(NAMES) == sorted(path.name for path in demo.suite_path().parent.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_valid_and_stripped(name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    path = demo.suite_path().parent / name
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert {cell.execution_count for cell in code} == {None}
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown", "says no reason"


def test_command_copies_notebooks_and_says_how_to_run_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("tutorial")
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (demo.suite_path().parent / name).read_bytes()
    assert done.stdout.splitlines()[-1].strip() == f"jupyter lab {NAMES[0]}"


def test_command_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / NAMES[1]).write_text("mine", encoding="utf-8")
    done = call("tutorial", "-o", tmp_path)
    assert done.returncode == 2
    assert "is there already" in done.stderr
    assert "zarrtrace tutorial -o FOLDER" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[1]]
    assert (tmp_path / NAMES[1]).read_text(encoding="utf-8") == "mine"


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run(name: str, tmp_path: Path) -> None:
    """In a process of its own: Jupyter's libraries warn of what is theirs."""
    program = (
        "import sys, nbformat, nbclient\n"
        "notebook = nbformat.read(sys.argv[1], as_version=4)\n"
        "nbclient.NotebookClient(notebook, timeout=250, resources={'metadata': {'path': '.'}})"
        ".execute()\n"
        "nbformat.write(notebook, 'done.ipynb')\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, demo.suite_path().parent / name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    cells = json.loads((tmp_path / "done.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    assert not [output for output in shown if output["output_type"] == "error"]
    said = json.dumps(shown)
    for sentence in EXPECTED[name]:
        assert sentence in said
