"""Where attention goes: against plain NumPy loops, lazily, and where something is missing."""

from __future__ import annotations

import re
from typing import Any

import dask
import fakes
import numpy as np
import planted
import pytest
import synthetic
import xarray as xr
from everyday import mostly_long

from zarrtrace import analysis
from zarrtrace.analysis.findings import with_findings
from zarrtrace.analysis.traces import tags, traces
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.store import open_run

IDS = [0, 7, 3, 7, 7, 3, 2, 7, 9, 3, *range(20, 38)]


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return planted.make_run(planted.SCENARIOS[:3], token_ids=IDS)


def trace_of(run: xr.DataTree, name: str = "Risky_0") -> xr.Dataset:
    return run[name].to_dataset()


# --- between spans -----------------------------------------------------------------------------


def test_attention_to_is_the_mean_of_the_pathway(run):
    found = analysis.attention_to(run, "balance")
    assert found.dims == ("scenario", "layer")
    for name in planted.SCENARIOS[:3]:
        whole = trace_of(run, name).attention.values
        for i, layer in enumerate(planted.LAYERS):
            total = 0.0
            for head in range(planted.HEADS):
                for key in planted.SPANS["balance"]:
                    total += float(whole[i, head, -1, key])
            expected = total / planted.HEADS / len(planted.SPANS["balance"])
            assert float(found.sel(scenario=name, layer=layer)) == pytest.approx(expected)


def test_attention_to_pairs_of_places_and_every_head(run):
    sources, targets = ["goal", "choices", -3], ["balance", "decision"]
    found = analysis.attention_to(run, sources, targets, heads="each", reduce="sum")
    assert found.dims == ("scenario", "source", "target", "layer", "head")
    assert found.source.values.tolist() == ["goal", "choices", "-3"]
    whole = trace_of(run, "Risky_2").attention.values.astype(np.float64)
    keys = {"goal": [9, 10], "choices": [20, 21], "-3": [25]}
    queries = {"balance": [14, 15, 16], "decision": [27]}
    for source, target in [(s, t) for s in keys for t in queries]:
        block = whole[:, :, queries[target]][..., keys[source]]
        np.testing.assert_allclose(
            found.sel(scenario="Risky_2", source=source, target=target),
            block.sum(-1).mean(-1),
        )
    assert (found.sel(source="choices", target="balance") == 0).all()  # it comes later


def test_attention_to_every_span_by_default(run):
    found = analysis.attention_to(trace_of(run))
    assert found.dims == ("source", "layer")
    assert found.source.values.tolist() == ["probability", "goal", "balance", "choices"]
    assert found.scenario.item() == "Risky_0"
    assert found.attrs["analysis"] == "attention_to"
    assert found.attrs["model"] == "fake/model"


def test_float16_is_summed_in_double_precision():
    ds = planted.make_trace(dtype="float16")
    expected = ds.attention.values[:, :, 20:, 4:6].astype(np.float64).mean((-1, -2))
    found = analysis.attention_to(ds, "probability", list(range(20, 28)), heads="each")
    np.testing.assert_allclose(found, expected)


# --- near or far -------------------------------------------------------------------------------


def locality_by_hand(attention: np.ndarray, window: int, exclude_first: bool) -> dict[str, float]:
    """The four measures of one ``(query, key)`` matrix, row by row."""
    rows: dict[str, list[float]] = {name: [] for name in ("distance", "entropy", "near", "first")}
    for query in range(1, len(attention)):
        row = attention[query].astype(np.float64)
        rows["first"].append(row[0] / row.sum())
        if exclude_first:
            row[0] = 0
        row = row / row.sum()
        rows["distance"].append(sum(p * (query - key) for key, p in enumerate(row)))
        rows["entropy"].append(-sum(p * np.log(p) for p in row if p > 0))
        # Where no key that is left in lies outside the window, the share would be 1.
        if query - window > (1 if exclude_first else 0):
            rows["near"].append(row[query - window : query + 1].sum())
    return {name: float(np.mean(values)) for name, values in rows.items()}


@pytest.mark.parametrize("exclude_first", [False, True])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_attention_locality_row_by_row(run, heads, exclude_first):
    found = analysis.attention_locality(run, heads=heads, window=3, exclude_first=exclude_first)
    ds = trace_of(run, "Risky_1")
    whole = ds.attention_mean.values[:, None] if heads == "mean" else ds.attention.values
    one = found.sel(scenario="Risky_1")
    for i, layer in enumerate(planted.LAYERS):
        for head in range(whole.shape[1]):
            by_hand = locality_by_hand(whole[i, head], 3, exclude_first)
            here = one.sel(layer=layer) if heads == "mean" else one.sel(layer=layer, head=head)
            for name, short in (("distance",) * 2, ("entropy",) * 2, ("window_share", "near"),
                                ("first_share", "first")):  # fmt: skip
                assert float(here[name]) == pytest.approx(by_hand[short]), name


