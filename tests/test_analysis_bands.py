"""Bands of layers and critical layers: computed by hand, planted, and on noise."""

from __future__ import annotations

import json

import numpy as np
import planted
import pytest
import synthetic
import xarray as xr
from scipy import stats

from zarrtrace import analysis
from zarrtrace.analysis.bands import BANDS
from zarrtrace.analysis.critical import control_tokens, sign_flips
from zarrtrace.errors import ConfigError, ScenarioError

DECISION = planted.TOKENS - 1
TASK = (*planted.SPANS["probability"], *planted.SPANS["goal"], *planted.SPANS["balance"])
EVERY_SPAN = (*TASK, *planted.SPANS["choices"])
NOISE_RUNS = 30


@pytest.fixture(scope="module")
def noise() -> xr.DataTree:
    return planted.make_run(seed=3)


# --- bands -------------------------------------------------------------------------------------


def measures_by_hand(mean: np.ndarray) -> tuple[float, float, float]:
    mean = mean.astype(np.float64)
    near = [
        mean[query, max(1, query - 5) : query + 1].sum() / mean[query, 1:].sum()
        for query in range(6, planted.TOKENS)
    ]
    task = [sum(mean[query, key] for key in TASK) for query in range(17, DECISION)]
    decided = sum(mean[DECISION, key] for key in EVERY_SPAN)
    return float(np.mean(near)), float(np.mean(task)), float(decided)


def test_measures_and_differences_by_hand(noise):
    found = analysis.layer_bands(noise, planted.BANDS, resamples=99)
    by_hand = np.array(
        [
            [measures_by_hand(matrix) for matrix in child["attention_mean"].values]
            for child in noise.children.values()
        ]
    )  # (scenario, layer, hypothesis)
    np.testing.assert_allclose(found.value.transpose("scenario", "layer", "hypothesis"), by_hand)
    bands = by_hand.reshape(len(noise.children), 3, 2, 3).mean(2)
    for i, name in enumerate(planted.BANDS):
        others = [n for n in range(3) if n != i]
        expected = bands[:, i, i] - bands[:, others, i].mean(1)
        one = found.sel(hypothesis=name)
        np.testing.assert_allclose(one.difference, expected)
        np.testing.assert_allclose(one.band_mean, bands[:, :, i].mean(0))
        assert float(one.estimate) == pytest.approx(expected.mean())


def test_the_interval_has_the_coverage_of_students():
    # On normal data the bootstrap-t estimates Student's t, whose interval is known.
    from zarrtrace.analysis.bands import _interval

    values = np.random.default_rng(0).normal(0.3, 1, 40)
    found = _interval(values, 20_000, 0.95, 0)
    exact = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert found.low == pytest.approx(exact[0], abs=0.06)
    assert found.high == pytest.approx(exact[1], abs=0.06)


def test_planted_bands_are_found():
    queries = range(17, DECISION)
    run = planted.make_run(
        plants=[
            planted.attend_near([1, 2]),
            planted.attend(list(queries), TASK, [3, 4]),
            planted.attend([DECISION], EVERY_SPAN, [5, 6]),
        ]
    )
    found = analysis.layer_bands(run, planted.BANDS)
    assert found.supported.all()
    assert found.highest.values.tolist() == ["local", "task", "decision"]
    assert found.attrs["findings"].count(" holds: ") == 3


def test_bands_in_the_wrong_order_are_reported_plainly():
    run = planted.make_run(plants=[planted.attend_near([5, 6])])
    found = analysis.layer_bands(run, planted.BANDS)
    local = found.sel(hypothesis="local")
    assert not local.supported
    assert local.highest == "decision"
    assert float(local.high) < 0
    assert "local in layers 1-2 does not hold" in found.attrs["findings"]


@pytest.mark.long
def test_noise_supports_nothing_beyond_the_error_rate():
    count = np.zeros(3)
    for seed in range(NOISE_RUNS):
        run = planted.make_run(planted.SCENARIOS[:6], seed=seed + 1, tokens=24)
        count += analysis.layer_bands(run, planted.BANDS, resamples=299).supported.values
    # One-sided 2.5 % each; more than this has a probability below 0.001.
    assert count.sum() <= stats.binom.ppf(0.999, 3 * NOISE_RUNS, 0.025)


def test_bands_lazily(noise):
    lazy = analysis.layer_bands(planted.chunked(noise), planted.BANDS, resamples=99)
    xr.testing.assert_allclose(lazy, analysis.layer_bands(noise, planted.BANDS, resamples=99))
    assert json.loads(lazy.attrs["parameters"])["bands"]["task"] == [3, 4]


def test_bands_read_each_matrix_once(noise):
    pairs = {name: planted.counting(child.to_dataset()) for name, child in noise.children.items()}
    run = planted.as_run({name: pair[0] for name, pair in pairs.items()})
    analysis.layer_bands(run, planted.BANDS, resamples=9)
    for ds, counters in pairs.values():
        assert counters["attention"].read == 0
        # whole for locality, and the rows that the other two need
        assert counters["attention_mean"].read <= 2 * ds.attention_mean.size


