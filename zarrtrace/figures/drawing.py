"""What all figures share: style, colours, and spans beside an axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from zarrtrace.analysis.bands import Bands
from zarrtrace.analysis.positions import positions
from zarrtrace.errors import ConfigError
from zarrtrace.figures.labels import drawable, label_tokens, thinned
from zarrtrace.scenarios import COMPLETION

P = ParamSpec("P")
R = TypeVar("R")

#: Width of a figure over both columns of a page, in inches.
PAGE_WIDTH = 7.2
#: Sequential and diverging colour maps that colour-blind readers can use.
SEQUENTIAL = "YlGnBu"
DIVERGING = "RdBu_r"
#: Colours of spans, dark enough for text, that colour-blind readers tell apart: the viewer's
#: ``LIGHT_SPANS`` (a test compares), so that a span has one colour everywhere.
SPAN_COLOURS = (
    "#0072b2", "#b35900", "#00795c", "#a3437b", "#710fb2", "#70161a", "#343074", "#4b2147",
)  # fmt: skip
#: Okabe & Ito (2008), of groups of scenarios: none is the colour of a span. Of scenarios in none.
GROUP_COLOURS = ("#E69F00", "#56B4E9", "#000000", "#CC79A7", "#009E73", "#F0E442")
NO_GROUP = "#999999"
#: Of a line that belongs to no span and no group.
LINE_COLOUR = "#444444"
NOT_STORED = "#e6e6e6"
#: Of the line behind the prompt, where generated text begins.
PROMPT_END = "#C2185B"
_PRINT_DPI = 300
_STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.titley": 1.0,  # else every drawing measures all labels of x to place the title
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "figure.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "lines.linewidth": 1,
    "image.origin": "upper",
    "pdf.fonttype": 42,  # TrueType: text in a PDF stays text, and journals ask for it
    "text.parse_math": False,  # "$90 or $10" is money
    "text.usetex": False,
    # No text is bold or italic: each further font takes half a second more in every PDF.
}


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw in the package's style and leave the caller's settings as they were."""

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return function(*args, **kwargs)

    return drawn


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches that pyplot knows nothing of."""
    return Figure(figsize=(width, height))


def axes_or_new(
    ax: Axes | None,
    width: float,
    height: float,
    *,
    margins: tuple[float, float, float, float] = (0.55, 0.2, 0.45, 0.3),
) -> Axes:
    """Return `ax`, or the axes of a new figure.

    Parameters
    ----------
    ax
        What the caller gave.
    width, height
        Size of the new figure, in inches.
    margins
        Left, right, bottom and top, in inches.
    """
    if ax is not None:
        return ax
    left, right, bottom, top = margins
    return blank(width, height).add_axes(
        (left / width, bottom / height, (width - left - right) / width,
         (height - bottom - top) / height)
    )  # fmt: skip


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches from the figure's upper left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def size_of(ax: Axes) -> tuple[float, float]:
    """Return width and height of axes in inches, before their aspect shrinks them."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ConfigError("the axes given are in no figure", remedy="Give axes of a figure.")
    width, height = figure.get_size_inches()
    box = ax.get_position()
    return float(box.width * width), float(box.height * height)


def colour_bar(
    ax: Axes,
    mappable: Any,
    label: str,
    *,
    cax: Axes | None = None,
    extend: Literal["neither", "max", "both"] = "neither",
    orientation: Literal["vertical", "horizontal"] = "vertical",
) -> Colorbar:
    """Add a colour bar with a label, in axes of its own if given."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ConfigError("the axes given are in no figure", remedy="Give axes of a figure.")
    if cax is None:
        cax = ax.inset_axes((1.015, 0.0, 0.02, 1.0))
    bar = figure.colorbar(mappable, cax=cax, extend=extend, orientation=orientation)
    bar.locator = MaxNLocator(nbins=4)
    bar.update_ticks()
    bar.set_label(label, fontsize=6.5)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=6, width=0.4, length=2)
    return bar


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as ``1 token`` or ``2 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def interpolation(ax: Axes, cells: int) -> str:
    """Return ``"nearest"`` where every cell of an image gets a dot of a print, else ``"auto"``.

    Sharp cells are right, and files of them small; with more cells than dots some would vanish.
    """
    return "nearest" if cells <= min(size_of(ax)) * _PRINT_DPI else "auto"


# --- spans -------------------------------------------------------------------------------------


def span_colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each span of a trace, given all of them in the trace's order."""
    return {name: SPAN_COLOURS[i % len(SPAN_COLOURS)] for i, name in enumerate(names)}


def cells_of_spans(ds: xr.Dataset) -> dict[str, list[int]]:
    """Return which cells of an image over a prompt's tokens each span of a trace covers.

    All spans, in the trace's order, which gives them their colours; those outside have no cell.
    All of a generated text is no span here: it would hide those in it, and a line marks it.
    """
    where = {int(label): i for i, label in enumerate(np.asarray(ds["key"]))}
    spans = ds.attrs["spans"]
    marked = COMPLETION if ds.attrs.get("generation") else None
    return {
        name: [where[i] for i in positions(ds, name)]
        if name != marked and found["tokens"] and set(found["tokens"]) <= set(where)
        else []
        for name, found in spans.items()
    }


def of_all_tokens(ds: xr.Dataset, values: xr.DataArray) -> np.ndarray:
    """Return values with every token of the prompt along ``query``; NaN where not stored."""
    bare = values.reset_coords(drop=True)
    return np.asarray(bare.reindex(query=ds["key"].values), dtype=np.float64)


