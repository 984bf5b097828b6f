"""Attention as images: query downwards, key to the right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import scenario_of
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    DIVERGING,
    NOT_STORED,
    PAGE_WIDTH,
    PROMPT_END,
    SEQUENTIAL,
    axes_at,
    axes_or_new,
    blank,
    cells_of_spans,
    colour_bar,
    colour_map,
    figure_of,
    interpolation,
    label_token_axis,
    mark_prompt_end,
    mark_spans,
    prompt_end,
    runs_of,
    size_of,
    span_colours,
    styled,
)
from zarrtrace.figures.labels import drawable, label_tokens
from zarrtrace.format.attributes import ranges

_WEIGHT = "attention weight"
_RATIO = "ratio to uniform attention, 1 / (q + 1)"
# Rows that see few tokens are far from uniform by chance, and the first token takes what no other
# gets: neither sets the scale of ratios.
_FIRST_ROWS, _LEAST_RATIO, _MOST_RATIO, _SHOWN_RATIOS = 8, 4.0, 64.0, 0.999
# Attention is skewed: one key takes most of a row and the rest share little. On a square root
# scale both are seen, and 0 stays 0, which it would not on a logarithmic one.
_GAMMA = 0.5
# The first queries see few keys and must spread a weight of 1 over them: without a limit, they
# alone would set the scale.
_SHOWN = 0.995
# Width that the key to colours and spans needs, in inches.
_KEY = 4.0
# Width of a character of the key to spans, and of the gap between names, in inches.
_CHARACTER, _GAP = 0.05, 0.2


@styled
def attention_map(
    ds: xr.Dataset,
    layer: int,
    *,
    head: int | None = None,
    norm: Normalize | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Attention of one layer, of one head or the mean over heads.

    Parameters
    ----------
    ds
        A trace with ``attention_mean`` (and ``attention`` for one head).
    layer
        The decoder block.
    head
        A query head; the mean over heads if None.
    norm
        Colour scale; from 0 to the 99.5th percentile, by its square root, if None.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes with an image ``(query, key)``. Keys after the query, which it cannot see, and rows
        that are not stored are masked.

    Raises
    ------
    ConfigError
        If the trace has no attention, or not that layer or head.
    """
    (weights,) = _weights(ds, [layer], [head])
    size = PAGE_WIDTH * 0.8
    ax = axes_or_new(ax, size, size, margins=(0.85, 0.65, 0.9, 0.6))
    image = _show(ax, weights, norm or _scale([weights]))
    spans = cells_of_spans(ds)
    label_token_axis(ax, ds, spans, side="x")
    label_token_axis(ax, ds, spans, side="y")
    mark_spans(ax, spans, side="top")
    mark_spans(ax, spans, side="left", names=False)
    ax.yaxis.set_tick_params(pad=6)  # beyond the strip
    ax.set_xlabel("key (attended to)")
    ax.set_ylabel("query (attends)")
    of = "mean over heads" if head is None else f"head {head}"
    ax.text(
        0.99, 0.99, f"{drawable(scenario_of(ds))}\nlayer {layer}, {of}",
        transform=ax.transAxes, ha="right", va="top", fontsize=7.5,
    )  # fmt: skip
    colour_bar(ax, image, _WEIGHT, extend="max")
    return figure_of(ax)


