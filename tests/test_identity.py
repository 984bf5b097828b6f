"""A run is resumed with the same weights, tokens and libraries, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.torch

from sae_lens import SAE  # noqa: E402

from zarrtrace import demo, extract  # noqa: E402
from zarrtrace.capture import load_model  # noqa: E402
from zarrtrace.capture.fingerprint import (  # noqa: E402
    fingerprint,
    model_fingerprint,
    sae_fingerprint,
)
from zarrtrace.capture.release_saes import ReleaseSAEs  # noqa: E402
from zarrtrace.capture.saes import FolderSAEs  # noqa: E402
from zarrtrace.cli import main  # noqa: E402
from zarrtrace.errors import ConfigMismatchError, SAEError  # noqa: E402
from zarrtrace.extraction import Options, configuration, extract_run  # noqa: E402
from zarrtrace.identity import combined_versions, differences, refuse_other  # noqa: E402
from zarrtrace.store import open_trace, read_run, read_trace, summarize, verify  # noqa: E402

NAMES = ("Risky_40", "Medium_60")
SAE_FOLDER = "blocks.2.hook_resid_post"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with copies of the embedded model and SAEs, which a test may change."""
    return copied(tmp_path)


def copied(folder: Path) -> Path:
    shutil.copytree(demo.model_path(), folder / "model")
    for layer in (1, 2, 3):
        name = f"blocks.{layer}.hook_resid_post"
        shutil.copytree(demo.sae_path() / name, folder / "saes" / name)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a run that was begun; tests put back what they change."""
    folder = copied(tmp_path_factory.mktemp("begun"))
    begin(folder / "run", options(folder))
    return folder


def options(files: Path, **changes: Any) -> Options:
    return Options(
        **{
            "model": str(files / "model"),
            "scenarios": "slot-machine",
            "sae_path": files / "saes",
            "layers": (1, 2, 3),
            "only": NAMES,
            **changes,
        }
    )


def begin(run: Path, asked: Options) -> None:
    """Begin a run, and end it when the SAE of layer 3 is to be loaded."""
    original = FolderSAEs.load

    def load(self: FolderSAEs, attributes: Any, device: Any) -> Any:
        if attributes.layer == 3:
            raise ConnectionError("ended")
        return original(self, attributes, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSAEs, "load", load)
        with pytest.raises(ConnectionError, match="ended"):
            extract_run(run, asked)
    assert summarize(run).traces[0].missing_layers


def change_tensors(file: Path, name: str) -> None:
    """Change a tensor's values by a little, and nothing else of its file."""
    weights = load_file(file)
    weights[name] = weights[name] * 1.001
    size = file.stat().st_size
    save_file(weights, file, metadata={"format": "pt"})
    assert abs(file.stat().st_size - size) < 100


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_weights(files: Path) -> None:
    change_tensors(files / "model/model.safetensors", "model.layers.30.mlp.down_proj.weight")


def change_norm(files: Path) -> None:
    change_tensors(files / "model/model.safetensors", "model.layers.3.input_layernorm.weight")


