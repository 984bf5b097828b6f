"""Notebooks: the displays of xarray, and the viewer's page in a frame."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import pytest
import xarray as xr

import zarrtrace as zt
from zarrtrace.viewer import Layout

pytestmark = pytest.mark.long  # a JupyterLab, and pages in frames

#: Height of a laptop's screen, in pixels of CSS.
SCREEN = 900
TRIED: dict[str, Callable[[Path], Any]] = {
    "trace": zt.open_trace,
    "trace, dask": lambda path: zt.open_trace(path, chunks={}),
    "trace, xarray": xr.open_zarr,
    "run": lambda path: zt.open_run(path.parent),
    "table": lambda path: zt.table(zt.open_run(path.parent)),
    "run, dask": lambda path: zt.open_run(path.parent, chunks={}),
    "run, xarray": lambda path: xr.open_datatree(path.parent, engine="zarr"),
}


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page as wide as a notebook's output, in which nothing may go wrong."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": 1000, "height": SCREEN})
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
    page.on("request", lambda r: r.url.startswith(("data:", "blob:")) or wrong.append(r.url))
    yield page
    page.close()
    assert wrong == []


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    """A run like a user's: several scenarios and SAEs, and a long configuration."""
    config = {
        "model": "owner/a-model", "dtype": "float32", "layers": "0-31",
        "saes": {f"blocks.{n}.hook_resid_post": f"{n:016x}" for n in range(32)},
        "prompts": {f"scenario_{n}": f"{n:016x}" for n in range(20)},
    }  # fmt: skip
    return fakes.make_run(
        tmp_path_factory.mktemp("wide"),
        scenarios=[f"scenario_{n}" for n in range(20)],
        layers=range(8),
        tokens=12,
        features={"features": 16, "features_b": 8},
        config=config,
    )


@pytest.mark.parametrize("name", TRIED)
def test_displays_take_less_than_a_screen(name: str, wide_run: fakes.FakeRun, page: Any) -> None:
    shown = TRIED[name](wide_run.trace)._repr_html_()
    page.set_content(f"<!doctype html><body style='font: 13px sans-serif'>{shown}</body>")
    height = page.evaluate("document.body.getBoundingClientRect().height")
    assert 100 < height < SCREEN
    assert page.locator("text=seal").first.is_hidden()  # attributes are folded


# --- the view ----------------------------------------------------------------------------------


def chosen(frame: Any) -> tuple[str, ...]:
    frame.locator("body:not([data-state=busy])").wait_for()
    found = (
        frame.locator("#scenario").input_value(),
        frame.locator("#layer-shown").inner_text(),
        frame.locator("#head-shown").inner_text(),
    )
    return tuple(found)


def test_the_frame_shows_what_was_chosen(shared_run: fakes.FakeRun, page: Any) -> None:
    choice = {"scenario": "Risky_2", "layer": 3, "head": 1}
    view = zt.open_run(shared_run.path).zt.view(**choice, height=700, static=True)
    page.set_content(f"<!doctype html><body>{view._repr_html_()}</body>")
    frame = page.frame_locator("iframe")
    assert chosen(frame) == ("Risky_2", "L3", "H1")
    texts = frame.locator("#tokens .token").all_inner_texts()
    assert len(texts) == len(fakes.make_tokens(7).texts)
    assert page.locator("iframe").bounding_box()["height"] == pytest.approx(700, abs=4)
    # Without an address of its own, the page still changes: scenario, layer and head.
    frame.locator("#scenario").fill("Safe_1")
    frame.locator("#scenario").press("Enter")
    assert chosen(frame) == ("Safe_1", "L3", "H1")
    frame.locator("#layer").fill("0")
    frame.locator("#head").fill("-1")
    assert chosen(frame) == ("Safe_1", "L1", "mean")
    frame.locator("#tokens .token").nth(2).click()
    time.sleep(0.2)  # in which an address would be written
    assert chosen(frame) == ("Safe_1", "L1", "mean")


#: A policy like that of VS Code's notebooks, which the frame inherits.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src https: data:; font-src https:; connect-src https:; child-src https: data:"
)


