"""The dataset card: what huggingface_hub reads from it, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
import xarray as xr
from huggingface_hub import DatasetCard

import zarrtrace as zt
from zarrtrace.card import write_card
from zarrtrace.errors import StoreError
from zarrtrace.index import build_index
from zarrtrace.store import verify


def test_the_hubs_parser_reads_the_card(run: fakes.FakeRun) -> None:
    build_index(run.path)
    written = write_card(run.path, license="cc-by-4.0", title="Slot | machine: *")
    assert str(written) == str(run.path / "README.md")
    card = DatasetCard.load(written.path)
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["pretty_name"] == "Slot | machine: *"
    assert data["size_categories"] == ["n<1K"]
    assert {"zarr", "sparse-autoencoder", "fake/model"} <= set(data["tags"])
    assert data["viewer"] is False
    assert "| `attention` | 3 × 2 × 7 × 7 |" in card.text
    assert "| Safe\\_1 | 7 | safe |" in card.text
    assert "`index/`" in card.text


def test_what_the_card_says_of_opening_works(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_card(run.path).read().decode()
    assert "license" not in text
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(run.path)
    names: dict[str, xr.Dataset] = {}
    exec(example, names)  # noqa: S102 -- the card's own example
    assert names["ds"].attention.shape == (3, 2, 7, 7)
    assert set(names["run"].children) == set(fakes.SCENARIOS)
    assert verify(run.path) == []
    assert len(zt.open_run(run.path).children) == 2


def test_a_readme_of_someone_else_stays(run: fakes.FakeRun) -> None:
    write_card(run.path)
    write_card(run.path, license="mit")  # its own is replaced
    card = run.path / "README.md"
    assert "license: mit" in card.read_text(encoding="utf-8")
    for text in ("# mine\n", card.read_text(encoding="utf-8").replace("# run", "# Our run")):
        card.write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match="exists"):
            write_card(run.path)
        assert card.read_text(encoding="utf-8") == text


def test_a_run_that_is_not_complete_says_so(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop={"Safe_1": (2,)})
    done = subprocess.run(
        [sys.executable, "-m", "zarrtrace", "card", run.path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{run.path / 'README.md'}\n")
    assert "Not complete" in (run.path / "README.md").read_text(encoding="utf-8")
