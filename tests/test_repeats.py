"""Repeats of scenarios: several sampled continuations of one prompt, in every analysis."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import xarray as xr
from click.testing import CliRunner
from scipy import stats

import zarrtrace as zt
from zarrtrace import analysis
from zarrtrace.analysis import critical
from zarrtrace.analysis.placebos import variants
from zarrtrace.analysis.traces import metadata, repeats, scenario_names
from zarrtrace.card import write_card
from zarrtrace.cli.find_ import command
from zarrtrace.cli.info_ import command as info
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.index import build_index, find_feature
from zarrtrace.store import summarize

PROMPT, TOKENS = 9, 12
OPTIONS = {"bet": 3, "stop": 7}


def repeat(
    scenario: str, number: int | None, choice: str | None, *, seed: int, **sizes: Any
) -> xr.Dataset:
    """Return a trace whose last three tokens were generated; the answer is the last but one."""
    ds = synthetic.trace(scenario, seed=seed, tokens=TOKENS, **sizes)
    spans = {
        **ds.attrs["spans"],
        "decision": {"characters": [], "tokens": [PROMPT - 1]},
        "completion": {"characters": [], "tokens": [9, 10, 11]},
    }
    if choice is not None:
        spans["answer"] = {"characters": [], "tokens": [10]}
    generation = {
        "tokens": 3, "temperature": 1.0, "top_p": 1.0, "seed": 0, "samples": 4, "stop": [],
        "prompt_tokens": PROMPT, "text": f" I {choice} now", "ended_by": "length",
    }  # fmt: skip
    ds = ds.assign_attrs(spans=spans, generation=generation, choice=choice)
    if number is not None:
        ds = ds.assign_attrs(repeat=number)
    return ds.assign_coords(generated=("key", np.arange(TOKENS) >= PROMPT))


def run_of(choices: dict[str, list[str | None]], **sizes: Any) -> xr.DataTree:
    """Return a run with the repeats of each scenario; they share its prompt."""
    traces: dict[str, xr.Dataset] = {}
    for at, (scenario, made) in enumerate(choices.items()):
        shared = repeat(scenario, 0, None, seed=1000 * at, **sizes)
        for number, choice in enumerate(made):
            ds = repeat(scenario, number, choice, seed=1000 * at + number, **sizes)
            prompt = ds["query"] < PROMPT
            same = {
                str(name): xr.where(prompt, shared[name], ds[name]).transpose(*ds[name].dims)
                for name in ds.data_vars
            }
            traces[f"{scenario}~{number}"] = ds.assign(same)
    root = xr.Dataset(attrs={"kind": "run", "scenarios": list(traces)})
    return xr.DataTree.from_dict({"/": root, **traces})


CHOICES: dict[str, list[str | None]] = {
    "S0": ["bet", "bet", "stop", None],
    "S1": ["stop", "stop", "stop", "bet"],
    "S2": [None, "bet", "bet", "bet"],
    "S3": ["stop", "bet", "stop", "bet"],
}
NAMES = [f"{name}~{number}" for name in CHOICES for number in range(4)]


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return run_of(CHOICES)


@pytest.fixture(scope="module", params=["run", "table"])
def data(request: pytest.FixtureRequest, run: xr.DataTree) -> Any:
    return run if request.param == "run" else zt.table(run, at="all")


# --- columns -----------------------------------------------------------------------------------


def test_results_by_scenario_tell_repeats(run: xr.DataTree) -> None:
    found = analysis.attention_to(run, "balance")
    assert found["scenario"].to_numpy().tolist() == NAMES
    assert found["scenario_name"].to_numpy().tolist() == [n[:2] for n in NAMES]
    assert found["repeat"].to_numpy().tolist() == [0, 1, 2, 3] * 4
    expected = [choice or "" for made in CHOICES.values() for choice in made]
    assert found["choice"].to_numpy().tolist() == expected
    one = analysis.attention_to(run["S1~3"].to_dataset(), "balance")
    assert one["scenario"].item() == "S1~3"
    np.testing.assert_array_equal(one, found.sel(scenario="S1~3"))


def test_runs_without_generated_text_have_no_such_columns() -> None:
    found = analysis.attention_to(synthetic.random_run(3), "balance")
    assert not {"repeat", "scenario_name", "choice"} & {*found.coords}


def test_a_column_of_metadata_of_that_name_is_kept_beside(run: xr.DataTree) -> None:
    changed = run.map_over_datasets(
        lambda ds: ds.assign_attrs(metadata={"choice": "mine"}) if ds.data_vars else ds
    )
    columns = metadata(changed)
    assert columns["choice"][0] == "bet"
    assert (columns["metadata_choice"] == "mine").all()


def test_a_table_has_the_same_columns(run: xr.DataTree) -> None:
    table = zt.table(run, at="completion")
    assert table["scenario"].to_numpy()[:6].tolist() == ["S0"] * 6
    assert table["repeat"].to_numpy()[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["generated"].to_numpy().all()
    assert scenario_names(table) == NAMES
    for name, column in repeats(run).items():
        np.testing.assert_array_equal(repeats(table)[name], column)


# --- decision ----------------------------------------------------------------------------------


def test_decision_at_the_answer_is_of_the_token_before_it(data: Any, run: xr.DataTree) -> None:
    found = analysis.decision(data, at="answer")
    assert found["scenario"].to_numpy().tolist() == NAMES
    for name in NAMES:
        ds = run[name].to_dataset()
        one = found.sel(scenario=name)
        if ds.attrs["choice"] is None:
            assert np.isnan(one["entropy"])
            assert one["top_token"] == -1
            continue
        ids, logs = ds["next_token"].to_numpy()[9], ds["next_token_logprob"].to_numpy()[9]
        for option, token in OPTIONS.items():
            at = np.flatnonzero(ids == token)
            expected = np.exp(logs[at[0]].astype(float)) if len(at) else np.nan
            np.testing.assert_allclose(one["probability"].sel(option=option), expected)
        assert one["top_token"] == ids[0]
    assert "2 of 16 traces have no span 'answer'" in found.attrs["limits"]


def test_decision_stays_that_of_the_prompt(data: Any, run: xr.DataTree) -> None:
    found = analysis.decision(data)
    ids = [run[name]["next_token"].to_numpy()[PROMPT - 1, 0] for name in NAMES]
    assert found["top_token"].to_numpy().tolist() == ids


def test_decision_before_a_token_that_a_table_lacks_is_refused(run: xr.DataTree) -> None:
    with pytest.raises(ScenarioError, match="no sample at position 9, before span 'answer'"):
        analysis.decision(zt.table(run, at="answer"), at="answer")


# --- choices -----------------------------------------------------------------------------------


def test_choices_are_counted_over_repeats_with_scipys_intervals(data: Any) -> None:
    found = analysis.choices(data)
    assert found["scenario"].to_numpy().tolist() == [*CHOICES]
    for name, made in CHOICES.items():
        one = found.sel(scenario=name)
        assert (one["repeats"], one["none"]) == (4, made.count(None))
        for option in OPTIONS:
            count = made.count(option)
            cell = one.sel(option=option)
            assert cell["count"] == count
            assert cell["rate"] == count / 4
            expected = stats.binomtest(count, 4).proportion_ci(0.95, method="exact")
            np.testing.assert_allclose((cell["low"], cell["high"]), expected, rtol=1e-9)
    stored = analysis.decision(data)["probability"]
    for name in CHOICES:
        np.testing.assert_allclose(
            found["probability"].sel(scenario=name),
            stored.sel(scenario=[f"{name}~{number}" for number in range(4)]).mean("scenario"),
        )
    assert (
        "16 continuations of 4 scenarios chose: bet 8, stop 6; no option 2"
        in (found.attrs["findings"])
    )


def test_choices_have_the_columns_of_metadata(run: xr.DataTree) -> None:
    sized = run.map_over_datasets(
        lambda ds: (
            ds.assign_attrs(metadata={"round": int(ds.attrs["scenario"][1:])})
            if ds.data_vars
            else ds
        )
    )
    assert analysis.choices(sized)["round"].to_numpy().tolist() == [0, 1, 2, 3]
    assert not {"repeat", "choice"} & {*analysis.choices(sized).coords}
    chose = analysis.chose(sized, "bet")
    assert chose["round"].to_numpy().tolist() == [int(name[1]) for name in NAMES]


def test_choices_of_one_trace_and_at_the_answer(run: xr.DataTree) -> None:
    one = analysis.choices(run["S1~3"].to_dataset())
    assert one["count"].sel(option="bet").item() == 1
    assert one["low"].sel(option="bet").item() == pytest.approx(0.025)
    found = analysis.choices(run, at="answer")
    stored = analysis.decision(run, at="answer")["probability"]
    names = [f"S0~{number}" for number in range(3)]  # the fourth has no answer
    np.testing.assert_allclose(
        found["probability"].sel(scenario="S0"), stored.sel(scenario=names).mean("scenario")
    )


def test_choices_need_generated_text_and_options() -> None:
    with pytest.raises(ConfigError, match="no text was generated"):
        analysis.choices(synthetic.random_run(2))
    bare = repeat("S0", 0, None, seed=1).assign_attrs(options={})
    with pytest.raises(ConfigError, match="no scenario has options"):
        analysis.choices(bare)


def test_other_temperatures_are_said_not_to_compare(run: xr.DataTree) -> None:
    hot = run.map_over_datasets(
        lambda ds: (
            ds.assign_attrs(generation={**ds.attrs["generation"], "temperature": 2.0})
            if ds.data_vars
            else ds
        )
    )
    assert "is not the rate to expect" in analysis.choices(hot).attrs["limits"]
    assert "is not the rate to expect" not in analysis.choices(run).attrs["limits"]


# --- repeats are not scenarios -----------------------------------------------------------------


def test_relate_permutes_a_choice_within_scenarios(run: xr.DataTree) -> None:
    outcome = analysis.chose(run, "bet")
    quantity = analysis.attention_to(run, "balance", "completion").sel(layer=2)
    found = analysis.relate(outcome, quantity, n_permutations=999)
    assert found.attrs["unit"] == "repeat, within its scenario"
    known = outcome.notnull().to_numpy()
    names = quantity["scenario_name"].to_numpy()[known]
    x, y = outcome.to_numpy()[known], quantity.to_numpy()[known]
    ranks = np.zeros((2, len(x)))
    for name in set(names):
        rows = names == name
        for row, values in zip(ranks, (x, y), strict=True):
            row[rows] = stats.rankdata(values[rows]) - stats.rankdata(values[rows]).mean()
    expected = (ranks[0] @ ranks[1]) / np.sqrt((ranks**2).sum(1).prod())
    assert found["rho"].item() == pytest.approx(expected)


def test_relate_takes_an_outcome_that_repeats_share_once_a_scenario(run: xr.DataTree) -> None:
    outcome = analysis.decision(run)["remainder"]
    quantity = analysis.attention_to(run, "balance", "completion").sel(layer=2)
    found = analysis.relate(outcome, quantity)
    assert found.attrs["unit"] == "scenario"
    assert found["n_scenarios"] == 4
    x = outcome.to_numpy().reshape(4, 4).mean(1)
    y = quantity.to_numpy().reshape(4, 4).mean(1)
    assert found["rho"].item() == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.attrs["smallest_p"] == pytest.approx(2 / 24)


def test_repeats_of_a_prompt_are_one_unit_of_critical_layers(
    run: xr.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they go on to say, which may be much longer than the prompt."""
    asked: list[Any] = []
    monkeypatch.setattr(critical, "variants", lambda ids: asked.extend(ids) or variants(ids))
    rng = np.random.default_rng(0)
    traces = {}
    for name, node in run.children.items():
        ids = rng.integers(0, 50_000, TOKENS)
        ids[:PROMPT] = np.random.default_rng(int(name[1])).integers(0, 50_000, PROMPT)
        traces[name] = node.to_dataset().assign_coords(token_id=("key", ids))
    changed = xr.DataTree.from_dict({"/": run.to_dataset(), **traces})
    found = analysis.critical_layers(changed, ["balance"], "completion", controls=1)
    assert found.attrs["prompts"] == len(CHOICES)
    assert [len(ids) for ids in asked] == [PROMPT] * len(traces)
    assert [len(group) for group in variants(asked)] == [4] * len(CHOICES)
    assert found["n"].max() == len(CHOICES)
    assert "scenarios are variants" not in found.attrs["limits"]
    # All repeats of S0 are like its first: nothing else changes by them.
    copied = {**traces, **{f"S0~{n}": traces["S0~0"].assign_attrs(repeat=n) for n in range(1, 4)}}
    fewer = {name: ds for name, ds in copied.items() if name not in ("S0~1", "S0~2", "S0~3")}
    several, one = (
        analysis.critical_layers(
            xr.DataTree.from_dict({"/": run.to_dataset(), **some}), ["balance"], "completion",
            controls=1,
        )
        for some in (copied, fewer)
    )  # fmt: skip
    for name in ("attention", "control", "z", "p", "n"):
        np.testing.assert_allclose(several[name], one[name])


