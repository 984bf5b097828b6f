"""Flow of attention from span to span, down to the decision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from zarrtrace.analysis import attention_rollout, attention_to
from zarrtrace.analysis.positions import Place, positions, span_names, spans_before, token_labels
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import scenario_of
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    PAGE_WIDTH,
    PROMPT_END,
    axes_at,
    blank,
    counted,
    prompt_end,
    span_colours,
    styled,
)
from zarrtrace.figures.labels import drawable, token_label, wrapped
from zarrtrace.scenarios import DECISION

_WITH_KEY = 0.65  # inches below axes, for the name of the axis and the key to lines
_WIDEST = 7.0  # points, for the largest share of a diagram
_LEAST = 0.15  # of the largest share: thinner lines hide the others
_LEAST_RATIO = 2.0  # to what a uniform row would give: less says nothing of the layer


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
        Spans to draw, in this order; all of them in the order of the prompt if None.
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
    ax.set_title("shares, span to span", loc="left")
    _draw_rollout(beside, ds, names, colours)
    _draw_first_token(apart, ds, _shares(ds, [first], names), colours)
    figure.suptitle(
        f"{drawable(scenario_of(ds))}: attention flow",
        x=0.5 / width, y=1 - 0.08 / height, ha="left", va="top",
    )  # fmt: skip
    return figure


# --- parts -------------------------------------------------------------------------------------


def _in_prompt_order(ds: xr.Dataset) -> list[str]:
    last = {name: (min(positions(ds, name)), name == DECISION) for name in span_names(ds)}
    return sorted(last, key=lambda name: last[name])


def _draw_prompt_end(ax: Axes, ds: xr.Dataset, names: Sequence[str]) -> None:
    """Draw a line between columns of the prompt and of generated text."""
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
    """Draw the share that each span pays to the first token."""
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
        ax.text(0.5, 0.5, f"not drawn:\n{drawable(wrapped(error.what, 30))}", ha="center",
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
    """Explain rollout where it ranks spans otherwise than attention does."""
    tokens = xr.DataArray([len(positions(ds, name)) for name in sources], dims="source")
    by_paths = str((rollout.isel(layer=-1) / tokens).idxmax("source").item())
    direct = str(attention_to(ds, sources).max("layer").idxmax("source").item())
    if by_paths == direct:
        return ""
    return wrapped(
        f"Here {drawable(by_paths)} is first, but the decision attends most to {drawable(direct)}: "
        "rollout multiplies all layers' means over heads, so that paths pile up on early tokens "
        "whatever single heads read.",
        38,
    )
