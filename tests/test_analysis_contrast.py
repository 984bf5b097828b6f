"""Groups of scenarios, against SciPy and statsmodels one test at a time."""

from __future__ import annotations

import math
from itertools import combinations

import fakes
import numpy as np
import pytest
import synthetic
import xarray as xr
from chunk_reads import ChunkReads
from scipy import stats

from zarrtrace.analysis import resampling
from zarrtrace.analysis.contrasts import contrast
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.store import open_run


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return synthetic.random_run(10)


def planted(run: xr.DataTree, *, layer: int = 1, feature: int = 5) -> xr.DataTree:
    """Return the run with a feature that fires at the decision of risky scenarios only."""
    rng = np.random.default_rng(0)
    traces = []
    for child in run.children.values():
        ds = child.to_dataset().copy(deep=True)
        risky = "risky" in ds.attrs["tags"]
        ds["features"][layer, -1, feature] = 10 + rng.random() if risky else rng.random()
        traces.append(synthetic.with_index(ds))
    return synthetic.run(traces)


def difference(a: np.ndarray, b: np.ndarray, axis: int = 0) -> np.ndarray:
    return a.mean(axis) - b.mean(axis)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)
    steps = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1)
    return q


class TestFeatures:
    def test_every_statistic_against_scipy(self, run: xr.DataTree) -> None:
        found = contrast(run, "risky", "safe", "balance")
        dense = np.stack(
            [
                child["features"].to_numpy()[:, 3:5].astype(float).mean(1)
                for child in run.children.values()
            ]
        )
        a, b = dense[:5], dense[5:]
        frame = found.to_dataframe()
        assert len(frame) == (dense > 0).any(0).sum()
        for row in frame.sample(25, random_state=0).itertuples():
            x, y = a[:, row.layer - 1, row.feature], b[:, row.layer - 1, row.feature]
            expected = stats.permutation_test((x, y), difference, n_resamples=np.inf)
            # SciPy doubles the smaller tail; groups of one size make both tails alike.
            assert row.p_permutation == pytest.approx(expected.pvalue)
            pooled = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
            assert row.cohens_d == pytest.approx((x.mean() - y.mean()) / pooled)
            welch = stats.ttest_ind(x, y, equal_var=False)
            assert (row.t, row.p_welch) == pytest.approx((welch.statistic, welch.pvalue))
            assert row.difference == pytest.approx(row.mean_a - row.mean_b)
            assert (row.mean_a, row.mean_b) == pytest.approx((x.mean(), y.mean()))
            assert (row.n_a, row.n_b) == (5, 5)
        np.testing.assert_allclose(
            frame["q_permutation"], benjamini_hochberg(frame["p_permutation"].to_numpy())
        )
        np.testing.assert_allclose(
            frame["q_welch"], benjamini_hochberg(frame["p_welch"].to_numpy())
        )

    def test_familywise_against_loops(self, run: xr.DataTree) -> None:
        found = contrast(run, "risky", "safe")
        columns = np.stack(
            [
                child["features"].to_numpy()[:, -1].astype(float).ravel()
                for child in run.children.values()
            ]
        )
        columns = columns[:, (columns > 0).any(0)]
        largest = []
        for members in combinations(range(10), 5):
            rest = [i for i in range(10) if i not in members]
            t = stats.ttest_ind(columns[list(members)], columns[rest], axis=0).statistic
            largest.append(np.abs(t).max())
        for row in found.to_dataframe().head(10).itertuples():
            dense = np.stack([c["features"].to_numpy()[:, -1] for c in run.children.values()])
            x = dense[:, row.layer - 1, row.feature].astype(float)
            t = abs(stats.ttest_ind(x[:5], x[5:]).statistic)
            expected = np.mean(np.array(largest) >= t * (1 - 1e-9))
            assert row.p_familywise == pytest.approx(expected)

    def test_a_planted_feature_comes_first(self, run: xr.DataTree) -> None:
        first = contrast(planted(run), "risky", "safe").isel(row=0)
        assert (first["layer"], first["feature"], first["place"]) == (2, 5, "decision")
        assert first["cohens_d"] > 10
        assert first["p_permutation"] == pytest.approx(2 / 252)
        assert first["p_familywise"] == pytest.approx(2 / 252)

    def test_limits_of_small_groups_are_stated(self, run: xr.DataTree) -> None:
        found = contrast(run, "risky", "safe")
        n = found.sizes["row"]
        assert found.attrs["smallest_p"] == pytest.approx(2 / math.comb(10, 5))
        assert found["p_permutation"].min() >= found.attrs["smallest_p"] - 1e-12
        assert found.attrs["n_tests"] == n
        assert found.attrs["smallest_q_alone"] == pytest.approx(min(1, n * 2 / 252))
        needed = found.attrs["needed_at_smallest_p"]
        least = found.attrs["smallest_p"]
        assert benjamini_hochberg(np.array([least] * needed + [1.0] * (n - needed)))[0] <= 0.05
        if needed > 1:
            fewer = np.array([least] * (needed - 1) + [1.0] * (n - needed + 1))
            assert benjamini_hochberg(fewer)[0] > 0.05
        assert "all 252" in found.attrs["limits"]

    def test_unequal_groups_reach_one_grouping(self, run: xr.DataTree) -> None:
        found = contrast(run, ["S0", "S1"], ["S3", "S4", "S5"])
        assert found.attrs["smallest_p"] == pytest.approx(1 / 10)

    def test_many_scenarios_draw_permutations(self) -> None:
        run = synthetic.random_run(24, layers=(1,), features=8)
        kwargs = {"n_permutations": 999, "seed": 3}
        found = contrast(run, "risky", "safe", **kwargs)
        assert found.attrs["permutations"] == "999 drawn"
        assert found.attrs["smallest_p"] == pytest.approx(1 / 1000)
        xr.testing.assert_identical(found, contrast(run, "risky", "safe", **kwargs))
        for row in found.to_dataframe().itertuples():
            x = np.array(
                [c["features"].to_numpy()[0, -1, row.feature] for c in run.children.values()]
            )
            expected = stats.permutation_test(
                (x[:12], x[12:]), difference, n_resamples=4000, rng=np.random.default_rng(1)
            )
            assert row.p_permutation == pytest.approx(expected.pvalue, abs=0.06)

    def test_a_feature_that_splits_without_variance(self) -> None:
        traces = []
        for i in range(6):
            ds = synthetic.trace(f"S{i}", tags=("risky",) if i < 3 else ("safe",))
            ds["features"][:] = 0
            ds["features"][:, -1, 2] = 1 if i < 3 else 0
            traces.append(synthetic.with_index(ds))
        found = contrast(synthetic.run(traces), "risky", "safe")
        assert found["feature"].to_numpy().tolist() == [2, 2, 2]
        assert np.isposinf(found["cohens_d"]).all()
        assert np.isnan(found["t"]).all()
        assert np.isnan(found["q_welch"]).all()
        np.testing.assert_allclose(found["p_permutation"], 2 / 20)

    def test_only_features_active_often_enough_are_tested(self, run: xr.DataTree) -> None:
        dense = np.stack([c["features"].to_numpy()[:, -1] for c in run.children.values()])
        found = contrast(run, "risky", "safe", min_scenarios=4)
        assert found.attrs["n_tests"] == ((dense > 0).sum(0) >= 4).sum()

    def test_lazy_equals_eager(self, run: xr.DataTree) -> None:
        at = ["balance", "decision"]
        xr.testing.assert_identical(
            contrast(synthetic.lazy(run), "risky", "safe", at), contrast(run, "risky", "safe", at)
        )

    def test_missing_spans_and_layers_leave_scenarios_out(self, run: xr.DataTree) -> None:
        changed = synthetic.change(
            run,
            S0=synthetic.without_layer(run["S0"].to_dataset(), 2),
            S1=synthetic.without_span(run["S1"].to_dataset(), "goal"),
            S6=run["S6"].to_dataset().sel(layer=[1, 2]),
        )
        found = contrast(changed, "risky", "safe", ["goal"]).to_dataframe()
        sizes = found.groupby("layer")[["n_a", "n_b"]].agg(["min", "max"])
        assert sizes.loc[1].tolist() == [4, 4, 5, 5]
        assert sizes.loc[2].tolist() == [3, 3, 5, 5]
        assert sizes.loc[3].tolist() == [4, 4, 4, 4]

    def test_layers_with_too_few_are_named(self, run: xr.DataTree) -> None:
        gaps = {f"S{i}": synthetic.without_layer(run[f"S{i}"].to_dataset(), 2) for i in range(4)}
        found = contrast(synthetic.change(run, **gaps), "risky", "safe")
        assert found.attrs["not_tested"] == "layer 2 at decision"
        assert 2 not in found["layer"]


