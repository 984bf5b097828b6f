"""Files in folders and object stores; knows nothing of Zarr."""

from zarrtrace.storage.location import Address, Location, locate

__all__ = ["Address", "Location", "locate"]
