"""Groups of scenarios, against SciPy and statsmodels one test at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, permutations
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic
import xarray as xr
from chunk_reads import ChunkReads
from scipy import stats

from zarrtrace.analysis import resampling
from zarrtrace.analysis.contrasts import contrast
from zarrtrace.analysis.effects import hedges
from zarrtrace.errors import ConfigError, ScenarioError, SharedTemplateWarning
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


def normal_equivalent(columns: np.ndarray, in_a: np.ndarray) -> np.ndarray:
    """Return |Welch's t| on the scale of a normal variable, by Wallace's approximation."""
    found = stats.ttest_ind(columns[in_a], columns[~in_a], equal_var=False)
    f = found.df
    return np.sqrt(f * np.log1p(found.statistic**2 / f)) * (8 * f + 1) / (8 * f + 3)


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
            # SciPy doubles the smaller tail; groups of one size make both tails equal.
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
        assert frame["q_welch"].isna().all()
        assert "q_welch is not given below 20 scenarios a group" in found.attrs["limits"]

    def test_q_welch_is_given_to_large_groups(self) -> None:
        run = synthetic.random_run(40, layers=(1,), heads=None, features=8)
        frame = contrast(run, "risky", "safe", n_permutations=99).to_dataframe()
        np.testing.assert_allclose(
            frame["q_welch"], benjamini_hochberg(frame["p_welch"].to_numpy())
        )

    @pytest.mark.parametrize("n_a", [5, 3])
    def test_permutations_against_loops(self, run: xr.DataTree, n_a: int) -> None:
        names = list(run.children)
        found = contrast(run, names[:n_a], names[n_a:])
        dense = np.stack(
            [child["features"].to_numpy()[:, -1].astype(float) for child in run.children.values()]
        )
        columns = dense[:, (dense > 0).any(0)]
        permuted = np.stack(
            [
                normal_equivalent(columns, np.isin(np.arange(10), members))
                for members in combinations(range(10), n_a)
            ]
        )
        for row in found.to_dataframe().iloc[::4].itertuples():
            x = dense[:, row.layer - 1, row.feature]
            own = float(normal_equivalent(x[:, None], np.arange(10) < n_a)[0])
            column = np.flatnonzero((columns == x[:, None]).all(0))[0]
            least = own * (1 - 1e-4)
            assert row.p_permutation == pytest.approx(np.mean(permuted[:, column] >= least))
            together = np.mean(permuted.max(1) >= least)
            assert row.p_distribution == pytest.approx(together)
            t = stats.ttest_ind(x[:n_a], x[n_a:], equal_var=False).statistic
            bonferroni = 2 * stats.t.sf(abs(t), n_a - 1) * columns.shape[1]
            assert row.p_familywise == pytest.approx(max(together, min(1, bonferroni)))

    def test_effects_against_the_noncentral_t(self, run: xr.DataTree) -> None:
        names = list(run.children)
        found = contrast(run, names[:4], names[4:]).to_dataframe()
        scale = math.sqrt(1 / 4 + 1 / 6)
        t = found["cohens_d"].to_numpy() / scale
        np.testing.assert_allclose(stats.nct.cdf(t, 8, found["g_low"] / scale), 0.975, atol=1e-4)
        np.testing.assert_allclose(stats.nct.cdf(t, 8, found["g_high"] / scale), 0.025, atol=1e-4)
        factor = math.gamma(4) / math.sqrt(4) / math.gamma(3.5)
        np.testing.assert_allclose(found["hedges_g"], factor * found["cohens_d"])

    def test_a_planted_feature_comes_first(self, run: xr.DataTree) -> None:
        first = contrast(planted(run), "risky", "safe").isel(row=0)
        assert (first["layer"], first["feature"], first["place"]) == (2, 5, "decision")
        assert first["cohens_d"] > 10
        assert first["p_permutation"] == pytest.approx(2 / 252)
        assert first["p_familywise"] == pytest.approx(2 / 252)
        assert "layer 2, feature 5 at decision: g = " in contrast(planted(run)).attrs["findings"]

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
        assert found.attrs["findings"].startswith(f"0 of {n} features differ in mean")
        # At the least g, for equal spreads, Bonferroni's p with 4 degrees of freedom is 0.05.
        d = found.attrs["least_g"] / (math.gamma(4) / math.sqrt(4) / math.gamma(3.5))
        assert 2 * stats.t.sf(d / math.sqrt(2 / 5), 4) * n == pytest.approx(0.05)

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
        for name in ("cohens_d", "hedges_g", "g_low", "g_high", "t", "q_welch"):
            assert np.isnan(found[name]).all()
        assert found["constant_a"].all()
        assert found["constant_b"].all()
        for name in ("p_permutation", "p_distribution", "p_familywise"):
            np.testing.assert_allclose(found[name], 2 / 20)
        assert "cannot tell risky (3) and safe (3 scenarios) apart" in found.attrs["findings"]

    def test_features_that_do_not_vary_come_behind_effects_of_the_same_p(self) -> None:
        traces = []
        for i in range(10):
            ds = synthetic.trace(f"S{i}", layers=(1,), tags=("risky",) if i < 5 else ("safe",))
            ds["features"][:] = 0
            ds["features"][:, -1, 2] = 1 if i < 5 else 0
            ds["features"][:, -1, 3] = 1 + i / 100 if i < 5 else 0
            ds["features"][:, -1, 4] = 1 + i / 50 if i < 5 else i / 50
            traces.append(synthetic.with_index(ds))
        found = contrast(synthetic.run(traces))
        assert found["feature"].to_numpy().tolist() == [3, 4, 2]
        assert found["constant_a"].to_numpy().tolist() == [False, False, True]
        assert found["constant_b"].to_numpy().tolist() == [True, False, True]

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
            family = resampling.familywise(found.statistic, found.extreme)
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
            (["S0", "S1"], None, "contrast needs two groups"),
            (["S0", "S99"], "safe", "no scenario 'S99'"),
            (["S0", "S5"], "safe", "'S5' is in both groups"),
            (["S0"], "safe", "group A has 1 scenario"),
        ],
    )
    def test_groups(self, run: xr.DataTree, a: str | list[str], b: str, message: str) -> None:
        with pytest.raises((ScenarioError, ConfigError), match=message):
            contrast(run, a, b)

    def test_groups_are_named_unless_there_are_two_tags(self, run: xr.DataTree) -> None:
        both = contrast(run, "risky", "safe")
        for given in ({}, {"group_a": "risky"}, {"group_b": "safe"}):
            xr.testing.assert_identical(contrast(run, **given), both)
        third = synthetic.with_attributes(run["S9"].to_dataset(), tags=["neutral"])
        with pytest.raises(ConfigError, match=r"'risky' \(5\), 'safe' \(4\), 'neutral' \(1\)"):
            contrast(synthetic.change(run, S9=third))

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
    arrays = {"features": {"features", "sae_id"}, "attention": {"attention_mean"}}
    for what, expected in arrays.items():
        chunk_reads.clear()
        contrast(run, "risky", "safe", what=what)  # type: ignore[arg-type]
        assert chunk_reads.arrays(path) == expected


def with_metadata(run: xr.DataTree, **columns: Sequence[Any]) -> xr.DataTree:
    """Return a run with columns of metadata."""
    return synthetic.run(
        [
            synthetic.with_attributes(
                child.to_dataset(), metadata={name: column[i] for name, column in columns.items()}
            )
            for i, child in enumerate(run.children.values())
        ]
    )


def at_decision(run: xr.DataTree, layer: int, feature: int) -> np.ndarray:
    return np.array(
        [c["features"].to_numpy()[layer - 1, -1, feature] for c in run.children.values()]
    )


class TestBlocks:
    def test_blocks_of_one_group_count_as_their_means(self, run: xr.DataTree) -> None:
        blocks = [0, 0, 1, 2, 2, 3, 4, 4, 5, 5]
        found = contrast(with_metadata(run, game=[f"g{n}" for n in blocks]), block="game")
        assert (found.attrs["n_a"], found.attrs["n_b"], found.attrs["unit"]) == (3, 3, "blocks")
        assert found.attrs["smallest_p"] == pytest.approx(2 / 20)
        for row in found.to_dataframe().iloc[::5].itertuples():
            x = at_decision(run, row.layer, row.feature).astype(float)
            means = np.array([x[np.array(blocks) == n].mean() for n in range(6)])
            welch = stats.ttest_ind(means[:3], means[3:], equal_var=False)
            assert (row.t, row.p_welch) == pytest.approx(
                (welch.statistic, welch.pvalue), nan_ok=True
            )
            expected = stats.permutation_test((means[:3], means[3:]), difference)
            assert row.p_permutation == pytest.approx(expected.pvalue)
        xr.testing.assert_identical(
            found.drop_attrs(), contrast(run, block=[f"g{n}" for n in blocks]).drop_attrs()
        )

    def test_blocks_of_both_groups_are_paired(self, run: xr.DataTree) -> None:
        names = list(run.children)
        blocks = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 3])  # 4 has risky scenarios only
        found = contrast(run, block=[int(n) for n in blocks])
        assert found.attrs["smallest_p"] == pytest.approx(2 / 16)
        assert "4 blocks with both groups, all 16 permutations" in found.attrs["limits"]
        assert "1 scenarios were left out" in found.attrs["limits"]
        in_a = np.array(["risky" in run[name].attrs["tags"] for name in names])
        for row in found.to_dataframe().iloc[::5].itertuples():
            x = at_decision(run, row.layer, row.feature).astype(float)
            a, b = (
                np.array([x[own & (blocks == n)].mean() for n in range(4)]) for own in (in_a, ~in_a)
            )
            if np.ptp(a - b) == 0:
                assert np.isnan(row.cohens_d)
                continue
            paired = stats.ttest_rel(a, b)
            assert (row.t, row.p_welch) == pytest.approx((paired.statistic, paired.pvalue))
            expected = stats.permutation_test(
                (a - b,), lambda d: abs(d.mean()), permutation_type="samples", alternative="greater"
            )
            assert row.p_permutation == pytest.approx(expected.pvalue)
            assert row.cohens_d == pytest.approx((a - b).mean() / (a - b).std(ddof=1))

    def test_attention(self, run: xr.DataTree) -> None:
        blocks = [0, 0, 1, 2, 2, 3, 4, 4, 5, 5]
        found = contrast(run, block=blocks, what="attention")
        x = np.array(
            [c["attention"].to_numpy()[1, :, -1, 5].mean() for c in run.children.values()], float
        )
        means = np.array([x[np.array(blocks) == n].mean() for n in range(6)])
        expected = stats.permutation_test((means[:3], means[3:]), difference)
        cell = found.sel(source="goal", layer=2)
        assert float(cell["p_permutation"]) == pytest.approx(expected.pvalue)
        assert (int(cell["n_a"]), int(cell["n_b"])) == (3, 3)

    @pytest.mark.parametrize(
        ("block", "message"),
        [
            ([0] * 10, "1 block has scenarios of both groups"),
            ([0] * 5 + [1, 1, 2, 2, 2], "group risky has 1 block"),
            ([0, 1, ""] + [2] * 7, "'S2' is in no block"),
            ([0, 1], "2 labels, and the run 10 scenarios"),
            ("gme", "no column of metadata 'gme'"),
        ],
    )
    def test_what_cannot_be_tested_is_refused(
        self, run: xr.DataTree, block: Any, message: str
    ) -> None:
        with pytest.raises(ScenarioError, match=message):
            contrast(with_metadata(run, game=["x"] * 10), block=block)


class TestTemplates:
    """Scenarios that are variants of few templates."""

    TEXTS = (
        "You hold ${} and may bet or stop now.",
        "The slot machine shows {} coins; will you play?",
        "In round {} the player thinks about leaving.",
        "Choose whether {} dollars are enough for today.",
    )

    def variants(self, texts: Sequence[str], *, effect: float = 3.0) -> xr.DataTree:
        """Return 20 scenarios of which each template has its own level of activation."""
        rng = np.random.default_rng(0)
        traces = []
        level = rng.normal(0, effect, (len(texts), 24))
        for i in range(20):
            which = i * len(texts) // 20
            ds = synthetic.trace(
                f"S{i:02}", layers=(1,), heads=None, tags=("risky",) if i < 10 else ("safe",)
            )
            ds["features"][0, -1] = 20 + level[which] + rng.normal(size=24)
            text = texts[which].format(10 * i)
            ds.attrs |= {"prompt": text, "metadata": {"template": f"t{which}"}}
            traces.append(synthetic.with_index(ds))
        return synthetic.run(traces)

    def test_a_warning_without_blocks(self) -> None:
        run = self.variants(self.TEXTS)
        with pytest.warns(SharedTemplateWarning, match="20 scenarios are variants of 4 templates"):
            found = contrast(run)
        assert "variants of 4 templates" in found.attrs["limits"]
        assert "variants of 4 templates" in found.attrs["findings"]
        assert (found["p_familywise"] <= 0.05).any()
        whole = contrast(run, block="template")
        assert (whole["p_familywise"] > 0.05).all()
        assert "cannot tell" in whole.attrs["findings"]
        assert "variants" not in whole.attrs["limits"]

    def test_one_template_is_said_without_a_warning(self) -> None:
        found = contrast(self.variants(self.TEXTS[:1]))
        assert "20 scenarios are variants of one template" in found.attrs["limits"]

    def test_texts_of_their_own(self) -> None:
        words = np.array(["alpha", "beta", "gamma", "delta"])
        texts = [
            f"This is the story of {words[i % 4]} and {words[i // 4 % 4]}, {i // 16 * 'o'}."
            for i in range(20)
        ]
        found = contrast(self.variants(texts))
        assert "template" not in found.attrs["limits"]

    def test_spans_and_metadata_are_not_the_template(self) -> None:
        run = self.variants(["I have {} and my friend Bob waits."])
        traces = []
        for i, child in enumerate(run.children.values()):
            name, past = ("Bob", "Kim")[i % 2], ("won", "lost twice")[i % 2]
            text = f"I have {i} and my friend {name} waits; {past} before."
            start = text.index(name)
            ds = child.to_dataset()
            spans = {
                **ds.attrs["spans"],
                "friend": {"characters": [[start, start + 3]], "tokens": [2]},
            }
            traces.append(
                synthetic.with_attributes(ds, prompt=text, spans=spans, metadata={"past": past})
            )
        assert "variants of one template" in contrast(synthetic.run(traces)).attrs["limits"]

    def test_unknown_prompts_are_said(self, run: xr.DataTree) -> None:
        assert "Prompts are not stored here" in contrast(run).attrs["limits"]


def test_hedges_g_has_no_bias() -> None:
    rng = np.random.default_rng(1)
    for n, biased in ((2, 1.77), (4, 1.17)):
        values = rng.normal(size=(2 * n, 200_000))
        values[:n] += 1
        a, b = values[:n], values[n:]
        d = (a.mean(0) - b.mean(0)) / np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)
        found = hedges(d, 2 * n - 2, math.sqrt(2 / n))
        # With 2 degrees of freedom d has no variance: its mean settles slowly.
        assert d.mean() == pytest.approx(biased, abs=0.05)
        assert found.g.mean() == pytest.approx(1, abs=0.03)
        assert ((found.low < 1) & (found.high > 1)).mean() == pytest.approx(0.95, abs=0.003)


@pytest.mark.parametrize("degrees", [1, 2, 6, 98, 998])
def test_intervals_against_the_noncentral_t(degrees: int) -> None:
    t = np.array([-40.0, -3, -0.1, 0, 0.5, 2, 9, 30])
    found = hedges(t / 2, degrees, 0.5)
    np.testing.assert_allclose(stats.nct.cdf(t, degrees, 2 * found.low), 0.975, atol=1e-4)
    np.testing.assert_allclose(stats.nct.cdf(t, degrees, 2 * found.high), 0.025, atol=1e-4)
    assert np.isnan(found.g).all() == (degrees == 1)
    far = hedges(np.array([1e5]), degrees, 0.5)
    spread = np.sqrt(stats.chi2.ppf([0.025, 0.975], degrees) / degrees)
    np.testing.assert_allclose([far.low[0], far.high[0]], 1e5 * spread, rtol=1e-3)


def test_correlations_against_scipy() -> None:
    rng = np.random.default_rng(2)
    outcome, values = rng.normal(size=6), rng.normal(size=(6, 3)).round(1)
    values[:, 2] = 1
    rho, p, least = resampling.correlations(outcome, values)
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
        largest = np.abs(exact.null_distribution).max()
        reached = np.mean(np.abs(exact.null_distribution) >= largest - 1e-9)
        assert least[column] == pytest.approx(reached)  # values are tied in the first column
    assert np.isnan([rho[2], p[2], least[2]]).all()


@pytest.mark.parametrize(
    "outcome", [[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1], [1, 1, 2, 2, 2, 3]]
)
def test_smallest_p_counts_ties(outcome: list[int]) -> None:
    values = np.array([[3, 1, 2, 4, 6, 5], [0, 0, 0, 0, 7, 7], [2, 2, 2, 5, 5, 9]], float).T
    _, p, least = resampling.correlations(np.array(outcome, float), values)
    orders = np.array(list(permutations(stats.rankdata(outcome))))
    for column, smallest in zip(values.T, least, strict=True):
        rho = np.corrcoef(orders, stats.rankdata(column)[None])[-1, :-1]
        assert smallest == pytest.approx(np.mean(np.abs(rho) >= np.abs(rho).max() - 1e-9))
    assert (p >= least - 1e-12).all()


def test_smallest_p_of_drawn_orders() -> None:
    outcome = np.array([0.0] * 11 + [1])
    _, p, least = resampling.correlations(outcome, np.arange(12.0)[:, None])
    assert least[0] == pytest.approx(2 / 12)
    assert p[0] == pytest.approx(2 / 12, abs=0.02)
    _, _, untied = resampling.correlations(np.arange(12.0), np.arange(12.0)[:, None])
    assert untied[0] == pytest.approx(1 / 10_000)
