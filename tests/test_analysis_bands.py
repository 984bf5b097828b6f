"""Bands of layers and critical layers: computed by hand, planted, and on noise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import fakes
import null_attention
import numpy as np
import planted
import pytest
import synthetic
import xarray as xr
from click.testing import CliRunner
from scipy import ndimage, stats
from statsmodels.api import OLS

from zarrtrace import analysis
from zarrtrace.analysis.bands import places
from zarrtrace.analysis.placebos import aligned, neighbours, variants
from zarrtrace.cli.analyze_ import command
from zarrtrace.errors import ConfigError, ScenarioError

DECISION = planted.TOKENS - 1
TASK = (*planted.SPANS["probability"], *planted.SPANS["goal"], *planted.SPANS["balance"])
EVERY_SPAN = (*TASK, *planted.SPANS["choices"])
TASK_SPANS = ("balance", "goal", "probability")
# Bands that can be supported: with fewer layers, p cannot be small enough.
LAYERS = tuple(range(1, 25))
BANDS = {"local": (1, 8), "task": (9, 16), "decision": (17, 24)}


@pytest.fixture(scope="module")
def noise() -> xr.DataTree:
    return planted.make_run(seed=3)


# --- bands -------------------------------------------------------------------------------------


def measures_by_hand(mean: np.ndarray) -> tuple[float, float, float]:
    mean = mean.astype(np.float64)
    near = [
        mean[query, max(1, query - 5) : query + 1].sum() / mean[query, 1:].sum()
        for query in range(7, planted.TOKENS)
    ]
    task = [sum(mean[query, key] for key in TASK) for query in range(17, DECISION)]
    decided = sum(mean[DECISION, key] for key in EVERY_SPAN)
    return float(np.mean(near)), float(np.mean(task)), float(decided)


def test_measures_and_differences_by_hand(noise):
    found = analysis.layer_bands(noise, planted.BANDS, task_spans=TASK_SPANS, resamples=99)
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


def test_a_token_of_several_spans_counts_once(noise):
    spans = {"all": sorted({*EVERY_SPAN}), "first": [EVERY_SPAN[0]]}
    more = {name: {"characters": [], "tokens": at} for name, at in spans.items()}
    traces = {
        name: child.to_dataset().assign_attrs(spans={**more, **child.attrs["spans"]})
        for name, child in noise.children.items()
    }
    found = analysis.layer_bands(
        planted.as_run(traces), planted.BANDS, task_spans=TASK_SPANS, resamples=99
    )
    same = analysis.layer_bands(noise, planted.BANDS, task_spans=TASK_SPANS, resamples=99)
    np.testing.assert_allclose(found.value, same.value)


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
        planted.SCENARIOS[:5],
        layers=LAYERS,
        plants=[
            planted.attend_near(range(1, 9)),
            planted.attend(list(queries), TASK, range(9, 17)),
            planted.attend([DECISION], EVERY_SPAN, range(17, 25)),
        ],
    )
    found = analysis.layer_bands(run, BANDS, task_spans=TASK_SPANS)
    assert found.supported.all()
    assert found.highest.values.tolist() == ["local", "task", "decision"]
    np.testing.assert_allclose(found.smallest_p, [1 / 48, 2 / 48, 1 / 48])
    np.testing.assert_allclose(found.p, found.smallest_p)
    assert found.attrs["findings"].startswith("Supported: local, task, decision of")
    assert found.attrs["findings"].count(" holds: ") == 3


def test_bands_in_the_wrong_order_are_reported_plainly():
    run = planted.make_run(plants=[planted.attend_near([5, 6])])
    found = analysis.layer_bands(run, planted.BANDS)
    local = found.sel(hypothesis="local")
    assert not local.supported
    assert local.highest == "decision"
    assert float(local.high) < 0
    assert found.attrs["findings"].startswith("Supported: none")
    assert "local in layers 1-2 does not hold" in found.attrs["findings"]


def test_few_layers_support_nothing_and_say_so():
    queries = list(range(17, DECISION))
    run = planted.make_run(plants=[planted.attend(queries, TASK, [3, 4])])
    found = analysis.layer_bands(run, planted.BANDS, task_spans=TASK_SPANS)
    task = found.sel(hypothesis="task")
    assert float(task.low) > 0
    assert task.highest == "task"
    assert float(task.p) == float(task.smallest_p) == pytest.approx(2 / 12)
    assert not found.supported.any()
    assert "local and task and decision cannot be supported" in found.attrs["limits"]


def test_places_of_the_bands_are_those_of_a_reflected_profile():
    # Convolution with reflected edges slides a kernel along a profile in just this way.
    rng = np.random.default_rng(0)
    profile, width = rng.normal(size=17), 5
    weights = np.zeros(17)
    weights[:width] = 1 / width
    found = places(weights) @ profile
    assert found.shape == (34,)
    smoothed = ndimage.uniform_filter1d(profile, width, mode="reflect")
    there_and_back = np.concatenate([smoothed, smoothed[::-1]])
    np.testing.assert_allclose(found, np.roll(there_and_back, -(width // 2)))


def test_p_of_bands_by_hand(noise):
    found = analysis.layer_bands(noise, planted.BANDS, resamples=99)
    for name, (first, last) in planted.BANDS.items():
        profile = found["value"].sel(hypothesis=name).mean("scenario").values.tolist()
        endless = (profile + profile[::-1]) * 2
        values = []
        for shift in range(12):
            moved = endless[shift : shift + 6]
            others = [moved[2 * i : 2 * i + 2] for i in range(3) if 2 * i != first - 1]
            values.append(np.mean(moved[first - 1 : last]) - np.mean(others))
        p = np.mean(np.array(values) >= values[0] - 1e-12)
        assert float(found.p.sel(hypothesis=name)) == pytest.approx(p)


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

    found = analysis.layer_bands(
        chosen([18, 25, DECISION]), planted.BANDS, task_spans=TASK_SPANS, resamples=99
    )
    mean = noise["Safe_1"]["attention_mean"].values[2, [18, 25]].astype(np.float64)
    by_hand = mean[:, list(TASK)].sum(1).mean()
    one = found["value"].sel(hypothesis="task", scenario="Safe_1", layer=3)
    assert float(one) == pytest.approx(by_hand)
    with pytest.raises(ConfigError, match="attention of token 17 is not stored"):
        analysis.layer_bands(chosen([DECISION]), planted.BANDS, task_spans=TASK_SPANS)


def test_bands_that_cannot_be_tested(noise):
    with pytest.raises(ConfigError, match=r"band 'task' \(layers 9 to 16\) has no layer"):
        analysis.layer_bands(noise, BANDS)
    with pytest.raises(ConfigError, match=r"(?s)no bands of layers are given.*--band local=1-10"):
        analysis.layer_bands(noise)
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


def test_bands_and_the_task_come_from_the_suite_file(noise):
    spans = [*planted.SPANS]
    plain = analysis.layer_bands(noise, planted.BANDS, resamples=99)
    assert json.loads(plain.attrs["parameters"])["task_spans"] == spans
    stated = {"bands": {n: [*at] for n, at in planted.BANDS.items()}, "task_spans": ["goal"]}
    run = xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs={**noise.attrs, **stated}), **noise.children}, name="run"
    )
    found = analysis.layer_bands(run, resamples=99)
    assert json.loads(found.attrs["parameters"])["task_spans"] == ["goal"]
    xr.testing.assert_equal(
        found, analysis.layer_bands(noise, planted.BANDS, task_spans=["goal"], resamples=99)
    )
    own = analysis.layer_bands(run, {"local": (5, 6), "task": (3, 4), "decision": (1, 2)})
    assert json.loads(own.attrs["parameters"])["bands"]["local"] == [5, 6]


# --- critical layers ---------------------------------------------------------------------------


def nearest_by_hand(group: Sequence[int], token: int, how_many: int) -> list[int]:
    free = [t for t in range(1, DECISION) if t not in EVERY_SPAN and t not in group]
    return sorted(free, key=lambda t: (abs(t - token), -t))[:how_many]


def log_ratio_by_hand(rows: np.ndarray, group: Sequence[int]) -> float:
    """Log ratio of attention ``(scenario, key)`` to a group and its neighbours."""
    own = rows[:, list(group)].mean()
    beside = [rows[:, nearest_by_hand(group, token, 4)].mean() for token in group]
    return float(np.log2(own / np.mean(beside)))


def groups_by_hand(span: Sequence[int]) -> list[list[int]]:
    """The span, then all groups of its shape outside spans."""
    moved = [[t + shift for t in span] for shift in range(-DECISION, DECISION)]
    free = [g for g in moved if all(0 < t < DECISION and t not in EVERY_SPAN for t in g)]
    return [list(span), *free]


def test_neighbours_are_near_and_in_no_span():
    is_free = np.array([0 < t < DECISION and t not in EVERY_SPAN for t in range(planted.TOKENS)])
    for span in planted.SPANS.values():
        for group in groups_by_hand(span):
            near, counts = neighbours(is_free, np.array([group]), 4)
            for at, token in enumerate(group):
                assert near[0, at][counts[0, at]].tolist() == nearest_by_hand(group, token, 4)


def test_critical_layers_of_one_template_by_hand(noise):
    found = analysis.critical_layers(noise)
    rows = np.array([c["attention_mean"].values[:, -1] for c in noise.children.values()])
    p_values = []
    for name, span in planted.SPANS.items():
        groups = groups_by_hand(span)
        logs = np.array(
            [[log_ratio_by_hand(rows[:, i].astype(float), g) for i in range(6)] for g in groups]
        )
        # A regression on nothing but a constant: each residual by the others' spread.
        scores = np.array(
            [OLS(column, np.ones(len(groups))).fit().get_influence().resid_studentized_external
             for column in logs.T]
        )  # fmt: skip
        one = found.sel(source=name)
        np.testing.assert_allclose(np.log2(one.ratio), logs[0])
        np.testing.assert_allclose(one.z, scores[:, 0])
        p = [(np.abs(scores) >= abs(z) - 1e-9).mean() for z in scores[:, 0]]
        np.testing.assert_allclose(one.p, p)
        assert int(one.placebos) == len(groups) - 1
        assert float(one.smallest_p) == pytest.approx(1 / scores.size)
        p_values.append(p)
    q = stats.false_discovery_control(np.ravel(p_values))
    np.testing.assert_allclose(found.q.values.ravel(), q)
    assert found.attrs["prompts"] == 1
    assert "variants of 1 prompt" in found.attrs["limits"]


def test_critical_layers_of_many_prompts_by_hand():
    ids = {name: {"token_ids": 100 * i + np.arange(28)} for i, name in enumerate("ABC")}
    run = planted.make_run("ABC", seed=5, changes=ids)
    found = analysis.critical_layers(run, ["goal"])
    groups = groups_by_hand(planted.SPANS["goal"])
    assert int(found.placebos[0]) == len(groups) ** 3 - 1 > 2000
    own, beside = np.zeros((2, 3, len(groups)))
    for number, child in enumerate(run.children.values()):
        row = child["attention_mean"].values[2, -1].astype(float)
        for at, group in enumerate(groups):
            own[number, at] = row[group].mean()
            beside[number, at] = np.mean([row[nearest_by_hand(group, t, 4)].mean() for t in group])
    every = list(itertools.product(range(len(groups)), repeat=3))
    logs = np.array([np.log2(own[range(3), c].mean() / beside[range(3), c].mean()) for c in every])
    p = np.mean(np.abs(logs - logs.mean()) >= abs(logs[0] - logs.mean()))
    assert float(found.p.sel(source="goal", layer=3)) == pytest.approx(p)
    assert found.attrs["prompts"] == 3


def test_variants_of_a_prompt_are_recognised():
    rng = np.random.default_rng(0)
    first, other = rng.integers(0, 1000, (2, 40))
    changed = first.copy()
    changed[5::10] = 2000  # the values of a template
    longer = np.insert(first, 20, [3000, 3001])
    assert variants([first, other, changed, longer, first]) == [[0, 2, 3, 4], [1]]
    assert aligned(first, changed).tolist() == list(range(40))
    assert aligned(first, longer).tolist() == [*range(20), *range(22, 42)]
    assert aligned(longer, first)[[19, 20, 21, 22]].tolist() == [19, -1, -1, 20]


def test_planted_critical_layers_are_found():
    run = planted.make_run(
        planted.SCENARIOS[:4],
        tokens=80,
        plants=[
            planted.attend([79], planted.SPANS["balance"], [2, 5]),
            planted.attend([79], planted.SPANS["goal"], [4], by=-6),
            # A neighbourhood that is attended to as a whole is no sign of the span.
            planted.attend([79], range(17, 27), [3]),
        ],
    )
    found = analysis.critical_layers(run, ["balance", "goal"])
    critical = {
        (s, n)
        for s in found.source.values.tolist()
        for n in found.layer.values.tolist()
        if found.critical.sel(source=s, layer=n)
    }
    assert critical == {("balance", 2), ("balance", 5)}
    assert "balance stands out in layers 2 (" in found.attrs["findings"]
    low = found.sel(source="goal", layer=4)
    assert float(low.q) < 0.05  # it stands out, downwards
    assert not analysis.critical_layers(run, ["choices"]).critical.sel(layer=3).any()


def test_a_word_that_differs_as_other_words_do_is_not_critical():
    # In every scenario, in the same direction: the sign-flip test calls all of these certain.
    run = null_attention.word_run(3, noise=0.01)
    found = analysis.critical_layers(run)
    assert (abs(np.log2(found.ratio)) > 0.2).mean() > 0.5
    assert not found.critical.any()


def test_placebos_drawn_for_each_variant_by_itself_would_average_out(monkeypatch):
    run = null_attention.word_run(3)
    assert not (analysis.critical_layers(run)["q"] <= 0.05).any()
    alone = [[number] for number in range(6)]
    monkeypatch.setattr("zarrtrace.analysis.critical.variants", lambda _: alone)
    assert (analysis.critical_layers(run)["q"] <= 0.05).mean() > 0.2


def test_a_single_trace_has_critical_layers():
    plants = [planted.attend([79], planted.SPANS["balance"], [2, 5], by=4)]
    found = analysis.critical_layers(planted.make_trace(plants=plants, tokens=80), ["balance"])
    assert found.critical.sel(source="balance").values.nonzero()[0].tolist() == [1, 4]
    assert (found.n == 1).all()


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
    gone = planted.make_run(planted.SCENARIOS[:3], missing=[4])
    assert analysis.critical_layers(gone).q.isnull().any("source").values.tolist() == [
        layer == 4 for layer in planted.LAYERS
    ]


def test_special_tokens_are_neither_placebos_nor_neighbours():
    ds = planted.make_trace(plants=[planted.attend([DECISION], [7, 12], [1, 2], by=8)])
    special = ("key", np.isin(np.arange(planted.TOKENS), [0, 7, 12]))
    with_mark, without = ds.assign_coords(special=special), analysis.critical_layers(ds)
    found = analysis.critical_layers(with_mark)
    assert (found.placebos < without.placebos).all()
    assert (found.control.sel(layer=[1, 2]) < without.control.sel(layer=[1, 2])).any()


def test_critical_layers_that_cannot_be_tested(noise):
    with pytest.raises(ScenarioError, match="no scenario has a span 'goals'"):
        analysis.critical_layers(noise, ["goals"])
    with pytest.raises(ConfigError, match="nothing to compare: 4 spans, 0 controls"):
        analysis.critical_layers(noise, controls=0)
    with pytest.raises(ConfigError, match="1999 draws are too few"):
        analysis.critical_layers(noise, draws=1999)
    full = planted.make_run(planted.SCENARIOS[:2], spans={"all": tuple(range(1, DECISION))})
    with pytest.raises(ConfigError, match="nothing to compare 'all' with"):
        analysis.critical_layers(full)
    mute = planted.as_run(
        {n: synthetic.trace(n, heads=None, spans={"goal": [3]}) for n in ("Mute_1", "Mute_2")}
    )
    with pytest.raises(ConfigError, match="Mute_1: the trace has no 'attention_mean'"):
        analysis.critical_layers(mute)
    bare = planted.make_trace().drop_vars("token_id")
    with pytest.raises(ConfigError, match="Risky_0: the trace has no token ids"):
        analysis.critical_layers(bare)


def test_a_span_without_placebos_is_left_out_and_named():
    spans = {"goal": (9, 10), "long": tuple(range(13, 23))}
    run = planted.make_run(planted.SCENARIOS[:2], spans=spans)
    found = analysis.critical_layers(run)
    assert found.q.sel(source="long").isnull().all()
    assert found.placebos.sel(source="long") == 0
    assert "long is not tested" in found.attrs["findings"]


def test_long_spans_are_compared_in_parts(monkeypatch):
    run = planted.make_run(planted.SCENARIOS[:2], tokens=80, spans={"long": tuple(range(30, 40))})
    whole = analysis.critical_layers(run)
    monkeypatch.setattr("zarrtrace.analysis.placebos._BLOCK", 1)
    xr.testing.assert_allclose(analysis.critical_layers(run), whole)


# --- on the command line -----------------------------------------------------------------------


def test_bands_on_the_command_line(tmp_path):
    names = ("Risky_1", "Risky_2", "Safe_1", "Safe_2")
    run = str(fakes.make_run(tmp_path, scenarios=names, tokens=12).path)
    without = CliRunner().invoke(command, ["layer-bands", run])
    assert isinstance(without.exception, ConfigError)
    assert "no bands of layers are given" in str(without.exception)
    bands = ["--band", "local=1-1", "--band", "task=2-2", "--band", "decision=3-3"]
    found = CliRunner().invoke(command, ["layer-bands", run, *bands, "--task-span", "balance"])
    assert found.exit_code == 0, found.output
    assert "task in layers 2-2 does not hold" in found.output
    assert "cannot be supported" in found.output
    wrong = CliRunner().invoke(command, ["layer-bands", run, "--band", "local=1:10"])
    assert wrong.exit_code == 2
    assert "'local=1:10' is no band of layers such as local=1-10" in wrong.output