def runs_of(cells: Sequence[int]) -> list[tuple[int, int]]:
    """Return stretches ``(first, last)`` of neighbouring cells."""
    stretches: list[tuple[int, int]] = []
    for cell in sorted(cells):
        if stretches and cell == stretches[-1][1] + 1:
            stretches[-1] = (stretches[-1][0], cell)
        else:
            stretches.append((cell, cell))
    return stretches


def mark_spans(
    ax: Axes,
    spans: Mapping[str, Sequence[int]],
    *,
    side: Literal["top", "left"] = "top",
    names: bool = True,
    thickness: float = 0.05,
) -> None:
    """Draw a coloured strip outside the axes for every span, with its name.

    Parameters
    ----------
    ax
        An image with one cell a token.
    spans
        Cells of each span.
    side
        Along which side.
    names
        Whether to write the names.
    thickness
        Of the strip, in inches.
    """
    colours = span_colours(spans)
    width, height = size_of(ax)
    thick = thickness / (height if side == "top" else width)
    transform = ax.get_xaxis_transform() if side == "top" else ax.get_yaxis_transform()
    patches, filled = [], []
    for name, cells in spans.items():
        for first, last in runs_of(cells):
            length = last - first + 1
            corner = (first - 0.5, 1 + thick / 2) if side == "top" else (-1.5 * thick, first - 0.5)
            size = (length, thick) if side == "top" else (thick, length)
            patches.append(Rectangle(corner, *size))
            filled.append(colours[name])
        if names and cells and side == "top":
            ax.text(
                (min(cells) + max(cells)) / 2, 1 + 2 * thick, drawable(name),
                transform=transform, color=colours[name], fontsize=6.5, rotation=45,
                ha="left", va="bottom", rotation_mode="anchor",
            )  # fmt: skip
    # One artist for all of them: small multiples have many.
    ax.add_collection(
        PatchCollection(patches, transform=transform, clip_on=False, lw=0, facecolor=filled),
        autolim=False,
    )


def prompt_end(ds: xr.Dataset) -> float | None:
    """Return where between the cells of tokens the prompt ends; None if nothing was generated."""
    generation, keys = ds.attrs.get("generation"), np.asarray(ds["key"])
    if generation is None:
        return None
    cell = int(np.searchsorted(keys, generation["prompt_tokens"]))
    return cell - 0.5 if 0 < cell < len(keys) else None


def mark_prompt_end(
    ax: Axes, ds: xr.Dataset, *, side: Literal["x", "y"] = "x", name: bool = False
) -> None:
    """Draw a line where generated tokens begin along one axis of an image.

    Parameters
    ----------
    ax
        An image with one cell a token.
    ds
        The trace; one without generated text has no line.
    side
        The axis of tokens.
    name
        Whether to write what the line is, along it.
    """
    at = prompt_end(ds)
    if at is None:
        return
    draw = ax.axvline if side == "x" else ax.axhline
    draw(at, color=PROMPT_END, lw=0.8, zorder=3, gid="end of the prompt")
    if name and side == "x":
        ax.annotate(
            "prompt ends", (at, 1), xycoords=ax.get_xaxis_transform(), xytext=(-1.5, -3),
            textcoords="offset points", rotation=90, ha="right", va="top", fontsize=5,
            color=PROMPT_END, bbox={"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 0.6},
            zorder=4,
        )  # fmt: skip


def label_token_axis(
    ax: Axes,
    ds: xr.Dataset,
    spans: Mapping[str, Sequence[int]],
    *,
    side: Literal["x", "y"] = "x",
    size: float = 5.5,
    keep: Sequence[int] = (),
) -> None:
    """Label one axis of an image with a trace's tokens, spans in colours, and the prompt's end."""
    colours = span_colours(spans)
    by_cell = {cell: colours[name] for name, cells in spans.items() for cell in cells}
    width, height = size_of(ax)
    texts = [str(text) for text in np.asarray(ds["key_token"])]
    label_tokens(
        ax.xaxis if side == "x" else ax.yaxis,
        texts,
        inches=width if side == "x" else height,
        keep=[*keep, *(first for cells in spans.values() for first, _ in runs_of(cells))],
        colours=by_cell,
        size=size,
        rotation=90 if side == "x" else 0,
    )
    (ax.xaxis if side == "x" else ax.yaxis).set_tick_params(length=1.2, pad=1)
    mark_prompt_end(ax, ds, side=side, name=True)


def label_layers(ax: Axes, layers: Sequence[int], *, side: Literal["x", "y"] = "y") -> None:
    """Label one axis of an image with layers L1, L2, …, thinned when crowded."""
    label_rows(ax, [f"L{layer}" for layer in layers], side=side)


def label_rows(ax: Axes, names: Sequence[str], *, side: Literal["x", "y"] = "y") -> None:
    """Label the cells of one axis of an image, thinned when crowded."""
    width, height = size_of(ax)
    # Names side by side need more room than names one below the other.
    inches, size = (width, 12) if side == "x" else (height, 6)
    shown = thinned(len(names), inches, size)
    axis = ax.xaxis if side == "x" else ax.yaxis
    axis.set_ticks(shown, labels=[names[i] for i in shown])


def shade_bands(
    ax: Axes, layers: Sequence[int], bands: Bands | None = None, *, names: bool = True
) -> None:
    """Shade the given bands of layers, on an x axis of layer numbers."""
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


# --- lines by layer ----------------------------------------------------------------------------

Groups = Mapping[str, Sequence[str]]


def lines_by_layer(ax: Axes, values: xr.DataArray, groups: Groups | None) -> list[Any]:
    """Draw every scenario as a thin line, and the mean of each group (or of all) as a thick one.

    Parameters
    ----------
    ax
        Where to draw.
    values
        ``([scenario,] layer)``.
    groups
        Names of scenarios by group; those in none are grey.

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