def test_bands_where_layers_or_spans_are_missing():
    run = planted.make_run(
        planted.SCENARIOS[:6],
        changes={
            "Risky_0": {"missing": [1]},
            "Risky_1": {"missing": [3, 4]},
            "Risky_2": {"spans": {"goal": (5,)}, "tokens": 15},
        },
    )
    found = analysis.layer_bands(run, planted.BANDS, resamples=99)
    assert found.difference.sel(scenario="Risky_0").notnull().all()  # layer 2 is there
    assert found.difference.sel(scenario="Risky_1").isnull().all()
    assert found.difference.sel(scenario="Risky_2").notnull().all()


def test_bands_of_chosen_queries(noise):
    def chosen(rows):
        kept = {n: synthetic.with_queries(c.to_dataset(), rows) for n, c in noise.children.items()}
        return planted.as_run(kept)

    found = analysis.layer_bands(chosen([18, 25, DECISION]), planted.BANDS, resamples=99)
    mean = noise["Safe_1"]["attention_mean"].values[2, [18, 25]].astype(np.float64)
    by_hand = mean[:, list(TASK)].sum(1).mean()
    one = found["value"].sel(hypothesis="task", scenario="Safe_1", layer=3)
    assert float(one) == pytest.approx(by_hand)
    with pytest.raises(ConfigError, match="attention of token 17 is not stored"):
        analysis.layer_bands(chosen([DECISION]), planted.BANDS)


def test_bands_that_cannot_be_tested(noise):
    with pytest.raises(ConfigError, match=r"band 'task' \(layers 11 to 20\) has no layer"):
        analysis.layer_bands(noise)
    assert BANDS == {"local": (1, 10), "task": (11, 20), "decision": (21, 31)}
    with pytest.raises(ConfigError, match="overlap"):
        analysis.layer_bands(noise, {"local": (1, 3), "task": (3, 4), "decision": (5, 6)})
    with pytest.raises(ConfigError, match="bands are called 'early'"):
        analysis.layer_bands(noise, {"early": (1, 3)})
    with pytest.raises(ConfigError, match="at least 4 scenarios, and there are 3"):
        analysis.layer_bands(planted.make_run(planted.SCENARIOS[:3]), planted.BANDS)
    with pytest.raises(ConfigError, match="and there is 1"):
        analysis.layer_bands(planted.make_trace(), planted.BANDS)
    with pytest.raises(ScenarioError, match="no scenario has a span 'gaol'"):
        analysis.layer_bands(noise, planted.BANDS, task_spans=["gaol"])
    changes = {name: {"missing": [5, 6]} for name in planted.SCENARIOS[:3]}
    few = planted.make_run(planted.SCENARIOS[:6], changes=changes)
    with pytest.raises(ConfigError, match="only 3 scenarios have what it needs"):
        analysis.layer_bands(few, planted.BANDS)


# --- critical layers ---------------------------------------------------------------------------


def nearest_by_hand(token: int, how_many: int) -> list[int]:
    free = [t for t in range(1, DECISION) if t not in EVERY_SPAN]
    return sorted(sorted(free, key=lambda t: (abs(t - token), -t))[:how_many])


def test_control_tokens_are_near_and_in_no_span():
    ds = planted.make_trace()
    for name, tokens in planted.SPANS.items():
        expected = [nearest_by_hand(token, 4) for token in tokens]
        assert control_tokens(ds, name, "decision", 4) == expected
    assert control_tokens(ds, "balance", "decision", 4)[1] == [12, 13, 17, 18]


