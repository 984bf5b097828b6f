"""Draw the documents' pictures from the demo's run: ``.github/demo.png`` and ``viewer.png``.

Needs the extra ``test`` and Chromium (``apt-get install chromium``).

    python scripts/draw_pictures.py [runs/demo]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

import zarrtrace as zt
from zarrtrace.analysis import word_associations
from zarrtrace.figures import integrated_view, save
from zarrtrace.viewer import Server

PICTURES = Path(__file__).parent.parent / ".github"
SCENARIO = "Bankruptcy_90_all_in"
#: The head of the demo that attends most from the decision to the balance, and where it does.
VIEW = {"scenario": SCENARIO, "layer": 25, "head": 2, "theme": "light"}
WIDTH, HEIGHT = 1440, 900


def draw_hero(run: Path, file: Path) -> None:
    """Draw attention of the decision and the features it goes with, with their words."""
    ds = zt.open_trace(run / SCENARIO)
    figure = integrated_view(ds, words=word_associations(zt.open_run(run), strip=True))
    save(figure, file, ds, dpi=165)


def draw_viewer(run: Path, file: Path) -> None:
    """Photograph the part of the viewer's page above its fold."""
    with Server(str(run)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"{server.url}#{urlencode(VIEW)}")
        page.wait_for_selector("body[data-state=ready]")
        page.screenshot(path=file, animations="disabled")
        browser.close()


def main() -> None:
    """Draw both."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    draw_hero(run, PICTURES / "demo.png")
    draw_viewer(run, PICTURES / "viewer.png")


if __name__ == "__main__":
    main()
