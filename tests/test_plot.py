"""``zt.plot``: what is drawn is what is stored, with its tokens, the right way up."""

from __future__ import annotations

from collections.abc import Iterator

import fakes
import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr

import zarrtrace as zt
from zarrtrace.errors import ConfigError

mpl.use("agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figure_is_left() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def ds(shared_run: fakes.FakeRun) -> xr.Dataset:
    return zt.open_trace(shared_run.trace)


def image_of(ax: plt.Axes) -> np.ndarray:
    (image,) = ax.get_images()
    return np.ma.filled(image.get_array(), np.nan)


@pytest.mark.parametrize("reader", [zt.open_trace, xr.open_zarr])
def test_attention_is_drawn_as_it_is_stored(reader, shared_run: fakes.FakeRun) -> None:
    truth = shared_run.truth["Safe_1"]["attention"][1, 1]
    ds = reader(shared_run.trace)
    for data in (
        lambda: zt.plot.attention(ds, layer=2, head=1),
        lambda: zt.plot.attention(ds.attention, layer=2, head=1),
        lambda: zt.plot.attention(ds.attention.sel(layer=2), head=1),
        lambda: zt.plot.attention(ds.attention.sel(layer=2, head=1).transpose("key", "query")),
    ):
        ax = data()
        np.testing.assert_allclose(image_of(ax), truth, rtol=1e-6)
        assert "layer 2, head 1" in ax.get_title()
        bottom, top = ax.get_ylim()
        assert bottom > top  # the first query is above
        left, right = ax.get_xlim()
        assert left < right


def test_mean_over_heads(ds: xr.Dataset, shared_run: fakes.FakeRun) -> None:
    truth = shared_run.truth["Safe_1"]["attention"][0].mean(0)
    for data in (ds, ds.attention, ds.attention_mean):
        ax = zt.plot.attention(data, layer=1)
        np.testing.assert_allclose(image_of(ax), truth, rtol=1e-5)
        assert "layer 1, mean over heads" in ax.get_title()


def test_axes_have_the_tokens_that_were_selected(ds: xr.Dataset) -> None:
    names = np.array(["one", "two\n", "$3", "$4$", " five", "\t", ""], object)
    ds = ds.assign_coords(key_token=("key", names), query_token=("query", names))
    shown = ["one", "two↵", "$3", "$4$", "·five", "⇥", '""']
    ax = zt.plot.attention(ds, layer=1)
    ax.figure.canvas.draw()  # "$4$" is no formula
    assert [label.get_text() for label in ax.get_xticklabels()] == shown
    assert [label.get_text() for label in ax.get_yticklabels()] == shown
    ax = zt.plot.attention(ds.attention.sel(layer=1, query=[5, 2], key=slice(1, 3)))
    assert [label.get_text() for label in ax.get_xticklabels()] == shown[1:4]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["⇥", "$3"]


def test_one_query_is_drawn_as_bars(ds: xr.Dataset, shared_run: fakes.FakeRun) -> None:
    names = np.array(["one", "two\n", "$3", "$4$", " five", "\t", ""], object)
    ds = ds.assign_coords(query_token=("query", names))
    ax = zt.plot.attention(ds.attention.sel(layer=3, head=0, query=1))
    found = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(found, shared_run.truth["Safe_1"]["attention"][2, 0, 1], rtol=1e-6)
    assert ax.get_title() == "layer 3, head 0, query 1 two↵"
    ax.figure.canvas.draw()


def test_rows_that_are_not_stored_are_no_zeros(ds: xr.Dataset) -> None:
    weights = ds.attention.sel(layer=1, head=0).load().copy()
    weights[2] = np.nan
    found = image_of(zt.plot.attention(weights))
    assert np.isnan(found[2]).all()
    assert not np.isnan(np.delete(found, 2, 0)).any()


def test_axes_are_the_caller_s_or_pyplot_s(ds: xr.Dataset) -> None:
    _, ax = plt.subplots()
    assert zt.plot.attention(ds, layer=1, ax=ax) is ax
    assert plt.get_fignums() == [1]
    assert zt.plot.attention(ds, layer=1).figure is plt.gcf()  # which notebooks show
    assert len(plt.get_fignums()) == 2


@pytest.mark.parametrize(
    ("choose", "options", "message"),
    [
        (lambda ds: ds, {}, r"several layers\nGive layer=…, one of 1, 2, 3"),
        (lambda ds: ds, {"layer": 9}, r"no layer 9\nThey have 1, 2, 3"),
        (lambda ds: ds, {"layer": 1, "head": 5}, r"no head 5\nThey have 0, 1"),
        (lambda ds: ds.attention_mean, {"layer": 1, "head": 0}, r"no head 0\nThey have none"),
        (lambda ds: ds.features, {"layer": 1}, r"cannot draw an array over \(query, feature\)"),
        (lambda ds: ds[["features"]], {"layer": 1}, r"has no attention\n.*\nIt has: features"),
        (lambda ds: ds.attention[0, 0].isel(key=0), {}, r"over \(query\)"),
    ],
)
def test_errors_say_what_to_choose(ds: xr.Dataset, choose, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zt.plot.attention(choose(ds), **options)
    assert plt.get_fignums() == []


def test_a_line_stands_where_generated_tokens_begin(ds: xr.Dataset) -> None:
    marked = ds.assign_coords(generated=("key", np.asarray(ds["key"]) >= 4))

    def lines(ax: plt.Axes) -> list[list[list[float]]]:
        return [[list(line.get_xdata()), list(line.get_ydata())] for line in ax.get_lines()]

    across, down = [[3.5, 3.5], [0, 1]], [[0, 1], [3.5, 3.5]]
    assert lines(zt.plot.attention(marked, layer=2)) == [across, down]
    # Of some tokens, where they begin among these; of one query, along its keys.
    part = marked.attention.sel(layer=2, head=1).isel(query=slice(2, None), key=slice(3, None))
    assert lines(zt.plot.attention(part)) == [[[0.5, 0.5], [0, 1]], [[0, 1], [1.5, 1.5]]]
    assert lines(zt.plot.attention(part.isel(query=-1))) == [[[0.5, 0.5], [0, 1]]]
    assert lines(zt.plot.attention(ds, layer=2)) == []
