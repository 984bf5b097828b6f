"""Measures by layer: pathways to a target, locality of attention, hypothesised bands."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from zarrtrace.analysis.bands import Bands
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    LINE_COLOUR,
    PAGE_WIDTH,
    Groups,
    axes_at,
    blank,
    layer_axis,
    lines_by_layer,
    shade_bands,
    styled,
)
from zarrtrace.figures.labels import drawable, wrapped
from zarrtrace.scenarios import DECISION

_WITH_KEY = 0.65  # inches below axes, for the name of the axis and the key to lines
_LOCALITY_TITLES = {
    "distance": "mean distance (tokens)",
    "entropy": "entropy (nats)",
    "window_share": "share of attention at most {window} tokens back",
    "first_share": "share of attention on the first token",
}


@styled
def pathway_strength(
    attention: xr.DataArray,
    *,
    groups: Groups | None = None,
    bands: Bands | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Strength of each pathway to the target by layer, all scenarios.

    Parameters
    ----------
    attention
        What :func:`zarrtrace.analysis.attention_to` returned, with heads as ``"mean"`` and one
        target: ``([scenario,] [source,] layer)``.
    groups
        Names of scenarios by group, such as ``{"risky": [...], "safe": [...]}``.
    bands
        First and last layer of hypothesised bands to shade, by name; None shades none.
    figure
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes a source that has values, on one scale: a thin line a scenario, a thick one the
        mean of a group.

    Raises
    ------
    ConfigError
        If the result has heads or several targets.
    """
    _refuse_dims(attention, ("scenario", "source", "layer"))
    if "source" not in attention.dims:
        attention = attention.expand_dims("source")
    if bool(attention.notnull().any()):
        attention = attention.dropna("source", how="all")  # no panel for what no scenario has
    sources = [str(source) for source in np.asarray(attention["source"])]
    layers = np.asarray(attention["layer"]).tolist()
    figure, axes = _panels(len(sources), figure, height=1.75, bottom=_WITH_KEY)
    top = float(np.nanmax(attention, initial=0)) or 1.0
    target = np.asarray(_parameter(attention, "target", [DECISION])).tolist()[0]
    lines = []
    for ax, source in zip(axes, sources, strict=True):
        shade_bands(ax, layers, bands)
        lines = lines_by_layer(ax, attention.sel(source=source), groups)
        layer_axis(ax, layers)
        ax.set_ylim(0, top * 1.12)
        ax.set_title(f"{drawable(source)} → {drawable(str(target))}")
        ax.set_ylabel("attention per token")
    _key(figure, lines)
    return figure


@styled
def locality(
    result: xr.Dataset, *, bands: Bands | None = None, figure: Figure | None = None
) -> Figure:
    """How local attention is, by layer.

    Parameters
    ----------
    result
        What :func:`zarrtrace.analysis.attention_locality` returned.
    bands
        First and last layer of hypothesised bands to shade, by name; None shades none.
    figure
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes a measure: the mean over heads and scenarios, and the range of heads.
    """
    layers = np.asarray(result["layer"]).tolist()
    figure, axes = _panels(len(_LOCALITY_TITLES), figure, height=1.75, bottom=_WITH_KEY)
    window = _parameter(result, "window", "?")
    for ax, (name, title) in zip(axes, _LOCALITY_TITLES.items(), strict=True):
        values = result[name]
        values = values.mean("scenario") if "scenario" in values.dims else values
        shade_bands(ax, layers, bands)
        mean = values
        if "head" in values.dims:
            mean = values.mean("head")
            ax.fill_between(
                layers, values.min("head"), values.max("head"), color=LINE_COLOUR, alpha=0.2, lw=0,
                label="range of heads",
            )  # fmt: skip
        ax.plot(layers, mean, color=LINE_COLOUR, lw=1.5, label="mean over heads")
        layer_axis(ax, layers)
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low), high + 0.1 * (high - min(0.0, low)))
        ax.set_title(title.format(window=window))
    _key(figure, axes[0].get_legend_handles_labels()[0])
    return figure


