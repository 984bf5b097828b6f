"""A program of a stranger, who has the wheel alone: it runs, and mypy --strict knows its types.

``scripts/check_package`` does both in an empty environment. An ``Any`` where a type should be makes
``assert_type`` fail; a name that does not exist and is not noticed makes its ``ignore`` unused.

    python downstream.py FOLDER     # which holds stores of tests/data/format2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import zarrtrace as zt
from zarrtrace import open_run
from zarrtrace.accessors import RunAccessor, TraceAccessor
from zarrtrace.errors import ConfigError
from zarrtrace.index import FeatureUse
from zarrtrace.store import Problem, RunSummary
from zarrtrace.viewer.notebook import View

if TYPE_CHECKING:
    from zarrtrace.viewer.widget import ViewWidget  # whose module needs anywidget

    def never_run(model: str) -> None:
        """Need torch."""
        assert_type(zt.extract("runs/a", ["A prompt"], model=model), xr.DataTree)
        assert_type(zt.extract("runs/b", model=model, layout="traces"), xr.DataTree)
        assert_type(zt.extract("runs/c", model=model, layout="table"), xr.Dataset)
        zt.extract("runs/d", layout="row")  # type: ignore[call-overload]
        zt.extract("runs/e", modell=model)  # type: ignore[call-overload]
        zt.no_such_name()  # type: ignore[attr-defined]
        zt.analysis.no_such_name()  # type: ignore[attr-defined]


def read(folder: Path) -> None:
    """Open a run, a trace and a table."""
    run = assert_type(zt.open_run(folder / "run"), xr.DataTree)
    assert_type(open_run(folder / "run"), xr.DataTree)
    ds = assert_type(zt.open_trace(folder / "run" / "whole"), xr.Dataset)
    samples = assert_type(zt.open_table(folder / "table"), xr.Dataset)
    assert {"attention", "features"} <= {*ds.data_vars}
    assert "residual" in samples
    assert_type(zt.table(run), xr.Dataset)
    assert_type(zt.span(ds, "balance"), list[int])
    assert_type(zt.summarize(folder / "run"), RunSummary)
    assert assert_type(zt.verify(folder / "run"), list[Problem]) == []
    assert_type(zt.__version__, str)


def look(folder: Path) -> None:
    """Use what ``.zt`` offers, by its classes."""
    ds, run = zt.open_trace(folder / "run" / "whole"), zt.open_run(folder / "run")
    trace = TraceAccessor(ds)
    positions = assert_type(trace.span("balance"), list[int])
    assert positions == ds.zt.span("balance") == zt.span(ds, "balance")
    assert assert_type(trace.tokens, list[str]) == ds.zt.tokens
    assert assert_type(trace.prompt, str | None) == ds.zt.prompt
    assert assert_type(RunAccessor(run).scenarios, pd.DataFrame).equals(run.zt.scenarios)
    view = RunAccessor(run).view(layer=2)
    if TYPE_CHECKING:
        assert_type(view, View | ViewWidget)
    assert isinstance(view, View), "there is no anywidget"
    assert "<iframe" in view._repr_html_()
    assert_type(zt.plot.attention(ds, layer=2, head=0), Axes)
    assert_type(zt.figures.attention_map(ds, 2), Figure)


def analyse(folder: Path) -> None:
    """Call an analysis and the index."""
    run = zt.open_run(folder / "run")
    found = assert_type(zt.analysis.attention_to(run, "balance"), xr.DataArray)
    assert found.sizes["scenario"] == len(run.children)
    assert_type(zt.index.find_feature(folder / "run", 2, 0), FeatureUse)
    try:
        zt.index.find_feature(folder / "run", 99, 0)
    except ConfigError as error:
        assert_type(error, ConfigError)
    else:
        raise AssertionError("there is no layer 99")


if __name__ == "__main__":
    stores = Path(sys.argv[1])
    read(stores)
    look(stores)
    analyse(stores)
