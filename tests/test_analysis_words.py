"""Words, their features and the decision, against pandas and SciPy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar

import fakes
import numpy as np
import pandas as pd
import pytest
import rounding
import synthetic
import xarray as xr
from chunk_reads import ChunkReads
from scipy import stats

from zarrtrace.analysis import words
from zarrtrace.analysis.blocks import blocks
from zarrtrace.analysis.contrasts import contrast
from zarrtrace.analysis.crossreferences import crossreference
from zarrtrace.analysis.decisions import decision, relate
from zarrtrace.analysis.features import feature_trajectory
from zarrtrace.analysis.findings import with_findings
from zarrtrace.analysis.pathways import pathway_features
from zarrtrace.analysis.shifts import p_of_shifts
from zarrtrace.analysis.specificity import position_specific_features
from zarrtrace.analysis.words import _stable_order, read_table, word_associations
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.store import open_run


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return synthetic.random_run()


def associations_by_pandas(run: xr.DataTree, *, strip: bool = False) -> pd.DataFrame:
    frames = []
    for child in run.children.values():
        frame = child["features"].astype(float).to_series().rename("activation").reset_index()
        texts = child["query_token"].to_numpy()
        frame["word"] = [texts[q].strip() if strip else texts[q] for q in frame["query"]]
        frames.append(frame)
    groups = pd.concat(frames).groupby(["layer", "feature", "word"])["activation"]
    found = groups.agg(
        score="mean", max_activation="max", count=lambda x: (x > 0).sum(), occurrences="size"
    )
    return found[found["count"] > 0]


class TestWordAssociations:
    @pytest.mark.parametrize("strip", [False, True])
    def test_against_pandas(self, run: xr.DataTree, strip: bool) -> None:
        # 24 features a token: the index of 32 holds all of them.
        found = word_associations(run, top=100, strip=strip).to_dataframe()
        found = found.set_index(["layer", "feature", "word"]).sort_index()
        expected = associations_by_pandas(run, strip=strip).sort_index()
        assert list(found.index) == list(expected.index)
        for column in ("score", "max_activation", "count", "occurrences"):
            stored = rounding.rounding("float32", 1, expected[column])
            rounding.assert_close(found[column], expected[column], stored)

    def test_best_words_come_first(self, run: xr.DataTree) -> None:
        found = word_associations(run, top=3).to_dataframe()
        expected = associations_by_pandas(run)["score"]
        for (layer, feature), rows in found.groupby(["layer", "feature"], sort=False):
            best = expected.loc[layer, feature].sort_values(ascending=False)[:3]
            rounding.assert_close(rows["score"], best, rounding.rounding("float32", 1, best))
        assert found[["layer", "feature"]].apply(tuple, axis=1).is_monotonic_increasing

    def test_rare_words_can_be_left_out(self, run: xr.DataTree) -> None:
        found = word_associations(run, top=100, min_count=3)
        assert found.sizes["row"] == (associations_by_pandas(run)["count"] >= 3).sum()

    def test_every_activation_counts(self) -> None:
        """The 32 strongest of 400 active features hold 0.7 of the sum."""
        ds = synthetic.trace("S", tokens=40, features=512, active=0.8, layers=(1, 2))
        found = (
            word_associations(ds, top=100).to_dataframe().set_index(["layer", "feature", "word"])
        )
        assert found["count"].sum() == (ds["features"].to_numpy() > 0).sum()
        dense, texts = ds["features"].to_numpy().astype(float), ds["query_token"].to_numpy()
        for word in np.unique(texts):
            means = dense[:, texts == word].mean(1)
            for layer, feature in ((1, 7), (2, 400)):
                mean = means[layer - 1, feature]
                if mean > 0:
                    score = found["score"].loc[layer, feature, word]
                    rounding.assert_close(score, mean, rounding.rounding("float32", 1, mean))

    def test_special_tokens_are_left_out(self, run: xr.DataTree) -> None:
        marked = run.map_over_datasets(
            lambda ds: (
                ds.assign_coords(special=("key", np.arange(ds.sizes["key"]) == 0))
                if "key" in ds.dims
                else ds
            )
        )
        without = run.map_over_datasets(lambda ds: ds.isel(query=slice(1, None)) if ds.dims else ds)
        rows = ["layer", "feature", "word"]
        found, expected = (
            word_associations(one, top=100).to_dataframe().set_index(rows).sort_index()
            for one in (marked, without)
        )
        pd.testing.assert_frame_equal(found, expected)
        xr.testing.assert_equal(word_associations(marked, special=True), word_associations(run))

    def test_values_that_are_not_finite_are_silent(self) -> None:
        ds = synthetic.trace("S", layers=(1,))
        odd = ds.copy(deep=True)
        odd["features"][0, 5, :3] = [np.nan, np.inf, -np.inf]
        ds["features"][0, 5, :3] = 0
        xr.testing.assert_equal(word_associations(odd), word_associations(ds))

    def test_a_planted_word(self, run: xr.DataTree) -> None:
        traces = []
        for child in run.children.values():
            ds = child.to_dataset().copy(deep=True)
            at = ds["query_token"].to_numpy() == " stop"
            ds["features"][2, :, 20] = np.where(at, 9, 0)
            traces.append(synthetic.with_index(ds))
        found = word_associations(synthetic.run(traces)).to_dataframe()
        rows = found[(found["layer"] == 3) & (found["feature"] == 20)]
        assert rows["word"].tolist() == [" stop"]
        assert rows["score"].tolist() == [9]

    @pytest.mark.parametrize("most", [50, 2**62])
    def test_order_is_stable(self, most: int) -> None:
        keys = np.random.default_rng(0).integers(0, 50, 999) * (most // 50)
        np.testing.assert_array_equal(_stable_order(keys), np.argsort(keys, kind="stable"))

    def test_layers_are_read_some_at_a_time(self, run: xr.DataTree) -> None:
        found = list(blocks(run, ["features"]))
        ids = [np.arange(block.starts[-1], dtype=np.int32) % 9 for block in found]
        together, apart = (list(words._by_layer(found, ids, 9, most)) for most in (2**24, 1))
        assert [layer for layer, *_ in together] == [layer for layer, *_ in apart] == [1, 2, 3]
        for (_, pairs, counts), (_, same, same_counts) in zip(together, apart, strict=True):
            np.testing.assert_array_equal(counts, same_counts)
            for values, others in zip(pairs, same, strict=True):
                np.testing.assert_array_equal(values, others)

    def test_memory_holds_pairs_and_not_tokens(self) -> None:
        ds = synthetic.trace("S", layers=(1,))
        (block,) = blocks(ds, ["features"])
        ids = np.arange(block.starts[-1], dtype=np.int32) % 3
        total = words._Sum(3)
        for _ in range(9):
            total.add(*words._pairs_of_layer(ds["features"].to_numpy()[0], 0, words=ids, n_words=3))
            assert len(total.pairs().key) <= 3 * ds.sizes["feature"]
        assert not total._waiting

    def test_lazy_equals_eager(self, run: xr.DataTree) -> None:
        xr.testing.assert_identical(word_associations(synthetic.lazy(run)), word_associations(run))

    def test_missing_layers_count_nowhere(self, run: xr.DataTree) -> None:
        rest = synthetic.run([child.to_dataset() for child in list(run.children.values())[1:]])
        expected = word_associations(rest).to_dataframe().query("layer == 2")
        for first in (
            synthetic.without_layer(run["S0"].to_dataset(), 2),
            run["S0"].to_dataset().sel(layer=[1, 3]),
        ):
            found = word_associations(synthetic.change(run, S0=first)).to_dataframe()
            pd.testing.assert_frame_equal(
                found.query("layer == 2").reset_index(drop=True), expected.reset_index(drop=True)
            )

    def test_reads_features_once(self, shared_run: fakes.FakeRun, chunk_reads: ChunkReads) -> None:
        run = open_run(shared_run.path)
        chunk_reads.clear()
        word_associations(run)
        read = chunk_reads.below(shared_run.path)
        assert set(read.values()) == {1}
        arrays = Counter(chunk.split("/")[1] for chunk in read)
        assert {*arrays} == {"features", "query_token", "special", "sae_id"}

    def test_refusals(self, run: xr.DataTree) -> None:
        with pytest.raises(ConfigError, match="no 'features'"):
            word_associations(synthetic.random_run(2, features=None))
        with pytest.raises(ConfigError, match="top=0"):
            word_associations(run, top=0)


TABLE = pd.DataFrame({"layer": 1, "feature": [1, 2], "word": ["null", " Ω"], "score": [1.5, 2.0]})


class TestTable:
    @pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
    def test_files(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"table.{ending}"
        if ending == "parquet":
            TABLE.to_parquet(path)
        else:
            TABLE.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
        found = read_table(path)
        assert found["word"].tolist() == ["null", " Ω"]
        assert found["score"].tolist() == [1.5, 2.0]

    def test_own_table(self, run: xr.DataTree) -> None:
        own = word_associations(run)
        assert len(read_table(own)) == own.sizes["row"]

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (TABLE.drop(columns="word"), "no column 'word'"),
            (TABLE.assign(layer=[1.5, 2]), "whole number"),
            (TABLE.assign(score="high"), "does not fit"),
            (xr.Dataset(), "no column"),
            ("nowhere.csv", "cannot be read"),
            ("table.xlsx", "unknown kind"),
        ],
    )
    def test_refusals(self, table: pd.DataFrame, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_table(table)


def measures_by_hand(
    run: xr.DataTree, layer: int, feature: int, span: str
) -> tuple[list[float], list[float]]:
    """Both measures of one feature in each scenario, by SciPy."""
    follows, place = [], []
    for child in run.children.values():
        x = child["features"].sel(layer=layer, feature=feature).to_numpy().astype(float)
        attention = child["attention_mean"].sel(layer=layer).to_numpy().astype(float)
        at = child.attrs["spans"][span]["tokens"]
        follows.append(follows_by_scipy(x, attention, at, np.arange(len(x))))
        spread = x.std() if np.ptp(x) > 0 else np.nan
        place.append((x[at].mean() - np.delete(x, at).mean()) / spread)
    return follows, place


def follows_by_scipy(
    x: np.ndarray, attention: np.ndarray, at: list[int], counted: np.ndarray
) -> float:
    """Correlate ranks over the tokens after a span; strength is ranked among all that count."""
    ranks = np.full(len(x), np.nan)
    ranks[counted] = stats.rankdata(x[counted])
    after = counted[counted > max(at)]
    if len(after) < 3 or np.ptp(x[after]) == 0:
        return np.nan
    attended = stats.rankdata(attention[np.ix_(after, at)].mean(1))
    return float(stats.pearsonr(ranks[after], attended).statistic)


def table_of(words: dict[int, str], layers: tuple[int, ...] = (1, 2, 3)) -> pd.DataFrame:
    rows = [(layer, f, word, 1.0) for layer in layers for f, word in words.items()]
    return pd.DataFrame(rows, columns=["layer", "feature", "word", "score"])


class TestCrossreference:
    words: ClassVar = {f: " Balance" if f < 4 else "stop" if f < 8 else "round" for f in range(14)}

    def test_against_scipy(self, run: xr.DataTree) -> None:
        found = crossreference(
            run, table_of(self.words), {"balance": "balance", "stop": "decision"}
        )
        assert found["mean"].dims == ("measure", "pair", "layer")
        assert found["span"].to_numpy().tolist() == ["balance", "decision"]
        assert np.isnan(found["mean"].sel(measure="attention", pair="stop @ decision")).all()
        for layer in (1, 2, 3):
            values = np.array([measures_by_hand(run, layer, f, "balance") for f in range(14)])
            for which, measure in enumerate(("attention", "place")):
                cell = found.sel(measure=measure, pair="balance @ balance", layer=layer)
                own, others = values[:4, which], values[4:, which]
                expected = [np.nanmean(np.nanmean(x, axis=0)) for x in (own, others)]
                assert float(cell["mean"]) == pytest.approx(expected[0])
                assert float(cell["mean_others"]) == pytest.approx(expected[1])
                assert float(cell["difference"]) == pytest.approx(expected[0] - expected[1])
                assert (cell["n_features"], cell["n_others"]) == (4, 10)
                assert cell["n_scenarios"] == 6

    def test_every_place_of_the_span_by_hand(self) -> None:
        ds = synthetic.trace("S", tokens=20, layers=(1,), features=14, active=0.8)
        found = crossreference(ds, table_of(self.words, (1,)), {"balance": "balance"})
        values, attention = (
            ds[name].to_numpy()[0].astype(float) for name in ("features", "attention_mean")
        )
        counted = np.arange(20)
        by_hand: dict[str, list[float]] = {"attention": [], "place": []}
        for start in range(20):
            at = [start, (start + 1) % 20]
            rest = np.setdiff1d(counted, at)
            stands = (values[at].mean(0) - values[rest].mean(0)) / values.std(0)
            by_hand["place"].append(stands[:4].mean() - stands[4:].mean())
            if start <= 15:  # three tokens stand behind the last of the two
                rho = [follows_by_scipy(x, attention, at, counted) for x in values.T]
                difference = np.nanmean(rho[:4]) - np.nanmean(rho[4:])
                by_hand["attention"].append(difference * np.sqrt(20 - start - 2 - 1))
        for measure, moved in by_hand.items():
            reached = np.abs(moved) >= abs(moved[3]) - 1e-9
            cell = found.sel(measure=measure).isel(pair=0, layer=0)
            assert float(cell["p_permutation"]) == pytest.approx(reached.mean())
            assert float(cell["p_familywise"]) == pytest.approx(reached.mean())  # one layer
        assert found.attrs["limits"].startswith("No p-value can fall below 0.05 (0.062")

    def test_familywise_by_hand(self, run: xr.DataTree) -> None:
        rng = np.random.default_rng(0)
        statistics = np.abs(rng.normal(size=(5, 40)) * [[1], [10], [0.1], [3], [1]])
        statistics[2] = np.nan
        p, familywise = p_of_shifts(statistics)
        scaled = statistics / np.sqrt((statistics**2).mean(1, keepdims=True))
        for row in (0, 1, 3, 4):
            reached = np.nanmax(scaled, axis=0) >= scaled[row, 0]
            assert familywise[row] == pytest.approx(reached.mean())
            assert p[row] == pytest.approx((scaled[row] >= scaled[row, 0]).mean())
        assert np.isnan([p[2], familywise[2]]).all()

    def test_shifts_without_a_value_do_not_count(self) -> None:
        """Else they would count as shifts that show nothing, and p would be too small."""
        statistics = np.abs(np.random.default_rng(0).normal(size=(2, 40)))
        statistics[0, 1:11] = np.nan
        statistics[1, 6:16] = np.nan
        p, familywise = p_of_shifts(statistics)
        scaled = statistics / np.sqrt(np.nanmean(statistics**2, axis=1, keepdims=True))
        largest = np.fmax(*scaled)
        largest = largest[~np.isnan(largest)]
        assert len(largest) == 35
        for row in (0, 1):
            there = scaled[row][~np.isnan(scaled[row])]
            assert p[row] == pytest.approx((there >= scaled[row, 0]).mean())
            assert familywise[row] == pytest.approx((largest >= scaled[row, 0]).mean())

    def test_planted_features_are_found(self, run: xr.DataTree) -> None:
        traces = []
        for child in run.children.values():
            ds = child.to_dataset().copy(deep=True)
            to_balance = ds["attention_mean"].to_numpy()[1][:, 3:5].mean(1)
            for f in range(4):
                ds["features"][1, 5:, f] = to_balance[5:]
                ds["features"][1, :, 4 + f] = 0
                ds["features"][1, -1, 4 + f] = 5
            traces.append(ds)
        found = crossreference(synthetic.run(traces), table_of(self.words))
        assert found["pair"].to_numpy().tolist() == ["balance @ balance", "stop @ decision"]
        apart = crossreference(synthetic.run(traces), table_of(self.words), block="scenario")
        attention = apart.sel(measure="attention", pair="balance @ balance")
        assert float(attention["mean"].sel(layer=2)) > 0.9  # ranks of before the span among them
        assert float(attention["q_permutation"].sel(layer=2)) < 0.05
        place = apart.sel(measure="place", pair="stop @ decision")
        assert float(place["q_permutation"].sel(layer=2)) < 0.05
        assert "stop @ decision (place) in layers 2" in apart.attrs["findings"]
        # Twelve places of one template cannot say.
        assert float(found["p_permutation"].min()) >= 1 / 14
        assert found.attrs["findings"].startswith("In none of 3 tests")
        assert "moved together" in found.attrs["limits"]

    def test_blocks_are_columns_of_metadata(self, run: xr.DataTree) -> None:
        numbers = {name: number for number, name in enumerate(run.children)}
        of_games = synthetic.run(
            [
                synthetic.with_attributes(
                    child.to_dataset(), metadata={"game": name, "half": numbers[name] // 3}
                )
                for name, child in run.children.items()
            ]
        )
        table, pair = table_of(self.words), {"balance": "balance"}
        each, games, halves, together = (
            crossreference(of_games, table, pair, block=block)
            for block in ("scenario", "game", "half", None)
        )
        for name in ("difference", "p_permutation"):
            np.testing.assert_array_equal(each[name], games[name])
        assert not np.array_equal(each["p_permutation"], halves["p_permutation"])
        assert (
            float(halves["p_permutation"].min()) < 1 / 14 <= float(together["p_permutation"].min())
        )
        with pytest.raises(ConfigError, match="block='player'"):
            crossreference(of_games, table, pair, block="player")

    def test_special_tokens_are_left_out(self, run: xr.DataTree) -> None:
        marked, changed = [], []
        for child in run.children.values():
            ds = child.to_dataset().copy(deep=True)
            special = np.arange(ds.sizes["key"]) < 2
            ds = ds.assign_coords(special=("key", special))
            marked.append(ds)
            ds = ds.copy(deep=True)
            ds["features"][:, :2] = 1000
            changed.append(ds)
        table, pair = table_of(self.words), {"balance": "balance"}
        with_, without = (
            crossreference(synthetic.run(one), table, pair) for one in (changed, marked)
        )
        xr.testing.assert_allclose(with_, without)
        loud = crossreference(synthetic.run(changed), table, pair, special=True)
        assert not np.allclose(loud["mean"], without["mean"])

    def test_rows_that_are_not_stored_do_not_count(self, run: xr.DataTree) -> None:
        kept = (0, 5, 7, 8, 10, 11)
        chosen = synthetic.run(
            [synthetic.with_queries(c.to_dataset(), kept) for c in run.children.values()]
        )
        pair = {"balance": "balance"}
        found = crossreference(chosen, table_of(self.words), pair)
        by_hand = []
        for child in run.children.values():
            x = child["features"].to_numpy()[0].astype(float)
            attention = child["attention_mean"].to_numpy()[0].astype(float)
            by_hand.append(
                [follows_by_scipy(x[:, f], attention, [3, 4], np.array(kept)) for f in range(4)]
            )
        cell = found.sel(measure="attention").isel(pair=0, layer=0)
        assert float(cell["mean"]) == pytest.approx(np.nanmean(np.nanmean(by_hand, axis=1)))
        last = synthetic.run(
            [
                synthetic.with_queries(c.to_dataset(), [c.sizes["query"] - 1])
                for c in run.children.values()
            ]
        )
        found = crossreference(last, table_of(self.words), pair)
        assert (found["n_features"].sel(measure="attention") == 0).all()
        assert (found["n_features"].sel(measure="place") == 4).all()

    def test_only_the_best_words_of_a_feature_are_its_own(self, run: xr.DataTree) -> None:
        weak = table_of(dict.fromkeys(range(14), "balance")).assign(score=0.5)
        both = pd.concat([table_of(self.words), weak])
        pair = {"balance": "balance"}
        one = crossreference(run, both, pair)
        assert (one["n_features"] == 4).all()
        assert (crossreference(run, both, pair, top=2)["n_others"] == 0).all()

    def test_lazy_equals_eager_and_own_tables_work(self, run: xr.DataTree) -> None:
        table = word_associations(run)
        xr.testing.assert_identical(
            crossreference(synthetic.lazy(run), table), crossreference(run, table)
        )

    def test_missing_layers_and_spans_leave_scenarios_out(self, run: xr.DataTree) -> None:
        rest = synthetic.run([child.to_dataset() for child in list(run.children.values())[1:]])
        pair = {"balance": "balance"}
        expected = crossreference(rest, table_of(self.words), pair)["mean"]
        for first in (
            synthetic.without_layer(run["S0"].to_dataset(), 2),
            synthetic.without_span(run["S0"].to_dataset(), "balance"),
            run["S0"].to_dataset().sel(layer=[1, 3]),
        ):
            found = crossreference(synthetic.change(run, S0=first), table_of(self.words), pair)
            xr.testing.assert_allclose(found["mean"].sel(layer=2), expected.sel(layer=2))

    def test_refusals(self, run: xr.DataTree) -> None:
        table = table_of(self.words)
        with pytest.raises(ConfigError, match="goes with the word 'casino'"):
            crossreference(run, table, {"casino": "balance"})
        with pytest.raises(ConfigError, match="'balance' or 'goal' or 'bet' or 'stop'"):
            crossreference(run, table_of({1: "x", 2: "y"}))
        with pytest.raises(ScenarioError, match="nowhere"):
            crossreference(run, table, {"stop": "nowhere"})
        with pytest.raises(ConfigError, match="names feature 99"):
            crossreference(run, table_of({**self.words, 99: "far"}))
        for half in ("features", "heads"):
            with pytest.raises(ConfigError, match="the trace has no"):
                crossreference(synthetic.random_run(2, **{half: None}), table)


class TestDecision:
    def test_against_the_stored_ten(self, run: xr.DataTree) -> None:
        found = decision(run, vocabulary=128)
        stored = 0
        for name, child in run.children.items():
            p = np.exp(child["next_token_logprob"].to_numpy()[-1].astype(float))
            ids = child["next_token"].to_numpy()[-1].tolist()
            here = found.sel(scenario=name)
            rest = 1 - p.sum()
            assert float(here["entropy"]) == pytest.approx(stats.entropy([*p, rest]))
            even = stats.entropy([*p, *[rest / 118] * 118])
            assert float(here["entropy_upper"]) == pytest.approx(even)
            assert float(here["remainder"]) == pytest.approx(rest)
            assert (here["top_token"], here["top_probability"]) == (ids[0], pytest.approx(p[0]))
            for option, token in (("bet", 3), ("stop", 7)):
                value = float(here["probability"].sel(option=option))
                bound = float(here["upper_bound"].sel(option=option))
                if token in ids:
                    stored += 1
                    assert value == bound == pytest.approx(p[ids.index(token)])
                else:
                    assert np.isnan(value)
                    assert bound == pytest.approx(min(p[-1], rest))
        assert 0 < stored < 12

    def test_shares_of_the_options(self) -> None:
        ds = synthetic.trace("S", options={"bet": 3, "stop": 7})
        ids, p = ds["next_token"].to_numpy(), ds["next_token_logprob"].to_numpy()
        ids[-1] = np.arange(10)
        p[-1] = np.log([0.5, 0.1, 0.09, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01])
        found = decision(ds)
        # Logarithms of 1/2 and 1/4 at most 3 in size, each stored in float32, in a quotient.
        error = rounding.rounding("float32", 2, 3)
        rounding.assert_close(found["share"], [0.75, 0.25], error)
        assert found["scenario"] == "S"
        ids[-1, 7] = 29
        assert np.isnan(decision(ds)["share"]).all()

    def test_options_that_some_lack(self, run: xr.DataTree) -> None:
        other = synthetic.trace("S0", options={"fold": 9})
        ids = other["next_token"].to_numpy()
        ids[-1] = np.arange(10)
        found = decision(synthetic.change(run, S0=other))
        assert found["option"].to_numpy().tolist() == ["fold", "bet", "stop"]
        assert float(found["share"].sel(scenario="S0", option="fold")) == 1
        assert np.isnan(found["upper_bound"].sel(scenario="S0", option="bet"))

    def test_lazy_equals_eager(self, run: xr.DataTree) -> None:
        found = decision(synthetic.lazy(run))
        assert found["entropy"].chunks is not None
        xr.testing.assert_identical(with_findings(found.compute()), decision(run))

    def test_reads_the_last_token_only(
        self, shared_run: fakes.FakeRun, chunk_reads: ChunkReads
    ) -> None:
        run = open_run(shared_run.path)
        chunk_reads.clear()
        decision(run).load()
        assert chunk_reads.arrays(shared_run.path) == {
            "next_token",
            "next_token_logprob",
            "next_token_text",
        }

    def test_refusals(self, run: xr.DataTree) -> None:
        ds = synthetic.trace("S")
        with pytest.raises(ConfigError, match="S: the trace has no 'next_token'"):
            decision(ds.drop_vars("next_token"))
        with pytest.raises(ConfigError, match="no scenario has options"):
            decision(synthetic.with_attributes(ds, options={}))
        with pytest.raises(ConfigError, match="vocabulary=10"):
            decision(run, vocabulary=10)


class TestRelate:
    scenarios: ClassVar = [f"S{i}" for i in range(9)]

    def outcome(self) -> xr.DataArray:
        values = np.random.default_rng(0).random(9)
        return xr.DataArray(values, dims="scenario", coords={"scenario": self.scenarios})

    def quantity(self) -> xr.DataArray:
        values = np.random.default_rng(1).random((2, 9, 40))
        return xr.DataArray(
            values,
            dims=("source", "scenario", "layer"),
            coords={"source": ["balance", "goal"], "scenario": self.scenarios, "layer": range(40)},
        )

    def test_against_scipy(self) -> None:
        outcome, quantity = self.outcome(), self.quantity()
        found = relate(outcome, quantity)
        assert found["rho"].dims == ("source", "layer")
        for source, layer in (("balance", 0), ("goal", 7)):
            expected = stats.spearmanr(outcome, quantity.sel(source=source, layer=layer))
            cell = found.sel(source=source, layer=layer)
            assert float(cell["rho"]) == pytest.approx(expected.statistic)
            assert float(cell["p_permutation"]) == pytest.approx(expected.pvalue, abs=0.03)
        np.testing.assert_allclose(
            found["q_permutation"].to_numpy().ravel(),
            stats.false_discovery_control(found["p_permutation"].to_numpy().ravel()),
        )

    def test_order_of_scenarios_does_not_matter(self) -> None:
        outcome, quantity = self.outcome(), self.quantity()
        shuffled = quantity.isel(scenario=[3, 1, 0, 2, 8, 7, 6, 5, 4])
        xr.testing.assert_allclose(
            relate(outcome, shuffled)["rho"], relate(outcome, quantity)["rho"]
        )

    def test_planted_and_noise(self) -> None:
        outcome, quantity = self.outcome(), self.quantity()
        quantity[0, :, 5] = np.exp(outcome)
        found = relate(outcome, quantity)
        assert float(found["rho"].sel(source="balance", layer=5)) == pytest.approx(1)
        assert float(found["q_permutation"].sel(source="balance", layer=5)) < 0.05
        assert int((found["q_permutation"] < 0.05).sum()) == 1

    def test_missing_values_leave_scenarios_out(self) -> None:
        outcome, quantity = self.outcome(), self.quantity()
        outcome[0] = np.nan
        quantity[0, 1, 3] = np.nan
        quantity[1, 1:8, 3] = np.nan
        found = relate(outcome, quantity)
        assert (found["n_scenarios"].sel(layer=3) == [7, 1]).all()
        assert np.isnan(found["rho"].sel(source="goal", layer=3))
        expected = stats.spearmanr(outcome[2:], quantity[0, 2:, 3]).statistic
        assert float(found["rho"].sel(source="balance", layer=3)) == pytest.approx(expected)

    def test_refusals(self) -> None:
        outcome, quantity = self.outcome(), self.quantity()
        with pytest.raises(ConfigError, match="quantity has no dimension 'scenario'"):
            relate(outcome, quantity.isel(scenario=0))
        with pytest.raises(ConfigError, match="the outcome has dimensions"):
            relate(quantity, quantity)
        with pytest.raises(ConfigError, match="only 2 scenarios"):
            relate(outcome[:2], quantity)


def test_layers_without_an_sae_or_not_stored_yet(tmp_path: Path) -> None:
    names = ("Safe_1", "Safe_2", "Risky_1", "Risky_2")
    no_sae = open_run(fakes.make_run(tmp_path, name="a", scenarios=names, without_sae=(2,)).path)
    staged = open_run(
        fakes.make_run(tmp_path, name="b", scenarios=names, drop=dict.fromkeys(names, (3,))).path,
        missing="nan",
    )
    for run, layer in ((no_sae, 2), (staged, 3)):
        rest = {1, 2, 3} - {layer}
        assert set(word_associations(run)["layer"].to_numpy()) == rest
        assert set(contrast(run, "risky", "safe")["layer"].to_numpy()) == rest
        assert (position_specific_features(run)["feature"].sel(layer=layer) == -1).all()
        assert (pathway_features(run, "balance")["feature"].sel(layer=layer) == -1).all()
        assert np.isnan(feature_trajectory(run, (layer, 1))).all()
        table = table_of({f: "x" if f < 8 else "y" for f in range(16)})
        found = crossreference(run, table, {"x": "balance"})
        assert (found["n_features"].sel(layer=layer) == 0).all()
