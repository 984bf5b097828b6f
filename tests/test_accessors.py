"""``.zt`` on datasets and trees, through zarrtrace and through xarray alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import fakes
import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

import zarrtrace as zt
import zarrtrace.accessors
from zarrtrace.cli import view_
from zarrtrace.errors import ConfigError, IntegrityError, NotATraceError, ScenarioError
from zarrtrace.viewer import Server, notebook

Reader = Callable[[Path], xr.Dataset]
READERS: dict[str, Reader] = {
    "zarrtrace": zt.open_trace,
    "dask": lambda path: zt.open_trace(path, chunks={}),
    "run": lambda path: zt.open_run(path.parent)[path.name].to_dataset(),
    "open_zarr": xr.open_zarr,
    "open_dataset": lambda path: xr.open_dataset(path, engine="zarr"),
    "tree's node": lambda path: xr.open_datatree(path.parent, engine="zarr")[path.name],
}


@pytest.fixture(scope="module")
def stored(shared_run: fakes.FakeRun) -> Mapping[str, Any]:
    """Attributes of the first trace, as they stand in its zarr.json."""
    found: dict[str, Any] = json.loads((shared_run.trace / "zarr.json").read_text())["attributes"]
    return found


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_trace_says_what_its_file_says(
    reader: Reader, shared_run: fakes.FakeRun, stored: Mapping[str, Any]
) -> None:
    ds = reader(shared_run.trace)
    for name, span in stored["spans"].items():
        assert ds.zt.span(name) == span["tokens"]
    assert ds.zt.prompt == stored["prompt"]
    assert ds.zt.tokens == list(fakes.make_tokens(7).texts)
    found = ds.zt.provenance
    assert found["model"] == stored["model"]["id"]
    assert found["versions"] == stored["versions"]
    assert found["saes"]["features"]["release"] == stored["saes"]["features"]["release"]
    assert found["source"] == str(shared_run.trace)
    assert ds["attention"].sel(key=ds.zt.span("decision")).sizes["key"] == 1


@pytest.mark.parametrize(
    "code",
    [
        "import xarray as xr, zarrtrace.accessors; ds = xr.open_zarr(path)",
        *(
            pytest.param(code, marks=pytest.mark.long)
            for code in (
                "import zarrtrace; ds = zarrtrace.open_trace(path)",
                "from zarrtrace.store import open_trace; ds = open_trace(path)",
            )
        ),
    ],
)
def test_every_way_of_opening_registers_the_accessor(code: str, shared_run: fakes.FakeRun) -> None:
    program = f"import sys\npath = sys.argv[1]\n{code}\nprint(ds.zt.span('decision'))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(shared_run.trace)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[6]\n"


def test_a_run_lists_its_scenarios(shared_run: fakes.FakeRun) -> None:
    for run in (zt.open_run(shared_run.path), xr.open_datatree(shared_run.path, engine="zarr")):
        table = run.zt.scenarios
        assert sorted(table.index) == sorted(fakes.SCENARIOS)
        assert table["tokens"].tolist() == [7, 7]
        for name, row in table.iterrows():
            assert row["prompt"] == run[name].attrs["prompt"]
            assert row["tags"] == ", ".join(run[name].attrs["tags"])
        assert run.zt.provenance["source"] == str(shared_run.path)
        assert run["Risky_2"].zt.span("decision") == [6]


def test_metadata_called_as_a_column_of_a_run_gets_another_name(
    shared_run: fakes.FakeRun,
) -> None:
    run = zt.open_run(shared_run.path)
    named = {"tokens": 1, "metadata_tokens": 2, "prompt": "p", "tags": "t", "choice": "c"}
    for node in run.children.values():
        node.attrs["metadata"] = named
    table = run.zt.scenarios
    for name, row in table.iterrows():
        assert row["tokens"] == 7
        assert row["prompt"] == run[name].attrs["prompt"]
        assert row["tags"] == ", ".join(run[name].attrs["tags"])
        assert row[["metadata_metadata_tokens", "metadata_tokens"]].tolist() == [1, 2]
        assert row[["metadata_prompt", "metadata_tags", "choice"]].tolist() == ["p", "t", "c"]
    for node in run.children.values():
        node.attrs["generation"] = {"text": "bet"}
        node.attrs["choice"] = "stop"
    both = run.zt.scenarios[["choice", "metadata_choice"]]
    assert both.to_numpy().tolist() == [["stop", "c"]] * 2


def test_source_follows_the_run_and_not_the_folder_one_is_in(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(run.path.parent)
    ds, tree = zt.open_trace(f"{run.path.name}/Safe_1"), zt.open_run(run.path.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in (ds, ds.isel(query=[0]), ds.sel(layer=2), ds[["attention"]], tree["Safe_1"]):
        assert source.zt.provenance["source"] == str(run.path / "Safe_1")
        assert source.zt.view(static=True).page is not None
    assert tree.zt.view(static=True).page is not None


def test_errors_say_what_to_do(shared_run: fakes.FakeRun) -> None:
    ds, run = zt.open_trace(shared_run.trace), zt.open_run(shared_run.path)
    with pytest.raises(ScenarioError, match=r"no span 'nothing'\nIt has: .*decision"):
        ds.zt.span("nothing")
    with pytest.raises(NotATraceError, match=r"not a trace of zarrtrace\n.*\n.*open_trace"):
        _ = xr.Dataset({"a": 1}).zt.tokens
    with pytest.raises(NotATraceError, match=r"not a run of zarrtrace"):
        _ = xr.DataTree().zt.scenarios
    with pytest.raises(ConfigError, match=r"no layer 9\nIt has 1, 2, 3"):
        ds.zt.view(layer=9, static=True)
    with pytest.raises(ConfigError, match=r"no head 2\nIt has 0, 1"):
        run.zt.view(head=2, static=True)
    with pytest.raises(ConfigError, match=r"no scenario 'Nobody'\nIt has: Safe_1, Risky_2"):
        run.zt.view(scenario="Nobody", static=True)
    plain = xr.open_datatree(shared_run.path, engine="zarr")["Safe_1"].to_dataset()
    with pytest.raises(ConfigError, match=r"where it is stored is not known"):
        plain.zt.view(static=True)


# --- what a view holds -------------------------------------------------------------------------


def given(view: notebook.View) -> dict[str, str]:
    """Return what a page shows first."""
    found = re.search(r'<meta name="view" content="([^"]*)">', (view.page or b"").decode())
    assert found
    return dict(parse_qsl(found[1].replace("&amp;", "&")))


def files(view: notebook.View) -> list[str]:
    found = re.search(r'id="bundle-files">(.*?)</script>', (view.page or b"").decode())
    assert found
    return list(json.loads(found[1]))


def test_view_holds_what_the_dataset_holds(shared_run: fakes.FakeRun) -> None:
    ds, run = zt.open_trace(shared_run.trace), zt.open_run(shared_run.path)
    whole = ds.zt.view(layer=3, head=1, static=True)
    assert given(whole) == {"scenario": "Safe_1", "layer": "3", "head": "1"}
    assert sum("Safe_1/attention/" in file for file in files(whole)) == 3  # chunks, one a layer
    assert (
        sum("Safe_1/attention/" in file for file in files(ds.sel(layer=[2]).zt.view(static=True)))
        == 1
    )
    assert (
        sum("Safe_1/attention/" in file for file in files(ds.sel(layer=2).zt.view(static=True)))
        == 1
    )
    both = files(run.zt.view(static=True))
    assert {file.split("/")[1] for file in both if "/attention/" in file} == set(fakes.SCENARIOS)
    assert given(run.zt.view(scenario="Risky_2", static=True)) == {"scenario": "Risky_2"}


def test_the_command_shows_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fakes.make_run(tmp_path / "my 'runs' $HOME", name="a run", scenarios=("A_1", "B-2"))
    view = zt.open_run(run.path).zt.view(scenario="B-2", layer=2, head=1, static=True)
    assert view.command in repr(view)
    words = shlex.split(view.command)
    assert words[:3] == ["zarrtrace", "view", str(run.path)]
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(Server, "run", lambda _: None)
    done = CliRunner().invoke(view_.command, words[2:], catch_exceptions=False)
    assert done.exit_code == 0
    assert opened == [done.stdout.strip()]
    fragment = dict(parse_qsl(urlsplit(opened[0]).fragment))
    assert fragment == given(view) == {"scenario": "B-2", "layer": "2", "head": "1"}


def test_large_pages_are_not_put_into_notebooks(
    shared_run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds, run = zt.open_trace(shared_run.trace), zt.open_run(shared_run.path)
    both, one = len(run.zt.view(static=True).page), len(ds.zt.view(static=True).page)
    monkeypatch.setattr(notebook, "MAX_BYTES", both)
    assert run.zt.view(static=True).note == ""
    monkeypatch.setattr(notebook, "MAX_BYTES", both - 1)
    part = run.zt.view(scenario="Risky_2", static=True)
    assert part.note.startswith("1 of 2 scenarios is shown")
    assert {file.split("/")[1] for file in files(part) if "/attention/" in file} == {"Risky_2"}
    assert part.note in part._repr_html_()
    assert part.command.replace("&", "&amp;").replace("'", "&#x27;") in part._repr_html_()
    monkeypatch.setattr(notebook, "MAX_BYTES", one // 2)
    for view in (ds.zt.view(layer=2, static=True), run.zt.view(static=True)):
        assert view.page is None
        assert "takes more than" in repr(view)
        assert view.command in repr(view)
        assert "<iframe" not in view._repr_html_()


def test_attention_is_rounded_where_it_is_large(
    shared_run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = zt.open_trace(shared_run.trace)
    size = ds["attention"].nbytes
    monkeypatch.setattr(notebook, "_EIGHT_BIT_FROM", size)
    exact = ds.zt.view(static=True).page
    monkeypatch.setattr(notebook, "_EIGHT_BIT_FROM", size - 1)
    assert len(ds.zt.view(static=True).page) < len(exact)


def test_a_run_that_was_replaced_is_not_shown_as_the_old_one(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, seed=1)
    ds, tree = zt.open_trace(run.trace), zt.open_run(run.path)
    fakes.make_run(tmp_path, seed=2, overwrite=True)
    for opened in (ds, tree, tree["Safe_1"]):
        with pytest.raises(IntegrityError, match="is not the trace that was opened"):
            opened.zt.view(static=True)
    assert zt.open_trace(run.trace).zt.view(static=True).page


def test_what_there_is_of_an_incomplete_run_is_shown(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop={"Risky_2": (2,)})
    ds = zt.open_trace(run.path / "Risky_2", missing="nan")
    whole = zt.open_run(run.path, missing="nan")
    for view in (source.zt.view(layer=1, static=True) for source in (ds, whole)):
        assert any("data/Risky_2/attention/" in file for file in files(view))
        assert shlex.split(view.command)[2] == str(run.path)


def test_text_of_a_run_is_text_in_the_notebook(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, name='"><script>alert(1)<')
    shown = zt.open_run(run.path).zt.view(layer=1, static=True)._repr_html_()
    assert shown.count("<") == shown.count("<iframe") + shown.count("</iframe>") == 2
    assert "allow-same-origin" not in shown


def test_view_of_an_object_store(shared_run: fakes.FakeRun) -> None:
    pytest.importorskip("obstore")
    zt.copy(shared_run.path, "memory://bucket/run")
    ds = zt.open_trace("memory://bucket/run/Safe_1")
    assert ds.zt.provenance["source"] == "memory://bucket/run/Safe_1"
    assert given(ds.zt.view(static=True)) == {"scenario": "Safe_1"}
    np.testing.assert_array_equal(ds.zt.span("decision"), [6])
