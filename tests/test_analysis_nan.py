"""NaN that the model computed and NaN of layers that are not stored, in every analysis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic
import xarray as xr

import zarrtrace as zt
from zarrtrace import analysis
from zarrtrace.analysis.gaps import missing_layers
from zarrtrace.errors import ConfigError, IncompleteError
from zarrtrace.records import LayerRecord, TokensRecord
from zarrtrace.store import RunWriter
from zarrtrace.store.trace_writer import TraceWriter

ANALYSES: dict[str, Callable[[Any], Any]] = {
    "attention_to": lambda run: analysis.attention_to(run, ["balance", "goal"]),
    "attention_locality": lambda run: analysis.attention_locality(run, heads="each"),
    "head_roles": analysis.head_roles,
    "feature_trajectory": lambda run: analysis.feature_trajectory(run, [(2, 3), (2, 4), (1, 3)]),
    "pathway_features": lambda run: analysis.pathway_features(run, "balance"),
    "position_specific_features": lambda run: analysis.position_specific_features(run, ["balance"]),
    "word_associations": analysis.word_associations,
    "contrast": lambda run: analysis.contrast(run, "risky", "safe", n_permutations=9),
    "relate": lambda run: analysis.relate(
        analysis.decision(run)["entropy"], analysis.attention_to(run, "balance"), n_permutations=9
    ),
}


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return synthetic.random_run(6)


def with_cell(run: xr.DataTree, array: str, place: dict[str, int], value: float) -> xr.DataTree:
    """Return a run in which the model computed a value at one place of S0's layer 2."""
    ds = run["S0"].to_dataset()
    changed = ds[array].copy(deep=True)
    changed.loc[{"layer": 2, **place}] = value
    arrays = {array: changed}
    if array == "attention":
        arrays["attention_mean"] = changed.mean("head", skipna=False)
    attributes = {"nonfinite": dict.fromkeys(arrays, "2")}
    return synthetic.change(run, S0=ds.assign(arrays).assign_attrs(attributes))


def without_layer(run: xr.DataTree) -> xr.DataTree:
    return synthetic.change(run, S0=synthetic.without_layer(run["S0"].to_dataset(), 2))


@pytest.mark.parametrize("name", ANALYSES)
def test_results_say_which_of_both_it_is(run: xr.DataTree, name: str) -> None:
    attended = name in ("attention_to", "attention_locality", "head_roles", "relate")
    array, place = ("attention", {"query": 9}) if attended else ("features", {"query": 9})
    computed = ANALYSES[name](with_cell(run, array, place, np.nan)).attrs
    assert f"{array} of layer 2 in S0" in computed["nonfinite"]
    assert "missing" not in computed
    gone = ANALYSES[name](without_layer(run)).attrs
    assert gone["missing"] == "Not stored, and left out: layer 2 in S0."
    assert "nonfinite" not in gone
    assert not {"missing", "nonfinite"} & ANALYSES[name](run).attrs.keys()


def test_attention_to_one_place_does_not_spoil_another(run: xr.DataTree) -> None:
    odd = with_cell(run, "attention", {"head": 1, "query": 11, "key": 5}, np.inf)  # the goal's
    for data in (odd, synthetic.lazy(odd)):
        found = analysis.attention_to(data, ["balance", "goal"], heads="each").compute()
        expected = analysis.attention_to(run, ["balance", "goal"], heads="each")
        cell = {"scenario": "S0", "layer": 2, "source": "goal", "head": 1}
        assert np.isnan(found.sel(cell))
        expected.loc[cell] = np.nan
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("lazily", [False, True])
def test_locality_of_a_head_with_nan_is_nan(run: xr.DataTree, lazily: bool) -> None:
    odd = with_cell(run, "attention", {"head": 1, "query": 4}, np.nan)
    found = analysis.attention_locality(synthetic.lazy(odd) if lazily else odd).compute()
    expected = analysis.attention_locality(run)
    for name in expected:
        cell = {"scenario": "S0", "layer": 2, "head": 1}
        assert np.isnan(found[name].sel(cell))
        expected[name].loc[cell] = np.nan
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)


def test_roles_of_a_head_with_nan_are_nan(run: xr.DataTree) -> None:
    found = analysis.head_roles(with_cell(run, "attention", {"head": 1, "query": 4}, np.nan))
    expected = analysis.head_roles(run)
    assert np.isnan(found.sel(scenario="S0", layer=2, head=1)).all()
    expected.loc[{"scenario": "S0", "layer": 2, "head": 1}] = np.nan
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("through", [analysis.attention_rollout, analysis.attention_flow])
def test_a_flow_says_why_it_cannot(run: xr.DataTree, through: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="S0: attention of layer 2 holds NaN") as computed:
        through(with_cell(run, "attention", {"query": 4}, np.nan), "balance")
    assert "--allow-nonfinite" in str(computed.value)
    with pytest.raises(ConfigError, match="S0: attention of layer 2 is missing"):
        through(without_layer(run), "balance")


def test_a_trajectory_is_nan_at_its_feature_only(run: xr.DataTree) -> None:
    odd = with_cell(run, "features", {"query": 11, "feature": 3}, np.nan)
    found, expected = (ANALYSES["feature_trajectory"](data) for data in (odd, run))
    assert np.isnan(found.sel(scenario="S0")).to_numpy().tolist() == [True, False, False]
    np.testing.assert_array_equal(found.isel(scenario=slice(1, None)), expected[1:])


