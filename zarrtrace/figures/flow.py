"""Where the decision gets its information from: pathways, flow and locality by layer."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from zarrtrace.analysis import attention_rollout, attention_to
from zarrtrace.analysis.bands import Bands
from zarrtrace.analysis.positions import Place, positions, span_names, spans_before, token_labels
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import scenario_of
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    LINE_COLOUR,
    PAGE_WIDTH,
    PROMPT_END,
    Groups,
    axes_at,
    blank,
    counted,
    layer_axis,
    lines_by_layer,
    prompt_end,
    shade_bands,
    span_colours,
    styled,
)
from zarrtrace.figures.labels import drawable, token_label
from zarrtrace.scenarios import DECISION

_WITH_KEY = 0.65  # inches below axes, for the name of the axis and the key to lines
_WIDEST = 7.0  # points, for the largest share of a diagram
_LEAST = 0.15  # of the largest share: thinner lines hide the others
_LEAST_RATIO = 2.0  # to what a uniform row would give: less says nothing of the layer
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
def flow_diagram(
    ds: xr.Dataset,
    *,
    spans: Sequence[str] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Attention-flow diagram of one scenario: spans from left to right, layers downwards.

    A line from a span at one layer to a span one layer down has the width of the share of attention
    that the lower one's tokens pay to the upper one's. Shares below 15 % of the largest, or below
    twice what uniform attention would give, are left out. To the left, apart, the share that each
    span pays to the first token, which often takes most. To the right, how much of the decision has
    come from each span by then (attention rollout).

    Parameters
    ----------
    ds
        A trace with ``attention_mean``.
    spans
        Which spans, in this order; all of them in the order of the prompt if None.
    figure
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        With the axes of the diagram, of the rollout and of the first token. The rollout is left
        out, with a note, where layers or rows of attention are missing; where it ranks spans
        otherwise than attention itself, a note says why.

    Raises
    ------
    ConfigError
        If the trace has no attention.
    """
    require(ds, "attention_mean")
    names = _in_prompt_order(ds) if spans is None else list(spans)
    first = int(token_labels(ds)[0])
    share = _shares(ds, names, names)
    layers = np.asarray(share["layer"]).tolist()
    figure = figure or blank(PAGE_WIDTH, min(8.5, 1.6 + 0.17 * len(layers)))
    width, height = figure.get_size_inches()
    tall, alone, right = height - 1.05, 0.9, width * 0.3
    middle = width - 0.5 - alone - 0.25 - right - 0.3
    apart = axes_at(figure, 0.5, 0.55, alone, tall)
    ax = axes_at(figure, 0.75 + alone, 0.55, middle, tall)
    beside = axes_at(figure, width - right - 0.1, 0.55, right, tall)
    colours = span_colours(ds.attrs["spans"])
    _draw_edges(ax, share, _uniform(ds, names), colours)
    _draw_prompt_end(ax, ds, names)
    ax.set_xticks(range(len(names)), labels=list(map(drawable, names)))
    for tick, name in zip(ax.get_xticklabels(), names, strict=True):
        tick.set(color=colours[name], fontsize=6.5)
    ax.set_yticks([])
    ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
    ax.tick_params(axis="x", length=0)
    ax.set_title("span to span", loc="left")
    _draw_rollout(beside, ds, names, colours)
    _draw_first_token(apart, ds, _shares(ds, [first], names), colours)
    figure.suptitle(
        f"{drawable(scenario_of(ds))}: attention flow",
        x=0.5 / width, y=1 - 0.08 / height, ha="left", va="top",
    )  # fmt: skip
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
            0.5, 1.21, _wrapped(str(measures.get(name, ""))), transform=ax.transAxes, ha="center",
            va="bottom", fontsize=6,
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


def _wrapped(text: str, width: int = 34) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _in_prompt_order(ds: xr.Dataset) -> list[str]:
    last = {name: (min(positions(ds, name)), name == DECISION) for name in span_names(ds)}
    return sorted(last, key=lambda name: last[name])


def _draw_prompt_end(ax: Axes, ds: xr.Dataset, names: Sequence[str]) -> None:
    """Draw a line between the columns of the prompt's spans and those of generated text."""
    if prompt_end(ds) is None:
        return
    first = ds.attrs["generation"]["prompt_tokens"]
    generated = [min(positions(ds, name)) >= first for name in names]
    if any(generated) and generated == sorted(generated):
        at = generated.index(True) - 0.5
        ax.axvline(at, color=PROMPT_END, lw=0.8, ls=(0, (4, 2)), gid="end of the prompt")
        ax.annotate(
            "prompt ends", (at, 0), xycoords=ax.get_xaxis_transform(), xytext=(-1.5, 3),
            textcoords="offset points", rotation=90, ha="right", va="bottom", fontsize=5,
            color=PROMPT_END,
        )  # fmt: skip


def _shares(ds: xr.Dataset, sources: Sequence[Place], targets: Sequence[Place]) -> xr.DataArray:
    """Return shares of attention ``(source, target, layer)``, also of a single span."""
    found = attention_to(ds, sources, targets, reduce="sum")
    lacking = [dim for dim in ("source", "target") if dim not in found.dims]
    return found.expand_dims(lacking)


