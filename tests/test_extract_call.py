"""``zt.extract``: names and loaded objects, in scripts, notebooks and threads."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import fakes
import numpy as np
import pytest
import torch
from architectures import Models
from everyday import mostly_long
from test_interrupts import handlers, interrupt  # noqa: F401 -- a fixture
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.torch

from sae_lens import (  # noqa: E402  # noqa: E402
    SAE,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TemporalSAEConfig,
)

import zarrtrace as zt  # noqa: E402
from zarrtrace import demo  # noqa: E402
from zarrtrace.capture.lockstep import Pass  # noqa: E402
from zarrtrace.cli import group  # noqa: E402
from zarrtrace.errors import (  # noqa: E402
    ConfigError,
    ConfigMismatchError,
    ModelError,
    SAEError,
    ScenarioError,
    ZarrtraceError,
)
from zarrtrace.extraction import running  # noqa: E402
from zarrtrace.store import read_trace, summarize, verify  # noqa: E402

PROMPTS = ["You now hold $90. Your choice:", "Bet or stop?", "The goal is $200."]
WIDTH = architectures.WIDTH


def load(path: Path, **options: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer as most users do."""
    with architectures.quiet():
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    return model, AutoTokenizer.from_pretrained(path)


def make_sae(
    layer: int,
    d_sae: int = 64,
    kind: Any = StandardSAEConfig,
    hook: str = "hook_resid_post",
    **how: Any,
) -> Any:
    """Make a random SAE in memory."""
    config = kind(d_in=WIDTH, d_sae=d_sae, **how)
    config.metadata.hook_name = f"blocks.{layer}.{hook}"
    sae = SAE.from_dict(config.to_dict())
    generator = torch.Generator().manual_seed(layer)
    for name, weight in [*sae.named_parameters(), *sae.named_buffers()]:
        values = torch.randn(weight.shape, generator=generator)
        weight.data = values.abs() if "threshold" in name else values
    return sae


