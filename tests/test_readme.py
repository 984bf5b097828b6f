"""The README's examples and scripts run, and its commands are ones that tests run verbatim."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import rounding

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.cli import group
from zarrtrace.npz import export_npz
from zarrtrace.scenarios import load_suite
from zarrtrace.store import verify

README = Path(__file__).parent.parent / "README.md"
SCRIPTS = README.parent / "scripts"


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
    shown = (SCRIPTS / "quickstart").read_text(encoding="utf-8").partition("Try next")[2]
    to_try = re.findall(r"^  zarrtrace (.*)$", shown, re.M)
    assert len(to_try) == 3
    assert len(commands()) >= 7
    for arguments in [*commands(), *map(shlex.split, to_try)]:
        name, *rest = arguments
        command = group.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None, name
        command.make_context(name, rest)


def test_files_it_names_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`(scripts/\w[\w.]*)", text):
        assert (README.parent / target).exists(), target


@pytest.mark.torch
def test_what_quickstart_shows(demo_run: Path, tmp_path: Path) -> None:
    """All of it, with the numbers of the store, and without a warning."""
    name = "Bankruptcy_90_all_in"
    exported = export_npz(demo_run, tmp_path / "npz", scenarios=[name])
    command = [sys.executable, "-W", "error", str(SCRIPTS / "show_demo.py")]
    done = subprocess.run(
        [*command, str(demo_run), str(tmp_path / "npz")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    ds = zt.open_trace(demo_run / name)
    attention = ds.attention[:, :, -1, zt.span(ds, "balance")].mean(("head", "key"))
    rows = re.findall(r"^  L(\d+) +(\S+)", done.stdout, re.M)
    assert [int(layer) for layer, _ in rows] == [*range(1, 32)] * 2
    printed = 0.5e-4  # half of the last decimal
    weights = ds.sizes["head"] * len(zt.span(ds, "balance"))
    means = 2 * rounding.rounding("float32", weights, attention)
    rounding.assert_close([float(x) for _, x in rows[:31]], attention, printed + means)
    (feature,) = re.findall(r"sel\(feature=(\d+)\)", done.stdout)
    trajectory = ds.features[:, -1].sel(feature=int(feature)).values
    assert (trajectory > 0).any()
    read = rounding.rounding("float32", 1, trajectory)
    rounding.assert_close([float(x) for _, x in rows[31:]], trajectory, printed + read)
    assert "P(bet) = 0.999" in done.stdout
    assert f"{name}/layer_1.npz ... layer_31.npz" in done.stdout
    assert exported.name in done.stdout


@pytest.mark.torch
@pytest.mark.parametrize(
    ("script", "arrays"),
    [
        ("launch_full.sh", {"attention", "features"}),
        ("launch_attention_only.sh", {"attention"}),
    ],
)
def test_launchers_keep_a_log(tmp_path: Path, script: str, arrays: set[str]) -> None:
    environment = {
        **os.environ,
        "MODEL": str(demo.model_path()),
        "SAE_PATH": str(demo.sae_path()),
        "OUTPUT": str(tmp_path / "runs" / "llama"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def launch(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPTS / script), *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    done = launch("--layer-start", "3", "--layer-end", "4", "--scenario", "Risky_40")
    assert done.returncode == 0, done.stdout
    (log,) = (tmp_path / "runs").glob("llama_*.log")
    written = log.read_text(encoding="utf-8")
    assert "complete     yes, 1 of 1 scenarios" in written
    assert done.stdout == f"logging to {log}\n{written}"
    assert verify(tmp_path / "runs" / "llama") == []
    ds = zt.open_trace(tmp_path / "runs" / "llama" / "Risky_40")
    assert {"attention", "features"} & set(ds.data_vars) == arrays
    assert list(ds.layer.values) == [3, 4]
    log.unlink()
    failed = launch("--layers", "all")
    assert failed.returncode == 2
    (log,) = (tmp_path / "runs").glob("llama_*.log")
    assert "'all' is not a list of layers" in log.read_text(encoding="utf-8")
