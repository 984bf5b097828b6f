"""What a notebook shows: the displays of xarray, and the viewer's page in a frame."""

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
from everyday import mostly_long

import zarrtrace as zt

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


@pytest.mark.parametrize("name", mostly_long(lambda name: "dask" not in name, TRIED))
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
    view = zt.open_run(shared_run.path).zt.view(scenario="Risky_2", layer=3, head=1, height=700)
    page.set_content(f"<!doctype html><body>{view._repr_html_()}</body>")
    frame = page.frame_locator("iframe")
    assert chosen(frame) == ("Risky_2", "L3", "H1")
    texts = frame.locator("#tokens .token").all_inner_texts()
    assert len(texts) == len(fakes.make_tokens(7).texts)
    assert page.locator("iframe").bounding_box()["height"] == pytest.approx(700, abs=4)
    # Without an address of its own, the page still changes: scenario, layer and head.
    frame.locator("#scenario").select_option("Safe_1")
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
    shown = zt.open_trace(shared_run.trace).zt.view(layer=2)._repr_html_()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page.set_content(f"<!doctype html>{policy}<body>{shown}</body>")
    frame = page.frame_locator("iframe")
    assert chosen(frame) == ("Safe_1", "L2", "mean")
    with page.expect_download() as saved:
        frame.locator("#large-panel button.copy").click()
    assert saved.value.suggested_filename == "large-panel.png"


def test_the_frame_cannot_reach_the_notebook(shared_run: fakes.FakeRun, browser: Any) -> None:
    view = zt.open_trace(shared_run.trace).zt.view()
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


@pytest.mark.long
def test_view_in_jupyterlab(lab: tuple[str, Path], shared_run: fakes.FakeRun, browser: Any) -> None:
    url, notebooks = lab
    cell = (
        f"import zarrtrace as zt\nrun = zt.open_run({str(shared_run.path)!r})\n"
        "run.zt.view(scenario='Risky_2', layer=3, head=1)"
    )
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [
        {"cell_type": "code", "id": "one", "metadata": {}, "outputs": [], "execution_count": None,
         "source": cell}
    ]  # fmt: skip
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (notebooks / "one.ipynb").write_text(json.dumps(content), encoding="utf-8")
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{url}/lab/tree/one.ipynb?token=for-this-test")
    page.get_by_text("(ipykernel) | Idle").wait_for()
    page.locator(".jp-Notebook .cm-content").first.click()
    page.keyboard.press("Control+Enter")
    frame = page.frame_locator(".jp-OutputArea-output iframe")
    assert chosen(frame) == ("Risky_2", "L3", "H1")
    texts = frame.locator("#tokens .token").all_inner_texts()
    assert len(texts) == len(fakes.make_tokens(7).texts)
    frame.locator("#scenario").select_option("Safe_1")
    assert chosen(frame) == ("Safe_1", "L3", "H1")
    page.close()
    assert errors == []
