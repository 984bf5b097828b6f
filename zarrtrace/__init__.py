"""Attention and SAE features of every layer and token, as labelled, lazily readable Zarr.

>>> import zarrtrace as zt
>>> run = zt.open_run("runs/demo")
>>> ds = zt.open_trace("runs/demo/Desperate_10")
>>> ds.attention.isel(query=-1).sel(key=ds.zt.span("balance"))
"""

from zarrtrace._lazy import lazy

# Importing zarrtrace must stay cheap, and reading must not need torch.
__getattr__, __dir__ = lazy(__name__, __file__)
