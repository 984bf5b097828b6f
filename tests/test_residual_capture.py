"""The residual stream that an extraction stores, against transformers, SAEs and ``features``."""

from __future__ import annotations

import json
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import fakes
import numpy as np
import pytest
import torch
import xarray as xr
from architectures import Activations, Models
from capturing import extract_within, interrupted_after, records_of
from sae_lens import SAE, StandardSAEConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.capture import CaptureLimits, copies, features, residual_hooks
from zarrtrace.errors import ConfigError, ConfigMismatchError, NonFiniteError
from zarrtrace.extraction import Options, estimate, extract_run, prepare, running
from zarrtrace.extraction.processes import WriterProcesses
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.format.layout import Limits
from zarrtrace.records import LayerRecord
from zarrtrace.store import open_trace, verify

pytestmark = pytest.mark.torch

NAMES = ("Risky_40", "Medium_60")
LAYERS = (3, 20, 31)
SMALL: dict[str, Any] = {"layers": LAYERS, "only": NAMES, "residual": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded model, with its SAEs."""
    path = tmp_path_factory.mktemp("demo") / "run"
    extract_run(path, Options(**SMALL))
    return path


def _outputs(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Return the outputs of blocks, by hooks of our own on a fresh model."""
    model = AutoModelForCausalLM.from_pretrained(demo.model_path(), attn_implementation="eager")
    found: dict[int, np.ndarray] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer] = hidden[0].numpy().copy()

        return hook

    for layer, block in enumerate(model.eval().model.layers):
        block.register_forward_hook(keep(layer))
    with torch.no_grad():
        model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    return found


def test_saes_encode_it_to_the_features_bit_for_bit(run: Path) -> None:
    assert verify(run) == []
    for name in NAMES:
        ds = xr.open_zarr(run / name)
        outputs = _outputs(ds.token_id.values)
        assert ds.residual.dims == ("layer", "query", "channel")
        assert ds.residual.dtype == np.float32
        for layer in LAYERS:
            stored = ds.residual.sel(layer=layer).values
            np.testing.assert_array_equal(stored, outputs[layer])
            sae = SAE.load_from_disk(demo.sae_path() / f"blocks.{layer}.hook_resid_post")
            with torch.no_grad():
                encoded = sae.encode(torch.from_numpy(stored)).numpy()
            np.testing.assert_array_equal(ds.features.sel(layer=layer), encoded)
        assert ds.attrs["residual_hook"] == "blocks.{layer}.hook_resid_post"
        assert ds.attrs["residual_dtype"] == "float32"
        assert ds.attrs["layers_without_residual"] == ""


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    ds = zt.extract(tmp_path / "run", layers=3, scenario=NAMES[0], quiet=True)[NAMES[0]]
    assert "residual" not in ds
    assert "channel" not in ds.coords
    assert ds.attrs["residual_dtype"] is None
    assert ds.attrs["residual_hook"] is None


def test_python_asks_for_it_alone(tmp_path: Path, run: Path) -> None:
    """Without SAEs it is the output of each block."""
    made = zt.extract(
        tmp_path / "run",
        layers=LAYERS,
        scenario=NAMES[0],
        attention=False,
        features=False,
        residual=True,
        residual_dtype="float16",
        quiet=True,
    )
    found = made[NAMES[0]].to_dataset()
    assert "attention" not in found
    assert "features" not in found
    expected = xr.open_zarr(run / NAMES[0]).residual.values
    np.testing.assert_array_equal(found.residual, expected.astype(np.float16))
    assert found.residual.dtype == np.float16
    assert found.attrs["residual_hook"] == "blocks.{layer}.hook_resid_post"
    with pytest.raises(ConfigError, match="leave nothing to extract") as error:
        zt.extract(tmp_path / "none", attention=False, features=False, quiet=True)
    assert "--residual" in (error.value.remedy or "")


