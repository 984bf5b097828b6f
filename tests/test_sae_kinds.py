"""Every SAE architecture and hook point against sae-lens's own encoding of hooked activations."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import numerics
import numpy as np
import pytest
import torch
from architectures import Models
from everyday import mostly_long
from sae_lens import (
    SAE,
    AbsTopKSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoderConfig,
    MatchingPursuitSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SkipTranscoderConfig,
    StandardSAEConfig,
    TemporalSAEConfig,
    TopKSAEConfig,
    TranscoderConfig,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_CLASS_REGISTRY
from transformers import AutoModelForCausalLM

from zarrtrace.capture import encoder, encoder_prefetch, features, release_saes, sae_configs, saes
from zarrtrace.capture.encoder_prefetch import Encoders, keeping
from zarrtrace.capture.hooks import place
from zarrtrace.capture.release_saes import ReleaseSAEs
from zarrtrace.errors import ConfigError, SAEError
from zarrtrace.extraction import Options, extract_run
from zarrtrace.store import open_trace, verify

pytestmark = pytest.mark.torch

D_SAE = 64
SUITE = {"scenarios": [{"name": "short", "prompt": "You now hold $90. Your choice:"}]}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suite") / "suite.yaml"
    file.write_text(json.dumps(SUITE), encoding="utf-8")
    return file


# --- random SAEs, saved by sae-lens -------------------------------------------------------------

Make = Callable[[Path, str, int], None]


def _randomise(sae: Any) -> None:
    """Give every weight a random value, thresholds and running estimates a positive one."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in [*sae.named_parameters(), *sae.named_buffers()]:
        values = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        positive = any(part in name for part in ("threshold", "log_"))
        weight.data = (values.abs() if positive else values).to(weight.dtype)


def _with_hook(config: Any, hook: str) -> Any:
    config.metadata.hook_name = hook
    return config


def _saver(kind: Any, **options: Any) -> Make:
    def save(folder: Path, hook: str, width: int) -> None:
        config = _with_hook(kind(d_in=width, d_sae=D_SAE, **options), hook)
        sae = SAE.from_dict(config.to_dict())
        _randomise(sae)
        sae.save_model(folder)

    return save


def _training_saver(kind: Any, config_kind: Any, **options: Any) -> Make:
    """Save as sae-lens does after training: BatchTopK and matryoshka SAEs become JumpReLU ones."""

    def save(folder: Path, hook: str, width: int) -> None:
        sae = kind(_with_hook(config_kind(d_in=width, d_sae=D_SAE, k=6, **options), hook))
        _randomise(sae)
        sae.save_inference_model(folder)

    return save


