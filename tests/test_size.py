"""Thousands of scenarios and samples: paged, sampled, or refused with a number; nothing hangs."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import warnings
from pathlib import Path
from subprocess import CompletedProcess

import command_line
import fakes
import many_traces
import numpy as np
import pytest
import reading
import xarray as xr
import zarr
from sample_tables import plan_of, records_of, values_of, write_table

import zarrtrace as zt
from zarrtrace.card import write_card
from zarrtrace.cli import _COMMANDS
from zarrtrace.cli.analysis_options import ANALYSES
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.figures import catalogue, page
from zarrtrace.format.layout import DEFAULT_LIMITS
from zarrtrace.index import find_feature
from zarrtrace.store import copy_run, damage, run_writer, summarize, verify
from zarrtrace.store import open as opening
from zarrtrace.viewer import Layout, bundle, traces
from zarrtrace.viewer.server import Server

COUNT = 60


def call(*arguments: str | Path) -> CompletedProcess[str]:
    """Run a command whose warnings are shown, as they are to users."""
    with warnings.catch_warnings(action="default"):
        return command_line.call(*arguments)


def widest(text: str) -> int:
    """Return the length of the longest line below the first, which names the path."""
    return max(map(len, text.splitlines()[1:]))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of more scenarios than are listed; no test may change it."""
    return many_traces.make_many(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table; no test may change it."""
    path = tmp_path_factory.mktemp("table") / "table"
    write_table(path, plan_of(50), values_of(3, 50, 300, 12))
    return path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first traces of a run tell that all take long."""
    monkeypatch.setattr(opening, "_TIMED", 5)
    monkeypatch.setattr(opening, "_LONG_SECONDS", 0.0)


# --- runs --------------------------------------------------------------------------------------


def test_info_lists_the_first_scenarios_and_counts_the_others(many: Path) -> None:
    done = call("info", many)
    assert done.returncode == 0
    assert "yes, 60 of 60 scenarios" in done.stdout
    assert "S000049" in done.stdout
    assert "S000050" not in done.stdout
    assert "... 10 more scenarios" in done.stdout
    assert "(of 50 scenarios)" in done.stdout
    assert widest(done.stdout) <= 80
    few, everything = call("info", many, "--first", "3"), call("info", many, "--all")
    assert few.stdout.count("\nS0") == 3
    assert "... 57 more scenarios" in few.stdout
    assert everything.stdout.count("\nS0") == COUNT
    assert "more scenarios" not in everything.stdout
    assert call("info", many, "--first", "3", "--all").returncode == 2


def test_info_as_json_is_complete_unless_paged(many: Path) -> None:
    whole = json.loads(call("info", many, "--json").stdout)
    part = json.loads(call("info", many, "--json", "--first", "2").stdout)
    assert [trace["scenario"] for trace in whole["traces"]] == many_traces.names_of(COUNT)
    assert part["traces"] == whole["traces"][:2]
    assert part["scenarios"] == part["scenarios_complete"] == COUNT
    assert part["complete"]


def test_a_page_knows_what_is_missing_behind_it(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    run = fakes.make_run(tmp_path, scenarios=names, drop={"b": (1, 2, 3), "c": (2,)})
    found, whole = summarize(run.path, first=1), summarize(run.path)
    assert [trace.scenario for trace in found.traces] == ["a"]
    for summary in (found, whole):
        assert not summary.complete
        assert (summary.scenarios, summary.scenarios_complete) == (4, 2)
        assert set(summary.scenarios_missing) <= {"b"}


def test_some_scenarios_of_a_run_are_opened(many: Path) -> None:
    tree = zt.open_run(many, scenarios=["S000007", "S000003"])
    assert list(tree.children) == ["S000003", "S000007"]
    np.testing.assert_array_equal(
        tree["S000007"].attention, zt.open_trace(many / "S000007").attention
    )
    assert len(tree.attrs["scenarios"]) == COUNT
    with pytest.raises(ScenarioError, match="no scenario 'S7'"):
        zt.open_run(many, scenarios=["S7"])


@pytest.mark.usefixtures("impatient")
def test_a_long_opening_is_told_with_a_number(many: Path) -> None:
    with pytest.warns(UserWarning, match=r"its 60 traces takes about \d+ s.*scenarios=") as caught:
        assert len(zt.open_run(many).children) == COUNT
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zt.open_run(many, scenarios=["S000001"])
    said = call("analyze", "decision", many).stderr
    assert said.startswith("zarrtrace: warning: ")
    assert "UserWarning" not in said


def test_verify_tells_progress_and_reads_files_in_parts(
    tmp_path: Path, many: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    assert verify(many, progress=lambda *at: told.append(at)) == []
    assert told == [(number, COUNT) for number in range(1, COUNT + 1)]
    told.clear()
    assert verify(table, progress=lambda *at: told.append(at)) == []
    arrays = [file for file in table.glob("*/*") if file.name != "zarr.json"]
    assert told[-1] == (sum(file.stat().st_size for file in arrays),) * 2
    run = fakes.make_run(tmp_path)
    reading.flip_byte_of_layer(run.trace, "features", 1)
    reading.flip_byte_of_layer(run.trace, "attention", 2)
    whole = verify(run.path)
    monkeypatch.setattr(damage, "_PART_BYTES", 1)
    assert verify(run.path) == whole
    assert [(one.array, one.layer) for one in whole] == [("attention", 3), ("features", 2)]


def test_metadata_is_repeated_for_a_thousand_traces_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_writer.MOST_CONSOLIDATED == 1000
    monkeypatch.setattr(run_writer, "MOST_CONSOLIDATED", 2)
    two = fakes.make_run(tmp_path, name="two", scenarios=("a", "b")).path
    three = fakes.make_run(tmp_path, name="three", scenarios=("a", "b", "c")).path
    groups = [json.loads((path / "zarr.json").read_bytes()) for path in (two, three)]
    assert ["consolidated_metadata" in group for group in groups] == [True, False]
    assert verify(three) == []
    assert summarize(three).complete
    ours = zt.open_run(three)
    for plain in (xr.open_datatree(three, engine="zarr", consolidated=False), ours):
        assert sorted(plain.children) == ["a", "b", "c"]
        np.testing.assert_array_equal(plain["c"].features, zt.open_trace(three / "c").features)
    assert sorted(zarr.open_group(three, mode="r").group_keys()) == ["a", "b", "c"]
    copy_run(three, tmp_path / "copy")
    assert fakes.files_in(tmp_path / "copy") == fakes.files_in(three)


# --- what is drawn -----------------------------------------------------------------------------


def test_figures_take_evenly_spaced_scenarios_and_say_so(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_DRAWN", 3)
    monkeypatch.setattr(catalogue, "MOST_COMPARED", 4)
    drawn: list[str | None] = []

    def draw(path: object, output: object, task: page._Task, **_: object) -> page._Result:
        drawn.append(task.scenario)
        return page._Result(task)

    monkeypatch.setattr(page, "_draw", draw)
    catalogue.forget()
    done = call("figures", many, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = "Of 60 scenarios, evenly spaced: figures over scenarios take 4, 3 are drawn one by one"
    assert said in done.stderr
    assert said in (tmp_path / "out" / "index.html").read_text()
    assert {*drawn} == {None, "S000000", "S000020", "S000040"}
    assert list(catalogue.open_compared(zt.storage.locate(many)).children) == [
        "S000000",
        "S000015",
        "S000030",
        "S000045",
    ]
    assert page._trace(zt.storage.locate(many), "S000007").attrs["scenario"] == "S000007"
    drawn.clear()
    call("figures", many, "-o", tmp_path / "out", "--scenario", "S000007")
    assert {*drawn} == {None, "S000007"}
    catalogue.forget()


def test_a_page_of_too_many_scenarios_is_refused_with_a_number(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "MOST_SCENARIOS", 50)
    monkeypatch.setattr(bundle, "MOST_SCENARIOS", 50)
    refused = call("bundle", many, "-o", tmp_path / "bundle")
    assert refused.returncode == 2
    assert "60 scenarios, a bundle holds at most 50" in refused.stderr
    assert "--scenario NAME" in refused.stderr
    done = call("bundle", many, "-o", tmp_path / "bundle", "--scenario", "S000055")
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "bundle" / "index.json").read_bytes())
    assert index["scenarios"] == ["S000055"]


def test_view_shows_all_scenarios_of_a_large_run(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "MOST_SCENARIOS", 3)
    monkeypatch.setattr(Server, "run", lambda _: None)
    opened: list[str] = []
    open_ = traces.Traces._open
    monkeypatch.setattr(
        traces.Traces, "_open", lambda self, name: (opened.append(name), open_(self, name))[1]
    )
    done = call("view", many, "--no-browser")
    assert done.returncode == 0, done.stderr
    assert "60 scenarios: without contrasts of features" in done.stderr
    assert opened == ["S000000"]
    layout = Layout(many)
    index = json.loads(layout.index)
    assert index["scenarios"] == many_traces.names_of(COUNT)
    assert index["run"] == {}
    listing = json.loads(gzip.decompress(layout.read("data/@listing/0.json.gz")))
    assert listing["tags"][:4] == [["safe"], ["risky"], ["safe"], ["risky"]]
    assert len(listing["tags"]) == len(listing["metadata"]) == COUNT
    assert opened == ["S000000"] * 2
    name = "S000044"
    found = json.loads(gzip.decompress(layout.read(f"data/@scenarios/{name}.json.gz")))
    assert found["tokens"] == zt.open_trace(many / name).key_token.values.tolist()
    view = zt.open_run(many).zt.view(scenario="S000020", static=True)
    assert "1 of 60 scenarios is shown" in view.note
    assert b"S000020" in view.page
    done = call("view", many, "--no-browser", "--scenario", "S000055")
    assert done.stderr.splitlines() == ["Ctrl-C stops."]


# --- tables ------------------------------------------------------------------------------------

# Arguments of commands behind the name of a table. Those that take no run are left out.
_ON_A_TABLE: dict[str, tuple[str, ...]] = {
    "info": (),
    "verify": (),
    "card": (),
    "index": (),
    "find": ("--layer", "1", "--feature", "0"),
    "figures": ("-o", "OUT"),
    "view": ("--no-browser",),
    "bundle": ("-o", "OUT"),
    "copy": ("OUT",),
    "labels": (),
    "export": ("-o", "OUT"),
}
_REFUSED = {
    "figures": "a table has none",
    "view": "zarrtrace.open_table",
    "bundle": "--to parquet",
    "export": "table",
}


def _analysis(name: str) -> tuple[str, ...]:
    """Return what the example of an analysis gives behind RUN, writing no file."""
    words = ANALYSES[name].example.split()
    return tuple(words[: words.index("-o")] if "-o" in words else words)


def test_every_command_is_tried_on_a_table() -> None:
    assert {*_COMMANDS} - {"extract", "import", "analyze", "tutorial"} == _ON_A_TABLE.keys()


@pytest.mark.parametrize("name", [*_ON_A_TABLE, *(f"analyze {name}" for name in ANALYSES)])
def test_commands_take_a_table_or_say_why_not(tmp_path: Path, table: Path, name: str) -> None:
    words = name.split()
    given = _analysis(words[1]) if len(words) > 1 else _ON_A_TABLE[name]
    copy_run(table, tmp_path / "table")
    arguments = [word.replace("OUT", str(tmp_path / "out")) for word in given]
    done = call(*words, tmp_path / "table", *arguments)
    assert done.returncode in (0, 1, 2), done.stderr
    if name in _REFUSED:
        assert done.returncode
        assert _REFUSED[name] in done.stderr
    elif done.returncode:
        # An analysis of a table without its spans, options or attention.
        assert done.stderr.startswith("zarrtrace: error: ")
        assert len(done.stderr.splitlines()) > 1, "no remedy"
    always = ("info", "verify", "copy", "card", "find", "index", "labels")
    assert name not in always or done.returncode == 0, done.stderr


def test_a_feature_of_a_table_is_found_without_an_index(tmp_path: Path) -> None:
    samples = 30
    plan, values = plan_of(samples), values_of(3, samples, 300, 12)
    path = tmp_path / "run"
    plan.coordinates["scenario"][:] = [f"s{n // 10}" for n in range(samples)]
    plan.coordinates["position"][:] = np.arange(samples) % 10
    with zt.store.TableWriter(path, plan) as writer:
        for record in records_of(plan, values, stop=10):
            writer.append(record)
        writer.fail("s1", "out of memory", 10, 10)
        for record in records_of(plan, values, start=20):
            writer.append(record)
        writer.finish()
    feature = int(np.count_nonzero(values.features[1], axis=0).argmax())
    column = np.delete(values.features[1, :, feature], np.s_[10:20]).astype(np.float64)
    rows = np.delete(np.arange(samples), np.s_[10:20])
    found = find_feature(path, 2, feature, top=2)
    assert found.maximum == column.max()
    assert found.mean == pytest.approx(column.mean(), rel=1e-12)
    assert found.frequency == np.count_nonzero(column) / len(column)
    best = rows[np.argsort(-column)[:2]]
    assert [one.activation for one in found.tokens] == values.features[1, best, feature].tolist()
    for one, row in zip(found.tokens, best, strict=True):
        assert (one.scenario, one.position) == (f"s{row // 10}", row % 10)
        assert one.token == f" token{row}"
        near = range(row - row % 10, row)[-6:]
        assert one.before == "".join(f" token{other}" for other in near)
    with pytest.raises(ConfigError, match="layer 5 has no values"):
        find_feature(path, 5, 7)
    with pytest.raises(ConfigError, match="no feature 300 of layer 1"):
        find_feature(path, 1, 300)
    with pytest.raises(ConfigError, match="no 'features_x'"):
        find_feature(path, 1, 3, array="features_x")


def test_info_shows_groups_of_a_table(table: Path) -> None:
    done = call("info", table)
    assert "samples      50 of 25 scenarios" in done.stdout
    for line in (
        "tags: safe (50), low (50)",
        "balance: 0.125 to 6.125, 40 values; 10 samples have none",
        "round: 0 to 490, 50 values",
        "is_last: False (25), True (25)",
        "_paradigm: p0 (17), p1 (17), p2 (16)",
    ):
        assert line in done.stdout
    assert widest(done.stdout) <= 80
    columns = json.loads(call("info", table, "--json").stdout)["columns"]
    ds = zt.open_table(table)
    for name, column in columns.items():
        if name != "tags":
            values = ds[name].to_series()
            assert column["distinct"] == values.nunique()
            assert column["missing"] == int(values.isna().sum())


def test_the_card_of_a_table_belongs_to_it(tmp_path: Path, table: Path) -> None:
    copy_run(table, tmp_path / "table")
    text = write_card(tmp_path / "table").read().decode()
    assert "50 of 25 prompts" in text
    assert "| \\_paradigm | p0 (17), p1 (17), p2 (16) | 0 |" in text
    assert verify(tmp_path / "table") == []
    copy_run(tmp_path / "table", tmp_path / "again")
    assert fakes.files_in(tmp_path / "again") == fakes.files_in(tmp_path / "table")


# --- at size -----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_hundred_thousand_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, path = 100_000, tmp_path / "table"
    plan = plan_of(samples, layers=(1, 5), features=16, channels=32, limits=DEFAULT_LIMITS)
    values = values_of(2, samples, 16, 32)
    write_table(path, plan, values, step=4096)
    done = call("info", path)
    assert "100,000 of 50,000 scenarios" in done.stdout
    assert widest(done.stdout) <= 80
    ds = zt.open_table(path)
    np.testing.assert_array_equal(ds.features.sel(layer=1, feature=3), values.features[0, :, 3])
    monkeypatch.setattr(damage, "_PART_BYTES", 2**20)
    largest = max(file.stat().st_size for file in path.rglob("*"))
    assert largest > 8 * 2**20
    tracemalloc.start()
    try:
        assert verify(path) == []
        assert tracemalloc.get_traced_memory()[1] < largest / 2
    finally:
        tracemalloc.stop()


@pytest.mark.long
def test_a_thousand_traces_and_one_more(tmp_path: Path) -> None:
    run = many_traces.make_many(tmp_path, 1001)
    for count, is_repeated in ((1001, False), (1000, True)):
        names = many_traces.names_of(count)
        many_traces.write_run(run, names)
        with run_writer.RunWriter(run, names, fakes.CONFIG) as writer:
            writer.finish()
        group = json.loads((run / "zarr.json").read_bytes())
        assert ("consolidated_metadata" in group) == is_repeated
        assert summarize(run, first=3).complete
    groups = zarr.open_group(run, mode="r")
    assert groups.metadata.consolidated_metadata is not None
    assert sum(1 for _ in groups.group_keys()) == 1000
