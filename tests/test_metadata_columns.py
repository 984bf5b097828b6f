"""Metadata of scenarios from a file to a run, and from there to results, tables and groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import fakes
import numpy as np
import pandas as pd
import planted
import pytest
import xarray as xr
from everyday import mostly_long

import zarrtrace as zt
from zarrtrace import analysis
from zarrtrace.card import write_card
from zarrtrace.cli.tables import Choice, Layout, text_of
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.format.attributes import TraceAttributes
from zarrtrace.store import summarize

# As a run stores it: a missing number is null, a missing text empty.
STORED = pd.DataFrame(
    {
        "balance": [float(10 * i) if i != 3 else None for i in range(10)],
        "round": range(10),
        "won": [i % 2 == 0 for i in range(10)],
        "game": ["", "g1", "g2", "g1", "g2", "g1", "g2", "g1", "g2", ""],
    },
    index=list(planted.SCENARIOS),
).astype({"balance": object})


def with_metadata(run: xr.DataTree, frame: pd.DataFrame = STORED) -> xr.DataTree:
    """Give the traces of a run metadata, through the format's own check."""
    for (_, ds), row in zip(run.children.items(), frame.to_dict("records"), strict=True):
        attributes = TraceAttributes(**{**ds.attrs, "metadata": row})
        ds.attrs["metadata"] = attributes.model_dump(mode="json")["metadata"]
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """A run of ten scenarios with attention, features and next tokens."""
    made = fakes.make_run(tmp_path_factory.mktemp("columns"), scenarios=planted.SCENARIOS)
    return with_metadata(zt.open_run(made.path))


@pytest.fixture(scope="module")
def effects() -> xr.DataTree:
    """A run in memory whose columns repeat its tags."""
    frame = STORED.assign(
        kind=["risky"] * 5 + ["safe"] * 5, safe=[False] * 5 + [True] * 5, level=[1] * 5 + [2] * 5
    )
    frame["most"] = ["", *frame["kind"][1:]]
    return with_metadata(planted.make_run(), frame)


def check_columns(result: Any, names: dict[str, str] | None = None) -> None:
    """Compare the columns of a result with pandas' of the stored values."""
    at = STORED.loc[np.atleast_1d(result["scenario"].values).tolist()]
    expected = {
        "balance": at["balance"].astype("float64"),
        "round": at["round"].astype("int64"),
        "won": at["won"].astype("bool"),
        "game": at["game"].astype(object),
    }
    for name, column in expected.items():
        coord = result.coords[(names or {}).get(name, name)]
        assert coord.dims == result["scenario"].dims
        if name != "game" or coord.ndim:
            assert coord.dtype == column.dtype
        np.testing.assert_array_equal(np.atleast_1d(coord.values), column.to_numpy())


# --- results -----------------------------------------------------------------------------------

# What each analysis is asked; those that are not here say nothing of single scenarios.
_BY_SCENARIO: dict[str, Callable[[Any], Any]] = {
    "attention_flow": lambda data: analysis.attention_flow(data, ["balance"]),
    "attention_locality": analysis.attention_locality,
    "attention_rollout": lambda data: analysis.attention_rollout(data, ["balance"]),
    "attention_to": lambda data: analysis.attention_to(data, "balance"),
    "decision": analysis.decision,
    "feature_trajectory": lambda data: analysis.feature_trajectory(data, (2, 3)),
    "head_roles": analysis.head_roles,
    "layer_bands": lambda data: analysis.layer_bands(
        data,
        bands={"local": (1, 1), "task": (2, 2), "decision": (3, 3)},
        task_spans=["balance"],
        window=2,
    ),
    "pathway_features": lambda data: analysis.pathway_features(data, "balance"),
}
_OVER_SCENARIOS: dict[str, Callable[[Any], Any]] = {
    "contrast": lambda data: analysis.contrast(data, "risky", "safe"),
    "critical_layers": lambda data: analysis.critical_layers(data, ["balance"]),
    "crossreference": lambda data: analysis.crossreference(data, analysis.word_associations(data)),
    "position_specific_features": analysis.position_specific_features,
    "relate": lambda data: analysis.relate(
        analysis.decision(data).probability.sel(option="bet").fillna(0),
        analysis.attention_to(data, "balance"),
    ),
    "word_associations": analysis.word_associations,
}