class TestAttention:
    def test_against_scipy(self, run: xr.DataTree) -> None:
        found = contrast(run, "risky", "safe", what="attention")
        assert found["cohens_d"].dims == ("source", "layer")
        assert found["source"].to_numpy().tolist() == ["balance", "goal"]
        values = np.stack(
            [
                c["attention"].to_numpy()[:, :, -1, 3:5].mean((1, 2), dtype=float)
                for c in run.children.values()
            ]
        )
        for layer in range(3):
            row = found.sel(source="balance").isel(layer=layer)
            x, y = values[:5, layer], values[5:, layer]
            assert float(row["t"]) == pytest.approx(
                stats.ttest_ind(x, y, equal_var=False).statistic
            )
            expected = stats.permutation_test((x, y), difference, n_resamples=np.inf)
            assert float(row["p_permutation"]) == pytest.approx(expected.pvalue)

    def test_by_head(self, run: xr.DataTree) -> None:
        found = contrast(run, "risky", "safe", "goal", what="attention", heads="each", target=-2)
        assert found["t"].dims == ("source", "layer", "head")
        x = np.array([c["attention"].to_numpy()[2, 1, -2, 5] for c in run.children.values()])
        expected = stats.ttest_ind(x[:5].astype(float), x[5:].astype(float), equal_var=False)
        assert float(found["t"].isel(source=0, layer=2, head=1)) == pytest.approx(
            expected.statistic
        )

    def test_a_planted_head_is_found(self, run: xr.DataTree) -> None:
        traces = []
        for i, child in enumerate(run.children.values()):
            ds = child.to_dataset().copy(deep=True)
            ds["attention"][1, 1, -1, 3:5] = 0.3 + 0.01 * i if i < 5 else 0.01 * i
            traces.append(ds)
        found = contrast(synthetic.run(traces), "risky", "safe", what="attention", heads="each")
        best = found["cohens_d"].argmax(...)
        assert [int(best[d]) for d in ("source", "layer", "head")] == [0, 1, 1]
        assert found["p_familywise"].isel(best) == pytest.approx(2 / 252)

    def test_lazy_equals_eager(self, run: xr.DataTree) -> None:
        xr.testing.assert_allclose(
            contrast(synthetic.lazy(run), "risky", "safe", what="attention"),
            contrast(run, "risky", "safe", what="attention"),
        )

    def test_what_is_missing(self, run: xr.DataTree) -> None:
        gaps = {
            f"S{i}": synthetic.without_span(run[f"S{i}"].to_dataset(), "goal") for i in range(4)
        }
        gaps["S9"] = synthetic.without_layer(run["S9"].to_dataset(), 2)
        found = contrast(synthetic.change(run, **gaps), "risky", "safe", what="attention")
        assert np.isnan(found["p_permutation"].sel(source="goal")).all()
        assert found["n_b"].sel(source="balance").to_numpy().tolist() == [5, 4, 5]
        assert "layer 1 to goal" in found.attrs["not_tested"]
        assert "balance" not in found.attrs["not_tested"]

    def test_chosen_queries(self, run: xr.DataTree) -> None:
        last = {name: [child.sizes["query"] - 1] for name, child in run.children.items()}
        chosen = synthetic.run(
            [synthetic.with_queries(run[name].to_dataset(), rows) for name, rows in last.items()]
        )
        xr.testing.assert_identical(
            contrast(chosen, "risky", "safe", what="attention"),
            contrast(run, "risky", "safe", what="attention"),
        )
        with pytest.raises(ConfigError, match="S0: attention of token 5 is not stored"):
            contrast(chosen, "risky", "safe", what="attention", target="goal")


