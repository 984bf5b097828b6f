"""Answers from traces and runs: pure functions, xarray in and xarray out.

Each function takes a trace (:class:`xarray.Dataset`) or a run (:class:`xarray.DataTree`), stays
lazy on dask-backed data, and returns labelled results whose ``attrs`` say what was computed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrtrace.analysis.attention import (
        attention_locality,
        attention_to,
        head_roles,
    )
    from zarrtrace.analysis.bands import layer_bands
    from zarrtrace.analysis.contrasts import contrast
    from zarrtrace.analysis.critical import critical_layers
    from zarrtrace.analysis.crossreferences import crossreference
    from zarrtrace.analysis.decisions import decision, relate
    from zarrtrace.analysis.features import feature_trajectory, of_sae, pathway_features
    from zarrtrace.analysis.flow import attention_flow, attention_rollout
    from zarrtrace.analysis.specificity import position_specific_features
    from zarrtrace.analysis.words import read_table, word_associations

# Resolved on first use: scipy and statsmodels take a second to import. No module is named like a
# function: importing it would hide the function.
_HOME = {
    "attention_flow": "flow",
    "attention_locality": "attention",
    "attention_rollout": "flow",
    "attention_to": "attention",
    "contrast": "contrasts",
    "critical_layers": "critical",
    "crossreference": "crossreferences",
    "decision": "decisions",
    "feature_trajectory": "features",
    "head_roles": "attention",
    "layer_bands": "bands",
    "of_sae": "features",
    "pathway_features": "features",
    "position_specific_features": "specificity",
    "read_table": "words",
    "relate": "decisions",
    "word_associations": "words",
}

__all__ = [
    "attention_flow",
    "attention_locality",
    "attention_rollout",
    "attention_to",
    "contrast",
    "critical_layers",
    "crossreference",
    "decision",
    "feature_trajectory",
    "head_roles",
    "layer_bands",
    "of_sae",
    "pathway_features",
    "position_specific_features",
    "read_table",
    "relate",
    "word_associations",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace.analysis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zarrtrace.analysis.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
