"""The page as the output of a notebook's cell."""

from __future__ import annotations

import html
import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import numpy as np
import xarray as xr

from zarrtrace.errors import ConfigError, readable
from zarrtrace.storage import Location
from zarrtrace.text import terminal_text
from zarrtrace.viewer.bundle import page_of
from zarrtrace.viewer.layout import Layout
from zarrtrace.viewer.traces import MOST_SCENARIOS, Traces

if TYPE_CHECKING:
    from zarrtrace.viewer.widget import ViewWidget

#: A larger page is not shown: a notebook is saved, sent and versioned with its outputs.
MAX_BYTES = 20 * 10**6
_LIMIT = f"{readable(MAX_BYTES)} that a page in a notebook may take"
# Above this, attention of all traces shown, uncompressed, is rounded to 8 bits.
_EIGHT_BIT_FROM = 4 * 10**6
# Scripts run, and nothing of the notebook can be reached: the frame has an origin of its own.
_SANDBOX = "allow-scripts allow-downloads allow-popups allow-popups-to-escape-sandbox"


class View:
    """The page of a run as a notebook's output.

    Parameters
    ----------
    command
        Command that shows the same in a browser.
    page
        The HTML page; None if it is too large for a notebook.
    note
        A sentence about what the page does not hold.
    height
        Height in pixels.
    """

    def __init__(self, command: str, page: bytes | None, note: str, height: int) -> None:
        self.command, self.page, self.note, self.height = command, page, note, height

    def __repr__(self) -> str:
        """Return the command, for consoles and notebooks without HTML."""
        return "\n".join(part for part in (self.note, f"To look at it: {self.command}") if part)

    def _repr_html_(self) -> str:
        # Where a notebook shows text, the note and the command can be selected and copied.
        note = f"{html.escape(self.note)} " if self.note else ""
        said = f"<p>{note}In a browser: <code>{html.escape(self.command)}</code></p>"
        if self.page is None:
            return said
        return (
            f'<iframe sandbox="{_SANDBOX}" title="zarrtrace" '
            f'style="width: 100%; height: {self.height}px; border: 1px solid #8888" '
            f'srcdoc="{html.escape(self.page.decode())}"></iframe>{said if self.note else ""}'
        )


def show(
    path: Location,
    seals: Mapping[str, str | None],
    *,
    scenario: str,
    choice: Mapping[str, int | None],
    layers: Sequence[int] | None = None,
    height: int = 800,
    static: bool = False,
) -> View | ViewWidget:
    """Return the view of a run or a trace.

    It is a widget if anywidget is installed, else a page.

    Parameters
    ----------
    path
        Where it is stored.
    seals
        By scenario to show, the seal that its trace had when it was opened; None if it was not
        complete.
    scenario
        The scenario to show first.
    choice
        Layer and head to show first; None for the page's own choice.
    layers
        Only these decoder blocks; all if None.
    height
        Height in pixels.
    static
        A page even if anywidget is installed.

    Raises
    ------
    ConfigError
        If there is no such layer or head.
    IntegrityError
        If a trace was replaced since it was opened.
    """
    layout = Layout(path, scenarios=[*seals], layers=layers, seals=seals, is_live=True)
    traces = layout.traces
    chosen = {name: number for name, number in choice.items() if number is not None}
    _check_choice(traces[scenario], scenario, chosen)
    at = urlencode({"scenario": scenario, **chosen})
    if not static and importlib.util.find_spec("anywidget") is not None:
        from zarrtrace.viewer.widget import ViewWidget  # noqa: PLC0415 -- an extra

        return ViewWidget(
            layout,
            _command(path, at),
            at,
            sandbox=_SANDBOX,
            height=height,
            scenario=scenario,
            choice=chosen,
        )

    return _static(path, traces, scenario, layers, at, height=height)


def _static(
    path: Location,
    traces: Traces,
    scenario: str,
    layers: Sequence[int] | None,
    at: str,
    *,
    height: int,
) -> View:
    """Return a page with as many scenarios as a notebook may hold."""

    def page(names: Sequence[str]) -> bytes | None:
        """Return a page of some scenarios; None if it is too large."""
        attention = sum(
            traces[name]["attention"].nbytes for name in names if "attention" in traces[name]
        )
        eight_bit = attention > _EIGHT_BIT_FROM
        layout = Layout(path, scenarios=names, layers=layers, eight_bit=eight_bit)
        try:
            return page_of(layout, view=at, limit=MAX_BYTES)
        except ConfigError:
            return None

    found, note = page([scenario]), ""
    if found is None:
        note = f"{terminal_text(scenario)} takes more than the {_LIMIT}."
        if traces[scenario].sizes["layer"] > 1:
            note += " Fewer layers take less, as in ds.sel(layer=[20, 21]).zt.view()."
    elif traces.is_large:
        note = (
            f"1 of {len(traces):,} scenarios is shown: a page holds at most {MOST_SCENARIOS}."
            " view(scenario=…) shows another."
        )
    elif len(traces) > 1:
        # Scenarios of one run are mostly of equal size.
        every = page([*traces]) if len(found) * len(traces) <= 2 * MAX_BYTES else None
        found = every or found
        if every is None:
            note = (
                f"1 of {len(traces)} scenarios is shown: together they take more than the {_LIMIT}."
                " view(scenario=…) shows another."
            )
    return View(_command(path, at), found, note, height)


def _check_choice(ds: xr.Dataset, scenario: str, chosen: Mapping[str, int]) -> None:
    for dim, number in chosen.items():
        there = np.asarray(ds[dim]).tolist() if dim in ds else []
        if number not in there:
            raise ConfigError(
                f"{scenario}: there is no {dim} {number}",
                remedy=f"It has {', '.join(map(str, there)) or 'none'}.",
            )


def _command(path: Location, at: str) -> str:
    options = [
        part for name, value in path.options for part in ("--storage-option", f"{name}={value}")
    ]
    return shlex.join(["zarrtrace", "view", str(path), "--show", at, *options])
