"""Without --layers every block is captured, or every block with an SAE; the others are named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import Models

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.capture import release_saes
from zarrtrace.cli import main
from zarrtrace.errors import ConfigError, SAEError
from zarrtrace.extraction import Job, Options, prepare
from zarrtrace.store import open_trace

pytestmark = pytest.mark.torch

BLOCKS = tuple(range(32))
#: The embedded model under its path, as any other model.
MODEL = str(demo.model_path())


def _job(**options: Any) -> Job:
    chosen = {"model": MODEL, "only": ("Risky_40",), **options}
    chosen["scenarios"] = None if chosen["model"] is None else "slot-machine"
    return prepare(Options(**chosen), weights=False)


def _saes(folder: Path, *layers: int, of: int | None = None) -> Path:
    """Copies of embedded SAEs; one may stand for a block that the model lacks."""
    for layer in layers:
        name = f"blocks.{layer}.hook_resid_post"
        shutil.copytree(demo.sae_path() / name, folder / name)
    if of is not None:
        shutil.copytree(demo.sae_path() / "blocks.0.hook_resid_post", folder / "beyond")
        file = folder / "beyond" / "cfg.json"
        config = json.loads(file.read_text())
        config["metadata"]["hook_name"] = f"blocks.{of}.hook_resid_post"
        file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["GPT-2", "Qwen 2"])
def test_no_block_of_a_small_model_is_dropped(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Models(tmp_path_factory.mktemp("models")).path(name)
    job = _job(model=str(path), features=False)
    assert job.layers == tuple(range(4))
    assert job.notes == ()


def test_layers_1_to_31_belong_to_the_demo() -> None:
    assert _job(model=None).layers == _job(model=None, features=False).layers == BLOCKS[1:]
    assert _job(features=False).layers == BLOCKS
    job = _job(sae_path=demo.sae_path())
    assert job.layers == tuple(job.saes) == BLOCKS
    assert job.notes == ()


@pytest.mark.parametrize("attention", [True, False])
def test_blocks_without_an_sae_are_named(tmp_path: Path, attention: bool) -> None:
    folder = _saes(tmp_path / "saes", 0, 2, 3, of=40)
    job = _job(sae_path=folder, attention=attention)
    assert job.layers == tuple(job.saes) == (0, 2, 3)
    left_out, beyond = job.notes
    assert left_out.startswith("layers 1,4-31 have no SAE and are left out; --no-features")
    assert beyond == "SAEs of layers 40 are not used: the model has blocks 0 to 31"
    with pytest.raises(SAEError, match="no SAE for layer 1,4"):
        _job(sae_path=folder, layers=(0, 1, 2, 3, 4))


def test_no_block_has_an_sae(tmp_path: Path) -> None:
    folder = _saes(tmp_path / "saes", of=40)
    with pytest.raises(SAEError, match="no SAE for layer 0-31") as caught:
        _job(sae_path=folder)
    assert "for layers 40" in caught.value.why


def test_blocks_of_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt2-small-res-jb has SAEs for blocks 0 to 11."""

    def config(_release: str, sae_id: str) -> dict[str, Any]:
        more = {"architecture": "standard", "d_in": 64, "d_sae": 128}
        return {**more, "hook_name": sae_id, "metadata": {"hook_name": sae_id}}

    monkeypatch.setattr(release_saes, "load_sae_config_from_huggingface", config)
    monkeypatch.setattr(release_saes, "snapshot_download", lambda *_, **__: "snapshots/0123abc")
    for patterns in ((), ("blocks.{layer}.hook_resid_pre",)):
        job = _job(sae_release="gpt2-small-res-jb", sae_ids=patterns)
        assert job.layers == BLOCKS[:12]
        (note,) = job.notes
        assert note.startswith("layers 12-31 have no SAE and are left out")
    job = _job(sae_release="gpt2-small-res-jb", layers=(10, 11, 12))
    assert (job.layers, tuple(job.saes)) == ((10, 11, 12), (10, 11))
    assert job.notes == ("layers 12 have no SAE: they are stored without features",)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"layer_start": 30}, (30, 31)),
        ({"layer_end": 1}, (0, 1)),
        ({"layer_start": 4, "layer_end": 5}, (4, 5)),
        ({"model": None, "layer_end": 2}, (1, 2)),
        ({"model": None, "layer_start": 31}, (31,)),
    ],
)
def test_a_range_ends_where_the_model_does(
    options: dict[str, Any], layers: tuple[int, ...]
) -> None:
    assert _job(features=False, **options).layers == layers


def test_a_range_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--layers 32: the model has blocks 0 to 31"):
        _job(features=False, layer_start=32)


def test_the_command_names_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _saes(tmp_path / "saes", 0, 2)
    note = "layers 1,3-31 have no SAE and are left out"

    def call(*more: str) -> tuple[str, str]:
        line = ["extract", "-o", str(tmp_path / "run"), "--model", MODEL, "--sae-path", str(folder)]
        line += ["--scenarios", "slot-machine"]
        monkeypatch.setattr(sys, "argv", ["zarrtrace", *line, "--scenario", "Risky_40", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr()

    plan, _ = call("--dry-run")
    assert "2 layers (0,2) of" in plan
    assert note in plan
    as_json = json.loads(call("--dry-run", "--json")[0])
    assert as_json["config"]["layers"] == "0,2"
    assert as_json["notes"][0].startswith(note)
    assert f"zarrtrace: {note}" in call()[1]
    assert open_trace(tmp_path / "run/Risky_40").layer.values.tolist() == [0, 2]
    assert note not in call("--quiet")[1]


def test_the_python_function_takes_the_same_default(tmp_path: Path) -> None:
    run = zt.extract(
        tmp_path / "run",
        "slot-machine",
        model=MODEL,
        saes=_saes(tmp_path / "saes", 0),
        scenario="Risky_40",
    )
    assert run["Risky_40"].layer.values.tolist() == [0]
