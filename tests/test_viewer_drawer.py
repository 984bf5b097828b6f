"""The drawer of a feature: what it says of the run is what NumPy finds in it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pandas as pd
import pytest
from everyday import mostly_long
from test_viewer_page import Open, exactly, fragment, look, pages, ready  # noqa: F401

import zarrtrace as zt
from zarrtrace.errors import IntegrityError
from zarrtrace.index import build_index, names_of
from zarrtrace.storage import locate
from zarrtrace.store.metadata import read_trace
from zarrtrace.store.seal import sealed_group
from zarrtrace.viewer import Layout, Server, estimate, write_bundle

SCENARIOS, LENGTHS = ("Safe_1", "Risky_2", "Safe_3"), (30, 41, 30)
LAYER, FEATURE = 2, 3


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    """A run with an index; its feature 3 fires at more tokens than the index lists."""
    folder = tmp_path_factory.mktemp("indexed")
    run = fakes.make_run(folder, scenarios=SCENARIOS, tokens=LENGTHS, active=0.6)
    build_index(run.path)
    write_bundle(Layout(run.path), folder / "page.html")
    return run


def uses(run: fakes.FakeRun, feature: int) -> list[tuple[float, str, int]]:
    """Return a feature's tokens, strongest first: activation, scenario, position."""
    found = []
    for name in SCENARIOS:
        special = np.asarray(zt.open_trace(run.path / name)["special"])
        values = run.truth[name]["features"][LAYER - 1, :, feature]
        found += [(float(v), name, at) for at, v in enumerate(values) if v and not special[at]]
    return sorted(found, key=lambda one: -abs(one[0]))


@pytest.mark.parametrize("way", mostly_long(lambda way: way != "server", ["server", "file"]))
def test_the_drawer_shows_the_strongest_tokens(
    way: str,
    indexed: fakes.FakeRun,
    look: Open,  # noqa: F811
) -> None:
    expected = uses(indexed, FEATURE)
    tokens = sum(LENGTHS) - sum(
        int(np.asarray(zt.open_trace(indexed.path / name)["special"]).sum()) for name in SCENARIOS
    )
    assert len(expected) > 20
    with Server(indexed.path) as live:
        url = live.url if way == "server" else (indexed.path.parent / "page.html").as_uri()
        page = look(url, scenario="Safe_1", layer=LAYER, feature=FEATURE)
        said = page.locator("#uses-of").inner_text()
        assert said.startswith(f"The 20 strongest of {len(expected)} tokens at which it fires, ")
        assert f"of {tokens};" in said
        mean = np.float64([value for value, _, _ in expected]).sum() / tokens
        shown = float(page.locator("#uses-of data").get_attribute("value"))
        np.testing.assert_allclose(shown, mean, rtol=1e-6)
        strongest = [value for value, _, _ in expected[:20]]
        counts = np.histogram(strongest, 12, (min(0, *strongest), max(strongest)))[0]
        assert page.locator("#histogram").get_attribute("data-counts") == ",".join(map(str, counts))
        rows = page.locator("#contexts li").all()
        texts = {
            name: list(zt.open_trace(indexed.path / name)["key_token"].values) for name in SCENARIOS
        }
        around = lambda name, at: "".join(texts[name][max(0, at - 6) : at + 4])  # noqa: E731
        found = pd.DataFrame(expected[:20], columns=["value", "name", "at"])
        found["text"] = [around(name, at) for _, name, at in expected[:20]]
        found["times"] = found.groupby("text")["text"].transform("size")
        contexts = found.drop_duplicates("text").head(10)
        assert len(rows) == len(contexts) > 5
        for row, known in zip(rows, contexts.itertuples(), strict=True):
            exactly(float(row.locator("data").get_attribute("value")), known.value)
            assert row.get_attribute("data-scenario") == known.name
            assert int(row.get_attribute("data-position")) == known.at
            assert row.locator(".context").text_content() == known.text.replace("\n", "⏎")
            times = f"×{known.times}" if known.times > 1 else ""
            assert row.locator(".position").text_content() == times
        name, at = contexts.iloc[1][["name", "at"]]
        rows[1].click()  # the whole row, not the scenario's name alone
        ready(page)
        assert fragment(page, f"scenario={name}&layer={LAYER}&token={at}&feature={FEATURE}")


def test_silent_features_are_told_from_those_of_special_tokens(
    tmp_path: Path,
    look: Open,  # noqa: F811
) -> None:
    run = fakes.make_run(tmp_path, features=40, active=0.15)
    build_index(run.path, special=True)
    fires = np.concatenate(
        [run.truth[name]["features"][LAYER - 1] != 0 for name in fakes.SCENARIOS]
    ).reshape(len(fakes.SCENARIOS), -1, 40)
    is_quiet = ~fires[:, 1:].any((0, 1))  # token 0 is the special one
    silent = int(np.flatnonzero(is_quiet & ~fires[:, 0].any(0))[0])
    special = int(np.flatnonzero(is_quiet & fires[:, 0].any(0))[0])
    with Server(run.path) as live:
        for feature, firing, words in (
            (silent, "none of 14 tokens", "at no word of these scenarios"),
            (special, "special tokens only", "at no token but special ones"),
        ):
            page = look(live.url, scenario="Safe_1", layer=LAYER, feature=feature)
            assert page.locator("#uses-of").inner_text() == f"It fires at {firing}."
            assert words in page.locator("#words").inner_text()