@pytest.mark.parametrize("exclude_first", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, planted.TOKENS - 3, planted.TOKENS - 2])
def test_uniform_attention_is_as_local_as_the_window_is_wide(window, exclude_first):
    # Every key gets the same weight: the share is the number of keys inside over that of all keys.
    ones = np.tril(np.ones((planted.TOKENS, planted.TOKENS), np.float32))
    ds = planted.make_trace()
    ds["attention_mean"] = ds.attention_mean.copy(data=np.broadcast_to(ones, (6, *ones.shape)))
    found = analysis.attention_locality(
        ds, heads="mean", window=window, exclude_first=exclude_first
    ).window_share
    keys = np.arange(1, planted.TOKENS) if exclude_first else np.arange(planted.TOKENS)
    shares = [
        np.mean(query - keys[keys <= query] <= window)
        for query in range(1, planted.TOKENS)
        if (query - keys > window).any()
    ]
    assert max(shares, default=0) < 1
    np.testing.assert_allclose(found, np.mean(shares) if shares else np.nan)


def test_locality_finds_a_local_layer_and_a_sink():
    sink = planted.attend(range(planted.TOKENS), [0], [4], by=6)
    ds = planted.make_trace(plants=[planted.attend_near([2], by=4), sink])
    found = analysis.attention_locality(ds, heads="mean")
    assert found.window_share.idxmax("layer") == 2
    assert found.distance.idxmin("layer") == 2
    assert found.first_share.idxmax("layer") == 4
    assert found.entropy.idxmin("layer") == 4


def test_rows_that_do_not_sum_to_one_are_normalised(run):
    ds = trace_of(run)
    found = analysis.attention_locality(ds)
    xr.testing.assert_allclose(
        found, analysis.attention_locality(ds.assign(attention=ds.attention * 0.25))
    )


# --- what heads do -----------------------------------------------------------------------------


def roles_by_hand(attention: np.ndarray, ids: list[int]) -> dict[str, float]:
    previous, first, duplicate, induction = [], [], [], []
    for query in range(len(ids)):
        row = attention[query].astype(np.float64)
        if query:
            previous.append(row[query - 1])
            first.append(row[0])
        copies = [key for key in range(query) if ids[key] == ids[query]]
        if copies:
            duplicate.append(sum(row[key] for key in copies))
        after = [key + 1 for key in copies if key + 1 < query]
        if after:
            induction.append(sum(row[key] for key in after))
    means = [float(np.mean(rows)) for rows in (previous, first, duplicate, induction)]
    names = ("previous_token", "first_token", "duplicate_token", "induction")
    return dict(zip(names, means, strict=True))


def test_head_roles_query_by_query(run):
    found = analysis.head_roles(run)
    whole = trace_of(run).attention.values
    for i, layer in enumerate(planted.LAYERS):
        for head in range(planted.HEADS):
            for role, expected in roles_by_hand(whole[i, head], IDS).items():
                score = found.sel(scenario="Risky_0", role=role, layer=layer, head=head)
                assert float(score) == pytest.approx(expected), role


def test_head_roles_find_planted_heads():
    ids = list(range(14)) * 2

    def plant(layer: int, scores: np.ndarray) -> None:
        at = np.arange(28)
        scores[0, at[1:], at[1:] - 1] += 8  # the token before
        scores[1, :, 0] += 8
        scores[2, at[14:], at[14:] - 14] += 8  # the earlier copy
        scores[3, at[14:], at[14:] - 13] += 8  # what came after the earlier copy

    found = analysis.head_roles(planted.make_trace(plants=[plant], token_ids=ids))
    best = found.mean("layer").argmax("head")
    assert dict(zip(found.role.values.tolist(), best.values.tolist(), strict=True)) == {
        "previous_token": 0,
        "first_token": 1,
        "duplicate_token": 2,
        "induction": 3,
    }
    assert float(found.max("head").min()) > 0.8


def test_head_roles_without_repeated_tokens():
    found = analysis.head_roles(planted.make_trace())
    assert found.sel(role=["duplicate_token", "induction"]).isnull().all()
    assert found.sel(role=["previous_token", "first_token"]).notnull().all()


# --- lazily, and no more than needed -----------------------------------------------------------

