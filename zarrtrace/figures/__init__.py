"""Figures for papers: xarray in, matplotlib out; nothing is shown, pyplot is never touched.

Each function takes a trace, or the result of an analysis, and ``ax=`` (or ``figure=`` where it
draws several axes), and returns the Axes (or the Figure). :func:`save` writes a file whose
metadata says what it shows; :func:`draw_run` draws everything there is to draw of a run.

>>> ax = attention_map(ds, 25)
>>> save(ax.figure, "layer_25.pdf", ds)
>>> save(volcano(contrast(run, "risky", "safe")).figure, "volcano.png", run)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrtrace.figures.contrasts import (
        critical_chart,
        difference_heads,
        difference_map,
        volcano,
    )
    from zarrtrace.figures.drawing import metadata_of, save
    from zarrtrace.figures.features import feature_timeline, integrated_view, trajectory
    from zarrtrace.figures.flow import bands, flow_diagram, locality, pathway_strength
    from zarrtrace.figures.heatmaps import attention_heads, attention_layers, attention_map
    from zarrtrace.figures.labels import token_label
    from zarrtrace.figures.page import draw_run

# Resolved on first use: matplotlib takes a second to import.
_HOME = {
    "attention_heads": "heatmaps",
    "attention_layers": "heatmaps",
    "attention_map": "heatmaps",
    "bands": "flow",
    "critical_chart": "contrasts",
    "difference_heads": "contrasts",
    "difference_map": "contrasts",
    "draw_run": "page",
    "feature_timeline": "features",
    "flow_diagram": "flow",
    "integrated_view": "features",
    "locality": "flow",
    "metadata_of": "drawing",
    "pathway_strength": "flow",
    "save": "drawing",
    "token_label": "labels",
    "trajectory": "features",
    "volcano": "contrasts",
}

__all__ = [
    "attention_heads",
    "attention_layers",
    "attention_map",
    "bands",
    "critical_chart",
    "difference_heads",
    "difference_map",
    "draw_run",
    "feature_timeline",
    "flow_diagram",
    "integrated_view",
    "locality",
    "metadata_of",
    "pathway_strength",
    "save",
    "token_label",
    "trajectory",
    "volcano",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace.figures' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zarrtrace.figures.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
