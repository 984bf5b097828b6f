"""Features along the prompt, and the integrated feature–word–token view of a scenario."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from zarrtrace.analysis import attention_to, pathway_features
from zarrtrace.analysis.selecting import (
    attention,
    positions,
    require,
    require_queries,
    scenario_of,
)
from zarrtrace.analysis.special import special_keys
from zarrtrace.errors import ConfigError
from zarrtrace.figures.drawing import (
    DIVERGING,
    NOT_STORED,
    PAGE_WIDTH,
    SEQUENTIAL,
    Groups,
    axes_at,
    axes_or_new,
    blank,
    cells_of_spans,
    colour_bar,
    interpolation,
    label_layers,
    label_token_axis,
    layer_axis,
    lines_by_layer,
    mark_spans,
    of_all_tokens,
    shade_bands,
    size_of,
    span_colours,
    styled,
)
from zarrtrace.figures.labels import drawable, token_label
from zarrtrace.scenarios import DECISION

# The first token's activations are often tens of times the others': they do not set the scale.
_SHOWN = 0.99


@styled
def feature_timeline(
    ds: xr.Dataset,
    feature: int | None = None,
    *,
    special: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Activation along the prompt in every layer, with the token texts.

    Parameters
    ----------
    ds
        A trace with ``features``, or with ``top_activation`` if `feature` is None.
    feature
        A latent index (in every layer another feature: SAEs are trained apart); the activation of
        largest magnitude of any feature if None.
    special
        Whether to draw special tokens (BOS, chat markers), too; otherwise their columns are empty.
        Their activations are often tens of times the others'.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With an image ``(layer, query)``, layers downwards; the scale ends at the 99th percentile
        of active magnitudes, and is a diverging one where activations are negative (AbsTopK).

    Raises
    ------
    ConfigError
        If the trace has no features, or no such feature.
    """
    if feature is None:
        require(ds, "top_activation")
        values, of = ds["top_activation"].isel(feature_rank=0), "strongest feature of each token"
    else:
        require(ds, "features")
        if feature not in ds.indexes["feature"]:
            raise ConfigError(
                f"{scenario_of(ds)}: the trace has no feature {feature}",
                remedy=f"It has 0 to {ds.indexes['feature'].max()}.",
            )
        values, of = ds["features"].sel(feature=feature), f"latent {feature}"
    shown = np.ma.masked_invalid(of_all_tokens(ds, values.transpose("layer", "query")))
    if not special:
        shown[:, special_keys(ds)] = np.ma.masked
    layers = np.asarray(ds["layer"]).tolist()
    height = 1.7 + max(1.0, 0.085 * len(layers))
    ax = axes_or_new(ax, PAGE_WIDTH, height, margins=(0.45, 0.65, 0.85, 0.85))
    image = ax.imshow(
        shown,
        **_scale(shown),
        aspect="auto",
        interpolation=interpolation(ax, shown.shape[1]),
    )
    ax.set_facecolor(NOT_STORED)
    spans = cells_of_spans(ds)
    label_token_axis(ax, ds, spans)
    mark_spans(ax, spans)
    label_layers(ax, layers)
    ax.set_ylabel("layer")
    ax.set_xlabel("token")
    ax.text(
        0, 1 + 0.62 / size_of(ax)[1], f"{drawable(scenario_of(ds))}: {of}", fontsize=8,
        transform=ax.transAxes, va="bottom",
    )  # fmt: skip
    extend: Literal["both", "max"] = "both" if (shown < 0).any() else "max"
    colour_bar(ax, image, "activation (SAE units)", extend=extend)
    return ax


