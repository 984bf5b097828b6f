"""Attention block of queries by block, chosen queries and batches, against whole matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
import xarray as xr
from architectures import ARCHITECTURES, Activations, Models
from capturing import records_of
from hypothesis import given, settings
from hypothesis import strategies as st

from zarrtrace import spec
from zarrtrace.capture import batches, blocked, hooks, lockstep, probe_model
from zarrtrace.capture.checks import wants_blocks
from zarrtrace.capture.model import Permitted
from zarrtrace.errors import ConfigError, ZarrtraceError
from zarrtrace.extraction import Options, extract
from zarrtrace.spec import LayerRecord, TokensRecord
from zarrtrace.store import open_trace, verify

pytestmark = pytest.mark.torch

NAMES = list(ARCHITECTURES)
#: What rounding may do to attention (probabilities) and to log-probabilities.
ATTENTION_TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
LOGPROB_TOLERANCE = {"float32": 2e-4, "bfloat16": 1.0, "float16": 1e-1}
#: The same for features here: activations of some hundreds at most.
FEATURE_TOLERANCE = 3e-5
SUITE = {
    "scenarios": [
        {
            "name": "short",
            "prompt": "You now hold $90. Your choice:",
            "spans": {"balance": "$90"},
        },
        {
            "name": "longer",
            "prompt": "Last spins: lost $30, lost $60. You now hold $140, and the goal is $200.",
            "spans": {"balance": "$140", "goal": "$200"},
        },
    ]
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suite") / "suite.yaml"
    file.write_text(json.dumps(SUITE), encoding="utf-8")
    return file


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several blocks, records, shards and pieces of logits of a short prompt."""
    monkeypatch.setattr(blocked, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(blocked, "_ROWS", 7)
    monkeypatch.setattr(spec, "_MAX_SHARD_BYTES", 1)
    monkeypatch.setattr(spec, "_QUERIES_PER_CHUNK", 16)
    monkeypatch.setattr(lockstep, "_LOGIT_ROWS", 10)


def _options(path: Path, suite: Path, **changes: Any) -> Options:
    chosen = {"features": False, "layers": (0, 1, 2, 3), "scenarios": suite, **changes}
    return Options(model=str(path), **chosen)


def _tolerance(way: str) -> float:
    """What a way may differ by in float32: not at all, if it takes whole matrices."""
    return ATTENTION_TOLERANCE["float32"] if way == "blocked" else 0


def _attention_by_layer(records: list[Any], tokens: int) -> dict[int, np.ndarray]:
    """Put the rows of records together."""
    found: dict[int, list[np.ndarray]] = {}
    for record in records:
        if isinstance(record, LayerRecord) and record.attention is not None:
            rows = found.setdefault(record.layer, [])
            assert record.start == sum(part.shape[1] for part in rows)
            attention = np.asarray(record.attention)
            assert attention.shape[2] == tokens
            rows.append(attention)
    return {layer: np.concatenate(rows, axis=1) for layer, rows in found.items()}


def _tokens(records: list[Any]) -> TokensRecord:
    (found,) = (record for record in records if isinstance(record, TokensRecord))
    return found


# --- blocked against whole ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(ATTENTION_TOLERANCE))
@pytest.mark.parametrize("name", NAMES)
def test_blocked_equals_transformers_eager_within_rounding(
    models: Models, small_blocks: None, name: str, dtype: str
) -> None:
    tokens = 50
    ids = architectures.random_ids(tokens)
    expected = architectures.reference(name, models.path(name, dtype), ids)
    request = architectures.request(ids, blocked=True)
    records = list(records_of(models(name, dtype), [request], attention_dtype="float32"))
    found = _attention_by_layer(records, tokens)
    assert list(found) == list(expected.attention)
    assert sum(isinstance(r, LayerRecord) and r.attention is not None for r in records) > len(found)
    for layer, weights in expected.attention.items():
        difference = np.abs(found[layer] - weights.float().numpy()).max()
        assert difference <= ATTENTION_TOLERANCE[dtype]
        assert (found[layer][:, ~np.tri(tokens, dtype=bool)] == 0).all()
    logprobs = expected.logits.float().log_softmax(-1)
    stored = _tokens(records)
    best = torch.gather(logprobs, 1, torch.from_numpy(stored.next_token.astype(np.int64)))
    difference = np.abs(best.numpy() - stored.next_token_logprob).max()
    assert difference <= LOGPROB_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(ATTENTION_TOLERANCE))