KINDS: dict[str, Make] = {
    "standard": _saver(StandardSAEConfig),
    "standard, input centred": _saver(StandardSAEConfig, apply_b_dec_to_input=True),
    "standard, layer norm": _saver(StandardSAEConfig, normalize_activations="layer_norm"),
    "standard, constant norm": _saver(
        StandardSAEConfig, normalize_activations="constant_norm_rescale"
    ),
    "jumprelu": _saver(JumpReLUSAEConfig),
    "jumprelu, input centred": _saver(JumpReLUSAEConfig, apply_b_dec_to_input=True),
    "topk": _saver(TopKSAEConfig, k=6),
    "topk, by decoder norm": _saver(TopKSAEConfig, k=6, rescale_acts_by_decoder_norm=True),
    "abstopk": _saver(AbsTopKSAEConfig, k=40),
    "abstopk, by decoder norm": _saver(AbsTopKSAEConfig, k=6, rescale_acts_by_decoder_norm=True),
    "matching pursuit": _saver(MatchingPursuitSAEConfig, max_iterations=9),
    "batchtopk": _training_saver(BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "gated": _saver(GatedSAEConfig),
    "matryoshka": _training_saver(
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        matryoshka_widths=[16, 32, D_SAE],
    ),
}
TRANSCODERS: dict[str, Make] = {
    "transcoder": _saver(TranscoderConfig, d_out=32, apply_b_dec_to_input=False),
    "jumprelu transcoder": _saver(JumpReLUTranscoderConfig, d_out=32, apply_b_dec_to_input=False),
    "skip transcoder": _saver(SkipTranscoderConfig, d_out=32, apply_b_dec_to_input=False),
    "jumprelu skip transcoder": _saver(
        JumpReLUSkipTranscoderConfig, d_out=32, apply_b_dec_to_input=False
    ),
}
# Those whose features depend on each other, or that are encoded whole for another reason.
WHOLE = (
    *("topk", "topk, by decoder norm", "abstopk", "abstopk, by decoder norm"),
    *("matching pursuit", "skip transcoder", "jumprelu skip transcoder"),
)


def test_every_architecture_of_sae_lens_is_compared_or_refused(tmp_path: Path) -> None:
    compared = set()
    for make in (KINDS | TRANSCODERS).values():
        make(tmp_path, "blocks.0.hook_resid_post", 32)
        compared.add(json.loads((tmp_path / "cfg.json").read_text())["architecture"])
    assert compared == set(sae_configs.ARCHITECTURES)
    assert set(SAE_CLASS_REGISTRY) - compared == {"temporal"}


@pytest.mark.parametrize("kind", [*KINDS, *TRANSCODERS])
def test_some_features_at_a_time_are_those_of_all(kind: str, tmp_path: Path) -> None:
    (KINDS | TRANSCODERS)[kind](tmp_path, "blocks.0.hook_resid_post", 32)
    sae = SAE.load_from_disk(tmp_path)
    tokens = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    expected = sae.encode(tokens).detach()
    source = saes.FolderSAEs(tmp_path)
    encoder = source.load(source.find([0])[0][0], torch.device("cpu"))
    encoder.columns = 24
    with torch.inference_mode():
        whole = [tile() for tile in encoder.tiles(tokens)]
        encoder.split()
        parts = [tile() for tile in encoder.tiles(tokens)]
    assert bool(encoder._parts) != (kind in WHOLE)
    found, of_parts = (_dense(tiles, 9, 24, [24, 24, 16]) for tiles in (whole, parts))
    assert np.array_equal(found, expected)
    if kind in WHOLE:
        assert np.array_equal(of_parts, expected)
    else:  # a product with fewer columns may be summed in another order
        size = _input_size(sae, tokens)
        numerics.assert_features_close(of_parts, expected.numpy(), sae, 0, size)
    assert (expected != 0).any()


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_threads_share_the_features_of_an_encoder(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path, "blocks.0.hook_resid_post", 32)
    tokens = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    source, before = saes.FolderSAEs(tmp_path), torch.get_num_threads()
    one = source.load(source.find([0])[0][0], torch.device("cpu"))
    one.columns = 8
    one.split()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            features._pool.cache_clear()
            found.append(features.encode(one, tokens).nonzeros)
    finally:
        torch.set_num_threads(before)
        features._pool.cache_clear()
    alone, shared = found
    assert len(alone.at) == 8
    assert sum(map(len, alone.at)) > 0
    for mine, other in zip((*alone.at, *alone.values), (*shared.at, *shared.values), strict=True):
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("kind", ["jumprelu", "gated"])
def test_a_kept_encoder_encodes_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of several waves, and workers with several tasks, use an encoder more than once."""
    monkeypatch.setattr(encoder, "feature_columns", lambda _: 24)
    KINDS[kind](tmp_path, "blocks.0.hook_resid_post", 32)
    tokens = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    source = keeping(saes.FolderSAEs(tmp_path))
    layers, device = {0: source.find([0])[0]}, torch.device("cpu")
    sae = SAE.load_from_disk(tmp_path)
    expected = sae.encode(tokens).detach().numpy()
    for _ in range(2):
        with Encoders(layers, source, device, [[0]]) as encoders:
            (one,) = encoders.take(0)
        found = features.encode(one, tokens).nonzeros
        tiles = list(zip(found.at, found.values, strict=True))
        whole = _dense(tiles, 40, 24, [24, 24, 16])
        numerics.assert_features_close(whole, expected, sae, 0, _input_size(sae, tokens))
    assert source.has(layers[0], device)


def test_a_gpu_with_room_waits_for_two_encoders_but_not_beyond_a_wave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder_prefetch, "_free_share", lambda _: 0.5)
    at_once, loaded = threading.Barrier(2, timeout=20), []

    class Source:
        def load(self, attributes: int, _device: torch.device) -> int:
            at_once.wait()  # another one is loaded at the same time
            loaded.append(attributes)
            return attributes

    def order() -> Iterator[list[int]]:
        yield [3, 4, 5, 6]
        assert sorted(loaded) == [3, 4, 5, 6]
        yield []
        yield [3, 4]

    given: Any = ({layer: [layer] for layer in range(9)}, Source(), torch.device("cuda"), order())
    with Encoders(*given) as encoders:
        taken = [encoders.take(layer) for layer in (3, 4, 5, 6, 3, 4)]
        assert encoders.take(3) == []
    assert taken == [[3], [4], [5], [6], [3], [4]]


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_an_encoder_in_parts_holds_no_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are copies: the file they were read from, decoder and all, is not kept mapped."""
    monkeypatch.setattr(encoder, "feature_columns", lambda _: 24)
    KINDS[kind](tmp_path, "blocks.0.hook_resid_post", 32)
    source, device = saes.FolderSAEs(tmp_path), torch.device("cpu")
    file = str(next(tmp_path.rglob("*.safetensors")))
    with Encoders({0: source.find([0])[0]}, source, device, [[0]]) as encoders:
        held = encoders.take(0)
    gc.collect()
    assert file not in Path("/proc/self/maps").read_text()
    assert held


def _dense(
    tiles: list[tuple[np.ndarray, np.ndarray]], tokens: int, columns: int, widths: list[int]
) -> np.ndarray:
    """Put blocks of some columns side by side; positions beyond a block's width are refused."""
    blocks = []
    for (at, values), width in zip(tiles, widths, strict=True):
        block = np.zeros(tokens * columns, np.float32)
        block[at] = values
        assert not block.reshape(tokens, columns)[:, width:].any()
        blocks.append(block.reshape(tokens, columns)[:, :width])
    return np.concatenate(blocks, axis=1)


def _input_size(sae: Any, tokens: torch.Tensor) -> float:
    """Return how large the numbers are that an SAE's encoder multiplies."""
    with torch.inference_mode():
        made = sae.process_sae_in(tokens)
    return float(max(tokens.abs().max(), made.abs().max()))


HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "hook_z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
}

