"""Parts of all figures: style, colours, and spans beside an axis."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

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
#: Colours of groups of scenarios, Okabe & Ito (2008): none is the colour of a span.
GROUP_COLOURS = ("#E69F00", "#56B4E9", "#000000", "#CC79A7", "#009E73", "#F0E442")
#: Colour of scenarios in no group.
NO_GROUP = "#999999"
#: Colour of a line that belongs to no span and no group.
LINE_COLOUR = "#444444"
NOT_STORED = "#e6e6e6"
#: Colour of the line behind the prompt, where generated text begins.
PROMPT_END = "#C2185B"
#: Dots per inch of a saved figure, unless asked otherwise.
PRINT_DPI = 300
_SCREEN_DPI = 110  # CSS pixels per inch in a notebook: the smallest text has 6 to its height
_PAD = 0.04  # inches around a drawn figure
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
    """Draw in the package's style, and restore the caller's settings."""

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return function(*args, **kwargs)

    return drawn


class NotebookFigure(Figure):
    """Figure that Jupyter shows as the value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Return a PNG of two dots a CSS pixel, and its size."""
        box, buffer = box_of(self), io.BytesIO()
        with mpl.rc_context(_STYLE):
            self.savefig(buffer, format="png", dpi=2 * _SCREEN_DPI, bbox_inches=box)
        size = {"width": box.width * _SCREEN_DPI, "height": box.height * _SCREEN_DPI}
        return buffer.getvalue(), {name: round(pixels) for name, pixels in size.items()}


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, without pyplot."""
    return NotebookFigure(figsize=(width, height))


def figure_of(ax: Axes) -> Figure:
    """Return the figure that axes are in.

    Raises
    ------
    ConfigError
        If the axes are in none.
    """
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ConfigError(
            "the axes given are in no figure",
            why="They were removed from it.",
            remedy="Give axes of a figure, such as those of plt.subplots().",
        )
    return figure


@styled
def box_of(figure: Figure) -> Bbox:
    """Return the part of a figure that is drawn on, in inches."""
    # bbox_inches="tight" would draw everything twice to find this out.
    shown, figure.dpi = figure.dpi, PRINT_DPI  # at 100, hinted letters are a tenth narrower
    try:
        return figure.get_tightbbox().padded(_PAD)
    finally:
        figure.dpi = shown


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
        Axes that the caller gave, or None.
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
    """Add axes at inches from the figure's upper left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def size_of(ax: Axes) -> tuple[float, float]:
    """Return width and height of axes in inches, before aspect."""
    width, height = figure_of(ax).get_size_inches()
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
    """Add a colour bar with a label, in `cax` if given."""
    if cax is None:
        cax = ax.inset_axes((1.015, 0.0, 0.02, 1.0))
    bar = figure_of(ax).colorbar(mappable, cax=cax, extend=extend, orientation=orientation)
    bar.locator = MaxNLocator(nbins=4)
    bar.update_ticks()
    bar.set_label(label, fontsize=6.5)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=6, width=0.4, length=2)
    return bar


def colour_map(name: str, missing: str = NOT_STORED) -> Colormap:
    """Return a colour map that draws missing cells opaque.

    Transparent cells are black below their mask: readers of PDFs that smooth images (PDFium) would
    draw a dark line around them.
    """
    return mpl.colormaps[name].with_extremes(bad=missing)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as ``1 token`` or ``2 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def interpolation(ax: Axes, cells: int) -> str:
    """Choose an image's interpolation by its cells a side.

    ``"nearest"`` where every cell gets a dot of a print: cells are sharp, and files small. With
    more cells than dots some would vanish; then ``"auto"``.
    """
    return "nearest" if cells <= min(size_of(ax)) * PRINT_DPI else "auto"


# --- spans -------------------------------------------------------------------------------------


def span_colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each span of a trace, by its place."""
    return {name: SPAN_COLOURS[i % len(SPAN_COLOURS)] for i, name in enumerate(names)}


def cells_of_spans(ds: xr.Dataset) -> dict[str, list[int]]:
    """Return the cells of an image over tokens that each span covers.

    The result has all spans, in the trace's order, which gives them their colours; spans outside
    of the image have no cell. ``completion`` has none either: it would hide the spans in it, and a
    line marks where it begins.
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
    """Return values of every token along ``query``; NaN where not stored."""
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
    """Draw a strip with its name outside the axes for every span.

    Parameters
    ----------
    ax
        An image with one cell a token.
    spans
        Cells of each span.
    side
        Side of the axes along which strips run.
    names
        Whether to write the names.
    thickness
        Thickness of a strip, in inches.
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
    """Return the edge of cells at which generated text begins; else None."""
    generation, keys = ds.attrs.get("generation"), np.asarray(ds["key"])
    if generation is None:
        return None
    cell = int(np.searchsorted(keys, generation["prompt_tokens"]))
    return cell - 0.5 if 0 < cell < len(keys) else None


def mark_prompt_end(
    ax: Axes, ds: xr.Dataset, *, side: Literal["x", "y"] = "x", name: bool = False
) -> None:
    """Draw a line where generated tokens begin.

    Parameters
    ----------
    ax
        An image with one cell a token.
    ds
        The trace; one without generated text has no line.
    side
        The axis of tokens.
    name
        Whether to write "prompt ends" beside the line.
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
    """Label one axis with tokens, spans in colours, and the prompt's end."""
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
    """Label one axis with layers L1, L2, …, thinned when crowded."""
    label_rows(ax, [f"L{layer}" for layer in layers], side=side)


def label_rows(ax: Axes, names: Sequence[str], *, side: Literal["x", "y"] = "y") -> None:
    """Label the cells of one axis of an image, thinned when crowded."""
    width, height = size_of(ax)
    # Names side by side need more room than names one below the other.
    inches, size = (width, 12) if side == "x" else (height, 6)
    shown = thinned(len(names), inches, size)
    axis = ax.xaxis if side == "x" else ax.yaxis
    axis.set_ticks(shown, labels=[names[i] for i in shown])