@pytest.mark.parametrize("name", NAMES)
def test_a_probe_permits_every_way_of_these_architectures(
    models: Models, name: str, dtype: str
) -> None:
    model = models(name, dtype)
    probed = probe_model(model)
    assert probed.attentions == model.attentions
    if dtype != "float32" and name in ("gpt-oss", "Qwen3-Next"):
        return  # another rounding may choose another expert, and the processor decides on rounding
    assert probed.permitted == Permitted(blocks=True, batches=True, parts=True)


def test_an_architecture_that_differs_by_blocks_is_captured_whole(
    models: Models, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked._Mask, "added", lambda self, start, stop: 0.0)  # not causal
    monkeypatch.setattr(blocked, "_ROWS", 7)
    monkeypatch.setattr(blocked, "_BLOCK_BYTES", 1)
    assert not probe_model(models("Llama")).permitted.blocks
    path = models.path("Llama")
    run = extract(tmp_path / "run", _options(path, suite, attention_capture="blocked"))
    ds = open_trace(run / "short")
    assert ds.attrs["zarrtrace"]["model"]["attn_implementation"] == "eager"
    expected = architectures.reference("Llama", path, ds.token_id.values.tolist())
    assert np.array_equal(ds.attention.values[2], expected.attention[2].numpy())


def test_blocks_are_chosen_where_a_whole_matrix_is_large(models: Models) -> None:
    model = models("Llama")  # 4 heads, float32: 256 MiB at 4,096 tokens
    assert not wants_blocks(model, 4096, mode="auto")
    assert wants_blocks(model, 4097, mode="auto")
    assert wants_blocks(model, 2, mode="blocked")
    assert not wants_blocks(model, 100_000, mode="whole")


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Qwen3-Next"])
def test_a_blocked_run_equals_a_whole_one(
    models: Models, suite: Path, tmp_path: Path, small_blocks: None, name: str
) -> None:
    path = models.path(name)
    whole = extract(tmp_path / "whole", _options(path, suite))
    run = extract(tmp_path / "blocked", _options(path, suite, attention_capture="blocked"))
    assert verify(run) == []
    for scenario in ("short", "longer"):
        expected, found = open_trace(whole / scenario), open_trace(run / scenario)
        attributes = found.attrs["zarrtrace"]
        assert attributes["model"]["attn_implementation"] == "blocked"
        assert attributes["model"]["softmax_dtype"] == "float32"
        for array in ("attention", "attention_mean"):
            np.testing.assert_allclose(
                found[array], expected[array], rtol=0, atol=ATTENTION_TOLERANCE["float32"]
            )
        assert np.array_equal(found.next_token, expected.next_token)


# --- chosen queries -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["whole", "blocked"])
@pytest.mark.parametrize("queries", ["last", "spans", (0, 5, -1)])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Qwen3-Next"])
def test_chosen_queries_are_stored_and_nothing_else(
    models: Models,
    suite: Path,
    tmp_path: Path,
    small_blocks: None,
    name: str,
    queries: Any,
    way: Any,
) -> None:
    path = models.path(name)
    run = extract(tmp_path / "run", _options(path, suite, queries=queries, attention_capture=way))
    assert verify(run) == []
    for scenario in ("short", "longer"):
        ds = open_trace(run / scenario)
        tokens = ds.sizes["query"]
        spans = ds.attrs["zarrtrace"]["spans"]
        rows = {
            "last": [tokens - 1],
            "spans": sorted({at for span in spans.values() for at in span["tokens"]}),
            (0, 5, -1): [0, 5, tokens - 1],
        }[queries]
        assert ds.attrs["zarrtrace"]["queries"] == rows
        assert np.flatnonzero(ds.has_attention).tolist() == rows
        assert ds.has_attention.dims == ("query",)
        expected = architectures.reference(name, path, ds.token_id.values.tolist()).attention
        others = np.setdiff1d(np.arange(tokens), rows)
        for at, weights in enumerate(expected.values()):
            stored = ds.attention.values[at]
            np.testing.assert_allclose(
                stored[:, rows], weights.numpy()[:, rows], rtol=0, atol=_tolerance(way)
            )
            mean = ds.attention_mean.values[at]
            np.testing.assert_allclose(mean[rows], stored[:, rows].mean(0), rtol=0, atol=1e-6)
            assert np.isnan(stored[:, others]).all()
            assert np.isnan(mean[others]).all()
        # Nothing on disk for the others: one file a row and layer.
        for array, place in (("attention", 2), ("attention_mean", 1)):
            folder = run / scenario / array / "c"
            files = [file.relative_to(folder).parts for file in folder.rglob("*") if file.is_file()]
            assert sorted({int(parts[place]) for parts in files}) == rows
            assert len(files) == len(rows) * len(expected)


