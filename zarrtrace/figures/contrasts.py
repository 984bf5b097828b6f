"""What separates groups of scenarios, and what stands out: maps of differences, volcano plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    DIVERGING,
    GROUP_COLOURS,
    NOT_STORED,
    PAGE_WIDTH,
    axes_at,
    axes_or_new,
    blank,
    colour_bar,
    counted,
    label_layers,
    styled,
)
from zarrtrace.figures.labels import FeatureLabels, drawable, feature_label

_ALPHA = 0.05
_NAME = (0.12, 0.035)  # width and height of a point's name, in shares of the axes
_LABEL = 16  # characters of a point's label


@styled
def difference_map(
    contrast: xr.Dataset,
    *,
    names: tuple[str, str] = ("A", "B"),
    ax: Axes | None = None,
) -> Axes:
    """Difference of two groups' attention to each span, by layer, centred on 0.

    Scenarios differ in length, so that token does not stand against token: they are compared span
    by span.

    Parameters
    ----------
    contrast
        What :func:`zarrtrace.analysis.contrast` returned with ``what="attention"`` and heads as
        ``"mean"``.
    names
        Of the groups.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With an image ``(source, layer)`` of the difference, first group less second; a dot where
        ``p_familywise`` ≤ 0.05, the test of :func:`volcano`. Without any dot the title says why.

    Raises
    ------
    ConfigError
        If it is a contrast of features, or of single heads.
    """
    values = _attention_difference(contrast, ("source", "layer"))
    ax = _wide_axes(ax, values.sizes["source"])
    image = _by_source_and_layer(ax, values)
    _dots(ax, contrast["p_familywise"].transpose("source", "layer") <= _ALPHA)
    first, second = map(drawable, names)
    colour_bar(ax, image, f"{first} − {second}")
    ax.set_title(
        f"attention of the {_target(contrast)} per token, {first} − {second}\n{_meaning(contrast)}",
        loc="left",
    )
    return ax


@styled
def difference_heads(
    contrast: xr.Dataset,
    *,
    names: tuple[str, str] = ("A", "B"),
    figure: Figure | None = None,
) -> Figure:
    """Difference of two groups' attention to each span, by layer and head, centred on 0.

    Parameters
    ----------
    contrast
        What :func:`zarrtrace.analysis.contrast` returned with ``what="attention"`` and heads as
        ``"each"``.
    names
        Of the groups.
    figure
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes a source that has values, with an image ``(layer, head)``, first group less second,
        on one scale; a dot where ``p_familywise`` ≤ 0.05. Without any dot the title says why.

    Raises
    ------
    ConfigError
        If it is a contrast of features, or of the mean over heads.
    """
    values = _attention_difference(contrast, ("source", "layer", "head"))
    if bool(values.notnull().any()):
        values = values.dropna("source", how="all")  # no panel for what no scenario has
    sources = [str(source) for source in np.asarray(values["source"])]
    layers = np.asarray(values["layer"]).tolist()
    norm = _centred(values)
    left, right, top, bottom, gap = 0.45, 0.75, 0.62, 0.4, 0.25
    figure = figure or blank(PAGE_WIDTH, min(6.0, top + bottom + max(1.2, 0.1 * len(layers))))
    width, height = figure.get_size_inches()
    each = (width - left - right - gap * (len(sources) - 1)) / len(sources)
    first, second = map(drawable, names)
    for number, source in enumerate(sources):
        ax = axes_at(figure, left + number * (each + gap), top, each, height - top - bottom)
        shown = values.sel(source=source)
        image = ax.imshow(shown, cmap=DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
        ax.set_facecolor(NOT_STORED)
        _dots(ax, contrast["p_familywise"].sel(source=source).transpose("layer", "head") <= _ALPHA)
        ax.set_title(drawable(source))
        ax.set_xlabel("head")
        ax.set_xticks(range(0, len(shown["head"]), max(1, len(shown["head"]) // 8)))
        if number:
            ax.set_yticks([])
        else:
            label_layers(ax, layers)
    bar = axes_at(figure, width - right + 0.1, top, 0.09, height - top - bottom)
    colour_bar(bar, image, f"{first} − {second}, attention per token", cax=bar)
    figure.suptitle(
        f"attention of the {_target(contrast)} by head, {first} − {second}\n{_meaning(contrast)}",
        x=left / width, y=1 - 0.08 / height, ha="left", va="top",
    )  # fmt: skip
    return figure


@styled
def volcano(
    contrast: xr.Dataset,
    *,
    p: Literal["p_welch", "p_permutation"] = "p_welch",
    names: tuple[str, str] = ("A", "B"),
    labelled: int = 8,
    labels: FeatureLabels | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Volcano plot: size of every feature's difference against its p-value.

    Parameters
    ----------
    contrast
        What :func:`zarrtrace.analysis.contrast` returned for features.
    p
        Which p-value. Permutation p-values of few scenarios take few values and have a floor.
    names
        Of the groups.
    labelled
        How many of the smallest p-values to name, as layer and latent index: of those coloured, if
        any are.
    labels
        Labels of features, as :func:`zarrtrace.index.names_of` returns them.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With points (difference of means, −log₁₀ p): coloured where the familywise p ≤ 0.05, grey
        elsewhere; if nothing is coloured the key says why. Features whose p is not defined are
        left out; p = 0 is drawn at the top.

    Raises
    ------
    ConfigError
        If it is a contrast of attention.
    """
    if "row" not in contrast.dims:
        raise ConfigError(
            "a volcano plot shows features, and this is a contrast of attention",
            remedy="Use difference_map, or contrast(what='features').",
        )
    ax = axes_or_new(ax, 4.6, 3.4, margins=(0.5, 0.15, 0.45, 0.5))
    x, values = np.asarray(contrast["difference"]), np.asarray(contrast[p])
    shown = np.isfinite(values)
    positive = values[shown & (values > 0)]
    y = -np.log10(np.where(values > 0, values, positive.min() if positive.size else 1.0))
    significant = shown & (np.asarray(contrast["p_familywise"]) <= _ALPHA)
    first, second = map(drawable, names)
    for mask, colour, label in (
        (shown & ~significant, "#b0b0b0", f"familywise p > {_ALPHA}"),
        (significant & (x > 0), GROUP_COLOURS[0], f"more in {first}"),
        (significant & (x < 0), GROUP_COLOURS[1], f"more in {second}"),
    ):
        if not mask.any():
            continue
        ax.plot(x[mask], y[mask], "o", ms=2.2, mew=0, alpha=0.75, color=colour, rasterized=True,
                label=f"{label} ({int(mask.sum())})")  # fmt: skip
    limit = float(np.abs(x[shown]).max(initial=0)) * 1.25 or 1.0
    ax.set_xlim(-limit, limit)
    ax.set_ylim(0, float(y[shown].max(initial=1.0)) * 1.12)
    ax.axvline(0, color="#999999", lw=0.5, zorder=0)
    test = "Welch's t-test" if p == "p_welch" else "permutation test"
    ax.set_xlabel(f"mean activation, {first} − {second} (SAE units)")
    ax.set_ylabel(f"−log₁₀ p ({test})")
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, columnspacing=1, handletextpad=0.2,
        title="" if significant.any() else _meaning(contrast), alignment="left",
    )  # fmt: skip
    named = significant if significant.any() else shown
    _name_points(ax, contrast, x, np.where(named, y, -np.inf), labelled, labels)
    if p == "p_permutation" and "smallest_p" in contrast.attrs:
        floor = -np.log10(contrast.attrs["smallest_p"])
        ax.axhline(floor, color="black", lw=0.5, ls=":")
        ax.text(-limit, floor, " smallest p there can be", va="bottom", fontsize=5.5)
    return ax


