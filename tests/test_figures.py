"""Figures: what is on the axes equals the data, and files say where they come from."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Iterable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fakes
import matplotlib as mpl
import numpy as np
import planted
import pytest
import synthetic
import xarray as xr
from click.testing import CliRunner
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

import zarrtrace as zt
from zarrtrace import analysis, figures
from zarrtrace.cli import shared
from zarrtrace.cli.figures_ import command
from zarrtrace.errors import ConfigError, NotATraceError, ScenarioError
from zarrtrace.figures import catalogue, drawing, features, integrated, labels, page
from zarrtrace.storage import locate

HOSTILE = ["<s>", " <b>x</b>", "🎰", "你好", "\u202ertl", "$x^2$", "$10", "\n", "\t", "", "e\u0301"]


RISKY, SAFE = planted.SCENARIOS[:5], planted.SCENARIOS[5:]
FEATURES = 24


def make_trace(name: str = RISKY[0], *, seed: int = 0, **options: Any) -> xr.Dataset:
    """Return a trace; a risky one attends to the balance in layer 3 and has more of feature 5."""
    risky = name in RISKY
    plant = planted.attend([planted.TOKENS - 1], planted.SPANS["balance"], [3])
    found = planted.make_trace(name, seed=seed, plants=[plant] if risky else [], **options)
    rng = np.random.default_rng(seed)
    shape = (found.sizes["layer"], found.sizes["query"], FEATURES)
    values = rng.exponential(1, shape).astype(np.float32) * (rng.random(shape) < 0.3)
    if risky:
        values[3, -1, 5] += 20
    found["features"] = (("layer", "query", "feature"), values)
    return synthetic.with_index(found.assign_coords(feature=np.arange(FEATURES)))


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    """Scenarios in two groups; one is shorter."""
    lengths = {"Safe_1": 25}
    return planted.as_run(
        {
            name: make_trace(name, seed=number, tokens=lengths.get(name, planted.TOKENS))
            for number, name in enumerate(planted.SCENARIOS)
        }
    )


@pytest.fixture(scope="module")
def ds(run: xr.DataTree) -> xr.Dataset:
    return run["Risky_0"].to_dataset()


def image(ax: Any) -> np.ma.MaskedArray:
    (found,) = ax.get_images()
    return np.ma.asarray(found.get_array())


def axes_of(figure: Figure) -> Any:
    """Return the axes of a figure that has one."""
    (ax,) = figure.axes
    return ax


def panels(figure: Figure) -> list[Any]:
    return [ax for ax in figure.axes if ax.get_images()]


def drawn_by(figure: Figure) -> None:
    """Draw, so that warnings (missing glyphs) become errors."""
    figure.savefig("/dev/null", format="png", dpi=40)


# --- generated text ----------------------------------------------------------------------------


def continued(ds: xr.Dataset, prompt: int = 22) -> xr.Dataset:
    """Return a trace whose last tokens were generated."""
    tokens = ds.sizes["key"]
    spans = {
        **ds.attrs["spans"],
        "decision": {"characters": [], "tokens": [prompt - 1]},
        "completion": {"characters": [], "tokens": list(range(prompt, tokens))},
        "answer": {"characters": [], "tokens": [prompt + 1]},
    }
    generated = ds.assign_coords(generated=("key", np.arange(tokens) >= prompt))
    return generated.assign_attrs(spans=spans, generation={"prompt_tokens": prompt})


def ends(ax: Any) -> list[tuple[list[float], list[float]]]:
    """Return the lines that mark the end of the prompt, as x and y."""
    found = [line for line in ax.get_lines() if line.get_gid() == "end of the prompt"]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]


@pytest.mark.long
def test_figures_with_token_axes_mark_where_the_prompt_ends(ds: xr.Dataset) -> None:
    generated = continued(ds)
    both = [([21.5, 21.5], [0, 1]), ([0, 1], [21.5, 21.5])]
    assert ends(axes_of(figures.attention_map(generated, 3))) == both
    for ax in panels(figures.attention_layers(generated)):
        assert ends(ax) == both
    figure = figures.attention_layers(generated)
    assert "│ prompt ends" in [text.get_text() for text in figure.texts]
    assert ends(axes_of(figures.feature_timeline(generated))) == both[:1]
    for ax in panels(figures.integrated_view(generated)):
        assert ends(ax) == both[:1]
    drawn_by(figure)


def test_a_prompt_alone_has_no_end(ds: xr.Dataset) -> None:
    assert ends(axes_of(figures.attention_map(ds, 3))) == []
    assert "│ prompt ends" not in [text.get_text() for text in figures.attention_layers(ds).texts]


def test_the_flow_has_generated_spans_behind_the_decision(ds: xr.Dataset) -> None:
    figure = figures.flow_diagram(continued(ds))
    _, ax, beside = figure.axes
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names[-3:] == ["decision", "completion", "answer"]
    assert [x for x, _ in ends(ax)] == [[len(names) - 2.5] * 2]
    # Nothing that was generated reached the decision.
    shown = [text.get_text() for text in beside.get_legend().get_texts()]
    assert not any(name in text for text in shown for name in ("completion", "answer", "decision"))


# --- all functions -----------------------------------------------------------------------------


def test_functions_are_documented_return_figures_and_take_axes_or_a_figure() -> None:
    readme = (Path(figures.__file__).parent / "README.md").read_text(encoding="utf-8")
    takes = {}
    for name in sorted(set(dir(figures)) - {"draw_run", "metadata_of", "save", "token_label"}):
        assert f"`{name}`" in readme, name
        function = getattr(figures, name)
        signature = inspect.signature(function)
        assert signature.return_annotation == "Figure", name
        assert "    Returns\n    -------\n    Figure\n" in (function.__doc__ or ""), name
        (takes[name],) = {"ax", "figure"} & {*signature.parameters}
    one = [name for name, given in takes.items() if given == "ax"]
    assert one == ["attention_map", "critical_chart", "difference_map", "feature_timeline",
                   "trajectory", "volcano"]  # fmt: skip
    assert len(takes) == 14


def test_axes_in_no_figure_are_refused(ds: xr.Dataset) -> None:
    figure = Figure()
    ax = figure.add_subplot()
    ax.remove()
    with pytest.raises(ConfigError, match="in no figure"):
        figures.attention_map(ds, 2, ax=ax)


def test_figures_are_values_of_cells_without_pyplot(ds: xr.Dataset) -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    figure = figures.feature_timeline(ds)
    data, metadata = formatters.DisplayFormatter().format(figure)
    with Image.open(io.BytesIO(data["image/png"])) as shown:
        size = metadata["image/png"]
        assert shown.size == pytest.approx((2 * size["width"], 2 * size["height"]), abs=2)
        assert size["width"] == pytest.approx(110 * figure.get_size_inches()[0], rel=0.1)
        assert np.unique(np.asarray(shown.convert("L"))).size > 10


# --- attention ---------------------------------------------------------------------------------


def test_attention_map_shows_the_weights_query_down_key_right(ds: xr.Dataset) -> None:
    ax = axes_of(figures.attention_map(ds, 3))
    weights = ds["attention_mean"].sel(layer=3).to_numpy()
    visible = np.tril(np.ones_like(weights, bool))
    np.testing.assert_array_equal(image(ax).filled(-1), np.where(visible, weights, -1))
    left, right, bottom, top = ax.get_images()[0].get_extent()
    assert (left, top) == (-0.5, -0.5)  # origin in the upper left corner
    assert bottom == right == planted.TOKENS - 0.5
    assert ax.yaxis_inverted()
    assert not ax.xaxis_inverted()
    assert "key" in ax.get_xlabel()
    assert "query" in ax.get_ylabel()


@pytest.mark.long
def test_attention_map_of_a_head_in_given_axes(ds: xr.Dataset) -> None:
    figure = Figure()
    ax = figure.add_subplot()
    assert figures.attention_map(ds, 2, head=1, ax=ax) is figure
    assert figure.axes == [ax]
    weights = ds["attention"].sel(layer=2, head=1).to_numpy()
    assert np.ma.allclose(image(ax), weights, rtol=0, atol=0)


def test_small_multiples_have_every_layer_on_one_scale(ds: xr.Dataset) -> None:
    figure = figures.attention_layers(ds, relative=False)
    axes = panels(figure)
    assert [ax.get_title() for ax in axes] == [f"L{layer}" for layer in planted.LAYERS]
    for ax, layer in zip(axes, planted.LAYERS, strict=True):
        assert np.ma.allclose(image(ax), ds["attention_mean"].sel(layer=layer), rtol=0, atol=0)
    norms = {id(ax.get_images()[0].norm) for ax in axes}
    assert len(norms) == 1
    norm = axes[0].get_images()[0].norm
    visible = ds["attention_mean"].to_numpy()[:, np.tril(np.ones((28, 28), bool))]
    assert norm.vmin == 0
    assert norm.vmax == pytest.approx(np.quantile(visible, 0.995))


def test_small_multiples_show_ratios_to_uniform_attention(ds: xr.Dataset) -> None:
    figure = figures.attention_layers(ds)
    axes = panels(figure)
    rows = np.arange(1, planted.TOKENS + 1)[:, None]
    for ax, layer in zip(axes, planted.LAYERS, strict=True):
        expected = ds["attention_mean"].sel(layer=layer).to_numpy() * rows
        shown = ~np.ma.getmaskarray(image(ax))
        np.testing.assert_array_equal(shown, np.tril(np.ones(expected.shape, bool)))
        np.testing.assert_allclose(image(ax).data[shown], expected[shown], rtol=1e-6)
    norm = axes[0].get_images()[0].norm
    assert norm(1.0) == pytest.approx(0.5)
    # A first token that takes nearly everything leaves the scale as it is.
    loud = ds.copy(deep=True)
    loud["attention_mean"][:, :, 0] = 1
    assert panels(figures.attention_layers(loud))[0].get_images()[0].norm.vmax == norm.vmax
    labelled = [label.get_text() for label in axes[0].get_yticklabels()]
    assert {"·t4", "·t9", "·t14"} <= set(labelled)


def test_no_attention_at_all_is_at_the_end_of_the_scale(ds: xr.Dataset) -> None:
    window = ds.copy(deep=True)
    window["attention_mean"][:, 20:, :10] = 0
    figure = figures.attention_layers(window)
    shown = image(panels(figure)[0])
    assert not np.ma.getmaskarray(shown)[25, 5]
    assert shown[25, 5] < panels(figure)[0].get_images()[0].norm.vmin
    drawn_by(figure)


@pytest.mark.long
def test_small_multiples_have_a_labelled_key_within_the_page(ds: xr.Dataset) -> None:
    for draw in (figures.attention_layers, partial(figures.attention_heads, layer=4)):
        for relative, said in ((True, "ratio to uniform attention"), (False, "attention weight")):
            figure = draw(ds, relative=relative)
            assert figure.axes[-1].get_xlabel().startswith(said)
            box = drawing.box_of(figure)
            assert -0.05 < box.x0 < box.x1 < drawing.PAGE_WIDTH + 0.1  # with the space around


def test_heads_of_one_layer(ds: xr.Dataset) -> None:
    axes = panels(figures.attention_heads(ds, 4, relative=False))
    for head, ax in enumerate(axes):
        assert ax.get_title() == f"head {head}"
        assert np.ma.allclose(image(ax), ds["attention"].sel(layer=4, head=head), rtol=0, atol=0)
    assert len(axes) == planted.HEADS


def test_rows_and_layers_that_are_not_stored_are_masked() -> None:
    ds = make_trace(missing=[2])
    gone, kept = panels(figures.attention_layers(ds, layers=[2, 3]))
    assert image(gone).mask.all()
    assert not image(kept).mask.all()
    assert "not stored" in {text.get_text() for text in gone.texts}


def test_rows_that_were_not_chosen_are_masked(ds: xr.Dataset) -> None:
    chosen = synthetic.with_queries(ds, [5, 27])
    for figure, weights in (
        (figures.attention_map(chosen, 3), ds["attention_mean"].sel(layer=3)),
        (figures.attention_map(chosen, 3, head=1), ds["attention"].sel(layer=3, head=1)),
    ):
        shown = image(axes_of(figure))
        assert shown.shape == (planted.TOKENS, planted.TOKENS)
        assert np.flatnonzero(~shown.mask.all(axis=1)).tolist() == [5, 27]
        for row in (5, 27):
            np.testing.assert_array_equal(shown[row, : row + 1], weights[row, : row + 1])


def test_layers_of_a_hybrid_model(ds: xr.Dataset) -> None:
    hybrid = ds.drop_vars(["features", "top_feature", "top_activation"]).sel(layer=[2, 4])
    hybrid = hybrid.rename(layer="attention_layer")
    assert [ax.get_title() for ax in panels(figures.attention_layers(hybrid))] == ["L2", "L4"]


# --- by layer ----------------------------------------------------------------------------------


def test_pathways_have_a_line_a_scenario_and_means_of_groups(run: xr.DataTree) -> None:
    attention = analysis.attention_to(run)
    groups = catalogue.default_groups(run)
    figure = figures.pathway_strength(attention, groups=groups)
    sources = attention["source"].values.tolist()
    assert len(figure.axes) == len(sources)
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    for ax, source in zip(figure.axes, sources, strict=True):
        own = {line.get_gid(): line for line in ax.lines if line.get_gid()}
        assert set(own) == set(planted.SCENARIOS)
        for name, line in own.items():
            expected = attention.sel(scenario=name, source=source)
            np.testing.assert_array_equal(line.get_ydata(), expected)
            np.testing.assert_array_equal(line.get_xdata(), planted.LAYERS)
        thick = {line.get_label(): line for line in ax.lines if line.get_gid() is None}
        for group, members in groups.items():
            mean = attention.sel(source=source, scenario=members).mean("scenario")
            np.testing.assert_allclose(thick[group].get_ydata(), mean)


def test_spans_without_values_get_no_panel(run: xr.DataTree) -> None:
    attention = analysis.attention_to(run).copy(deep=True)
    attention.loc[{"source": "goal"}] = np.nan
    titles = [ax.get_title() for ax in figures.pathway_strength(attention).axes]
    assert titles == ["probability → decision", "balance → decision", "choices → decision"]
    found = analysis.contrast(run, "risky", "safe", what="attention", heads="each").copy(deep=True)
    found["difference"].loc[{"source": "goal"}] = np.nan
    titles = [ax.get_title() for ax in panels(figures.difference_heads(found))]
    assert titles == ["probability", "balance", "choices"]


def test_pathways_name_the_target_that_was_chosen_and_what_is_summed(run: xr.DataTree) -> None:
    several = analysis.attention_to(run, "balance", ["decision", "choices"])
    (ax,) = figures.pathway_strength(several.sel(target="choices")).axes
    assert ax.get_title() == "balance → choices"
    assert ax.get_ylabel() == "attention per token"
    (ax,) = figures.pathway_strength(analysis.attention_to(run, "choices", reduce="sum")).axes
    assert ax.get_ylabel() == "attention to all its tokens"


def test_one_scenario_is_not_a_plural(run: xr.DataTree) -> None:
    figure = figures.pathway_strength(analysis.attention_to(run).isel(scenario=[0]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["the scenario"]


def test_pathways_refuse_heads(run: xr.DataTree) -> None:
    with pytest.raises(ConfigError, match="head"):
        figures.pathway_strength(analysis.attention_to(run, heads="each"))


def test_locality_shows_mean_and_range_of_heads(run: xr.DataTree) -> None:
    found = analysis.attention_locality(run)
    figure = figures.locality(found)
    for ax, name in zip(figure.axes, analysis.attention.LOCALITY, strict=True):
        values = found[name].mean("scenario")
        np.testing.assert_allclose(ax.lines[-1].get_ydata(), values.mean("head"))
        (band,) = ax.collections
        vertices = band.get_paths()[0].vertices[:, 1]
        assert vertices.max() == pytest.approx(float(values.max()))


def test_bands_say_what_was_found() -> None:
    run = planted.make_run(planted.SCENARIOS[:5])
    found = analysis.layer_bands(run, planted.BANDS)
    figure = figures.bands(found)
    for ax, name in zip(figure.axes, found["hypothesis"].values, strict=True):
        one = found.sel(hypothesis=name)
        assert ("does not hold" in ax.get_title()) is not bool(one["supported"])
        means = [line for line in ax.collections if isinstance(line, LineCollection)]
        heights = [line.get_segments()[0][0][1] for line in means]
        np.testing.assert_allclose(heights, one["band_mean"])


def test_flow_diagram_draws_attention_between_spans(ds: xr.Dataset) -> None:
    figure = figures.flow_diagram(ds)
    apart, ax, rollout = figure.axes
    names = ["probability", "goal", "balance", "choices", "decision"]
    share = analysis.attention_to(ds, names, names, reduce="sum")
    others = share.where(share["source"] != share["target"], 0)
    widest = float(others.max())
    edges = {found.get_gid(): found for found in ax.collections}
    balance = edges["from balance"]
    ends = {
        tuple(map(tuple, line)): width
        for line, width in zip(balance.get_segments(), balance.get_linewidths(), strict=True)
    }
    expected = float(share.sel(source="balance", target="decision", layer=3)) / widest
    assert ends[(2.0, 2.0), (4.0, 3.0)] == pytest.approx(7 * expected)
    # A uniform row gives 1 / (q + 1) to each of the balance's three tokens.
    uniform = {"decision": 3 / 28, "choices": (3 / 21 + 3 / 22) / 2}
    shown = sum(
        int((others.sel(source="balance", target=target) >= max(0.15 * widest, 2 * even)).sum())
        for target, even in uniform.items()
    )
    assert len(ends) == shown > 0
    assert all(one.yaxis_inverted() for one in figure.axes)  # layers downwards, as in the viewer
    first = ds["attention_mean"].sel(query=27, key=0)
    np.testing.assert_allclose(apart.lines[-1].get_xdata(), first)
    lines = {line.get_label().split(" ")[0]: line for line in rollout.lines}
    expected_rollout = analysis.attention_rollout(ds, "goal") / 2
    np.testing.assert_allclose(lines["goal"].get_xdata(), expected_rollout)
    np.testing.assert_array_equal(lines["goal"].get_ydata(), planted.LAYERS)


def test_flow_of_one_span(ds: xr.Dataset) -> None:
    apart, ax, _ = figures.flow_diagram(ds, spans=["decision"]).axes
    assert len(apart.lines) == 1
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["decision"]


def test_flow_explains_where_rollout_ranks_otherwise(ds: xr.Dataset) -> None:
    sources = list(planted.SPANS)
    rollout = analysis.attention_rollout(ds, sources).isel(layer=-1)
    per_token = [
        float(one) / len(planted.SPANS[name]) for name, one in zip(sources, rollout, strict=True)
    ]
    by_paths = sources[int(np.argmax(per_token))]
    assert by_paths != "balance"  # to which the decision attends most, as planted
    title = figures.flow_diagram(ds).axes[2].get_legend().get_title().get_text()
    assert f"Here {by_paths} is first, but" in title.replace("\n", " ")
    assert "attends most to balance" in title.replace("\n", " ")


def test_flow_diagram_without_a_layer_says_so() -> None:
    figure = figures.flow_diagram(make_trace(missing=[2]))
    (text,) = figure.axes[2].texts
    assert "not drawn" in text.get_text()


# --- contrasts ---------------------------------------------------------------------------------


def test_difference_map_is_centred_on_zero(run: xr.DataTree) -> None:
    found = analysis.contrast(run, "risky", "safe", what="attention")
    found["p_familywise"] = xr.where(np.abs(found["difference"]) > 0.05, 0.01, 1.0)
    ax = axes_of(figures.difference_map(found, names=("risky", "safe")))
    np.testing.assert_array_equal(image(ax), found["difference"].transpose("source", "layer"))
    norm = ax.get_images()[0].norm
    assert norm(0.0) == 0.5
    assert norm.vmax == -norm.vmin == float(np.abs(found["difference"]).max())
    dots = ax.lines[0].get_xydata()
    rows, columns = np.nonzero((found["p_familywise"] <= 0.05).transpose("source", "layer").values)
    np.testing.assert_array_equal(dots, np.stack([columns, rows], axis=1))
    assert len(dots) > 0


def test_figures_of_a_contrast_say_why_nothing_is_marked(run: xr.DataTree) -> None:
    few = {"a": ["Risky_0", "Risky_1"], "b": ["Safe_0", "Safe_1"]}
    for what, draw in (("attention", figures.difference_map), ("features", figures.volcano)):
        found = analysis.contrast(run, *few.values(), what=what)
        assert found.attrs["smallest_p"] > 0.05
        text = "".join(part.get_text() for part in draw(found).findobj(mpl.text.Text))
        assert "2 against 2 scenarios are too few for any p ≤ 0.05" in text
        assert "•" not in text
        assert "more in" not in text
        enough = analysis.contrast(run, "risky", "safe", what=what)
        enough["p_familywise"] = xr.ones_like(enough["p_familywise"])
        text = "".join(part.get_text() for part in draw(enough).findobj(mpl.text.Text))
        assert "nothing reaches familywise p ≤ 0.05, which takes |g|" in text


def test_difference_by_head(run: xr.DataTree) -> None:
    found = analysis.contrast(run, "risky", "safe", what="attention", heads="each")
    axes = panels(figures.difference_heads(found))
    largest = float(np.abs(found["difference"]).max())
    for ax, source in zip(axes, found["source"].values, strict=True):
        expected = found["difference"].sel(source=source).transpose("layer", "head")
        np.testing.assert_array_equal(image(ax), expected)
        assert ax.get_images()[0].norm.vmax == largest
    some = figures.difference_heads(found.isel(head=slice(1, None)))
    labels = [label.get_text() for label in panels(some)[0].get_xticklabels()]
    assert labels == [str(head) for head in found["head"].to_numpy()[1:]]


def test_contrasts_are_not_mixed_up(run: xr.DataTree) -> None:
    attention = analysis.contrast(run, "risky", "safe", what="attention")
    with pytest.raises(ConfigError, match="source, layer, head"):
        figures.difference_heads(attention)
    with pytest.raises(ConfigError, match="volcano"):
        figures.volcano(attention)


@pytest.mark.parametrize("p", ["p_welch", "p_permutation"])
def test_volcano_shows_every_feature(run: xr.DataTree, p: Any) -> None:
    found = analysis.contrast(run, "risky", "safe")
    ax = axes_of(figures.volcano(found, p=p, names=("risky", "safe")))
    clouds = [line for line in ax.lines if line.get_linestyle() == "None"]
    points = np.concatenate([line.get_xydata() for line in clouds])
    known = np.isfinite(found[p].values)
    expected = np.stack([found["difference"], -np.log10(found[p])], axis=1)[known]
    np.testing.assert_allclose(
        points[np.lexsort(points.T)], expected[np.lexsort(expected.T)], atol=1e-12
    )
    assert ax.get_xlim()[0] == -ax.get_xlim()[1]
    if p == "p_welch":
        assert "L4 · 5" in {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("seed", range(3))
def test_names_cover_no_point_and_no_other_name(run: xr.DataTree, seed: int) -> None:
    found = analysis.contrast(run, "risky", "safe").copy(deep=True)
    rng = np.random.default_rng(seed)
    rows = found.sizes["row"]
    found["difference"] = ("row", rng.normal(1, 2, rows))
    found["p_welch"] = ("row", 10 ** -(rng.beta(2, 3, rows) * 8))
    found["p_familywise"] = ("row", np.where(found["p_welch"] < 1e-4, 0.01, 1.0))
    names = {
        (int(layer), int(feature)): "a label of some length"
        for layer, feature in zip(found["layer"], found["feature"], strict=True)
    }
    figure = figures.volcano(found, labels=names)
    figure.dpi = 300  # of a print, whose letters are wider than those of a screen
    figure.draw_without_rendering()
    ax = axes_of(figure)
    boxes = [mpl.text.Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == 8
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    values = np.stack([found["difference"], -np.log10(found["p_welch"])], axis=1)
    points = ax.transData.transform(values[np.isfinite(values).all(axis=1)])
    for box in boxes:
        assert ax.bbox.fully_containsx(box.x0)
        assert ax.bbox.fully_containsx(box.x1)
        assert not box.count_contains(points)


def test_critical_chart(run: xr.DataTree) -> None:
    found = analysis.critical_layers(run)
    ax = axes_of(figures.critical_chart(found))
    own, others = (found[name].transpose("source", "layer") for name in ("attention", "control"))
    np.testing.assert_allclose(image(ax), np.log2(own) - np.log2(others))
    assert ax.get_images()[0].norm(0.0) == 0.5
    assert len(ax.lines[0].get_xdata()) == int(found["critical"].sum())


# --- features ----------------------------------------------------------------------------------


def test_feature_timeline(ds: xr.Dataset) -> None:
    ax = axes_of(figures.feature_timeline(ds, [(3, 5), (1, 7)]))
    expected = [ds["features"].sel(layer=layer, feature=f) for layer, f in ((3, 5), (1, 7))]
    np.testing.assert_array_equal(image(ax), expected)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["L3 · 5", "L1 · 7"]
    assert ax.yaxis_inverted()
    assert ax.get_xticklabels()[0].get_text() == "·t0"
    strongest = axes_of(figures.feature_timeline(ds))
    np.testing.assert_array_equal(image(strongest), ds["features"].max("feature"))
    with pytest.raises(ConfigError, match="no feature 24"):
        figures.feature_timeline(ds, (1, 24))
    with pytest.raises(ConfigError, match="feature 5 of which layer"):
        figures.feature_timeline(ds, 5)


def test_unrelated_features_get_bars_and_no_line(run: xr.DataTree) -> None:
    found = analysis.feature_trajectory(run, [(3, 5), (1, 5), (2, 7)])
    groups = {"a": ["Risky_2"], "b": [name for name in run.children if name != "Risky_2"]}
    ax = axes_of(figures.trajectory(found, groups=groups))
    assert all(line.get_linestyle() == "None" for line in ax.lines if len(line.get_xdata()) > 2)
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    expected = [found.sel(scenario=members).mean("scenario") for members in groups.values()]
    np.testing.assert_allclose(heights, expected, rtol=1e-6)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["L3 · 5", "L1 · 5", "L2 · 7"]
    members = groups["b"]
    found = found.copy(deep=True)  # as if a scenario had no such place
    found.loc[{"scenario": members[0]}] = np.nan
    _, others = axes_of(figures.trajectory(found, groups=groups)).containers
    np.testing.assert_allclose(
        [bar.get_height() for bar in others], found.sel(scenario=members).mean("scenario"), 1e-6
    )
    with pytest.raises(ConfigError, match="place"):
        figures.trajectory(analysis.feature_trajectory(run, (3, 5), ["goal", "balance"]))


def test_one_sae_of_all_layers_gets_a_line(run: xr.DataTree) -> None:
    shared = run.map_over_datasets(
        lambda ds: (
            ds.assign_coords(sae_id=("layer", ["crosscoder"] * ds.sizes["layer"]))
            if "layer" in ds.dims
            else ds
        )
    )
    found = analysis.feature_trajectory(shared, 5)
    ax = axes_of(figures.trajectory(found))
    assert not ax.containers
    own = {line.get_gid(): line.get_ydata() for line in ax.lines if line.get_gid()}
    np.testing.assert_array_equal(own["Risky_2"], found.sel(scenario="Risky_2"))
    several = axes_of(figures.trajectory(analysis.feature_trajectory(shared, [5, 6])))
    assert len(several.containers[0]) == 2 * run["Risky_2"].sizes["layer"]


def test_special_tokens_are_left_out_unless_asked_for(ds: xr.Dataset) -> None:
    special = np.arange(ds.sizes["key"]) < 2
    loud = ds.copy(deep=True).assign_coords(special=("key", special))
    loud["features"][:, :2] = 1e6
    loud["top_activation"][:, :2] = 1e6
    (image,) = axes_of(figures.feature_timeline(loud)).images
    drawn = image.get_array()
    assert drawn is not None
    assert np.ma.getmaskarray(drawn)[:, special].all()
    assert image.norm.vmax < 1e6
    (image,) = axes_of(figures.feature_timeline(loud, special=True)).images
    assert np.asarray(image.get_array()).max() == 1e6
    below = panels(figures.integrated_view(loud, sources=["balance"], count=4))[-1]
    scaled = np.ma.masked_invalid(below.images[0].get_array())
    assert np.ma.getmaskarray(scaled)[:, special].all()
    assert scaled.max() == 1


def test_integrated_view(run: xr.DataTree, ds: xr.Dataset) -> None:
    words = analysis.word_associations(run)
    figure = figures.integrated_view(ds, words=words, count=8)
    above, below = panels(figure)
    expected = ds["attention_mean"].isel(query=-1).transpose("layer", "key")
    assert np.ma.allclose(image(above), expected, rtol=0, atol=0)
    names = [label.get_text() for label in below.get_yticklabels()]
    assert len(names) == 8
    drawn = {text.get_text() for text in below.texts}
    for row, name in zip(image(below), names, strict=True):
        layer, feature = map(int, name.removeprefix("L").split(" · "))
        values = ds["features"].sel(layer=layer, feature=feature)
        np.testing.assert_allclose(row, values / values.max())
        known = words.where((words.layer == layer) & (words.feature == feature), drop=True)
        best = known["word"].values[:3]
        assert "  ".join(labels.token_label(word) for word in best) in drawn


def test_integrated_view_draws_the_strongest_over_all_layers(ds: xr.Dataset) -> None:
    """Also where several of them are in one layer."""
    found = analysis.pathway_features(ds, "balance", top=FEATURES)
    score = found["score"].fillna(0).to_series().abs().sort_values(ascending=False)[:6]
    expected = {(layer, int(found["feature"].sel(layer=layer, rank=rank)))
                for layer, rank in score[score > 0].index}  # fmt: skip
    assert len({layer for layer, _ in expected}) < len(expected) == 6
    below = panels(figures.integrated_view(ds, sources=["balance"], count=6))[1]
    names = [label.get_text() for label in below.get_yticklabels()]
    drawn = [tuple(map(int, name.removeprefix("L").split(" · "))) for name in names]
    assert {*drawn} == expected
    assert [layer for layer, _ in drawn] == sorted(layer for layer, _ in drawn)
    below = panels(figures.integrated_view(ds.sel(layer=[3]), count=12))[1]
    assert len(below.get_yticklabels()) == 12


def test_integrated_view_names_what_the_decision_attends_to(ds: xr.Dataset) -> None:
    above = panels(figures.integrated_view(ds))[0]
    norm = above.get_images()[0].norm
    # Nothing but the first token may be off the scale.
    assert norm.vmax == ds["attention_mean"].isel(query=-1).to_numpy()[:, 1:].max()
    named = {
        text.get_text(): text.xy for text in above.texts if isinstance(text, mpl.text.Annotation)
    }
    strongest = ds["attention_mean"].isel(query=-1).sel(key=slice(1, None))
    at = {name: int(index) for name, index in strongest.argmax(("layer", "key")).items()}
    assert named[f"·t{at['key'] + 1}"] == (at["key"] + 1, at["layer"])


# --- colours of spans --------------------------------------------------------------------------


def _colours_of_the_viewer(name: str) -> list[str]:
    script = Path(zt.__file__).parent / "viewer" / "page" / "draw.js"
    (line,) = re.findall(rf"{name} = (\[.*?\]);", script.read_text())
    return list(json.loads(line))


def test_spans_have_the_colours_that_the_viewer_gives_them() -> None:
    assert list(drawing.SPAN_COLOURS) == _colours_of_the_viewer("LIGHT_SPANS")
    assert len(_colours_of_the_viewer("DARK_SPANS")) == len(drawing.SPAN_COLOURS) >= 8


# Machado, Oliveira & Fernandes (2009), severity 1: linear RGB as people without one cone see it.
VISION = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
# From linear sRGB to XYZ, relative to the white of D65 (IEC 61966-2-1).
XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def _linear(colours: Iterable[str]) -> np.ndarray:
    shares = np.array([mpl.colors.to_rgb(colour) for colour in colours])
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize(("name", "paper"), [("LIGHT_SPANS", "#ffffff"), ("DARK_SPANS", "#11161f")])
def test_readers_with_any_vision_tell_spans_apart_and_can_read_them(name: str, paper: str) -> None:
    colours = _colours_of_the_viewer(name)
    for vision, matrix in VISION.items():
        seen = np.clip(_linear(colours) @ np.transpose(matrix), 0, 1)
        x, y, z = np.cbrt(seen @ XYZ.T / XYZ.sum(1)).T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)  # CIE 1976
        distance = np.linalg.norm(lab[:, None] - lab, axis=-1)
        pairs = distance[np.triu_indices(len(colours), 1)]
        assert pairs.min() > 10, vision  # four times what people just notice
    light, back = (_linear(of) @ XYZ[1] + 0.05 for of in (colours, [paper]))
    assert np.maximum(light / back, back / light).min() >= 4.5  # WCAG 2.2, contrast of text


def test_a_span_has_one_colour_in_every_figure(ds: xr.Dataset) -> None:
    # The decision is not last, and a span without tokens has a colour of its own.
    order = ["choices", "decision", "nowhere", "balance", "goal", "probability"]
    spans = {"nowhere": {"characters": [], "tokens": []}, **ds.attrs["spans"]}
    other = ds.assign_attrs(spans={name: spans[name] for name in order})
    colours = dict(zip(order, drawing.SPAN_COLOURS, strict=False))
    figure = figures.flow_diagram(other, spans=["balance", "decision"])
    ticks = figure.axes[1].get_xticklabels()
    assert {tick.get_text(): tick.get_color() for tick in ticks} == {
        name: colours[name] for name in ("balance", "decision")
    }
    for found in (
        figures.integrated_view(other),
        figures.attention_map(other, 3),
        figures.feature_timeline(other),
        figures.attention_layers(other),
    ):
        texts = {t.get_text().removeprefix("■ "): t for t in found.findobj(mpl.text.Text)}
        shown = {name: texts[name].get_color() for name in order if name in texts}
        assert shown == {name: colours[name] for name in order if name != "nowhere"}


# --- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" balance", "·balance"),
        (".\n", ".↵"),
        ("\t", "⇥"),
        ("", '""'),
        ("🎰", "<U+1F3B0>"),
        ("\u202eabc", "<U+202E>abc"),
        (" Ω", "·Ω"),
        ("antidisestablishment", "antidisestabl…"),
    ],
)
def test_token_label(text: str, label: str) -> None:
    assert labels.token_label(text) == label


def test_labels_are_thinned_and_the_important_ones_stay() -> None:
    assert labels.thinned(10, inches=7, size=6) == list(range(10))
    shown = labels.thinned(500, inches=5, size=6, keep=[251, 252])
    assert 251 in shown
    assert 252 not in shown
    gaps = np.diff(shown)
    assert gaps.min() * 5 * 72 / 500 >= 6
    assert len(shown) > 25


def test_every_label_is_readable_text(ds: xr.Dataset) -> None:
    ax = axes_of(figures.attention_map(ds, 1))
    drawn_by(ax.figure)
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    for before, after in itertools.pairwise(boxes):
        assert before.x1 <= after.x0 + 1


def hostile_trace() -> xr.Dataset:
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(planted.TOKENS)]
    coords = {"query_token": ("query", texts), "key_token": ("key", texts)}
    found = make_trace().assign_coords(coords)
    name = "<script>alert(1)</script> 🎰 $a$ $b$"
    return found.assign_attrs(scenario=name)


@pytest.mark.long
def test_hostile_text_is_drawn_as_text_without_warnings() -> None:
    ds = hostile_trace()
    words = analysis.word_associations(ds)
    for figure in (
        figures.attention_map(ds, 1),
        figures.attention_layers(ds),
        figures.attention_heads(ds, 1),
        figures.feature_timeline(ds),
        figures.integrated_view(ds, words=words),
        figures.flow_diagram(ds),
    ):
        drawn_by(figure)
        shown = [text for text in figure.findobj(mpl.text.Text) if "$" in text.get_text()]
        assert not any(text.get_parse_math() for text in shown)


# --- files -------------------------------------------------------------------------------------


def test_metadata_is_in_the_files(ds: xr.Dataset, run: xr.DataTree, tmp_path: Path) -> None:
    ds = ds.assign_attrs(saes={"features": {"release": "llama_scope_lxr_8x"}})
    figure = figures.feature_timeline(ds)
    png = figures.save(figure, tmp_path / "a.png", ds, title="Timeline", dpi=50)
    with Image.open(png) as opened:
        text = opened.text  # type: ignore[attr-defined]
    assert text["Title"] == "Timeline"
    assert text["zarrtrace:model"] == "fake/model"
    assert text["zarrtrace:sae_release"] == "llama_scope_lxr_8x"
    assert text["zarrtrace:scenario"] == "Risky_0"
    assert text["zarrtrace:zarrtrace_version"] == "0"
    assert text["Software"] == f"zarrtrace {text['zarrtrace:figures_version']}"
    pdf = figures.save(figure, tmp_path / "a.pdf", ds, title="Timeline", dpi=50).read_bytes()
    assert b"llama_scope_lxr_8x" in pdf
    assert b"/Title (Timeline)" in pdf
    assert b"CreationDate" not in pdf
    found = figures.metadata_of(analysis.attention_to(run, "balance"))
    assert found["analysis"] == "attention_to"
    assert json.loads(found["parameters"])["source"] == ["balance"]
    assert found["scenario"].split(", ") == list(planted.SCENARIOS)
    with pytest.raises(ConfigError, match="svg"):
        figures.save(figure, tmp_path / "a.svg", ds)


def test_pdf_has_fonts_and_text(ds: xr.Dataset, run: xr.DataTree, tmp_path: Path) -> None:
    contrast = analysis.contrast(run, "risky", "safe")
    for number, figure in enumerate((figures.flow_diagram(ds), figures.volcano(contrast))):
        content = figures.save(figure, tmp_path / f"{number}.pdf", ds, dpi=50).read_bytes()
        assert content.count(b"/FontFile2") > 0  # TrueType, embedded
        assert b"/Subtype /Type3" not in content
        streams = re.findall(rb"/FlateDecode.*?stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)
        pages = b"".join(zlib.decompressobj().decompress(one) for one in streams)
        written = [t for t in figure.findobj(mpl.text.Text) if t.get_text() and t.get_visible()]
        assert pages.count(b"\nBT") >= len(written) / 2


@pytest.mark.long
def test_images_in_a_pdf_need_no_mask(ds: xr.Dataset, tmp_path: Path) -> None:
    figure = figures.attention_heads(ds, 4)  # which leaves later keys out
    content = figures.save(figure, tmp_path / "a.pdf", ds, dpi=50).read_bytes()
    assert content.count(b"/Subtype /Image") >= planted.HEADS
    assert b"/SMask" not in content


def test_png_has_the_dots_it_should(ds: xr.Dataset, tmp_path: Path) -> None:
    figure = figures.attention_layers(ds)
    with Image.open(figures.save(figure, tmp_path / "a.png", ds, dpi=100)) as opened:
        assert opened.info["dpi"] == pytest.approx((100, 100), abs=0.1)
        assert abs(opened.width - 100 * figure.get_size_inches()[0]) < 60


def test_settings_of_the_caller_stay(ds: xr.Dataset) -> None:
    before = dict(mpl.rcParams)
    figures.attention_layers(ds)
    assert dict(mpl.rcParams) == before


@pytest.mark.long
def test_pyplot_is_never_imported() -> None:
    code = (
        "import sys, zarrtrace.figures as f\n"
        "assert 'matplotlib' not in sys.modules, 'lazy'\n"
        "f.attention_layers, f.draw_run, f.volcano, f.integrated_view, f.flow_diagram\n"
        "assert 'matplotlib.figure' in sys.modules\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the set -----------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.files: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        link = found.get("src") or found.get("href") or "#"
        if not link.startswith("#"):
            self.files.append(link)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_set_of_a_run(tmp_path: Path) -> None:
    names = ("Risky_1", "Risky_2", "Safe_1", "Safe_2")
    run = fakes.make_run(tmp_path, scenarios=names, tokens=[18, 19, 19, 20])
    done: list[tuple[int, int, str]] = []
    output = tmp_path / "out"
    index = figures.draw_run(
        run.path,
        output,
        scenarios=["Risky_2"],
        formats=["png"],
        dpi=40,
        progress=lambda *at: done.append(at),
    )
    shown = _Page(index)
    files = {file.name for file in output.iterdir()} - {"index.html"}
    assert set(shown.files) == files
    for key in ("integrated", "layers", "heads", "flow", "timeline"):
        assert f"Risky_2_{key}.png" in files
    for key in ("pathways", "critical", "difference", "heads", "volcano", "locality"):
        assert f"run_{key}.png" in files
    assert not any(file.startswith("Risky_1") for file in files)
    assert done[-1] == (12, 12, "Risky_2_timeline")
    # The suite states none.
    assert "Hypothesised bands" not in shown.text
    found = analysis.attention_locality(zt.open_run(run.path))
    assert "?" not in _texts_of(figures.locality(found))


def test_only_figures_replace_figures(
    shared_run: fakes.FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for of in ("OF_RUN", "OF_SCENARIO"):  # one figure over scenarios, one of each
        monkeypatch.setattr(catalogue, of, getattr(catalogue, of)[:1])
    names = list(shared_run.truth)
    out, mine = tmp_path / "out", tmp_path / "mine"

    def draw(**how: Any) -> Path:
        return figures.draw_run(
            shared_run.path, out, scenarios=names[:1], formats=["png", "pdf"], dpi=30, **how
        )

    page = draw()
    assert draw() == page
    files = sorted(out.iterdir())
    assert [file.suffix for file in files].count(".png") == 2
    assert [file.suffix for file in files].count(".pdf") == 2
    (out / "notes.html").write_text("mine")
    mine.write_text("mine")
    for file in files:
        content = file.read_bytes()
        for put in (lambda file: file.write_text("mine"), lambda file: file.symlink_to(mine)):
            file.unlink()
            put(file)
            before = fakes.files_in(tmp_path)
            with pytest.raises(ConfigError, match=rf"(?s){file.name}.*not written.*--overwrite"):
                draw()
            assert fakes.files_in(tmp_path) == before
        file.unlink()
        file.write_bytes(content)
    page.write_text("mine")
    draw(overwrite=True)
    assert page.read_text() != "mine"
    assert (out / "notes.html").read_text() == mine.read_text() == "mine"


@pytest.mark.long
def test_bands_are_drawn_if_the_suite_states_them(tmp_path: Path) -> None:
    names = ("Risky_1", "Risky_2", "Safe_1", "Safe_2")
    stated = {"bands": {"local": (1, 1), "task": (2, 2), "decision": (3, 3)}}
    run = fakes.make_run(tmp_path, scenarios=names, tokens=[8, 9, 9, 10], stated=stated)
    figures.draw_run(run.path, tmp_path / "out", scenarios=["Risky_2"], formats=["png"], dpi=40)
    assert (tmp_path / "out" / "run_bands.png").exists()
    found = analysis.attention_locality(zt.open_run(run.path))
    figure = figures.locality(found, bands=zt.open_run(run.path).attrs["bands"])
    assert "task?" in _texts_of(figure)


def _texts_of(figure: Figure) -> str:
    return " ".join(text.get_text() for ax in figure.axes for text in ax.texts)


@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "drawn", "not_drawn"),
    [
        ({"features": 0}, {"S_layers", "S_heads", "S_flow"}, {"S_timeline", "S_integrated"}),
        ({"attention": False}, {"S_timeline"}, {"S_layers", "S_heads", "S_flow", "run_pathways"}),
    ],
)
def test_runs_with_half_of_it_and_one_group(
    tmp_path: Path, sizes: dict[str, Any], drawn: set[str], not_drawn: set[str]
) -> None:
    run = fakes.make_run(tmp_path, scenarios=("S",), **sizes)
    index = figures.draw_run(run.path, tmp_path / "out", formats=["png"], dpi=40)
    files = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert drawn <= files
    assert not not_drawn & files
    text = _Page(index).text
    assert "no two groups of scenarios" in text
    assert "no-features" in text or "no-attention" in text


def test_the_page_escapes_everything() -> None:
    name = "<script>alert('x')</script>\"&"
    task = page._Task("layers", name, "a b&c")
    bad = page._Task("flow", name, "x")
    run = xr.DataTree.from_dict({"/": xr.Dataset(), "t": hostile_trace()}, name="<i>run")
    run.attrs = {"kind": "run", "scenarios": ["t"]}
    html = page._page(
        run,
        [name],
        [page._Result(task, ("a b&c.png",)), page._Result(bad, why_not="<b>no</b>")],
        at="a <b>",
    )
    assert "<script" not in html
    assert "<b>no" not in html
    assert "<i>run" not in html
    assert 'src="a%20b%26c.png"' in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;" in html


@pytest.mark.long
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1440, "dark")])
def test_the_page_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    names = [f"A_rather_long_name_of_scenario_{number}" for number in range(12)]
    traces = {name: make_trace() for name in names[:2]}
    run = xr.DataTree.from_dict({"/": xr.Dataset(), **traces}, name="run")
    run.attrs = {"kind": "run", "scenarios": names[:2]}
    Image.new("RGB", (2000, 1500), "white").save(tmp_path / "one.png")
    task = page._Task("layers", names[0], "one")
    html = page._page(run, names, [page._Result(task, ("one.png", "one.pdf"))], at="runs/run")
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.goto((tmp_path / "index.html").as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    tops = opened.eval_on_selector_all("nav a", "all => all.map(a => a.offsetTop)")
    assert len(set(tops)) > 1  # the links wrap
    paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    command = opened.text_content("code")
    assert command == f"zarrtrace view runs/run --show 'scenario={names[0]}&layer=3'"
    opened.click("figure img")
    assert opened.url.endswith("/one.png")
    assert not complaints
    opened.close()


def test_names_of_files_are_harmless_and_differ() -> None:
    stems = page._stems(["../a", "a", "A", "run", "你好", "b<c"])
    assert stems == ["a", "a_2", "A_3", "run_2", "scenario", "b_c"]


def test_groups(run: xr.DataTree) -> None:
    assert catalogue.default_groups(run) == {
        "risky": list(RISKY),
        "safe": list(SAFE),
    }
    assert catalogue.default_groups(planted.make_run(RISKY)) == {}


def test_strongest_layer(ds: xr.Dataset) -> None:
    assert catalogue.strongest_layer(ds) == 3


def test_a_trace_is_drawn_as_a_scenario_of_its_run(
    shared_run: fakes.FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for of in ("OF_RUN", "OF_SCENARIO"):
        monkeypatch.setattr(catalogue, of, getattr(catalogue, of)[:1])
    figures.draw_run(shared_run.path, tmp_path / "run", scenarios=["Safe_1"], dpi=30)
    figures.draw_run(shared_run.trace, tmp_path / "trace", dpi=30)
    assert fakes.files_in(tmp_path / "trace") == fakes.files_in(tmp_path / "run")
    with pytest.raises(ScenarioError, match="Risky_2"):
        figures.draw_run(shared_run.trace, tmp_path / "other", scenarios=["Risky_2"])
    zt.store.copy_run(shared_run.trace, tmp_path / "alone" / "Safe_1")
    with pytest.raises(NotATraceError, match="is a trace, not a run"):
        figures.draw_run(tmp_path / "alone" / "Safe_1", tmp_path / "other")


def test_unknown_scenario_and_format(shared_run: fakes.FakeRun, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="Nobody"):
        figures.draw_run(shared_run.path, tmp_path / "out", scenarios=["Nobody"])
    with pytest.raises(ConfigError, match="svg"):
        figures.draw_run(shared_run.path, tmp_path / "out", formats=["svg"])
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_processes_draw_the_same_files(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Risky_1",))
    tasks = page._tasks(["Risky_1"], has_bands=False)
    some = [tasks[0], *tasks[-2:]]
    for workers in (1, 2):
        out = tmp_path / str(workers)
        out.mkdir()
        draw = partial(page._draw, locate(run.path), str(out), formats=("png",), dpi=40)
        drawn = list(page._in_processes(draw, some, workers))
        assert sorted(some, key=repr) == sorted((one.task for one in drawn), key=repr)
    assert len(fakes.files_in(tmp_path / "1")) == 3
    assert fakes.files_in(tmp_path / "1") == fakes.files_in(tmp_path / "2")


def test_command(
    shared_run: fakes.FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OF_RUN", "OF_SCENARIO"):  # a test above draws all of them
        monkeypatch.setattr(catalogue, name, getattr(catalogue, name)[:1])
    output = tmp_path / "out"
    arguments = [str(shared_run.path), "-o", str(output), "--scenario", "Safe_1"]
    options = ["--format", "pdf", "--dpi", "40", "--quiet"]
    result = CliRunner().invoke(command, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.strip() == str(output / "index.html")
    assert {file.suffix for file in output.iterdir()} == {".html", ".pdf"}
    assert CliRunner().invoke(command, [*arguments, "--format", "svg"]).exit_code == 2


def test_command_draws_special_tokens_if_asked_for(
    shared_run: fakes.FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def note(name: str, draw: Any) -> Any:
        def noted(*args: Any, special: bool, **options: Any) -> Any:
            asked.append((name, special))
            return draw(*args, special=special, **options)

        return noted

    for home, name in ((integrated, "integrated_view"), (features, "feature_timeline")):
        monkeypatch.setattr(home, name, note(name, getattr(home, name)))
    monkeypatch.setattr(catalogue, "OF_RUN", ())
    special = [drawing for drawing in catalogue.OF_SCENARIO if drawing.has_special]
    monkeypatch.setattr(catalogue, "OF_SCENARIO", special)
    for options in ([], ["--special"]):
        arguments = [str(shared_run.path), "-o", str(tmp_path), "--scenario", "Safe_1", "--quiet"]
        result = CliRunner().invoke(command, [*arguments, "--dpi", "40", *options])
        assert result.exit_code == 0, result.output
    names = ["integrated_view", "feature_timeline"]
    assert asked == [(name, special) for special in (False, True) for name in names]


def test_the_bar_says_which_figure_was_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared, "show_progress", lambda *, quiet: not quiet)
    with shared.bar("figures", quiet=False, unit="figure") as progress:
        progress(3, 57, "Risky_40_flow")
    assert "3/57" in (drawn := capsys.readouterr().err)
    assert "Risky_40_flow" in drawn
