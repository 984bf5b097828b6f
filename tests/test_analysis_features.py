"""Features along layers, on pathways and at spans, against plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pandas as pd
import pytest
import rounding
import synthetic
import xarray as xr
from chunk_reads import ChunkReads
from click.testing import CliRunner

from zarrtrace.analysis.attention import attention_to
from zarrtrace.analysis.features import feature_trajectory, of_sae
from zarrtrace.analysis.findings import with_findings
from zarrtrace.analysis.pathways import pathway_features
from zarrtrace.analysis.specificity import position_specific_features
from zarrtrace.analysis.words import word_associations
from zarrtrace.cli import group
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.store import open_run


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return synthetic.random_run()


def spans_of(ds: xr.Dataset) -> dict[str, list[int]]:
    return {name: span["tokens"] for name, span in ds.attrs["spans"].items()}


def shared(run: xr.DataTree) -> xr.DataTree:
    """Return a run whose layers share one SAE."""
    return synthetic.run(
        [
            child.to_dataset().assign_coords(sae_id=("layer", ["one"] * child.sizes["layer"]))
            for child in run.children.values()
        ]
    )


class TestTrajectory:
    def test_one_feature_at_the_last_token(self, run: xr.DataTree) -> None:
        found = feature_trajectory(run, (2, 14))
        assert found.dims == ("scenario",)
        assert (int(found["layer"]), int(found["feature"])) == (2, 14)
        for name, child in run.children.items():
            expected = child["features"].to_numpy()[1, -1, 14]
            np.testing.assert_array_equal(found.sel(scenario=name), expected)

    def test_many_features_and_places(self, run: xr.DataTree) -> None:
        pairs = [(3, 14), (1, 3), (3, 0), (2, 3), (1, 3)]
        found = feature_trajectory(run, pairs, at=["balance", "decision", -2])
        assert found.dims == ("scenario", "place", "pair")
        assert list(zip(found["layer"].values, found["feature"].values, strict=True)) == pairs
        for name, child in run.children.items():
            dense = child["features"].to_numpy()
            cells = np.stack([dense[layer - 1, :, f] for layer, f in pairs], axis=-1)
            mean = cells[[3, 4]].mean(0, dtype=np.float64)
            error = rounding.rounding("float32", 2, mean)
            rounding.assert_close(found.sel(scenario=name, place="balance"), mean, error)
            np.testing.assert_array_equal(found.sel(scenario=name, place="-2"), cells[-2])

    def test_an_index_alone_needs_one_sae_of_all_layers(self, run: xr.DataTree) -> None:
        with pytest.raises(ConfigError, match="feature 3 of which layer") as caught:
            feature_trajectory(run, 3)
        assert "unrelated" in str(caught.value)
        assert "(3, 3)" in str(caught.value)
        unlike = run["S0"].to_dataset().assign_coords(sae_id=("layer", ["a", "b", "c"]))
        with pytest.raises(ConfigError, match="of which layer"):
            feature_trajectory(unlike, [3])
        found = feature_trajectory(shared(run), [3, 5])
        assert set(found["dictionary"].to_numpy().tolist()) == {"one"}
        expected = run["S1"]["features"].to_numpy()[:, -1, [3, 5]]
        np.testing.assert_array_equal(found.sel(scenario="S1"), expected.T.ravel())

    def test_fingerprints_tell_saes_of_one_name_apart(self, run: xr.DataTree) -> None:
        ds = shared(run)["S0"].to_dataset()
        same = ds.assign_coords(sae_fingerprint=("layer", ["f", "f", "f"]))
        assert feature_trajectory(same, 3).sizes == {"pair": 3}
        with pytest.raises(ConfigError, match="of which layer"):
            feature_trajectory(ds.assign_coords(sae_fingerprint=("layer", ["f", "g", "f"])), 3)

    def test_a_trace_keeps_each_token_with_its_text(self, run: xr.DataTree) -> None:
        ds = run["S0"].to_dataset()
        found = feature_trajectory(ds, [(2, 1), (1, 2)], at="balance", reduce="none")
        assert found.dims == ("query", "pair")
        assert found["query_token"].to_numpy().tolist() == [" $", "90"]
        dense = ds["features"].to_numpy()[:, 3:5]
        np.testing.assert_array_equal(found, np.stack([dense[1, :, 1], dense[0, :, 2]], axis=1))

    def test_maximum_over_a_span(self, run: xr.DataTree) -> None:
        ds = run["S0"].to_dataset()
        found = feature_trajectory(ds, (3, 5), at="balance", reduce="max")
        np.testing.assert_array_equal(found, ds["features"].to_numpy()[2, 3:5, 5].max())

    def test_lazy_equals_eager_and_computes_nothing(self, run: xr.DataTree) -> None:
        asked = [(1, 1), (3, 2)], ["balance", "goal"]
        found = feature_trajectory(synthetic.lazy(run), *asked)
        assert found.chunks is not None
        assert "findings" not in found.attrs
        expected = feature_trajectory(run, *asked)
        xr.testing.assert_identical(with_findings(found.compute()), expected)

    def test_a_scenario_without_the_span_or_a_layer_is_nan(self, run: xr.DataTree) -> None:
        changed = synthetic.change(
            run,
            S1=synthetic.without_span(run["S1"].to_dataset(), "goal"),
            S2=synthetic.without_layer(run["S2"].to_dataset(), 2),
            S3=run["S3"].to_dataset().sel(layer=[1, 2]),
        )
        found = feature_trajectory(changed, [(n, 4) for n in (1, 2, 3)], at="goal")
        assert np.isnan(found.sel(scenario="S1")).all()
        assert np.isnan(found.sel(scenario="S2")).to_numpy().tolist() == [False, True, False]
        assert np.isnan(found.sel(scenario="S3")).to_numpy().tolist() == [False, False, True]
        assert not np.isnan(found.sel(scenario="S0")).any()

    def test_the_sentence_counts_scenarios_that_have_a_value(self, run: xr.DataTree) -> None:
        names = [*run.children]
        lack = {name: synthetic.without_span(run[name].to_dataset(), "goal") for name in names[1:]}
        goal = run[names[0]]["features"][0, spans_of(run[names[0]])["goal"]]
        feature = int(np.argmax(abs(goal.to_numpy()).max(0)))
        found = feature_trajectory(synthetic.change(run, **lack), (1, feature), at="goal")
        said = found.attrs["findings"]
        assert said.startswith(f"Activation, in 1 of {len(names)} scenarios: feature 1:{feature} ")
        assert said.endswith(" (active in 1 of 1 scenarios).")
        assert "mean over" not in said

    def test_a_layer_without_sae_is_not_silent(self, tmp_path: Path) -> None:
        made = fakes.make_run(tmp_path, without_sae=(2,), active=0.9)
        found = feature_trajectory(open_run(made.path), [(1, 3), (2, 3)])
        assert "feature 2:3 not known, because layer 2 has no SAE." in found.attrs["findings"]
        assert "silent" not in found.attrs["findings"]

    @pytest.mark.parametrize("reduce", ["mean", "max", "none"])
    def test_float16_stores_give_float32(self, tmp_path: Path, reduce: Any) -> None:
        made = fakes.make_run(tmp_path, feature_dtype="float16", active=0.9)
        run = open_run(made.path)
        found = feature_trajectory(run, [(1, 3), (2, 5)], at="balance", reduce=reduce)
        assert found.dtype == np.float32
        lazy = feature_trajectory(
            open_run(made.path, chunks={}), [(1, 3), (2, 5)], at="balance", reduce=reduce
        )
        assert lazy.dtype == lazy.compute().dtype == np.float32
        if reduce == "mean":
            ds = run["Safe_1"].to_dataset()
            values = ds["features"].to_numpy()[0, spans_of(ds)["balance"], 3]
            exact = values.mean(dtype=np.float64).astype(np.float32)
            np.testing.assert_allclose(found.sel(scenario="Safe_1")[0], exact, rtol=1e-6)

    @pytest.mark.parametrize(
        ("features", "at", "error", "message"),
        [
            ((1, 24), "decision", ConfigError, "no feature 24"),
            ((4, 1), "decision", ConfigError, "no layer 4"),
            ([], "decision", ConfigError, "no features were given"),
            ((1, 0), "nowhere", ScenarioError, "nowhere"),
            ((1, 0), 99, ScenarioError, "99"),
        ],
    )
    def test_refusals(
        self, run: xr.DataTree, features: Any, at: str | int, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            feature_trajectory(run, features, at=at)

    def test_each_token_of_several_places_is_refused(self, run: xr.DataTree) -> None:
        with pytest.raises(ConfigError, match="one place"):
            feature_trajectory(run, (1, 0), at=["balance", "goal"], reduce="none")

    def test_a_run_without_features_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match="S0: the trace has no 'features'"):
            feature_trajectory(synthetic.random_run(2, features=None), (1, 0))

    def test_results_say_where_they_come_from(self, run: xr.DataTree, tmp_path: Path) -> None:
        found = feature_trajectory(run, [(1, 1)], at=["balance", "goal"])
        assert found.attrs["analysis"] == "feature_trajectory"
        assert found.attrs["model"] == "fake/model"
        assert '"features": [[1, 1]]' in found.attrs["parameters"]
        found.to_netcdf(tmp_path / "out.nc", engine="scipy")


def pathway_by_hand(ds: xr.Dataset, source: list[int], target: list[int], top: int) -> list[dict]:
    dense, attention = (ds[name].to_numpy().astype(float) for name in ("features", "attention"))
    out = []
    for layer in range(len(dense)):
        mean = attention[layer].mean(0)
        scores = {}
        for f in range(dense.shape[-1]):
            if dense[layer, target, f].max() > 0:
                scores[f] = np.mean(
                    [sum(mean[q, k] * dense[layer, k, f] for k in source) for q in target]
                )
        best = sorted((f for f in scores if scores[f] > 0), key=lambda f: (-scores[f], f))
        out.append({f: scores[f] for f in best[:top]})
    return out


class TestPathway:
    @pytest.mark.parametrize("target", ["decision", "goal"])
    def test_against_loops(self, run: xr.DataTree, target: str) -> None:
        found = pathway_features(run, "balance", target, top=4)
        assert found["score"].dims == ("scenario", "layer", "rank")
        for name, child in run.children.items():
            ds = child.to_dataset()
            spans = spans_of(ds)
            expected = pathway_by_hand(ds, spans["balance"], spans[target], 4)
            for layer, by_feature in enumerate(expected):
                row = found.sel(scenario=name).isel(layer=layer)
                n = len(by_feature)
                assert row["feature"].to_numpy()[:n].tolist() == list(by_feature)
                assert (row["feature"].to_numpy()[n:] == -1).all()
                np.testing.assert_allclose(row["score"][:n], list(by_feature.values()))
                assert np.isnan(row["score"][n:]).all()

    def test_layers_without_attention_have_no_pathway(self, run: xr.DataTree) -> None:
        ds = next(iter(run.children.values())).to_dataset()
        own = {"layer": "attention_layer"}
        names = ("attention", "attention_mean")
        hybrid = ds.assign({name: ds[name].isel(layer=[0, 2]).rename(own) for name in names})
        expected = pathway_features(ds, "balance").isel(layer=[0, 2])
        for data in (hybrid, hybrid.chunk(layer=1, attention_layer=1)):
            found = pathway_features(data, "balance").compute()
            xr.testing.assert_allclose(found.drop_attrs(), expected.drop_attrs())

    def test_a_planted_pathway_comes_first(self) -> None:
        ds = synthetic.trace("S", seed=4)
        ds["features"][1, [3, 4, 11], 7] = 50
        found = pathway_features(synthetic.with_index(ds), "balance", top=3)
        assert found["feature"].isel(layer=1, rank=0) == 7
        np.testing.assert_allclose(found["source_activation"].isel(layer=1, rank=0), 50)
        np.testing.assert_allclose(found["target_activation"].isel(layer=1, rank=0), 50)

    def test_lazy_equals_eager(self, run: xr.DataTree) -> None:
        found = pathway_features(synthetic.lazy(run), "balance")
        assert all(variable.chunks for variable in found.data_vars.values())
        xr.testing.assert_identical(
            with_findings(found.compute()), pathway_features(run, "balance")
        )

    def test_scenarios_without_the_span_are_empty(self, run: xr.DataTree) -> None:
        changed = synthetic.change(
            run,
            S1=synthetic.without_span(run["S1"].to_dataset(), "balance"),
            S2=synthetic.without_layer(run["S2"].to_dataset(), 2),
        )
        found = pathway_features(changed, "balance")
        assert (found["feature"].sel(scenario="S1") == -1).all()
        assert (found["feature"].sel(scenario="S2", layer=2) == -1).all()
        assert (found["feature"].sel(scenario="S2", layer=1)[0] >= 0).all()

    @pytest.mark.parametrize(("lacking", "name"), [("heads", "attention_mean"), ("features",) * 2])
    def test_needs_both_halves(self, lacking: str, name: str) -> None:
        with pytest.raises(ConfigError, match=f"no '{name}'"):
            pathway_features(synthetic.random_run(2, **{lacking: None}), "balance")

    def test_chosen_queries(self, run: xr.DataTree) -> None:
        ds = run["S0"].to_dataset()
        chosen = synthetic.with_queries(ds, [2, 11])
        xr.testing.assert_identical(
            pathway_features(chosen, "balance").drop_attrs(),
            pathway_features(ds, "balance").drop_attrs(),
        )
        with pytest.raises(ConfigError, match="S0: attention of token 5 is not stored"):
            pathway_features(chosen, "balance", "goal")

    def test_top_is_at_least_one(self, run: xr.DataTree) -> None:
        with pytest.raises(ConfigError, match="top=0"):
            pathway_features(run, "balance", top=0)


class TestPositionSpecific:
    def test_against_loops(self, run: xr.DataTree) -> None:
        found = position_specific_features(run, ["balance", "decision"], threshold=0.5, top=24)
        for span in ("balance", "decision"):
            at, elsewhere = [], []
            for child in run.children.values():
                dense = child["features"].to_numpy() > 0.5
                tokens = spans_of(child.to_dataset())[span]
                at.append(dense[:, tokens])
                elsewhere.append(np.delete(dense, tokens, axis=1))
            inside, outside = np.concatenate(at, 1), np.concatenate(elsewhere, 1)
            score = inside.mean(1) - outside.mean(1)
            recall, total = inside.mean(1), inside.sum(1) + outside.sum(1)
            for layer in range(3):
                row = found.sel(span=span).isel(layer=layer)
                kept = row["feature"].to_numpy()
                kept = kept[kept >= 0]
                assert len(kept) == (score[layer] > 1e-12).sum()
                n = len(kept)
                np.testing.assert_allclose(row["score"][:n], np.sort(score[layer])[::-1][:n])
                np.testing.assert_allclose(row["rate_at"][:n], recall[layer, kept])
                np.testing.assert_allclose(
                    row["precision"][:n], inside.sum(1)[layer, kept] / total[layer, kept]
                )
                times = sum(block[layer][:, kept].any(0).astype(int) for block in at)
                np.testing.assert_array_equal(row["scenarios"][:n], times)

    def test_a_planted_feature_comes_first(self, run: xr.DataTree) -> None:
        traces = []
        for child in run.children.values():
            ds = child.to_dataset().copy(deep=True)
            ds["features"][2, :, 9] = 0
            ds["features"][2, [3, 4], 9] = 1
            traces.append(ds)
        best = position_specific_features(synthetic.run(traces)).sel(
            span="balance", layer=3, rank=1
        )
        assert (best["feature"], best["score"], best["precision"]) == (9, 1, 1)
        assert best["scenarios"] == 6

    def test_lazy_equals_eager(self, run: xr.DataTree) -> None:
        xr.testing.assert_identical(
            position_specific_features(synthetic.lazy(run)), position_specific_features(run)
        )

    def test_what_is_missing_counts_nowhere(self, run: xr.DataTree) -> None:
        rest = synthetic.run([child.to_dataset() for child in list(run.children.values())[1:]])
        absent = synthetic.change(run, S0=synthetic.without_span(run["S0"].to_dataset(), "balance"))
        xr.testing.assert_equal(
            position_specific_features(absent, ["balance"]),
            position_specific_features(rest, ["balance"]),
        )
        gap = synthetic.change(run, S0=synthetic.without_layer(run["S0"].to_dataset(), 2))
        xr.testing.assert_equal(
            position_specific_features(gap, ["balance"]).sel(layer=2),
            position_specific_features(rest, ["balance"]).sel(layer=2),
        )
        fewer = synthetic.change(run, S0=run["S0"].to_dataset().sel(layer=[1, 3]))
        xr.testing.assert_equal(
            position_specific_features(fewer, ["balance"]),
            position_specific_features(gap, ["balance"]),
        )

    def test_repeats_can_be_asked_for(self, run: xr.DataTree) -> None:
        found = position_specific_features(run, ["decision"], min_scenarios=4)
        assert (found["scenarios"].where(found["feature"] >= 0, 4) >= 4).all()

    def test_attention_only_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="attention only"):
            position_specific_features(synthetic.random_run(2, features=None))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    return fakes.make_run(
        tmp_path_factory.mktemp("two"),
        scenarios=["Safe_1", "Safe_2"],
        features={"features": 16, "features_mlp_out": 24},
        active=0.5,
    )


class TestSeveralSAEs:
    """Layers with several SAEs: the analyses of any of them."""

    @pytest.mark.parametrize("chunks", [None, "auto"])
    def test_the_other_ones_features_take_their_place(
        self, two: fakes.FakeRun, chunk_reads: ChunkReads, chunks: Any
    ) -> None:
        run = open_run(two.path, chunks=chunks)
        chunk_reads.clear()
        other = of_sae(run, "mlp_out")
        assert not chunk_reads.below(two.path)
        found = feature_trajectory(other, (2, 23)).load()
        assert chunk_reads.arrays(two.path) == {"features_mlp_out"}
        for name in run.children:
            expected = two.truth[name]["features_mlp_out"][1, -1, 23]
            np.testing.assert_array_equal(found.sel(scenario=name), expected)
        words = word_associations(other)
        assert int(words["feature"].max()) > 15
        with pytest.raises(ConfigError, match="no feature 23"):
            feature_trajectory(run, (2, 23))

    def test_a_trace_and_a_node(self, two: fakes.FakeRun) -> None:
        run = open_run(two.path)
        expected = two.truth["Safe_1"]["features_mlp_out"]
        for trace in (run["Safe_1"], run["Safe_1"].to_dataset()):
            found = of_sae(trace, "mlp_out")
            assert type(found) is type(trace)
            np.testing.assert_array_equal(found["features"], expected)
            assert pathway_features(found, "balance")["feature"].max() < 24

    def test_one_that_is_not_there(self, two: fakes.FakeRun) -> None:
        with pytest.raises(ConfigError, match="no 'features_z'") as caught:
            of_sae(open_run(two.path), "z")
        assert caught.value.remedy == "Names there are: mlp_out."

    def test_the_command(self, two: fakes.FakeRun, tmp_path: Path) -> None:
        command = ["analyze", "feature-trajectory", str(two.path)]
        command += [part for n in (1, 2, 3) for part in ("--feature", f"{n}:23")]
        file = tmp_path / "out.csv"
        done = CliRunner().invoke(group, [*command, "--sae", "mlp_out", "-o", str(file)])
        assert done.exit_code == 0, done.output
        frame = pd.read_csv(file).sort_values(["scenario", "layer"])
        expected = [two.truth[n]["features_mlp_out"][:, -1, 23] for n in sorted(two.truth)]
        written = frame["activation"].to_numpy().astype(np.float32)
        np.testing.assert_array_equal(written, np.concatenate(expected))
        assert "no feature 23" in str(CliRunner().invoke(group, command).exception)


class TestReadsOnlyWhatItNeeds:
    """The chunks that are read are counted."""

    @pytest.mark.parametrize("chunks", [None, {"layer": 1}])
    def test_one_layer_of_a_trajectory(
        self, shared_run: fakes.FakeRun, chunk_reads: ChunkReads, chunks: Any
    ) -> None:
        run = open_run(shared_run.path, chunks=chunks)
        chunk_reads.clear()
        found = feature_trajectory(run["Safe_1"].to_dataset().sel(layer=slice(2, 2)), (2, 3))
        if chunks:
            assert not chunk_reads.below(shared_run.path)
        found.load()
        assert chunk_reads.below(shared_run.path) == {"Safe_1/features/1.0.0": 1}

    def test_pathways_leave_the_attention_of_heads_alone(
        self, shared_run: fakes.FakeRun, chunk_reads: ChunkReads
    ) -> None:
        run = open_run(shared_run.path, chunks="auto")
        chunk_reads.clear()
        pathway_features(run, "balance").load()
        assert chunk_reads.arrays(shared_run.path) == {"features", "attention_mean", "sae_id"}


def test_indexes_know_their_labels_before_threads_ask(
    run: xr.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()
    ask: Any = pd.Index.get_indexer
    indexes = [index for child in run.children.values() for index in child.indexes.values()]

    def get_indexer(index: Any, *arguments: Any, **settings: Any) -> Any:
        asked.add(id(index))
        return ask(index, *arguments, **settings)

    def all_together(calls: Iterable[Callable[[], Any]]) -> list[Any]:
        assert {id(index) for index in indexes} <= asked
        return [call() for call in calls]

    monkeypatch.setattr(pd.Index, "get_indexer", get_indexer)
    monkeypatch.setattr("zarrtrace.analysis.results.all_together", all_together)
    attention_to(run, "balance")