def test_features_without_label_have_their_words(
    indexed: fakes.FakeRun,
    look: Open,  # noqa: F811
) -> None:
    with Server(indexed.path) as live:
        page = look(live.url, scenario="Safe_1", layer=LAYER)
        page.wait_for_function(
            "() => [...document.querySelectorAll('#top-features .label')].every(l => l.textContent)"
        )
        rows = page.locator("#top-features li").all()
        features = [int(row.get_attribute("data-feature")) for row in rows]
        names = names_of(indexed.path, [(LAYER, feature) for feature in features])
        for row, feature in zip(rows, features, strict=True):
            assert row.locator(".label").inner_text() == names[LAYER, feature]
        rows[0].click()
        ready(page)
        name = f"Feature {features[0]}: {names[LAYER, features[0]]}"
        assert page.locator("#feature-name").inner_text() == name


def test_without_an_index_the_drawer_says_so(tmp_path: Path, look: Open) -> None:  # noqa: F811
    run = fakes.make_run(tmp_path, scenarios=("Safe_1",), active=0.9)
    with Server(run.path) as live:
        page = look(live.url, layer=LAYER, feature=FEATURE)
        assert "no index" in page.locator("#uses-of").inner_text()
        assert page.locator("#histogram").is_hidden()
        assert page.locator("#words li").count()


# --- the files -----------------------------------------------------------------------------------


def block(layout: Layout, layer: int = LAYER) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        gzip.decompress(layout.read(f"data/@strongest/features/{layer}/0.json.gz"))
    )
    return found


def test_equal_contexts_are_counted_once(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, scenarios=("A", "B"), active=0.6)
    build_index(run.path)
    texts = {name: np.asarray(zt.open_trace(run.path / name)["key_token"]) for name in ("A", "B")}
    assert texts["A"].tolist() == texts["B"].tolist()  # a template's text
    for number, found in block(Layout(run.path))["features"].items():
        for _, at, *_, times in found["contexts"]:
            fires = [run.truth[name]["features"][LAYER - 1, at, int(number)] != 0 for name in "AB"]
            assert times == sum(fires)
        listed = sum(context[-1] for context in found["contexts"])
        assert listed == len(found["activations"])


def test_an_index_of_what_was_there_before_is_refused(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Safe_1", "Risky_2"), active=0.6)
    build_index(run.path)
    fakes.make_run(tmp_path, name="other", scenarios=("Safe_1", "Risky_2"), active=0.6, seed=9)
    block(Layout(run.path))
    shutil.rmtree(run.path / "Safe_1")
    shutil.copytree(tmp_path / "other" / "Safe_1", run.path / "Safe_1")
    with pytest.raises(IntegrityError, match="not of what is there now"):
        block(Layout(run.path))


def test_a_part_of_a_run_has_contexts_of_all_of_it(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, scenarios=SCENARIOS, active=0.6)
    build_index(run.path)
    layout = Layout(run.path, scenarios=["Safe_1"], layers=[LAYER])
    assert layout.context_files() == [f"data/@strongest/features/{LAYER}/0.json.gz"]
    contexts = [one for use in block(layout)["features"].values() for one in use["contexts"]]
    assert {name for name, *_ in contexts} >= {"Safe_1", "Risky_2"}
    for path in ("features/1/0", "features/2/1", "features/02/0", "features_x/2/0", "../2/0"):
        with pytest.raises(KeyError):
            layout.read(f"data/@strongest/{path}.json.gz")
    assert estimate(layout, "site").files == len(list(layout.files()))


# --- residual stream and metadata ----------------------------------------------------------------


def test_the_residual_streams_norm_is_shown(tmp_path: Path, look: Open) -> None:  # noqa: F811
    run = fakes.make_run(tmp_path, scenarios=("Safe_1",), channels=8, tokens=70)
    truth = np.linalg.norm(run.truth["Safe_1"]["residual"].astype(np.float64), axis=-1)
    with Server(run.path) as live:
        page = look(live.url, layer=LAYER, token=66)
        shown = float(page.locator("#residual-value data").get_attribute("value"))
        np.testing.assert_allclose(shown, truth[LAYER - 1, 66], rtol=1e-6)
        page.keyboard.press("ArrowDown")
        ready(page)
        shown = float(page.locator("#residual-value data").get_attribute("value"))
        np.testing.assert_allclose(shown, truth[LAYER, 66], rtol=1e-6)
        hook = zt.open_trace(run.path / "Safe_1").attrs["residual_hook"]
        assert page.locator("#residual-hook").inner_text() == (f"At {hook}. " if hook else "")


def test_metadata_stands_below_the_prompt(tmp_path: Path, look: Open) -> None:  # noqa: F811
    stored = {"balance": 40, "win_rate": 0.25, "is_risky": True, "note": "a & <i>b</i>"}
    path = locate(fakes.make_run(tmp_path, scenarios=("Risky_40",)).trace)
    trace = read_trace(path)
    attributes = trace.attributes.model_copy(update={"metadata": stored})
    (tmp_path / "run" / "Risky_40" / "zarr.json").write_bytes(sealed_group(attributes, trace.nodes))
    with Server(path) as live:
        page = look(live.url)
        page.locator("#metadata summary").click()
        shown = dict(
            page.eval_on_selector_all(
                "#metadata tr", "rows => rows.map(r => [...r.children].map(c => c.innerText))"
            )
        )
    written = {name: str(value) for name, value in stored.items()}
    assert shown == written | {"is_risky": "true"}
