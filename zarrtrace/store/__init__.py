"""Runs and traces on disk: the only package that knows Zarr."""

from zarrtrace._lazy import lazy

# Resolved on first use: a summary needs neither Zarr nor xarray, which take half a second.
__getattr__, __dir__ = lazy(__name__, __file__)