LAZY: dict[str, Any] = {
    "attention_to": analysis.attention_to,
    "attention_to_each": lambda data: analysis.attention_to(data, "goal", heads="each"),
    "attention_locality": analysis.attention_locality,
    "head_roles": analysis.head_roles,
    "attention_rollout": analysis.attention_rollout,
    "attention_flow": lambda data: analysis.attention_flow(data, "balance"),
}


@pytest.mark.parametrize(
    ("name", "chunks"),
    mostly_long(
        lambda name, chunks: name == "attention_to" or "key" in chunks,
        LAZY,
        [{}, {"query": 9}, {"query": 10, "key": 13}],
    ),
)
def test_lazy_equals_eager(run, name, chunks):
    function = LAZY[name]
    eager = function(run)
    with planted.nothing_computed():
        lazy = function(planted.chunked(run, **chunks))
    assert all(
        array.chunks is not None
        for array in (lazy.data_vars.values() if isinstance(lazy, xr.Dataset) else [lazy])
    )
    assert "findings" not in lazy.attrs
    computed = with_findings(lazy.compute(scheduler="synchronous"))
    xr.testing.assert_allclose(computed, eager)
    # Sums in another order differ in digits that a sentence does not show.
    assert computed.attrs == eager.attrs


def test_the_proof_of_laziness_can_fail(run):
    with planted.nothing_computed(), pytest.raises(AssertionError, match="computed"):
        analysis.attention_to(planted.chunked(run)).compute()


def test_a_pathway_reads_only_its_row(run):
    ds, counters = planted.counting(trace_of(run))
    analysis.attention_to(ds, "balance").sel(layer=3).compute(scheduler="synchronous")
    assert counters["attention"].read == 0
    assert counters["attention_mean"].read <= planted.TOKENS  # of one layer, the decision's row
    analysis.attention_to(ds, heads="each").compute(scheduler="synchronous")
    assert counters["attention"].read <= len(planted.LAYERS) * planted.HEADS * planted.TOKENS


@pytest.mark.parametrize("name", ["attention_locality", "head_roles"])
def test_every_value_is_read_once(run, name):
    ds, counters = planted.counting(trace_of(run))
    LAZY[name](ds).compute(scheduler="synchronous")
    # Heads have no role at the first token.
    rows = planted.TOKENS - (name == "head_roles")
    assert counters["attention"].read == ds.attention.size // planted.TOKENS * rows
    assert counters["attention_mean"].read == 0


def test_only_the_chunks_that_are_needed_are_read(shared_run, chunk_reads):
    run = open_run(shared_run.path, chunks={"layer": 1})
    chunk_reads.clear()
    found = analysis.attention_to(run, "balance").sel(layer=2)
    assert not chunk_reads.below(shared_run.path)
    with dask.config.set(scheduler="synchronous"):
        found.load()
    wanted = {f"{name}/attention_mean/1.0.0": 1 for name in run.children}
    assert chunk_reads.below(shared_run.path) == wanted
    truth = shared_run.truth["Safe_1"]["attention_mean"][1, -1, [1, 2]].mean(dtype=float)
    assert float(found.sel(scenario="Safe_1")) == pytest.approx(float(truth))


# --- where something is missing ----------------------------------------------------------------


def test_missing_layers_and_lengths_and_spans():
    short = {"goal": (3, 4), "balance": (6,)}
    run = planted.make_run(
        planted.SCENARIOS[:3],
        changes={
            "Risky_0": {"missing": [3]},
            "Risky_1": {"layers": (1, 2, 4)},
            "Risky_2": {"tokens": 12, "spans": short},
        },
    )
    found = analysis.attention_to(run)
    gaps = {
        (s, p, n)
        for s in found.scenario.values.tolist()
        for p in found.source.values.tolist()
        for n in found.layer.values.tolist()
        if np.isnan(found.sel(scenario=s, source=p, layer=n))
    }
    spans, layers = set(found.source.values.tolist()), planted.LAYERS
    assert gaps == (
        {("Risky_0", p, 3) for p in spans}
        | {("Risky_1", p, n) for p in spans for n in (3, 5, 6)}
        | {("Risky_2", p, n) for p in ("probability", "choices") for n in layers}
    )
    locality = analysis.attention_locality(run)
    assert locality.distance.sel(scenario="Risky_0", layer=3).isnull().all()
    assert locality.distance.sel(scenario="Risky_2").notnull().all()
    roles = analysis.head_roles(run).sel(role="first_token")
    assert roles.sel(scenario="Risky_0", layer=3).isnull().all()
    only = analysis.attention_to(run, "choices")
    assert only.scenario.values.tolist() == list(planted.SCENARIOS[:3])
    assert only.sel(scenario="Risky_2").isnull().all()


