"""Tables of ``zarrtrace analyze``: the answer first, rows by effect, fitting the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic
import xarray as xr
from click.testing import CliRunner

from zarrtrace import analysis
from zarrtrace.cli import analyze_, group
from zarrtrace.cli.analysis_options import ANALYSES
from zarrtrace.cli.tables import LAYOUTS, Choice, Layout, rows_of, text_of

SCENARIOS = tuple(f"S{n}" for n in range(12))
# What commands need besides the run.
GIVEN = {
    "feature-trajectory": ["--feature", "1:3", "--feature", "2:5"],
    "pathway-features": ["--source", "balance"],
    "attention-to": ["--source", "balance"],
    "relate": ["--option", "bet", "--source", "balance"],
    "probe": ["--column", "balance", "--what", "features", "--permutations", "19", "--folds", "2"],
    "directions": ["--column", "balance", "--what", "features"],
    "contrast": ["--group-a", "risky", "--group-b", "safe"],
}


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    found = synthetic.random_run(len(SCENARIOS))
    for number, node in enumerate(found.children.values()):
        node.attrs["metadata"] = {"balance": float(number % 3)}
    return found


_COMPUTE = analyze_._compute
_RESULTS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _opened(run: xr.DataTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every command find the run in memory, and compute the same question once."""

    def compute(function: str, data: Any, given: dict[str, Any]) -> Any:
        key = f"{function} {given}"
        if key not in _RESULTS:
            _RESULTS[key] = _COMPUTE(function, data, given)
        return _RESULTS[key]

    monkeypatch.setattr(analyze_, "_open", lambda *_, **_given: run)
    monkeypatch.setattr(analyze_, "_compute", compute)


