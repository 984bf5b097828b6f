"""Runs and traces on disk: the only package that knows Zarr."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrtrace.store.copy import copy_run
    from zarrtrace.store.index_arrays import (
        IndexableTrace,
        IndexWriter,
        RunIndex,
        indexable_traces,
        locked,
        read_features,
        read_token_texts,
        write_index_layer,
    )
    from zarrtrace.store.metadata import kind_of, read_run, read_trace, refuse_foreign
    from zarrtrace.store.open import open_run, open_trace
    from zarrtrace.store.run_writer import RunWriter
    from zarrtrace.store.staged import only_writer, wait_for_writers
    from zarrtrace.store.summary import RunSummary, TraceSummary, summarize
    from zarrtrace.store.trace_writer import TraceWriter
    from zarrtrace.store.verification import Problem, verify
    from zarrtrace.store.write import attention_problem, layer_record, trace_plan, write_trace

# Resolved on first use: a summary needs neither Zarr nor xarray, which take half a second.
_HOME = {
    "IndexWriter": "index_arrays",
    "IndexableTrace": "index_arrays",
    "Problem": "verification",
    "RunIndex": "index_arrays",
    "RunSummary": "summary",
    "RunWriter": "run_writer",
    "TraceSummary": "summary",
    "TraceWriter": "trace_writer",
    "attention_problem": "write",
    "copy_run": "copy",
    "indexable_traces": "index_arrays",
    "kind_of": "metadata",
    "layer_record": "write",
    "locked": "index_arrays",
    "only_writer": "staged",
    "open_run": "open",
    "open_trace": "open",
    "read_features": "index_arrays",
    "read_run": "metadata",
    "read_token_texts": "index_arrays",
    "read_trace": "metadata",
    "refuse_foreign": "metadata",
    "summarize": "summary",
    "trace_plan": "write",
    "verify": "verification",
    "wait_for_writers": "staged",
    "write_index_layer": "index_arrays",
    "write_trace": "write",
}

__all__ = [
    "IndexWriter",
    "IndexableTrace",
    "Problem",
    "RunIndex",
    "RunSummary",
    "RunWriter",
    "TraceSummary",
    "TraceWriter",
    "attention_problem",
    "copy_run",
    "indexable_traces",
    "kind_of",
    "layer_record",
    "locked",
    "only_writer",
    "open_run",
    "open_trace",
    "read_features",
    "read_run",
    "read_token_texts",
    "read_trace",
    "refuse_foreign",
    "summarize",
    "trace_plan",
    "verify",
    "wait_for_writers",
    "write_index_layer",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zarrtrace.store.{_HOME[name]}"), name)