class TestNoise:
    """Nothing is there: p-values must be as large as they claim."""

    def test_p_values_keep_their_level(self) -> None:
        rng = np.random.default_rng(7)
        in_a = np.arange(10) < 5
        found = resampling.two_groups(rng.normal(size=(10, 20_000)), in_a)
        for level in (0.05, 0.2):
            assert (found.p_permutation <= level).mean() <= level * 1.1
            assert (found.p_welch <= level).mean() <= level * 1.1

    def test_corrections_keep_their_level_over_runs(self) -> None:
        rng = np.random.default_rng(11)
        in_a = np.arange(12) < 6
        runs, false_q, false_family = 200, 0, 0
        for _ in range(runs):
            # Sparse like features: mostly zero, long tail.
            values = rng.exponential(2, (12, 60)) * (rng.random((12, 60)) < 0.5)
            found = resampling.two_groups(values, in_a)
            false_q += (resampling.corrected(found.p_permutation) <= 0.05).any()
            family = resampling.familywise(found.standardised, found.extreme)
            false_family += (family <= 0.05).any()
        bound = stats.binom.ppf(0.999, runs, 0.05)
        assert false_q <= bound
        assert false_family <= bound

    def test_a_noise_run_shows_nothing(self, run: xr.DataTree) -> None:
        found = contrast(run, "risky", "safe")
        assert (found["q_permutation"] > 0.05).all()
        assert (found["p_familywise"] > 0.05).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("a", "b", "message"),
        [
            ("riskyy", "safe", "no scenario has the tag 'riskyy'"),
            (["S0", "S99"], "safe", "no scenario 'S99'"),
            (["S0", "S5"], "safe", "'S5' is in both groups"),
            (["S0"], "safe", "group A has 1 scenario"),
        ],
    )
    def test_groups(self, run: xr.DataTree, a: str | list[str], b: str, message: str) -> None:
        with pytest.raises(ScenarioError, match=message):
            contrast(run, a, b)

    @pytest.mark.parametrize("what", ["features", "attention"])
    def test_absent_spans(self, run: xr.DataTree, what: str) -> None:
        with pytest.raises(ScenarioError, match="nowhere"):
            contrast(run, "risky", "safe", "nowhere", what=what)  # type: ignore[arg-type]

    def test_runs_of_the_other_half(self) -> None:
        with pytest.raises(ConfigError, match="S0: the trace has no 'features'"):
            contrast(synthetic.random_run(4, features=None), "risky", "safe")
        with pytest.raises(ConfigError, match="no 'attention_mean'"):
            contrast(synthetic.random_run(4, heads=None), "risky", "safe", what="attention")

    @pytest.mark.parametrize(("what", "at"), [("features", "goal"), ("attention", "goal")])
    def test_nothing_in_common(self, run: xr.DataTree, what: str, at: str) -> None:
        gaps = {
            f"S{i}": synthetic.without_span(run[f"S{i}"].to_dataset(), "goal") for i in range(4)
        }
        with pytest.raises(ScenarioError, match="nothing to compare"):
            contrast(synthetic.change(run, **gaps), "risky", "safe", at, what=what)  # type: ignore[arg-type]


