"""Runs and traces on disk: the only package that touches Zarr."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrtrace.store.attributes import (
        TOKENS,
        kind_of,
        read_run_attributes,
        read_trace_attributes,
        refuse_foreign,
    )
    from zarrtrace.store.files import only_writer, trace_locks, wait_for_writers
    from zarrtrace.store.reader import array_of, open_run, open_trace
    from zarrtrace.store.run_index import (
        IndexableTrace,
        IndexWriter,
        RunIndex,
        indexable_traces,
        locked,
        read_features,
        read_token_texts,
        write_index_layer,
    )
    from zarrtrace.store.summary import RunSummary, TraceSummary, summarize
    from zarrtrace.store.trace_writer import TraceWriter
    from zarrtrace.store.verification import Problem, verify
    from zarrtrace.store.writer import RunWriter

# Resolved on first use: a summary needs neither Zarr nor xarray, which take half a second.
_HOME = {
    "IndexWriter": "run_index",
    "IndexableTrace": "run_index",
    "Problem": "verification",
    "RunIndex": "run_index",
    "RunSummary": "summary",
    "RunWriter": "writer",
    "TOKENS": "attributes",
    "TraceSummary": "summary",
    "TraceWriter": "trace_writer",
    "array_of": "reader",
    "indexable_traces": "run_index",
    "kind_of": "attributes",
    "only_writer": "files",
    "locked": "run_index",
    "open_run": "reader",
    "open_trace": "reader",
    "read_features": "run_index",
    "read_token_texts": "run_index",
    "read_run_attributes": "attributes",
    "read_trace_attributes": "attributes",
    "refuse_foreign": "attributes",
    "summarize": "summary",
    "trace_locks": "files",
    "verify": "verification",
    "wait_for_writers": "files",
    "write_index_layer": "run_index",
}

__all__ = [
    "TOKENS",
    "IndexWriter",
    "IndexableTrace",
    "Problem",
    "RunIndex",
    "RunSummary",
    "RunWriter",
    "TraceSummary",
    "TraceWriter",
    "array_of",
    "indexable_traces",
    "kind_of",
    "locked",
    "only_writer",
    "open_run",
    "open_trace",
    "read_features",
    "read_run_attributes",
    "read_token_texts",
    "read_trace_attributes",
    "refuse_foreign",
    "summarize",
    "trace_locks",
    "verify",
    "wait_for_writers",
    "write_index_layer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zarrtrace.store.{_HOME[name]}"), name)