def test_every_analysis_is_among_these() -> None:
    others = {"of_sae", "read_table", "probe", "directions"}
    others |= {"choices", "chose"}  # of generated text: test_repeats.py
    assert {*_BY_SCENARIO, *_OVER_SCENARIOS} == {*analysis.__all__} - others


@pytest.mark.parametrize(
    "name", mostly_long(lambda name: name in ("attention_to", "feature_trajectory"), _BY_SCENARIO)
)
def test_results_by_scenario_have_the_columns(run: xr.DataTree, name: str) -> None:
    result = _BY_SCENARIO[name](run)
    assert result["scenario"].to_numpy().tolist() == list(planted.SCENARIOS)
    check_columns(result)
    lazy = run.map_over_datasets(lambda ds: ds.chunk() if ds.attrs.get("spans") else ds)
    check_columns(_BY_SCENARIO[name](lazy).compute())


@pytest.mark.parametrize("name", [name for name in _BY_SCENARIO if name != "layer_bands"])
def test_a_trace_has_its_own_values(run: xr.DataTree, name: str) -> None:
    for scenario in ("Risky_3", "Safe_0"):
        result = _BY_SCENARIO[name](run[scenario].to_dataset())
        assert result["scenario"].ndim == 0
        check_columns(result)


@pytest.mark.parametrize("name", _OVER_SCENARIOS)
def test_results_over_all_scenarios_have_none(
    run: xr.DataTree, effects: xr.DataTree, name: str
) -> None:
    # A prompt of seven tokens has no control tokens.
    data = effects if name == "critical_layers" else run
    assert "scenario" not in _OVER_SCENARIOS[name](data).dims


def test_results_can_be_selected_and_combined(run: xr.DataTree) -> None:
    attention = analysis.attention_to(run, "balance")
    won = attention.sel(scenario=attention.won)
    assert won["scenario"].to_numpy().tolist() == STORED.index[STORED.won].tolist()
    product = attention * analysis.decision(run)["entropy"]
    check_columns(product)
    by_game = attention.groupby("game").mean("scenario")
    for game, part in STORED.groupby("game"):
        expected = attention.sel(scenario=part.index.tolist()).mean("scenario")
        np.testing.assert_allclose(by_game.sel(game=game), expected)


def test_columns_called_as_something_else_get_another_name(run: xr.DataTree) -> None:
    frame = STORED.rename(columns={"balance": "source", "round": "attention", "won": "band"})
    frame["metadata_source"] = 1
    other = with_metadata(run.copy(), frame)
    found = analysis.attention_to(other, ["balance"])
    names = {
        "balance": "metadata_metadata_source",
        "round": "metadata_attention",
        "won": "metadata_band",
    }
    check_columns(found, names)
    assert found.coords["source"].to_numpy().tolist() == ["balance"]
    locality = analysis.attention_locality(other)
    check_columns(locality, {**names, "round": "attention"})
    # A dimension of any result is one of none here, so that results can be combined.
    assert (found * locality["entropy"]).dims == ("scenario", "source", "layer", "head")


def test_columns_that_traces_put_together_disagree_in_are_left_out(run: xr.DataTree) -> None:
    other = run.copy()
    with_metadata(other, STORED.drop(columns=["won"]))
    other["Safe_0"].attrs["metadata"] = {"balance": "text", "won": True, "round": 5}
    with pytest.warns(UserWarning, match="left out") as caught:
        found = analysis.attention_to(other, "balance")
    assert len(caught) == 2
    assert {"balance", "won"} & {*found.coords} == set()
    assert found["game"].sel(scenario="Safe_0").item() == ""
    np.testing.assert_array_equal(found["round"], [*range(10)])