def test_critical_layers_by_hand(noise):
    found = analysis.critical_layers(noise)
    p_values = []
    for name, tokens in planted.SPANS.items():
        for i, layer in enumerate(planted.LAYERS):
            differences = []
            for child in noise.children.values():
                row = child["attention_mean"].values[i, -1].astype(np.float64)
                control = np.mean([row[nearest_by_hand(token, 4)].mean() for token in tokens])
                differences.append(row[list(tokens)].mean() - control)
            one = found.sel(source=name, layer=layer)
            d = np.mean(differences) / np.std(differences, ddof=1)
            test = stats.permutation_test(
                (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
            )
            assert float(one.difference) == pytest.approx(np.mean(differences))
            assert float(one.cohens_d) == pytest.approx(d)
            assert float(one.p) == pytest.approx(test.pvalue)
            p_values.append(float(one.p))
    q = stats.false_discovery_control(p_values)
    np.testing.assert_allclose(found.q.values.ravel(), q)
    assert found.attrs["smallest_p"] == 2 / 2**10


def test_planted_critical_layers_are_found():
    run = planted.make_run(
        plants=[
            planted.attend([DECISION], planted.SPANS["balance"], [2, 5]),
            planted.attend([DECISION], planted.SPANS["goal"], [4], by=-3),
            # A neighbourhood that is attended to as a whole is no sign of the span.
            planted.attend([DECISION], range(18, 25), [3]),
        ]
    )
    found = analysis.critical_layers(run)
    critical = {
        (s, n)
        for s in found.source.values.tolist()
        for n in found.layer.values.tolist()
        if found.critical.sel(source=s, layer=n)
    }
    assert {("balance", 2), ("balance", 5)} <= critical
    assert ("choices", 3) not in critical
    assert float(found.cohens_d.sel(source="balance", layer=2)) > 2
    low = found.sel(source="goal", layer=4)
    assert float(low.q) < 0.05  # it stands out, downwards
    assert not low.critical


def test_what_differs_little_but_always_is_not_critical():
    traces = {}
    for name, child in planted.make_run().children.items():
        ds = child.to_dataset()
        mean = ds["attention_mean"].copy(deep=True)
        rest = [t for t in range(1, DECISION) if t not in planted.SPANS["balance"]]
        mean[3, -1, rest] = 0.02
        mean[3, -1, list(planted.SPANS["balance"])] = 0.03
        traces[name] = ds.assign(attention_mean=mean)
    balance = {"source": "balance", "layer": planted.LAYERS[3]}
    found = analysis.critical_layers(planted.as_run(traces)).sel(balance)
    assert float(found.q) < 0.05
    assert float(found.ratio) == pytest.approx(1.5)
    assert not found.critical
    assert analysis.critical_layers(planted.as_run(traces), least_ratio=1.5 - 1e-6).critical.sel(
        balance
    )


@pytest.mark.long
def test_noise_has_no_critical_layers_beyond_the_error_rate():
    count = 0
    for seed in range(NOISE_RUNS):
        found = analysis.critical_layers(planted.make_run(seed=seed + 1))
        count += bool((found.q <= 0.05).any())
    assert count <= stats.binom.ppf(0.999, NOISE_RUNS, 0.05)


def test_many_scenarios_draw_permutations():
    rng = np.random.default_rng(0)
    values = rng.normal(0.4, 1, (20, 3))
    p, smallest = sign_flips(values, 9999, seed=0)
    for column in range(3):
        test = stats.permutation_test(
            (values[:, column],),
            np.mean,
            permutation_type="samples",
            n_resamples=9999,
            rng=np.random.default_rng(1),
        )
        assert p[column] == pytest.approx(test.pvalue, abs=0.02)
    assert smallest == 1e-4


def test_critical_layers_lazily_and_reading_only_rows(noise):
    pairs = {name: planted.counting(child.to_dataset()) for name, child in noise.children.items()}
    run = planted.as_run({name: pair[0] for name, pair in pairs.items()})
    found = analysis.critical_layers(run)
    xr.testing.assert_allclose(found, analysis.critical_layers(noise))
    for _, counters in pairs.values():
        assert counters["attention"].read == 0
        assert counters["attention_mean"].read <= len(planted.LAYERS) * planted.TOKENS


def test_critical_layers_where_something_is_missing():
    run = planted.make_run(
        planted.SCENARIOS[:6],
        changes={
            "Risky_0": {"missing": [3]},
            "Risky_1": {"spans": {"balance": (14,)}},
            "Risky_2": {"layers": (1, 2, 3)},
        },
    )
    found = analysis.critical_layers(run)
    assert found.n.sel(source="balance").values.tolist() == [6, 6, 5, 5, 5, 5]
    assert found.n.sel(source="goal").values.tolist() == [5, 5, 4, 4, 4, 4]
    assert found.q.notnull().all()


def test_critical_layers_that_cannot_be_tested(noise):
    with pytest.raises(ConfigError, match="at least two scenarios"):
        analysis.critical_layers(planted.make_trace())
    with pytest.raises(ScenarioError, match="no scenario has a span 'goals'"):
        analysis.critical_layers(noise, ["goals"])
    with pytest.raises(ConfigError, match="nothing to compare: 4 spans, 0 controls"):
        analysis.critical_layers(noise, controls=0)
    full = planted.make_run(planted.SCENARIOS[:2], spans={"all": tuple(range(1, DECISION))})
    with pytest.raises(ConfigError, match="no token to compare 'all' with"):
        analysis.critical_layers(full)
    mute = planted.as_run(
        {n: synthetic.trace(n, heads=None, spans={"goal": [3]}) for n in ("Mute_1", "Mute_2")}
    )
    with pytest.raises(ConfigError, match="Mute_1: the trace has no 'attention_mean'"):
        analysis.critical_layers(mute)


def test_differences_that_do_not_vary_and_columns_with_one_scenario():
    run = planted.make_run(("A", "B", "C"), changes={"A": {"missing": [6]}, "B": {"missing": [6]}})
    same = planted.as_run(
        {n: run["C"].to_dataset().assign_attrs(run[n].attrs) for n in ("A", "B", "C")}
    )
    found = analysis.critical_layers(same)
    assert np.isinf(found.cohens_d).all()
    assert (found.p == 2 / 8).all()
    alone = analysis.critical_layers(run).sel(layer=6)
    assert (alone.n == 1).all()
    assert alone.q.isnull().all()
    assert not alone.critical.any()