def call(
    monkeypatch: pytest.MonkeyPatch, *arguments: Any, width: int | None = None, code: int = 0
) -> str:
    """Return what the command prints on a terminal of a width, or into a pipe."""
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    done = CliRunner().invoke(group, ["analyze", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def body(shown: str) -> list[list[str]]:
    """Return the rows of a printed table, its header first."""
    lines = shown.split("\n\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if not line.startswith(("In all", "Means")))
    return [line.split() for line in lines[start:] if line and not line.startswith("...")]


@pytest.mark.parametrize("width", [80, 120, None])
@pytest.mark.parametrize("name", sorted({*ANALYSES} - {"layer-bands", "choices"}))
def test_every_table_fits_its_terminal(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int | None
) -> None:
    shown = call(monkeypatch, name, "RUN", *GIVEN.get(name, ()), width=width)
    assert width is None or max(map(len, shown.splitlines())) <= width
    assert shown.count("too narrow") <= int(width is not None)


@pytest.mark.parametrize(
    "name",
    ["attention-to", "attention-rollout", "attention-flow", "feature-trajectory", "decision",
     "pathway-features", "position-specific-features", "head-roles", "relate"],
)  # fmt: skip
def test_the_answer_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    given = [name, "RUN", *GIVEN.get(name, ())]
    shown = call(monkeypatch, *given)
    call(monkeypatch, *given, "-o", tmp_path / "x.json")
    call(monkeypatch, *given, "-o", tmp_path / "x.parquet")
    call(monkeypatch, *given, "-o", tmp_path / "x.nc")
    answer = json.loads((tmp_path / "x.json").read_text())["attrs"]["findings"]
    assert shown.startswith(answer + "\n")
    assert pd.read_parquet(tmp_path / "x.parquet").attrs["findings"] == answer
    with xr.open_dataset(tmp_path / "x.nc", engine="h5netcdf") as ds:
        # Of an array, attributes are the array's.
        assert answer in {**ds.attrs, **next(iter(ds.data_vars.values())).attrs}["findings"]


def test_head_roles_name_the_strongest_heads(
    run: xr.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = analysis.head_roles(run).mean("scenario")
    series = mean.sel(role="previous_token").to_series()
    layer, head = series.idxmax()
    shown = call(monkeypatch, "head-roles", "RUN", "--sort", "previous_token", "--top", 3)
    assert f"previous-token layer {layer} head {head} ({series.max():.3g})" in shown
    header, *rows = body(shown)
    assert header[:2] == ["layer", "head"]
    expected = series.sort_values(ascending=False).index[:3].tolist()
    assert [(int(row[0]), int(row[1])) for row in rows] == expected
    at = header.index("first_token")
    wanted = [float(mean.sel(role="first_token", layer=n, head=h)) for n, h in expected]
    np.testing.assert_allclose([float(row[at]) for row in rows], wanted, rtol=1e-3)


def test_scenarios_are_columns_where_they_fit(
    run: xr.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["attention-to", "RUN", "--source", "balance", "--source", "goal"]
    found = analysis.attention_to(run, ["balance", "goal"])
    order = found.mean("scenario").to_series().sort_values(ascending=False)
    header, *rows = body(call(monkeypatch, *given, width=250))
    assert header == ["layer", "source", *SCENARIOS]
    assert [(row[1], int(row[0])) for row in rows] == order.index.tolist()
    for row in rows:
        values = found.sel(source=row[1], layer=int(row[0])).sel(scenario=list(SCENARIOS))
        np.testing.assert_allclose([float(one) for one in row[2:]], values, rtol=1e-3)
    narrow = call(monkeypatch, *given, width=60)
    assert "Means over 12 scenarios" in narrow
    header, *rows = body(narrow)
    assert header == ["layer", "source", "attention", "min", "max"]
    for row in rows:
        values = found.sel(source=row[1], layer=int(row[0]))
        wanted = [float(values.mean()), float(values.min()), float(values.max())]
        np.testing.assert_allclose([float(one) for one in row[2:]], wanted, rtol=1e-3)


def test_files_hold_all_rows_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ["attention-to", "RUN", "--source", "balance", "--source", "goal"]
    shown = [(row[1], int(row[0])) for row in body(call(monkeypatch, *given, width=250))[1:]]
    call(monkeypatch, *given, "-o", tmp_path / "x.csv")
    frame = pd.read_csv(tmp_path / "x.csv")
    written = list(zip(frame["source"], frame["layer"], strict=True))
    assert written == [key for key in shown for _ in SCENARIOS]
    assert frame["scenario"].tolist() == [*SCENARIOS] * len(shown)
    call(monkeypatch, *given, "--layer", "2-3", "--top", 2, "-o", tmp_path / "x.csv")
    some = pd.read_csv(tmp_path / "x.csv")
    kept = [key for key in shown if key[1] in (2, 3)][:2]
    assert list(zip(some["source"], some["layer"], strict=True))[:: len(SCENARIOS)] == kept


def test_options_stand_side_by_side(run: xr.DataTree, monkeypatch: pytest.MonkeyPatch) -> None:
    found = analysis.decision(run)
    options = found["option"].to_numpy().tolist()
    header, *rows = body(call(monkeypatch, "decision", "RUN"))
    assert header[:3] == ["scenario", *options]
    known = found["probability"].sel(option=options[0]).to_series().dropna()
    order = known.sort_values(ascending=False, kind="stable").index.tolist()
    assert [row[0] for row in rows][: len(order)] == order
    assert len(rows) == len(SCENARIOS)


class TestChoosing:
    def test_features_are_pairs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        given = ["word-associations", "RUN", "-o", tmp_path / "x.csv"]
        call(monkeypatch, *given, "--feature", "2:3", "--feature", "1:5")
        frame = pd.read_csv(tmp_path / "x.csv")
        assert {*zip(frame["layer"], frame["feature"], strict=True)} == {(2, 3), (1, 5)}
        assert frame["score"].is_monotonic_decreasing
        call(monkeypatch, *given, "--layer", 2, "--feature", 3)
        one = pd.read_csv(tmp_path / "x.csv")
        assert {*zip(one["layer"], one["feature"], strict=True)} == {(2, 3)}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["word-associations", "--feature", "3"], "--feature 3: of which layer?"),
            (["word-associations", "--feature", "2:3:4"], "is not a layer and a feature"),
            (["word-associations", "--feature", "2:9999"], "no row of the result is about 2:9999"),
            (["head-roles", "--layer", "77"], "no row of the result is of these layers"),
            (["head-roles", "--sort", "inducton"], "Did you mean 'induction'?"),
            (["head-roles", "--top", "3", "-o", "x.nc"], "a .nc file has labelled arrays"),
        ],
    )
    def test_refusals(
        self, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
    ) -> None:
        name, *options = given
        shown = call(monkeypatch, name, "RUN", *options, code=2)
        assert message in " ".join(shown.split())

    def test_a_number_without_a_layer(
        self, run: xr.DataTree, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = ["analyze", "feature-trajectory", "RUN", "--feature", "3"]
        error = CliRunner().invoke(group, given).exception
        assert "feature 3 of which layer?" in str(error)
        assert "--feature 3:3" in str(error)
        header, row = body(call(monkeypatch, *given[1:], "--layer", 2, width=60))
        found = analysis.feature_trajectory(run, (2, 3)).mean()
        value = float(row[header.index("activation")])
        np.testing.assert_allclose(value, found, rtol=1e-3, atol=1e-6)

    def test_all_layouts_belong_to_commands(self) -> None:
        assert {*LAYOUTS} <= {*ANALYSES}


def test_constants_are_said_once_and_nothing_is_lost() -> None:
    """The printed cells and constants, read back, are the frame that pandas makes."""
    rng = np.random.default_rng(0)
    result = xr.Dataset(
        {"score": ("row", rng.normal(size=7)), "n": ("row", np.full(7, 4))},
        {"layer": ("row", np.full(7, 3)), "feature": ("row", np.arange(7)), "row": np.arange(7)},
    )
    layout = Layout(("score",))
    shown = text_of(result, layout, Choice())
    assert shown.splitlines()[0] == "In all rows: layer 3, n 4"
    rows = [line.split() for line in shown.splitlines()[1:]]
    assert rows[0] == ["feature", "score"]
    frame = result.to_dataframe().sort_values("score", key=lambda s: -s.abs())
    assert [int(row[0]) for row in rows[1:]] == frame["feature"].tolist()
    written = rows_of(result, layout, Choice())
    np.testing.assert_array_equal(written["score"], frame["score"])
    assert [*written] == ["layer", "feature", "score", "n"]


def test_long_texts_are_cut_where_nothing_else_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    result = xr.Dataset(
        {"score": ("row", [1.0, 2.0])}, {"word": ("row", ["a" * 200, "b"]), "row": [0, 1]}
    )
    monkeypatch.setenv("COLUMNS", "40")
    shown = text_of(result, Layout(("score",)), Choice())
    assert max(map(len, shown.splitlines())) <= 40
    assert "…" in shown
