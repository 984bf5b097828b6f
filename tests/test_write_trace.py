"""``zt.write_trace``: arrays that something else captured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import tensorstore
import xarray as xr

import zarrtrace as zt
from zarrtrace.errors import (
    ConfigError,
    ConfigMismatchError,
    LockedError,
    NonFiniteError,
    NotATraceError,
    ScenarioError,
    ZarrtraceError,
)
from zarrtrace.format.attributes import MOST_LAYERS
from zarrtrace.store import verify
from zarrtrace.store import write as module
from zarrtrace.store.trace_writer import TraceWriter

TEXTS = ["<s>", "You", " hold", " $", "90"]
TOKENS = (range(5), TEXTS)
SCENARIO = zt.Scenario(
    "You hold [[balance:$90]]", name="poor", tags=["risky"], metadata={"balance": 90.0}
)
FEATURES = 5000  # two blocks of columns


def attention(seed: int = 0, heads: int = 2, rows: int = 5, keys: int = 5) -> np.ndarray:
    weights = np.random.default_rng(seed).random((heads, rows, keys), dtype=np.float32)
    weights = np.tril(weights, keys - rows)
    return weights / weights.sum(-1, keepdims=True)


def features(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(5, FEATURES)).astype(np.float32)
    values[np.abs(values) < 1.5] = 0
    values[3] = 0
    return values


def residual(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(5, 24)) * [1000, *[1] * 23]
    return values.astype(np.float32)


def write(run: Path, scenario: Any = SCENARIO, **changes: Any) -> None:
    given: dict[str, Any] = {"tokens": TOKENS, "attention": {0: attention(), 2: attention(1)}}
    zt.write_trace(run, scenario, **{**given, **changes})


def test_everything_comes_back(tmp_path: Path) -> None:
    write(
        tmp_path / "run",
        features={0: features(), 2: scipy.sparse.coo_array(features(1))},
        special=[True, *[False] * 4],
        model="lens",
    )
    assert verify(tmp_path / "run") == []
    run = zt.open_run(tmp_path / "run")
    assert run.attrs["config"]["model"] == "lens"
    ds = run["poor"].to_dataset()
    for layer, seed in ((0, 0), (2, 1)):
        here = ds.sel(layer=layer)
        assert np.array_equal(here.attention, attention(seed))
        assert np.array_equal(here.attention_mean, attention(seed).mean(0, dtype=np.float32))
        assert np.array_equal(here.features, features(seed))
        order = np.argsort(-np.abs(features(seed)), axis=1, kind="stable")[:, :32]
        top = np.take_along_axis(features(seed), order, 1)
        assert np.array_equal(here.top_activation, top)
        assert np.array_equal(here.top_feature, np.where(top != 0, order, 2**32 - 1))
    assert ds.token_id.values.tolist() == [0, 1, 2, 3, 4]
    assert ds.key_token.values.tolist() == TEXTS
    assert ds.special.values.tolist() == [True, *[False] * 4]
    assert (zt.span(ds, "balance"), zt.span(ds, "decision")) == ([3, 4], [4])
    assert ds.attrs["prompt"] == "You hold $90"
    assert list(ds.attrs["tags"]) == ["risky"]
    assert ds.attrs["metadata"] == {"balance": 90.0}
    plain = xr.open_datatree(tmp_path / "run", engine="zarr", chunks=None)
    assert np.array_equal(plain["poor"].attention, ds.attention)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_precisions_are_kept(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    weights = torch.tensor(attention(), requires_grad=True).to(getattr(torch, dtype))
    values = torch.tensor(features()).to(getattr(torch, dtype))
    stream = torch.tensor(residual(), requires_grad=True).to(getattr(torch, dtype))
    transposed = weights.transpose(1, 2).contiguous().transpose(1, 2)
    write(
        tmp_path / "run",
        attention={1: transposed},
        features={1: values.to_sparse()},
        residual={1: stream},
    )
    ds = zt.open_run(tmp_path / "run")["poor"].to_dataset()
    expected = "float16" if dtype == "float16" else "float32"
    assert ds.attention.dtype == ds.features.dtype == ds.residual.dtype == expected
    assert np.array_equal(ds.attention[0], weights.detach().float().numpy())
    assert np.array_equal(ds.features[0], values.float().numpy())
    assert np.array_equal(ds.residual[0], stream.detach().float().numpy())


def test_mixed_precisions_are_stored_in_the_wider_one(tmp_path: Path) -> None:
    half = attention().astype(np.float16)
    write(tmp_path / "run", attention={0: half, 1: attention(1)})
    found = zt.open_run(tmp_path / "run")["poor"].attention
    assert found.dtype == np.float32
    assert np.array_equal(found[0], half.astype(np.float32))
    assert np.array_equal(found[1], attention(1))


def test_layers_that_have_only_one_of_both(tmp_path: Path) -> None:
    write(tmp_path / "run", attention={0: attention(), 2: attention(1)}, features={1: features()})
    ds = zt.open_run(tmp_path / "run")["poor"].to_dataset()
    assert ds.layer.values.tolist() == [0, 1, 2]
    assert ds.attention_layer.values.tolist() == [0, 2]
    assert ds.features.isnull().all(["query", "feature"]).values.tolist() == [True, False, True]


def test_the_residual_stream_of_some_layers(tmp_path: Path) -> None:
    """Other readers find it, and NaN where none was given."""
    write(tmp_path / "run", residual={2: residual(), 3: residual(1)})
    assert verify(tmp_path / "run") == []
    opened = zt.open_run(tmp_path / "run")["poor"].to_dataset()
    plain = xr.open_zarr(tmp_path / "run" / "poor")
    store = {"driver": "file", "path": f"{tmp_path}/run/poor/residual/"}
    other = tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()
    missing = np.full((5, 24), np.nan, np.float32)
    expected = np.stack([missing, residual(), residual(1)])
    for ds in (opened, plain):
        assert ds.residual.dims == ("layer", "query", "channel")
        assert ds.layer.values.tolist() == [0, 2, 3]
        assert ds.channel.values.tolist() == list(range(24))
        assert ds.residual.dtype == np.float32
        np.testing.assert_array_equal(ds.residual, expected)
    np.testing.assert_array_equal(other.read().result(), expected)
    at = opened.residual.sel(layer=3, query=opened.zt.span("decision"), channel=0)
    assert at.item() == residual(1)[4, 0]
    assert opened.attrs["residual_dtype"] == "float32"
    assert opened.attrs["residual_hook"] is None
    assert opened.attrs["layers_without_residual"] == "0"


def test_the_residual_stream_alone(tmp_path: Path) -> None:
    write(tmp_path / "run", attention=None, residual={0: residual().astype(np.float16)})
    ds = zt.open_run(tmp_path / "run")["poor"].to_dataset()
    assert {*ds.data_vars} == {"residual"}
    assert ds.residual.dtype == np.float16
    np.testing.assert_array_equal(ds.residual[0], residual().astype(np.float16))


def test_some_rows(tmp_path: Path) -> None:
    rows = attention()[:, [1, 4]]
    write(tmp_path / "run", attention={3: rows}, attention_positions=[1, 4])
    found = zt.open_run(tmp_path / "run")["poor"].attention
    assert found.attention_query.values.tolist() == [1, 4]
    assert np.array_equal(found[0], rows)


def test_each_call_leaves_a_complete_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zarrtrace.store.run_writer.MOST_EXTENDED", 3)
    names = [f"n{at}" for at in range(5)]
    for at, name in enumerate(names):
        write(tmp_path / "run", zt.Scenario("x", name=name), attention={0: attention(at)})
        run = zt.open_run(tmp_path / "run")
        assert list(run.children) == names[: at + 1]
        assert verify(tmp_path / "run") == []
        repeated = len(names[: at + 1]) <= 3
        plain = xr.open_datatree(
            tmp_path / "run", engine="zarr", chunks=None, consolidated=repeated
        )
        for seed, one in enumerate(run.children):
            assert np.array_equal(run[one].attention[0], attention(seed))
            assert np.array_equal(plain[one].attention[0], attention(seed))


def test_a_trace_is_replaced_on_demand(tmp_path: Path) -> None:
    write(tmp_path / "run")
    with pytest.raises(ConfigError, match="has scenario 'poor'") as error:
        write(tmp_path / "run", attention={0: attention(5), 2: attention(6)})
    assert "overwrite=True" in str(error.value)
    before = zt.open_run(tmp_path / "run")["poor"].to_dataset()
    write(tmp_path / "run", attention={0: attention(5), 2: attention(6)}, overwrite=True)
    run = zt.open_run(tmp_path / "run")
    assert list(run.children) == ["poor"]
    assert np.array_equal(run["poor"].attention[1], attention(6))
    assert verify(tmp_path / "run") == []
    with pytest.raises(ZarrtraceError):  # never the numbers of the other trace
        before.attention.load()


@pytest.mark.parametrize("moment", ["append", "complete", "publish"])
def test_a_call_that_ends_early_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """And the next one stores its own arrays, not what the first has staged."""
    write(tmp_path / "run", "first")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("ended")

    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, moment, fail)
        with pytest.raises(OSError, match="ended"):
            write(tmp_path / "run", "second", attention={0: attention(7), 2: attention(8)})
    assert list(zt.open_run(tmp_path / "run").children) == ["first"]
    write(tmp_path / "run", "second", attention={0: attention(3), 2: attention(4)})
    assert np.array_equal(zt.open_run(tmp_path / "run")["second"].attention[0], attention(3))
    assert verify(tmp_path / "run") == []


def test_a_trace_that_was_published_and_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("ended")

    write(tmp_path / "run", "first")
    with monkeypatch.context() as patch:
        patch.setattr(module.RunExtension, "add", fail)
        with pytest.raises(OSError, match="ended"):
            write(tmp_path / "run", "second")
    assert list(zt.open_run(tmp_path / "run").children) == ["first"]
    write(tmp_path / "run", "second", attention={0: attention(3), 2: attention(4)})
    assert np.array_equal(zt.open_run(tmp_path / "run")["second"].attention[0], attention(3))
    assert verify(tmp_path / "run") == []


def test_the_memory_of_a_process(tmp_path: Path) -> None:
    """An object store: uploads, metadata last."""
    address: Any = "memory://written/run"
    for name in ("first", "second"):
        write(address, name)
    write(address, "second", attention={0: attention(5), 2: attention(6)}, overwrite=True)
    run = zt.open_run(address)
    assert list(run.children) == ["first", "second"]
    assert np.array_equal(run["second"].attention[0], attention(5))


def test_analyses_take_it(tmp_path: Path) -> None:
    from zarrtrace import analysis

    write(tmp_path / "run")
    write(tmp_path / "run", zt.Scenario("You hold [[balance:$90]]", name="rich",
          metadata={"balance": 180.0}))  # fmt: skip
    found = analysis.attention_to(zt.open_run(tmp_path / "run"), "balance")
    assert np.allclose(found.sel(scenario="poor").values, [
        attention(seed)[:, 4, 3:].mean() for seed in (0, 1)
    ])  # fmt: skip


# --- spans ----------------------------------------------------------------------------------------


def test_spans_by_offsets_and_by_positions(tmp_path: Path) -> None:
    other = (range(5), ["BOS", "You", "hold", "$", "90"])  # white space is lost
    offsets = [(0, 0), (0, 3), (4, 8), (9, 10), (10, 12)]
    write(tmp_path / "a", tokens=other, offsets=offsets)
    write(tmp_path / "b", tokens=other, spans={"balance": [4]})
    write(tmp_path / "c", "poor", tokens=other, spans={"own": [1, 2]})
    spans = [zt.open_run(tmp_path / run)["poor"].attrs["spans"] for run in ("a", "b", "c")]
    assert list(spans[0]["balance"]["tokens"]) == [3, 4]
    assert list(spans[1]["balance"]["tokens"]) == [4]
    assert list(spans[2]["own"]["tokens"]) == [1, 2]
    with pytest.raises(ConfigError, match="no token positions for span 'balance'"):
        write(tmp_path / "d", tokens=other)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "of", ["builtins.list", "numpy.array", pytest.param("torch.tensor", marks=pytest.mark.torch)]
)
def test_positions_and_tokens_of_any_integers(tmp_path: Path, of: str) -> None:
    library, _, function = of.partition(".")
    of_kind = getattr(pytest.importorskip(library), function)
    given = {
        "tokens": (of_kind([7, 8, 9, 10, 11]), np.array(TEXTS)),
        "attention": {0: attention(rows=2, keys=5)},
        "positions": of_kind([3, 4]),
    }
    write(tmp_path / "run", **given, spans={"x": of_kind([4, 1])})
    trace = zt.open_trace(tmp_path / "run" / "poor")
    assert trace.zt.span("x") == [1, 4]
    assert trace["query"].values.tolist() == [3, 4]
    assert trace["token_id"].values.tolist() == [7, 8, 9, 10, 11]
    assert trace.zt.tokens == TEXTS
    with pytest.raises(ConfigError, match="span 'x': not token positions"):
        write(tmp_path / "masked", **given, spans={"x": of_kind([False] * 4 + [True])})


def test_the_last_layer_that_can_be_read_is_written(tmp_path: Path) -> None:
    write(tmp_path / "run", attention={MOST_LAYERS - 1: attention()})
    assert zt.open_trace(tmp_path / "run" / "poor").layer.values.tolist() == [MOST_LAYERS - 1]


def test_a_space_that_sentencepiece_adds(tmp_path: Path) -> None:
    write(tmp_path / "run", tokens=(range(5), ["<s>", " You", " hold", " $9", "0"]))
    spans = zt.open_run(tmp_path / "run")["poor"].attrs["spans"]
    assert list(spans["balance"]["tokens"]) == [3, 4]


# --- what is refused ------------------------------------------------------------------------------


def _with(value: float) -> np.ndarray:
    weights = attention()
    weights[0, 3, 1] = value
    return weights


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"attention": {}}, ConfigError, "no array was given"),
        ({"attention": {"0": attention()}}, ConfigError, "'0' is no layer"),
        ({"attention": {-1: attention()}}, ConfigError, "-1 is no layer"),
        ({"attention": {0: attention()[None]}}, ConfigError, "has shape (1, 2, 5, 5)"),
        ({"attention": {0: attention(keys=6)}}, ConfigError, "has shape (2, 5, 6)"),
        (
            {"attention": {0: attention(), 1: attention(heads=3)}},
            ConfigError,
            "attention of layer 1 has shape (3, 5, 5), not (2, 5, 5)",
        ),
        ({"attention": {0: attention().astype(float)}}, ConfigError, "is float64"),
        ({"attention": {0: np.eye(5, dtype=int)[None]}}, ConfigError, "is int64"),
        ({"attention": {0: _with(1.5)}}, ConfigError, "holds 1.5, which is no probability"),
        ({"attention": {0: _with(-0.5)}}, ConfigError, "holds -0.5, which is no probability"),
        ({"attention": {0: np.ones((2, 5, 5), "f4")}}, ConfigError, "weights sum to 5"),
        ({"attention": {0: np.zeros((2, 5, 5), "f4")}}, ConfigError, "is 0 in every head"),
        ({"attention": {0: _with(np.nan)}}, NonFiniteError, "holds NaN or infinity"),
        (
            {"features": {0: np.full((5, 3), np.inf, "f4")}},
            NonFiniteError,
            "features of layer 0 holds NaN or infinity",
        ),
        (
            {"features": {0: scipy.sparse.csr_array(np.full((5, 3), np.nan, "f4"))}},
            NonFiniteError,
            "features of layer 0 holds NaN or infinity",
        ),
        ({"residual": {0: residual()[:4]}}, ConfigError, "residual of layer 0 has shape (4, 24)"),
        (
            {"residual": {0: residual(), 2: residual()[:, :9]}},
            ConfigError,
            "residual of layer 2 has shape (5, 9), not (5, 24)",
        ),
        (
            {"residual": {0: residual().astype(float)}},
            ConfigError,
            "residual of layer 0 is float64",
        ),
        (
            {"residual": {2: np.full((5, 24), np.nan, "f4")}},
            NonFiniteError,
            "residual of layer 2 holds NaN or infinity",
        ),
        ({"residual": {"0": residual()}}, ConfigError, "'0' is no layer"),
        ({"features": {0: features()[:4]}}, ConfigError, "features of layer 0 has shape (4, 5000)"),
        ({"attention_positions": [4, 1]}, ConfigError, "attention_positions [4, 1]"),
        ({"attention_positions": [5]}, ConfigError, "attention_positions [5]"),
        ({"attention_positions": [1]}, ConfigError, "has shape (2, 5, 5), not (2, 1, 5)"),
        ({"tokens": TEXTS}, ConfigError, "tokens are no ids and texts"),
        ({"tokens": (range(4), TEXTS)}, ConfigError, "tokens are no ids and texts"),
        ({"tokens": ([-1, 1, 2, 3, 4], TEXTS)}, ConfigError, "tokens are no ids and texts"),
        ({"special": [True]}, ConfigError, "tokens are no ids and texts"),
        ({"spans": {"x": [5]}}, ConfigError, "span 'x' at [5]"),
        ({"spans": {"decision": [1]}}, ConfigError, "span 'decision' at [1]"),
        ({"offsets": [(0, 1)]}, ConfigError, "offsets are for 1 tokens"),
        ({"spans": {"x": np.arange(5) > 3}}, ConfigError, "span 'x': not token positions"),
        ({"spans": {"x": [False, True]}}, ConfigError, "span 'x': not token positions"),
        ({"spans": {"x": [1.7]}}, ConfigError, "span 'x': not token positions"),
        ({"spans": {"x": 1}}, ConfigError, "span 'x': not token positions"),
        ({"spans": {"x,y": [1]}}, ConfigError, "'x,y' is no name of a span"),
        ({"spans": {"": [1]}}, ConfigError, "'' is no name of a span"),
        ({"spans": {3: [1]}}, ConfigError, "3 is no name of a span"),
        ({"positions": [0.2, 1.9]}, ConfigError, "positions: not token positions: [0.2"),
        ({"positions": np.arange(5) > 3}, ConfigError, "positions: not token positions"),
        ({"attention_positions": [True]}, ConfigError, "attention_positions: not token positions"),
        ({"attention_positions": [4.5]}, ConfigError, "attention_positions: not token positions"),
        ({"tokens": ([1.5, 2, 3, 4, 5], TEXTS)}, ConfigError, "tokens are no ids and texts"),
        ({"tokens": ([True, 2, 3, 4, 5], TEXTS)}, ConfigError, "tokens are no ids and texts"),
        (
            {"tokens": (range(5), [*TEXTS[:4], "\ud800"])},
            ConfigError,
            "the text of token 4 is '\\ud800', which is not valid Unicode",
        ),
        ({"features": {0: features()[:, :0]}}, ConfigError, "features of layer 0 is empty"),
        ({"attention": {0: attention()[:0]}}, ConfigError, "attention of layer 0 is empty"),
        ({"residual": {0: residual()[:, :0]}}, ConfigError, "residual of layer 0 is empty"),
        ({"residual": {10**6: residual()}}, ConfigError, "1000000 is no layer"),
        ({"residual": {MOST_LAYERS: residual()}}, ConfigError, "100000 is no layer"),
        ({"scenario": "../x"}, ScenarioError, "not safe as a folder name"),
        ({"scenario": zt.Scenario("x")}, ScenarioError, "has no name"),
        ({"scenario": zt.Scenario("x", name="x", options={"bet": "1"})}, ConfigError, "options"),
    ],
)
def test_arrays_that_are_none(
    tmp_path: Path, changes: dict[str, Any], kind: type[ZarrtraceError], said: str
) -> None:
    with pytest.raises(kind) as error:
        write(tmp_path / "run", changes.pop("scenario", SCENARIO), **changes)
    assert said in str(error.value)
    assert error.value.remedy
    if (tmp_path / "run").exists():
        assert list(zt.open_run(tmp_path / "run").children) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": {0: attention()}}, "layers: '0,2' there, '0' now"),
        ({"attention": {0: attention(heads=1), 2: attention(heads=1)}}, "heads: 2 there, 1 now"),
        ({"features": {0: features()}}, "features: None there, 5000 now"),
        ({"residual": {0: residual()}}, "layers_without_residual: '' there, '2' now"),
        ({"model": "other"}, "model: None there, 'other' now"),
        ({"scenario": zt.Scenario("x", name="n")}, "metadata"),
    ],
)
def test_traces_of_a_run_agree(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write(tmp_path / "run")
    other = zt.Scenario("You hold $1", name="other", metadata={"balance": 1.0})
    with pytest.raises(ConfigMismatchError, match=said):
        write(tmp_path / "run", changes.pop("scenario", other), **changes)
    assert list(zt.open_run(tmp_path / "run").children) == ["poor"]


def _extracted(folder: Path, shared: Path) -> None:
    shutil.copytree(shared, folder)


def _thesis(folder: Path, _: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")


@pytest.mark.parametrize(
    ("make", "kind"), [(_extracted, ConfigMismatchError), (_thesis, NotATraceError)]
)
def test_other_runs_and_folders_are_left_alone(
    tmp_path: Path, shared_run: Any, make: Callable[..., None], kind: type[ZarrtraceError]
) -> None:
    make(tmp_path / "run", shared_run.path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(kind):
        write(tmp_path / "run")
    after = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert after == {file: content for file, content in before.items() if "run" in file.parts}


def test_one_name_in_two_spellings(tmp_path: Path) -> None:
    write(tmp_path / "run", "Case")
    with pytest.raises(ConfigError, match="'case' is taken by 'Case'"):
        write(tmp_path / "run", "case")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    from zarrtrace.storage import locate
    from zarrtrace.store.run_writer import lock_run

    lock = lock_run(locate(tmp_path / "run").resolved())
    try:
        with pytest.raises(LockedError):
            write(tmp_path / "run")
    finally:
        lock.release()


@pytest.mark.long
@pytest.mark.torch
def test_a_cache_of_transformer_lens_is_what_zarrtrace_captures(tmp_path: Path) -> None:
    """The recipe of ``zarrtrace/extraction/README.md``, against an extraction of the same model."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zarrtrace import demo

    model = AutoModelForCausalLM.from_pretrained(demo.model_path())
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    own = zt.extract(
        tmp_path / "own", SCENARIO, model=model, tokenizer=tokenizer, features=False, quiet=True
    )
    lens = TransformerBridge.boot_transformers(
        str(demo.model_path()), hf_model=model, tokenizer=tokenizer
    )
    with torch.no_grad():
        _, cache = lens.run_with_cache(SCENARIO.prompt, remove_batch_dim=True)
    write(
        tmp_path / "run",
        tokens=(lens.to_tokens(SCENARIO.prompt)[0], lens.to_str_tokens(SCENARIO.prompt)),
        attention={layer: cache["pattern", layer] for layer in range(lens.cfg.n_layers)},
        residual={layer: cache["resid_post", layer] for layer in (8, 20)},
    )
    found, expected = zt.open_run(tmp_path / "run")["poor"], own["poor"]
    assert np.array_equal(found.token_id, expected.token_id)
    assert found.key_token.values.tolist() == expected.key_token.values.tolist()
    assert zt.span(found.to_dataset(), "balance") == zt.span(expected.to_dataset(), "balance")
    assert np.allclose(found.attention, expected.attention, rtol=0, atol=2e-6)
    for layer in (8, 20):
        stream = cache["resid_post", layer].numpy()
        assert np.array_equal(found.residual.sel(layer=layer), stream)
