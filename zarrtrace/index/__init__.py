"""The index of a run or a table: which tokens drive which feature, over all scenarios."""

from zarrtrace._lazy import lazy

# Resolved on first use: looking a feature up must not import dask.
__getattr__, __dir__ = lazy(__name__, __file__)