@styled
def bands(
    result: xr.Dataset, *, groups: Groups | None = None, figure: Figure | None = None
) -> Figure:
    """Test of the hypothesised bands: each one's measure by layer, and what was found.

    Parameters
    ----------
    result
        What :func:`zarrtrace.analysis.layer_bands` returned.
    groups
        Names of scenarios by group.
    figure
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes a hypothesis: a thin line a scenario, the mean, and the mean of each band as a
        horizontal line; the title says whether it holds.
    """
    names = [str(name) for name in np.asarray(result["hypothesis"])]
    limits = _parameter(result, "bands", {})
    measures = _parameter(result, "measures", {})
    layers = np.asarray(result["layer"]).tolist()
    figure, axes = _panels(len(names), figure, height=1.7, columns=3, top=0.75, bottom=_WITH_KEY)
    lines = []
    for ax, name in zip(axes, names, strict=True):
        one = result.sel(hypothesis=name)
        low, high = limits[name]
        ax.axvspan(low - 0.5, high + 0.5, color="#ececec", lw=0, zorder=0)
        lines = lines_by_layer(ax, one["value"], groups)
        for band in names:
            start, stop = limits[band]
            ax.hlines(float(one["band_mean"].sel(band=band)), start - 0.5, stop + 0.5,
                      color="black", lw=1.2, ls=(0, (3, 1.5)))  # fmt: skip
        layer_axis(ax, layers)
        verdict = "holds" if bool(one["supported"]) else "does not hold"
        ax.set_title(f"{name} in L{low}–{high}: {verdict}\n" + _numbers(one))
        ax.text(
            0.5, 1.21, wrapped(str(measures.get(name, "")), 34), transform=ax.transAxes,
            ha="center", va="bottom", fontsize=6,
        )  # fmt: skip
    dashed = Line2D([], [], color="black", lw=1.2, ls=(0, (3, 1.5)), label="mean of each band")
    _key(figure, [*lines, dashed, Patch(color="#ececec", label="hypothesised band")])
    return figure


# --- parts -------------------------------------------------------------------------------------


def _panels(
    count: int,
    figure: Figure | None,
    *,
    height: float,
    columns: int = 2,
    top: float = 0.35,
    bottom: float,
) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    left, right, gap_x, gap_y = 0.5, 0.1, 0.6, 0.6
    if figure is None:
        total = top + rows * height + (rows - 1) * gap_y + bottom
        figure = blank(PAGE_WIDTH if columns > 1 else PAGE_WIDTH * 0.6, total)
    w, h = figure.get_size_inches()
    each_w = (w - left - right - (columns - 1) * gap_x) / columns
    each_h = (h - top - bottom - (rows - 1) * gap_y) / rows
    out = []
    for number in range(count):
        row, column = divmod(number, columns)
        out.append(
            axes_at(figure, left + column * (each_w + gap_x), top + row * (each_h + gap_y),
                    each_w, each_h)
        )  # fmt: skip
    return figure, out


def _key(figure: Figure, handles: Sequence[Any]) -> None:
    """Put the key to the lines in a row below all axes."""
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), borderaxespad=0.1)


def _refuse_dims(array: xr.DataArray, known: Sequence[str]) -> None:
    other = [str(dim) for dim in array.dims if dim not in known]
    if other or "layer" not in array.dims:
        raise ConfigError(
            f"cannot draw an array with dimensions {', '.join(map(str, array.dims))}",
            why=f"This figure shows {', '.join(known)}.",
            remedy=f"Select one {other[0]} first." if other else "Give a result by layer.",
        )


def _parameter(result: xr.DataArray | xr.Dataset, name: str, otherwise: object) -> Any:
    return json.loads(result.attrs.get("parameters", "{}")).get(name, otherwise)


def _numbers(one: xr.Dataset) -> str:
    """Return an estimate, its interval and its p."""
    estimate, low, high = (f"{float(one[name]):+.4f}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}], p {float(one['p']):.2g}".replace("-", "−")
