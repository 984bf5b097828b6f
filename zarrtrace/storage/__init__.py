"""Files in folders and object stores; knows nothing of Zarr."""

from zarrtrace.storage.location import Location, at_once, locate

__all__ = ["Location", "at_once", "locate"]