def test_a_notebook_with_a_policy_shows_it_and_saves_pictures(
    shared_run: fakes.FakeRun, page: Any
) -> None:
    shown = zt.open_trace(shared_run.trace).zt.view(layer=2, static=True)._repr_html_()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page.set_content(f"<!doctype html>{policy}<body>{shown}</body>")
    frame = page.frame_locator("iframe")
    assert chosen(frame) == ("Safe_1", "L2", "mean")
    with page.expect_download() as saved:
        frame.locator("#large-panel").get_by_text("Copy PNG").click()
    assert saved.value.suggested_filename == "large-panel.png"


def test_the_frame_cannot_reach_the_notebook(shared_run: fakes.FakeRun, browser: Any) -> None:
    view = zt.open_trace(shared_run.trace).zt.view(static=True)
    page = browser.new_page()
    page.set_content(f"<!doctype html><body><p id=secret>x</p>{view._repr_html_()}</body>")
    chosen(page.frame_locator("iframe"))
    (frame,) = page.main_frame.child_frames
    reach = "() => { try { return parent.document.title; } catch (error) { return error.name; } }"
    assert frame.evaluate(reach) == "SecurityError"
    assert frame.evaluate("() => fetch('https://example.org').catch(() => 'refused')") == "refused"
    page.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A JupyterLab of its own: its address, and the folder of its notebooks."""
    if importlib.util.find_spec("jupyterlab") is None:
        message = "needs JupyterLab: pip install '.[test]'"
        required = os.environ.get("ZARRTRACE_REQUIRE_BROWSER") == "1"
        pytest.fail(message) if required else pytest.skip(message)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": notebooks,
        "IdentityProvider.token": "for-this-test",
        "LabApp.workspaces_dir": tmp_path / "workspaces",
        "LabApp.user_settings_dir": tmp_path / "settings",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env={**os.environ, **{name: str(tmp_path / name) for name in own}},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/api?token=for-this-test").close()  # noqa: S310
                break
            except OSError:
                time.sleep(0.2)
        yield url, notebooks
    finally:
        server.terminate()
        server.wait(60)


def written(notebooks: Path, *cells: str) -> None:
    """Write a notebook of some cells."""
    content = {
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "metadata": {},
                "outputs": [],
                "execution_count": None,
                "source": cell,
            }
            for number, cell in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (notebooks / "one.ipynb").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def notebook(lab: tuple[str, Path], browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a notebook of some cells in JupyterLab; nothing may go wrong in its page."""
    url, notebooks = lab
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: errors.append(str(error)))

    def show(*cells: str) -> Any:
        written(notebooks, *cells)
        page.goto(f"{url}/lab/tree/one.ipynb?token=for-this-test")
        page.get_by_text("(ipykernel) | Idle").wait_for()
        return page

    yield show
    page.close()
    assert errors == []


def run_cell(page: Any, number: int) -> None:
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(number).click()
    page.keyboard.press("Control+Enter")


def output(page: Any, number: int) -> Any:
    return page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".jp-OutputArea-output")


def test_view_in_jupyterlab(notebook: Callable[..., Any], shared_run: fakes.FakeRun) -> None:
    page = notebook(
        f"import zarrtrace as zt\nrun = zt.open_run({str(shared_run.path)!r})\n"
        "run.zt.view(scenario='Risky_2', layer=3, head=1, static=True)"
    )
    run_cell(page, 0)
    frame = page.frame_locator(".jp-OutputArea-output iframe")
    assert chosen(frame) == ("Risky_2", "L3", "H1")
    texts = frame.locator("#tokens .token").all_inner_texts()
    assert len(texts) == len(fakes.make_tokens(7).texts)
    frame.locator("#scenario").fill("Safe_1")
    frame.locator("#scenario").press("Enter")
    assert chosen(frame) == ("Safe_1", "L3", "H1")


