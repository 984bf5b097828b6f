"""The scripts that README names run: quickstart's summary and the launchers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rounding

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.npz import export_npz
from zarrtrace.store import verify

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.long
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
    strongest = ds.features[:, -1].max("feature").values
    assert (strongest > 0).any()
    read = rounding.rounding("float32", 1, strongest)
    rounding.assert_close([float(x) for _, x in rows[31:]], strongest, printed + read)
    features = [int(found) for found in re.findall(r"feature (\d+)", done.stdout)]
    assert features == ds.features[:, -1].argmax("feature").values.tolist()
    assert "P(bet) = 0.999" in done.stdout
    assert f"{name}/layer_1.npz ... layer_31.npz" in done.stdout
    assert exported.name in done.stdout


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.parametrize(
    ("script", "arrays"),
    [
        pytest.param("launch_full.sh", {"attention", "features"}, marks=pytest.mark.long),
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
