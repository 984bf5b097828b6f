"""Each way to ask for something impossible: the message names the cause and the remedy."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import pytest
import torch
from huggingface_hub.errors import GatedRepoError

from zarrtrace import demo
from zarrtrace.capture import model as capture_model
from zarrtrace.errors import (
    ConfigError,
    ConfigMismatchError,
    FormatVersionError,
    IntegrityError,
    ModelError,
    NoSpaceError,
    NotATraceError,
    SAEError,
    ScenarioError,
    StoreError,
    ZarrtraceError,
)
from zarrtrace.extraction import Options, extract_run, prepare
from zarrtrace.store import open_run

pytestmark = pytest.mark.torch


def message(error: pytest.ExceptionInfo[ZarrtraceError]) -> str:
    """Return a message, after checking that it says what to do."""
    assert error.value.remedy
    return str(error.value)


def fails(kind: type[ZarrtraceError], **options: Any) -> str:
    with pytest.raises(kind) as error:
        prepare(Options(**{"model": "demo", "scenarios": "slot-machine", **options}), weights=False)
    return message(error)


def copy_of_demo_saes(folder: Path, layers: range) -> Path:
    for layer in layers:
        name = f"blocks.{layer}.hook_resid_post"
        shutil.copytree(demo.sae_path() / name, folder / name)
    return folder


def change_config(folder: Path, layer: int, **changes: Any) -> None:
    file = folder / f"blocks.{layer}.hook_resid_post" / "cfg.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        (config["metadata"] if key == "hook_name" else config)[key] = value
    file.write_text(json.dumps(config))


def suite(folder: Path, *entries: dict[str, Any]) -> Path:
    file = folder / "suite.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    return file


# --- models ------------------------------------------------------------------------------------


def test_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = fails(ModelError, model="nobody/no-such-model", features=False)
    assert "nobody/no-such-model" in said
    assert "HF_HUB_OFFLINE" in said


@pytest.mark.parametrize(("name", "why"), [("./nowhere", "no such folder"), (None, "config.json")])
def test_folder_that_is_no_model(tmp_path: Path, name: str | None, why: str) -> None:
    assert why in fails(ModelError, model=name or str(tmp_path), features=False)


def test_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise OSError("You are trying to access a gated repo.") from GatedRepoError(
            "gated", response=response
        )

    monkeypatch.setattr(capture_model.AutoConfig, "from_pretrained", refuse)
    said = fails(ModelError, model="meta-llama/Llama-3.1-8B", features=False)
    assert "no access to this gated model" in said
    assert "hf auth login" in said


def test_damaged_model(tmp_path: Path) -> None:
    shutil.copytree(demo.model_path(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "from_the_future"}')
    assert "upgrade transformers" in fails(
        ModelError, model=str(tmp_path / "model"), features=False
    )


def test_layers_outside_the_model() -> None:
    said = fails(ConfigError, layers=(30, 31, 32))
    assert "--layers 32" in said
    assert "0 to 31" in said


def test_device_that_is_not_there() -> None:
    said = fails(ConfigError, device="cuda:7")
    assert "--device cuda:7" in said
    assert "--device cpu" in said


def test_prompt_longer_than_the_context(tmp_path: Path) -> None:
    file = suite(tmp_path, {"name": "long", "prompt": "Stop " * 600})
    said = fails(ConfigError, scenarios=file)
    assert "'long'" in said
    assert "context has 512" in said


def test_memory_that_is_full_amid_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    real, calls = LlamaMLP.forward, []

    def full(self: Any, *arguments: Any) -> Any:
        calls.append(self)
        if len(calls) == 4:  # of blocks 0 to 3
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", full)
        with pytest.raises(ModelError) as error:
            extract_run(tmp_path / "run", small(layers=(1, 2, 3, 4)))
    said = message(error)
    assert "the memory of cpu is full" in said
    assert "--low-memory" in said
    extract_run(tmp_path / "run", small(layers=(1, 2, 3, 4)))  # goes on


# --- SAEs --------------------------------------------------------------------------------------


def test_no_saes_given() -> None:
    assert "--sae-release" in fails(ConfigError, model="some/model")


@pytest.mark.long
def test_unknown_release() -> None:
    assert "llama_scope_lxr_8x" in fails(SAEError, sae_release="llama_scope_lxr_8")


def test_id_that_is_not_in_the_release() -> None:
    said = fails(SAEError, sae_release="llama_scope_lxr_8x", sae_ids=("l{layer}r_9x",))
    assert "no SAE 'l1r_9x' for layer 1" in said
    assert "--sae-id" in said


def test_no_sae_for_a_layer(tmp_path: Path) -> None:
    folder = copy_of_demo_saes(tmp_path, range(1, 4))
    said = fails(SAEError, sae_path=folder, layers=(2, 3, 4, 5))
    assert "no SAE for layer 4-5" in said
    assert "layers 1-3" in said


def test_width_that_does_not_match(tmp_path: Path) -> None:
    folder = copy_of_demo_saes(tmp_path, range(1, 2))
    change_config(folder, 1, d_in=128)
    said = fails(SAEError, sae_path=folder, layers=(1,))
    assert "reads 128 dimensions" in said
    assert "has 64" in said


def test_unfolded_input_scale(tmp_path: Path) -> None:
    folder = copy_of_demo_saes(tmp_path, range(1, 2))
    change_config(folder, 1, normalize_activations="expected_average_only_in")
    assert "not folded" in fails(SAEError, sae_path=folder, layers=(1,))


@pytest.mark.parametrize("hook", ["blocks.1.ln2.hook_normalized", "blocks.1.attn.hook_q", "head"])
def test_hook_point_that_cannot_be_read(tmp_path: Path, hook: str) -> None:
    folder = copy_of_demo_saes(tmp_path, range(1, 2))
    change_config(folder, 1, hook_name=hook)
    assert repr(hook) in fails(SAEError, sae_path=folder, layers=(1,))


def test_weights_that_are_missing(tmp_path: Path) -> None:
    folder = copy_of_demo_saes(tmp_path / "saes", range(1, 2))
    (folder / "blocks.1.hook_resid_post" / "sae_weights.safetensors").unlink()
    with pytest.raises(SAEError) as error:
        extract_run(tmp_path / "run", Options(sae_path=folder, layers=(1,), only=("Risky_40",)))
    assert "sae_weights.safetensors is missing" in message(error)


# --- scenarios ---------------------------------------------------------------------------------


def test_unknown_span(tmp_path: Path) -> None:
    file = suite(tmp_path, {"name": "a", "prompt": "You hold $5.", "spans": {"goal": "$9"}})
    said = fails(ScenarioError, scenarios=file)
    assert "suite.jsonl:1" in said
    assert "'$9' is not in the prompt" in said


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "zarr.json", "con", "a/b"])
def test_unsafe_names(tmp_path: Path, name: str) -> None:
    said = fails(ScenarioError, scenarios=suite(tmp_path, {"name": name, "prompt": "Hello"}))
    assert "starts with a letter or digit" in said


def test_duplicate_names(tmp_path: Path) -> None:
    file = suite(tmp_path, {"name": "Same", "prompt": "a"}, {"name": "same", "prompt": "b"})
    assert "is taken by 'Same'" in fails(ScenarioError, scenarios=file)


def test_scenario_that_is_not_in_the_suite() -> None:
    assert "Desperate_10" in fails(ScenarioError, only=("Nobody",))


# --- output ------------------------------------------------------------------------------------


def test_output_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(NotATraceError) as error:
        extract_run(tmp_path)
    assert "nothing there was changed" in message(error)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def small(**changes: Any) -> Options:
    fields: dict[str, Any] = {"layers": (1, 2), "features": False, "only": ("Risky_40",)}
    return Options(**{**fields, **changes})


def test_another_configuration(tmp_path: Path) -> None:
    extract_run(tmp_path / "run", small())
    with pytest.raises(ConfigMismatchError) as error:
        extract_run(tmp_path / "run", small(layers=(1, 3)))
    assert "layers: '1-2' there, '1,3' now" in message(error)
    assert error.value.exit_code == 2


def test_newer_format(tmp_path: Path) -> None:
    extract_run(tmp_path / "run", small())
    file = tmp_path / "run" / "zarr.json"
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(FormatVersionError) as error:
        open_run(tmp_path / "run")
    assert "Install a newer zarrtrace" in message(error)


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open
    written = []

    def full(self: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "attention" in str(self) and "a" in mode:
            written.append(self)
            if len(written) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, mode, *more, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(NoSpaceError) as error:
        extract_run(tmp_path / "run", small())
    assert re.search(r"The run needs about \d+ kB in all\. .* are free now", message(error))
    monkeypatch.undo()
    extract_run(tmp_path / "run", small())
    assert len(open_run(tmp_path / "run")["Risky_40"].layer) == 2


def test_a_pickled_model_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo.model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weights": Evil(tmp_path / "was here")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        prepare(Options(model=str(folder), scenarios="slot-machine", features=False))
    assert "a pickle that holds more than tensors" in message(error)
    assert not (tmp_path / "was here").exists()


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StoreError) as error:
        extract_run(tmp_path / "file" / "run", small())
    assert "a file is where a folder should be" in message(error)


def test_spans_beyond_the_prompt(tmp_path: Path) -> None:
    extract_run(tmp_path / "run", small())

    def change(group: Any) -> None:
        group["attributes"]["spans"]["goal"]["tokens"] = [3, 5000]

    hostile.change_group(tmp_path / "run" / "Risky_40", change)
    with pytest.raises(IntegrityError) as error:
        open_run(tmp_path / "run")
    assert "span 'goal' has positions beyond the prompt's" in message(error)
