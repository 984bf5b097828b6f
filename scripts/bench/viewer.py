"""Time the viewer in headless Chromium against the live server, on stores of real shape.

Every figure is the median of 20, from the event until everything chosen is drawn and laid out. The
server's cache is emptied before each first view and each layer, which is one that the page has not
read ahead: these times include reading and decoding the store.

    python scripts/bench/viewer.py [--repeats 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
from playwright.sync_api import sync_playwright
from read import FEATURES, NAME, Case, records, write_trace

from zarrtrace.viewer import Server

ACTIVE = 50
#: The mission's shape, and a long prompt: tokens, layers, heads.
SHAPES = {"121 tokens, 31 layers": (121, 31, 32), "4,096 tokens, 3 layers": (4_096, 3, 8)}
#: Scenarios that are searched.
SCENARIOS = 10_000
#: Limits in ms, for the first shape.
LIMITS = {"first view": 900, "another layer": 100, "another head": 15, "hover": 12, "search": 50}

_FIRST = """
window.drawn = new Promise(done => {
    const look = () => document.body?.dataset.state === "ready" ? done(performance.now())
        : setTimeout(look, 0);
    document.addEventListener("DOMContentLoaded", look);
});
"""
# Dispatches an event and waits until all that it chose is drawn and laid out. Polling would take
# one of two cores from the server.
_TIMED = """async ([selector, kind, name, init]) => {
    const task = () => new Promise(done => {
        const channel = new MessageChannel();
        channel.port1.onmessage = done;
        channel.port2.postMessage(0);
    });
    const isReady = () => document.body.dataset.state === "ready";
    const target = document.querySelector(selector);
    const before = performance.now();
    target.dispatchEvent(new window[kind](name, {bubbles: true, cancelable: true, ...init}));
    await task();
    if (!isReady()) await new Promise(done => new MutationObserver((_, watch) => {
        if (isReady()) { watch.disconnect(); done(); }
    }).observe(document.body, {attributes: true, attributeFilter: ["data-state"]}));
    document.body.getBoundingClientRect();
    return performance.now() - before;
}"""


def build(folder: Path, tokens: int, layers: int, heads: int) -> None:
    """Write a trace of random attention and features."""
    case = Case(tokens, heads, ACTIVE, layers)
    write_trace(folder, case, records(case))


def measure(browser: Any, server: Server, tokens: int, layers: int, repeats: int) -> dict[str, Any]:
    """Return medians in ms, and megabytes that the first view takes from the server."""
    times: dict[str, list[float]] = {}
    received = 0
    for _ in range(repeats):
        server.forget()
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        page = context.new_page()
        page.add_init_script(_FIRST)
        page.goto(server.url)
        times.setdefault("first view", []).append(page.evaluate("() => window.drawn"))
        received = sum(
            page.evaluate(
                "() => performance.getEntriesByType('resource').map(e => e.encodedBodySize)"
            )
        )
        context.close()

    def timed(page: Any, name: str, *event: Any) -> None:
        page.wait_for_timeout(30)
        times.setdefault(name, []).append(page.evaluate(_TIMED, event))

    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    for at in range(repeats):
        server.forget()
        page = context.new_page()
        page.goto(f"{server.url}#layer=1")
        page.wait_for_selector("body[data-state=ready]")
        page.evaluate(
            f"() => {{ document.querySelector('#layer').value = {2 + at % (layers - 2)}; }}"
        )
        timed(page, "another layer", "#layer", "InputEvent", "input", {})
        page.close()
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("body[data-state=ready]")
    page.wait_for_timeout(1000)
    for _ in range(repeats):
        timed(page, "another head", "body", "KeyboardEvent", "keydown", {"key": "ArrowRight"})
        if page.locator("#head").input_value() == page.locator("#head").get_attribute("max"):
            page.locator("#head").fill("-1")
    first = int(page.locator(".token").first.get_attribute("data-position"))
    shown = page.locator(".token").count()
    for at in range(repeats):
        token = f'.token[data-position="{first + (7 * at) % shown}"]'
        timed(page, "hover", token, "PointerEvent", "pointerover", {})
    if tokens > shown:
        page.goto(f"{server.url}#token={tokens - 1}&head=1")
        page.wait_for_selector("body[data-state=ready]")
        for at in range(repeats):
            number = at % (tokens // 256)
            page.evaluate(f"() => {{ document.querySelector('#windows input').value = {number}; }}")
            timed(page, "another window", "#windows input", "InputEvent", "input", {})
    context.close()
    medians = {name: round(statistics.median(found), 1) for name, found in times.items()}
    return medians | {"MB for the first view": round(received / 1e6, 2)}


def measure_search(browser: Any, server: Server, repeats: int) -> float:
    """Return the median of a search over :data:`SCENARIOS` names, tags and metadata, in ms."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    numbers = range(SCENARIOS)
    index = json.loads(server.file("index.json"))
    names = [*index["scenarios"], *(f"scenario_{number}" for number in numbers[1:])]
    told = json.dumps({**index, "scenarios": names, "listed": SCENARIOS})
    listing = {
        "tags": [[f"group_{number % 20}"] for number in numbers],
        "metadata": [{"balance": number % 300, "round": number % 7} for number in numbers],
    }
    packed = gzip.compress(json.dumps(listing).encode())
    page.route("**/index.json", lambda route: route.fulfill(body=told))
    page.route(re.compile("listing/0"), lambda route: route.fulfill(body=packed))
    page.goto(server.url)
    page.wait_for_selector("body[data-state=ready]")
    page.keyboard.press("/")
    page.locator("#search-text").fill("group_3")
    page.wait_for_function("() => document.querySelector('#search-list').innerText.includes('500')")
    found: list[float] = []
    for at in range(repeats):
        text = f"group_{at % 20} balance={at}"
        page.evaluate("text => { document.querySelector('#search-text').value = text; }", text)
        found.append(page.evaluate(_TIMED, ["#search-text", "InputEvent", "input", {}]))
        page.wait_for_selector("#search-list [data-name]")
        page.wait_for_timeout(300)
    page.close()
    return round(statistics.median(found), 1)


def main() -> None:
    """Build, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, (tokens, layers, heads) in SHAPES.items():
            path = Path(folder) / NAME
            build(Path(folder), tokens, layers, heads)
            with Server(path) as server:
                found[name] = measure(browser, server, tokens, layers, options.repeats)
                found[name]["search"] = measure_search(browser, server, options.repeats)
            shutil.rmtree(path)
        browser.close()
    print(f"{ACTIVE} active features a token, {FEATURES:,} in all; median of {options.repeats}\n")
    print(f"| ms | limit | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}")
    for what in dict.fromkeys(key for one in found.values() for key in one):
        cells = " | ".join(str(one.get(what, "–")) for one in found.values())
        print(f"| {what} | {LIMITS.get(what, '–')} | {cells} |")
    common.save(options.json, found)


if __name__ == "__main__":
    main()
