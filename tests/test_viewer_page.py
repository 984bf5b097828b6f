"""The viewer's page in Chromium: what it shows is what the store holds."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import fakes
import numpy as np
import pytest
import rounding
import xarray as xr
from everyday import mostly_long

import zarrtrace as zt
from zarrtrace.analysis import contrast, word_associations
from zarrtrace.index import write_labels
from zarrtrace.records import Tokens, TokensRecord
from zarrtrace.store import RunWriter
from zarrtrace.viewer import Layout, Server, write_bundle

GROUPS = ("Safe_1", "Risky_2", "Safe_3", "Risky_4")
LENGTHS = (7, 9, 7, 8)
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "\"quotes' &amp; </bdi>",
    "\u202eright to left\u202c שלום",
    "🎰👩‍👩‍👧",
    "a\0b",
    "x" * 10_000,
    "${1}{{1}}",
    "\n",
]

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def pages(browser: Any) -> list[Any]:
    """Two pages for all that is looked at: a new one, with its process, takes a second of a core.

    They know nothing of each other, nor of what they showed before.
    """

    def page() -> Any:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(15_000)
        context.new_cdp_session(page).send("Network.setCacheDisabled", {"cacheDisabled": True})
        return page

    return [page(), page()]


@pytest.fixture
def look(pages: list[Any]) -> Iterator[Open]:
    """Show an address; nothing may go wrong in it, nor may it ask another host for anything.

    It takes the place of what was looked at before, unless it is to be shown beside that.
    """
    wrong: list[str] = []
    watched: list[tuple[Any, str, Callable[[Any], object]]] = []

    def watch(page: Any, url: str, *, damaged: bool) -> None:
        own = (url.split("#", maxsplit=1)[0].rsplit("/", 1)[0] + "/", "data:", "blob:")

        def on(event: str, call: Callable[[Any], object]) -> None:
            page.on(event, call)
            watched.append((page, event, call))

        on("pageerror", lambda error: wrong.append(f"error: {error}"))
        if not damaged:  # the browser itself reports an answer 404 or 500
            on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        on("request", lambda r: r.url.startswith(own) or wrong.append(f"asked {r.url}"))

    def forget(page: Any) -> None:
        for one in [one for one in watched if one[0] is page]:
            page.remove_listener(*one[1:])
            watched.remove(one)

    def look(
        url: str, *, damaged: bool = False, width: int = 1280, beside: bool = False, **choice: Any
    ) -> Any:
        page = pages[beside]
        page.goto("about:blank")  # where only the fragment differs, nothing would be loaded anew
        forget(page)
        page.unroute_all()
        page.emulate_media(media="null", color_scheme="null")
        page.set_viewport_size({"width": width, "height": 900})
        page.mouse.move(0, 0)
        watch(page, url, damaged=damaged)
        page.goto(f"{url}#{urlencode(choice)}" if choice else url)
        ready(page)
        return page

    yield look
    for page in pages:
        forget(page)
    assert wrong == []


def ready(page: Any) -> None:
    """Wait until everything chosen is drawn."""
    page.wait_for_selector("body:not([data-state=busy])")


def choose(page: Any, field: str, name: str) -> None:
    """Choose a scenario in a field of the header."""
    page.locator(f"#{field}").fill(name)
    page.keyboard.press("Enter")
    ready(page)


def unpacked(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


def pack(path: Path, content: Any) -> None:
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        """Say nothing."""


class _Host(ThreadingHTTPServer):
    def handle_error(self, *_args: object) -> None:
        """Say nothing: a browser that closes a page drops its connections."""


@pytest.fixture(scope="module")
def host() -> Iterator[Callable[[Path], str]]:
    """Put a folder on a static host that knows no byte ranges."""
    started = []

    def host(folder: Path) -> str:
        handler = functools.partial(_Quiet, directory=str(folder))
        server = _Host(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield host
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> fakes.FakeRun:
    return fakes.make_run(
        tmp_path_factory.mktemp("whole"), scenarios=GROUPS, tokens=LENGTHS, active=0.6
    )


@pytest.fixture(scope="module")
def addresses(
    whole: fakes.FakeRun,
    tmp_path_factory: pytest.TempPathFactory,
    host: Callable[[Path], str],
) -> Iterator[dict[str, str]]:
    """The same run three ways: live, on a static host, in one file."""
    made = tmp_path_factory.mktemp("made")
    write_bundle(Layout(whole.path), made / "folder")
    write_bundle(Layout(whole.path), made / "page.html")
    with Server(whole.path) as live:
        yield {
            "server": live.url,
            "folder": host(made / "folder"),
            "file": (made / "page.html").as_uri(),
        }


# --- reading the page ----------------------------------------------------------------------------


def rows(page: Any, selector: str, key: str) -> list[tuple[int, float]]:
    """Return key and value of a list's rows."""
    found: list[list[Any]] = page.eval_on_selector_all(
        f"{selector} li[data-{key}]",
        f"items => items.map(i => [i.getAttribute('data-{key}'), i.querySelector('data').value])",
    )
    return [(int(at), float(value)) for at, value in found]


def value(page: Any, selector: str) -> float:
    return float(page.locator(f"{selector} data").first.get_attribute("value"))


def exactly(found: float, stored: Any) -> None:
    """A number on the page has all the digits of the stored one."""
    np.testing.assert_array_equal(np.float32(found), np.float32(stored))


