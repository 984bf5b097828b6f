"""Rollout and flow, against matrix products and an independent maximum flow."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
import numpy as np
import planted
import pytest
import xarray as xr

from zarrtrace import analysis
from zarrtrace.errors import ConfigError

SPANS = {"goal": (2,), "balance": (4, 5)}


def residual(attention: np.ndarray, share: float) -> np.ndarray:
    mixed = share * np.eye(len(attention)) + (1 - share) * attention.astype(np.float64)
    return mixed / mixed.sum(1, keepdims=True)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_rollout_is_the_product_of_the_layers(share):
    ds = planted.make_trace()
    found = analysis.attention_rollout(ds, ["balance", "goal"], residual=share)
    product = np.eye(planted.TOKENS)
    for i, layer in enumerate(planted.LAYERS):
        product = residual(ds.attention_mean.values[i], share) @ product
        for span in ("balance", "goal"):
            expected = sum(product[-1, key] for key in planted.SPANS[span])
            assert float(found.sel(source=span, layer=layer)) == pytest.approx(expected)


def test_rollout_from_all_tokens_is_whole():
    found = analysis.attention_rollout(planted.make_trace(), list(range(planted.TOKENS)))
    np.testing.assert_allclose(found, 1)


def test_rollout_to_a_span_is_the_mean_over_its_tokens():
    ds = planted.make_trace()
    each = [analysis.attention_rollout(ds, "goal", t) for t in planted.SPANS["balance"]]
    together = analysis.attention_rollout(ds, "goal", "balance")
    np.testing.assert_allclose(together, np.mean(each, axis=0))


def maximum_flow(layers: list[np.ndarray], sources: Sequence[int], targets: Sequence[int]) -> float:
    """Return what can flow to one of the target's tokens, by networkx on real capacities."""
    graph = nx.DiGraph()
    graph.add_nodes_from(["source", "target"])
    for number, layer in enumerate(layers):
        for query, key in zip(*np.tril_indices(len(layer)), strict=True):
            graph.add_edge((number, key), (number + 1, query), capacity=float(layer[query, key]))
    graph.add_edges_from([("source", (0, token)) for token in sources])
    graph.add_edges_from([((len(layers), token), "target") for token in targets])
    return float(nx.maximum_flow_value(graph, "source", "target")) / len(targets)


@pytest.mark.parametrize(
    "target", [(7,), (5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7), (3, 4), (1,)], ids=str
)
def test_flow_is_the_maximum_flow(target):
    ds = planted.make_trace(tokens=8, spans={**SPANS, "first": (0,)}, layers=(3, 4, 5, 6))
    found = analysis.attention_flow(ds, ["goal", "balance", "first"], target)
    layers = [residual(matrix, 0.5) for matrix in ds.attention_mean.values]
    for top in range(1, 5):
        for span, tokens in {**SPANS, "first": (0,)}.items():
            assert float(found.sel(source=span).isel(layer=top - 1)) == pytest.approx(
                maximum_flow(layers[:top], tokens, target), abs=1e-6
            )


def test_one_token_feeds_many():
    """The first token gets most attention of all others: a target of twelve takes it in full."""
    weights = np.tril(np.full((24, 24), 0.02))
    weights[:, 0] = 1
    weights /= weights.sum(1, keepdims=True)
    ds = planted.make_trace(tokens=24, spans={"first": (0,), "long": tuple(range(12, 24))})
    ds["attention_mean"] = ds["attention_mean"].copy(
        data=np.broadcast_to(weights.astype(np.float32), ds["attention_mean"].shape)
    )
    found = analysis.attention_flow(ds, "first", "long")
    for top in (1, 2, 3):
        expected = maximum_flow([residual(weights, 0.5)] * top, [0], range(12, 24))
        assert float(found[top - 1]) == pytest.approx(expected, abs=1e-6)
    assert float(found[0]) == pytest.approx(weights[12:, 0].mean() / 2)


def test_flow_bounds_rollout_and_finds_the_pathway():
    pathway = planted.attend([planted.TOKENS - 1], planted.SPANS["balance"], [6], by=5)
    ds, noise = planted.make_trace(plants=[pathway]), planted.make_trace()
    rolled, flowed = analysis.attention_rollout(ds), analysis.attention_flow(ds)
    assert (flowed >= rolled - 1e-6).all()  # what rolls through is a flow
    assert (flowed <= 1 + 1e-6).all()
    gained = rolled - analysis.attention_rollout(noise)
    assert gained.sel(layer=6).idxmax("source") == "balance"
    assert float(gained.sel(layer=6, source="balance")) > 0.01
    assert float(abs(gained.sel(layer=slice(1, 5))).max()) == 0


def test_scenarios_without_a_span_or_with_other_lengths():
    run = planted.make_run(
        planted.SCENARIOS[:2], changes={"Risky_1": {"tokens": 8, "spans": SPANS}}
    )
    found = analysis.attention_rollout(run, ["balance", "choices"])
    assert found.sel(scenario="Risky_1", source="choices").isnull().all()
    assert found.sel(scenario="Risky_1", source="balance").notnull().all()
    alone = analysis.attention_rollout(run["Risky_1"].to_dataset(), "balance")
    np.testing.assert_allclose(found.sel(scenario="Risky_1", source="balance"), alone)


@pytest.mark.parametrize("function", [analysis.attention_rollout, analysis.attention_flow])
def test_gaps_are_refused_by_name(function):
    missing = planted.make_trace("Risky_7", missing=[3])
    with pytest.raises(ConfigError, match="Risky_7: attention of layer 3 is missing"):
        function(missing)
    with pytest.raises(ConfigError, match="Risky_7: attention of layer 3 is missing"):
        function(planted.chunked(missing)).compute(scheduler="synchronous")
    with pytest.raises(ConfigError, match="attention of layer 2 is missing"):
        function(planted.make_trace(layers=(1, 3)))
    with pytest.raises(ConfigError, match="attention of token 0 is not stored"):
        function(planted.make_trace().isel(query=slice(5, None)))
    with pytest.raises(ConfigError, match="not square"):
        function(planted.make_trace().isel(key=slice(5)))
    with pytest.raises(ConfigError, match="not within 0 to 1"):
        function(planted.make_trace(), residual=1.5)
    with pytest.raises(ConfigError, match="no source"):
        function(planted.make_trace(spans={}))


def test_too_large_a_graph_is_refused():
    layers, tokens = 31, 1200
    mean = np.broadcast_to(np.float32(1 / tokens), (layers, tokens, tokens))  # takes no memory
    ds = xr.Dataset(
        {"attention_mean": (("layer", "query", "key"), mean)},
        {"layer": range(layers), "query": range(tokens), "key": range(tokens)},
        planted.make_trace().attrs,
    )
    with pytest.raises(ConfigError, match=r"22,338,600 edges.*\n.*\n.*attention_rollout"):
        analysis.attention_flow(ds)


def test_rollout_holds_one_layer_at_a_time():
    ds, counters = planted.counting(planted.make_trace())
    analysis.attention_rollout(ds).isel(layer=1).compute(scheduler="synchronous")
    assert counters["attention_mean"].read == 2 * planted.TOKENS**2  # nothing above it
    assert counters["attention"].read == 0


def test_the_result_is_labelled():
    found = analysis.attention_flow(planted.make_trace(), "goal")
    assert isinstance(found, xr.DataArray)
    assert found.name == "flow"
    assert "Abnar" in found.attrs["method"]