def test_reads_one_array_only(
    tmp_path_factory: pytest.TempPathFactory, chunk_reads: ChunkReads
) -> None:
    path = fakes.make_run(
        tmp_path_factory.mktemp("contrast"), scenarios=["Safe_1", "Safe_2", "Risky_1", "Risky_2"]
    ).path
    run = open_run(path)
    for what, array in (("features", "features"), ("attention", "attention_mean")):
        chunk_reads.clear()
        contrast(run, "risky", "safe", what=what)  # type: ignore[arg-type]
        assert chunk_reads.arrays(path) == {array}


def test_correlations_against_scipy() -> None:
    rng = np.random.default_rng(2)
    outcome, values = rng.normal(size=6), rng.normal(size=(6, 3)).round(1)
    values[:, 2] = 1
    rho, p, least = resampling.correlations(outcome, values)
    assert least == pytest.approx(2 / 720)
    for column in range(2):
        found = stats.spearmanr(outcome, values[:, column])
        assert rho[column] == pytest.approx(found.statistic)
        exact = stats.permutation_test(
            (outcome,),
            lambda x, column=column: stats.spearmanr(x, values[:, column]).statistic,
            permutation_type="pairings",
            n_resamples=np.inf,
            vectorized=False,
        )
        # SciPy doubles the smaller tail; ours is the share of |rho| at least as large.
        inside = np.mean(np.abs(exact.null_distribution) >= abs(found.statistic) - 1e-9)
        assert p[column] == pytest.approx(inside)
    assert np.isnan(rho[2])
    assert np.isnan(p[2])
