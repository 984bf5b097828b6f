"""Figures for papers: xarray in, matplotlib out; nothing is shown, pyplot is never touched.

Each function takes a trace, or the result of an analysis, and ``ax=`` (or ``figure=`` where it
draws several axes), and returns the Axes (or the Figure). :func:`save` writes a file whose
metadata says what it shows; :func:`draw_run` draws everything there is to draw of a run.

>>> ax = attention_map(ds, 25)
>>> save(ax.figure, "layer_25.pdf", ds)
>>> save(volcano(contrast(run, "risky", "safe")).figure, "volcano.png", run)
"""

from zarrtrace._lazy import lazy

# Resolved on first use: matplotlib takes a second to import.
__getattr__, __dir__ = lazy(__name__, __file__)
