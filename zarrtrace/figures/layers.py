"""Measures by layer: pathways to a target, locality of attention, hypothesised bands."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from zarrtrace.analysis.bands import Bands
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    GROUP_COLOURS,
    LINE_COLOUR,
    NO_GROUP,
    PAGE_WIDTH,
    axes_at,
    blank,
    styled,
)
from zarrtrace.figures.labels import drawable, wrapped
from zarrtrace.scenarios import DECISION

#: Names of scenarios by group.
Groups = Mapping[str, Sequence[str]]

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
        Result of :func:`zarrtrace.analysis.attention_to`, with heads as ``"mean"`` and one
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
    chosen = attention.coords.get("target", _parameter(attention, "target", [DECISION]))
    target = np.atleast_1d(np.asarray(chosen)).tolist()[0]
    summed = _parameter(attention, "reduce", "mean") == "sum"
    lines = []
    for ax, source in zip(axes, sources, strict=True):
        shade_bands(ax, layers, bands)
        lines = lines_by_layer(ax, attention.sel(source=source), groups)
        layer_axis(ax, layers)
        ax.set_ylim(0, top * 1.12)
        ax.set_title(f"{drawable(source)} → {drawable(str(target))}")
        ax.set_ylabel("attention to all its tokens" if summed else "attention per token")
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
        Result of :func:`zarrtrace.analysis.attention_locality`.
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
    """Test of the hypothesised bands: measures by layer, and results.

    Parameters
    ----------
    result
        Result of :func:`zarrtrace.analysis.layer_bands`.
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


# --- axes and lines by layer --------------------------------------------------------------------


def shade_bands(
    ax: Axes, layers: Sequence[int], bands: Bands | None = None, *, names: bool = True
) -> None:
    """Shade bands of layers on an x axis of layer numbers."""
    first, last = min(layers), max(layers)
    for number, (name, (start, stop)) in enumerate((bands or {}).items()):
        low, high = max(first, start) - 0.5, min(last, stop) + 0.5
        if low >= high:
            continue
        ax.axvspan(low, high, color=("#f3f3f3", "#e6e6e6")[number % 2], lw=0, zorder=0)
        if names:
            ax.text(
                (low + high) / 2, 0.985, f"{drawable(name)}?", transform=ax.get_xaxis_transform(),
                ha="center", va="top", fontsize=5.5, color="#555555",
            )  # fmt: skip
    ax.set_xlim(first - 0.5, last + 0.5)


def lines_by_layer(ax: Axes, values: xr.DataArray, groups: Groups | None) -> list[Any]:
    """Draw scenarios as thin lines, and means of groups as thick ones.

    Parameters
    ----------
    ax
        Where to draw.
    values
        ``([scenario,] layer)``.
    groups
        Names of scenarios by group, the others grey; one group of all of them if None.

    Returns
    -------
    list
        The thick lines, labelled, for a legend.
    """
    layers = np.asarray(values["layer"])
    if "scenario" not in values.dims:
        label = drawable(str(values["scenario"].item()))
        return list(ax.plot(layers, values, color=LINE_COLOUR, label=label))
    values = values.transpose("scenario", "layer")
    names = [str(name) for name in np.asarray(values["scenario"])]
    groups = groups or {_mean_of(len(names)): names}
    for name, row in zip(names, np.asarray(values), strict=True):
        colour = group_colour(name, groups)
        ax.plot(layers, row, lw=0.5, alpha=0.55, color=colour, gid=name)
    thick = []
    for group, members in groups.items():
        mean = values.sel(scenario=[n for n in names if n in members]).mean("scenario")
        colour = group_colour(members[0], groups)
        thick += ax.plot(layers, mean, lw=1.6, color=colour, label=drawable(group))
    if not set(names) <= {name for members in groups.values() for name in members}:
        thick.append(Line2D([], [], lw=0.5, color=NO_GROUP, label="other scenarios"))
    return thick


def _mean_of(scenarios: int) -> str:
    return "the scenario" if scenarios == 1 else f"mean of {scenarios} scenarios"


def group_colour(scenario: str, groups: Groups) -> str:
    """Return the colour of the group that a scenario is in."""
    for number, members in enumerate(groups.values()):
        if scenario in members:
            return GROUP_COLOURS[number % len(GROUP_COLOURS)]
    return NO_GROUP


def layer_axis(ax: Axes, layers: Sequence[int]) -> None:
    """Count layers in whole numbers along x."""
    ax.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_xlabel("layer")
