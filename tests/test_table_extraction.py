"""``layout="table"``: against traces, transformers and sae-lens; failures, resume and refusals."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shutil
import signal
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import fakes
import numpy as np
import processes
import pytest
import rounding
import torch
import xarray as xr
from architectures import Models
from chat_templates import CHATML, chat_tokenizer
from click.testing import CliRunner
from everyday import mostly_long
from s3_servers import Server
from sae_lens import SAE
from test_extract_call import make_sae
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import zarrtrace as zt
from zarrtrace import demo
from zarrtrace.cli import group
from zarrtrace.errors import (
    ConfigError,
    ConfigMismatchError,
    ModelError,
    NotATraceError,
    ScenarioError,
    ZarrtraceError,
)
from zarrtrace.extraction import call, gathering, table
from zarrtrace.store import verify

pytestmark = pytest.mark.torch

LAYERS = (3, 20)
NAMES = ("Desperate_10", "Safe_130_one_win", "Risky_40")
SMALL: dict[str, Any] = {"layers": LAYERS, "residual": True, "attention": False, "quiet": True}
VALUES = ("features", "residual", "next_token", "next_token_logprob", "next_token_text")


def extract(path: Path, scenarios: Any = None, **options: Any) -> xr.Dataset:
    """Extract to a table."""
    return zt.extract(path, scenarios, layout="table", **{**SMALL, **options})


def equal(found: xr.DataArray, expected: xr.DataArray) -> bool:
    """Whether two arrays are equal bit for bit, in dimensions and values."""
    nan, kinds = found.dtype.kind == "f", [{"f"}, {"i"}, {"u"}, {"b"}, {"O"}, {"O", "T"}]
    return (
        found.dims == expected.dims
        and {found.dtype.kind, expected.dtype.kind} in kinds
        and np.array_equal(found.values, expected.values, equal_nan=nan)
    )


def assert_same(stored: xr.Dataset, computed: xr.Dataset) -> None:
    """Compare a table on disk with that of traces: arrays, coordinates and attributes of both."""
    own = {name for name in stored.variables if str(name).startswith("sae_")}
    assert set(stored.variables) - (own - set(computed.variables)) == set(computed.variables)
    assert set(stored.data_vars) == set(computed.data_vars)
    for name in computed.variables:
        assert equal(stored[name], computed[name]), name
    own = {"positions", "config", "seal", "zarr_conventions"}
    assert set(computed.attrs) - own <= set(stored.attrs)
    for name in set(computed.attrs) - own:
        assert stored.attrs[name] == computed.attrs[name], name


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "batch_size"),
    mostly_long(
        lambda positions, size: (positions, size) == ("spans", 3),
        ["last", "spans", "all", "goal,balance", (0, -1)],
        [1, 3],
    ),
)
def test_a_table_equals_that_of_traces(tmp_path: Path, positions: Any, batch_size: int) -> None:
    """Bit for bit: one prompt alone, or the same prompts in each batch."""
    asked = {**SMALL, "scenario": NAMES, "positions": positions, "batch_size": batch_size}
    extract(tmp_path / "table", **asked)
    traces = zt.extract(tmp_path / "traces", **asked)
    expected = zt.table(traces, at="all")
    for stored in (xr.open_zarr(tmp_path / "table"), zt.open_table(tmp_path / "table")):
        assert_same(stored, expected)
    assert verify(tmp_path / "table") == []
    assert stored.attrs["positions"] == {(0, -1): "0,-1"}.get(positions, positions)
    counts = stored["scenario"].to_series().value_counts()
    assert counts.to_dict() == {name: node.sizes["query"] for name, node in traces.children.items()}


def test_groups_are_as_good_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"scenario": NAMES, "positions": "all", "batch_size": 1}
    whole = extract(tmp_path / "whole", **asked)
    monkeypatch.setattr(table, "_SAMPLES", 64)
    seen = []
    real = table._computed

    def counted(job: Any, chosen: Any, *given: Any, **options: Any) -> Any:
        seen.append(len(chosen))
        return real(job, chosen, *given, **options)

    monkeypatch.setattr(table, "_computed", counted)
    cut = extract(tmp_path / "cut", **asked)
    assert seen == [1, 1, 1]
    assert cut.identical(whole)
    assert fakes.files_in(tmp_path / "cut") == fakes.files_in(tmp_path / "whole")


@pytest.fixture(scope="module")
def chat_model() -> tuple[Any, Any]:
    tokenizer = chat_tokenizer(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


SUITE = [
    zt.Scenario(
        messages=[{"role": "user", "content": "You hold [[balance:$90]]. Bet?"}],
        name="chat",
        tags=["risky", "chat"],
        metadata={"game": "g1", "loss": 0.5, "round": 3, "is_last": True},
    ),
    zt.Scenario(
        "You hold [[balance:$10]] of [[goal:$200]]. 1) Bet 2) Stop:",
        name="plain",
        options={"bet": "1", "stop": "2"},
        metadata={"game": "g2", "loss": 2, "round": 4, "is_last": False},
    ),
    zt.Scenario(
        messages=[
            {"role": "user", "content": "Bet or stop?"},
            {"role": "assistant", "content": "I bet [[goal:on]]"},
        ],
        name="continued",
        options={"stop": "2"},
        generation_prompt=False,
        metadata={"game": "", "loss": -1.25, "round": -5, "is_last": False},
    ),
]


@pytest.mark.long
@pytest.mark.parametrize("positions", ["all", "balance,decision"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chats_metadata_tags_and_options(
    tmp_path: Path, chat_model: tuple[Any, Any], positions: str, generation_prompt: bool
) -> None:
    model, tokenizer = chat_model
    asked: dict[str, Any] = {
        "model": model, "tokenizer": tokenizer, "saes": {1: make_sae(1)}, "layers": (0, 1),
        "batch_size": 1, "positions": positions, "generation_prompt": generation_prompt,
    }  # fmt: skip
    stored = extract(tmp_path / "table", SUITE, **asked)
    expected = zt.table(zt.extract(tmp_path / "traces", SUITE, **{**SMALL, **asked}), at="all")
    assert_same(stored, expected)
    assert stored.attrs["chat_template"] == expected.attrs["chat_template"]
    assert np.isnan(stored.features.sel(layer=0)).all()
    first = {name: stored[name].groupby("scenario").first() for name in ("option_bet", "loss")}
    assert first["loss"].sel(scenario=["chat", "plain", "continued"]).values.tolist() == [
        0.5, 2.0, -1.25,
    ]  # fmt: skip
    (bet,) = tokenizer("1", add_special_tokens=False)["input_ids"][-1:]
    assert first["option_bet"].sel(scenario=["chat", "plain"]).values.tolist() == [-1, bet]
    assert stored["is_last"].dtype == bool
    assert stored["tags"].values[0] == "risky,chat"


@pytest.mark.parametrize(
    "name", mostly_long(lambda name: name in ("Llama", "GPT-2"), architectures.EVERY_DAY)
)
def test_residual_is_transformers_own_and_saes_encode_it(
    models: Models, tmp_path: Path, name: str
) -> None:
    """Prompts of one length are a batch without padding, which transformers computes by itself."""
    path = models.path(name)
    saes = {layer: make_sae(layer, 96) for layer in (1, 3)}
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [f"You now hold ${number}0. Bet or stop?" for number in range(1, 8)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    same = [n for n, one in enumerate(ids) if len(one) == len(ids[0])]
    assert len(same) > 3
    found = extract(
        tmp_path / "run", [texts[n] for n in same], model=path, saes=saes, layers=(1, 3),
        positions="all",
    )  # fmt: skip
    batch = torch.tensor([ids[n] for n in same])
    assert found["token_id"].values.reshape(batch.shape).tolist() == batch.tolist()
    model = architectures.load_eager_once(path)
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer, block in enumerate(architectures.blocks_of(name, model)):
            stack.callback(block.register_forward_hook(keep(layer)).remove)
        mask = torch.ones_like(batch)
        logits = model(batch, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
    for layer, sae in saes.items():
        stored = found.residual.sel(layer=layer).values
        np.testing.assert_array_equal(stored, outputs[layer].flatten(0, 1).numpy())
        with torch.no_grad():
            encoded = sae.encode(torch.from_numpy(stored)).numpy()
        np.testing.assert_array_equal(found.features.sel(layer=layer), encoded)
        assert encoded.any()
    expected = logits.log_softmax(-1).topk(10)
    np.testing.assert_array_equal(found.next_token_logprob, expected.values.numpy())
    np.testing.assert_array_equal(found.next_token, expected.indices.numpy())


@pytest.mark.long
def test_saes_encode_what_is_stored_of_a_padded_batch(tmp_path: Path) -> None:
    found = extract(tmp_path / "run")
    assert found.attrs["config"]["batch_size"] > 9
    for layer in LAYERS:
        sae = SAE.load_from_disk(demo.sae_path() / f"blocks.{layer}.hook_resid_post")
        with torch.no_grad():
            encoded = sae.encode(torch.from_numpy(found.residual.sel(layer=layer).values))
        np.testing.assert_array_equal(found.features.sel(layer=layer), encoded)


def test_several_saes_of_a_layer(models: Models, tmp_path: Path) -> None:
    saes = [make_sae(1), make_sae(1, hook="hook_mlp_out"), make_sae(2)]
    asked: dict[str, Any] = {
        "model": models.path("Llama"), "saes": saes, "layers": "0-3", "batch_size": 1,
    }  # fmt: skip
    prompts = ["You hold $90.", "Bet or stop?"]
    stored = extract(tmp_path / "table", prompts, **asked)
    assert_same(
        stored, zt.table(zt.extract(tmp_path / "run", prompts, **{**SMALL, **asked}), at="all")
    )
    assert np.isnan(stored.features_mlp_out.sel(layer=2)).all()
    assert stored.features_mlp_out.sel(layer=1).notnull().all()


# --- scenarios that cannot be computed ----------------------------------------------------------

PROMPTS = [f"You hold ${number}0 of $200. Bet?" for number in range(1, 9)]
#: Its last token is in no other prompt.
BROKEN = "You hold $90 of $200. Choose now:"


@pytest.fixture
def loaded() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(demo.model_path())
    return model, AutoTokenizer.from_pretrained(demo.model_path())


def given(loaded: tuple[Any, Any], **options: Any) -> dict[str, Any]:
    model, tokenizer = loaded
    return {"model": model, "tokenizer": tokenizer, "saes": demo.sae_path(), **options}


@contextlib.contextmanager
def failing(loaded: tuple[Any, Any], how: str) -> Iterator[None]:
    """Have prompts fail that hold the marker, in one of several ways."""
    model, tokenizer = loaded
    token = tokenizer(BROKEN)["input_ids"][-1]
    assert not any(token in tokenizer(text)["input_ids"] for text in PROMPTS)

    def hook(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        at = args[0] == token
        if not at.any():
            return output
        if how == "raises":
            raise RuntimeError("no such token")
        output = output.clone()
        output[at] = {"nan": torch.nan, "inf": torch.inf, "large": 1e6}[how]
        return output

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "positions"),
    mostly_long(
        lambda how, positions: (how, positions) in (("raises", "last"), ("nan", "all")),
        ["raises", "nan", "inf", "large"],
        ["last", "all"],
    ),
)
def test_a_scenario_that_fails_is_nan_and_named(
    tmp_path: Path, loaded: tuple[Any, Any], how: str, positions: str
) -> None:
    scenarios = [*PROMPTS[:5], BROKEN, *PROMPTS[5:]]
    asked = given(loaded, positions=positions, residual_dtype="float16")
    sound = extract(tmp_path / "sound", scenarios, **asked)
    assert sound.attrs["failed"] == {}
    with failing(loaded, how):
        found = extract(tmp_path / "run", scenarios, **asked)
        assert verify(tmp_path / "run") == []
        again = extract(tmp_path / "run", scenarios, **asked)  # nothing is left to compute
    assert again.attrs["seal"] == found.attrs["seal"]
    assert list(found.attrs["failed"]) == ["scenario_5"]
    reason = found.attrs["failed"]["scenario_5"]
    assert ("no such token" if how == "raises" else "NaN") in reason
    failed = found["scenario"].values == "scenario_5"
    assert failed.sum() == (1 if positions == "last" else len(loaded[1](BROKEN)["input_ids"]))
    for name in ("features", "residual", "next_token_logprob"):
        at = found[name].dims.index("sample")
        values = np.moveaxis(found[name].values, at, 0)
        assert np.isnan(values[failed]).all()
        rest = np.moveaxis(sound[name].values, at, 0)[~failed]
        if how == "raises":  # they were computed again, each alone
            scale = float(np.abs(sound.residual.astype("float32")).max())
            error = rounding.rounding("float32", 64 * 31, scale) + rounding.rounding(
                "float16", 2, scale
            )
            rounding.assert_close(values[~failed], rest, error)
        else:
            np.testing.assert_array_equal(values[~failed], rest)
    assert (found.next_token.values[failed] == 2**32 - 1).all()
    assert (found.next_token_text.values[failed] == "").all()
    for label in set(sound.coords) - {"next_token_text"}:
        assert equal(found[label], sound[label])


def test_a_group_that_fails_whole_raises(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    for name, scenarios in (("one", [BROKEN]), ("two", [BROKEN, BROKEN])):
        with failing(loaded, "raises"), pytest.raises(ModelError, match="no such token"):
            extract(tmp_path / name, scenarios, **given(loaded))
        assert not (tmp_path / name).exists()


# --- the command --------------------------------------------------------------------------------


def suite_file(path: Path, prompts: list[str]) -> Path:
    """Write prompts as JSONL."""
    lines = [json.dumps({"name": f"s{n}", "prompt": text}) for n, text in enumerate(prompts)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return suite_file(tmp_path / "suite.jsonl", PROMPTS[:3])


def command(output: Any, suite: Path, *options: object) -> Any:
    """Run ``zarrtrace extract`` in this process."""
    words = ["extract", "--model", "demo", "--scenarios", suite, "--layers", "3", "-o", output]
    return CliRunner().invoke(group, [*map(str, words), *map(str, options)])


TABLE = ("--layout", "table", "--positions", "last")


def test_the_command_says_what_it_has_written(tmp_path: Path, suite: Path) -> None:
    done = command(tmp_path / "run", suite, *TABLE)
    assert done.exit_code == 0, done.exception
    assert re.search(r"^samples +3 of 3 scenarios$", done.stdout, re.M)
    assert done.stderr.count("a table holds no attention (--no-attention)") == 1
    assert "zarrtrace.open_table(" in done.stderr
    found = zt.open_table(tmp_path / "run")
    assert found["scenario"].values.tolist() == ["s0", "s1", "s2"]
    as_json = command(tmp_path / "run", suite, *TABLE, "--no-attention", "--json")
    assert json.loads(as_json.stdout)["samples"] == 3
    assert "holds no attention" not in as_json.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", 2], "--workers with --layout table"),
        (["--scheduler", "tcp://x"], "--scheduler with --layout table"),
        (["--scheduler-file", "x"], "--scheduler-file with --layout table"),
        (["--attention-dtype", "float16"], "--attention-dtype with --layout table"),
        (["--attention-keepbits", 3], "--attention-keepbits with --layout table"),
        (["--attention-positions", "last"], "--attention-positions with --layout table"),
        (["--allow-nonfinite"], "--allow-nonfinite with --layout table"),
        (["--no-features"], "leave nothing to extract"),
        (["--positions", "balance"], "no scenario has a span 'balance'"),
        (["--positions", "5000"], "--positions 5000"),
    ],
)
def test_options_that_a_table_does_not_have(
    tmp_path: Path, suite: Path, options: list[Any], said: str
) -> None:
    """Each line fits into 80 columns, behind what the command line puts before it."""
    done = command(tmp_path / "run", suite, *TABLE, *options)
    assert isinstance(done.exception, ZarrtraceError)
    assert said in str(done.exception)
    lines = f"zarrtrace: error: {done.exception}".replace(str(tmp_path), "runs").splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert not (tmp_path / "run").exists()


def test_python_refuses_the_same(tmp_path: Path) -> None:
    for options in ({"workers": 2}, {"allow_nonfinite": True}, {"attention_dtype": "float16"}):
        with pytest.raises(ConfigError, match="with --layout table"):
            extract(tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="layout 'tables'"):
        zt.extract(tmp_path / "run", layout="tables", quiet=True)  # type: ignore[call-overload]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_be_stored(tmp_path: Path, suite: Path) -> None:
    asked = (*TABLE, "--residual", "--dry-run")
    done = command(tmp_path / "run", suite, *asked)
    assert "Would extract 3 samples of 3 scenarios × 1 layers (3)" in done.stdout
    plan = json.loads(command(tmp_path / "run", suite, *asked, "--json").stdout)
    assert not (tmp_path / "run").exists()
    assert command(tmp_path / "run", suite, *asked[:-1], "-q").exit_code == 0
    found = zt.open_table(tmp_path / "run")
    numeric = (v for v in found.variables.values() if v.dtype.kind in "fui")
    assert plan["dense_bytes"] >= sum(variable.nbytes for variable in numeric)
    config = found.attrs["config"]
    later = ("model_fingerprint", "device")
    assert {k: v for k, v in plan["config"].items() if k not in later} == {
        k: v for k, v in config.items() if k not in later
    }


def test_differences_are_named_and_nothing_is_changed(tmp_path: Path, suite: Path) -> None:
    run = tmp_path / "run"
    assert command(run, suite, *TABLE, "-q").exit_code == 0
    before = fakes.files_in(run)
    other = suite_file(tmp_path / "other.jsonl", ["You hold $70 of $200. Bet?", *PROMPTS[1:3]])
    for file, options, said in (
        (other, (*TABLE, "--residual"), "\n  prompts changed\n  residual: False there, True now"),
        (suite, ("--layout", "table"), "positions: 'last' there, 'all' now"),
    ):
        done = command(run, file, *options, "-q")
        assert isinstance(done.exception, ConfigMismatchError)
        assert said in str(done.exception)
        assert fakes.files_in(run) == before
    assert command(run, other, *TABLE, "-q", "--overwrite").exit_code == 0
    assert fakes.files_in(run) != before


@pytest.mark.long
def test_other_weights_do_not_resume(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    extract(tmp_path / "run", PROMPTS[:2], **given(loaded))
    with torch.no_grad():
        loaded[0].get_output_embeddings().weight *= 1.001
    with pytest.raises(ConfigMismatchError, match="weights of the model"):
        extract(tmp_path / "run", PROMPTS[:2], **given(loaded))


@pytest.mark.long
def test_traces_and_tables_replace_each_other_only_if_asked(tmp_path: Path, suite: Path) -> None:
    run = tmp_path / "run"
    traces = ("--positions", "last", "--no-attention", "-q")
    for first, then, said in (
        (TABLE, traces, "is a table, not a run"),
        (traces, TABLE, "is a run, not a table"),
    ):
        assert command(run, suite, *first, "-q").exit_code == 0
        before = fakes.files_in(run)
        done = command(run, suite, *then)
        assert isinstance(done.exception, NotATraceError)
        assert said in str(done.exception)
        assert "loading torch" not in done.stderr
        assert "--overwrite" in str(done.exception)
        assert fakes.files_in(run) == before
        assert command(run, suite, *then, "--overwrite", "-q").exit_code == 0
        assert verify(run) == []
        expected = tmp_path / f"expected {said}"
        assert command(expected, suite, *then, "-q").exit_code == 0
        assert fakes.files_in(run) == fakes.files_in(expected)
        shutil.rmtree(run)


def test_failed_scenarios_are_said_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = suite_file(tmp_path / "suite.jsonl", [*PROMPTS[:2], BROKEN])
    real = gathering._is_sound

    def unsound(record: Any, part: Any, *dtypes: str) -> Any:
        sound = real(record, part, *dtypes)
        sound[part.rows == 2] = False
        return sound

    with monkeypatch.context() as patch:
        patch.setattr(gathering, "_is_sound", unsound)
        done = command(tmp_path / "run", file, *TABLE)
    for again in (done, command(tmp_path / "run", file, *TABLE, "-q")):
        assert again.exit_code == 3
        assert re.search(r"^zarrtrace: s2: not computed, .* NaN: layer 3", again.stderr, re.M)
        assert "zarrtrace: 1 scenario was not computed\n" in again.stderr


@pytest.mark.long
def test_repair_computes_damaged_blocks_again(tmp_path: Path, suite: Path) -> None:
    run = tmp_path / "run"
    assert command(run, suite, *TABLE, "-q").exit_code == 0
    before = fakes.files_in(run)
    (file,) = (one for one in (run / "features").iterdir() if one.name.startswith("c."))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert verify(run)
    assert command(run, suite, *TABLE, "-q", "--repair").exit_code == 0
    assert fakes.files_in(run) == before


@pytest.mark.long
def test_in_an_object_store(s3: Server, tmp_path: Path, suite: Path) -> None:
    run = s3.folder() / "run"
    options = (*TABLE, "--residual", "-q")
    where = ("--storage-option", f"endpoint={s3.proxy.address}")
    done = command(run, suite, *options, *where)
    assert done.exit_code == 0, done.exception
    assert command(tmp_path / "run", suite, *options).exit_code == 0
    expected = fakes.files_in(tmp_path / "run")
    assert {name: (run / name).read() for name in expected} == expected
    assert zt.open_table(run).features.equals(zt.open_table(tmp_path / "run").features)


# --- streams ------------------------------------------------------------------------------------


def test_a_file_that_changes_between_the_passes_is_refused(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = vars(table)["survey"]

    def change_before(*given: Any) -> Any:  # names and types were looked at
        suite_file(suite, [PROMPTS[0], PROMPTS[5], PROMPTS[2]])
        return real(*given)

    monkeypatch.setattr(table, "survey", change_before)
    done = command(tmp_path / "run", suite, *TABLE, "-q")
    assert isinstance(done.exception, ScenarioError)
    assert "changed since they were first read" in str(done.exception)
    assert not (tmp_path / "run").exists()


#: Has a process write blocks of 64 samples, of groups of 64.
SMALL_BLOCKS = """
import contextlib, dataclasses
from zarrtrace.capture import CaptureLimits
from zarrtrace.extraction import table
from zarrtrace.format.layout import Limits