def test_the_widget_in_jupyterlab(notebook: Callable[..., Any], shared_run: fakes.FakeRun) -> None:
    """Chunks come through the kernel; what one side chooses the other side has."""
    page = notebook(
        f"import zarrtrace as zt\nrun = zt.open_run({str(shared_run.path)!r})\n"
        "view = run.zt.view(scenario='Risky_2', layer=3, head=1)\nview",
        "view.scenario, view.layer, view.head, view.token, view.feature",
        "view.layer, view.head, view.token, view.feature = 2, -1, 4, 5",
        "view.layer = 99",
        "view.scenario = 'Safe_1'\nview",
    )
    run_cell(page, 0)
    frame = page.frame_locator(".jp-OutputArea-output iframe")
    assert chosen(frame) == ("Risky_2", "L3", "H1")
    truth = shared_run.truth["Risky_2"]["attention"]
    shown = float(frame.locator("#attends-to data").first.get_attribute("value"))
    assert shown == truth[2, 1, -1].max()
    # The page chooses, Python reads.
    frame.locator("#layer").fill("0")
    frame.locator("#tokens .token").nth(2).click()
    assert chosen(frame) == ("Risky_2", "L1", "H1")
    for _ in range(50):
        run_cell(page, 1)
        output(page, 1).wait_for()
        if "('Risky_2', 1, 1, 2, -1)" in output(page, 1).inner_text():
            break
        time.sleep(0.1)
    assert "('Risky_2', 1, 1, 2, -1)" in output(page, 1).inner_text()
    # Python chooses, the page shows.
    run_cell(page, 2)
    frame.locator("#layer-shown", has_text="L2").wait_for()
    frame.locator("#feature-panel:not([hidden])").wait_for()
    assert chosen(frame) == ("Risky_2", "L2", "mean")
    assert frame.locator('.token[aria-selected="true"]').get_attribute("data-position") == "4"
    run_cell(page, 3)
    output(page, 3).get_by_text("has no layer 99").first.wait_for()
    # Shown once more, it shows what was chosen last.
    run_cell(page, 4)
    for number in (4, 0):
        shown = output(page, number).frame_locator("iframe")
        assert chosen(shown)[:2] == ("Safe_1", "L2")


def test_choices_of_the_widget_are_checked(shared_run: fakes.FakeRun) -> None:
    traitlets = pytest.importorskip("traitlets")
    pytest.importorskip("anywidget")
    view = zt.open_run(shared_run.path).zt.view(scenario="Risky_2")
    view.layer, view.head, view.token, view.feature = 3, 1, 2, 15
    for name, value in {
        "layer": 99, "head": 2, "token": 7, "feature": 16, "scenario": "Nobody"
    }.items():  # fmt: skip
        with pytest.raises(traitlets.TraitError, match=str(value)):
            setattr(view, name, value)
    assert (view.scenario, view.layer, view.head) == ("Risky_2", 3, 1)
    assert (view.token, view.feature) == (2, 15)


def test_the_widget_says_the_layer_that_is_chosen(shared_run: fakes.FakeRun) -> None:
    pytest.importorskip("anywidget")
    ds = zt.open_trace(shared_run.trace)
    view = ds.zt.view(layer=3, head=1)
    assert (view.layer, view.head) == (3, 1)
    assert f"{ds.attrs['scenario']}, layer 3;" in repr(view)
    assert "layer=3" in repr(view)
    open_ = ds.zt.view()
    assert "layer" not in repr(open_)  # the page will choose one
    open_.layer = 2
    assert ", layer 2;" in repr(open_)


def test_the_widget_answers_with_files_of_the_bundle(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("anywidget")
    view = zt.open_run(run.path).zt.view()
    sent: list[tuple[dict[str, Any], list[bytes]]] = []
    monkeypatch.setattr(view, "send", lambda said, buffers=(): sent.append((said, [*buffers])))
    layout = Layout(run.path, is_live=True)
    assert json.loads(layout.index)["source"]["arguments"] == repr(str(run.path))
    good = "data/Safe_1/attention/c/1/0/0/0"
    for number, path in enumerate(["index.json", good, "../zarr.json", "data/Safe_1/nothing"]):
        view._handle_custom_msg({"id": number, "path": path}, [])
    assert sent[0] == ({"id": 0}, [layout.index])
    assert sent[1] == ({"id": 1}, [layout.read(good)])
    assert [said["error"] for said, _ in sent[2:]] == [
        "../zarr.json is missing.", "data/Safe_1/nothing is missing."
    ]  # fmt: skip