def test_layer_bands_count_scenarios(run: xr.DataTree) -> None:
    one = run_of({"S0": ["bet"] * 5})
    bands = {"local": (1, 1), "task": (2, 2), "decision": (3, 3)}
    with pytest.raises(ConfigError, match="there is 1"):
        analysis.layer_bands(one, bands, task_spans=["balance"])
    values = analysis.layer_bands(run, bands, task_spans=["balance"])["value"]
    assert values["scenario"].to_numpy().tolist() == [*CHOICES]
    each = analysis.attention_to(run, ["balance", "goal"], reduce="sum").sum("source")
    np.testing.assert_allclose(
        values.sel(hypothesis="decision"), each.to_numpy().reshape(4, 4, -1).mean(1)
    )


def test_a_prompt_attends_to_no_generated_span(run: xr.DataTree) -> None:
    assert analysis.attention_to(run)["source"].to_numpy().tolist() == ["balance", "goal"]
    behind = analysis.attention_to(run, target="answer")
    assert behind["source"].to_numpy().tolist() == ["balance", "goal", "completion"]


def test_contrast_of_choices_compares_repeats_within_scenarios(data: Any, run: xr.DataTree) -> None:
    found = analysis.contrast(data, "bet", "stop", "answer", by="choice")
    # S2 only ever bets: of the others, each is one observation, its difference of means.
    assert (found.attrs["n_a"], found.attrs["unit"]) == (3, "scenarios")
    assert "3 scenarios with both groups" in found.attrs["limits"]
    assert "3 repeats were left out" in found.attrs["limits"]
    assert found.attrs["smallest_p"] == pytest.approx(2 / 2**3)
    frame = found.to_dataframe()
    for row in frame[frame["n_a"] == 3].sample(10, random_state=1).itertuples():
        differences = []
        for name in ("S0", "S1", "S3"):
            values: dict[str, list[float]] = {"bet": [], "stop": []}
            for number, choice in enumerate(CHOICES[name]):
                if choice:
                    dense = run[f"{name}~{number}"]["features"].sel(layer=row.layer).to_numpy()
                    values[choice].append(float(dense[10, row.feature]))
            differences.append(np.mean(values["bet"]) - np.mean(values["stop"]))
        assert row.difference == pytest.approx(np.mean(differences), rel=1e-6)
        paired = stats.permutation_test(
            (np.array(differences),), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert row.p_permutation == pytest.approx(paired.pvalue)


def test_contrast_of_scenarios_takes_their_repeats_as_one(data: Any, run: xr.DataTree) -> None:
    found = analysis.contrast(data, ["S0", "S1"], ["S2", "S3"], "completion")
    assert (found.attrs["n_a"], found.attrs["n_b"]) == (2, 2)
    for row in found.to_dataframe().sample(10, random_state=0).itertuples():
        dense = np.stack([run[name]["features"].sel(layer=row.layer) for name in NAMES])
        means = dense[:, PROMPT:, row.feature].astype(float).reshape(4, -1).mean(1)
        assert row.mean_a == pytest.approx(means[:2].mean(), rel=1e-6)
        assert row.mean_b == pytest.approx(means[2:].mean(), rel=1e-6)
    with pytest.raises(ConfigError, match="repeats of a scenario differ in 'repeat'"):
        analysis.contrast(data, ["S0", "S1"], ["S2", "S3"], "completion", block="repeat")


def test_repeats_of_one_scenario_are_no_group(run: xr.DataTree) -> None:
    with pytest.raises(ScenarioError, match="group A has 1 scenario"):
        analysis.contrast(run, ["S0"], ["S1"])
    one = run_of({"S0": ["bet", "bet", "stop", "stop"]})
    with pytest.raises(ScenarioError, match="1 scenario has repeats of both groups"):
        analysis.contrast(one, "bet", "stop", "answer", by="choice")


def test_attention_contrast_of_choices(run: xr.DataTree) -> None:
    found = analysis.contrast(run, "bet", "stop", by="choice", what="attention", target="answer")
    assert found.attrs["n_a"] == 3
    assert found["source"].to_numpy().tolist() == ["balance", "goal", "completion", "decision"]


# --- features of generated text ----------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, run: xr.DataTree) -> Path:
    """The run on disk, without what its attributes say of options."""
    path = tmp_path_factory.mktemp("stored") / "run"
    for name in NAMES:
        ds = run[name].to_dataset()
        texts = [str(text) for text in ds["key_token"].to_numpy()]
        zt.write_trace(
            path,
            ds.attrs["scenario"],
            tokens=(ds["token_id"].to_numpy(), texts),
            attention={n: ds["attention"].sel(layer=n).to_numpy() for n in (1, 2, 3)},
            features={n: ds["features"].sel(layer=n).to_numpy() for n in (1, 2, 3)},
            spans={
                span: found["tokens"]
                for span, found in ds.attrs["spans"].items()
                if span not in ("decision", "completion")
            },
            repeat=ds.attrs["repeat"],
            choice=ds.attrs["choice"],
            generation=ds.attrs["generation"],
        )
    return path


def counted(run: xr.DataTree, layer: int) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Return the rows of features that count, and which they are: each prompt once."""
    rows, labels = [], []
    for name in NAMES:
        dense = run[name]["features"].sel(layer=layer).to_numpy()
        first = 0 if name.endswith("~0") else PROMPT
        rows.append(dense[first:])
        labels += [(name, at) for at in range(first, TOKENS)]
    return np.concatenate(rows), labels


def test_an_index_counts_the_prompt_of_repeats_once(stored: Path, run: xr.DataTree) -> None:
    build_index(stored)
    dense, labels = counted(run, 2)
    for feature in (0, 5):
        found = find_feature(stored, 2, feature)
        values = dense[:, feature]
        assert found.frequency == pytest.approx((values != 0).mean())
        assert found.mean == pytest.approx(values.mean(dtype=float), rel=1e-6)
        order = np.argsort(-values, kind="stable")[: len(found.tokens)]
        assert [(one.scenario, one.position) for one in found.tokens] == [
            labels[at] for at in order
        ]
        assert [one.generated for one in found.tokens] == [labels[at][1] >= PROMPT for at in order]
        generated = find_feature(stored, 2, feature, text="generated", top=3).tokens
        assert generated == tuple(one for one in found.tokens if one.generated)[:3]
        prompts = find_feature(stored, 2, feature, text="prompt").tokens
        assert prompts == tuple(one for one in found.tokens if not one.generated)


def test_find_says_which_tokens_were_generated(stored: Path) -> None:
    build_index(stored)
    shown = CliRunner().invoke(
        command, [str(stored), "--layer", "2", "--feature", "5", "--text", "generated"]
    )
    assert shown.exit_code == 0, shown.output
    assert "of its strongest tokens are generated; an index holds 20" in shown.output
    rows = shown.output.splitlines()[4:]
    assert rows
    assert all(" generated " in row for row in rows)


def test_words_count_the_prompt_of_repeats_once(data: Any, run: xr.DataTree) -> None:
    for text, kept in (
        ("all", lambda name, at: at >= PROMPT or name.endswith("~0")),
        ("prompt", lambda name, at: at < PROMPT and name.endswith("~0")),
        ("generated", lambda name, at: at >= PROMPT),
    ):
        found = analysis.word_associations(data, text=text, top=99)
        words: dict[str, list[np.ndarray]] = {}
        for name in NAMES:
            ds = run[name].to_dataset()
            for at, word in enumerate(ds["key_token"].to_numpy()):
                if kept(name, at):
                    words.setdefault(word, []).append(ds["features"].sel(layer=3).to_numpy()[at])
        frame = found.to_dataframe()
        frame = frame[frame["layer"] == 3]
        assert set(frame["word"]) <= set(words)
        for row in frame.sample(20, random_state=0).itertuples():
            values = np.array(words[row.word])[:, row.feature]
            assert row.occurrences == len(values)
            assert row.count == (values != 0).sum()
            assert row.score == pytest.approx(values.mean(dtype=float), rel=1e-6)
    with pytest.raises(ConfigError, match="no token was generated"):
        analysis.word_associations(synthetic.random_run(2), text="generated")


@pytest.mark.parametrize("span", ["balance", "answer"])
def test_specific_features_count_the_prompt_of_repeats_once(
    data: Any, run: xr.DataTree, span: str
) -> None:
    """And each continuation, also of repeats without the span; the first of S2 has no answer."""
    found = analysis.position_specific_features(data, [span], top=3).sel(span=span)
    for layer in run["S0~0"].indexes["layer"]:
        dense, labels = counted(run, layer)
        spans = {name: run[name].attrs["spans"].get(span, {"tokens": []}) for name in NAMES}
        is_at = np.array([at in spans[name]["tokens"] for name, at in labels])
        fires = dense != 0
        at, elsewhere = fires[is_at].mean(0), fires[~is_at].mean(0)
        here = found.sel(layer=layer)
        assert here["tokens_at"] == is_at.sum()
        assert here["tokens_elsewhere"] == (~is_at).sum()
        order = np.argsort(elsewhere - at, kind="stable")[:3]
        np.testing.assert_allclose(here["score"], (at - elsewhere)[order])
        np.testing.assert_array_equal(here["feature"], order)
    assert found["scenarios"].max() <= (4 if span == "balance" else 14)


def test_blocks_of_crossreference_hold_all_repeats(run: xr.DataTree) -> None:
    words = analysis.word_associations(run)
    pairs = {"balance": "balance"}
    found = analysis.crossreference(run, words, pairs, block="scenario", n_permutations=99)
    assert (found["n_scenarios"] <= 16).all()
    same = analysis.crossreference(run, words, pairs, block="scenario_name", n_permutations=99)
    xr.testing.assert_equal(found, same)
    with pytest.raises(ConfigError, match="repeats of a scenario differ in 'choice'"):
        analysis.crossreference(run, words, pairs, block="choice")


# --- what is said of it ------------------------------------------------------------------------


def test_info_accessors_and_card_tell_texts_and_choices(stored: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(info, [str(stored)]).output
    (line,) = [line for line in shown.splitlines() if line.startswith("S0~1 ")]
    assert line.split(maxsplit=8)[8].split(maxsplit=1) == ["bet", "' I bet now'"]
    found = summarize(stored).traces[4]
    assert (found.repeat, found.choice, found.completion) == (0, "stop", " I stop now")

    run = zt.open_run(stored)
    table = run.zt.scenarios
    assert table.loc["S1~3", ["scenario_name", "repeat", "choice", "completion"]].tolist() == [
        "S1", 3, "bet", " I bet now",
    ]  # fmt: skip
    assert (run["S1~3"].zt.completion, run["S1~3"].zt.choice) == (" I bet now", "bet")
    rows = zt.table(run, "completion").zt.scenarios
    assert rows.loc[("S1", 3), ["samples", "choice"]].tolist() == [3, "bet"]
    prompt = zt.open_trace(stored / "S0~3")
    assert prompt.zt.choice is None

    shutil.copytree(stored, tmp_path / "copy")
    card = write_card(tmp_path / "copy").read().decode()
    assert "16 repeats of 4 prompts" in card
    assert "the model itself wrote 16 continuations of 4 prompts" in card
    assert "Options found in them: bet (8), stop (6), none (2)." in card
    assert "| S1\\~3 | 12 |  | bet | I bet now |" in re.sub(" +", " ", card).replace("| |", "|  |")
