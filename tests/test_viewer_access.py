"""The page for everyone: axe-core finds nothing serious, and no label is cut off, on any screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakes
import node_packages
import pytest
from test_viewer_page import Open, look, pages, ready  # noqa: F401

from zarrtrace.index import build_index
from zarrtrace.viewer import Server

pytestmark = pytest.mark.long  # axe-core from npm, in a browser

#: A laptop and a phone.
SIZES = [(1440, 900), (390, 844)]
VIEWS: dict[str, dict[str, Any]] = {
    "feature": {"feature": 3, "layer": 2},
    "comparison": {"with": "Risky_2", "layer": 2, "head": 1},
}
SCREENS = [(size, theme, view) for size in SIZES for theme in ("light", "dark") for view in VIEWS]
Screen = tuple[tuple[int, int], str, str]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run = fakes.make_run(
        tmp_path_factory.mktemp("access"),
        scenarios=("Safe_1", "Risky_2", "Safe_3", "Risky_4"),
        tokens=(40, 44, 40, 44),
        active=0.6,
        channels=8,
    )
    build_index(run.path)
    with Server(run.path) as server:
        yield server.url


def shown(look: Any, live: str, screen: Screen) -> Any:  # noqa: F811
    (width, height), theme, view = screen
    page = look(live, width=width, theme=theme, **VIEWS[view])
    page.set_viewport_size({"width": width, "height": height})
    ready(page)
    return page


@pytest.mark.long  # axe-core takes some seconds a page
@pytest.mark.parametrize("screen", SCREENS)
def test_axe_finds_nothing_serious(screen: Screen, live: str, look: Open) -> None:  # noqa: F811
    source = (node_packages.install() / "axe-core" / "axe.min.js").read_text()
    page = shown(look, live, screen)
    # The page's policy forbids other scripts; what the debugger evaluates is not the page's.
    page.evaluate(source)
    found = page.evaluate("axe.run({resultTypes: ['violations', 'passes']})")
    assert len(found["passes"]) > 20
    serious = [
        (one["id"], one["impact"], node["target"], node["failureSummary"])
        for one in found["violations"]
        for node in one["nodes"]
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    # It does find what is wrong.
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    found = page.evaluate("axe.run({runOnly: ['button-name']})")
    assert [one["impact"] for one in found["violations"]] == ["critical"]


# Text that its box does not show whole. The texts of the run itself may be shortened: they have
# their title.
_CUT = """() => [...document.querySelectorAll(
        "h1, h2, h3, th, button, label, .tick, .name, .scale data, .hint, .legend li, .readout, " +
        ".finding, output, .badge, td, .bars data")]
    .filter(e => e.checkVisibility() && !e.matches(".token, .place, .unseen") && e.clientWidth)
    .filter(e => e.scrollWidth > e.clientWidth + 1 || (getComputedStyle(e).overflow === "hidden" &&
        e.scrollHeight > e.clientHeight + 1))
    .map(e => `${e.className} ${e.textContent.slice(0, 40)}: ${e.scrollWidth}/${e.clientWidth}`)"""
# Labels that reach beyond the panel that they are in.
_OUTSIDE = """() => [...document.querySelectorAll(".tick, .name, .scale, .copy, figcaption")]
    .filter(e => e.checkVisibility())
    .filter(e => {
        const a = e.getBoundingClientRect(), b = e.closest(".panel").getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1;
    }).map(e => `${e.className} ${e.textContent.slice(0, 40)}`)"""


@pytest.mark.parametrize("screen", SCREENS)
def test_labels_are_not_cut_off(screen: Screen, live: str, look: Open) -> None:  # noqa: F811
    page = shown(look, live, screen)
    assert page.locator(".tick").count() > 10
    assert page.evaluate(_CUT) == []
    assert page.evaluate(_OUTSIDE) == []
    width = page.evaluate("[document.body.scrollWidth, document.documentElement.scrollWidth]")
    assert max(width) <= screen[0][0]


def test_a_phone_shows_first_what_was_found(live: str, look: Open) -> None:  # noqa: F811
    """The map stands below the prompt; title, Close and histogram above the drawer's fold."""
    page = look(live, width=390, layer=2)
    page.set_viewport_size({"width": 390, "height": 844})
    ready(page)
    tops = {
        name: page.locator(f"#{name}").bounding_box()["y"]
        for name in ("prompt", "map-panel", "flow-panel", "readout")
    }
    assert sorted(tops, key=tops.__getitem__) == [*tops]
    page.locator("#top-features .feature").first.click()
    page.locator("#histogram").wait_for()
    ready(page)
    boxes = {
        name: page.locator(f"#{name}").bounding_box()
        for name in ("feature-panel", "feature-name", "feature-close", "histogram")
    }
    drawer, title, close, histogram = boxes.values()
    assert close["y"] < title["y"] + title["height"] < histogram["y"]
    assert close["x"] > title["x"] + title["width"] - 1
    assert drawer["y"] > 844 / 3
    assert histogram["y"] + histogram["height"] <= 844


def test_numbers_have_one_format(live: str, look: Open) -> None:  # noqa: F811
    """Three digits, or an integer; the exact value is that of the element."""
    page = look(live, layer=2, head=1, feature=3, **{"with": "Risky_2"})
    found = page.eval_on_selector_all(
        "data", "all => all.map(d => [d.value, d.textContent]).filter(d => d[1])"
    )
    assert len(found) > 100
    for value, text in found:
        number = float(value.replace("NaN", "nan"))
        if number != number:
            assert text == "–"
        elif number == 0:
            assert text == "0"
        elif abs(number) < 1e-3:
            assert text == f"{number:.2e}".replace("e-0", "e-").replace("-", "−")
        elif abs(number) < 999.5:
            assert float(text.replace("−", "-")) == float(f"{number:.3g}")
            assert len(text.lstrip("−0.").replace(".", "")) == 3
        else:
            assert text == str(round(number))
    assert "%" not in page.locator("#map-finding").inner_text()