@styled
def critical_chart(critical: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Critical layers: how far attention to each span stands out against its neighbourhood.

    Parameters
    ----------
    critical
        What :func:`zarrtrace.analysis.critical_layers` returned.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With an image ``(source, layer)`` of log₂ of the ratio of attention to the controls',
        centred on 0 and limited to ±3, and a dot at each critical layer.
    """
    ratio = critical["ratio"].transpose("source", "layer")
    effect = ratio.copy(data=np.log2(ratio.where(ratio > 0)))
    ax = _wide_axes(ax, effect.sizes["source"])
    image = _by_source_and_layer(ax, effect, limit=3.0)
    _dots(ax, critical["critical"].transpose("source", "layer"))
    colour_bar(ax, image, "log₂ ratio", extend="both")
    asked = json.loads(critical.attrs["parameters"])
    number = int(critical["n"].max())
    ax.set_title(
        f"attention to a span against the tokens beside it, {counted(number, 'scenario')} "
        f"(• critical: more than placebos, q ≤ {asked['alpha']})",
        loc="left",
    )
    return ax


# --- parts -------------------------------------------------------------------------------------


def _attention_difference(contrast: xr.Dataset, dims: Sequence[str]) -> xr.DataArray:
    found = contrast["difference"]
    if set(found.dims) != set(dims):
        raise ConfigError(
            f"this figure shows {', '.join(dims)}, and the contrast has "
            + ", ".join(map(str, found.dims)),
            remedy="Use contrast(what='attention', heads=...): 'mean' for difference_map, 'each' "
            "for difference_heads; volcano for features.",
        )
    return found.transpose(*dims)


def _meaning(contrast: xr.Dataset) -> str:
    """Say what a dot is; without any, that there is none, and whether there could be one."""
    n_a, n_b = (contrast.attrs.get(name, "?") for name in ("n_a", "n_b"))
    unit = "scenario" if n_a == n_b == 1 else contrast.attrs.get("unit", "scenarios")
    sizes = f"{n_a} against {n_b} {drawable(str(unit))}"
    floor, least = (contrast.attrs.get(name) for name in ("smallest_p", "least_g"))
    if bool((contrast["p_familywise"] <= _ALPHA).any()):
        return f"{sizes}; • familywise p ≤ {_ALPHA}"
    if floor is not None and floor > _ALPHA:
        return f"{sizes} are too few for any p ≤ {_ALPHA}: none can be below {floor:.2g}"
    needed = "" if least is None else f", which takes |g| of at least {least:.2g}"
    return f"{sizes}; nothing reaches familywise p ≤ {_ALPHA}{needed}"


def _target(contrast: xr.Dataset) -> str:
    return drawable(str(json.loads(contrast.attrs.get("parameters", "{}")).get("target", "target")))


def _wide_axes(ax: Axes | None, rows: int) -> Axes:
    margins = (0.85, 0.75, 0.42, 0.42)
    return axes_or_new(ax, PAGE_WIDTH, 0.87 + 0.24 * max(rows, 2), margins=margins)


def _centred(values: xr.DataArray, limit: float | None = None) -> CenteredNorm:
    finite = np.abs(np.asarray(values))[np.isfinite(np.asarray(values))]
    largest = float(finite.max(initial=0.0)) or 1.0
    return CenteredNorm(0, largest if limit is None else min(limit, largest))


def _by_source_and_layer(ax: Axes, values: xr.DataArray, limit: float | None = None) -> AxesImage:
    """Show ``(source, layer)``: spans downwards, layers to the right."""
    image = ax.imshow(
        values, cmap=DIVERGING, norm=_centred(values, limit), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    ax.set_facecolor(NOT_STORED)
    names = [drawable(str(name)) for name in np.asarray(values["source"])]
    ax.set_yticks(range(len(names)), labels=names)
    label_layers(ax, np.asarray(values["layer"]).tolist(), side="x")
    ax.set_xlabel("layer")
    return image


def _dots(ax: Axes, marked: xr.DataArray) -> None:
    rows, columns = np.nonzero(np.asarray(marked))
    ax.plot(columns, rows, "o", ms=2.2, mfc="black", mec="white", mew=0.4, ls="none")


def _name_points(
    ax: Axes,
    contrast: xr.Dataset,
    x: np.ndarray,
    y: np.ndarray,
    count: int,
    labels: FeatureLabels | None,
) -> None:
    """Name the highest points that have room for a name beside them."""
    taken: list[tuple[float, float, float]] = []
    low, high = ax.get_xlim()
    top = ax.get_ylim()[1]
    layer, feature = np.asarray(contrast["layer"]), np.asarray(contrast["feature"])
    for i in np.lexsort((-np.abs(x), -y)):
        if len(taken) == count or not np.isfinite(y[i]):
            break
        right = x[i] > 0
        name = feature_label(int(layer[i]), int(feature[i]), labels, limit=_LABEL)
        width = _NAME[0] * max(1, len(name) / 9)
        outwards = (x - x[i]) * (1 if right else -1) / (high - low)
        beside = (outwards > 0) & (outwards < width) & (np.abs(y - y[i]) < _NAME[1] * top / 2)
        covers = any(
            abs(x[i] - a) < max(width, other) * (high - low) and abs(y[i] - b) < _NAME[1] * top
            for a, b, other in taken
        )
        if beside.any() or covers:
            continue
        taken.append((float(x[i]), float(y[i]), width))
        ax.annotate(
            name, (x[i], y[i]), xytext=(3 if right else -3, 0),
            textcoords="offset points", fontsize=5.5, va="center", ha="left" if right else "right",
            color="#666666",
        )  # fmt: skip