surveyed = table.surveyed

@contextlib.contextmanager
def small(*given, **options):
    with surveyed(*given, **options) as found:
        limits = CaptureLimits(layout=Limits(samples=64))
        model = dataclasses.replace(found.job.model, limits=limits)
        yield dataclasses.replace(found, job=dataclasses.replace(found.job, model=model))

table.surveyed = small
table._SAMPLES = 64
"""

MEMORY = """
import sys, tracemalloc
import zarrtrace as zt
from zarrtrace.extraction import table

file, folder = sys.argv[1:]
how = dict(model="demo", layers=[3, 20], residual=True, positions="last", quiet=True)
how["layout"] = "table"
zt.extract(folder + "/warm", ["You hold $90. Bet?"], **how)
held = []
real = table._computed
def computed(*given, **options):
    found = real(*given, **options)
    held.append(tracemalloc.get_traced_memory()[0])
    return found
table._computed = computed
tracemalloc.start()
zt.extract(folder + "/run", file, batch_size=32, **how)
print(len(held), max(held[2:6]), max(held[-4:]))
"""


@pytest.mark.long
def test_memory_does_not_grow_with_prompts(tmp_path: Path) -> None:
    """2,000 prompts in groups of 64: what Python and NumPy hold at the end and near the start."""
    prompts = [f"You hold ${n} of $200, after {n % 7} rounds. Bet or stop?" for n in range(2000)]
    file = suite_file(tmp_path / "suite.jsonl", prompts)
    done = processes.python(SMALL_BLOCKS + MEMORY, file, tmp_path)
    assert done.returncode == 0, done.stderr
    groups, early, late = map(int, done.stdout.split())
    assert groups == 32
    assert late < 1.1 * early


# --- kill -9 ------------------------------------------------------------------------------------

KILLED = (
    processes.COUNTED
    + """