# --- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["kind", "safe", "level"])
def test_contrast_by_a_column_equals_that_by_tags(effects: xr.DataTree, by: str) -> None:
    expected = analysis.contrast(effects, "risky", "safe", what="attention")
    found = analysis.contrast(effects, by=by, what="attention")
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    parameters = json.loads(found.attrs["parameters"])
    assert parameters.pop("by") == by
    assert parameters == json.loads(expected.attrs["parameters"])
    safe, risky = (effects[name].attrs["metadata"][by] for name in ("Safe_1", "Risky_1"))
    turned = analysis.contrast(effects, safe, risky, by=by, what="attention")
    np.testing.assert_array_equal(turned["difference"], -expected["difference"])


def test_missing_values_belong_to_no_group(effects: xr.DataTree) -> None:
    found = analysis.contrast(effects, by="most", what="attention")
    parameters = json.loads(found.attrs["parameters"])
    assert parameters["group_a"] == ["Risky_1", "Risky_2", "Risky_3", "Risky_4"]
    few = analysis.contrast(effects, "g2", "g1", by="game", what="attention")
    assert (
        json.loads(few.attrs["parameters"])["group_b"] == STORED.index[STORED.game == "g1"].tolist()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": "knd"}, "(?s)no column of metadata 'knd'.*mean 'kind'"),
        ({"by": "balance"}, r"(?s)'balance' has 9 values.*0\.0, 10\.0"),
        ({"by": "game", "group_a": "g1", "group_b": "g9"}, "(?s)no value 'g9'.*'g1', 'g2'"),
        ({"by": "game", "group_a": "g1", "group_b": ""}, "no value ''"),
        ({"by": "game", "group_a": "g1"}, "'game' needs a second value"),
        ({"by": "game", "group_a": ["Risky_1"], "group_b": ["Safe_1"]}, "no value"),
        ({"by": "round", "group_a": 1, "group_b": 2}, "group A has 1 scenario"),
        ({"group_a": "nobody"}, "(?s)no scenario has the tag 'nobody'.*risky, safe"),
    ],
)
def test_wrong_groups_are_refused(
    effects: xr.DataTree, given: dict[str, Any], message: str
) -> None:
    with pytest.raises((ScenarioError, ConfigError), match=message):
        analysis.contrast(effects, **given, what="attention")


# --- from a file to a table --------------------------------------------------------------------


def call(*arguments: object, code: int = 0) -> str:
    """Run a command that ends with a code; return what it prints, or its error."""
    done = command_line.call(*arguments)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