def test_chosen_queries_are_read_without_our_code(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    run = extract(tmp_path / "run", _options(models.path("Llama"), suite, queries="last"))
    ds = xr.open_zarr(run / "short", chunks=None)
    assert ds.has_attention.dtype == bool
    assert "has_attention" in ds.coords
    last = ds.attention.where(ds.has_attention, drop=True)
    assert last.sizes["query"] == 1
    assert np.isfinite(last).all()
    assert ds.attention.sizes["query"] == ds.sizes["query"]


def test_queries_outside_a_prompt_are_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    path = models.path("Llama")
    for wanted in ((1000,), (-1000,)):
        with pytest.raises(ConfigError, match=f"--queries {wanted[0]}"):
            extract(tmp_path / "run", _options(path, suite, queries=wanted))
        assert not (tmp_path / "run").exists()


def test_chosen_queries_go_on_where_they_were_interrupted(
    models: Models, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.path("Gemma 2")
    options = _options(path, suite, queries=(0, 5, -1), attention_capture="blocked")
    expected = extract(tmp_path / "expected", options)
    real = lockstep.Pass.advance
    calls = []

    def fail_later(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(lockstep.Pass, "advance", fail_later)
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path / "run", options)
    found = extract(tmp_path / "run", options)
    assert verify(found) == []
    for scenario in ("short", "longer"):
        a, b = open_trace(expected / scenario), open_trace(found / scenario)
        xr.testing.assert_identical(a.drop_attrs(), b.drop_attrs())


def test_export_writes_rows_that_are_not_stored_as_nan(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    from zarrtrace.npz import export_npz

    run = extract(tmp_path / "run", _options(models.path("Llama"), suite, queries=(0, -1)))
    export_npz(run, tmp_path / "npz")
    ds = open_trace(run / "short")
    with np.load(tmp_path / "npz" / "short" / "layer_2.npz") as layer:
        exported = layer["attention"]
    assert np.array_equal(exported, ds.attention.sel(layer=2).values, equal_nan=True)
    assert np.isnan(exported[:, 1:-1]).all()
    assert np.isfinite(exported[:, [0, -1]]).all()


def test_analysis_reads_stored_rows_and_refuses_others_by_name(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    from zarrtrace.analysis import attention_flow, attention_to

    path = models.path("Llama")
    chosen = open_trace(extract(tmp_path / "last", _options(path, suite, queries="last")) / "short")
    whole = open_trace(extract(tmp_path / "all", _options(path, suite)) / "short")
    xr.testing.assert_allclose(
        attention_to(chosen, "balance", "decision"),
        attention_to(whole, "balance", "decision"),
    )
    with pytest.raises(ZarrtraceError, match=r"not stored|has no attention"):
        attention_to(chosen, "balance", "balance")
    with pytest.raises(ZarrtraceError, match=r"not stored|has no attention"):
        attention_flow(chosen)


# --- long prompts on disk -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["whole", "blocked"])
def test_tiles_above_the_diagonal_take_no_space(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    suite = tmp_path / "long.yaml"
    prompt = "You now hold $90. " * 110
    suite.write_text(
        json.dumps({"scenarios": [{"name": "long", "prompt": prompt.strip()}]}), encoding="utf-8"
    )
    monkeypatch.setattr(spec, "_MAX_SHARD_BYTES", 4 * 4 * 768 * 192)
    path = models.path("Llama", max_position_embeddings=2048)
    options = _options(path, suite, layers=(1,), attention_capture=way)
    run = extract(tmp_path / "run", options)
    assert verify(run) == []
    ds = open_trace(run / "long")
    tokens = ds.sizes["query"]
    assert tokens > 600
    stored = 0
    shards = [file for file in (run / "long" / "attention" / "c").rglob("*") if file.is_file()]
    assert len(shards) == -(-tokens // 192)
    for shard in shards:
        content = shard.read_bytes()
        tiles = 192 // 16 * -(-tokens // 256)
        index = np.frombuffer(content[-(16 * tiles + 4) : -4], dtype="<u8").reshape(tiles, 2)
        stored += int((index[:, 0] != 2**64 - 1).sum())
    # Tiles are 16 queries by 256 keys: a query sees as many as start before its block ends.
    starts = range(0, tokens, 16)
    assert stored == sum(-(-min(start + 16, tokens) // 256) for start in starts)
    assert stored < len(starts) * -(-tokens // 256)
    found = xr.open_zarr(run / "long", chunks=None).attention.values[0]
    assert (found[:, ~np.tri(tokens, dtype=bool)] == 0).all()
    expected = architectures.reference("Llama", path, ds.token_id.values.tolist()).attention[1]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=_tolerance(way))


# --- properties ---------------------------------------------------------------------------------

ANY_ARCHITECTURE = st.sampled_from(NAMES)
LAYERS = st.sets(st.integers(0, 3), min_size=1).map(sorted)
LENGTHS = st.integers(1, 40)
HEAD_COUNTS = st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 2), (2, 1), (1, 1)])


@settings(max_examples=15)
@given(name=ANY_ARCHITECTURE, tokens=LENGTHS, layers=LAYERS, seed=st.integers(0, 99))
def test_whole_capture_is_exact_for_any_length_and_layers(
    models: Models, name: str, tokens: int, layers: list[int], seed: int
) -> None:
    ids = architectures.random_ids(tokens, seed)
    expected = architectures.reference(name, models.path(name), ids)
    source = Activations("hook_resid_post")
    request = architectures.request(ids, layers=layers)
    records = list(
        records_of(
            models(name),
            [request],
            attention_dtype="float32",
            saes=source.find(layers),
            source=source,
        )
    )
    found = architectures.gather(records)
    assert list(found) == layers
    for layer, record in found.items():
        blocks = np.asarray(record.features["features"].activations)
        assert np.array_equal(blocks, expected.blocks[layer].numpy())
        if layer in expected.attention:
            assert record.attention is not None
            assert np.array_equal(np.asarray(record.attention), expected.attention[layer].numpy())


@settings(max_examples=15)
@given(
    name=ANY_ARCHITECTURE,
    tokens=LENGTHS,
    layers=LAYERS,
    rows=st.integers(1, 50),
    shard_rows=st.sampled_from([1, 8, 16]),
    data=st.data(),
)
def test_blocked_capture_equals_whole_for_any_blocks_and_queries(
    models: Models,
    name: str,
    tokens: int,
    layers: list[int],
    rows: int,
    shard_rows: int,
    data: st.DataObject,
) -> None:
    ids = architectures.random_ids(tokens)
    some = st.sets(st.integers(0, tokens - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    queries = data.draw(st.none() | some)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_BLOCK_BYTES", 1)
        patch.setattr(blocked, "_ROWS", rows)
        patch.setattr(spec, "_MAX_SHARD_BYTES", 1)
        patch.setattr(spec, "_QUERIES_PER_CHUNK", shard_rows)
        patch.setattr(spec, "_QUERIES_PER_SHORT_CHUNK", shard_rows)
        requests = [
            architectures.request(ids, layers=layers, blocked=way, queries=queries)
            for way in (False, True)
        ]
        whole, found = (
            list(records_of(models(name), [request], attention_dtype="float32"))
            for request in requests
        )
    expected, stored = _attention_by_layer(whole, tokens), _attention_by_layer(found, tokens)
    assert list(stored) == list(expected)
    for layer, weights in expected.items():
        assert stored[layer].shape == weights.shape
        assert weights.shape[1] == (tokens if queries is None else len(queries))
        np.testing.assert_allclose(
            stored[layer], weights, rtol=0, atol=ATTENTION_TOLERANCE["float32"]
        )


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_mlps_compute_a_long_prompt_in_parts(
    models: Models, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ids, model = architectures.random_ids(20), models(name)
    request, lengths = architectures.request(ids), []
    for block in model.blocks:
        mlp = hooks.mlp_of(block)
        assert mlp is not None

        def forward(hidden: torch.Tensor, original: Any = mlp.forward) -> Any:
            lengths.append(hidden.shape[1])
            return original(hidden)

        monkeypatch.setattr(mlp, "forward", forward)
    whole = list(records_of(model, [request], attention_dtype="float32"))
    assert set(lengths) == {20}
    lengths.clear()
    monkeypatch.setattr(lockstep, "_MLP_TOKENS", 8)
    found = list(records_of(model, [request], attention_dtype="float32"))
    if 20 not in lengths:  # or it may look at all tokens: a mixture of experts
        assert lengths == [8, 8, 4] * len(model.blocks)
    assert vars(hooks.mlp_of(model.blocks[0]))["forward"].__name__ == "forward"
    for one, other in zip(whole, found, strict=True):
        if isinstance(one, LayerRecord):
            assert (other.attention is None) == (one.attention is None)
            if one.attention is not None:
                np.testing.assert_allclose(other.attention, one.attention, atol=1e-5)
        else:
            np.testing.assert_allclose(other.next_token_logprob, one.next_token_logprob, atol=1e-4)


@settings(max_examples=10)
@given(heads=HEAD_COUNTS, tokens=LENGTHS, dtype=st.sampled_from(list(ATTENTION_TOLERANCE)))
def test_any_number_of_heads(
    models: Models, heads: tuple[int, int], tokens: int, dtype: str
) -> None:
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8}
    model = models("Qwen 3", dtype, **changes)
    ids = architectures.random_ids(tokens)
    path = models.path("Qwen 3", dtype, **changes)
    expected = architectures.reference("Qwen 3", path, ids).attention
    for way in (False, True):
        records = list(
            records_of(model, [architectures.request(ids, blocked=way)], attention_dtype="float32")
        )
        for layer, weights in _attention_by_layer(records, tokens).items():
            assert weights.shape == (heads[0], tokens, tokens)
            tolerance = ATTENTION_TOLERANCE[dtype] if way else 0
            difference = np.abs(weights - expected[layer].float().numpy()).max()
            assert difference <= tolerance


@settings(max_examples=15)
@given(
    name=ANY_ARCHITECTURE,
    lengths=st.lists(LENGTHS, min_size=2, max_size=5),
    size=st.integers(2, 5),
    dtype=st.sampled_from(list(ATTENTION_TOLERANCE)),
    layers=LAYERS,
)
def test_what_is_stored_of_a_prompt_does_not_depend_on_its_batch(
    models: Models, name: str, lengths: list[int], size: int, dtype: str, layers: list[int]
) -> None:
    source = Activations()
    requests = [
        architectures.request(architectures.random_ids(tokens, seed), f"s{seed}", layers)
        for seed, tokens in enumerate(lengths)
    ]

    def run(batch_size: int) -> list[Any]:
        return list(
            records_of(
                models(name, dtype),
                requests,
                attention_dtype="float32",
                saes=source.find(layers),
                source=source,
                batch_size=batch_size,
            )
        )

    alone, together = run(1), run(size)
    for seed, tokens in enumerate(lengths):
        expected = architectures.gather(alone, f"s{seed}")
        found = architectures.gather(together, f"s{seed}")
        assert list(found) == list(expected) == layers
        for layer, record in expected.items():
            other = found[layer]
            activations = np.asarray(other.features["features"].activations)
            assert activations.shape == (tokens, 32)
            assert np.isfinite(activations).all()
            if dtype == "float32":
                _close(activations, np.asarray(record.features["features"].activations))
            if record.attention is None:
                assert other.attention is None
                continue
            assert other.attention is not None
            batched = np.asarray(other.attention)
            assert batched.shape == (4, tokens, tokens)
            difference = np.abs(batched - np.asarray(record.attention)).max()
            assert difference <= ATTENTION_TOLERANCE[dtype]
            assert (batched[:, ~np.tri(tokens, dtype=bool)] == 0).all()
        rows = [r for r in together if isinstance(r, TokensRecord) and r.scenario == f"s{seed}"]
        assert [r.next_token.shape for r in rows] == [(tokens, 10)]


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=FEATURE_TOLERANCE * scale)


def test_batches_hold_prompts_of_similar_length(models: Models) -> None:
    lengths = [30, 5, 31, 6, 29, 7]
    requests = [
        architectures.request(architectures.random_ids(tokens), str(tokens)) for tokens in lengths
    ]
    made = batches.batches(models("Llama"), requests, 3)
    assert [batch.lengths for batch in made] == [[5, 6, 7], [29, 30, 31]]


def test_a_batched_run_equals_one_prompt_at_a_time(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    path = models.path("Gemma 3")
    alone = extract(tmp_path / "alone", _options(path, suite, batch_size=1))
    together = extract(tmp_path / "together", _options(path, suite, batch_size=2))
    assert verify(together) == []
    for scenario in ("short", "longer"):
        a, b = open_trace(alone / scenario), open_trace(together / scenario)
        assert dict(a.sizes) == dict(b.sizes)
        for name, coordinate in a.coords.items():
            assert np.array_equal(b[name], coordinate)
        np.testing.assert_allclose(
            b.attention, a.attention, rtol=0, atol=ATTENTION_TOLERANCE["float32"]
        )
        np.testing.assert_allclose(b.next_token_logprob, a.next_token_logprob, rtol=0, atol=2e-4)
        ours, theirs = a.attrs["zarrtrace"], b.attrs["zarrtrace"]
        own = {"stored", "blake2b"}
        assert {k: v for k, v in ours.items() if k not in own} == {
            k: v for k, v in theirs.items() if k not in own
        }
