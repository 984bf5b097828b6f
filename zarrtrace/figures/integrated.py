"""The integrated feature–word–token view of a scenario."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from zarrtrace.analysis import attention_to, pathway_features
from zarrtrace.analysis.positions import positions, require_queries
from zarrtrace.analysis.special import special_keys
from zarrtrace.analysis.trace_arrays import attention, require
from zarrtrace.analysis.traces import scenario_of
from zarrtrace.figures.drawing import (
    PAGE_WIDTH,
    SEQUENTIAL,
    axes_at,
    blank,
    cells_of_spans,
    colour_bar,
    colour_map,
    interpolation,
    label_layers,
    label_token_axis,
    mark_prompt_end,
    mark_spans,
    of_all_tokens,
    size_of,
    span_colours,
    styled,
)
from zarrtrace.figures.features import scale_of
from zarrtrace.figures.labels import (
    FeatureLabels,
    drawable,
    feature_label,
    name_points,
    token_label,
)
from zarrtrace.scenarios import DECISION

# Tokens that the decision attends to most get their text beside their cell: at most `_NAMED`, and
# none with less than `_LEAST_NAMED` of the largest.
_NAMED, _LEAST_NAMED = 6, 0.25
# Distance of a name from the middle of a cell, in points.
_CELL = 3.0
# Width of a scale with its numbers, in inches.
_BAR = 0.5
# Characters of a label beside the tokens.
_LABEL = 34


@styled
def integrated_view(
    ds: xr.Dataset,
    *,
    words: xr.Dataset | None = None,
    sources: Sequence[str] | None = None,
    count: int = 12,
    special: bool = False,
    labels: FeatureLabels | None = None,
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
        Result of :func:`zarrtrace.analysis.word_associations`: the words of each feature.
    sources
        Spans whose pathways to draw; all but the decision if None.
    count
        Number of features, shared out among the spans: of each the strongest over all layers,
        several of one layer where they are.
    special
        Whether activations at special tokens (BOS, chat markers) are drawn and scale a feature's
        row, too.
    labels
        Labels of features, as :func:`zarrtrace.index.names_of` returns them; a feature that has
        one has no words.
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
    covered = [name for name, cells in spans.items() if cells and name != DECISION]
    names = covered if sources is None else list(sources)
    chosen = _pathway_rows(ds, names, count)
    decision = positions(ds, DECISION)
    require_queries(ds, decision)
    decided = attention(ds, "mean").sel(query=decision).mean("query", skipna=False)
    layers = np.asarray(decided["layer"]).tolist()
    above, row = min(3.6, max(1.0, 0.085 * len(layers))), 0.155
    left, top, between, bottom = 0.75, 0.95, 0.36, 0.95
    beside, words_width = 1.05, 1.7
    below = max(0.3, row * len(chosen))
    figure = figure or blank(PAGE_WIDTH, top + above + between + below + bottom)
    width, height = figure.get_size_inches()
    stretch = (height - top - between - bottom) / (above + below)
    wide = width - left - words_width
    ax = axes_at(figure, left, top, wide, above * stretch)
    values = np.ma.masked_invalid(np.asarray(decided.transpose("layer", "key"), dtype=np.float64))
    # The first token often takes most of the attention: its cells alone may be off the scale.
    largest = float(values.filled(0)[:, 1:].max(initial=0))
    image = ax.imshow(
        values,
        cmap=colour_map(SEQUENTIAL),
        norm=PowerNorm(0.5, 0, largest or 1.0),
        aspect="auto",
        interpolation=interpolation(ax, values.shape[1]),
    )
    interesting = _name_tokens(ax, ds, values)
    mark_spans(ax, spans)
    mark_prompt_end(ax, ds)
    label_layers(ax, layers)
    ax.set_xticks([])
    ax.set_ylabel("layer")
    right = width - words_width + 0.06
    bar = axes_at(figure, right, top, 0.07, above * stretch)
    beyond = bool(values.filled(0).max(initial=0) > largest)
    colour_bar(
        bar, image, "attention of the decision", cax=bar, extend="max" if beyond else "neither"
    )
    _draw_pathways(
        axes_at(figure, right + _BAR + 0.08, top, beside, above * stretch), ds, names, spans
    )
    lower = axes_at(figure, left, top + above * stretch + between, wide, below * stretch)
    rows = _draw_features(
        lower, ds, chosen, spans, words, labels or {}, special=special, keep=interesting
    )
    if rows is not None:
        bar = axes_at(figure, right, top + above * stretch + between, 0.07, below * stretch)
        colour_bar(bar, rows, "share of own largest", cax=bar)
    figure.suptitle(
        f"{drawable(scenario_of(ds))}: attention of the decision (mean over heads), and features",
        x=left / width, y=1 - 0.08 / height, ha="left", va="top",
    )  # fmt: skip
    return figure


# --- parts -------------------------------------------------------------------------------------


def _pathway_rows(ds: xr.Dataset, names: Sequence[str], count: int) -> list[tuple[str, int, int]]:
    """Return the strongest (span, layer, feature) of each span, by layer."""
    each = max(1, count // max(1, len(names)))
    rows: list[tuple[str, int, int]] = []
    for name in names:
        found = pathway_features(ds, name, top=each).transpose("layer", "rank", ...)
        score = np.abs(np.nan_to_num(np.asarray(found["score"])))
        best = sorted(np.argsort(-score, axis=None, kind="stable")[:each].tolist())
        layers, features = np.asarray(found["layer"]), np.asarray(found["feature"])
        cells = [np.unravel_index(i, score.shape) for i in best]
        rows += [(name, int(layers[at[0]]), int(features[at])) for at in cells if score[at] > 0]
    return rows


def _name_tokens(ax: Axes, ds: xr.Dataset, values: np.ma.MaskedArray) -> list[int]:
    """Write the tokens attended to most beside their cells; return them."""
    peaks = np.asarray(values.filled(0).max(axis=0))
    peaks[0] = 0
    order = np.argsort(-peaks, kind="stable")[:_NAMED]
    chosen = [int(key) for key in order if peaks[key] > _LEAST_NAMED * peaks.max()]
    texts, attended = np.asarray(ds["key_token"]), values.filled(0)
    strong = np.argwhere(attended > _LEAST_NAMED * peaks.max())[:, ::-1]
    cells = [np.array([key, attended[:, key].argmax()], dtype=float) for key in chosen]
    named = zip((token_label(str(texts[key])) for key in chosen), cells, strict=True)
    name_points(ax, named, strong, most=_NAMED, size=6, colour="black", clear=_CELL)
    return chosen


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
    labels: FeatureLabels,
    *,
    special: bool,
    keep: Sequence[int],
) -> AxesImage | None:
    rows = [
        of_all_tokens(ds, ds["features"].sel(layer=layer, feature=feature))
        for _, layer, feature in chosen
    ]
    if not rows:
        ax.text(0.5, 0.5, "no feature is active at a span and at the decision", ha="center",
                va="center", transform=ax.transAxes)  # fmt: skip
        ax.set_yticks([])
        label_token_axis(ax, ds, spans, keep=keep)
        return None
    values = np.stack(rows)
    if not special:
        values[:, special_keys(ds)] = np.nan
    values /= np.nanmax(np.abs(values), axis=1, keepdims=True)
    shown = np.ma.masked_invalid(values)
    image = ax.imshow(shown, **scale_of(shown, 1.0), aspect="auto")
    colours = span_colours(spans)
    ax.set_yticks(range(len(chosen)), labels=[feature_label(n, f) for _, n, f in chosen])
    for tick, (name, _, _) in zip(ax.get_yticklabels(), chosen, strict=True):
        tick.set(color=colours[name], fontsize=5.5)
    at = 1 + (_BAR + 0.14) / size_of(ax)[0]
    for number, (_, layer, feature) in enumerate(chosen):
        if number and chosen[number][0] != chosen[number - 1][0]:
            ax.axhline(number - 0.5, color="black", lw=0.5)
        text = _words_of(words, layer, feature)
        if label := drawable(labels.get((layer, feature), "")):
            text = label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"
        ax.text(at, number, text, transform=ax.get_yaxis_transform(), va="center", fontsize=5.5)
    if words is not None or labels:
        heading = "label or strongest words" if labels else "strongest words"
        ax.text(at, -0.75, heading, transform=ax.get_yaxis_transform(), va="bottom",
                fontsize=5.5, color="#555555")  # fmt: skip
    label_token_axis(ax, ds, spans, keep=keep)
    ax.set_xlabel("token")
    return image


def _words_of(words: xr.Dataset | None, layer: int, feature: int, count: int = 3) -> str:
    if words is None:
        return ""
    mine = (np.asarray(words["layer"]) == layer) & (np.asarray(words["feature"]) == feature)
    found = np.asarray(words["word"])[mine][:count]
    return "  ".join(token_label(str(word), limit=10) for word in found)