SUITE = pd.DataFrame(
    {
        "name": ["a", "b", "c", "d"],
        "prompt": ["Bet 5 now", "Bet 7 now", "Stop at 9", "Stop at 4"],
        "balance": [5, None, 9, 4],
        "round": [1, 2, 3, 4],
        "won": [True, False, True, False],
        "outcome": ["gain", "loss", "gain", "loss"],
        "note": ["x, y", None, "with \"quotes\" | and | bars", "漢 Ω"],
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded model over a CSV file, through the command line."""
    pytest.importorskip("torch")
    from zarrtrace import demo

    folder = tmp_path_factory.mktemp("extracted")
    SUITE.to_csv(folder / "suite.csv", index=False)
    arguments = ["--scenarios", folder / "suite.csv", "--model", demo.model_path()]
    layers = ["--no-features", "--layers", "1-2", "--quiet"]
    call("extract", *arguments, *layers, "-o", folder / "run")
    call("extract", *arguments, *layers, "-o", folder / "run")  # asks for the same: resumed
    changed = SUITE.assign(round=[1, 2, 3, 5])
    changed.to_csv(folder / "suite.csv", index=False)
    message = call("extract", *arguments, *layers, "-o", folder / "run", code=2)
    assert "prompts" in message
    return folder / "run"


@pytest.mark.torch
def test_a_file_becomes_columns(extracted: Path) -> None:
    expected = SUITE.set_index("name").assign(note=SUITE["note"].fillna("").tolist())
    found = analysis.attention_to(zt.open_run(extracted), [0])
    for name in ("balance", "round", "won", "outcome", "note"):
        assert found[name].dims == ("scenario",)
        np.testing.assert_array_equal(found[name], expected[name].to_numpy())
        if expected[name].dtype.kind in "fib":
            assert found[name].dtype == expected[name].dtype
    # Plain xarray finds them, too, with null for the missing number.
    plain = xr.open_zarr(extracted / "b", consolidated=True).attrs["metadata"]
    assert plain == {"balance": None, "round": 2, "won": False, "outcome": "loss", "note": ""}
    info = json.loads(call("info", extracted, "--json"))
    assert info["traces"][1]["metadata"] == plain
    assert [trace.metadata["won"] for trace in summarize(extracted).traces] == SUITE.won.tolist()


@pytest.mark.torch
@pytest.mark.parametrize("ending", ["csv", "parquet", "json", "nc"])
def test_tables_have_the_columns(extracted: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"out.{ending}"
    call("analyze", "attention-to", extracted, "--source", 0, "-o", file)
    if ending == "nc":
        with xr.open_dataset(file, engine="h5netcdf") as ds:
            frame = ds.load().to_dataframe().reset_index()
    elif ending == "json":
        frame = pd.DataFrame(json.loads(file.read_text())["rows"])
    else:
        frame = pd.read_csv(file) if ending == "csv" else pd.read_parquet(file)
    assert len(frame) == 4 * 2
    merged = frame.merge(SUITE, left_on="scenario", right_on="name", suffixes=("", "_given"))
    assert len(merged) == len(frame)
    for name in ("balance", "round", "won", "outcome"):
        column = merged[name].astype(merged[f"{name}_given"].dtype)
        pd.testing.assert_series_equal(column, merged[f"{name}_given"], check_names=False)
    assert merged["note"].fillna("").tolist() == merged["note_given"].fillna("").tolist()


@pytest.mark.torch
def test_a_terminal_shows_the_columns_that_fit(
    extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = analysis.attention_to(zt.open_run(extracted), 0)

    def header(width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        shown = text_of(found, Layout(), Choice())
        assert max(map(len, shown.splitlines())) <= max(width, 40)
        assert ("too narrow for" in shown) == (width < 200)
        return next(line.split() for line in shown.splitlines() if "attention  " in line)

    every = ["balance", "round", "won", "outcome", "note"]
    assert [name for name in header(200) if name in every] == every
    some = [name for name in header(55) if name in every]
    assert 0 < len(some) < len(every)
    assert some == every[: len(some)]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("given", "group_a"),
    [
        (["--by", "outcome"], ["a", "c"]),
        (["--by", "won", "--group-a", "true", "--group-b", "False"], ["a", "c"]),
        (["--by", "outcome", "--group-a", "loss", "--group-b", "gain"], ["b", "d"]),
    ],
)
def test_contrast_by_a_column_on_the_command_line(
    extracted: Path, tmp_path: Path, given: list[str], group_a: list[str]
) -> None:
    file = tmp_path / "out.json"
    asked = ["--what", "attention", "--at", "0", "-o", file]
    call("analyze", "contrast", extracted, *given, *asked)
    assert json.loads(json.loads(file.read_text())["attrs"]["parameters"])["group_a"] == group_a
    assert "group A has 1" in call(
        "analyze", "contrast", extracted, "--by", "balance", "--group-a", "5", "--group-b", "9.0",
        *asked, code=2,
    )  # fmt: skip
    assert "contrast needs two groups" in call("analyze", "contrast", extracted, *asked, code=2)


@pytest.mark.torch
def test_the_card_shows_the_columns(extracted: Path) -> None:
    text = write_card(extracted).read().decode()
    assert "| name | tokens | tags | `balance` | `round` | `won` | `outcome` | `note` |" in text
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert rows["| a"].count("| 5.0 | 1 | true | gain | x, y |") == 1
    assert "|  | 2 | false | loss |  |" in rows["| b"]
    assert rows["| c"].replace("\\|", "").count("|") == 9
    (extracted / "README.md").unlink()
