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
    from zarrtrace.store.reader import array_of, check_sizes, open_run, open_trace
    from zarrtrace.store.summary import RunSummary, TraceSummary, summarize
    from zarrtrace.store.trace_writer import TraceWriter
    from zarrtrace.store.verification import Problem, verify
    from zarrtrace.store.writer import RunWriter

# Resolved on first use: a summary needs neither Zarr nor xarray, which take half a second.
_HOME = {
    "Problem": "verification",
    "RunSummary": "summary",
    "RunWriter": "writer",
    "TOKENS": "attributes",
    "TraceSummary": "summary",
    "TraceWriter": "trace_writer",
    "array_of": "reader",
    "check_sizes": "reader",
    "kind_of": "attributes",
    "only_writer": "files",
    "open_run": "reader",
    "open_trace": "reader",
    "read_run_attributes": "attributes",
    "read_trace_attributes": "attributes",
    "refuse_foreign": "attributes",
    "summarize": "summary",
    "trace_locks": "files",
    "verify": "verification",
    "wait_for_writers": "files",
}

__all__ = [
    "TOKENS",
    "Problem",
    "RunSummary",
    "RunWriter",
    "TraceSummary",
    "TraceWriter",
    "array_of",
    "check_sizes",
    "kind_of",
    "only_writer",
    "open_run",
    "open_trace",
    "read_run_attributes",
    "read_trace_attributes",
    "refuse_foreign",
    "summarize",
    "trace_locks",
    "verify",
    "wait_for_writers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zarrtrace.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zarrtrace.store.{_HOME[name]}"), name)