@styled
def trajectory(
    result: xr.DataArray, *, groups: Groups | None = None, ax: Axes | None = None
) -> Axes:
    """One feature's activation by layer, all scenarios.

    Parameters
    ----------
    result
        What :func:`zarrtrace.analysis.feature_trajectory` returned for one feature and place:
        ``([scenario,] layer)``.
    groups
        Names of scenarios by group.
    ax
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With a thin line a scenario and the mean of each group.

    Raises
    ------
    ConfigError
        If the result has several features or places.
    """
    if set(result.dims) - {"scenario", "layer"}:
        raise ConfigError(
            f"cannot draw a trajectory with dimensions {', '.join(map(str, result.dims))}",
            remedy="Select one feature and one place, as .sel(feature=14826).",
        )
    ax = axes_or_new(ax, PAGE_WIDTH * 0.6, 2.2)
    layers = np.asarray(result["layer"]).tolist()
    shade_bands(ax, layers)
    lines = lines_by_layer(ax, result, groups)
    layer_axis(ax, layers)
    ax.set_ylabel("activation (SAE units)")
    if "feature" in result.coords:
        place = drawable(str(result.coords["place"].item())) if "place" in result.coords else ""
        ax.set_title(f"latent {int(result['feature'])}" + (f" at {place}" if place else ""))
    ax.legend(handles=lines, loc="best")
    return ax


@styled
def integrated_view(
    ds: xr.Dataset,
    *,
    words: xr.Dataset | None = None,
    sources: Sequence[str] | None = None,
    count: int = 12,
    special: bool = False,
    figure: Figure | None = None,
) -> Figure:
    """Features, words and tokens of one scenario in one picture.

    Above, how much the decision attends to every token in every layer, and beside it the pathways
    from the spans. Below, on the same tokens, where the features fire that are active both at a
    span and at the decision and whose activation attention can carry
    (:func:`zarrtrace.analysis.pathway_features`), with the words they go with.

    Parameters
    ----------
    ds
        A trace with ``attention_mean`` and ``features``.
    words
        What :func:`zarrtrace.analysis.word_associations` returned: the words of each feature.
    sources
        Spans; all but the decision if None.
    count
        How many features, shared out among the spans.
    special
        Whether activations at special tokens (BOS, chat markers) are drawn and scale a feature's
        row, too.
    figure
        Where to draw; a new figure if None.

    Returns
    -------
    Figure
        With axes for attention ``(layer, key)``, pathways, and features ``(feature, query)``,
        each feature scaled to its own largest activation.

    Raises
    ------
    ConfigError
        If the trace lacks attention or features.
    """
    require(ds, "attention_mean", "features")
    spans = cells_of_spans(ds)
    names = [n for n in spans if n != DECISION] if sources is None else list(sources)
    chosen = _pathway_rows(ds, names, count)
    # The scale leaves out the first token, which often takes most of the attention.
    decision = positions(ds, DECISION)
    require_queries(ds, decision)
    decided = attention(ds, "mean").sel(query=decision).mean("query", skipna=False)
    layers = np.asarray(decided["layer"]).tolist()
    above, row = min(3.6, max(1.0, 0.085 * len(layers))), 0.155
    left, top, between, bottom = 0.75, 0.95, 0.36, 0.95
    beside, words_width = 1.25, 1.45
    below = max(0.3, row * len(chosen))
    figure = figure or blank(PAGE_WIDTH, top + above + between + below + bottom)
    width, height = figure.get_size_inches()
    stretch = (height - top - between - bottom) / (above + below)
    wide = width - left - words_width
    ax = axes_at(figure, left, top, wide, above * stretch)
    values = np.ma.masked_invalid(np.asarray(decided.transpose("layer", "key"), dtype=np.float64))
    image = ax.imshow(
        values,
        **_scale(values[:, 1:], 0.999),
        aspect="auto",
        interpolation=interpolation(ax, values.shape[1]),
    )
    ax.set_facecolor(NOT_STORED)
    mark_spans(ax, spans)
    label_layers(ax, layers)
    ax.set_xticks([])
    ax.set_ylabel("layer")
    bar = axes_at(figure, width - words_width + 0.08, height - 0.5, 1.1, 0.07)
    colour_bar(
        bar, image, "attention of the decision", cax=bar, extend="max", orientation="horizontal"
    )
    _draw_pathways(
        axes_at(figure, width - words_width + 0.08, top, beside, above * stretch), ds, names, spans
    )
    lower = axes_at(figure, left, top + above * stretch + between, wide, below * stretch)
    _draw_features(lower, ds, chosen, spans, words, special=special)
    figure.suptitle(
        f"{drawable(scenario_of(ds))}: attention of the decision (mean over heads), and features",
        x=left / width, y=1 - 0.08 / height, ha="left", va="top",
    )  # fmt: skip
    return figure