import zarrtrace as zt
from zarrtrace.extraction import table
from zarrtrace.storage import disk
from zarrtrace.store import table_writer, publish, staged_table

counted(table, "_computed")
counted(disk, "append")
counted(disk, "sync")
counted(disk, "sync_path")
counted(disk, "remove_folder")
counted(table_writer, "publish_folder")
for name in ("create", "end_block", "complete"):
    counted(staged_table.StagedTable, name)
counted(os, "rename")
counted(os, "replace")
prompts = [f"You hold ${n} of $200, after {n % 7} rounds. Bet or stop?" for n in range(160)]
zt.extract(folder, prompts, model="demo", layers=[3, 20], residual=True, layout="table",
           positions="last", quiet=True, batch_size=16)
print(steps)
"""
)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_kill_9_at_20_moments(tmp_path: Path) -> None:
    """Between all that it does with files, while it publishes, too."""
    done = processes.python(SMALL_BLOCKS + KILLED, tmp_path / "expected", 0)
    assert done.returncode == 0, done.stderr
    steps, expected = int(done.stdout), fakes.files_in(tmp_path / "expected")
    assert zt.open_table(tmp_path / "expected").attrs["config"]["batch_size"] == 16
    assert steps > 30
    moments = sorted({*np.linspace(2, steps, 12).astype(int).tolist(), *range(steps - 9, steps)})
    assert len(moments) >= 20
    run, seen = tmp_path / "run", set()
    for at in moments:
        done = processes.python(SMALL_BLOCKS + KILLED, run, at)
        if done.returncode == -signal.SIGKILL:
            seen.add(run.exists())
            if run.exists():  # whole, or not there; the journal is removed last
                assert {problem.array for problem in verify(run)} <= {"journal"}
            done = processes.python(SMALL_BLOCKS + KILLED, run, 0)
        assert done.returncode == 0, f"step {at}: {done.stderr}"
        assert fakes.files_in(run) == expected, f"step {at}"
        assert {file.name for file in tmp_path.iterdir()} == {"expected", "run"}, f"step {at}"
        shutil.rmtree(run)
    assert False in seen


# --- types --------------------------------------------------------------------------------------


def test_type_checkers_know_every_option() -> None:
    parameters = set(inspect.signature(zt.extract).parameters)
    assert set(call.ExtractOptions.__annotations__) == parameters - {
        "output", "scenarios", "layout",
    }  # fmt: skip
    for overload in typing.get_overloads(call.extract):
        assert set(inspect.signature(overload).parameters) == {
            "output", "scenarios", "layout", "options",
        }  # fmt: skip
