"""The index of a run: which tokens drive which feature, over all scenarios."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrtrace.index.building import IndexUpdate, build_index
    from zarrtrace.index.finding import FeatureUse, TokenUse, find_feature

# Resolved on first use: looking a feature up must not import dask.
_HOME = {
    "FeatureUse": "finding",
    "IndexUpdate": "building",
    "TokenUse": "finding",
    "build_index": "building",
    "find_feature": "finding",
}

__all__ = ["FeatureUse", "IndexUpdate", "TokenUse", "build_index", "find_feature"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace.index' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zarrtrace.index.{_HOME[name]}"), name)
