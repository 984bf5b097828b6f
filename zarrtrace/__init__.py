"""Attention and SAE features of every layer and token, as labelled, lazily readable Zarr.

>>> import zarrtrace as zt
>>> run = zt.open_run("runs/demo")
>>> ds = zt.open_trace("runs/demo/Desperate_10")
>>> ds.attention.isel(query=-1).sel(key=zt.span(ds, "balance"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrtrace.npz import export_npz, import_npz
    from zarrtrace.scenarios import Scenario, load_suite, span
    from zarrtrace.store import open_run, open_trace

# Resolved on first use: importing zarrtrace must stay cheap, and reading must not need torch.
_HOME = {
    "Scenario": "zarrtrace.scenarios",
    "analysis": "zarrtrace.analysis",
    "export_npz": "zarrtrace.npz",
    "extract": "zarrtrace.extraction",
    "figures": "zarrtrace.figures",
    "import_npz": "zarrtrace.npz",
    "index": "zarrtrace.index",
    "load_suite": "zarrtrace.scenarios",
    "open_run": "zarrtrace.store",
    "open_trace": "zarrtrace.store",
    "span": "zarrtrace.scenarios",
}

__all__ = [
    "Scenario",
    "export_npz",
    "import_npz",
    "load_suite",
    "open_run",
    "open_trace",
    "span",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if _HOME[name].rpartition(".")[2] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