def outputs_of(model: Any, ids: list[int], name: str) -> list[torch.Tensor]:
    """Return what each block makes of a prompt, by hooks of our own."""
    found: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for block in architectures.blocks_of(name, model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    mostly_long(lambda name: name in architectures.EVERY_DAY, architectures.ARCHITECTURES),
)
def test_attention_of_a_loaded_model_is_transformers_own(
    models: Models, tmp_path: Path, name: str
) -> None:
    """Models are loaded with the attention that transformers chooses, which returns no matrix."""
    path = models.path(name)
    model, tokenizer = load(path)
    assert model.config.get_text_config()._attn_implementation in ("sdpa", "eager")
    run = zt.extract(
        tmp_path / "run", PROMPTS, model=model, tokenizer=tokenizer, features=False, quiet=True
    )
    assert list(run.children) == ["scenario_0", "scenario_1", "scenario_2"]
    for prompt, (_, node) in zip(PROMPTS, run.children.items(), strict=True):
        ds = node.to_dataset()
        assert ds.attrs["prompt"] == prompt
        expected = architectures.reference(name, path, ds.token_id.values.tolist())
        layers = ds[ds.attention.dims[0]].values.tolist()
        assert layers == list(expected.attention)
        for layer in layers:
            found = ds.attention.sel({ds.attention.dims[0]: layer}).values
            assert np.array_equal(found, expected.attention[layer].numpy())
        logprobs = expected.logits.log_softmax(-1).topk(10).values
        assert np.array_equal(ds.next_token_logprob.values, logprobs.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_those_of_the_loaded_sae(models: Models, tmp_path: Path, dtype: str) -> None:
    """5,000 features take several chunks, which threads encode by themselves."""
    model, tokenizer = load(models.path("Llama"))
    eager = architectures.load_eager(models.path("Llama"))
    saes = {layer: make_sae(layer, 5000) for layer in (1, 3)}
    for sae in saes.values():
        sae.to(dtype=getattr(torch, dtype))
    before = {layer: dict(sae.state_dict()) for layer, sae in saes.items()}
    run = zt.extract(tmp_path / "run", PROMPTS, model=model, tokenizer=tokenizer, saes=saes)
    for node in run.children.values():
        ds = node.to_dataset()
        assert ds.layer.values.tolist() == [1, 3]
        hidden = outputs_of(eager, ds.token_id.values.tolist(), "Llama")
        for layer, sae in saes.items():
            with torch.no_grad():
                expected = sae.encode(hidden[layer]).float()
            assert np.array_equal(ds.features.sel(layer=layer).values, expected.numpy())
            assert (expected > 0).any()
        assert ds.attrs["saes"]["features"]["dtype"] == dtype
    for layer, sae in saes.items():
        assert sae.W_dec.shape == (5000, WIDTH)
        for name, value in sae.state_dict().items():
            assert value.data_ptr() == before[layer][name].data_ptr()
        assert all(parameter.requires_grad for parameter in sae.parameters())


class Divided(StandardSAE):
    """Divides each feature by the largest of its token."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        found = super().encode(x)
        return found / found.amax(-1, keepdim=True)


class Decoding(StandardSAE):
    """Scales each feature by its decoder direction."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x) * self.W_dec.norm(dim=-1)


def ablate(sae: Any) -> None:
    sae.hook_sae_acts_post.add_hook(lambda found, hook: found * (torch.arange(5000) != 7))


def mix(sae: Any) -> None:
    sae.hook_sae_acts_pre.add_hook(lambda found, hook: found.roll(1, -1))


def share(sae: Any) -> None:
    sae.activation_fn = torch.nn.Softmax(dim=-1)


def double(sae: Any) -> None:
    own = sae.encode
    sae.encode = lambda x: 2 * own(x)


def of_class(kind: type) -> Callable[[Any], None]:
    return lambda sae: setattr(sae, "__class__", kind)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *itertools.product([StandardSAEConfig, GatedSAEConfig], [ablate, mix, share, double]),
        (StandardSAEConfig, of_class(Divided)),
        (StandardSAEConfig, of_class(Decoding)),
    ],
)
def test_changed_saes_encode_as_they_are(
    models: Models, tmp_path: Path, kind: Any, change: Callable[[Any], None]
) -> None:
    """5,000 features are encoded some at a time, unless a user's code may see all of them."""
    model, tokenizer = load(models.path("Llama"))
    sae = make_sae(1, 5000, kind)
    change(sae)
    run = zt.extract(
        tmp_path / "run", PROMPTS[0], model=model, tokenizer=tokenizer, saes=sae, residual=True
    )
    ds = run["scenario_0"].to_dataset()
    with torch.no_grad():
        expected = sae.encode(torch.tensor(ds.residual.values[0])).numpy()
    assert np.array_equal(ds.features.values[0], expected)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", [StandardSAEConfig, GatedSAEConfig])
def test_saes_decode_as_before(models: Models, tmp_path: Path, norm: str, kind: Any) -> None:
    """Decoding scales back by what encoding took note of, here with gradients."""
    model, tokenizer = load(models.path("Llama"))
    sae = make_sae(1, 5000, kind, normalize_activations=norm)
    inputs = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = sae.decode(sae.encode(inputs)).detach()
    found = sae.encode(inputs)
    run = zt.extract(
        tmp_path / "run", PROMPTS[0], model=model, tokenizer=tokenizer, saes=sae, residual=True
    )
    assert torch.equal(sae.decode(found), expected)
    ds = run["scenario_0"].to_dataset()
    with torch.no_grad():
        encoded = sae.encode(torch.tensor(ds.residual.values[0])).numpy()
    np.testing.assert_allclose(ds.features.values[0], encoded, rtol=1e-4, atol=1e-4)