#: By architecture, where a hook point is: a module of the block and the side of it. None is the
#: block itself. Written out by hand, against the architectures' source.
Places = dict[str, tuple[str | None, str]]
_RESIDUAL: Places = {"resid_pre": (None, "input"), "resid_post": (None, "output")}
_PRE_NORM: Places = {
    **_RESIDUAL,
    "attn_out": ("self_attn", "output"),
    "mlp_out": ("mlp", "output"),
    "hook_z": ("self_attn.o_proj", "input"),
    "mlp_in": ("mlp", "input"),
}
_POST_NORM: Places = {
    **_PRE_NORM,
    "attn_out": ("post_attention_layernorm", "output"),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}
PLACES: dict[str, Places] = {
    "Llama": _PRE_NORM,
    "GPT-2": {
        **_PRE_NORM,
        "attn_out": ("attn", "output"),
        "hook_z": ("attn.c_proj", "input"),
    },
    "GPT-NeoX": {
        **_PRE_NORM,
        "attn_out": ("attention", "output"),
        "hook_z": ("attention.dense", "input"),
    },
    "Mistral": _PRE_NORM,
    "Gemma 2": _POST_NORM,
    "Gemma 3": _POST_NORM,
    "Qwen 2": _PRE_NORM,
    "Qwen 3": _PRE_NORM,
    "Phi-3": _PRE_NORM,
    "OLMo 2": _POST_NORM,
    "gpt-oss": _PRE_NORM,
}
LAYER = 2


