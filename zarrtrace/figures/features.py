"""Activation of features along the prompt and in all scenarios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from zarrtrace.analysis.features import Feature, as_pairs, dictionaries_of
from zarrtrace.analysis.special import special_keys
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import scenario_of
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    DIVERGING,
    PAGE_WIDTH,
    SEQUENTIAL,
    axes_or_new,
    cells_of_spans,
    colour_bar,
    colour_map,
    figure_of,
    interpolation,
    label_rows,
    label_token_axis,
    mark_spans,
    of_all_tokens,
    size_of,
    styled,
)
from zarrtrace.figures.labels import FeatureLabels, drawable, feature_label
from zarrtrace.figures.layers import (
    Groups,
    group_colour,
    layer_axis,
    lines_by_layer,
    shade_bands,
)

# The first token's activations are often tens of times the others': they do not set the scale.
_SHOWN = 0.99
# Width of a character of an axis' labels, in inches.
_CHARACTER = 0.067


@styled
def feature_timeline(
    ds: xr.Dataset,
    features: Feature | Sequence[Feature] | None = None,
    *,
    special: bool = False,
    labels: FeatureLabels | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Activation along the prompt, with the token texts.

    Parameters
    ----------
    ds
        A trace with ``features``, or with ``top_activation`` if `features` is None.
    features
        Pairs of a layer and the index of a feature, a row each, as
        :func:`zarrtrace.analysis.feature_trajectory` takes them; if None, in every layer the
        activation of largest magnitude of any feature.
    special
        Whether to draw special tokens (BOS, chat markers), too; otherwise their columns are empty.
        Their activations are often tens of times the others'.
    labels
        Labels of features, as :func:`zarrtrace.index.names_of` returns them.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes with an image ``(layer or pair, query)``, layers downwards; the scale ends at the
        99th percentile of active magnitudes, and is a diverging one where activations are negative
        (AbsTopK).

    Raises
    ------
    ConfigError
        If the trace has no features, or no such feature.
    """
    if features is None:
        require(ds, "top_activation")
        values, of = ds["top_activation"].isel(feature_rank=0), "strongest feature of each token"
        names = [f"L{layer}" for layer in np.asarray(ds["layer"]).tolist()]
    else:
        require(ds, "features")
        pairs = as_pairs(features, ds["features"], dictionaries_of(ds))
        layer, index = (xr.DataArray(list(one), dims="layer") for one in zip(*pairs, strict=True))
        values = ds["features"].sel(layer=layer, feature=index)
        names, of = [feature_label(*pair, labels) for pair in pairs], "layer · feature"
    shown = np.ma.masked_invalid(of_all_tokens(ds, values.transpose("layer", "query")))
    if not special:
        shown[:, special_keys(ds)] = np.ma.masked
    height = 1.7 + max(1.0, 0.085 * len(names))
    left = max(0.65, 0.1 + _CHARACTER * max(map(len, names)))
    ax = axes_or_new(ax, PAGE_WIDTH, height, margins=(left, 0.65, 0.85, 0.85))
    image = ax.imshow(
        shown,
        **scale_of(shown),
        aspect="auto",
        interpolation=interpolation(ax, shown.shape[1]),
    )
    spans = cells_of_spans(ds)
    label_token_axis(ax, ds, spans)
    mark_spans(ax, spans)
    label_rows(ax, names)
    ax.set_ylabel("layer" if features is None else "")
    ax.set_xlabel("token")
    ax.text(
        0, 1 + 0.62 / size_of(ax)[1], f"{drawable(scenario_of(ds))}: {of}", fontsize=8,
        transform=ax.transAxes, va="bottom",
    )  # fmt: skip
    extend: Literal["both", "max"] = "both" if (shown < 0).any() else "max"
    colour_bar(ax, image, "activation (SAE units)", extend=extend)
    return figure_of(ax)