def test_several_saes_of_a_layer_and_one_alone(models: Models, tmp_path: Path) -> None:
    model, tokenizer = load(models.path("GPT-2"))
    both = [make_sae(1), make_sae(1, hook="hook_mlp_out", kind=JumpReLUSAEConfig)]
    given: list[Any] = [{1: both, 2: make_sae(2)}, [*both, make_sae(2)]]
    for at, saes in enumerate(given):
        run = zt.extract(
            tmp_path / str(at), PROMPTS[0], model=model, tokenizer=tokenizer, saes=saes
        )
        ds = run["scenario_0"].to_dataset()
        assert ds.layer.values.tolist() == [1, 2]
        assert {"features", "features_mlp_out"} <= set(ds.data_vars)
        assert ds.features_mlp_out.sel(layer=2).isnull().all()
    run = zt.extract(tmp_path / "one", PROMPTS[0], model=model, tokenizer=tokenizer, saes=both[0])
    assert run["scenario_0"].layer.values.tolist() == [1]
    run = zt.extract(
        tmp_path / "all", PROMPTS[0], model=model, tokenizer=tokenizer, saes=both[0], layers="0-3"
    )
    assert run["scenario_0"].features.notnull().all(["query", "feature"]).values.tolist() == [
        False, True, False, False,
    ]  # fmt: skip
    table = zt.extract(
        tmp_path / "table", PROMPTS[0], model=model, tokenizer=tokenizer, saes=both[0],
        layers="0-3", layout="table",
    )  # fmt: skip
    np.testing.assert_array_equal(table.features, run["scenario_0"].features)


def test_a_tokenizer_given_with_a_name(models: Models, tmp_path: Path) -> None:
    path, options = models.path("Llama"), {"features": False, "quiet": True}
    other = AutoTokenizer.from_pretrained(path)
    other.add_tokens(["hold"])
    plain = zt.extract(tmp_path / "plain", PROMPTS[0], model=path, **options)["scenario_0"]
    by_name = zt.extract(tmp_path / "named", PROMPTS[0], model=path, tokenizer=path, **options)
    assert np.array_equal(by_name["scenario_0"].token_id, plain.token_id)
    with pytest.raises(ConfigError, match="gives id 480, the model has 480 embeddings"):
        zt.extract(tmp_path / "other", PROMPTS[0], model=path, tokenizer=other, **options)