def _hooked(
    name: str, path: Path, ids: list[int], where: tuple[str | None, str], layer: int = LAYER
) -> torch.Tensor:
    """Return ``(token, d)`` at a place of a block, by a hook of our own on a model of our own."""
    model = architectures.load_eager_once(path)
    block = architectures.blocks_of(name, model)[layer]
    module = block if where[0] is None else block.get_submodule(where[0])
    found: list[torch.Tensor] = []
    if where[1] == "input":

        def before(_module: Any, args: Any, kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:

        def after(_module: Any, _args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = module.register_forward_hook(after)
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return found[0][0]


def _options(path: Path, suite: Path, **changes: Any) -> Options:
    chosen = {"attention": False, "layers": (LAYER,), "scenarios": suite, **changes}
    return Options(model=str(path), **chosen)


def _width(kind: str, name: str) -> int:
    return 64 if kind == "hook_z" and name == "Qwen 3" else 32


def _check(
    models: Models, suite: Path, tmp_path: Path, name: str, kind: str, make: Make, **options: Any
) -> Any:
    """Extract with one SAE and compare with sae-lens; return what the trace says of it."""
    path, folder = models.path(name), tmp_path / "saes" / "one"
    make(folder, f"blocks.{LAYER}.{HOOKS[kind]}", _width(kind, name))
    asked = _options(path, suite, sae_path=tmp_path / "saes", residual=True, **options)
    run = extract_run(tmp_path / "run", asked)
    assert verify(run) == []
    ds = open_trace(run / "short")
    activations = _hooked(name, path, ds.token_id.values.tolist(), PLACES[name][kind])
    assert np.array_equal(ds.residual.values[0], activations.numpy())
    assert ds.attrs["residual_hook"] == f"blocks.{{layer}}.{HOOKS[kind]}"
    sae = SAE.load_from_disk(folder)
    if options.get("fold_decoder_norm"):
        sae.fold_W_dec_norm()
    if kind == "hook_z":
        sae.turn_off_forward_pass_hook_z_reshaping()
    expected = sae.encode(activations).detach().numpy()
    assert (expected > 0).any()
    assert np.array_equal(ds.features.values[0], expected)
    (attributes,) = ds.attrs["saes"].values()
    assert attributes["hook_name"].format(layer=LAYER) == f"blocks.{LAYER}.{HOOKS[kind]}"
    assert attributes["d_in"] == activations.shape[-1]
    assert attributes["architecture"] == sae.cfg.architecture()
    return attributes


# Which encoder is used and where its input is read do not know of each other: every day, each kind
# at one hook point and each hook point with one kind.
@pytest.mark.long
@pytest.mark.parametrize(
    ("sae", "kind"),
    mostly_long(
        lambda sae, kind: kind == "resid_post" or sae == "jumprelu",
        KINDS,
        [kind for kind in HOOKS if kind != "mlp_in"],
    ),
)
def test_every_architecture_of_sae_at_every_hook_point(
    models: Models, suite: Path, tmp_path: Path, sae: str, kind: str
) -> None:
    _check(models, suite, tmp_path, "Llama", kind, KINDS[sae])


@pytest.mark.parametrize(
    ("name", "sae"),
    mostly_long(lambda name, _sae: name == "Llama", ["Llama", "GPT-2", "Gemma 2"], TRANSCODERS),
)
def test_transcoders_read_the_input_of_the_mlp(
    models: Models, suite: Path, tmp_path: Path, name: str, sae: str
) -> None:
    _check(models, suite, tmp_path, name, "mlp_in", TRANSCODERS[sae])


@pytest.mark.parametrize(
    ("name", "kind"),
    mostly_long(
        lambda name, kind: (
            name == "GPT-2"
            or (name == "Gemma 2" and not kind.startswith("resid"))
            or (name, kind) == ("Qwen 3", "hook_z")
        ),
        [name for name in PLACES if name != "Llama"],
        HOOKS,
    ),
)
def test_every_hook_point_of_every_model(
    models: Models, suite: Path, tmp_path: Path, name: str, kind: str
) -> None:
    make = TRANSCODERS["transcoder"] if kind == "mlp_in" else KINDS["standard"]
    _check(models, suite, tmp_path, name, kind, make)


@pytest.mark.parametrize("name", PLACES)
def test_hook_points_are_where_the_architecture_has_them(models: Models, name: str) -> None:
    model = models(name)
    for layer, block in enumerate(model.blocks):
        for kind, (module, side) in PLACES[name].items():
            found = place(block, model.attentions[layer], kind)
            assert found == (block.get_submodule(module or ""), side)


def test_hybrids_have_residual_and_mlp_hook_points_on_all_layers(models: Models) -> None:
    model = models("Qwen3-Next")
    for layer, block in enumerate(model.blocks):
        attention = model.attentions.get(layer)
        for kind in ("resid_pre", "resid_post", "mlp_out", "mlp_in"):
            place(block, attention, kind)
        for kind in ("attn_out", "hook_z"):
            if attention is None:
                with pytest.raises(SAEError, match="has no place for hook point"):
                    place(block, attention, kind)
            else:
                place(block, attention, kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_any_precision_compute_in_float32(
    models: Models, suite: Path, tmp_path: Path, dtype: str
) -> None:
    folder, path = tmp_path / "saes", models.path("Llama")
    _saver(JumpReLUSAEConfig, dtype=dtype)(folder, f"blocks.{LAYER}.hook_resid_post", 32)
    ds = open_trace(extract_run(tmp_path / "run", _options(path, suite, sae_path=folder)) / "short")
    activations = _hooked("Llama", path, ds.token_id.values.tolist(), (None, "output"))
    expected = SAE.load_from_disk(folder, dtype="float32").encode(activations).detach().numpy()
    assert (expected > 0).any()
    assert np.array_equal(ds.features.values[0], expected)
    (attributes,) = ds.attrs["saes"].values()
    assert attributes["dtype"] == "float32"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "transcoder", "apply_b_dec_to_input": True, "d_out": 32}, "transcoders"),
        ({"reshape_activations": "hook_z"}, "hook_z SAEs"),
    ],
)
def test_what_sae_lens_refuses_is_refused_before_anything_is_written(
    models: Models, suite: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    KINDS["standard"](tmp_path / "saes", f"blocks.{LAYER}.hook_resid_post", 32)
    file = tmp_path / "saes" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert said in _refused(models, suite, tmp_path)


# --- decoder norms ------------------------------------------------------------------------------


@pytest.mark.parametrize("sae", ["standard", "jumprelu", "gated", "topk, by decoder norm"])
@pytest.mark.parametrize("fold", [False, True])
def test_decoder_norms_are_folded_as_sae_lens_folds_them(
    models: Models, suite: Path, tmp_path: Path, sae: str, fold: bool
) -> None:
    attributes = _check(
        models, suite, tmp_path, "Llama", "resid_post", KINDS[sae], fold_decoder_norm=fold
    )
    assert attributes["decoder_norm_folded"] is fold


def test_topk_saes_whose_choice_would_change_are_not_folded(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    KINDS["topk"](tmp_path / "saes", f"blocks.{LAYER}.hook_resid_post", 32)
    options = _options(
        models.path("Llama"), suite, sae_path=tmp_path / "saes", fold_decoder_norm=True
    )
    with pytest.raises(SAEError, match="its decoder norm cannot be folded") as caught:
        extract_run(tmp_path / "run", options)
    assert "--fold-decoder-norm" in caught.value.remedy


# --- several SAEs on a layer --------------------------------------------------------------------


def test_several_saes_on_one_layer_give_several_arrays(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    path, folder = models.path("Gemma 2"), tmp_path / "saes"
    for layer in (1, 2):
        KINDS["jumprelu"](folder / f"res{layer}", f"blocks.{layer}.hook_resid_post", 32)
    KINDS["standard"](folder / "mlp", "blocks.2.hook_mlp_out", 32)
    KINDS["topk"](folder / "z", "blocks.1.attn.hook_z", 32)
    run = extract_run(tmp_path / "run", _options(path, suite, layers=(1, 2), sae_path=folder))
    assert verify(run) == []
    ds = open_trace(run / "short")
    ids = ds.token_id.values.tolist()
    names = {
        (int(layer), variable)
        for variable in ds.attrs["saes"]
        for layer in ds.layer.values
        if ds[f"sae_id{variable.removeprefix('features')}"].sel(layer=layer).item()
    }
    assert names == {
        (1, "features"),
        (2, "features"),
        (2, "features_mlp_out"),
        (1, "features_hook_z"),
    }
    for variable, layer, kind, saved in (
        ("features", 1, "resid_post", "res1"),
        ("features", 2, "resid_post", "res2"),
        ("features_mlp_out", 2, "mlp_out", "mlp"),
        ("features_hook_z", 1, "hook_z", "z"),
    ):
        suffix = variable.removeprefix("features")
        assert ds[variable].dims == ("layer", "query", f"feature{suffix}")
        activations = _hooked("Gemma 2", path, ids, PLACES["Gemma 2"][kind], layer)
        sae = SAE.load_from_disk(folder / saved)
        if kind == "hook_z":
            sae.turn_off_forward_pass_hook_z_reshaping()
        expected = sae.encode(activations).detach().numpy()
        assert np.array_equal(ds[variable].sel(layer=layer).values, expected)
        strongest = ds[f"top_activation{suffix}"].sel(layer=layer).values
        assert np.array_equal(strongest, -np.sort(-expected, axis=1)[:, :32])
    assert np.isnan(ds.features_mlp_out.sel(layer=1)).all()
    assert np.isnan(ds.features_hook_z.sel(layer=2)).all()


# --- refusals -----------------------------------------------------------------------------------


def _refused(models: Models, suite: Path, tmp_path: Path, name: str = "Llama", **more: Any) -> str:
    options = _options(models.path(name), suite, sae_path=tmp_path / "saes", **more)
    with pytest.raises(SAEError) as caught:
        extract_run(tmp_path / "run", options)
    assert caught.value.why
    assert caught.value.remedy
    assert not (tmp_path / "run").exists()
    return caught.value.what


def test_another_width_is_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    KINDS["standard"](tmp_path / "saes", f"blocks.{LAYER}.hook_resid_post", 48)
    what = _refused(models, suite, tmp_path)
    assert "reads 48 dimensions" in what
    assert "resid_post of the model has 32" in what


def test_heads_are_as_wide_as_all_of_them(models: Models, suite: Path, tmp_path: Path) -> None:
    """Qwen 3's four heads of 16 are wider than its residual stream of 32."""
    KINDS["standard"](tmp_path / "saes", f"blocks.{LAYER}.attn.hook_z", 32)
    assert "hook_z of the model has 64" in _refused(models, suite, tmp_path, "Qwen 3")


@pytest.mark.parametrize(
    "hook", ["blocks.2.ln2.hook_normalized", "blocks.2.attn.hook_q", "hook_embed", "layers.2"]
)
def test_a_hook_point_that_cannot_be_mapped_is_refused(
    models: Models, suite: Path, tmp_path: Path, hook: str
) -> None:
    KINDS["standard"](tmp_path / "saes", hook, 32)
    assert f"hook point '{hook}' cannot be read" in _refused(models, suite, tmp_path)


def _save(sae: Any, folder: Path) -> None:
    sae.save_model(folder)


SCALES = {
    "expected_average_only_in": "fold_activation_norm_scaling_factor",
    "covariance_whitening": "fold_activation_whitening",
}


@pytest.mark.parametrize("scale", list(SCALES))
def test_an_input_scale_that_is_not_folded_is_refused(
    models: Models, suite: Path, tmp_path: Path, scale: str
) -> None:
    make = _saver(StandardSAEConfig, normalize_activations=scale)
    make(tmp_path / "saes", f"blocks.{LAYER}.hook_resid_post", 32)
    what = _refused(models, suite, tmp_path)
    assert "saes: its input scale is not folded" in what
    with pytest.raises(SAEError) as caught:
        saes.FolderSAEs(tmp_path / "saes").find([LAYER])
    assert SCALES[scale] in caught.value.remedy
    # As sae-lens folds it, the same SAE is captured.
    sae = SAE.load_from_disk(tmp_path / "saes")
    if scale == "covariance_whitening":
        matrix = torch.linalg.qr(torch.randn(32, 32, generator=torch.manual_seed(3)))[0]
        sae.fold_activation_whitening(torch.ones(32), matrix, matrix.T)
    else:
        sae.fold_activation_norm_scaling_factor(0.5)
    (tmp_path / "saes" / "cfg.json").unlink()
    _check(models, suite, tmp_path, "Llama", "resid_post", lambda folder, *_: _save(sae, folder))


def test_a_scale_of_another_kind_is_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    KINDS["standard"](tmp_path / "saes", f"blocks.{LAYER}.hook_resid_post", 32)
    _change(tmp_path / "saes", normalize_activations="constant_scalar_rescale")
    what = _refused(models, suite, tmp_path)
    assert "its normalize_activations is 'constant_scalar_rescale'" in what


def _change(folder: Path, **changes: Any) -> None:
    """Change an SAE's configuration: metadata by names that its top lacks."""
    config = json.loads((folder / "cfg.json").read_text())
    for name, value in changes.items():
        (config if name in config else config["metadata"])[name] = value
    (folder / "cfg.json").write_text(json.dumps(config))


def test_temporal_saes_are_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    make = _saver(TemporalSAEConfig, n_heads=1)
    make(tmp_path / "saes", f"blocks.{LAYER}.hook_resid_post", 32)
    what = _refused(models, suite, tmp_path)
    assert "saes: SAEs of architecture 'temporal' cannot be captured" in what


def test_saes_of_a_release_are_refused_as_those_of_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook = "blocks.1.hook_resid_pre"
    for changes, said in (
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"normalize_activations": "covariance_whitening"}, "its input scale is not folded"),
        ({"metadata": {"hook_name": hook, "hook_head_index": 3}}, "trained on head 3 alone"),
    ):
        config = {**_config_of(hook), **changes}
        monkeypatch.setattr(
            release_saes, "load_sae_config_from_huggingface", lambda *_, c=config: c
        )
        with pytest.raises(SAEError) as caught:
            ReleaseSAEs("gpt2-small-res-jb").find([1])
        assert caught.value.what.startswith(f"gpt2-small-res-jb/{hook}: ")
        assert said in caught.value.what


def test_an_sae_of_one_head_is_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    KINDS["standard"](tmp_path / "saes", f"blocks.{LAYER}.attn.hook_z", 32)
    _change(tmp_path / "saes", hook_head_index=1)
    assert "saes: was trained on head 1 alone" in _refused(models, suite, tmp_path)


def test_weights_of_another_size_are_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    for name, width in (("one", 32), ("other", 48)):
        KINDS["gated"](tmp_path / "saes" / name, f"blocks.{LAYER}.hook_resid_post", width)
    other = tmp_path / "saes" / "other"
    (other / "sae_weights.safetensors").rename(tmp_path / "saes/one/sae_weights.safetensors")
    (other / "cfg.json").unlink()
    what = _refused(models, suite, tmp_path)
    assert "one: by its configuration, the SAE reads 32 dimensions" in what
    assert "has 48" in what


def test_hook_mlp_in_is_behind_the_norm_or_refused(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    """TransformerLens reads it before the norm, Gemma Scope 2 behind it."""
    hook, folder, path = f"blocks.{LAYER}.hook_mlp_in", tmp_path / "saes", models.path("Gemma 3")
    TRANSCODERS["transcoder"](folder, hook, 32)
    what = _refused(models, suite, tmp_path, "Gemma 3")
    assert f"{hook!r} may be before the MLP's norm" in what
    _change(folder, hf_hook_name=f"model.layers.{LAYER}.pre_feedforward_layernorm.output")
    ds = open_trace(extract_run(tmp_path / "run", _options(path, suite, sae_path=folder)) / "short")
    ids = ds.token_id.values.tolist()
    activations = _hooked("Gemma 3", path, ids, ("pre_feedforward_layernorm", "output"))
    expected = SAE.load_from_disk(folder).encode(activations).detach().numpy()
    assert np.array_equal(ds.features.values[0], expected)


# --- BOS ----------------------------------------------------------------------------------------


def _with_bos(folder: Path, layer: int, prepend_bos: bool | None) -> None:
    KINDS["standard"](folder, f"blocks.{layer}.hook_resid_post", 32)
    _change(folder, prepend_bos=prepend_bos)


def _bos_used(options: Options, run: Path) -> bool:
    attributes = open_trace(extract_run(run, options) / "short").attrs
    used: bool = attributes["model"]["prepend_bos"]
    return used


def test_saes_that_disagree_on_bos_are_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    _with_bos(tmp_path / "saes" / "a", 1, True)
    _with_bos(tmp_path / "saes" / "b", 2, False)
    _with_bos(tmp_path / "saes" / "c", 3, None)
    what = _refused(models, suite, tmp_path, layers=(1, 2))
    assert what == "SAE a was trained with a BOS token, SAE b without"
    # Those of a run count, not all of the folder; one that does not say follows the others.
    path = models.path("Llama")
    for layers, expected in (((1, 3), True), ((2, 3), False), ((2,), False)):
        options = _options(path, suite, sae_path=tmp_path / "saes", layers=layers)
        assert _bos_used(options, tmp_path / f"run{layers}") is expected
    for chosen in (True, False):
        options = _options(
            path, suite, sae_path=tmp_path / "saes", layers=(1, 2), prepend_bos=chosen
        )
        assert _bos_used(options, tmp_path / f"chosen{chosen}") is chosen


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_models_that_scale_what_they_add_are_refused_there(
    suite: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoTokenizer, GraniteConfig

    from zarrtrace import demo

    def save(folder: Path, scale: float) -> Path:
        torch.manual_seed(0)
        config = GraniteConfig(
            vocab_size=480,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            residual_multiplier=scale,
            initializer_range=0.3,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(folder)
        return folder

    KINDS["standard"](tmp_path / "saes", f"blocks.{LAYER}.{HOOKS[kind]}", 32)
    scaled = _options(save(tmp_path / "scaled", 0.22), suite, sae_path=tmp_path / "saes")
    with pytest.raises(SAEError, match="block 2 adds something else than the outputs"):
        extract_run(tmp_path / "run", scaled)
    plain = _options(save(tmp_path / "plain", 1.0), suite, sae_path=tmp_path / "saes")
    extract_run(tmp_path / "run", plain)
    KINDS["standard"](tmp_path / "res", f"blocks.{LAYER}.hook_resid_post", 32)
    residual = _options(tmp_path / "scaled", suite, sae_path=tmp_path / "res")
    extract_run(tmp_path / "other", residual)


# --- registered releases: ids from sae-lens's own table -----------------------------------------


#: What reads configurations, of Llama Scope's SAEs and of others.
CONFIG_READERS = "read_config", "load_sae_config_from_huggingface"


def _config_of(hook: str, **more: Any) -> dict[str, Any]:
    return {"architecture": "jumprelu", "d_in": 32, "d_sae": 64, "hook_name": hook, **more}


@pytest.fixture
def hook_of_id(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], list[str]]:
    """Replace the hub: a function says which hook point an id reads."""

    def replace(hook: Callable[[str], str]) -> list[str]:
        asked: list[str] = []

        def load(_release: str, sae_id: str, **_: Any) -> dict[str, Any]:
            asked.append(sae_id)
            return _config_of(hook(sae_id))

        for name in CONFIG_READERS:
            monkeypatch.setattr(release_saes, name, load)
        monkeypatch.setattr(
            release_saes, "snapshot_download", lambda *_, **__: "snapshots/0123abcd"
        )
        return asked

    return replace


def _number(sae_id: str) -> int:
    return int(next(part for part in _pieces(sae_id) if part.isdigit()))


def _pieces(sae_id: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in sae_id).split()


HookOfId = Callable[[Callable[[str], str]], list[str]]


@pytest.mark.parametrize(
    ("release", "form", "site", "layers"),
    [
        ("llama_scope_lxr_8x", "l{}r_8x", "hook_resid_post", 32),
        ("llama_scope_lxr_32x", "l{}r_32x", "hook_resid_post", 32),
        ("llama_scope_lxm_8x", "l{}m_8x", "hook_mlp_out", 32),
        ("llama_scope_lxa_8x", "l{}a_8x", "hook_attn_out", 32),
        ("gpt2-small-res-jb", "blocks.{}.hook_resid_pre", "hook_resid_pre", 12),
        ("gpt2-small-mlp-out-v5-32k", "blocks.{}.hook_mlp_out", "hook_mlp_out", 12),
        ("gpt2-small-hook-z-kk", "blocks.{}.hook_z", "attn.hook_z", 12),
    ],
)
def test_ids_of_releases_with_one_sae_a_layer(
    hook_of_id: HookOfId, release: str, form: str, site: str, layers: int
) -> None:
    asked = hook_of_id(lambda name: f"blocks.{_number(name)}.{site}")
    found = ReleaseSAEs(release).find(range(layers))
    assert {layer: [sae.id for sae in of] for layer, of in found.items()} == {
        layer: [form.format(layer)] for layer in range(layers)
    }
    assert set(asked) <= set(get_pretrained_saes_directory()[release].saes_map)
    assert {sae.variable for of in found.values() for sae in of} == {"features"}


def test_a_release_with_two_hook_points_on_a_layer(hook_of_id: HookOfId) -> None:
    """gpt2-small-res-jb ends with the output of block 11, Pythia's begin with the input of 0."""
    hook_of_id(lambda name: name)
    found = ReleaseSAEs("gpt2-small-res-jb").find([10, 11])
    names = {layer: {sae.variable: sae.id for sae in of} for layer, of in found.items()}
    assert names == {
        10: {"features": "blocks.10.hook_resid_pre"},
        11: {
            "features": "blocks.11.hook_resid_pre",
            "features_resid_post": "blocks.11.hook_resid_post",
        },
    }
    found = ReleaseSAEs("pythia-70m-deduped-res-sm").find(range(6))
    names = {layer: {sae.variable: sae.id for sae in of} for layer, of in found.items()}
    assert names[0] == {
        "features": "blocks.0.hook_resid_post",
        "features_resid_pre": "blocks.0.hook_resid_pre",
    }
    assert [names[n]["features"] for n in range(6)] == [
        f"blocks.{n}.hook_resid_post" for n in range(6)
    ]


def test_gemma_scope(hook_of_id: HookOfId) -> None:
    asked = hook_of_id(lambda name: f"blocks.{_number(name)}.hook_resid_post")
    with pytest.raises(SAEError, match=r"gemma-scope-2b-pt-res: .* SAEs for layer 3: ") as caught:
        ReleaseSAEs("gemma-scope-2b-pt-res").find([3, 4])
    assert "--sae-id" in caught.value.remedy
    assert not asked  # nothing is fetched to find out
    pattern = "layer_{layer}/width_16k/canonical"
    found = ReleaseSAEs("gemma-scope-2b-pt-res-canonical", [pattern]).find(range(26))
    assert [sae.id for of in found.values() for sae in of] == [
        pattern.replace("{layer}", str(layer)) for layer in range(26)
    ]


def test_several_patterns_give_several_arrays(hook_of_id: HookOfId) -> None:
    hook_of_id(lambda name: f"blocks.{_number(name)}.hook_resid_post")
    patterns = ["layer_{layer}/width_16k/canonical", "layer_{layer}/width_65k/canonical"]
    found = ReleaseSAEs("gemma-scope-2b-pt-res-canonical", patterns).find([5])
    assert [(sae.variable, sae.id) for sae in found[5]] == [
        ("features", "layer_5/width_16k/canonical"),
        ("features_resid_post", "layer_5/width_65k/canonical"),
    ]


def test_wrong_releases_and_patterns_are_refused(hook_of_id: HookOfId) -> None:
    hook_of_id(lambda name: f"blocks.{_number(name)}.hook_resid_post")
    with pytest.raises(SAEError, match="no such SAE release") as caught:
        ReleaseSAEs("llama_scope_lxr_8")
    assert "llama_scope_lxr_8x" in caught.value.remedy
    with pytest.raises(ConfigError, match="names one SAE for all layers"):
        ReleaseSAEs("llama_scope_lxr_8x", ["l1r_8x"])
    with pytest.raises(SAEError, match="no SAE 'l1r_9x' for layer 1"):
        ReleaseSAEs("llama_scope_lxr_8x", ["l{layer}r_9x"]).find([1])
    with pytest.raises(SAEError, match="no SAE for layer 40"):
        ReleaseSAEs("llama_scope_lxr_8x").find([40])


def test_a_number_that_is_not_the_block_is_refused(hook_of_id: HookOfId) -> None:
    """Off by one, as in hidden_states[N]: the id says another layer than the hook point."""
    hook_of_id(lambda name: f"blocks.{_number(name) + 1}.hook_resid_post")
    with pytest.raises(SAEError, match=r"reads blocks\.2\.hook_resid_post, not layer 1"):
        ReleaseSAEs("llama_scope_lxr_8x").find([1])


def test_a_release_without_a_norm_to_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config_of("blocks.1.hook_resid_pre", normalize_activations="expected_average_only_in")
    for name in CONFIG_READERS:
        monkeypatch.setattr(release_saes, name, lambda *_: config)
    monkeypatch.setattr(release_saes, "snapshot_download", lambda *_, **__: "snapshots/0123abcd")
    with pytest.raises(SAEError, match="its input scale is not folded"):
        ReleaseSAEs("gpt2-small-res-jb").find([1])
    config["hook_name"] = "blocks.1.hook_resid_post"
    assert list(ReleaseSAEs("llama_scope_lxr_8x").find([1])) == [1]


def test_layers_without_an_sae_are_listed_and_have_no_features(
    models: Models, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release for a model of 2 blocks, on one of 4: two layers are left without features."""
    release = "gpt2-small-res-jb"
    entry = get_pretrained_saes_directory()[release]
    monkeypatch.setattr(
        release_saes,
        "get_pretrained_saes_directory",
        lambda: {release: replace(entry, saes_map=dict(list(entry.saes_map.items())[:2]))},
    )
    monkeypatch.setattr(release_saes, "snapshot_download", lambda *_, **__: "snapshots/0123abcd")
    for layer in (0, 1):
        hook = f"blocks.{layer}.hook_resid_pre"
        KINDS["standard"](tmp_path / "saes" / hook, hook, 32)

    def config_of(_release: str, sae_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "saes" / sae_id / "cfg.json").read_text())
        return found

    def load(_release: str, sae_id: str, **_: Any) -> Any:
        return SAE.load_from_disk(tmp_path / "saes" / sae_id)

    monkeypatch.setattr(release_saes, "load_sae_config_from_huggingface", config_of)
    monkeypatch.setattr(release_saes.SAE, "from_pretrained", load)
    path = models.path("GPT-2")
    options = _options(path, suite, attention=True, layers=(0, 1, 2, 3), sae_release=release)
    run = extract_run(tmp_path / "run", options)
    assert verify(run) == []
    ds = open_trace(run / "short")
    assert ds.attrs["layers_without_sae"] == "2-3"
    assert [sae["release"] for sae in ds.attrs["saes"].values()] == [release]
    assert [bool(text) for text in ds.sae_id.values] == [True, True, False, False]
    assert np.isnan(ds.features.sel(layer=[2, 3])).all()
    assert np.isfinite(ds.attention).all()
    ids = ds.token_id.values.tolist()
    for layer in (0, 1):
        activations = _hooked("GPT-2", path, ids, (None, "input"), layer)
        sae = SAE.load_from_disk(tmp_path / "saes" / f"blocks.{layer}.hook_resid_pre")
        expected = sae.encode(activations).detach().numpy()
        assert np.array_equal(ds.features.sel(layer=layer).values, expected)