def change_settings(files: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["rms_norm_eps"] = 1e-5

    change_json(files / "model/config.json", change)


def change_sae(files: Path) -> None:
    change_tensors(files / "saes" / SAE_FOLDER / "sae_weights.safetensors", "W_enc")


def change_sae_config(files: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["apply_b_dec_to_input"] = not config["apply_b_dec_to_input"]

    change_json(files / "saes" / SAE_FOLDER / "cfg.json", change)


def change_hook_point(files: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["metadata"]["hook_name"] = "blocks.2.hook_resid_pre"

    change_json(files / "saes" / SAE_FOLDER / "cfg.json", change)


def change_tokenizer(files: Path) -> None:
    """Exchange the ids of two tokens that prompts have."""

    def change(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["."], vocabulary["$"] = vocabulary["$"], vocabulary["."]

    change_json(files / "model/tokenizer.json", change)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, r"\n  weights of the model: '\w{16}' there, '\w{16}' now\n"),
        (change_norm, r"\n  weights of the model: '\w{16}' there, '\w{16}' now\n"),
        (change_settings, r"\n  configuration of the model: '\w{16}' there, '\w{16}' now\n"),
        (change_sae, r"\n  weights of SAEs: .*'\w{16}'.* there, .*'\w{16}'.* now\n"),
        (change_sae_config, r"\n  weights of SAEs: .* there, .* now\n"),
        (change_hook_point, r"\n  hook points of SAEs: .*resid_post.* there, .*resid_pre.* now\n"),
        (
            change_tokenizer,
            r"\n  prompts: Risky_40, Medium_60 changed\n.*or the tokenizer makes other tokens",
        ),
    ],
)
def test_changed_files_are_refused(begun: Path, change: Callable[[Path], None], named: str) -> None:
    before, asked = fakes.files_in(begun), options(begun)
    change(begun)
    with pytest.raises(ConfigMismatchError, match=named) as refused:
        extract_run(begun / "run", asked)
    assert "--overwrite" in refused.value.remedy
    assert "another --output" in refused.value.remedy
    after = fakes.files_in(begun)
    changed = [name for name, content in before.items() if after[name] != content]
    assert after.keys() == before.keys()
    assert [name.split("/")[0] for name in changed] in (["model"], ["saes"])
    for name in changed:  # for the next test
        (begun / name).write_bytes(before[name])


@pytest.mark.parametrize("layout", ["traces", "table"])
def test_a_corrected_hook_point_is_refused(files: Path, layout: str) -> None:
    """The weights are the same, and what they encode is not."""
    given: dict[str, Any] = {
        "model": str(files / "model"), "saes": str(files / "saes"), "layers": [2], "quiet": True,
        "scenario": NAMES[0], "layout": layout, "attention": False,
    }  # fmt: skip
    extract(files / "run", "slot-machine", **given)
    change_hook_point(files)
    named = r"hook points of SAEs: \{.*hook_resid_post'\} there, \{.*hook_resid_pre'\} now"
    with pytest.raises(ConfigMismatchError, match=named):
        extract(files / "run", "slot-machine", **given)


def test_runs_that_do_not_say_hook_points_and_ends_are_resumed() -> None:
    stored = {"saes": {"a": "f00d", "b": "cafe"}, "generation": {"tokens": 3}}
    added = {"sae_hooks": {"a": "blocks.1.hook_resid_pre"}, "end_of_sequence": [1, 2]}
    refuse_other("run", stored, {**stored, **added})
    refuse_other("run", {**stored, **added}, stored)
    with pytest.raises(ConfigMismatchError) as refused:
        refuse_other("run", {**stored, **added}, {**stored, **added, "saes": {}, "sae_hooks": {}})
    assert "hook points" not in str(refused.value)  # they are other SAEs
    with pytest.raises(ConfigMismatchError, match=r"end-of-sequence.*: \[1, 2\] there, \[\] now"):
        refuse_other("run", {**stored, **added}, {**stored, **added, "end_of_sequence": []})


@pytest.mark.long
def test_restored_files_are_gone_on_with(files: Path) -> None:
    asked = options(files)
    begin(files / "run", asked)
    good = {name: fakes.files_in(files / name) for name in ("model", "saes")}
    for change in (change_weights, change_settings, change_sae, change_tokenizer):
        change(files)
    with pytest.raises(ConfigMismatchError):
        extract_run(files / "run", asked)
    for folder, content in good.items():
        for name, data in content.items():
            (files / folder / name).write_bytes(data)
    extract_run(files / "run", asked)
    extract_run(files / "uninterrupted", asked)
    assert fakes.files_in(files / "run") == fakes.files_in(files / "uninterrupted")


@pytest.mark.long
def test_pickled_weights_and_streamed_ones_are_compared_too(files: Path) -> None:
    file = files / "model/model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, files / "model/pytorch_model.bin")
    asked = options(files)
    begin(files / "run", asked)
    extract_run(files / "run", options(files, low_memory=True))
    begin(files / "other", asked)
    weights["model.layers.1.self_attn.o_proj.weight"] *= 1.001
    torch.save(weights, files / "model/pytorch_model.bin")
    for low_memory in (False, True):
        with pytest.raises(ConfigMismatchError, match="weights of the model"):
            extract_run(files / "other", options(files, low_memory=low_memory))


def test_traces_say_the_fingerprints(files: Path) -> None:
    extract_run(files / "run", options(files))
    attributes = read_trace(files / "run" / NAMES[0]).attributes
    ds = open_trace(files / "run" / NAMES[0])
    assert attributes.model is not None
    assert attributes.model.fingerprint == load_model(str(files / "model")).attributes.fingerprint
    assert attributes.model.revision is None
    found = dict(zip(ds.sae_id.values, ds.sae_fingerprint.values, strict=True))
    assert len(set(found.values())) == 3
    assert read_run(files / "run").attributes.config["saes"] == found


def test_an_sae_that_is_replaced_during_a_run_ends_it(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FolderSAEs.find

    def find(self: FolderSAEs, layers: Any) -> Any:
        found = original(self, layers)
        change_sae(files)
        return found

    monkeypatch.setattr(FolderSAEs, "find", find)
    with pytest.raises(SAEError, match=r"its weights have fingerprint \w{16}, not \w{16}"):
        extract_run(files / "run", options(files))
    found = summarize(files / "run").traces[0]
    assert set(found.layers) - set(found.missing_layers) == {1}


# --- from the hub ------------------------------------------------------------------------------


@pytest.fixture
def hub(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with a model and SAEs."""
    found = hub_home / "hub"
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(found))
    return found


def move_on(repository: Path) -> str:
    """Give a repository's branch another commit with the same files."""
    commit = (repository / "refs/main").read_text()
    later = hashlib.sha1(commit.encode(), usedforsecurity=False).hexdigest()
    shutil.copytree(
        repository / "snapshots" / commit, repository / "snapshots" / later, symlinks=True
    )
    (repository / "refs/main").write_text(later)
    return later


FROM_HUB = Options(
    model="meta-llama/Llama-3.1-8B",
    scenarios="slot-machine",
    sae_release="llama_scope_lxr_8x",
    layers=(1, 2),
    only=NAMES[:1],
)


@pytest.mark.long
def test_commits_of_model_and_saes_are_compared(hub: Path, tmp_path: Path) -> None:
    model, saes = (
        hub / f"models--{name.replace('/', '--')}"
        for name in ("meta-llama/Llama-3.1-8B", "fnlp/Llama3_1-8B-Base-LXR-8x")
    )
    first = (saes / "refs/main").read_text()
    extract_run(tmp_path / "run", FROM_HUB)
    attributes = read_trace(tmp_path / "run" / NAMES[0]).attributes
    assert {sae.revision for sae in attributes.saes.values()} == {first}
    assert "sae_fingerprint" not in open_trace(tmp_path / "run" / NAMES[0])
    assert attributes.model is not None
    assert attributes.model.revision == (model / "refs/main").read_text()
    assert attributes.model.fingerprint is not None
    later = move_on(saes)
    with pytest.raises(ConfigMismatchError, match=rf"weights of SAEs: .*{first}.*{later}"):
        extract_run(tmp_path / "run", FROM_HUB)
    (saes / "refs/main").write_text(first)
    extract_run(tmp_path / "run", FROM_HUB)
    later = move_on(model)
    with pytest.raises(ConfigMismatchError, match=rf"revision: .* there, '{later}' now"):
        extract_run(tmp_path / "run", FROM_HUB)


def test_an_edited_snapshot_is_noticed_under_its_old_commit(hub: Path, tmp_path: Path) -> None:
    extract_run(tmp_path / "run", FROM_HUB)
    (file,) = hub.glob("models--meta-llama--*/snapshots/*/model.safetensors")
    change_tensors(file, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConfigMismatchError, match="weights of the model"):
        extract_run(tmp_path / "run", FROM_HUB)


def test_a_commit_that_arrives_during_a_run_is_not_read(hub: Path) -> None:
    source = ReleaseSAEs("llama_scope_lxr_8x")
    (attributes,) = source.find([3])[3]
    repository = hub / "models--fnlp--Llama3_1-8B-Base-LXR-8x"
    tokens = torch.randn(5, attributes.d_in)
    before = source.load(attributes, torch.device("cpu"))(tokens)
    later = move_on(repository)
    (file,) = (repository / "snapshots" / later).glob("*-L3R-*/checkpoints/final.safetensors")
    weights = load_file(file)
    file.unlink()  # a link to what the first commit has
    save_file({**weights, "encoder.weight": 2 * weights["encoder.weight"]}, file)
    torch.testing.assert_close(
        source.load(attributes, torch.device("cpu"))(tokens), before, rtol=0, atol=0
    )
    now = attributes.model_copy(update={"revision": later})
    assert not torch.equal(source.load(now, torch.device("cpu"))(tokens), before)


def test_a_commit_that_arrives_during_a_run_ends_it_where_sae_lens_reads(hub: Path) -> None:
    source = ReleaseSAEs("llama_scope_lxr_8x", fold_decoder_norm=True)
    (attributes,) = source.find([3])[3]
    source.load(attributes, torch.device("cpu"))
    later = move_on(hub / "models--fnlp--Llama3_1-8B-Base-LXR-8x")
    with pytest.raises(SAEError, match=f"loaded from commit {later}, not from"):
        source.load(attributes, torch.device("cpu"))


# --- libraries ---------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["zarrtrace", "extract", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.long
def test_other_versions_are_refused_or_both_are_said(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options(files)
    today = configuration.library_versions()
    old = {**today, "torch": "2.4.0", "zarr": "3.1.0"}
    with monkeypatch.context() as patch:
        patch.setattr(configuration, "_versions", lambda: tuple(old.items()))
        extract_run(files / "run", options(files, only=NAMES[1:]))  # complete, by the old ones
        begin(files / "begun", asked)
    begun = fakes.files_in(files / "begun")
    for run, only in (("run", NAMES[1:]), ("begun", NAMES)):
        command = ["-o", str(files / run), "--model", str(files / "model"), "--layers", "1-3"]
        command += ["--scenarios", "slot-machine"]
        command += ["--sae-path", str(files / "saes"), "-q"]
        command += [part for name in only for part in ("--scenario", name)]
        before = fakes.files_in(files / run)
        assert call(monkeypatch, *command) == 2
        said = capsys.readouterr().err
        assert f"version of torch: '2.4.0' there, {today['torch']!r} now" in said
        assert f"version of zarr: '3.1.0' there, {today['zarr']!r} now" in said
        assert "version of numpy" not in said
        assert "--overwrite" in said
        assert "--accept-versions" in said
        assert fakes.files_in(files / run) == before
        assert call(monkeypatch, *command, "--accept-versions") == 0
        if run == "run":  # nothing was to be done
            assert fakes.files_in(files / run) == before
        else:
            assert call(monkeypatch, *command) == 0  # it has been accepted
    both = {**today, "torch": f"2.4.0, {today['torch']}", "zarr": f"3.1.0, {today['zarr']}"}
    assert begun != fakes.files_in(files / "begun")
    assert read_run(files / "begun").attributes.config["versions"] == both
    for name in NAMES:
        assert read_trace(files / "begun" / name).attributes.versions == both
    assert verify(files / "begun") == []


@pytest.mark.long
def test_a_repaired_trace_says_both_versions_and_the_others_keep_theirs(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = configuration.library_versions()
    old = {**today, "transformers": "5.0.0"}
    asked = options(files, features=False, sae_path=None)
    with monkeypatch.context() as patch:
        patch.setattr(configuration, "_versions", lambda: tuple(old.items()))
        extract_run(files / "run", asked)
    (damaged, *_) = sorted(
        (file for file in (files / "run" / NAMES[0] / "attention").rglob("*") if file.is_file()),
        key=lambda file: -file.stat().st_size,
    )
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ConfigMismatchError, match=r"version of transformers: '5\.0\.0' there"):
        extract_run(files / "run", asked, repair=True)
    extract_run(files / "run", asked, repair=True, accept_versions=True)
    assert verify(files / "run") == []
    both = f"5.0.0, {today['transformers']}"
    for name, expected in zip(NAMES, (both, "5.0.0"), strict=True):
        found = read_trace(files / "run" / name).attributes.versions["transformers"]
        assert found == expected


def test_versions_are_compared_one_by_one() -> None:
    stored = {"versions": {"torch": "2.4.0, 2.13.0", "zarr": "3.1"}, "dtype": "float32"}
    now = {"versions": {"torch": "2.13.0", "zarr": "3.2"}, "dtype": "float32"}
    (found,) = differences(stored, now)
    assert (found.name, found.there, found.here) == ("version of zarr", "'3.1'", "'3.2'")
    assert combined_versions(stored["versions"], now["versions"]) == {  # type: ignore[arg-type]
        "torch": "2.4.0, 2.13.0",
        "zarr": "3.1, 3.2",
    }
    refuse_other("run", stored, now, accept_versions=True)
    with pytest.raises(ConfigMismatchError, match="version of zarr"):
        refuse_other("run", stored, now)
    with pytest.raises(ConfigMismatchError, match="dtype"):
        refuse_other("run", stored, {**now, "dtype": "float16"}, accept_versions=True)
    # 2.1 is no part of 2.13
    assert differences({"versions": {"torch": "2.13"}}, {"versions": {"torch": "2.1"}})


def test_another_transformers_may_describe_the_model_otherwise() -> None:
    stored = {"model_settings": "a", "versions": {"transformers": "5.0"}}
    same, other = ({"model_settings": "b", "versions": {"transformers": v}} for v in ("5.0", "6.0"))
    assert [one.key for one in differences(stored, same)] == ["model_settings"]
    refuse_other("run", stored, other, accept_versions=True)


# --- fingerprints ------------------------------------------------------------------------------


def test_a_model_in_memory_has_the_fingerprint_of_the_one_loaded_by_name(files: Path) -> None:
    from transformers import AutoModelForCausalLM

    name = str(files / "model")
    loaded = load_model(name)
    own = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    assert model_fingerprint(own) == loaded.attributes.fingerprint
    assert load_model(name, dtype="bfloat16").attributes.fingerprint != model_fingerprint(own)
    with torch.no_grad():
        own.model.layers[7].self_attn.q_proj.weight += 1e-3
    assert model_fingerprint(own) != loaded.attributes.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_sae_in_memory_has_the_fingerprint_of_its_file(files: Path, dtype: str) -> None:
    folder = files / "saes" / SAE_FOLDER
    SAE.load_from_disk(folder, dtype=dtype).save_model(folder)
    ((found,),) = FolderSAEs(folder.parent).find([2]).values()
    own = SAE.load_from_disk(folder, dtype="float32")
    assert sae_fingerprint(own.cfg, own.state_dict()) == found.fingerprint
    with torch.no_grad():
        own.b_enc += 1e-3
    assert sae_fingerprint(own.cfg, own.state_dict()) != found.fingerprint


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.bool],
)
def test_fingerprints_of_any_tensor(dtype: torch.dtype) -> None:
    plain = torch.arange(90 * 80).reshape(90, 80).remainder(2).to(dtype)
    first = fingerprint({"a": plain})
    assert first == fingerprint({"a": plain.T.contiguous().T})
    assert first != fingerprint({"b": plain})
    assert first != fingerprint({"a": plain.reshape(80, 90)})
    assert first != fingerprint({"a": plain}, {"eps": 1})
    changed = plain.clone()
    changed[-1, -1] = 0
    assert fingerprint({"a": changed}) != first
    assert fingerprint({"a": plain[0, 0]}) != fingerprint({"a": plain[0, 1]})


def test_tensors_made_of_others_are_taken_apart() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    one, other = torch.ones(4), torch.zeros(4)
    found = {fingerprint({"a": TwoTensor(*pair)}) for pair in ((one, one), (one, other))}
    assert len(found) == 2


def test_only_some_pages_of_a_file_are_read(tmp_path: Path) -> None:
    """A sparse file of 2 GB is read as little as one of 2 MB."""
    from sae_lens import StandardSAEConfig

    size = 2**31
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)

    def read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    before = read()
    sae_fingerprint(StandardSAEConfig(d_in=1, d_sae=1), tmp_path / "a.safetensors")
    assert read() - before < 100_000


def test_code_that_comes_with_a_model_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = set()
    for scale in (1, 2, 1):
        file = tmp_path / "own.py"
        file.write_text(
            "import torch\n"
            "class Own(torch.nn.Linear):\n"
            f"    def forward(self, x):\n        return {scale} * super().forward(x)\n"
        )
        spec = importlib.util.spec_from_file_location("transformers_modules.own", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "transformers_modules.own", module)
        spec.loader.exec_module(module)
        model = module.Own(2, 2)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.ones_(model.bias)
        found.add(model_fingerprint(model))
    assert len(found) == 2