@pytest.mark.parametrize("options", [{}, {"layout": "table", "residual": True}, {"generate": 2}])
def test_tokens_without_embeddings_are_refused(
    models: Models, tmp_path: Path, options: dict[str, Any]
) -> None:
    """They were added to the tokenizer of a model, whose embeddings nobody resized."""
    path = shutil.copytree(models.path("Llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["hold"])
    tokenizer.save_pretrained(path)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with pytest.raises(IndexError), torch.inference_mode():
        architectures.load_eager(path)(ids)
    given = {"model": path, "features": False, "quiet": True, **options}
    prompts = [f"Bet {number}?" for number in range(20)]
    with pytest.raises(ConfigError, match="gives id 480, the model has 480 embeddings"):
        zt.extract(tmp_path / "run", [*prompts, PROMPTS[0]], **given)
    assert not (tmp_path / "run").exists()
    zt.extract(tmp_path / "run", prompts[:2], **given)


# --- a model is given back as it was --------------------------------------------------------------


def state_of(model: Any) -> dict[str, Any]:
    """Return everything of a model that a caller may see."""
    state: dict[str, Any] = {"config": model.config.to_dict(), "own": sorted(vars(model.config))}
    state["attention"] = model.config._attn_implementation
    for name, module in model.named_modules():
        hooks = [vars(module)[key] for key in vars(module) if key.endswith("_hooks")]
        state[f"module {name}"] = type(module), module.training, [list(one) for one in hooks]
        state[f"own of {name}"] = sorted(key for key in vars(module) if key != "forward")
        state[f"forward of {name}"] = "forward" in vars(module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = tensor.requires_grad, tensor.device, tensor.dtype, tensor.data_ptr()
    return state


def prepared(models: Models, name: str = "Llama") -> tuple[Any, Any, dict[str, Any]]:
    """Return a model in an unusual state: in training, partly frozen, with a hook."""
    model, tokenizer = load(models.path(name))
    model.train()
    model.get_output_embeddings().eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    return model, tokenizer, state_of(model)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Qwen3-Next"])
def test_state_is_restored(models: Models, tmp_path: Path, name: str) -> None:
    model, tokenizer, before = prepared(models, name)
    zt.extract(tmp_path / "run", PROMPTS, model=model, tokenizer=tokenizer, features=False)
    assert state_of(model) == before
    loss = model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()  # refused for tensors that were made in inference mode


def test_own_outputs_stay_as_they_were(models: Models, tmp_path: Path) -> None:
    """transformers leaves hooks on a model that was asked for hidden states."""
    model, tokenizer = load(models.path("Llama"))
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids, output_hidden_states=True).hidden_states
    zt.extract(tmp_path / "run", PROMPTS, model=model, tokenizer=tokenizer, features=False)
    after = model(ids, output_hidden_states=True).hidden_states
    assert len(after) == len(before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_state_is_restored_after_an_error(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model, tokenizer, before = prepared(models)
    original, steps = Pass.advance, []

    def fail(self: Pass) -> Any:
        steps.append(self)
        if len(steps) > 60:  # the probe takes fewer
            raise error("in the middle")
        return original(self)

    monkeypatch.setattr(Pass, "advance", fail)
    with pytest.raises(error):
        zt.extract(tmp_path / "run", PROMPTS * 9, model=model, tokenizer=tokenizer, features=False)
    assert summarize(tmp_path / "run").traces
    assert state_of(model) == before


def test_a_refused_model_is_given_back(models: Models, tmp_path: Path) -> None:
    model, tokenizer, before = prepared(models)
    with pytest.raises(ConfigError, match="the model has blocks 0 to 3"):
        zt.extract(
            tmp_path / "run", "x", model=model, tokenizer=tokenizer, features=False, layers=9
        )
    assert state_of(model) == before


# --- resume ---------------------------------------------------------------------------------------


def ended_early(monkeypatch: pytest.MonkeyPatch, stop: Callable[[], None]) -> pytest.MonkeyPatch:
    """Have the next extractions stop after five records."""
    original = running.captured

    def some(*given: Any) -> Any:
        for at, record in enumerate(original(*given)):
            if at == 5:
                stop()
            yield record

    monkeypatch.setattr(running, "captured", some)
    return monkeypatch


def test_an_interrupted_run_is_resumed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jupyter's "interrupt the kernel" is SIGINT in the main thread."""
    model, tokenizer = load(models.path("Llama"))
    asked: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "features": False}
    whole = zt.extract(tmp_path / "whole", PROMPTS, **asked)
    with monkeypatch.context() as patch:
        ended_early(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            zt.extract(tmp_path / "run", PROMPTS, **asked)
    assert sum(len(one.missing_layers) for one in summarize(tmp_path / "run").traces) > 0
    again = zt.extract(tmp_path / "run", PROMPTS, **asked)
    assert verify(tmp_path / "run") == []
    for name, node in whole.children.items():
        assert node.to_dataset().identical(again[name].to_dataset())


@pytest.mark.long
def test_a_loaded_model_resumes_a_run_by_name(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.path("Llama")
    folder = tmp_path / "saes" / "blocks.1.hook_resid_post"
    make_sae(1).save_model(folder)
    model, tokenizer = load(path)

    def stop() -> None:
        raise OSError("ended")

    with monkeypatch.context() as patch:
        ended_early(patch, stop)
        with pytest.raises(OSError, match="ended"):
            zt.extract(tmp_path / "run", PROMPTS * 3, model=path, saes=tmp_path / "saes")
    saes = {1: SAE.load_from_disk(folder)}
    zt.extract(tmp_path / "run", PROMPTS * 3, model=model, tokenizer=tokenizer, saes=saes)
    by_name = zt.extract(tmp_path / "run", PROMPTS * 3, model=path, saes=tmp_path / "saes")
    assert verify(tmp_path / "run") == []
    attributes = read_trace(tmp_path / "run" / "scenario_0").attributes
    assert attributes.model is not None
    assert attributes.model.id == str(path) == by_name["scenario_0"].attrs["model"]["id"]
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1.001
    with pytest.raises(ConfigMismatchError, match="weights of the model"):
        zt.extract(tmp_path / "run", PROMPTS * 3, model=model, tokenizer=tokenizer, saes=saes)
    with torch.no_grad():
        saes[1].W_enc *= 1.001
    again = load(path)[0]
    with pytest.raises(ConfigMismatchError, match="weights of SAEs"):
        zt.extract(tmp_path / "run", PROMPTS * 3, model=again, tokenizer=tokenizer, saes=saes)


def test_an_sae_in_another_precision_does_not_resume(models: Models, tmp_path: Path) -> None:
    """A checkpoint in bfloat16 has one fingerprint, whatever it is computed in."""
    model, tokenizer = load(models.path("Llama"))
    sae = make_sae(1).to(dtype=torch.bfloat16)
    zt.extract(tmp_path / "run", "x", model=model, tokenizer=tokenizer, saes=sae)
    wide = sae.to(dtype=torch.float32)
    with pytest.raises(ConfigMismatchError, match="sae_dtype"):
        zt.extract(tmp_path / "run", "x", model=model, tokenizer=tokenizer, saes=wide)


# --- where it runs --------------------------------------------------------------------------------


def test_in_a_running_loop(models: Models, tmp_path: Path) -> None:
    """Cells of Jupyter run within asyncio's loop."""
    model, tokenizer = load(models.path("Llama"))

    async def cell() -> Any:
        return zt.extract(
            tmp_path / "run", PROMPTS[0], model=model, tokenizer=tokenizer, features=False
        )

    run = asyncio.run(cell())
    assert float(run["scenario_0"].attention.isel(query=0, key=0).min()) == 1


def test_in_another_thread(models: Models, tmp_path: Path) -> None:
    model, tokenizer = load(models.path("Llama"))
    asked: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "features": False}
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(zt.extract(tmp_path / "run", PROMPTS, **asked))
    )
    thread.start()
    thread.join()
    expected = zt.extract(tmp_path / "again", PROMPTS, **asked)
    for name, node in expected.children.items():
        assert node.attention.identical(found[0][name].attention)


@pytest.mark.parametrize(("quiet", "said"), [(True, False), (False, True)])
def test_progress_is_on_stderr_or_nowhere(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet: bool,
    said: bool,
) -> None:
    model, tokenizer = load(models.path("Llama"))
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    zt.extract(tmp_path / "run", "x", model=model, tokenizer=tokenizer, features=False, quiet=quiet)
    out, err = capsys.readouterr()
    assert not out
    assert ("scenarios: 100%" in err) == said
    assert err == "" or said


def test_what_is_missing_is_said_without_torch() -> None:
    code = (
        "import sys, zarrtrace as zt\n"
        "try: zt.extract('x', ['a prompt'])\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ConfigError False\n"


# --- options --------------------------------------------------------------------------------------

#: Options of the command that have another name in Python, or stand for one another.
_RENAMED = {
    "no_attention": "attention",
    "no_features": "features",
    "sae_release": "saes",
    "sae_id": "saes",
    "sae_path": "saes",
    "storage_option": "storage_options",
    "prompt": "scenarios",
    "gpu": "device",
    "layer_start": "layers",
    "layer_end": "layers",
}
#: Printed, not extracted.
_OF_THE_COMMAND = {"dry_run", "json", "help"}
_OF_PYTHON = {"tokenizer"}


def test_every_option_is_one_of_both() -> None:
    command = group.get_command(group.make_context("zarrtrace", ["extract"]), "extract")
    assert command is not None
    flags = {parameter.opts[0].removeprefix("--").replace("-", "_") for parameter in command.params}
    parameters = inspect.signature(zt.extract).parameters
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    expected = {_RENAMED.get(name, name) for name in flags - _OF_THE_COMMAND}
    assert set(parameters) == expected | _OF_PYTHON


def test_every_parameter_is_documented() -> None:
    """As NumPy does it: in the order of the signature, types left to annotations."""
    text = inspect.getdoc(zt.extract) or ""
    section = text.partition("Parameters\n----------\n")[2].partition("\nReturns\n")[0]
    named = [
        name.strip()
        for line in section.splitlines()
        if line and not line.startswith(" ")
        for name in line.split(",")
    ]
    assert sorted(named) == sorted(inspect.signature(zt.extract).parameters)


def test_options_reach_the_run(models: Models, tmp_path: Path) -> None:
    run = zt.extract(
        tmp_path / "run",
        "slot-machine",
        model=models.path("Llama"),
        features=False,
        scenario=["Risky_40", "Medium_60"],
        layers=range(1, 3),
        attention_positions=[-1, 0],
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        batch_size=2,
        attention_dtype="float16",
        prepend_bos=False,
    )
    assert sorted(run.children) == ["Medium_60", "Risky_40"]
    ds = run["Risky_40"].to_dataset()
    assert ds.layer.values.tolist() == [1, 2]
    assert ds.attention.dtype == np.float16
    assert ds[ds.attention.dims[2]].values.tolist() == [0, ds.sizes["key"] - 1]
    assert ds.attrs["model"]["dtype"] == "bfloat16"
    assert not ds.attrs["model"]["prepend_bos"]
    config = run.attrs["config"]
    assert config["batch_size"] == 2


@pytest.mark.long
def test_the_demo_by_name(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": [1, 2], "scenario": "Risky_40", "quiet": True}
    plain = zt.extract(tmp_path / "a", **options)
    named = zt.extract(tmp_path / "a", "slot-machine", model="demo", **options)
    assert plain["Risky_40"].to_dataset().identical(named["Risky_40"].to_dataset())
    own = zt.extract(tmp_path / "b", PROMPTS[0], model="demo", layers=3, quiet=True)
    assert own["scenario_0"].attrs["model"]["id"] == "zarrtrace-demo"
    release = demo.sae_path()
    folder = zt.extract(tmp_path / "c", PROMPTS[0], model="demo", saes=str(release), layers=3)
    assert folder["scenario_0"].features.identical(own["scenario_0"].features)


def test_scenarios_with_metadata_and_spans(models: Models, tmp_path: Path) -> None:
    poor = zt.Scenario(
        "You hold [[balance:$90]]. Bet?", name="poor", tags=["risky"], metadata={"balance": 90.0}
    )
    run = zt.extract(
        tmp_path / "run", [poor, {"prompt": "x", "name": "rich", "metadata": {"balance": 1}}],
        model=models.path("Llama"), features=False,
    )  # fmt: skip
    ds = run["poor"].to_dataset()
    texts = [str(ds.key_token.values[at]) for at in zt.span(ds, "balance")]
    assert "".join(texts).strip() == "$90"
    assert ds.attrs["metadata"] == {"balance": 90.0}


# --- what is refused ------------------------------------------------------------------------------


def fails(tmp_path: Path, kind: type[ZarrtraceError], *given: Any, **options: Any) -> str:
    with pytest.raises(kind) as error:
        zt.extract(tmp_path / "run", *given, **options)
    assert error.value.remedy
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_a_model_without_prompts_and_prompts_without_a_model(tmp_path: Path) -> None:
    said = fails(tmp_path, ConfigError, model="gpt2", features=False)
    assert said.startswith("no scenarios given for gpt2")
    assert "slot-machine" in said
    said = fails(tmp_path, ConfigError, PROMPTS)
    assert said.startswith("no model given for these scenarios")
    assert "demo" in said
    said = fails(tmp_path, ConfigError, PROMPTS, model="gpt2")
    assert said.startswith("no SAEs given for gpt2")
    assert "features=False" in said


def test_a_loaded_model_needs_a_tokenizer(models: Models, tmp_path: Path) -> None:
    path = models.path("Llama")
    model, _ = load(path)
    run = zt.extract(tmp_path / "found", PROMPTS[0], model=model, features=False)
    assert run["scenario_0"].sizes["key"] > 3
    model.name_or_path = model.config._name_or_path = ""
    said = fails(tmp_path, ConfigError, PROMPTS[0], model=model, features=False)
    assert said.startswith("no tokenizer for the loaded model LlamaForCausalLM")
    assert "the argument tokenizer" in said
    said = fails(tmp_path, ConfigError, "x", model=path, tokenizer="no/such", features=False)
    assert said.startswith("no tokenizer no/such")


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"dtype": "float32"},
        {"revision": "main"},
        {"low_memory": True},
        {"trust_remote_code": True},
    ],
)
def test_options_of_loading(models: Models, tmp_path: Path, options: Mapping[str, Any]) -> None:
    model, tokenizer = load(models.path("Llama"))
    said = fails(tmp_path, ConfigError, "x", model=model, tokenizer=tokenizer, **options)
    (name,) = options
    assert f"{'device' if name == 'gpu' else name} with a loaded model" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 2.0}, "--batch-size 2.0"),
        ({"batch_size": "2"}, "--batch-size '2'"),
        ({"batch_size": np.array([1, 2])}, "--batch-size array"),
        ({"attention_keepbits": 5.0}, "--attention-keepbits 5.0"),
        ({"workers": "2"}, "--workers '2'"),
        ({"prepend_bos": "no"}, "--prepend-bos 'no'"),
        ({"attention": 2}, "--attention 2"),
        ({"generate": 2, "temperature": "hot"}, "--temperature 'hot'"),
        ({"generate": 2, "temperature": 1, "top_p": [1]}, r"--top-p \[1\]"),
        ({"generate": 2, "temperature": 1, "seed": "x"}, "--seed 'x'"),
        ({"generate": 2, "answer": 1}, "--answer 1"),
        ({"generate": 2, "stop": 1}, "--stop 1"),
        ({"generate": 2, "stop": ["x", b"y"]}, "--stop "),
    ],
)
def test_values_of_another_kind(tmp_path: Path, options: Mapping[str, Any], said: str) -> None:
    given = {"model": "demo", "features": False, **options}
    assert re.match(said, fails(tmp_path, ConfigError, "x", **given))


