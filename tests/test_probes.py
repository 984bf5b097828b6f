"""Probes and directions: the same numbers as scikit-learn, no leaks, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from null_probe import draw, table_of
from sample_tables import plan_of, values_of, write_table
from scipy import sparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import zarrtrace as zt
from zarrtrace import analysis
from zarrtrace.analysis import crossvalidation, layer_samples, targets
from zarrtrace.analysis.crossvalidation import PENALTIES, Rows, out_of_fold
from zarrtrace.analysis.scores import auc, r_squared
from zarrtrace.cli import main
from zarrtrace.errors import ConfigError, ScenarioError

RNG = np.random.default_rng


class RelativeRidge(RegressorMixin, BaseEstimator):
    """scikit-learn's ridge regression with a penalty that is a part of max(n, columns)."""

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def fit(self, x: np.ndarray, y: np.ndarray) -> RelativeRidge:
        ridge = Ridge(self.penalty * max(x.shape), solver="svd")
        self.model_ = make_pipeline(StandardScaler(), ridge).fit(x, y)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model_.predict(x)


def searched(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> GridSearchCV:
    """Choose the penalty as a probe does, by scikit-learn alone."""
    search = GridSearchCV(
        RelativeRidge(),
        {"penalty": PENALTIES[::-1]},
        cv=GroupKFold(3, shuffle=True, random_state=0),
        scoring="neg_mean_squared_error",
    )
    return search.fit(x, y, groups=groups)


# --- the same as scikit-learn --------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 90])
def test_ridge_is_that_of_sklearn(channels: int) -> None:
    """24 groups of 3 in 4 folds: 18 to train on, 6 of them in each inner fold of equal size."""
    samples = draw(0, groups=24, channels=channels, layers=1, effect=1.0)
    found = analysis.probe(samples, "y", groups="group", folds=4, n_permutations=0)
    x, y = samples["residual"].to_numpy()[0].astype(np.float64), samples["y"].to_numpy()
    groups, fold = samples["group"].to_numpy(), found["fold"].to_numpy()
    expected = np.empty(len(y))
    for number in range(4):
        test = fold == number
        expected[test] = searched(x[~test], y[~test], groups[~test]).predict(x[test])
    np.testing.assert_allclose(found["prediction"][0], expected, rtol=1e-8, atol=1e-8)
    assert float(found["score"][0]) == pytest.approx(r2_score(y, expected))
    assert set(np.unique(fold)) == {0, 1, 2, 3}
    assert all(len(np.unique(fold[groups == group])) == 1 for group in range(24))


@pytest.mark.parametrize("channels", [8, 90])
def test_logistic_is_that_of_sklearn(channels: int) -> None:
    samples = draw(1, groups=24, channels=channels, layers=1, effect=2.0, classes=True)
    found = analysis.probe(samples, "y", groups="group", folds=4, n_permutations=0)
    x, y = samples["residual"].to_numpy()[0].astype(np.float64), samples["y"].to_numpy()
    groups, fold = samples["group"].to_numpy(), found["fold"].to_numpy()
    expected = np.empty(len(y))
    for number in range(4):
        test = fold == number
        chosen = searched(x[~test], y[~test].astype(float), groups[~test])
        alpha = chosen.best_params_["penalty"] * max(x[~test].shape)
        model = LogisticRegression(C=1 / (alpha * y[~test].var()), solver="newton-cg", tol=1e-8)
        fitted = make_pipeline(StandardScaler(), model).fit(x[~test], y[~test])
        expected[test] = fitted.predict_proba(x[test])[:, 1]
    # L-BFGS stops at a gradient of 1e-4.
    np.testing.assert_allclose(found["prediction"][0], expected, atol=2e-3)
    assert float(found["accuracy"][0]) == pytest.approx(((expected > 0.5) == y).mean(), abs=0.03)
    within = [fold == number for number in range(4)]
    pairs = [y[one].sum() * (~y[one]).sum() for one in within]
    areas = [roc_auc_score(y[one], found["prediction"][0].to_numpy()[one]) for one in within]
    assert float(found["score"][0]) == pytest.approx(np.average(areas, weights=pairs))


def test_scores_are_those_of_sklearn_also_with_weights_and_ties() -> None:
    rng = RNG(2)
    y, predicted = rng.integers(0, 2, 60), np.round(rng.random(60), 1)
    weights = rng.integers(0, 4, (5, 60)).astype(float)
    fold = np.zeros(60)
    for own, area, share in zip(
        weights, auc(y, predicted, fold, weights), r_squared(y, predicted, weights), strict=True
    ):
        assert area == pytest.approx(roc_auc_score(y, predicted, sample_weight=own))
        assert share == pytest.approx(r2_score(y, predicted, sample_weight=own))


def test_a_known_share_of_variance_is_found() -> None:
    """A target of which half the variance is in the layer: R² = 0.5 with many samples."""
    rng = RNG(3)
    x = rng.standard_normal((1, 3000, 10))
    y = x[0] @ rng.standard_normal(10)
    y = y / y.std() + rng.standard_normal(3000)
    found = analysis.probe(table_of(x, y=y), "y", n_permutations=19)
    # Four standard errors of R² = 0.5 at n = 3000: 4 × 2 √0.5 × 0.5 / √3000.
    assert abs(float(found["score"][0]) - 0.5) < 0.052
    assert float(found["low"][0]) < 0.5 < float(found["high"][0])
    assert float(found["p"][0]) == found.attrs["smallest_p"] == 0.05


# --- leaks ---------------------------------------------------------------------------------------


def test_no_prediction_depends_on_what_is_held_out() -> None:
    """Neither on held-out targets nor on the other held-out samples."""
    rng = RNG(4)
    x = sparse.csr_array(rng.random((40, 30)) * (rng.random((40, 30)) < 0.3))
    y, fold, groups = rng.standard_normal(40), np.repeat(np.arange(4), 10), np.arange(40) // 2
    rows = Rows(x, rng.standard_normal((40, 1)), groups, 12)
    for model, target in ((crossvalidation.ridge, y), (crossvalidation.logistic, y > 0)):
        before = out_of_fold(model, rows, target.astype(float), fold)
        other = np.where(fold == 1, target[::-1], target).astype(float)
        after = out_of_fold(model, rows, other, fold)
        np.testing.assert_array_equal(before[fold == 1], after[fold == 1])
        assert not np.array_equal(before[fold == 0], after[fold == 0])
        dense = x.toarray()
        dense[10:19] *= 100  # held out together with sample 19
        moved = rows._replace(x=sparse.csr_array(dense))
        again = out_of_fold(model, moved, target.astype(float), fold)
        np.testing.assert_allclose(again[19], before[19], rtol=1e-9)


def test_the_number_of_a_group_is_not_predicted() -> None:
    """Every group has a place of its own in the layer, which says nothing about other groups."""
    rng = RNG(5)
    groups = np.repeat(np.arange(30), 5)
    x = rng.standard_normal((1, 30, 40))[:, groups] + 0.1 * rng.standard_normal((1, 150, 40))
    found = analysis.probe(
        table_of(x, 5, y=rng.permutation(30)[groups]), "y", groups="group", n_permutations=39
    )
    leaking = cross_val_predict(
        Ridge(), x[0], found["target"], cv=KFold(5, shuffle=True, random_state=0)
    )
    assert r2_score(found["target"], leaking) > 0.8
    assert float(found["score"][0]) < 0.2
    assert float(found["p"][0]) > 0.05
    assert found.attrs["exchanged"] == "groups"


@pytest.mark.long
def test_features_are_not_chosen_by_what_they_predict_out_of_fold() -> None:
    """Pure noise: 5,000 features of 60 samples."""
    scores, leaking = [], []
    for seed in range(4):
        rng = RNG(seed)
        dense = rng.random((60, 5000)) * (rng.random((60, 5000)) < 0.1)
        y = RNG(seed + 100).permutation(np.arange(60) % 2 == 0)
        samples = table_of(np.zeros((1, 60, 1)), y=y)
        samples["features"] = (("layer", "sample", "feature"), dense[None].astype(np.float32))
        found = analysis.probe(samples, "y", what="features", n_permutations=0, n_features=500)
        scores.append(float(found["score"][0]))
        best = SelectKBest(f_classif, k=50).fit_transform(dense[:, dense.any(0)], y)
        predicted = cross_val_predict(Ridge(), best, y.astype(float), cv=5)
        leaking.append(roc_auc_score(y, predicted))
    assert min(leaking) > 0.9
    # Standard error of an area of 60 samples: 0.075; of four of them half of that.
    assert abs(np.mean(scores) - 0.5) < 4 * 0.0375


# --- confounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [False, True])
def test_a_layer_with_the_confound_alone_adds_nothing(*, classes: bool) -> None:
    samples = draw(6, groups=60, confounded=2.0, classes=classes)
    found = analysis.probe(samples, "y", groups="group", confounds=["c"], n_permutations=39)
    assert (found["score"] > (0.7 if classes else 0.4)).all()
    assert (abs(found["improvement"]) < 0.05).all()
    assert (found["improvement_low"] <= 0).all()
    assert (found["p"] > 0.05).all()
    alone = analysis.probe(samples, "y", groups="group", n_permutations=39)
    assert (alone["p"] <= 0.05).all()


def test_what_a_layer_adds_to_a_confound_is_known() -> None:
    """A target of three equal parts: the confound, the layer's and noise."""
    rng = RNG(7)
    x, c, noise = rng.standard_normal((3, 3000))
    samples = table_of(x[None, :, None], y=x + c + noise, c=c)
    found = analysis.probe(samples, "y", confounds=["c"], n_permutations=19).isel(layer=0)
    for name, share in {
        "score": 1 / 3, "baseline": 1 / 3, "score_with_confounds": 2 / 3, "improvement": 1 / 3,
        "statistic": 1 / 2,
    }.items():  # fmt: skip
        assert float(found[name]) == pytest.approx(share, abs=0.06), name
    assert float(found["p"]) == 0.05
    assert "beyond c" in found.attrs["findings"]


def test_texts_are_confounds_too() -> None:
    samples = draw(8, groups=30)
    kinds = np.array(["a", "b", "c"], object)[samples["group"].to_numpy() % 3]
    shifted = samples["y"].to_numpy() + 5.0 * (kinds == "b")
    samples = samples.assign_coords(y=("sample", shifted), kind=("sample", kinds))
    found = analysis.probe(samples, "y", groups="group", confounds=["kind"], n_permutations=0)
    means = [shifted[kinds == kind].var() for kind in "abc"]
    assert float(found["baseline"][0]) == pytest.approx(1 - np.mean(means) / shifted.var(), abs=0.1)


# --- permutations --------------------------------------------------------------------------------


def test_targets_are_exchanged_between_groups_or_within() -> None:
    groups = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
    none = np.empty((21, 0))
    between = targets.exchanged(np.arange(6.0)[groups], groups, none, 50, 0)
    assert between.unit == "groups"
    for column in between.columns.T:
        assert sorted({(g, v) for g, v in zip(groups, column, strict=True)}) == [
            (g, column[groups == g][0]) for g in range(6)
        ]
        assert sorted(np.unique(column)) == list(range(6))
    within = targets.exchanged(np.arange(21.0), groups, none, 50, 0)
    assert within.unit == "samples within groups"
    assert len(np.unique(within.columns, axis=1).T) > 45
    for group in range(6):
        own = np.sort(within.columns[groups == group], axis=0)
        np.testing.assert_array_equal(own, own[:, :1].repeat(51, axis=1))


def test_the_smallest_p_is_that_of_distinct_permutations() -> None:
    def least(values: list[float], drawn: int = 999) -> float:
        target = np.array(values)
        return targets.exchanged(
            target, np.arange(len(target)), np.empty((len(target), 0)), drawn, 0
        ).smallest_p

    assert least([0, 0, 0, 1, 1, 1]) == pytest.approx(2 / 20)  # both names of the groups
    assert least([0, 0, 1, 1, 1]) == pytest.approx(1 / 10)
    assert least([1, 2, 3]) == pytest.approx(1 / 6)
    assert least(list(range(20))) == 0.001


# --- samples -------------------------------------------------------------------------------------


def test_samples_that_lack_something_are_left_out_and_counted() -> None:
    samples = draw(9, groups=20)
    residual = samples["residual"].to_numpy().copy()
    residual[0, :3] = np.nan  # a failed prompt, in one layer
    y, c = samples["y"].to_numpy().copy(), samples["c"].to_numpy().copy()
    y[10], c[20] = np.nan, np.nan
    samples = table_of(residual, 3, y=y, c=c)
    found = analysis.probe(samples, "y", groups="group", confounds=["c"], n_permutations=0)
    assert found["n_samples"].to_numpy().tolist() == [55, 58]
    assert found["n_groups"].to_numpy().tolist() == [19, 20]
    assert np.flatnonzero(np.isnan(found["prediction"][0])).tolist() == [0, 1, 2, 10, 20]
    assert np.flatnonzero(found["fold"] < 0).tolist() == [10, 20]
    assert "2 samples without target, group or confounds are left out" in found.attrs["limits"]


def test_a_layer_without_values_is_named() -> None:
    samples = draw(10)
    samples["residual"][1] = np.nan
    found = analysis.probe(samples, "y", groups="group", n_permutations=19)
    assert np.isnan(found["score"]).to_numpy().tolist() == [False, True]
    assert found["n_samples"].to_numpy().tolist() == [60, 0]
    assert "layer 1" in found.attrs["not_tested"]
    with pytest.raises(ConfigError, match="too few"):
        analysis.probe(samples, "y", groups="group", layers=[1])


def test_blocks_of_samples_and_dask_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = draw(11, effect=1.0)
    active = np.maximum(samples["residual"].to_numpy(), 0)
    samples["features"] = (("layer", "sample", "feature"), active)
    for what in ("residual", "features"):
        whole = analysis.probe(samples, "y", what=what, groups="group", n_permutations=5)
        with monkeypatch.context() as patched:
            patched.setattr(layer_samples, "_READ_BYTES", 7 * 20 * 4)
            lazily = analysis.probe(
                samples.chunk({"sample": 11}), "y", what=what, groups="group", n_permutations=5
            )
        xr.testing.assert_identical(whole, lazily)


def test_a_run_gives_its_last_tokens(shared_run: fakes.FakeRun) -> None:
    run = zt.open_run(shared_run.path)
    one = analysis.directions(run, xr.DataArray([0, 1], dims="sample"), what="features", at=[-1])
    features = zt.table(run)["features"].to_numpy().astype(np.float64)
    expected = features[:, 1] - features[:, 0]
    np.testing.assert_allclose(one["direction"] * one["norm"], expected, atol=1e-6)


def test_repeats_of_a_scenario_stay_together() -> None:
    samples = draw(12, groups=20)
    names = np.array([f"p{n}" for n in np.repeat(np.arange(20), 3)], object)
    samples = samples.assign_coords(scenario_name=("sample", names))
    found = analysis.probe(samples, "y", n_permutations=0)
    assert found["n_groups"].to_numpy().tolist() == [20, 20]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "settings", "said"),
    [
        ("z", {}, "no column 'z'"),
        ("y", {"groups": "z"}, "no column 'z'"),
        ("y", {"confounds": ["z"]}, "no column 'z'"),
        ("constant", {}, "no value but 1"),
        ("text", {}, "text with 3 values"),
        ("infinite", {}, "infinite in 1 samples"),
        ("y", {"what": "features"}, "no 'features'"),
        ("y", {"layers": [7]}, "no layer 7"),
        ("y", {"layers": []}, "no layer is asked for"),
        ("y", {"groups": "group", "folds": 21}, "20 group\\(s\\) of 'group' are too few for 21"),
        ("y", {"groups": "few", "folds": 2}, "too few for 2 folds"),
        ("y", {"folds": 1}, "folds=1"),
        ("rare", {"groups": "group"}, "one value in all folds but one"),
        ("half", {"groups": "four", "folds": 4}, "one value in each fold"),
        ("y", {"groups": "apart"}, "in several groups"),
        ("y", {"groups": "group", "confounds": ["y"]}, "confounds leave too little"),
        ("y", {"confounds": ["many"]}, "confounds leave too little"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    target: str, settings: dict[str, Any], said: str
) -> None:
    samples = draw(13)
    number = np.arange(60)
    group = samples["group"].to_numpy()
    samples = samples.assign_coords(
        {
            name: ("sample", values)
            for name, values in {
                "scenario": np.array([f"s{n}" for n in number // 2 * 2], object)
                if settings.get("groups") == "apart"
                else samples["scenario"].to_numpy(),
                "constant": np.ones(60),
                "text": np.array(["a", "b", "c"], object)[number % 3],
                "infinite": np.where(number == 5, np.inf, number),
                "few": group // 10,
                "four": group // 5,
                "half": group // 5 < 2,
                "rare": group == 4,
                "apart": number,
                "many": np.array([f"m{n * 2 // 3}" for n in number], object),
            }.items()
        }
    )
    with pytest.raises((ConfigError, ScenarioError), match=said) as raised:
        analysis.probe(samples, target, **settings)
    assert raised.value.remedy


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for function in (
        lambda: analysis.probe(draw(14), "y"),
        lambda: analysis.directions(draw(14), "y"),
    ):
        with pytest.raises(ConfigError, match=r"needs sklearn[\s\S]*'.\[probe\]'"):
            function()
    assert (analysis.directions(draw(14, classes=True), "y")["norm"] > 0).all()


@pytest.mark.long
def test_scikit_learn_is_imported_on_use() -> None:
    code = (
        "import sys; from zarrtrace import analysis; analysis.probe, analysis.directions, "
        "analysis.contrast; sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- directions ----------------------------------------------------------------------------------


def test_a_difference_of_means_is_that_of_numpy(tmp_path: Path) -> None:
    samples = draw(15, classes=True)
    found = analysis.directions(samples, "y")
    x, y = samples["residual"].to_numpy().astype(np.float64), samples["y"].to_numpy()
    expected = x[:, y].mean(1) - x[:, ~y].mean(1)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(expected, axis=1), rtol=1e-6)
    np.testing.assert_allclose(
        found["direction"], expected / np.linalg.norm(expected, axis=1)[:, None], atol=1e-6
    )
    assert found["direction"].dims == ("layer", "channel")
    found.to_netcdf(tmp_path / "kept.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "kept.nc", engine="h5netcdf") as kept:
        xr.testing.assert_equal(kept.load(), found)
    found.to_zarr(tmp_path / "kept.zarr", consolidated=False)
    xr.testing.assert_equal(xr.open_zarr(tmp_path / "kept.zarr", consolidated=False), found)


@pytest.mark.parametrize("what", ["residual", "features"])
def test_a_ridge_direction_predicts_as_sklearn(what: str) -> None:
    samples = draw(16, groups=24, layers=1, effect=1.0)
    samples["features"] = (
        ("layer", "sample", "feature"), np.maximum(samples["residual"].to_numpy(), 0),
    )  # fmt: skip
    found = analysis.directions(samples, "y", what=what, groups="group").isel(layer=0)
    x, y = samples[what].to_numpy()[0].astype(np.float64), samples["y"].to_numpy()
    expected = searched(x, y, samples["group"].to_numpy()).predict(x)
    predicted = x @ found["direction"].to_numpy() * float(found["norm"]) + float(found["intercept"])
    np.testing.assert_allclose(predicted, expected, rtol=1e-8, atol=1e-8)
    assert np.linalg.norm(found["direction"]) == pytest.approx(1)


def test_a_layer_that_does_not_vary_has_no_direction() -> None:
    samples = draw(17, classes=True)
    samples["residual"][0] = 1.0
    found = analysis.directions(samples, "y")
    assert np.isnan(found["direction"][0]).all()
    assert found["norm"][0] == 0
    for target, method, said in (("c", "difference", "more than two"), ("y", "lasso", "neither")):
        with pytest.raises(ConfigError, match=said):
            analysis.directions(samples, target, method=method)  # type: ignore[arg-type]


# --- command line --------------------------------------------------------------------------------


def test_the_command_answers_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, probe = tmp_path / "table", ("probe", "--column", "round", "--permutations", "19")
    write_table(table, plan_of(50), values_of(3, 50, 300, 12))

    def call(command: str, *arguments: str | Path) -> str:
        line = ["zarrtrace", "analyze", command, table, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    assert "round is predicted best from layer" in call(*probe)
    call(*probe, "--what", "features", "-o", tmp_path / "x.csv")
    rows = pd.read_csv(tmp_path / "x.csv").set_index("layer")
    assert rows["n_samples"].to_dict() == {1: 50, 2: 50, 5: 0}  # layer 5 has no SAE
    assert rows["p"].dropna().between(0.05, 1).all()
    call(*probe, "-o", tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc", engine="h5netcdf") as kept:
        assert kept["prediction"].dims == ("layer", "sample")
    call("directions", "--column", "is_last", "--layers", "1", "-o", tmp_path / "d.nc")
    with xr.open_dataset(tmp_path / "d.nc", engine="h5netcdf") as kept:
        assert kept["direction"].sizes == {"layer": 1, "channel": 12}
        assert float((kept["direction"] ** 2).sum()) == pytest.approx(1)
