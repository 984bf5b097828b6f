"""Figures for papers: xarray in, Matplotlib's Figure out; pyplot is never touched.

Each function takes a trace, or the result of an analysis, and ``ax=`` (or ``figure=`` where it
draws several axes). Jupyter shows the returned Figure where it is the last value of a cell.
:func:`save` writes a file whose metadata says what it shows; :func:`draw_run` draws every figure
that a run allows.

>>> figure = attention_map(ds, 25)
>>> save(figure, "layer_25.pdf", ds)
>>> save(volcano(contrast(run, "risky", "safe")), "volcano.png", run)
"""

from zarrtrace._lazy import lazy

# Resolved on first use: matplotlib takes a second to import.
__getattr__, __dir__ = lazy(__name__, __file__)