@pytest.mark.parametrize("layout", ["traces", "table"])
def test_numbers_of_numpy_are_pythons(models: Models, tmp_path: Path, layout: Any) -> None:
    model, tokenizer = load(models.path("Llama"))
    options: dict[str, Any] = {
        "model": model, "tokenizer": tokenizer, "layout": layout, "generate": 2, "samples": 2,
        "temperature": 1, "residual": True,
    }  # fmt: skip
    plain = {"features": False, "prepend_bos": True, "batch_size": 2, "seed": 3, "top_p": 0.5}
    numpy = {"features": np.bool_(False), "prepend_bos": np.bool_(True), "top_p": np.float32(0.5)}
    numpy |= {"batch_size": np.int64(2), "seed": np.uint8(3)}
    if layout == "traces":
        plain["attention_keepbits"], numpy["attention_keepbits"] = 5, np.int64(5)
    zt.extract(tmp_path / "run", PROMPTS, **options, **numpy)
    zt.extract(tmp_path / "run", PROMPTS, **options, **plain)  # resumes it
    zt.extract(tmp_path / "plain", PROMPTS, **options, **plain)
    assert fakes.files_in(tmp_path / "run") == fakes.files_in(tmp_path / "plain")


def test_a_model_in_float64_is_refused(models: Models, tmp_path: Path) -> None:
    model, tokenizer = load(models.path("Llama"))
    given = {"model": model.double(), "tokenizer": tokenizer, "features": False}
    said = fails(tmp_path, ModelError, "x", **given)
    assert "its weights are torch.float64" in said
    assert "model.float()" in said
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wide = {"model": tmp_path / "model", "features": False}
    assert "--dtype float32" in fails(tmp_path, ModelError, "x", **wide)
    narrow = zt.extract(tmp_path / "run", "x", **wide, dtype="float32")
    assert narrow.equals(zt.extract(tmp_path / "own", "x", **{**given, "model": model.float()}))


