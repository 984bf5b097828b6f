"""Answers from traces and runs: pure functions, xarray in and xarray out.

Each function takes a trace (:class:`xarray.Dataset`) or a run (:class:`xarray.DataTree`), stays
lazy on dask-backed data, and returns labelled results whose ``attrs`` say what was computed.
"""

from zarrtrace._lazy import lazy

# Resolved on first use: scipy and statsmodels take a second to import. No module is named like a
# function: importing it would hide the function.
__getattr__, __dir__ = lazy(__name__, __file__)