@styled
def trajectory(
    result: xr.DataArray,
    *,
    groups: Groups | None = None,
    labels: FeatureLabels | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Activation of single features in all scenarios.

    A line joins layers only if one SAE serves all of them. Otherwise the same index is another
    feature in each layer, and every pair of layer and feature gets a bar of its own.

    Parameters
    ----------
    result
        Result of :func:`zarrtrace.analysis.feature_trajectory` for one place:
        ``([scenario,] [pair])``.
    groups
        Names of scenarios by group.
    labels
        Labels of features, as :func:`zarrtrace.index.names_of` returns them.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        One axes with bars: for each pair the mean of each group, and a dot a scenario; or with
        lines: a thin one a scenario and the mean of each group.

    Raises
    ------
    ConfigError
        If the result has several places.
    """
    if set(result.dims) - {"scenario", "pair"}:
        raise ConfigError(
            f"cannot draw a trajectory with dimensions {', '.join(map(str, result.dims))}",
            remedy="Select one place, as .sel(place='balance').",
        )
    result = result if "pair" in result.dims else result.expand_dims("pair")
    layers, index = (np.asarray(result[name]).tolist() for name in ("layer", "feature"))
    place = drawable(str(result["place"].item())) if "place" in result.coords else ""
    at = f" at {place}" if place else ""
    if _is_one_feature(result):
        ax = axes_or_new(ax, PAGE_WIDTH * 0.6, 2.2)
        by_layer = result.swap_dims(pair="layer").sortby("layer")
        shade_bands(ax, layers)
        handles = lines_by_layer(ax, by_layer, groups)
        layer_axis(ax, layers)
        ax.set_title(f"feature {index[0]}{at}")
    else:
        names = [feature_label(*pair, labels) for pair in zip(layers, index, strict=True)]
        slanted = _CHARACTER * 0.71 * max(map(len, names))  # at 45 degrees
        left, bottom = max(0.55, slanted - 0.1), max(0.45, slanted + 0.1)
        width = max(PAGE_WIDTH * 0.4, 1 + 0.5 * len(index)) - 0.55 + left
        ax = axes_or_new(ax, width, 1.95 + bottom, margins=(left, 0.2, bottom, 0.3))
        handles = _bars_by_pair(ax, result, groups)
        ax.set_xticks(range(len(names)), labels=names, rotation=45, ha="right")
        ax.set_title(f"single features{at}")
    ax.set_ylabel("activation (SAE units)")
    ax.legend(handles=handles, loc="best")
    return figure_of(ax)


def _is_one_feature(result: xr.DataArray) -> bool:
    """Whether pairs are one feature of one SAE in several layers."""
    if "dictionary" not in result.coords:
        return False
    dictionaries = set(np.asarray(result["dictionary"]).tolist())
    layers, index = (np.asarray(result[name]).tolist() for name in ("layer", "feature"))
    one = len(dictionaries) == 1 and len(set(index)) == 1 and "" not in dictionaries
    return one and len(set(layers)) == len(layers) > 1


def _bars_by_pair(ax: Axes, result: xr.DataArray, groups: Groups | None) -> list[Any]:
    """Draw means of groups as bars and scenarios as dots."""
    if "scenario" not in result.dims:
        result = result.expand_dims("scenario")
    values = np.asarray(result.transpose("scenario", "pair"))
    names = [str(name) for name in np.asarray(result["scenario"])]
    groups = groups or {f"mean of {len(names)} scenarios" if len(names) > 1 else names[0]: names}
    width = 0.8 / len(groups)
    handles: list[Any] = []
    for number, (group, members) in enumerate(groups.items()):
        rows = values[[name in members for name in names]]
        if not len(rows):
            continue
        x = np.arange(values.shape[1]) + (number - (len(groups) - 1) / 2) * width
        colour = group_colour(members[0], groups)
        label = drawable(group)
        has_value = ~np.isnan(rows)
        with np.errstate(invalid="ignore"):  # no bar where no scenario of the group has the place
            means = np.where(has_value, rows, 0).sum(0) / has_value.sum(0)
        handles.append(ax.bar(x, means, width * 0.9, color=colour, alpha=0.5, label=label))
        if len(rows) > 1:
            ax.plot(x, rows.T, ls="", marker=".", ms=3, color=colour)
    ax.axhline(0, color="black", lw=0.5)
    return handles


def scale_of(values: np.ma.MaskedArray, share: float = _SHOWN) -> dict[str, Any]:
    """Return colours and norm, diverging from 0 if values are negative."""
    present = values.compressed()
    active = np.abs(present[present != 0])
    end = float(np.quantile(active, share)) if active.size else 1.0
    if (present < 0).any():
        return {"cmap": colour_map(DIVERGING), "norm": Normalize(-end, end)}
    return {"cmap": colour_map(SEQUENTIAL), "norm": Normalize(0, end)}