def _uniform(ds: xr.Dataset, names: Sequence[str]) -> np.ndarray:
    """Return the share ``(source, target)`` that uniform attention would give."""
    at = [np.asarray(positions(ds, name)) for name in names]
    return np.array([[((s <= t[:, None]).sum(1) / (t + 1)).mean() for t in at] for s in at])


def _down_layers(ax: Axes, layers: Sequence[int]) -> None:
    """Let layers run downwards, with room for the layer above the first."""
    ax.set_ylim(max(layers) + 0.4, min(layers) - 1.2)


def _draw_first_token(
    ax: Axes, ds: xr.Dataset, share: xr.DataArray, colours: dict[str, str]
) -> None:
    """Draw the share of attention that each span pays to the first token."""
    layers = np.asarray(share["layer"]).tolist()
    for target in np.asarray(share["target"]).tolist():
        own = share.isel(source=0).sel(target=target)
        ax.plot(own, layers, lw=0.9, color=colours[str(target)])
    _down_layers(ax, layers)
    ax.set_xlim(0, max(0.05, min(1.0, ax.get_xlim()[1])))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=2))
    ax.set_yticks(layers if len(layers) < 40 else layers[:: math.ceil(len(layers) / 40)])
    ax.set_ylabel("layer")
    ax.set_title("on the first token", loc="left")
    ax.set_xlabel(token_label(str(np.asarray(ds["key_token"])[0])))
    ax.spines[["top", "right"]].set_visible(False)


def _draw_edges(
    ax: Axes, share: xr.DataArray, uniform: np.ndarray, colours: dict[str, str]
) -> None:
    """Draw lines between columns of spans, one layer down each."""
    sources = [str(name) for name in np.asarray(share["source"])]
    targets = [str(name) for name in np.asarray(share["target"])]
    layers = np.asarray(share["layer"]).tolist()
    values = np.nan_to_num(np.asarray(share.transpose("source", "target", "layer")))
    column = {name: i for i, name in enumerate(sources)}
    elsewhere = np.array([[s != t for t in targets] for s in sources])
    widest = float((values * elsewhere[..., None]).max()) or 1.0
    least = np.maximum(_LEAST * widest, _LEAST_RATIO * uniform)
    for i, source in enumerate(sources):
        ends = [
            (((column[source], layer - 1), (column[target], layer)), values[i, j, n])
            for j, target in enumerate(targets)
            for n, layer in enumerate(layers)
            if target != source and values[i, j, n] >= least[i, j]
        ]
        ax.add_collection(
            LineCollection(
                [line for line, _ in ends],
                linewidths=[_WIDEST * value / widest for _, value in ends],
                colors=colours[source],
                alpha=0.6,
                capstyle="butt",
                gid=f"from {source}",
            ),
            autolim=False,
        )
    for name in sources:
        ax.axvline(column[name], color="#bbbbbb", lw=0.5, zorder=0)
    ax.set_xlim(-0.5, len(sources) - 0.5)
    _down_layers(ax, layers)
    ax.legend(
        handles=[
            Line2D([], [], color="#777777", lw=_WIDEST * part, label=f"{widest * part:.2g}",
                   solid_capstyle="butt")
            for part in (1, 0.5, _LEAST)
        ],
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.2, handlelength=1.5,
    )  # fmt: skip


def _draw_rollout(ax: Axes, ds: xr.Dataset, names: Sequence[str], colours: dict[str, str]) -> None:
    sources = [name for name in names if name in spans_before(ds, [DECISION])]
    ax.set_title("rollout: all paths to the decision", loc="left")
    try:
        rollout = attention_rollout(ds, sources) if sources else None
    except ConfigError as error:
        ax.text(0.5, 0.5, f"not drawn:\n{drawable(_wrapped(error.what, 30))}", ha="center",
                va="center", transform=ax.transAxes)  # fmt: skip
        ax.set_axis_off()
        return
    if rollout is None:
        ax.set_axis_off()
        return
    layers = np.asarray(rollout["layer"])
    for name in sources:
        tokens = len(positions(ds, name))
        ax.plot(
            rollout.sel(source=name) / tokens, layers, color=colours[name],
            label=f"{drawable(name)} ({counted(tokens, 'token')})",
        )  # fmt: skip
    _down_layers(ax, layers.tolist())
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel("share of the decision, per token of the span")
    ax.set_yticks([])
    # The largest shares are in the first layers.
    ax.legend(loc="lower right", title=_why_otherwise(ds, rollout, sources), title_fontsize=5.5,
              alignment="left")  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)


def _why_otherwise(ds: xr.Dataset, rollout: xr.DataArray, sources: Sequence[str]) -> str:
    """Explain rollout where it puts another span first than attention does; else nothing."""
    tokens = xr.DataArray([len(positions(ds, name)) for name in sources], dims="source")
    by_paths = str((rollout.isel(layer=-1) / tokens).idxmax("source").item())
    direct = str(attention_to(ds, sources).max("layer").idxmax("source").item())
    if by_paths == direct:
        return ""
    return _wrapped(
        f"Here {drawable(by_paths)} is first, but the decision attends most to {drawable(direct)}: "
        "rollout multiplies all layers' means over heads, so that paths pile up on early tokens "
        "whatever single heads read.",
        38,
    )