def test_pathways_count_features_that_are_nan(run: xr.DataTree) -> None:
    clean = analysis.pathway_features(run, "balance", top=24)
    best = int(clean["feature"].sel(scenario="S0", layer=2, rank=1))
    for query in (3, 11):  # of the source, and of the target
        odd = with_cell(run, "features", {"query": query, "feature": best}, np.nan)
        found = analysis.pathway_features(odd, "balance", top=24)
        assert int(found["features_nan"].sum()) == 1
        assert int(found["features_nan"].sel(scenario="S0", layer=2)) == 1
        own = found["feature"].sel(scenario="S0", layer=2)
        assert own[:-1].to_numpy().tolist() == clean["feature"].sel(own.coords)[1:].values.tolist()
    gone = analysis.pathway_features(without_layer(run), "balance")
    assert not gone["features_nan"].any()
    assert (gone["feature"].sel(scenario="S0", layer=2) == -1).all()


@pytest.mark.parametrize("cell", [{"query": 0, "feature": 0}, {"query": 3, "feature": 7}])
def test_position_specific_features_leave_out_the_token(
    run: xr.DataTree, cell: dict[str, int]
) -> None:
    """Against NumPy over the tokens that are left."""
    odd = with_cell(run, "features", cell, np.nan)
    found = analysis.position_specific_features(odd, ["balance"], top=24).sel(span="balance")
    rows, at = [], []
    for name, child in run.children.items():
        dense = child["features"].sel(layer=2).to_numpy() > 0
        kept = [q for q in range(len(dense)) if name != "S0" or q != cell["query"]]
        rows.append(dense[kept])
        at.append(np.isin(kept, child.attrs["spans"]["balance"]["tokens"]))
    fires, inside = np.concatenate(rows), np.concatenate(at)
    layer = found.sel(layer=2)
    known = layer["feature"].to_numpy()
    known = known[known >= 0]
    assert len(known) > 3
    np.testing.assert_allclose(layer["rate_at"][: len(known)], fires[inside].mean(0)[known])
    np.testing.assert_allclose(layer["rate_elsewhere"][: len(known)], fires[~inside].mean(0)[known])
    assert (int(layer["tokens_at"]), int(layer["tokens_nan"])) == (inside.sum(), 1)
    assert not found["tokens_nan"].sel(layer=[1, 3]).any()
    gone = analysis.position_specific_features(without_layer(run), ["balance"])
    assert not gone["tokens_nan"].any()
    assert gone["tokens_at"].sel(layer=2).item() == 2 * 5


def test_relate_leaves_the_scenario_out_and_counts(run: xr.DataTree) -> None:
    found = ANALYSES["relate"](with_cell(run, "attention", {"query": 11}, np.nan))
    assert found["n_scenarios"].to_numpy().tolist() == [6, 5, 6]


def test_a_decision_without_finite_probabilities(run: xr.DataTree) -> None:
    ds = run["S0"].to_dataset()
    odd = ds.assign(next_token_logprob=ds["next_token_logprob"] * np.nan)
    odd = odd.assign_attrs(nonfinite={"next_token_logprob": ""})
    found = analysis.decision(synthetic.change(run, S0=odd))
    assert "next_token_logprob in S0" in found.attrs["nonfinite"]
    for name in ("probability", "upper_bound", "entropy", "remainder"):
        assert np.isnan(found[name].sel(scenario="S0")).all()
    assert not np.isnan(found["upper_bound"].sel(scenario="S1")).any()  # there not stored is known


@pytest.mark.parametrize("at", ["all", "decision"])
def test_tables_of_traces_keep_the_difference(run: xr.DataTree, at: str) -> None:
    odd = with_cell(run, "features", {"query": 11, "feature": 3}, np.nan)
    both = synthetic.change(odd, S1=synthetic.without_layer(run["S1"].to_dataset(), 3))
    found = analysis.feature_trajectory(zt.table(both, at), [(2, 3), (3, 3)])
    assert "features of layer 2 in S0" in found.attrs["nonfinite"]
    assert found.attrs["missing"] == "Not stored, and left out: layer 3 in S1."
    np.testing.assert_array_equal(found, analysis.feature_trajectory(both, [(2, 3), (3, 3)]))


def test_a_staged_trace_tells_both(tmp_path: Path) -> None:
    """Layer 1 holds NaN that was computed, layers 2 and 3 are still to come."""
    plan = fakes.make_plan("Safe_1")
    layer_1, tokens = (
        next(one for one in fakes.make_records("Safe_1") if isinstance(one, kind))
        for kind in (LayerRecord, TokensRecord)
    )
    attention = np.array(layer_1.attention)
    attention[0, 0, 0] = np.nan
    with RunWriter(tmp_path / "run", ["Safe_1"], fakes.CONFIG) as writer:
        trace = TraceWriter(writer.path, plan, allow_nonfinite=True)
        trace.append(replace(layer_1, attention=attention, attention_mean=attention.mean(0)))
        trace.append(tokens)
        with pytest.raises(IncompleteError):
            trace.finish()
    run = zt.open_run(tmp_path / "run", missing="nan")
    ds = run["Safe_1"].to_dataset()
    assert ds.attrs["missing_layers"] == "2-3"
    assert ds.attrs["nonfinite"] == {"attention": "1"}
    assert missing_layers(ds) == {2, 3}
    found = analysis.attention_to(run, "balance")
    assert found.attrs["missing"] == "Not stored, and left out: layers 2-3 in Safe_1."
    assert "attention of layer 1 in Safe_1" in found.attrs["nonfinite"]
    assert np.isnan(found).sel(scenario="Safe_1").to_numpy().tolist() == [False, True, True]
