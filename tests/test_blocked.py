"""Attention block of queries by block, chosen queries and batches, against whole matrices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import numerics
import numpy as np
import pytest
import rounding
import torch
import xarray as xr
from architectures import ARCHITECTURES, EVERY_DAY, Activations, Models
from capturing import extract_within, records_of
from everyday import mostly_long
from hypothesis import given, settings
from hypothesis import strategies as st

from zarrtrace.capture import CaptureLimits, batches, blocked, hooks, lockstep, probe_model
from zarrtrace.capture.checks import wants_blocks
from zarrtrace.capture.model import LoadedModel, Permitted
from zarrtrace.errors import ConfigError, ZarrtraceError
from zarrtrace.extraction import Options, extract_run
from zarrtrace.format.layout import Limits
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.store import open_trace, verify

pytestmark = pytest.mark.torch

NAMES = list(ARCHITECTURES)
DTYPES = ["float32", "bfloat16", "float16"]
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
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suite") / "suite.yaml"
    file.write_text(json.dumps(SUITE), encoding="utf-8")
    return file


#: Several blocks, records, files and pieces of logits of a short prompt.
IN_PARTS = CaptureLimits(
    layout=Limits(file_bytes=1, record_bytes=1), block_bytes=1, block_rows=7, logit_rows=10
)


@pytest.mark.parametrize(("device", "rows"), [("cpu", 16), ("meta", 256)])
def test_blocks_are_larger_where_small_ones_leave_a_device_idle(device: str, rows: int) -> None:
    """Scores of 32 heads over 8,192 keys in float32: 8 and 256 MiB a block."""
    query = torch.empty((1, 32, 8192, 4), device=device)
    found = list(blocked._blocks(query, 32, 8192, CaptureLimits()))
    assert [len(block) for block in found] == [rows] * (8192 // rows)
    assert [at for block in found for at in block] == list(range(8192))


def in_parts(model: LoadedModel, limits: CaptureLimits = IN_PARTS) -> LoadedModel:
    return replace(model, limits=limits)


def _options(path: Path, suite: Path, **changes: Any) -> Options:
    chosen = {"features": False, "layers": (0, 1, 2, 3), "scenarios": suite, **changes}
    return Options(model=str(path), **chosen)


def _deviations(name: str, path: Path, ids: Any) -> dict[str, float]:
    """Return how far apart rounding may bring two float32 runs over a prompt."""
    return numerics.whole_model_deviations(name, path, tuple(map(int, ids)))


def _tolerance(way: str, name: str, path: Path, ids: Any) -> float:
    """Tolerance of a way in float32: zero if it takes whole matrices."""
    return _deviations(name, path, ids)["attention"] if way == "blocked" else 0


def _exact(call: numerics.AttentionCall, name: str, *of: int) -> numerics.Exact:
    windows = ARCHITECTURES[name].windows or {}
    return numerics.attention_in_float64(call, windows.get(call.layer), *of)


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


@pytest.mark.parametrize(
    ("name", "dtype"), mostly_long(lambda name, _: name in EVERY_DAY, NAMES, DTYPES)
)
def test_blocked_attention_is_what_queries_and_keys_give_in_float64(
    models: Models, name: str, dtype: str
) -> None:
    """Each layer from its own input: over several, one unit in the last place may grow to 1."""
    tokens, model = 50, in_parts(models(name, dtype))
    request = architectures.request(architectures.random_ids(tokens), blocked=True)
    with numerics.attention_calls() as calls:
        records = list(records_of(model, [request], attention_dtype="float32"))
    found = _attention_by_layer(records, tokens)
    assert list(found) == list(ARCHITECTURES[name].attention_layers)
    assert sum(isinstance(r, LayerRecord) and r.attention is not None for r in records) > len(found)
    assert [call.layer for call in calls] == list(found)
    for call in calls:
        exact = _exact(call, name)
        rounding.assert_close(found[call.layer], exact.weights, exact.weights_error)
        rounding.assert_close(call.output[0].float(), exact.output, exact.output_error)
        assert (found[call.layer][:, ~np.tri(tokens, dtype=bool)] == 0).all()


@pytest.mark.parametrize("name", mostly_long(lambda name: name in EVERY_DAY, NAMES))
def test_blocked_equals_transformers_eager_within_rounding(models: Models, name: str) -> None:
    tokens = 50
    ids, path = architectures.random_ids(tokens), models.path(name)
    expected, allowed = architectures.reference(name, path, ids), _deviations(name, path, ids)
    request = architectures.request(ids, blocked=True)
    records = list(records_of(in_parts(models(name)), [request], attention_dtype="float32"))
    found = _attention_by_layer(records, tokens)
    assert list(found) == list(expected.attention)
    for layer, weights in expected.attention.items():
        rounding.assert_close(found[layer], weights, allowed["attention"])
    logprobs, best = expected.logits.log_softmax(-1).topk(10)
    stored = _tokens(records)
    rounding.assert_close(stored.next_token_logprob, logprobs, allowed["logprob"])
    rounding.assert_same_ranking(
        stored.next_token, best.numpy(), logprobs.numpy(), allowed["logprob"]
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_long(
        lambda name, dtype: name == "Llama" or (name in EVERY_DAY and dtype == "float32"),
        NAMES,
        DTYPES,
    ),
)
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
    assert not probe_model(models("Llama")).permitted.blocks
    path = models.path("Llama")
    run = extract_run(tmp_path / "run", _options(path, suite, attention_capture="blocked"))
    ds = open_trace(run / "short")
    assert ds.attrs["model"]["attn_implementation"] == "eager"
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
    models: Models, suite: Path, tmp_path: Path, name: str
) -> None:
    path = models.path(name)
    whole = extract_within(IN_PARTS, tmp_path / "whole", _options(path, suite))
    blocks = _options(path, suite, attention_capture="blocked")
    run = extract_within(IN_PARTS, tmp_path / "blocked", blocks)
    assert verify(run) == []
    for scenario in ("short", "longer"):
        expected, found = open_trace(whole / scenario), open_trace(run / scenario)
        attributes = found.attrs
        assert attributes["model"]["attn_implementation"] == "blocked"
        assert attributes["model"]["softmax_dtype"] == "float32"
        allowed = _deviations(name, path, expected.token_id.values)
        for array in ("attention", "attention_mean"):
            rounding.assert_close(found[array], expected[array], allowed["attention"])
        rounding.assert_same_ranking(
            found.next_token.values,
            expected.next_token.values,
            expected.next_token_logprob.values,
            allowed["logprob"],
        )


# --- chosen queries -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "queries", "way"),
    mostly_long(
        lambda name, queries, _: name != "Gemma 2" and queries == "spans",
        ["Llama", "Gemma 2", "Qwen3-Next"],
        ["last", "spans", (0, 5, -1)],
        ["whole", "blocked"],
    ),
)
def test_chosen_queries_are_stored_and_nothing_else(
    models: Models, suite: Path, tmp_path: Path, name: str, queries: Any, way: Any
) -> None:
    path = models.path(name)
    options = _options(path, suite, attention_positions=queries, attention_capture=way)
    run = extract_within(IN_PARTS, tmp_path / "run", options)
    assert verify(run) == []
    for scenario in ("short", "longer"):
        ds = open_trace(run / scenario)
        tokens = ds.sizes["query"]
        spans = ds.attrs["spans"]
        rows = {
            "last": [tokens - 1],
            "spans": sorted({at for span in spans.values() for at in span["tokens"]}),
            (0, 5, -1): [0, 5, tokens - 1],
        }[queries]
        assert ds.attention.dims[-2:] == ("attention_query", "key")
        assert ds.attention_query.values.tolist() == rows
        ids = ds.token_id.values.tolist()
        expected = architectures.reference(name, path, ids).attention
        tolerance = _tolerance(way, name, path, ids)
        for at, weights in enumerate(expected.values()):
            stored = ds.attention.values[at]
            rounding.assert_close(stored, weights[:, rows], tolerance)
            mean, exact = ds.attention_mean.values[at], stored.mean(0, dtype=np.float64)
            rounding.assert_close(mean, exact, rounding.rounding("float32", len(stored), exact))
        with pytest.raises(KeyError):
            ds.attention.sel(attention_query=1)


def test_chosen_queries_are_read_without_our_code(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    run = extract_run(
        tmp_path / "run", _options(models.path("Llama"), suite, attention_positions="last")
    )
    ds = xr.open_zarr(run / "short", chunks=None)
    assert ds.attention_query.values.tolist() == [ds.sizes["key"] - 1]
    assert np.isfinite(ds.attention).all()
    assert ds.sizes["query"] == ds.sizes["key"]


def test_queries_outside_a_prompt_are_refused(models: Models, suite: Path, tmp_path: Path) -> None:
    path = models.path("Llama")
    for wanted in ((1000,), (-1000,)):
        with pytest.raises(ConfigError, match=f"--attention-positions {wanted[0]}"):
            extract_run(tmp_path / "run", _options(path, suite, attention_positions=wanted))
        assert not (tmp_path / "run").exists()


def test_chosen_queries_go_on_where_they_were_interrupted(
    models: Models, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.path("Gemma 2")
    options = _options(path, suite, attention_positions=(0, 5, -1), attention_capture="blocked")
    expected = extract_run(tmp_path / "expected", options)
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
            extract_run(tmp_path / "run", options)
    found = extract_run(tmp_path / "run", options)
    assert verify(found) == []
    for scenario in ("short", "longer"):
        a, b = open_trace(expected / scenario), open_trace(found / scenario)
        xr.testing.assert_identical(a, b)


def test_export_writes_rows_that_are_not_stored_as_nan(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    from zarrtrace.npz import export_npz

    run = extract_run(
        tmp_path / "run", _options(models.path("Llama"), suite, attention_positions=(0, -1))
    )
    export_npz(run, tmp_path / "npz")
    ds = open_trace(run / "short")
    with np.load(tmp_path / "npz" / "short" / "layer_2.npz") as layer:
        exported = layer["attention"]
    np.testing.assert_array_equal(exported[:, [0, -1]], ds.attention.sel(layer=2).values)
    assert np.isnan(exported[:, 1:-1]).all()
    assert np.isfinite(exported[:, [0, -1]]).all()


def test_analysis_reads_stored_rows_and_refuses_others_by_name(
    models: Models, suite: Path, tmp_path: Path
) -> None:
    from zarrtrace.analysis import attention_flow, attention_to

    path = models.path("Llama")
    chosen = open_trace(
        extract_run(tmp_path / "last", _options(path, suite, attention_positions="last")) / "short"
    )
    whole = open_trace(extract_run(tmp_path / "all", _options(path, suite)) / "short")
    alone, together = (attention_to(ds, "balance", "decision") for ds in (chosen, whole))
    weights = 4 * len(chosen.attrs["spans"]["balance"]["tokens"])  # of four heads
    error = 2 * rounding.rounding("float32", weights, together)
    rounding.assert_close(alone, together, error)
    with pytest.raises(ZarrtraceError, match=r"not stored|has no attention"):
        attention_to(chosen, "balance", "balance")
    with pytest.raises(ZarrtraceError, match=r"not stored|has no attention"):
        attention_flow(chosen)


# --- long prompts on disk -----------------------------------------------------------------------


@pytest.mark.parametrize("way", [pytest.param("whole", marks=pytest.mark.long), "blocked"])
def test_long_prompts_are_cut_into_files_and_read_as_one(
    models: Models, tmp_path: Path, way: Any
) -> None:
    suite = tmp_path / "long.yaml"
    prompt = "You now hold $90. " * 110
    suite.write_text(
        json.dumps({"scenarios": [{"name": "long", "prompt": prompt.strip()}]}), encoding="utf-8"
    )
    limits = Limits(file_bytes=4 * 4 * 768 * 192, record_bytes=4 * 4 * 768 * 64)
    path = models.path("Llama", max_position_embeddings=2048)
    options = _options(path, suite, layers=(1,), attention_capture=way)
    run = extract_within(CaptureLimits(layout=limits), tmp_path / "run", options)
    assert verify(run) == []
    ds = open_trace(run / "long")
    tokens = ds.sizes["query"]
    assert tokens > 600
    files = [file for file in Path(run, "long", "attention").iterdir() if file.name != "zarr.json"]
    assert len(files) > 2
    plain = xr.open_zarr(Path(run, "long"), chunks=None)
    np.testing.assert_array_equal(ds.attention.values, plain.attention.values)
    expected = architectures.reference("Llama", path, ds.token_id.values.tolist()).attention[1]
    allowed = _deviations("Llama", path, ds.token_id.values)["attention"]
    rounding.assert_close(ds.attention.values[0], expected, allowed)


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
    chunk_rows=st.sampled_from([1, 8, 16]),
    data=st.data(),
)
def test_blocked_capture_equals_whole_for_any_blocks_and_queries(
    models: Models,
    name: str,
    tokens: int,
    layers: list[int],
    rows: int,
    chunk_rows: int,
    data: st.DataObject,
) -> None:
    ids = architectures.random_ids(tokens)
    some = st.sets(st.integers(0, tokens - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    queries = data.draw(st.none() | some)
    layout = Limits(file_bytes=1, record_bytes=1, queries=chunk_rows)
    model = in_parts(models(name), CaptureLimits(layout, block_bytes=1, block_rows=rows))
    requests = [
        architectures.request(ids, layers=layers, blocked=way, attention_positions=queries)
        for way in (False, True)
    ]
    whole, found = (
        list(records_of(model, [request], attention_dtype="float32")) for request in requests
    )
    expected, stored = _attention_by_layer(whole, tokens), _attention_by_layer(found, tokens)
    assert list(stored) == list(expected)
    for layer, weights in expected.items():
        assert stored[layer].shape == weights.shape
        assert weights.shape[1] == (tokens if queries is None else len(queries))
        tolerance = _tolerance("blocked", name, models.path(name), ids)
        rounding.assert_close(stored[layer], weights, tolerance)


@pytest.mark.parametrize("name", mostly_long(lambda name: name in EVERY_DAY, NAMES))
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
    model = in_parts(model, CaptureLimits(mlp_tokens=8))
    found = list(records_of(model, [request], attention_dtype="float32"))
    if 20 not in lengths:  # or it may look at all tokens: a mixture of experts
        assert lengths == [8, 8, 4] * len(model.blocks)
    assert vars(hooks.mlp_of(model.blocks[0]))["forward"].__name__ == "forward"
    allowed = _deviations(name, models.path(name), ids)
    for one, other in zip(whole, found, strict=True):
        if isinstance(one, LayerRecord):
            assert (other.attention is None) == (one.attention is None)
            if one.attention is not None:
                rounding.assert_close(other.attention, one.attention, allowed["attention"])
        else:
            rounding.assert_close(
                other.next_token_logprob, one.next_token_logprob, allowed["logprob"]
            )


@pytest.mark.long  # every day, heads of the models above
@settings(max_examples=10)
@given(heads=HEAD_COUNTS, tokens=LENGTHS, dtype=st.sampled_from(DTYPES))
def test_any_number_of_heads(
    models: Models, heads: tuple[int, int], tokens: int, dtype: str
) -> None:
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8}
    model = models("Qwen 3", dtype, **changes)
    ids = architectures.random_ids(tokens)
    path = models.path("Qwen 3", dtype, **changes)
    expected = architectures.reference("Qwen 3", path, ids).attention
    for way in (False, True):
        request = architectures.request(ids, blocked=way)
        with numerics.attention_calls() as calls:
            records = list(records_of(model, [request], attention_dtype="float32"))
        found = _attention_by_layer(records, tokens)
        assert list(found) == list(expected)
        for call in calls:
            weights, exact = found[call.layer], _exact(call, "Qwen 3")
            assert weights.shape == (heads[0], tokens, tokens)
            rounding.assert_close(weights, exact.weights, exact.weights_error)
            if not way:
                assert np.array_equal(weights, expected[call.layer].float().numpy())


@pytest.mark.long
@settings(max_examples=15)
@given(
    name=ANY_ARCHITECTURE,
    lengths=st.lists(LENGTHS, min_size=2, max_size=5),
    size=st.integers(2, 5),
    dtype=st.sampled_from(DTYPES),
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

    model = models(name, dtype)

    def run(batch_size: int) -> list[Any]:
        return list(
            records_of(
                model,
                requests,
                attention_dtype="float32",
                saes=source.find(layers),
                source=source,
                batch_size=batch_size,
            )
        )

    alone = run(1)
    with numerics.attention_calls() as calls:
        together = run(size)
    for seed, tokens in enumerate(lengths):
        expected = architectures.gather(alone, f"s{seed}")
        found = architectures.gather(together, f"s{seed}")
        assert list(found) == list(expected) == layers
        allowed = (
            _deviations(name, models.path(name), architectures.random_ids(tokens, seed))
            if dtype == "float32"
            else None
        )
        for layer, record in expected.items():
            other = found[layer]
            activations = np.asarray(other.features["features"].activations)
            assert activations.shape == (tokens, 32)
            assert np.isfinite(activations).all()
            if allowed:
                exact = record.features["features"].activations
                rounding.assert_close(activations, exact, allowed["blocks"])
            if record.attention is None:
                assert other.attention is None
                continue
            batched = np.asarray(other.attention)
            assert batched.shape == (4, tokens, tokens)
            assert (batched[:, ~np.tri(tokens, dtype=bool)] == 0).all()
            if allowed:
                rounding.assert_close(batched, record.attention, allowed["attention"])
            _assert_computed(batched, [call for call in calls if call.layer == layer], name)
        rows = [r for r in together if isinstance(r, TokensRecord) and r.scenario == f"s{seed}"]
        assert [r.next_token.shape for r in rows] == [(tokens, 10)]


def _assert_computed(stored: np.ndarray, calls: list[numerics.AttentionCall], name: str) -> None:
    """One sequence of one call made the stored weights, as float64 makes them of its queries."""
    tokens = stored.shape[-1]
    made = [
        (call, sequence)
        for call in calls
        if call.weights is not None
        for sequence, weights in enumerate(call.weights[..., :tokens, :tokens])
        if np.array_equal(weights.float().numpy(), stored)
    ]
    assert made
    call, sequence = made[0]
    exact = _exact(call, name, sequence, tokens)
    rounding.assert_close(stored, exact.weights, exact.weights_error)


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
    alone = extract_run(tmp_path / "alone", _options(path, suite, batch_size=1))
    together = extract_run(tmp_path / "together", _options(path, suite, batch_size=2))
    assert verify(together) == []
    for scenario in ("short", "longer"):
        a, b = open_trace(alone / scenario), open_trace(together / scenario)
        assert dict(a.sizes) == dict(b.sizes)
        for name, coordinate in a.coords.items():
            assert np.array_equal(b[name], coordinate)
        allowed = _deviations("Gemma 3", path, a.token_id.values)
        rounding.assert_close(b.attention, a.attention, allowed["attention"])
        rounding.assert_close(b.next_token_logprob, a.next_token_logprob, allowed["logprob"])
        ours, theirs = a.attrs, b.attrs
        own = {"stored", "seal"}
        assert {k: v for k, v in ours.items() if k not in own} == {
            k: v for k, v in theirs.items() if k not in own
        }
