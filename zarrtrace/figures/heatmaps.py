"""Attention as images: query downwards, key to the right, origin at the top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from zarrtrace.analysis.selecting import require, scenario_of
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    NOT_STORED,
    PAGE_WIDTH,
    PROMPT_END,
    SEQUENTIAL,
    axes_at,
    axes_or_new,
    blank,
    cells_of_spans,
    colour_bar,
    interpolation,
    label_token_axis,
    mark_prompt_end,
    mark_spans,
    prompt_end,
    runs_of,
    span_colours,
    styled,
)
from zarrtrace.figures.labels import drawable
from zarrtrace.format.attributes import ranges

_WEIGHT = "attention weight"
# Attention is skewed: one key takes most of a row and the rest share little. On a square root
# scale both are seen, and 0 stays 0, which it would not on a logarithmic one.
_GAMMA = 0.5
# The first queries see few keys and must spread a weight of 1 over them: without a limit, they
# alone would set the scale.
_SHOWN = 0.995
# Width that the key to colours and spans needs, in inches.
_KEY = 4.0


@styled
def attention_map(
    ds: xr.Dataset,
    layer: int,
    *,
    head: int | None = None,
    norm: Normalize | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Attention of one layer with its tokens: one head, or the mean over heads.

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
    Axes
        With an image ``(query, key)``. Keys after the query, which it cannot see, and rows that
        are not stored are masked.

    Raises
    ------
    ConfigError
        If the trace has no attention, or not that layer or head.
    """
    weights = _weights(ds, layer, head)
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
    return ax