def messages(page: Any) -> list[str]:
    return [m.inner_text() for m in page.locator(".message").all() if m.is_visible()]


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", mostly_long(lambda way: way != "folder", ["server", "folder", "file"])
)
def test_what_is_shown_is_what_is_stored(
    way: str, addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    truth = whole.truth["Risky_2"]
    feature = int(truth["top_feature"][1, 6, 0])
    page = look(addresses[way], scenario="Risky_2", layer=2, head=1, token=6, feature=feature)
    assert messages(page) == []
    assert page.locator(".token").count() == 9

    # What the token attends to, and what attends to it.
    attention = truth["attention"][1, 1]
    shown = rows(page, "#attends-to", "position")
    assert [at for at, _ in shown] == np.argsort(-attention[6, :7], kind="stable").tolist()
    for at, weight in shown:
        exactly(weight, attention[6, at])
    for at, weight in rows(page, "#attended-by", "position"):
        exactly(weight, attention[at, 6])

    # Any cell of the large matrix, by keyboard.
    page.locator("#large").focus()
    start = page.locator("#cell").inner_text()
    query, key = 6, int(start.split("→")[1].split()[0])
    assert key == attention[6].argmax()
    for press, down, right in (("ArrowUp", -1, 0), ("ArrowLeft", 0, -1), ("ArrowDown", 1, 0)):
        page.keyboard.press(press)
        query, key = query + down, max(0, key + right)
        exactly(value(page, "#cell"), attention[query, key])

    # Next tokens, strongest features.
    nexts = rows(page, "#next", "token-id")
    assert [at for at, _ in nexts] == truth["next_token"][6].tolist()
    np.testing.assert_allclose(
        [p for _, p in nexts], np.exp(truth["next_token_logprob"][6].astype(float))
    )
    shown = page.locator("#next .token-text").all_text_contents()
    assert shown == truth["next_token_text"][6].tolist()
    gaps = page.eval_on_selector_all(
        "#next .of-token",
        "of => of.map(({children: [token, option]}) => option.getBoundingClientRect().left"
        " - token.getBoundingClientRect().right)",
    )
    assert min(gaps) > 4, "what a token stands for is written into it"
    strongest = rows(page, "#top-features", "feature")
    active = (truth["top_activation"][1, 6] > 0).sum()
    assert [at for at, _ in strongest] == truth["top_feature"][1, 6][: min(active, 12)].tolist()
    for at, activation in strongest:
        exactly(activation, truth["features"][1, 6, at])

    # The feature's timeline, by keyboard over all of it.
    page.locator("#timeline").focus()
    exactly(value(page, "#timeline-cell"), truth["features"][1, 6, feature])
    page.keyboard.press("ArrowUp")
    for token in (5, 4, 3):
        page.keyboard.press("ArrowLeft")
        exactly(value(page, "#timeline-cell"), truth["features"][0, token, feature])

    # The flow into the token: attention to the span over layers.
    for span in ("balance", "decision"):
        positions = zt.span(zt.open_trace(whole.path / "Risky_2"), span)
        found = value(page, f'#flow-legend [data-span="{span}"]')
        total = truth["attention_mean"][1, 6, positions].sum(dtype=float)
        np.testing.assert_allclose(found, total)
    # Any layer and key of it; Enter turns to the layer.
    page.locator("#flow").focus()
    key = int(truth["attention_mean"][1, 6].argmax())
    exactly(value(page, "#flow-cell"), truth["attention_mean"][1, 6, key])
    page.keyboard.press("ArrowUp")
    exactly(value(page, "#flow-cell"), truth["attention_mean"][0, 6, key])
    page.keyboard.press("Enter")
    ready(page)
    assert page.locator("#layer-shown").inner_text() == "L1"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two continuations of five tokens' prompt, of which one holds an answer."""
    run = tmp_path_factory.mktemp("generated") / "run"
    texts = ["<s>", "Bal", "ance", " 90", ":", " I", " bet", "<img src=x>"]
    rng = np.random.default_rng(0)
    for repeat, choice in enumerate(["bet", None]):
        zt.write_trace(
            run,
            "game",
            tokens=(range(8), texts),
            attention={1: fakes.make_attention(2, 8, seed=repeat)},
            features={1: rng.exponential(1, (8, 16)).astype(np.float32)},
            spans={"balance": [1, 2], **({"answer": [6]} if choice else {})},
            repeat=repeat,
            choice=choice,
            generation={
                "tokens": 3, "temperature": 1.0, "top_p": 1.0, "seed": 0, "samples": 2,
                "prompt_tokens": 5, "text": "".join(texts[5:]), "ended_by": "length",
            },
        )  # fmt: skip
    return run


def test_generated_text_is_told_from_the_prompt(generated: Path, look: Open) -> None:
    with Server(generated) as live:
        page = look(live.url, feature=3, **{"with": "game~1"})
        page.locator("#scenario").click()
        names = page.locator("#scenario-list [role=option] bdi").all_text_contents()
        assert names == ["game~0", "game~1"]
        page.keyboard.press("Escape")
        # The prompt's last token comes first; those behind it are marked, and where they begin.
        assert page.locator(".token[aria-selected=true]").get_attribute("data-position") == "4"
        marked = page.locator("#tokens .token.generated")
        assert [one.get_attribute("data-position") for one in marked.all()] == ["5", "6", "7"]
        assert page.locator("#tokens .prompt-end + .token").get_attribute("data-position") == "5"
        said = page.locator("#generated").inner_text()
        assert "from token 5 on:  I bet<img src=x>" in said
        assert "choice: bet" in said
        assert "its length" in said
        # A line in each matrix of tokens, at five eighths of it.
        lines = {"large": 2, "flow": 1, "timeline": 1, "compare-a": 2, "compare-difference": 2}
        for matrix, count in lines.items():
            canvas = page.locator(f"#{matrix}").bounding_box()
            ends = page.locator(f"#{matrix} + .ends .end").all()
            assert len(ends) == count, matrix
            for end in ends:
                at = end.bounding_box()
                across = at["height"] > at["width"]
                middle = at["x"] + at["width"] / 2 if across else at["y"] + at["height"] / 2
                start, size = ("x", "width") if across else ("y", "height")
                place = (middle - canvas[start]) / canvas[size]
                assert place == pytest.approx(5 / 8, abs=2 / canvas[size])
        choose(page, "scenario", "game~1")
        assert "choice: none" in page.locator("#generated").inner_text()


def test_a_prompt_alone_has_no_end(addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"], scenario="Risky_2")
    assert page.locator(".end, .token.generated, #tokens .prompt-end").count() == 0
    assert not page.locator("#generated").is_visible()


def test_axes_say_which_token_and_layer(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    page = look(addresses["server"], scenario="Risky_2", layer=2, feature=3, theme="light")
    stored = zt.open_trace(whole.path / "Risky_2").key_token.values.tolist()
    texts = [{"\n": "⏎", "": "∅"}.get(text, text) for text in stored]
    for ruler in ("large-keys", "large-queries", "flow-keys", "timeline-tokens"):
        ticks = page.locator(f"#{ruler} .tick").all_text_contents()
        assert ticks == texts  # of so few tokens, the texts
        # Spans (tokens 1 and 2, and the last) in colour, all others not.
        alpha = page.evaluate(_ALPHA, f"#{ruler} canvas")
        assert [at for at, a in enumerate(alpha) if a] == [1, 2, 8]
    assert page.locator("#flow-keys .name").all_text_contents() == ["balance", "decision"]
    for ruler in ("flow-layers", "timeline-layers"):
        assert page.locator(f"#{ruler} .tick").all_text_contents() == ["L1", "L2", "L3"]
        assert page.locator(f"#{ruler} .chosen").inner_text() == "L2"
    page.locator("#scale").select_option("absolute")
    ready(page)
    assert page.locator("#large-scale data").all_text_contents() == ["0", "0.250", "1.00"]


def test_every_span_has_its_name_on_the_axis(tmp_path: Path, look: Open) -> None:
    """Whatever the order of their names, and though they would touch each other on one line."""
    names = ["zebra", "apple", "mango", "a_rather_long_name_of_a_span", "balance"]
    zt.write_trace(
        tmp_path / "run",
        "one",
        tokens=(list(range(60)), [f" word{i}" for i in range(60)]),
        attention={0: np.tril(np.ones((2, 60, 60), np.float32)) / np.float32(60)},
        spans={name: [50 - i] for i, name in enumerate(names)},
    )
    with Server(tmp_path / "run") as live:
        page = look(live.url)
        shown = page.locator("#flow-keys .name")
        assert sorted(shown.all_text_contents()) == sorted([*names, "decision"])
        boxes = [one.bounding_box() for one in shown.all()]
    for a, b in itertools.combinations(boxes, 2):
        apart = a["x"] + a["width"] <= b["x"] + 1 or b["x"] + b["width"] <= a["x"] + 1
        assert apart or a["y"] + a["height"] <= b["y"] + 1 or b["y"] + b["height"] <= a["y"] + 1


_ALPHA = """selector => {
    const c = document.querySelector(selector);
    const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    return [...data].filter((_, i) => i % 4 === 3);
}"""


def test_pictures_are_of_their_own_matrix(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    page = look(addresses["server"], scenario="Safe_1", layer=3, head=0, theme="light")
    pixels = page.evaluate(
        """() => [...document.querySelectorAll("#large, #heads canvas, #layers canvas")].map(c =>
            [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data])"""
    )
    truth = whole.truth["Safe_1"]
    matrices = [truth["attention"][2, 0], *truth["attention"][2], *truth["attention_mean"]]
    assert len(pixels) == len(matrices)
    for found, matrix in zip(pixels, matrices, strict=True):
        # Darker is more: the order of brightness is the order of the values.
        red = np.asarray(found).reshape(7, 7, 4)[..., 0]
        order = np.argsort(matrix, axis=None)
        assert (np.diff(red.ravel()[order].astype(int)) <= 0).all()
        assert (red[np.triu_indices(7, 1)] == 255).all()


@pytest.mark.parametrize("way", ["server", "file"])
def test_words_and_contrasts_are_the_analyses(
    way: str, addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    run = zt.open_run(whole.path)
    table = contrast(run, "safe", "risky").to_dataframe().reset_index()
    row = table.iloc[0]
    layer, feature = int(row.layer), int(row.feature)
    page = look(addresses[way], layer=layer, feature=feature)
    cells = page.locator("#contrasts tr[data-pair] data").all()
    names = ("mean_a", "mean_b", "difference", "cohens_d", "p_permutation", "q_permutation")
    for cell, name in zip(cells, names, strict=True):
        exactly(float(cell.get_attribute("value").replace("NaN", "nan")), row[name])
    words = word_associations(run, top=5).to_dataframe()
    expected = words[(words["layer"] == layer) & (words["feature"] == feature)]
    assert len(expected)
    shown = page.locator("#words li").all()
    assert len(shown) == len(expected)
    for line, (_, known) in zip(shown, expected.iterrows(), strict=True):
        exactly(float(line.locator("data").get_attribute("value")), known["score"])
        assert f"×{known['count']}" in line.inner_text()


def test_two_scenarios_and_their_difference(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    url = addresses["folder"]
    page = look(url, **{"scenario": "Safe_1", "with": "Safe_3", "layer": 1, "head": 1, "token": 6})
    a, b = (whole.truth[name]["attention"][0, 1, 6] for name in ("Safe_1", "Safe_3"))
    found = page.eval_on_selector_all(
        "#compare-rows tr",
        "all => all.map(r => [r.dataset.a, ...[...r.querySelectorAll('data')].map(d => d.value)])",
    )
    assert len(found) == 7
    for at, left, right, difference in found:
        key = int(at.split("-")[0])
        exactly(float(left), a[key])
        exactly(float(right), b[key])
        exactly(float(difference), float(a[key]) - float(b[key]))
    sizes = [abs(float(row[3])) for row in found]
    assert sizes == sorted(sizes, reverse=True)
    assert page.locator("#compare-pair").inner_text() == "Safe_1 − Safe_3"
    # Every cell, by keyboard, from the largest difference of the chosen token on.
    page.locator("#compare-difference").focus()
    key = int(np.abs(a - b).argmax())
    for press, query in (("", 6), ("ArrowUp", 5)):
        if press:
            page.keyboard.press(press)
        shown = [d.get_attribute("value") for d in page.locator("#compare-cell data").all()]
        matrices = [whole.truth[name]["attention"][0, 1] for name in ("Safe_1", "Safe_3")]
        for text, matrix in zip(shown, matrices, strict=False):
            exactly(float(text), matrix[query, key])
    # And what the model says next in both.
    found = page.eval_on_selector_all(
        "#compare-next tr",
        "all => all.map(r => [r.dataset.tokenId,"
        " ...[...r.querySelectorAll('data')].map(d => d.value)])",
    )
    assert len(found) == 8
    likely = [
        dict(zip(t["next_token"][6], np.exp(t["next_token_logprob"][6].astype(float)), strict=True))
        for t in (whole.truth["Safe_1"], whole.truth["Safe_3"])
    ]
    for token, *shown in found:
        for text, known in zip(shown, likely, strict=False):
            expected = known.get(int(token), np.nan)
            np.testing.assert_allclose(float(text.replace("NaN", "nan")), expected)


def test_scenarios_of_other_length_are_aligned_by_span(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    # 9 and 7 tokens; the spans are tokens 1 and 2, and the last: 3–7 against 3–5 between them.
    page = look(
        addresses["server"],
        **{"scenario": "Risky_2", "with": "Safe_1", "layer": 1, "head": 0, "token": 8},
    )
    a = whole.truth["Risky_2"]["attention"][0, 0, 8]
    b = whole.truth["Safe_1"]["attention"][0, 0, 6]
    found = page.eval_on_selector_all(
        "#compare-rows tr",
        "all => all.map(r => [r.dataset.a, r.dataset.b, r.cells[2].textContent,"
        " ...[...r.querySelectorAll('data')].map(d => d.value)])",
    )
    by_keys = {row[0]: row for row in found}
    assert by_keys["1-2"][1:3] == ["1-2", "balance"]
    assert by_keys["8-9"][1:3] == ["6-7", "decision"]
    assert len(found) == 7
    for left, right, _, x, y, _ in found:
        keys_a, keys_b = (slice(*map(int, keys.split("-"))) for keys in (left, right))
        np.testing.assert_allclose(float(x), a[keys_a].sum(dtype=float))
        np.testing.assert_allclose(float(y), b[keys_b].sum(dtype=float))


@pytest.mark.long
def test_a_public_release_is_linked_and_not_asked(
    whole: fakes.FakeRun, tmp_path: Path, host: Callable[[Path], str], look: Open
) -> None:
    write_bundle(Layout(whole.path, scenarios=["Safe_1"]), tmp_path / "out")
    file = tmp_path / "out/data/@scenarios/Safe_1.json.gz"
    pack(file, {**unpacked(file), "sources": {"features": {"2": "gpt2-small/2-res-jb"}}})
    page = look(host(tmp_path / "out"), layer=2, feature=5)
    link = page.locator("#feature-name a")
    assert link.get_attribute("href") == "https://www.neuronpedia.org/gpt2-small/2-res-jb/5"
    assert link.get_attribute("rel") == "noopener noreferrer"
    page.keyboard.press("ArrowDown")
    ready(page)
    assert link.count() == 0


def test_missing_layers_are_named(tmp_path: Path, look: Open) -> None:
    run = fakes.make_run(tmp_path, drop={"Risky_2": (3,)})
    with Server(run.path) as live:
        page = look(live.url, scenario="Risky_2", layer=3, head=0)
        assert messages(page) == ["Not stored: layers 3."]
        page.keyboard.press("ArrowUp")
        ready(page)
        exactly(
            rows(page, "#attends-to", "position")[0][1],
            run.truth["Risky_2"]["attention"][1, 0, 6].max(),
        )


@pytest.mark.long
@pytest.mark.torch
def test_queries_that_were_not_chosen_are_said(tmp_path: Path, look: Open) -> None:
    from zarrtrace.extraction import Options, extract_run

    asked = Options(layers=(1, 2), only=("Risky_40",), features=False, attention_positions=(5, -1))
    run = extract_run(tmp_path / "run", asked)
    chosen = zt.open_trace(run / "Risky_40").attention.sel(layer=1, head=2)
    assert chosen.attention_query.values.tolist() == [5, chosen.sizes["key"] - 1]
    attention, tokens = chosen.values, chosen.sizes["key"]
    with Server(run) as live:

        def weights(token: int, where: str) -> dict[int, float]:
            page = look(live.url, scenario="Risky_40", layer=1, head=2, token=token)
            if page.locator(f"{where} .none").count():
                assert page.locator(f"{where} li").all_text_contents() == [
                    "not stored for these tokens"
                ]
                return {}
            return {int(at): weight for at, weight in rows(page, where, "position")}

        found = weights(5, "#attends-to")
        assert found
        for key, weight in found.items():
            exactly(weight, attention[0, key])
        assert not weights(6, "#attends-to")
        found = weights(3, "#attended-by")
        assert set(found) <= {5, tokens - 1}
        exactly(found[5], attention[0, 3])
        assert not weights(tokens - 2, "#attends-to")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"attention": False}, "no attention"), ({"features": 0}, "no features")],
)
def test_what_a_run_lacks_is_said(tmp_path: Path, sizes: dict, message: str, look: Open) -> None:
    run = fakes.make_run(tmp_path, **sizes)
    with Server(run.path) as live:
        page = look(live.url)
        assert any(message in found for found in messages(page))
        assert len(rows(page, "#next", "token-id")) == 10


@pytest.mark.long
def test_a_long_prompt_is_shown_in_windows(tmp_path: Path, look: Open) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Long",), tokens=700, layers=(0,), features=40)
    truth = run.truth["Long"]
    with Server(run.path) as live:
        page = look(live.url, layer=0, head=1, token=600)
        assert page.locator(".token").count() == 700 - 512
        row = truth["attention"][0, 1, 600]
        shown = rows(page, "#attends-to", "position")
        assert [at for at, _ in shown] == (
            512 + np.argsort(-row[512:], kind="stable")[:10]
        ).tolist()
        page.locator("#windows input").focus()
        page.keyboard.press("Home")
        ready(page)
        assert page.locator(".token").first.get_attribute("data-position") == "0"
        for at, weight in rows(page, "#attends-to", "position"):
            assert at < 256
            exactly(weight, row[at])
        # Choosing a token of this window shows its own row.
        page.locator('.token[data-position="9"]').click()
        ready(page)
        for at, weight in rows(page, "#attends-to", "position"):
            exactly(weight, truth["attention"][0, 1, 9, at])
        # No more than a window of a matrix is ever drawn.
        drawn = ".panel:not([hidden]) :is(.square, .strip, .grid canvas)"
        sizes = page.eval_on_selector_all(drawn, "c => c.map(x => x.width)")
        assert max(sizes) <= 256
        # A slider that has the focus keeps it, so that the next key goes to it, too.
        page.locator("#windows input").focus()
        for key in ("ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
            ready(page)
        assert page.locator(".token").first.get_attribute("data-position") == "512"


@pytest.mark.long
def test_a_long_prompt_has_an_overview(tmp_path: Path, look: Open) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Long",), tokens=700, layers=(0, 1), features=40)
    truth = run.truth["Long"]
    with Server(run.path) as live:
        for head, row in (
            (1, truth["attention"][1, 1, 600]),
            (-1, truth["attention_mean"][1, 600]),
        ):
            page = look(live.url, layer=1, head=head, token=600)
            page.wait_for_selector("#overview:not(.stale)")
            found = page.eval_on_selector_all(
                "#overview-keys button",
                "all => all.map(b => [b.dataset.position, b.querySelector('data').value])",
            )
            assert [int(at) for at, _ in found] == np.argsort(-row, kind="stable")[:6].tolist()
            for at, weight in found:
                exactly(float(weight), row[int(at)])
        at = min(int(position) for position, _ in found)
        page.locator(f'#overview-keys [data-position="{at}"]').click()
        ready(page)
        assert page.locator(f'.token[data-position="{at}"]').count() == 1
        page.keyboard.press("ArrowUp")
        assert page.locator("#overview-keys").is_hidden()


# --- hostile content -----------------------------------------------------------------------------


def hostile_run(path: Path) -> xr.Dataset:
    planned = fakes.make_plan("Safe_1", tokens=len(HOSTILE))
    planned = replace(
        planned,
        attributes=planned.attributes.model_copy(update={"tags": tuple(HOSTILE[:3])}),
        tokens=Tokens(ids=range(len(HOSTILE)), texts=HOSTILE),
    )
    with RunWriter(path, ["Safe_1"], fakes.CONFIG) as run:
        writer = run.trace(planned)
        for record in fakes.make_records(tokens=len(HOSTILE), active=0.6):
            if isinstance(record, TokensRecord):
                texts = np.resize(np.array(HOSTILE, object), record.next_token.shape)
                writer.append(replace(record, next_token_text=texts))
            else:
                writer.append(record)
        writer.finish()
        run.finish()
    return zt.open_trace(path / "Safe_1")


@pytest.mark.long
def test_texts_are_texts(
    tmp_path: Path, host: Callable[[Path], str], look: Open, pages: list[Any]
) -> None:
    """Tokens, tags and names of another's bundle are shown as they are."""
    ds = hostile_run(tmp_path / "run")
    feature = int(ds.top_feature.sel(layer=1)[-1, 0])
    write_bundle(Layout(tmp_path / "run"), tmp_path / "out")
    index = json.loads((tmp_path / "out/index.json").read_text())
    index |= {"title": HOSTILE[1], "model": HOSTILE[0]}
    # Names that no run of ours can have, but a file from elsewhere can.
    index["scenarios"] = HOSTILE[:8]
    (tmp_path / "out/index.json").write_text(json.dumps(index))
    data = tmp_path / "out/data"
    one = unpacked(data / "@scenarios/Safe_1.json.gz")
    one["spans"] = {HOSTILE[0]: [1], HOSTILE[1]: [2], "__proto__": [3]}
    one["options"] = {HOSTILE[1]: 3}
    listing = {
        "tags": [[text] for text in HOSTILE[:8]],
        "metadata": [dict.fromkeys(HOSTILE, text) for text in HOSTILE[:8]],
    }
    pack(data / "@listing/0.json.gz", listing)

    def answer(route: Any) -> None:  # no folder holds a file of such a name
        name = unquote(route.request.url.split("scenarios/")[1]).removesuffix(".json.gz")
        route.fulfill(body=gzip.compress(json.dumps({**one, "name": name}).encode()))

    there = re.compile(r"/(@|%40)scenarios/")
    url = host(tmp_path / "out")
    with Server(tmp_path / "run") as live:
        for address, names in (
            (live.url, ["Safe_1"]),
            (url, [HOSTILE[0], HOSTILE[3], HOSTILE[5], HOSTILE[6]]),
        ):
            if address == url:
                pages[0].context.route(there, answer)
            for name in names:
                page = look(address, scenario=name, layer=1, head=0, feature=feature)
                shown = page.locator(".token").all_text_contents()
                assert shown[:8] == HOSTILE[:8]
                assert page.locator("#scenario").input_value() == name
                page.locator("#scenario").click()
                assert name in page.locator("#scenario-list bdi").all_text_contents()
                page.keyboard.press("/")
                assert page.evaluate("window.hacked") is None
                assert page.locator("script").count() == 1
                assert page.locator("img, iframe, object").count() == 0
                assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    pages[0].context.unroute(there)


# --- damage --------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def test_special_tokens_are_shown_if_asked_for(whole: fakes.FakeRun, look: Open) -> None:
    truth = whole.truth["Risky_2"]
    values = truth["features"]
    # A feature that is strongest at BOS, which is position 0.
    feature = int((np.abs(values[:, 0]).max(0) - np.abs(values[:, 1:]).max((0, 1))).argmax())
    every, usual = np.abs(values[:, :, feature]).max(), np.abs(values[:, 1:, feature]).max()
    assert every > usual
    with Server(whole.path) as live:
        page = look(live.url, scenario="Risky_2", layer=2, token=0, feature=feature)
        scale = page.locator("#timeline-scale data").last
        assert page.locator("#top-features").inner_text() == "left out: a special token"
        exactly(float(scale.get_attribute("value") or "nan"), usual)
        page.locator("#special").check()
        ready(page)
        listed = [at for at, _ in rows(page, "#top-features", "feature")]
        assert listed == truth["top_feature"][1, 0][: len(listed)].tolist()
        exactly(float(scale.get_attribute("value") or "nan"), every)
        page.wait_for_function("() => location.hash.includes('special=1')")


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0xFF
    path.write_bytes(content)


def swap(path: Path) -> None:
    path.write_bytes(gzip.compress(b"another size"))


@pytest.mark.long
@pytest.mark.parametrize(
    "damage",
    mostly_long(lambda damage: damage in (flip, Path.unlink), [cut, flip, swap, Path.unlink]),
)
def test_a_damaged_chunk_is_said_and_the_rest_is_shown(
    damage: Callable[[Path], None],
    whole: fakes.FakeRun,
    tmp_path: Path,
    host: Callable[[Path], str],
    look: Open,
) -> None:
    write_bundle(Layout(whole.path, scenarios=["Safe_1"]), tmp_path / "out")
    damage(tmp_path / "out/data/Safe_1/attention/c/0/0/0/0")
    page = look(host(tmp_path / "out"), damaged=True, layer=1, head=0, token=6)
    said = messages(page)
    assert said
    assert all("data/Safe_1/attention/c/0/0/0/0 " in message for message in said)
    truth = whole.truth["Safe_1"]
    assert rows(page, "#top-features", "feature")[0][0] == truth["top_feature"][0, 6, 0]
    page.keyboard.press("ArrowDown")
    ready(page)
    assert messages(page) == []
    exactly(rows(page, "#attends-to", "position")[0][1], truth["attention"][1, 0, 6].max())


def test_damage_in_the_store_is_said(tmp_path: Path, look: Open) -> None:
    run = fakes.make_run(tmp_path)
    flip(run.path / "Safe_1/attention/c.0.0.0.0", 40)  # layer 1 comes first
    with Server(run.path) as live:
        page = look(live.url, damaged=True, layer=1, head=0, token=6)
        assert any("cannot be read" in message for message in messages(page))
        assert rows(page, "#next", "token-id")
        page.keyboard.press("ArrowDown")
        ready(page)
        # Other layers are drawn; the map of all layers is not.
        assert len(messages(page)) == 1
        assert page.locator("#map-panel .message").is_visible()


def test_a_page_without_its_index_says_so(
    tmp_path: Path, whole: fakes.FakeRun, host: Callable[[Path], str], look: Open
) -> None:
    write_bundle(Layout(whole.path, scenarios=["Safe_1"]), tmp_path / "out")
    index = tmp_path / "out/index.json"
    index.write_text(index.read_text().replace('"version":2', '"version":99'))
    url = host(tmp_path / "out")
    assert messages(look(url)) == ["This page reads layout 2, index.json is 99."]
    index.unlink()
    assert messages(look(url, damaged=True)) == ["index.json is missing (404)."]


# --- choosing ------------------------------------------------------------------------------------


def fragment(page: Any, expected: str) -> str:
    """Return the address's fragment once it holds `expected`: it follows a moment after."""
    page.wait_for_function("text => location.hash.includes(text)", arg=expected)
    return str(page.evaluate("location.hash"))


@pytest.mark.long
@pytest.mark.parametrize("way", ["server", "file"])
def test_what_is_chosen_is_in_the_address(way: str, addresses: dict[str, str], look: Open) -> None:
    page = look(addresses[way])
    choose(page, "other", "Risky_4")
    page.locator("#heads button").nth(1).click()
    page.locator("#layers button").nth(0).click()
    page.locator("#heads button").nth(1).click()
    page.locator('.token[data-position="5"]').click()
    page.locator("#top-features button").nth(1).click()
    page.locator("#theme").click()
    ready(page)
    feature = page.locator("#top-features .chosen").get_attribute("data-feature")
    expected = {"scenario": "Safe_1", "with": "Risky_4", "layer": 1, "head": 1, "token": 5}
    whole = urlencode({**expected, "feature": feature, "theme": "dark"})
    there = fragment(page, whole)
    assert there == "#" + whole
    page.mouse.move(0, 0)
    page.locator("body").evaluate("() => document.activeElement.blur()")
    again = look(addresses[way] + there, beside=True)
    for selector in ("#attends-to", "#next", "#top-features", "#cell", "#compare-rows", "#words"):
        assert again.locator(selector).inner_text() == page.locator(selector).inner_text()
    assert fragment(again, there) == there
    # Another scenario is a step back.
    choose(page, "scenario", "Safe_3")
    page.go_back()
    page.wait_for_function("() => document.querySelector('#scenario').value === 'Safe_1'")
    assert fragment(page, there) == there


@pytest.mark.long
def test_any_address_shows_something(addresses: dict[str, str], look: Open) -> None:
    for junk, said in {
        "#layer=99&head=-7&token=1e9&feature=99999999": "layer=99 (Safe_1 has layers 1 to 3)",
        "#scenario=%00&with=%ff&sae=<b>": "sae=<b> (Safe_1 has features)",
        "#layer=2&place=nothing&scale=log": "place=nothing, scale=log",
    }.items():
        page = look(addresses["server"] + junk)
        assert any("This run has no " in one and said in one for one in messages(page))
        assert rows(page, "#attends-to", "position")
        page.locator("#theme").click()
        ready(page)
        assert messages(page) == []


@pytest.mark.long
def test_everything_can_be_done_by_keyboard(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    page = look(addresses["server"], scenario="Safe_1", layer=2)
    press = page.keyboard.press
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight", "ArrowLeft"):
        press(key)
    ready(page)
    assert fragment(page, "layer=1&head=0")
    assert page.locator("#layer-shown").inner_text() == "L1"
    # Every control is reached by Tab, in order, and the tokens are one stop.
    stops = []
    for _ in range(50):
        press("Tab")
        stops.append(
            page.evaluate("(e => e.id || e.className + e.textContent)(document.activeElement)")
        )
    for one in ("scenario", "other", "layer", "head", "theme", "large", "feature-number"):
        assert one in stops
    assert sum(stop.startswith("token") for stop in stops) == 1
    page.locator("#layer").focus()
    press("ArrowRight")
    ready(page)
    assert fragment(page, "layer=2")
    page.locator('.token[tabindex="0"]').focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight"):
        press(key)
    truth = whole.truth["Safe_1"]["attention"][1, 0]
    page.wait_for_function(
        "() => document.querySelector('#active-token').textContent.startsWith('3')"
    )
    for at, weight in rows(page, "#attended-by", "position"):
        exactly(weight, truth[at, 3])
    press("Enter")
    ready(page)
    assert fragment(page, "token=3")
    page.locator("#feature-number").focus()
    page.keyboard.type("4")
    press("Enter")
    ready(page)
    assert fragment(page, "feature=4")
    assert page.locator("#feature-detail").is_visible()
    # What is pressed keeps the focus, though all around it is drawn anew.
    for selector in ("#top-features button", "#spans button", "#heads button", "#layers button"):
        page.locator(selector).last.focus()
        press("Enter")
        ready(page)
        assert page.evaluate("s => document.activeElement.matches(s)", selector), selector
    page.locator("#feature-close").focus()
    press("Enter")
    ready(page)
    assert page.locator("#feature-panel").is_hidden()
    assert page.evaluate("document.activeElement.id") == "feature-number"


def test_an_unknown_feature_is_refused(addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"], feature=4)
    page.locator("#feature-number").fill("9999")
    page.keyboard.press("Enter")
    said = page.evaluate("document.querySelector('#feature-number').validationMessage")
    assert said.startswith("This SAE has the features 0 to ")
    assert fragment(page, "feature=4")
    assert page.locator("#feature-name").inner_text().startswith("Feature 4")


def test_a_screen_reader_finds_its_way(addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"], feature=3, layer=2, head=0, token=5, **{"with": "Risky_2"})
    for role, least in (("banner", 1), ("main", 1), ("region", 9), ("listbox", 1)):
        assert page.get_by_role(role).count() >= least, role
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("section, canvas, select, input, [tabindex]")]
            .filter(e => e.checkVisibility() && !e.closest("[aria-hidden=true]") &&
                e.getAttribute("role") !== "option" && !e.getAttribute("aria-label") &&
                !e.getAttribute("aria-labelledby") && !e.closest("label"))
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert [one for one in unnamed if "option" not in one] == []
    assert page.locator("#status").inner_text().startswith("L2, head 0, token 5 ")
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    ready(page)
    assert page.locator("#status").inner_text().startswith("L3, head 0, token 5 ")
    # Only the cells of the matrix that has the focus are read out.
    live = "all => all.filter(e => e.ariaLive).map(e => e.id)"
    assert page.eval_on_selector_all(".readout", live) == []
    page.locator("#flow").focus()
    assert page.eval_on_selector_all(".readout", live) == ["flow-cell"]
    page.emulate_media(media="print")
    assert page.locator("#large").is_visible()
    assert page.locator("#theme").is_hidden()


def test_a_server_that_was_stopped_is_said(addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"], damaged=True, scenario="Safe_1", layer=1)
    page.route("**/data/**", lambda route: route.abort("connectionrefused"))
    choose(page, "scenario", "Safe_3")
    assert any("nothing answers" in message for message in messages(page))
    # It still shows what it says that it shows.
    assert page.locator("#scenario").input_value() == "Safe_1"
    assert page.locator("#heads button").first.is_visible()
    page.unroute("**/data/**")
    page.route("**/data/Safe_3/**", lambda route: route.abort("connectionrefused"))
    choose(page, "scenario", "Safe_3")
    assert any("nothing answers" in message for message in messages(page))
    # Nothing of the other scenario is left that could be taken for this one's.
    assert not page.locator("#heads button").first.is_visible()


def test_hovering_shows_the_token(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    page = look(addresses["server"], scenario="Safe_1", layer=2, head=1)
    page.locator('.token[data-position="4"]').hover()
    truth = whole.truth["Safe_1"]
    page.wait_for_selector(f'#next li[data-token-id="{truth["next_token"][4, 0]}"]')
    for at, weight in rows(page, "#attends-to", "position"):
        exactly(weight, truth["attention"][1, 1, 4, at])
    coloured = page.eval_on_selector_all(
        ".token", "all => all.map(t => t.style.backgroundColor !== '')"
    )
    assert all(coloured)
    spans = page.locator(".token.in-span").evaluate_all("all => all.map(t => t.title)")
    assert spans == ["balance", "balance", "decision"]


_CLIPBOARD = """
Object.defineProperty(navigator, "clipboard", {value: {write: async ([item]) => {
    const blob = await item.getType("image/png");
    window.copied = [blob.size, await blob.slice(1, 4).text()];
}}});
"""


@pytest.mark.long
def test_what_is_copied_as_python_reads_what_is_shown(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.path.parent)
    page = look(addresses["file"], scenario="Risky_2", layer=2, head=1, token=5, feature=3)
    ds = zt.open_trace(whole.path / "Risky_2").load()
    attention, mean = ds.attention, ds.attention_mean
    places = {
        "balance": attention.sel(query=5, key=ds.zt.span("balance")).sum("key"),
        "@strongest": attention.sel(query=5, key=[1, 2, 3, 4]).max("key"),
    }
    for place, expected in places.items():
        page.locator("#place").select_option(place)
        ready(page)
        np.testing.assert_allclose(_read(page, "map-panel"), expected, rtol=1e-6)
    np.testing.assert_array_equal(_read(page, "flow-panel"), mean.sel(query=5))
    np.testing.assert_array_equal(_read(page, "large-panel"), attention.sel(layer=2, head=1))
    np.testing.assert_array_equal(_read(page, "heads-panel"), attention.sel(layer=2))
    np.testing.assert_array_equal(_read(page, "layers-panel"), mean)
    np.testing.assert_array_equal(_read(page, "feature-panel"), ds.features.sel(feature=3))


def test_python_opens_a_live_run_where_the_user_found_it(
    tmp_path: Path, look: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is the one that the user gave; a single trace is opened with open_trace."""
    run = fakes.make_run(tmp_path, name="runs/uni")
    monkeypatch.chdir(tmp_path)
    for path in ("runs/uni", "runs/uni/Safe_1"):
        with Server(path) as live:
            page = look(live.url, scenario="Safe_1", layer=2, head=1)
            found = _read(page, "large-panel")
        np.testing.assert_array_equal(found, run.truth["Safe_1"]["attention"][1, 1])


def _read(page: Any, panel: str) -> Any:
    """Run the lines that a panel's button copies, and return the value of the last one."""
    button = page.locator(f"#{panel} .copy").filter(has_text="Python")
    button.click()
    *lines, last = button.get_attribute("data-code").splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)  # noqa: S102 -- our own page's
    return eval(last, names)  # noqa: S307


def test_it_opens_on_the_finding(tmp_path: Path, look: Open) -> None:
    """The layer and head that attend most to a span, the first token and itself left out."""
    run = fakes.make_run(tmp_path, scenarios=("Safe_1",), tokens=9)
    ds = zt.open_trace(run.path / "Safe_1").load()
    to_balance = ds.attention[:, :, -1, ds.zt.span("balance")].sum("key")
    layer, head = (int(to_balance.stack(of=("layer", "head")).idxmax().item()[i]) for i in (0, 1))
    with Server(run.path) as live:
        page = look(live.url)
        assert page.locator("#layer-shown").inner_text() == f"L{layer}"
        assert page.locator("#head-shown").inner_text() == f"H{head}"
        exactly(value(page, "#map-finding"), to_balance.max())
        exactly(value(page, "#map-cell"), to_balance.max())
        # Together with the prompt, above the fold.
        for panel in ("#tokens", "#map", "#flow"):
            box = page.locator(panel).bounding_box()
            assert box["y"] < 700


def test_colours_go_by_panel_row_or_one(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    """The darkest pixel of each row is full where colours go by row, and pale where up to 1."""
    page = look(addresses["server"], scenario="Risky_2", layer=2, head=1, theme="light")
    darkest = """() => {
        const drawn = document.querySelector("#large"), w = drawn.width, h = drawn.height;
        const copy = Object.assign(document.createElement("canvas"), { width: w, height: h });
        const context = copy.getContext("2d", { willReadFrequently: true });
        context.drawImage(drawn, 0, 0);
        const pixels = Array.from(context.getImageData(0, 0, w, h).data);
        const green = pixels.filter((_, i) => i % 4 === 1);
        const ofRow = (row) => Math.min(...green.slice(row * w + 1, (row + 1) * w));
        return Array.from({ length: h }, (_, row) => ofRow(row));
    }"""
    truth = whole.truth["Risky_2"]["attention"][1, 1][:, 1:].max(1)
    by_panel = page.evaluate(darkest)
    page.locator("#scale").select_option("row")
    ready(page)
    by_row = page.evaluate(darkest)
    page.locator("#scale").select_option("absolute")
    ready(page)
    up_to_1 = page.evaluate(darkest)
    for row in range(1, len(truth)):
        assert by_row[row] == min(by_row) <= by_panel[row] <= up_to_1[row]
    assert max(up_to_1[1:]) > max(by_row[1:])


def test_a_feature_colours_the_prompt(
    addresses: dict[str, str], whole: fakes.FakeRun, look: Open
) -> None:
    truth = whole.truth["Risky_2"]["features"][1, :, 3]
    page = look(addresses["server"], scenario="Risky_2", layer=2, feature=3)
    coloured = """all => all.map(t => {
        const alpha = t.style.backgroundColor.match(/([\\d.]+)\\)$/);
        return alpha ? Number(alpha[1]) : 0;
    })"""
    shades = page.eval_on_selector_all(".token", coloured)
    assert [shade > 0 for shade in shades] == [bool(v) for v in truth]
    assert int(np.argmax(shades)) == int(np.argmax(np.abs(truth)))
    assert page.locator("#feature-legend").is_visible()
    assert (
        page.locator("#tokens").bounding_box()["x"]
        < page.locator("#feature-panel").bounding_box()["x"]
    )
    page.locator("#feature-close").click()
    ready(page)
    assert page.locator("#attention-legend").is_visible()


_NO_CLIPBOARD = _CLIPBOARD.replace("const blob", "throw new Error('no'); const blob")


@pytest.mark.long
def test_a_picture_is_copied_or_saved(addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"], feature=3)
    page.evaluate(_CLIPBOARD)
    for panel in page.locator("[data-picture]").all():
        if not panel.is_visible():
            continue
        page.evaluate("window.copied = null")
        panel.get_by_text("Copy PNG").click()
        page.wait_for_function("() => window.copied")
        size, kind = page.evaluate("window.copied")
        assert kind == "PNG"
        assert size > 2000
    page = look(addresses["server"])
    page.evaluate(_NO_CLIPBOARD)
    with page.expect_download() as saved:
        page.locator("#large-panel").get_by_text("Copy PNG").click()
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")


def test_a_choice_lays_the_page_out_once(addresses: dict[str, str], look: Open) -> None:
    """A head whose layer has been read: what is drawn asks for no size that has to be laid out."""
    page = look(addresses["server"], layer=2, head=0)
    page.wait_for_timeout(500)  # neighbours are read ahead
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")

    def layouts() -> int:
        found = session.send("Performance.getMetrics")["metrics"]
        return int(next(one["value"] for one in found if one["name"] == "LayoutCount"))

    before = layouts()
    page.evaluate(
        """async () => {
            const init = {key: "ArrowRight", bubbles: true};
            document.body.dispatchEvent(new KeyboardEvent("keydown", init));
            for (let i = 0; i < 50; i++) await null;
            document.body.getBoundingClientRect();
        }"""
    )
    assert layouts() - before <= 2  # one, or two if the browser paints in between
    assert page.locator("#head-shown").inner_text() == "H1"
    ready(page)
    session.detach()


@pytest.mark.parametrize("width", mostly_long(lambda width: width != 768, [360, 768, 2560]))
def test_it_fits(width: int, addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"], width=width, feature=3, **{"with": "Risky_2"})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = page.eval_on_selector_all(".panel:not([hidden])", "all => all.map(p => p.offsetWidth)")
    assert min(widths) >= 280
    narrow = page.eval_on_selector_all(".multiple canvas", "all => all.map(c => c.offsetWidth)")
    assert min(narrow) >= 40


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(theme: str, addresses: dict[str, str], look: Open) -> None:
    """WCAG 2 AA: 4.5 for text, on every colour that a token or a bar can have behind it."""
    page = look(addresses["server"], theme=theme, feature=3, layer=2, token=0)
    ratios = page.evaluate(_CONTRAST)
    assert len(ratios) > 40
    assert [found for found in ratios if found[1] < 4.5] == []


_CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const over = (below, colour) => {
        canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = rgb => rgb.map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 :
        ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) =>
            sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const out = [];
    for (const at of document.querySelectorAll("body *")) {
        if (![...at.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        if (!at.checkVisibility() || at.disabled) continue;
        if (at.closest("option, script, noscript")) continue;
        let back = [255, 255, 255];
        const line = [];
        for (let e = at; e; e = e.parentElement) line.unshift(e);
        for (const e of line) {
            const style = getComputedStyle(e);
            back = over(back, style.backgroundColor);
            const bar = /rgba?\\([^)]*\\)/.exec(style.backgroundImage);
            if (bar) back = over(back, bar[0]);
        }
        const [x, y] = [light(over(back, getComputedStyle(at).color)), light(back)];
        out.push([at.outerHTML.slice(0, 80), (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05)]);
    }
    return out;
}"""


def test_the_systems_theme_is_followed(addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"])
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"() => document.documentElement.dataset.theme === '{scheme}'")


def test_rounded_attention_is_labelled(whole: fakes.FakeRun, tmp_path: Path, look: Open) -> None:
    write_bundle(Layout(whole.path, eight_bit=True), tmp_path / "page.html")
    page = look((tmp_path / "page.html").as_uri(), scenario="Safe_1", layer=1, head=0, token=6)
    assert "rounded to 8 bits" in page.locator("#bits").inner_text()
    for at, weight in rows(page, "#attends-to", "position"):
        stored = whole.truth["Safe_1"]["attention"][0, 0, 6, at]
        assert abs(weight - stored) <= 0.5 / 254 + rounding.rounding("float32", 2)


def test_a_part_of_the_matrix_is_zoomed_into(tmp_path: Path, look: Open) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Safe_1",), tokens=60)
    truth = run.truth["Safe_1"]["attention"][1, 1]
    stored = zt.open_trace(run.path / "Safe_1").key_token.values.tolist()
    with Server(run.path) as live:
        page = look(live.url, layer=2, head=1)
        page.locator("#large").scroll_into_view_if_needed()
        box = page.locator("#large").bounding_box()
        cell = box["width"] / 60
        at = lambda row, column: (box["x"] + (column + 0.5) * cell, box["y"] + (row + 0.5) * cell)  # noqa: E731
        page.mouse.move(*at(40, 10))
        page.mouse.down()
        page.mouse.move(*at(55, 29))
        page.mouse.up()
        ready(page)
        assert fragment(page, "zoom=40-55%2C10-29")
        assert page.evaluate("[large.height, large.width]") == [16, 20]
        texts = [{"\n": "⏎", "": "∅"}.get(text, text) for text in stored[40:56]]
        assert page.locator("#large-queries .tick").all_text_contents() == texts
        box = page.locator("#large").bounding_box()  # the axis is wider, with texts
        page.mouse.move(box["x"] + box["width"] * 2.5 / 20, box["y"] + box["height"] * 1.5 / 16)
        exactly(value(page, "#cell"), truth[41, 12])
        assert page.locator("#tip").inner_text() == page.locator("#cell").inner_text()
        page.locator("#large").focus()
        page.keyboard.press("+")
        ready(page)
        assert page.evaluate("[large.height, large.width]") == [8, 10]
        page.locator("#zoom-out").click()
        ready(page)
        assert page.evaluate("[large.height, large.width]") == [60, 60]


@pytest.mark.long
@pytest.mark.parametrize("way", ["server", "file"])
def test_features_have_their_labels(way: str, tmp_path: Path, look: Open) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Safe_1",), active=0.9)
    top = int(run.truth["Safe_1"]["top_feature"][1, -1, 0])
    text = f"layer,feature,label\n2,{top},money <b>&</b> debts\n"
    (tmp_path / "labels.csv").write_text(text)
    write_labels(run.path, tmp_path / "labels.csv")
    write_bundle(Layout(run.path), tmp_path / "page.html")
    with Server(run.path) as live:
        url = live.url if way == "server" else (tmp_path / "page.html").as_uri()
        page = look(url, layer=2, head=0)
        rows_ = page.locator("#top-features li")
        assert rows_.first.locator(".label").inner_text() == "money <b>&</b> debts"
        assert set(rows_.locator(".label").all_text_contents()[1:]) == {""}
        rows_.first.click()  # the whole row, not the number alone
        ready(page)
        assert fragment(page, f"feature={top}")
        assert page.locator("#feature-name").inner_text().startswith(f"Feature {top}: money <b>")
        page.keyboard.press("ArrowUp")
        ready(page)
        assert "money" not in page.locator("#feature-name").inner_text()


# --- scenarios and search --------------------------------------------------------------------


def rows_of(page: Any, within: str) -> list[str]:
    return page.locator(f"{within} [role=option]").all_inner_texts()


def test_a_scenario_is_chosen_from_a_grouped_list(addresses: dict[str, str], look: Open) -> None:
    page = look(addresses["server"], scenario="Risky_2")
    field, options = page.locator("#scenario"), "#scenario-list"
    field.click()
    page.wait_for_selector(f"{options} [role=group]:nth-of-type(2)")
    groups = page.locator(f"{options} [role=group]")
    assert [one.get_attribute("aria-label") for one in groups.all()] == ["safe", "risky"]
    assert rows_of(page, options) == ["Safe_1", "Safe_3", "Risky_2", "Risky_4"]
    assert page.locator(f"{options} [aria-selected=true]").inner_text() == "Risky_2"
    # The field keeps the focus, and says which row is meant.
    page.keyboard.press("ArrowDown")
    row = page.locator(f"#{field.get_attribute('aria-activedescendant')}")
    assert row.inner_text() == "Risky_4"
    page.keyboard.press("Escape")
    assert page.locator(options).is_hidden()
    assert field.input_value() == "Risky_2"
    page.keyboard.type("safe 3")
    assert rows_of(page, options) == ["Safe_3"]
    page.keyboard.press("Enter")
    ready(page)
    assert fragment(page, "scenario=Safe_3&")
    choose(page, "other", "Safe_1")
    assert page.locator("#compare-name-b").inner_text() == "B: Safe_1"
    page.locator("#other").click()
    page.locator("#other-list [role=option]", has_text="nothing").click()
    ready(page)
    assert page.locator("#compare-panel").is_hidden()


def seek(page: Any, text: str) -> None:
    """Type into the search, and wait until labels and words have been read."""
    page.locator("#search-text").fill(text)
    page.wait_for_function(
        "text => document.querySelector('#search-list').dataset.query === text", arg=text
    )


@pytest.mark.long
def test_the_search_finds_what_the_run_holds(
    whole: fakes.FakeRun, tmp_path: Path, look: Open
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole.path, run)
    (tmp_path / "labels.csv").write_text("layer,feature,label\n3,7,debts & <b>money</b>\n")
    write_labels(run, tmp_path / "labels.csv")
    table = word_associations(zt.open_run(run), top=5).to_dataframe().reset_index()
    of_layer = table[table.layer == 2]
    word = next(one for one in of_layer.word if one.strip())
    with_word = of_layer[of_layer.word.str.strip().str.lower().str.contains(word.strip().lower())]
    with Server(run) as live:
        page = look(live.url, scenario="Risky_2", layer=2)
        press = page.keyboard.press
        press("/")
        assert page.evaluate("document.activeElement.id") == "search-text"
        seek(page, "risky")
        assert rows_of(page, "#search-list [aria-label^=Scenarios]") == ["Risky_2", "Risky_4"]
        for key in ("ArrowDown", "ArrowDown", "Enter"):
            press(key)
        ready(page)
        assert fragment(page, "scenario=Risky_4")
        press("Control+k")
        seek(page, "debts")
        press("Enter")
        ready(page)
        assert fragment(page, "layer=3")
        assert fragment(page, "feature=7")
        press("Control+k")
        seek(page, "5")
        assert "L3 feature 5" in rows_of(page, "#search-list")
        texts = page.locator("#tokens .token").all_text_contents()
        text = next(one.strip() for one in texts[1:] if one.strip())
        seek(page, text.lower())
        found = page.locator("#search-list [data-token]").first
        token = found.get_attribute("data-token")
        assert found.locator("mark").inner_text().strip() == texts[int(token)].strip()
        found.click()
        ready(page)
        assert fragment(page, f"token={token}")
        page.goto("about:blank")
        page.goto(f"{live.url}#scenario=Risky_2&layer=2")
        ready(page)
        page.keyboard.press("/")
        seek(page, word.strip())
        shown = page.locator("#search-list [aria-label^='Features of L2'] [role=option]")
        features = {int(one.get_attribute("data-feature")) for one in shown.all()}
        assert features
        assert features <= set(with_word.feature)
        assert len(features) == min(20, with_word.feature.nunique())
        seek(page, "no such thing")
        assert page.locator("#search-list").inner_text() == "nothing found"
        for _ in range(8):  # a key that follows at once is the page's: one in four was lost
            press("/")
            press("Escape")
            assert not page.locator("#search").is_visible()
            press("?")
            assert page.locator("#keys").is_visible()
            press("ArrowDown")  # it changes no layer behind the dialog
            press("Escape")
        for key, layer in (("ArrowDown", "L3"), ("ArrowUp", "L2")) * 4:
            press("/")
            press("Escape")
            press(key)
            ready(page)
            assert page.locator("#layer-shown").inner_text() == layer


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1440])
def test_thousands_of_scenarios_are_listed(
    whole: fakes.FakeRun, tmp_path: Path, host: Callable[[Path], str], look: Open, width: int
) -> None:
    """Some rows of each group, and the others by what is typed."""
    count = 2_000
    write_bundle(Layout(whole.path, scenarios=["Safe_1"]), tmp_path / "out")
    data = tmp_path / "out/data"
    index = json.loads((tmp_path / "out/index.json").read_text())
    names = ["Safe_1", *(f"S{number:05}" for number in range(1, count))]
    index |= {"scenarios": names, "run": {}}
    (tmp_path / "out/index.json").write_text(json.dumps(index))
    for part in range(count // index["listed"]):
        numbers = range(part * index["listed"], (part + 1) * index["listed"])
        pack(data / f"@listing/{part}.json.gz", {
            "tags": [["odd" if n % 2 else "even"] for n in numbers],
            "metadata": [{"balance": n} for n in numbers],
        })  # fmt: skip
    one = unpacked(data / "@scenarios/Safe_1.json.gz")
    pack(data / "@scenarios/S01234.json.gz", {**one, "name": "S01234"})
    page = look(host(tmp_path / "out"), width=width)
    page.locator("#scenario").click()
    page.wait_for_selector("#scenario-list [aria-label=odd]")
    page.wait_for_function(
        "() => document.querySelector('#scenario-list').innerText.includes('900 more of odd')"
    )
    assert page.locator("#scenario-list [role=option]").count() <= 202
    box = page.locator("#scenario-list").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#scenario-list [role=option]", has_text="900 more of odd").click()
    assert page.locator("#scenario").input_value() == "odd"
    assert len(rows_of(page, "#scenario-list")) == 200
    page.locator("#scenario").fill("balance=1234")
    assert rows_of(page, "#scenario-list") == ["S01234\nbalance=1234"]
    page.keyboard.press("Enter")
    ready(page)
    assert fragment(page, "scenario=S01234")
    assert page.locator("#scenario").input_value() == "S01234"