# --- parts -------------------------------------------------------------------------------------


def _scale(values: np.ma.MaskedArray, share: float = _SHOWN) -> dict[str, Any]:
    """Return the colours and norm for values, diverging from 0 if some are negative."""
    present = values.compressed()
    active = np.abs(present[present != 0])
    end = float(np.quantile(active, share)) if active.size else 1.0
    if (present < 0).any():
        return {"cmap": DIVERGING, "norm": Normalize(-end, end)}
    return {"cmap": SEQUENTIAL, "norm": Normalize(0, end)}


def _pathway_rows(ds: xr.Dataset, names: Sequence[str], count: int) -> list[tuple[str, int, int]]:
    """Return (span, layer, feature), the strongest of each span, by span and layer."""
    each = max(1, count // max(1, len(names)))
    rows: list[tuple[str, int, int]] = []
    for name in names:
        found = pathway_features(ds, name, top=1)
        score = np.abs(np.nan_to_num(np.asarray(found["score"].isel(rank=0))))
        best = np.argsort(-score, kind="stable")[:each]
        layers, features = np.asarray(found["layer"]), np.asarray(found["feature"].isel(rank=0))
        rows += [(name, int(layers[i]), int(features[i])) for i in sorted(best) if score[i] > 0]
    return rows


def _draw_pathways(
    ax: Axes, ds: xr.Dataset, names: Sequence[str], spans: dict[str, list[int]]
) -> None:
    colours = span_colours(spans)
    if names:
        strength = attention_to(ds, list(names))
        layers = np.asarray(strength["layer"])
        for name in names:
            ax.plot(strength.sel(source=name), np.arange(len(layers)), color=colours[name], lw=1)
        ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="x", labelsize=5.5, pad=1)
    ax.set_title("to each span, per token", fontsize=6, pad=2)


def _draw_features(
    ax: Axes,
    ds: xr.Dataset,
    chosen: Sequence[tuple[str, int, int]],
    spans: dict[str, list[int]],
    words: xr.Dataset | None,
    *,
    special: bool,
) -> None:
    rows = [
        of_all_tokens(ds, ds["features"].sel(layer=layer, feature=feature))
        for _, layer, feature in chosen
    ]
    if not rows:
        ax.text(0.5, 0.5, "no feature is active at a span and at the decision", ha="center",
                va="center", transform=ax.transAxes)  # fmt: skip
        ax.set_yticks([])
        label_token_axis(ax, ds, spans)
        return
    values = np.stack(rows)
    if not special:
        values[:, special_keys(ds)] = np.nan
    values /= np.nanmax(np.abs(values), axis=1, keepdims=True)
    shown = np.ma.masked_invalid(values)
    ax.imshow(shown, **_scale(shown, 1.0), aspect="auto")
    ax.set_facecolor(NOT_STORED)
    colours = span_colours(spans)
    ax.set_yticks(range(len(chosen)), labels=[f"L{layer} · {f}" for _, layer, f in chosen])
    for tick, (name, _, _) in zip(ax.get_yticklabels(), chosen, strict=True):
        tick.set(color=colours[name], fontsize=5.5)
    for number, (_, layer, feature) in enumerate(chosen):
        if number and chosen[number][0] != chosen[number - 1][0]:
            ax.axhline(number - 0.5, color="black", lw=0.5)
        text = _words_of(words, layer, feature)
        ax.text(1.012, number, text, transform=ax.get_yaxis_transform(), va="center", fontsize=5.5)
    if words is not None:
        ax.text(1.012, -0.75, "strongest words", transform=ax.get_yaxis_transform(), va="bottom",
                fontsize=5.5, fontstyle="italic")  # fmt: skip
    label_token_axis(ax, ds, spans)
    ax.set_xlabel("token; features scaled to their own largest activation")


def _words_of(words: xr.Dataset | None, layer: int, feature: int, count: int = 3) -> str:
    if words is None:
        return ""
    mine = (np.asarray(words["layer"]) == layer) & (np.asarray(words["feature"]) == feature)
    found = np.asarray(words["word"])[mine][:count]
    return "  ".join(token_label(str(word), limit=10) for word in found)
