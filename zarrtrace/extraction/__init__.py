"""The main job: scenarios in, one labelled Zarr store each out."""

from zarrtrace._lazy import lazy

# Resolved on first use: processes that write need neither pandas nor scenarios, which take seconds.
__getattr__, __dir__ = lazy(__name__, __file__)
