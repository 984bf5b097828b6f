"""Analyses of tables: the same answers as of the traces that they were made from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sample_tables
import scipy.stats
import synthetic
import xarray as xr
from everyday import mostly_long

import zarrtrace as zt
from zarrtrace import analysis
from zarrtrace.analysis import blocks
from zarrtrace.analysis.findings import with_findings
from zarrtrace.errors import ConfigError, ScenarioError

#: How a table comes to an analysis.
OPENED = ("lazy", "dask", "plain xarray")

ANALYSES: dict[str, Callable[[Any], xr.Dataset | xr.DataArray]] = {
    "trajectory": lambda data: analysis.feature_trajectory(
        data, [(1, 3), (3, 0)], ["balance", "decision"]
    ),
    "one feature": lambda data: analysis.feature_trajectory(data, (2, 5)),
    "largest": lambda data: analysis.feature_trajectory(data, (2, 5), "balance", reduce="max"),
    "each token": lambda data: analysis.feature_trajectory(data, (2, 5), "balance", reduce="none"),
    "positions": lambda data: analysis.feature_trajectory(data, [(1, 1)], [[2, -3]]),
    "decision": lambda data: analysis.decision(data, vocabulary=30),
    "tags": lambda data: analysis.contrast(data, "risky", "safe", ["balance", "decision"]),
    "names": lambda data: analysis.contrast(data, ["S0", "S3"], ["S5", "S1"], min_scenarios=2),
    "metadata": lambda data: analysis.contrast(data, by="won", at=["decision", [0, -2]]),
    "words": lambda data: analysis.word_associations(data, top=3),
    "positional": lambda data: analysis.position_specific_features(data, top=4),
    "one span": lambda data: analysis.position_specific_features(data, ["goal"], threshold=1.0),
}


def with_metadata(run: xr.DataTree) -> xr.DataTree:
    """Return a run with columns of every type."""
    columns = [
        {"won": n % 2 == 0, "balance_now": 10 * n, "share": n / 4, "game": f"g{n // 2}"}
        for n in range(len(run.children))
    ]
    return synthetic.run(
        [
            synthetic.with_attributes(child.to_dataset(), metadata=own)
            for child, own in zip(run.children.values(), columns, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    """Return a run in which a scenario lacks a span, and others a layer."""
    whole = synthetic.random_run(6, features=60, active=0.7)
    s1, s3, s4 = (whole[name].to_dataset() for name in ("S1", "S3", "S4"))
    gaps = synthetic.change(
        whole,
        S1=synthetic.without_span(s1, "goal"),
        S3=synthetic.without_layer(s3, 2),
        S4=synthetic.without_layer(s4, 2),
    )
    return with_metadata(gaps)


@pytest.fixture(scope="module")
def tables(run: xr.DataTree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.Dataset]:
    lazy = zt.table(run, "all")
    path = tmp_path_factory.mktemp("tables") / "table"
    with warnings.catch_warnings():  # of fixed-length text, which is not in Zarr's standard
        warnings.simplefilter("ignore")
        chunks = {"features": {"chunks": (1, 10, 60)}}
        lazy.copy().load().to_zarr(path, zarr_format=3, encoding=chunks)
    return {
        "lazy": lazy,
        "dask": zt.table(synthetic.lazy(run), "all"),
        "plain xarray": xr.open_zarr(path),
    }


def assert_same(found: Any, expected: Any) -> None:
    """Compare values, coordinates and attributes; text may be stored as objects or not."""
    found, expected = with_findings(found.compute()), with_findings(expected.compute())
    assert dict(found.sizes) == dict(expected.sizes)
    assert {**found.attrs} == {**expected.attrs}
    assert set(found.coords) == set(expected.coords)
    arrays = found.data_vars if isinstance(found, xr.Dataset) else {found.name: found}
    wanted = expected.data_vars if isinstance(found, xr.Dataset) else {expected.name: expected}
    assert list(arrays) == list(wanted)
    pairs = [(arrays[name], wanted[name]) for name in wanted]
    pairs += [(found[name], expected[name]) for name in expected.coords]
    for one, other in pairs:
        assert one.dims == other.dims
        np.testing.assert_array_equal(one.to_numpy(), other.to_numpy(), str(one.name))


@pytest.mark.parametrize(
    ("name", "opened"),
    mostly_long(
        lambda name, opened: name == "decision" or opened != "plain xarray", ANALYSES, OPENED
    ),
)
def test_a_table_answers_as_its_run(
    run: xr.DataTree, tables: dict[str, xr.Dataset], name: str, opened: str
) -> None:
    assert_same(ANALYSES[name](tables[opened]), ANALYSES[name](run))


@pytest.mark.parametrize("name", ["tags", "words", "positional"])
def test_blocks_of_few_scenarios_answer_the_same(
    run: xr.DataTree,
    tables: dict[str, xr.Dataset],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 30 * 60 * 4)
    found = list(blocks.blocks(tables["lazy"], ["features"]))
    assert [list(block.scenarios) for block in found] == [[0, 1], [2, 3], [4, 5]]
    assert_same(ANALYSES[name](tables["lazy"]), ANALYSES[name](run))


def test_contrast_some_layers_and_features_at_a_time(
    run: xr.DataTree, tables: dict[str, xr.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ANALYSES["tags"](run)
    monkeypatch.setattr("zarrtrace.analysis.activations._AT_ONCE", 1)
    monkeypatch.setattr("zarrtrace.analysis.activations._TESTED", 70)
    found = ANALYSES["tags"](tables["plain xarray"]).to_dataframe().reset_index(drop=True)
    keys = ["place", "layer", "feature"]
    pd.testing.assert_frame_equal(
        found.sort_values(keys).reset_index(drop=True),
        expected.to_dataframe().sort_values(keys).reset_index(drop=True),
    )


class TestSomeSamples:
    """Tables that hold chosen positions, against NumPy, pandas and SciPy."""

    @pytest.fixture
    def last(self, run: xr.DataTree) -> xr.Dataset:
        return zt.table(run)

    def test_contrast_equals_scipy(self, last: xr.Dataset) -> None:
        found = analysis.contrast(last, "risky", "safe").to_dataframe()
        dense, won = last["features"].to_numpy(), last["tags"].to_numpy() == "risky"
        for row in found[found["layer"] == 1].itertuples():
            values = dense[0, :, row.feature].astype(np.float64)
            welch = scipy.stats.ttest_ind(values[won], values[~won], equal_var=False)
            np.testing.assert_allclose(row.t, welch.statistic, rtol=1e-9)
            np.testing.assert_allclose(row.p_welch, welch.pvalue, rtol=1e-9)

    def test_word_associations_equal_pandas(self, last: xr.Dataset) -> None:
        few = last.isel(feature=slice(0, 20))  # no token has more than the 32 that count
        found = analysis.word_associations(few, top=99).to_dataframe().reset_index()
        frame = few["features"].to_dataframe().reset_index()
        frame = frame[~frame["features"].isna()]
        mean = frame.groupby(["layer", "feature", "token"])["features"].mean()
        assert len(found) == (mean > 0).sum()
        expected = mean.loc[list(found[["layer", "feature", "word"]].itertuples(index=False))]
        np.testing.assert_allclose(found["score"], expected, rtol=1e-6)

    def test_trajectory_equals_the_column(self, last: xr.Dataset) -> None:
        found = analysis.feature_trajectory(last, [(1, 7), (3, 2)])
        columns = [last["features"].sel(layer=n)[:, f] for n, f in ((1, 7), (3, 2))]
        np.testing.assert_array_equal(found, np.stack(columns, axis=1))
        np.testing.assert_array_equal(found["balance_now"], last["balance_now"])

    def test_a_scenario_that_failed_counts_nowhere(self, last: xr.Dataset) -> None:
        missing = last["scenario"] == "S0"
        holed = last.assign(features=last["features"].where(~missing))
        holed = holed.assign_attrs(failed={"S0": "out of memory"})
        without = last.isel(sample=slice(1, None))
        names = ["S1", "S2"], ["S3", "S4"]
        for of in (
            lambda data: analysis.contrast(data, *names),
            analysis.word_associations,
            analysis.position_specific_features,
        ):
            found, expected = of(holed), of(without)
            gone = "layer 2 in S3, S4."
            assert expected.attrs.pop("missing") == f"Not stored, and left out: {gone}"
            missing_now = found.attrs.pop("missing")
            assert missing_now == f"Not stored, and left out: all in S0; {gone}"
            assert_same(found, expected)

    def test_relate_takes_what_tables_give(self, last: xr.Dataset, run: xr.DataTree) -> None:
        found, expected = (
            analysis.relate(
                analysis.decision(data).top_probability, analysis.feature_trajectory(data, (1, 3))
            )
            for data in (last, run)
        )
        assert_same(found, expected)

    def test_another_sae(self, run: xr.DataTree) -> None:
        double = run.map_over_datasets(
            lambda ds: (
                ds.assign(features_mlp=ds["features"].rename(feature="feature_mlp") * 2)
                if "features" in ds
                else ds
            )
        )
        table = analysis.of_sae(zt.table(double), "mlp")
        assert table["features"].dims == ("layer", "sample", "feature")
        found = analysis.feature_trajectory(table, (2, 3))
        np.testing.assert_array_equal(found, 2 * analysis.feature_trajectory(run, (2, 3)))
        with pytest.raises(ConfigError, match="the table has no 'features_mpl'"):
            analysis.of_sae(zt.table(double), "mpl")


class TestRefused:
    @pytest.mark.parametrize(
        "analyse",
        [
            lambda data: analysis.attention_to(data, "balance"),
            analysis.attention_locality,
            analysis.head_roles,
            lambda data: analysis.attention_rollout(data, "balance"),
            analysis.critical_layers,
            analysis.layer_bands,
            lambda data: analysis.pathway_features(data, "balance"),
            lambda data: analysis.contrast(data, "risky", "safe", what="attention"),
        ],
    )
    def test_attention(self, tables: dict[str, xr.Dataset], analyse: Any) -> None:
        with pytest.raises(ConfigError, match="a table has no attention"):
            analyse(tables["lazy"])

    def test_a_span_that_may_be_cut(self, run: xr.DataTree) -> None:
        cut = zt.table(run, [3, -1])
        with pytest.raises(ScenarioError, match="may lack tokens of span 'balance'"):
            analysis.feature_trajectory(cut, (1, 3), "balance")
        found, expected = (analysis.feature_trajectory(data, (1, 3)) for data in (cut, run))
        assert_same(found, expected)

    def test_a_span_without_samples(self, run: xr.DataTree) -> None:
        with pytest.raises(ScenarioError, match="no scenario has a span 'goal'"):
            analysis.feature_trajectory(zt.table(run), (1, 3), "goal")

    def test_a_position_that_a_scenario_lacks(self, run: xr.DataTree) -> None:
        with pytest.raises(ScenarioError, match="S0: the table has no sample at position 4"):
            analysis.feature_trajectory(zt.table(run, [3, -1]), (1, 3), 4)

    def test_an_array_that_the_table_lacks(self, tables: dict[str, xr.Dataset]) -> None:
        bare = tables["lazy"].drop_vars(["features", "next_token"])
        with pytest.raises(ConfigError, match="the table has no 'features'"):
            analysis.feature_trajectory(bare, (1, 3))
        with pytest.raises(ConfigError, match="the table has no 'next_token'"):
            analysis.decision(bare)

    def test_samples_of_a_scenario_apart(self, tables: dict[str, xr.Dataset]) -> None:
        shuffled = tables["lazy"].isel(sample=[0, 20, 1])
        with pytest.raises(ConfigError, match="samples of scenario 'S0' are apart"):
            analysis.word_associations(shuffled)


def test_choosing_samples_of_a_table(run: xr.DataTree, tables: dict[str, xr.Dataset]) -> None:
    for at in ("all", "spans", "decision", ["goal", 0]):
        for opened in OPENED:
            found, expected = zt.table(tables[opened], at), zt.table(run, at)
            assert_same(found["features"], expected["features"])
            assert found.attrs["positions"] == expected.attrs["positions"]


def test_a_table_on_disk(tmp_path: Path) -> None:
    plan, values = sample_tables.plan_of(), sample_tables.values_of(3, 50, 300, 12)
    sample_tables.write_table(tmp_path / "table", plan, values)
    dense = sample_tables.expected(plan, values).features
    ours, plain = zt.open_table(tmp_path / "table"), xr.open_zarr(tmp_path / "table")
    for table in (ours, plain):
        layers = table.indexes["layer"].tolist()
        found = analysis.feature_trajectory(table, [(n, f) for n in layers for f in (3, 200)])
        expected = dense[:, ::2, [3, 200]].transpose(1, 0, 2).reshape(found.shape)
        np.testing.assert_array_equal(found, expected)
    for of in (
        lambda data: analysis.contrast(data, [f"s{n}" for n in range(5)], ["s7", "s8"]),
        analysis.word_associations,
        analysis.position_specific_features,
    ):
        expected = of(ours.copy().load())
        assert_same(of(ours), expected)
        assert_same(of(plain), expected)


def test_blocks_hold_every_sample_once() -> None:
    run = synthetic.random_run(5)
    table = zt.table(run, "all")
    found = list(blocks.blocks(table, ["features"]))
    assert [number for block in found for number in block.scenarios] == list(range(5))
    joined = xr.concat([block.arrays["features"] for block in found], "sample")
    np.testing.assert_array_equal(joined, table["features"])