def test_the_sentence_counts_scenarios_that_have_the_span(run):
    names = [*run.children]
    data = planted.as_run({name: trace_of(run, name) for name in names})
    for name in names[1:]:
        spans = data[name].attrs["spans"]
        data[name].attrs["spans"] = {one: of for one, of in spans.items() if one != "goal"}
    said = analysis.attention_to(data, ["goal", "balance"]).attrs["findings"]
    assert re.search(rf"to goal in layer \d+ \([^)]*, in 1 of {len(names)} scenarios\)", said)
    assert re.search(rf"to balance in layer \d+ \([^)]*over {len(names)} scenarios\)", said)
    alone = analysis.attention_to(data, ["goal"]).attrs["findings"]
    assert alone.endswith(f"a token), in 1 of {len(names)} scenarios.")


def test_a_span_that_no_scenario_has(run):
    with pytest.raises(ScenarioError, match=r"(?s)no scenario has a span 'blance'.*balance"):
        analysis.attention_to(run, "blance")
    with pytest.raises(ScenarioError, match="which is not there"):
        analysis.attention_to(run, 999)


@pytest.mark.parametrize("name", LAZY)
def test_features_only_traces_are_refused_by_name(name):
    ds = synthetic.trace("Mute", heads=None, spans={"balance": [2], "goal": [3]})
    with pytest.raises(ConfigError, match=r"(?s)Mute: the trace has no 'attention.*--no-attention"):
        LAZY[name](ds)


def test_chosen_queries():
    ds = planted.make_trace()
    partial = synthetic.with_queries(ds, [16, 27])
    xr.testing.assert_allclose(analysis.attention_to(partial), analysis.attention_to(ds))
    with pytest.raises(ConfigError, match="attention of token 14 is not stored"):
        analysis.attention_to(partial, "goal", "balance")
    with pytest.raises(ConfigError, match="not stored"):
        analysis.attention_rollout(partial)
    row = ds.attention_mean.values[0].astype(np.float64)
    distance = np.mean([sum(row[q] * (q - np.arange(28))) / row[q].sum() for q in (16, 27)])
    found = analysis.attention_locality(partial, heads="mean")
    assert float(found.distance.sel(layer=1)) == pytest.approx(distance)
    assert analysis.head_roles(partial).sel(role="previous_token").notnull().all()


def test_layers_without_attention_have_none():
    ds = planted.make_trace(layers=(1, 2, 3))
    own = {"layer": "attention_layer"}
    separate = ds.assign(
        attention=ds.attention.isel(layer=[0, 2]).rename(own),
        attention_mean=ds.attention_mean.isel(layer=[0, 2]).rename(own),
    )
    found = analysis.attention_to(separate, heads="each")
    assert found.layer.values.tolist() == [1, 3]
    xr.testing.assert_allclose(found, analysis.attention_to(ds, heads="each").sel(layer=[1, 3]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ds: analysis.attention_to(ds, heads="all"), "neither 'mean' nor 'each'"),
        (lambda ds: analysis.attention_to(ds, "goal", reduce="max"), "neither 'mean' nor 'sum'"),
        (lambda ds: analysis.attention_to(ds, []), "from nothing or to nothing"),
        (lambda ds: analysis.attention_locality(ds, window=-1), "negative"),
        (lambda ds: analysis.attention_to(ds.drop_attrs()), "not a trace"),
        (lambda ds: analysis.head_roles(ds.drop_vars("token_id")), "no token ids"),
        (lambda ds: traces(xr.DataTree.from_dict({"/a": xr.Dataset()})), "no traces"),
    ],
)
def test_requests_that_make_no_sense(call, message):
    with pytest.raises(ConfigError, match=message):
        call(planted.make_trace())


def test_traces_of_a_run_and_of_a_node(run):
    assert list(traces(run)) == list(planted.SCENARIOS[:3])
    assert list(traces(run["Risky_1"])) == ["Risky_1"]
    node = analysis.attention_to(run["Risky_1"], "goal")
    xr.testing.assert_identical(node, analysis.attention_to(trace_of(run, "Risky_1"), "goal"))
    assert fakes.make_trace_attributes("x").tags == tags(
        trace_of(planted.as_run({"Safe_0": planted.make_trace("Safe_0")}), "Safe_0")
    )


@pytest.mark.parametrize("name", LAZY)
def test_results_can_be_saved(run, name, tmp_path):
    found = LAZY[name](run)
    found.to_netcdf(tmp_path / "out.nc", engine="scipy")
    back = xr.load_dataset(tmp_path / "out.nc", engine="scipy")
    again = found if isinstance(found, xr.Dataset) else found.to_dataset()
    xr.testing.assert_allclose(back, again)