def test_models_that_are_none(models: Models, tmp_path: Path) -> None:
    path = models.path("Llama")
    _, tokenizer = load(path)
    options = {"tokenizer": tokenizer, "features": False}
    said = fails(tmp_path, ModelError, "x", model=torch.nn.Linear(2, 2), **options)
    assert "no model of transformers" in said
    assert "write_trace" in said
    said = fails(tmp_path, ModelError, "x", model=AutoModel.from_pretrained(path), **options)
    assert "does not say a next token" in said
    compiled = torch.compile(load(path)[0], backend="eager")
    assert "is compiled" in fails(tmp_path, ModelError, "x", model=compiled, **options)
    spread = load(path)[0]
    spread.model.layers[1].to("meta")
    said = fails(tmp_path, ModelError, "x", model=spread, **options)
    assert "its weights are on cpu, meta" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {2: make_sae(1)}, "reads blocks.1.hook_resid_post, not layer 2"),
        (lambda: {"1": make_sae(1)}, "no index of a layer"),
        (lambda: [make_sae(1), make_sae(1)], "2 SAEs for layer 1"),
        (dict, "holds no SAE"),
        (lambda: torch.nn.Linear(2, 2), "no SAE of sae-lens"),
        (lambda: make_sae(9), "saes: none for layer 0-3"),
        (lambda: make_sae(1, hook="hook_q"), "cannot be read"),
        (lambda: make_sae(1, normalize_activations="expected_average_only_in"), "is not folded"),
        (lambda: make_sae(1).half().to(dtype=None), "its weights are"),
        (
            lambda: SAE.from_dict(StandardSAEConfig(d_in=WIDTH, d_sae=8).to_dict()),
            "does not say which hook point",
        ),
        (
            lambda: StandardTrainingSAE(StandardTrainingSAEConfig(d_in=WIDTH, d_sae=8)),
            "an SAE in training",
        ),
    ],
)
def test_saes_that_cannot_be_used(
    models: Models, tmp_path: Path, make: Callable[[], Any], said: str
) -> None:
    model, tokenizer = load(models.path("Llama"))
    found = fails(tmp_path, SAEError, "x", model=model, tokenizer=tokenizer, saes=make())
    assert said in found


