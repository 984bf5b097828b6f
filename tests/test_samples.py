"""Tables of samples from traces, against NumPy picking from each trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic
import xarray as xr
from chunk_reads import ChunkReads
from hypothesis import given, settings
from hypothesis import strategies as st

import zarrtrace as zt
from zarrtrace.errors import ConfigError, ScenarioError

SPANS = ("balance", "goal")
EVERYWHERE = ("all", "spans", "decision", *SPANS, 0, -1, [2, -3], ["goal", 1, "decision"])


def expected_positions(ds: xr.Dataset, at: Any) -> list[int]:
    """Return the positions of a trace that are asked for, in ascending order."""
    tokens = ds.sizes["key"]
    spans = {name: span["tokens"] for name, span in ds.attrs["spans"].items()}
    if isinstance(at, str) and at == "all":
        return list(range(tokens))
    places = list(spans) if isinstance(at, str) and at == "spans" else at
    found: set[int] = set()
    for place in places if isinstance(places, list) else [places]:
        here = spans.get(place, []) if isinstance(place, str) else [place % tokens]
        found.update(here)
    return sorted(found)


@st.composite
def runs(draw: st.DrawFn) -> xr.DataTree:
    """Draw a run whose traces differ in tokens, spans and metadata."""
    traces = []
    for number in range(draw(st.integers(1, 4))):
        tokens = draw(st.integers(4, 9))
        positions = st.lists(st.integers(0, tokens - 1), min_size=1, max_size=3, unique=True)
        spans = {name: sorted(draw(positions)) for name in SPANS}
        # The first scenario has every span: one that none has is refused.
        kept = spans if number == 0 else {n: spans[n] for n in SPANS if draw(st.booleans())}
        ds = synthetic.trace(f"S{number}", tokens=tokens, seed=number, heads=None, spans=kept)
        columns = {"round": number, "game": f"g{number % 2}", "loss": number / 2}
        traces.append(ds.assign_attrs(metadata=columns, tags=["even", "x"][: 1 + number % 2]))
    return synthetic.run(traces)


@settings(max_examples=15, deadline=None)
@given(runs(), st.sampled_from(EVERYWHERE), st.booleans())
def test_equals_numpy_picking_from_the_traces(run: xr.DataTree, at: Any, on_dask: bool) -> None:
    found = zt.table(synthetic.lazy(run) if on_dask else run, at=at)
    traces = [child.to_dataset() for child in run.children.values()]
    positions = [expected_positions(ds, at) for ds in traces]

    def picked(name: str, axis: int) -> np.ndarray:
        rows = zip(traces, positions, strict=True)
        return np.concatenate([ds[name].to_numpy().take(p, axis) for ds, p in rows], axis)

    assert (found["features"].chunks is not None) == on_dask
    np.testing.assert_array_equal(found["features"], picked("features", 1))
    for name in ("next_token", "next_token_logprob"):
        np.testing.assert_array_equal(found[name], picked(name, 0))
        assert found[name].dtype == traces[0][name].dtype
    np.testing.assert_array_equal(found["token"], picked("query_token", 0))
    np.testing.assert_array_equal(found["token_id"], picked("token_id", 0))
    np.testing.assert_array_equal(found["position"], np.concatenate(positions))
    of_trace = np.repeat(np.arange(len(traces)), [len(p) for p in positions])
    assert found["scenario"].to_numpy().tolist() == [f"S{number}" for number in of_trace]
    np.testing.assert_array_equal(found["round"], of_trace)
    np.testing.assert_array_equal(found["loss"], of_trace / 2)
    assert found["game"].to_numpy().tolist() == [f"g{number % 2}" for number in of_trace]
    names = [
        ",".join(n for n in (*SPANS, "decision") if q in spans.get(n, {"tokens": ()})["tokens"])
        for ds, here in zip(traces, positions, strict=True)
        for spans in (ds.attrs["spans"],)
        for q in here
    ]
    assert found["span"].to_numpy().tolist() == names


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.make_run(tmp_path_factory.mktemp("samples"), channels=8).path


class TestOfARunOnDisk:
    def test_nothing_is_read_before_it_is_looked_at(
        self, stored: Path, chunk_reads: ChunkReads
    ) -> None:
        run = zt.open_run(stored)
        chunk_reads.clear()
        found = zt.table(run, at="all")
        repr(found), found._repr_html_()
        chosen = found["features"].sel(layer=2).isel(sample=slice(0, 3))
        assert not chunk_reads.below(stored)
        first, second = list(run.children)[:2]
        chosen.to_numpy()
        reads = chunk_reads.below(stored)
        assert reads
        assert all(name.startswith(f"{first}/features/") for name in reads)
        assert set(reads.values()) == {1}
        assert second not in str(reads)

    def test_each_chunk_is_read_once_and_only_those_that_hold_the_answer(
        self, stored: Path, chunk_reads: ChunkReads
    ) -> None:
        run = zt.open_run(stored)
        found = zt.table(run, at=[0, -1])
        chunk_reads.clear()
        values = found["features"].isel(layer=1, feature=[3, 0]).to_numpy()
        reads = chunk_reads.below(stored)
        for number, (name, child) in enumerate(run.children.items()):
            dense = child["features"].to_numpy()[1]
            np.testing.assert_array_equal(
                values[2 * number : 2 * number + 2], dense[[0, -1]][:, [3, 0]]
            )
            assert f"{name}/features/1.0.0" in reads
        assert set(reads.values()) == {1}
        assert not [name for name in reads if "/1." not in name]

    def test_residual_and_texts_of_continuations(self, stored: Path) -> None:
        run = zt.open_run(stored)
        found = zt.table(run, at=[1, 2])
        for number, child in enumerate(run.children.values()):
            rows = slice(2 * number, 2 * number + 2)
            here = found.isel(sample=rows)
            np.testing.assert_array_equal(here["residual"], child["residual"][:, 1:3])
            np.testing.assert_array_equal(here["next_token_text"], child["next_token_text"][1:3])
        assert "next_token_text" in found.coords

    def test_dask_if_the_run_was_opened_so(self, stored: Path) -> None:
        lazily, plainly = (zt.table(zt.open_run(stored, chunks=c), "all") for c in ("auto", None))
        assert all(array.chunks is not None for array in lazily.data_vars.values())
        xr.testing.assert_identical(lazily.compute(), plainly.load())

    def test_dask_names_what_it_reads(self, stored: Path) -> None:
        tokenize = pytest.importorskip("dask.base").tokenize
        all_of_it, last = (zt.table(zt.open_run(stored), at) for at in ("all", -1))
        again = zt.table(zt.open_run(stored), "all")
        assert tokenize(all_of_it["features"]) == tokenize(again["features"])
        assert tokenize(all_of_it["features"]) != tokenize(last["features"])


def test_several_saes_say_which_layers_each_has(tmp_path: Path) -> None:
    run = fakes.make_run_of_two_saes(tmp_path)
    for data in (zt.open_run(run.path), zt.open_run(run.path, chunks="auto")):
        found = zt.table(data)
        assert found["sae_id"].to_numpy().tolist() == ["l1", ""]
        assert found["sae_id_mlp"].to_numpy().tolist() == ["", "l2"]
        for name in ("features", "features_mlp"):
            expected = np.stack([truth[name][:, -1] for truth in run.truth.values()], 1)
            np.testing.assert_array_equal(found[name], expected)
            assert (np.isnan(expected).all((1, 2)) == (found[f"sae_id{name[8:]}"] == "")).all()


class TestIndexing:
    @pytest.fixture
    def run(self) -> xr.DataTree:
        return synthetic.random_run(3)

    @pytest.mark.parametrize(
        "key",
        [
            {"sample": -1},
            {"sample": [5, 0, 30], "feature": [3, 1]},
            {"sample": slice(None, None, -4), "layer": 0},
            {"sample": slice(3, 3)},
            {"sample": xr.DataArray([0, 14], dims="p"), "feature": xr.DataArray([2, 5], dims="p")},
        ],
    )
    def test_as_numpy_does(self, run: xr.DataTree, key: dict[str, Any]) -> None:
        lazy, loaded = zt.table(run, "all")["features"], zt.table(run, "all")["features"].load()
        np.testing.assert_array_equal(lazy.isel(key), loaded.isel(key))

    def test_a_layer_or_feature_that_a_trace_lacks_is_nan(self, run: xr.DataTree) -> None:
        part = run["S1"].to_dataset().isel(layer=slice(1, 3), feature=slice(0, 20))
        mixed = synthetic.change(run, S1=part)
        for data in (mixed, synthetic.lazy(mixed)):
            found = zt.table(data)["features"]
            assert found["layer"].to_numpy().tolist() == [1, 2, 3]
            expected = run["S1"]["features"].to_numpy()[:, -1].copy()
            expected[0], expected[:, 20:] = np.nan, np.nan
            np.testing.assert_array_equal(found[:, 1], expected)
            np.testing.assert_array_equal(found[:, 0], run["S0"]["features"][:, -1])
            np.testing.assert_array_equal(found[[0, 2], :, -1], found.load()[[0, 2], :, -1])


class TestRefused:
    @pytest.fixture
    def run(self) -> xr.DataTree:
        return synthetic.random_run(3)

    def test_a_position_that_one_scenario_does_not_store(self, run: xr.DataTree) -> None:
        part = run["S1"].to_dataset().isel(query=[0, 3, -1])
        partial = synthetic.change(run, S1=part)
        assert zt.table(partial, at=[0, 3]).sizes["sample"] == 6
        assert zt.table(partial, at="all").sizes["sample"] == 12 + 3 + 14
        np.testing.assert_array_equal(zt.table(partial).features, zt.table(run).features)
        with pytest.raises(ConfigError, match="S1: token 4 is not stored"):
            zt.table(partial, at="balance")

    def test_a_position_outside_the_prompt(self, run: xr.DataTree) -> None:
        with pytest.raises(ScenarioError, match="S0: '12' covers token 12, which is not there"):
            zt.table(run, at=12)
        with pytest.raises(ScenarioError, match="-14"):
            zt.table(run, at=-14)

    def test_a_span_that_no_scenario_has(self, run: xr.DataTree) -> None:
        with pytest.raises(ScenarioError, match="no scenario has a span 'balanec'"):
            zt.table(run, at=["balanec", -1])

    def test_nothing(self, run: xr.DataTree) -> None:
        with pytest.raises(ScenarioError, match="no samples"):
            zt.table(run, at=[])

    def test_a_tag_with_a_comma(self, run: xr.DataTree) -> None:
        odd = synthetic.with_attributes(run["S1"].to_dataset(), tags=["a,b"])
        with pytest.raises(ConfigError, match="'a,b' has a comma"):
            zt.table(synthetic.change(run, S1=odd))

    def test_metadata_named_as_an_array(self, run: xr.DataTree) -> None:
        named = {
            name: synthetic.with_attributes(child.to_dataset(), metadata={"token_id": 3})
            for name, child in run.children.items()
        }
        with pytest.raises(ConfigError, match="'token_id' has the name of an array"):
            zt.table(synthetic.change(run, **named))

    def test_a_trace_without_an_array_that_others_have(self, run: xr.DataTree) -> None:
        part = run["S1"].to_dataset().drop_vars("features")
        with pytest.raises(ConfigError, match="S1: the trace has no 'features'"):
            zt.table(synthetic.change(run, S1=part))


def test_accessor_of_a_table() -> None:
    run = synthetic.random_run(3)
    named = [
        synthetic.with_attributes(child.to_dataset(), metadata={"round": number})
        for number, child in enumerate(run.children.values())
    ]
    table = zt.table(synthetic.run(named), at="balance")
    found = table.zt.scenarios
    assert found.index.tolist() == ["S0", "S1", "S2"]
    assert found["samples"].tolist() == [2, 2, 2]
    assert found["tags"].tolist() == ["risky", "safe", "safe"]
    assert found["round"].tolist() == [0, 1, 2]
    assert table.zt.provenance["model"] == "fake/model"


def test_metadata_called_samples_gets_another_name_in_the_accessor() -> None:
    run = synthetic.random_run(3)
    named = [
        synthetic.with_attributes(child.to_dataset(), metadata={"samples": number})
        for number, child in enumerate(run.children.values())
    ]
    found = zt.table(synthetic.run(named), at="balance").zt.scenarios
    assert found["samples"].tolist() == [2, 2, 2]
    assert found["metadata_samples"].tolist() == [0, 1, 2]