@styled
def attention_layers(
    ds: xr.Dataset,
    *,
    layers: Sequence[int] | None = None,
    head: int | None = None,
    columns: int | None = None,
    norm: Normalize | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Attention of every layer as small multiples on one colour scale.

    Parameters
    ----------
    ds
        A trace with ``attention_mean`` (and ``attention`` for one head).
    layers
        Which layers; all of them if None.
    head
        A query head; the mean over heads if None.
    columns
        How many panels side by side.
    norm
        Colour scale; from 0 to the 99.5th percentile of all panels, by its square root, if None.
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
    panels = {f"L{layer}": _weights(ds, layer, head) for layer in numbers}
    of = "mean over heads" if head is None else f"head {head}"
    return _multiples(ds, panels, f"attention by layer, {of}", columns, norm, figure)


@styled
def attention_heads(
    ds: xr.Dataset,
    layer: int,
    *,
    heads: Sequence[int] | None = None,
    columns: int | None = None,
    norm: Normalize | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Attention of every head of one layer as small multiples on one colour scale.

    Parameters
    ----------
    ds
        A trace with ``attention``.
    layer
        The decoder block.
    heads
        Which heads; all of them if None.
    columns, norm, figure
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
    panels = {f"head {head}": _weights(ds, layer, head) for head in numbers}
    return _multiples(ds, panels, f"heads of layer {layer}", columns, norm, figure)


# --- values ------------------------------------------------------------------------------------


def _layers(ds: xr.Dataset) -> list[int]:
    require(ds, "attention_mean")
    return [int(layer) for layer in np.asarray(ds[_layer_dim(ds)])]


def _layer_dim(ds: xr.Dataset) -> str:
    # Hybrid models have layers without attention: their stored attention has its own dimension.
    return "attention_layer" if "attention_layer" in ds.dims else "layer"


def _weights(ds: xr.Dataset, layer: int, head: int | None) -> np.ma.MaskedArray:
    """Return ``(query, key)``, what a query cannot see and what is not stored masked."""
    name = "attention_mean" if head is None else "attention"
    require(ds, name)
    wanted = {_layer_dim(ds): layer, **({} if head is None else {"head": head})}
    for dim, value in wanted.items():
        if value not in ds.indexes[dim]:
            raise ConfigError(
                f"{scenario_of(ds)}: the trace has no attention of {dim} {value}",
                remedy=f"It has {ranges(np.asarray(ds[dim]).tolist())}.",
            )
    weights = ds[name].sel(wanted).reset_coords(drop=True)
    if "attention_query" in weights.dims:
        weights = weights.rename(attention_query="query")
    # A row for every token: those that are not stored are drawn as such.
    weights = weights.reindex(query=ds["key"].values)
    values = np.asarray(weights.transpose("query", "key"), dtype=np.float64)
    keys = np.asarray(ds["key"])
    future = keys[None, :] > keys[:, None]
    return np.ma.masked_where(future | np.isnan(values), values)


def _scale(panels: Sequence[np.ma.MaskedArray]) -> PowerNorm:
    visible = np.concatenate([panel.compressed() for panel in panels])
    largest = float(np.quantile(visible, _SHOWN)) if visible.size else 0.0
    return PowerNorm(_GAMMA, vmin=0, vmax=largest or 1.0)


def _show(ax: Axes, weights: np.ma.MaskedArray, norm: Normalize) -> AxesImage:
    image = ax.imshow(
        weights, cmap=SEQUENTIAL, norm=norm, aspect="auto",
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
    norm: Normalize | None,
    figure: Figure | None,
) -> Figure:
    if not panels:
        raise ConfigError("no panel was asked for", remedy="Name at least one layer or head.")
    columns = columns or (6 if len(panels) > 16 else min(len(panels), 4))
    rows = math.ceil(len(panels) / columns)
    left, right, top, bottom, gap = 0.5, 0.1, 0.5, 1.0, 0.2
    width = PAGE_WIDTH if figure is None else float(figure.get_size_inches()[0])
    side = (width - left - right - gap * (columns - 1) * 0.6) / columns
    side = min(side, 2.4)
    free = columns * rows - len(panels)
    inside = free * side > _KEY  # the key to colours fits into the empty cells of the last row
    height = top + rows * (side + gap) + (0.25 if inside else bottom)
    figure = figure or blank(width, height)
    squeeze = float(figure.get_size_inches()[1]) / height
    norm = norm or _scale(list(panels.values()))
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
        _small_ticks(ax, weights.shape, first=column == 0, last=number + columns >= len(panels))
        mark_spans(ax, spans, side="top", names=False, thickness=0.025)
        mark_spans(ax, spans, side="left", names=False, thickness=0.025)
        mark_prompt_end(ax, ds, side="x")
        mark_prompt_end(ax, ds, side="y")
    figure.suptitle(
        f"{drawable(scenario_of(ds))}: {title}",
        x=left / width, y=1 - 0.12 / height, ha="left", va="top",
    )  # fmt: skip
    below = (top + rows * (side + gap)) * squeeze
    middle = left + columns * side / 2
    _write(figure, middle, below + 0.05, "key (token position attended to)", ha="center")
    _write(figure, 0.12, (below + top) / 2, "query (token position that attends)", rotation=90)
    x, y = left, below + 0.45
    if inside:
        x, y = left + (columns - free) * (side + 0.6 * gap) + 0.3, below - side * squeeze * 0.75
    bar = axes_at(figure, x, y, 2.4, 0.09)
    colour_bar(bar, image, f"{_WEIGHT}, one scale for all", cax=bar, extend="max",
               orientation="horizontal")  # fmt: skip
    _span_key(figure, ds, list(spans), *((x, y + 0.45) if inside else (x + 2.7, y - 0.04)))
    return figure


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write at a place in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    style = {"ha": "center", "va": "center", "fontsize": 7, **style}
    figure.text(x / width, 1 - y / height, text, **style)


def _small_ticks(ax: Axes, shape: tuple[int, ...], *, first: bool, last: bool) -> None:
    step = max(1, 10 ** math.floor(math.log10(max(shape))))
    step = step // 2 if max(shape) / step < 2 and step > 1 else step
    for axis, count, shown in ((ax.yaxis, shape[0], first), (ax.xaxis, shape[1], last)):
        ticks = list(range(0, count, step))
        axis.set_ticks(ticks, labels=[str(tick) for tick in ticks] if shown else [])
        axis.set_tick_params(labelsize=5, length=1.5, pad=4 if axis is ax.yaxis else 1.5)


def _span_key(
    figure: Figure, ds: xr.Dataset, names: Sequence[str], left: float, top: float
) -> None:
    """Write the names of spans in their colours, and what the line behind the prompt is."""
    entries = [(f"■ {drawable(name)}", colour) for name, colour in span_colours(names).items()]
    if prompt_end(ds) is not None:
        entries.append(("│ prompt ends", PROMPT_END))
    for number, (text, colour) in enumerate(entries):
        row, column = divmod(number, 5)
        _write(
            figure, left + column * 0.85, top + 0.16 * row, text,
            color=colour, fontsize=6.5, ha="left", va="top",
        )  # fmt: skip