def test_a_temporal_sae_is_refused_by_name(models: Models, tmp_path: Path) -> None:
    model, tokenizer = load(models.path("Llama"))
    config = TemporalSAEConfig(d_in=WIDTH, d_sae=64, n_heads=1, bottleneck_factor=1)
    config.metadata.hook_name = "blocks.1.hook_resid_post"
    sae = SAE.from_dict(config.to_dict())
    said = fails(tmp_path, SAEError, "x", model=model, tokenizer=tokenizer, saes=sae)
    assert "A temporal SAE's features" in said


def test_saes_disagree_on_bos(models: Models, tmp_path: Path) -> None:
    model, tokenizer = load(models.path("Llama"))
    saes = [make_sae(1), make_sae(2)]
    for sae, value in zip(saes, (True, False), strict=True):
        sae.cfg.metadata.prepend_bos = value
    said = fails(tmp_path, SAEError, "x", model=model, tokenizer=tokenizer, saes=saes)
    assert "was trained with a BOS token" in said
    without = zt.extract(tmp_path / "run", "x", model=model, tokenizer=tokenizer, saes=saes[1])
    assert not without["scenario_0"].special.any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int4"}, "--dtype int4"),
        ({"attention_capture": "half"}, "--attention-capture half"),
        ({"positions": 1.5}, "positions 1.5"),
        ({"attention_positions": [True]}, "attention_positions [True]"),
        ({"layers": "all"}, "layers: 'all' is not a list"),
        ({"overwrite": True, "repair": True}, "overwrite and repair"),
        ({"workers": 2, "scheduler": "tcp://x"}, "workers and scheduler"),
        ({"attention": False}, "leave nothing to extract"),
    ],
)
def test_options_that_contradict(
    models: Models, tmp_path: Path, options: Mapping[str, Any], said: str
) -> None:
    asked: dict[str, Any] = {"model": models.path("Llama"), "features": False, **options}
    assert said in fails(tmp_path, ConfigError, PROMPTS, **asked)


def test_loaded_objects_do_not_go_to_a_cluster(models: Models, tmp_path: Path) -> None:
    model, tokenizer = load(models.path("Llama"))
    said = fails(
        tmp_path, ConfigError, "x", model=model, tokenizer=tokenizer, features=False, workers=2
    )
    assert "workers with a model, a tokenizer or SAEs in memory" in said


def test_a_scenario_that_is_not_there(models: Models, tmp_path: Path) -> None:
    said = fails(
        tmp_path, ScenarioError, "slot-machine", model=models.path("Llama"),
        features=False, scenario="Risky_41",
    )  # fmt: skip
    assert "'Risky_41'" in said