@styled
def attention_layers(
    ds: xr.Dataset,
    *,
    layers: Sequence[int] | None = None,
    head: int | None = None,
    columns: int | None = None,
    relative: bool = True,
    norm: Normalize | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Attention of every layer as small multiples on one colour scale.

    Parameters
    ----------
    ds
        A trace with ``attention_mean`` (and ``attention`` for one head).
    layers
        Layers to draw; all of them if None.
    head
        A query head; the mean over heads if None.
    columns
        Number of panels side by side; by the number of panels if None.
    relative
        Whether to divide by what a uniform row would give, 1 / (q + 1) for query q, so that panels
        differ by what heads and layers choose; the plain weights if False.
    norm
        Colour scale; if None, of ratios a logarithmic one around 1 that ends at the 99.9th
        percentile outside the first token and the first rows, of weights one from 0 to the 99.5th
        percentile of all panels, by its square root.
    figure
        Where to draw; a new figure, its height by the number of panels, if None.

    Returns
    -------
    Figure
        One axes a layer, in order, with the layer's image; then the key to spans and colours.

    Raises
    ------
    ConfigError
        If the trace has no attention, or not one of the layers or the head.
    """
    numbers = _layers(ds) if layers is None else list(layers)
    found = _weights(ds, numbers, [head], relative=relative)
    panels = {f"L{layer}": weights for layer, weights in zip(numbers, found, strict=True)}
    of = "mean over heads" if head is None else f"head {head}"
    scale = norm or _norm(list(panels.values()), relative=relative)
    return _multiples(ds, panels, f"attention by layer, {of}", columns, scale, figure)


@styled
def attention_heads(
    ds: xr.Dataset,
    layer: int,
    *,
    heads: Sequence[int] | None = None,
    columns: int | None = None,
    relative: bool = True,
    norm: Normalize | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Attention of every head of one layer as small multiples.

    Parameters
    ----------
    ds
        A trace with ``attention``.
    layer
        The decoder block.
    heads
        Heads to draw; all of them if None.
    columns, relative, norm, figure
        As for :func:`attention_layers`.

    Returns
    -------
    Figure
        One axes a head, in order, with the head's image; then the key to spans and colours.

    Raises
    ------
    ConfigError
        If the trace has no attention, or not that layer or one of the heads.
    """
    require(ds, "attention")
    numbers = np.asarray(ds["head"]).tolist() if heads is None else list(heads)
    found = _weights(ds, [layer], numbers, relative=relative)
    panels = {f"head {head}": weights for head, weights in zip(numbers, found, strict=True)}
    scale = norm or _norm(list(panels.values()), relative=relative)
    return _multiples(ds, panels, f"heads of layer {layer}", columns, scale, figure)


# --- values ------------------------------------------------------------------------------------


def _layers(ds: xr.Dataset) -> list[int]:
    require(ds, "attention_mean")
    return [int(layer) for layer in np.asarray(ds[_layer_dim(ds)])]


def _layer_dim(ds: xr.Dataset) -> str:
    # Hybrid models have layers without attention: their stored attention has its own dimension.
    return "attention_layer" if "attention_layer" in ds.dims else "layer"


def _weights(
    ds: xr.Dataset,
    layers: Sequence[int],
    heads: Sequence[int | None],
    *,
    relative: bool = False,
) -> list[np.ma.MaskedArray]:
    """Return ``(query, key)`` of each head; None is their mean.

    Keys after the query and rows that are not stored are masked. If `relative`, ratios to a
    uniform row.
    """
    mean = list(heads) == [None]
    name = "attention_mean" if mean else "attention"
    require(ds, name)
    wanted: dict[str, list[Any]] = {_layer_dim(ds): list(layers)}
    if not mean:
        wanted["head"] = [*heads]
    for dim, numbers in wanted.items():
        for value in numbers:
            if value not in ds.indexes[dim]:
                raise ConfigError(
                    f"{scenario_of(ds)}: the trace has no attention of {dim} {value}",
                    remedy=f"It has {ranges(np.asarray(ds[dim]).tolist())}.",
                )
    weights = ds[name].sel(wanted).reset_coords(drop=True)
    if "attention_query" in weights.dims:
        weights = weights.rename(attention_query="query")
    # A row for every token: those that are not stored are drawn as such.
    weights = weights.reindex(query=ds["key"].values).transpose(*wanted, "query", "key")
    values = np.asarray(weights, dtype=np.float64).reshape(-1, *weights.shape[-2:])
    keys = np.asarray(ds["key"])
    future = keys[None, :] > keys[:, None]
    if relative:
        # No ratio is drawn as 0, which has no logarithm: windows are at the end of the scale.
        values = np.maximum(values * (keys[:, None] + 1), 1 / _MOST_RATIO)
    return [np.ma.masked_where(future | np.isnan(one), one) for one in values]


def _scale(panels: Sequence[np.ma.MaskedArray]) -> PowerNorm:
    visible = np.concatenate([panel.compressed() for panel in panels])
    largest = float(np.quantile(visible, _SHOWN)) if visible.size else 0.0
    return PowerNorm(_GAMMA, vmin=0, vmax=largest or 1.0)


def _norm(panels: Sequence[np.ma.MaskedArray], *, relative: bool) -> Normalize:
    """Return one scale for all panels."""
    if not relative:
        return _scale(panels)
    visible = np.concatenate([np.zeros(0), *(p[_FIRST_ROWS:, 1:].compressed() for p in panels)])
    largest = float(np.quantile(visible, _SHOWN_RATIOS)) if visible.size else 0.0
    end = min(max(largest, _LEAST_RATIO), _MOST_RATIO)
    return LogNorm(1 / end, end)


def _show(ax: Axes, weights: np.ma.MaskedArray, norm: Normalize) -> AxesImage:
    colours = colour_map(DIVERGING if isinstance(norm, LogNorm) else SEQUENTIAL, missing="white")
    image = ax.imshow(
        weights, cmap=colours, norm=norm, aspect="auto",
        interpolation=interpolation(ax, max(weights.shape)),
    )  # fmt: skip
    unstored = np.asarray(weights.mask).all(axis=1) if np.ma.is_masked(weights) else np.zeros(0)
    for first, last in runs_of(np.flatnonzero(unstored).tolist()):
        ax.axhspan(first - 0.5, last + 0.5, color=NOT_STORED, lw=0, zorder=2)
    return image


# --- small multiples ---------------------------------------------------------------------------


def _multiples(
    ds: xr.Dataset,
    panels: dict[str, np.ma.MaskedArray],
    title: str,
    columns: int | None,
    norm: Normalize,
    figure: Figure | None,
) -> Figure:
    if not panels:
        raise ConfigError("no panel was asked for", remedy="Name at least one layer or head.")
    columns = columns or (6 if len(panels) > 16 else min(len(panels), 4))
    rows = math.ceil(len(panels) / columns)
    left, right, top, bottom, gap = 0.75, 0.1, 0.5, 1.35, 0.2
    width = PAGE_WIDTH if figure is None else float(figure.get_size_inches()[0])
    side = (width - left - right - gap * (columns - 1) * 0.6) / columns
    side = min(side, 2.4)
    free = columns * rows - len(panels)
    inside = free * side > _KEY  # the key to colours fits into the empty cells of the last row
    height = top + rows * (side + gap) + (0.65 if inside else bottom)
    figure = figure or blank(width, height)
    squeeze = float(figure.get_size_inches()[1]) / height
    spans = cells_of_spans(ds)
    image = None
    for number, (name, weights) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        ax = axes_at(
            figure,
            left + column * (side + 0.6 * gap),
            (top + row * (side + gap)) * squeeze,
            side,
            side * squeeze,
        )
        image = _show(ax, weights, norm)
        ax.set_title(name, pad=4, fontsize=6.5)
        if not weights.count():
            ax.text(0.5, 0.5, "not stored", transform=ax.transAxes, ha="center", va="center")
        _small_ticks(ax, ds, spans, first=column == 0, last=number + columns >= len(panels))
        for edge in ("top", "left"):
            mark_spans(ax, spans, side=edge, names=False, thickness=0.025)
        mark_prompt_end(ax, ds, side="x")
        mark_prompt_end(ax, ds, side="y")
    figure.suptitle(
        f"{drawable(scenario_of(ds))}: {title}",
        x=left / width, y=1 - 0.12 / height, ha="left", va="top",
    )  # fmt: skip
    below = (top + rows * (side + gap)) * squeeze
    middle = left + columns * side / 2
    _write(figure, middle, below + 0.5, "key (token attended to)", ha="center")
    _write(figure, 0.08, (below + top) / 2, "query (token that attends)", rotation=90)
    x, y = left, below + 0.75
    if inside:
        x, y = left + (columns - free) * (side + 0.6 * gap) + 0.3, below - side * squeeze * 0.5
    bar = axes_at(figure, x, y, 2.4, 0.09)
    _key_to_colours(bar, image, norm)
    _span_key(figure, ds, spans, *((x, y + 0.45) if inside else (x + 2.7, y - 0.04)))
    return figure


def _key_to_colours(bar: Axes, image: AxesImage | None, norm: Normalize) -> None:
    """Draw the scale of small multiples; ratios are named as such."""
    relative = isinstance(norm, LogNorm)
    drawn = colour_bar(bar, image, f"{_RATIO if relative else _WEIGHT}, one scale for all",
                       cax=bar, extend="both" if relative else "max",
                       orientation="horizontal")  # fmt: skip
    if relative:
        steps = range(math.floor(math.log2(norm.vmax or 2)) + 1)
        powers = [2**step for step in steps]
        ticks = {1 / power: f"1/{power}" for power in powers[:0:-1]}
        ticks |= {power: f"{power}" for power in powers}
        drawn.set_ticks(list(ticks), labels=list(ticks.values()))
        drawn.minorticks_off()


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write at a place in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    style = {"ha": "center", "va": "center", "fontsize": 7, **style}
    figure.text(x / width, 1 - y / height, text, **style)


def _small_ticks(
    ax: Axes, ds: xr.Dataset, spans: Mapping[str, Sequence[int]], *, first: bool, last: bool
) -> None:
    """Label tokens beside the first column and below the last row."""
    texts = [str(text) for text in np.asarray(ds["key_token"])]
    colours = span_colours(spans)
    starts = {run[0]: colours[name] for name, cells in spans.items() for run in runs_of(cells)}
    width, height = size_of(ax)
    for axis, inches, shown in ((ax.yaxis, height, first), (ax.xaxis, width, last)):
        if shown:
            axis.set_tick_params(length=1.5, pad=4 if axis is ax.yaxis else 1.5)
            label_tokens(axis, texts, inches=inches, keep=starts, colours=starts, size=5,
                         rotation=90 if axis is ax.xaxis else 0, limit=9)  # fmt: skip
        else:
            axis.set_ticks([])  # strips mark the spans, and many ticks take long to draw
            axis.set_visible(False)  # an axis without ticks is measured all the same


def _span_key(
    figure: Figure, ds: xr.Dataset, spans: Mapping[str, Sequence[int]], left: float, top: float
) -> None:
    """Write the names of spans in their colours, and the prompt's end."""
    colours = span_colours(spans)
    entries = [(f"■ {drawable(name)}", colours[name]) for name, cells in spans.items() if cells]
    if prompt_end(ds) is not None:
        entries.append(("│ prompt ends", PROMPT_END))
    x, end = left, float(figure.get_size_inches()[0])
    for text, colour in entries:
        width = _GAP + _CHARACTER * len(text)
        if x > left and x + width > end:
            x, top = left, top + 0.16
        _write(figure, x, top, text, color=colour, fontsize=6.5, ha="left", va="top")
        x += width