class _Stream:
    """Stands for a stream, and for an event, of a GPU."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batches_hold_each_prompts_own_tokens(
    models: Models, dtype: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what an encoder is given, in batches and parts of them."""
    if way == "device":
        _copy_as_from_a_gpu(monkeypatch)
    lengths = {"a": 5, "b": 9, "c": 7, "d": 2}
    requests = [
        architectures.request(architectures.random_ids(length), name)
        for name, length in lengths.items()
    ]
    source = Activations()
    captured = records_of(
        models("Llama", dtype),
        requests,
        attention_dtype=None,
        saes=source.find(range(4)),
        source=source,
        residual={layer: f"blocks.{layer}.hook_resid_post" for layer in range(4)},
        batch_size=3,
    )
    records = [one for one in captured if isinstance(one, LayerRecord)]
    expected = {(name, layer) for name in lengths for layer in range(4)}
    assert {(one.scenario, one.layer) for one in records} == expected
    for record in records:
        stored = np.asarray(record.residual)
        assert stored.shape == (lengths[record.scenario], 32)
        given = np.asarray(record.features["features"].activations)
        np.testing.assert_array_equal(stored, given)
        assert given.any()


@pytest.mark.parametrize("way", ["host", "device"])
def test_rows_of_one_prompt_are_each_tokens_own(
    models: Models, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "device":
        _copy_as_from_a_gpu(monkeypatch)
    source, asked = Activations(), [architectures.request(architectures.random_ids(50))]

    def captured(limits: CaptureLimits) -> list[LayerRecord]:
        found = records_of(
            replace(models("Llama", "bfloat16"), limits=limits),
            asked,
            attention_dtype=None,
            saes=source.find(range(4)),
            source=source,
            residual={layer: f"blocks.{layer}.hook_resid_post" for layer in range(4)},
        )
        return [one for one in found if isinstance(one, LayerRecord)]

    whole = {one.layer: np.asarray(one.residual) for one in captured(CaptureLimits())}
    parts = captured(CaptureLimits(layout=Limits(file_bytes=1, record_bytes=1, tokens=4)))
    for layer, expected in whole.items():
        streams = [one for one in parts if one.layer == layer and one.residual is not None]
        encoded = [one for one in parts if one.layer == layer and one.features]
        for found in (streams, encoded):
            assert [one.start for one in found] == list(range(0, 50, 4))
        residual = np.concatenate([np.asarray(one.residual) for one in streams])
        given = [np.asarray(one.features["features"].activations) for one in encoded]
        np.testing.assert_array_equal(residual, expected)
        np.testing.assert_array_equal(np.concatenate(given), expected)


def test_a_model_that_changes_what_it_passed_on_changes_no_record(models: Models) -> None:
    model, ids = models("Llama"), architectures.random_ids(9)

    def captured() -> dict[int, LayerRecord]:
        residual = {1: "blocks.1.hook_resid_post"}
        asked = [architectures.request(ids, layers=[1])]
        found = records_of(model, asked, attention_dtype=None, residual=residual)
        return architectures.gather(list(found))

    expected = np.array(captured()[1].residual)
    assert expected.any()

    def spoil(_module: Any, args: Any) -> None:
        args[0].zero_()

    handle = model.blocks[2].register_forward_pre_hook(spoil)
    try:
        np.testing.assert_array_equal(captured()[1].residual, expected)
    finally:
        handle.remove()


def _copy_as_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU do what is done to bring a GPU's results to the host."""
    monkeypatch.setattr(copies.Copies, "__init__", _with_stream)
    for name, value in {
        "Event": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (copies, features):
        monkeypatch.setattr(module, "begin_copy", torch.Tensor.clone)


def _with_stream(self: copies.Copies, device: torch.device) -> None:
    self._device, self._side = device, _Stream()
    self._waiting, self._most = deque(), {}


# --- long prompts, interruptions, processes -----------------------------------------------------


#: Layers are cut into as many records and files as can be.
CUT = CaptureLimits(layout=Limits(file_bytes=1, record_bytes=1, tokens=16))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Options:
    file = tmp_path_factory.mktemp("suite") / "suite.yaml"
    prompt = "You now hold $140, and the goal is $200. " * 8
    file.write_text(json.dumps({"scenarios": [{"name": "long", "prompt": prompt.strip()}]}))
    return Options(
        model=str(models.path("Llama", "bfloat16")),
        features=False,
        scenarios=file,
        attention_capture="blocked",
        residual=True,
    )


def test_rows_of_a_long_prompt_are_those_of_all(tmp_path: Path, long: Options) -> None:
    whole = open_trace(extract_run(tmp_path / "whole", long) / "long")
    run = extract_within(CUT, tmp_path / "rows", long)
    assert verify(run) == []
    assert whole.sizes["query"] > 64
    for rows in (open_trace(run / "long"), xr.open_zarr(run / "long")):
        np.testing.assert_array_equal(rows.residual, whole.residual)
    assert len(list((run / "long/residual").glob("c.0.*"))) > 3


@pytest.mark.parametrize(
    "records",
    [pytest.param(2, marks=pytest.mark.long), 7, pytest.param(12, marks=pytest.mark.long)],
)
def test_an_interrupted_run_is_the_same_byte_for_byte(
    tmp_path: Path, long: Options, records: int
) -> None:
    expected = fakes.files_in(extract_within(CUT, tmp_path / "expected", long))
    with interrupted_after(records):
        extract_within(CUT, tmp_path / "run", long)
    assert not (tmp_path / "run/long").exists()
    assert fakes.files_in(extract_within(CUT, tmp_path / "run", long)) == expected


@pytest.mark.long
def test_writer_processes_store_the_same_residual(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def processes(job: Any, traces: Any, watch: Any, pool: Any) -> Any:
        return WriterProcesses(traces, watch, pool, job.batch_size)

    monkeypatch.setattr(running, "_writers", processes)
    extract_run(tmp_path / "run", Options(**SMALL))
    assert fakes.files_in(tmp_path / "run") == fakes.files_in(run)


# --- precision and size -------------------------------------------------------------------------


def test_values_beyond_float16_are_refused_or_named(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.model_path())
    with torch.no_grad():
        model.model.embed_tokens.weight[:] *= 1e6
    given: dict[str, Any] = {
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(demo.model_path()),
        "layers": 0,
        "features": False,
        "residual": True,
        "quiet": True,
    }
    half = {**given, "residual_dtype": "float16"}
    with pytest.raises(NonFiniteError) as error:
        zt.extract(tmp_path / "run", "You hold $90", **half)
    assert "residual of layer 0 has values that are infinite in float16" in error.value.what
    assert "--residual-dtype float32" in (error.value.remedy or "")
    named = zt.extract(tmp_path / "run", "You hold $90", allow_nonfinite=True, **half)
    (found,) = named.children.values()
    assert found.attrs["nonfinite"] == {"residual": "0"}
    assert np.isinf(found.residual).any()
    (exact,) = zt.extract(tmp_path / "exact", "You hold $90", **given).children.values()
    assert np.isfinite(exact.residual).all()
    with np.errstate(over="ignore"):
        expected = exact.residual.values.astype(np.float16)
    np.testing.assert_array_equal(found.residual, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_dry_run_says_its_size(tmp_path: Path, dtype: str) -> None:
    options = Options(**SMALL, residual_dtype=dtype)
    without = Options(**{**SMALL, "residual": False})
    needed, less = (estimate(prepare(one, weights=False)) for one in (options, without))
    extract_run(tmp_path / "run", options)
    arrays = [open_trace(tmp_path / "run" / name).residual for name in NAMES]
    dense = sum(array.nbytes + array.channel.nbytes for array in arrays)
    assert needed.dense_bytes - less.dense_bytes == dense
    files = (tmp_path / "run").glob("*/residual/c.*")
    stored = sum(file.stat().st_size for file in files)
    assert (needed.disk_bytes - less.disk_bytes) / stored == pytest.approx(1, rel=0.3)


def test_a_run_without_it_is_another_run(run: Path) -> None:
    with pytest.raises(ConfigMismatchError, match="residual"):
        extract_run(run, Options(**{**SMALL, "residual": False}))


# --- which hook point ---------------------------------------------------------------------------


def _sae(layer: int, hook: str, variable: str = "features") -> SAEAttributes:
    (made,) = fakes.make_saes([layer], 8)
    return made.model_copy(update={"hook_name": f"blocks.{layer}.{hook}", "variable": variable})


def test_the_saes_of_features_say_the_hook_point() -> None:
    before = {1: (_sae(1, "hook_mlp_out", "features_mlp_out"), _sae(1, "hook_resid_pre"))}
    found = residual_hooks((1, 11), before)
    assert found == {1: "blocks.1.hook_resid_pre", 11: "blocks.11.hook_resid_pre"}
    assert residual_hooks((5,), {}) == {5: "blocks.5.hook_resid_post"}
    added = {11: (_sae(11, "hook_attn_out"),)}
    assert residual_hooks((1, 11), added) == {11: "blocks.11.hook_attn_out"}
    mixed = {1: (_sae(1, "hook_resid_pre"),), 2: (_sae(2, "hook_resid_post"),)}
    with pytest.raises(ConfigError, match=r"SAEs read .*hook_resid_post and .*hook_resid_pre"):
        residual_hooks((1, 2), mixed)


def test_of_several_arrays_it_is_the_input_of_features(tmp_path: Path, models: Models) -> None:
    for layer, hook in ((1, "hook_mlp_out"), (2, "hook_mlp_out"), (2, "hook_resid_post")):
        config = StandardSAEConfig(d_in=32, d_sae=48)
        config.metadata.hook_name = f"blocks.{layer}.{hook}"
        SAE.from_dict(config.to_dict()).save_model(tmp_path / "saes" / f"{layer}.{hook}")
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps({"scenarios": [{"name": "short", "prompt": "You hold $90."}]}))
    options = Options(
        model=str(models.path("Llama")),
        layers=(1, 2),
        sae_path=tmp_path / "saes",
        scenarios=file,
        residual=True,
    )
    ds = open_trace(extract_run(tmp_path / "run", options) / "short")
    assert ds.attrs["residual_hook"] == "blocks.{layer}.hook_mlp_out"
    assert np.isnan(ds.features_resid_post.sel(layer=1)).all()
    for layer in (1, 2):
        sae = SAE.load_from_disk(tmp_path / "saes" / f"{layer}.hook_mlp_out")
        with torch.no_grad():
            found = sae.encode(torch.from_numpy(ds.residual.sel(layer=layer).values))
        np.testing.assert_array_equal(ds.features.sel(layer=layer), found)


def test_layers_without_such_an_sae_have_none(tmp_path: Path, models: Models) -> None:
    """Where SAEs read what a part of a block adds."""
    config = StandardSAEConfig(d_in=32, d_sae=48)
    config.metadata.hook_name = "blocks.2.hook_mlp_out"
    sae = SAE.from_dict(config.to_dict())
    given: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(models.path("Llama")),
        "tokenizer": AutoTokenizer.from_pretrained(models.path("Llama")),
        "layers": [1, 2],
        "residual": True,
        "quiet": True,
    }
    source = zt.extract(tmp_path / "run", {"name": "a", "prompt": "You hold"}, saes=sae, **given)
    ds = source["a"].to_dataset()
    assert ds.attrs["layers_without_residual"] == "1"
    assert np.isnan(ds.residual.sel(layer=1)).all()
    assert np.isfinite(ds.residual.sel(layer=2)).all()
    assert verify(tmp_path / "run") == []
