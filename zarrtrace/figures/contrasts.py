"""Contrasts of groups of scenarios, and critical layers."""

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
    PAGE_WIDTH,
    axes_at,
    axes_or_new,
    blank,
    colour_bar,
    colour_map,
    counted,
    figure_of,
    label_layers,
    styled,
)
from zarrtrace.figures.labels import FeatureLabels, drawable, feature_label, name_points

_ALPHA = 0.05


@styled
def difference_map(
    contrast: xr.Dataset,
    *,
    names: tuple[str, str] = ("A", "B"),
    ax: Axes | None = None,
) -> Figure:
    """Difference of two groups' attention to each span, by layer.

    Scenarios differ in length, so that they are compared span by span, not token by token.

    Parameters
    ----------
    contrast
        Result of :func:`zarrtrace.analysis.contrast` with ``what="attention"`` and heads as
        ``"mean"``.
    names
        Names of the two groups.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes with an image ``(source, layer)`` of the difference, first group less second; a dot
        where ``p_familywise`` ≤ 0.05, the test of :func:`volcano`. Without any dot the title says
        why.

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
    return figure_of(ax)


@styled
def difference_heads(
    contrast: xr.Dataset,
    *,
    names: tuple[str, str] = ("A", "B"),
    figure: Figure | None = None,
) -> Figure:
    """Difference of two groups' attention to each span, by head.

    Parameters
    ----------
    contrast
        Result of :func:`zarrtrace.analysis.contrast` with ``what="attention"`` and heads as
        ``"each"``.
    names
        Names of the two groups.
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
        image = ax.imshow(
            shown, cmap=colour_map(DIVERGING), norm=norm, aspect="auto", interpolation="nearest"
        )
        _dots(ax, contrast["p_familywise"].sel(source=source).transpose("layer", "head") <= _ALPHA)
        ax.set_title(drawable(source))
        ax.set_xlabel("head")
        heads = np.asarray(shown["head"]).tolist()
        ticks = range(0, len(heads), max(1, len(heads) // 8))
        ax.set_xticks(ticks, [str(heads[at]) for at in ticks])
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
) -> Figure:
    """Volcano plot: size of every feature's difference against its p-value.

    Parameters
    ----------
    contrast
        Result of :func:`zarrtrace.analysis.contrast` for features.
    p
        The p-value to draw. Permutation p-values of few scenarios take few values and have a floor.
    names
        Names of the two groups.
    labelled
        Number of features to name at most, those of the smallest p first; if any are coloured, only
        coloured ones. A feature without room for its name stays unnamed.
    labels
        Labels of features, as :func:`zarrtrace.index.names_of` returns them.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes with points (difference of means, −log₁₀ p): coloured where the familywise p ≤
        0.05, grey elsewhere; if nothing is coloured the key says why. Features without a defined p
        are left out; p = 0 is drawn at the top.

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
        title=_meaning(contrast, f"colour by p_familywise, height by {p}"), alignment="left",
    )  # fmt: skip
    order = np.lexsort((-np.abs(x), -y))
    named = order[(significant if significant.any() else shown)[order]]
    points = np.stack([x, np.where(shown, y, np.nan)], axis=1)
    _name_features(ax, contrast, points, named, labelled, labels)
    if p == "p_permutation" and "smallest_p" in contrast.attrs:
        floor = -np.log10(contrast.attrs["smallest_p"])
        ax.axhline(floor, color="black", lw=0.5, ls=":")
        ax.text(-limit, floor, " smallest p there can be", va="bottom", fontsize=5.5)
    return figure_of(ax)


@styled
def critical_chart(critical: xr.Dataset, *, ax: Axes | None = None) -> Figure:
    """Critical layers: attention to each span against its neighbourhood.

    Parameters
    ----------
    critical
        Result of :func:`zarrtrace.analysis.critical_layers`.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes with an image ``(source, layer)`` of log₂ of the ratio of attention to the
        controls', centred on 0 and limited to ±3, and a dot at each critical layer.
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
    return figure_of(ax)


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


def _meaning(contrast: xr.Dataset, mark: str = f"• familywise p ≤ {_ALPHA}") -> str:
    """Say what marks small p-values, or why there are none."""
    n_a, n_b = (contrast.attrs.get(name, "?") for name in ("n_a", "n_b"))
    unit = "scenario" if n_a == n_b == 1 else contrast.attrs.get("unit", "scenarios")
    sizes = f"{n_a} against {n_b} {drawable(str(unit))}"
    floor, least = (contrast.attrs.get(name) for name in ("smallest_p", "least_g"))
    if bool((contrast["p_familywise"] <= _ALPHA).any()):
        return f"{sizes}; {mark}"
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
        values, cmap=colour_map(DIVERGING), norm=_centred(values, limit), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    names = [drawable(str(name)) for name in np.asarray(values["source"])]
    ax.set_yticks(range(len(names)), labels=names)
    label_layers(ax, np.asarray(values["layer"]).tolist(), side="x")
    ax.set_xlabel("layer")
    return image


def _dots(ax: Axes, marked: xr.DataArray) -> None:
    rows, columns = np.nonzero(np.asarray(marked))
    ax.plot(columns, rows, "o", ms=2.2, mfc="black", mec="white", mew=0.4, ls="none")


def _name_features(
    ax: Axes, contrast: xr.Dataset, points: np.ndarray, order: np.ndarray, count: int,
    labels: FeatureLabels | None,
) -> None:  # fmt: skip
    """Name features in order, as far as there is room."""
    layer, feature = np.asarray(contrast["layer"]), np.asarray(contrast["feature"])
    names = (feature_label(int(layer[i]), int(feature[i]), labels) for i in order)
    everything = points[np.isfinite(points).all(axis=1)]
    name_points(ax, zip(names, points[order], strict=True), everything, most=count)
